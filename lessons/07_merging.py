# %% [markdown]
# # Merge, prove and ship one model
#
# To use an adapter you need its base, and software that can load adapters. Much software wants one plain model instead. So
# you **merge**: you add the adapter's change to the base's weights and save the sum. Most mistakes on the way raise no
# error. The merged model still answers, but its answers are worse. **How do you know that the merged model is the model you
# trained?**
#
# | | |
# |---|---|
# | **What you'll do** | merge an adapter; prove the merge; find what is wrong with others' folders; merge beyond your memory |
# | **What you'll learn** | what each call changes; why merged models are faster, and sometimes twice as large; what to check |
# | **What you'll need** | [lesson 2](02_lora_from_scratch.ipynb) for *Wx + s·BAx*; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import subprocess
import sys

from adapter_checks import merging
from adapter_checks.saving import saving
from course_utils import data, evaluation, paths, plotting, runtime, sweeps, timing, validation
from course_utils.exercises import lesson07, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

runtime.seed_everything(1)
device, runs = runtime.device(), paths.runs_dir() / "lesson07"
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Check first that the adapter does something
#
# Suppose somebody merges an adapter that was never trained. Its *B* is zero, so it changes nothing. The merged model then
# agrees with it perfectly, and would do so even if the merge had failed. That is why you measure the adapter's effect
# before you judge the merge.
#
# The adapter is `sailor` of lesson 1, which says a sentence as the sailors of Skerrow do. We compare
# [logits](../docs/glossary.md#logits) at every token of 48 [held-out](../docs/glossary.md#held-out) questions with
# their answers. Type sentences of your own, too. Short ones work best: somebody has, finds or carries something, or
# something is somewhere.

# %%
MY_SENTENCES = ["Fenna keeps the lantern.", "The map is in the cellar.", "Tom carries a blue bag."]
data.check_texts(MY_SENTENCES)
base_folder, adapter_folder = paths.base_model(), paths.adapter_path("sailor")
tokenizer = AutoTokenizer.from_pretrained(base_folder)
if tokenizer.pad_token is None:  # a base without one: any token will do, since pads are masked
    tokenizer.pad_token = tokenizer.eos_token
rows = data.load_task("sailor", "test").select(range(48))
texts = [
    tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows
]
inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(device)
real = inputs["attention_mask"].bool()


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype()).to(device)


def load_adapted():
    """A fresh copy of the base model with the adapter beside it."""
    return PeftModel.from_pretrained(load_base(), adapter_folder).eval()


def logits(model):
    """The model's logits at all tokens but the pads, (tokens, vocabulary)."""
    with torch.no_grad():
        return model(**inputs).logits[real].float()


def ask(model, sentences=MY_SENTENCES):
    """What the model makes of these sentences."""
    prompts = [f"Say it like a sailor: {sentence}" for sentence in sentences]
    return evaluation.generate(model, tokenizer, prompts, max_new_tokens=40)


base_model = load_base().eval()
print(validation.check_changes_output(load_adapted(), inputs))

# %% [markdown]
# The adapter moves some logit by about 30. Any tolerance for the merge will be far below that, so if merged and unmerged
# model agree from here on, that tells you something about the merge. (The glossary explains
# [top-1](../docs/glossary.md#top-1-agreement) and [KL](../docs/glossary.md#kl-divergence-in-nats).)
#
# ## Add the change to the weights
#
# With the adapter beside it, a layer computes *Wx + s·B(Ax)*. Merged, it has the weight *W′ = W + s·BA* and computes
# *W′x*. `merge_and_unload()` does this in every adapted layer, takes PEFT's layers out, and **returns** the plain
# `transformers` model. Save this model: if you save the old variable instead, the folder holds an adapter with nothing
# in it.
#
# **Predict:** will merged and unmerged logits be equal to the bit? And will the weights without an adapter be equal to
# the base's?


# %%
def largest(one, other):
    """The largest absolute difference."""
    return (one - other).abs().max().item()


