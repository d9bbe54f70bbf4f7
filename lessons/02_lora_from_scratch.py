# %% [markdown]
# # Build LoRA from scratch
#
# In lesson 1 you loaded an adapter, and its file held two thin matrices for each adapted layer. **What does LoRA compute with
# these matrices, and what does `get_peft_model` do to your model?** To answer this, you will write the layer yourself in
# about twenty lines, compare it with PEFT's, put it into a language model, and train it in a loop of your own.
#
# | | |
# |---|---|
# | **What you'll do** | write a LoRA layer and compare it with the library's; put it into a model; train with PEFT in a bare PyTorch loop, then with a plain `Trainer`; find the fault in a run that learns nothing |
# | **What you'll learn** | what rank, alpha and the scaling do; why training starts exactly at the base model; what else a training loop needs, and which mistakes a first attempt makes |
# | **What you'll need** | [lesson 1](01_load_lora_adapter.ipynb); matrix products and gradients; a PyTorch training loop that you have read before; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import math
import textwrap
from collections import OrderedDict

from course_utils import data, evaluation, paths, plotting, runtime, validation
from course_utils.exercises import lesson02, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from course_utils.progress import Progress, ProgressLine

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Write the layer
#
# A linear layer multiplies its input *x* by a weight matrix *W*. Fine-tuning adds a change *ΔW* to that matrix, and if every
# entry may change on its own, *ΔW* needs as many numbers as *W*. LoRA ([Hu et al. 2021](https://arxiv.org/abs/2106.09685))
# saves numbers by restricting the change: it must be the product of two thin matrices. The picture shows an example. Each row
# of this change is a multiple of the same row *A*, so 14 numbers describe all 48 entries.
#
# ![A frozen weight matrix of 6 × 8 numbers, plus a change that is the product of a column B of 6 numbers and a row A of 8 numbers: 14 trained numbers instead of 48](../images/low_rank.png)
#
# With *r* rows in *A* and *r* columns in *B*, the change has at most the [rank](../docs/glossary.md#rank-r) *r*. The layer
# computes
#
# > *h = Wx + (α/r)·B(Ax)*, with *A* of shape (r, inputs) and *B* of shape (outputs, r).
#
# This is equation 3 of the paper, with the factor α/r that the paper adds just below it. You choose the number *α*, called
# [alpha](../docs/glossary.md#alpha-α-scaling). The factor α/r is the **scaling**: with alpha 16 and rank 8, for example, it
# is 2. *W* is frozen, which means that training doesn't change it.


# %%
class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank change: h = W x + (alpha / rank) B (A x)."""

    def __init__(self, base_layer, rank, alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = alpha / rank
        weight = base_layer.weight  # (outputs, inputs); A and B take its dtype and device
        self.lora_A = nn.Parameter(weight.new_empty(rank, base_layer.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(base_layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear and PEFT do

    def forward(self, x):
        """x (..., inputs) -> (..., outputs)."""
        change = (x @ self.lora_A.T) @ self.lora_B.T  # two thin products; BA itself is never formed
        return self.base_layer(x) + self.scaling * change


layer = LoRALinear(nn.Linear(256, 704, bias=False), rank=8, alpha=16)
for name, parameter in layer.named_parameters():
    state = "trained" if parameter.requires_grad else "frozen"
    print(f"{name:18} {tuple(parameter.shape)!s:>11} {parameter.numel():>9,} numbers, {state}")

# %% [markdown]
# For this layer, LoRA of rank 8 trains 7,680 numbers instead of 180,224. That is 8 × (256 + 704) instead of 256 × 704.
#
# ## Compare it with PEFT's layer
#
# PEFT's layer is the reference, so the next cell puts both around the same weights, with the same *A* and *B*. It works in
# float64, because rounding errors are too small there to hide a mistake. To see what such a comparison can find, it also plants
# two mistakes in our layer: a scaling that was forgotten, and alpha used as the scaling.
#
# **Predict:** the comparison is made once with *B* = 0, as in every new adapter, and once with a random *B*. Which of the two
# finds the mistakes?


# %%
def peft_layer(base_layer, rank, alpha):
    """PEFT's own LoRA around a copy of `base_layer`."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["proj"])
    model = get_peft_model(nn.Sequential(OrderedDict(proj=copy.deepcopy(base_layer))), config)
    return model.base_model.model.proj


