"""Lesson 7: its checks, the folders that it makes, its sweep, and what PEFT does, as the lesson shows it."""

import functools
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_checks import check_merged_folder, merging
from adapter_checks.saving import saving
from course_utils import paths
from course_utils.exercises import lesson07
from experiments import merge_memory
from support import two_adapters
from tiny_models import make_tiny_model, make_tiny_tokenizer

# The solutions


def right_verdict(base, adapter, merged, tolerance, least=10, size=lambda difference: difference.abs().max()):
    if size(adapter - base) < least * tolerance:
        return "no effect"
    return "same" if size(merged - adapter) <= tolerance else "differs"


def right_shard(
    tensors, adapter, scaling, add=lambda weight, B, A, scaling: (weight.float() + scaling * (B @ A)).to(weight.dtype)
):
    merged = {}
    for name, tensor in tensors.items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        A, B = (adapter.get(f"{prefix}.lora_{factor}.weight") for factor in "AB")
        merged[name] = tensor.clone() if A is None else add(tensor, B, A, scaling)
    return merged


def right_times(base, merged, changes):
    above = sum(((merged[name] - base[name]) * change).sum() for name, change in changes.items())
    return above / sum(change.square().sum() for change in changes.values())


def right_ship(base, adapter, out, dtype="auto", finish=lambda model: model.merge_and_unload(), save_tokenizer=True):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    finish(PeftModel.from_pretrained(model, adapter)).save_pretrained(out)
    if save_tokenizer:
        AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return check_merged_folder(base, adapter, out)


# Typical mistakes


def twice(base, adapter, out):
    for source in (base, out):
        right_ship(source, adapter, out)
    return check_merged_folder(base, adapter, out)


def beside(base, adapter, out):
    report = right_ship(base, adapter, out)
    for file in Path(adapter).iterdir():
        shutil.copy(file, out)
    return report


def over_the_base(base, adapter, out):
    right_ship(base, adapter, out)
    return right_ship(base, adapter, base)


def without_template(base, adapter, out):
    report = right_ship(base, adapter, out)
    (Path(out) / "chat_template.jinja").unlink()
    return report


def and_a_norm(base, adapter, out):
    def finish(model):
        merged = model.merge_and_unload()
        merged.model.norm.weight.data += 1
        return merged

    return right_ship(base, adapter, out, finish=finish)


def nan_is_same(base, adapter, merged, tolerance):
    if (adapter - base).abs().max() < 10 * tolerance:
        return "no effect"
    return "differs" if (merged - adapter).abs().max() > tolerance else "same"


def merge_first(base, adapter, merged, tolerance):
    if not (merged - adapter).abs().max() <= tolerance:
        return "differs"
    return right_verdict(base, adapter, merged, tolerance)


def in_place(tensors, adapter, scaling):
    for name, tensor in right_shard(tensors, adapter, scaling).items():
        tensors[name] = tensor
    return tensors


def everything(tensors, adapter, scaling):
    return right_shard(tensors, adapter, scaling) | {name: tensor for name, tensor in adapter.items()}


def other_shards_too(tensors, adapter, scaling):
    names = [name.removeprefix("base_model.model.").replace(".lora_A", "") for name in adapter if "lora_A" in name]
    return right_shard(tensors, adapter, scaling) | {name: torch.zeros(2) for name in names if name not in tensors}


def only_changed(tensors, adapter, scaling):
    return {
        name: tensor
        for name, tensor in right_shard(tensors, adapter, scaling).items()
        if not torch.equal(tensor, tensors[name])
    }


def adding(rule):
    return lambda tensors, adapter, scaling: right_shard(tensors, adapter, scaling, add=rule)


def touched_norm(tensors, adapter, scaling):
    merged = right_shard(tensors, adapter, scaling)
    return {name: tensor + 1 if "norm" in name else tensor for name, tensor in merged.items()}


