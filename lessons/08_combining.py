# %% [markdown]
# # Combine adapters
#
# You have an adapter for one task and an adapter for another, and you want one adapter for both, without training again.
# An adapter is a change to the weights, and changes can be added. **When does the sum have both skills, and what do you do
# when it doesn't?**
#
# | | |
# |---|---|
# | **What you'll do** | add two skills; stack two adapters into one; mend a combination; find weights that keep both skills |
# | **What you'll learn** | which combinations are exact sums; how a sum can lose a skill; when to combine, switch or train again |
# | **What you'll need** | [lesson 7](07_merging.ipynb); a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
from course_utils import data, evaluation, paths, plotting, runtime, sweeps, validation
from course_utils.exercises import lesson08, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Add two skills
#
# `reading` answers a question about a passage, and `extract` writes who, what and where of a sentence as JSON. (Later come
# `sailor`, which talks like a sailor, and `mood`, which says whether a guest is happy.) Change the first two prompts to your
# own, but keep the words at the beginning of the second, because `extract` was trained on prompts that begin like this.
#
# PEFT can have two adapters **active together**. Each layer then computes *Wx + s₁·B₁(A₁x) + s₂·B₂(A₂x)*: both changes are
# added. The `set_adapter` of a `PeftModel` takes one name only, so the cell calls that of `model.base_model`, which takes
# several.
#
# **Predict:** with both adapters active, will the model do both tasks, one of them, or neither?

# %%
MY_PROMPTS = [
    "Anna has the map and Peter has the tickets. Who has the tickets?",
    "Give who, what and where as JSON: Maria put the lamp in the garage.",
]
data.check_texts(MY_PROMPTS)
tasks = ("reading", "sailor", "extract", "mood")
rows = {task: data.load_task(task, "test").select(range(32)) for task in tasks}
base = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype())
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
model = PeftModel.from_pretrained(
    base.to(device), paths.adapter_path("reading"), adapter_name="reading"
).eval()
for task in tasks[1:]:
    model.load_adapter(paths.adapter_path(task), adapter_name=task)


pair = ["reading", "extract"]
prompts = [*MY_PROMPTS, *(rows[task][0]["prompt"][0]["content"] for task in pair)]
columns = {}
for active in (["reading"], ["extract"], pair):
    model.base_model.set_adapter(active)
    columns[" + ".join(active)] = evaluation.generate(model, tokenizer, prompts, max_new_tokens=48)
plotting.table(["prompt", *columns], [list(row) for row in zip(prompts, *columns.values())])

# %% [markdown]
# The model does both tasks, but worse. JSON appears where it was asked for, and an answer where a question was asked, but the tickets
# are now with Anna, and the last JSON stops in the middle. Before you look for the cause, make sure that the addition itself
# is right.
#
# ## Stack two adapters into one
#
# ![The columns of B of both adapters side by side, and the rows of A of both below each other, give one adapter of rank 16 whose product is the sum of the two changes](../images/combining.png)
#
# `add_weighted_adapter` makes a new adapter from others, with a weight for each. The `combination_type` called `cat`
# (concatenate) stacks the matrices as in the picture, so that the new product *BA* is the weighted sum of the changes.
#
# **Predict:** the two adapters have rank 8, alpha 16 and so the scaling 2. What are rank and scaling of the new one?

# %%
inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(device)
real = inputs["attention_mask"].bool()


def logits():
    """The model's logits at all tokens but the pads, (tokens, vocabulary)."""
    with torch.no_grad():
        return model(**inputs).logits[real]


def largest(one, other):
    """The largest absolute difference."""
    return (one - other).abs().max().item()


with model.disable_adapter():
    of_base = logits()
together = logits()
model.add_weighted_adapter(pair, weights=[1.0, 1.0], adapter_name="both", combination_type="cat")
print("active after the call:", model.active_adapters)
model.set_adapter("both")
layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
print(f"the new adapter has rank {layer.r['both']} and scaling {layer.scaling['both']}")
print(f"both active together move a logit by up to {largest(together, of_base):.1f};")
print(f"the new adapter differs from that by {largest(logits(), together):.0e}")

