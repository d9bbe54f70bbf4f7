# %% [markdown]
# # How exact is exact enough?
#
# A merged model and the same model with its adapter beside it are both right, and yet their logits differ. In bfloat16
# they differ about ten thousand times as much as in float32. **How large may a difference be before it means a mistake?** You
# will work the answer out, instead of trying tolerances until a test passes.
#
# | | |
# |---|---|
# | **What you'll do** | derive a tolerance; merge in 32 and in 16 bits; find which changes get lost; unmerge a hundred times |
# | **What you'll learn** | why sums in another order differ, and by how much; what 16 bits cost; when unmerging is not the way back |
# | **What you'll need** | [lesson 7](07_merging.ipynb); a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import math

from course_utils import data, evaluation, paths, plotting, runtime, validation
from course_utils.exercises import deep_rounding, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from course_utils.progress import ProgressLine

runtime.seed_everything(0)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Look at the steps between numbers
#
# A computer can't store every number. Between 1 and 2 there are 127 numbers in bfloat16, 1,023 in float16 and about 8
# million in float32, and whatever lies between two of them is rounded to the nearer one. Between 2 and 4 there are as many
# again, so the steps get larger as the numbers do.
#
# **Predict:** in bfloat16, what are 1 + 0.003 and 1 + 0.005? (The step above 1 is 1/128 ≈ 0.0078.)

# %%
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
steps = []
for name, dtype in DTYPES.items():
    one, eps = torch.tensor(1.0, dtype=dtype), torch.finfo(dtype).eps
    sums = [f"{(one + torch.tensor(small, dtype=dtype)).item():.7g}" for small in (0.003, 0.005)]
    steps.append([name, f"{eps:.1e}", f"{eps / 32:.1e}", *sums, f"{torch.finfo(dtype).max:.1e}"])
plotting.table(
    ["dtype", "step above 1", "step above 1/32", "1 + 0.003", "1 + 0.005", "largest number"], steps
)

# %% [markdown]
# In bfloat16 the first sum is 1, as if nothing had been added, because 0.003 is less than half a step. The second is
# rounded up to 1.0078. Each stored number is off by at most half a step, so its [relative
# error](../docs/glossary.md#relative-error) is at most *u*: 2⁻²⁴ in float32, 2⁻¹¹ in float16, 2⁻⁸ in bfloat16. In return,
# bfloat16 reaches as far as float32, while the largest number in float16 is 65,504. That is why many models train in
# bfloat16.
#
# ## Derive a tolerance
#
# A merged layer computes *(W + s·BA)x*, and a layer with a separate adapter computes *Wx + s·B(Ax)*. In exact arithmetic they
# are equal. On a computer each addition and each product rounds, and the two ways round differently. How far apart may the
# results be?
#
# For example, take the sum of 1,000 products. Each rounding has a relative error of at most *u*, so the sum is off by at
# most about 1,000·*u* times the sum of the absolute values (Higham, *Accuracy and Stability of Numerical Algorithms*, section
# 3.1). In our layer a number passes through at most *inputs + r + 4* roundings: a sum over the inputs, a sum over the rank,
# the scaling and the product with it, and the additions of change and bias. Both ways may be off, so you allow twice that:
#
# > |separate − merged| ≤ 2·(inputs + r + 4)·u·(|W||x| + s·|B||A||x| + |bias|)
#
# That is the **worst case**. Roundings go up as often as down, so *n* of them typically add up to √n times one rounding,
# instead of *n* times. A tolerance with √(inputs + r + 4) in the formula is therefore smaller.
#
# **Predict:** in float32, for a layer with 256 inputs and 704 outputs, do both ways agree to 1e-3, 1e-5 or 1e-7? Would
# the worst case notice a scaling that is wrong by a ten-thousandth? Would the tolerance with √n?

# %%
inputs, outputs, rank, s = 256, 704, 8, 2.0
W, bias = nn.Linear(inputs, outputs).weight.detach(), torch.randn(outputs) / 16
A, B, x = torch.randn(rank, inputs) / 16, torch.randn(outputs, rank) / 5, torch.randn(64, inputs)


