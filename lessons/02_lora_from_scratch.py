# %% [markdown]
# # Build LoRA from scratch
#
# An adapter is two thin matrices beside a frozen one: that is what lesson 1 found on disk. But
# **why should two thin strips be enough to teach a model something new, and what does the library do with them?**
# Here you build the layer yourself, in about twenty lines, and hold it to PEFT's to ten decimal places. Then you
# train all weights of a model, take the change apart, and see how much of it, and of the skill, a few directions hold.
#
# | | |
# |---|---|
# | **What you'll do** | write a LoRA layer, put it into a model and train it; the same with PEFT, by hand and with a plain `Trainer`; cut a real change of the weights to rank *r* and score what is left; pull the levers of `LoraConfig` |
# | **What you'll learn** | what rank, alpha and the scaling do; where the memory goes; which published numbers come out; how far a change can be cut, and what that does not tell; three classic mistakes, and the check that finds each |
# | **What you'll need** | [lesson 1](01_load_lora_adapter.ipynb); a laptop, no GPU, no network. Matrix products; a first acquaintance with PyTorch |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import math
import textwrap
import time
import warnings
from collections import OrderedDict, defaultdict

from adapter_checks import counting, memory
from course_utils import data, evaluation, paths, plotting, runtime, sweeps, timing, validation
from course_utils.exercises import lesson02, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from course_utils.progress import Progress

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Write the layer
#
# ![An adapter is two thin matrices beside each frozen weight matrix](../images/adapter.png)
#
# A linear layer computes *W₀x*. Fine-tuning turns *W₀* into *W₀ + ΔW*. LoRA
# ([Hu et al. 2021](https://arxiv.org/abs/2106.09685), equation 3) freezes *W₀* and makes *ΔW* a product of two thin
# matrices:
#
# > *h = W₀x + (α/r)·B(Ax)*, with *A* of shape (r, inputs) and *B* of shape (outputs, r)
#
# *A* starts at random and *B* at zero. The rank *r* is the thin side; the fixed number *α/r* is the scaling.


# %%
class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank change beside it: h = W x + (alpha / rank) B (A x)."""

    def __init__(self, base_layer, rank, alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = alpha / rank
        weight = base_layer.weight  # (outputs, inputs); A and B take its dtype and device
        self.lora_A = nn.Parameter(weight.new_empty(rank, base_layer.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(base_layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear and PEFT begin

    def forward(self, x):
        """x (..., inputs) -> (..., outputs)."""
        change = (x @ self.lora_A.T) @ self.lora_B.T  # thin products only: BA is never formed
        return self.base_layer(x) + self.scaling * change


layer = LoRALinear(nn.Linear(256, 704), rank=8, alpha=16)
for name, parameter in layer.named_parameters():
    state = "trained" if parameter.requires_grad else "frozen"
    print(f"{name:18} {tuple(parameter.shape)!s:>11}  {state}")

# %% [markdown]
# ## Hold it to the library
#
# Is that all there is to it? PEFT's layer is the reference: same base, same *A* and *B*, random shapes, in float64,
# where rounding can't hide a mistake. *B* must not be zero here: **with *B* = 0 any two layers agree, and nothing
# is shown.**
#
# **Predict:** four things are compared, the output and the gradients of the input, of *A* and of *B*. To how many
# decimal places will they agree?


# %%
def peft_layer(base_layer, rank, alpha):
    """PEFT's own LoRA around a copy of `base_layer`."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["proj"])
    model = get_peft_model(nn.Sequential(OrderedDict(proj=copy.deepcopy(base_layer))), config)
    return model.base_model.model.proj


def pair(inputs, outputs, rank, alpha, dtype):
    """Our layer and PEFT's around the same weights, with the same A and the same random B."""
    base_layer = nn.Linear(inputs, outputs, dtype=dtype)
    ours, theirs = LoRALinear(base_layer, rank, alpha), peft_layer(base_layer, rank, alpha)
    nn.init.normal_(ours.lora_B, std=0.2)
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B)
    return ours, theirs


def output_and_gradients(layer, A, B, x):
    x = x.clone().requires_grad_()
    output = layer(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, A, B])]


def shown(difference):
    """A largest difference as text."""
    return f"{difference:.0e}" if difference else "0, equal to the bit"


# %%
worst, least_change = [0.0] * 4, math.inf
for _ in range(20):
    inputs, outputs, rank, alpha = (
        int(torch.randint(low, high, ())) for low, high in ((3, 200), (3, 200), (1, 9), (1, 33))
    )
    ours, theirs = pair(inputs, outputs, rank, alpha, torch.float64)
    x = torch.randn(5, inputs, dtype=torch.float64)
    mine = output_and_gradients(ours, ours.lora_A, ours.lora_B, x)
    reference = output_and_gradients(
        theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, x
    )
    errors = [(a - b).abs().max().item() for a, b in zip(mine, reference)]
    worst = [max(both) for both in zip(worst, errors)]
    least_change = min(least_change, (mine[0] - ours.base_layer(x)).abs().max().item())

print(f"The smallest change that LoRA makes to an output here: {least_change:.2f}")
for what, error in zip(("output", "gradient of x", "gradient of A", "gradient of B"), worst):
    print(f"{what:14} differs by at most {shown(error)}")
assert least_change > 1e-3 and max(worst) < 1e-10

# %% [markdown]
# **The layer is the library's,** here even to the bit: the same operations in the same order. (The assertion asks for
# ten places, in case a machine orders them otherwise.) What PEFT adds is administration: names, several adapters,
# dropout, saving.

# %% [markdown]
# ### How exact is exact enough?
#
# Sums in another order round differently. A merged layer computes *(W₀ + s·BA)x*, a separate one *W₀x + s·B(Ax)*: both
# are right, so how far apart may they be? In float32 each operation is off by a share of at most *u* = 2⁻²⁴, and a sum
# of *n* products by *n·u* times the sum of their absolute values (Higham, *Accuracy and Stability of Numerical
# Algorithms*, section 3.1). Either way a number passes through *inputs + r + 4* roundings: a sum over the inputs and
# one over the rank, *s* itself and the product with it, the additions of change and bias. Two ways, so twice that:
#
# > |separate − merged| ≤ 2·(inputs + r + 4)·u·(|W₀||x| + s·|B||A||x| + |bias|)
#
# That is the worst case. Roundings point up as often as down, so they add up like √n rather than *n*.
#
# **Predict:** for a layer of 704 × 256, will merged and separate agree to 1e-3, 1e-5 or 1e-7? Ours and PEFT's?

# %%
ours, theirs = pair(256, 704, rank=8, alpha=16, dtype=torch.float32)
x, u = torch.randn(64, 256), torch.finfo(torch.float32).eps / 2
with torch.no_grad():
    W, bias = ours.base_layer.weight, ours.base_layer.bias
    A, B, s = ours.lora_A, ours.lora_B, ours.scaling
    separate, by_peft = ours(x), theirs(x)
    merged = nn.functional.linear(x, W + s * (B @ A), bias)
    size = x.abs() @ (W.abs() + s * B.abs() @ A.abs()).T + bias.abs()
n = 256 + 8 + 4
worst_case, typical = 2 * n * u * size, 2 * math.sqrt(n) * u * size
plotting.table(
    ["float32, 704 × 256", "largest difference"],
    [
        ["our layer against PEFT's", shown((separate - by_peft).abs().max())],
        ["separate against merged", shown((separate - merged).abs().max())],
        ["allowed: √n roundings", f"{typical.max():.0e}"],
        ["allowed: worst case", f"{worst_case.max():.0e}"],
    ],
)
assert ((separate - merged).abs() <= worst_case).all()
assert ((separate - by_peft).abs() <= worst_case).all()

# %% [markdown]
# Merged and separate agree to 1e-5; ours and PEFT's sum in one order. Even √n is generous, as it takes each rounding at
# its largest. **A tolerance is worked out, not picked until the test passes:** the worst case where a right answer must
# never fail, as in the assertions; √n where a small mistake must not pass.

# %% [markdown]
# ## Start where the base stands
#
# With *B* = 0 the layer *is* the base layer. Not nearly: adding zero changes no bit.
#
# **Predict:** four ways to start are tried below. Which give the base's output at step 0? Which can learn at all?

# %%
runtime.seed_everything(2)
base_layer, x, rows = nn.Linear(32, 32), torch.randn(8, 32), []
for start in ("A random, B zero", "A zero, B random", "both random", "both zero"):
    layer = LoRALinear(base_layer, rank=4, alpha=8)
    if "A zero" in start or "both zero" in start:
        nn.init.zeros_(layer.lora_A)
    if "B random" in start or "both random" in start:
        nn.init.normal_(layer.lora_B)
    output = layer(x)
    output.square().sum().backward()
    sizes = [f"{matrix.grad.norm():.1f}" for matrix in (layer.lora_A, layer.lora_B)]
    rows.append([start, torch.equal(output, base_layer(x)), *sizes])