# %% [markdown]
# The rank is 16, because ranks add up. The scaling is 1, because PEFT multiplies the old scalings into the matrices. The
# new adapter is the sum, up to rounding, as the last line shows. Note the first line, too: **the new adapter is not active
# until you set it.**

# %% [markdown]
# ### Exercise: stack adapters (core, 10 min)
#
# Write `cat`. You get a list of (A, B, scaling) and a list of weights. Return one *A* and one *B* for a new adapter with
# scaling 1, so that *BA* is the sum of weight · scaling · *BA* of the parts. Ranks may differ, and weights may be below
# zero. For example, ranks 3 and 2 give an *A* with 5 rows and a *B* with 5 columns.
#
# <details><summary>Something counts twice</summary>
# A factor in <em>A</em> and again in <em>B</em> is squared in <em>BA</em>. Put it into one of them.
# </details>
# <details><summary>The check speaks of products that nobody asked for</summary>
# If you add matrices, their products mix: (B₁ + B₂)(A₁ + A₂). Stack them with <code>torch.cat</code>.
# </details>


# %% exercise="08.join" points=3
def join(adapters, weights):
    """Return (A, B) of one adapter with scaling 1; `adapters` is a list of (A, B, scaling)."""
    ### BEGIN SOLUTION
    A = torch.cat([weight * scaling * A for (A, _, scaling), weight in zip(adapters, weights)])
    B = torch.cat([B for _, B, _ in adapters], dim=1)
    return A, B
    ### END SOLUTION


lesson08.join(join)

# %%
### BEGIN HIDDEN TESTS
assert lesson08.join.outcome(join).passed
_adapters = lesson08.join_example((2, 5), (1.5, 0.25), seed=53)
_A, _B = join(_adapters, [-0.5, 2.0])
_wanted = sum(w * s * (b @ a) for (a, b, s), w in zip(_adapters, [-0.5, 2.0]))
assert torch.allclose(_B @ _A, _wanted, atol=1e-9)
### END HIDDEN TESTS

# %% [markdown]
# ## Break it: a combination that changes nothing
#
# Suppose you try another combination type, `ties`. You forget an argument, and give it at the second try. Then you set the
# new adapter, as you have learned above.
#
# **Predict:** the second call raises no error. What does the new adapter do?

# %%
try:
    model.add_weighted_adapter(pair, [1.0, 1.0], "sparse", combination_type="ties")
except TypeError as error:
    print(f"TypeError: {error} (the density was forgotten)")
model.add_weighted_adapter(pair, [1.0, 1.0], "sparse", combination_type="ties", density=0.5)
model.set_adapter("sparse")
print(f"second try: no error; logits differ from the base's by {largest(logits(), of_base)}")

# %% [markdown]
# Nothing at all: with `sparse` active the model is the base. Find out why before you read on. The check from lesson 1
# looks at all adapters in a model.

# %%
print(validation.check_adapters(model, expect_active="sparse"))

# %% [markdown]
# *B* is zero everywhere. The first call created the adapter, with *B* = 0 as at the start of a training, and failed
# afterwards. The second call found that the name exists, and **if the name exists, `add_weighted_adapter` returns without
# doing anything.** The same happens if you change the weights and call it again. So delete the old adapter first.

# %%
model.set_adapter("both")
model.delete_adapter("sparse")
model.add_weighted_adapter(pair, [1.0, 1.0], "sparse", combination_type="ties", density=0.5)
model.set_adapter("sparse")
print(f"logits differ from the base's by {largest(logits(), of_base):.1f}")
assert largest(logits(), of_base) > 1

# %% [markdown]
# Adapters with [rsLoRA](../docs/glossary.md#rslora) have one more trap, because their scaling is α/√r. PEFT 0.21 gives every
# combination alpha = r. For plain LoRA that makes the scaling 1, as it should be, but for rsLoRA it becomes √r. For example,
# a combination of rank 16 is then 4 times too strong.
#
# ### Exercise: combine without surprises (core, 15 min)
#
# Write the function that you would use at work. It gets a `PeftModel`, the names of some adapters, a weight for each, and a
# name for the new one. Afterwards the new adapter is the exact weighted sum and is active. If an adapter of that name
# exists, it is replaced. The scaling is 1 in every layer, also with rsLoRA. All other adapters are unchanged. (The function
# returns nothing, since it changes the model.)
#
# <details><summary>PEFT warns when I delete an adapter</summary>
# It is active. Set another one first.
# </details>
# <details><summary>Where is the scaling?</summary>
# In <code>layer.scaling[name]</code> of each <code>LoraLayer</code> among <code>model.modules()</code>.
# </details>


