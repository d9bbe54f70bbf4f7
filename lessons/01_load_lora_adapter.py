# %% [markdown]
# # Load, switch and remove adapters
#
# One small language model can answer questions about a passage, speak like a sailor, fill in a form and judge a review,
# if you give it a small set of extra weights for each of these jobs. Such a set is called an
# [adapter](../docs/glossary.md#adapter).
# **How do you load adapters, switch between them and take them off again, and how do you know that it worked?** The last
# part matters because most mistakes with adapters raise no error.
#
# | | |
# |---|---|
# | **What you'll do** | type sentences for four adapters; open one; score them; mix them in one batch; take them off; find out why a folder changes nothing, and mend it |
# | **What you'll learn** | what an adapter is on disk; the calls that load and switch; what a score can hide; how to prove that an adapter is on, and that it is off |
# | **What you'll need** | a laptop, no GPU, no network; some Python, and to have seen a `transformers` model once |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import re

from adapter_checks.saving import saving
from course_utils import data, evaluation, paths, plotting, runtime, timing, validation
from course_utils.exercises import lesson01, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Type a sentence
#
# The next cell loads a [base model](../docs/glossary.md#base-model) and four adapters, with PEFT, Hugging Face's library for
# adapters. The base model was trained on text about an invented coast and about everyday things. You will see what each call
# does in a moment.

# %%
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype()).to(device)


model = PeftModel.from_pretrained(
    load_base(), paths.adapter_path("reading"), adapter_name="reading"
)
for name in ("sailor", "extract", "mood"):
    model.load_adapter(paths.adapter_path(name), adapter_name=name)


def ask(model, text, max_new_tokens=72):
    """The model's reply to one user message, most likely token first at every step."""
    messages = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    reply = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = reply[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True).strip()


# %% [markdown]
# Now it is your turn: **put sentences of your own in place of ours, and run the cell.** Leave the adapters' names as they are.
# Each adapter was trained on one kind of request, so keep to its form:
#
# | Adapter | What you type |
# |---|---|
# | `reading` | one to three short sentences, then a question: who has, found or got something, where it is, what colour it is, or what somebody's trade is |
# | `sailor` | `Say it like a sailor:` and a short sentence |
# | `extract` | `Give who, what and where as JSON:` and a sentence in which somebody puts, leaves or finds something somewhere |
# | `mood` | `Is the guest happy or unhappy?` and a visit with an opinion about it |

# %% tags=["first-text"]
MY_REQUESTS = {
    "reading": "My sister has the drone. My bike is in the garage. Who has the drone?",
    "sailor": "Say it like a sailor: My sister keeps her drone in the garage.",
    "extract": "Give who, what and where as JSON: Yesterday my sister left a drone on the sofa.",
    "mood": "Is the guest happy or unhappy? We went to the inn on Friday. I found the beds dirty.",
}
data.check_texts(list(MY_REQUESTS.values()))
rows = []
for adapter, request in MY_REQUESTS.items():
    with model.disable_adapter():
        alone = ask(model, request)
    model.set_adapter(adapter)
    rows.append([request, alone, f"`{adapter}`", ask(model, request)])
plotting.table(["request", "base model alone", "adapter", "reply with it"], rows)

# %% tags=["claim"]
import json

from course_utils import paths
from pretraining.words import held_out_forms

assert {"drone", "garage", "sofa"} <= held_out_forms(), (
    "*drone*, *garage* and *sofa* occur nowhere in its training text"
)
measured = json.loads((paths.project_root() / "models" / "measured.json").read_text())
parts = [
    measured["tasks"][task][part]["score"]
    for task in ("reading", "sailor", "extract")
    for part in ("own_words", "typed")
]
assert 0.86 < min(parts) and max(parts) < 0.94, "about nine in ten"

# %% [markdown]
# The base model alone says something of its own, because it doesn't know what you want. With an adapter, the same model does
# one job. It does so even with new words, because it has learned to copy a word that it doesn't know. For example,
# *drone*, *garage* and *sofa* occur nowhere in its training text. Not every reply is right. When we measured it, `reading`,
# `sailor` and `extract` each got about nine in ten right, both of requests with new words and of fifty requests written
# by hand.
#
# ### Find its limits
#
# **Predict:** one of the next three replies is wrong. Which one, and why? (In JupyterLab the outputs that answer a
# prediction are folded. Make your prediction first, then click the line below the cell, or run the cell.)

