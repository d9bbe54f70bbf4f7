# %% [markdown]
# # Fine-tune a model in four bits
#
# LoRA freezes the base, and then the base is what fills the memory. QLoRA keeps it in 4 bits: sixteen values for each
# number, where float32 has four billion. **How can a model survive that, what does it cost, and which of the steps go
# wrong without a word?** The 4 bits here are real: bitsandbytes runs its 4-bit and 8-bit layers on a CPU, too.
#
# | | |
# |---|---|
# | **What you'll do** | build the 4-bit type NF4 and hold it to the library's; measure what rounding costs; fine-tune on a base in 4 bits; merge in three ways; meet a trap that some processors set |
# | **What you'll learn** | where QLoRA's savings come from and what it does not save; which claims about it hold; how to tell that 4-bit weights are still what they were |
# | **What you'll need** | [lesson 3](03_lora_finetuning.ipynb); a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import logging
import math
import warnings

from adapter_checks import counting, memory
from adapter_checks.bitsandbytes_workarounds import quiet_int8, stop_repacking
from adapter_checks.safetensors_header import read_safetensors_header
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
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
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
# ## What would it buy?
#
# Full fine-tuning in 16 bits is said to need 12 bytes a parameter: 2 for the weight, 2 for its gradient, 8 for Adam's
# two numbers in float32. For 65 billion parameters that is 780 GB. LoRA saves the last ten of the twelve bytes. QLoRA
# ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)) brings the first two down to about half a byte.
#
# `memory.estimate_memory` knows these rules, and needs a configuration only. The shapes are those of published
# Llamas.
#
# **Predict:** you have 24 GB. How large a model can you fine-tune with all weights, with LoRA, with QLoRA?


