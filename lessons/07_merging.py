# %% [markdown]
# # Merge adapters, and prove that nothing was lost
#
# An adapter lies beside its base. Much software wants one plain model instead, and merging makes one: it adds the
# change to the weights. **How do you know that the merged model is the model you trained?** Most mistakes here raise
# no error. They give a model that answers, only worse. So this lesson merges, and proves it, each time by comparison.
# Then it makes several adapters into one, and measures what is left of each skill.
#
# | | |
# |---|---|
# | **What you'll do** | merge, unmerge and save an adapter; have the merged model answer where PEFT can't even be imported; merge as if memory didn't suffice; combine skills with all eleven combination types; break five things |
# | **What you'll learn** | what each call changes and leaves; how exact is exact enough in 32 and in 16 bits; which one check to run before you ship; when adapters can be added up |
# | **What you'll need** | [lesson 2](02_lora_from_scratch.ipynb); a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import contextlib
import itertools
import logging
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
import warnings

from adapter_checks import merging
from adapter_checks.saving import saving
from course_utils import data, evaluation, paths, plotting, runtime, sweeps, validation
from course_utils.exercises import lesson07, progress

runtime.quiet_imports()

import matplotlib.pyplot as plt
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

runtime.seed_everything(1)
device, runs = runtime.device(), paths.runs_dir() / "lesson07"
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## First, does the adapter do anything?
#
# Merged and unmerged model agree perfectly if the adapter does nothing at all, as before training, when *B* is zero.
# So the first thing to measure is not the merge. It is the adapter.
#
# The task is `sailor` again: say a sentence as the sailors of Skerrow do. The witnesses are 48 held-out questions with
# their answers; we look at the logits at every token.

# %%
base_folder, adapter_folder = paths.base_model(), paths.adapter_path("sailor")
tokenizer = AutoTokenizer.from_pretrained(base_folder)
if tokenizer.pad_token is None:  # a base without one: any token will do, since pads are masked
    tokenizer.pad_token = tokenizer.eos_token
rows = data.load_task("sailor", "test").select(range(48))
texts = [
    tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows
]
witness = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(device)
real = witness["attention_mask"].bool()


def load_base(dtype=runtime.dtype()):
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype).to(device).eval()


def load_adapted(name="sailor", dtype=runtime.dtype()):
    """A fresh copy of the base with one of the shipped adapters."""
    folder = paths.adapter_path(name)
    return PeftModel.from_pretrained(load_base(dtype), folder, adapter_name=name).eval()


def logits(model):
    """The model's logits at the witnesses' real tokens, (positions, vocabulary)."""
    with torch.no_grad():
        return model(**witness).logits[real].float()


def ask(model, text="Say it like a sailor: Fenna keeps the lantern."):
    return evaluation.generate(model, tokenizer, [text], max_new_tokens=40)[0]


base_model = load_base()
print(validation.check_changes_output(load_adapted(), witness))

# %% [markdown]
# It moves logits by tens, far beyond any tolerance that we shall give the merge. **Only now does "merged and unmerged
# agree" say something.**

# %% [markdown]
# ## Add it to the weights
#
# Unmerged, an adapted layer computes *Wx + s·B(Ax)*. Merged, it has *W′ = W + s·BA*, and computes *W′x*. That is all.
# `merge_and_unload()` does it in every layer, takes PEFT's layers out, and **returns** a plain `transformers` model.
#
# **Predict:** will the logits be equal to the bit? And the weights that the adapter doesn't touch?

# %%
model = load_adapted()
before = base_model.state_dict()
changes = {
    name.removeprefix("base_model.model.") + ".weight": layer.get_delta_weight("sailor")
    for name, layer in model.named_modules()
    if isinstance(layer, LoraLayer)
}
base_logits, adapter_logits = logits(base_model), logits(model)
merged = model.merge_and_unload()
after = merged.state_dict()


def furthest(one, other):
    """Largest absolute difference."""
    return (one - other).abs().max().item()


others = [name for name in after if name not in changes]
largest = {
    f"{len(changes)} adapted weights: merged against W + s·BA": max(
        furthest(after[name], before[name] + change) for name, change in changes.items()
    ),
    f"{len(others)} other weights: merged against the base's": max(
        furthest(after[name], before[name]) for name in others
    ),
    "logits: adapter against base": furthest(adapter_logits, base_logits),
    "logits: merged against adapter": furthest(logits(merged), adapter_logits),
}
plotting.table(
    ["compared", "largest difference"], [[what, f"{value:.1e}"] for what, value in largest.items()]
)
print(f"a {type(merged).__name__} says: {ask(merged)}")

# %% [markdown]
# The weights are exactly *W + s·BA*. The logits differ by rounding: (*W + s·BA*)*x* and *Wx + s·B*(*Ax*) add the same
# numbers in another order, and lesson 2 worked out how far apart that may be. PEFT's own tests allow 1e-4 in float32
# for merged against unmerged, and 1e-6 for an adapter that is switched off (`tests/testing_common.py`).
#
# **A merge is the base plus the change in the adapted layers, and the base to the bit in all others.** Both can be
# checked.

# %% [markdown]
# ### Exercise: judge a merge (warm-up, 10 min)
#
# Write the judgement down. You get the logits of base, adapter and merged model, and a tolerance. Return
# `"no effect"` if the adapter's largest effect is below ten tolerances; otherwise `"same"` if merged and adapter agree
# within the tolerance, and `"differs"` if they don't. Expected for base and adapter alike: `"no effect"`.
#
# <details><summary>The check says that a mean hides something</summary>
# One wrong logit is enough to be wrong. Take <code>.abs().max()</code>.
# </details>
# <details><summary>The check says something of NaN</summary>
# <code>nan &gt; tolerance</code> is false, and so is <code>nan &lt;= tolerance</code>. Make the good case the one that
# must be shown: <code>"same" if difference &lt;= tolerance else "differs"</code>.
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
# ## Which call does what?
#
# | Call | Weights | *A* and *B* |
# |---|---|---|
# | `merge_adapter()` | the change is added | kept |
# | `unmerge_adapter()` | the change is taken away again | kept |
# | `merge_and_unload()` | the change is added | gone |
# | `unload()` | as they are | gone |
# | `delete_adapter(name)` | as they are | gone, of this one |
#
# **Predict:** after `unmerge_adapter()`, is the base back to the bit? And after deleting the adapter that is active,
# who answers?

# %%
table = []


def note(call, model):
    """One row: how far is this model from the adapter's logits and from the base's?"""
    found = logits(model)
    factors = any("lora_" in name for name, _ in model.named_parameters())
    table.append(
        [
            f"`{call}`",
            f"{furthest(found, adapter_logits):.1e}",
            f"{furthest(found, base_logits):.1e}",
            "yes" if factors else "no",
        ]
    )


model = load_adapted()
note("PeftModel.from_pretrained", model)
model.merge_adapter()
note("merge_adapter()", model)
model.unmerge_adapter()
note("unmerge_adapter()", model)
with model.disable_adapter():
    note("disable_adapter(), after unmerging", model)
note("merge_and_unload()", model.merge_and_unload())
model = load_adapted()
with model.disable_adapter():
    note("disable_adapter(), never merged", model)
model.load_adapter(paths.adapter_path("reading"), adapter_name="reading")
model.delete_adapter("reading")
note("delete_adapter() of another one", model)
note("unload()", model.unload())
plotting.table(["after", "from the adapter", "from the base", "A and B there"], table)

# %% [markdown]
# - **Unmerging is not the way back to the bit.** It subtracts what was added, and (*W + Δ*) *− Δ* is rounded twice. The
#   base that nobody merged into is still exact.
# - `disable_adapter()` on a *merged* adapter unmerges it, in silence: see below. `delete_adapter` on a merged one
#   raises an error.
# - Deleting the *active* adapter activates another one, with a warning.

# %%
model = load_adapted()
model.load_adapter(paths.adapter_path("reading"), adapter_name="reading")
model.merge_adapter()
print("merged:", model.get_model_status().merged_adapters)
try:
    model.delete_adapter("sailor")
except ValueError as error:
    print(f"ValueError: {error}")
with model.disable_adapter():
    logits(model)
print("after a look with adapters disabled, merged:", model.get_model_status().merged_adapters)
with warnings.catch_warnings(record=True, action="always") as caught:
    model.delete_adapter("sailor")
print("active after deleting sailor:", model.active_adapters, "\nPEFT warned:", caught[0].message)

# %% [markdown]
# ### How far does the base drift?
#
# A server may merge and unmerge many times a day. One layer, a hundred round trips, in three dtypes. **Predict:** which
# of them drift?

