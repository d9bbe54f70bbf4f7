# %% [markdown]
# # Fine-tune a model in four bits
#
# LoRA trains few numbers, but the frozen base still fills the memory. QLoRA
# ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)) stores that base in 4 bits, where a weight can take only one
# of sixteen values. **How can a model survive that, what do you save, and what do you pay?** The 4 bits here are real: bitsandbytes
# runs on a CPU, too.
#
# | | |
# |---|---|
# | **What you'll do** | plan within a memory budget; build the type NF4; train on a base in 4 bits; merge; mend a colleague's merge |
# | **What you'll learn** | what QLoRA saves and what not; which claims about it hold; into which weights to merge |
# | **What you'll need** | [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import math
import warnings

from adapter_checks import memory
from adapter_checks.bitsandbytes_workarounds import quiet_int8, stop_repacking
from adapter_checks.model_folder import load_config
from adapter_checks.saving import saving
from course_utils import data, evaluation, paths, plotting, runtime, validation
from course_utils.exercises import lesson05, progress
from course_utils.sweeps import over_seeds, spread

runtime.quiet_imports()

import bitsandbytes
import peft
import torch
import transformers
import trl
from bitsandbytes import functional
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from course_utils.progress import Progress

runtime.seed_everything(0)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · trl {trl.__version__}"
    f" · bitsandbytes {bitsandbytes.__version__} · on {device}"
)

# %% [markdown]
# ## See what is stored and what is trained
#
# ![One layer in QLoRA. W is stored in 4 bits and frozen. For each pass it is read back in 16 bits, used and dropped. A and B are kept in 16 or 32 bits and trained. Gradients pass through W and do not change it](../images/qlora.png)
#
# The picture shows one linear layer. Its weights *W* are [quantised](../docs/glossary.md#quantise): stored as 4-bit numbers.
# Whenever the layer runs, bitsandbytes [dequantises](../docs/glossary.md#dequantise) *W*: it reads the numbers
# back in 16 or 32 bits, multiplies with them, and drops them. Since training never changes *W*, it can be stored coarsely. *A* and
# *B* change in many small steps, so they stay in 16 or 32 bits.
#
# `estimate_memory` computes from the configuration alone what training holds: weights, gradients, optimizer state, and
# [activations](../docs/glossary.md#activations), which the forward pass keeps for the backward pass. The next cell asks it
# for a Llama of 8 billion parameters, with one row of 512 tokens a step and [activation
# checkpointing](../docs/glossary.md#activation-checkpointing).
#
# **Predict:** which of these four parts are smaller with QLoRA than with LoRA?


