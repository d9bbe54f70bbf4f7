"""The checks of lesson 1: the stub is to do, the solution passes, each typical mistake gets its own hint."""

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
        (lesson01.silent, lambda model: print(model.active_adapter), "Is a return missing?"),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert hint in outcome.hint, outcome.hint


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
