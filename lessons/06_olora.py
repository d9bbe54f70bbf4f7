# %% [markdown]
# # Choose where LoRA starts
#
# Plain LoRA starts with *B* = 0: it changes nothing, and it knows nothing of the weight beside it. OLoRA and PiSSA
# start from that weight itself, and are said to learn faster. **Do they? And what do you pay for a start that has to
# move the base out of the way?**
#
# | | |
# |---|---|
# | **What you'll do** | build OLoRA's start with one QR decomposition and hold it to PEFT's; race five starts and two other levers over learning rates and seeds; train one, convert it, share it; break a dozen things |
# | **What you'll learn** | what a start changes and what it leaves alone; how to compare starts fairly; what a mutated base means, and the check that finds one; how to save such an adapter so that others can use it |
# | **What you'll need** | [lesson 2](02_lora_from_scratch.ipynb) for *A*, *B* and the scaling, [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import math
import shutil
import textwrap
import warnings

from adapter_checks.bitsandbytes_workarounds import stop_repacking
from course_utils import data, evaluation, paths, plotting, runtime, sweeps, validation
from course_utils.exercises import lesson06, progress
from course_utils.sweeps import over_seeds, spread

runtime.quiet_imports()

import peft
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from course_utils.progress import Progress

runtime.seed_everything(0)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · trl {trl.__version__} · on {device}"
)

# %% [markdown]
# ## Take a weight apart
#
# Every matrix is *W = QR*: the columns of *Q* are **orthonormal** (of length 1, at right angles), and *R* is upper
# triangular. OLoRA ([Büyükakyüz 2024](https://arxiv.org/abs/2406.01775)) takes the first *r* directions of that as
# its start, and so that nothing changes at step 0, it takes their product out of the weight:
#
# > *B = Q[:, :r]*, *A = R[:r]*, *W ← W − s·BA*
#
# We do it on one layer, in float64 and with α = r, so s = 1.
#
# **Predict:** the layer's output with the adapter, at step 0: by how much does it differ? And without the adapter?

# %%
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)


def load_base(**options):
    """A fresh copy of the base model."""
    options = {"dtype": runtime.dtype(), **options}
    return AutoModelForCausalLM.from_pretrained(base_folder, **options).to(device).eval()


base_model = load_base()
LAYER = "model.layers.0.self_attn.q_proj"
W = base_model.get_submodule(LAYER).weight.detach().cpu().double()  # (outputs, inputs)
rank = 8
Q, R = torch.linalg.qr(W)
B, A = Q[:, :rank], R[:rank]
left = W - B @ A

x = torch.randn(5, W.shape[1], dtype=torch.float64)
with_adapter = (x @ left.T + (x @ A.T) @ B.T - x @ W.T).abs().max()
without = (x @ left.T - x @ W.T).abs().max()
off = (B.T @ B - torch.eye(rank)).abs().max()
print(f"BᵀB differs from I by {off:.0e}")
print(f"output at step 0 differs by {with_adapter:.0e} with the adapter, by {without:.1f} without")
assert off < 1e-10 and with_adapter < 1e-10 and without > 0.1

# %% [markdown]
# Nothing has changed as long as the adapter is there. **The base has moved, and the adapter holds what it lacks.**
#
# Which eight directions are these? Look at the upper left corner of each.

# %%
title = "OLoRA takes out the first 8 columns whole, and a little of the others"
corner = (slice(48), slice(48))
parts = {"W": W, "B A": B @ A, "W − B A": left}
figure = plotting.weight_picture({name: part[corner] for name, part in parts.items()}, title)
plotting.show(
    figure,
    f"{title}. The upper left corners of three matrices, 48 × 48. W is a fine "
    "grain. In BA the first eight columns are those of W, the rest is faint. "
    "In W − BA those eight are empty.",
)
print(
    f"largest number in the first {rank} columns of W: {W[:, :rank].abs().max():.2f},"
    f" of what is left: {left[:, :rank].abs().max():.0e}"
)

# %% [markdown]
# QR goes through the columns from left to right, and a column is what *one input* writes. So OLoRA's directions are
# those of the first eight inputs: not the most important ones, and others if the inputs were numbered otherwise.
# **PiSSA** ([Meng et al. 2024](https://arxiv.org/abs/2404.02948)) takes the largest singular directions instead.
#
# How much of a weight is that? Measured as a share of ‖W‖², for eight directions out of all.
#
# **Predict:** OLoRA beside PiSSA, beside eight random directions?


# %%
def share(weight, directions):
    """The share of the weight's squared numbers that lies in these orthonormal columns."""
    return ((directions.T @ weight).square().sum() / weight.square().sum()).item()


layers = [
    name
    for name, module in base_model.named_modules()
    if isinstance(module, torch.nn.Linear) and "layers." in name
]
shares = {"random": [], "OLoRA": [], "PiSSA": []}
for name in layers:
    weight = base_model.get_submodule(name).weight.detach().cpu().float()
    U, _, _ = torch.linalg.svd(weight, full_matrices=False)
    chosen = {
        "random": torch.linalg.qr(torch.randn(len(weight), rank)).Q,
        "OLoRA": torch.linalg.qr(weight).Q[:, :rank],
        "PiSSA": U[:, :rank],
    }
    for start, directions in chosen.items():
        shares[start].append(share(weight, directions))
mean_share = {start: sum(found) / len(found) for start, found in shares.items()}
plotting.table(
    [f"{rank} directions", f"share of ‖W‖², mean of {len(layers)} layers"],
    [[start, f"{mean:.1%}"] for start, mean in mean_share.items()],
)
evaluation.band("OLoRA's share", mean_share["OLoRA"], 0.05, 0.07)
evaluation.band("PiSSA's share", mean_share["PiSSA"], 0.10, 0.14)

# %% [markdown]
# OLoRA's directions hold about twice as much as random ones: their own eight columns whole, and a chance share of the
# rest. PiSSA's hold twice that again. **Orthonormal directions are not yet important ones.**

# %% [markdown]
# ## Hold it to the library
#
# In PEFT all of this is one word: `init_lora_weights="olora"`.
#
# **Predict:** the same *A* and *B* as ours? And in how many of the base's 28 layers has the weight changed?


# %%
def lora_config(start=True, **changes):
    """New each time: PEFT writes the layers' names into it."""
    settings = dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return LoraConfig(init_lora_weights=start, **settings | changes)


witness = tokenizer(
    ["Fenna keeps the lantern at Greyham.", "Edan and Marta"], return_tensors="pt", padding=True
).to(device)


def logits(model):
    with torch.no_grad():
        return model(**witness).logits.float()


def apart(one, other):
    """The largest difference of two sets of logits, in words."""
    largest = (one - other).abs().max().item()
    return f"{largest:.0e}" if 0 < largest < 0.01 else f"{largest:.2g}"


# %%
untrained = get_peft_model(load_base(), lora_config("olora")).eval()
layer = untrained.get_submodule(f"base_model.model.{LAYER}")
theirs = [getattr(layer, part)["default"].weight.detach().cpu() for part in ("lora_A", "lora_B")]
differences = [(ours - its).abs().max().item() for ours, its in zip((A, B), theirs)]
print(f"A and B differ from ours by at most {max(differences):.0e}")
step_0 = apart(logits(untrained), logits(base_model))
largest = logits(base_model).abs().max()
print(f"logits at step 0 differ from the base's by {step_0}, and the largest is {largest:.0f}")
assert not paths.is_shipped_base() or float(step_0) < 1e-4
print(validation.check_adapters(untrained, original_base=base_model))

