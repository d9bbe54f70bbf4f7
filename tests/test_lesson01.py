"""The checks of lesson 1: the stub is to do, the solution passes, each typical mistake gets its own hint."""

import contextlib
import math
import re

import numpy
import pytest
import torch

from course_utils import paths, validation
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


def right_mend(tensors, adapter):
    return {
        name.removesuffix(f".{adapter}.weight") + ".weight": tensor
        for name, tensor in tensors.items()
        if name.endswith((f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight"))
    }


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


def mend_by_pattern(tensors, adapter):
    pattern = re.compile(rf"(.*\.lora_[AB])\.{re.escape(adapter)}\.weight")
    return {f"{match[1]}.weight": tensors[name] for name in tensors if (match := pattern.fullmatch(name))}


def mend_by_parts(tensors, adapter):
    found = {}
    for name, tensor in tensors.items():
        *path, matrix, owner, last = name.split(".")
        if matrix in ("lora_A", "lora_B") and owner == adapter:
            found[".".join([*path, matrix, last])] = tensor.clone()
    return dict(reversed(found.items()))


def mend_with_numpy(tensors, adapter):
    return {name: tensor.numpy() for name, tensor in right_mend(tensors, adapter).items()}


SOLUTIONS = {"01.weigh": right_weigh, "01.borrow": right_borrow, "01.mend": right_mend}
RIGHT = {
    "01.weigh": [weigh_in_a_loop, weigh_with_numpy, weigh_flat],
    "01.borrow": [borrow_in_a_context, borrow_for_each_row, borrow_and_raise_again],
    "01.mend": [mend_by_pattern, mend_by_parts, mend_with_numpy],
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


def mended(name_of, keep=lambda name, adapter: f".{adapter}." in name):
    """A `mend` that keeps other tensors, or makes their names otherwise."""
    return lambda tensors, adapter: {
        name_of(name, adapter): tensor for name, tensor in tensors.items() if keep(name, adapter)
    }


def take_out(name, adapter):
    return name.replace(f".{adapter}.weight", ".weight")


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
        (lesson01.borrow, hides_the_error, "hid it"),
        (lesson01.mend, lambda tensors, adapter: tensors, "a weight of the base model"),
        (lesson01.mend, mended(lambda name, adapter: name), "still has the adapter's name"),
        (lesson01.mend, mended(take_out, lambda name, adapter: "lora_" in name), "belongs to another adapter"),
        (lesson01.mend, mended(take_out, lambda name, adapter: "base_layer" not in name), "a weight of the base model"),
        (
            lesson01.mend,
            mended(
                lambda name, adapter: re.sub(rf"{adapter}\w*\.", "", name),
                lambda name, adapter: "lora_" in name and adapter in name,
            ),
            "other numbers than the adapter's|no name that PEFT expects",
        ),
        (
            lesson01.mend,
            mended(lambda name, adapter: name.replace(f".{adapter}", "")),
            "no name that PEFT expects|belongs to another adapter",
        ),
        (
            lesson01.mend,
            lambda tensors, adapter: {
                name.removeprefix("base_model.model."): tensor for name, tensor in right_mend(tensors, adapter).items()
            },
            "no name that PEFT expects",
        ),
        (
            lesson01.mend,
            mended(
                lambda name, adapter: name.replace(f".{adapter}.weight", ""),
                lambda name, adapter: name.endswith(f".{adapter}.weight"),
            ),
            "has lost its end",
        ),
        (lesson01.mend, mended(take_out, lambda name, adapter: f".lora_A.{adapter}." in name), "are missing"),
        (lesson01.mend, lambda tensors, adapter: {}, "nothing came back"),
        (lesson01.mend, lambda tensors, adapter: list(right_mend(tensors, adapter)), "should be of type dict"),
        (lesson01.mend, lambda tensors, adapter: print(adapter), "Is a return missing?"),
        (
            lesson01.mend,
            lambda tensors, adapter: {name: tensor / 2 for name, tensor in right_mend(tensors, adapter).items()},
            "other numbers than the adapter's",
        ),
        (
            lesson01.mend,
            lambda tensors, adapter: {name: tensor.T for name, tensor in right_mend(tensors, adapter).items()},
            "has shape",
        ),
        (
            lesson01.mend,
            lambda tensors, adapter: {
                name.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B"): tensor
                for name, tensor in right_mend(tensors, adapter).items()
            },
            "has shape",
        ),
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
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert any(part in outcome.hint for part in hint.split("|")), outcome.hint


def test_each_tiny_adapter_changes_the_output_in_its_own_way():
    model = lesson01.tiny_adapted_model(["left", "right"])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        left = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        model.set_adapter("right")
        right = model(input_ids=ids).logits
    assert not torch.equal(left, base) and not torch.equal(right, base) and not torch.equal(left, right)


def test_the_folder_of_the_diagnosis_has_the_fault_and_can_be_mended(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    def load_base():
        return AutoModelForCausalLM.from_pretrained(paths.models_dir() / "base")

    sailor = paths.models_dir() / "adapters" / "sailor"
    lesson01.write_folder(tmp_path / "given", load_base(), sailor)
    assert validation.check_adapter_folder(tmp_path / "given").codes == ["adapter_name_in_keys"]
    loaded = PeftModel.from_pretrained(load_base(), sailor).load_adapter(tmp_path / "given", adapter_name="style")
    assert len(loaded.missing_keys) == 56 and len(loaded.unexpected_keys) == 112
    found, right = (
        right_mend(load_file(tmp_path / "given" / "adapter_model.safetensors"), "sailor"),
        load_file(sailor / "adapter_model.safetensors"),
    )
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
