"""The check of the deep dive on four bits on a CPU, with its typical mistakes."""

import numpy
import pytest
import torch

from adapter_checks.bitsandbytes_workarounds import quiet_imports
from course_utils.exercises import deep_four_bits_on_cpu

quiet_imports()

from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit


def read(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def right_spoilt(model, action):
    def weights():
        return {name: read(layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}

    before = weights()
    action()
    return [name for name, weight in weights().items() if not torch.equal(weight, before[name])]


# Other right answers


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


MISTAKES_IN_FOUR_BITS = [
    ("spoilt", with_argument, "takes no arguments, and you gave it 1: call action()"),
    ("spoilt", other_objects_too, "replaced by an equal one"),
    ("spoilt", compared_by(lambda one, other: not torch.allclose(one, other, atol=1e-2)), "you found nothing"),
    ("spoilt", compared_by(lambda one, other: one[-1].ne(other[-1]).any()), "another first number"),
    ("spoilt", lambda *given: right_spoilt(*given)[:1], "The action spoilt ['blocks.0.key', 'blocks.1.up']"),
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
]


@pytest.mark.parametrize("name, wrong, hint", MISTAKES_IN_FOUR_BITS)
def test_typical_mistakes_in_four_bits_get_their_own_hint(name, wrong, hint):
    outcome = getattr(deep_four_bits_on_cpu, name).outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert hint in outcome.hint, outcome.hint


def test_the_planted_damage_is_what_it_says():
    for what, (action, right) in deep_four_bits_on_cpu.spoilers(deep_four_bits_on_cpu.small_model()).items():
        model = deep_four_bits_on_cpu.small_model()
        action, right = deep_four_bits_on_cpu.spoilers(model)[what]
        assert set(right_spoilt(model, action)) == right, what


SOLUTIONS = {"deep.spoilt": right_spoilt}
RIGHT = {"deep.spoilt": [spoilt_by_bytes, spoilt_by_differences, spoilt_with_numpy]}