def pair(inputs, outputs, rank, alpha, random_b=True):
    """Our layer and PEFT's in float64, around the same weights, with the same A and the same B."""
    base_layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    ours, theirs = LoRALinear(base_layer, rank, alpha), peft_layer(base_layer, rank, alpha)
    if random_b:
        nn.init.normal_(ours.lora_B, std=0.2)
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B)
    return ours, theirs


x, rows = torch.randn(5, 48, dtype=torch.float64), []
for mistake, scaling in (("none", 16 / 8), ("scaling forgotten", 1), ("alpha as the scaling", 16)):
    found = []
    for random_b in (False, True):
        ours, theirs = pair(48, 32, rank=8, alpha=16, random_b=random_b)
        ours.scaling = scaling
        found.append(f"{(ours(x) - theirs(x)).abs().max().item():.2g}")
    rows.append([mistake, *found])
plotting.table(["mistake", "difference with B = 0", "difference with a random B"], rows)

# %% [markdown]
# Only the random *B* finds them: both mistakes show a difference in the last column. With *B* = 0 the change is zero whatever
# the scaling is, so a right and a wrong layer agree, and the comparison proves nothing. **Before you compare two adapters, make
# sure that they change the output.**
#
# With a random *B*, our layer without a mistake agrees with PEFT's. The next cell tries 20 random shapes, and also compares
# the gradients, because they decide what the layer will learn.


# %%
def output_and_gradients(layer, A, B, x):
    """The layer's output, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    output = layer(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, A, B])]


worst = [0.0] * 4
for _ in range(20):
    inputs, outputs, rank, alpha = (
        int(torch.randint(low, high, ())) for low, high in ((3, 200), (3, 200), (1, 9), (1, 33))
    )
    ours, theirs = pair(inputs, outputs, rank, alpha)
    x = torch.randn(5, inputs, dtype=torch.float64)
    mine = output_and_gradients(ours, ours.lora_A, ours.lora_B, x)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    reference = output_and_gradients(theirs, A, B, x)
    errors = [(a - b).abs().max().item() for a, b in zip(mine, reference)]
    worst = [max(both) for both in zip(worst, errors)]
for what, error in zip(("output", "gradient of x", "gradient of A", "gradient of B"), worst):
    print(f"{what:14} differs by at most {error:.2g}")
assert max(worst) < 1e-10

# %% [markdown]
# The two layers agree to the last bit, because both do the same operations in the same order. So these twenty lines do
# what PEFT's layer does. PEFT adds the administration: several adapters on one layer, their names, dropout,
# saving and loading.
#
# ## Start at the base model
#
# A new adapter should change nothing, because training then starts from what the model can already do. There is more than one
# way to achieve this. The next cell tries four [starts](../docs/glossary.md#initialisation-start), which are the values of *A*
# and *B* before the first step, on one layer.
#
# **Predict:** which starts leave the base layer's output as it is? With which of them can the adapter learn?

# %%
runtime.seed_everything(2)
base_layer, x, rows = nn.Linear(32, 32), torch.randn(8, 32), []
for start in ("A random, B zero", "A zero, B random", "both random", "both zero"):
    layer = LoRALinear(base_layer, rank=4, alpha=8)
    if start in ("A zero, B random", "both zero"):
        nn.init.zeros_(layer.lora_A)
    if start in ("A zero, B random", "both random"):
        nn.init.normal_(layer.lora_B)
    output = layer(x)
    output.square().sum().backward()
    sizes = [f"{matrix.grad.norm():.1f}" for matrix in (layer.lora_A, layer.lora_B)]
    rows.append([start, torch.equal(output, base_layer(x)), *sizes])
plotting.table(["start", "output equals the base's", "gradient of A", "gradient of B"], rows)

# %% [markdown]
# Every start with a zero matrix gives the base's output, to the bit. Of these three, only "both zero" can't learn: *B* is a
# factor in the gradient of *A*, and *A* in the gradient of *B*, so both gradients are zero and stay so. If only one matrix is
# zero, that matrix moves in the first step, and from the second step on both move. "Both random" can learn as well, but it
# starts from a changed model. LoRA uses the first row: *A* is random, and *B* is zero.
#
# ## Put LoRA into a model
#
# `get_peft_model` does two things: it freezes the model, and it wraps a LoRA layer around each layer that you name. The named
# layers are called the [target modules](../docs/glossary.md#target-modules). You can write such a function yourself.

# %% [markdown]
# ### Exercise: put LoRA into a model (core, 15 min)
#
# Freeze the whole model. Then look at the last part of each linear layer's name, for example `q_proj` in
# `model.layers.0.self_attn.q_proj`. If it is one of `names`, replace the layer by a `LoRALinear` around it. Change the model in
# place, and return how many layers you replaced. Expected for a Llama with two blocks and `["q_proj", "down_proj"]`: 4.
#
# <details><summary>How do I replace a layer?</summary>
# <code>parent, _, last = name.rpartition(".")</code>, then
# <code>setattr(model.get_submodule(parent), last, new_layer)</code>.
# </details>
# <details><summary>The check says that A and B are frozen, too</summary>
# You froze after replacing. <code>model.requires_grad_(False)</code> comes first.
# </details>
# <details><summary>A layer was replaced that was not asked for</summary>
# The name <code>lm_head</code> ends with <code>head</code>, but no layer is called <code>head</code>: compare the whole
# last part, <code>name.split(".")[-1]</code>. And <code>mlp</code> is a block that contains layers, so check
# <code>isinstance(module, nn.Linear)</code>, too.
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
# ## Train in four steps
#
# Fine-tuning with PEFT takes four steps: **1** load the base model, **2** write a configuration, **3** call
# `get_peft_model`, **4** train. You now go through them once by hand. The task is `sailor` from lesson 1: the model is given a
# sentence, and should say it like a sailor. The configuration names its targets as `"all-linear"`, which means every linear layer
# except the output layer.

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())


def load_base():
    """Step 1: a fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()).to(
        device
    )