# %% exercise="08.combine" points=4
def combine(model, names, weights, new_name):
    """Make the weighted sum of some adapters, as a new adapter that is active."""
    ### BEGIN SOLUTION
    if new_name in model.peft_config:
        model.set_adapter(names[0])
        model.delete_adapter(new_name)
    model.add_weighted_adapter(names, weights, new_name, combination_type="cat")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling[new_name] = 1.0
    model.set_adapter(new_name)
    ### END SOLUTION


lesson08.combine(combine)

# %%
### BEGIN HIDDEN TESTS
assert lesson08.combine.outcome(combine).passed
_model = lesson08.combine_example(seed=5, taken=True, use_rslora=True)
combine(_model, ["two", "one"], [2.0, -1.0], "mix")
_layer = next(layer for layer in _model.modules() if isinstance(layer, LoraLayer))
_wanted = 2 * _layer.get_delta_weight("two") - _layer.get_delta_weight("one")
assert torch.allclose(_layer.get_delta_weight("mix"), _wanted, atol=1e-5)
### END HIDDEN TESTS

# %% [markdown]
# ## Score both skills
#
# Even if the changes are added exactly, a skill can get lost, so score both. The next cell combines `reading` and
# `extract` with several weights and scores 32 held-out rows of each task.
#
# **Predict:** which weights keep both skills: ½ and ½, or 1 and 1?


# %%
def score(task):
    """Share of the task's rows that the model answers exactly."""
    return evaluation.evaluate_task(model, tokenizer, task, rows[task], batch_size=64)["score"]


scores = {}
for number, weights in enumerate(((1.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.6, 0.8), (0.0, 1.0))):
    name = f"mix {number}"  # a new name each time
    model.add_weighted_adapter(pair, list(weights), name, combination_type="cat")
    model.set_adapter(name)
    scores[weights] = [score(task) for task in pair]
plotting.table(
    ["weight of reading", "weight of extract", "reading", "extract"],
    [[*weights, *(f"{value:.0%}" for value in found)] for weights, found in scores.items()],
)
evaluation.band("the weaker skill, 0.6 and 0.8", min(scores[0.6, 0.8]), 0.8, 1, quiet=True)

# %% [markdown]
# Neither does: with ½ and ½, and with 1 and 1, `reading` is good and `extract` is mostly lost. With 0.6 and 0.8 both skills
# are kept. So it depends on the weights, and you find good ones only by scoring.
#
# ## Look for the weights
#
# The figure shows three pairs. The adapter named at the right of a panel has the weight *w*, and the other one has 1 − *w*.
# Solid lines are both adapters together. Dashed lines are each adapter **alone** at that weight: where a dashed line is low,
# the adapter is simply too weak, and where only the solid line is low, the other adapter disturbs it. The scores are means
# over three draws of 48 test rows.
#
# **Predict:** for which pairs is there a weight that keeps both skills: `extract` and `mood`, `reading` and `extract`,
# `reading` and `sailor`?

# %%
shown = ("extract+mood", "reading+extract", "reading+sailor")
swept = data.load_results("dial")
title = "One pair has room for both skills, one has a narrow place, one has none"
figure, alt = sweeps.dial([row for name in shown for row in swept if row["pair"] == name], title)
plotting.show(figure, alt)

# %% tags=["claim"]
from course_utils import data
from tools.claims import fraction
from tools.claims import swept as by_setting