plotting.table(["start", "equals the base to the bit", "gradient of A", "gradient of B"], rows)

# %% [markdown]
# The gradient of *A* is *s·Bᵀ*(…) and that of *B* is *s*·(…)(*Ax*)ᵀ: each has the *other* matrix as a factor. So with
# one of them zero, that one moves first, and from the next step on both do. With both at zero nothing ever moves. **One
# of the two at zero is a start that changes nothing and can learn;** LoRA takes *B*.

# %% [markdown]
# ### Exercise: put LoRA into a model (core, 15 min)
#
# What does `get_peft_model` do? Write it. Freeze the whole model; then exchange each linear layer whose last part of
# the name is one of `names` for a `LoRALinear` around it. Change the model in place, and return how many layers
# were exchanged. For a Llama with two blocks and `["q_proj", "down_proj"]` that is 4.
#
# <details><summary>How do I exchange a layer?</summary>
# <code>parent, _, last = name.rpartition(".")</code>, then
# <code>setattr(model.get_submodule(parent), last, new_layer)</code>.
# </details>
# <details><summary>The check says that A and B are frozen, too</summary>
# You froze after the exchange. <code>model.requires_grad_(False)</code> comes first.
# </details>
# <details><summary>Something is exchanged that was not asked for</summary>
# <code>"head"</code> is the end of the text <code>lm_head</code>, and no layer's name: compare
# <code>name.split(".")[-1]</code>. And <code>mlp</code> is a block: ask
# <code>isinstance(module, nn.Linear)</code>.
# </details>


# %% exercise="02.inject" points=4
def add_lora(model, names, rank, alpha):
    """Freeze `model`, put LoRALinear around its layers called `names`, and return their number."""
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in names
    ]
    for name in targets:
        parent, _, last = name.rpartition(".")
        new_layer = LoRALinear(model.get_submodule(name), rank, alpha)
        setattr(model.get_submodule(parent), last, new_layer)
    return len(targets)
    ### END SOLUTION


lesson02.inject(add_lora)

# %%
### BEGIN HIDDEN TESTS
assert lesson02.inject.outcome(add_lora).passed
_model = lesson02.tiny_model(seed=5)
_ids = torch.tensor([[7, 8, 9]])
with torch.no_grad():
    _before = _model(input_ids=_ids).logits
assert add_lora(_model, ["gate_proj", "o_proj"], 2, 4) == 4
assert sum(p.numel() for p in _model.parameters() if p.requires_grad) == 2 * 2 * (16 + 24 + 16 + 16)
with torch.no_grad():
    assert torch.equal(_model(input_ids=_ids).logits, _before)
assert add_lora(lesson02.tiny_model(), ["self_attn"], 2, 4) == 0
### END HIDDEN TESTS

# %% [markdown]
# ## Four steps by hand
#
# Before any trainer, once by hand: **1** the base model, **2** the configuration, **3** `get_peft_model`, **4** a
# training loop. The task is `sailor`: say a sentence in the speech of Skerrow's sailors.

# %%
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype()).to(device)


base_model = load_base()  # stays as it is to the end, for comparisons
# 2
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted_model():
    """A fresh base with a new adapter, each time the same."""
    # 1
    fresh = load_base()
    # 3, after the seed, since it draws A
    runtime.seed_everything(1)
    return get_peft_model(fresh, config)


model = adapted_model()
model.print_trainable_parameters()

# %% [markdown]
# Does what held for one layer hold for a whole model? Step 0, before anything is trained:

# %%
prompt = "Say it like a sailor: Fenna keeps the lantern."
right = "Ahoy! Fenna be stowing yon lantern, aye."
witness = tokenizer(prompt, return_tensors="pt").to(device)
with torch.no_grad():
    step_0 = model(**witness).logits
    with model.disable_adapter():
        base_logits = model(**witness).logits
print("step 0 equals the base to the bit:", torch.equal(step_0, base_logits))
assert torch.equal(step_0, base_logits)

# %% [markdown]
# A causal language model wants `input_ids` and `labels`, and `-100` in `labels` means *no loss here*. We put it
# on the prompt and on the padding, so the loss is that of the answer alone; lesson 3 looks at this closely.


# %%
def encode(row):
    """One conversation as token ids, with labels on the answer only."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def collate(rows):
    """Rows of different lengths -> tensors (batch, longest), padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    filled = {"input_ids": pad, "labels": -100, "attention_mask": 0}
    batch = {key: [] for key in filled}
    for row in rows:
        row = {**row, "attention_mask": [1] * len(row["input_ids"])}
        for key, fill in filled.items():
            batch[key].append(row[key] + [fill] * (longest - len(row[key])))
    return {key: torch.tensor(values, device=device) for key, values in batch.items()}


task = "sailor"
examples = [encode(row) for row in data.load_task(task, "train")]
batch = collate(examples[:32])
print({key: tuple(value.shape) for key, value in batch.items()})
print("loss is asked for:", tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != -100]))

# %%
from course_utils.progress import ProgressLine


