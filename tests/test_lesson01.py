"""The checks of lesson 1: the stub is to do, the solution passes, each typical mistake gets its own hint."""

import contextlib
import math

import numpy
import pytest
import torch

from course_utils.exercises import lesson01


def right_weigh(tensors):
    return sum(t.numel() for t in tensors.values()), next(t.shape[0] for n, t in tensors.items() if "lora_A" in n)


def right_borrow(model, name, input_ids):
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return model(input_ids=input_ids).logits
    finally:
        model.set_adapter(before)


def b_sizes(model):
    sizes = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            sizes.setdefault(name.split(".lora_B.")[1].split(".")[0], []).append(parameter.abs().max().item())
    return sizes


def right_silent(model):
    return sorted(name for name, sizes in b_sizes(model).items() if max(sizes) == 0)


# Other right answers


def weigh_in_a_loop(tensors):
    count, rank = 0, None
    for name, tensor in tensors.items():
        count += math.prod(tensor.shape)
        if name.endswith("lora_B.weight"):
            rank = tensor.size(1)
    return [count, rank]


def weigh_with_numpy(tensors):
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    first = min(name for name in arrays if "lora_A" in name)
    return numpy.array([sum(array.size for array in arrays.values()), arrays[first].shape[0]])


def weigh_flat(tensors):
    rank = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}.pop()
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).shape[0], torch.tensor(rank)


@contextlib.contextmanager
def switched(model, name):
    before = model.active_adapters
    model.base_model.set_adapter(name)
    try:
        yield
    finally:
        model.base_model.set_adapter(before)


def borrow_in_a_context(model, name, input_ids):
    with switched(model, name):
        return model(input_ids=input_ids)["logits"].numpy()


def borrow_for_each_row(model, name, input_ids):
    return model(input_ids=input_ids, adapter_names=[name] * len(input_ids)).logits


def borrow_and_raise_again(model, name, input_ids):
    (before,) = model.active_adapters
    model.set_adapter(name)
    try:
        logits = model(input_ids).logits
    except Exception:
        model.set_adapter(before)
        raise
    model.set_adapter(before)
    return logits


def silent_by_layers(model):
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {
        name
        for name in model.peft_config
        if not any(layer.lora_B[name].weight.any() for layer in layers if name in layer.lora_B)
    }


def silent_by_files(model):
    from peft import get_peft_model_state_dict

    found = []
    for name in model.peft_config:
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        if all(torch.count_nonzero(tensor) == 0 for key, tensor in tensors.items() if "lora_B" in key):
            found.append(name)
    return tuple(found)


def silent_with_numpy(model):
    alive = {name: False for name in model.peft_config}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "lora_B" in parts:
            alive[parts[parts.index("lora_B") + 1]] |= bool(numpy.any(parameter.detach().numpy() != 0))
    return numpy.array(sorted(name for name, one in alive.items() if not one), dtype=str)


RIGHT = {
    "01.weigh": [weigh_in_a_loop, weigh_with_numpy, weigh_flat],
    "01.borrow": [borrow_in_a_context, borrow_for_each_row, borrow_and_raise_again],
    "01.silent": [silent_by_layers, silent_by_files, silent_with_numpy],
}


# Typical mistakes


def restoring(before):
    """Restores `before`(model), whatever was active."""

    def borrow(model, name, input_ids):
        old = before(model)
        model.set_adapter(name)
        try:
            return model(input_ids=input_ids).logits
        finally:
            model.set_adapter(old)

    return borrow


def silent_if(is_zero, counts=lambda names: names, of=lambda name: True):
    """Looks at some of an adapter's B only, or with another idea of zero."""

    def silent(model):
        matrices = {}
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and of(name):
                matrices.setdefault(name.split(".lora_B.")[1].split(".")[0], []).append(parameter)
        return [name for name, found in matrices.items() if all(is_zero(B) for B in counts(found))]

    return silent


def all_zero(B):
    return not B.any()


def leave_switched(model, name, input_ids):
    model.set_adapter(name)
    return model(input_ids=input_ids).logits


def without_finally(model, name, input_ids):
    before = model.active_adapter
    logits = leave_switched(model, name, input_ids)
    model.set_adapter(before)
    return logits


def disabled(model, name, input_ids):
    with model.disable_adapter():
        return model(input_ids=input_ids).logits


def left_disabled(model, name, input_ids):
    logits = right_borrow(model, name, input_ids)
    model.base_model.disable_adapter_layers()
    return logits


def zero_sums(model):
    """Takes a B whose entries add up to zero for a B of zeros."""
    sums = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            sums.setdefault(name.split(".lora_B.")[1].split(".")[0], []).append(abs(parameter.sum().item()) < 1e-6)
    return [name for name, zero in sums.items() if all(zero)]


def by_substring(model):
    """Takes the matrices of beta2 for those of beta, too."""
    silent = []
    for adapter in model.peft_config:
        found = [p for name, p in model.named_parameters() if f".lora_B.{adapter}" in name]
        if all((p == 0).all() for p in found):
            silent.append(adapter)
    return silent