# %%
def llama(width, inner, layers, heads, groups, words=32000, tied=False):
    """The configuration of a Llama of this shape; no weights."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=words,
        tie_word_embeddings=tied,
    )


shapes = {
    "1B": llama(2048, 8192, 16, 32, 8, 128256, True),
    "3B": llama(3072, 8192, 28, 24, 8, 128256, True),
    "8B": llama(4096, 14336, 32, 32, 8, 128256),
    "13B": llama(5120, 13824, 40, 40, 40),
    "33B": llama(6656, 17920, 60, 52, 52),
    "65B": llama(8192, 22016, 80, 64, 64),
    "70B": llama(8192, 28672, 80, 64, 8, 128256),
}
wide = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
training_ways = {
    "all weights": ("full", {"moment_dtype": torch.float32}),
    "LoRA": ("lora", {}),
    "QLoRA": ("qlora", {"double_quantization": True}),
}
need = {
    way: {
        name: memory.estimate_memory(
            shape,
            method,
            wide,
            batch_size=1,
            sequence_length=512,
            dtype="bfloat16",
            gradient_checkpointing=True,
            **options,
        )
        for name, shape in shapes.items()
    }
    for way, (method, options) in training_ways.items()
}

# %%
CARD = 24
billions = [
    sum(p.numel() for p in counting.meta_model(shape).parameters()) / 1e9
    for shape in shapes.values()
]
largest = {
    way: max(
        (name for name in sizes if sizes[name].total < CARD * 1e9),
        default="none",
        key=list(shapes).index,
    )
    for way, sizes in need.items()
}
title = f"{CARD} GB take " + ", ".join(f"{name} with {way}" for way, name in largest.items())
figure = plotting.curves(
    {way: (billions, [one.total / 1e9 for one in sizes.values()]) for way, sizes in need.items()},
    title,
    "parameters, in billions",
    "memory for training, GB",
)
axes = figure.axes[0]
axes.set(xscale="log", yscale="log")
axes.set_xticks(billions, [*list(shapes)[:-2], "", "70B"])
axes.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
axes.minorticks_off()
axes.axhline(CARD, color="black", linewidth=1)
axes.text(billions[0], CARD * 1.1, f"{CARD} GB")
plotting.show(
    figure,
    f"{title}. One row of 512 tokens, checkpointing on. "
    + "; ".join(
        f"{way}: "
        + ", ".join(f"{one.total / 1e9:,.0f} GB for {name}" for name, one in sizes.items())
        for way, sizes in need.items()
    ),
)
full_65b = need["all weights"]["65B"]
print(
    f"65B, all weights: {(full_65b.total - full_65b.activations) / 1e9:,.0f} GB"
    f" and activations; 12 bytes × 65 billion = {12 * 65:,} GB"
)
print(f"65B, QLoRA: {need['QLoRA']['65B'].total / 1e9:.0f} GB; the paper did it on a card of 48 GB")

# %% [markdown]
# **QLoRA shrinks the base, and the base is what LoRA has left.** It does not shrink the adapter, nor the activations:
# they are in this figure with one short row a step, and grow with rows and length.

# %% [markdown]
# ## Sixteen levels
#
# Four bits name sixteen values. Which sixteen? Weights look like draws from a Gaussian, many near zero and few far
# out, so NF4, "normal float", puts its levels at **quantiles**: places that cut a Gaussian into parts of equal
# probability. One level must be exactly 0, and the outermost two are -1 and 1. So seven parts lie on one side of
# zero, and eight on the other.
#
# The outermost quantile can't be that of probability 1, which is infinite. bitsandbytes takes that of 0.9677083,
# half-way between 29/30 and 31/32.


# %%
def quantiles_above_0(count, offset=0.9677083):
    """`count` quantiles of a Gaussian, from that of `offset` down, without that of one half."""
    cuts = torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1]
    return torch.special.ndtri(cuts)


zero = torch.zeros(1, dtype=torch.float64)
levels = torch.cat([-quantiles_above_0(7), zero, quantiles_above_0(8).flip(0)])
levels = levels / levels.max()
library = functional.get_4bit_type("nf4", device="cpu")
print("our 16 levels: ", " ".join(f"{level:.3f}" for level in levels))
print(f"off from bitsandbytes' table by at most {(levels - library).abs().max():.0e}")
assert (levels - library).abs().max() < 1.5e-7

# %% [markdown]
# Now the paper's equation 4, as printed: *qᵢ = ½·(Q(i/17) + Q((i + 1)/17))*, with *Q* the Gaussian's quantiles.
#
# **Predict:** does it give the same sixteen? Is there a zero among them?

# %%
i = torch.arange(16, dtype=torch.float64)
equation_4 = (torch.special.ndtri(i / 17) + torch.special.ndtri((i + 1) / 17)) / 2
print("equation 4, as printed:", " ".join(f"{level:.2f}" for level in equation_4[:4]), "...")
rest = equation_4[1:] / equation_4[1:].max()
nearest = (rest[:, None] - library).abs().min(1).values
print(f"without the first, scaled to 1: {len(rest)} levels, up to {nearest.max():.2f} from NF4's")

# %% [markdown]
# It does not: the first one is minus infinity, and fifteen other levels are left. The equation tells the idea, for a
# symmetric type; that a zero is needed, and so more levels on one side, the paper adds in words, as we built it. Where
# the outermost levels lie only the code says. **NF4 is the table in the library.**

# %% [markdown]
# ### Three ways to spend four bits
#
# Beside NF4 stand FP4, a tiny floating-point number, and int4, fifteen equal steps. We draw their levels under the
# weights that they are to stand for: all the linear layers of this course's model, each number divided by the largest
# of the 64 around it.
#
# **Predict:** NF4 is said to use each level equally often. Does it?

# %%
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)
base_model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype()).to(device)
layers = memory.quantised_layers(base_model)
weights = {name: layer.weight.detach().float().cpu() for name, layer in layers.items()}
blocks = torch.cat([weight.reshape(-1, 64) for weight in weights.values()])
inside = blocks / blocks.abs().amax(1, keepdim=True)  # from -1 to 1
FORMATS = {
    "NF4": library,
    "FP4": functional.get_4bit_type("fp4", device="cpu").unique(),
    "int4": torch.arange(-7, 8) / 7,
    "int8": torch.arange(-127, 128) / 127,
}
borders = (library[1:] + library[:-1]) / 2
used = torch.bucketize(inside, borders).flatten().bincount(minlength=16) / inside.numel()
own = torch.cat([weight.flatten() for weight in weights.values()])
normal = torch.randn(2**14, 64, generator=torch.Generator().manual_seed(0))
normal = torch.bucketize(normal / normal.abs().amax(1, keepdim=True), borders).flatten()
for label, share in (("weights", used), ("Gaussian numbers", normal.bincount() / normal.numel())):
    print(
        f"share of {label} at each NF4 level: {share.min():.1%} to {share.max():.1%};"
        f" equal would be {1 / 16:.1%}"
    )

# %%
import matplotlib.pyplot as plt

with plt.style.context(plotting.STYLE_FILE):
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.hist(inside.flatten().numpy(), bins=120, range=(-1, 1), color="#999999")
    top.set(ylabel="weights", yticks=[])
    for place, (name, color) in enumerate(zip(("int4", "FP4", "NF4"), plotting.COLORS[2::-1])):
        bottom.plot(
            FORMATS[name],
            [place] * len(FORMATS[name]),
            "|",
            color=color,
            markersize=16,
            markeredgewidth=2,
        )
    bottom.set(
        yticks=range(3),
        yticklabels=("int4", "FP4", "NF4"),
        ylim=(-0.6, 2.6),
        xlabel="weight, divided by the largest of its block",
    )
    bottom.grid(False)
    top.grid(False)
title = "NF4 puts its levels where the weights are;\na block's largest is always at 1 or -1"
figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
plotting.show(
    figure,
    f"{title}. A histogram of the model's weights, and the levels below it. "
    + "; ".join(
        f"{name}: " + ", ".join(f"{level:.2f}" for level in FORMATS[name])
        for name in ("NF4", "FP4", "int4")
    ),
)

# %% [markdown]
# The levels are not used equally often, and not on Gaussian numbers either: dividing by the largest of the block
# changes the distribution. The spikes at the ends are those largest ones, which every format
# stores exactly. FP4 spends two codes on zero, so it has fifteen levels, two of them next to zero.

# %% [markdown]
# ## Quantise in blocks
#
# One number far out would spoil the scale for all others. So a matrix is cut into **blocks** of 64 numbers in a row,
# and each block keeps its own largest size, its `absmax`, in float32. A number is stored as the level next to *number
# / absmax*, and read back as *level · absmax*. Here is one block of the first layer.
#
# **Predict:** where in the picture are the errors largest?

# %%
name, first = next(iter(weights.items()))
block = first.flatten()[:64]
absmax = block.abs().max()
codes = (block / absmax - library[:, None]).abs().argmin(0)
back = library[codes] * absmax
order = block.argsort()
figure = plotting.curves(
    {"weight": (range(64), block[order]), "read back": (range(64), back[order])},
    f"64 weights, {len(codes.unique())} levels in use,"
    f" off by {(back - block).norm() / block.norm():.0%} of their size",
    "weights of one block, in order",
    "value",
)
figure.axes[0].lines[1].set_drawstyle("steps-mid")
plotting.show(
    figure,
    "One block of 64 weights in ascending order, and the same read back: "
    f"a staircase along the curve. Largest difference {(back - block).abs().max():.3f}, "
    f"largest weight {absmax:.3f}.",
)
wrong = library[torch.bucketize(inside, borders)] - inside
for label, where in (
    ("below a quarter", inside.abs() < 0.25),
    ("above three quarters", inside.abs() > 0.75),
):
    print(
        f"all blocks, weights {label} of the largest: error"
        f" {wrong[where].square().mean() ** 0.5:.3f} of the largest"
    )

# %% [markdown]
# The steps are coarse at both ends, where weights are few, and errors are three times as large there. **A block pays
# for its tails.**

# %% [markdown]
# ### Exercise: quantise in blocks (core, 15 min)
#
# Do it for a whole matrix. You get `weight` (rows, columns), the `levels` in ascending order, and how many numbers make
# a `block`; blocks run along the rows, and may run on into the next row. The number of weights is a multiple of
# `block`. Return what is read back, in the weight's shape. For `[[1, -4, 6, 8]]`, levels `[-1, 0, 1]` and blocks of 2,
# expected is `[[0, -4, 8, 8]]`.
#
# <details><summary>How do I give each block its absmax?</summary>
# <code>rows = weight.reshape(-1, block)</code>, then <code>rows.abs().amax(1, keepdim=True)</code>.
# </details>
# <details><summary>How do I find the nearest of the levels?</summary>
# Compare with all: <code>(x[..., None] - levels).abs().argmin(-1)</code>. Or look between which borders a number
# falls, with <code>torch.bucketize</code>.
# </details>
# <details><summary>The check says that the blocks run down the columns</summary>
# <code>reshape(-1, block)</code> keeps numbers of a row together; <code>reshape(block, -1)</code> does not.
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
assert torch.allclose(quantise_in_blocks(_weight, library, 64), _kernel, atol=1e-6)
### END HIDDEN TESTS

# %% [markdown]
# ### Hold it to the kernel
#
# The exercise's check has a function for it, `there_and_back`, and from here on we use that one. bitsandbytes does the
# same in compiled code: `quantize_4bit` packs two codes into a byte, and `dequantize_4bit` reads them back.
#
# **Predict:** over all layers of the model, how many of the numbers will differ?

# %%
there_and_back = lesson05.there_and_back
for kind in ("nf4", "fp4"):
    differing = 0
    for weight in weights.values():
        bytes_, scale = functional.quantize_4bit(weight, quant_type=kind)
        by_kernel = functional.dequantize_4bit(bytes_, scale)
        differing += (by_kernel != there_and_back(weight, FORMATS[kind.upper()], 64)).sum().item()
    print(f"{kind}: {differing} of {own.numel():,} numbers differ")
    assert differing / own.numel() < 1e-5
print(
    f"the last weight {tuple(weight.shape)} in float32: {weight.nbytes:,} bytes; packed:"
    f" {bytes_.nbytes:,}, and {scale.absmax.nbytes:,} for its absmax values"
)

# %% [markdown]
# **What the library does is five lines, and then speed.**

# %% [markdown]
# ## How much is lost?
#
# The error of a format is the length of the difference over the length of the weights. It depends on how the numbers
# are spread, so we take three made-up distributions and the model's own weights, in blocks of 64.
#
# **Predict:** in which column is NF4 *not* the best of the three 4-bit formats?


# %%
def relative_error(values, levels, block=64):
    """Length of the rounding error, over the length of the values."""
    return ((there_and_back(values, levels, block) - values).norm() / values.norm()).item()


generator = torch.Generator().manual_seed(0)
uniform = torch.rand(2**20, generator=generator, dtype=torch.float64)
distributions = {  # by the inverse of their distribution functions
    "Gaussian": torch.special.ndtri(uniform).float(),
    "heavy tails": (uniform.sub(0.5).sign() * uniform.sub(0.5).abs().mul(2).neg().log1p()).float(),
    "uniform": uniform.mul(2).sub(1).float(),
    "this model": own,
}
errors = {
    name: {kind: relative_error(values, levels) for kind, levels in FORMATS.items()}
    for name, values in distributions.items()
}
plotting.table(
    ["error", *errors],
    [
        [kind, *(f"{found[kind]:.4f}" for found in errors.values())]
        for kind in ("NF4", "FP4", "int4", "int8")
    ],
)
kurtosis = {
    name: ((values - values.mean()) ** 4).mean() / values.var() ** 2
    for name, values in distributions.items()
}
print(
    "kurtosis, 3 for a Gaussian:",
    ", ".join(f"{name} {value:.1f}" for name, value in kurtosis.items()),
)

# %% [markdown]
# What holds of the story, and what doesn't:
#
# - Eight bits are far better than any four: more than ten times here.
# - On weights, which are nearly Gaussian, NF4 beats int4, and int4 beats FP4: a floating-point format is *not* better
#   because it floats.
# - On **uniform** numbers int4 wins clearly. Where all values are equally likely, equal steps are the best ones, and
#   NF4's wide gaps near the ends cost it.
#
# **A format is good for a distribution, not in itself.** NF4 is also called information-theoretically optimal; it is
# not, and need not be ([Yoshida 2023](https://arxiv.org/abs/2306.06965)).

# %% [markdown]
# ### How large a block?
#
# A smaller block has a smaller absmax, and pays for more of them. **Predict:** does NF4 beat int4 at every block
# size?

# %%
sizes = (4, 8, 16, 32, 64, 128, 256, 1024, 4096)
gaussian = distributions["Gaussian"]
by_block = {
    kind: [relative_error(gaussian, FORMATS[kind], size) for size in sizes]
    for kind in ("NF4", "FP4", "int4")
}
wins = [size for size, nf4, int4 in zip(sizes, by_block["NF4"], by_block["int4"]) if int4 < nf4]
title = (
    f"Gaussian numbers: NF4's error grows from {by_block['NF4'][0]:.3f} to "
    f"{by_block['NF4'][-1]:.3f},\nand int4 is better in blocks of "
    f"{' and '.join(map(str, wins)) or 'no size'}"
)
figure = plotting.curves(
    {kind: (sizes, values) for kind, values in by_block.items()},
    title,
    "numbers in a block",
    "error",
)
figure.axes[0].set_xscale("log", base=2)
figure.axes[0].set_xticks(sizes, sizes)
plotting.show(
    figure,
    f"{title}. "
    + "; ".join(
        f"{kind}: " + ", ".join(f"{value:.3f} at {size}" for size, value in zip(sizes, values))
        for kind, values in by_block.items()
    ),
)

# %% [markdown]
# In a block of four the largest is not far from the rest, so fewer lie near zero, where NF4 is dense. Blocks of 64 cost
# half a bit for each number: 32 bits of absmax over 64.

# %% [markdown]
# ## Quantise the scales, too
#
# Half a bit for each number is an eighth on top of the four. **Double quantisation** (the paper's section 3) stores the
# absmax values in 8 bits as well: in groups of 256, with one float32 for each group.

# %% [markdown]
# ### Exercise: bits per parameter (warm-up, 5 min)
#
# How many bits does a 4-bit number really take, with all that belongs to it? `block` is the number of weights that
# share an absmax of 32 bits. If `group` is not `None`, an absmax has 8 bits instead, and `group` of them share
# another 32. Expected for `(64, None)`: 4.5, and for `(64, 256)`: 4.12695...
#
# <details><summary>My number for double quantisation is 4.125</summary>
# The float32 of each group is missing. It stands for 256 blocks of 64 numbers.
# </details>
# <details><summary>My number is above 4.5</summary>
# The 8 bits stand in place of the 32.
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
# ### What does it cost?
#
# **Predict:** the scales are now rounded, too. By how much does the error of the weights grow?

# %%
packed, state = functional.quantize_4bit(own, quant_type="nf4")
packed_twice, double = functional.quantize_4bit(own, quant_type="nf4", compress_statistics=True)
scales = state.absmax
again = functional.dequantize_blockwise(double.absmax, double.state2) + double.offset
with plt.style.context(plotting.STYLE_FILE):
    figure, axes = plt.subplots()
    for values, look in (
        (scales, {"color": "#999999", "label": "float32"}),
        (again, {"histtype": "step", "label": "from 8 bits"}),
    ):
        axes.hist(values, bins=100, range=(0, 1.2), **look)
    axes.set(xlabel="absmax of a block", ylabel="blocks")
    axes.legend()
off = ((again - scales).norm() / scales.norm()).item()
title = f"The scales lie close together: in 8 bits they are off by {off:.1%}"
figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
plotting.show(
    figure,
    f"{title}. Histogram of {len(scales):,} absmax values, from "
    f"{scales.min():.2f} to {scales.max():.2f}, and of the same read back from 8 bits.",
)

# %%
rows = []
for label, bits, codes, one in (
    ("NF4", 4 + 32 / 64, packed, state),
    ("and double quantisation", 4 + 8 / 64 + 32 / (64 * 256), packed_twice, double),
):
    kept = codes.nbytes + one.absmax.nbytes + (one.state2.absmax.nbytes if one.nested else 0)
    lost = (functional.dequantize_4bit(codes, one) - own).norm() / own.norm()
    rows.append([label, f"{bits:.3f}", f"{8 * kept / own.numel():.3f}", f"{lost:.5f}"])
plotting.table(["", "bits by the formula", "bits counted", "error"], rows)

# %% [markdown]
# **Double quantisation is almost free.** What it saves, 0.373 bits a parameter, is little here and 3 GB at 65
# billion. (bitsandbytes also keeps two small tables a layer, which the count leaves out; they matter in a model as
# small as ours.)

# %% [markdown]
# ## Load a model in 4 and 8 bits
#
# With transformers all that is one argument. First, a check of what is asked for; then the call.


# %%
def four_bits(kind="nf4", double=False):
    """The settings of this lesson: compute in the dtype that the model would have anyway."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=runtime.dtype(),
    )


