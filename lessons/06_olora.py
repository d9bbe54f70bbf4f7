# %% [markdown]
# # Choose where LoRA starts
#
# Plain LoRA [starts](../docs/glossary.md#initialisation-start) with *B* = 0, so at first the adapter changes nothing.
# [OLoRA](../docs/glossary.md#olora) and [PiSSA](../docs/glossary.md#pissa) move a part of the base model's weights into the
# adapter instead, and are said to learn faster. **Do they? And what do you pay for a start that changes the base model?**
#
# | | |
# |---|---|
# | **What you'll do** | build OLoRA's start; race five starts and a control; train one, switch it off, convert it, ship it |
# | **What you'll learn** | what a start changes; how to compare methods fairly; what a moved base breaks, and how to find it |
# | **What you'll need** | [lesson 2](02_lora_from_scratch.ipynb) for *A*, *B* and the scaling, [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import shutil
import tempfile
import warnings
from pathlib import Path

from course_utils import data, evaluation, paths, plotting, runtime, sweeps, validation
from course_utils.exercises import lesson06, progress
from course_utils.sweeps import over_seeds, spread

runtime.quiet_imports()

import peft
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

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
# ![OLoRA moves a part of the weight W into the adapter: B and A hold it, and W minus s times BA is left. Together they compute what W did. With the adapter off, that part is missing](../images/olora.png)
#
# Every matrix *W* can be written as a product *QR* ([QR decomposition](../docs/glossary.md#qr-decomposition)). The columns
# of *Q* are [orthonormal](../docs/glossary.md#orthonormal): each has length 1, and any two are at right angles. OLoRA
# ([Büyükakyüz 2024](https://arxiv.org/abs/2406.01775)) starts with the first *r* columns of *Q* as *B* and the first *r* rows of
# *R* as *A*, where *r* is the rank. The layer should still compute what it did, so OLoRA subtracts from the weight what the
# adapter adds, which is *BA* times the [scaling](../docs/glossary.md#alpha-α-scaling) *s*:
#
# > *B = Q[:, :r]*, *A = R[:r]*, *W ← W − s·BA*
#
# Do it for one layer, in float64 and with s = 1.
#
# **Predict:** by how much does the layer's output differ with this adapter? And without it?

# %%
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)