# %% [markdown]
# The output at step 0 is the base's, up to rounding in float32, and every adapted weight has moved: both are proven,
# and the check names the start that is missing.
#
# ### Alpha means one thing more
#
# PEFT takes out *s·BA*, and with α = 16 and r = 8 that is **twice** the part of *W* that lies in *B*.
#
# **Predict:** is what is left then smaller than *W*?

# %%
rows = []
for scaling in (0.5, 1, 2, 4):
    now = W - scaling * (B @ A)
    inside = (B.T @ now).norm() / (B.T @ W).norm()
    rows.append([scaling, f"{inside:.2f}", f"{now.norm() / W.norm():.3f}"])
plotting.table(["s = α/r", "what is left of W in B's directions", "‖W − s·BA‖ / ‖W‖"], rows)

# %% [markdown]
# At s = 1 these directions are empty. At s = 2 they are **mirrored**: *W* − 2·QQᵀ*W* has the size of *W*, and points
# the other way. PiSSA divides its start by *s* and so takes out the same whatever alpha is. **With OLoRA, alpha says
# how far the base is moved, as well as how fast the adapter learns.**

# %% [markdown]
# ### Exercise: start as OLoRA does (core, 15 min)
#
# Write the start for any float weight (outputs, inputs), any rank up to its smaller side, and any alpha. Return *A*,
# *B* and the new weight, and leave the weight that you were given as it is. Expected for `W`, 8 and 16: `A` (8, 256),
# `B` (256, 8), and `new + 2 * B @ A` equal to `W`.
#
# <details><summary>The check says that it doesn't add up</summary>
# The layer computes <code>new @ x + s * B @ A @ x</code> with <code>s = alpha / rank</code>.
# </details>
# <details><summary>My shapes are wrong for a weight that isn't square</summary>
# <code>torch.linalg.qr</code> gives Q (outputs, k) and R (k, inputs), with k the smaller side. Rows of R, columns of Q.
# </details>


# %% exercise="06.olora" points=4
def olora_start(weight, rank, alpha):
    """Return A (rank, inputs), B (outputs, rank) and the weight that is left."""
    ### BEGIN SOLUTION
    Q, R = torch.linalg.qr(weight)
    A, B = R[:rank], Q[:, :rank]
    return A, B, weight - alpha / rank * B @ A
    ### END SOLUTION


lesson06.olora(olora_start)

# %%
### BEGIN HIDDEN TESTS
assert lesson06.olora.outcome(olora_start).passed
_weight = torch.randn(7, 11, dtype=torch.float64)
_A, _B, _left = olora_start(_weight, 3, 4)
assert torch.allclose(_B.T @ _B, torch.eye(3, dtype=torch.float64))
assert torch.allclose((_B @ _A)[:, :3], _weight[:, :3])
assert torch.allclose(_left + 4 / 3 * _B @ _A, _weight)
### END HIDDEN TESTS

# %% [markdown]
# ## Five starts at step 0
#
# | `init_lora_weights` | *A* | *B* |
# |---|---|---|
# | `True`, the default | uniform, small | zero |
# | `"gaussian"` | normal, of size 1/r | zero |
# | `"orthogonal"` | random | random, *at right angles to A*, so that *BA* = 0 |
# | `"pissa"` | largest singular directions of *W* | the same |
# | `"olora"` | *R[:r]* of *W = QR* | *Q[:, :r]* |
#
# **Predict:** which of them leave the base alone? For which does *A* get a gradient in the very first step?