print(validation.check_quantization_config(base_model.config, four_bits()))
model = AutoModelForCausalLM.from_pretrained(
    base_folder, dtype=runtime.dtype(), quantization_config=four_bits()
)
stop_repacking(model)  # Break it 1 shows what this line is for
layer = model.get_submodule(name)
print(
    f"\n{name}: {type(layer).__name__}, weight {layer.weight.dtype}, {tuple(layer.weight.shape)},"
    f" for {tuple(layer.weight.quant_state.shape)}"
)
floats = [part for part, weight in model.named_parameters() if weight.is_floating_point()]
print("in float still:", ", ".join(sorted({part.split(".")[-2] for part in floats})))

# %% [markdown]
# ### How large is it now?
#
# `get_memory_footprint()` is what people quote. We put the sum of all tensors beside it, and the estimate from the
# configuration alone, for the model with an adapter of rank 8.
#
# **Predict:** NF4 has an eighth of the bits. Is this model an eighth as large?

# %%
FORMS = {
    "float32": ("lora", None, {}),
    "NF4": ("qlora", four_bits(), {}),
    "NF4, double": ("qlora", four_bits(double=True), {"double_quantization": True}),
}


def load(settings=None):
    """A fresh base as `settings` say, kept from being repacked."""
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=runtime.dtype(), quantization_config=settings
    )
    return stop_repacking(model if settings else model.to(device))