# %%
def llama(width, inner, layers, heads, groups, words=32000):
    """The configuration of a Llama of this shape; no weights."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=words,
        tie_word_embeddings=False,
    )


def estimate(config, method, lora, length=512, checkpointing=True, **options):
    """What training with one row of this many tokens holds, for a model in bfloat16."""
    return memory.estimate_memory(
        config,
        method,
        lora,
        batch_size=1,
        sequence_length=length,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
        **options,
    )


ways = {
    "all weights": ("full", {"moment_dtype": torch.float32}),
    "LoRA": ("lora", {}),
    "QLoRA": ("qlora", {"double_quantization": True}),
}
rank_16 = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
shape_8b = llama(4096, 14336, 32, 32, 8, 128256)
parts = {}
for way, (method, options) in ways.items():
    sizes = estimate(shape_8b, method, rank_16, **options).sizes()
    parts[way] = {part: size / 1e9 for part, size in sizes.items() if part != "total"}
title = "LoRA saves gradients and optimizer state, QLoRA the weights"
plotting.show(*plotting.stacked_bars(parts, title, "memory for training 8 billion parameters, GB"))

# %% tags=["claim"]
import peft
import torch
import transformers

import adapter_checks.memory
from tools.claims import fraction, swept


def _llama(width, inner, layers, heads, groups, words=32000):
    return transformers.AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=words,
        tie_word_embeddings=False,
    )


def _estimate(config, method, length=512, checkpointing=True, rank=16, targets="all-linear"):
    return adapter_checks.memory.estimate_memory(
        config,
        method,
        peft.LoraConfig(r=rank, target_modules=targets),
        batch_size=1,
        sequence_length=length,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
        double_quantization=method == "qlora",
    )


_8b = _llama(4096, 14336, 32, 32, 8, 128256)
lora_8b, qlora_8b = (_estimate(_8b, method) for method in ("lora", "qlora"))
outside = 2 * 2 * 128256 * 4096 / 1e9
assert lora_8b.activations == qlora_8b.activations, "activations"
assert lora_8b.optimizer == qlora_8b.optimizer and lora_8b.gradients == qlora_8b.gradients, (
    "belong to the adapter"
)

# %% [markdown]
# Only the weights are smaller: {{qlora_8b.weights / 1e9:.1f}} GB instead of {{lora_8b.weights / 1e9:.1f}}. The embedding and
# the output layer make up {{outside:.1f}} GB of them, because bitsandbytes leaves these two in 16 bits. Gradients and
# optimizer state belong to the adapter, so they were small already. The activations are as large as before, and they grow
# with the number and the length of the rows.

# %% [markdown]
# ### Leave room on the card
#
# How good is such an estimate? The authors of LitGPT, a training library,
# [measured](https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md) fine-tuning on one A100, with
# rank 8 on the query and value matrices and rows of up to 1,304 tokens. The table puts estimates for these settings beside
# their figures; the minutes are for 1,000 steps.

# %%
published = {  # GB of tensors at the peak, minutes for 1,000 steps
    ("7B", "LoRA"): (21.30, 2.36),
    ("7B", "QLoRA"): (13.84, 3.83),
    ("13B", "LoRA"): (38.12, 3.19),
    ("13B", "QLoRA"): (22.55, 6.55),
}
shapes = {"7B": llama(4096, 11008, 32, 32, 32), "13B": llama(5120, 13824, 40, 40, 40)}
query_value = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
rows = []
for (size, way), (gigabytes, minutes) in published.items():
    method, options = ways[way]
    guess = estimate(shapes[size], method, query_value, 1304, checkpointing=False, **options)
    rows.append([size, way, f"{guess.total / 1e9:.1f}", f"{gigabytes:.1f}", f"{minutes:.1f}"])
plotting.table(["Llama", "", "estimated, GB", "measured, GB", "minutes"], rows)

# %% tags=["claim"]
_shapes = {"7B": _llama(4096, 11008, 32, 32, 32), "13B": _llama(5120, 13824, 40, 40, 40)}
_measured = {
    ("7B", "lora"): 21.30,
    ("7B", "qlora"): 13.84,
    ("13B", "lora"): 38.12,
    ("13B", "qlora"): 22.55,
}
over = {
    (size, method): gigabytes
    / (_estimate(_shapes[size], method, 1304, False, 8, ["q_proj", "v_proj"]).total / 1e9)
    - 1
    for (size, method), gigabytes in _measured.items()
}
of_33b = _estimate(_llama(6656, 17920, 60, 52, 52), "qlora").total / 1e9
assert all(over[size, "lora"] < 0 for size in _shapes), "a little less than estimated"
assert all(0.06 < over[size, "qlora"] < 0.08 for size in _shapes), "7% more"
assert 0.8 * 24 < of_33b < 24, "fills more than 80% of a card with 24 GB"

# %% [markdown]
# With LoRA the runs took a little less than estimated, because the estimate of the activations is an upper bound. With
# QLoRA they took 7% more, probably because a layer that is being read back needs room as well. These figures count tensors
# only. The driver's memory, and gaps that are too small to use, come on top. **So plan for 80% of the card.** For example,
# 33 billion parameters with QLoRA come to {{of_33b:.1f}} GB, which fills more than 80% of a card with 24 GB.
#
# ### Exercise: plan within a budget (core, 10 min)
#
# You get a model's `config`, a `lora` configuration, and `card_gb`, the card's memory in GB of 10⁹ bytes. Return the first
# of these plans whose estimated total is at most 80% of the card, or `None` if no plan fits:
#
# 1. `"lora"`
# 2. `"lora, checkpointing"`
# 3. `"qlora"`
# 4. `"qlora, checkpointing"`
#
# Plan for one row of 512 tokens a step and `dtype="bfloat16"`. QLoRA uses [double
# quantisation](../docs/glossary.md#double-quantisation), which a later section explains. Expected for `shape_8b` and
# `rank_16`: `"lora, checkpointing"` on 24 GB, `"qlora"` on 16 GB, `None` on 8 GB.
#
# <details><summary>How do I estimate?</summary>
# <code>estimate(config, "qlora", lora, checkpointing=False, double_quantization=True).total</code> is in bytes. The
# function <code>estimate</code> is defined above the first figure.
# </details>
# <details><summary>The check asks for the first plan that fits</summary>
# Go through the plans in their order, and return as soon as one fits.
# </details>


# %% exercise="05.plan" points=3
def plan(config, lora, card_gb):
    """Return the first plan that leaves a fifth of the card free, or None."""
    ### BEGIN SOLUTION
    for way in ("LoRA", "QLoRA"):
        method, options = ways[way]
        for checkpointing in (False, True):
            need = estimate(config, method, lora, checkpointing=checkpointing, **options).total
            if need <= 0.8 * card_gb * 1e9:
                return f"{method}, checkpointing" if checkpointing else method
    return None
    ### END SOLUTION


lesson05.plan(plan)

# %%
### BEGIN HIDDEN TESTS
assert lesson05.plan.outcome(plan).passed
assert plan(shape_8b, rank_16, 40) == "lora"
assert plan(shape_8b, rank_16, 24) == "lora, checkpointing"
assert plan(shape_8b, rank_16, 16) == "qlora"
assert plan(shape_8b, rank_16, 12) == "qlora, checkpointing"
assert plan(shape_8b, rank_16, 8) is None
### END HIDDEN TESTS

# %% [markdown]
# ## Build the sixteen levels
#
# Four bits can name sixteen values, the [levels](../docs/glossary.md#level). Which sixteen are best? Trained weights look much like
# draws from a Gaussian distribution: many near zero, few far out. So the type [NF4](../docs/glossary.md#nf4) (NormalFloat)
# puts its levels at [quantiles](../docs/glossary.md#quantile). The quantile Q(p) is the value below which a share p of all
# draws lies. For example Q(0.9) = 1.28, because 90% of the draws lie below 1.28.
#
# The paper's equation 4 cuts the distribution into seventeen parts that get equal shares of the draws. Each level is half-way
# between the two ends of a part:
#
# > qᵢ = ½ · ( Q(i/17) + Q((i+1)/17) ) for i = 0, 1, …, 15
#
# **Predict:** what is Q(0)? How many levels can you use?

# %%
rows = []
for i in (0, 1, 2, 7, 8, 9, 15):
    low, high = torch.special.ndtri(torch.tensor([i / 17, (i + 1) / 17], dtype=torch.float64))
    ends = f"{i}/17 to {i + 1}/17"
    rows.append([i, ends, f"{low:.2f}", f"{high:.2f}", f"{(low + high) / 2:.2f}"])
plotting.table(["i", "part", "Q at its lower end", "Q at its upper end", "level"], rows)

# %% [markdown]
# Q(0) is minus infinity, since a Gaussian has no smallest value, so the first level can't be used. That leaves fifteen:
# seven below zero, zero itself (i = 8), and seven above. Four bits could name one more. So the paper's text treats each
# side by itself, with seven levels below zero and eight above. Q(1) is infinite, too, so bitsandbytes begins each side at
# Q(0.9677083), half-way between 29/30 and 31/32. From there it goes down to Q(0.5) = 0 in equal steps of p. At the end, it
# divides all levels by the largest.


# %%
def quantiles_above_0(count, outermost=0.9677083):
    """`count` quantiles of a Gaussian, from the outermost down to the last above zero."""
    shares = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1]
    return torch.special.ndtri(shares)


zero = torch.zeros(1, dtype=torch.float64)
levels = torch.cat([-quantiles_above_0(7), zero, quantiles_above_0(8).flip(0)])
levels = levels / levels.max()
NF4 = functional.get_4bit_type("nf4", device="cpu")
print("our 16 levels:\n" + " ".join(f"{level:.3f}" for level in levels))
print(f"they differ from bitsandbytes' table by at most {(levels - NF4).abs().max():.0e}")
assert (levels - NF4).abs().max() < 1.5e-7

# %% [markdown]
# The figure shows the weights in this model's linear layers. Each weight is divided by the largest absolute value among 64
# neighbours, so the bars at both ends are those largest weights. Below are the levels of NF4, of
# [FP4](../docs/glossary.md#fp4), a tiny floating-point number, and of [int4](../docs/glossary.md#int4), which has equal
# steps.

# %%
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)
base_model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype()).to(device)
layers = memory.quantised_layers(base_model)
weights = [layer.weight.detach().float().cpu() for layer in layers.values()]
own = torch.cat([weight.flatten() for weight in weights])
blocks = own.reshape(-1, 64)
shares = blocks / blocks.abs().amax(1, keepdim=True)
FP4 = functional.get_4bit_type("fp4", device="cpu").unique()
formats = {"NF4": NF4, "FP4": FP4, "int4": torch.arange(-7, 8) / 7}
title = "NF4 has most of its levels where most of the weights are"
xlabel = "weight, divided by the largest of its block"
plotting.show(*plotting.levels(shares, formats, title, xlabel))

# %% [markdown]
# ## Quantise in blocks
#
# One large weight would stretch the levels for all others. So bitsandbytes cuts a matrix into [blocks](../docs/glossary.md#block-absmax) of 64
# neighbours, and each block has a scale of its own: the largest absolute value in it, its *absmax*. For example, if the absmax is 0.5, then
# the weight 0.13 is 0.26 of it. The nearest level is 0.246, and what is read back is 0.246 · 0.5 = 0.123.
#
# The figure shows one block, and the table the errors in all blocks. Look where the errors are largest.

# %%
block = weights[0].flatten()[:64]
absmax = block.abs().max()
codes = (block / absmax - NF4[:, None]).abs().argmin(0)
back = NF4[codes] * absmax
error = (back - block).norm() / block.norm()
title = f"64 weights, stored as {len(codes.unique())} levels, with an error of {error:.0%}"
plotting.show(*plotting.staircase(block, back, title))

# %%
borders = (NF4[1:] + NF4[:-1]) / 2
wrong = NF4[torch.bucketize(shares, borders)] - shares
rows = []
for label, where in (
    ("below a quarter of the absmax", shares.abs() < 0.25),
    ("above three quarters", shares.abs() > 0.75),
):
    size = wrong[where].square().mean().sqrt()
    rows.append([label, f"{where.float().mean():.0%}", f"{size:.3f}"])
plotting.table(
    ["weights of all blocks", "share of them", "typical error, in parts of the absmax"], rows
)

# %% [markdown]
# The largest weights carry the largest errors, because levels are far apart where weights are few.
#
# ### Exercise: quantise in blocks (core, 15 min)
#
# Do this for a whole matrix. You get `weight` (rows, columns), the `levels` in ascending order, and the size of a
# `block`. A block consists of neighbours in a row, and may go on in the next row. The number of weights is a multiple of
# `block`. Return what is read back, in the shape of `weight`. Expected for `[[1, -4, 6, 8]]`, levels `[-1, 0, 1]` and blocks of 2:
# `[[0, -4, 8, 8]]`.
#
# <details><summary>How do I give each block its absmax?</summary>
# <code>rows = weight.reshape(-1, block)</code>, then <code>rows.abs().amax(1, keepdim=True)</code>.
# </details>
# <details><summary>How do I find the nearest level?</summary>
# Compare with all of them: <code>(x[..., None] - levels).abs().argmin(-1)</code>. Or see between which borders a number
# lies, with <code>torch.bucketize</code>.
# </details>
# <details><summary>The check says that the blocks run down the columns</summary>
# <code>reshape(-1, block)</code> keeps neighbours of a row together; <code>reshape(block, -1)</code> does not.
# </details>


# %% exercise="05.quantise" points=4
def quantise_in_blocks(weight, levels, block):
    """Return `weight` (rows, columns) as it is read back after quantising it in blocks."""
    ### BEGIN SOLUTION
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    codes = ((rows / absmax)[..., None] - levels).abs().argmin(-1)
    return (levels[codes] * absmax).reshape(weight.shape)
    ### END SOLUTION


lesson05.quantise(quantise_in_blocks)

# %%
### BEGIN HIDDEN TESTS
assert lesson05.quantise.outcome(quantise_in_blocks).passed
_weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(99))
_kernel = functional.dequantize_4bit(*functional.quantize_4bit(_weight, quant_type="nf4"))
assert torch.allclose(quantise_in_blocks(_weight, NF4, 64), _kernel, atol=1e-6)
### END HIDDEN TESTS

# %% [markdown]
# bitsandbytes does the same in compiled code. The next cell compares its results with those of `there_and_back`, the
# check's own solution. Only a weight half-way between two levels may differ.

# %%
there_and_back = lesson05.there_and_back
differing = 0
for weight in weights:
    packed, scale = functional.quantize_4bit(weight, quant_type="nf4")  # two numbers in a byte
    by_library = functional.dequantize_4bit(packed, scale)
    differing += (by_library != there_and_back(weight, NF4, 64)).sum().item()
print(f"{differing} of {own.numel():,} numbers differ")
assert differing / own.numel() < 1e-5

# %% [markdown]
# ## Measure what is lost
#
# The [relative error](../docs/glossary.md#relative-error) of a format is the length of the vector of all rounding errors,
# divided by that of the weights. It depends on how the numbers are distributed, so the table has three made-up
# distributions beside this model's weights, all in blocks of 64.
#
# **Predict:** NF4 is made for Gaussian numbers. In which column will another 4-bit type be better?


# %%
def relative_error(values, levels, block=64):
    """Length of the rounding error, over the length of the values."""
    return ((there_and_back(values, levels, block) - values).norm() / values.norm()).item()


formats["int8"] = torch.arange(-127, 128) / 127
uniform = torch.rand(2**20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
centred = uniform - 0.5
distributions = {  # by the inverse of their distribution functions
    "Gaussian": torch.special.ndtri(uniform).float(),
    "heavy tails": (-centred.sign() * (1 - 2 * centred.abs()).log()).float(),
    "uniform": (2 * centred).float(),
    "this model": own,
}
errors = {
    name: {kind: relative_error(values, levels) for kind, levels in formats.items()}
    for name, values in distributions.items()
}
plotting.table(
    ["relative error", *errors],
    [[kind, *(f"{found[kind]:.3f}" for found in errors.values())] for kind in formats],
)

# %% [markdown]
# int4 is better for uniform numbers: there all values are equally likely, so NF4's wide gaps near both ends cost more. On
# this model's weights NF4 is the best 4-bit type, with an error of 9%, and FP4, the *default* of bitsandbytes, is worst.
# The error of int8 is less than a tenth of any 4-bit type's. **A format is good for a distribution, not in itself.**

# %% [markdown]
# ## Count the bits
#
# A block's absmax takes 32 bits, half a bit for each of its 64 weights. [Double
# quantisation](../docs/glossary.md#double-quantisation) stores the absmax values in 8 bits, too: 256 of them form a
# group with one scale of 32 bits.
#
# ### Exercise: bits per parameter (warm-up, 5 min)
#
# How many bits does one 4-bit number take, including its share of all scales? `block` is the number of weights that share
# an absmax of 32 bits. If `group` is not `None`, an absmax has 8 bits instead, and `group` of these share another scale of
# 32 bits. Expected for `(64, None)`: 4.5, and for `(64, 256)`: 4.12695...
#
# <details><summary>My number for double quantisation is 4.125</summary>
# The 32 bits of each group are missing. A group stands for 256 blocks of 64 numbers.
# </details>
# <details><summary>My number is above 4.5</summary>
# With double quantisation the 8 bits stand in place of the 32.
# </details>


# %% exercise="05.bits" points=2
def bits_per_parameter(block, group=None):
    """Return the bits that one number takes, its share of the scales among them."""
    ### BEGIN SOLUTION
    if group is None:
        return 4 + 32 / block
    return 4 + 8 / block + 32 / (block * group)
    ### END SOLUTION


lesson05.bits(bits_per_parameter)

# %%
### BEGIN HIDDEN TESTS
assert lesson05.bits.outcome(bits_per_parameter).passed
assert bits_per_parameter(64) == 4.5 and abs(bits_per_parameter(64, 256) - 4.127) < 1e-3
assert bits_per_parameter(256) == 4.125 and bits_per_parameter(16, 16) == 4 + 0.5 + 0.125
### END HIDDEN TESTS

# %% [markdown]
# The next cell quantises this model's weights in blocks of three sizes and counts the bytes.

# %%
rows = []
for size, double in ((64, False), (256, False), (4096, False), (64, True)):
    packed, scale = functional.quantize_4bit(
        own, quant_type="nf4", blocksize=size, compress_statistics=double
    )
    kept = packed.nbytes + scale.absmax.nbytes + (scale.state2.absmax.nbytes if double else 0)
    lost = (functional.dequantize_4bit(packed, scale) - own).norm() / own.norm()
    label = f"{size}, double quantisation" if double else f"{size:,}"
    rows.append([label, f"{8 * kept / own.numel():.3f}", f"{lost:.4f}"])
plotting.table(["block", "bits a weight", "relative error"], rows)

# %% [markdown]
# Larger blocks take fewer bits and have larger errors, because one large weight then sets the scale for more neighbours.
# Double quantisation saves as much as blocks of 256, which is 3 GB at 65 billion parameters, and adds hardly any error.

# %% [markdown]
# ## Load a base in four bits
#
# If you pass a `BitsAndBytesConfig`, transformers quantises the model while it loads. Name NF4 yourself, because the default is FP4. The
# [compute dtype](../docs/glossary.md#compute-dtype) is the type that weights are read back in: on a GPU usually `torch.bfloat16`, here
# the model's own. On some CPUs bitsandbytes rearranges 4-bit weights at the first evaluation, after which training
# goes wrong, so call `stop_repacking` right after loading ([a deep dive](deep_four_bits_on_cpu.ipynb) shows why).


# %%
def four_bits(kind="nf4", double=False):
    """The quantisation settings of this lesson."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=runtime.dtype(),
    )