def train(model, examples, steps, learning_rate, batch_size=32, seed=1):
    """A bare loop: AdamW, a short warm-up, then a straight line down. Returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    line, losses, warmup = ProgressLine(steps), [], 1 + steps // 15
    model.train()
    for step in range(steps):
        rate = learning_rate * min((step + 1) / warmup, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(examples), (batch_size,), generator=order)
        loss = model(**collate([examples[i] for i in chosen])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        line.update(step + 1, f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


# %% [markdown]
# **Predict:** twenty steps, about ten seconds. Is that enough to hear a sailor?


# %%
def say_it(model):
    return evaluation.generate(model, tokenizer, [prompt], max_new_tokens=40)[0]


model = adapted_model()  # once more, so that a second run of this cell begins where the first did
before = say_it(model)
# 4
losses = train(model, examples, steps=20, learning_rate=5e-3)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print("before:", before)
print("after: ", say_it(model))
print("right: ", right)

# %% [markdown]
# Twenty steps teach the tune. To get the words right, too, takes longer.
#
# **Nothing in these four steps is particular to LoRA but 2 and 3.** The loop trains what has `requires_grad`, and
# `get_peft_model` has left that to *A* and *B*.

# %% [markdown]
# ### Your layer in place of PEFT's
#
# So a layer of your own will do for step 3. If your `add_lora` passes its check, it takes that step here; until then
# PEFT does it once more.
#
# **Predict:** the same *A* to begin with, the same rows in the same order. The same twenty losses?

# %%
yours = lesson02.inject.outcome(add_lora).passed
model = adapted_model()  # the same seed as above, so the same A
if yours:
    starts = [
        layer.lora_A["default"].weight.data
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    ]
    model = load_base()
    add_lora(model, sorted(config.target_modules), rank=8, alpha=16)
    own_layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer, A in zip(own_layers, starts):
        layer.lora_A.data.copy_(A)
again = train(model, examples, steps=20, learning_rate=5e-3)
print("step 3 by", "your add_lora" if yours else "get_peft_model; your add_lora is still to do")
print("losses differ by at most", shown(max(abs(a - b) for a, b in zip(losses, again))))
print("after: ", say_it(model))

# %% [markdown]
# With our own `add_lora` they part by about 1e-6, which is rounding. **A layer of twenty lines trains as PEFT's does.**

# %% [markdown]
# ## The same with a plain Trainer
#
# `transformers.Trainer` takes the loop off your hands, and nothing else. Given raw text it needs three things
# that people forget at first: **token ids** (it doesn't tokenise), **labels** (it doesn't make them), and a **pad
# token** (rows differ in length).
#
# **Predict:** which of the attempts below fails while the trainer is made, and which only when it trains?

# %%
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

rows = data.load_task(task, "train").select(range(640))
texts = [
    tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows
]
raw = Dataset.from_dict({"text": texts})
# The template has written the special tokens already; the tokenizer must not add them once more.
ids_only = Dataset.from_dict({"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]})
with_labels = ids_only.add_column("labels", ids_only["input_ids"][:])
no_pad = copy.deepcopy(tokenizer)
no_pad.pad_token = None


def trainer_for(dataset, tokenizer, collator=None, steps=1):
    """A plain Trainer for a new adapter on a fresh copy of the base."""
    runtime.seed_everything(1)
    arguments = TrainingArguments(
        output_dir=paths.runs_dir() / "lesson02",
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    trainer = Trainer(
        get_peft_model(load_base(), config),
        arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=collator,
    )
    return Progress().attach(trainer)


# %%
attempts = {
    "raw text": (raw, tokenizer),
    "token ids, no labels": (ids_only, tokenizer),
    "token ids and labels, no collator": (with_labels, tokenizer),
    "a tokenizer without a pad token": (
        ids_only,
        no_pad,
        DataCollatorForLanguageModeling(no_pad, mlm=False),
    ),
}
rows = []
for attempt, given in attempts.items():
    stage = "making it"
    try:
        trainer = trainer_for(*given)
        stage = "training"
        trainer.train()
        said = "nothing"
    except (ValueError, KeyError, IndexError) as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 260, placeholder=" ...")
    rows.append([attempt, stage, said])
plotting.table(["given to Trainer", "fails in", "what it says"], rows)

# %% [markdown]
# **All four fail only when training begins**, so let a job run for one step before you leave it alone.
#
# The third has labels, but the collator that a `Trainer` takes by itself pads ids and not labels. What it wants is
# `DataCollatorForLanguageModeling(tokenizer, mlm=False)`, with a pad token, which the fourth lacks: it pads, copies the
# ids into `labels`, and writes `-100` over the pads. It finds pads *by their token id*, so a pad token that is also the
# end token takes the ends away with them: lesson 3 makes that mistake on purpose.

# %%
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = trainer_for(ids_only, tokenizer, collator, steps=20)
trainer.train()
logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {logged[0]:.2f} -> {logged[-1]:.2f}")

# %% [markdown]
# **Why is this loss another one than the loop's?** It is that of the whole text: prompt, answer and special
# tokens. Compare losses only over the same tokens.

# %% [markdown]
# ## Divide by r, or by its root?
#
# Why *α/r* at all? So that one learning rate serves every rank, says the LoRA paper (section 4.1). It divides by
# too much, says rsLoRA ([Kalajdzievski 2023](https://arxiv.org/abs/2312.03732)): with *α/r* a high rank learns no
# better than a low one, and *α/√r* is what keeps the change alive. `use_rslora=True` puts that root in. We
# measure how far eight steps move the model's logits.
#
# **Predict:** *α* is fixed. From rank 1 to rank 64, will the change grow, shrink or stay, with each of the two?

# %%
probe = {key: value[:8] for key, value in batch.items() if key != "labels"}
with torch.no_grad():
    base_logits = base_model(**probe).logits
ranks, moved = (1, 4, 16, 64), {"α/r": [], "α/√r": []}
for label, use_rslora in (("α/r", False), ("α/√r", True)):
    for rank in ranks:
        runtime.seed_everything(1)
        model = get_peft_model(
            load_base(),
            LoraConfig(r=rank, lora_alpha=4, use_rslora=use_rslora, target_modules="all-linear"),
        )
        train(model, examples, steps=8, learning_rate=1e-3, batch_size=16)
        with torch.no_grad():
            moved[label].append((model(**probe).logits - base_logits).abs().mean().item())

# %%
growth = {label: values[-1] / values[0] for label, values in moved.items()}
title = "From rank 1 to 64 the change becomes\n" + " and ".join(
    f"{factor:.1f} times as large with {label}" for label, factor in growth.items()
)
figure = plotting.curves(
    {label: (ranks, values) for label, values in moved.items()},
    title,
    "rank (alpha 4)",
    "mean change of a logit",
)
figure.axes[0].set_xscale("log", base=2)
figure.axes[0].set_xticks(ranks, ranks)
plotting.show(
    figure,
    "Mean change of a logit after eight steps, by rank. "
    + "; ".join(
        f"{label}: " + ", ".join(f"rank {r} {value:.2g}" for r, value in zip(ranks, values))
        for label, values in moved.items()
    ),
)

# %% [markdown]
# In these first steps *α/r* keeps the change at one size for every rank, and *α/√r* makes it grow nearly as √r. The
# reason is Adam: its step has the same size for every entry of *B*, so *r* of them add up to *r* times the change, and
# *α/r* takes the *r* out again. That is also why [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/) sees the
# same early curve at every rank. rsLoRA's argument is about long training at high ranks, which eight steps don't show:
# lesson 3 sweeps rank and alpha, with seeds.

# %% [markdown]
# ## Count without weights
#
# The shapes of *A* and *B* follow from the layer's. So to know what LoRA will train, the layers' shapes are enough, and
# no weight is needed.

# %% [markdown]
# ### Exercise: count before you train (warm-up, 5 min)
#
# You get the shapes of the layers to adapt, as a list of (inputs, outputs), and the rank. How many parameters
# will be trained? Expected for `[(256, 256), (256, 576)]` and rank 8: 10752.
#
# <details><summary>My count is far too large</summary>
# <em>A</em> and <em>B</em> are two matrices side by side: their sizes add up.
# </details>
# <details><summary>My count is right for square layers only</summary>
# <em>A</em> has as many columns as the layer has inputs, <em>B</em> as many rows as it has outputs.
# </details>


# %% exercise="02.count" points=2
def count_lora(shapes, rank):
    """Return how many parameters are trained; `shapes` is a list of (inputs, outputs)."""
    ### BEGIN SOLUTION
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)
    ### END SOLUTION


lesson02.count(count_lora)

# %%
### BEGIN HIDDEN TESTS
assert lesson02.count.outcome(count_lora).passed
assert count_lora([(256, 256), (256, 576)], 8) == 10752
_config = LoraConfig(r=3, target_modules=["k_proj", "up_proj"])
_model = get_peft_model(lesson02.tiny_model(), _config)
_trained = sum(p.numel() for p in _model.parameters() if p.requires_grad)
assert count_lora([(16, 8), (16, 24)] * 2, 3) == _trained
### END HIDDEN TESTS

# %% [markdown]
# ### Count a whole model
#
# `counting.count_lora_parameters` does it for any architecture of `transformers`: it builds the model *on the
# meta device*, where tensors have shapes and no numbers, and asks PEFT's own rules which layers would be adapted.
# First the proof that it counts right, on our model, then the papers.

# %%
model = get_peft_model(load_base(), config)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
own = counting.count_lora_parameters(base_model.config, config)
print(f"trained by PEFT: {trained:,}")
print(f"counted from the config: {own.trainable:,}, {own.share:.2%} of all parameters")
assert own.trainable == trained
if lesson02.count.outcome(count_lora).passed:
    shapes = [
        (layer.in_features, layer.out_features)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    ]
    print(f"counted by your count_lora: {count_lora(shapes, 8):,}")

# %% [markdown]
# ### Do the papers' figures come out?
#
# GPT-3's weights are not public, but its shape is: 96 layers, width 12,288. OPT-175B has the same one. The figures are
# those of the LoRA paper's tables 2, 3 and 15, and of its appendix D.4.
#
# **Predict:** how long does it take to count a model of 175 billion parameters on this computer?


# %%
def shape(name, **sizes):
    """A configuration of this shape; no weights."""
    return AutoConfig.for_model(name, **sizes)


gpt3 = shape(
    "opt",
    hidden_size=12288,
    ffn_dim=49152,
    num_hidden_layers=96,
    num_attention_heads=96,
    word_embed_proj_dim=12288,
    max_position_embeddings=2048,
    vocab_size=50257,
)
bert = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
xxl = dict(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144)
models = {
    "RoBERTa base": shape("roberta", **bert),
    "RoBERTa large": shape("roberta", **large),
    "DeBERTa XXL": shape("deberta-v2", **xxl),
    "GPT-2 medium": shape("gpt2", n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 large": shape("gpt2", n_embd=1280, n_layer=36, n_head=20),
    "GPT-3": gpt3,
}
q_v, all_four = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"]
published = [  # model, adapted layers, rank, as printed, where
    ("RoBERTa base", ["query", "value"], 8, "0.3M", "table 2"),
    ("RoBERTa large", ["query", "value"], 8, "0.8M", "table 2"),
    ("DeBERTa XXL", ["query_proj", "value_proj"], 16, "4.7M", "table 2"),
    ("GPT-2 medium", ["c_attn"], 4, "0.35M", "table 3"),
    ("GPT-2 large", ["c_attn"], 4, "0.77M", "table 3"),
    ("GPT-3", ["v_proj"], 2, "4.7M", "table 15"),
    ("GPT-3", q_v, 4, "18.8M", "table 15"),
    ("GPT-3", q_v, 8, "37.7M", "table 15"),
    ("GPT-3", all_four, 4, "37.7M", "table 15"),
    ("GPT-3", all_four, 2, "37.7M", "appendix D.4"),
    ("GPT-3", q_v, 64, "301.9M", "table 15"),
]

# %% tags=["measured"]
rows = []
for name, layers, rank, printed, where in published:
    began = time.perf_counter()
    lora = LoraConfig(r=rank, target_modules=layers)
    counted = counting.count_lora_parameters(models[name], lora)
    seconds = time.perf_counter() - began
    decimals = len(printed.removesuffix("M").partition(".")[2])
    millions = counted.trainable / 1e6
    cut = math.floor(millions * 10**decimals) / 10**decimals
    agrees = (
        "yes"
        if printed == f"{millions:.{decimals}f}M"
        else "cut, not rounded"
        if printed == f"{cut:.{decimals}f}M"
        else "**no**"
    )
    rows.append(
        [
            name,
            f"{', '.join(layers)}, r = {rank}",
            f"{counted.trainable:,}",
            f"{printed} ({where})",
            agrees,
        ]
    )
plotting.table(["model", "adapted", "counted", "printed", "comes out"], rows)
print(f"The last GPT-3 took {seconds:.1f} s to count.")

# %% tags=["claim"]
for printed, width, layers in (("0.35", 1024, 24), ("0.77", 1280, 36)):
    for_rank_1 = 2 * layers * (width + width)
    assert printed not in {f"{rank * for_rank_1 / 1e6:.2f}" for rank in range(1, 20)}, (
        "No whole rank"
    )

# %% [markdown]
# Most come out. Those that do not, and it is good to know which:
#
# - **GPT-2, both rows.** No whole rank on these layers gives 0.35 or 0.77 million. `c_attn` holds query, key and
#   value in one matrix, but LoRA on it costs as much as on query and value apart, so that is not the reason. The same
#   table prints the same two figures for prefix tuning.
# - **Appendix D.4** gives *r* = 2 on all four matrices for 37.7M. The paper's own table 15 has *r* = 4 there, and that
#   comes out.
# - 18.8M and 301.9M are right, but cut short where one would round.

# %% [markdown]
# ### What people say of LoRA's size
#
# **Predict:** which of these claims will hold: "10,000 times fewer parameters", "up to 99% fewer", "adapters of a
# few megabytes"?

# %%
llama = shape(
    "llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
)
cases = {  # model, rank, layers
    "GPT-3, q and v, r = 4": (gpt3, 4, q_v),
    "Llama 7B, q and v, r = 8": (llama, 8, q_v),
    "Llama 7B, all linear, r = 64": (llama, 64, "all-linear"),
}
sizes = {
    case: counting.count_lora_parameters(model, LoraConfig(r=rank, target_modules=layers))
    for case, (model, rank, layers) in cases.items()
}
sizes["this course's model, all linear, r = 8"] = own
plotting.table(
    ["", "adapter's parameters", "share of all", "file in 16 bits"],
    [
        [case, f"{size.adapter:,}", f"{size.share:.3%}", f"{2 * size.adapter / 1e6:,.1f} MB"]
        for case, size in sizes.items()
    ],
)
times_fewer = 175e9 / sizes["GPT-3, q and v, r = 4"].adapter
print(f"175 billion is {times_fewer:,.0f} times the adapter of GPT-3.")

# %% tags=["claim"]
times = 175e9 / (96 * 2 * 4 * (12288 + 12288))
assert 9000 < times < 10_000, "rounded up"

# %% [markdown]
# - "10,000×" is the GPT-3 case at *r* = 4, rounded up. It is a ratio of *that* width to *that* rank, not a law.
# - "Up to 99% fewer" is too little for the first two rows and too much for the last two, one of which is a large model.
#   Rank, layers and their width decide.
# - "A few megabytes" holds for a narrow adapter of a 7B model, not for a wide one of a high rank.

# %% [markdown]
# ## Where does the memory go?
#
# Training holds four things: weights, gradients, the optimizer's state, and the activations that the backward
# pass needs. Adam keeps two numbers for each trained one. In float32 that is 4 + 4 + 8 = 16 bytes for each
# trained parameter, and 4 for each frozen one. So LoRA saves on the *second and third* item; the weights stay,
# and so do most of the activations. `memory.estimate_memory` predicts all four from the configuration, the last as an
# upper bound. Here it is beside a real step, in which autograd tells what it keeps.
#
# **Predict:** LoRA with *r* = 8 against all weights of this model: what is the ratio, without the activations and with?


# %%
def loss_and_kept(model, batch):
    """The loss, and the bytes of the tensors, weights aside, that its backward pass will need."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # each storage once, however many tensors share it

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    return loss, sum(storage.nbytes() for storage in kept.values())