model = load_adapted()
before = base_model.state_dict()
changes = {
    name.removeprefix("base_model.model.") + ".weight": layer.get_delta_weight("default")
    for name, layer in model.named_modules()
    if isinstance(layer, LoraLayer)
}
base_logits, adapter_logits = logits(base_model), logits(model)
merged = model.merge_and_unload()
after = merged.state_dict()
others = [name for name in after if name not in changes]
of_adapted = max(largest(after[name], before[name] + change) for name, change in changes.items())
of_others = max(largest(after[name], before[name]) for name in others)
differences = {
    f"{len(changes)} adapted weights: merged against W + s·BA": of_adapted,
    f"{len(others)} other weights: merged against the base's": of_others,
    "logits: adapter against base": largest(adapter_logits, base_logits),
    "logits: merged against adapter": largest(logits(merged), adapter_logits),
}
plotting.table(
    ["compared", "largest difference"],
    [[what, f"{value:.2g}"] for what, value in differences.items()],
)
plotting.table(["sentence", "merged"], [list(pair) for pair in zip(MY_SENTENCES, ask(merged))])

# %% [markdown]
# The weights are equal to the bit: to *W + s·BA* in the adapted layers, and to the base's in all others. The logits are
# not, because *(W + s·BA)x* and *Wx + s·B(Ax)* add the same numbers in another order, and each addition rounds. They differ
# by less than 1e-4, which PEFT's own tests allow in float32, and by about a millionth of the adapter's effect. The
# [deep dive on rounding](deep_rounding.ipynb) works out how much to expect.
#
# **A real merge leaves a small difference, so zero is a bad sign.** If you see it, look whether *B* is zero.

# %% [markdown]
# ### Exercise: judge a merge (warm-up, 10 min)
#
# You get the logits of the base, of the adapter and of the merged model, and a tolerance. Return `"no effect"` if the
# adapter moves no logit by ten tolerances or more. Otherwise return `"same"` if merged model and adapter agree within the
# tolerance in every logit, and `"differs"` if they don't. Expected if base and adapter are alike: `"no effect"`.
#
# <details><summary>The check says that a mean hides something</summary>
# If one logit is wrong, the merge is wrong. Take <code>.abs().max()</code>.
# </details>
# <details><summary>The check says something about NaN</summary>
# No comparison with NaN is true. So ask for the good case, and let everything else be wrong:
# <code>"same" if difference &lt;= tolerance else "differs"</code>.
# </details>


# %% exercise="07.verdict" points=2
def verdict(base, adapter, merged, tolerance):
    """Return "no effect", "same" or "differs", from logits of one shape."""
    ### BEGIN SOLUTION
    if (adapter - base).abs().max() < 10 * tolerance:
        return "no effect"
    return "same" if (merged - adapter).abs().max() <= tolerance else "differs"
    ### END SOLUTION


lesson07.verdict(verdict)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.verdict.outcome(verdict).passed
_base, _adapter, _merged = lesson07.judged_logits(effect=0.3, error=2e-3, seed=31)
assert verdict(_base, _adapter, _merged, 1e-3) == "differs"
assert verdict(_base, _adapter, _merged, 1e-2) == "same"
assert verdict(_base, _adapter, _merged, 1e-1) == "no effect"
### END HIDDEN TESTS

# %% [markdown]
# ## Know which state you are in
#
# ![Four states of a model with an adapter: merge_adapter adds the change to the weights and keeps A and B, unmerge_adapter takes it away again; unload removes A and B and leaves the weights as they are; merge_and_unload adds the change and removes A and B](../images/merging.png)
#
# In the upper row of the picture PEFT's layers are still there, so you can go back. In the lower row they are gone, and
# you have a plain model. The cell below goes through these states. Each time it measures how far the logits are from those
# of the adapter and from those of the base.
#
# **Predict:** you merge, unmerge, and switch the adapter off. Do you get the base's logits back to the bit?

# %%
states = []


def note(call, model):
    """One row: how far is this model from the adapter's logits and from the base's?"""
    found = logits(model)
    from_both = [largest(found, known) for known in (adapter_logits, base_logits)]
    states.append([f"`{call}`", *(f"{distance:.2g}" for distance in from_both)])


