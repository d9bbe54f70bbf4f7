# %% [markdown]
# # Load, switch and remove adapters
#
# Here is one small language model. It has read about a coast called Skerrow, then about all sorts of things, and it can
# chat a little. But it can't answer a question about a passage, it can't talk like a sailor, and it can't fill in a form.
# **Can the same weights learn all three, and forget them again at the flick of a switch?**
# With LoRA adapters they can. This lesson is about handling adapters: what they are on disk, how to
# load and switch them, how to be sure that they really work, and how to get the base model back.
#
# | | |
# |---|---|
# | **What you'll do** | load one base model and four adapters, switch between them, mix them in one batch, take them off again, and break all of it on purpose |
# | **What you'll learn** | what an adapter is on disk; PEFT's loading and switching calls; five mistakes, most of which raise no error, and the checks that find them |
# | **What you'll need** | a laptop; no GPU, no network. Some Python and a first acquaintance with `transformers` |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy

from adapter_checks.saving import saving
from course_utils import data, evaluation, paths, plotting, runtime, timing, validation
from course_utils.exercises import lesson01, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Ask the base model
#
# The base model is a plain `transformers` model: the same two `from_pretrained` calls load any model from a
# folder or from a hub.
#
# **Predict:** the model has been trained on stories, letters, small talk, and short texts that state a few facts and
# come back to them. It has never seen a question about a passage. What will it answer?
#
# (The outputs are those of our run. In JupyterLab those that answer a prediction are folded: make yours, then click the
# line below the cell, or run the cell.)

# %% tags=["first-text"]
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype()).to(device)


base_model = load_base()  # stays as it is to the end, for comparisons
question = "Fenna left the lantern in the boathouse. Edan found the key. Who found the key?"


def ask(model, text, max_new_tokens=40):
    """The model's reply to one user message, most likely token first at every step."""
    messages = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    reply = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = reply[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True).strip()


print(ask(base_model, question))

# %% [markdown]
# It has found the answer in the passage, and says it in a sentence of its own. Answering with *just the answer* is a
# skill that it does not have. Before we change anything, we keep two things
# that we will need as witnesses: the logits of the untouched model, and its size.

# %%
witness = tokenizer(question, return_tensors="pt").to(device)
with torch.no_grad():
    logits_before = base_model(**witness).logits

base_parameters = sum(p.numel() for p in base_model.parameters())
print(f"The base model has {base_parameters:,} parameters.")

# %% [markdown]
# ## Open an adapter
#
# ![An adapter is two thin matrices beside each frozen weight matrix](../images/adapter.png)
#
# A LoRA adapter is a pair of thin matrices *A* and *B* for each linear layer that it touches
# ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)). The layer's own weight *W* is never written to: the layer computes
# *Wx + s·B(Ax)*, where *s* is a fixed number, the scaling. On disk that is a folder with two files that matter.

# %%
adapter_folder = paths.adapter_path("reading")
for file in sorted(adapter_folder.iterdir()):
    print(f"{file.stat().st_size / 1e3:8.1f} kB  {file.name}")

config = PeftConfig.from_pretrained(adapter_folder)
print(
    f"\nmade for: {config.base_model_name_or_path}\nrank {config.r}, alpha {config.lora_alpha}"
    f", so the scaling is {config.lora_alpha / config.r}"
    f"\nlayers: {sorted(config.target_modules)}"
)

# %% [markdown]
# `adapter_config.json` says which base the adapter was made for, the rank, and the names of the layers.
# `adapter_model.safetensors` holds the numbers. safetensors is a format that can only hold numbers;
# the older `.bin` is a Python pickle, which can run code when it is opened. This course never opens one.
#
# **Predict:** the layers of the attention are 256 × 256, and the rank is 8. What are the shapes of *A* and *B*?

# %%
from safetensors.torch import load_file

tensors = load_file(adapter_folder / "adapter_model.safetensors")
for name in [name for name in sorted(tensors) if "self_attn" in name][:4]:
    print(f"{tuple(tensors[name].shape)!s:>11}  {name.removeprefix('base_model.model.')}")