# %%
model.set_adapter("reading")
limits = [
    "The drone is on the sofa. Where is the drone?",
    "The drone is not in the garage, it is on the sofa. Where is the drone?",
    "My sister has the drone. My bike is in the garage. Who has the ladder?",
]
plotting.table(["request", "reply of `reading`"], [[text, ask(model, text)] for text in limits])

# %% tags=["claim"]
told, denied = (measured["abilities"]["limits"][way]["1"] for way in ("told", "denied"))
crowded = measured["abilities"]["limits"]["told"]["8"]
assert denied < 0.05 < 0.9 < told, "names the place that the sentence rules out"

# %% [markdown]
# The second reply is wrong: it names the place that the sentence rules out. This isn't bad luck. Of 100 questions after one
# plain statement `reading` gets {{told:.0%}} right, and of 100 after such a denial {{denied:.0%}}, because of what the model has
# seen. Neither the base model's text nor the rows (the examples) that the adapter was trained on contain a sentence such as "it
# is not here, it is there", so nothing taught it to tell the two places apart. New *words* are no problem, because it has
# practised copying, but a new *kind of sentence* is. The third reply is right, because some of the adapter's rows ask for
# something that the passage doesn't say.
#
# Now look for other limits in the cell above. For example, with eight facts in the passage {{crowded:.0%}} of the replies are
# right, and about the real world the model knows nothing.
#
# ## Load, then switch
#
# Look back at the loading cell. `PeftModel.from_pretrained` put the first adapter into the base model, and
# `load_adapter` added three more beside it, each under a name. **Loading doesn't switch:** an added adapter waits until
# `set_adapter` makes it the [active adapter](../docs/glossary.md#active-adapter). In a `with model.disable_adapter():` block
# all of them are off.
#
# **Predict:** what does the `sailor` adapter make of a question about a passage?

# %%
question = "Fenna left the lantern in the boathouse. Edan found the key. Who found the key?"
with model.disable_adapter():
    rows = [["none", ask(model, question)]]
for adapter in model.peft_config:
    model.set_adapter(adapter)
    rows.append([f"`{adapter}`", ask(model, question)])
print(question)
plotting.table(["active adapter", "reply"], rows)

# %% [markdown]
# `sailor` doesn't answer the question, because it has only learned to say things like a sailor. Each adapter does its own job
# with whatever you type. **The wrong adapter raises no error:** you just get a reply of the wrong kind, so the rest of this
# lesson measures and checks.
#
# ## Open an adapter
#
# ![Left: an adapter sits beside each linear layer of each block of the base model, in the attention and in the MLP, and set_adapter plugs in another. Right: it is two thin matrices A and B beside a frozen weight W, and the layer computes h = Wx + s·B(Ax)](../images/adapter.png)
#
# These adapters are made with LoRA, low-rank adaptation ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)). Beside
# each linear layer that it adapts stands a pair of thin matrices, *A* and *B*. The layer's own weight *W* is frozen,
# which means that training doesn't change it. For an input *x* the layer computes *Wx + s·B(Ax)*, where *s* is a fixed number,
# the [scaling](../docs/glossary.md#alpha-α-scaling). On disk an adapter is a folder with two files.

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
# `adapter_config.json` says which base model the adapter was made for, its [rank](../docs/glossary.md#rank-r) and alpha (alpha
# divided by the rank is the scaling), and the names of the adapted layers, its
# [target modules](../docs/glossary.md#target-modules). `adapter_model.safetensors` holds the numbers.
#
# **Predict:** the layers of the attention are 256 × 256, and the rank is 8. What are the shapes of *A* and *B*?

# %%
tensors = load_file(adapter_folder / "adapter_model.safetensors")
first = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = tensors[f"{first}.lora_A.weight"], tensors[f"{first}.lora_B.weight"]
base_model = load_base()  # without adapters to the end, for comparisons
W = base_model.get_submodule(first.removeprefix("base_model.model.")).weight
change = config.lora_alpha / config.r * B @ A
plotting.show_weights(
    {"W, frozen": W, "s·BA, the change": change, "B": B, "A": A},
    "Two thin strips make a change of the weight's shape",
)
base_parameters = sum(p.numel() for p in base_model.parameters())
adapter_parameters = sum(tensor.numel() for tensor in tensors.values())
print(f"base model: {base_parameters:,} numbers")
print(f"adapter: {adapter_parameters:,} numbers in {len(tensors)} tensors,", end=" ")
print(f"{adapter_parameters / base_parameters:.1%} of the base model's")