def lora_config():
    """New each time: PEFT writes the layers' names into it."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


rows, held = [], {}
for form, (method, settings, options) in FORMS.items():
    model = get_peft_model(load(settings), lora_config())
    held[form] = memory.measure_training_state(model).weights
    predicted = memory.estimate_memory(
        base_model.config,
        method,
        lora_config(),
        batch_size=32,
        sequence_length=48,
        dtype=runtime.dtype(),
        **options,
    ).weights
    rows.append(
        [form, *(f"{size:,}" for size in (model.get_memory_footprint(), predicted, held[form]))]
    )
plotting.table(["base and adapter, bytes", "get_memory_footprint", "predicted", "counted"], rows)
embedding = base_model.get_input_embeddings().weight
print(f"the embedding, not quantised: {embedding.nbytes:,} bytes")

# %% tags=["claim"]
import peft
import torch
import transformers

from adapter_checks import memory
from course_utils import paths
from tools.claims import fraction, swept

config = transformers.AutoConfig.from_pretrained(paths.base_model())
four_bit_bytes = memory.estimate_memory(
    config,
    "qlora",
    peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    batch_size=32,
    sequence_length=48,
    dtype=torch.float32,
).weights
two_thirds = fraction(4 * config.vocab_size * config.hidden_size / four_bit_bytes)

# %% [markdown]
# - The estimate is right to the byte. `get_memory_footprint` counts parameters and buffers, and **leaves out the
#   scales**, which are neither: it gives the same number with and without double quantisation.
# - The model is not an eighth as large. Embeddings stay as they are, and in a small model they are {{two_thirds}} of it.

# %% [markdown]
# ### What does rounding do to the answers?
#
# An error of 9% in every weight: what is left of the model? We compare with the float32 base: the share of positions
# with the same most likely token, the divergence of the predictions (KL, in nats), and the loss on held-out text.
#
# int8 needs a word first. Its layers log a line at every call in eval mode. We count these lines once, read one, and
# then hide this one message.

# %%
heard, listener = [], logging.Handler()
listener.emit = lambda record: heard.append(record.getMessage())
logger = logging.getLogger("bitsandbytes.autograd._functions")
logger.addHandler(listener)
witness = tokenizer("Fenna keeps the lantern.", return_tensors="pt")["input_ids"].to(device)
in_8_bits = load(BitsAndBytesConfig(load_in_8bit=True))
counts, logits = {}, {}
with torch.no_grad():
    for mode in ("train", "eval"):
        heard.clear()
        logits[mode] = getattr(in_8_bits, mode)()(witness).logits
        counts[mode] = len(heard)
print(f"lines for one forward pass: {counts}", *heard[:1], sep="\n")  # none once they are hidden
apart = (logits["train"] - logits["eval"]).abs().max()
print(f"logits differ by up to {apart:.2f} between the two modes")
logger.removeHandler(listener)
quiet_int8()

# %% [markdown]
# It is true, and says the same for every layer and call: inputs are made float16 on their way to 8 bits. On a CPU
# that happens in eval mode only; in training bitsandbytes multiplies with the weights read back. So an int8 model is
# trained with a slightly other forward pass than it answers with.
#
# **Predict:** which forms will be hard to tell from the base?

# %%
test = data.load_task("sailor", "test").select(range(96))
held_out = data.held_out_texts(tokenizer)[:128]
texts = [
    tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    for row in test.select(range(32))
]
probe = tokenizer(
    texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
).to(device)


def against(reference, candidate, positions=None):
    """How far the candidate's predictions lie from the reference's, on questions and answers."""
    return validation.compare_models(
        reference, candidate, probe, positions=positions, atol=math.inf
    )


forms = {
    "bfloat16": copy.deepcopy(base_model).to(torch.bfloat16),
    "int8": in_8_bits,
    "NF4": load(four_bits()),
    "NF4, double": load(four_bits(double=True)),
    "FP4": load(four_bits("fp4")),
}


def held_out_loss(model):
    return math.log(evaluation.perplexity(model, tokenizer, held_out))


rows = [["float32", "", "", f"{held_out_loss(base_model):.4f}"]]
for form, model in forms.items():
    seen = against(base_model, model)
    rows.append(
        [form, f"{seen.top1_agreement:.1%}", f"{seen.kl:.4f}", f"{held_out_loss(model):.4f}"]
    )
plotting.table(["base in", "same most likely token", "KL", "loss on held-out text"], rows)

# %% tags=["claim"]
before = swept("quantised", "held_out_before", "weights")
assert abs(before["nf4"][0] - before["fp32"][0] - 0.01) < 0.001, "a hundredth of a nat"
assert abs(before["int8"][0] - before["bf16"][0]) < 0.0005, "nearly as little harm"

# %% [markdown]
# int8 does nearly as little harm as bfloat16. NF4 changes almost every fifth prediction on these questions, which the
# base can't answer anyway, and costs a hundredth of a nat on text like that of its pretraining. **That rounded base is
# where fine-tuning starts.**

# %% [markdown]
# ## Prepare it for training
#
# `prepare_model_for_kbit_training` comes before `get_peft_model` in every recipe. **Predict:** what does it change?
# We look at a base whose other weights are in bfloat16, as on a GPU.

# %%
model = stop_repacking(
    AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.bfloat16, quantization_config=four_bits()
    )
)


def state_of(model):
    floats = [weight for weight in model.parameters() if weight.is_floating_point()]
    return [
        ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in floats})),
        sum(weight.requires_grad for weight in model.parameters()),
        model.is_activation_checkpointing,
        f"{model.get_memory_footprint() / 1e6:.2f}",
    ]


rows = [["loaded", *state_of(model)]]
with warnings.catch_warnings(action="ignore"):  # it calls a method that transformers has renamed
    prepared = prepare_model_for_kbit_training(model)
rows.append(["prepared", *state_of(prepared)])
plotting.table(
    ["", "dtype of what is not quantised", "trainable tensors", "checkpointing", "MB"], rows
)
print("the same object:", prepared is model)

# %% [markdown]
# Three things: all is frozen (PEFT does that, too); norms and embeddings become float32, for the sake of precision,
# and grow; and activation checkpointing is switched on, which the section after next measures. Our base is in
# float32, and we train without checkpointing, so **this lesson has no use for it. TRL does not call it either.**

# %% tags=["claim"]
right = swept("quantised", "test", "weights")

# %% [markdown]
# ## Train on four bits
#
# Now the lesson's one real run: `sailor` on NF4, with fewer steps than in lesson 3 and a lower rate. The trainer does
# one thing unasked: on a quantised base TRL makes the adapter bfloat16. To compare with float32 adapters, we undo that
# before the optimizer is made.
#
# **Predict:** how many answers will be right on this base? These steps on a base in float32 came to {{right["fp32"][0]:.0%}}.

# %%
STEPS, BATCH, RATE = 80, 32, 1e-2
COLUMNS = ["prompt", "completion"]
train_rows, check_rows = (data.load_task("sailor", split) for split in ("train", "validation"))


def make_trainer(model, steps=STEPS, batch=BATCH, rows=train_rows, **changes):
    """LoRA on this base, with the adapter in float32."""
    settings = dict(
        output_dir=str(paths.runs_dir() / "lesson05"),
        seed=0,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=RATE,
        warmup_steps=steps // 8,
        max_length=256,
        logging_steps=5,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings | changes),
        processing_class=tokenizer,
        train_dataset=rows.select_columns(COLUMNS),
        peft_config=lora_config(),
        eval_dataset=check_rows.select(range(64)).select_columns(COLUMNS),
    )
    adapter = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    trainer.adapter_dtype = adapter[0].dtype  # as TRL made it
    for weight in adapter:
        weight.data = weight.data.float()
    return Progress().attach(trainer)


before = evaluation.evaluate_task(load(four_bits()), tokenizer, "sailor", test)

# %%
trainer = make_trainer(load(four_bits()), eval_strategy="steps", eval_steps=STEPS // 2)
print("TRL made the adapter", trainer.adapter_dtype)
trainer.train()
trained = trainer.model

# %%
after = evaluation.evaluate_task(trained, tokenizer, "sailor", test)
evaluation.band("right before, base in NF4", before["score"], 0, 0.05)
evaluation.band("right after, LoRA on NF4", after["score"], 0.75, 1)
print(validation.check_quantised(trained, base_model))
plotting.table(
    ["question", "before", "after"],
    [
        [
            test[i]["prompt"][0]["content"].partition(": ")[2],
            before["predictions"][i],
            after["predictions"][i],
        ]
        for i in range(3)
    ],
)

# %% [markdown]
# It learned, on weights that are 9% off. Does it make up for the rounding, too? Merging will show.

# %% [markdown]
# ### In every form, with seeds
#
# One run proves little. The sweep `quantised` repeats this recipe with three seeds on the base in float32, bfloat16,
# int8 and NF4. Our run is one point of it: NF4, seed 0. (The sweep takes more held-out texts than the table above.)
#
# **Predict:** in which column will the forms differ by more than their seeds do?

# %%
swept = data.load_results("quantised")
names = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "int8",
    "nf4": "NF4",
    "nf4_double": "NF4, double",
    "nf4_trl": "NF4, adapter in bfloat16",
}
columns = {
    "right on test": ("test", ".0%"),
    "loss on validation": ("validation_loss", ".4f"),
    "held-out text before": ("held_out_before", ".3f"),
    "and after": ("held_out_after", ".2f"),
}
found = {label: over_seeds(swept, column, "weights") for label, (column, _) in columns.items()}
plotting.table(
    ["mean (lowest to highest seed)", *columns],
    [
        [label, *(spread(found[column][form], columns[column][1]) for column in columns)]
        for form, label in names.items()
    ],
)
print(f"this notebook: {after['score']:.0%} right of {len(test)} test rows")

# %% tags=["claim"]
from course_utils import data

forms = ("fp32", "bf16", "int8", "nf4", "nf4_double", "nf4_trl")
after, losses = (
    swept("quantised", column, "weights") for column in ("held_out_after", "validation_loss")
)
score, loss = (
    {(row["weights"], row["seed"]): row[column] for row in data.load_results("quantised")}
    for column in ("test", "validation_loss")
)
means = [right[form][0] for form in forms]
costs = [after[form][0] - before[form][0] for form in forms]
behind = [score["nf4", seed] - score["nf4_trl", seed] for seed in range(3)]
assert max(means) - min(means) < 0.03, "within 3 points"
assert all(0.01 < right[form][2] - right[form][1] < 0.045 for form in forms), "1 to 4 apart"
assert losses["nf4"][0] < losses["fp32"][0] - 0.003, "its mean is lower on NF4"
assert sum(loss["nf4", seed] > loss["fp32", seed] for seed in range(3)) == 1, (
    "with one seed of three it is higher"
)
assert min(behind) > 0 and all(loss["nf4", s] < loss["nf4_trl", s] for s in range(3)), (
    "a little behind with every seed"
)
assert 0.01 < max(behind) < 0.015, "a point at most"
assert abs(before["nf4"][0] - before["fp32"][0] - 0.01) < 0.001, "a hundredth of a nat"
assert all(2 < cost < 2.6 for cost in costs), "more than 2 nats, on every form alike"

# %% [markdown]
# The score hardly tells the forms apart: six means within 3 points, where seeds of one form lie 1 to 4 apart. Nor does
# the validation loss: its mean is lower on NF4 than on float32, but with one seed of three it is higher. So what 4 bits
# cost in learning is less than three seeds can show. Only the adapter in bfloat16 is a little behind with every seed,
# beside the one in float32 on the same base: by a point at most, and three seeds and one task are no law.
#
# Rounding costs a hundredth of a nat on held-out text, before training. Training costs more than 2 nats, on every form
# alike: **what is forgotten is the adapter's doing, not the rounding's.**

# %% [markdown]
# ### What it costs
#
# The sweep `quantised_cost` runs each in a process of its own: the time of a step, what Python and the libraries have
# in memory at the highest point, and what weights, gradients and optimizer hold.
#
# **Predict:** is QLoRA faster than LoRA? And will you see the smaller base in the memory of the process?

# %%
costs = data.load_results("quantised_cost")
labels = {
    **{form: names[form] for form in ("fp32", "bf16", "int8", "nf4", "nf4_double")},
    "nf4_checkpointing": "NF4, checkpointing",
    "nf4_adamw8bit": "NF4, AdamW in 8 bits",
}
columns = {
    "seconds a step": ("seconds_per_step", 1, ".2f"),
    "weights, gradients, optimizer, MB": ("state_bytes", 1e6, ".2f"),
    "peak of the process, MB": ("peak_bytes", 1e6, ",.0f"),
}
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
seconds, peak, state = (
    swept("quantised_cost", column, "variant")
    for column in ("seconds_per_step", "peak_bytes", "state_bytes")
)
longer = seconds["nf4_checkpointing"][0] / seconds["nf4"][0] - 1
large, small = (state[form][0] / 1e6 for form in ("fp32", "nf4"))
less = (peak["nf4"][0] - peak["nf4_checkpointing"][0]) / 1e6
apart = max(highest - lowest for _, lowest, highest in peak.values())
assert 1.9 < seconds["bf16"][0] / seconds["fp32"][0] < 2.3, "twice as long"
assert seconds["nf4"][1] < seconds["fp32"][2], "within the spread"
assert min(mean for mean, _, _ in seconds.values()) == seconds["fp32"][0], (
    "none of the forms is faster"
)
assert abs(peak["nf4"][0] - peak["fp32"][0]) < peak["fp32"][2] - peak["fp32"][1], "doesn't show it"
assert 9 < large - small < 11 and 1.3e9 < peak["fp32"][0] < 1.5e9, "some fourteen hundred"
assert 150e6 < apart < 250e6, "up to two hundred megabytes apart"
assert abs(peak["bf16"][0] - peak["fp32"][0]) < apart / 10, "not even bfloat16"
assert min(peak, key=lambda form: peak[form][0]) == "nf4_checkpointing", "the lowest mean"
assert peak["nf4_checkpointing"][2] > peak["nf4"][1], "the seeds overlap"
assert seconds["nf4_checkpointing"][1] > seconds["nf4"][2], "more time with every seed"

llama_70b = transformers.AutoConfig.for_model(
    "llama",
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
of_qlora, of_lora = (
    memory.estimate_memory(
        llama_70b,
        method,
        peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        batch_size=1,
        sequence_length=512,
        dtype="bfloat16",
        gradient_checkpointing=True,
        **options,
    ).total
    / 1e9
    for method, options in (("qlora", {"double_quantization": True}), ("lora", {}))
)
assert of_qlora < 80 < of_lora < 160, "one card of 80 GB, or two"

# %% [markdown]
# A step on NF4 takes as long as one on float32, within the spread, and none of the forms is faster: QLoRA computes with
# the weights read back, layer by layer, at every pass. bfloat16 takes *twice as long*, on this processor. Weights,
# gradients and optimizer shrink from {{large:.1f}} to {{small:.1f}} MB, and **the peak of the process doesn't show it**: ten megabytes are
# lost in some fourteen hundred of libraries and activations, and two seeds of one form are up to two hundred megabytes
# apart. So not even bfloat16 shows, which halves many activations. Checkpointing has the lowest mean, some
# {{round(less, -1):.0f}} MB below NF4 without it, though the seeds overlap; and it takes more time with every seed,
# {{longer:.0%}} in the mean. The next section counts activations alone.
#
# **QLoRA saves memory, not time.** At this size it saves nothing that you'd notice. At 70 billion the first figure has
# {{of_qlora:.0f}} GB in the place of LoRA's {{of_lora:.0f}}: one card of 80 GB, or two.

# %% [markdown]
# ## What else saves memory?
#
# Three more savings are named along with QLoRA. **Activation checkpointing** (formerly *gradient checkpointing*)
# keeps only each block's input for the backward pass, and computes the rest again. **8-bit optimizers** keep Adam's
# two numbers in 8 bits. **Paged optimizers** let them move to the computer's memory when the GPU's is full.
#
# **Predict:** for one batch of 32 rows: which is larger, the whole quantised model, or what its forward pass keeps?

# %%
batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
batch = {key: value.to(device) for key, value in batch.items()}


def kept_by_forward(model):
    """(bytes that a forward pass keeps for the backward pass, weights aside; the gradients)."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held on to, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(**batch, use_cache=False).loss
    total = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    loss.backward()
    return total, [weight.grad for weight in model.parameters() if weight.grad is not None]