def load_base():
    """A fresh copy of the base model."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype())
    return base.to(device).eval()


base_model = load_base()  # never changed, for comparisons
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
print(f"BᵀB differs from the identity by {off:.0e}, so B's columns are orthonormal")
print(f"output differs by {with_adapter:.0e} with the adapter, by {without:.1f} without")
assert off < 1e-10 and with_adapter < 1e-10 and without > 0.1

# %%
corner = (slice(48), slice(48))
parts = {"W": W[corner], "BA": (B @ A)[corner], "W − BA": left[corner]}
plotting.show_weights(
    parts, "OLoRA takes the first 8 columns out of W,\nand a little of the others"
)

# %% tags=["claim"]
import torch
from safetensors.torch import load_file

from course_utils import paths

weights = [
    weight.float()
    for name, weight in load_file(f"{paths.base_model()}/model.safetensors").items()
    if "layers." in name and weight.ndim == 2
]
torch.manual_seed(0)
directions = {
    "olora": [torch.linalg.qr(weight).Q[:, :8] for weight in weights],
    "pissa": [torch.linalg.svd(weight, full_matrices=False).U[:, :8] for weight in weights],
    "random": [torch.linalg.qr(torch.randn(len(weight), 8)).Q for weight in weights],
}


def mean(values):
    return sum(values) / len(values)


held = {
    start: mean(
        [
            ((U.T @ weight).square().sum() / weight.square().sum()).item()
            for U, weight in zip(found, weights)
        ]
    )
    for start, found in directions.items()
}

# %% [markdown]
# With the adapter the output is the same up to rounding, and without it the layer computes something else. **The base
# model [has moved](../docs/glossary.md#moved-base), and the adapter holds what it lacks.**
#
# Which part of *W* is it? The QR decomposition works through the columns of *W* from left to right. A column holds what one
# input contributes, so OLoRA takes out the whole columns of the first eight inputs, as the figure shows. These are not the most
# important ones. If you measure a weight by the sum of its squared numbers, OLoRA's eight directions (the columns of *B*) hold
# {{held["olora"]:.1%}} of it, on average over all layers, and eight random directions {{held["random"]:.1%}}. The largest
# [singular directions](../docs/glossary.md#singular-value-decomposition), which PiSSA
# ([Meng et al. 2024](https://arxiv.org/abs/2404.02948)) takes, hold {{held["pissa"]:.1%}}.
#
# ## Let PEFT do it
#
# In PEFT all of this is one setting, `init_lora_weights="olora"`. The next cell compares PEFT's *A* and *B* with ours, and the
# [logits](../docs/glossary.md#logits) with the base model's. Then it lets `check_adapters` look at the base.


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
    """The largest difference of two sets of logits, as text."""
    largest = (one - other).abs().max().item()
    return f"{largest:.0e}" if 0 < largest < 0.01 else f"{largest:.2g}"


untrained = get_peft_model(load_base(), lora_config("olora")).eval()
layer = untrained.get_submodule(f"base_model.model.{LAYER}")
theirs = [getattr(layer, part)["default"].weight.detach().cpu() for part in ("lora_A", "lora_B")]
differences = [(ours - its).abs().max().item() for ours, its in zip((A, B), theirs)]
print(f"A and B differ from ours by at most {max(differences):.0e}")
step_0 = apart(logits(untrained), logits(base_model))
print(f"logits differ from the base model's by {step_0}\n")
assert not paths.is_shipped_base() or float(step_0) < 1e-4
print(validation.check_adapters(untrained, original_base=base_model))

# %% [markdown]
# PEFT computes the same start, and the output is the base model's, although all 28 adapted weights have changed. Note that PEFT
# subtracts *s·BA*, and here *s* = α/r = 2. So **with OLoRA, alpha sets how far the base moves** as well as how strongly the
# adapter acts. (PiSSA divides its start by *s*, so there the base moves equally far, whatever alpha is.)
#
# ### Exercise: start as OLoRA does (core, 10 min)
#
# Compute this start for any float weight (outputs, inputs), any rank up to its smaller side, and any alpha. Return *A*,
# *B* and the new weight, and leave the weight that you were given as it is. Expected for `W`, 8 and 16: `A` has the shape
# (8, 256), `B` (256, 8), and `new + 2 * B @ A` equals `W`.
#
# <details><summary>The check says that it doesn't add up</summary>
# The layer computes <code>new @ x + s * B @ A @ x</code> with <code>s = alpha / rank</code>.
# </details>
# <details><summary>My shapes are wrong for a weight that isn't square</summary>
# <code>torch.linalg.qr</code> gives Q (outputs, k) and R (k, inputs), with k the smaller side. Take rows of R and columns of Q.
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
# ## Compare five starts before training
#
# These are five of PEFT's starts:
#
# | `init_lora_weights` | *A* | *B* |
# |---|---|---|
# | `True`, the default | uniform, small | zero |
# | `"gaussian"` | normal, with a standard deviation of 1/r | zero |
# | `"orthogonal"` | random | random, and at right angles to *A*, so that *BA* = 0 |
# | `"pissa"` | from the largest singular directions of *W* | from the same directions |
# | `"olora"` | *R[:r]* of *W = QR* | *Q[:, :r]* |
#
# **Predict:** all five compute the base model's output at first. Which of them leave the base itself alone?

# %%
STARTS = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "PiSSA": "pissa",
    "OLoRA": "olora",
}
names = [name for name, module in untrained.named_modules() if hasattr(module, "lora_A")]
originals = [
    base_model.get_submodule(name.removeprefix("base_model.model.")).weight for name in names
]
rows = []
for name, start in STARTS.items():
    runtime.seed_everything(0)
    model = get_peft_model(load_base(), lora_config(start)).eval()
    layers = [model.get_submodule(name) for name in names]
    moved = sum(
        (layer.base_layer.weight - weight).square().sum().item()
        for layer, weight in zip(layers, originals)
    )
    size = sum(weight.square().sum().item() for weight in originals)
    numbers = torch.cat([layer.lora_A["default"].weight.detach().flatten() for layer in layers])
    rms = numbers.square().mean() ** 0.5
    differ = apart(logits(model), logits(base_model))
    rows.append([name, differ, f"{(moved / size) ** 0.5:.0%}", f"{rms:.3f}"])
plotting.table(
    ["start", "logits differ by", "base moved, of its size", "size of A's numbers (rms)"], rows
)

# %% [markdown]
# The first three leave the base alone, because their *BA* is 0. PiSSA moves it by a third of its size (the root of its sum of
# squares), and OLoRA by nearly half: its part is smaller, but it is subtracted *s* = 2 times. Look at the last column, too. The
# optimizer Adam moves each number of *B* by about the learning rate, so *BA* changes by that times *A*: **the larger *A*, the
# larger the first steps.** So a head start need not come from the directions, and the race needs a control.
#
# ## Race them
#
# OLoRA's paper reports faster convergence and better scores on models of 1 to 7 billion parameters. Others find no
# reliable gain at the end: the EVA paper ([Paischer et al. 2024](https://arxiv.org/abs/2410.07170)), which proposes another
# start, reports scores of 89.2 for LoRA and 89.4 for OLoRA on Llama-3.1-8B, and of 92.2 and 91.8 on Gemma-2-9B.
#
# So measure it. Our [sweep](../docs/glossary.md#sweep) trained on `sailor` for 100 steps of 16 rows, each method at five learning
# rates with three seeds. To the five starts it adds two other settings of LoRA, [rsLoRA](../docs/glossary.md#rslora) and
# [DoRA](../docs/glossary.md#dora), and the control: OLoRA with random directions. There *B* has random orthonormal columns, and
# everything else is as in OLoRA, including *A = BᵀW*. The best rates are chosen on validation rows, and the scores at the end are read
# on test rows.
#
# **Predict:** if all take the same learning rate, which method looks best?

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
plotting.show_matrix(
    {
        label: {f"{rate:g}": validated[method, rate][0] for rate in rates}
        for method, label in NAMES.items()
    },
    "Which start looks best depends on the learning rate\n"
    "(right on validation rows, mean of three seeds)",
    "learning rate",
    "method",
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
assert score["olora", 1.5e-3] == max(score[method, 1.5e-3] for method in methods), "OLoRA leads"
assert score["olora", 1.5e-2] == min(starts), "OLoRA is the last of the starts"
assert score["gaussian", 1.5e-2] == max(starts), "`gaussian` comes first"
assert set(best.values()) == {5e-3, 1.5e-2}, "0.005 and 0.015"

# %% [markdown]
# Which method looks best depends on the rate. At 0.0015 OLoRA leads with {{score["olora", 1.5e-3]:.0%}}, and the default has
# {{score["default", 1.5e-3]:.0%}}. At 0.015 `gaussian` comes first with {{score["gaussian", 1.5e-2]:.0%}}, the default has
# {{score["default", 1.5e-2]:.0%}}, and OLoRA is the last of the starts with {{score["olora", 1.5e-2]:.0%}}. So a comparison at one
# rate mostly says which method that rate suits. **Give each method its own best rate.** Here the best rates are 0.005 and 0.015.
# Models of 1 to 70 billion parameters take 1e-4 to 2e-4 for LoRA ([Recipes](../docs/recipes.md)), so copy the way of comparing,
# and not the numbers.
#
# Now run OLoRA at its best rate yourself, as in the sweep, with seed 0. Save the adapter before training, too, because you will
# need what it started with when you share it.

# %%
best = {method: max(rates, key=lambda rate: validated[method, rate][0]) for method in NAMES}
folder = paths.runs_dir() / "lesson06"
initial, plain = folder / "olora_initial", folder / "olora_trained"
shutil.rmtree(folder, ignore_errors=True)
train_rows = data.load_task("sailor", "train")
runtime.seed_everything(0)
settings = SFTConfig(
    output_dir=str(folder / "trainer"),
    seed=0,
    max_steps=100,
    per_device_train_batch_size=16,
    learning_rate=best["olora"],
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
trainer.model.save_pretrained(initial)
Progress().attach(trainer).train()
model = trainer.model.eval()  # the trained OLoRA, to the end of this lesson
model.save_pretrained(plain)
live = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}

# %%
at_best = {
    method: [
        row for row in raced if row["method"] == method and row["learning_rate"] == best[method]
    ]
    for method in NAMES
}
drawn = ("default", "olora", "pissa", "random")
title = "Each at its best rate: OLoRA leads up to step 50,\nthen random directions have caught up"
figure, alt = sweeps.curves(
    {NAMES[method]: sweeps.losses(at_best[method]) for method in drawn},
    title,
    "step",
    "training loss (nats a token)",
    log_y=True,
)
figure.axes[0].plot(list(live), list(live.values()), "kx", markersize=5)
plotting.show(figure, f"{alt} Crosses: the live run, {live[5]:.2f} at 5 to {live[100]:.3f} at 100.")

# %% [markdown]
# The crosses are your run of OLoRA, and the bands reach from the lowest to the highest seed. The difference between two such
# curves is easiest to state in steps: how many does each need to reach a given loss? Write that metric first.
#
# ### Exercise: when was the loss down? (warm-up, 5 min)
#
# Given a log, which is a dict from step to loss in any order, return the first step whose loss is at or below a level, or
# `None` if there is none. Expected for `{5: 4.0, 10: 0.9, 15: 0.5}` and 1.0: 10.
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
# Now compare the methods by two measures: the steps to a training loss of 0.1, and the loss on validation rows after the last
# step. The table has means over three seeds, with the lowest and the highest seed in brackets.
#
# **Predict:** is the control, random directions, worse than OLoRA in both measures, in one, or in none?

# %%
finish = over_seeds(raced, "test", "method", "learning_rate")
final_loss = over_seeds(raced, "validation_loss", "method", "learning_rate")
plotting.table(
    ["", "best rate", "steps to 0.1", "validation loss", "right (test)"],
    [
        [
            name,
            f"{best[method]:g}",
            spread(sweeps.steps_to_loss(at_best[method], 0.1), ".0f"),
            spread(final_loss[method, best[method]], ".3f"),
            spread(finish[method, best[method]]),
        ]
        for method, name in NAMES.items()
    ],
)

# %% tags=["claim"]
from course_utils import sweeps as of_seeds


def at_rate(column):
    """{method: (mean, lowest, highest)} at the rate that is best for it."""
    found = swept("starts", column, "method", "learning_rate")
    return {method: found[method, rate] for method, rate in best.items()}


def overlap(one, other):
    return one[1] <= other[2] and other[1] <= one[2]


needs = {
    method: of_seeds.steps_to_loss(
        [
            row
            for row in data.load_results("starts")
            if (row["method"], row["learning_rate"]) == (method, rate)
        ],
        0.1,
    )
    for method, rate in best.items()
}
ends, test = at_rate("validation_loss"), at_rate("test")
rms_of = {
    start: torch.cat([(U.T @ weight).flatten() for U, weight in zip(directions[start], weights)])
    .square()
    .mean()
    .item()
    ** 0.5
    for start in ("olora", "random")
}
lesson_3 = swept("learning_rate", "test", "method", "learning_rate")["lora", 1.5e-2]
by_step = {
    method: of_seeds.losses(
        [
            row
            for row in data.load_results("starts")
            if (row["method"], row["learning_rate"]) == (method, best[method])
        ]
    )
    for method in methods
}
for step in range(20, 51, 5):
    loss = {method: by_step[method][step][0] for method in methods}
    assert min(loss[method] for method in methods if method != "olora") > loss["olora"], (
        "from step 55 on"
    )
for step in range(55, 101, 5):
    assert abs(by_step["random"][step][0] / by_step["olora"][step][0] - 1) < 0.2, "a fifth"
for measure in (needs, ends):
    assert measure["olora"][2] < measure["default"][1], "ahead of the default with every seed"
    assert overlap(measure["olora"], measure["random"]), "In none"
    assert measure["random"][2] < measure["default"][1], "does as well in both"
assert needs["default"][1] <= needs["pissa"][2] and overlap(ends["pissa"], ends["default"]), (
    "its seeds overlap with the default's in both"
)
assert overlap(test["olora"], test["random"]) and overlap(test["olora"], test["default"]), (
    "overlap there"
)
assert test["olora"][0] == max(found[0] for found in test.values()), "the highest test score"
assert lesson_3[1] > test["olora"][0] + 0.03, "more than any of these"
to_tenth_by_rank = {
    rank: {
        method: of_seeds.steps_to_loss(
            [
                row
                for row in data.load_results("starts_rank")
                if (row["method"], row["rank"]) == (method, rank)
            ],
            0.1,
        )[0]
        for method in ("default", "olora")
    }
    for rank in (1, 64)
}
assert to_tenth_by_rank[1]["olora"] > to_tenth_by_rank[1]["default"], "At rank 1"

# %% [markdown]
# In none. OLoRA is ahead of the default with every seed, in both measures: {{needs["olora"][0]:.0f}} steps against
# {{needs["default"][0]:.0f}}, and a validation loss of {{ends["olora"][0]:.3f}} against {{ends["default"][0]:.3f}}. But **the
# control does as well in both**: {{needs["random"][0]:.0f}} steps and {{ends["random"][0]:.3f}}, with seeds that overlap with
# OLoRA's, and from step 55 on its training loss is within a fifth of OLoRA's. So the head start doesn't need the directions
# that the QR decomposition picks. What the two have in common is an orthonormal *B* and a large *A*, whose numbers
# have a size of {{rms_of["olora"]:.2f}} and {{rms_of["random"]:.2f}}, far above the default's in the table of the five starts.
# PiSSA has the most important directions and gains little: its seeds overlap with the default's in both measures.
#
# How much is the head start worth? OLoRA also has the highest test score, {{test["olora"][0]:.0%}}, but the seeds of OLoRA, of
# random directions ({{test["random"][0]:.0%}}) and of the default ({{test["default"][0]:.0%}}) overlap there. And these runs are
# short: in lesson 3 the default start came to {{lesson_3[0]:.0%}} in 120 steps of 32 rows, more than any of these. The head start
# also depends on the rank. At rank 1 there is none, because OLoRA needs {{to_tenth_by_rank[1]["olora"]:.0f}} steps and the default
# {{to_tenth_by_rank[1]["default"]:.0f}}. At rank 64 it is {{to_tenth_by_rank[64]["olora"]:.0f}} against
# {{to_tenth_by_rank[64]["default"]:.0f}}. (Alpha stays 16 and the learning rate that of rank 8, so rank and step size change
# together.)
#
# ## Is it more stable?
#
# OLoRA is also said to improve stability, for example in [PEFT's
# guide](https://huggingface.co/docs/peft/main/en/developer_guides/lora#initialization). Such a claim needs a measure. You can
# read two from the sweep: how far the seeds lie apart, and how many learning rates work.
#
# **Predict:** at how many of the five rates does each method get at least 70% right?

# %%
rows = []
for method in ("default", "pissa", "olora", "random"):
    working = [f"{rate:g}" for rate in rates if validated[method, rate][0] >= 0.7]
    _, lowest, highest = finish[method, best[method]]
    rows.append([NAMES[method], ", ".join(working), f"{highest - lowest:.1%}"])
plotting.table(["", "rates with 70% right", "test score, highest less lowest seed"], rows)

# %% tags=["claim"]
works = {
    method: [rate for rate in rates if score[method, rate] >= 0.7]
    for method in ("default", "pissa", "olora", "random")
}
seeds_apart = {
    method: round(100 * (test[method][2] - test[method][1])) for method in ("olora", "default")
}
assert [len(works[method]) for method in ("olora", "pissa", "random", "default")] == [3, 2, 2, 1], (
    "three rates, PiSSA and random directions at two, and the default at one"
)
assert (
    score["olora", 1.5e-3] > score["random", 1.5e-3] + 0.1 and rms_of["olora"] > rms_of["random"]
), "whose *A* is larger"
assert [method for method in works if min(works[method]) < 5e-3] == ["olora"], "at its lower end"
assert {max(found) for found in works.values()} == {1.5e-2}, "0.015 is the highest that works"
assert max(score[method, 5e-2] for method in methods) == 0, "at 0.05 all of them get 0%"
assert abs(seeds_apart["olora"] - seeds_apart["default"]) <= 2, "hardly less"

# %% [markdown]
# OLoRA gets there at three rates, PiSSA and random directions at two, and the default at one. But OLoRA's range is wider only at its lower end, where
# 100 steps are too few for the others. That is the head start once more: at 0.0015 OLoRA, whose *A* is larger, has
# {{score["olora", 1.5e-3]:.0%}}, and random directions {{score["random", 1.5e-3]:.0%}}. At the upper end, where runs break, OLoRA
# is no more stable, because for each of the four 0.015 is the highest that works, and at 0.05 all of them get 0%. And OLoRA's
# seeds are {{seeds_apart["olora"]}} points apart, hardly less than the default's {{seeds_apart["default"]}}. So **on this task we
# see no gain in stability**, by either measure.
#
# ## What a moved base breaks
#
# In [lesson 1](01_load_lora_adapter.ipynb) you switched an adapter off and had the base model back. Try it with OLoRA.
#
# **Predict:** which replies like the base model: OLoRA trained, switched off, or after `unload()`?

# %%
question = ["Who keeps the lantern at Greyham?"]


def described(name, model):
    """A row: the reply, and how far the logits are from the base model's."""
    reply = evaluation.generate(model, tokenizer, question, max_new_tokens=24)[0]
    return [name, reply, apart(logits(model), logits(base_model))]