def separate_and_merged(dtype, s_merged=s):
    """Both ways to compute the layer's output, (64, outputs), in this dtype."""
    W_, A_, B_, x_, bias_ = (matrix.to(dtype) for matrix in (W, A, B, x, bias))
    separate = nn.functional.linear(x_, W_, bias_) + s * (x_ @ A_.T @ B_.T)
    return separate, nn.functional.linear(x_, W_ + s_merged * (B_ @ A_), bias_)


def furthest(one, other):
    """The largest absolute difference."""
    return (one.float() - other.float()).abs().max().item()


n, u = inputs + rank + 4, torch.finfo(torch.float32).eps / 2
size = x.abs() @ (W.abs() + s * B.abs() @ A.abs()).T + bias.abs()
worst_case, typical = 2 * n * u * size, 2 * math.sqrt(n) * u * size
separate, by_merging = separate_and_merged(torch.float32)
wrong = separate_and_merged(torch.float32, s_merged=1.0001 * s)[1]
plotting.table(
    ["float32, 256 inputs, 704 outputs", "at most"],
    [
        ["separate against merged", f"{furthest(separate, by_merging):.0e}"],
        ["allowed: √n roundings", f"{typical.max():.0e}"],
        ["allowed: worst case", f"{worst_case.max():.0e}"],
        ["separate against merged, scaling 1.0001·s", f"{furthest(separate, wrong):.0e}"],
    ],
)
assert ((separate - by_merging).abs() <= worst_case).all()
assert ((separate - wrong).abs() <= worst_case).all()
assert ((separate - wrong).abs() > typical).any()

# %% [markdown]
# Both ways agree to 1e-5, as the first row shows, which is well inside both tolerances. Even the tolerance with √n is generous,
# because it takes each rounding at its largest. The wrong scaling is off by 7e-04. So the tolerance with √n notices it, and
# the worst case lets it pass.
#
# **Work a tolerance out from the number of roundings.** Take the worst case if a right answer must never fail, and √n if a
# small mistake must not pass.

# %% [markdown]
# ### Exercise: write the tolerance (core, 15 min)
#
# Return the worst case of the formula above as a tensor of shape (rows, outputs). You get `x` (rows, inputs), `W` (outputs,
# inputs), `A` (r, inputs), `B` (outputs, r), the scaling `s` and a dtype, whose *u* you have to find. There is no bias.
# Expected for zeros in `x`: zeros.
#
# <details><summary>Where do I get u from?</summary>
# <code>torch.finfo(dtype).eps</code> is the step above 1, and <em>u</em> is half of it.
# </details>
# <details><summary>The check says that my tolerance is too small in places</summary>
# Products of opposite signs cancel in <code>W @ x</code>, but their roundings don't. Take absolute values of every matrix
# first, and of a negative <em>s</em>, too.
# </details>


# %% exercise="deep.tolerance" points=4
def tolerance(x, W, A, B, s, dtype):
    """Return how far merged and separate outputs may be apart, (rows, outputs)."""
    ### BEGIN SOLUTION
    roundings = W.shape[1] + A.shape[0] + 4
    size = x.abs() @ (W.abs() + abs(s) * B.abs() @ A.abs()).T
    return 2 * roundings * torch.finfo(dtype).eps / 2 * size
    ### END SOLUTION


deep_rounding.tolerance(tolerance)

# %%
### BEGIN HIDDEN TESTS
assert deep_rounding.tolerance.outcome(tolerance).passed
_x, _W, _A, _B = (torch.ones(*shape) for shape in ((2, 10), (4, 10), (2, 10), (4, 2)))
_expected = torch.full((2, 4), 2 * (10 + 2 + 4) * 2**-11 * (10 + 3 * 20))
assert torch.allclose(tolerance(_x, _W, -_A, _B, 3.0, torch.float16), _expected)
### END HIDDEN TESTS

# %% [markdown]
# ## Measure agreement
#
# For a whole model the formula would become very long, so you measure instead. Three numbers describe how well two models agree at the
# tokens of some texts. The **largest difference** of the logits finds any fault. **Top-1 agreement** is the share of tokens
# at which both find the same next token most likely. The [KL divergence](../docs/glossary.md#kl-divergence-in-nats) weighs
# each difference by how likely the token is:
#
# > *KL(p ‖ q) = Σ p·(log p − log q)*, in nats, the mean over positions; *p* is the reference
#
# ### Exercise: measure agreement (core, 10 min)
#
# You get the logits of a reference and of a candidate, each of shape (positions, vocabulary). Return the share of positions with
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