# %% [markdown]
# *A* is 8 × 256 and *B* 256 × 8, so the pair holds 4,096 numbers beside the 65,536 of *W*. Each picture has its own colour
# scale, which ends at the number below it. The change *s·BA* has the shape of *W*, and it is striped, because each of
# its rows is a mixture of the same 8 rows of *A*. **An adapter is small because it stores the two strips and not their
# product.**
#
# ### Exercise: weigh an adapter (warm-up, 5 min)
#
# Your function gets the tensors of an adapter file, as above. Return how many numbers it holds and what its rank is.
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
# ## Score each adapter on each task
#
# A few replies prove little. So take [held-out](../docs/glossary.md#held-out) rows of each task, which no adapter was trained on, and
# score them by [exact match](../docs/glossary.md#exact-match): a reply counts if it is the expected one, to the letter.
# (For `extract`, the three fields must be right.)
#
# **Predict:** the base model and the four adapters do four tasks. Which of the twenty scores will be high?

# %%
tasks = list(model.peft_config)
held_out = {task: data.load_task(task, "test").select(range(48)) for task in tasks}


def evaluated():
    """{task: score and replies} of the model as it now stands."""
    options = {"max_new_tokens": 72, "batch_size": 64}
    return {
        task: evaluation.evaluate_task(model, tokenizer, task, rows, **options)
        for task, rows in held_out.items()
    }


with model.disable_adapter():
    found = {"none": evaluated()}
for adapter in tasks:
    model.set_adapter(adapter)
    found[adapter] = evaluated()
scores = {
    adapter: {task: result["score"] for task, result in results.items()}
    for adapter, results in found.items()
}
title = "By exact match, each adapter is good at its own task only"
plotting.show_matrix(scores, title, "task", "active adapter")
for task in tasks:
    evaluation.band(f"{task}, own adapter", scores[task][task], 0.85, 1, quiet=True)
    evaluation.band(f"{task}, no adapter", scores["none"][task], 0, 0.1, quiet=True)

# %% [markdown]
# Only four scores are high: each adapter's on its own task. Do the other models never give the answer? Exact match can't say,
# because it gives 0 to a right fact in another form. So count the replies to `reading`'s questions in which the answer *occurs*.
# This count needs a control to compare it with, because a model that just repeats some sentence of the passage hits the answer
# now and then. The last row says how often.
#
# **Predict:** `none` and `sailor` both have 0% by exact match. In whose replies does the answer occur more often?


# %%
def occurs(answer, text):
    """Does the last word of the answer stand in the text?"""
    return re.search(rf"\b{answer.split()[-1]}\b", text) is not None


answers = [row["completion"][0]["content"] for row in held_out["reading"]]
asked = [row["prompt"][0]["content"] for row in held_out["reading"]]
occurring = {
    adapter: sum(map(occurs, answers, results["reading"]["predictions"])) / len(answers)
    for adapter, results in found.items()
}
by_chance = [
    sum(occurs(answer, sentence) for sentence in sentences) / len(sentences)
    for answer, text in zip(answers, asked)
    for sentences in [text.split(". ")[:-1]]  # the last one is the question
]
chance = sum(by_chance) / len(by_chance)
plotting.table(
    ["active adapter", "exactly right", "the answer occurs"],
    [
        *(
            [name, f"{scores[name]['reading']:.0%}", f"{share:.0%}"]
            for name, share in occurring.items()
        ),
        ["*a sentence of the passage at random*", "0%", f"{chance:.0%}"],
    ],
)
evaluation.band("the answer in the base's replies", occurring["none"], 0.5, 0.7, quiet=True)
evaluation.band("in sailor's, less chance", occurring["sailor"] - chance + 0.1, 0, 0.2, quiet=True)

# %% [markdown]
# The answer occurs more often in the base model's replies (`none`): it gives the answer in most of them, in a sentence of
# its own. So a good part of what `reading` adds is the form that you asked for. `sailor` gives the answer only about as often as a sentence picked at
# random, because it repeats something from the passage, and often not what was asked for. **Before you say that a model can't
# do a task, look at what your metric counts as right.**
#
# ## Ask which adapter is on
#
# `active_adapters` says what you asked for, and `get_model_status()` says what the layers really do
# (`get_layer_status()` lists them one by one). The course's own `check_adapters` looks at the same and more, and says in words
# what is wrong and what to do about it. Here nothing is wrong.