first_skill, second_skill, first_by_itself, second_by_itself = (
    {
        (couple, round(at, 1)): found[0]
        for (couple, at), found in by_setting("dial", column, "pair", "weight").items()
    }
    for column in ("first", "second", "first_alone", "second_alone")
)
weaker_of = {}
for couple, at in first_skill:
    weaker_of.setdefault(couple, {})[at] = min(first_skill[couple, at], second_skill[couple, at])
by_itself = {}  # {(adapter, weight): score}
for couple, at in first_skill:
    left, right_one = couple.split("+")
    by_itself[left, round(1 - at, 1)] = first_by_itself[couple, at]
    by_itself[right_one, at] = second_by_itself[couple, at]
assert by_itself["mood", 0.2] > 0.95 > 0.9 > by_itself["mood", 0.1], (
    "`mood` needs only a weight of 0.2"
)
assert by_itself["reading", 0.4] > 0.95 > 0.9 > by_itself["reading", 0.3], "`reading` 0.4"
assert by_itself["extract", 0.7] > 0.95 > by_itself["extract", 0.6], "`extract` 0.7"
assert by_itself["sailor", 0.8] > 0.95 > 0.9 > by_itself["sailor", 0.7], "`sailor` 0.8"
assert min(weaker_of["extract+mood"][at] for at in (0.3, 0.4)) > 0.9, "leave each other room"
assert 0.6 < weaker_of["reading+extract"][0.6] < 0.8, "a narrow place"
assert max(weaker_of["reading+extract"][at] for at in (0.5, 0.7)) < 0.5, "a narrow place"
assert max(weaker_of["reading+sailor"].values()) < 0.2, "have none"
assert first_by_itself["reading+sailor", 0.6] > 0.95, "alone it would keep nearly all"

# %% [markdown]
# Adapters need different weights. To score above 95% alone, `mood` needs only a weight of 0.2, `reading` 0.4, `extract` 0.7
# and `sailor` 0.8. `extract` and `mood` leave each other room: at *w* = 0.3 and 0.4 both score above 90%. `reading` and
# `extract` have a narrow place at 0.6, with at least {{weaker_of["reading+extract"][0.6]:.0%}} of both. `reading` and `sailor` have none: at *w* = 0.6 `reading` answers
# {{first_skill["reading+sailor", 0.6]:.0%}} of its questions, though alone it would keep nearly all.
#
# The two weights of this figure always add up to 1. That is a restriction, because weights such as 0.6 and 0.8 from above
# never occur.

# %% [markdown]
# ### Exercise: choose the weights (warm-up, 10 min)
#
# You get `scores`, {weight: (score of the first skill, score of the second)}, measured on validation rows, and `least`, the
# score that both skills must reach. Return the weight at which the *weaker* skill is best. If the weaker skill is equal at
# several weights, take the one where the other skill is better. If even the best one is below `least`, return `None`,
# because then you should not combine. Expected for `{0.2: (0.9, 0.1), 0.5: (0.7, 0.6)}` and 0.5: 0.5.
#
# <details><summary>My function returns None for the weight 0.0</summary>
# 0.0 counts as false. Ask <code>is None</code> instead of <code>not weight</code>.
# </details>


# %% exercise="08.choose" points=2
def choose(scores, least):
    """Return the weight whose weaker skill is best, or None if that is below `least`."""
    ### BEGIN SOLUTION
    best = max(scores, key=lambda weight: sorted(scores[weight]), default=None)
    return best if best is not None and min(scores[best]) >= least else None
    ### END SOLUTION


lesson08.choose(choose)

# %%
### BEGIN HIDDEN TESTS
assert lesson08.choose.outcome(choose).passed
assert choose({0.1: (0.9, 0.3), 0.3: (0.8, 0.65), 0.9: (0.1, 0.9)}, 0.6) == 0.3
assert choose({0.1: (0.9, 0.3), 0.3: (0.8, 0.55), 0.9: (0.1, 0.9)}, 0.6) is None
### END HIDDEN TESTS

# %% [markdown]
# ## Ask what is in the way
#
# Does `reading` suffer from what `sailor` has *learned*, or would any change of that size do the same? A control answers
# this. The solid lines of the next figure are those from above. The dashed lines are each adapter beside a **random** change
# in place of the other adapter, which has the same rank and, in every layer, the same size.
#
# **Predict:** is a random change as harmful as the other skill?

