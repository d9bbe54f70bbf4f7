"""Checks of lesson 5: bits per parameter, quantise in blocks, merge into the dequantised base, find weights that were spoilt."""

import math

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    reference,
)


@exercise("05.bits", title="Bits per parameter", level="warm-up", minutes=5)
def bits(function):
    """Compare with 4 + 32/block, and with double quantisation 4 + 8/block + 32/(block * group)."""
    for block, group in ((64, None), (128, None), (64, 256), (32, 256), (128, 64), (16, 16), (256, None)):
        found = expect_number(call_learner(function, block, group), "the number of bits")
        right = 4 + 32 / block if group is None else 4 + 8 / block + 32 / (block * group)
        if math.isclose(found, right, abs_tol=1e-9):
            continue
        if any(round(right, digits) == found for digits in range(9)):
            raise TryAgain("That is rounded. Return the number as it is.")
        mistakes = [
            (right - 4, "That is the scales' share alone. Add the 4 bits of the number itself."),
            (right / 8, "That is in bytes. Count in bits."),
            (right * block, "That is a whole block. Divide by the numbers in it."),
            (4 + 4 / block, "An absmax in float32 has 4 bytes, and 32 bits."),
        ]
        if group is not None:
            mistakes += [
                (4 + 32 / block, "With double quantisation an absmax has 8 bits, not 32."),
                (
                    4 + 8 / block,
                    "The absmax values are quantised in groups, and each group has a float32 of its own: 32 bits for group × block numbers.",
                ),
                (
                    4 + 8 / block + 32 / group,
                    "A group holds absmax values, each for a whole block. So it stands for group × block numbers.",
                ),
                (
                    4 + 8 / block + 32 / (64 * 256),
                    "Blocks need not have 64 numbers: a group stands for group × block of them.",
                ),
                (
                    4 + 8 / block + 32 / (block * 256),
                    "Groups need not have 256 absmax values: the second number that you are given says how many.",
                ),
                (
                    4 + 32 / block + 8 / block + 32 / (block * group),
                    "The 8 bits stand in place of the 32, they don't come on top.",
                ),
            ]
        for wrong, hint in mistakes:
            if math.isclose(found, wrong, abs_tol=1e-9):
                raise TryAgain(hint)
        side = "many" if found > right else "few"
        raise TryAgain(
            f"For blocks of {block}{f' and groups of {group}' if group else ''} you count {found:.4g} bits, which is too {side}."
        )


@reference
def there_and_back(weight, levels, block):
    """`weight` quantised in blocks of `block` numbers in a row to levels in [-1, 1], and read back, in the same shape."""
    import torch

    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    between = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(rows / absmax, between)] * absmax).reshape(weight.shape)