# %% exercise="deep.agreement" points=3
def agreement(reference, candidate):
    """Return (top-1 agreement from 0 to 1, mean KL in nats) of logits (positions, vocabulary)."""
    ### BEGIN SOLUTION
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    top_1 = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    return top_1, (p.exp() * (p - q)).sum(-1).mean().item()
    ### END SOLUTION


deep_rounding.agreement(agreement)

# %%
### BEGIN HIDDEN TESTS
assert deep_rounding.agreement.outcome(agreement).passed
_reference, _candidate = deep_rounding.agreement_example(40, 17, seed=23)
_share, _kl = agreement(_reference, _candidate)
_wanted = nn.functional.kl_div(
    _candidate.log_softmax(-1), _reference.softmax(-1), reduction="batchmean"
)
assert abs(float(_kl) - _wanted) < 1e-6
assert abs(float(_share) - (_reference.argmax(-1) == _candidate.argmax(-1)).double().mean()) < 1e-6
### END HIDDEN TESTS

# %% [markdown]
# ## Merge in 16 bits
#
# Few models are served in float32. The next cells merge the adapter `sailor` in each dtype and compare everything with one
# reference: the adapter, unmerged, in float32. The [perplexity](../docs/glossary.md#perplexity) is that of 48 held-out
# questions with their answers.
#
# The comparison needs a control. If a merge in bfloat16 differs from the reference, does the difference come from the merging
# or from bfloat16? So the *unmerged* model is measured in 16 bits, too.
#
# **Predict:** which differs more from the reference, the unmerged model in bfloat16 or the merged one? Will you see it in the
# score?

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
if tokenizer.pad_token is None:  # a base without one: any token will do, since pads are masked
    tokenizer.pad_token = tokenizer.eos_token
rows = data.load_task("sailor", "test").select(range(48))
texts = [
    tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows
]
compared = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").to(device)


def load_adapted(dtype):
    """A fresh copy of the base in this dtype, with the adapter beside it."""
    base = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=dtype)
    return PeftModel.from_pretrained(base.to(device), paths.adapter_path("sailor")).eval()


models = {"float32, unmerged": load_adapted(torch.float32)}
models["float32, merged"] = load_adapted(torch.float32).merge_and_unload()
for name in ("float16", "bfloat16"):
    models[f"{name}, unmerged"] = load_adapted(DTYPES[name])
    models[f"{name}, merged"] = load_adapted(DTYPES[name]).merge_and_unload()
    merged = load_adapted(torch.float32).merge_and_unload().to(DTYPES[name])
    models[f"{name}, merged in float32 and rounded"] = merged

# %%
reference = models["float32, unmerged"]
found, table, line = {}, [], ProgressLine(len(models), "model")
for number, (name, candidate) in enumerate(models.items(), 1):
    right = evaluation.evaluate_task(
        candidate, tokenizer, "sailor", rows.select(range(32)), batch_size=64, max_new_tokens=40
    )["score"]
    perplexity = evaluation.perplexity(candidate, tokenizer, texts)
    agree = ("reference", "", "")
    if candidate is not reference:
        found[name] = validation.compare_models(reference, candidate, compared, atol=math.inf)
        agree = (
            f"{found[name].max_abs:.0e}",
            f"{found[name].top1_agreement:.1%}",
            f"{found[name].kl:.0e}",
        )
    table.append([name, *agree, f"{right:.0%}", f"{perplexity:.1f}"])
    evaluation.band(f"score of {name}", right, 0.88, 1, quiet=True)
    line.update(number, name)
plotting.table(["weights", "largest difference", "top-1", "KL, nats", "score", "perplexity"], table)