# %%
def encode(rows):
    """A padded batch of conversations, with the loss on all that is said."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    batch = tokenizer.apply_chat_template(
        texts, padding=True, return_tensors="pt", return_dict=True
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {key: value.to(device) for key, value in {**batch, "labels": labels}.items()}


def norm(tensors):
    """The length of all these numbers taken as one vector."""
    return math.sqrt(sum(tensor.float().square().sum().item() for tensor in tensors))


train_rows = data.load_task("sailor", "train")
batch = encode(list(train_rows.select(range(16))))
originals = [base_model.get_submodule(name).weight for name in layers]


# %%
def at_step_0(start):
    """What this start has done before any training: a row of the table."""
    runtime.seed_everything(0)
    model = get_peft_model(load_base(), lora_config(start))
    tuned = [model.get_submodule(f"base_model.model.{name}") for name in layers]
    products = [layer.get_delta_weight("default") for layer in tuned]
    moves = [layer.base_layer.weight - weight for layer, weight in zip(tuned, originals)]
    model(**batch).loss.backward()
    gradients = [
        norm([getattr(layer, part)["default"].weight.grad for layer in tuned])
        for part in ("lora_A", "lora_B")
    ]
    numbers = torch.cat([layer.lora_A["default"].weight.detach().flatten() for layer in tuned])
    return [
        *(f"{norm(change) / norm(originals):.0%}" for change in (products, moves)),
        apart(logits(model), logits(base_model)),
        f"{numbers.square().mean() ** 0.5:.3f}",
        *(f"{size:.2g}" for size in gradients),
    ]


STARTS = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "PiSSA": "pissa",
    "OLoRA": "olora",
}
plotting.table(
    [
        "start",
        "size of s·BA, of W",
        "base moved by",
        "logits differ by",
        "numbers of A (rms)",
        "gradient of A",
        "gradient of B",
    ],
    [[name, *at_step_0(start)] for name, start in STARTS.items()],
)

# %% [markdown]
# All five compute the base's output. Three leave the base alone. With *B* = 0, *A* stands still in the first step. And
# look at the numbers of *A*. Adam moves each number of *B* by about the learning rate, whatever its gradient, and so
# *BA* by that times *A*: **the larger *A*, the larger the first steps**. A head start can come from there, too.

# %% [markdown]
# ### Exercise: a start that says nothing (stretch, 20 min)
#
# How can *BA* be 0 when neither is? Write such a start for an even rank: return *A* (rank, inputs) and *B* (outputs,
# rank), random, both different from 0, with *BA* = 0. Each uses half of the *r* directions between them, and no
# single row of *A* or column of *B* is zero.
#
# <details><summary>I have no idea how to begin</summary>
# <em>A</em> writes <em>r</em> numbers, <em>B</em> reads them. Let A write into one half of the directions of that
# r-dimensional space and B read from the other. A random orthogonal matrix (r, r) gives such directions:
# <code>torch.linalg.qr(torch.randn(rank, rank))[0]</code>.
# </details>
# <details><summary>BA is small, but not zero</summary>
# Rows of one orthogonal matrix are at right angles. Rows of two different ones are not.
# </details>


# %% exercise="06.quiet" points=4
def quiet_start(inputs, outputs, rank):
    """Return A (rank, inputs) and B (outputs, rank), neither zero, with BA = 0."""
    ### BEGIN SOLUTION
    directions = torch.linalg.qr(torch.randn(rank, rank))[0]
    half = rank // 2
    A = directions[:half].T @ torch.randn(half, inputs)
    B = torch.randn(outputs, half) @ directions[half:]
    return A, B
    ### END SOLUTION


lesson06.quiet(quiet_start)

# %%
### BEGIN HIDDEN TESTS
assert lesson06.quiet.outcome(quiet_start).passed
_A, _B = quiet_start(13, 5, 8)
assert _A.shape == (8, 13) and _B.shape == (5, 8) and (_B @ _A).abs().max() < 1e-4
assert _A.norm() > 0.1 and _B.norm() > 0.1
### END HIDDEN TESTS

# %% [markdown]
# ## The race
#
# OLoRA's paper reports faster convergence and better scores on models of 1 to 7 billion parameters. A comparison by
# others, with a rival start of their own, finds no reliable better finish: the EVA paper ([Paischer et al.
# 2024](https://arxiv.org/abs/2410.07170)) has 89.2 for LoRA and 89.4 for OLoRA on Llama-3.1-8B, 92.2 and 91.8 on
# Gemma-2-9B.
#
# So measure it. The sweep trains on `sailor` for 100 steps of 16 rows: five starts, and two other levers, rsLoRA and
# DoRA, each at five learning rates with three seeds. And a control: OLoRA with **random** orthonormal columns for *B*,
# and all else alike. Rates are chosen on the validation rows, scores read on the test rows. (Don't compare the two:
# validation rows speak of any word, test rows of the course's own world.)
#
# **Predict:** with one learning rate for all of them, which start looks best?

# %%
raced = data.load_results("starts")
NAMES = {
    "default": "default",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "random": "random directions",
    "rslora": "rsLoRA",
    "dora": "DoRA",
}
rates = sorted({row["learning_rate"] for row in raced})
validated = over_seeds(raced, "validation", "method", "learning_rate")
means = [[validated[method, rate][0] for rate in rates] for method in NAMES]
title = "Which start looks best depends on the learning rate"
figure = plotting.score_matrix(means, list(NAMES.values()), [f"{rate:g}" for rate in rates], title)
figure.axes[0].set_xlabel("learning rate")
plotting.show(
    figure,
    f"{title}. Right on validation rows, mean of three seeds: "
    + "; ".join(
        f"{name}: " + ", ".join(f"{score:.0%} at {rate:g}" for rate, score in zip(rates, line))
        for name, line in zip(NAMES.values(), means)
    ),
)

# %% tags=["claim"]
from course_utils import data
from tools.claims import swept

score = {
    key: found[0] for key, found in swept("starts", "validation", "method", "learning_rate").items()
}
rates = sorted({rate for _, rate in score})
methods = list(dict.fromkeys(method for method, _ in score))
best = {method: max(rates, key=lambda rate: score[method, rate]) for method in methods}
starts = [score[method, 1.5e-2] for method in methods if method not in ("dora", "rslora")]
assert score["olora", 1.5e-3] == max(score[method, 1.5e-3] for method in methods), "leads with"
assert score["olora", 1.5e-2] == min(starts), "the last of the starts"
assert score["gaussian", 1.5e-2] == max(starts), "the first"
assert best["default"] != best["olora"], "how well that rate suits each"

# %% [markdown]
# With 1.5e-3 for all, OLoRA leads with {{score["olora", 1.5e-3]:.0%}}, and the default has {{score["default", 1.5e-3]:.0%}}. With 1.5e-2 for all, `gaussian` is the first with {{score["gaussian", 1.5e-2]:.0%}}, the
# default has {{score["default", 1.5e-2]:.0%}}, and OLoRA is the last of the starts with {{score["olora", 1.5e-2]:.0%}}. **A comparison at one rate compares how well
# that rate suits each.**
#
# So each gets its own best rate, and OLoRA's run is done live, with seed 0: 100 steps of the sweep, in the open. What
# it starts with is saved **before** training; you'll need it when you share the adapter.

# %%
best = {method: max(rates, key=lambda rate: validated[method, rate][0]) for method in NAMES}
folder = paths.runs_dir() / "lesson06"
initial, plain = folder / "olora_initial", folder / "olora_trained"
shutil.rmtree(folder, ignore_errors=True)


def make_trainer(learning_rate, steps=100):
    """SFTTrainer with OLoRA on `sailor`, as in the sweep."""
    settings = SFTConfig(
        output_dir=str(folder / "trainer"),
        seed=0,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        warmup_steps=10,
        lr_scheduler_type="linear",
        max_length=256,
        logging_steps=5,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    trainer = SFTTrainer(
        model=load_base(),
        args=settings,
        peft_config=lora_config("olora"),
        train_dataset=train_rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    return Progress().attach(trainer)


trainer = make_trainer(best["olora"])
trainer.model.save_pretrained(initial)
trainer.train()
model = trainer.model.eval()  # the trained OLoRA, to the end of this lesson
live = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
print(
    f"OLoRA at {best['olora']:g}: loss {live[5]:.2f} in the first steps,"
    f" {live[100]:.3f} in the last"
)

# %%
steps = list(live)
at_best = {
    method: [
        row for row in raced if row["method"] == method and row["learning_rate"] == best[method]
    ]
    for method in NAMES
}


def curve(method):
    """{step: (mean, lowest, highest)} of the loss over the seeds."""
    columns = {step: [row[f"loss_{step}"] for row in at_best[method]] for step in steps}
    return {
        step: (sum(values) / len(values), min(values), max(values))
        for step, values in columns.items()
    }


drawn = ("default", "olora", "pissa", "random")
title = "Each at its best rate: OLoRA leads up to step 50,\nthen random directions have caught up"
figure, alt = sweeps.curves(
    {NAMES[method]: curve(method) for method in drawn},
    title,
    "step",
    "training loss (nats a token)",
    log_y=True,
)
figure.axes[0].plot(steps, list(live.values()), "kx", markersize=5)
plotting.show(
    figure, f"{alt} Crosses: the live run of OLoRA, {live[5]:.2f} at 5 to {live[100]:.3f} at 100."
)

# %% [markdown]
# The crosses are the live run; bands go from the lowest to the highest seed.
#
# ### Exercise: when was the loss down? (warm-up, 5 min)
#
# A head start is best told in steps. From a curve, a dict from step to loss in any order, return the first step whose
# loss is at or below a level, or `None` if it never is. Expected for `{5: 4.0, 10: 0.9, 15: 0.5}` and 1.0: 10.
#
# <details><summary>The check speaks of the order of the dict</summary>
# <code>for step in sorted(losses)</code> goes up through the steps.
# </details>


# %% exercise="06.reach" points=2
def steps_to(losses, level):
    """Return the first step with a loss of at most `level`, or None."""
    ### BEGIN SOLUTION
    return next((step for step in sorted(losses) if losses[step] <= level), None)
    ### END SOLUTION


lesson06.reach(steps_to)

# %%
### BEGIN HIDDEN TESTS
assert lesson06.reach.outcome(steps_to).passed
assert steps_to({30: 0.1, 10: 0.6, 20: 0.3}, 0.3) == 20
assert steps_to({30: 0.1, 10: 0.6}, 0.05) is None
### END HIDDEN TESTS

# %% [markdown]
# Now the whole field, each at its best rate.
#
# **Predict:** does the fastest start also end best?


# %%
def reached(row, level):
    """The step at which this run's loss was first down at `level`; after the last one if never."""
    return next((step for step in steps if row[f"loss_{step}"] <= level), steps[-1] + 5)