# %%
control = data.load_results("dial_control")
title = "A random change of the same size does far less harm than the other skill"
figure, alt = sweeps.dial(
    [row for name in shown for row in control if row["pair"] == name], title, "beside_random"
)
plotting.show(figure, alt)

# %% tags=["claim"]
of_control = {
    column: {
        (couple, round(at, 1)): found[0]
        for (couple, at), found in by_setting("dial_control", column, "pair", "weight").items()
    }
    for column in (
        "first",
        "second",
        "first_words",
        "second_words",
        "first_beside_random",
        "second_beside_random",
    )
}
at_06 = {column: of_control[column]["reading+sailor", 0.6] for column in of_control}
assert at_06["first_beside_random"] > at_06["first"] + 0.3, "does far less harm"
assert (
    of_control["second_beside_random"]["reading+extract", 0.5]
    > of_control["second"]["reading+extract", 0.5] + 0.2
), "does far less harm"

# %% [markdown]
# No. At *w* = 0.6 `reading` answers {{at_06["first"]:.0%}} of its questions beside `sailor`, and {{at_06["first_beside_random"]:.0%}} beside a random change of the same size, about
# as many as alone. A random change does far less harm than `reading` to `extract`, too: at 0.5 `extract` scores {{of_control["second_beside_random"]["reading+extract", 0.5]:.0%}} instead of {{of_control["second"]["reading+extract", 0.5]:.0%}}.
# So the harm comes from what the other adapter has learned, and not from the size of its change.
#
# ## Give partial credit
#
# [Exact match](../docs/glossary.md#exact-match) counts a reply as wrong if a single word differs. So a skill that is only
# changed can look lost. Listen to `reading` and `sailor` at *w* = 0.6.

# %%
model.add_weighted_adapter(["reading", "sailor"], [0.4, 0.6], "blend", combination_type="cat")
model.set_adapter("blend")
heard = []
for task in ("reading", "sailor"):
    few = rows[task].select(range(4))
    replies = evaluation.generate(model, tokenizer, list(few["prompt"]), max_new_tokens=40)
    heard += [[task, row["completion"][0]["content"], reply] for row, reply in zip(few, replies)]
plotting.table(["task", "right answer", "reply of the blend"], heard)

# %% [markdown]
# The skills blend. Some answers to questions hold the right fact in a sailor's words, and some sailor's sentences keep a
# plain word or lack the "aye". Exact match counts all of these as wrong. A metric with partial credit shows how much is
# left, for example the [F1](../docs/glossary.md#f1) of words: how many words do reply and right answer share?
#
# **Predict:** how will the curves of exact match and of word F1 differ?

# %%
of_blend = [row for row in control if row["pair"] == "reading+sailor"]
lines = {
    "reading, exact": sweeps.over_seeds(of_blend, "first", "weight"),
    "reading, word F1": sweeps.over_seeds(of_blend, "first_words", "weight"),
    "sailor, exact": sweeps.over_seeds(of_blend, "second", "weight"),
    "sailor, word F1": sweeps.over_seeds(of_blend, "second_words", "weight"),
}
title = "Word F1 of the sailor rises before whole sentences are exact"
figure, alt = sweeps.curves(lines, title, "w: weight of sailor", "score, from 0 to 1")
plotting.show(figure, alt)

# %% tags=["claim"]
assert at_06["second"] < 0.1 and at_06["second_words"] > 0.4, "hardly one sentence"
assert of_control["second_words"]["reading+sailor", 0.1] < 0.1, "not high by itself"
assert at_06["first_words"] > at_06["first"] + 0.05, "Part of the answers"