def by_the_adapter(tensors, adapter, scaling):
    merged = dict(tensors)
    for A in (key for key in adapter if ".lora_A." in key):
        name = A.removeprefix("base_model.model.").replace(".lora_A", "")
        change = scaling * (adapter[A.replace("lora_A", "lora_B")] @ adapter[A])
        merged[name] = (tensors[name].float() + change).to(tensors[name].dtype)
    return merged


def ratio_of_norms(base, merged, changes):
    return math.sqrt(
        sum((merged[n] - base[n]).square().sum() for n in changes) / sum(c.square().sum() for c in changes.values())
    )


def single(base, merged, changes, name):
    return ((merged[name] - base[name]) * changes[name]).sum() / changes[name].square().sum()


def cosine(base, merged, changes):
    return right_times(base, merged, changes) / ratio_of_norms(base, merged, changes)


def largest(difference):
    return difference.abs().max()


def judged(effect=largest, error=largest):
    """A verdict that takes the sizes of adapter - base and of merged - adapter in its own way."""

    def verdict(base, adapter, merged, tolerance):
        if effect(adapter - base) < 10 * tolerance:
            return "no effect"
        return "same" if error(merged - adapter) <= tolerance else "differs"

    return verdict


def relative(base, adapter, merged, tolerance):
    if largest(adapter - base) < 10 * tolerance:
        return "no effect"
    return "same" if largest(merged - adapter) / largest(adapter) <= tolerance else "differs"


def relative_effect(base, adapter, merged, tolerance):
    if largest(adapter - base) / largest(base) < 10 * tolerance:
        return "no effect"
    return "same" if largest(merged - adapter) <= tolerance else "differs"


def close_to(rtol=1e-5, effect_too=False):
    def verdict(base, adapter, merged, tolerance):
        if (
            torch.allclose(adapter, base, atol=10 * tolerance, rtol=rtol)
            if effect_too
            else largest(adapter - base) < 10 * tolerance
        ):
            return "no effect"
        return "same" if torch.allclose(merged, adapter, atol=tolerance, rtol=rtol) else "differs"

    return verdict


def merged_is_base(base, adapter, merged, tolerance):
    return "no effect" if torch.equal(merged, base) else right_verdict(base, adapter, merged, tolerance)


def effect_of_merged(base, adapter, merged, tolerance):
    if largest(merged - base) < 10 * tolerance:
        return "no effect"
    return "same" if largest(merged - adapter) <= tolerance else "differs"


def by_part_of_name(part, ending=""):
    """A shard that takes the first A whose name holds `part` of the layer's name."""

    def shard(tensors, adapter, scaling):
        merged = {}
        for name, tensor in tensors.items():
            key = next((key for key in adapter if "lora_A" in key and part(name) + ending in key), None)
            merged[name] = (
                tensor if key is None else tensor.float() + scaling * adapter[key.replace("_A.", "_B.")] @ adapter[key]
            )
            merged[name] = merged[name].to(tensor.dtype)
        return merged

    return shard


def shard_by_kind(is_adapted, layer_of=lambda name: name.removesuffix(".weight")):
    def shard(tensors, adapter, scaling):
        merged = {}
        for name, tensor in tensors.items():
            A, B = (f"base_model.model.{layer_of(name)}.lora_{factor}.weight" for factor in "AB")
            merged[name] = (
                (tensor.float() + scaling * adapter[B] @ adapter[A]).to(tensor.dtype)
                if is_adapted(name, adapter, A)
                else tensor
            )
        return merged

    return shard


def first_dtype(tensors, adapter, scaling):
    return {
        name: tensor.to(next(iter(tensors.values())).dtype)
        for name, tensor in right_shard(tensors, adapter, scaling).items()
    }


def emptied(tensors, adapter, scaling):
    merged = right_shard(tensors, adapter, scaling)
    adapter.clear()
    return merged