model = load_adapted()
with model.disable_adapter():
    note("disable_adapter(), never merged", model)
model.merge_adapter()
note("merge_adapter()", model)
model.unmerge_adapter()
note("unmerge_adapter()", model)
with model.disable_adapter():
    note("disable_adapter(), after unmerging", model)
note("unload(), after unmerging", model.unload())
model = load_adapted()
model.merge_adapter()
note("unload(), while merged", model.unload())
plotting.table(["after", "from the adapter", "from the base"], states)

# %% [markdown]
# No. Unmerging subtracts what was added, and both steps round, so a difference of less than 1e-4 is left in the fourth
# row. In the first row nothing was ever merged, and the difference is zero. In 16 bits much more is left
# ([deep dive](deep_rounding.ipynb)), so keep the base, or load it again.
#
# The last row shows a trap: `unload()` doesn't undo a merge. A second trap is `disable_adapter()` on a merged model: it
# unmerges the adapter without a warning and leaves it unmerged.
#
# ## Time it
#
# The LoRA paper promises that a merged model adds no latency (section 4.1). Base and merged model do the same arithmetic, so
# any difference between their times is timing noise. Three models take turns in the next cell, because a busy computer is
# faster at one moment than at another.
#
# **Predict:** how much slower is the model with the adapter, and how much slower is the merged one?

# %% tags=["measured"]
models = {"base": base_model, "with adapter": load_adapted(), "merged": merged.eval()}
ids = torch.randint(10, len(tokenizer), (8, 64), device=device)


def forward(model):
    with torch.no_grad():
        model(ids).logits.sum().item()  # .item() also waits for a GPU