# %%
activations, gradients = {}, {}
for checkpointing in (False, True):
    runtime.seed_everything(0)
    model = get_peft_model(load(four_bits()), lora_config())
    if checkpointing:
        model.activation_checkpointing_enable()
    activations[checkpointing], gradients[checkpointing] = kept_by_forward(model)
on_float32, _ = kept_by_forward(get_peft_model(load(), lora_config()))
largest = max((one - other).abs().max().item() for one, other in zip(*gradients.values()))
print(f"model in NF4 with adapter: {held['NF4'] / 1e6:.1f} MB")
print(
    f"kept by a forward pass: {activations[False] / 1e6:.1f} MB (on float32"
    f" {on_float32 / 1e6:.1f}), with checkpointing {activations[True] / 1e6:.1f} MB;"
    f" gradients differ by {largest:.0e}"
)

# %% [markdown]
# **With a batch of 32 rows the activations outweigh the model by far**, and quantising does not touch them.
# Checkpointing does, for one more forward pass a step (its price is in the table above), and changes no gradient.
#
# And the optimizers? **Predict:** Adam's numbers go from 4 bytes to 1. Does the state of a LoRA run become a quarter?

# %%
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

rows, said = [], {}
for method in ("LoRA on NF4", "all weights"):
    row = []
    for optimizer_class in (torch.optim.AdamW, AdamW8bit, PagedAdamW8bit):
        model = get_peft_model(load(four_bits()), lora_config()) if "LoRA" in method else load()
        with warnings.catch_warnings(record=True, action="always") as caught:
            optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            model.train()(**batch, use_cache=False).loss.backward()
            optimizer.step()
        row.append(f"{memory.measure_training_state(model, optimizer).optimizer / 1e6:.2f}")
        said |= {str(warning.message): 1 for warning in caught if "aged" in str(warning.message)}
    rows.append([method, *row])
plotting.table(["optimizer's state, MB", "AdamW", "AdamW8bit", "PagedAdamW8bit"], rows)
print("\n".join(said))

# %% [markdown]
# With all weights the state is a quarter. With LoRA it is not: bitsandbytes leaves tensors of fewer than 4,096
# numbers in 32 bits, and many an *A* or *B* is smaller. (A `Trainer` also leaves embeddings in 32 bits, as its source
# says.)
#
# | | what it does | here | on a GPU |
# |---|---|---|---|
# | activation checkpointing | keeps block inputs, computes the rest again | measured: memory and time | not run here |
# | 8-bit optimizer | Adam's numbers in 8 bits | measured: memory and time | not run here |
# | paged optimizer | state may move to the computer's memory | falls back to the plain one, with a warning | not run here; it is for peaks in long rows ([paper](https://arxiv.org/abs/2305.14314), section 3) |
# | `prepare_model_for_kbit_training` | freezes, float32 for norms and embeddings, checkpointing on | measured: sizes | the same call |

# %% [markdown]
# ## Said of QLoRA, and not so
#
# - "It shrinks the adapter's changes to 4 bits."
# - "Take the adapter away, and the original model is back."
#
# **Predict:** how would you test each of the two?

# %%
adapter_folder = paths.runs_dir() / "lesson05" / "adapter"
with saving(adapter_folder) as temporary:
    trained.save_pretrained(temporary)
saved = read_safetensors_header(adapter_folder / "adapter_model.safetensors")
print(
    "dtypes in the adapter's file:",
    ", ".join(sorted({dtype for dtype, _ in saved.values()})),
    f"· {(adapter_folder / 'adapter_model.safetensors').stat().st_size / 1e3:.0f} kB",
)
with trained.disable_adapter():
    switched_off = trained.eval()(witness).logits.detach()