def scaled_in_place(tensors, adapter, scaling):
    return right_shard(tensors, adapter, scaling, lambda w, B, A, s: (w.float() + B.mul_(s) @ A).to(w.dtype))


def singles(base, merged, changes):
    return torch.stack([single(base, merged, changes, name) for name in changes])


def norms(changes):
    return torch.stack([change.norm() for change in changes.values()])


def largest_layer(base, merged, changes):
    return singles(base, merged, changes)[norms(changes).argmax()]


def signed_ratio(base, merged, changes):
    return math.copysign(ratio_of_norms(base, merged, changes), right_times(base, merged, changes))


def ratios(base, merged, changes):
    return torch.cat([((merged[n] - base[n]) / changes[n]).flatten() for n in changes])


def weighted_by_norms(base, merged, changes):
    return (singles(base, merged, changes) * norms(changes)).sum() / norms(changes).sum()


def without_small(is_small):
    return lambda b, m, c: right_times(
        b, m, {n: change for n, change in c.items() if not is_small(change, norms(c).max())}
    )


def in_order(base, merged, changes):
    return right_times(*(dict(enumerate(part.values())) for part in (base, merged, changes)))


def all_keys(base, merged, changes):
    above = sum(((merged[n] - base[n]) * changes.get(n, merged[n] - base[n])).sum() for n in base)
    return above / norms(changes).square().sum()


def ratio_over_all_keys(base, merged, changes):
    return math.sqrt(sum((merged[n] - base[n]).square().sum() for n in base)) / norms(changes).norm()


def in_16_bits(dtype, of=lambda number: number):
    def times(base, merged, changes):
        base, merged, changes = ({n: t.to(dtype) for n, t in part.items()} for part in (base, merged, changes))
        return of(right_times(base, merged, changes))

    return times


def divided_in_16_bits(base, merged, changes):
    above = sum(((merged[n] - base[n]).bfloat16() * c.bfloat16()).sum() for n, c in changes.items())
    return above.item() / sum(c.bfloat16().square().sum() for c in changes.values()).item()


def with_bias(tensors, adapter, scaling):
    """The layer is the name without its last part, be that a weight or a bias."""
    merged = {}
    for name, tensor in tensors.items():
        layer = "base_model.model." + name.rpartition(".")[0]
        A, B = adapter.get(f"{layer}.lora_A.weight"), adapter.get(f"{layer}.lora_B.weight")
        merged[name] = tensor if A is None else (tensor.float() + scaling * B @ A).to(tensor.dtype)
    return merged


# Other right answers


def ship_by_shards(base, adapter, out):
    merging.merge_by_shards(base, adapter, out)
    return check_merged_folder(base, adapter, out)


def ship_in_small_files(base, adapter, out):
    model = AutoModelForCausalLM.from_pretrained(str(base))
    model = PeftModel.from_pretrained(model, str(adapter))
    model.merge_adapter()
    model.unload().save_pretrained(str(out), max_shard_size="100KB")
    AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(out))
    return check_merged_folder(str(base), str(adapter), str(out))


def ship_atomically(base, adapter, out):
    with saving(out) as folder:
        right_ship(base, adapter, folder)
    return check_merged_folder(base, adapter, out)


def verdict_with_numpy(base, adapter, merged, tolerance):
    base, adapter, merged = base.numpy(), adapter.numpy(), merged.numpy()
    if numpy.max(numpy.abs(adapter - base)) < 10 * tolerance:
        return numpy.str_("no effect")
    return numpy.array(["differs", "same"])[int(numpy.allclose(merged, adapter, rtol=0, atol=tolerance))]


def verdict_in_steps(base, adapter, merged, tolerance):
    if not ((adapter - base).abs() >= 10 * tolerance).any():
        return "no effect"
    return "same" if ((merged - adapter).abs() <= tolerance).all() else "differs"


def times_by_least_squares(base, merged, changes):
    change = torch.cat([change.flatten() for change in changes.values()])
    difference = torch.cat([(merged[name] - base[name]).flatten() for name in changes])
    return torch.linalg.lstsq(change[:, None], difference[:, None]).solution


