"""The checks of lesson 5, each with its typical mistakes; and that its run is one of the sweep's."""

import copy
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch

from adapter_checks.bitsandbytes_workarounds import quiet_imports
from course_utils.exercises import lesson05
from tools import build

quiet_imports()

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit

SOURCE = Path(build.ROOT, "lessons", "05_qlora.py").read_text(encoding="utf-8")


# The solutions


def right_bits(block, group):
    return 4 + 32 / block if group is None else 4 + 8 / block + 32 / (block * group)


def right_quantise(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    codes = ((rows / absmax)[..., None] - levels).abs().argmin(-1)
    return (levels[codes] * absmax).reshape(weight.shape)


def read(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def right_merge(layer, A, B, scaling):
    return read(layer) + scaling * B @ A


def right_spoilt(model, action):
    def weights():
        return {name: read(layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}

    before = weights()
    action()
    return [name for name, weight in weights().items() if not torch.equal(weight, before[name])]


# Other right answers


def bits_by_counting(block, group=None):
    numbers = block * (group or 1)
    if group is None:
        return Fraction(4 * numbers + 32, numbers)
    return Fraction(4 * numbers + 8 * group + 32, numbers)


def bits_in_decimals(block, group):
    scale = Decimal(32) if group is None else 8 + Decimal(32) / group
    return 4 + scale / block


def quantise_with_borders(weight, levels, block):
    rows = weight.view(-1, block)
    absmax = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    codes = torch.searchsorted((levels[1:] + levels[:-1]) / 2, rows / absmax.unsqueeze(1))
    return (levels[codes] * absmax.unsqueeze(1)).view_as(weight)


def quantise_with_numpy(weight, levels, block):
    rows, table = weight.numpy().reshape(-1, block), levels.numpy()
    absmax = numpy.abs(rows).max(axis=1, keepdims=True)
    codes = numpy.abs(rows[..., None] / absmax[..., None] - table).argmin(axis=-1)
    return (table[codes] * absmax).reshape(weight.shape)


def quantise_block_by_block(weight, levels, block):
    read_back = []
    for piece in weight.flatten().split(block):
        scaled = levels * piece.abs().max()
        read_back.append(scaled[(piece[:, None] - scaled[None]).abs().argmin(dim=1)])
    return torch.cat(read_back).reshape(*weight.shape)


def merge_with_addmm(layer, A, B, scaling):
    return torch.addmm(read(layer), B, A, alpha=scaling)


def merge_by_peft(layer, A, B, scaling):
    from peft.utils.integrations import dequantize_bnb_weight

    with torch.no_grad():
        return dequantize_bnb_weight(layer.weight) + (A.T @ B.T).T * scaling


def merge_with_numpy(layer, A, B, scaling):
    return read(layer).numpy() + scaling * (B.numpy() @ A.numpy())


def spoilt_by_bytes(model, action):
    def seen():
        layers = ((name, layer) for name, layer in model.named_modules() if type(layer) is Linear4bit)
        return {(name, read(layer).float().numpy().tobytes()) for name, layer in layers}

    before = seen()
    action()
    return {name for name, _ in before - seen()}


def spoilt_by_differences(model, action):
    names = [name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    before = [read(model.get_submodule(name)).float() for name in names]
    action()
    after = [read(model.get_submodule(name)).float() for name in names]
    return tuple(name for name, one, other in zip(names, before, after) if (one - other).abs().max() > 0)


def spoilt_with_numpy(model, action):
    before = {name: read(layer).float() for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    action()
    layers = dict(model.named_modules())
    return numpy.array([name for name in before if (read(layers[name]).float() != before[name]).any()], dtype=object)


RIGHT = {
    "05.bits": [bits_by_counting, bits_in_decimals, lambda block, group: torch.tensor(right_bits(block, group))],
    "05.quantise": [quantise_with_borders, quantise_with_numpy, quantise_block_by_block],
    "05.merge": [merge_with_addmm, merge_by_peft, merge_with_numpy],
    "05.spoilt": [spoilt_by_bytes, spoilt_by_differences, spoilt_with_numpy],
}


# Typical mistakes


def with_argument(model, action):
    before = {name: read(layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    action(model)
    return [name for name in before if not torch.equal(before[name], read(model.get_submodule(name)))]


def compared_by(differ):
    def spoilt(model, action):
        before = {name: read(layer).float() for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
        action()
        return [name for name in before if differ(before[name], read(model.get_submodule(name)).float())]

    return spoilt


def other_objects_too(model, action):
    before = {name: (layer, read(layer)) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    action()
    after = {name: model.get_submodule(name) for name in before}
    return [
        name
        for name, (layer, weight) in before.items()
        if layer is not after[name] or not torch.equal(weight, read(after[name]))
    ]


LEVELS = lesson05.level_sets()


def as_nf4(layer, A, B, scaling):
    state = copy.deepcopy(layer.weight.quant_state)
    state.code, state.quant_type = LEVELS["NF4"], "nf4"
    return dequantize_4bit(layer.weight.data, state) + scaling * B @ A


def one_scale(weight, levels, block):
    return right_quantise(weight, levels, weight.numel())


def a_scale_a_row(weight, levels, block):
    return right_quantise(weight, levels, weight.shape[1])


def down_the_columns(weight, levels, block):
    return right_quantise(weight.T.contiguous(), levels, block).T


def wrong_reshape(weight, levels, block):
    columns = weight.reshape(block, -1)
    absmax = columns.abs().amax(0)
    codes = ((columns / absmax)[..., None] - levels).abs().argmin(-1)
    return (levels[codes] * absmax).reshape(weight.shape)


def pieces(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return absmax, ((rows / absmax)[..., None] - levels).abs().argmin(-1)


def numbers_of_levels(weight, levels, block):
    return pieces(weight, levels, block)[1].reshape(weight.shape)


def without_scales(weight, levels, block):
    return levels[pieces(weight, levels, block)[1]].reshape(weight.shape)


def signed_largest(weight, levels, block):
    rows = weight.reshape(-1, block)
    largest = rows.amax(1, keepdim=True)
    return (levels[((rows / largest)[..., None] - levels).abs().argmin(-1)] * largest).reshape(weight.shape)


def next_level(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return (levels[torch.bucketize(rows / absmax, levels).clamp(max=len(levels) - 1)] * absmax).reshape(weight.shape)


def level_below(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return (levels[(torch.bucketize(rows / absmax, levels, right=True) - 1).clamp(min=0)] * absmax).reshape(
        weight.shape
    )


def with_absmax(change):
    def quantise(weight, levels, block):
        rows = weight.reshape(-1, block)
        absmax = change(rows.abs().amax(1, keepdim=True))
        return (levels[((rows / absmax)[..., None] - levels).abs().argmin(-1)] * absmax).reshape(weight.shape)

    return quantise


def equal_steps(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return (levels[((rows / absmax + 1) / 2 * (len(levels) - 1)).round().long()] * absmax).reshape(weight.shape)


def in_place(weight, levels, block):
    return weight.copy_(right_quantise(weight, levels, block))


def one_block_wrong(weight, levels, block):
    found = right_quantise(weight, levels, block)
    found[3] *= 1.1
    return found


def merge_in_place(layer, A, B, scaling):
    merged = right_merge(layer, A, B, scaling)
    layer.weight.data, layer.weight.quant_state = quantize_4bit(merged, quant_type="nf4")
    return merged


def with_scaling(factor):
    return lambda layer, A, B, scaling: right_merge(layer, A, B, factor(scaling))


def by(look):
    """`right_spoilt` with another thing looked at."""

    def run(model, action):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
        before = {name: look(layer) for name, layer in layers.items()}
        action()
        return {name for name, layer in layers.items() if not torch.equal(look(layer), before[name])}

    return run


def every_parameter(model, action):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    action()
    return [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]


def not_called(model, action):
    return []


def called_twice(model, action):
    action()
    return right_spoilt(model, action)


def by_identity(model, action):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    before = {name: read(layer) for name, layer in layers.items()}
    action()
    return [name for name, layer in layers.items() if read(layer) is not before[name]]


def children_only(model, action):
    layers = {name: layer for name, layer in model.named_children() if isinstance(layer, Linear4bit)}
    before = {name: read(layer) for name, layer in layers.items()}
    action()
    return [name for name, layer in layers.items() if not torch.equal(read(layer), before[name])]


def layers_from_before(model, action):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    before = {name: read(layer) for name, layer in layers.items()}
    action()
    return [
        name
        for name, layer in layers.items()
        if read(layer).dtype != before[name].dtype or not torch.equal(read(layer), before[name])
    ]


def with_head(model, action):
    return [*right_spoilt(model, action), "head"]


SOLUTIONS = {"bits": right_bits, "quantise": right_quantise, "merge": right_merge, "spoilt": right_spoilt}


@pytest.mark.parametrize(
    "name, wrong, hint",
    [
        ("bits", lambda block, group: right_bits(block, group) - 4, "the scales' share alone"),
        ("bits", lambda block, group: right_bits(block, group) / 8, "in bytes"),
        ("bits", lambda block, group: right_bits(block, group) * block, "a whole block"),
        ("bits", lambda block, group: 4 + 4 / block, "4 bytes, and 32 bits"),
        ("bits", lambda block, group: 4 + 32 / block, "has 8 bits, not 32"),
        (
            "bits",
            lambda block, group: right_bits(block, None) if group is None else 4 + 8 / block + 32 / (64 * 256),
            "need not have 64 numbers",
        ),
        ("bits", lambda block, group: round(right_bits(block, group), 3), "That is rounded"),
        (
            "bits",
            lambda block, group: right_bits(block, None) if group is None else 4 + 8 / block,
            "a float32 of its own",
        ),
        (
            "bits",
            lambda block, group: right_bits(block, None) if group is None else 4 + 8 / block + 32 / group,
            "each for a whole block",
        ),
        ("bits", lambda block, group: right_bits(block, group) + (32 / block if group else 0), "don't come on top"),
        ("bits", lambda block, group: right_bits(block, group and 256), "need not have 256"),
        *(
            ("bits", lambda block, group, digits=digits: round(right_bits(block, group), digits), "That is rounded")
            for digits in (2, 4, 5)
        ),
        ("bits", lambda block, group: 5, "too many"),
        ("quantise", lambda weight, levels, block: right_quantise(weight, LEVELS["NF4"], block), "is off by"),
        ("quantise", lambda weight, levels, block: right_quantise(weight, levels, 64), "is off by|in blocks of"),
        ("merge", as_nf4, "The base is in FP4 here"),
        ("spoilt", with_argument, "takes no arguments, and you gave it 1: call action()"),
        ("spoilt", other_objects_too, "replaced by an equal one"),
        ("spoilt", compared_by(lambda one, other: not torch.allclose(one, other, atol=1e-2)), "you found nothing"),
        ("spoilt", compared_by(lambda one, other: one[-1].ne(other[-1]).any()), "another first number"),
        ("spoilt", lambda *given: right_spoilt(*given)[:1], "The action spoilt ['blocks.0.key', 'blocks.1.up']"),
        ("bits", lambda block, group: print(end=""), "Is a return missing"),
        ("bits", lambda block, group: float("nan"), "is nan"),
        ("bits", lambda block, group: 32 / group, "TypeError"),
        ("bits", lambda block, group: "4.5", "should be a number"),
        ("quantise", lambda weight, levels, block: weight.clone(), "Nothing was rounded"),
        ("quantise", one_scale, "Each block has its own"),
        ("quantise", a_scale_a_row, "One absmax for each row"),
        ("quantise", numbers_of_levels, "numbers of the levels"),
        ("quantise", without_scales, "levels from -1 to 1"),
        ("quantise", signed_largest, "take abs() first"),
        ("quantise", next_level, "goes up to the next level"),
        ("quantise", equal_steps, "not equally far apart"),
        ("quantise", wrong_reshape, "reshape(block, -1) puts the blocks into columns"),
        ("quantise", in_place, "have changed"),
        (
            "quantise",
            lambda weight, levels, block: right_quantise(weight, levels, weight.numel() // block),
            "Pieces of `block` numbers",
        ),
        ("quantise", level_below, "goes down to the level below"),
        ("quantise", with_absmax(lambda absmax: absmax + 1e-6), "of its largest number"),
        ("quantise", with_absmax(lambda absmax: absmax.clamp(min=0.05)), "of its largest number"),
        ("quantise", one_block_wrong, "row 3 is off by"),
        ("quantise", lambda *given: right_quantise(*given).reshape(-1), "has shape"),
        ("quantise", lambda *given: right_quantise(*given).tolist(), "should be of type Tensor"),
        ("quantise", lambda *given: right_quantise(*given) * float("nan"), "holds NaN"),
        ("quantise", lambda *given: print(end=""), "Is a return missing"),
        ("quantise", lambda weight, levels, block: weight.reshape(7, 7), "RuntimeError"),
        ("merge", lambda layer, A, B, scaling: read(layer), "change is missing"),
        ("merge", lambda layer, A, B, scaling: scaling * B @ A, "add the base's weight"),
        ("merge", with_scaling(lambda scaling: 1), "The scaling is missing"),
        ("merge", with_scaling(lambda scaling: -scaling), "added, not taken away"),
        (
            "merge",
            lambda layer, A, B, scaling: (
                read(layer) + scaling * (B @ A).T
                if layer.in_features == layer.out_features
                else right_merge(layer, A, B, scaling)
            ),
            "lies on its side",
        ),
        (
            "merge",
            lambda *given: dequantize_4bit(*quantize_4bit(right_merge(*given), quant_type="nf4")),
            "quantised again",
        ),
        ("merge", merge_in_place, "The layer has changed"),
        ("merge", lambda layer, A, B, scaling: read(layer) + B @ A.mul_(scaling), "A or B has changed"),
        ("merge", lambda *given: right_merge(*given).bfloat16(), "right to 16 bits"),
        ("merge", lambda layer, A, B, scaling: right_merge(layer, A, B, scaling / len(A)), "Don't divide by r again"),
        ("merge", lambda layer, A, B, scaling: layer.weight.data + scaling * B @ A, "RuntimeError"),
        ("merge", lambda layer, A, B, scaling: layer.weight.data, "has shape"),
        ("merge", lambda *given: right_merge(*given) + 0.1, "is off by 0.1"),
        ("merge", lambda *given: print(end=""), "Is a return missing"),
        ("spoilt", not_called, "did not call it"),
        ("spoilt", called_twice, "more than once"),
        ("spoilt", by(lambda layer: layer.weight.data.clone()), "Its numbers alone don't tell"),
        ("spoilt", by(lambda layer: layer.weight.data), "you found nothing"),
        ("spoilt", every_parameter, "give the layer's name"),
        ("spoilt", by_identity, "Nothing happened, and you found"),
        ("spoilt", with_head, "head is no 4-bit layer"),
        ("spoilt", lambda model, action: [model["head"], action()], "names of the layers"),
        ("spoilt", lambda *given: [name.rpartition(".")[2] for name in right_spoilt(*given)], "Give whole names"),
        ("spoilt", children_only, "you found nothing"),
        ("spoilt", layers_from_before, "go through the model again"),
        (
            "spoilt",
            by(
                lambda layer: torch.cat(
                    [layer.weight.data.float().flatten(), layer.weight.quant_state.absmax.float().flatten()]
                )
            ),
            "scales of scales",
        ),
        ("spoilt", by(lambda layer: read(layer).float().sum().round(decimals=1)), "compare every number"),
        ("spoilt", by(lambda layer: read(layer).float()[0]), "compare every number"),
        ("spoilt", lambda *given: [*right_spoilt(*given), "head"] if right_spoilt(*given) else [], "more than once"),
        ("spoilt", lambda *given: len(right_spoilt(*given)), "should be of type"),
        ("spoilt", lambda *given: print(len(right_spoilt(*given))), "Is a return missing"),
        ("spoilt", lambda model, action: model.missing, "AttributeError"),
    ],
)
def test_typical_mistakes_get_their_own_hint(name, wrong, hint):
    outcome = getattr(lesson05, name).outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert any(part in outcome.hint for part in hint.split("|")), outcome.hint


@pytest.mark.parametrize("kind, name", [("nf4", "NF4")])
def test_the_reference_of_the_exercise_is_bitsandbytes_kernel(kind, name):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    ours = lesson05.there_and_back(weight, lesson05.level_sets()[name], 64)
    assert torch.equal(ours, dequantize_4bit(*quantize_4bit(weight, quant_type=kind)))


def test_the_planted_damage_is_what_it_says():
    for what, (action, right) in lesson05.spoilers(lesson05.small_model()).items():
        model = lesson05.small_model()
        action, right = lesson05.spoilers(model)[what]
        assert set(right_spoilt(model, action)) == right, what


def test_the_lessons_run_is_the_sweeps():
    from experiments import quantised, training

    steps, batch, rate = map(
        float, re.search(r"^STEPS, BATCH, RATE = (\d+), (\d+), (\S+)$", SOURCE, flags=re.MULTILINE).groups()
    )
    assert (steps, batch, rate) == (quantised.STEPS, training.BATCH, quantised.RATE)