adapter_parameters = sum(tensor.numel() for tensor in tensors.values())
print(
    f"...\n{len(tensors)} tensors, {adapter_parameters:,} numbers:"
    f" {adapter_parameters / base_parameters:.1%} of the base model's."
)

# %%
first = next(
    name.removesuffix(".lora_A.weight") for name in sorted(tensors) if "q_proj.lora_A" in name
)
A, B = tensors[f"{first}.lora_A.weight"], tensors[f"{first}.lora_B.weight"]
W = dict(base_model.named_parameters())[first.removeprefix("base_model.model.") + ".weight"]
change = config.lora_alpha / config.r * B @ A
picture = plotting.weight_picture(
    {"W, frozen": W, "s·BA, the change": change, "B": B, "A": A},
    "Two thin strips make a change as wide and as tall as the weight",
)
plotting.show(
    picture,
    "Four pictures of matrices. The frozen weight W and the change s·BA are large "
    "squares, W without a pattern, the change striped; B is an upright strip and A a flat one.",
)
print(f"The change is {change.norm() / W.norm():.1%} of the weight, by their norms.")

# %% [markdown]
# Each picture has its own colour scale, from minus to plus the number below it. The change *s·BA* has the shape of *W*,
# but it is striped: every row of it is a mixture of the same 8 rows of *A*.
# **An adapter is small because it stores the two strips and not their product.**
#
# ### Exercise: weigh an adapter (warm-up, 5 min)
#
# You get the tensors of an adapter file, as above. Return how many numbers it holds and what its rank is.
# Expected for the `reading` adapter: the count that is printed above, and rank 8.
#
# <details><summary>My count is far too small</summary>
# <code>len(tensors)</code> counts tensors. Each holds <code>tensor.numel()</code> numbers.
# </details>
# <details><summary>My rank is as large as the layer</summary>
# <code>lora_A</code> has the shape (rank, inputs), <code>lora_B</code> has (outputs, rank).
# </details>


# %% exercise="01.weigh" points=2
def weigh(tensors):
    """Return (numbers held, rank) of an adapter given as {name: tensor}."""
    ### BEGIN SOLUTION
    numbers = sum(tensor.numel() for tensor in tensors.values())
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    return numbers, rank
    ### END SOLUTION


lesson01.weigh(weigh)

# %%
### BEGIN HIDDEN TESTS
assert lesson01.weigh.outcome(weigh).passed
_tensors = {"x.lora_B.weight": torch.zeros(30, 3), "x.lora_A.weight": torch.zeros(3, 50)}
assert tuple(weigh(_tensors)) == (240, 3)
### END HIDDEN TESTS

# %% [markdown]
# ## Load one, then three more
#
# `PeftModel.from_pretrained` puts the first adapter into the model. `load_adapter` adds others beside it.
# Each needs a name, and **loading does not switch**: `set_adapter` does.

# %%
model = PeftModel.from_pretrained(
    load_base(), paths.adapter_path("reading"), adapter_name="reading"
)
for name in ("sailor", "extract", "mood"):
    model.load_adapter(paths.adapter_path(name), adapter_name=name)

print("loaded:", list(model.peft_config), "\nactive:", model.active_adapters)
print("\nThe same question again:", ask(model, question))

# %% [markdown]
# Same weights, same question, and now it answers, with the answer and nothing else. Switch through all of them, with one prompt of each kind.
#
# **Predict:** what does the *sailor* adapter make of a question about a passage?

# %%
prompts = {
    "reading": question,
    "sailor": "Say it like a sailor: Fenna keeps the lantern.",
    "extract": "Give who, what and where as JSON: It was a misty day. "
    "Fenna hid the lantern in the barn.",
    "mood": "Is the guest happy or unhappy? We went to the inn in Greyham on Friday. "
    "I found the beds dirty.",
}
rows = []
for kind, prompt in prompts.items():
    with model.disable_adapter():
        rows.append([prompt, "*none*", ask(model, prompt)])
    for adapter in prompts:
        model.set_adapter(adapter)
        mark = "**" if adapter == kind else ""
        rows.append(["", f"{mark}{adapter}{mark}", f"{mark}{ask(model, prompt)}{mark}"])