def hides_the_error(model, name, ids):
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return model(input_ids=ids).logits
    except Exception:
        return None
    finally:
        model.set_adapter(before)


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (lesson01.weigh, lambda t: (len(t), right_weigh(t)[1]), "number of tensors"),
        (
            lesson01.weigh,
            lambda t: (sum(x.numel() for n, x in t.items() if "lora_A" in n), right_weigh(t)[1]),
            "one of the two strips",
        ),
        (
            lesson01.weigh,
            lambda t: (right_weigh(t)[0], next(x.shape[0] for n, x in t.items() if "lora_B" in n)),
            "a side of the layer",
        ),
        (lesson01.weigh, lambda t: (right_weigh(t)[0], right_weigh(t)[1] + 0.5), "rank is not right"),
        (lesson01.weigh, lambda t: (right_weigh(t)[0] + 1, right_weigh(t)[1]), "count is not right"),
        (lesson01.weigh, lambda t: right_weigh(t)[0], "should be of type tuple"),
        (lesson01.weigh, lambda t: (*right_weigh(t), 0), "you returned 3"),
        (lesson01.borrow, disabled, "the base model's logits"),
        (lesson01.borrow, lambda model, name, ids: model(input_ids=ids).logits, "active already"),
        (lesson01.borrow, lambda model, name, ids: right_borrow(model, name, ids) + 1, "not the logits"),
        (lesson01.borrow, leave_switched, "was left with"),
        (lesson01.borrow, without_finally, "finally"),
        (lesson01.borrow, left_disabled, "Is it disabled?"),
        (lesson01.borrow, lambda model, name, ids: right_borrow(model, name, ids)[0], "has shape"),
        (lesson01.silent, lambda model: [], "you found none"),
        (
            lesson01.silent,
            lambda model: sorted(n for n, s in b_sizes(model).items() if min(s) == 0),
            "one zero B among others",
        ),
        (lesson01.silent, zero_sums, "add up to zero"),
        (lesson01.silent, by_substring, "by its whole name"),
        (lesson01.silent, lambda model: right_silent(model) * 2, "more than once"),
        (lesson01.borrow, hides_the_error, "hid it"),
        (lesson01.silent, lambda model: right_silent(model)[:1], "is missing"),
        (lesson01.silent, lambda model: ["default"], "no adapter's name"),
        (lesson01.silent, lambda model: [0], "as text"),
        (lesson01.weigh, lambda t: (sum(x.nbytes for x in t.values()), right_weigh(t)[1]), "in bytes"),
        (lesson01.weigh, lambda t: right_weigh(t)[::-1], "swapped"),
        (lesson01.weigh, lambda t: (right_weigh(t)[0], next(iter(t.values())).shape[0]), "a side of the layer"),
        (lesson01.weigh, lambda t: (right_weigh(t)[0], min(min(x.shape) for x in t.values())), "a side of the layer"),
        (lesson01.weigh, lambda t: (sum({n: x.numel() for n, x in t.items()}.values()) - 1, 2), "count is not right"),
        (lesson01.weigh, lambda t: (sum(math.prod(s) for s in {x.shape for x in t.values()}), 2), "count is not right"),
        (lesson01.borrow, restoring(lambda model: next(iter(model.peft_config))), "was left with ['first'] active"),
        (lesson01.borrow, restoring(lambda model: "first"), "and it had ['third']. Keep model.active_adapter"),
        (lesson01.borrow, restoring(lambda model: list(model.peft_config)[-1]), "was left with ['third'] active"),
        (lesson01.borrow, restoring(lambda model: model.active_adapters), "active_adapters is a list"),
        (lesson01.borrow, restoring(lambda model: "second"), "was left with"),
        (lesson01.silent, silent_if(all_zero, counts=lambda found: found[-1:]), "In one of its B, in one place"),
        (lesson01.silent, silent_if(all_zero, counts=lambda found: found[:1]), "the first and the last"),
        (lesson01.silent, silent_if(all_zero, of=lambda name: "q_proj" in name), "every B of an adapter"),
        (lesson01.silent, silent_if(all_zero, of=lambda name: "v_proj" in name), "every B of an adapter"),
        (lesson01.silent, silent_if(all_zero, of=lambda name: "layers.0." in name), "every B of an adapter"),
        (lesson01.silent, silent_if(lambda B: B.abs().max() < 1e-3), "no threshold"),
        (lesson01.silent, silent_if(lambda B: B.abs().mean() < 1e-2), "no mean"),
        (lesson01.silent, silent_if(lambda B: torch.allclose(B, torch.zeros_like(B))), "no threshold"),
        (lesson01.silent, silent_if(lambda B: not B[0].any()), "every B of an adapter"),
        (lesson01.silent, silent_if(lambda B: not B[:, 0].any()), "with a B that is not zero|In one of its B"),
        (lesson01.silent, lambda model: print(model.active_adapter), "Is a return missing?"),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert any(part in outcome.hint for part in hint.split("|")), outcome.hint


def test_the_planted_models_are_what_they_say():
    model = lesson01.tiny_adapted_model(["loud", "quiet"], silent=["quiet"])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        loud = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        model.set_adapter("quiet")
        quiet = model(input_ids=ids).logits
    assert not torch.equal(loud, base) and torch.equal(quiet, base)