rows = [described("the base model", base_model), described("OLoRA, trained", model)]
with model.disable_adapter():
    rows.append(described("OLoRA, switched off", model))
with warnings.catch_warnings(action="ignore"):  # PEFT says in general terms what you see here
    unloaded = PeftModel.from_pretrained(load_base(), plain).unload()
rows.append(described("OLoRA, `unload()`", unloaded))
plotting.table(["", "reply", "differs from the base by"], rows)
print(validation.check_adapters(unloaded, original_base=base_model))

# %% [markdown]
# None of the three does. `disable_adapter()` and `unload()` take the adapter away, and nothing puts back into the base what
# the adapter held, so the model talks nonsense. If you need the base model, load it afresh. [DPO](../docs/glossary.md#dpo) takes
# the model with its adapter off as a reference, so with OLoRA that reference is wrong, as [lesson 9](09_preference.ipynb) shows.
#
# Several adapters often share a base. Take `reading` from lesson 1, which was trained on the untouched base.
#
# **Predict:** what does `reading` score when the OLoRA adapter is loaded beside it, but not active?

# %%
reading_rows = data.load_task("reading", "test").select(range(64))


def beside(other=None):
    """Score of `reading` with another adapter beside it, what PEFT warns of, and the check."""
    both = PeftModel.from_pretrained(
        load_base(), paths.adapter_path("reading"), adapter_name="reading"
    )
    with warnings.catch_warnings(record=True, action="always") as caught:
        if other:
            both.load_adapter(other, adapter_name="other")
    found = evaluation.evaluate_task(both, tokenizer, "reading", reading_rows)
    warned = any("base weights" in str(one.message) for one in caught)
    report = validation.check_adapters(both, original_base=base_model)
    return found["score"], "yes" if warned else "no", ", ".join(report.codes) or "nothing"