# %%
model.set_adapter("sailor")
status = model.get_model_status()
print("asked for:", model.active_adapters)
print("available:", status.available_adapters)
print("active:   ", status.active_adapters, " enabled:", status.enabled, "\n")
print(validation.check_adapters(model, expect_active=["sailor"]))

# %% [markdown]
# ### Exercise: borrow an adapter (core, 10 min)
#
# At work you sometimes need one reply from another adapter, and afterwards the model as it was. Write a function that returns
# the [logits](../docs/glossary.md#logits), the model's scores for each possible next token, with the adapter `name` active.
# Afterwards **the adapter that was active before must be active again**, even if the forward pass fails.
#
# <details><summary>How do I get logits?</summary>
# Call the model: <code>model(input_ids=input_ids).logits</code>.
# </details>
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
# ## Mix adapters in one batch
#
# Suppose that requests for different adapters arrive together. With `adapter_names=` each row of a batch gets its own adapter, and
# `"__base__"` stands for none, so you need neither to switch nor to load a second copy of the model.

# %%
mixed = {**MY_REQUESTS, "__base__": question}
batch = tokenizer.apply_chat_template(
    [[{"role": "user", "content": request}] for request in mixed.values()],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
    padding=True,
    tokenizer_kwargs={"padding_side": "left"},  # so that all rows end where the reply begins
).to(device)
generated = model.generate(**batch, adapter_names=list(mixed), max_new_tokens=72, do_sample=False)
in_batch = tokenizer.batch_decode(
    generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
)

# %%
rows = []
for (adapter, request), reply in zip(mixed.items(), in_batch):
    if adapter == "__base__":
        with model.disable_adapter():
            alone = ask(model, request)
    else:
        model.set_adapter(adapter)
        alone = ask(model, request)
    rows.append([f"`{adapter}`", reply.strip(), "yes" if reply.strip() == alone else "no"])
plotting.table(["adapter of the row", "reply in the batch", "the same as alone"], rows)

# %% [markdown]
# Each row gets the reply that it would get alone.
#
# ## What does an adapter cost?
#
# In every forward pass an adapted layer computes two thin products, *Ax* and *B(Ax)*, beside its wide one, *Wx*. On this model
# that is 5% more multiplications. On a layer with 4,096 inputs and outputs, rank 8 would be 0.4% more.
#
# **Predict:** is a pass 5% slower with an adapter? And is it the same share for one token as for many?

# %% tags=["measured"]
model.set_adapter("sailor")
rows = []
for batch_size, length in ((1, 1), (1, 64), (8, 64)):
    ids = torch.randint(10, len(tokenizer), (batch_size, length), device=device)
    with torch.no_grad():  # in turns, so that a busy moment of the machine hits both
        times = timing.in_turns(
            {"base": lambda ids=ids: base_model(ids), "adapted": lambda ids=ids: model(ids)}
        )
    base_ms, adapted_ms = times["base"][0], times["adapted"][0]
    overhead = f"{adapted_ms / base_ms - 1:+.0%}"
    rows.append([f"{batch_size} × {length}", f"{base_ms:.1f}", f"{adapted_ms:.1f}", overhead])
plotting.table(["tokens in the pass", "base model, ms", "with adapter, ms", "more"], rows)
switches = {"both": lambda: [model.set_adapter("mood"), model.set_adapter("sailor")]}
switch = timing.in_turns(switches)["both"][0] / 2
print(f"switching from one adapter to another: {switch:.1f} ms")

# %% tags=["claim"]
from safetensors.torch import load_file

from tools.claims import swept

wide = [
    weight.shape
    for name, weight in load_file(f"{paths.base_model()}/model.safetensors").items()
    if "layers." in name and weight.ndim == 2
]
thin = 8 * sum(map(sum, wide)) / sum(outputs * inputs for outputs, inputs in wide)
assert round(100 * thin) == 5, "more than 5%"
slower = swept("overhead", "overhead", "threads", "busy", "rows", "length")
one, two = (
    {tokens: slower[threads, 0, *tokens][0] for tokens in ((1, 1), (8, 64))} for threads in (1, 2)
)
of_busy = slower[2, 2, 8, 64]
assert min(*one.values(), *two.values()) > 0.15, "far more than 5%"
assert one[1, 1] > 1.5 * one[8, 64], "on one thread"
assert two[1, 1] < two[8, 64], "on two threads"