def level_sets():
    """{name: levels} of NF4, of a plain 4-bit integer, and of two bits that nobody uses, in ascending order."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    return {
        "NF4": get_4bit_type("nf4", device="cpu"),
        "int4": torch.arange(-7, 8) / 7,
        "four uneven": torch.tensor([-1.0, -0.3, 0.05, 1.0]),
    }


@exercise("05.quantise", title="Quantise in blocks", level="core", minutes=15)
def quantise(function):
    """Compare with the nearest level times the block's absmax; for NF4 that is what bitsandbytes' kernel gives, to the bit."""
    import torch

    generator = torch.Generator().manual_seed(6)
    for shape, block in (((16, 128), 64), ((12, 96), 32), ((6, 64), 128), ((4, 96), 64), ((3, 32), 16)):
        for name, levels in level_sets().items():
            weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[0])[:, None]
            given, known = weight.clone(), levels.clone()
            found = expect_tensor(call_learner(function, given, known, block), shape, "the result").float()
            if not torch.equal(given, weight) or not torch.equal(known, levels):
                raise TryAgain("The weight or the levels that you were given have changed. Make a new tensor.")
            right = there_and_back(weight, levels, block)
            if not torch.allclose(found, right, rtol=1e-5, atol=1e-9):
                _explain_quantised(weight, levels, block, found, right, name)


def _explain_quantised(weight, levels, block, found, right, name):
    import torch

    def close(other):
        return (
            other is not None
            and other.shape == found.shape
            and torch.allclose(found, other.to(found), rtol=1e-4, atol=1e-8)
        )

    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    between, inside = (levels[1:] + levels[:-1]) / 2, rows / absmax
    codes = torch.bucketize(inside, between)
    largest = rows.amax(1, keepdim=True)
    steps = ((inside + 1) / 2 * (len(levels) - 1)).round().long()
    mistakes = [
        (weight, "Nothing was rounded: this is the weight itself."),
        (
            codes.reshape(weight.shape),
            "These are the numbers of the levels. Look the levels up, and multiply by the block's absmax.",
        ),
        (
            levels[codes].reshape(weight.shape),
            "These are levels from -1 to 1. Multiply each block by its absmax again.",
        ),
        (there_and_back(weight, levels, weight.numel()), "One absmax for the whole matrix. Each block has its own."),
        (
            there_and_back(weight, levels, weight.shape[1]),
            "One absmax for each row. A block has `block` numbers, may be shorter than a row, "
            "and may run on into the next: weight.reshape(-1, block).",
        ),
        (
            there_and_back(weight, levels, weight.numel() // block),
            "These are `block` pieces. Pieces of `block` numbers are weight.reshape(-1, block).",
        ),
        (
            there_and_back(weight.T.contiguous(), levels, block).T if weight.numel() % block == 0 else None,
            "Your blocks run down the columns. They run along the rows: weight.reshape(-1, block).",
        ),
        (
            there_and_back(weight.reshape(block, -1).T.contiguous(), levels, block).T.reshape(weight.shape),
            "reshape(block, -1) puts the blocks into columns. Use reshape(-1, block).",
        ),
        (
            (levels[torch.bucketize(rows / largest, between)] * largest).reshape(weight.shape),
            "You divide by the largest number. A block's largest size may be that of a negative one: take abs() first.",
        ),
        (
            (levels[torch.bucketize(inside, levels).clamp(max=len(levels) - 1)] * absmax).reshape(weight.shape),
            "Each number goes up to the next level. Take the nearest one: the borders lie half-way between levels.",
        ),
        (
            (levels[(torch.bucketize(inside, levels, right=True) - 1).clamp(min=0)] * absmax).reshape(weight.shape),
            "Each number goes down to the level below. Take the nearest one: the borders lie half-way between levels.",
        ),
        (
            (levels[steps] * absmax).reshape(weight.shape),
            "You round to equal steps and look the level up by its number. The levels are not equally far apart: take the nearest.",
        ),
    ]
    for wrong, hint in mistakes:
        if close(wrong):
            raise TryAgain(hint)
    off = (found - right).abs().amax(1) / right.abs().amax(1)
    raise TryAgain(
        f"With {name} levels and blocks of {block} row {int(off.argmax())} is off by {off.max():.1%} of its largest number. "
        "Divide each block by its absmax, take the nearest level, multiply by the absmax."
    )


def four_bit_layer(inputs, outputs, seed=0, quant_type="nf4", double=False):
    """A `Linear4bit` with random weights, never run; `double` quantises its scales, too."""
    import torch
    from bitsandbytes.nn import Linear4bit

    generator = torch.Generator().manual_seed(seed)
    layer = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=double
    )
    layer.weight.data = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return layer.to("cpu")


def change_of(inputs, outputs, rank, seed=0):
    """Random A (rank, inputs) and B (outputs, rank)."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(rank, inputs, generator=generator) / 8, torch.randn(outputs, rank, generator=generator) / 8