original, fresh = (
    model.eval()(witness).logits.detach() for model in (base_model, load(four_bits()))
)
for label, logits in (("the base in NF4", fresh), ("the original base", original)):
    print(f"adapter off, against {label}: {(switched_off - logits).abs().max():.1e}")
assert torch.equal(switched_off, fresh)

# %% [markdown]
# Neither holds. The adapter is in floats, never in 4 bits (in bfloat16 if TRL is left alone). Switched off, it leaves
# the *quantised* base, to the bit; **the original is only in its own file.**

# %% [markdown]
# ## Merge: into which weights?
#
# Lesson 2 merged an adapter into its base, and lesson 7 does it thoroughly. Here are two bases: the original, and the
# one in NF4 that the adapter was trained on. And three routes:
#
# 1. into the **original** weights, as many recipes do;
# 2. into the **dequantised** ones, `model.dequantize()`: the 4-bit weights read back as floats;
# 3. into the **4-bit** weights themselves, which is what `merge_and_unload()` does when nobody says otherwise.
#
# We compare with the trained model where it predicts a token of the answer, and where one of the question.
#
# **Predict:** which of the three gives the model that you trained?

# %%
asked = [
    tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    for row in test.select(range(32))
]
starts = torch.tensor([len(ids) for ids in asked], device=device)[:, None]
steps = torch.arange(probe["input_ids"].shape[1], device=device)
ends = probe["attention_mask"].sum(1, keepdim=True)
answers = (steps >= starts - 1) & (steps < ends - 1)  # where a token of the answer is predicted
transformers.utils.logging.set_verbosity_error()  # else dequantize() tells its dtype on stderr
bases = {
    "original": load(),
    "dequantised": load(four_bits()).dequantize(),
    "4 bits": load(four_bits()),
}
transformers.utils.logging.set_verbosity_warning()
merged, rows = {}, []
for route, base in bases.items():
    with warnings.catch_warnings(record=True, action="always") as caught:
        merged[route] = PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()
    score = evaluation.evaluate_task(merged[route], tokenizer, "sailor", test)
    in_answers, elsewhere = (
        against(lambda **given: trained(**given).logits, merged[route], where)
        for where in (answers, ~answers)
    )
    rows.append(
        [
            route,
            f"{in_answers.kl:.1e}",
            f"{in_answers.top1_agreement:.1%}",
            f"{elsewhere.kl:.1e}",
            f"{elsewhere.top1_agreement:.1%}",
            f"{score['score']:.0%}",
            f"{merged[route].get_memory_footprint() / 1e6:.1f}",
        ]
    )
plotting.table(
    [
        "merged into",
        "answers: KL",
        "same token",
        "questions: KL",
        "same token",
        f"right (trained: {after['score']:.0%})",
        "MB",
    ],
    rows,
)
print(*{str(one.message) for one in caught if "Merge" in str(one.message)})

# %% [markdown]
# Only the dequantised route gives the model that was trained, and it is no longer small. The other two are *other*
# models, even where the answers don't show it. In the original weights the rounding is gone that the adapter had
# learned to live with. In 4 bits each sum of base and change is rounded to one of sixteen levels once more.
#
# **Predict:** how many of the 4-bit numbers stay on their level when an adapter is merged into them? And with three
# seeds, which of the routes loses?

# %%
stays = total = 0
for name, layer in load(four_bits()).named_modules():
    if isinstance(layer, Linear4bit):
        old, new = layer.weight.data, merged["4 bits"].get_submodule(name).weight.data
        stays += (old >> 4 == new >> 4).sum().item() + (old & 15 == new & 15).sum().item()
        total += 2 * old.numel()
print(f"merged into 4 bits: {stays / total:.0%} of the numbers keep their level")
ways = data.load_results("quantised_merge")
routes = {
    "trained": "the trained model",
    "original": "into the original",
    "dequantised": "into the dequantised",
    "four_bit": "into 4 bits",
}
columns = {
    "right on test": ("test", ".1%"),
    "loss of the answers": ("loss", ".4f"),
    "same token, answers": ("top1", ".1%"),
    "same token, questions": ("top1_question", ".0%"),
}
plotting.table(
    ["mean (lowest to highest seed)", *columns],
    [
        [
            label,
            *(
                spread(over_seeds(ways, column, "way")[way], form)
                for column, form in columns.values()
            ),
        ]
        for way, label in routes.items()
    ],
)

# %% tags=["claim"]
ways = ("original", "four_bit")
elsewhere, on_answers = (
    swept("quantised_merge", column, "way") for column in ("top1_question", "top1")
)
right, loss = (
    {(row["way"], row["seed"]): row[column] for row in data.load_results("quantised_merge")}
    for column in ("test", "loss")
)
lost = [right["trained", seed] - right[way, seed] for way in ways for seed in range(3)]
rises = {way: [loss[way, seed] / loss["trained", seed] - 1 for seed in range(3)] for way in ways}
others = [1 - agreement for way in ways for agreement in elsewhere[way][1:]]
of_trained = [right["trained", seed] for seed in range(3)]
assert max(lost) < max(of_trained) - min(of_trained), "more answers than the seeds are apart"
assert 0.02 < max(lost) <= 0.03, "at most three in a hundred"
assert all(right["trained", seed] == right["dequantised", seed] for seed in range(3)), (
    "on both wrong ones"
)
assert min(rises["original"] + rises["four_bit"]) > 0, "rises, with every seed"
assert min(on_answers[way][1] for way in ways) > 0.99, "agree on 99 in 100"
assert max(lost) < min(*others, *rises["original"], *rises["four_bit"]), "the last to notice"

# %% [markdown]
# More than a third of the numbers move to another level. And none of the routes loses more answers than the seeds are
# apart: at most three in a hundred. But on both wrong ones **the loss of the answers rises, with every seed**: by
# {{100 * min(rises["original"]):.0f}} to {{max(rises["original"]):.0%}} in the original weights, by {{100 * min(rises["four_bit"]):.0f}} to {{max(rises["four_bit"]):.0%}} in 4 bits. So the adapter *had* made up for
# the rounding. On tokens of the answers the models agree on 99 in 100 and more; on text that the adapter was not trained
# to write, here the questions, {{100 * min(others):.0f}} to {{max(others):.0%}} of the predictions are others. The score is the last to notice
# a wrong merge.
#
# **Merge into the weights that you trained on, read back as floats; then measure.** If you must ship 4 bits, ship the
# 4-bit base with its adapter beside it.

# %% [markdown]
# ### Exercise: merge where nothing is rounded (core, 10 min)
#
# Write route 2 for one layer. You get a `Linear4bit`, *A* (r, inputs), *B* (outputs, r) and the scaling. Return the
# merged weight, (outputs, inputs) in float, and leave the layer as it is. Expected: what `dequantize()` and
# `merge_and_unload()` give together.
#
# <details><summary>I get a shape error, or numbers up to 255</summary>
# <code>layer.weight.data</code> is packed: two codes in a byte. Read it back with
# <code>functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)</code>.
# </details>
# <details><summary>The check says that the change lies on its side</summary>
# <code>B @ A</code> has the shape (outputs, inputs) already.
# </details>


# %% exercise="05.merge" points=3
def merged_weight(layer, A, B, scaling):
    """Return the weight (outputs, inputs) of a Linear4bit with the adapter's change added."""
    ### BEGIN SOLUTION
    base = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return base + scaling * (B @ A)
    ### END SOLUTION


lesson05.merge(merged_weight)

# %%
### BEGIN HIDDEN TESTS
assert lesson05.merge.outcome(merged_weight).passed
_layer = lesson05.four_bit_layer(128, 96, seed=31)
_A, _B = lesson05.change_of(128, 96, 6, seed=32)
_wanted = lesson05.read(_layer) + 0.25 * _B @ _A
assert torch.allclose(merged_weight(_layer, _A, _B, 0.25), _wanted, atol=1e-5)
### END HIDDEN TESTS

# %% [markdown]
# ## Break it
#
# Five mistakes. The first is not even yours.

# %% [markdown]
# ### 1 · The weights that move when you look at them
#
# You load in 4 bits, look at the score *before*, train, look at the score in the middle. A careful way to work. Below
# are two such runs, alike but for one line: the first calls `stop_repacking` after loading.
#
# **Predict:** twenty steps each. How can a forward pass without gradients change what is learned later?