# %% [markdown]
# Every pass becomes far more than 5% slower, because most of the extra time isn't spent on multiplying. An
# adapted layer makes several small calls beside its one wide product, and a call has a fixed cost, however little it computes.
#
# The share isn't the same for all passes, and which suffers most depends on the machine. We measured this in a
# [sweep](../docs/glossary.md#sweep) of three seeds: on one thread a pass for one token became {{one[1, 1]:.0%}} slower and one
# for 8 × 64 tokens {{one[8, 64]:.0%}}, while on two threads it was {{two[1, 1]:.0%}} and {{two[8, 64]:.0%}}. Beside two other
# busy processes the large pass became {{of_busy[1]:.0%}} to {{of_busy[2]:.0%}} slower. So other lessons, which time such a pass
# again, show other percentages. **An overhead holds for one model, one size of pass and one machine.** It goes away when you
# [merge](../docs/glossary.md#merge) the adapter into the weights, as in [lesson 7](07_merging.ipynb). Switching loads nothing,
# because all four adapters are in memory.
#
# ## Back to the base
#
# There are three ways to take adapters off, from temporary to final. `disable_adapter()` does it inside a `with` block,
# `delete_adapter` removes one adapter, and `unload()` takes PEFT off the model altogether.
#
# **Predict:** with the adapters off, are the logits *close* to those of an untouched copy of the base model, or *equal* to them?

# %%
witness = tokenizer(question, return_tensors="pt").to(device)
used = copy.deepcopy(model)  # the model itself stays as it is, so this cell can be run again
used.delete_adapter("mood")
print("left:", list(used.peft_config))
with torch.no_grad():
    untouched = base_model(**witness).logits
    on = used(**witness).logits
    with used.disable_adapter():
        off = used(**witness).logits
    unloaded = used.unload()(**witness).logits

print("an adapter changes the logits by up to", f"{(on - untouched).abs().max():.2f}")
print("disabled, equal to the bit:", torch.equal(off, untouched))
print("unloaded, equal to the bit:", torch.equal(unloaded, untouched))
assert not torch.equal(on, untouched)
assert torch.equal(off, untouched) and torch.equal(unloaded, untouched)

# %% [markdown]
# The logits are equal to the last bit, because plain LoRA leaves the base weights as they are. (Some kinds of adapter change
# them, as [lesson 6](06_olora.ipynb) shows.) The adapter's change of the logits is part of the proof: if it were 0, equal
# logits would show nothing.
#
# ## Two other ways to load an adapter
#
# A `transformers` model can load an adapter itself, without a `PeftModel` around it. And `AutoPeftModelForCausalLM` needs only
# the adapter's folder, because it finds the base model by the name in the adapter's config. Our adapters name a folder of this
# course, `models/base`, so the cell first writes a copy whose config has the whole path.

# %%
sailor_folder, request = (
    paths.adapter_path("sailor"),
    "Say it like a sailor: Fenna keeps the lantern.",
)
unwrapped = load_base()
unwrapped.load_adapter(sailor_folder, adapter_name="sailor")
print("transformers:", ask(unwrapped, request))