def show_shared():
    header = ["`reading`", "right", "PEFT warns", "`check_adapters` finds"]
    rows = [[how, f"{right:.0%}", *others] for how, (right, *others) in shared.items()]
    plotting.table(header, rows)


shared = {"alone": beside(), "beside the OLoRA adapter": beside(plain)}
show_shared()
evaluation.band("reading alone", shared["alone"][0], 0.85, 1, quiet=True)
evaluation.band("reading beside OLoRA", shared["beside the OLoRA adapter"][0], 0, 0, quiet=True)

# %% [markdown]
# `reading` gets nothing right any more, although it was active all the time, because loading the other adapter moved the
# base under it. PEFT warns once, while it loads. `check_adapters` reports it whenever you call it: the adapters share a base
# (`start_not_shared`) that lacks what one subtracted (`start_taken_out`).
#
# ## Convert it to plain LoRA
#
# Training has changed *s·BA*, and the base lacks *s·B₀A₀*, with which the adapter started. On an **untouched** base the
# whole change is therefore the difference
#
# > *s·BA − s·B₀A₀ = s·[B, −B₀]·[A over A₀]*
#
# with *B* and *−B₀* side by side, and *A* on top of *A₀*. That is again a product of two thin matrices, now of rank 2r: a plain
# LoRA. PEFT computes it when you save the adapter, if you say where the initial adapter is.
#
# **Predict:** what are rank, alpha and file size of the converted adapter?