def read(layer):
    """The weight (outputs, inputs) that a `Linear4bit` stands for."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@exercise("05.merge", title="Merge where nothing is rounded", level="core", minutes=10)
def merge(function):
    """Compare with the dequantised weight plus scaling * B @ A, in NF4 and FP4, with scales as they are and quantised."""
    import torch

    for seed, (inputs, outputs, rank, scaling, how) in enumerate((
        (64, 64, 4, 2.0, {}), (128, 64, 3, 0.5, {"double": True}), (64, 192, 5, 2.0, {"quant_type": "fp4"}),
        (192, 128, 1, 0.25, {"quant_type": "fp4", "double": True}),
    )):  # fmt: skip
        layer, (A, B) = four_bit_layer(inputs, outputs, seed, **how), change_of(inputs, outputs, rank, seed)
        stored, base, change = layer.weight.data.clone(), read(layer), B @ A
        given = A.clone(), B.clone()
        found = expect_tensor(call_learner(function, layer, *given, scaling), (outputs, inputs), "the merged weight")
        if not torch.equal(layer.weight.data, stored) or not torch.equal(read(layer), base):
            raise TryAgain("The layer has changed. Return a new weight, and leave the 4-bit one as it is.")
        if not torch.equal(given[0], A) or not torch.equal(given[1], B):
            raise TryAgain("A or B has changed. Multiply without an underscore: scaling * B @ A makes a new tensor.")
        right = base + scaling * change
        if torch.allclose(found.float(), right, atol=1e-5):
            continue
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        kind = layer.weight.quant_state.quant_type
        rounded = dequantize_4bit(*quantize_4bit(right, quant_type=kind))
        mistakes = [
            (base, "This is the base alone: the adapter's change is missing."),
            (scaling * change, "This is the adapter's change alone: add the base's weight."),
            (base + change, "The scaling is missing: add scaling * B @ A."),
            (base - scaling * change, "The change is added, not taken away."),
            (right.bfloat16().float(), "This is right to 16 bits. Return the sum in float32."),
            (base + scaling / rank * change, "The scaling is α/r already. Don't divide by r again."),
            (rounded, "This was quantised again, and the change rounded with it. Return the sum in float32."),
            (
                base + scaling * change.T if inputs == outputs else None,
                "The change lies on its side. B @ A has the shape (outputs, inputs) already.",
            ),
            (
                base + scaling * A.T @ B.T if inputs == outputs else None,
                "The change lies on its side. B @ A has the shape (outputs, inputs) already.",
            ),
        ]
        for wrong, hint in mistakes:
            if wrong is not None and torch.allclose(found.float(), wrong, atol=1e-5):
                raise TryAgain(hint)
        double = " with quantised scales" if how.get("double") else ""
        raise TryAgain(
            f"The base is in {kind.upper()}{double} here. The merged weight is off by {(found - right).abs().max():.2g}. Read the base back with "
            "bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), and add scaling * B @ A."
        )


def small_model():
    """Two blocks of 4-bit layers, one of them with quantised scales, and a head that is not in 4 bits."""
    from torch import nn

    parts = ("query", "key", "up", "down")
    blocks = nn.ModuleList(
        nn.ModuleDict({name: four_bit_layer(64, 64, 4 * i + j) for j, name in enumerate(parts)}) for i in range(2)
    )
    last = four_bit_layer(64, 64, 9, double=True)
    return nn.ModuleDict({"blocks": blocks, "last": last, "head": nn.Linear(64, 8)})


def spoilers(model):
    """{what happens: (an action that does it to the model, the names of the layers that it spoils)}."""
    import copy

    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    first, second = model["blocks"]

    def nothing():
        pass

    def repack():
        for layer in (first["key"], second["up"]):
            weight = layer.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)

    def other_numbers():
        second["query"].weight.data.copy_(second["query"].weight.data.flip(0))

    def one_number():
        second["key"].weight.data[-1] ^= 1  # one step up or down in the last two numbers of the last row

    def scales_only():
        first["down"].weight.quant_state.absmax.mul_(2)

    def scales_of_scales():
        model["last"].weight.quant_state.state2.absmax.mul_(1.001)

    def another_layer():
        first["up"] = four_bit_layer(64, 64, seed=77)

    def equal_copy():
        first["query"] = copy.deepcopy(first["query"])

    def first_and_last():
        first["query"].weight.data[0] ^= 16
        model["last"].weight.data[0] ^= 16

    def head_only():
        model["head"].weight.data.zero_()

    return {
        "nothing": (nothing, set()),
        "repacking": (repack, {"blocks.0.key", "blocks.1.up"}),
        "other numbers": (other_numbers, {"blocks.1.query"}),
        "another last number": (one_number, {"blocks.1.key"}),
        "other scales": (scales_only, {"blocks.0.down"}),
        "other scales of the scales": (scales_of_scales, {"last"}),
        "another layer in the place of one": (another_layer, {"blocks.0.up"}),
        "an equal layer in the place of one": (equal_copy, set()),
        "another first number": (first_and_last, {"blocks.0.query", "last"}),
        "a head in float32": (head_only, set()),
    }


def _watched(action, ran):
    """The action as the learner gets it: it adds to `ran` when it is called, and takes nothing."""

    def watched(*given):
        if given:
            raise TryAgain(f"The action takes no arguments, and you gave it {len(given)}: call action().")
        ran.append(True)
        action()

    return watched


@exercise("05.spoilt", title="Which weights were spoilt?", level="stretch", minutes=15)
def spoilt(function):
    """Plant damage of several kinds, in place, and compare the names that are returned."""
    from bitsandbytes.nn import Linear4bit

    for what in spoilers(small_model()):
        model, ran = small_model(), []
        action, right = spoilers(model)[what]

        answer = expect_list(call_learner(function, model, _watched(action, ran)), "the answer", in_order=False)
        if not ran:
            raise TryAgain("Your function was given an action and did not call it: action().")
        if len(ran) > 1:
            raise TryAgain("The action was called more than once. Call it once, between the two looks at the weights.")
        if not all(isinstance(name, str) for name in answer):
            raise TryAgain("Return the names of the layers, as named_modules() gives them.")
        found, layers = set(answer), {name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
        if found == right:
            continue
        if {name.rpartition(".")[2] for name in right} == found != right:
            raise TryAgain(
                f"Two blocks may have a layer {sorted(found)[0]!r}. Give whole names, as named_modules() does: {sorted(right)[0]!r}."
            )
        if strangers := sorted(found - layers):
            raise TryAgain(
                f"{strangers[0]} is no 4-bit layer. Look at isinstance(layer, Linear4bit), and give the layer's name, not its weight's."
            )
        if what.startswith("an equal") and found:
            raise TryAgain(
                f"A layer was replaced by an equal one, and you found {sorted(found)}. Compare the numbers: torch.equal."
            )
        if what == "nothing":
            raise TryAgain(
                f"Nothing happened, and you found {sorted(found)}. Compare tensors with torch.equal, of the same layer before and after."
            )
        if "scales" in what and not found:
            raise TryAgain(
                f"The action brought {what}, and you found nothing. Its numbers alone don't tell, and there may be scales of scales: "
                "compare what dequantize_4bit gives."
            )
        if what.startswith("another layer") and not found:
            raise TryAgain(
                "A layer was replaced by another one, and you found nothing. After the action, go through the model again."
            )
        if not found:
            raise TryAgain(
                f"The action brought {what}, and you found nothing. Did you keep the weights themselves, which change with the "
                "model, rather than what dequantize_4bit gives? And compare every number."
            )
        raise TryAgain(f"The action spoilt {sorted(right)}, and you return {sorted(found)}.")