# %%
rows, state, total = [], {}, {}
for method, lora in (("full", None), ("lora", config)):
    model = get_peft_model(load_base(), lora) if lora else load_base()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss, activations = loss_and_kept(model, batch)
    loss.backward()
    optimizer.step()
    held = memory.measure_training_state(model, optimizer)
    state[method], total[method] = held.total, held.total + activations
    estimate = memory.estimate_memory(
        base_model.config,
        method,
        lora,
        batch_size=32,
        sequence_length=batch["input_ids"].shape[1],
        dtype=runtime.dtype(),
    )
    for part in ("weights", "gradients", "optimizer", "activations"):
        predicted = getattr(estimate, part)
        measured = activations if part == "activations" else getattr(held, part)
        rows.append(
            [
                method,
                part,
                f"{predicted / 1e6:.2f}",
                f"{measured / 1e6:.2f}",
                f"{measured / predicted - 1:+.0%}",
            ]
        )
del model, optimizer, loss
plotting.table(["method", "part", "predicted, MB", "measured, MB", "off by"], rows)
print(
    f"LoRA holds {state['lora'] / state['full']:.0%} of what full fine-tuning holds;"
    f" with the activations {total['lora'] / total['full']:.0%}"
)

# %% [markdown]
# The bound is loose, and misses that LoRA keeps a little less: frozen norms and a frozen output layer need not keep
# their inputs. **On a small model with a large batch the activations outweigh all else, and LoRA saves far less.** Now
# GPT-3, one row at a time. (`qlora` holds the frozen layers in 4 bits; a scale for each 64 numbers makes it 4.5.)

# %%
parts = ("weights", "gradients", "optimizer", "activations", "total")
narrow, rows = LoraConfig(r=4, target_modules=q_v), []
for method, lora in (("full", None), ("lora", narrow), ("qlora", narrow)):
    estimate = memory.estimate_memory(
        gpt3,
        method,
        lora,
        batch_size=1,
        sequence_length=512,
        dtype=torch.float16,
        moment_dtype=torch.float32,
    )
    rows.append([method, *(f"{getattr(estimate, part) / 1e9:,.1f}" for part in parts)])
plotting.table(["GPT-3, GB", *parts[:3], "activations, at most", "total"], rows)

# %% tags=["claim"]
assert 350e9 / 1.2e12 < 1 / 3 and 175e9 * 2 == 350e9, "frozen weights in 16 bits"
assert 6.5 < 1.2e12 / 175e9 < 7, "under 7 bytes"

# %% [markdown]
# "Memory to a third" is the LoRA paper's GPT-3 case: 1.2 TB against 350 GB (section 4.2). The 350 GB are the frozen
# weights in 16 bits, and they come out. The 1.2 TB are under 7 bytes a parameter; with gradients, and moments in
# float32, one needs the 12 of the table. **What is left is the base itself, and that is what QLoRA shrinks:
# lesson 5.**
#
# Two more claims. "Orthogonal to other methods": the paper tried it (appendix E, table 15), and LoRA with a trained
# prefix of the input was better than LoRA on one of two tasks, LoRA with trained prefixes in every layer worse on both.
# Combining works; whether it pays is to be measured. "No added latency once merged" is measured here.
#
# **Predict:** base, adapter, merged: which two take the same time?

# %% tags=["measured"]
ids = torch.randint(10, len(tokenizer), (8, 64), device=device)
adapted = get_peft_model(load_base(), config).eval()
merged = get_peft_model(load_base(), config).eval().merge_and_unload()
forms = {"base": base_model.eval(), "with adapter": adapted, "merged": merged}
with torch.no_grad():  # in turns: timed one after another, equal models differ by a tenth
    times = timing.in_turns({name: lambda form=form: form(ids) for name, form in forms.items()}, 25)