def times_with_numpy(base, merged, changes):
    difference = numpy.concatenate([(merged[name] - base[name]).numpy().ravel() for name in changes])
    change = numpy.concatenate([change.numpy().ravel() for change in changes.values()])
    return difference @ change / (change @ change)


def times_in_float32(base, merged, changes):
    return in_16_bits(torch.float32)(base, merged, changes)


SOLUTIONS = {"07.verdict": right_verdict, "07.shard": right_shard, "07.times": right_times, "07.ship": right_ship}
RIGHT = {
    "07.ship": [ship_by_shards, ship_in_small_files, ship_atomically],
    "07.verdict": [close_to(rtol=0, effect_too=True), verdict_with_numpy, verdict_in_steps],
    "07.shard": [
        lambda t, a, s: right_shard(t, a, s, lambda w, B, A, s: torch.addmm(w.float(), s * B, A).to(w.dtype)),
        lambda t, a, s: right_shard(t, a, s, lambda w, B, A, s: (w.double() + (A.T @ B.T).T * s).to(w.dtype)),
        shard_by_kind(lambda name, adapter, A: A in adapter),
    ],
    "07.times": [times_by_least_squares, times_with_numpy, times_in_float32],
}


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (
            lesson07.verdict,
            lambda b, a, m, t: "same" if (m - a).abs().max() <= t else "differs",
            "which shows nothing about the merge",
        ),
        (
            lesson07.verdict,
            lambda b, a, m, t: right_verdict(b, a, m, t, size=lambda d: d.abs().mean()),
            "a mean hides it",
        ),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b, a, m, t, size=lambda d: d.max()), "off downwards"),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b, a, m, t, least=1), "only five tolerances"),
        (lesson07.verdict, merge_first, "The first question comes first"),
        (lesson07.verdict, nan_is_same, "no comparison with NaN is true"),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b, a, m, t) == "same", "should be of type str"),
        (lesson07.verdict, lambda b, a, m, t: "equal", "one of 'no effect'"),
        (lesson07.verdict, lambda b, a, m, t: print(right_verdict(b, a, m, t)), "Is a return missing"),
        (lesson07.verdict, judged(effect=lambda d: d.abs().mean()), "500 tolerances.*a mean hides it"),
        (lesson07.verdict, judged(error=lambda d: d.abs().mean()), "fifty tolerances.*a mean hides it"),
        (lesson07.verdict, judged(effect=torch.mean), "The largest absolute differences"),
        (lesson07.verdict, judged(error=lambda d: (-d).max()), "off upwards.*abs\\(\\) before max"),
        (lesson07.verdict, judged(error=torch.max), "off downwards.*abs\\(\\) before max"),
        (lesson07.verdict, judged(effect=torch.max), "effect is downwards"),
        (lesson07.verdict, judged(effect=lambda d: (-d).max()), "effect is upwards"),
        (lesson07.verdict, judged(effect=torch.norm), "Ten logits move by five.*a norm"),
        (lesson07.verdict, judged(error=torch.norm), "Ten logits are off.*a norm"),
        (lesson07.verdict, judged(effect=lambda d: d.abs().sum()), "Ten logits move by five"),
        (lesson07.verdict, relative, "about 400 here"),
        (lesson07.verdict, relative_effect, "about 400 here"),
        (lesson07.verdict, close_to(), "rtol=0"),
        (lesson07.verdict, close_to(1e-3), "rtol=0"),
        (lesson07.verdict, close_to(effect_too=True), "rtol=0"),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b, a, m, t, least=9), "is 9.5 tolerances"),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b, a, m, t, least=11), "is 10.5 tolerances"),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b, a, m, t, least=20), "is 10.5 tolerances"),
        (lesson07.verdict, merged_is_base, "the merge was lost"),
        (lesson07.verdict, effect_of_merged, "differ from the base"),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b, a, m, 1e-4), "tolerance is 1e-06"),
        (lesson07.verdict, lambda b, a, m, t: right_verdict(b[-1], a[-1], m[-1], t), "of all positions"),
        (
            lesson07.verdict,
            lambda b, a, m, t: right_verdict(*(x.flatten(0, -2)[:6] if x.dim() == 2 else x[0] for x in (b, a, m)), t),
            "over all dimensions",
        ),
        (lesson07.shard, with_bias, "bias has got a change"),
        (lesson07.shard, in_place, "has changed. Put the results"),
        (lesson07.shard, everything, "is no tensor of this shard"),
        (lesson07.shard, other_shards_too, "layers.0.self_attn.q_proj.weight is no tensor of this shard"),
        (lesson07.shard, by_the_adapter, "layers.0.self_attn.q_proj is a layer of another shard"),
        (lesson07.shard, only_changed, "input_layernorm.weight is missing"),
        (lesson07.shard, lambda t, a, s: {name: tensor.clone() for name, tensor in t.items()}, "is as it was"),
        (lesson07.shard, adding(lambda w, B, A, s: w + B @ A), "scaling is missing"),
        (lesson07.shard, adding(lambda w, B, A, s: s * (B @ A)), "the change alone"),
        (lesson07.shard, adding(lambda w, B, A, s: w + s * (B @ A)), "would change its size"),
        (lesson07.shard, adding(lambda w, B, A, s: w + (s * (B @ A)).to(w.dtype)), "BA was rounded before"),
        (lesson07.shard, adding(lambda w, B, A, s: w + 2 * s * (B @ A)), "is not W \\+ scaling·BA"),
        (lesson07.shard, adding(lambda w, B, A, s: w + s * (A @ B)), "Your code stopped with RuntimeError"),
        (lesson07.shard, touched_norm, "has no A and B, and has changed"),
        (lesson07.shard, lambda t, a, s: [1], "of type dict"),
        (lesson07.shard, lambda t, a, s: dict.fromkeys(t), "of type Tensor"),
        (lesson07.shard, lambda t, a, s: {name: tensor * math.nan for name, tensor in t.items()}, "NaN"),
        (
            lesson07.shard,
            by_part_of_name(lambda name: name.removesuffix(".weight")[14:]),
            "got A and B of .*compare whole names",
        ),
        (
            lesson07.shard,
            by_part_of_name(lambda name: name.removesuffix(".weight")),
            "got A and B of .*gate_proj. A part of a name",
        ),
        (
            lesson07.shard,
            by_part_of_name(lambda name: name.partition("layers.1")[2].removesuffix(".weight"), "."),
            "got A and B of .*compare whole names",
        ),
        (lesson07.shard, shard_by_kind(lambda name, a, A: "proj" in name), "KeyError.*Not every tensor"),
        (
            lesson07.shard,
            shard_by_kind(lambda name, a, A: A in a, lambda name: name.rstrip(".weight")),
            "rstrip.*take removesuffix",
        ),
        (lesson07.shard, first_dtype, "would change its size"),
        (lesson07.shard, emptied, "adapter that you were given has changed"),
        (lesson07.shard, scaled_in_place, "adapter that you were given has changed"),
        (lesson07.shard, adding(lambda w, B, A, s: w - s * (B @ A)), "sign is turned"),
        (lesson07.shard, adding(lambda w, B, A, s: w + s**2 * (B @ A)), "scaling counts twice"),
        (lesson07.shard, adding(lambda w, B, A, s: w + s / len(A) * (B @ A)), "Don't divide by r"),
        (lesson07.times, ratio_of_norms, "no sign"),
        (
            lesson07.times,
            lambda b, m, c: sum((m[n] - b[n]).norm() for n in c) / sum(c[n].norm() for n in c),
            "no sign of its own",
        ),
        (
            lesson07.times,
            lambda b, m, c: sum((m[n] - b[n]).norm() / c[n].norm() for n in c) / len(c),
            "no sign of its own",
        ),
        (lesson07.times, lambda b, m, c: 1.003 * right_times(b, m, c), "near, and not the least-squares factor"),
        (lesson07.times, cosine, "the cosine"),
        (
            lesson07.times,
            lambda b, m, c: right_times({n: 0 * t for n, t in b.items()}, m, c),
            "Take the base away first",
        ),
        (lesson07.times, lambda b, m, c: sum(((m[n] - b[n]) * c[n]).sum() for n in c), "the dot product"),
        (lesson07.times, lambda b, m, c: sum(single(b, m, c, n) for n in c) / len(c), "mean over layers"),
        (lesson07.times, lambda b, m, c: single(b, m, c, next(iter(c))), "one layer only"),
        (lesson07.times, lambda b, m, c: single(b, m, c, list(c)[-1]), "one layer only"),
        (lesson07.times, lambda b, m, c: 1, "and you find 1"),
        (
            lesson07.times,
            lambda b, m, c: torch.cat([((m[n] - b[n]) / c[n]).flatten() for n in c]).mean(),
            "and you find",
        ),
        (lesson07.times, lambda b, m, c: sum((m[n] - b[n]).sum() for n in b) / 0, "stopped with|is (inf|nan|-inf)"),
        (lesson07.times, lambda b, m, c: m, "should be a number"),
        (lesson07.times, largest_layer, "one layer only"),
        (lesson07.times, signed_ratio, "no sign of its own"),
        (lesson07.times, lambda *given: ratios(*given).median(), "Entry by entry"),
        (lesson07.times, lambda *given: ratios(*given).mean(), "Entry by entry"),
        (lesson07.times, weighted_by_norms, "weighted by the norms"),
        (lesson07.times, without_small(lambda change, most: change.norm() < 0.5), "are left out"),
        (lesson07.times, without_small(lambda change, most: change.norm() < most / 20), "are left out"),
        (lesson07.times, without_small(lambda change, most: change.norm() < 1e-3), "Leave no layer out"),
        (lesson07.times, in_order, "different orders"),
        (lesson07.times, all_keys, "The norm has no change"),
        (lesson07.times, ratio_over_all_keys, "and you find"),
        (lesson07.times, lambda *given: round(right_times(*given).item(), 2), "That is rounded"),
        (lesson07.times, lambda *given: round(right_times(*given).item(), 3), "That is rounded"),
        (lesson07.times, in_16_bits(torch.bfloat16), "bfloat16 holds two or three digits"),
        (lesson07.times, in_16_bits(torch.bfloat16, of=torch.Tensor.item), "bfloat16 holds two or three digits"),
        (lesson07.times, in_16_bits(torch.float16), "bfloat16 holds two or three digits"),
        (lesson07.times, divided_in_16_bits, "bfloat16 holds two or three digits"),
        (lesson07.times, lambda *given: -right_times(*given), "sign is turned"),
        (lesson07.times, lambda *given: singles(*given).median(), "the median over the layers"),
        (lesson07.times, lambda *given: singles(*given).quantile(0.5), "the median over the layers"),
        (
            lesson07.times,
            lambda b, m, c: right_times(b, m, c) * (1 / (1 + 1e-8 / norms(c).square().sum())),
            "add nothing below",
        ),
        (lesson07.ship, functools.partial(right_ship, finish=lambda model: model), "the PeftModel was saved"),
        (lesson07.ship, functools.partial(right_ship, finish=lambda model: model.unload()), "the change isn't in them"),
        (lesson07.ship, functools.partial(right_ship, save_tokenizer=False), "tokenizer.json is missing"),
        (lesson07.ship, functools.partial(right_ship, dtype=torch.float32), "stored in bfloat16"),
        (lesson07.ship, functools.partial(right_ship, dtype=torch.bfloat16), "stored in float32"),
        (lesson07.ship, without_template, "chat_template.jinja is missing"),
        (lesson07.ship, twice, "2.0 times"),
        (lesson07.ship, beside, "An adapter lies beside"),
        (lesson07.ship, over_the_base, "folder of the base"),
        (lesson07.ship, and_a_norm, "not those of base"),
        (lesson07.ship, lambda b, a, o: print(b), "no model in the folder"),
        (lesson07.ship, lambda b, a, o: right_ship(b, a, o).ok, "Return the report"),
        (lesson07.ship, lambda b, a, o: right_ship(b, a, o) and check_merged_folder(o, a, b), "in this order"),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