# Step 2
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted_model():
    """Step 3: a fresh base with a new adapter, the same each time, since the seed comes first."""
    base = load_base()
    runtime.seed_everything(1)
    return get_peft_model(base, config)


model = adapted_model()
model.print_trainable_parameters()
prompt = "Say it like a sailor: Fenna keeps the lantern."
right = "Ahoy! Fenna be stowing yon lantern, aye."
inputs = tokenizer(prompt, return_tensors="pt").to(device)
with torch.no_grad():
    step_0 = model(**inputs).logits
    with model.disable_adapter():
        print("step 0 equals the base model:", torch.equal(step_0, model(**inputs).logits))

# %% [markdown]
# What held for one layer holds for the whole model: before the first step, its output is the base model's.
#
# A model of this kind learns to predict the next token. To compute a loss it needs `input_ids` and
# [`labels`](../docs/glossary.md#label), which are the same ids again; the model itself compares each prediction with the next
# token's label. A token with the label −100 is left out of the loss. We put −100 on the prompt, because the model should learn
# to write the answer and not the question. Shorter rows are filled up with [pad tokens](../docs/glossary.md#pad-token), and
# these get −100 as well.


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


examples = [encode(row) for row in data.load_task("sailor", "train")]
batch = collate(examples[:32])
print({key: tuple(value.shape) for key, value in batch.items()})
plotting.token_strip(tokenizer, batch["input_ids"][0], batch["labels"][0])

# %% [markdown]
# Step 4 is a plain PyTorch loop. The function `adamw` gives the optimizer every parameter that has `requires_grad`. After
# `get_peft_model`, these are only *A* and *B*.