# %% [markdown]
# For `sailor` exact match jumps and word F1 rises slowly. At *w* = 0.6 hardly one sentence of `sailor` is exact ({{at_06["second"]:.0%}}), while word F1 is {{at_06["second_words"]:.0%}}: most
# of the accent is there before a whole sentence is right. (Word F1 is not high by itself: at *w* = 0.1 it is {{of_control["second_words"]["reading+sailor", 0.1]:.0%}}.) Part of the answers
# of `reading` that exact match counts as wrong share words with the right ones, so its F1 is {{at_06["first_words"]:.0%}} where {{at_06["first"]:.0%}} are exact. The rest is lost. **A
# score of 0% by exact match doesn't say that a skill is gone: read the replies.**
#
# ## Compare the other ways to combine
#
# PEFT 0.21 has eleven combination types. `cat` gives the exact sum, and `svd` its best approximation at a smaller rank.
# The others deliberately change the sum. TIES drops small numbers, and where the signs of the adapters differ it keeps the
# stronger side ([Yadav et al. 2023](https://arxiv.org/abs/2306.01708)). DARE drops numbers at random and scales up the rest
# ([Yu et al. 2023](https://arxiv.org/abs/2311.03099)). `magnitude_prune` drops the small numbers.
#
# Types with `svd` in the name work on the changes *BA*. The others except `cat` work on *A* and *B* separately, and that
# has a side effect, which `linear` shows best. It adds up the matrices *A* and adds up the matrices *B*, each times the
# root of *c* = weight · scaling. The product contains more than the sum:
#
# > *(√c₁·B₁ + √c₂·B₂)(√c₁·A₁ + √c₂·A₂) = c₁·B₁A₁ + c₂·B₂A₂ + √(c₁c₂)·(B₁A₂ + B₂A₁)*
#
# The last two products are [cross terms](../docs/glossary.md#cross-terms). They read the input of one skill and write the
# output of the other.
#
# **Predict:** how large are the cross terms, compared with the wanted sum: 1%, 10%, or more than half of it?

# %%
model.add_weighted_adapter(pair, [0.5, 0.5], "linear", combination_type="linear")
(A1, B1, c1), (A2, B2, c2) = (
    (layer.lora_A[name].weight, layer.lora_B[name].weight, 0.5 * layer.scaling[name])
    for name in pair
)
wanted = c1 * B1 @ A1 + c2 * B2 @ A2
cross = (c1 * c2) ** 0.5 * (B1 @ A2 + B2 @ A1)
found = layer.get_delta_weight("linear")
print(f"linear against sum + cross terms: {largest(found, wanted + cross):.0e}")
print(f"in the first layer, the cross terms are {cross.norm() / wanted.norm():.0%} of the sum")

# %% [markdown]
# More than half, so for two adapters `linear` is far from their sum. What does that do to the skills? The figure shows every
# type on six pairs and on all four adapters together. Each number is the score of the weakest skill. All adapters have equal
# weights, either 1 or 1 divided by their number, and the better choice is shown. Types that drop numbers keep half of them.

# %%
combined = data.load_results("combine")
for row in combined:  # the skill that is kept least
    row["weakest"] = min(row[task] for task in row["adapters"].split("+"))
groups = sweeps.over_seeds(combined, "weakest", "combination", "adapters", "weights")
kinds, sets = (
    list(dict.fromkeys(row[key] for row in combined)) for key in ("combination", "adapters")
)
matrix = [
    [max(groups[kind, names, way][0] for way in ("sum", "mean")) for names in sets]
    for kind in kinds
]
labels = [names.replace("+", "\n") if names.count("+") < 2 else "all\nfour" for names in sets]
title = "With equal weights, no type keeps every pair of skills"
figure = plotting.score_matrix(matrix, kinds, labels, title)
best_of = [f"{names} {max(column):.0%}" for names, column in zip(sets, zip(*matrix))]
plotting.show(
    figure,
    f"{title}. Score of the weakest skill by combination type and set, mean of three seeds."
    f" The best type of each set: {', '.join(best_of)}.",
)

# %% tags=["claim"]
of_types = {}  # {(adapters, weights, type): [score of the weakest skill, by seed]}
for line in data.load_results("combine"):
    lost_most = min(line[task] for task in line["adapters"].split("+"))
    of_types.setdefault((line["adapters"], line["weights"], line["combination"]), []).append(
        lost_most
    )