# The folders, and the sweep


def test_each_folder_has_its_fault_and_one_is_right(tmp_path):
    folders = lesson07.suspects(paths.models_dir() / "base", paths.adapter_path("sailor"), tmp_path)
    found = {
        name: check_merged_folder(paths.models_dir() / "base", paths.adapter_path("sailor"), folder)
        for name, folder in folders.items()
    }
    assert {name: report.codes[:1] for name, report in found.items()} == {
        "one": ["wrong_scaling"],
        "two": ["adapter_beside"],
        "three": [],
        "four": ["not_merged"],
        "five": ["merged_twice"],
    }
    assert [round(report.times, 1) for report in found.values()] == [0.5, 1, 1, 0, 2]


def test_the_memory_of_both_ways_is_measured(monkeypatch):
    monkeypatch.setattr(merge_memory, "SIZES", {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2})
    monkeypatch.setattr(merge_memory, "SHARD", "1MB")
    rows = merge_memory.measure(0, 2)
    assert [row["way"] for row in rows] == ["merge_whole", "merge_by_shards"]
    assert all(row["model_mb"] > 1 and row["peak_mb"] > 0 for row in rows)


# What PEFT does, as the lesson shows it


def test_unload_leaves_a_merged_change_in_the_weights():
    model = two_adapters()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before, change = layer.get_base_layer().weight.detach().clone(), layer.get_delta_weight("one").detach()
    model.merge_adapter()
    assert torch.allclose(model.unload().model.layers[0].self_attn.q_proj.weight, before + change)