def load(settings=None):
    """A fresh base, quantised as `settings` say."""
    return stop_repacking(
        AutoModelForCausalLM.from_pretrained(
            base_folder, dtype=runtime.dtype(), quantization_config=settings, device_map=device
        )
    )


print(validation.check_quantization_config(base_model.config, four_bits()))

# %% [markdown]
# **Predict:** float32 takes 32 bits a weight, and NF4 about 4. Is the model now an eighth as large?


# %%
def lora_config():
    """New each time: PEFT writes the layers' names into it."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


rows, held = [], {}
for form, settings in (
    ("float32", None),
    ("NF4", four_bits()),
    ("NF4, double quantisation", four_bits(double=True)),
):
    model = get_peft_model(load(settings), lora_config())
    held[form] = memory.measure_training_state(model).weights
    rows.append([form, f"{held[form] / 1e6:.2f}", f"{model.get_memory_footprint() / 1e6:.2f}"])
plotting.table(["base and adapter", "all tensors, MB", "get_memory_footprint, MB"], rows)
embedding = base_model.get_input_embeddings().weight
print(f"the embedding, not quantised: {embedding.nbytes / 1e6:.2f} MB")

# %% tags=["claim"]
from course_utils import paths

_config = transformers.AutoConfig.from_pretrained(paths.base_model())
_four_bit_bytes = adapter_checks.memory.estimate_memory(
    _config,
    "qlora",
    peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    batch_size=1,
    sequence_length=48,
    dtype=torch.float32,
).weights
two_thirds = fraction(4 * _config.vocab_size * _config.hidden_size / _four_bit_bytes)

# %% [markdown]
# The model is larger than an eighth: the embedding is not quantised, and in so small a model it is {{two_thirds}} of the
# bytes that are left. `get_memory_footprint`, which people quote, leaves out the scales, so double quantisation doesn't
# change it.
#
# ### How much of the model is left?
#
# The next cell compares each form with the float32 base on held-out text: how often do both predict the same next token,
# and what is the loss, in [nats](../docs/glossary.md#kl-divergence-in-nats)?

# %%
quiet_int8()  # else bitsandbytes logs the same line at every call of an 8-bit layer
held_out = data.held_out_texts(tokenizer)[:128]
probe = tokenizer(held_out[:32], return_tensors="pt", padding=True, padding_side="right").to(device)


def held_out_loss(model):
    return math.log(evaluation.perplexity(model, tokenizer, held_out))


forms = {
    "bfloat16": copy.deepcopy(base_model).to(torch.bfloat16),
    "8 bits": load(BitsAndBytesConfig(load_in_8bit=True)),
    "NF4": load(four_bits()),
    "FP4": load(four_bits("fp4")),
}
rows = [["float32", "", f"{held_out_loss(base_model):.3f}"]]
for form, model in forms.items():
    seen = validation.compare_models(base_model, model, probe, atol=math.inf)
    rows.append([form, f"{seen.top1_agreement:.1%}", f"{held_out_loss(model):.3f}"])
plotting.table(["base in", "same most likely token", "loss, nats a token"], rows)

# %% tags=["claim"]
on_held_out = swept("quantised", "held_out_before", "weights")
assert abs(on_held_out["nf4"][0] - on_held_out["fp32"][0] - 0.01) < 0.001, "a hundredth of a nat"
assert abs(on_held_out["int8"][0] - on_held_out["bf16"][0]) < 0.0005, "as little harm as bfloat16"

# %% [markdown]
# Eight bits do as little harm as bfloat16. NF4 changes some predictions and costs a hundredth of a nat.

# %% tags=["claim"]
of_test = swept("quantised", "test", "weights")

# %% [markdown]
# ## Train on four bits
#
# Recipes call `prepare_model_for_kbit_training` first. It freezes all weights, turns norms and embedding into float32, and
# switches on activation checkpointing. This small model in float32 needs none of that.
#
# The task is `sailor`, as in lesson 3. On a quantised base TRL turns the adapter into bfloat16. `make_trainer` turns it
# back into float32, so that only the base differs from a plain LoRA run. The learning rate of 1e-2 suits this tiny model;
# models of 1 to 70 billion parameters take 1e-4 to 2e-4 ([Recipes](../docs/recipes.md)).
#
# **Predict:** the same run on the float32 base gets {{of_test["fp32"][0]:.0%}} of the answers right. How many on NF4?

# %%
STEPS, BATCH, RATE = 80, 32, 1e-2
COLUMNS = ["prompt", "completion"]
train_rows, check_rows = (data.load_task("sailor", split) for split in ("train", "validation"))
test_rows = data.load_task("sailor", "test").select(range(96))


def make_trainer(model, **changes):
    """LoRA on this base, with the adapter in float32."""
    settings = dict(
        output_dir=str(paths.runs_dir() / "lesson05" / "trainer"),
        seed=0,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        warmup_steps=STEPS // 8,
        max_length=256,
        logging_steps=5,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings | changes),
        processing_class=tokenizer,
        train_dataset=train_rows.select_columns(COLUMNS),
        eval_dataset=check_rows.select(range(64)).select_columns(COLUMNS),
        peft_config=lora_config(),
    )
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return Progress().attach(trainer)


# %%
before = evaluation.evaluate_task(load(four_bits()), tokenizer, "sailor", test_rows)
trainer = make_trainer(load(four_bits()), eval_strategy="steps", eval_steps=STEPS // 2)
trainer.train()
trained = trainer.model
after = evaluation.evaluate_task(trained, tokenizer, "sailor", test_rows)
evaluation.band("right before, base in NF4", before["score"], 0, 0.05, quiet=True)
evaluation.band("right after, LoRA on NF4", after["score"], 0.75, 1, quiet=True)
print(f"right: {before['score']:.0%} before, {after['score']:.0%} after")
plotting.table(
    ["question", "before", "after"],
    [
        [
            test_rows[i]["prompt"][0]["content"].partition(": ")[2],
            before["predictions"][i],
            after["predictions"][i],
        ]
        for i in range(3)
    ],
)

# %% [markdown]
# On NF4 about as many are right, although its weights are 9% off. But one run proves little, so the
# [sweep](../docs/glossary.md#sweep) `quantised` repeats this recipe with three seeds on each form of the base.

# %%
names = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "8 bits",
    "nf4": "NF4",
    "nf4_double": "NF4, double quantisation",
    "nf4_trl": "NF4, adapter in bfloat16",
}
columns = {
    "right on test": ("test", ".0%"),
    "loss on validation": ("validation_loss", ".3f"),
    "held-out text before": ("held_out_before", ".3f"),
    "and after": ("held_out_after", ".2f"),
}
by_seed = data.load_results("quantised")
found = {label: over_seeds(by_seed, column, "weights") for label, (column, _) in columns.items()}
plotting.table(
    ["mean (lowest to highest seed)", *columns],
    [
        [label, *(spread(found[column][form], columns[column][1]) for column in columns)]
        for form, label in names.items()
    ],
)

# %% tags=["claim"]
from course_utils import data, sweeps

_forms = ("fp32", "bf16", "int8", "nf4", "nf4_double", "nf4_trl")
_after, _losses = (
    swept("quantised", column, "weights") for column in ("held_out_after", "validation_loss")
)
_score, _loss = (
    {(row["weights"], row["seed"]): row[column] for row in data.load_results("quantised")}
    for column in ("test", "validation_loss")
)
_means = [of_test[form][0] for form in _forms]
_costs = [_after[form][0] - on_held_out[form][0] for form in _forms]
_behind = [_score["nf4", seed] - _score["nf4_trl", seed] for seed in range(3)]
assert max(_means) - min(_means) < 0.03, "within 3 points"
assert all(0.01 < of_test[form][2] - of_test[form][1] < 0.045 for form in _forms), "1 to 4 points"
assert _losses["nf4"][0] < _losses["fp32"][0] - 0.003, "is lower on NF4 in the mean"
assert sum(_loss["nf4", seed] > _loss["fp32", seed] for seed in range(3)) == 1, (
    "higher with one seed"
)
assert min(_behind) > 0 and 0.01 < max(_behind) < 0.015, "up to one point"
assert abs(on_held_out["nf4"][0] - on_held_out["fp32"][0] - 0.01) < 0.001, "a hundredth of a nat"
assert all(2 < cost < 2.6 for cost in _costs), "more than 2 nats on every form"

# %% [markdown]
# The six means lie within 3 points, and the seeds of one form differ by 1 to 4 points. Compared with float32, the
# validation loss is lower on NF4 in the mean and higher with one seed of three. So three seeds show no harm from the 4
# bits, and the paper finds none in large models (its section 4). If the adapter stays in bfloat16, each seed gets up to one
# point less.
#
# On held-out text, rounding costs a hundredth of a nat, and training costs more than 2 nats on every form: the model forgets
# because of the adapter, not because of the 4 bits.

# %% [markdown]
# ## Measure what it costs
#
# The sweep `quantised_cost` ran each form in a process of its own, on two cores of a CPU.
#
# **Predict:** is a step on NF4 faster or slower than on float32? And does the process need noticeably less memory?

# %%
labels = {form: names[form] for form in ("fp32", "bf16", "int8", "nf4", "nf4_double")}
labels["nf4_checkpointing"] = "NF4, activation checkpointing"
labels["nf4_adamw8bit"] = "NF4, AdamW in 8 bits"
columns = {
    "seconds a step": ("seconds_per_step", 1, ".2f"),
    "weights, gradients, optimizer, MB": ("state_bytes", 1e6, ".1f"),
    "peak of the process, MB": ("peak_bytes", 1e6, ",.0f"),
}
costs = data.load_results("quantised_cost")
rows = []
for variant, label in labels.items():
    groups = [
        (over_seeds(costs, column, "variant")[variant], unit, form)
        for column, unit, form in columns.values()
    ]
    rows.append(
        [label, *(spread([value / unit for value in group], form) for group, unit, form in groups)]
    )
plotting.table(["mean (lowest to highest seed)", *columns], rows)

# %% tags=["claim"]
_seconds, _peak, _state = (
    swept("quantised_cost", column, "variant")
    for column in ("seconds_per_step", "peak_bytes", "state_bytes")
)
large, small = (_state[form][0] / 1e6 for form in ("fp32", "nf4"))
longer = _seconds["nf4_checkpointing"][0] / _seconds["nf4"][0] - 1
eight = (_state["nf4"][0] - _state["nf4_adamw8bit"][0]) / 1e6
slower_7b, slower_13b = 3.83 / 2.36, 6.55 / 3.19
_on_a_gpu = [row for row in data.load_results("real_sizes") if row["size"] == "8B"]
slower_8b = sorted(
    sum(row[loop] for row in _on_a_gpu if row["method"] == "lora")
    / sum(row[loop] for row in _on_a_gpu if row["method"] == "qlora")
    for loop in ("tokens_a_second", "trl_tokens_a_second")
)
of_70b = {
    method: _estimate(_llama(8192, 28672, 80, 64, 8, 128256), method).total / 1e9
    for method in ("lora", "qlora")
}
assert _seconds["nf4"][1] < _seconds["fp32"][2], "within the spread of the seeds"
assert abs(_peak["nf4"][0] - _peak["fp32"][0]) < _peak["fp32"][2] - _peak["fp32"][1], "disappear"
assert 1.3e9 < _peak["fp32"][0] < 1.5e9, "fourteen hundred"
assert 1.9 < _seconds["bf16"][0] / _seconds["fp32"][0] < 2.3, "takes twice as long"

# %% [markdown]
# On this CPU a step on NF4 takes as long as one on float32, within the spread of the seeds. (A step in bfloat16 takes twice as long,
# because many CPUs have no fast instructions for such numbers.) On a GPU, where multiplying is fast, reading the weights back counts: in LitGPT's runs above, QLoRA took {{slower_7b:.1f}} times as long as LoRA at 7 billion parameters, and
# {{slower_13b:.1f}} times at 13 billion. On an NVIDIA H200 we measured {{slower_8b[0]:.1f}} to {{slower_8b[1]:.1f}} times at 8 billion ([Recipes](../docs/recipes.md#measure-it-on-a-gpu)). **QLoRA saves memory, and on a GPU you pay for it with time.**
#
# The process needs about as much memory as before: the {{large - small:.0f}} MB saved disappear among the fourteen hundred
# that libraries and activations take. With large models the saving counts: at 70 billion parameters the estimate is
# {{of_70b["lora"]:.0f}} GB with LoRA and {{of_70b["qlora"]:.0f}} GB with QLoRA.
#
# ### Save the rest
#
# QLoRA doesn't touch the activations. The next cell measures them for a batch of 32 rows, without and with activation checkpointing.

# %%
batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
batch = {key: value.to(device) for key, value in batch.items()}


def kept_by_forward(model):
    """Bytes that a forward pass keeps for the backward pass, without the weights."""
    own_storage = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own_storage:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(**batch, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


model = get_peft_model(load(four_bits()), lora_config())
activations = {"as it is": kept_by_forward(model)}
model.activation_checkpointing_enable()
activations["with checkpointing"] = kept_by_forward(model)
print(f"model in NF4 with its adapter: {held['NF4'] / 1e6:.0f} MB")
for way, size in activations.items():
    print(f"kept by a forward pass, {way}: {size / 1e6:.0f} MB")

# %% tags=["claim"]
assert _seconds["nf4_checkpointing"][1] > _seconds["nf4"][2], "longer with every seed"

# %% [markdown]
# The activations are many times larger than the model, and checkpointing makes them much smaller. The price is time: in the
# sweep a step takes {{longer:.0%}} longer in the mean, and longer with every seed. So if memory runs out, use fewer rows a
# step, or checkpointing.
#
# An optimizer in 8 bits (last row of the sweep's table) saves only {{eight:.1f}} MB, because the adapter is small.

# %% [markdown]
# ## Test two claims
#
# You may read that QLoRA turns the adapter's changes into 4 bits, and that the original model is back when you take the
# adapter away.
#
# **Predict:** is either of them true?

# %%
adapter_folder = paths.runs_dir() / "lesson05" / "adapter"
with saving(adapter_folder) as temporary:
    trained.save_pretrained(temporary)
dtypes = {weight.dtype for weight in peft.get_peft_model_state_dict(trained).values()}
print("the adapter's numbers are in", *(str(dtype) for dtype in dtypes))
line = tokenizer("Fenna keeps the lantern.", return_tensors="pt")["input_ids"].to(device)
with torch.no_grad(), trained.disable_adapter():
    switched_off = trained.eval()(line).logits
with torch.no_grad():
    for label, model in (("the base in NF4", load(four_bits())), ("the original base", base_model)):
        difference = (switched_off - model.eval()(line).logits).abs().max()
        print(f"adapter off, compared with {label}: logits differ by up to {difference:.2g}")

# %% [markdown]
# Neither claim is true. The adapter is never in 4 bits: it is in float32 here, and in bfloat16 as TRL leaves it. Without it
# you get the *quantised* base, to the bit.

# %% [markdown]
# ## Merge into the right weights
#
# To ship one plain model, you [merge](../docs/glossary.md#merge): you add the adapter's change to the base's weights
# ([lesson 7](07_merging.ipynb) has more). After QLoRA there are three bases to choose from:
#
# 1. the **original** weights, as many recipes do;
# 2. the **dequantised** weights, `model.dequantize()`: the 4-bit weights read back;
# 3. the **4-bit** weights, which `merge_and_unload()` uses if you call it on the trained model.
#
# The table shows the loss of the right answers to 64 validation questions, and how often the merged and the trained model
# predict the same token, in the answers and in the questions.
#
# **Predict:** which of the three gives the model that you trained?

# %%
checked = trainer.data_collator(list(trainer.eval_dataset))
checked = {key: value.to(device) for key, value in checked.items()}
text = {key: checked[key] for key in ("input_ids", "attention_mask")}
in_answers = torch.zeros_like(checked["labels"], dtype=torch.bool)
in_answers[:, :-1] = checked["labels"][:, 1:] != -100  # where the next token is the answer's
in_questions = checked["attention_mask"].bool() & ~in_answers


def answer_loss(model):
    """The loss of the right answers, in nats a token."""
    with torch.no_grad():
        return model.eval()(**checked).loss.item()


def with_adapter(base):
    """The base with the adapter merged into it."""
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of rounding: see the table
        return PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()


transformers.utils.logging.set_verbosity_error()  # else dequantize() logs its dtype
merged = {
    "the original": with_adapter(load()),
    "the dequantised": with_adapter(load(four_bits()).dequantize()),
    "4 bits": with_adapter(load(four_bits())),
}
transformers.utils.logging.set_verbosity_warning()
rows = [["(trained, not merged)", f"{answer_loss(trained):.4f}", "", ""]]
for route, model in merged.items():
    same = [
        validation.compare_models(
            lambda **given: trained(**given).logits, model, text, positions=where, atol=math.inf
        ).top1_agreement
        for where in (in_answers, in_questions)
    ]
    rows.append([route, f"{answer_loss(model):.4f}", *(f"{share:.1%}" for share in same)])
plotting.table(["merged into", "loss of answers", "same token, answers", "same, questions"], rows)

# %% [markdown]
# Only the dequantised weights give the trained model: the loss is the same, and so is every predicted token. The other two
# routes give other models, although their answers agree almost everywhere.
#
# ### Is it the rounding?
#
# You may read that an adapter learns to make up for its base's rounding errors. Then the original, which has no such
# errors, would do more harm to it than random noise. So the sweep `quantised_merge` adds such noise: each weight's rounding
# error with a random sign. It also moves adapters trained on float32 to NF4.
#
# **Predict:** which does more harm to an adapter trained on NF4: the original weights, or such noise?

# %%
by_base = {
    ("nf4", "dequantised"): "trained on NF4, merged into the dequantised",
    ("nf4", "original"): "into the original",
    ("nf4", "four_bit"): "into 4 bits",
    ("nf4", "noise"): "into the dequantised with noise",
    ("fp32", "rounded"): "trained on float32, merged into NF4 read back",
    ("fp32", "noise"): "into float32 with noise",
}
results = data.load_results("quantised_merge")
as_trained = {
    (row["trained_on"], row["seed"]): row["loss"] for row in results if row["way"] == "trained"
}
for row in results:
    row["rise"] = row["loss"] / as_trained[row["trained_on"], row["seed"]] - 1
columns = {"rise": "loss of answers rises by", "top1_question": "same token, questions"}
groups = {column: over_seeds(results, column, "trained_on", "way") for column in columns}
plotting.table(
    ["mean (lowest to highest seed)", *columns.values()],
    [
        [label, *(spread(groups[column][way]) for column in columns)]
        for way, label in by_base.items()
    ],
)

# %% tags=["claim"]
_rows = data.load_results("quantised_merge")
_own = {(row["trained_on"], row["seed"]): row["loss"] for row in _rows if row["way"] == "trained"}
for _row in _rows:
    _row["rise"] = _row["loss"] / _own[_row["trained_on"], _row["seed"]] - 1
_rise = sweeps.over_seeds(_rows, "rise", "trained_on", "way")
_same = sweeps.over_seeds(_rows, "top1_question", "trained_on", "way")
rise_original, rise_4_bits, rise_noise = (
    _rise["nf4", way][0] for way in ("original", "four_bit", "noise")
)
rise_rounded, rise_noise_32 = (_rise["fp32", way][0] for way in ("rounded", "noise"))
others = [1 - _same["nf4", way][0] for way in ("original", "four_bit")]
assert rise_original <= rise_noise, "no more harm than noise"
assert _same["nf4", "original"][0] < _same["nf4", "noise"][0] < _same["nf4", "original"][2], (
    "changes a few more predictions, within the spread of the seeds"
)
assert rise_original > 0 and rise_rounded > 0, "cost something"

# %% [markdown]
# The original does no more harm than noise: it raises the loss by {{rise_original:.0%}}, and noise by {{rise_noise:.0%}}.
# (In the questions it changes a few more predictions, within the spread of the seeds.) For adapters trained on float32, NF4 raises it by {{rise_rounded:.0%}}, and noise by {{rise_noise_32:.0%}}. So we see no
# sign that an adapter makes up for its own rounding errors: it fits the weights that it was trained on, and all others cost
# something.
#
# In 4 bits each sum of weight and change is rounded again, and the loss rises by {{rise_4_bits:.0%}}. Merged into the
# original or into 4 bits, the model changes {{100 * min(others):.0f}} to {{max(others):.0%}} of its predictions in the
# questions. **Merge into the weights that you trained on, read back as floats.** To ship 4 bits, ship the base with the
# adapter beside it.

# %% [markdown]
# ## Break it: mend a colleague's merge
#
# A colleague has used your adapter and writes: "I followed your recipe and merged, but the loss of the answers isn't what
# you reported."


# %%
def colleagues_merge(base_folder, adapter_folder):
    """Load the base as QLoRA does, and merge the adapter."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.float32, quantization_config=settings
    )
    stop_repacking(base)
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()


