# %% [markdown]
# # See why a low rank can be enough
#
# LoRA assumes that a model can learn a task with a change of low rank. **Is the change that training makes really of low
# rank, or does LoRA work for another reason?** In this deep dive you train all weights of a model, take the change
# apart, and measure how much of the change a few directions hold, and how much of the skill.
#
# | | |
# |---|---|
# | **What you'll do** | train all weights for two tasks; look at the singular values of the change; cut it to rank *r* and score what is left; compare the directions that two ranks find |
# | **What you'll learn** | what a singular value decomposition says about a change; why a few strong directions need not hold the skill; how cutting to a rank differs from training with it |
# | **What you'll need** | [lesson 2](02_lora_from_scratch.ipynb); matrix products; a laptop, no GPU, no network. No other lesson needs this one |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
from collections import defaultdict

from course_utils import data, evaluation, paths, plotting, runtime, sweeps
from course_utils.exercises import deep_low_rank, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from course_utils.progress import ProgressLine

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Train all weights
#
# You need a change that nothing forces to be of low rank. So the next cells train **all** weights, once for `reading` (answer a
# question about a passage) and once for `sailor` (say a sentence in a sailor's speech). Both runs use the same settings, so
# that differences come from the task. The learning rate of 2.5e-3 suits this model of 3.9 million parameters; full fine-tuning
# of models with billions of parameters takes about 1e-5.

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()).to(
        device
    )


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
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: torch.tensor(
            [row[key] + [fill] * (longest - len(row[key])) for row in rows], device=device
        )
        for key, fill in filled.items()
    }