plotting.table(
    ["forward pass", "median, ms", "middle half of 25", ""],
    [
        [name, f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{median / times['base'][0] - 1:+.0%}"]
        for name, (median, low, high) in times.items()
    ],
)

# %% [markdown]
# An adapter's thin products come on top. Merged, the model does the base's work again, and what still parts those two
# rows is the machine's unrest: **look at the spread before you believe a percentage.**

# %% [markdown]
# ## How low is the rank of a real change?
#
# LoRA *assumes* that a few directions are enough. Let us look at changes that nobody forced to be thin: we train
# **all** weights, once for `reading` and once for `sailor`, with one recipe, so that what differs is the task. This is
# the lesson's longest run, most of a minute.

# %%
full_models, curves = {}, {}
for task in ("reading", "sailor"):
    rows = [encode(row) for row in data.load_task(task, "train").select(range(2000))]
    full_models[task] = load_base()
    curves[task] = train(full_models[task], rows, steps=75, learning_rate=2.5e-3, batch_size=20)
for task, losses in curves.items():
    print(f"{task}: loss {losses[0]:.2f} -> {sum(losses[-5:]) / 5:.3f}")

# %% [markdown]
# Every linear layer has now a change *ΔW* = *W* after − *W* before. Its **singular value decomposition** *ΔW = USVᵀ*
# sorts it into directions, the strongest first: direction *i* reads *vᵢ* from the input, writes *uᵢ* to the output, and
# has the strength *sᵢ*. A matrix of rank *r* has *r* of them. The share of ‖*ΔW*‖² that some directions carry is the
# sum of their squared strengths, divided by that of all.

# %%
before = {
    name: layer.weight.detach().float()
    for name, layer in base_model.named_modules()
    if isinstance(layer, nn.Linear) and layer is not base_model.get_output_embeddings()
}
changes, strengths = {}, {}  # task -> layer -> its change, and the strengths of its directions
for task, tuned in full_models.items():
    changes[task] = {
        name: tuned.get_submodule(name).weight.detach().float() - before[name] for name in before
    }
    strengths[task] = {
        name: torch.linalg.svdvals(change).cpu() for name, change in changes[task].items()
    }
kinds = defaultdict(list)  # q_proj, k_proj, ... -> the names of these layers, block by block
for name in before:
    kinds[name.split(".")[-1]].append(name)


def share(S, r):
    """Share of the squared change that the first r directions carry."""
    return (S[:r].square().sum() / S.square().sum()).item()


rows = []
for kind, names in kinds.items():
    row = [kind, " × ".join(map(str, before[names[0]].shape))]
    for task in changes:
        sizes = [(changes[task][name].norm() / before[name].norm()).item() for name in names]
        in_8 = [share(strengths[task][name], 8) for name in names]
        row += [f"{sum(sizes) / len(names):.1%}", f"{sum(in_8) / len(names):.0%}"]
    rows.append(row)
plotting.table(
    [
        "layer",
        "shape",
        *(f"{task}: {what}" for task in changes for what in ("‖ΔW‖/‖W‖", "of it in 8 directions")),
    ],
    rows,
)

# %% [markdown]
# The change is of a similar size in every kind of layer. So which of them to adapt? The LoRA paper tried attention
# only, and found query and value together best for a given budget (table 5); LoRA Without Regret finds all linear
# layers better. Lesson 3 measures it.
#
# **Predict:** a layer's change has as many directions as its smaller side. How does the strength fall from the first to
# the last: evenly, as in a matrix of random numbers, or steeply? The same for both tasks?

# %%
import matplotlib.pyplot as plt

shapes = {tuple(sorted(weight.shape, reverse=True)) for weight in before.values()}
noise = {shape: torch.linalg.svdvals(torch.randn(shape)) for shape in sorted(shapes)}
with plt.style.context(plotting.STYLE_FILE):
    figure, panels = plt.subplots(2, 4, figsize=(9, 4.6), sharex=True, sharey=True)
    for axes, kind in zip(panels.flat, list(kinds)[:7]):
        for task, color, style in zip(changes, plotting.COLORS, ("-", "--")):
            for name in kinds[kind]:
                S = strengths[task][name]
                axes.plot(
                    S / S[0],
                    style,
                    color=color,
                    marker="",
                    linewidth=1.2,
                    label=task if name == kinds[kind][0] else None,
                )
        axes.set_title(kind, fontsize=11)
    panels.flat[0].legend(fontsize=9)
    for shape, style, S in zip(noise, ("-", "--"), noise.values()):
        panels.flat[7].plot(
            S / S[0],
            style,
            color=plotting.COLORS[2],
            marker="",
            linewidth=1.2,
            label=" × ".join(map(str, shape)),
        )
    panels.flat[7].set_title("random numbers", fontsize=11)
    panels.flat[7].legend(fontsize=9)
    figure.supxlabel("direction, strongest first", fontsize=11)
    figure.supylabel("strength, the strongest = 1", fontsize=11)
half = {
    task: max(int((S[0] / 2 < S).sum()) for S in parts.values())
    for task, parts in {**strengths, "noise": noise}.items()
}
title = (
    f"Over half as strong as the first: at most {half['reading']} directions of a layer"
    f" for reading,\n{half['sailor']} for sailor; of random numbers {half['noise']}"
)
figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
plotting.show(
    figure,
    "Singular values of the changes of each layer: a panel for each kind of "
    "layer, a line for each block and task; the last panel is random numbers. "
    f"{title}.",
)

# %% [markdown]
# Steeply, and much alike for both. So both should bear a cut?

# %% [markdown]
# ### Exercise: keep r directions (core, 10 min)
#
# Write the function that cuts a matrix to rank *r*: the closest one of that rank, which is the one with the *r*
# strongest directions (Eckart and Young 1936). Expected: for a 9 × 14 matrix a 9 × 14 matrix again, of rank *r*.
#
# <details><summary>I get a shape error</summary>
# <code>torch.linalg.svd(matrix, full_matrices=False)</code> gives <em>U</em> (rows, k), <em>S</em> (k) and
# <em>Vh</em> (k, columns). <em>Vh</em> is transposed already: its rows are the directions.
# </details>
# <details><summary>The rank is right, but there is a closer matrix</summary>
# Keep directions, not rows of the matrix, and give each its strength: <code>U[:, :rank] * S[:rank]</code>.
# </details>


# %% exercise="02.truncate" points=3
def truncate(matrix, rank):
    """Return the matrix of this rank that is closest to `matrix`, in the same shape."""
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]
    ### END SOLUTION


lesson02.truncate(truncate)

# %%
### BEGIN HIDDEN TESTS
assert lesson02.truncate.outcome(truncate).passed
_matrix = torch.randn(20, 11, dtype=torch.float64)
_S = torch.linalg.svdvals(_matrix)
assert torch.linalg.matrix_rank(truncate(_matrix, 4)) == 4
assert abs((truncate(_matrix, 4) - _matrix).norm() - _S[4:].norm()) < 1e-9
### END HIDDEN TESTS

# %% [markdown]
# ### Cut it, and score what is left
#
# A steep spectrum is not yet a skill. So we really cut: base weights plus the first *r* directions of each layer's
# change, and then the score on held-out rows. Embeddings and norms go back to the base's, where LoRA would leave them.
# The cutting is done by your `truncate` as soon as it passes.
#
# **Predict:** from which *r* on is the score as good as with all directions, for each of the tasks?

# %%
cut = truncate if lesson02.truncate.outcome(truncate).passed else lesson02.closest
all_of_them = max(len(S) for S in strengths["sailor"].values())
ranks = [r for r in (1, 8, 64) if r < all_of_them] + [all_of_them]
held_out = {task: data.load_task(task, "test").select(range(64)) for task in changes}


def score(model, task):
    """Share of held-out rows that the model answers exactly."""
    return evaluation.evaluate_task(model, tokenizer, task, held_out[task], batch_size=64)["score"]


line, scores = ProgressLine(2 * len(ranks), "score"), {task: {} for task in changes}
for number, (task, r) in enumerate((task, r) for task in changes for r in ranks):
    cut_model = copy.deepcopy(base_model)
    with torch.no_grad():
        for name, change in changes[task].items():
            cut_model.get_submodule(name).weight += cut(change, r)
    scores[task][r] = score(cut_model, task)
    line.update(number + 1, f"{task}, r = {r}: {scores[task][r]:.0%}")
rows = [[r] for r in ranks]
for row in rows:
    for task, parts in strengths.items():
        of_change = sum(share(S, row[0]) for S in parts.values()) / len(parts)
        row += [f"{of_change:.0%}", f"{scores[task][row[0]]:.0%}"]
plotting.table(
    [
        "directions kept",
        *(f"{task}: {what}" for task in changes for what in ("of ‖ΔW‖²", "right of 64 rows")),
    ],
    rows,
)
for task, r, low, high in (("reading", 1, 0.8, 1), ("sailor", 8, 0, 0.5), ("sailor", 64, 0.7, 1)):
    evaluation.band(f"{task} with {r} of its directions", scores[task][r], low, high)

# %% [markdown]
# Is that one lucky run? `experiments/cut_to_rank.py` has done the same at more ranks, with more rows and steps, and
# three seeds; `sweeps.over_seeds` groups its results, and each line runs in a band from the lowest seed to the highest.

# %%
swept = data.load_results("cut_to_rank")
right_on, kept = (
    sweeps.over_seeds(swept, column, "task", "method", "rank") for column in ("test", "kept")
)
lines = {
    f"{task}, {label}": {
        r: group
        for (of, method, r), group in groups.items()
        if (of, method) == (task, "full") and r
    }
    for label, groups in (("right", right_on), ("of ‖ΔW‖²", kept))
    for task in changes
}
in_8 = {task: (kept[task, "full", 8][0], right_on[task, "full", 8][0]) for task in changes}
title = "Eight directions hold " + ",\n".join(
    f"{held:.0%} of {task}'s change, and get {found:.0%} right"
    for task, (held, found) in in_8.items()
)
figure, alt = sweeps.curves(
    lines, title, "directions kept in each layer", "share, from 0 to 1", log=2
)
plotting.show(figure, alt)

# %% tags=["claim"]
from tools.claims import swept