# %%
def train(model, optimizer, steps, batch_size=32, seed=1):
    """Train on `examples` with a short warm-up, then a rate that falls to 0. Returns the losses."""
    highest = optimizer.param_groups[0]["lr"]
    order = torch.Generator().manual_seed(seed)
    line, losses, warmup = ProgressLine(steps), [], 1 + steps // 15
    model.train()
    for step in range(steps):
        rate = highest * min((step + 1) / warmup, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(examples), (batch_size,), generator=order)
        loss = model(**collate([examples[i] for i in chosen])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        line.update(step + 1, f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def adamw(model, rate=5e-3):
    """AdamW for what is trained. This tiny model takes a rate of 5e-3, large ones about 1e-4."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)


def say_it(model):
    """The model's answer to the prompt above."""
    return evaluation.generate(model, tokenizer, [prompt], max_new_tokens=40)[0]


# %% [markdown]
# The learning rate of 5e-3 suits this model of 3.9 million parameters. Most [recipes](../docs/recipes.md) for LoRA on models
# with billions of parameters use 1e-4 to 3e-4, so don't use this rate there. The next cell trains for twenty steps, which takes
# some seconds.
#
# **Predict:** will the answer still be the base model's, will it sound like a sailor, or will it be right to the letter?

# %%
model = adapted_model()  # anew, so that a second run of this cell begins where the first did
before = say_it(model)
losses = train(model, adamw(model), steps=20)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print("before:", before)
print("after: ", say_it(model))
print("right: ", right)

# %% [markdown]
# After twenty steps the answer sounds like a sailor: it greets and ends as a sailor's does, and the loss has fallen far. The
# words in between take more steps, because they differ from sentence to sentence. Only steps 2 and 3 are about LoRA. The loop
# is the one that you would write for any model.
#
# ### Train with your own layer
#
# Nothing in the loop is specific to PEFT, so your own layers can take the place of PEFT's. If your `add_lora` passes its check,
# the next cell uses it for step 3. Until then it calls `get_peft_model` once more.
#
# **Predict:** both runs begin with the same *A*, and see the same rows in the same order. How far apart will the losses be?

# %%
yours = lesson02.inject.outcome(add_lora).passed
model = adapted_model()
if yours:
    peft_layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    model = load_base()
    names = sorted(config.target_modules)  # PEFT has replaced "all-linear" by the layers' names
    add_lora(model, names, rank=8, alpha=16)
    own_layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for own, theirs in zip(own_layers, peft_layers):
        own.lora_A.data.copy_(theirs.lora_A["default"].weight)
again = train(model, adamw(model), steps=20)
print("layers by", "your add_lora" if yours else "get_peft_model, as your add_lora is still to do")
print(f"losses differ by at most {max(abs(a - b) for a, b in zip(losses, again)):.0e}")
print("after: ", say_it(model))

# %% [markdown]
# With our solution of `add_lora` the losses are the same in all digits, because the two layers do the same operations in the same
# order. So the model learns the same with your layer as with PEFT's.
#
# ## Find the fault in a run that learns nothing
#
# A colleague has written a loop as well. It runs without an error or a warning, but the loss does not fall. You get the code,
# and with it what you would look at first: the losses, the gradients, and the numbers in *B*.
#
# **Predict:** read the code before you run it. Which line is to blame?


# %%
def colleagues_run(steps=8):
    """The colleague's code: (model, optimizer, losses, norm of the gradient of all B)."""
    base = load_base()
    optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3, weight_decay=0.0)
    runtime.seed_everything(1)
    model = get_peft_model(base, config)
    losses = []
    for step in range(steps):
        batch = collate(examples[32 * step : 32 * step + 32])
        loss = model(**batch).loss
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    of_b = [p.grad.norm() for name, p in model.named_parameters() if ".lora_B." in name]
    return model, optimizer, losses, torch.stack(of_b).norm().item()


broken, broken_optimizer, stuck, gradient_norm = colleagues_run()
largest = max(p.abs().max().item() for name, p in broken.named_parameters() if ".lora_B." in name)
print("losses:", ", ".join(f"{loss:.2f}" for loss in stuck))
print(f"norm of the gradient of B: {gradient_norm:.2f}; largest number in B: {largest}\n")
print(validation.check_training(broken))

# %% [markdown]
# The line that makes the optimizer is to blame: it stands *before* `get_peft_model`, so the optimizer holds the parameters of the
# base model. These are frozen now, and *A* and *B*, which were made later, are not among them. The output points there, too:
# *B* has a gradient, so labels, loss and layers are in order, but it is still zero after eight steps, so no step has moved it.
# `check_training` reports this for all 28 matrices *B*. (It looks only at *B*, which is known to start at zero.)
#
# ### Exercise: find what the optimizer misses (core, 10 min)
#
# Write the check for this fault. Return a list, in any order, with the names of all parameters of `model` that have
# `requires_grad` but that the optimizer doesn't hold. An optimizer keeps its parameters in `optimizer.param_groups`, a list of
# dicts, under `"params"`. Expected for the colleague's run: the names of all *A* and *B*, 56 in all.
#
# <details><summary>"The size of tensor a must match the size of tensor b", or "Boolean value of Tensor is ambiguous"</summary>
# <code>in</code> compares tensors number by number. You want to know whether it is the <em>same object</em>: compare
# <code>id(parameter)</code>.
# </details>
# <details><summary>My list lacks a parameter</summary>
# Two parameters are different objects even if they hold the same numbers. Also, an optimizer may have several groups: look at
# all of them.
# </details>
# <details><summary>My list has a name too many</summary>
# A frozen parameter doesn't need an optimizer: leave out those without <code>requires_grad</code>.
# </details>


# %% exercise="02.optimizer" points=3
def not_optimised(model, optimizer):
    """Return the names of the trainable parameters that the optimizer doesn't hold."""
    ### BEGIN SOLUTION
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]
    ### END SOLUTION