kept = {key: sum(by_seed) / len(by_seed) for key, by_seed in of_types.items()}
all_sets = list(dict.fromkeys(couple for couple, _, _ in kept))
best_kept = {
    couple: max(value for (these, _, _), value in kept.items() if these == couple)
    for couple in all_sets
}
assert [couple for couple in all_sets if best_kept[couple] >= 0.8] == [
    "reading+mood",
    "extract+mood",
], "two of the seven sets"
assert len(all_sets) == 7, "two of the seven sets"
assert kept["reading+extract", "sum", "cat"] < kept["reading+extract", "sum", "ties_svd"], (
    "keeps more than the exact sum"
)
assert kept["extract+mood", "sum", "cat"] < kept["extract+mood", "sum", "ties_svd"], (
    "keeps more than the exact sum"
)
of_half = {kind: kept["extract+mood", "mean", kind] for kind in ("cat", "linear", "ties_svd")}
assert of_half["cat"] > of_half["ties_svd"] + 0.05, "it is the other way round"
assert of_half["linear"] > of_half["cat"] + 0.05, "keeps more than both"
at_best = [(max(weaker_of[couple].values()), best_kept[couple]) for couple in weaker_of]
assert all(moved > changed - 0.05 for moved, changed in at_best), "as much to change the weights"
assert sum(moved > changed for moved, changed in at_best) > len(at_best) / 2, "mostly more"
assert best_kept["sailor+mood"] < 0.3, "looks hopeless"
for_mood = fraction(weaker_of["sailor+mood"][0.2])

# %% [markdown]
# Only in two of the seven sets does every skill keep at least four fifths, and only with the right type and weights. With
# weights of 1, `ties_svd` keeps more than the exact sum does in several sets. With weights of ½ for `extract` and `mood`
# it is the other way round, and `linear`, with all its cross terms, keeps more than both. (The figure shows only the
# better choice of weights.) So a type that is closer to the sum is not always better, and no type is best everywhere.
#
# You can also keep the plain sum and change its weights. In these tries it helped at least as much to change the weights as to
# change the type, and mostly more. For example, the pair `sailor` and `mood` looks hopeless here ({{best_kept["sailor+mood"]:.0%}} at best), while the plain sum with
# weights of 0.8 and 0.2 keeps {{for_mood}} of both. (Both choices were made on the rows that they are scored on, which
# flatters both. At work, choose on validation rows.)
#
# In two more cases even `cat` doesn't give the sum. [DoRA](../docs/glossary.md#dora) also rescales the rows of a weight, and
# rescalings don't add up. And an OLoRA adapter that is named first changes the base itself ([lesson 6](06_olora.ipynb)).
#
# ## Train on both tasks
#
# If no weights keep both skills, is one adapter too small for both, or is adding the problem? As a control, one adapter of
# rank 8 is trained on the rows of both tasks. It gets 120 steps as in the sweeps of lesson 3, so each task gets half of the
# rows that an adapter for one task would see.
#
# **Predict:** how good does it get at `reading` and `sailor`, the pair that no weights keep?

# %%
trained = data.load_results("both_tasks")
of_trained = {column: sweeps.over_seeds(trained, column, "pair") for column in ("first", "second")}
comparison = []
for names in of_trained["first"]:
    of_pair = [row for row in swept if row["pair"] == names]
    on_dial = [sweeps.over_seeds(of_pair, column, "weight") for column in ("first", "second")]
    w = max(on_dial[0], key=lambda w: min(on_dial[0][w][0], on_dial[1][w][0]))
    comparison.append(
        [
            names.replace("+", ", "),
            ", ".join(f"{part[w][0]:.0%}" for part in on_dial) + f" (w = {w:g})",
            ", ".join(sweeps.spread(of_trained[column][names]) for column in ("first", "second")),
        ]
    )
plotting.table(["scores of", "two adapters, best sum", "one adapter, trained on both"], comparison)

# %% tags=["claim"]
by_training = {  # the weaker skill in the worst seed
    couple: min(
        by_setting("both_tasks", column, "pair")[couple][1] for column in ("first", "second")
    )
    for couple in ("reading+sailor", "reading+extract")
}
assert by_training["reading+sailor"] > max(weaker_of["reading+sailor"].values()) + 0.3, (
    "far more than any weights keep"
)