# %%
converted = folder / "olora_converted"
# A copy, because PEFT rewrites the configuration in the folder that it is given.
start_copy = shutil.copytree(initial, folder / "start", dirs_exist_ok=True)
with warnings.catch_warnings(action="ignore"):  # for a moment there are two adapters
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=str(start_copy))
trained_logits, rows = logits(model), []
for name, saved in (("as it is", plain), ("converted", converted)):
    config = LoraConfig.from_pretrained(saved)
    size = (saved / "adapter_model.safetensors").stat().st_size
    fresh = PeftModel.from_pretrained(load_base(), saved)
    row = [name, config.init_lora_weights, config.r, config.lora_alpha, f"{size / 1e3:,.0f} kB"]
    row.append(apart(logits(fresh), trained_logits))
    with fresh.disable_adapter():
        rows.append([*row, apart(logits(fresh), logits(base_model))])
plotting.table(
    [
        "saved",
        "`init_lora_weights`",
        "rank",
        "alpha",
        "file",
        "differs from trained by",
        "switched off, from base by",
    ],
    rows,
)

# %%
test_rows = data.load_task("sailor", "test").select(range(96))
score = evaluation.evaluate_task(fresh, tokenizer, "sailor", test_rows)["score"]
shared["beside the converted adapter"] = beside(converted)
print(f"converted, on a fresh base: {score:.0%} right on `sailor`")
evaluation.band("right with the converted adapter", score, 0.75, 1, quiet=True)
show_shared()