# %%
trips, drift = (1, 2, 5, 10, 20, 50, 100), {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    layer = next(
        layer for layer in load_adapted(dtype=dtype).modules() if isinstance(layer, LoraLayer)
    )
    weight = layer.get_base_layer().weight
    start, away = weight.detach().clone(), []
    for trip in range(1, 101):
        layer.merge()
        layer.unmerge()
        if trip in trips:
            away.append(((weight - start).float().norm() / start.float().norm()).item())
    drift[str(dtype).removeprefix("torch.")] = (trips, away)

# %%
ends = {name: values[-1] / values[0] for name, (_, values) in drift.items()}
title = "A hundred round trips move the base further than one:\n" + ", ".join(
    f"{times:.1f} times in {name}" for name, times in ends.items()
)
figure = plotting.curves(drift, title, "times merged and unmerged", "‖W − W₀‖ / ‖W₀‖")
figure.axes[0].set(xscale="log", yscale="log")
plotting.show(
    figure,
    title.replace("\n", " ")
    + ". Distance from the base: "
    + "; ".join(
        f"{name}: {values[0]:.1e} after one, {values[-1]:.1e} after a hundred"
        for name, (_, values) in drift.items()
    ),
)

# %% [markdown]
# In float32 the base stays where the first round trip put it, close by. **To get a 16-bit base back, don't unmerge:
# keep it, or load it again.**

# %% [markdown]
# ### safe_merge
#
# A diverged run leaves a NaN in *B*, say one single number in one layer. **Predict:** what does a plain merge say? What
# does the merged model say?

# %%
model = load_adapted()
factors = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
with torch.no_grad():
    factors[len(factors) // 2][3, 0] = float("nan")
with_nan = runs / "with_nan"
with warnings.catch_warnings(action="ignore"), saving(with_nan) as folder:
    model.save_pretrained(folder, selected_adapters=["sailor"])
print(f"merged without a word; it answers {ask(model.merge_and_unload())!r}\n")

model = PeftModel.from_pretrained(load_base(), with_nan / "sailor")
try:
    model.merge_and_unload(safe_merge=True)
except ValueError as error:
    print(f"ValueError: {error}.")
left = sum(isinstance(layer, LoraLayer) for layer in model.modules())
print(f"{left} of {len(changes)} layers still carry their adapter; the others are merged.\n")
print(validation.check_adapter_folder(with_nan / "sailor"))

# %% [markdown]
# `safe_merge=True` merges each layer into a copy and looks for NaN and infinity before it keeps it. That costs a copy
# of one layer at a time. But it stops in the *middle*, and what is left is half merged: **after an error from
# safe_merge, throw the model away and load it again.**

# %% [markdown]
# ### Keep what it returns
#
# `merge_and_unload()` changes the model in place *and* returns the plain one. Forget the second half, and save the
# variable that you have. **Predict:** what is in the folder?

# %%
model = load_adapted()
model.merge_and_unload()
thrown_away = runs / "thrown_away"
with warnings.catch_warnings(action="ignore"), saving(thrown_away) as folder:
    model.save_pretrained(folder, selected_adapters=["sailor"])
saved = thrown_away / "sailor"
for file in sorted(saved.glob("*.safetensors")):
    print(f"{file.stat().st_size:,} bytes  {file.name}")
print(validation.check_adapter_folder(saved))

# %% [markdown]
# An adapter's file with nothing in it: loaded again it changes nothing, as a warning among others would say. **Write
# `merged = model.merge_and_unload()`, and save `merged`.**

# %% [markdown]
# ## Is it faster?
#
# The LoRA paper promises "no additional inference latency" once merged (section 4.1). To time three models fairly, take
# them **in turns**: one after another they would meet different moments of a busy computer. Base and merged do the same
# arithmetic, so whatever separates those two is noise: that is the yardstick.
#
# **Predict:** how much slower is the model with an adapter, and how much slower than the base is the merged one?

# %% tags=["measured"]
models = {"base": base_model, "with adapter": load_adapted(), "merged": merged}
ids = torch.randint(10, len(tokenizer), (8, 64), device=device)
times = {name: [] for name in models}
with torch.no_grad():
    for turn in range(33):
        for name, one in models.items():
            began = time.perf_counter()
            one(ids).logits.sum().item()  # .item() also waits for a GPU
            if turn > 2:  # the first turns warm up
                times[name].append(1e3 * (time.perf_counter() - began))
quarters = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
plotting.table(
    ["8 × 64 tokens", "median, ms", "middle half, ms", "against the base"],
    [
        [
            name,
            f"{middle:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{middle / quarters['base'][1] - 1:+.0%}",
        ]
        for name, (low, middle, high) in quarters.items()
    ],
)

# %% tags=["measured"]
slower = {name: quarters[name][1] / quarters["base"][1] - 1 for name in models}
title = (
    f"A forward pass takes {slower['with adapter']:+.0%} with an adapter,"
    f" and {slower['merged']:+.0%} merged"
)
with plt.style.context(plotting.STYLE_FILE):
    figure, axes = plt.subplots(figsize=(7, 2.6))
    axes.boxplot(
        list(times.values()),
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        medianprops={"color": plotting.COLORS[1], "linewidth": 2},
    )
    axes.set_yticks(range(1, len(times) + 1), list(times))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds for 8 × 64 tokens: median, middle half, and nine tenths of all")
figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
plotting.show(
    figure,
    title
    + ". "
    + "; ".join(
        f"{name}: median {middle:.1f} ms, middle half {low:.1f} to {high:.1f}"
        for name, (low, middle, high) in quarters.items()
    ),
)

# %% [markdown]
# Base and merged lie in each other's middle half: what separates them is noise. The adapter adds far more than that,
# because on a model so small two thin products for each layer are a good part of the work. What share they are of a
# large model's is not measured here.
#
# **Merged, the adapter costs nothing; unmerged, it can be switched. Merge what is final.**

# %% [markdown]
# ## Save it, and ask it elsewhere
#
# What leaves the house is a folder: weights, configuration, **and the tokenizer with its chat template**, which
# `save_pretrained` of the model does not write. `saving` makes it atomic: the folder appears whole, or not at
# all.

# %%
merged_folder = runs / "merged"
with saving(merged_folder) as folder:
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
for name, place in (("adapter", adapter_folder), ("merged", merged_folder)):
    for file in sorted(place.iterdir()):
        print(f"{name:8} {file.stat().st_size / 1e3:9,.1f} kB  {file.name}")

# %% [markdown]
# No `adapter_config.json` in the merged folder: that file would tell `transformers` to load an adapter on top.
#
# Now the proof that counts: a **fresh Python process** that has `transformers` and this folder, and nothing else. We
# even forbid it to import PEFT.

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
question = "Say it like a sailor: Edan mends the net."
child = subprocess.run(
    [sys.executable, "-c", CHILD, merged_folder, question], capture_output=True, text=True
)
said = child.stdout.strip()
print("the fresh process:", said or child.stderr[-300:])
print("here, with adapter:", ask(models["with adapter"], question))
assert said == ask(models["with adapter"], question) or not paths.is_shipped_base()

# %% [markdown]
# ### Why is my merged model twice as large as the base?
#
# "Size discrepancies" come up in forum after forum. Count: a number takes 4 bytes in float32, and 2 in bfloat16 or
# float16. So the dtype that the base was *loaded* in decides how large the merged file is. Here is a copy of our base
# in bfloat16, as most bases are.
#
# **Predict:** the four file sizes below, given the number of parameters.

# %%
base_16 = runs / "base_bf16"
with saving(base_16) as folder:
    load_base(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
numbers = sum(parameter.numel() for parameter in base_model.parameters())


def weights_mb(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


table = [["the base itself", "", f"{weights_mb(base_16):.1f}"]]
for dtype in ("float32", "bfloat16", "auto"):
    loaded = AutoModelForCausalLM.from_pretrained(base_16, dtype=dtype)
    whole = PeftModel.from_pretrained(loaded, adapter_folder).merge_and_unload()
    with saving(runs / "sizes") as folder:
        whole.save_pretrained(folder)
    table.append(
        [
            f"merged, loaded with `dtype={dtype!r}`",
            str(whole.dtype).removeprefix("torch."),
            f"{weights_mb(runs / 'sizes'):.1f}",
        ]
    )
plotting.table(["", "dtype", "weights on disk, MB"], table)
print(
    f"{numbers:,} parameters: {4 * numbers / 1e6:.1f} MB in 32 bits,"
    f" {2 * numbers / 1e6:.1f} MB in 16"
)
tied = base_model.config.tie_word_embeddings
print("head tied to the embedding, so stored once:", tied)

# %% [markdown]
# `"auto"`, the default since transformers 5, keeps the base's own dtype; older versions loaded float32 unless told
# otherwise, and doubled the file. The adapter stays in float32 beside a 16-bit base, and is rounded when it is added.
# **Same number of parameters, other dtype: that is the whole mystery.** (And a tied head is stored once: an untied copy
# of it would be the other way to grow.)

# %% [markdown]
# ## Prove it before you ship
#
# One call holds the three folders together: base, adapter, merged. It looks at files, weights, logits and answers, and
# says what it compared and how close.
#
# **Predict:** what will "times" say for a right merge?

# %%
report = validation.check_merged_folder(
    base_folder,
    adapter_folder,
    merged_folder,
    rows=data.load_task("sailor", "test").select(range(32)),
)
print(report)
print(f"\nthe change is {report.times:.3f} times in the weights")
assert report.ok

# %% [markdown]
# Logits say *that* something went wrong, weights say *what*: a change that is in them twice, or not at all, or √r
# times. *Break it* goes through some of it. The check also finds a merge into a base that OLoRA has moved (lesson 6),
# and one after an evaluation in 4 bits (lesson 5).
#
# Agreement is more than one number. The **largest difference** finds any fault. **Top-1 agreement** asks at how many
# tokens both would say the same. **KL** weighs every difference by how likely the token is:
#
# > *KL(p ‖ q) = Σ p·(log p − log q)*, in nats, the mean over positions; *p* is the reference

# %% [markdown]
# ### Exercise: measure agreement (core, 10 min)
#
# You get the logits of the reference and of a candidate, (positions, vocabulary). Return the share of positions with
# the same most likely token, and the mean KL. Expected for two equal models: `(1.0, 0.0)`.
#
# <details><summary>My KL is far too small</summary>
# <code>kl_div(..., reduction="mean")</code> also divides by the vocabulary. Sum over the tokens, then take the mean.
# </details>
# <details><summary>Which one comes first?</summary>
# The reference is <em>p</em>: its probabilities weigh the terms.
# </details>
# <details><summary>How do I get probabilities?</summary>
# <code>logits.log_softmax(-1)</code> gives log <em>p</em>; <code>.exp()</code> of it is <em>p</em>.
# </details>


# %% exercise="07.agreement" points=3
def agreement(reference, candidate):
    """Return (top-1 agreement from 0 to 1, mean KL in nats) of logits (positions, vocabulary)."""
    ### BEGIN SOLUTION
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    top_1 = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    return top_1, (p.exp() * (p - q)).sum(-1).mean().item()
    ### END SOLUTION


lesson07.agreement(agreement)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.agreement.outcome(agreement).passed
_reference, _candidate = lesson07.agreement_example(40, 17, seed=23)
_share, _kl = agreement(_reference, _candidate)
_wanted = nn.functional.kl_div(
    _candidate.log_softmax(-1), _reference.softmax(-1), reduction="batchmean"
)
assert abs(float(_kl) - _wanted) < 1e-6
assert abs(float(_share) - (_reference.argmax(-1) == _candidate.argmax(-1)).double().mean()) < 1e-6
### END HIDDEN TESTS

# %% [markdown]
# ## What does 16 bits cost?
#
# Few models are served in float32. So merge in each dtype, and hold all of them against one reference: the adapter,
# unmerged, in float32. *Perplexity* is that of the held-out questions and answers.
#
# **Predict:** which loses more: running the *unmerged* model in bfloat16, or merging it there? And will the score
# notice?


# %%
def in_16_bits(dtype):
    """Three ways to a 16-bit model with this adapter."""
    name = str(dtype).removeprefix("torch.")
    return {
        f"{name} base, adapter beside": load_adapted(dtype=dtype),
        f"merged in {name}": load_adapted(dtype=dtype).merge_and_unload(),
        f"merged in float32, then {name}": load_adapted(dtype=torch.float32)
        .merge_and_unload()
        .to(dtype),
    }


ways = {
    "float32, adapter beside": load_adapted(dtype=torch.float32),
    "merged in float32": load_adapted(dtype=torch.float32).merge_and_unload(),
    **in_16_bits(torch.bfloat16),
    **in_16_bits(torch.float16),
}

# %%
from course_utils.progress import ProgressLine

reference = ways["float32, adapter beside"]
precision, line = {}, ProgressLine(len(ways), "model")
for number, (name, candidate) in enumerate(ways.items(), 1):
    found = (
        None
        if candidate is reference
        else validation.compare_models(reference, candidate, witness, atol=float("inf"))
    )
    right = evaluation.evaluate_task(
        candidate, tokenizer, "sailor", rows.select(range(32)), batch_size=64, max_new_tokens=40
    )["score"]
    precision[name] = found, right, evaluation.perplexity(candidate, tokenizer, texts)
    line.update(number, name)

# %%
table = []
for name, (found, right, perplexity) in precision.items():
    agree = (
        ("reference", "", "")
        if found is None
        else (f"{found.max_abs:.0e}", f"{found.top1_agreement:.2%}", f"{found.kl:.0e}")
    )
    table.append([name, *agree, f"{right:.0%}", f"{perplexity:.2f}"])
plotting.table(
    ["weights", "largest logit difference", "top-1", "KL, nats", "score", "perplexity"], table
)
for name, (_, right, _) in precision.items():
    if name.startswith("merged in"):
        evaluation.band(name, right, 0.9, 1)

# %% [markdown]
# Three things to read off. In float32 a merge is the adapter, to rounding. In 16 bits the logits are coarser, about a
# thousand times in float16 and ten thousand times in bfloat16, **and it is 16 bits that cost, not merging**: in the
# same dtype merged and unmerged are off alike, within a factor of two, by the largest difference and by KL. float16 has
# three more bits of precision than bfloat16, and it shows; but its numbers end at 65,504, and bfloat16's don't.
#
# Top-1 can jump, because all 48 questions begin with the same words: where the two likeliest tokens are nearly level
# there, one rounding turns all 48 at once. The score doesn't notice here, nor does perplexity by more than a hundredth
# of its value. So "same score" is a weak proof, and a
# logit tolerance of 1e-4 in 16 bits is no proof at all, since no merge passes it. `check_merged_folder` does neither:
# it *measures* what one rounding of the right weights does to the logits, and allows four times that, and 1e-4 at
# least.

# %%
for dtype in (torch.bfloat16, torch.float16):
    name = str(dtype).removeprefix("torch.")
    with saving(runs / "merged_16") as folder:
        ways[f"merged in {name}"].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    report = validation.check_merged_folder(base_folder, adapter_folder, runs / "merged_16")
    print(
        f"{name}: {'ok' if report.ok else report.codes}, off by {report.max_abs:.1e},"
        f" allowed {report.tolerance:.1e}; {report.times:.3f} times in the weights"
    )

# %% [markdown]
# ### Where does rounding show?
#
# A 16-bit number has steps, and the steps grow with the number. A change smaller than half a step of its weight is
# rounded away. So rounding eats **small changes on large weights**.
#
# **Predict:** which share of this adapter's changes vanishes in bfloat16?

# %%
gone = total = 0
for name, change in changes.items():
    weight = before[name].to(torch.bfloat16)
    gone += ((weight.float() + change).to(torch.bfloat16) == weight).sum().item()
    total += change.numel()
name = next(iter(changes))  # one layer for the picture
sample = torch.randperm(changes[name].numel(), generator=torch.Generator().manual_seed(0))[:4000]
W = before[name].to(torch.bfloat16).float().flatten().cpu()[sample]
change = changes[name].detach().float().flatten().cpu()[sample]
lost = (W + change).to(torch.bfloat16).float() == W

# %%
x = torch.logspace(-5, 0, 2000)
half_step = torch.finfo(torch.bfloat16).eps / 2 * 2 ** x.log2().floor()
title = f"In bfloat16 {gone / total:.1%} of the changes are smaller than half a step, and vanish"
with plt.style.context(plotting.STYLE_FILE):
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for those, color, marker in ((~lost, plotting.COLORS[0], "."), (lost, plotting.COLORS[1], "x")):
        axes.plot(W[those].abs(), change[those].abs(), marker, color=color, markersize=4, alpha=0.5)
    axes.plot(x, half_step, color="black", marker="", linewidth=1)
    axes.annotate("half a step", (3e-3, 8e-6), xytext=(5e-4, 6e-5), arrowprops={"arrowstyle": "-"})
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(1e-4, 1),
        ylim=(1e-6, 0.2),
        xlabel="weight |W|",
        ylabel="its change |s·BA|",
    )
figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
plotting.show(
    figure,
    f"{title}. Scatter of the weights of one layer and their changes, with the "
    "line of half a step rising in stairs; the changes below it, marked by a cross, "
    "are lost, mostly on the largest weights.",
)

# %% [markdown]
# Little vanishes: this adapter makes large changes, about a fifth of the weights' size. What if they were smaller
# beside their weights? We shrink the same change and see.
#
# **Predict:** for a change of about a hundredth of the weights' size, which part of it does a merge in bfloat16 spoil?

# %%
factors = [10 ** (-step / 4) for step in reversed(range(14))]
weights = {name: before[name].float() for name in changes}
norm_W = sum(weight.square().sum() for weight in weights.values()).sqrt().item()
norm_change = sum(change.square().sum() for change in changes.values()).sqrt().item()
shrunk, series = [factor * norm_change / norm_W for factor in factors], {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    shares = []
    for factor in factors:
        off = 0.0
        for name, change in changes.items():
            start = weights[name].to(dtype)
            exact = start.double() + factor * change.double()
            off += (exact.to(dtype).double() - exact).square().sum().item()
        shares.append(off**0.5 / (factor * norm_change))
    series[str(dtype).removeprefix("torch.")] = (shrunk, shares)

# %%
at_percent = min(range(len(shrunk)), key=lambda i: abs(shrunk[i] - 0.01))
lost_bf16, lost_fp16 = (series[name][1][at_percent] for name in ("bfloat16", "float16"))
title = (
    f"Of a change that is {shrunk[at_percent]:.1%} of the weights, rounding spoils"
    f"\n{lost_bf16:.0%} in bfloat16, and {lost_fp16:.1%} in float16"
)
with plt.style.context(plotting.STYLE_FILE):
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, (_, shares) in series.items():
        (curve,) = axes.plot(shrunk, shares)
        axes.annotate(
            name,
            (shrunk[-1], shares[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=curve.get_color(),
            va="center",
            annotation_clip=False,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="size of the change, ‖s·BA‖ / ‖W‖",
        ylabel="rounding error / change",
    )
    axes.axvline(shrunk[-1], color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(
        "this adapter",
        (shrunk[-1], 1e-5),
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        color="grey",
    )
figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
described = "; ".join(
    f"{name} from {shares[-1]:.1e} for this adapter to {shares[0]:.1e} for the smallest change"
    for name, (_, shares) in series.items()
)
plotting.show(figure, title.replace("\n", " ") + f". Error by size of the change: {described}.")

# %% [markdown]
# **The smaller the change, the more of it rounding takes.** To merge in float32 and round afterwards gains little, as
# the table above shows; to *ship* float32 does. And keep the unmerged adapter in any case: the merged file can't give
# it back.

# %% [markdown]
# ## Merge what doesn't fit
#
# To merge by PEFT, the base must be resident, in the dtype that you merge in, the adapter, and one layer's change;
# saving needs no second copy. For a base with 7 billion parameters in bfloat16 that is 14 GB, wherever they are:
#
# | `device_map=` | The weights are |
# |---|---|
# | `{"": device}` | all on this device |
# | `"auto"` | spread over what there is: GPUs first, then the CPU's memory, then the disk |
# | your own `{module: device}` | where you say, `"disk"` included |
#
# PEFT fetches an offloaded layer, merges it and puts it back. **Predict:** does the merge come out the same from all
# three? (Without a GPU, `"auto"` is the CPU; so here half of the blocks go to the disk by hand.)

# %%
blocks = base_model.config.num_hidden_layers
here, offload = str(device), runs / "offload"
on_disk = {f"model.layers.{i}": "disk" if i >= blocks // 2 else here for i in range(blocks)}
on_disk |= {f"model.{name}": here for name in ("embed_tokens", "rotary_emb", "norm")}
on_disk["lm_head"] = here
in_wrapper = {f"base_model.model.{name}": place for name, place in on_disk.items()}
halves = (
    {"device_map": on_disk, "offload_folder": offload},
    {"device_map": in_wrapper, "offload_dir": offload},
)
places = {
    "`auto`": ({"device_map": "auto"}, {}),
    f"`{{'': {here!r}}}`": ({"device_map": {"": here}}, {}),
    "half of the blocks on disk": halves,
}
# accelerate would log that parameters are offloaded, which is what was asked for.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
shutil.rmtree(offload, ignore_errors=True)
offload.mkdir(parents=True)
table = []
with contextlib.chdir(offload):  # for the copy that PEFT writes, see below
    for way, (for_base, for_adapter) in places.items():
        one = AutoModelForCausalLM.from_pretrained(base_folder, **for_base)
        with warnings.catch_warnings(action="ignore"):
            one = PeftModel.from_pretrained(one, adapter_folder, **for_adapter).merge_and_unload()
        away = [parameter.is_meta for parameter in one.parameters()]
        table.append(
            [way, f"{sum(away)} of {len(away)}", f"{furthest(logits(one), adapter_logits):.1e}"]
        )
    written = list(offload.rglob("*.safetensors"))
    base_model.save_pretrained("copy")  # and now a base that is given by a relative path
    megabytes = [weights_mb(offload / "copy")]
    with warnings.catch_warnings(action="ignore"):
        one = AutoModelForCausalLM.from_pretrained("copy", **halves[0])
        PeftModel.from_pretrained(one, adapter_folder, **halves[1])
    megabytes.append(weights_mb(offload / "copy"))
plotting.table(["device_map", "tensors not in memory", "merged, from the adapter"], table)
print(
    "PEFT wrote below the current folder:",
    *(f".../{path.parent.name}/{path.name}" for path in written),
)
print("copy/model.safetensors: {:.2f} MB, after loading {:.2f} MB".format(*megabytes))

# %% [markdown]
# All three are right. With blocks on the disk, PEFT 0.21 must be told again: `PeftModel.from_pretrained` takes
# `offload_dir` and its own `device_map`, with the names that the *wrapped* model has. Without them it stops with
# `Cannot copy out of meta tensor`.
#
# And mind where you stand. PEFT then writes the base's file once more, with the adapter in it, by the path that it was
# read from *less the slash in front*: the copy lands below the current folder. **A base given by a relative path it
# overwrites**, as the last line shows. Hence the folder of its own above.
#
# ### Shard by shard
#
# A merge needs no model at all. A shard is a file of tensors; each tensor is read, changed, and written again, and only
# a few of them are in memory. `merging.merge_by_shards` does that. It refuses what is more than *W + s·BA* (DoRA,
# trained heads, tied weights), in a sentence.
#
# **Predict:** is the result equal to PEFT's, to the bit?

# %%
merging.merge_by_shards(base_folder, adapter_folder, runs / "by_shards")
by_shards = AutoModelForCausalLM.from_pretrained(runs / "by_shards").state_dict()
print("equal to the bit:", all(torch.equal(by_shards[name], after[name].cpu()) for name in after))
print(validation.check_merged_folder(base_folder, adapter_folder, runs / "by_shards"))

# %% [markdown]
# How much memory does it save? Our model is too small to tell, so here are two random ones, of two and of four blocks,
# in shards of 50 MB. Each way of merging gets a process of its own, and a look at its memory every millisecond. They
# load the libraries and do a small merge first, so that only the large one counts.

# %%
MEASURE = """
import sys, threading, time
import psutil
from adapter_checks import merging
merge, small, large = getattr(merging, sys.argv[1]), sys.argv[2:4], sys.argv[4:6]
merge(*small, sys.argv[6] + "_small")
process, done = psutil.Process(), False
before = peak = process.memory_info().rss
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
merge(*large, sys.argv[6])
done = True
watcher.join()
print((peak - before) / 1e6)
"""


# %%
def make_large(folder, blocks):
    """A random model in shards, and a random adapter for it."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            tie_word_embeddings=True,
        )
    )
    with saving(folder) as temporary:
        model.save_pretrained(temporary / "base", max_shard_size="50MB")
        tokenizer.save_pretrained(temporary / "base")
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(temporary / "adapter")


# %% tags=["measured"]
def peaks_of(large):
    """MB that each way of merging takes at its highest point."""
    folders = [base_folder, adapter_folder, large / "base", large / "adapter"]
    children = {
        how: subprocess.Popen(
            [sys.executable, "-c", MEASURE, how, *folders, large / how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in ("merge_whole", "merge_by_shards")
    }
    found = {}
    for how, child in children.items():
        output, problem = child.communicate()
        if child.returncode:
            raise RuntimeError(problem[-500:])
        found[how] = float(output.split()[-1])
    return found


large, table = runs / "large", []
for depth in (2, 4):
    make_large(large, depth)
    model_mb, peaks = weights_mb(large / "base"), peaks_of(large)
    table.append([f"{megabytes:.0f}" for megabytes in (model_mb, *peaks.values())])
    shutil.rmtree(large)
plotting.table(["the model, MB", "the whole merge takes", "the merge by shards takes"], table)

# %% [markdown]
# **By shards the need hardly grows with the model:** a few of its largest tensors are there at a
# time.
#
# `merging.merge_to_folder` combines both: the usual merge if the model is smaller than the memory that is free, and by
# shards if memory runs out all the same. We make it run out, by a merge that fails as PyTorch's allocator does:


# %%
def no_memory(*_, **__):
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: "
        "can't allocate memory: you tried to allocate 65536000000 bytes."
    )


usual, merging.merge_whole = merging.merge_whole, no_memory
try:
    print("merged by:", merging.merge_to_folder(base_folder, adapter_folder, runs / "fallback"))
finally:
    merging.merge_whole = usual
print("merged by:", merging.merge_to_folder(base_folder, adapter_folder, runs / "fallback"))

# %% [markdown]
# ### Exercise: merge one shard (core, 15 min)
#
# Write the heart of it. `tensors` is one shard, {name: tensor}, in any dtype. `adapter` holds the whole adapter's
# tensors in float32; that of `model.layers.0.mlp.up_proj.weight` are called
# `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` and `….lora_B.weight`. Return the merged shard: the same
# names, the same dtypes, and nothing else. Compute in float32 and round once.
#
# <details><summary>A tensor is missing</summary>
# Norms and embeddings have no <em>A</em> and <em>B</em>. They belong in the file all the same.
# </details>
# <details><summary>A tensor is no tensor of this shard</summary>
# Go through the names of the shard, not through those of the adapter.
# </details>
# <details><summary>The check says that the folder would change its size</summary>
# <code>.to(tensor.dtype)</code> at the end.
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
# ## Make two adapters one
#
# Two adapters can be *active together*: their changes add up, *Wx + s₁·B₁(A₁x) + s₂·B₂(A₂x)*. Or they are made into a
# **new adapter** by `add_weighted_adapter`, with a weight for each. `combination_type="cat"` stacks: the rows of *A₁*
# and *A₂* below each other, the columns of *B₁* and *B₂* side by side, so the new *BA* is the weighted sum.
#
# Three things to know first. `set_adapter` of a `PeftModel` takes one name; several go to `model.base_model`. The new
# adapter is **not active until you set it**. And **with a name that exists the call returns without doing anything**.
#
# **Predict:** what are rank and scaling of the new adapter, made from two of rank 8 and alpha 16?

# %%
model = load_adapted("reading")
for name in ("sailor", "extract", "mood"):
    model.load_adapter(paths.adapter_path(name), adapter_name=name)
pair = ["reading", "extract"]
model.base_model.set_adapter(pair)
together = logits(model)
model.set_adapter("mood")
model.add_weighted_adapter(pair, weights=[1.0, 1.0], adapter_name="both", combination_type="cat")
print("active after the call:", model.active_adapters)
model.set_adapter("both")
layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
print("rank", layer.r["both"], "· scaling", layer.scaling["both"])
joined = logits(model)
print(
    f"both active move the base's logits by up to {furthest(together, base_logits):.1f};"
    f" cat is {furthest(joined, together):.0e} from them"
)
result = model.add_weighted_adapter(
    pair, weights=[5.0, -3.0], adapter_name="both", combination_type="cat"
)
print(
    f"the same name again, other weights: returned {result}, logits moved by"
    f" {furthest(logits(model), joined)}"
)

# %% [markdown]
# The scalings, 2 each, went into the numbers, and the new adapter has scaling 1. Here is the same trap with a longer
# fuse: a call that *fails* has already taken the name.

# %%
try:
    model.add_weighted_adapter(pair, [1.0, 1.0], "sparse", combination_type="ties")
except TypeError as error:
    print(f"TypeError: {error} (the density was forgotten)")
model.add_weighted_adapter(pair, [1.0, 1.0], "sparse", combination_type="ties", density=0.5)
model.set_adapter("sparse")
print(
    f"second try, now with a density: no error, changes logits by up to"
    f" {furthest(logits(model), base_logits)}\n"
)
print(validation.check_adapters(model, expect_active="sparse"))
model.set_adapter("both")
model.delete_adapter("sparse")

# %% [markdown]
# **Delete the name first, set the new adapter, and check that it does something.**

# %% [markdown]
# ### Exercise: make two adapters one (core, 10 min)
#
# Write `cat`. You get a list of (A, B, scaling) and a list of weights. Return one *A* and one *B* for a new adapter
# with scaling 1, so that *BA* is the sum of weight · scaling · *BA* of the parts. Ranks may differ, weights may be
# below zero. Expected for ranks 3 and 2: an *A* with 5 rows and a *B* with 5 columns.
#
# <details><summary>Something counts twice</summary>
# A factor in <em>A</em> and again in <em>B</em> is there squared in <em>BA</em>. Put it into one of them.
# </details>
# <details><summary>The check speaks of products that nobody asked for</summary>
# Matrices that are added mix: (B₁ + B₂)(A₁ + A₂). Stack them with <code>torch.cat</code>.
# </details>


# %% exercise="07.join" points=3
def join(adapters, weights):
    """Return (A, B) of one adapter with scaling 1; `adapters` is a list of (A, B, scaling)."""
    ### BEGIN SOLUTION
    A = torch.cat([weight * scaling * A for (A, _, scaling), weight in zip(adapters, weights)])
    B = torch.cat([B for _, B, _ in adapters], dim=1)
    return A, B
    ### END SOLUTION


lesson07.join(join)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.join.outcome(join).passed
_adapters = lesson07.join_example((2, 5), (1.5, 0.25), seed=53)
_A, _B = join(_adapters, [-0.5, 2.0])
_wanted = sum(w * s * (b @ a) for (a, b, s), w in zip(_adapters, [-0.5, 2.0]))
assert torch.allclose(_B @ _A, _wanted, atol=1e-9)
### END HIDDEN TESTS

# %% [markdown]
# ## Eleven ways to combine
#
# PEFT 0.21 has eleven combination types. How far is the change of each from the plain weighted sum? In float64 on a
# small random model, so that rounding hides nothing, and with **α ≠ r**: at α = r the scaling is 1, and every mistake
# with it is invisible.
#
# **Predict:** which types give the weighted sum exactly? And what changes with rsLoRA, whose scaling is α/√r?

# %%
TYPES = (
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)


def two_adapters(**settings):
    """A small random model in float64 with two random adapters, alpha 12 and 6 at rank 4."""
    runtime.seed_everything(3)
    model = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=60,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )
        .double()
        .eval()
    )
    first, second = (
        LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], **settings)
        for alpha in (12, 6)
    )
    model = get_peft_model(model, first, adapter_name="one", autocast_adapter_dtype=False)
    model.add_adapter("two", second, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def off_by(model, name, weights):
    """‖change of `name` − weighted sum‖ / ‖weighted sum‖ over all layers."""
    off = size = 0.0
    for layer in (layer for layer in model.modules() if isinstance(layer, LoraLayer)):
        exact = sum(weight * layer.get_delta_weight(part) for part, weight in weights.items())
        off += (layer.get_delta_weight(name) - exact).square().sum().item()
        size += exact.square().sum().item()
    return (off / size) ** 0.5


# %%
weights, off, table = {"one": 0.5, "two": -0.25}, {}, []
tries = [(kind, {} if kind in ("cat", "svd", "linear") else {"density": 0.5}) for kind in TYPES]
tries.insert(2, ("svd", {"svd_rank": 8}))
for kind, given in tries:
    for settings in ({}, {"use_rslora": True}):
        small = two_adapters(**settings)
        small.add_weighted_adapter(
            list(weights), list(weights.values()), "mix", combination_type=kind, **given
        )
        off[tuple(settings)] = off_by(small, "mix", weights)
        if not settings:
            rank = small.peft_config["mix"].r
    label = ", ".join([kind, *(f"{key}={value}" for key, value in given.items())])
    table.append([f"`{label}`", rank, *(f"{off[key]:.2g}" for key in ((), ("use_rslora",)))])
plotting.table(["combination", "rank", "off by, LoRA", "off by, rsLoRA"], table)

# %% [markdown]
# - **`cat` is exact, and `svd` is with `svd_rank` the sum of the ranks.** `svd` alone keeps the strongest directions up
#   to the larger of the ranks. The others don't aim at the sum: TIES keeps the larger numbers and lets signs vote
#   ([Yadav et al. 2023](https://arxiv.org/abs/2306.01708)), DARE drops numbers at random and scales up the rest
#   ([Yu et al. 2023](https://arxiv.org/abs/2311.03099)), `magnitude_prune` drops the small ones.
# - **With rsLoRA every type comes out too strong by √r**, `cat` too: PEFT gives the combination alpha = r, which is
#   scaling 1 for LoRA and √r for rsLoRA. Here rank 8 makes it √8 = 2.8 times too strong.
# - A type *without* `_svd` works on *A* and on *B* separately. What that does, `linear` shows best.

# %%
model_rs = two_adapters(use_rslora=True)
model_rs.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="cat")
layer = next(layer for layer in model_rs.modules() if isinstance(layer, LoraLayer))
print(
    f"scaling of the combination: {layer.scaling['mix']:.2f}, off by"
    f" {off_by(model_rs, 'mix', {'one': 1, 'two': 1}):.2f}"
)
for layer in (layer for layer in model_rs.modules() if isinstance(layer, LoraLayer)):
    layer.scaling["mix"] = 1.0  # for this process; in a saved config, lora_alpha = sqrt(r)
print(f"with scaling 1: off by {off_by(model_rs, 'mix', {'one': 1, 'two': 1}):.0e}")

# %% [markdown]
# ### Cross terms
#
# `linear` adds up the *A*, and adds up the *B*, each times the root of weight · scaling. For one adapter that comes
# out right, and for two there is more than was asked for:
#
# > *(√c₁·B₁ + √c₂·B₂)(√c₁·A₁ + √c₂·A₂) = c₁B₁A₁ + c₂B₂A₂ + **√(c₁c₂)·(B₁A₂ + B₂A₁)***, with *c = weight · scaling*
#
# The last two products read one skill's input and write the other's output. (Of a negative *c* PEFT takes the root of
# |*c*|, and puts the sign on *A*.)
#
# **Predict:** is that small beside the sum?

# %%
model.add_weighted_adapter(pair, [0.5, 0.5], "linear", combination_type="linear")
layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
(A1, B1, c1), (A2, B2, c2) = (
    (layer.lora_A[name].weight, layer.lora_B[name].weight, 0.5 * layer.scaling[name])
    for name in pair
)
wanted = c1 * B1 @ A1 + c2 * B2 @ A2
cross = (c1 * c2) ** 0.5 * (B1 @ A2 + B2 @ A1)
found = layer.get_delta_weight("linear")
print(f"linear against sum + cross terms: {furthest(found, wanted + cross):.0e}")
print(f"cross terms are {cross.norm() / wanted.norm():.0%} of the sum")
unscaled = (0.5 * (B1 + B2)) @ (A1 + A2)  # what one would think without the scalings
print(f"without the scalings the formula is off by {(found - unscaled).norm() / found.norm():.0%}")

# %% [markdown]
# **`linear` is the sum for one adapter, and far from it for two.** PEFT's own docstring calls it "a very rough
# approximation". It also needs equal ranks, as do all types without `svd` in the name but `cat`.
#
# Two more that are not what they seem. **DoRA** also rescales each row of the weight, and rescalings don't add up:
# `cat` of the *A* and *B* is another model.

# %%
small = two_adapters(use_dora=True)
small.base_model.set_adapter(["one", "two"])
ids = torch.randint(0, 60, (2, 12))
with torch.no_grad():
    both_active = small(ids).logits
    small.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="cat")
    small.set_adapter("mix")
    with small.disable_adapter():
        effect = furthest(both_active, small(ids).logits)
    print(
        f"DoRA, cat against both active: {furthest(small(ids).logits, both_active):.2f}"
        f" (their effect: {effect:.2f})"
    )

# %% [markdown]
# And an **OLoRA** adapter that is named *first* hands its configuration to the new one, which takes its own start out
# of the base: the base moves, and with it every other adapter. (Lesson 6 shows why.)

# %%
for order in (["plain", "olora"], ["olora", "plain"]):
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    olora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="olora")
    tiny = get_peft_model(tiny, olora, adapter_name="olora")
    tiny.add_adapter("plain", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    weight = tiny.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    start = weight.detach().clone()
    tiny.add_weighted_adapter(order, [1.0, 1.0], "mix", combination_type="cat")
    print(f"{order[0]} given first: the base moves by {(weight - start).norm() / start.norm():.0%}")

# %% [markdown]
# ## What is left of each skill?
#
# A change that is added exactly is not yet a skill that is kept. So we score. `reading` and `extract` (answer as JSON)
# in one adapter: once with weights of ½, once of 1, and once as 0.6 and 0.8.
#
# **Predict:** will the sum of two good adapters be good at both?

# %%
tasks = ("reading", "sailor", "extract", "mood")


def score(model, task):
    """Share of 32 held-out rows answered exactly."""
    few = data.load_task(task, "test").select(range(32))
    return evaluation.evaluate_task(model, tokenizer, task, few, batch_size=64)["score"]


scores = {}
for number, weights in enumerate(((1.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.6, 0.8), (0.0, 1.0))):
    name = f"mix {number}"  # a new name each time; one with a "." is refused
    model.add_weighted_adapter(pair, list(weights), name, combination_type="cat")
    model.set_adapter(name)
    scores[weights] = [score(model, task) for task in pair]
plotting.table(
    ["weight of reading", "weight of extract", "reading", "extract"],
    [[*weights, *(f"{value:.0%}" for value in found)] for weights, found in scores.items()],
)
evaluation.band("the weaker skill with 0.6 and 0.8", min(scores[0.6, 0.8]), 0.8, 1)

# %% [markdown]
# Exact sums, and mostly one skill wins. But with 0.6 and 0.8 *both* are mostly there. **The weights decide, and
# which are right can only be measured.**
#
# ### The dial
#
# So turn a dial: (1 − w) of one and w of the other, from 0 to 1. Dashed is each adapter **alone** at that strength.
# Where the dashed line is low, too, the adapter is simply too weak; where only the solid one is, the other disturbs it.
# Means of three draws of 48 test rows, from `experiments/dial.py`.
#
# **Predict:** is there a place on the dial where both skills are there? For all of these pairs?

# %%
dial, lines, best = data.load_results("dial"), {}, {}
for names in dict.fromkeys(row["pair"] for row in dial):
    points = [row for row in dial if row["pair"] == names]
    drawn = {
        column: {w: mean for w, (mean, _, _) in sweeps.over_seeds(points, column, "weight").items()}
        for column in ("first", "second", "first_alone", "second_alone")
    }
    both = {w: min(score, drawn["second"][w]) for w, score in drawn["first"].items()}
    lines[names], best[names] = drawn, max(both.items(), key=lambda item: item[1])
shown = ("extract+mood", "reading+extract", "reading+sailor")
title = "The most of both skills at once: " + ",\n".join(
    f"{best[names][1]:.0%} of {names.replace('+', ' and ')} at w = {best[names][0]:g}"
    for names in shown
)

# %%
with plt.style.context(plotting.STYLE_FILE):
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.8), sharey=True)
    for axes, names in zip(panels, shown):
        first, second = names.split("+")
        for column, color in zip(("first", "second"), plotting.COLORS):
            together, alone = lines[names][column], lines[names][f"{column}_alone"]
            axes.plot(together.keys(), together.values(), "-o", color=color)
            axes.plot(alone.keys(), alone.values(), "--", color=color, marker="")
        axes.annotate(first, (0, 1.04), color=plotting.COLORS[0])
        axes.annotate(second, (1, 1.04), color=plotting.COLORS[1], ha="right")
        axes.set(xlabel=f"w: share of {second}", ylim=(-0.03, 1.12))
    panels[0].set_ylabel("score, from 0 to 1")
figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
described = "; ".join(
    f"{names}, {column.replace('_', ' ')}: "
    + ", ".join(f"{value:.0%} at {w:g}" for w, value in values.items())
    for names in shown
    for column, values in lines[names].items()
)
plotting.show(figure, title.replace("\n", " ") + f". Score by share of the second: {described}.")

# %% tags=["claim"]
from course_utils import data
from tools.claims import fraction, swept

first, second, first_alone, second_alone = (
    {
        (pair, round(weight, 1)): found[0]
        for (pair, weight), found in swept("dial", column, "pair", "weight").items()
    }
    for column in ("first", "second", "first_alone", "second_alone")
)
both = {}
for pair, weight in first:
    both.setdefault(pair, {})[weight] = min(first[pair, weight], second[pair, weight])
alone = {}  # {(adapter, strength): score}
for pair, weight in first:
    one, other = pair.split("+")
    alone[one, round(1 - weight, 1)] = first_alone[pair, weight]
    alone[other, weight] = second_alone[pair, weight]
assert alone["mood", 0.2] > 0.95 > 0.9 > alone["mood", 0.1], (
    "`mood` is nearly whole with two tenths"
)
assert alone["reading", 0.4] > 0.95 > 0.9 > alone["reading", 0.3], "`reading` with four"
assert alone["extract", 0.7] > 0.95 > alone["extract", 0.6], "`extract` with seven"
assert alone["sailor", 0.8] > 0.95 > 0.9 > alone["sailor", 0.7], "`sailor` with eight"
assert min(both["extract+mood"][weight] for weight in (0.3, 0.4)) > 0.9, "leave each other room"
assert 0.6 < both["reading+extract"][0.6] < 0.8, "most of both"
assert max(both["reading+extract"][weight] for weight in (0.5, 0.7)) < 0.5, "a narrow place"
assert max(both["reading+sailor"].values()) < 0.2, "have none"
assert second["reading+sailor", 0.6] < 0.05, "`sailor` hardly answers yet"
assert first["reading+sailor", 0.6] < 0.4, "`reading` has lost most of its answers"
assert first_alone["reading+sailor", 0.6] > 0.95, "alone it would be nearly whole"

# %% [markdown]
# Adapters differ in the strength that they need. Alone, `mood` is nearly whole with two tenths, `reading` with four,
# `extract` with seven, `sailor` with eight: the dashed lines. All else is disturbance. `extract` and `mood` leave each
# other room. `reading` and `extract` have a narrow place that has most of both. `reading` and `sailor` have none: at
# w = 0.6 `sailor` hardly answers yet, and `reading` has lost most of its answers, though alone it would be nearly
# whole.
#
# The dial holds the weights' sum at 1, which is a choice, too: it misses the 0.6 and 0.8 from above, whose sum is
# larger, and which kept more of `reading` and `extract` than any point of it.
#
# ### Every type, every pair
#
# The whole picture, from `experiments/combine.py`: eleven types, six pairs and all four together, each with weights of
# 1 and of 1/number, with half of the numbers kept where a type drops any; 48 test rows, drawn by three seeds, which
# also draw what DARE drops.
#
# **Predict:** is there a type that is best everywhere? Does closeness to the weighted sum decide?

# %%
combined = data.load_results("combine")
for row in combined:  # the skill that is kept least, of those that are to be kept
    row["worst"] = min(row[task] for task in row["adapters"].split("+"))
groups = sweeps.over_seeds(combined, "worst", "combination", "adapters", "weights")
sets = list(dict.fromkeys(row["adapters"] for row in combined))
matrix = [
    [max(groups[kind, names, way][0] for way in ("sum", "mean")) for names in sets]
    for kind in TYPES
]
kept = [names for column, names in enumerate(sets) if max(row[column] for row in matrix) >= 0.8]
title = f"In {len(kept)} of {len(sets)} sets some type keeps four fifths of every skill"
labels = [names.replace("+", "\n") if names.count("+") < 2 else "all\nfour" for names in sets]
figure = plotting.score_matrix(matrix, TYPES, labels, title)
figure.supylabel("combination type")
plotting.show(
    figure,
    f"{title}. Score of the weaker skill, better of the two weightings, mean of "
    "three seeds. "
    + "; ".join(
        f"{kind}: " + ", ".join(f"{names} {value:.0%}" for names, value in zip(sets, row))
        for kind, row in zip(TYPES, matrix)
    ),
)

# %%
detail = [
    row for row in combined if row["adapters"] == "reading+extract" and row["weights"] == "sum"
]
columns = {column: sweeps.over_seeds(detail, column, "combination") for column in ("error", *tasks)}
plotting.table(
    ["reading + extract, weights 1", "off by", *tasks],
    [
        [
            f"`{kind}`",
            sweeps.spread(columns["error"][kind], ".2g"),
            *(sweeps.spread(columns[task][kind]) for task in tasks),
        ]
        for kind in TYPES
    ],
)

# %% tags=["claim"]
results = {}  # {(adapters, weights, type): [score of the weakest skill, by seed]}
for row in data.load_results("combine"):
    weakest = min(row[task] for task in row["adapters"].split("+"))
    results.setdefault((row["adapters"], row["weights"], row["combination"]), []).append(weakest)
score = {key: sum(by_seed) / len(by_seed) for key, by_seed in results.items()}
sets, types = (list(dict.fromkeys(key[part] for key in score)) for part in (0, 2))
best = {
    names: max(value for (other, _, _), value in score.items() if other == names) for names in sets
}
kept_by = {  # {(adapters, weights): how many types keep four fifths of every skill}
    (names, way): sum(score[names, way, kind] >= 0.8 for kind in types)
    for names in sets
    for way in ("sum", "mean")
}
assert len(sets) == 7, "two of the seven sets"
assert [names for names in sets if best[names] >= 0.8] == ["reading+mood", "extract+mood"], (
    "two of the seven sets"
)
assert kept_by["reading+mood", "mean"] == 9, "by nine types with weights of ½"
assert kept_by["extract+mood", "sum"] == 2, "by two types with weights of 1"
assert kept_by["reading+mood", "sum"] == kept_by["extract+mood", "mean"] == 0, (
    "by none with the other"
)
some_left = [names for names in sets if score[names, "sum", "cat"] > 0.02]
assert len(some_left) == 3, "the three sets"
for names in some_left:
    of_sum = {kind: score[names, "sum", kind] for kind in types}
    assert min(of_sum["ties_svd"], of_sum["dare_ties_svd"]) > of_sum["cat"], "keeps more"
    assert max(of_sum["linear"], of_sum["dare_linear"]) < of_sum["cat"] / 2, "less than half of it"
halved = {kind: score["extract+mood", "mean", kind] for kind in types}
quarter = fraction(halved["linear"])
assert halved["linear"] == max(halved.values()), "more than any other type"
assert halved["ties_svd"] < 0.02, "hardly anything"

# %% [markdown]
# With equal weights two of the seven sets are kept: `reading` and `mood` by nine types with weights of ½, `extract` and
# `mood` by two types with weights of 1, and both by none with the other weights. Elsewhere none is good. With weights
# of 1, TIES on the whole change (`ties_svd`, `dare_ties_svd`) keeps more than the exact sum does in the three sets of
# which the sum keeps more than a row or two; `linear` and `dare_linear`, with their cross terms, keep less than half of
# it. With weights of ½ even that can turn round: of `extract` and `mood` `linear` keeps {{quarter}}, more than any
# other type, and `ties_svd` hardly anything. Being close to the weighted sum is no virtue in itself.
#
# Now set that beside the dial: the plain sum, at its best place. (Both are picked on the rows that they are scored on,
# which flatters both.)

# %%
table = []
for names, (w, value) in best.items():
    column = sets.index(names)
    top = max(range(len(TYPES)), key=lambda i: matrix[i][column])
    winner = f" (`{TYPES[top]}`)" if matrix[top][column] else ""
    table.append(
        [
            names.replace("+", " and "),
            f"{matrix[top][column]:.0%}{winner}",
            f"{value:.0%} (w = {w:g})",
        ]
    )
plotting.table(
    [
        "score of the weaker skill",
        "equal weights, best of eleven types",
        "exact sum, best place on the dial",
    ],
    table,
)
kept_by_weights = sum(value >= 0.8 for _, value in best.values())

# %% tags=["claim"]
at_best = [(max(both[names].values()), best[names]) for names in both]
assert all(moved > changed - 0.05 for moved, changed in at_best), "as much to move the weights"
assert sum(moved > changed for moved, changed in at_best) > len(at_best) / 2, "mostly more"
assert best["sailor+mood"] < 0.3, "looked hopeless"
for_mood = fraction(both["sailor+mood"][0.2])
for names in ("reading+sailor", "sailor+extract"):
    assert max(*both[names].values(), best[names]) < 0.2, (
        "`sailor` stays hopeless beside `reading` and beside `extract`"
    )

# %% [markdown]
# **In these tries it helped as much to move the weights of the plain sum as to change the type, and mostly more.**
# `sailor` and `mood` looked hopeless at equal weights, and at 0.8 and 0.2 {{for_mood}} of both are there. But `sailor`
# stays hopeless beside `reading` and beside `extract`. Do two changes get into each other's way where they point in like directions?


# %%
def cosine(one, other):
    """Cosine of two adapters' changes, over all layers."""
    dots = [0.0, 0.0, 0.0]
    for layer in (layer for layer in model.modules() if isinstance(layer, LoraLayer)):
        a, b = layer.get_delta_weight(one), layer.get_delta_weight(other)
        for i, (x, y) in enumerate(((a, b), (a, a), (b, b))):
            dots[i] += (x * y).sum().item()
    return dots[0] / (dots[1] * dots[2]) ** 0.5, dots[1] ** 0.5, dots[2] ** 0.5


found = {names: cosine(*names) for names in itertools.combinations(tasks, 2)}
sizes = {name: size for names, (_, *both) in found.items() for name, size in zip(names, both)}
plotting.table(
    ["pair", "cosine of the changes"],
    [[" and ".join(names), f"{angle:+.3f}"] for names, (angle, *_) in found.items()],
)
print("size of each change:", ", ".join(f"{name} {size:.0f}" for name, size in sizes.items()))

# %% [markdown]
# All angles are close to a right one, and the pair with the *least* right angle, `reading` and `mood`, is the one that
# goes together best with equal weights. **Orthogonal changes don't make independent skills.** A likely cause, not
# tested here: every layer's *output* is shared, and what comes next reads the sum. Nor do sizes tell: the change of
# `sailor` is the largest, and needs the most strength all the same. **Adding adapters is an experiment: score every
# skill that you want to keep. If it fails, keep several adapters and switch, or train one on both tasks.**

# %% [markdown]
# ## Break it
#
# Five mistakes that people make, the symptom, and the check that finds each.
#
# ### 1 · Saved into the adapter's folder
#
# "Put it where the adapter is." **Predict:** what does `from_pretrained` on that folder load?

# %%
crowded = runs / "crowded"
shutil.copytree(adapter_folder, crowded, dirs_exist_ok=True)
merged.save_pretrained(crowded)
tokenizer.save_pretrained(crowded)
print(textwrap.fill(", ".join(sorted(file.name for file in crowded.iterdir())), 95), "\n")
loaded = AutoModelForCausalLM.from_pretrained(crowded).to(device)
print("merged:", ask(merged), "\nloaded:", ask(loaded), "\n")
print(validation.check_merged_folder(base_folder, adapter_folder, crowded))
shutil.rmtree(crowded)

# %% [markdown]
# `transformers` found a model, *and* an `adapter_config.json`, and put the adapter on top: the change is there twice,
# and no word was said. **A merged model gets a folder of its own.**

# %% [markdown]
# ### 2 · Merged twice
#
# The merged model is taken for the base, and the adapter merged once more. **Predict:** what is its score?


# %%
def save(model, name, tokenizer=tokenizer):
    """Save a model with its tokenizer under runs/lesson07, and return the folder."""
    with saving(runs / name) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return runs / name


again = AutoModelForCausalLM.from_pretrained(merged_folder).to(device)
twice = PeftModel.from_pretrained(again, adapter_folder).merge_and_unload()
print(f"score {score(twice, 'sailor'):.0%}: {ask(twice)}\n")
print(validation.check_merged_folder(base_folder, adapter_folder, save(twice, "twice")))

# %% [markdown]
# (Within one process PEFT takes care: a second `merge_adapter()` warns that there is nothing to do.)
#
# ### Exercise: how often was it merged? (stretch, 15 min)
#
# The report says how many times the change is in the weights. Find that number yourself, from {name: tensor} of base,
# merged and changes (*s·BA* of each adapted layer). It is the factor *t* that brings *t*·change closest to
# merged − base, over all layers at once: the least-squares fit. 1 is right; 2 is merged twice; 0 is not merged; α
# divided by the root of *r* gives √*r*. Expected for a right merge: 1, but for rounding.
#
# <details><summary>What is the formula?</summary>
# For vectors: <em>t</em> = (difference · change) / (change · change). For matrices multiply entry by entry, and add up.
# </details>
# <details><summary>The check says that the mean over layers is no good</summary>
# A layer that hardly changes has noise above and next to nothing below. Add up both over all layers first.
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
# ### 3 · Merged with B = 0, and "verified"
#
# The wrong checkpoint: an adapter as it was before training. The test that everybody writes passes with flying colours.

# %%
runtime.seed_everything(1)
untrained = get_peft_model(
    load_base(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
)
with warnings.catch_warnings(action="ignore"), saving(runs / "untrained") as folder:
    untrained.save_pretrained(folder)
unmerged_logits = logits(untrained.eval())
empty = untrained.merge_and_unload()
print(f"merged against adapter: {furthest(logits(empty), unmerged_logits)}, a perfect merge\n")
print(validation.check_merged_folder(base_folder, runs / "untrained", save(empty, "empty")))

# %% [markdown]
# **Zero difference is a bad sign.** A real merge differs in the last digits.

# %% [markdown]
# ### 4 · One of two merged, the other silently off
#
# Two adapters are active together, and one of them is merged. PEFT's list says that both are active still. **Predict:**
# what does the second one do?

# %%
model = load_adapted("reading")
model.load_adapter(paths.adapter_path("extract"), adapter_name="extract")
model.base_model.set_adapter(pair)
together = logits(model)
model.merge_adapter(["reading"])
moved = furthest(logits(model), together)
print("active:", model.active_adapters, f"· logits moved by {moved:.1f}\n")
print(validation.check_adapters(model), "\n")
model.unmerge_adapter()
one_lost = model.merge_and_unload(adapter_names=["reading"])
folders = [paths.adapter_path(name) for name in pair]
print(validation.check_merged_folder(base_folder, folders, save(one_lost, "one_lost")))

# %% [markdown]
# A merged layer runs its weights alone, whatever else is active. Without `adapter_names`, all active adapters are
# merged; so look at `active_adapters` before you merge.

# %% [markdown]
# ### 5 · The tied head
#
# In our base the output layer *is* the embedding: one matrix, used twice. An adapter on `lm_head` changes the output
# only. Merged, it changes that one matrix, and so the embedding, too. **Predict:** what does it still say?

# %%
if not base_model.config.tie_word_embeddings:
    print("This base has a head of its own, so nothing breaks below.")
question = "What is the capital of France?"
with warnings.catch_warnings(record=True, action="always") as caught:
    runtime.seed_everything(1)
    model = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"]))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight, std=0.2)
    unmerged_logits, before_merge = logits(model.eval()), ask(model, question)
    with saving(runs / "head_adapter") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
    broken = model.merge_and_unload()
for said in sorted(
    {str(warning.message).split(". ")[0] for warning in caught if "tie" in str(warning.message)}
):
    print("PEFT warned:", textwrap.shorten(said, 95, placeholder=" ..."))
print(f"\nadapter: {before_merge}\nmerged:  {ask(broken, question)}")
print(
    f"the adapter moves logits by {furthest(unmerged_logits, base_logits):.1f}, and the merge is"
    f" {furthest(logits(broken), unmerged_logits):.1f} away from it\n"
)
print(validation.check_merged_folder(base_folder, runs / "head_adapter", save(broken, "tied")))

# %% [markdown]
# By its largest logit the merge is further from the adapter than the adapter is from the base. On the check's own texts
# it is about as far, by all three measures: the merge spoils as much as the adapter had changed. PEFT warns twice. The way out is to untie first: give the base a head
# of its own, a copy of the embedding, and say so in its configuration.


# %%
def load_untied():
    """The base with a head of its own."""
    model = load_base()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


with warnings.catch_warnings(action="ignore"):
    untied = PeftModel.from_pretrained(load_untied(), runs / "head_adapter").merge_and_unload()
print(
    f"merged into the untied base, against the adapter:"
    f" {furthest(logits(untied), unmerged_logits):.1e}"
)

# %% [markdown]
# `target_modules="all-linear"` leaves the output layer out, which is one more reason for it.

# %% [markdown]
# ## Recap
#
# What this notebook measured, in one table:

# %% tags=["measured"]
bf16 = precision["merged in bfloat16"][0]
plotting.table(
    ["", "measured"],
    [
        [
            "the adapter's effect on a logit, at most",
            f"{furthest(adapter_logits, base_logits):.0f}",
        ],
        ["merged against adapter, float32", f"{furthest(logits(merged), adapter_logits):.0e}"],
        [
            "merged in bfloat16: largest difference, top-1",
            f"{bf16.max_abs:.0e}, {bf16.top1_agreement:.1%}",
        ],
        [
            "forward pass: with an adapter, and merged",
            f"{slower['with adapter']:+.0%}, {slower['merged']:+.0%} time",
        ],
        [
            f"memory to merge a model of {model_mb:.0f} MB: whole, by shards",
            f"{peaks['merge_whole']:.0f} MB, {peaks['merge_by_shards']:.0f} MB",
        ],
        [
            f"of a change of {shrunk[at_percent]:.1%} of the weights, bfloat16 spoils",
            f"{lost_bf16:.0%}",
        ],
        [
            "pairs of skills kept, four fifths of both: equal weights, on the dial",
            f"{sum(names.count('+') == 1 for names in kept)} and {kept_by_weights} of {len(best)}",
        ],
    ],
)
progress("07")

# %% [markdown]
# ## Take it to work
#
# Put your three folders, or hub ids, between the quotes. The check needs 4 bytes a parameter; with
# `dtype="bfloat16"` two.

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
# Hardly. They add in another order, so a real change leaves rounding behind. Look whether <em>B</em> is zero.
# </details>
# <details><summary>2 · <code>cat</code> of two rsLoRA adapters of rank 8: how strong is the result?</summary>
# Four times what it should be: the new rank is 16, and its scaling √16. Set <code>lora_alpha</code> to 4.
# </details>
# <details><summary>3 · The merged folder is twice as large as the base's. What happened?</summary>
# The base lay there in 16 bits and was loaded in 32. Load it in its own dtype, or cast before saving.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [LoRA](https://arxiv.org/abs/2106.09685), Hu et al. 2021: section 4.1 on latency once merged
# - [Editing Models with Task Arithmetic](https://arxiv.org/abs/2212.04089), Ilharco et al. 2022: adding and subtracting
#   changes
# - [TIES-Merging](https://arxiv.org/abs/2306.01708), Yadav et al. 2023, and
#   [DARE](https://arxiv.org/abs/2311.03099), Yu et al. 2023
# - [PEFT: model merging](https://huggingface.co/docs/peft/main/en/developer_guides/model_merging), and
#   [its LoRA guide](https://huggingface.co/docs/peft/main/en/developer_guides/lora) on merging adapters into the base
# - [PEFT welcomes new merging methods](https://huggingface.co/blog/peft_merging), Hugging Face 2024
# - [Accelerate: big model inference](https://huggingface.co/docs/accelerate/usage_guides/big_modeling), on device maps
# - [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# This was the last lesson. The two pages above are for the day after.