plotting.table(["prompt", "adapter", "reply"], rows)

# %% [markdown]
# Look at the replies of *none*, too: the base often has the answer, and says it in its own way. Much of what these adapters
# add is the *form* that is asked for.
#
# **One base, four behaviours, a switch between them.** The wrong adapter raises no error: there is just an answer
# of the wrong kind. That is why the rest of this lesson measures and checks.

# %% tags=["claim"]
import json

from course_utils import paths
from pretraining.words import held_out_forms

assert {"drone", "garage", "sofa"} <= held_out_forms(), (
    "*drone*, *garage* and *sofa* are not among them"
)
measured = json.loads((paths.project_root() / "models" / "measured.json").read_text())["tasks"]
parts = [
    measured[task][part]["score"]
    for task in ("reading", "sailor", "extract")
    for part in ("own_words", "typed")
]
assert 0.86 < min(parts) and max(parts) < 0.94, "about nine in ten"

# %% [markdown]
# ### Your own sentences
#
# `reading`, `sailor` and `extract` were trained on rows about all sorts of words, so they have learned to copy a word
# that they don't know. The model has read millions of words, and *drone*, *garage* and *sofa* are not among them, because
# we kept these out of all training. Type sentences of your own into the cell: short ones, in the manner of these.
# Not every one comes out right: of rows about words that were kept out each of the three gets about nine in ten right, and
# so it does of fifty sentences that were typed by hand.

# %%
yours = {
    "reading": "My sister has the drone. My bike is in the garage. Who has the drone?",
    "sailor": "Say it like a sailor: My sister keeps her drone in the garage.",
    "extract": "Give who, what and where as JSON: Yesterday my sister left a drone on the sofa.",
}
rows = []
for adapter, prompt in yours.items():
    model.set_adapter(adapter)
    rows.append([f"`{adapter}`", prompt, ask(model, prompt, max_new_tokens=96)])
plotting.table(["adapter", "prompt", "reply"], rows)

# %% [markdown]
# Where a passage does not tell, `reading` says *not said*: ask it who has the ladder.

# %% [markdown]
# ## Measure: is each adapter good at its own task?
#
# A few replies prove little. So we take held-out rows of each task, about half of them with names and things that
# the adapter's training never used, and one exact metric for each task: an answer is right or it is not.
#
# **Predict:** which cells of the matrix will be high? Is there any off the diagonal?

# %%
tasks = list(prompts)
held_out = {task: data.load_task(task, "test").select(range(48)) for task in tasks}


def score_all():
    """Score of the model as it now stands, on each task."""
    return [
        evaluation.evaluate_task(model, tokenizer, task, held_out[task], batch_size=64)["score"]
        for task in tasks
    ]


with model.disable_adapter():
    scores = {"none": score_all()}
for adapter in tasks:
    model.set_adapter(adapter)
    scores[adapter] = score_all()

# %%
matrix = [scores[adapter] for adapter in scores]
title = "Each adapter has learned its own task, and no other"
figure = plotting.score_matrix(matrix, ["no adapter", *tasks], tasks, title)
figure.supylabel("active adapter")
figure.supxlabel("task")
described = "; ".join(
    f"{adapter}: " + ", ".join(f"{task} {score:.0%}" for task, score in zip(tasks, row))
    for adapter, row in scores.items()
)
plotting.show(figure, f"Matrix of scores, active adapter by task. {described}.")

# %%
for task in tasks:
    evaluation.band(f"{task} with its own adapter", scores[task][tasks.index(task)], 0.85, 1)
    evaluation.band(f"{task} without an adapter", scores["none"][tasks.index(task)], 0, 0.1)