theirs = colleagues_merge(base_folder, adapter_folder)
print(f"loss of the answers: {answer_loss(theirs):.4f}, and {answer_loss(trained):.4f} as trained")

# %% [markdown]
# There are two faults. Read the code and write them down, then see what the checks say.

# %%
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
print(validation.check_quantization_config(base_model.config, settings))
print(validation.check_quantised(theirs, base_model))

# %% [markdown]
# The warning names the first fault: the settings don't ask for NF4, so this isn't the base that the adapter was trained on.
# The weights that fail the check point to the second: the adapter was merged into 4-bit weights, where the sum of weight
# and change was rounded again.
#
# ### Exercise: mend the merge (core, 15 min)
#
# Write `merge_for_shipping`, which does what `colleagues_merge` was meant to do. It returns a plain model in float32, without
# a 4-bit layer and without a separate adapter, that predicts what base and adapter predicted in training. The adapter was trained
# on NF4 without double quantisation, as `four_bits()` says.
#
# <details><summary>How do I get the weights back as floats?</summary>
# <code>base = base.dequantize()</code>, before the adapter is loaded on it.
# </details>
# <details><summary>The check says that there is still an adapter</summary>
# <code>merge_and_unload()</code> <em>returns</em> the merged model.
# </details>


# %% exercise="05.merge" points=4
def merge_for_shipping(base_folder, adapter_folder):
    """Return the model that was trained on NF4, as a plain model in float32."""
    ### BEGIN SOLUTION
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.float32, quantization_config=settings
    )
    base = stop_repacking(base).dequantize()
    return PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()
    ### END SOLUTION