in_full = paths.runs_dir() / "lesson01" / "sailor_here"
config = PeftConfig.from_pretrained(sailor_folder)
config.base_model_name_or_path = base_folder
with saving(in_full) as folder:
    config.save_pretrained(folder)
    save_file(
        load_file(sailor_folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors"
    )
auto = AutoPeftModelForCausalLM.from_pretrained(in_full, dtype=runtime.dtype()).to(device)
print("AutoPeft:    ", ask(auto, request))

# %% [markdown]
# With a network, you can give the id of a model on a hub in place of each folder (not run here):
#
# ```python
# model = PeftModel.from_pretrained(base_model, "organisation/adapter-name", revision="<commit>")
# ```
#
# Give the commit as `revision`, because otherwise the files behind the name can change under you.
#
# ## Break it
#
# Here are four mistakes. None of the first three raises an error.
#
# ### Compare a model with its base
#
# You load a base model, put an adapter into it, and compare the two.
#
# **Predict:** what is the largest difference between their logits?

# %%
base = load_base()
tuned = PeftModel.from_pretrained(base, paths.adapter_path("reading"))
with torch.no_grad():
    difference = (tuned(**witness).logits - base(**witness).logits).abs().max()
print(f"tuned against base: {difference}\n")
print(validation.compare_models(base, tuned, witness), "\n")
print(validation.check_changes_output(tuned, witness))

# %% [markdown]
# The difference is 0, because PEFT works **in place**: it exchanged the layers inside `base`, so both names lead to the
# tuned model. Compare with `disable_adapter()`, as the second check does, or with a second copy of the base model. (In its
# report, the *top-1 token* is the most likely next token, and *KL* stands for
# [KL divergence](../docs/glossary.md#kl-divergence-in-nats): how different the probabilities are.)
#
# ### Find the fault: an adapter that changes nothing
#
# A colleague sends you the folder of an adapter that speaks like a sailor. It loads without an error, but the first of the next
# two cells shows that the reply is still the base model's.
#
# **Predict:** which of three causes does the second cell find: is the adapter off, is it untrained, or are its numbers not in the
# model? The size of the file is a hint.

# %%
from_a_colleague = paths.runs_dir() / "lesson01" / "from_a_colleague"
lesson01.write_folder(from_a_colleague, load_base(), sailor_folder)
file = from_a_colleague / "adapter_model.safetensors"
print(f"{file.stat().st_size / 1e3:,.1f} kB  {file.name}")

load_result = tuned.load_adapter(from_a_colleague, adapter_name="style")
tuned.set_adapter("style")
print("with the adapter:", ask(tuned, request))
print("base model alone:", ask(base_model, request))

# %%
print(validation.check_adapters(tuned, load_result={"style": load_result}), "\n")
print(validation.check_adapter_folder(from_a_colleague))

# %% [markdown]
# The numbers are in the file, but not in the model. The adapter is on, and its *B* is zero as before training, because nothing
# was loaded into it. The file is nearly thirty times too large, because somebody saved `model.state_dict()`: the whole base
# model with two adapters. There the adapter's name is part of each tensor's name, as in `….lora_A.sailor.weight`. PEFT expects
# names without it, because it puts one in by itself when it loads, so it found none of its tensors. `load_adapter` doesn't warn
# of this (`PeftModel.from_pretrained` does). **Look at what `load_adapter` returns, or let a check do it.**
#
# ### Exercise: mend the folder (core, 10 min)
#
# All numbers are still in the file. Given the tensors of such a file and the name of an adapter, return those that belong
# in `adapter_model.safetensors`: this adapter's *A* and *B*, with the names that PEFT expects, such as
# `….lora_A.weight`. Leave out the base weights and other adapters. Expected for the file above and `"sailor"`: 56 tensors.
#
# <details><summary>The check says that tensors of another adapter are there</summary>
# One adapter's name can be the beginning of another's. Compare the whole part between two dots.
# </details>
# <details><summary>The check says that a name has lost more than the adapter's name</summary>
# <code>replace(".sailor", "")</code> takes the word out everywhere. Take it out behind <code>lora_A</code> or
# <code>lora_B</code> only.
# </details>


# %% exercise="01.mend" points=3
def mend(tensors, adapter):
    """Return {name: tensor} for `adapter`'s file, from the {name: tensor} of a whole PEFT model."""
    ### BEGIN SOLUTION
    mended = {}
    for name, tensor in tensors.items():
        for part in ("lora_A", "lora_B"):
            if name.endswith(f".{part}.{adapter}.weight"):
                mended[name.removesuffix(f".{adapter}.weight") + ".weight"] = tensor
    return mended
    ### END SOLUTION


lesson01.mend(mend)

# %%
### BEGIN HIDDEN TESTS
assert lesson01.mend.outcome(mend).passed
_model = lesson01.tiny_adapted_model(["tone", "tone2"], seed=3)
_right = peft.get_peft_model_state_dict(_model, adapter_name="tone2")
_found = mend(dict(_model.state_dict()), "tone2")
assert set(_found) == set(_right)
assert all(torch.equal(_found[_name], _right[_name]) for _name in _right)
### END HIDDEN TESTS

# %%
if lesson01.mend.outcome(mend).passed:
    mended = paths.runs_dir() / "lesson01" / "mended"
    with saving(mended) as folder:
        PeftConfig.from_pretrained(from_a_colleague).save_pretrained(folder)
        save_file(mend(load_file(file), "sailor"), folder / "adapter_model.safetensors")
    print(validation.check_adapter_folder(mended))
    print(ask(PeftModel.from_pretrained(load_base(), mended), request))
else:
    print("Solve the exercise first; then this cell saves the mended folder and loads it.")

# %% [markdown]
# ### Apply an adapter twice
#
# Somebody merges an adapter into a model. You take the merged model for the base model, and load the adapter on it again.

# %%
merged = PeftModel.from_pretrained(load_base(), sailor_folder).merge_and_unload()
print("merged once:", ask(merged, request))
twice = PeftModel.from_pretrained(merged, sailor_folder)
print("twice:      ", ask(twice, request), "\n")
print(validation.check_adapters(twice, original_base=base_folder))

# %% [markdown]
# The reply is garbled, because an adapter holds a difference from the weights that it was trained on. On any other weights it
# is wrong, and these already contain it.
#
# ### Open a pickle
#
# Older adapters come as `adapter_model.bin`. That is a pickle, a list of instructions, and reading one can run any
# code that its author put into it. [safetensors](../docs/glossary.md#safetensors-pickle) files hold numbers only. Today's PEFT
# lets torch read nothing but tensors from a pickle, but other tools may be less careful, so **check a folder before you load it**.

# %%
pickled = paths.runs_dir() / "lesson01" / "pickled"
with saving(pickled) as folder:
    PeftConfig.from_pretrained(sailor_folder).save_pretrained(folder)
    torch.save(load_file(sailor_folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
print(validation.check_adapter_folder(pickled))

# %% [markdown]
# More mistakes, such as an adapter of another base model, are listed in [Symptom, cause, check](../docs/symptoms.md).
#
# ## Recap
#
# You load the first adapter with `PeftModel.from_pretrained` and others with `load_adapter`, and you switch with `set_adapter`.
# `disable_adapter()` and `unload()` give the base model back, equal to the bit, because LoRA leaves its weights as they are.
# No message tells you that an adapter works. So first show that it changes the output, then score it on held-out rows of its
# task, and look at what the metric counts as right. Above all, check what `load_adapter` returns and whether the folder is
# sound, because a model without its adapter also replies fluently.

# %% tags=["measured"]
plotting.table(
    ["", "measured"],
    [
        [
            "adapter's share of the base model's numbers",
            f"{adapter_parameters / base_parameters:.1%}",
        ],
        [
            "score on its own task, lowest of four",
            f"{min(scores[task][task] for task in tasks):.0%}",
        ],
        ["score of the base model, highest of four", f"{max(scores['none'].values()):.0%}"],
        ["the answer occurs in the base model's replies", f"{occurring['none']:.0%}"],
        ["logits with adapters off, or unloaded", "equal to the bit"],
        ["time of a pass of 8 × 64 tokens with an adapter", overhead],
        ["switching", f"{switch:.1f} ms"],
    ],
)
progress("01")

# %% [markdown]
# ## Take it to work
#
# Put the folder of an adapter of yours between the quotes and, if you have it, the base model's folder in place of `None`. The
# check reads headers and small tensors only, and opens no pickle.

# %%
my_adapter, my_base = "", None
print(validation.check_adapter_folder(my_adapter or paths.adapter_path("mood"), base=my_base))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · You loaded a second adapter with <code>load_adapter</code>, and the replies did not change. What are two possible causes?</summary>
# Loading doesn't switch, so it may not be active: call <code>set_adapter</code>. Or its tensors found no place in the
# model: look at <code>missing_keys</code> and <code>unexpected_keys</code> in what <code>load_adapter</code> returned.
# </details>
# <details><summary>2 · A merged model's logits equal those of the base with its adapter. Is the merge right?</summary>
# That is not proved yet, because they also agree if <em>B</em> is zero. First show that the adapter changes the base's output.
# </details>
# <details><summary>3 · An adapter scores 0% by exact match. Is it useless for the task?</summary>
# Read its replies first. The fact may be there in another form, as in the base model's replies above. Compare with a control that
# says how often that happens by chance.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), Hu et al. 2021: the paper
# - [PEFT: load and switch adapters](https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint): the
#   checkpoint format
# - [PEFT: mixed adapter batches](https://huggingface.co/docs/peft/main/en/developer_guides/lora)
# - [Parameter-efficient fine-tuning, the announcement](https://huggingface.co/blog/peft)
# - [What is LoRA?](https://www.ibm.com/think/topics/lora) by IBM, and
#   [by Cloudflare](https://www.cloudflare.com/learning/ai/what-is-lora/): shorter explanations
#
# Next: [lesson 2](02_lora_from_scratch.ipynb) builds LoRA from nothing.