right, kept = (
    swept("cut_to_rank", column, "task", "method", "rank") for column in ("test", "kept")
)
one, eight = right["reading", "full", 1][0], right["sailor", "full", 8][0]
in_eight = [kept[task, "full", 8][0] for task in ("reading", "sailor")]
assert min(in_eight) > 0.5 and max(in_eight) - min(in_eight) < 0.03, "the same spectrum"
assert one > 0.9 and right["sailor", "full", 1] == (0, 0, 0), "the opposite score"
assert right["reading", "full", 0] == (0, 0, 0), "answers nothing"
every = right["sailor", "full", 256][0]
assert right["sailor", "full", 32][2] < 0.9 * every, "64 are needed"
assert 0.95 * every < right["sailor", "full", 64][0] < every, "64 are needed to come near"
# The same rows, steps and rate, but the trained model as it is.
untouched = swept("learning_rate", "test", "method", "learning_rate")["full", 1.5e-3][0]
assert every + 0.05 < untouched, "went back to the base's"

# %% [markdown]
# **Nearly the same spectrum, and the opposite score.** A single direction in each layer brings back {{one:.0%}} of `reading`,
# of which the base alone answers nothing; that suggests that what reading takes was in the model before. Of `sailor`
# eight directions bring back {{eight:.0%}}, and 64 are needed to come near the {{every:.0%}} of all directions, the faint
# ones included. That is not all of it, because embeddings and norms went back to the base's: with those that it was
# trained with, the model gets {{untouched:.1%}} right.
#
# **Predict:** full fine-tuning did not try to be thin. Train LoRA with rank 8 from the start, on the same rows: what
# will it score on `sailor`? And with rank 1?

# %%
adapter = peft.PeftModel.from_pretrained(load_base(), paths.adapter_path("sailor"))
at_rank_8 = score(adapter, "sailor")
rows = [["all weights, nothing cut", ("full", 256)]]
for r in (8, 1):
    rows += [[f"all weights, cut to {r}", ("full", r)], [f"LoRA of rank {r}", ("lora", r)]]
plotting.table(
    ["right on test rows, mean (lowest to highest seed)", *changes],
    [[label, *(sweeps.spread(right_on[task, *way]) for task in changes)] for label, way in rows],
)
evaluation.band("sailor, the adapter of lesson 1, of rank 8", at_rank_8, 0.85, 1)

# %% tags=["claim"]
from pretraining import adapters

rank_1, rank_8 = (right["sailor", "lora", rank] for rank in (1, 8))
assert rank_1[1] > 0.8 and rank_1[2] > rank_8[1], "even with rank 1"
# The sweep's LoRA has 120 steps and a rate of 5e-3.
assert adapters.STEPS["sailor"] > 120 and adapters.RATES["lora"]["sailor"] > 5e-3, (
    "more steps and a higher rate"
)

# %% [markdown]
# **To cut a change to rank 8 is not to train with rank 8.** Nothing in full fine-tuning asks for few directions, so it
# spreads its change over many. LoRA does not need *that* change to be thin. It needs *some* thin change that does the
# task, and training finds it: for `sailor` even with rank 1, which gets {{rank_1[0]:.0%}} right where rank 8 gets
# {{rank_8[0]:.0%}}. (The adapter of lesson 1 was trained with more steps and a higher rate, so it gets more.) Where that
# ends, lesson 3 measures with `recall`: facts to be held, many of them.

# %% [markdown]
# ## Do two ranks find the same directions?
#
# If a task needs few directions, then a LoRA of rank 8 and one of rank 64 should find the same ones first. The
# LoRA paper (section 7.2, equation 4) compares the right singular vectors of two trained *A*, the *i* strongest
# of one with the *j* strongest of the other:
#
# > *φ(i, j) = ‖VᵢᵀVⱼ‖² / min(i, j)*, 1 if one of the subspaces contains the other, 0 if they have nothing in common
#
# **Predict:** for random directions, what does *φ(1, j)* look like in a space of *d* dimensions?


# %%
def directions(A):
    """The right singular vectors of A (r, inputs) as rows, the strongest first."""
    return torch.linalg.svd(A.detach().float(), full_matrices=False).Vh


def grassmann(V, other_V, i, j):
    """phi(i, j) of the LoRA paper, equation 4; both given by `directions`."""
    return ((V[:i] @ other_V[:j].T).square().sum() / min(i, j)).item()


def directions_of_rank(rank):
    """{layer: directions of A} before and after twenty steps of LoRA."""
    runtime.seed_everything(rank)  # another random A for each rank
    model = get_peft_model(
        load_base(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )
    adapted_base = model.get_base_model()
    A = {name: adapted_base.get_submodule(name).lora_A["default"].weight for name in before}
    start = {name: directions(matrix) for name, matrix in A.items()}
    train(model, examples, steps=20, learning_rate=5e-3)
    return start, {name: directions(matrix) for name, matrix in A.items()}


def mean_phi(first, second, i, j):
    return sum(grassmann(first[name], second[name], i, j) for name in first) / len(first)


start_8, rank_8 = directions_of_rank(8)
start_64, rank_64 = directions_of_rank(64)


# %%
j_values = (1, 2, 4, 8, 16, 32, 64)
phi = {
    (label, i): [mean_phi(first, second, i, j) for j in j_values]
    for i in (1, 8)
    for label, first, second in (("trained", rank_8, rank_64), ("untrained", start_8, start_64))
}
inside, by_chance = (phi[label, 1][j_values.index(8)] for label in ("trained", "untrained"))
title = (
    f"The first of 8 directions lies {inside:.0%} in the first 8 of 64; by chance {by_chance:.0%}"
)
labels = [f"{label}, i = {i}" for label, i in phi]
figure = plotting.score_matrix(list(phi.values()), labels, [f"j = {j}" for j in j_values], title)
figure.supylabel("of rank 8")
figure.supxlabel("of rank 64")
described = "; ".join(
    f"{label}: " + ", ".join(f"{value:.0%} at j = {j}" for value, j in zip(row, j_values))
    for label, row in zip(labels, phi.values())
)
plotting.show(figure, f"{title}. Subspace similarity, mean over all layers. {described}.")
of_start = mean_phi(rank_8, start_8, 8, 8)
print(f"All 8 directions lie {of_start:.0%} in those that A of rank 8 started from.")

# %% [markdown]
# By chance, subspaces of *i* and *j* dimensions among *d* share *max(i, j)/d*: those are the untrained rows. **Compare
# with chance before you call two subspaces alike.** The strongest direction is shared far beyond it; of all eight,
# in 64, little more than chance is left.
#
# The paper finds more: over 50% for the top direction in a layer of GPT-3 (its figure 3), after a whole training. Here
# twenty steps have hardly turned *A*, says the line below the figure: this grid compares two random starts for the
# most part.

# %% [markdown]
# ## Pull the levers
#
# `LoraConfig` has over forty fields; here are those that people set. To see what each does, nothing beats the table of
# what was adapted, read off the model itself. A small random Llama of four blocks is enough for that.

# %%
from transformers import LlamaConfig, LlamaForCausalLM

tiny = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
).eval()
COLUMNS = ["layer", "blocks", "in → out", "rank", "scaling", "parameters"]


def adapted(model):
    """One row of COLUMNS for each kind of adapted layer."""
    groups = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            place = ".".join(part for part in name.split(".") if part.isdigit())
            sides = f"{A.shape[1]}\u00a0→\u00a0{B.shape[0]}"  # spaces that no line breaks at
            kind = (name.split(".")[-1], sides, layer.r["default"], f"{layer.scaling['default']:g}")
            groups[kind].append((place, A.numel() + B.numel()))
    return [
        [
            name,
            ",\u00a0".join(place for place, _ in found),
            sides,
            rank,
            scaling,
            sum(numbers for _, numbers in found),
        ]
        for (name, sides, rank, scaling), found in groups.items()
    ]


def lever_table(model, *settings):
    """Wrap a copy of the model with each of the settings, and show what was adapted."""
    rows = []
    for setting in settings:
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, **setting})
        wrapped = get_peft_model(copy.deepcopy(model), config)
        written = ", ".join(f"{key}={value!r}" for key, value in setting.items())
        written = written.replace(r"\\", "\\")  # as it was typed, in a raw string
        for number, row in enumerate(adapted(wrapped)):
            rows.append(["" if number else f"`{written}`", *row])
    plotting.table(["setting", *COLUMNS], rows)


# %% [markdown]
# ### Which layers
#
# Names, a regular expression over the *whole* name, or `"all-linear"`, which leaves out the output layer.
# `exclude_modules` takes some away again, and `layers_to_transform` keeps some blocks only. **Predict** for each
# setting which layers it adapts, and in which of the blocks 0 to 3.

# %%
lever_table(
    tiny,
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.[13]\.self_attn\.[qo]_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 3]},
)