def over(rows, measured, form):
    values = [measured(row) for row in rows]
    return spread((sum(values) / len(values), min(values), max(values)), form)


finish = over_seeds(raced, "test", "method", "learning_rate")
plotting.table(
    ["", "best rate", "steps to a loss of 1", "steps to 0.1", "validation loss", "right (test)"],
    [
        [
            name,
            f"{best[method]:g}",
            *(
                over(at_best[method], lambda row, level=level: reached(row, level), ".0f")
                for level in (1, 0.1)
            ),
            over(at_best[method], lambda row: row["validation_loss"], ".3f"),
            spread(finish[method, best[method]]),
        ]
        for method, name in NAMES.items()
    ],
)

# %% tags=["claim"]
import torch
from safetensors.torch import load_file

from course_utils import paths

steps = range(5, 101, 5)


def mean(values):
    return sum(values) / len(values)


def at_best(column):
    """{method: [the column by seed]} at the rate that is best for it."""
    rows = data.load_results("starts")
    return {
        method: [
            row[column] for row in rows if (row["method"], row["learning_rate"]) == (method, rate)
        ]
        for method, rate in best.items()
    }


def steps_to(level):
    """{method: [the first step by seed whose loss is at or below the level, or 105]}."""
    losses = {step: at_best(f"loss_{step}") for step in steps}
    return {
        method: [
            next((step for step in steps if losses[step][method][seed] <= level), 105)
            for seed in range(3)
        ]
        for method in methods
    }


to_1, to_tenth = steps_to(1), steps_to(0.1)
needs = {method: round(mean(by_seed)) for method, by_seed in to_tenth.items()}
test, final_loss = at_best("test"), at_best("validation_loss")
by_step = {
    step: {method: mean(by_seed) for method, by_seed in at_best(f"loss_{step}").items()}
    for step in steps
}
all_to_1 = [step for by_seed in to_1.values() for step in by_seed]
lesson_3 = swept("learning_rate", "test", "method", "learning_rate")["lora", 1.5e-2]
below = {method for method in methods if max(test[method]) < min(test["olora"])}


def overlap(one, other):
    return min(one) <= max(other) and min(other) <= max(one)


weights = [
    weight.float()
    for name, weight in load_file(f"{paths.base_model()}/model.safetensors").items()
    if "layers." in name and weight.ndim == 2
]
torch.manual_seed(0)
A_of = {
    "olora": [torch.linalg.qr(weight).R[:8] for weight in weights],
    "random": [torch.linalg.qr(torch.randn(len(weight), 8)).Q.T @ weight for weight in weights],
}
size = {
    start: torch.cat([A.flatten() for A in drawn]).square().mean().item() ** 0.5
    for start, drawn in A_of.items()
}
for step in range(20, 51, 5):
    loss = by_step[step]
    assert min(loss[method] for method in methods if method != "olora") > loss["olora"], (
        "There is a head start"
    )
for step in range(55, 101, 5):
    loss = by_step[step]
    assert abs(loss["random"] / loss["olora"] - 1) < 0.2, "within a fifth of"
assert max(to_tenth["olora"] + to_tenth["random"]) < min(to_tenth["default"]), "needs only"
assert 0 < needs["default"] - needs["pissa"] <= 5, "hardly fewer"
assert abs(needs["random"] - needs["olora"]) < 5, "The directions have little part in it"
assert min(size.values()) > 1.5 / 8, "the largest *A*"
assert all(
    needs["random"] < needs[method] < needs["default"]
    and overlap(to_tenth[method], to_tenth["default"])
    for method in ("gaussian", "orthogonal", "pissa")
), "their seeds overlap"
assert mean(test["olora"]) == max(map(mean, test.values())), "ends best"
assert overlap(test["olora"], test["random"]) and overlap(test["olora"], test["default"]), (
    "overlap with its own"
)
assert below == {"pissa", "rslora", "dora"}, "Only PiSSA's, rsLoRA's and DoRA's"
assert lesson_3[1] > mean(test["olora"]) + 0.03, "more than any of these"
assert all(by_step[step]["pissa"] < by_step[step]["default"] for step in range(5, 86, 5)), (
    "up to step 85"
)
assert min(methods, key=lambda method: mean(test[method])) == "pissa", "ends last"
assert rates.index(best["rslora"]) == rates.index(best["default"]) - 1, "a step lower"
assert all(
    overlap(measured["dora"], measured["default"]) for measured in (to_tenth, final_loss, test)
), "in steps, loss and score its seeds overlap"

# %% [markdown]
# Means over three seeds, with the lowest and the highest where they differ. Losses are means over five steps, and rates
# lie half a power of ten apart, so both are known to within that.
#
# - **There is a head start, and it comes late.** A loss of 1 is reached by all within {{min(all_to_1)}} to {{max(all_to_1)}} steps. To 0.1 the
#   default needs {{needs["default"]}}; OLoRA needs only {{needs["olora"]}}, and PiSSA {{needs["pissa"]}}, hardly fewer than the default.
# - **The directions have little part in it.** With *random* ones it is {{needs["random"]}} steps, and from step 55 on their loss is
#   within a fifth of OLoRA's. What these two share is the largest *A*: its numbers are {{size["olora"]:.2f}} and {{size["random"]:.2f}} (rms). `gaussian`,
#   `orthogonal` and PiSSA have a larger *A* than the default, too, and lie between with {{needs["gaussian"]}}, {{needs["orthogonal"]}} and {{needs["pissa"]}} steps. But
#   their seeds overlap with the default's, so this is a hint and no proof.
# - **OLoRA also ends best here**: {{mean(test["olora"]):.0%}}, random directions {{mean(test["random"]):.0%}}, the default {{mean(test["default"]):.0%}}. But the seeds of the last two
#   overlap with its own. Only PiSSA's, rsLoRA's and DoRA's lie wholly below. And this is the finish of a *short* run:
#   lesson 3's default start came to {{lesson_3[0]:.0%}} in 120 steps of 32 rows, more than any of these.
# - Early speed is no promise: up to step 85 PiSSA's loss is below the default's, and on the test rows it ends last,
#   with {{mean(test["pissa"]):.0%}}.
# - rsLoRA has a scaling of 16/√8 = 5.7 in the place of 2, and acts like a higher rate: its best one is a step lower.
#   DoRA goes the default's way: in steps, loss and score its seeds overlap with the default's.

# %% [markdown]
# ## Is it more stable?
#
# OLoRA is also said to train more stably, by [PEFT's
# guide](https://huggingface.co/docs/peft/main/en/developer_guides/lora#initialization) for one. That can mean two
# things that can be measured: seeds that agree, and a wide range of learning rates that work.
#
# **Predict:** which method has the most rates at which at least 70% of the answers are right?


# %%
def width(method, mark=0.7):
    """The learning rates whose mean score is at least `mark`."""
    return [rate for rate in rates if validated[method, rate][0] >= mark]


plotting.table(
    [
        "",
        "rates with 70% right",
        "test score at the best rate: highest less lowest seed",
        "mean over all five rates",
    ],
    [
        [
            name,
            ", ".join(f"{rate:g}" for rate in width(method)) or "none",
            f"{finish[method, best[method]][2] - finish[method, best[method]][1]:.1%}",
            f"{sum(validated[method, rate][0] for rate in rates) / len(rates):.0%}",
        ]
        for method, name in NAMES.items()
    ],
)