# %% [markdown]
# All three double: the rank and the file because there are two products in it, and alpha so that the scaling stays 2.
# Loaded on a fresh base, both folders give the trained model. The first one does because its configuration says `olora`: PEFT
# repeats the QR decomposition, subtracts the same start, and fills in what was trained. So loading it moves the base again.
# **Only the converted adapter leaves its base alone**, and `reading` works beside it.
#
# ### Exercise: convert by hand (core, 10 min)
#
# From the initial *A₀*, *B₀* and the trained *A*, *B* with their alpha, return the plain adapter's *A*, *B* and alpha. PEFT
# will divide the new alpha by the new rank. Expected shapes for rank 8: (16, inputs), (outputs, 16).
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
# ### Exercise: ship the folder (core, 15 min)
#
# Save the adapter of `model` into the folder `out`, so that others can load it on an untouched base. `initial` is the folder of
# the adapter as it was before training. Use PEFT's conversion, but beware of what it does with the initial folder: it writes
# into it, loads it as an adapter named after the last part of the path, and at the end deletes the adapter of that name.
# Afterwards `initial` and the model must be as before, also if `initial` has the name of the model's adapter, or its path ends
# with a slash.
#
# <details><summary>ValueError: Adapter  does not exist</summary>
# A path that ends with a slash has an empty last part.
# </details>
# <details><summary>The check says that the initial folder has changed, or my adapter is gone</summary>
# Give PEFT a copy with a name of its own: <code>shutil.copytree</code> into a <code>tempfile.TemporaryDirectory()</code>.
# </details>