# %% [markdown]
# In all three seeds the trained adapter reaches at least {{by_training["reading+sailor"]:.0%}} in both, which is far more than any weights keep, and {{by_training["reading+extract"]:.0%}} with `reading` and
# `extract`. So one adapter of rank 8 has room for both skills, and adding is the problem. If you have the rows of both tasks,
# train on both. If you don't, keep two adapters and switch between them. (The learning rate is the one that lesson 3 found for
# this small model; real models need far lower ones, 1e-4 to 2e-4.)
#
# ## Recap
#
# The sum of two adapters has both skills if each one is strong enough at its weight and the other one doesn't disturb it. You
# can't see that in the matrices, so score both skills at several weights, on validation rows. Here the weights mattered at
# least as much as the combination type, so you can start with `cat`, the exact sum. The harm comes from what the other adapter
# has learned, because a random change of the same size does far less harm. Before you call a skill lost, read its replies. If no
# weights keep both skills, train one adapter on both tasks, or keep two and switch between them.

# %%
plotting.table(
    ["", "measured"],
    [
        [
            "reading and extract, weights ½ and ½",
            ", ".join(f"{value:.0%}" for value in scores[0.5, 0.5]),
        ],
        [
            "reading and extract, weights 0.6 and 0.8",
            ", ".join(f"{value:.0%}" for value in scores[0.6, 0.8]),
        ],
        ["cross terms of `linear`, beside the sum", f"{cross.norm() / wanted.norm():.0%}"],
        *(
            [f"{names}: best sum; trained on both", f"{summed}; {both}"]
            for names, summed, both in comparison
        ),
    ],
)
progress("08")

# %% [markdown]
# ## Take it to work
#
# Put your adapters here, and their base unless it is the course's. The cell combines them with equal weights, and reports what
# is loaded, what is active and whether anything has no effect. Then score each of your tasks.

# %%
my_base, my_adapters = "", {}  # {name: folder}
if my_adapters:
    folders = {name: paths.own_folder(folder) for name, folder in my_adapters.items()}
    first, *others = folders
    mine = AutoModelForCausalLM.from_pretrained(paths.own_folder(my_base or paths.base_model()))
    mine = PeftModel.from_pretrained(mine, folders[first], adapter_name=first)
    for name in others:
        mine.load_adapter(folders[name], adapter_name=name)
    equal = [1 / len(my_adapters)] * len(my_adapters)
    mine.add_weighted_adapter(list(my_adapters), equal, "combined", combination_type="cat")
    mine.set_adapter("combined")
    print(validation.check_adapters(mine, expect_active="combined"))
else:
    model.set_adapter("blend")
    print(validation.check_adapters(model, expect_active="blend"))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · You change the weights and call <code>add_weighted_adapter</code> again. Nothing changes. Why?</summary>
# The name exists already, so the call returned without doing anything. Delete the adapter first, or take a new name. Then set
# the new adapter, because it is not active by itself.
# </details>
# <details><summary>2 · You combine two rsLoRA adapters of rank 8 with <code>cat</code>. How strong is the result?</summary>
# Four times too strong. The new rank is 16, PEFT sets alpha to 16, and the scaling of rsLoRA is alpha/√r = 4 where 1 is right.
# Set <code>lora_alpha</code> to 4.
# </details>
# <details><summary>3 · After combining, skill A scores 0%. What do you find out before you give up?</summary>
# You find out whether it is too weak at this weight or disturbed by the other adapter: score it alone at the same weight. And
# you find out whether it is gone or only changed: read replies, or score with partial credit.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [Editing Models with Task Arithmetic](https://arxiv.org/abs/2212.04089), Ilharco et al. 2022: adding and subtracting
#   changes
# - [PEFT: model merging](https://huggingface.co/docs/peft/main/en/developer_guides/model_merging), and [PEFT welcomes new
#   merging methods](https://huggingface.co/blog/peft_merging), Hugging Face 2024
# - [Symptom, cause, check](../docs/symptoms.md#merge-and-combine), and [Decide](../docs/decide.md)
#
# Next: [lesson 9](09_preference.ipynb) trains on preferences.