# %% [markdown]
# In the same dtype, merged and unmerged differ from the reference about equally, within a factor of two, by the largest
# difference and by KL. So **16 bits cost something, and merging adds little.** In float16, which has three more bits for
# precision, the largest difference is about a tenth of that in bfloat16. Merging in float32 and rounding afterwards gains
# little.
#
# In the score you see nothing, so the same score is a weak proof of a merge. Top-1 agreement can jump. All 48 questions begin
# with the same words, and if two tokens are almost equally likely there, one rounding changes the most likely one in all 48
# at once.
#
# A fixed tolerance of 1e-4 would reject every right merge in 16 bits. `check_merged_folder` measures instead what one rounding
# of the right weights does to the logits of your model, and allows four times that.
#
# ## See which changes get lost
#
# A change that is smaller than half a step of its weight is rounded away. So rounding hurts **small changes of large
# weights**. How much of this adapter's change is lost, and what if the change were smaller, as after a gentler training? The
# next cells shrink the same change by factors down to less than a thousandth, add it in each dtype, and measure how much of the
# change the rounding spoils: the size of the rounding error, divided by the size of the change.
#
# **Predict:** for a change of about a hundredth of the weights' size, how much does bfloat16 spoil: 1%, 10%, or most?

# %%
unmerged = load_adapted(torch.float32)
changes = [
    (layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").detach())
    for layer in unmerged.modules()
    if isinstance(layer, LoraLayer)
]
gone = sum(((W.bfloat16().float() + d).bfloat16() == W.bfloat16()).sum().item() for W, d in changes)
print(f"{gone / sum(d.numel() for _, d in changes):.1%} of the changes vanish in bfloat16")

length_W, length_d = (
    math.sqrt(sum(part[i].double().square().sum().item() for part in changes)) for i in (0, 1)
)
factors = [10 ** (-step / 4) for step in reversed(range(14))]
sizes, spoilt = [factor * length_d / length_W for factor in factors], {}
for name, dtype in DTYPES.items():
    parts = []
    for factor in factors:
        error = 0.0
        for W, d in changes:
            exact = W.to(dtype).double() + factor * d.double()
            error += (exact.to(dtype).double() - exact).square().sum().item()
        parts.append(math.sqrt(error) / (factor * length_d))
    spoilt[name] = (sizes, parts)

# %%
place = min(range(len(sizes)), key=lambda i: abs(sizes[i] - 0.01))
spoilt_16 = {name: spoilt[name][1][place] for name in ("bfloat16", "float16")}
title = "The smaller the change, the more of it rounding spoils"
figure = plotting.curves(
    spoilt, title, "size of the change: ‖s·BA‖ / ‖W‖", "rounding error / change", log_y=True
)
figure.axes[0].set_xscale("log")
figure.axes[0].axvline(sizes[-1], color="grey", linewidth=0.8, linestyle=":")
figure.axes[0].annotate(
    "this adapter", (sizes[-1], 2e-6), xytext=(-6, 0), textcoords="offset points", ha="right"
)
plotting.show(
    figure,
    f"{title}. "
    + "; ".join(
        f"{name}: {parts[-1]:.1e} for this adapter, {parts[0]:.1e} for the smallest change"
        for name, (_, parts) in spoilt.items()
    ),
)
print(f"Of a change of {sizes[place]:.1%} of the weights, rounding spoils")
print(", ".join(f"{part:.1%} in {name}" for name, part in spoilt_16.items()))

# %% [markdown]
# Rounding spoils about a tenth in bfloat16, and about a tenth of that in float16. This adapter itself (the dotted line) changes the
# weights by about a fifth of their size, which is a lot, so little of it gets lost, as the share printed first also says. **Before
# you merge an adapter with a small change into a bfloat16 base, look how large the change is.** And keep the unmerged adapter in any case, because you can't get
# it back from the merged file.
#
# ## Merge and unmerge a hundred times
#
# Suppose a server merges an adapter for each request and unmerges it afterwards. Unmerging subtracts what was added, and both
# steps round. The next cell makes a hundred such round trips with one layer.
#
# **Predict:** in which dtypes does the base drift further with each round trip?

# %%
trips, drift = (1, 2, 5, 10, 20, 50, 100), {}
for name, dtype in DTYPES.items():
    layer = next(layer for layer in load_adapted(dtype).modules() if isinstance(layer, LoraLayer))
    weight = layer.get_base_layer().weight
    start, away = weight.detach().float().clone(), []
    for trip in range(1, trips[-1] + 1):
        layer.merge()
        layer.unmerge()
        if trip in trips:
            away.append(((weight.float() - start).norm() / start.norm()).item())
    drift[name] = (trips, away)
title = "In 16 bits the base drifts further with each round trip"
figure = plotting.curves(drift, title, "times merged and unmerged", "‖W − W₀‖ / ‖W₀‖", log_y=True)
figure.axes[0].set_xscale("log")
plotting.show(
    figure,
    f"{title}. Distance from the base: "
    + "; ".join(
        f"{name}: {away[0]:.1e} after one, {away[-1]:.1e} after a hundred"
        for name, (_, away) in drift.items()
    ),
)

# %% [markdown]
# In both 16-bit dtypes the base drifts: after a hundred round trips it is five to six times as far away as after one. In
# float32 it stays where the first round trip put it, very close to the original. So **in 16 bits, unmerging doesn't bring the
# base back.** Keep the base, or load it again. Or don't merge: you can switch an unmerged adapter off, which is exact.
#
# ## Recap
#
# A difference is small enough if rounding can explain it. For one layer you can work out how much rounding explains: the
# number of roundings, times *u*, times the size of the terms. For a whole model you measure what one rounding of the right
# weights does. In float32 the difference is about a millionth of the adapter's effect, so a real mistake stands out. In
# bfloat16 it is about ten thousand times as large, whether you merge or not. Small changes suffer most, and unmerging no
# longer gives the base back.

# %%
bf16 = found["bfloat16, merged"]
plotting.table(
    ["", "measured"],
    [
        ["one layer in float32: separate against merged", f"{furthest(separate, by_merging):.0e}"],
        ["the same, allowed in the worst case", f"{worst_case.max():.0e}"],
        ["a logit, merged in float32", f"{found['float32, merged'].max_abs:.0e}"],
        ["a logit, merged in bfloat16", f"{bf16.max_abs:.0e}"],
        ["a logit, unmerged in bfloat16", f"{found['bfloat16, unmerged'].max_abs:.0e}"],
        [f"of a change of {sizes[place]:.1%}, bfloat16 spoils", f"{spoilt_16['bfloat16']:.0%}"],
        [
            "base after 1 and 100 round trips, bfloat16",
            f"{drift['bfloat16'][1][0]:.1e}, {drift['bfloat16'][1][-1]:.1e}",
        ],
    ],
)
progress("deep")

# %% [markdown]
# ## Take it to work
#
# How large is the change of your own adapter? Put the name of your base and your adapter's folder here.

# %%
my_base, my_adapter = "", ""
mine = AutoModelForCausalLM.from_pretrained(paths.own_folder(my_base or paths.base_model()))
mine = PeftModel.from_pretrained(mine, paths.own_folder(my_adapter or paths.adapter_path("mood")))
shares = [
    (layer.get_delta_weight("default").norm() / layer.get_base_layer().weight.float().norm()).item()
    for layer in mine.modules()
    if isinstance(layer, LoraLayer)
]
print(f"the change is {min(shares):.2%} to {max(shares):.2%} of a layer's weights")

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · Your merge in bfloat16 fails a test with a tolerance of 1e-4. Is it wrong?</summary>
# You can't tell from that, because every right merge in bfloat16 fails it. Compare with what one rounding of the right weights does,
# or with the unmerged model in bfloat16.
# </details>
# <details><summary>2 · Would you merge in float32 and round to bfloat16 afterwards, or merge in bfloat16?</summary>
# It makes little difference here, because either way the sum is rounded to bfloat16. What matters is the dtype that you store.
# </details>
# <details><summary>3 · A server merges and unmerges adapters all day in float16, and answers get worse towards the evening. Why?</summary>
# Each round trip rounds twice, so the base drifts. Load it again, or leave adapters unmerged and switch between them.
# </details>

# %% [markdown]
# ## Where to read on
#
# - Higham, *Accuracy and Stability of Numerical Algorithms*, 2002
# - [What Every Programmer Should Know About Floating-Point Arithmetic](https://floating-point-gui.de/)
# - [Lesson 7](07_merging.ipynb), which merges and ships; [Recipes](../docs/recipes.md) for dtypes of real models