# %% [markdown]
# `layers_to_transform` takes the *first* number in a layer's name for the block's. Where names are unusual,
# `layers_pattern` says before which number to look. Here is a model of two stages with three units each.


# %%
class Stages(nn.Module):
    """Layers named encoder.stages.0.units.2.proj: two numbers, as in some vision models."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stages = nn.ModuleList(nn.Module() for _ in range(2))
        for stage in self.encoder.stages:
            stage.units = nn.ModuleList(nn.Module() for _ in range(3))
            for unit in stage.units:
                unit.proj = nn.Linear(8, 8)


lever_table(
    Stages(),
    {"target_modules": ["proj"], "layers_to_transform": [1]},
    {"target_modules": ["proj"], "layers_to_transform": [1], "layers_pattern": "units"},
)

# %% [markdown]
# ### How large
#
# `r` and `lora_alpha` for all; `rank_pattern` and `alpha_pattern` for some, by the end of the name or a regular
# expression; `use_rslora` for *α/√r*. **Predict** the scaling of each row before you look.

# %%
lever_table(
    tiny,
    {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8},
    {"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8},
    {"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 16}},
    {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.v_proj": 16},
        "alpha_pattern": {"v_proj": 32},
    },
)

# %% [markdown]
# A higher rank by `rank_pattern` *lowers* the scaling there, since alpha stays. **Who changes a rank looks at
# alpha, too.**

# %% [markdown]
# ### Dropout and DoRA
#
# `lora_dropout` drops inputs of the adapter, in training mode only. `use_dora` ([Liu et al.
# 2024](https://arxiv.org/abs/2402.09353)) splits each weight into a direction and a size, lets LoRA turn the
# direction, and trains the sizes as a vector. **Predict:** is step 0 still the base to the bit, with each?

# %%
ids = torch.randint(0, 60, (2, 12))
with torch.no_grad():
    base_output, rows = tiny(ids).logits, []
    for setting in ({"lora_dropout": 0.5}, {"use_dora": True}):
        model = get_peft_model(
            copy.deepcopy(tiny),
            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **setting),
        )
        at_start, trained, agree = torch.equal(model(ids).logits, base_output), defaultdict(int), {}
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter)  # as if trained: there must be something to drop
            if parameter.requires_grad:
                trained[name.split(".")[-3]] += parameter.numel()
        for mode in (True, False):
            model.train(mode)
            agree[mode] = torch.equal(model(ids).logits, model(ids).logits)
        rows.append(
            [
                f"`{setting}`",
                at_start,
                agree[True],
                agree[False],
                ", ".join(f"{part} {numbers}" for part, numbers in trained.items()),
            ]
        )
plotting.table(
    ["setting", "step 0 is the base", "two passes agree in training", "in eval mode", "trained"],
    rows,
)

# %% [markdown]
# Both start at the base. Dropout makes two passes differ, until `eval()`. DoRA trains 512 numbers more: a size for each
# of 64 outputs of 8 layers.

# %% [markdown]
# ### Biases
#
# The layers of a Llama have no bias; those of OPT and BERT do. `bias="lora_only"` trains those of the adapted
# layers, `"all"` every bias of the model.
#
# **Predict:** one training step, then `disable_adapter()`. With which of the three does the base come back?

# %%
from transformers import OPTConfig, OPTForCausalLM

opt_config = OPTConfig(
    vocab_size=60,
    hidden_size=64,
    ffn_dim=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    word_embed_proj_dim=64,
    max_position_embeddings=64,
    dropout=0.0,
)
rows = []
for bias in ("none", "lora_only", "all"):
    opt = OPTForCausalLM(opt_config)
    with torch.no_grad():
        base_output = opt(ids).logits
    bias_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias=bias)
    counted = counting.count_lora_parameters(opt_config, bias_config)
    model = get_peft_model(opt, bias_config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad(), warnings.catch_warnings(record=True, action="always") as caught:
        with model.disable_adapter():
            back = torch.equal(model(ids).logits, base_output)
    said = [str(warning.message) for warning in caught if "bias" in str(warning.message)]
    rows.append(
        [
            f"`bias={bias!r}`",
            f"{counted.adapter:,}",
            f"{counted.biases:,}",
            back,
            said[0] if said else "",
        ]
    )
plotting.table(["setting", "A and B", "biases", "disabled equals the base", "PEFT's warning"], rows)

# %% [markdown]
# A bias has no twin to switch off: it is trained *in place*. **With trained biases the base is gone,** unless you
# have kept it.

# %% [markdown]
# ### A new head
#
# A classifier needs a head that the base doesn't have, so it begins at random, and LoRA freezes it.
# `modules_to_save` trains it fully and saves it with the adapter; `task_type="SEQ_CLS"` does that by itself, for
# heads called `classifier` or `score`. The task: is a guest happy (`mood`)?
#
# **Predict:** a frozen random head. Can LoRA learn around it? And what happens when the adapter is loaded
# tomorrow, and the base is given a new random head? We try five.

# %%
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def classifier(seed):
    """The base with a new, random head of two outputs."""
    runtime.seed_everything(seed)
    transformers.utils.logging.set_verbosity_error()  # else it reports that the head is new
    model = AutoModelForSequenceClassification.from_pretrained(
        base_folder, num_labels=2, pad_token_id=pad_id, dtype=runtime.dtype()
    ).to(device)
    transformers.utils.logging.set_verbosity_warning()
    return model


def reviews(rows):
    """Token ids (batch, longest) with their mask, and labels (batch): 1 is happy."""
    texts = [row["prompt"][0]["content"] for row in rows]
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    tensors = collate([{"input_ids": ids, "labels": []} for ids in encoded])
    labels = [int(row["completion"][0]["content"] == "happy") for row in rows]
    return {**tensors, "labels": torch.tensor(labels, device=device)}


def accuracy(model, batch):
    model.eval()
    with torch.no_grad():
        return (model(**batch).logits.argmax(-1) == batch["labels"]).float().mean().item()


# %%
train_rows, check_rows = (list(data.load_task("mood", split)) for split in ("train", "validation"))
check_batch, rows = reviews(check_rows[:64]), []
for setting in ({}, {"modules_to_save": ["score"]}, {"task_type": "SEQ_CLS"}):
    head_config = LoraConfig(r=8, lora_alpha=16, target_modules=list(kinds), **setting)
    model = get_peft_model(classifier(seed=1), copy.deepcopy(head_config)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    for step in range(20):
        loss = model(**reviews(train_rows[16 * step : 16 * step + 16])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = get_peft_model_state_dict(model)
    found = []
    for seed in range(2, 7):
        tomorrow = get_peft_model(classifier(seed), copy.deepcopy(head_config))
        set_peft_model_state_dict(tomorrow, saved)
        found.append(accuracy(tomorrow, check_batch))
    label = f"`{setting}`" if setting else "LoRA alone"
    rows.append(
        [
            label,
            any("score" in name for name in saved),
            f"{accuracy(model, check_batch):.0%}",
            ", ".join(f"{value:.0%}" for value in sorted(found)),
        ]
    )
plotting.table(
    ["setting", "head in the file", "accuracy after 20 steps", "loaded on five new heads"], rows
)

# %% [markdown]
# Around a frozen random head LoRA learns nearly as well as with a trained one. But the adapter has learned to serve *that*
# head. With another one it is a lottery: good by luck, no better than a coin, or far below it, where a head points the
# other way and swaps the labels. No error says so, only transformers' load report, which names `score.weight` as MISSING and newly
# initialized; we silenced it above, as many scripts do.
#
# **A head that was not saved is lost, however well the training went.**

# %% [markdown]
# ### Single words
#
# `trainable_token_indices` trains single rows of the embedding: for a special token that costs one row instead of the
# whole matrix. Here it is two tokens, 7 and 9.

# %%
model = get_peft_model(
    copy.deepcopy(tiny), LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7, 9])
)
for name, parameter in model.named_parameters():
    if parameter.requires_grad and "lora_" not in name:
        print(name.removeprefix("base_model.model."), tuple(parameter.shape))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
after_step = model.merge_and_unload().get_input_embeddings().weight
changed = (after_step != tiny.get_input_embeddings().weight).any(1).nonzero().flatten()
print("rows of the embedding that changed:", changed.tolist())

# %% [markdown]
# ## Break it
#
# Three mistakes, and two impossible ranks. What does `validation.check_lora_config(model, config)` say to each? It only
# reads the two, and trains nothing, so it can stand before every run.

# %% [markdown]
# ### 1 · "q_proj and v_proj" on GPT-2
#
# A recipe for a Llama, on another architecture. **Predict:** an error, a warning, or silence?

# %% tags=["measured"]
from transformers import GPT2Config, GPT2LMHeadModel

gpt2 = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=60,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
)
llama_recipe = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
try:
    get_peft_model(gpt2, llama_recipe)
except ValueError as error:
    print(f"{type(error).__name__}: {str(error).split('. ')[0]}.\n")
print(validation.check_lora_config(gpt2, llama_recipe))

# %% [markdown]
# That was loud. (Names given as a list become a set, so their order in the message may be another one.) What is there
# instead of `q_proj`? And what if *one* of the names is right?

# %%
for name, layer in gpt2.transformer.h[0].named_modules():
    if hasattr(layer, "weight") and layer.weight.ndim == 2:
        print(f"{name:12} {type(layer).__name__:8} weight {tuple(layer.weight.shape)}")

# %%
half_right = {"target_modules": ["c_attn", "v_proj"], "fan_in_fan_out": True}
lever_table(gpt2, half_right)
print(validation.check_lora_config(gpt2, LoraConfig(r=4, lora_alpha=8, **half_right)))

# %% [markdown]
# **With one right name PEFT passes over the wrong ones in silence.**
#
# Query, key and value are one layer, `c_attn`, of a class of its own: a `Conv1D` computes the same as a linear
# layer, and keeps its weight *on its side*, as (inputs, outputs). PEFT must know that when it merges, hence
# `fan_in_fan_out=True`; left out, PEFT 0.21 sets it with a warning.

# %% [markdown]
# ### 2 · The pattern that matches nothing
#
# Rank 16 for the value layers, says the configuration. Their name was misspelt.

# %%
misspelt = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"value_proj": 16}
)
with warnings.catch_warnings(record=True, action="always") as caught:
    model = get_peft_model(copy.deepcopy(tiny), misspelt)
plotting.table(COLUMNS, adapted(model))
for warning in caught:
    if "rank_pattern" in str(warning.message):
        print("PEFT warned:", warning.message, "\n")
print(validation.check_lora_config(tiny, misspelt))

# %% [markdown]
# It trains, with rank 4. PEFT 0.21 warns; older versions said nothing, and a warning is easily lost among others.
# **Print the table of adapted modules before every long run.**

# %% [markdown]
# ### 3 · Alpha taken for the scaling
#
# "A scaling of 2 is usual, so `lora_alpha=2`." But alpha is *divided* by the rank. **Predict:** by what factor is
# the change too small at rank 32?

# %%
learning = {}
for alpha in (2, 64):
    runtime.seed_everything(1)
    model = get_peft_model(
        load_base(), LoraConfig(r=32, lora_alpha=alpha, target_modules="all-linear")
    )
    label = f"lora_alpha={alpha}, scaling {alpha / 32:g}"
    learning[label] = train(model, examples, steps=20, learning_rate=1e-3)

# %%
ends = [sum(values[-5:]) / 5 for values in learning.values()]
title = f"The same run with two alphas: a loss of {ends[0]:.2f} and {ends[1]:.2f}"
figure = plotting.curves(
    {label: (range(1, 21), values) for label, values in learning.items()},
    title,
    "step",
    "training loss (nats)",
)
figure.axes[0].set_xticks((1, 5, 10, 15, 20))
described = "; ".join(
    f"{label}: from {values[0]:.2f} to {values[-1]:.2f}" for label, values in learning.items()
)
plotting.show(figure, f"{title}, means of the last five steps. {described}.")
too_small = LoraConfig(r=32, lora_alpha=2, target_modules="all-linear")
print(validation.check_lora_config(base_model, too_small))

# %% [markdown]
# 2 / 32 where 2 was meant is 32 times too small. No error and no warning from PEFT, and the loss falls, only far too
# slowly: the sort of run that one blames on the data.

# %% [markdown]
# ### Numbers that are no rank
#
# **Predict:** which of these does PEFT refuse: rank 0, or rank 100 in a layer of 64 × 64?

# %%
for rank in (0, 100):
    bad = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj"])
    try:
        get_peft_model(copy.deepcopy(tiny), bad)
        print(f"rank {rank}: accepted")
    except ValueError as error:
        print(f"rank {rank}: {error}")
    print(validation.check_lora_config(tiny, bad), "\n")

# %% [markdown]
# A rank above the layer's smaller side is accepted, costs more than the layer itself, and can do no more than
# full fine-tuning of it.

# %% [markdown]
# ### Exercise: merge into a layer that lies on its side (stretch, 15 min)
#
# The layer on its side and the scaling, in one function: return the weight of a GPT-2 `Conv1D` with the adapter merged
# in. `weight` has the shape (inputs, outputs), `A` (r, inputs), `B` (outputs, r). Leave `weight` itself as it is.
# Expected: what PEFT's `merge_and_unload` gives.
#
# <details><summary>I get a shape error, or it is right for square layers only</summary>
# <em>BA</em> has the shape (outputs, inputs). Turn it: <code>(B @ A).T</code>.
# </details>
# <details><summary>The check says that I have used alpha itself</summary>
# The rank is <code>A.shape[0]</code>. The scaling is alpha over the rank, or over its root with rsLoRA.
# </details>


# %% exercise="02.merge" points=4
def merge_conv1d(weight, A, B, alpha, use_rslora):
    """Return the Conv1D's weight (inputs, outputs) with the adapter merged in."""
    ### BEGIN SOLUTION
    rank = A.shape[0]
    scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
    return weight + scaling * (B @ A).T
    ### END SOLUTION