def train(model, examples, steps, learning_rate, batch_size):
    """A bare loop, as in lesson 2: a short warm-up, then a falling rate. Returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(1)
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


# %%
base_model = load_base()  # stays as it is, to compare with
examples, full_models = {}, {}
for task in ("reading", "sailor"):
    examples[task] = [encode(row) for row in data.load_task(task, "train").select(range(2000))]
    full_models[task] = load_base()
    losses = train(full_models[task], examples[task], 75, learning_rate=2.5e-3, batch_size=20)
    print(f"{task}: loss {losses[0]:.2f} -> {sum(losses[-5:]) / 5:.3f}")

# %% [markdown]
# ## Take the change apart
#
# Every linear layer now has a change *ΔW*, its weights after training minus those before. A [singular value
# decomposition](../docs/glossary.md#singular-value-decomposition) writes it as a sum of **directions**, the strongest first:
# *ΔW* = *s₁u₁v₁ᵀ* + *s₂u₂v₂ᵀ* + … In each direction, a column *u* and a row *vᵀ* of length 1 are multiplied, and the singular
# value *s* is its strength. For example, the matrix with the rows (1, 2), (2, 4) and (3, 6) has one direction, because each row is
# a multiple of (1, 2). The rank of a matrix is the number of its strengths above zero.
#
# The squared strengths add up to the squared size of the change, ‖*ΔW*‖², which is the sum of its squared entries. So you can
# measure, for example, which share of it the first eight directions hold.

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
    """Share of the squared change that the first r directions hold."""
    return (S[:r].square().sum() / S.square().sum()).item()


rows = []
for kind, names in kinds.items():
    row = [kind, " × ".join(map(str, before[names[0]].shape))]
    for task in changes:
        size = sum((changes[task][name].norm() / before[name].norm()).item() for name in names)
        in_8 = sum(share(strengths[task][name], 8) for name in names)
        row += [f"{size / len(names):.1%}", f"{in_8 / len(names):.0%}"]
    rows.append(row)
columns = [
    f"{task}: {what}" for task in changes for what in ("‖ΔW‖/‖W‖", "of ‖ΔW‖² in 8 directions")
]
plotting.table(["layer", "shape", *columns], rows)

# %% [markdown]
# Every kind of layer changes by a few percent of its size, and eight of its 256 directions hold a large part of that change. The
# next figure shows the strengths of all directions in each layer. Such a list of strengths is called a spectrum.
#
# **Predict:** will the strengths fall evenly from the first direction to the last, as those of random numbers do, or steeply at
# first? Will the two tasks differ?

# %%
panels = {
    kind: {task: [strengths[task][name] for name in names] for task in changes}
    for kind, names in kinds.items()
}
shapes = sorted({tuple(sorted(weight.shape, reverse=True)) for weight in before.values()})
noise = {f"{n} × {m}": [torch.linalg.svdvals(torch.randn(n, m))] for n, m in shapes}
half = {
    name: max(int((S > S[0] / 2).sum()) for S in values)
    for name, values in {
        **{task: parts.values() for task, parts in strengths.items()},
        "noise": [S for values in noise.values() for S in values],
    }.items()
}
title = (
    "Directions more than half as strong as the first, at most in a layer:"
    f"\n{half['reading']} for reading, {half['sailor']} for sailor,"
    f" {half['noise']} for random numbers"
)
figure, alt = plotting.spectra({**panels, "random numbers": noise}, title)
plotting.show(figure, alt)

# %% [markdown]
# The strengths fall steeply for both tasks: in a trained layer, few directions are more than half as strong as the first, and among random
# numbers many are. The tasks differ most in `down_proj`, where some lines of `sailor` fall more slowly. If a few directions hold
# so much of the change, can you drop the rest?
#
# ### Exercise: keep r directions (core, 10 min)
#
# Write the function that cuts a matrix to rank *r*. The closest matrix of that rank is the one with the *r*
# strongest directions (Eckart and Young 1936). Expected for a 9 × 14 matrix: a 9 × 14 matrix again, of rank *r*.
#
# <details><summary>I get a shape error</summary>
# <code>torch.linalg.svd(matrix, full_matrices=False)</code> gives <em>U</em> (rows, k), <em>S</em> (k) and
# <em>Vh</em> (k, columns). <em>Vh</em> is transposed already: its rows are the directions.
# </details>
# <details><summary>The rank is right, but there is a closer matrix</summary>
# Keep directions, not rows of the matrix, and give each its strength: <code>U[:, :rank] * S[:rank]</code>.
# </details>


# %% exercise="deep.truncate" points=3
def truncate(matrix, rank):
    """Return the matrix of this rank that is closest to `matrix`, in the same shape."""
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]
    ### END SOLUTION


deep_low_rank.truncate(truncate)

# %%
### BEGIN HIDDEN TESTS
assert deep_low_rank.truncate.outcome(truncate).passed
_matrix = torch.randn(20, 11, dtype=torch.float64)
_S = torch.linalg.svdvals(_matrix)
assert torch.linalg.matrix_rank(truncate(_matrix, 4)) == 4
assert abs((truncate(_matrix, 4) - _matrix).norm() - _S[4:].norm()) < 1e-9
### END HIDDEN TESTS

# %% [markdown]
# ## Cut it, and score what is left
#
# A steep spectrum says something about numbers, but not yet about a skill. So the next cell takes the base model, adds the
# first *r* directions of each layer's change, and scores the result on [held-out](../docs/glossary.md#held-out) rows. Embeddings
# and norms keep the base model's values, because LoRA would not train them either. Your `truncate` does the cutting as soon as
# it passes its check.
#
# **Predict:** the cell keeps 1, 8, 64 and all 256 directions of each layer. For each task, which of these numbers is the first
# that scores about as well as all 256?

# %%
cut = truncate if deep_low_rank.truncate.outcome(truncate).passed else deep_low_rank.closest
ranks = (1, 8, 64, 256)
held_out = {task: data.load_task(task, "test").select(range(64)) for task in changes}


def score(model, task):
    """Share of held-out rows that the model answers exactly."""
    return evaluation.evaluate_task(model, tokenizer, task, held_out[task], batch_size=64)["score"]


line, scores = ProgressLine(len(changes) * len(ranks), "score"), {}
for task in changes:
    for r in ranks:
        cut_model = copy.deepcopy(base_model)
        with torch.no_grad():
            for name, change in changes[task].items():
                cut_model.get_submodule(name).weight += torch.as_tensor(cut(change, r))
        scores[task, r] = score(cut_model, task)
        line.update(len(scores), f"{task}, r = {r}: {scores[task, r]:.0%}")
rows = []
for r in ranks:
    row = [r]
    for task, parts in strengths.items():
        of_change = sum(share(S, r) for S in parts.values()) / len(parts)
        row += [f"{of_change:.0%}", f"{scores[task, r]:.0%}"]
    rows.append(row)
columns = [f"{task}: {what}" for task in changes for what in ("of ‖ΔW‖²", "right of 64 rows")]
plotting.table(["directions kept", *columns], rows)
for task, r, low, high in (("reading", 1, 0.8, 1), ("sailor", 8, 0, 0.5), ("sailor", 64, 0.7, 1)):
    name = f"{task} with {r} of its directions"
    evaluation.band(name, scores[task, r], low, high, quiet=True)

# %% [markdown]
# For `reading` one direction is enough. For `sailor` even eight bring little, and only 64 come near the score of all 256. One run
# may be luck, so a [sweep](../docs/glossary.md#sweep), `cut_to_rank`, repeated this beforehand with three seeds, more ranks,
# more rows and more steps. In the figure, each line is a mean over the seeds, and the band around it goes from the lowest to the
# highest.

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
from tools.claims import swept as swept_by

right, in_kept = (
    swept_by("cut_to_rank", column, "task", "method", "rank") for column in ("test", "kept")
)
one, eight = right["reading", "full", 1][0], right["sailor", "full", 8][0]
in_eight = [in_kept[task, "full", 8][0] for task in ("reading", "sailor")]
assert min(in_eight) > 0.5 and max(in_eight) - min(in_eight) < 0.03, "nearly the same"
assert one > 0.9 and right["sailor", "full", 1] == (0, 0, 0), "far apart"
assert right["reading", "full", 0] == (0, 0, 0), "answers none"
every = right["sailor", "full", 256][0]
assert right["sailor", "full", 32][2] < 0.9 * every, "64 are needed"
assert 0.95 * every < right["sailor", "full", 64][0] < every, "64 are needed to come near"
# The same rows, steps and rate, but the trained model as it is.
untouched = swept_by("learning_rate", "test", "method", "learning_rate")["full", 1.5e-3][0]
assert every + 0.05 < untouched, "part of the skill is lost with them"

# %% [markdown]
# The shares of the change are nearly the same for both tasks, but the scores are far apart. With a single direction in each
# layer, the model answers {{one:.0%}} of the questions of `reading`, of which the base alone answers none. That suggests that the
# base model could already do what reading takes, and had to learn only when to do it. For `sailor`, eight directions bring
# {{eight:.0%}}, and 64 are needed to come near the {{every:.0%}} of all 256, so its faint directions matter. (The trained model
# itself gets {{untouched:.1%}} of `sailor` right. It has its own embeddings and norms, and part of the skill is lost with
# them.) **A share of the change is not a share of the skill.**
#
# ## Train with a low rank from the start
#
# If eight directions of the change are not enough for `sailor`, can LoRA of rank 8 learn it? The next table compares the two,
# on the same rows and with the same number of steps.
#
# **Predict:** for `sailor`, what will LoRA of rank 8 get: about the {{eight:.0%}} of the change that was cut to rank 8, nearly the
# {{every:.0%}} of all directions, or something halfway?

# %%
rows = [["all weights, nothing cut", ("full", 256)]]
for r in (8, 1):
    rows += [[f"all weights, cut to rank {r}", ("full", r)], [f"LoRA of rank {r}", ("lora", r)]]
plotting.table(
    ["right on test rows, mean (lowest to highest of three seeds)", *changes],
    [[label, *(sweeps.spread(right_on[task, *way]) for task in changes)] for label, way in rows],
)

# %% tags=["claim"]
rank_1, rank_8 = (right["sailor", "lora", rank] for rank in (1, 8))
assert rank_1[1] > 0.8 and rank_1[2] > rank_8[1], "even rank 1"
assert swept_by("recall", "told", "rank")[1][1] > 0.95, "rank 1 holds nearly all of 100"

# %% [markdown]
# LoRA of rank 8 is nearly as good as all directions: it gets {{rank_8[0]:.0%}} of `sailor` right, where the cut change gets
# {{eight:.0%}}, and even rank 1 gets {{rank_1[0]:.0%}}. Nothing in full fine-tuning asks for few directions, so it spreads its
# change over many. LoRA doesn't have to reproduce *that* change. It only needs *some* change of low rank that does the task, and
# training looks for one. [Lesson 3](03_lora_finetuning.ipynb) goes further and teaches separate facts: rank 1 holds nearly all
# of 100.
#
# ## Do two ranks find the same directions?
#
# If a task needs few directions, then LoRA of rank 8 and of rank 64 should find the same ones first. The
# LoRA paper (section 7.2, equation 4) compares two trained matrices *A*: the first *i* directions *v* of one, as the columns of
# *Vᵢ*, with the first *j* of the other.
#
# > *φ(i, j) = ‖VᵢᵀVⱼ‖² / min(i, j)*
#
# This similarity is 1 if the *i* directions lie within the space of the *j* (or the other way round), and 0 if every direction
# of one is at right angles to every direction of the other.
#
# **Predict:** what is *φ(1, 8)* for random directions, in a space of 256 dimensions: 0, 3% or 50%?


# %%
def directions(A):
    """The right singular vectors of A (r, inputs) as rows, the strongest first."""
    return torch.linalg.svd(A.detach().float(), full_matrices=False).Vh


def similarity(V, other_V, i, j):
    """phi(i, j) of the LoRA paper, equation 4; both given by `directions`."""
    return ((V[:i] @ other_V[:j].T).square().sum() / min(i, j)).item()


def directions_of_rank(rank):
    """{layer: directions of A} before and after twenty steps of LoRA."""
    runtime.seed_everything(rank)  # another random A for each rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(load_base(), config)
    adapted = model.get_base_model()
    A = {name: adapted.get_submodule(name).lora_A["default"].weight for name in before}
    start = {name: directions(matrix) for name, matrix in A.items()}
    train(model, examples["sailor"], 20, learning_rate=5e-3, batch_size=32)
    return start, {name: directions(matrix) for name, matrix in A.items()}


def mean_similarity(first, second, i, j):
    return sum(similarity(first[name], second[name], i, j) for name in first) / len(first)


start_8, rank_8 = directions_of_rank(8)
start_64, rank_64 = directions_of_rank(64)

# %%
j_values = (1, 2, 4, 8, 16, 32, 64)
phi = {
    f"{label}, i = {i}": [mean_similarity(first, second, i, j) for j in j_values]
    for i in (1, 8)
    for label, first, second in (("trained", rank_8, rank_64), ("untrained", start_8, start_64))
}
inside, by_chance = (phi[f"{label}, i = 1"][3] for label in ("trained", "untrained"))
title = (
    f"The first of 8 directions lies {inside:.0%} in the first 8 of 64; by chance {by_chance:.0%}"
)
columns = [f"j = {j}" for j in j_values]
figure = plotting.score_matrix(list(phi.values()), list(phi), columns, title)
figure.supylabel("of rank 8")
figure.supxlabel("of rank 64")
series = {label: (j_values, values) for label, values in phi.items()}
plotting.show(figure, plotting.describe(series, title, "j", "similarity"))
of_start = mean_similarity(rank_8, start_8, 8, 8)
print(f"All 8 directions lie {of_start:.0%} in those that A of rank 8 started from.")

# %% [markdown]
# For random directions *φ(1, 8)* is about 3%: in *d* dimensions, *φ(i, j)* is max(*i*, *j*)/*d* on average, here 8/256. The rows
# of untrained matrices agree with this. Always compare with chance before you call two sets of directions alike. The strongest
# trained direction (*i* = 1) is far above chance everywhere. All eight together (*i* = 8) are far above it only for small *j*.
#
# The paper finds more: over 50% for the top direction in a layer of GPT-3, after a whole training (figure 3). The line below
# the figure says why we find less: the directions of *A* still lie mostly in those of its random start, because twenty steps
# have hardly turned it. So for the most part, this grid compares two random starts.
#
# ## Recap
#
# The change of full fine-tuning is only roughly of low rank: a few directions are strong, but faint ones can carry the skill,
# and how many are needed depends on the task. LoRA works for another reason. It doesn't need *that* change to be of low rank.
# It is enough that *some* change of low rank does the task, and for a task such as `sailor` training finds one even at rank 1.
# To judge whether two ranks find the same directions, compare with chance.

# %%
plotting.table(
    ["", "measured"],
    [
        [
            f"{task}, right with 1, 8, 64 and all directions",
            ", ".join(f"{scores[task, r]:.0%}" for r in ranks),
        ]
        for task in changes
    ]
    + [
        [
            "sailor, three seeds: cut to rank 8, trained with rank 8",
            ", ".join(sweeps.spread(right_on["sailor", method, 8]) for method in ("full", "lora")),
        ],
        [
            "top direction of rank 8 in the first 8 of rank 64",
            f"{inside:.0%}, by chance {by_chance:.0%}",
        ],
    ],
)
progress("deep.truncate")

# %% [markdown]
# ## Take it to work
#
# Put the folder of an adapter of your own in the place of `None`. The cell shows how many directions its changes use. If these
# are few, a lower rank is worth a try. Only training with it can tell whether it does as well.

# %%
my_adapter = None
tensors = peft.utils.load_peft_weights(
    str(my_adapter or paths.adapter_path("sailor")), device="cpu"
)
used, largest = [], 0
for name, A in tensors.items():
    if ".lora_A." in name:
        B = tensors[name.replace(".lora_A.", ".lora_B.")]
        S = torch.linalg.svdvals(B.float() @ A.float())
        shares = S.square().cumsum(0) / S.square().sum()
        used.append(int((shares < 0.9).sum()) + 1)
        largest = max(largest, len(A))
print(
    f"rank {largest}: 90% of a layer's squared change lie in {min(used)} to {max(used)} directions"
)

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · Eight directions hold 57% of a change. What does that say about the score with these eight?</summary>
# Nothing by itself. Here the same share went with nearly all of <code>reading</code> and a small part of <code>sailor</code>.
# You have to score it.
# </details>
# <details><summary>2 · A change from full fine-tuning keeps its skill only with 64 directions. Must LoRA have rank 64, too?</summary>
# No. Full fine-tuning spreads its change because nothing stops it. LoRA looks for another change, one of low rank, and
# may find one that does as well.
# </details>
# <details><summary>3 · You compare 64 directions of each of two adapters, in 256 dimensions, and find φ(64, 64) = 20%. Are they alike?</summary>
# No. Random directions would have 64/256, which is 25%.
# </details>
#
# ## Where to read on
#
# - [LoRA](https://arxiv.org/abs/2106.09685), Hu et al. 2021: section 7 on rank and subspaces
# - [Intrinsic Dimensionality Explains the Effectiveness of Language Model
#   Fine-Tuning](https://arxiv.org/abs/2012.13255), Aghajanyan et al. 2020: the idea before LoRA
# - [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/), on what a low rank can and can't hold
#
# Back to the road: [lesson 3](03_lora_finetuning.ipynb) fine-tunes with LoRA, [lesson 4](04_configuration.ipynb) chooses a
# rank.