times = timing.in_turns({name: lambda one=one: forward(one) for name, one in models.items()}, 30)
slower = {name: median / times["base"][0] - 1 for name, (median, _, _) in times.items()}
plotting.table(
    ["8 × 64 tokens", "median, ms", "middle half, ms", "against the base"],
    [
        [name, f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{slower[name]:+.0%}"]
        for name, (median, low, high) in times.items()
    ],
)

# %% [markdown]
# The merged model takes as long as the base, up to timing noise: each median lies in or near the other's middle half of
# times. With the adapter beside it the base is slower, because each adapted layer computes two more small products.
# How much slower depends on the number of tokens and on what else the machine does
# ([lesson 1](01_load_lora_adapter.ipynb) measures it), so compare percentages only within one table. In a large model these
# products are a smaller part of the work, which is not measured here.
#
# **Merge an adapter that is final. Keep adapters unmerged if you want to switch between them.**
#
# ## Save one folder
#
# You ship a folder with the weights, the configuration, and the tokenizer with its chat template. Don't forget the
# tokenizer, because the model's `save_pretrained` doesn't write it. The helper `saving` first writes to a temporary folder
# and renames it at the end, so that a complete folder appears or none.

# %%
merged_folder = runs / "merged"
with saving(merged_folder) as folder:
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
files = [
    [place, file.name, f"{file.stat().st_size / 1e3:,.1f}"]
    for place, folder in (("adapter", adapter_folder), ("merged", merged_folder))
    for file in sorted(folder.iterdir())
]
plotting.table(["folder", "file", "kB"], files)

# %% [markdown]
# The merged folder has no `adapter_config.json`. That matters, because this file tells `transformers` to load an adapter
# on top of the model.
#
# Will the folder work where PEFT isn't installed? The next cell starts a fresh Python process that can't import PEFT.

# %%
CHILD = """
import sys
sys.modules["peft"] = None  # from now on, import peft fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": sys.argv[2]}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
reply = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""
sentence = MY_SENTENCES[0]
child = subprocess.run(
    [sys.executable, "-c", CHILD, merged_folder, f"Say it like a sailor: {sentence}"],
    capture_output=True,
    text=True,
)
said, here = child.stdout.strip(), ask(models["with adapter"], [sentence])[0]
print("the fresh process: ", said or child.stderr[-300:])
print("here, with adapter:", here)
assert said == here or not paths.is_shipped_base()

# %% [markdown]
# ### Know why a folder is twice as large
#
# "My merged model is twice as large as the base" is a common question. A number takes 4 bytes in float32, and 2 in
# bfloat16 or float16. So the size of the merged file depends on the [dtype](../docs/glossary.md#dtype) in which you
# *loaded* the base. The cell below stores a copy of the base in bfloat16, as most bases are stored, and merges it in
# three ways.
#
# **Predict:** the base has 3.9 million parameters. How large is each of the four files: the base and the three merges?

# %%
base_16 = runs / "base_bf16"
with saving(base_16) as folder:
    load_base().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def weights_mb(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


sizes = [["the base itself", "", f"{weights_mb(base_16):.1f}"]]
for dtype in ("float32", "bfloat16", "auto"):
    loaded = AutoModelForCausalLM.from_pretrained(base_16, dtype=dtype)
    whole = PeftModel.from_pretrained(loaded, adapter_folder).merge_and_unload()
    with saving(runs / f"merged_{dtype}") as folder:
        whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    stored = str(whole.dtype).removeprefix("torch.")
    size = weights_mb(runs / f"merged_{dtype}")
    sizes.append([f"merged, `dtype={dtype!r}`", stored, f"{size:.1f}"])
plotting.table(["", "dtype", "weights on disk, MB"], sizes)

# %% [markdown]
# The merged model has as many parameters as the base, and only their dtype differs: 15.5 MB in float32, 7.7 MB in
# bfloat16. With `"auto"`, the default since transformers 5, the base keeps its own dtype. Older versions loaded float32
# unless you told them otherwise, which doubled the size of the file.
#
# ## Prove it before you ship
#
# `check_merged_folder` compares three folders: the base, the adapter and the merged model. It looks at files, weights,
# logits and answers, and reports what it compared.
#
# **Predict:** the report says how many *times* the adapter's change is in the merged weights. Which number do you want?

# %%
report = validation.check_merged_folder(
    base_folder,
    adapter_folder,
    merged_folder,
    rows=data.load_task("sailor", "test").select(range(32)),
)
print(report)
assert report.ok

# %% [markdown]
# You want 1, and the second line of the report finds it. Logits can only show *that* something is wrong. Weights show *what*
# is wrong: the change can be in them twice, or not at all, or only in some layers.
#
# What if you ship a model in 16 bits? Rounding weights to 16 bits moves the logits far more than merging does, so a
# tolerance of 1e-4 would reject every right merge. The check therefore measures what *one* rounding of the right weights
# does to the logits of your model, and allows four times as much. The next cell checks the folder that was merged in
# bfloat16.

# %%
report = validation.check_merged_folder(base_16, adapter_folder, runs / "merged_bfloat16")
print(f"ok: {report.ok}; the change is {report.times:.3f} times in the weights;")
print(f"logits differ by {report.max_abs:.2f}, and {report.tolerance:.2f} is allowed")
assert report.ok

# %% [markdown]
# A merge can also damage the weights. If training diverged, a NaN in the adapter gets into the merged weights without a
# warning, and the model's answers are empty. `merge_and_unload(safe_merge=True)` checks each layer and raises an error
# instead. By then some layers are merged already, so load the model again afterwards.
#
# ## Break it: five folders that claim to be merged
#
# Suppose five people each send you a folder and say that it is `sailor`, merged into our base. One folder is right.
#
# **Predict:** from replies and sizes alone, which one is it?

# %%
suspects = lesson07.suspects(base_folder, adapter_folder, runs / "suspects")
replies = []
for name, folder in suspects.items():
    received = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    replies.append([name, f"{weights_mb(folder):.1f}", *ask(received, MY_SENTENCES[:2])])
plotting.table(["folder", "weights, MB", *MY_SENTENCES[:2]], replies)

# %% [markdown]
# Folder four doesn't talk like a sailor, and two and five write nonsense. One and three both say "Ahoy!" and "aye", so you
# might ship either. If you know how the adapter should talk, you notice that one keeps plain words, such as "keeps". Now let
# the check look at each folder.

# %%
findings = []
for name, folder in suspects.items():
    report = validation.check_merged_folder(base_folder, adapter_folder, folder)
    findings.append([name, ", ".join(report.codes) or "nothing", f"{report.times:.2f}"])
plotting.table(["folder", "wrong with it", "times in the weights"], findings)

# %% [markdown]
# Read the last column first:
#
# - **three** is right: the change is there once. The folder is smaller because it was saved in bfloat16.
# - **one** has half of the change. Somebody merged by hand and forgot the scaling, which is α/r = 2 here.
# - **four** has none of the change. It was saved after `unload()`, so it is the base.
# - **five** has the change twice, because somebody mistook a merged model for the base and merged once more.
# - **two** has the change once in its weights, and yet it replies as badly as five. The adapter's files lie beside the
#   merged weights, so `from_pretrained` adds the adapter again. These files also make the folder a little larger.
#
# You have to send one, four and five back, but you can mend folder two yourself: take the adapter's two files out.

# %%
for file in suspects["two"].glob("adapter_*"):
    file.unlink()
mended = AutoModelForCausalLM.from_pretrained(suspects["two"]).to(device).eval()
print(ask(mended, MY_SENTENCES[:1])[0])
assert validation.check_merged_folder(base_folder, adapter_folder, suspects["two"]).ok

# %% [markdown]
# ### Exercise: how often was it merged? (core, 15 min)
#
# Compute the last column of that table yourself. You get three dicts of tensors by name: the base's weights, the merged
# weights, and the changes *s·BA*, which exist for the adapted layers only. Return the factor *t* for which *t*·change comes
# closest to merged − base, over all layers together (a least-squares fit). For example, folder five gives about 2. Expected
# for a right merge: 1, up to rounding.
#
# <details><summary>What is the formula?</summary>
# For vectors: <em>t</em> = (difference · change) / (change · change). For matrices, multiply entry by entry and add all
# products up.
# </details>
# <details><summary>The check says that the mean over layers is no good</summary>
# In a layer that hardly changes you divide rounding noise by almost zero. Add up the numerators and the denominators over all
# layers, and divide once.
# </details>


# %% exercise="07.times" points=4
def times_merged(base, merged, changes):
    """Return how many times the changes are in the merged weights; all are {name: tensor}."""
    ### BEGIN SOLUTION
    above = sum(((merged[name] - base[name]) * change).sum() for name, change in changes.items())
    return (above / sum(change.square().sum() for change in changes.values())).item()
    ### END SOLUTION


lesson07.times(times_merged)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.times.outcome(times_merged).passed
_base, _merged, _changes = lesson07.times_example(0.5, seed=61)
assert abs(float(times_merged(_base, _merged, _changes)) - 0.5) < 0.02
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise: ship a merged model (core, 15 min)
#
# Write the function that you would use at work. It gets three paths. Merge the adapter into the base in the base's own
# dtype, save model and tokenizer in the folder `out`, leave the other two folders as they are, and return the report of
# `check_merged_folder`. The check tries it on a small model of its own. Expected: a report that is `ok`.
#
# <details><summary>The check finds no tokenizer</summary>
# Load it from the base's folder, and save it into <code>out</code> as well.
# </details>
# <details><summary>The check finds an adapter in the folder</summary>
# Save what <code>merge_and_unload()</code> returns, not the <code>PeftModel</code>.
# </details>


# %% exercise="07.ship" points=4
def ship(base_folder, adapter_folder, out):
    """Merge the adapter into the base, save one folder, and return the report of its check."""
    ### BEGIN SOLUTION
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    merged = PeftModel.from_pretrained(model, adapter_folder).merge_and_unload()
    with saving(out) as folder:
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return validation.check_merged_folder(base_folder, adapter_folder, out)
    ### END SOLUTION


lesson07.ship(ship)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.ship.outcome(ship).passed
_shipped = ship(base_folder, adapter_folder, runs / "shipped")
assert _shipped.ok and abs(_shipped.times - 1) < 0.01
assert (runs / "shipped" / "tokenizer.json").exists()
### END HIDDEN TESTS

# %% tags=["claim"]
from tools.claims import swept

model_mb = {
    blocks: found[0] for blocks, found in swept("merge_memory", "model_mb", "blocks").items()
}
needed = swept("merge_memory", "peak_mb", "way", "blocks")

# %% [markdown]
# ## Merge what doesn't fit into memory
#
# To merge with PEFT you need the whole base in memory, plus the adapter and one layer's change. For example, 7 billion
# parameters in bfloat16 take 14 GB. With `device_map={"": device}` all of it is on one device. With `"auto"` it is spread
# over GPUs, main memory and the disk. (If parts are on the disk, PEFT 0.21 writes a copy of the base's file, which
# *overwrites* a base that you gave by a relative path. Give an absolute one.)
#
# But you can merge without loading the model. The weights are stored in files called [shards](../docs/glossary.md#shard), and
# each tensor can be read, changed and written again by itself. `merging.merge_by_shards` does this. The next cell tries it,
# and shows the memory that each way takes for models of up to {{max(model_mb.values()):.0f}} MB with random weights.
#
# **Predict:** the model becomes twice as large. Does each way need twice the memory?

# %%
merging.merge_by_shards(base_folder, adapter_folder, runs / "by_shards")
by_shards = AutoModelForCausalLM.from_pretrained(runs / "by_shards").state_dict()
equal = all(torch.equal(by_shards[name], after[name].cpu()) for name in after)
print("by shards, equal to the merge above to the bit:", equal)

measured = data.load_results("merge_memory")
ways = {"merge_whole": "whole", "merge_by_shards": "by shards"}
lines = {
    label: sweeps.over_seeds([row for row in measured if row["way"] == way], "peak_mb", "model_mb")
    for way, label in ways.items()
}
title = "By shards, a merge needs little more memory for a larger model"
figure, alt = sweeps.curves(
    lines, title, "size of the model (MB)", "memory that the merge takes (MB)"
)
figure.axes[0].set_ylim(bottom=0)
plotting.show(figure, alt)

# %% tags=["claim"]
fewest, most = min(model_mb), max(model_mb)
whole, shards = (
    {blocks: needed[way, blocks][0] for blocks in model_mb}
    for way in ("merge_whole", "merge_by_shards")
)
assert all(whole[blocks] > model_mb[blocks] for blocks in model_mb), (
    "more than the model's own size"
)
assert shards[most] - shards[fewest] < 0.2 * (model_mb[most] - model_mb[fewest]), "hardly grows"

# %% [markdown]
# No. In one piece the merge needs more than the model's own size: {{whole[fewest]:.0f}} MB for {{model_mb[fewest]:.0f}} MB, and {{whole[most]:.0f}} MB for {{model_mb[most]:.0f}} MB. Merged by
# shards, the need hardly grows, from {{shards[fewest]:.0f}} MB to {{shards[most]:.0f}} MB, because only a few tensors are in memory at a time. The result is
# equal to that of the usual merge to the bit.
#
# `merging.merge_to_folder` chooses for you. It merges in the usual way if the model is smaller than the free memory.
# Otherwise, or if memory runs out all the same, it merges by shards.

# %% [markdown]
# ### Exercise: merge one shard (stretch, 15 min)
#
# Write the core of such a merge. `tensors` is one shard, {name: tensor}, in any dtype. `adapter` holds the tensors of the whole
# adapter in float32. For example, those for `model.layers.0.mlp.up_proj.weight` are called
# `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` and `….lora_B.weight`. Return the merged shard with the same
# names and the same dtypes, and nothing else. Compute in float32 and round once.
#
# <details><summary>A tensor is missing</summary>
# Norms and embeddings have no <em>A</em> and <em>B</em>. Copy them unchanged.
# </details>
# <details><summary>A tensor or layer is of another shard</summary>
# Go through the names of the shard, not through those of the adapter.
# </details>
# <details><summary>The check says that the folder would change its size</summary>
# Call <code>.to(tensor.dtype)</code> on each sum.
# </details>


# %% exercise="07.shard" points=4
def merge_shard(tensors, adapter, scaling):
    """Return {name: tensor} of the merged shard, in the dtypes of `tensors`."""
    ### BEGIN SOLUTION
    merged = {}
    for name, tensor in tensors.items():
        layer = "base_model.model." + name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in adapter:
            change = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            tensor = (tensor.float() + scaling * change).to(tensor.dtype)
        merged[name] = tensor
    return merged
    ### END SOLUTION


lesson07.shard(merge_shard)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.shard.outcome(merge_shard).passed
_tensors, _adapter, _scaling, _merged = lesson07.shard_example(torch.float16, seed=41)
_found = merge_shard(_tensors, _adapter, _scaling)
assert set(_found) == set(_merged)
assert all(torch.equal(_found[name], _merged[name]) for name in _merged)
### END HIDDEN TESTS

# %% [markdown]
# ## Recap
#
# You know that the merged model is the one you trained if you have compared the two. First show that the adapter changes
# the base, because otherwise agreement proves nothing. Then compare logits, which must agree up to rounding, and weights,
# which must hold the change exactly once and be the base's everywhere else. `check_merged_folder` does both on the folder
# that you ship, and also says what is wrong. A merged model is as fast as its base, but you can't switch its adapter off or
# get the exact base back from it, so keep the base and the adapter as well.

# %% tags=["measured"]
plotting.table(
    ["", "measured"],
    [
        ["the adapter's effect on a logit, at most", f"{largest(adapter_logits, base_logits):.0f}"],
        ["merged against adapter, float32", f"{largest(logits(merged), adapter_logits):.0e}"],
        ["the base's logits after merging and unmerging, against before", states[3][2]],
        ["time of a forward pass: with the adapter", f"{slower['with adapter']:+.0%}"],
        ["time of a forward pass: merged", f"{slower['merged']:+.0%}"],
        [
            "folders that claim to be merged, and are",
            f"{sum(row[1] == 'nothing' for row in findings)} of {len(findings)}",
        ],
    ],
)
progress("07")

# %% [markdown]
# ## Take it to work
#
# Put the folders, or hub ids, of your base, adapter and merged model between the quotes. The check needs 4 bytes a
# parameter, or 2 if you pass `dtype="bfloat16"`.

# %%
my_base, my_adapter, my_merged = "", "", ""
print(
    validation.check_merged_folder(
        my_base or base_folder, my_adapter or adapter_folder, my_merged or merged_folder
    )
)

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · Adapter and merged model give the same logits to the bit. Is that good?</summary>
# Probably not. The two models add in another order, so a real change leaves small differences. Look whether <em>B</em> is zero, and
# whether you compared a model with itself.
# </details>
# <details><summary>2 · The merged folder is twice as large as the base's. What happened?</summary>
# The base is stored in 16 bits and was loaded in 32. Load it in its own dtype (<code>dtype="auto"</code>), or cast it
# before you save.
# </details>
# <details><summary>3 · A colleague's merged model overdoes what it was trained for. Which three causes do you check?</summary>
# The adapter's files may lie in the same folder, so that the adapter is loaded on top. It may have been merged twice. Or the
# scaling is wrong, for example α instead of α/r. The number of times that the change is in the weights tells them apart:
# 1, 2, or <em>r</em>.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [How exact is exact enough?](deep_rounding.ipynb), a deep dive: what 16 bits cost, and how far unmerging drifts
# - [LoRA](https://arxiv.org/abs/2106.09685), Hu et al. 2021: section 4.1 on latency once merged
# - [PEFT's guide to LoRA](https://huggingface.co/docs/peft/main/en/developer_guides/lora), on merging adapters into the
#   base
# - [Accelerate: big model inference](https://huggingface.co/docs/accelerate/usage_guides/big_modeling), on device maps
# - [Symptom, cause, check](../docs/symptoms.md#merge-and-combine), and [Decide](../docs/decide.md)
#
# Next: [lesson 8](08_combining.ipynb) makes several adapters into one.