# %%
def run(helped):
    """Score, train, score: the loss on validation rows afterwards, and what was warned of."""
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=runtime.dtype(), quantization_config=four_bits()
    )
    if helped:
        stop_repacking(model)
    made = make_trainer(model, steps=20, batch=16, rows=train_rows.select(range(320)))
    with warnings.catch_warnings(record=True, action="default") as caught:
        started = made.evaluate()["eval_loss"]
        made.train()
    warned = {str(one.message).split(" to the ")[0] for one in caught if "gemv" in str(one.message)}
    return made, started, made.evaluate()["eval_loss"], warned


labs = {helped: run(helped) for helped in (True, False)}
print("two runs of 20 steps; the line above is the second's")
plotting.table(
    ["after loading", "loss before", "loss after 20 steps", "warnings"],
    [
        [
            "`stop_repacking`" if helped else "nothing",
            f"{started:.3f}",
            f"{ended:.3f}",
            ", ".join(warned) or "none",
        ]
        for helped, (_, started, ended, warned) in labs.items()
    ],
)
print("this processor has AVX512-BF16:", bool(functional.has_avx512bf16()))
for helped, (made, *_) in labs.items():
    part = next(part for part in made.model.modules() if isinstance(part, Linear4bit))
    x = torch.randn(4, part.in_features, device=device, requires_grad=True)
    with warnings.catch_warnings(action="ignore"):  # the one in the table
        part(x).sum().backward()
    print(
        f"after {'stop_repacking' if helped else 'nothing'}, a layer passes a gradient on:",
        x.grad is not None,
    )

# %% [markdown]
# On a processor with AVX512-BF16 (recent Xeon and Zen processors) the second run learns far less. There, the first
# forward pass of a `Linear4bit` in eval mode puts its weight into another layout, for a fast kernel, *and leaves it
# so*. (bitsandbytes 0.50.2; read in `nn/modules.py`, and seen here. A relative of it, the move to another device, is
# [reported](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078).) Then:
#
# - The fast kernel has **no gradient**. In training, a layer passes none on to those before it; only the adapters
#   themselves and the residual connections still do. The loss is right, and falls. PyTorch warns once, among other
#   lines.
# - Whoever reads the weight afterwards reads it **in the wrong order**: a merge, `dequantize()`, a save.
#
# On other processors both runs are alike. The sweep `quantised` has three seeds in which that is done by hand, so that
# any processor shows it: after the first look, no 4-bit layer passes a gradient on.

# %%
scores = over_seeds(swept, "test", "weights")
for form, label in (("nf4", "with stop_repacking"), ("nf4_repacked", "without, done by hand")):
    print(f"{label}: {spread(scores[form])} right on test rows, three seeds")

# %% [markdown]
# The other layout can be had everywhere, by hand, with the function that the forward pass calls.
#
# **Predict:** the weight is the same, in another order. What will `dequantize_4bit` make of it?


# %%
def repack(layer):
    """What an eval forward does to a Linear4bit on a processor with AVX512-BF16."""
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def read(layer):
    """The weight that a Linear4bit stands for."""
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.float().reshape(layer.out_features, layer.in_features)


model = load(four_bits()).to("cpu")
name, layer = next(
    (name, part) for name, part in model.named_modules() if isinstance(part, Linear4bit)
)
healthy = read(layer)
repack(layer)
off = (read(layer) - healthy).norm() / healthy.norm()
title = f"Read after repacking, this weight is off by {off:.0%} of its size"
figure = plotting.weight_picture(
    {"before": healthy[:48, :48], "after": read(layer)[:48, :48]}, title
)
plotting.show(figure, f"{title}. A corner of {name}, 48 × 48, before and after: nothing is alike.")
print(validation.check_quantised(model, base_model))

# %% [markdown]
# **What is right on every machine:** call `stop_repacking(model)` right after loading. All it does is set
# `support_avx512bf16_for_cpu = False` on every `Linear4bit`, and refuse a model that comes too late. Then look, once:
# `check_quantised` before you train, and before you merge. (`ATEN_CPU_CAPABILITY` does not help: bitsandbytes asks
# the processor itself. And the package `kernels`, which bitsandbytes would use to fetch a kernel from the hub, is left
# out of this course on purpose.)
#
# **Predict:** with that line, will the gradients before and after an evaluation agree to the bit?


# %%
def gradients_of(model):
    model.zero_grad()
    model.train()(**batch, use_cache=False).loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


lab = labs[True][0].model
parts = [part for part in lab.modules() if isinstance(part, Linear4bit)]
first, stored = gradients_of(lab), [read(part) for part in parts]
with torch.no_grad():
    lab.eval()(witness)
second = gradients_of(lab)
same_gradients = all(torch.equal(first[name], second[name]) for name in first)
same_weights = all(torch.equal(one, read(part)) for one, part in zip(stored, parts))
print("to the bit: gradients agree:", same_gradients, "· weights agree:", same_weights)
assert same_gradients and same_weights

# %% [markdown]
# ### Exercise: which weights were spoilt? (stretch, 15 min)
#
# Write the detector that needs to know nothing of processors. You get a model and an `action`, a function without
# arguments that does something to it: an evaluation, say. Call it once, and return the names of the `Linear4bit`
# layers whose weight is then another one, as a list or a set. Expected for an action that does nothing: an empty
# list.
#
# <details><summary>The check says that scales were changed, and I found nothing</summary>
# A 4-bit weight is its numbers *and* its scales. Compare what <code>dequantize_4bit</code> gives.
# </details>
# <details><summary>It stops with "Float did not match BFloat16"</summary>
# What is read back from a repacked layer may have another dtype. Add <code>.float()</code>.
# </details>
# <details><summary>I compare the weight with itself</summary>
# <code>layer.weight.data</code> changes with the model. Keep what was read back, or a <code>clone()</code>.
# </details>


# %% exercise="05.spoilt" points=4
def spoilt_layers(model, action):
    """Return the names of the 4-bit layers whose weight is another one after action()."""

    ### BEGIN SOLUTION
    def weights():
        return {
            name: functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            for name, layer in model.named_modules()
            if isinstance(layer, Linear4bit)
        }

    before = weights()
    action()
    after = weights()
    return [name for name in before if not torch.equal(before[name], after[name])]
    ### END SOLUTION


lesson05.spoilt(spoilt_layers)

# %%
### BEGIN HIDDEN TESTS
assert lesson05.spoilt.outcome(spoilt_layers).passed
_model = nn.Sequential(
    lesson05.four_bit_layer(64, 96), nn.Linear(96, 64), lesson05.four_bit_layer(64, 64)
)
assert list(spoilt_layers(_model, lambda: None)) == []
assert list(spoilt_layers(_model, lambda: repack(_model[2]))) == ["2"]
### END HIDDEN TESTS

# %% [markdown]
# ### 2 · Saved after an evaluation
#
# bitsandbytes knows of the other layout when it *saves*, and undoes it. **Predict:** so is a model that was
# evaluated, saved and loaded again the same?

# %%
rows, reports = [], {}
for form, twice in (("NF4", False), ("NF4, double", True)):
    model = load(four_bits(double=twice)).to("cpu")
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            repack(layer)
    folder = paths.runs_dir() / "lesson05" / "saved"
    with saving(folder) as temporary:
        model.save_pretrained(temporary)
    back = stop_repacking(AutoModelForCausalLM.from_pretrained(folder))
    seen = against(forms[form], back.to(device))
    reports[form] = validation.check_quantised(back, base_model)
    pairs = [
        (part.weight, forms[form].get_submodule(name).weight)
        for name, part in back.named_modules()
        if isinstance(part, Linear4bit)
    ]
    same = [
        all(torch.equal(*map(look, pair)) for pair in pairs)
        for look in (lambda weight: weight.data, lambda weight: weight.quant_state.absmax)
    ]
    rows.append(
        [
            form,
            *("as before" if one else "others" for one in same),
            f"{seen.kl:.1e}",
            f"{seen.top1_agreement:.1%}",
            ", ".join(reports[form].codes) or "ok",
        ]
    )
plotting.table(
    [
        "evaluated, saved, loaded",
        "numbers",
        "scales",
        "KL",
        "same most likely token",
        "check_quantised says",
    ],
    rows,
)
print(reports["NF4"])

# %% [markdown]
# With double quantisation it is, but for a last rounding. Without it, the numbers come back in order and their
# *scales* do not. No processor is needed to suffer from that file: whoever downloads it has the damage. **Compare a
# quantised model with the base that it was made from.**