lesson02.merge(merge_conv1d)

# %%
### BEGIN HIDDEN TESTS
assert lesson02.merge.outcome(merge_conv1d).passed
_weight, _A, _B, _merged = lesson02.conv1d_example(9, 27, 5, 7, True, seed=21)
assert torch.allclose(merge_conv1d(_weight, _A, _B, 7, True), _merged, atol=1e-10)
### END HIDDEN TESTS

# %% [markdown]
# ## Recap
#
# What this notebook measured, in one table:

# %% tags=["measured"]
plotting.table(
    ["", "measured"],
    [
        ["our layer against PEFT's, float64, output and gradients", shown(max(worst))],
        ["trained parameters, all linear layers, r = 8", f"{own.share:.1%} of all"],
        [
            "weights, gradients and optimizer, LoRA against full; with activations",
            f"{state['lora'] / state['full']:.0%}; {total['lora'] / total['full']:.0%}",
        ],
        [
            "right with 1 direction of each layer's change",
            ", ".join(f"{task} {found[ranks[0]]:.0%}" for task, found in scores.items()),
        ],
        [
            "sailor: cut to rank 8, and trained with rank 8",
            f"{scores['sailor'][8]:.0%}, {at_rank_8:.0%}",
        ],
        [
            "top direction of rank 8 in the first 8 of rank 64",
            f"{inside:.0%}, by chance {by_chance:.0%}",
        ],
        [
            "time of a forward pass against the base's: with an adapter, and merged",
            ", ".join(f"{times[form][0] / times['base'][0] - 1:+.0%}" for form in list(times)[1:]),
        ],
    ],
)
progress("02")

# %% [markdown]
# ## Take it to work
#
# Put the folder or the hub id of a model of yours between the quotes: what would LoRA cost there? Only the
# configuration is read, no weights. The activations are an upper bound, and so is their share of the total.

# %%
my_model = ""
my_config = AutoConfig.from_pretrained(my_model or base_folder)
my_lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
print(counting.count_lora_parameters(my_config, my_lora))
for method, lora in (("full", None), ("lora", my_lora)):
    estimate = memory.estimate_memory(my_config, method, lora, batch_size=8, sequence_length=512)
    print(f"\n{method}:\n{estimate}")

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · You raise <em>r</em> from 8 to 64 and leave alpha alone. What else has changed?</summary>
# The scaling, to an eighth of what it was. With <code>use_rslora</code> it falls by the root of eight only.
# </details>
# <details><summary>2 · Why may <em>A</em> and <em>B</em> not both start at zero?</summary>
# The gradient of each has the other as a factor, so neither would ever move.
# </details>
# <details><summary>3 · LoRA trains one parameter in a hundred. Why not in a hundredth of the memory?</summary>
# Gradients and optimizer state shrink with the trained parameters; the frozen weights and the activations do not.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), Hu et al. 2021: section 4
#   for the method, 7 for rank and subspaces
# - [A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA](https://arxiv.org/abs/2312.03732), Kalajdzievski 2023
# - [PEFT: LoRA](https://huggingface.co/docs/peft/main/en/developer_guides/lora), and
#   [every field of LoraConfig](https://huggingface.co/docs/peft/main/en/package_reference/lora)
# - [Intrinsic Dimensionality Explains the Effectiveness of Language Model
#   Fine-Tuning](https://arxiv.org/abs/2012.13255), Aghajanyan et al. 2020: the idea before LoRA
# - [What is LoRA?](https://www.ibm.com/think/topics/lora) by IBM, and
#   [by Cloudflare](https://www.cloudflare.com/learning/ai/what-is-lora/);
#   [Parameter-efficient fine-tuning](https://huggingface.co/blog/peft) by Hugging Face
# - [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# Next: lesson 3 fine-tunes with the library's own trainer, on the answer alone, and asks which rank and which
# learning rate.