# %% tags=["claim"]
works = {
    mark: [sum(score[method, rate] >= mark for rate in rates) for method in ("olora", "default")]
    for mark in (0.6, 0.7, 0.8)
}
apart = {
    method: round(100 * (max(test[method]) - min(test[method])))
    for method in ("olora", "default", "dora")
}
range_of = {method: [rate for rate in rates if score[method, rate] >= 0.7] for method in methods}
lowest = {method: min(found) for method, found in range_of.items()}
assert works[0.7] == [3, 1], "three rates, and the default one"
assert works[0.6] == [3, 2], "three against two"
assert works[0.8] == [2, 0], "two against none"
assert [method for method in methods if lowest[method] < 5e-3] == ["olora"], "at its lower end"
assert {max(found) for found in range_of.values()} == {1.5e-2}, "but only at"
assert max(score[method, 5e-2] for method in methods) == 0, "all of them have 0%"
assert apart == {"olora": 5, "default": 7, "dora": 1}, (
    "5 points apart, the default's 7 and DoRA's one"
)

# %% [markdown]
# At the mark of 70% OLoRA has three rates, and the default one; at 60% it is three against two, at 80% two against
# none. **OLoRA's range is wider, but only at its lower end.** There 100 steps are too few for the others, so this is
# the head start once more. At the upper end, where runs break, it is no more stable: at 1.5e-2 OLoRA is the last of the
# starts, and at 5e-2 all of them have 0%. Nor do its seeds tell: they are 5 points apart, the default's 7 and DoRA's
# one. All this on one task, and with rates half a power of ten apart.

# %% [markdown]
# ## Does the rank matter?
#
# At a high rank a start from the weight holds much of it, at rank 1 one direction. The sweep repeats the race at
# other ranks, each method at the rate that was best for it at rank 8, with alpha at 16.
#
# **Predict:** does the head start grow or shrink with the rank?

# %%
by_rank = data.load_results("starts_rank")
three = ("default", "olora", "pissa")
by_rank += [{**row, "rank": 8} for method in three for row in at_best[method]]
SEEN_AT = 30
early = over_seeds(by_rank, f"loss_{SEEN_AT}", "method", "rank")
ranks = sorted({row["rank"] for row in by_rank})
title = f"Around step {SEEN_AT} OLoRA and PiSSA are ahead from rank 4 on"
figure, alt = sweeps.curves(
    {NAMES[method]: {rank: early[method, rank] for rank in ranks} for method in three},
    title,
    "rank",
    "training loss (nats a token)",
    log=2,
)
plotting.show(figure, alt)
at_rank = {
    (method, rank): [row for row in by_rank if (row["method"], row["rank"]) == (method, rank)]
    for method in three
    for rank in ranks
}
plotting.table(
    ["steps to 0.1 (105: not within 100)", *(f"rank {rank}" for rank in ranks)],
    [
        [
            NAMES[method],
            *(over(at_rank[method, rank], lambda row: reached(row, 0.1), ".0f") for rank in ranks),
        ]
        for method in three
    ],
)

# %% tags=["claim"]
early = {key: found[0] for key, found in swept("starts_rank", "loss_30", "method", "rank").items()}
early |= {(method, 8): by_step[30][method] for method in ("default", "olora", "pissa")}
to_tenth_by_rank = {(method, 8): by_seed for method, by_seed in to_tenth.items()}
for row in data.load_results("starts_rank"):
    first = next((step for step in steps if row[f"loss_{step}"] <= 0.1), 105)
    to_tenth_by_rank.setdefault((row["method"], row["rank"]), []).append(first)
needs_at = {key: mean(by_seed) for key, by_seed in to_tenth_by_rank.items()}
saved = {
    method: {
        rank: round(needs_at["default", rank] - needs_at[method, rank])
        for rank in (1, 4, 8, 16, 64)
    }
    for method in ("olora", "pissa")
}
lead = {
    method: [early["default", rank] - early[method, rank] for rank in (4, 8, 16, 64)]
    for method in ("olora", "pissa")
}
assert max(saved[method][1] for method in saved) < 0, "At rank 1 there is no head start"
assert min(min(leads) for leads in lead.values()) > 0, "From rank 4 on"
assert list(saved["pissa"].values()) == sorted(set(saved["pissa"].values())), "PiSSA's grows"
assert min(saved["olora"][rank] for rank in (8, 16, 64)) > 10 > saved["olora"][4], "from rank 8 on"
assert needs_at["olora", 64] == needs_at["pissa", 64], "equally fast"
assert lead["pissa"] == sorted(lead["pissa"]), "PiSSA's lead grows"
assert lead["olora"][1:] == sorted(lead["olora"][1:], reverse=True), (
    "OLoRA's shrinks from rank 8 on"
)

# %% [markdown]
# At rank 1 there is no head start: to a loss of 0.1 OLoRA and PiSSA need about {{needs_at["olora", 1]:.0f}} steps and {{needs_at["pissa", 1]:.0f}}, the default {{needs_at["default", 1]:.0f}}. From
# rank 4 on both are ahead around step 30. In steps PiSSA's grows with the rank: it saves {{saved["pissa"][4]}} at rank 4, {{saved["pissa"][8]}} at 8, {{saved["pissa"][16]}} at 16 and {{saved["pissa"][64]}} at
# 64. OLoRA saves {{saved["olora"][4]}} at rank 4, and from rank 8 on {{saved["olora"][8]}}, {{saved["olora"][16]}} and {{saved["olora"][64]}}; at 64 the two are equally fast. In the loss around step 30,
# too, PiSSA's lead grows, and OLoRA's shrinks from rank 8 on. But alpha stays at 16, so the scaling goes from 16 at
# rank 1 to a quarter at rank 64, and the rate is not tuned again: rank and step size change together. How all this
# depends on the **size of the model** is not measured here: there is one base, and it is small.

# %% [markdown]
# ## What a moved base means
#
# Lesson 1 said: switch the adapter off, and you have the base. Ask the live model something, with the adapter, with
# the adapter off, and after `unload()`.
#
# **Predict:** which of them answers like the base?

# %%
model.save_pretrained(plain)  # for later; the adapter as it is, not converted
question = ["Who keeps the lantern at Greyham?"]


def answer(model):
    return evaluation.generate(model, tokenizer, question, max_new_tokens=24)[0]


rows = [
    ["the base", answer(base_model), "0"],
    ["OLoRA, trained", answer(model), apart(logits(model), logits(base_model))],
]
with model.disable_adapter():
    rows.append(
        ["OLoRA, adapter switched off", answer(model), apart(logits(model), logits(base_model))]
    )
with warnings.catch_warnings(action="ignore"):
    unloaded = PeftModel.from_pretrained(load_base(), plain).unload()
rows.append(["OLoRA, `unload()`", answer(unloaded), apart(logits(unloaded), logits(base_model))])
plotting.table(["", "answer", "logits differ from the base's by"], rows)
print(validation.check_adapters(unloaded, original_base=base_model))

# %% [markdown]
# `disable_adapter()` and `unload()` take away the adapter, and nobody puts back what it held. **A base that has had
# OLoRA on it is another model.** Whoever needs the base loads it afresh.