def test_a_merged_adapter_is_not_deleted_and_is_unmerged_by_a_look_without_it():
    model = two_adapters()
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("one")
    with model.disable_adapter(), torch.no_grad():
        model(torch.tensor([[1, 2]]))
    assert model.get_model_status().merged_adapters == []


def test_a_safe_merge_that_fails_leaves_a_model_half_merged():
    from peft.tuners.lora import LoraLayer

    model = two_adapters()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    layers[-1].lora_B["one"].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert 0 < sum(isinstance(module, LoraLayer) for module in model.modules()) < len(layers)


def test_a_base_given_by_a_relative_path_is_overwritten_when_half_of_it_is_on_disk(tmp_path, monkeypatch):
    """PEFT 0.21's copy: by an absolute path below the current folder, by a relative one over the base."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = make_tiny_model(make_tiny_tokenizer())
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "here").mkdir()
    file = tmp_path / "base" / "model.safetensors"
    before, last = file.read_bytes(), model.config.num_hidden_layers - 1
    places = {f"model.layers.{i}": "disk" if i == last else "cpu" for i in range(last + 1)}
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    for base, here in ((tmp_path / "base", tmp_path / "here"), ("base", tmp_path)):
        monkeypatch.chdir(here)
        with warnings.catch_warnings(action="ignore"):
            loaded = AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=tmp_path / "offload")
            PeftModel.from_pretrained(
                loaded,
                tmp_path / "adapter",
                offload_dir=tmp_path / "offload",
                device_map={f"base_model.model.{name}": place for name, place in places.items()},
            )
        if here.name == "here":
            assert file.read_bytes() == before and list(here.rglob("model.safetensors"))
    assert file.read_bytes() != before