lesson02.optimizer(not_optimised)

# %%
### BEGIN HIDDEN TESTS
assert lesson02.optimizer.outcome(not_optimised).passed
_model = get_peft_model(lesson02.tiny_model(), LoraConfig(r=2, target_modules=["k_proj"]))
_first = next(name for name, p in _model.named_parameters() if p.requires_grad)
_some = [p for name, p in _model.named_parameters() if p.requires_grad and name != _first]
assert not_optimised(_model, torch.optim.SGD(_some, lr=0.1)) == [_first]
### END HIDDEN TESTS

# %% [markdown]
# To mend the run, make the optimizer after `get_peft_model`. The next cell does so, and runs our own loop for eight steps.

# %%
mended = adapted_model()
mended_losses = train(mended, adamw(mended), steps=8)
print("losses:", ", ".join(f"{loss:.2f}" for loss in mended_losses))
if lesson02.optimizer.outcome(not_optimised).passed:
    for name, model, optimizer in (
        ("broken", broken, broken_optimizer),
        ("mended", mended, adamw(mended)),
    ):
        print(f"{name}: the optimizer misses {len(not_optimised(model, optimizer))} parameters")

# %% [markdown]
# Now the loss falls from the first step on.
#
# ## Let a Trainer run the loop
#
# `transformers.Trainer` runs the loop for you, and makes the optimizer itself when the model is complete. But it doesn't prepare
# text. For a language model it needs three things: **token ids**, because it doesn't tokenise; **labels**, because without them
# there is no loss; and a **pad token**, because rows differ in length.

# %%
rows = data.load_task("sailor", "train").select(range(640))
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
        adapted_model(),
        arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=collator,
    )
    return Progress().attach(trainer)


# %% [markdown]
# The next cell makes four attempts, and each of them lacks something. It gives the trainer raw text, then token ids without
# labels, then token ids and labels without a [collator](../docs/glossary.md#collator) (the function that makes a batch of several
# rows), and at last a tokenizer without a pad token.
#
# **Predict:** which of them fail already when the trainer is made, and which only when it trains?

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
found = []
for attempt, given in attempts.items():
    stage = "making it"
    try:
        trainer = trainer_for(*given)
        stage = "training"
        trainer.train()
        said = "nothing"
    except (ValueError, KeyError, IndexError) as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 260, placeholder=" ...")
    found.append([attempt, stage, said])
plotting.table(["given to Trainer", "fails in", "what it says"], found)