# %% [markdown]
# ## Save it so that others can use it
#
# What was trained is *s·BA*, and what the base lacks is *s·B₀A₀*. So on an **untouched** base the whole change is the
# difference:
#
# > *s·BA − s·B₀A₀ = s·[B, −B₀]·[A over A₀]*
#
# Two thin matrices again, of rank 2r: a plain LoRA. PEFT makes it when you tell it where the initial adapter lies.
#
# **Predict:** rank, alpha and file size of the converted adapter?

# %%
converted = folder / "olora_converted"
# A copy, since PEFT rewrites the configuration in there.
start_copy = shutil.copytree(initial, folder / "start", dirs_exist_ok=True)
with warnings.catch_warnings(action="ignore"):  # it holds two adapters for a moment, and warns
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=str(start_copy))
rows = []
for name, saved in (("as it is", plain), ("converted", converted)):
    config = LoraConfig.from_pretrained(saved)
    size = (saved / "adapter_model.safetensors").stat().st_size
    rows.append(
        [name, config.init_lora_weights, config.r, config.lora_alpha, f"{size / 1e3:,.0f} kB"]
    )
plotting.table(["saved", "`init_lora_weights`", "rank", "alpha", "file"], rows)

# %% [markdown]
# **Predict:** load each on a fresh base. Which gives the trained model's output? Which leaves its base alone?

# %%
trained_logits = logits(model)
rows = []
for name, saved in (("as it is", plain), ("converted", converted)):
    fresh = PeftModel.from_pretrained(load_base(), saved)
    report = validation.check_adapters(fresh, original_base=base_model)
    with fresh.disable_adapter():
        alone = apart(logits(fresh), logits(base_model))
    rows.append(
        [name, apart(logits(fresh), trained_logits), alone, ", ".join(report.codes) or "nothing"]
    )
plotting.table(
    [
        "loaded on a fresh base",
        "differs from the trained model by",
        "switched off, differs from the base by",
        "`check_adapters` finds",
    ],
    rows,
)
print(validation.check_changes_output(fresh, witness))

# %% [markdown]
# **Both give the trained model.** Plain saving *happens* to work: the configuration says `olora`, so PEFT repeats the
# QR of the fresh base, arrives at the same start, takes it out, and fills in what was trained. It leans on the QR
# coming out the same. The converted one leans on nothing, and its base stays the base.

# %%
test_rows = data.load_task("sailor", "test").select(range(96))
score = evaluation.evaluate_task(fresh, tokenizer, "sailor", test_rows)
print(f"converted, on a fresh base: {score['score']:.0%} right")
evaluation.band("right with the converted adapter", score["score"], 0.75, 1)

# %% [markdown]
# ### Exercise: convert by hand (core, 15 min)
#
# Write the conversion: from the initial *A₀*, *B₀* and the trained *A*, *B* with their alpha, return the plain
# adapter's *A*, *B* and alpha. PEFT will divide the new alpha by the new rank. Expected shapes for rank 8: (16,
# inputs), (outputs, 16).
#
# <details><summary>The check says that the scaling is not right</summary>
# The rank has doubled, and α/r must stay what it was.
# </details>
# <details><summary>Where does the minus go?</summary>
# Into one of the two, <code>-B0</code> or <code>-A0</code>. Into both, it cancels.
# </details>


# %% exercise="06.convert" points=4
def convert(A0, B0, A, B, alpha):
    """Return A (2r, inputs), B (outputs, 2r) and alpha of the plain LoRA."""
    ### BEGIN SOLUTION
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1), 2 * alpha
    ### END SOLUTION


lesson06.convert(convert)

# %%
### BEGIN HIDDEN TESTS
assert lesson06.convert.outcome(convert).passed
_A0, _A = torch.randn(2, 3, 5).double()
_B0, _B = torch.randn(2, 4, 3).double()
_newA, _newB, _alpha = convert(_A0, _B0, _A, _B, 9)
assert torch.allclose(_alpha / 6 * _newB @ _newA, 9 / 3 * (_B @ _A - _B0 @ _A0))
### END HIDDEN TESTS

# %% [markdown]
# ## Two adapters, one of them OLoRA
#
# At work several adapters share a base. `reading` was trained on the untouched base; what happens beside OLoRA?
#
# **Predict:** three scores of `reading`, alone, beside the OLoRA adapter, beside the converted one?

# %%
reading_rows = data.load_task("reading", "test").select(range(64))


def beside(other):
    """The score of `reading` with another adapter loaded, and what the check says."""
    both = PeftModel.from_pretrained(
        load_base(), paths.adapter_path("reading"), adapter_name="reading"
    )
    if other:
        with warnings.catch_warnings(record=True, action="always") as caught:
            both.load_adapter(other, adapter_name="sailor")
            warned.extend(str(warning.message) for warning in caught)
    found = evaluation.evaluate_task(both, tokenizer, "reading", reading_rows)
    return found["score"], validation.check_adapters(both, original_base=base_model)


# %%
warned = []
shared = {
    "alone": beside(None),
    "beside the converted adapter": beside(converted),
    "beside the OLoRA adapter": beside(plain),
}
plotting.table(
    ["`reading`", "right", "`check_adapters` finds"],
    [
        [how, f"{right:.0%}", ", ".join(report.codes) or "nothing"]
        for how, (right, report) in shared.items()
    ],
)
said = next(text for text in warned if "base weights" in text)
print(textwrap.fill(f"PEFT warns: {said}", 90, break_on_hyphens=False), "\n")
print(shared["beside the OLoRA adapter"][1])

# %% [markdown]
# Loading was enough; `reading` was active all the time. PEFT warns, once, among other lines of a log. The check says
# it whenever you ask: **an adapter that moved the base does not share it.**

# %% [markdown]
# ## Break it
#
# What follows was seen with peft 0.21. Some of it is an error without a reason, most of it is silence.
#
# ### 1 · The wrong folder
#
# `path_initial_model_for_weight_conversion` wants the *initial* adapter. Somebody gives the trained one.
#
# **Predict:** an error? And in what state is the folder afterwards that was given?