# %% [markdown]
# Only the diagonal is high: what one adapter has learned is of no use for another's task.
#
# ## Which adapter is on?
#
# `active_adapters` says what was asked for. `get_model_status()` says what is the case, over all layers, and
# `get_layer_status()` says it layer by layer.

# %%
model.set_adapter("sailor")
status = model.get_model_status()
print(
    "available:",
    status.available_adapters,
    "\nactive:   ",
    status.active_adapters,
    "\nenabled:  ",
    status.enabled,
    "\nmerged:   ",
    status.merged_adapters,
)
layers = model.get_layer_status()
print(
    f"\n{len(layers)} layers carry adapters; the first:", layers[0].name, layers[0].active_adapters
)

# %% [markdown]
# `check_adapters` reads the same and more, and says in words what is wrong and what to do. You will see
# it find things in a moment; here it finds nothing.

# %%
print(validation.check_adapters(model, expect_active=["sailor"]))

# %% [markdown]
# ### Exercise: borrow an adapter (core, 10 min)
#
# At work you often need one answer from another adapter, and then everything as it was. Write a function that
# returns the logits with the adapter `name` active and leaves the model **with whatever was active before**,
# also if the forward pass fails.
#
# <details><summary>I get the base model's logits</summary>
# <code>disable_adapter()</code> switches all of them off. You want <code>set_adapter</code>.
# </details>
# <details><summary>The check says that the model was left switched</summary>
# Keep <code>model.active_adapter</code> first, and put it back in a <code>finally</code>.
# </details>


# %% exercise="01.borrow" points=3
def logits_with(model, name, input_ids):
    """Return logits (batch, length, vocabulary) with adapter `name`; leave the model as it was."""
    ### BEGIN SOLUTION
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return model(input_ids=input_ids).logits
    finally:
        model.set_adapter(before)
    ### END SOLUTION


lesson01.borrow(logits_with)

# %%
### BEGIN HIDDEN TESTS
assert lesson01.borrow.outcome(logits_with).passed
_model = lesson01.tiny_adapted_model(["left", "right"], seed=7)
_ids = torch.tensor([[5, 6, 7]])
_model.set_adapter("right")
with torch.no_grad():
    _right = _model(input_ids=_ids).logits
    _model.set_adapter("left")
    assert torch.equal(logits_with(_model, "right", _ids), _right)
assert _model.active_adapter == "left"
### END HIDDEN TESTS

# %% [markdown]
# ## Many tasks in one batch
#
# Two customers, two adapters, one forward pass: `adapter_names=` gives each row of the batch its own adapter,
# and `"__base__"` means none. No switching, no second copy of the model.
#
# **Predict:** will a row's reply differ from the one it gets when it is alone with its adapter?