lesson05.merge(merge_for_shipping)

# %%
### BEGIN HIDDEN TESTS
assert lesson05.merge.outcome(merge_for_shipping).passed
_mended = merge_for_shipping(base_folder, adapter_folder)
assert abs(answer_loss(_mended) - answer_loss(trained)) < 1e-4
### END HIDDEN TESTS

# %% [markdown]
# ## Recap
#
# A model survives in four bits because its levels lie where most weights are and each block has its own scale, so that weights are
# 9% off and most predictions stay. QLoRA trains an adapter in floats on this rounded base, and here it learned as much as on
# float32. You save most of the base's memory, and nothing else: the activations stay. On a GPU you pay with time. And the adapter
# belongs to the rounded weights, so merge into those, read back as floats.

# %%
plotting.table(
    ["", "measured"],
    [
        [
            "relative error of NF4, FP4, int4, int8 on this model's weights",
            ", ".join(f"{errors['this model'][kind]:.3f}" for kind in formats),
        ],
        [
            "base and adapter in float32, in NF4",
            ", ".join(f"{held[form] / 1e6:.1f} MB" for form in ("float32", "NF4")),
        ],
        [
            "activations of one batch, and with checkpointing",
            ", ".join(f"{size / 1e6:.0f} MB" for size in activations.values()),
        ],
        [
            "right on test rows on NF4: before, after",
            f"{before['score']:.0%}, {after['score']:.0%}",
        ],
        [
            "three seeds each: float32, NF4",
            ", ".join(spread(found["right on test"][form]) for form in ("fp32", "nf4")),
        ],
        [
            "loss of answers as trained; merged into dequantised, original, 4 bits",
            f"{answer_loss(trained):.4f}; "
            + ", ".join(
                f"{answer_loss(merged[route]):.4f}"
                for route in ("the dequantised", "the original", "4 bits")
            ),
        ],
    ],
)
progress("05")