# %%
def quietly(call, *given, **named):
    """The result of a call, or the error; PEFT's warnings are shown elsewhere."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return call(*given, **named)
        except Exception as error:
            return error


# %%
trained_copy = shutil.copytree(plain, folder / "sailor", dirs_exist_ok=True)
useless = folder / "useless"
quietly(model.save_pretrained, useless, path_initial_model_for_weight_conversion=str(trained_copy))
out = PeftModel.from_pretrained(load_base(), useless)
print(validation.check_changes_output(out, witness), "\n")
reset = PeftModel.from_pretrained(load_base(), trained_copy)
config = LoraConfig.from_pretrained(trained_copy)
print("in the folder that was given: init_lora_weights =", config.init_lora_weights)
print(f"loaded, it differs from the trained model by {apart(logits(reset), trained_logits)}")
print(validation.check_adapters(reset, original_base=base_model))

# %% [markdown]
# No error, and two adapters are ruined. The new one is the trained one less itself: nothing, up to rounding. And PEFT
# has **written into the folder that it was given**: `init_lora_weights` is `true` now, so the next load leaves the
# start in the base, and adds it once more. The numbers are all there, though.
#
# **Predict:** is it enough to put the word back?

# %%
config.init_lora_weights = "olora"
config.save_pretrained(trained_copy)
restored = PeftModel.from_pretrained(load_base(), trained_copy)
print(
    "with olora in its configuration again, it differs from the trained model by",
    apart(logits(restored), trained_logits),
)

# %% [markdown]
# ### 2 · A second OLoRA
#
# **Predict:** two OLoRA adapters on one base. Does either of them still work?

# %%
two = quietly(PeftModel.from_pretrained, load_base(), plain, adapter_name="first")
alone = apart(logits(two), trained_logits)
quietly(two.load_adapter, plain, adapter_name="second")
rows = [["the first, alone", alone]]
for name in ("first", "second"):
    two.set_adapter(name)
    rows.append([f"the {name}, with both loaded", apart(logits(two), trained_logits)])
plotting.table(["", "differs from the trained model by"], rows)
print(validation.check_adapters(two))

# %% [markdown]
# The second QR is that of a base which the first had moved. Even the *same* adapter twice is wrong both times.

# %% [markdown]
# ### 3 · The reference that isn't
#
# Preference training (DPO) compares the model with a reference, and to save memory TRL takes the model itself with
# the adapter switched off. At step 0 both are equal, so the first loss is ln 2 = 0.693, whatever the rows.
#
# **Predict:** the first loss with OLoRA? With a `ref_model` of its own? And with a model that was wrapped before?

# %%
pairs = train_rows.select(range(8)).map(
    lambda row: {"chosen": row["completion"], "rejected": [{"role": "assistant", "content": "No."}]}
)
pairs = pairs.select_columns(["prompt", "chosen", "rejected"])


def first_step(model, **options):
    """The loss of one DPO step at a rate of 0, and how far the model is from the base."""
    arguments = DPOConfig(
        output_dir=str(folder / "dpo"),
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        per_device_train_batch_size=8,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    made = DPOTrainer(
        model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer, **options
    )
    Progress().attach(made)
    made.train()
    made.model.eval()
    loss = made.state.log_history[0]["loss"]
    return [
        f"{loss:.3f}",
        apart(logits(made.model), logits(base_model)),
        ", ".join(made.model.peft_config),
    ]


# %%
with warnings.catch_warnings(action="ignore"):
    wrapped = get_peft_model(load_base(), lora_config("olora"))
    rows = [
        ["LoRA, `peft_config`", *first_step(load_base(), peft_config=lora_config())],
        ["OLoRA, `peft_config`", *first_step(load_base(), peft_config=lora_config("olora"))],
        [
            "the same, with a `ref_model`",
            *first_step(load_base(), peft_config=lora_config("olora"), ref_model=load_base()),
        ],
        ["OLoRA, wrapped before", *first_step(wrapped)],
    ]
plotting.table(
    ["", "first loss", "model in training: logits off the base's by", "its adapters"], rows
)

# %% [markdown]
# In the second row the reference is the moved base, and the first loss gives it away. The last row is worse: **the loss
# is 0.693 and all is wrong**. TRL makes a second adapter, `ref`, as reference, with the same configuration, and that
# moves the base under both. With OLoRA give `peft_config` and a `ref_model`, or start plain.

# %% [markdown]
# ### 4 · A base in few bits
#
# What is left of *W* has to be stored again. **Predict:** at step 0, which starts still give the base's output on a
# base in bfloat16? In 4 bits?


# %%
def in_4_bit():
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=runtime.dtype()
    )
    return stop_repacking(load_base(quantization_config=settings))


def off_at_step_0(load, start):
    """How far the output at step 0 is from that of the same base alone; or the error."""
    base = load()
    before = logits(base)
    made = quietly(get_peft_model, base, lora_config(start))
    if isinstance(made, Exception):
        refused[start] = f"{type(made).__name__}: {made}"
        return type(made).__name__
    return apart(logits(made.eval()), before)


exact, refused = logits(load_base(dtype=torch.float32)), {}
bases = {
    "float32": lambda: load_base(dtype=torch.float32),
    "bfloat16": lambda: load_base(dtype=torch.bfloat16),
    "NF4": in_4_bit,
}
plotting.table(
    ["base", "its logits are off float32's by", *STARTS],
    [
        [
            name,
            apart(logits(load()), exact),
            *(off_at_step_0(load, start) for start in STARTS.values()),
        ]
        for name, load in bases.items()
    ],
)
for start, error in refused.items():
    print(textwrap.fill(f"{start}: {error}", 95))
print("\n", validation.check_lora_config(in_4_bit(), lora_config("olora")), sep="")

# %% [markdown]
# In bfloat16 a start costs about as much as bfloat16 itself, even `orthogonal`, which moves no base: its *BA* is 0 only
# up to rounding. On a quantised base PiSSA refuses and says why, `orthogonal` refuses with an error about gradients,
# and OLoRA quantises what is left anew, in silence: at step 0 it isn't the base that you measured. **A start with *B* =
# 0 touches nothing, and is exact on all of them.**

# %% [markdown]
# ### 5 · Paths
#
# **Predict:** four paths for the initial adapter. Which work, which leave the trained adapter unharmed?


# %%
def attempt(given, adapter_name="default"):
    """What converting with this path says, and whether the trained adapter is still there."""
    mine = PeftModel.from_pretrained(load_base(), plain, adapter_name=adapter_name)
    error = quietly(
        mine.save_pretrained, folder / "tried", path_initial_model_for_weight_conversion=given
    )
    said = f"{type(error).__name__}: {error}".replace(str(folder), "…") if error else "nothing"
    return [
        textwrap.shorten(said, 190, placeholder=" ..."),
        "yes" if adapter_name in mine.peft_config else "**gone**",
    ]


named = shutil.copytree(initial, folder / "init" / "sailor", dirs_exist_ok=True)
plotting.table(
    ["path", "PEFT says", "trained adapter still there"],
    [
        ["the folder", *attempt(str(start_copy))],
        ["with a slash at the end", *attempt(f"{start_copy}/")],
        ["a folder that isn't there", *attempt(str(folder / "nowhere"))],
        ["`init/sailor`, of an adapter called `sailor`", *attempt(str(named), "sailor")],
    ],
)
report = validation.check_adapter_folder(folder / "not_there")
print(str(report).replace(str(folder), "…"))

# %% [markdown]
# The last one loses your work: PEFT loads the initial adapter under its folder's name, which is the name of the
# trained one, and afterwards deletes what is called so. `save_pretrained` itself makes such folders for adapters with
# a name. **Save the trained adapter first, keep the initial one in a folder with a name of its own, and run
# `check_adapter_folder` on that path.**
#
# And if nobody kept the initial adapter? **Predict:** can it be made once more?

# %%
again = folder / "made_again"
get_peft_model(load_base(), LoraConfig.from_pretrained(plain)).save_pretrained(again)
with warnings.catch_warnings(action="ignore"):
    model.save_pretrained(folder / "rescued", path_initial_model_for_weight_conversion=str(again))
rescued = PeftModel.from_pretrained(load_base(), folder / "rescued")
print(
    "converted with a start made anew: differs from the trained model by",
    apart(logits(rescued), trained_logits),
)

# %% [markdown]
# Yes, as long as you have the same base: nothing in OLoRA's start is random.

# %% [markdown]
# ### 6 · Shapes
#
# **Predict:** which of these are errors? A rank above the layer's size; an odd rank for `orthogonal`; OLoRA on GPT-2,
# whose layers lie on their side (Conv1D).

# %%
from transformers import GPT2Config, GPT2LMHeadModel

runtime.seed_everything(0)
gpt2 = GPT2LMHeadModel(
    GPT2Config(
        n_layer=1,
        n_embd=32,
        n_head=2,
        vocab_size=64,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
).eval()


def tried(base, start, **changes):
    """What this start does on a copy of the base, and what `check_lora_config` says of it."""
    config = lora_config(start, **changes)
    found = ", ".join(validation.check_lora_config(base, config).codes) or "nothing"
    ids = torch.arange(8, device=next(base.parameters()).device)[None]

    def run():
        made = get_peft_model(copy.deepcopy(base), config).eval()
        first = next(m for name, m in made.named_modules() if name.endswith("lora_A.default"))
        with torch.no_grad():
            differs = apart(made(ids).logits, base(ids).logits)
        return f"A has {len(first.weight)} rows; step 0 differs by {differs}"

    seen = quietly(run)
    return [f"{type(seen).__name__}: {seen}" if isinstance(seen, Exception) else seen, found]


# %%
sideways = {"r": 4, "fan_in_fan_out": True}
too_many = 2 * min(W.shape)
plotting.table(
    ["", "what happens", "`check_lora_config` finds"],
    [
        [
            f"OLoRA, rank {too_many}",
            *tried(base_model, "olora", r=too_many, target_modules=["q_proj"]),
        ],
        ["orthogonal, rank 7", *tried(base_model, "orthogonal", r=7)],
        ["OLoRA, Conv1D of 32 × 96", *tried(gpt2, "olora", target_modules=["c_attn"], **sideways)],
        [
            "OLoRA, Conv1D of 32 × 32",
            *tried(gpt2, "olora", target_modules=["attn.c_proj"], **sideways),
        ],
        [
            "PiSSA, Conv1D of 32 × 32",
            *tried(gpt2, "pissa", target_modules=["attn.c_proj"], **sideways),
        ],
    ],
)

# %% [markdown]
# Only the odd rank gets a clear word from PEFT. The rank shrinks in silence while alpha is still divided by the one
# that you asked for; the Conv1D fails with an error about shapes, and if it is square, *A* and *B* lie the wrong way
# round, without an error. **Run `check_lora_config` before training, and look at step 0: if its output isn't the
# base's, don't train.**

# %% [markdown]
# ### 7 · Two more refusals
#
# `low_cpu_mem_usage=True` makes the adapter on the meta device first, without numbers. **Predict:** what does a start
# say to that which needs numbers? And can every OLoRA adapter be converted?


# %%
def patterned():
    """OLoRA with rsLoRA and a rank of its own for one kind of layer; then the conversion."""
    config = lora_config("olora", use_rslora=True, rank_pattern={"q_proj": 4})
    made = get_peft_model(load_base(), config)
    made.save_pretrained(folder / "patterned")
    made.save_pretrained(
        folder / "out", path_initial_model_for_weight_conversion=str(folder / "patterned")
    )


def with_less_memory(adapter):
    """The difference to the trained model."""
    loaded = PeftModel.from_pretrained(load_base(), adapter, low_cpu_mem_usage=True)
    return apart(logits(loaded), trained_logits)


for what, seen in (
    ("low_cpu_mem_usage, converted", quietly(with_less_memory, converted)),
    ("low_cpu_mem_usage, OLoRA", quietly(with_less_memory, plain)),
    ("rsLoRA and a pattern", quietly(patterned)),
):
    kind = type(seen).__name__ if isinstance(seen, Exception) else "differs by"
    print(
        what,
        textwrap.fill(f"{kind}: {seen}", 95, initial_indent="  ", subsequent_indent="  "),
        "",
        sep="\n",
    )
print(validation.check_adapter_folder(plain))

# %% [markdown]
# The first error names neither OLoRA nor the option; the check on the folder does. The second is clear, but comes
# when the training is done: PEFT warns of it when the `LoraConfig` is made, so read warnings.

# %% [markdown]
# ## Recap
#
# What this notebook measured, in one table:


# %%
def first_at(method, level=0.1):
    return over(at_best[method], lambda row: reached(row, level), ".0f")


plotting.table(
    ["", "measured"],
    [
        ["OLoRA at step 0: logits, base weights", f"{step_0} off; all {len(layers)} layers moved"],
        [
            "share of W in 8 directions: random, OLoRA, PiSSA",
            ", ".join(f"{mean:.1%}" for mean in mean_share.values()),
        ],
        [
            "steps to a loss of 0.1: default, OLoRA, PiSSA",
            "; ".join(first_at(method) for method in three),
        ],
        [
            "right on test rows, same order",
            "; ".join(spread(finish[method, best[method]]) for method in three),
        ],
        [
            "learning rates with 70% right, same order",
            ", ".join(f"{len(width(method))} of {len(rates)}" for method in three),
        ],
        ["right with the adapter converted to plain LoRA", f"{score['score']:.0%}"],
        [
            "`reading` alone, beside OLoRA, beside the converted one",
            ", ".join(
                f"{shared[how][0]:.0%}"
                for how in ("alone", "beside the OLoRA adapter", "beside the converted adapter")
            ),
        ],
    ],
)
progress("06")

# %% [markdown]
# ## Take it to work
#
# Put the folder of an adapter of yours here, and the folder of its base. The first check reads the files only, the
# second loads both, and compares the base's weights with those of a second copy.

# %%
my_adapter, my_base = "", ""
checked, on_base = my_adapter or plain, my_base or base_folder
print(validation.check_adapter_folder(checked), "\n")
loaded, untouched = (AutoModelForCausalLM.from_pretrained(on_base) for _ in range(2))
loaded = PeftModel.from_pretrained(loaded, checked)
print(validation.check_adapters(loaded, original_base=untouched))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · OLoRA is far ahead of LoRA after 50 steps, both at 1e-3. What do you ask?</summary>
# Whether 1e-3 is a good rate for both. At its own best rate each start has another curve; and then ask about the end.
# </details>
# <details><summary>2 · You score an OLoRA adapter, call <code>unload()</code>, and the base scores 0. Why?</summary>
# Loading took the start out of the base's weights, and unloading doesn't put it back. Load the base afresh.
# </details>
# <details><summary>3 · What must you save before training, and why?</summary>
# The initial adapter. The converted adapter is what was trained less what it started with, and after training the
# start is gone from the model. (For OLoRA the base gives it back by another QR, if you still have the same base.)
# </details>

# %% [markdown]
# ## Where to read on
#
# - [OLoRA](https://arxiv.org/abs/2406.01775), Büyükakyüz 2024, and [PEFT's example with the
#   conversion](https://github.com/huggingface/peft/tree/main/examples/olora_finetuning)
# - [PiSSA](https://arxiv.org/abs/2404.02948), Meng et al. 2024; [EVA](https://arxiv.org/abs/2410.07170), Paischer et
#   al. 2024, with comparisons of starts; [rsLoRA](https://arxiv.org/abs/2312.03732);
#   [DoRA](https://arxiv.org/abs/2402.09353)
# - [PEFT: starts of LoRA](https://huggingface.co/docs/peft/main/en/developer_guides/lora#initialization), and
#   [Hugging Face on PEFT](https://huggingface.co/blog/peft)
# - [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# Next: lesson 7 merges adapters, and proves that the merged model is the same.