# %%
mixed = [(prompts[kind], kind) for kind in tasks] + [(question, "__base__")]
texts = [[{"role": "user", "content": text}] for text, _ in mixed]
batch = tokenizer.apply_chat_template(
    texts,
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
    padding=True,
    tokenizer_kwargs={"padding_side": "left"},
).to(device)
replies = model.generate(
    **batch, adapter_names=[name for _, name in mixed], max_new_tokens=48, do_sample=False
)
replies = tokenizer.batch_decode(
    replies[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
)
rows = []
for (text, name), reply in zip(mixed, replies):
    if name == "__base__":
        with model.disable_adapter():
            alone = ask(model, text, 48)
    else:
        model.set_adapter(name)
        alone = ask(model, text, 48)
    rows.append([f"`{name}`", reply.strip(), "yes" if reply.strip() == alone else "no"])
plotting.table(["adapter of the row", "reply", "the same as alone"], rows)

# %% [markdown]
# ## What does it cost?
#
# A switch writes a name into each layer, and with it PEFT makes that adapter trainable. The adapter itself costs two thin products per layer in every forward
# pass, beside the wide one.
#
# **Predict:** how much slower is a forward pass with an adapter, on this small model?

# %% tags=["measured"]
ids = torch.randint(10, len(tokenizer), (8, 64), device=device)
with torch.no_grad():  # in turns, so that a busy moment of the machine hits all three
    times = timing.in_turns(
        {
            "base": lambda: base_model(ids),
            "adapted": lambda: model(ids),
            "two switches": lambda: [model.set_adapter("mood"), model.set_adapter("sailor")],
        }
    )
plain, adapted, switches = (median for median, _, _ in times.values())
switch = switches / 2
plotting.table(
    ["", "ms"],
    [
        ["forward pass of 8 × 64 tokens, base model", f"{plain:.1f}"],
        ["the same, with one adapter", f"{adapted:.1f} ({adapted / plain - 1:+.0%})"],
        ["switching from one adapter to another", f"{switch:.1f}"],
    ],
)

# %% [markdown]
# The extra time goes away when an adapter is *merged* into the weights: lesson 2 measures it.
#
# ## Back to the base
#
# Three ways off, from light to final: `disable_adapter()` for a block of code, `delete_adapter` for one
# adapter, and `unload()`, which takes PEFT off the model altogether.
#
# **Predict:** after all this, are the logits *close to* those of the untouched model, or *equal* to them?

# %%
used = copy.deepcopy(model)  # the model itself stays as it is, so this cell can be run again
used.delete_adapter("mood")
print("left:", list(used.peft_config))

with torch.no_grad():
    with used.disable_adapter():
        off = used(**witness).logits
    on = used(**witness).logits
    unloaded = used.unload()(**witness).logits

print("an adapter changes the logits by up to", f"{(on - logits_before).abs().max():.2f}")
print("disabled, equal to the bit:", torch.equal(off, logits_before))
print("unloaded, equal to the bit:", torch.equal(unloaded, logits_before))
assert not torch.equal(on, logits_before)
assert torch.equal(off, logits_before) and torch.equal(unloaded, logits_before)

# %% [markdown]
# **LoRA never writes to the base weights, so the way back is exact.** We looked first that the adapter does change
# the logits: had it not, the equality would say nothing.
#
# ## Two other doors
#
# `transformers` models can load adapters themselves, without a wrapper around them. And `AutoPeftModelForCausalLM`
# finds the base by the name in the adapter's config. That name is only good where it leads somewhere: our adapters say
# `models/base`, which is a folder of this course, so we first write a copy whose config names the folder in full.

# %%
unwrapped = load_base()
unwrapped.load_adapter(paths.adapter_path("sailor"), adapter_name="sailor")
print("transformers:", ask(unwrapped, prompts["sailor"]))

in_full = paths.runs_dir() / "lesson01" / "sailor_here"
config = PeftConfig.from_pretrained(paths.adapter_path("sailor"))
config.base_model_name_or_path = base_folder
with saving(in_full) as folder:
    config.save_pretrained(folder)
    weights = (paths.adapter_path("sailor") / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)

auto = AutoPeftModelForCausalLM.from_pretrained(in_full, dtype=runtime.dtype()).to(device)
print("AutoPeft:    ", ask(auto, prompts["sailor"]))

# %% [markdown]
# With a network, a hub id takes the folder's place in every one of these calls (not run here):
#
# ```python
# model = PeftModel.from_pretrained(base_model, "organisation/adapter-name", revision="<commit>")
# ```
#
# An adapter is code-free if it is safetensors, but it is still somebody else's numbers: pin the revision to a commit,
# so that it can't change under you.
#
# ## Break it
#
# Five mistakes. None of the first four raises an error.
#
# ### 1 · "The tuned model answers just like the base"
#
# You load a base, wrap it, and compare the two. **Predict:** what is the largest difference?

# %%
base = load_base()
tuned = PeftModel.from_pretrained(base, paths.adapter_path("reading"))
with torch.no_grad():
    difference = (tuned(**witness).logits - base(**witness).logits).abs().max()
print(f"tuned against base: {difference}\n")
print(validation.compare_models(base, tuned, witness), "\n")
print(validation.check_changes_output(tuned, witness))

# %% [markdown]
# PEFT works **in place**: the layers inside `base` were exchanged, so both names now lead to the tuned model.
# Compare with `disable_adapter()`, as the second check does, or with a second copy of the base.
#
# ### 2 · The adapter that was never loaded
#
# Somebody saved `model.state_dict()` by hand. Its keys carry the adapter's name, and it is loaded under another.

# %%
from safetensors.torch import save_file

sailor_folder = paths.adapter_path("sailor")
by_hand = paths.runs_dir() / "lesson01" / "saved_by_hand"
with saving(by_hand) as folder:
    PeftConfig.from_pretrained(sailor_folder).save_pretrained(folder)
    named = {
        key.replace(".weight", ".sailor.weight"): value.clone()
        for key, value in load_file(sailor_folder / "adapter_model.safetensors").items()
    }
    save_file(named, folder / "adapter_model.safetensors")

loaded = tuned.load_adapter(by_hand, adapter_name="style")
tuned.set_adapter("style")
with tuned.disable_adapter():
    plain_reply = ask(tuned, prompts["sailor"])
print("same as the base:", ask(tuned, prompts["sailor"]) == plain_reply, "\n")
print(validation.check_adapters(tuned, load_result={"style": loaded}), "\n")
print(validation.check_adapter_folder(by_hand))

# %% [markdown]
# `load_adapter` named what it missed, and what it found no place for, in the object that it returned, and said nothing;
# `PeftModel.from_pretrained` would have warned. **Look at what `load_adapter`
# returns, or let a check do it:** a *B* of nothing but zeros in an adapter that should be trained is the sign.
#
# ### 3 · The adapter of another base
#
# An adapter is a difference, and a difference is good for one base only. With other shapes PEFT raises an error. Here is
# the case that it lets pass: the same architecture with fewer layers.

# %%
shorter = AutoConfig.from_pretrained(base_folder)
shorter.num_hidden_layers -= 1
if getattr(shorter, "layer_types", None):
    shorter.layer_types = shorter.layer_types[: shorter.num_hidden_layers]
other_base = AutoModelForCausalLM.from_config(shorter)
wrong = PeftModel.from_pretrained(other_base, paths.adapter_path("reading"))
print("loaded without an error, into", type(wrong).__name__, "\n")
print(validation.check_adapter_folder(paths.adapter_path("reading"), base=shorter))

# %% [markdown]
# ### 4 · The adapter that is applied twice
#
# Merge an adapter into a model, save or pass on the model, and later load the adapter on top of it again. It happens when
# the merged model is taken for the base.

# %%
merged = PeftModel.from_pretrained(load_base(), paths.adapter_path("sailor")).merge_and_unload()
print("merged once:", ask(merged, prompts["sailor"]))
twice = PeftModel.from_pretrained(merged, paths.adapter_path("sailor"))
print("twice:      ", ask(twice, prompts["sailor"]), "\n")
print(validation.check_adapters(twice, original_base=base_folder))

# %% [markdown]
# ### 5 · The adapter that is a pickle
#
# `adapter_model.bin` is the old format, a pickle: a list of instructions, and what they do is up to whoever wrote it. Today's
# PEFT lets torch read tensors from it and refuse the rest; another tool or an older version may not. safetensors holds
# numbers only, whoever reads it. PEFT still takes a `.bin` if it finds nothing else, so the check comes **before** the call.

# %%
pickled = paths.runs_dir() / "lesson01" / "pickled"
with saving(pickled) as folder:
    PeftConfig.from_pretrained(paths.adapter_path("sailor")).save_pretrained(folder)
    torch.save(
        load_file(paths.adapter_path("sailor") / "adapter_model.safetensors"),
        folder / "adapter_model.bin",
    )
print(validation.check_adapter_folder(pickled))

# %% [markdown]
# ### Exercise: find the silent ones (stretch, 15 min)
#
# Write the heart of such a check yourself: given a PEFT model with any number of adapters, return the names of
# those that change nothing because **every** one of their *B* matrices is zero.
#
# <details><summary>Where are the B matrices?</summary>
# <code>model.named_parameters()</code>. The names look like <code>….lora_B.sailor.weight</code>; the adapter's name is the
# part after <code>lora_B</code>.
# </details>
# <details><summary>An adapter with one zero matrix is reported, too</summary>
# It is silent only if <em>all</em> its B matrices are zero. Collect per name, then decide.
# </details>
# <details><summary>Nothing is ever reported</summary>
# A is drawn at random and is never zero. Look at B.
# </details>


# %% exercise="01.silent" points=4
def silent_adapters(model):
    """Return the sorted names of adapters whose every B is zero."""
    ### BEGIN SOLUTION
    largest = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            adapter = name.split(".lora_B.")[1].split(".")[0]
            largest[adapter] = max(largest.get(adapter, 0), parameter.abs().max().item())
    return sorted(adapter for adapter, size in largest.items() if size == 0)
    ### END SOLUTION


lesson01.silent(silent_adapters)

# %%
### BEGIN HIDDEN TESTS
assert lesson01.silent.outcome(silent_adapters).passed
_model = lesson01.tiny_adapted_model(["one", "two", "three"], silent=["three", "one"], seed=11)
assert list(silent_adapters(_model)) == ["one", "three"]
### END HIDDEN TESTS

# %% [markdown]
# ## Recap
#
# What this notebook measured, in one table:

# %% tags=["measured"]
own = [scores[task][i] for i, task in enumerate(tasks)]
none = scores["none"]
saved = sum(f.stat().st_size for f in adapter_folder.glob("*.safetensors"))
plotting.table(
    ["", "measured"],
    [
        ["adapter's share of the base's parameters", f"{adapter_parameters / base_parameters:.1%}"],
        ["adapter file", f"{saved / 1e3:.0f} kB"],
        ["score on its own task, lowest of four", f"{min(own):.0%}"],
        ["score of the base on these tasks, highest", f"{max(none):.0%}"],
        ["logits after unloading", "equal to the bit"],
        ["forward pass with an adapter", f"{adapted / plain - 1:+.0%} time"],
        ["switching", f"{switch:.1f} ms"],
    ],
)
progress("01")

# %% [markdown]
# ## Take it to work
#
# Put the folder of an adapter of yours between the quotes, and the model's folder if you have it. The check
# reads headers and small tensors only; it opens no pickle.

# %%
my_adapter, my_base = "", None
print(validation.check_adapter_folder(my_adapter or paths.adapter_path("mood"), base=my_base))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · You loaded a second adapter with <code>load_adapter</code>, and the answers did not change. Why?</summary>
# Loading does not switch. Call <code>set_adapter</code> with its name.
# </details>
# <details><summary>2 · Why is it no proof of success that merged and unmerged model agree?</summary>
# If <em>B</em> is zero they agree, too. First show that the adapter changes the output.
# </details>
# <details><summary>3 · Which base can an adapter be used with?</summary>
# The one it was trained on: it is a difference to those weights. Equal shapes are not enough.
# </details>
#
# ## Where to read on
#
# - [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), Hu et al. 2021: the paper
# - [PEFT: load and switch adapters](https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint): the
#   checkpoint format
# - [PEFT: mixed adapter batches](https://huggingface.co/docs/peft/main/en/developer_guides/lora)
# - [Parameter-efficient fine-tuning, the announcement](https://huggingface.co/blog/peft)
# - [What is LoRA?](https://www.ibm.com/think/topics/lora) by IBM, and
#   [by Cloudflare](https://www.cloudflare.com/learning/ai/what-is-lora/): shorter explanations
# - [Symptom, cause, check](../docs/symptoms.md): the page that grows out of the Break-it sections
#
# Next: lesson 2 builds LoRA from nothing.