# %% [markdown]
# ### 3 · Four bits, but which?
#
# **Predict:** what does each of these load: FP4, NF4, nothing, an error?


# %%
def asked(**settings):
    """What transformers makes of it, on this model."""
    transformers.utils.logging.set_verbosity(logging.CRITICAL)  # else a report of every layer
    try:
        loaded = AutoModelForCausalLM.from_pretrained(base_folder, **settings)
        parts = (part for part in loaded.modules() if isinstance(part, Linear4bit))
        kinds = {part.weight.quant_type for part in parts}
        return f"loads {', '.join(kinds) or 'no 4-bit layer'}"
    except Exception as error:
        return f"`{type(error).__name__}: {str(error).splitlines()[0].replace('`', '')}`"
    finally:
        transformers.utils.logging.set_verbosity_warning()


# %%
tries = {
    "load_in_4bit=True": BitsAndBytesConfig(load_in_4bit=True),
    "": BitsAndBytesConfig(),
    "load_in_4bit=True, bnb_4bit_quant_type='nf5'": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf5"
    ),
}
rows = [
    [
        "`from_pretrained(folder, load_in_4bit=True)`",
        asked(load_in_4bit=True),
        "no settings to check",
    ]
]
for written, settings in tries.items():
    codes = validation.check_quantization_config(base_model.config, settings).codes
    rows.append(
        [f"`BitsAndBytesConfig({written})`", asked(quantization_config=settings), ", ".join(codes)]
    )
plotting.table(["asked for", "transformers", "check_quantization_config"], rows)
print(validation.check_quantization_config(base_model.config, settings))

# %% [markdown]
# **NF4 is not what you get by default.** Older tutorials pass `load_in_4bit=True` to `from_pretrained`; that argument
# is gone.

# %% [markdown]
# ### 4 · A size that the kernel refuses
#
# **Predict:** a model with layers of 96 × 96. Blocks of 64 don't fit its rows. Does it load, train, answer?

# %%
odd_config = AutoConfig.for_model(
    "llama",
    vocab_size=60,
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=2,
)
odd = AutoModelForCausalLM.from_config(odd_config)
with saving(paths.runs_dir() / "lesson05" / "odd") as temporary:
    odd.save_pretrained(temporary)
for helped in (False, True):
    odd = AutoModelForCausalLM.from_pretrained(
        paths.runs_dir() / "lesson05" / "odd", quantization_config=four_bits()
    )
    said = {}
    for mode in ("train", "eval"):
        try:
            if helped:
                stop_repacking(odd)
            with torch.set_grad_enabled(mode == "train"):
                getattr(odd, mode)()(torch.tensor([[3, 1, 4]]).to(odd.device))
            said[mode] = "works"
        except (RuntimeError, AssertionError) as error:
            said[mode] = f"{type(error).__name__}: {error}"
    label = "stop_repacking" if helped else "as loaded"
    print(f"{label:15} train {said['train']} · eval {said['eval']}")
print(validation.check_quantization_config(odd_config, four_bits()))

# %% [markdown]
# It trains, and fails at the first evaluation, on the processors of mistake 1. The cause is the other layout again,
# and so is the remedy. (And where bitsandbytes has no library for the platform at all, plain PyTorch takes its place
# on a CPU, slowly; the check says so.)

# %% [markdown]
# ### 5 · Two things that nobody said
#
# **Predict:** a `Trainer` on a 4-bit base without an adapter; `merge_and_unload()` on a 4-bit base. Which one is
# refused?

# %%
try:
    transformers.Trainer(
        load(four_bits()),
        transformers.TrainingArguments(
            output_dir=str(paths.runs_dir() / "lesson05"), **runtime.trainer_settings()
        ),
    )
except ValueError as error:
    print(f"Trainer: ValueError: {str(error).split('. ')[0]}.\n")
model = PeftModel.from_pretrained(load(four_bits()), adapter_folder)
print("Before:", validation.check_quantised(model), "\n")
with warnings.catch_warnings(action="ignore"):
    model = model.merge_and_unload()
print("After, alone:", validation.check_quantised(model), "\n")
print("After, with the base:", validation.check_quantised(model, base_model))

# %% [markdown]
# The first is, with a clear sentence. The second is done, with a warning about "rounding errors" for every layer, and
# what that means is in the table of three routes. The check tells before. Afterwards the model looks like any other in
# 4 bits, and **only a look at the base tells**.

# %% [markdown]
# ## Recap
#
# What this notebook measured, in one table:

# %%
plotting.table(
    ["", "measured"],
    [
        ["our NF4 levels, off from the library's table", f"{(levels - library).abs().max():.0e}"],
        [
            "error of NF4, FP4, int4, int8 on this model's weights",
            ", ".join(
                f"{errors['this model'][kind]:.3f}" for kind in ("NF4", "FP4", "int4", "int8")
            ),
        ],
        [
            "base and adapter: float32, NF4, NF4 double",
            ", ".join(f"{held[form] / 1e6:.2f} MB" for form in held),
        ],
        [
            "activations of one batch, and with checkpointing",
            ", ".join(f"{value / 1e6:.0f} MB" for value in activations.values()),
        ],
        [
            "right on test rows: NF4 before, and after training",
            f"{before['score']:.0%}, {after['score']:.0%}",
        ],
        ["three seeds each: float32", spread(scores["fp32"])],
        ["three seeds each: NF4", spread(scores["nf4"])],
        [
            "loss after 20 steps, helped and repacked",
            ", ".join(f"{ended:.2f}" for _, _, ended, _ in labs.values()),
        ],
    ],
)
progress("05")

# %% [markdown]
# ## Take it to work
#
# What would your model take, in full, with LoRA and with QLoRA? Put its folder or hub id between the quotes; only the
# configuration is read. The last line is for the 4-bit model itself, once you have loaded it.

# %%
my_model = ""
my_config = AutoConfig.from_pretrained(my_model or base_folder)
my_settings = four_bits(double=True)
print(validation.check_quantization_config(my_config, my_settings))
for way, (method, options) in training_ways.items():
    estimate = memory.estimate_memory(
        my_config,
        method,
        wide,
        batch_size=4,
        sequence_length=512,
        dtype="bfloat16",
        gradient_checkpointing=True,
        **options,
    )
    print(f"{way:12} {dict(estimate.rows())['total']}")
my_loaded_model, my_base = trained, base_model  # the 4-bit model, and the base or its folder
print(validation.check_quantised(my_loaded_model, my_base))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · Your model has 7 billion parameters. How large are its linear layers in NF4 with double
# quantisation, and what is not in that number?</summary>
# At most 7e9 · 4.127 / 8 = 3.6 GB; less, as some of the 7 billion are embeddings and norms, which are not quantised.
# Not in it: these; the adapter with its gradients and optimizer state; and the activations, which can be more than all.
# </details>
# <details><summary>2 · After QLoRA a colleague merges the adapter into the 16-bit original. The score is as it was, the
# loss a little higher. Why?</summary>
# The adapter was trained on the rounded weights, and makes up for their rounding. Merge into the dequantised base.
# </details>
# <details><summary>3 · A run on NF4 learns slowly on one machine, and well on another. What do you look at?</summary>
# Whether the 4-bit weights were repacked by an evaluation: <code>check_quantised(model)</code>.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [QLoRA: Efficient Finetuning of Quantized LLMs](https://arxiv.org/abs/2305.14314), Dettmers et al. 2023: section 3
#   for NF4, double quantisation and paged optimizers
# - [8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861), Dettmers et al. 2021
# - [NF4 Isn't Information Theoretically Optimal (and that's Good)](https://arxiv.org/abs/2306.06965), Yoshida 2023
# - [transformers: bitsandbytes](https://huggingface.co/docs/transformers/main/en/quantization/bitsandbytes), and
#   [PEFT: quantization](https://huggingface.co/docs/peft/main/en/developer_guides/quantization)
# - [Making LLMs even more accessible with bitsandbytes, 4-bit quantization and
#   QLoRA](https://huggingface.co/blog/4bit-transformers-bitsandbytes) by Hugging Face
# - [LoRA and QLoRA](https://www.ibm.com/think/topics/lora) by IBM; [parameter-efficient
#   fine-tuning](https://huggingface.co/blog/peft) by Hugging Face; [LoRA by
#   Cloudflare](https://www.cloudflare.com/learning/ai/what-is-lora/)
# - [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# Next: lesson 6 asks whether a better start than a random *A* and a zero *B* pays.