# %% exercise="06.ship" points=4
def ship(model, initial, out):
    """Save a plain LoRA of an OLoRA adapter to `out`; change neither model nor `initial`."""
    ### BEGIN SOLUTION
    with tempfile.TemporaryDirectory() as own:
        start = shutil.copytree(initial, Path(own) / "start_of_conversion")
        model.save_pretrained(out, path_initial_model_for_weight_conversion=str(start))
    ### END SOLUTION


lesson06.ship(ship)

# %%
### BEGIN HIDDEN TESTS
assert lesson06.ship.outcome(ship).passed
_out = folder / "shipped"
ship(model, f"{initial}/", _out)
_shipped = PeftModel.from_pretrained(load_base(), _out)
assert float(apart(logits(_shipped), trained_logits)) < 1e-3
assert LoraConfig.from_pretrained(initial).init_lora_weights == "olora"
assert LoraConfig.from_pretrained(_out).init_lora_weights is True
### END HIDDEN TESTS

# %% [markdown]
# ## Break it: a folder that was good
#
# You lend somebody the folder of your trained adapter, not converted. When it comes back, the model talks nonsense, although
# nobody has trained the adapter any further. One line of `adapter_config.json` is wrong. **Which one?** Read the report, put
# your change into `MY_CHANGE`, for example `{"lora_alpha": 32}`, and run the cell again until the difference is 0.

# %%
MY_CHANGE = {}
returned = folder / "came_back"
lesson06.lend(plain, returned, load_base())
config = lesson06.change(returned, MY_CHANGE)
suspect = PeftModel.from_pretrained(load_base(), returned)
print(evaluation.generate(suspect, tokenizer, question, max_new_tokens=24)[0])
print(f"differs from the trained model by {apart(logits(suspect), trained_logits)}\n")
print(validation.check_adapters(suspect, original_base=base_model))