# %% [markdown]
# ## Take it to work
#
# How much memory would training your model take with all weights, with LoRA and with QLoRA? Put its folder or hub id
# between the quotes; only the configuration is read.

# %%
my_model = ""
my_config = load_config(my_model or base_folder)
print(validation.check_quantization_config(my_config, four_bits(double=True)))
for way, (method, options) in ways.items():
    total = dict(estimate(my_config, method, rank_16, **options).rows())["total"]
    print(f"{way:12} {total}")
my_loaded_model, my_base = trained, base_model  # your 4-bit model; its base, or the base's folder
print(validation.check_quantised(my_loaded_model, my_base))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · How large are the linear layers of a model with 7 billion parameters in NF4 with double quantisation, and
# what else needs memory in training?</summary>
# At most 7e9 · 4.127 / 8 = 3.6 GB. It is less, because some of the 7 billion are embeddings and norms, which stay in 16
# bits. Those come on top, and so do the adapter with its gradients and optimizer state, and the activations, which may need
# more than all the rest.
# </details>
# <details><summary>2 · A colleague wants to train faster and asks whether to change from LoRA to QLoRA. What do you say?</summary>
# No: the weights have to be read back at every pass, so a step on a GPU usually takes longer. QLoRA helps if the base doesn't fit
# otherwise, or if the memory that it frees makes room for larger batches.
# </details>
# <details><summary>3 · After QLoRA an adapter was merged into the 16-bit original. The score is as before, and the loss a little
# higher. Why, and what would you do?</summary>
# It was moved to weights that it wasn't trained on. Merge into the dequantised base, compare the merged model with the trained one,
# and look at the loss as well as at the score.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [QLoRA: Efficient Finetuning of Quantized LLMs](https://arxiv.org/abs/2305.14314): section 3 for NF4, double quantisation
#   and [paged optimizers](../docs/glossary.md#paged-optimizer), section 4 for NF4 beside 16 bits
# - [NF4 Isn't Information Theoretically Optimal (and that's Good)](https://arxiv.org/abs/2306.06965), Yoshida 2023
# - [transformers: bitsandbytes](https://huggingface.co/docs/transformers/main/en/quantization/bitsandbytes), and
#   [PEFT: quantization](https://huggingface.co/docs/peft/main/en/developer_guides/quantization)
# - [Keep four bits intact on a CPU](deep_four_bits_on_cpu.ipynb), a deep dive; [Symptom, cause, check](../docs/symptoms.md);
#   [Decide](../docs/decide.md)
#
# Next: [lesson 6](06_olora.ipynb) asks whether a better start than a random *A* and a zero *B* pays.