# %% [markdown]
# All four fail only when training begins, because a `Trainer` doesn't look at the rows before that. So let a job run for
# one step before you leave it alone.
#
# The third attempt has labels and still fails: without a collator of your own, `Trainer` pads the ids but not the labels.
# `DataCollatorForLanguageModeling(tokenizer, mlm=False)` takes care of both: it pads the ids, copies them into `labels`, and
# writes −100 over the pads. It needs a pad token, which the fourth attempt lacks.
#
# **Predict:** our loop's loss was a mean over the answers only. This collator writes −100 over the pads, but not over the
# prompts. Will the trainer's first loss be the same, higher or lower?

# %%
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = trainer_for(ids_only, tokenizer, collator, steps=20)
trainer.train()
logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loop:    loss {losses[0]:.2f} -> {losses[-1]:.2f}, of the answers")
print(f"trainer: loss {logged[0]:.2f} -> {logged[-1]:.2f}, of the whole text")
print("after: ", say_it(trainer.model))

# %% [markdown]
# The trainer's first loss is lower. It is a mean over prompts and answers, so at the start the tokens of the prompts must be easier
# than those of the answers. At the end it is higher than the loop's, because nobody can know which sentence a prompt will ask
# for, so this part of the loss can't fall far. Compare losses only if they count the same tokens; lesson 3 looks at this closely.
#
# ## Recap
#
# LoRA adds a second path to a frozen linear layer: two thin matrices, whose product is a change of low rank. The scaling α/r
# multiplies this change. Because *B* starts at zero, training begins exactly at the base model; because *A* doesn't, the adapter
# can learn. `get_peft_model` freezes the model and puts such a layer around each layer that you name. Everything after that is
# ordinary training, and that is where a first attempt goes wrong: the optimizer is made too early, or the rows lack ids, labels
# or padding.

# %%
plotting.table(
    ["", "measured"],
    [
        ["our layer and PEFT's, float64: largest difference", f"{max(worst):.2g}"],
        ["loss of twenty steps by hand", f"{losses[0]:.2f} to {losses[-1]:.2f}"],
        ["the same with your own layers", f"{again[0]:.2f} to {again[-1]:.2f}"],
        [
            "eight steps with an optimizer made too early, and mended",
            f"{stuck[0]:.2f} to {stuck[-1]:.2f}, {mended_losses[0]:.2f} to {mended_losses[-1]:.2f}",
        ],
    ],
)
progress("02")

# %% [markdown]
# ## Take it to work
#
# Put a `Trainer` of your own in the place of `None`, after its first steps. The check tells you whether the right parameters are
# trained, whether they have moved, and whether the log shows a problem.

# %%
my_trainer = None
print(validation.check_training(my_trainer or trainer))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · You compare a new, untrained adapter with a colleague's implementation, and all outputs agree. What do you know?</summary>
# Nothing yet. <em>B</em> is zero in both, so both give the base model's output. Fill <em>B</em> with random numbers first, then
# compare outputs and gradients.
# </details>
# <details><summary>2 · Somebody starts <em>A</em> and <em>B</em> at zero, "to be safe". What happens in training?</summary>
# The loss stays where it is, without an error. Each matrix is a factor in the gradient of the other, so neither ever moves.
# </details>
# <details><summary>3 · Two runs on the same rows report losses of 0.9 and 2.1. Is the first one better?</summary>
# You can't tell before you know which tokens they count. One may average over answers, the other over prompts as well. Compare
# losses only over the same tokens.
# </details>
#
# ## Where to read on
#
# - [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), Hu et al. 2021: section 4
#   for the method
# - [PEFT: LoRA](https://huggingface.co/docs/peft/main/en/developer_guides/lora), the library's page
# - [What is LoRA?](https://www.ibm.com/think/topics/lora) by IBM, and
#   [by Cloudflare](https://www.cloudflare.com/learning/ai/what-is-lora/);
#   [Parameter-efficient fine-tuning](https://huggingface.co/blog/peft) by Hugging Face
# - [Symptom, cause, check](../docs/symptoms.md), for runs that learn nothing
#
# Next: [lesson 3](03_lora_finetuning.ipynb) fine-tunes with TRL's `SFTTrainer`, which prepares the rows for you, and asks
# how you know that a run went well. [Lesson 4](04_configuration.ipynb) chooses targets, rank and alpha. A [deep
# dive](deep_low_rank.ipynb) asks why a low rank can be enough.