# %% [markdown]
# **Predict:** which setting has to change? And are the trained numbers in the folder still good?

# %%
config.init_lora_weights = "olora"
config.save_pretrained(returned)
mended = PeftModel.from_pretrained(load_base(), returned)
print(f"differs from the trained model by {apart(logits(mended), trained_logits)}")

# %% [markdown]
# `init_lora_weights` had become `true`, so nothing was subtracted from the base, and the start counted twice. The numbers are
# still good, as the difference of 0 shows. What happened? Somebody gave this folder, with the *trained* adapter, as
# `path_initial_model_for_weight_conversion`, and PEFT rewrote its configuration. (What such a conversion saves is the adapter
# less itself, which is nothing.)
#
# Other ways to break it are listed in [Symptom, cause, check](../docs/symptoms.md), for example a second OLoRA adapter on the
# same base, or a base in 4 bits, which has to be rounded anew when something is subtracted from it.
#
# ## Recap
#
# OLoRA learns faster than LoRA's default start here: at its own best rate it needs about two thirds of the steps to the same loss, and its
# validation loss is lower. The same start with random directions does as well in both, so the gain doesn't need the QR
# decomposition, and we see no gain in stability. You pay with a base model that has moved: switching the adapter off no longer
# gives the base, and other adapters on it break. If you use such a start, save the initial adapter, convert when you save, and
# check the folder on a fresh base. Otherwise use the default, and try several learning rates.

# %%
plotting.table(
    ["", "measured"],
    [
        ["OLoRA before training: logits differ by", step_0],
        *(
            [f"{what}: default, OLoRA, random", "; ".join(shown)]
            for what, shown in {
                "steps to a loss of 0.1": [
                    spread(sweeps.steps_to_loss(at_best[one], 0.1), ".0f")
                    for one in ("default", "olora", "random")
                ],
                "validation loss": [
                    spread(final_loss[one, best[one]], ".3f")
                    for one in ("default", "olora", "random")
                ],
            }.items()
        ),
        ["`sailor` with the converted adapter", f"{score:.0%}"],
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
# Put the folder of an adapter of yours here, and the folder of its base. The first check only reads the files. For the second
# the cell loads both, and the check compares the base's weights with those of a second copy.

# %%
my_adapter, my_base = "", ""
checked, on_base = my_adapter or plain, paths.own_folder(my_base or base_folder)
report = validation.check_adapter_folder(checked)
print(report, "\n")
if report.ok:
    loaded, untouched = (AutoModelForCausalLM.from_pretrained(on_base) for _ in range(2))
    loaded = PeftModel.from_pretrained(loaded, checked)
    print(validation.check_adapters(loaded, original_base=untouched))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · OLoRA is far ahead of LoRA after 50 steps, both at 1e-3. What do you ask?</summary>
# Whether 1e-3 is a good rate for both: at its own best rate each start has another curve. Then ask for a control, for
# several seeds, and for the end of the run.
# </details>
# <details><summary>2 · You score an OLoRA adapter, call <code>unload()</code>, and the base scores 0. Why?</summary>
# Loading took the start out of the base's weights, and unloading doesn't put it back. Load the base afresh.
# </details>
# <details><summary>3 · What must you save before training, and why?</summary>
# The initial adapter. The converted adapter is what was trained less what it started with, and after training the
# start is gone from the model. (Another QR decomposition of the same base gives it back, if you still have that base.)
# </details>

# %% [markdown]
# ## Where to read on
#
# - [OLoRA](https://arxiv.org/abs/2406.01775), Büyükakyüz 2024, and [PEFT's example with the
#   conversion](https://github.com/huggingface/peft/tree/main/examples/olora_finetuning)
# - [PiSSA](https://arxiv.org/abs/2404.02948), Meng et al. 2024; [EVA](https://arxiv.org/abs/2410.07170), Paischer et
#   al. 2024, with comparisons of starts; [rsLoRA](https://arxiv.org/abs/2312.03732);
#   [DoRA](https://arxiv.org/abs/2402.09353)
# - [PEFT: starts of LoRA](https://huggingface.co/docs/peft/main/en/developer_guides/lora#initialization)
# - [Decide](../docs/decide.md), with the other choices
#
# Next: [lesson 7](07_merging.ipynb) merges adapters, and proves that the merged model is the same.
