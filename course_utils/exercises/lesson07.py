"""Checks of lesson 7: judge a merge, merge a shard, count how often one was merged, ship a folder; and folders to find faults in."""

import functools
import shutil
import tempfile
from pathlib import Path

from course_utils import paths
from course_utils.exercises import (
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_number,
    expect_tensor,
    expect_type,
)

VERDICTS = ("no effect", "differs", "same")
PREFIX = "base_model.model."


def judged_logits(effect, error, seed=0, shift=0):
    """Logits (6, 20) of base, adapter and merged: the adapter moves one by `effect`, the merge is off by `error`; lists move several.

    Which ones changes with the seed.
    """
    import torch

    base = shift + torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    change, off = torch.zeros_like(base), torch.zeros_like(base)
    for moved, by in ((change[(seed + 2) % 6], effect), (off[(seed + 4) % 6], error)):
        by, first = torch.as_tensor(by, dtype=torch.float64).reshape(-1), 3 * seed % 11
        moved[first : first + len(by)] = by
    return base, base + change, base + change + off


@exercise("07.verdict", title="Judge a merge", level="warm-up", minutes=10)
def verdict(function):
    """Is the adapter's effect looked at first, and then the largest absolute difference, NaN included?"""
    both = [1.0, -1.0]  # up and down, so that a lost sign shows in the other number only
    cases = [
        ("same", both, [1e-5, -1e-5], {}, "The adapter moves two logits by 1 here, and the merge is off by a tenth of the tolerance: "
                                          "that is 'same'. The largest absolute differences, of all positions, show it."),
        ("differs", both, [0.005, -0.005], {}, "Two logits are off by fifty tolerances. Take the largest difference: a mean hides it."),
        ("differs", both, 0.01, {}, "Here the merged model is off upwards. Take the absolute difference: abs() before max()."),
        ("differs", both, -0.01, {}, "Here the merged model is off downwards. Take the absolute difference: abs() before max()."),
        ("same", -1.0, 1e-5, {}, "Here the adapter's effect is downwards: it lowers a logit. That is an effect, too: abs() before max()."),
        ("same", 1.0, -1e-5, {}, "Here the adapter's effect is upwards: it raises a logit. Take the absolute difference from the base: "
                                 "abs() before max()."),
        ("no effect", 0.0, 0.0, {}, "Base, adapter and merged are all the same here, which shows nothing about the merge. Ask first "
                                    "whether the adapter changes the base."),
        ("same", 0.05, 0.0, {}, "The adapter moves one logit of 120 here, by 500 tolerances. Take the largest effect: a mean hides it."),
        ("differs", 0.003, 2e-4, {"shift": 400}, "The logits are about 400 here. The effect is thirty tolerances, and the merge is off by "
                                                 "two. Don't measure them against the logits: no division, and in allclose rtol=0."),
        ("no effect", 5e-4, 0.0, {}, "The adapter's effect is only five tolerances here. Less than ten count as none."),
        ("no effect", [5e-4] * 10, 0.0, {}, "Ten logits move by five tolerances each here, and none by ten. Take the largest effect: a norm "
                                            "or a sum adds them up."),
        ("same", 1.0, [9e-5] * 10, {}, "Ten logits are off by 0.9 tolerances each here, and none by more. Take the largest difference: a "
                                       "norm or a sum adds them up."),
        ("no effect", 9.5e-4, 0.0, {}, "The adapter's effect is 9.5 tolerances here. Less than ten count as none."),
        ("same", 1.05e-3, 0.0, {}, "The adapter's effect is 10.5 tolerances here, and that counts. Only less than ten count as none."),
        ("no effect", 0.0, 0.01, {}, "Here the adapter has no effect, and the merge is off. The first question comes first: does the "
                                     "adapter differ from the base?"),
    ]  # fmt: skip
    for seed, (expected, effect, error, how, hint) in enumerate(cases):
        if _verdict_of(function, *judged_logits(effect, error, seed, **how)) != expected:
            raise TryAgain(hint)
    for tolerance in (1e-6, 0.5):
        for seed, (expected, effect, error) in enumerate(
            (("same", 30.0, 0.9), ("differs", 30.0, 1.2), ("no effect", 8.0, 0.0))
        ):
            # The same logits with another dimension in front, (rows, positions, vocabulary).
            logits = [part.reshape(2, 3, 20) for part in judged_logits(effect * tolerance, error * tolerance, seed)]
            if _verdict_of(function, *logits, tolerance) != expected:
                raise TryAgain(
                    f"Here the tolerance is {tolerance:g}, the adapter moves a logit by {effect:g} tolerances, and the merge is off by "
                    f"{error:g}. Compare with the `tolerance` that you are given, over all dimensions."
                )
    base, adapter, merged = judged_logits(1.0, 0.0, seed=99)
    if _verdict_of(function, base, adapter, base) != "differs":
        raise TryAgain("Here the adapter has an effect, and the merged model is the base still: the merge was lost. 'no effect' is about "
                       "adapter and base; this is 'differs'.")  # fmt: skip
    merged[0, 0] = float("nan")
    if _verdict_of(function, base, adapter, merged) != "differs":
        raise TryAgain("A logit of the merged model is NaN here, and no comparison with NaN is true. Ask whether the difference is "
                       "within the tolerance, and say 'differs' if it isn't.")  # fmt: skip


def _verdict_of(function, base, adapter, merged, tolerance=1e-4):
    found = call_learner(function, base.clone(), adapter.clone(), merged.clone(), tolerance)
    if expect_type(found, str, "the verdict") not in VERDICTS:
        raise TryAgain(f"The verdict is one of {', '.join(map(repr, VERDICTS))}, not {found[:40]!r}.")
    return found


@exercise("07.shard", title="Merge one shard", level="stretch", minutes=15)
def shard(function):
    """Compare with W + scaling * B @ A in the dtype of W, for a file that holds part of the layers and other tensors."""
    import torch

    # bfloat16 comes last: a wrong sum shows first where rounding can't be the reason.
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        tensors, adapter, scaling, expected = shard_example(dtype, seed)
        given, given_adapter = ({name: tensor.clone() for name, tensor in part.items()} for part in (tensors, adapter))
        try:
            found = expect_type(call_learner(function, given, given_adapter, scaling), dict, "the shard")
        except TryAgain as wrong:
            if "KeyError" not in str(wrong):
                raise
            lost = next((name for name in (key.removeprefix(PREFIX).partition(".lora_")[0] for key in adapter)
                         if f"{name}.weight" not in tensors and f"'{name}" in str(wrong)), None)  # fmt: skip
            if lost:
                raise TryAgain(f"{wrong}. {lost} is a layer of another shard. Go through the names of the shard, not through those of "
                               "the adapter.") from None  # fmt: skip
            raise TryAgain(f"{wrong}. Not every tensor has A and B: ask the adapter, by the whole name. (removesuffix takes an ending "
                           "off; rstrip takes letters.)") from None  # fmt: skip
        if set(given_adapter) != set(adapter) or any(
            not torch.equal(given_adapter[name], tensor) for name, tensor in adapter.items()
        ):
            raise TryAgain("The adapter that you were given has changed. Read A and B without taking them out (pop), and multiply without "
                           "an underscore: the next shard needs them, too.")  # fmt: skip
        if any(not torch.equal(given[name], tensors[name]) for name in tensors if name in given) or len(given) != len(
            tensors
        ):
            raise TryAgain("The shard that you were given has changed. Put the results into a new dictionary.")
        if extra := set(found) - set(expected):
            raise TryAgain(f"{_first(extra)} is no tensor of this shard. A merged file holds the names of the base's, and no others: "
                           "not the adapter's, and not layers of another shard.")  # fmt: skip
        if lost := set(expected) - set(found):
            raise TryAgain(f"{_first(lost)} is missing. A tensor without A and B is copied as it is.")
        for name, wanted in expected.items():
            if name.endswith(".bias") and getattr(found[name], "shape", None) != wanted.shape:
                raise TryAgain(
                    f"{name} has got a change. A and B are for the layer's weight: ask for names that end in '.weight'."
                )
            _check_merged(name, expect_tensor(found[name], wanted.shape, name), tensors[name], adapter, scaling, wanted)


def _first(names):
    """The first of some names, whatever they are."""
    first = sorted(map(str, names))[0]
    return first if len(first) <= 60 else first[:60] + "..."


def _check_merged(name, found, weight, adapter, scaling, wanted):
    import torch

    layer = name.removesuffix(".weight")
    A, B = (adapter.get(f"{PREFIX}{layer}.lora_{factor}.weight") for factor in "AB")
    if found.dtype != wanted.dtype:
        raise TryAgain(f"{name} is {str(found.dtype)[6:]} now and was {str(wanted.dtype)[6:]}: the folder would change its size. Give "
                       "each sum the dtype of the base's tensor of this name.")  # fmt: skip
    if A is None:
        if not torch.equal(found, wanted):
            raise TryAgain(f"{name} has no A and B, and has changed. Copy it as it is.")
        return
    share = 1e-2 if wanted.dtype == torch.bfloat16 else 1e-5
    exactly, found, wanted, weight = torch.equal(found, wanted), found.float(), wanted.float(), weight.float()
    change = B @ A

    def close(other):
        return (found - other).norm() <= share * wanted.norm()

    if close(wanted):
        if not exactly and share == 1e-2:
            raise TryAgain(
                "Nearly. The product BA was rounded before it was added. Compute in float32, and round the sum once."
            )
        return
    if close(weight):
        cut = (
            ""
            if name.rstrip(".weight") == layer
            else " rstrip('.weight') cuts off any of these letters: take removesuffix."
        )
        raise TryAgain(f"{name} is as it was. Its A is called {PREFIX}{layer}.lora_A.weight.{cut}")
    others = [key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")]
    for other in others:
        others_A, others_B = (adapter[f"{other}.lora_{factor}.weight"] for factor in "AB")
        if other != PREFIX + layer and len(others_B) == len(B) and close(weight + scaling * others_B @ others_A):
            raise TryAgain(f"{name} got A and B of {other}. A part of a name fits several layers: compare whole names.")
    mistakes = [
        (weight + change, "The scaling is missing: W + scaling·BA."),
        (scaling * change, "That is the change alone. Add it to the weight."),
        (weight - scaling * change, "The sign is turned: the change is added, W + scaling·BA."),
        (weight + scaling**2 * change, "The scaling counts twice. Multiply by it once: W + scaling·BA."),
        (weight + scaling / len(A) * change, "The scaling is α/r already. Don't divide by r again."),
    ]
    for wrong, hint in mistakes:
        if close(wrong):
            raise TryAgain(hint)
    raise TryAgain(f"{name} is not W + scaling·BA. B is (outputs, r) and stands first.")


def shard_example(dtype, seed):
    """(tensors of one shard, tensors of the adapter, scaling, merged shard); the adapter has a layer of another shard, too.

    Names are close to each other, two tensors are in float32 whatever `dtype`, o_proj has no A and B, and a layer has a bias. The
    order of the tensors, the rank and the scaling change with the seed.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "model.layers.1.self_attn.q_proj.weight": random(12, 12).to(dtype),
        "model.layers.1.self_attn.o_proj.weight": random(12, 12).to(dtype),
        "model.layers.11.self_attn.q_proj.weight": random(12, 12).to(dtype),
        "model.layers.1.mlp.gate_proj.weight": random(20, 12).to(dtype),
        "model.layers.1.mlp.gate.weight": random(20, 12),
        "model.layers.1.self_attn.q_proj.bias": random(12).to(dtype),
        "model.layers.1.input_layernorm.weight": random(12),
    }
    if seed % 2:
        tensors = dict(reversed(tensors.items()))
    scaling, rank, adapter, merged = (3.0, 0.5)[seed % 2], 2 + seed % 2, {}, dict(tensors)
    for layer, (outputs, inputs) in {"layers.0.self_attn.q_proj": (12, 12), "layers.11.self_attn.q_proj": (12, 12),
                                     "layers.1.self_attn.q_proj": (12, 12), "layers.1.mlp.gate_proj": (20, 12),
                                     "layers.1.mlp.gate": (20, 12)}.items():  # fmt: skip
        # In eighths, so that float32 holds scaling·BA exactly, and the order of the products doesn't matter.
        A, B, name = (
            (8 * random(rank, inputs)).round() / 8,
            (8 * random(outputs, rank)).round() / 8,
            f"model.{layer}.weight",
        )
        adapter[f"{PREFIX}model.{layer}.lora_A.weight"], adapter[f"{PREFIX}model.{layer}.lora_B.weight"] = A, B
        if name in tensors:
            merged[name] = (tensors[name].float() + scaling * (B @ A)).to(tensors[name].dtype)
    return tensors, adapter, scaling, merged


@exercise("07.times", title="How often was it merged?", level="core", minutes=15)
def times(function):
    """Compare with the least-squares factor of the changes in (merged - base), pooled over all layers."""
    tiny = ("Here all weights and changes are a hundred thousand times smaller. Leave no layer out for being small, round nothing, and add "
            "nothing below the fraction.")  # fmt: skip
    cases = [*((factor, {}, "") for factor in (2.0, 1.0, 0.0, -1.0, 16.0, 2**0.5)),
             (1.0, {"other": 2.0}, ""), (1.0, {"noise": 0.3, "small": 0.02}, ""), (2.0, {"unit": 1e-5}, tiny)]  # fmt: skip
    for seed, (factor, how, hint) in enumerate(cases):
        base, merged, changes = times_example(factor, seed, **how)
        copies = [{name: tensor.clone() for name, tensor in given.items()} for given in (base, merged, changes)]
        try:
            answer = call_learner(function, *copies)
            found = expect_number(answer, "the number")
        except TryAgain as wrong:
            raise TryAgain(hint or str(wrong)) from None
        difference = {name: merged[name] - base[name] for name in base}
        pooled = _dot(difference, changes) / _dot(changes, changes)
        if abs(found - pooled) < 1e-4 * max(1, abs(pooled)):
            continue
        near = abs(found - pooled) < 0.03 * max(1, abs(pooled))
        coarse = (f"Here the change is {pooled:.6g} times in the weights, and you find {found:.6g}. {{}} Return the number as it is, and "
                  "compute in the dtype that you are given: bfloat16 holds two or three digits only.")  # fmt: skip
        if near and _has_few_digits(found, getattr(answer, "dtype", None)):
            raise TryAgain(coarse.format("That is rounded."))
        coarse = coarse.format("That is near, and not the least-squares factor.")
        hint = hint or _explain_times(found, pooled, base, merged, changes, difference) or (near and coarse)
        raise TryAgain(hint or f"Here the change is {pooled:.3g} times in the weights, and you find {found:.3g}. Sum the dot products of "
                       "difference and change over all layers, and divide by the changes' own.")  # fmt: skip


def _has_few_digits(number, dtype):
    """Is it in 16 bits, or a number that 16 bits or three decimals hold?"""
    import torch

    kinds = (torch.bfloat16, torch.float16)
    return dtype in kinds or any(torch.as_tensor(number, dtype=kind).item() == number for kind in kinds) \
        or round(number, 3) == number  # fmt: skip


def _explain_times(found, pooled, base, merged, changes, difference):
    """The hint for a typical mistake, or None."""
    import statistics

    import torch

    above, below = _dot(difference, changes), _dot(changes, changes)
    own = {n: change.square().sum().item() for n, change in changes.items()}
    single = [_dot(difference, {n: changes[n]}) / own[n] for n in changes]
    norms = [size**0.5 for size in own.values()]
    moved = [difference[n].norm().item() for n in changes]
    large = {n: changes[n] for n in changes if own[n] > max(own.values()) / 100}
    adapted = {n: difference[n] for n in changes}
    entries = torch.cat([(difference[n] / changes[n]).flatten() for n in changes])
    in_order = zip(base.values(), merged.values(), changes.values(), strict=False)
    by_ratio = "The ratio of the norms has no sign of its own, and it counts noise of any direction. Project: the dot product of " \
               "difference and change."  # fmt: skip
    one_by_one = "Entry by entry the change is near 0 in places, and you find noise divided by nearly nothing there. Sum above and below " \
                 "the fraction first."  # fmt: skip
    median = "That is one layer only, or the median over the layers. Each layer counts: sum above and below over all of them."
    mistakes = [
        (above, "That is the dot product. Divide it by that of the change with itself."),
        (above / (_dot(adapted, adapted) * below) ** 0.5, "That is the cosine, 1 for any number of times above 0. Divide by the change's own "
                                                          "size only."),
        (_dot(merged, changes) / below, "Take the base away first: merged - base."),
        (-pooled, "The sign is turned: merged - base."),
        ((_dot(adapted, adapted) / below) ** 0.5, by_ratio), (-((_dot(adapted, adapted) / below) ** 0.5), by_ratio),
        (sum(moved) / sum(norms), by_ratio), (statistics.mean(one / size for one, size in zip(moved, norms, strict=True)), by_ratio),
        (sum(((m - b) * c).sum().item() for b, m, c in in_order) / below, "Base, merged and changes have their tensors in different orders. "
                                                                          "Go by the names, not by the places."),
        ((above + _dot(difference, {"norm": difference["norm"]})) / below, "The norm has no change, and it must not count. Go through the "
                                                                           "names of the changes."),
        (sum(single) / len(single), "The mean over layers lets a layer with a tiny change count as much as any, and there the noise is "
                                    "everything. Sum above and below the fraction over all layers, and divide once."),
        (sum(size * one for size, one in zip(norms, single, strict=True)) / sum(norms), "That is a mean weighted by the norms. In least "
                                "squares they count squared: sum above and below the fraction, and divide once."),
        (_dot(difference, large) / _dot(large, large), "The layers with a small change are left out. They count, if little: sum over all."),
        (entries.mean().item(), one_by_one), (entries.median().item(), one_by_one), (statistics.median(entries.tolist()), one_by_one),
        *((middle(single), median) for middle in (statistics.median, statistics.median_low, statistics.median_high)),
        *((one, "That is one layer only. Sum over all of them.") for one in single),
    ]  # fmt: skip
    for value, hint in mistakes:
        if abs(found - value) < 1e-6 * max(1, abs(value)):
            return hint
    return None


def _dot(first, second):
    return sum((first[name] * second[name]).sum().item() for name in second)


def times_example(factor, seed, other=None, noise=0.005, small=1e-4, unit=1.0):
    """{name: weight} of base and merged, {layer: change}: the change `factor` times, with noise; in the first and the last it is small.

    `other` is the factor of up_proj, and `unit` multiplies everything. The three have their layers in different orders.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    base, merged, changes = {}, {}, {}
    layers = {
        "k_proj": ((8, 8), small),
        "q_proj": ((8, 8), 0.5),
        "up_proj": ((12, 8), 0.3),
        "gate_proj": ((12, 8), small),
    }
    for name, (shape, size) in layers.items():
        weight, change, off = (unit * torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(3))
        times = other if other is not None and name == "up_proj" else factor
        base[name], changes[name] = weight, size * change
        merged[name] = weight + times * size * change + noise * off
    base["norm"] = torch.full((8,), unit, dtype=torch.float64)  # a weight that differs, without a change
    merged["norm"] = 1.5 * base["norm"]
    base = {name: base[name] for name in ("q_proj", "k_proj", "up_proj", "gate_proj", "norm")}
    merged = {name: merged[name] for name in ("k_proj", "q_proj", "gate_proj", "up_proj", "norm")}
    return base, merged, changes


@exercise("07.ship", title="Ship a merged model", level="core", minutes=15)
def ship(function):
    """Does the folder hold base + change in the base's dtype, the tokenizer with its template, and no adapter; and what is returned?"""
    from adapter_checks.merged_report import MergedReport

    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as root:
            shutil.copytree(_ship_example(dtype).name, root, dirs_exist_ok=True)
            base, adapter, out = (Path(root) / name for name in ("base", "adapter", "out"))
            given = {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()}
            found = call_learner(function, base, adapter, out)
            if given != {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()}:
                raise TryAgain(
                    "The folder of the base or of the adapter has changed. Save into `out`, and nowhere else."
                )
            _check_shipped(base, adapter, out, dtype)
            if not isinstance(found, MergedReport):
                raise TryAgain(
                    f"The folder is right. Return the report of check_merged_folder, too; this is {describe(found)}."
                )
            if not found.ok:
                raise TryAgain(f"The folder is right, and the report says {', '.join(found.codes)}. Give the check base, adapter and "
                               "`out`, in this order.")  # fmt: skip


def _check_shipped(base, adapter, out, dtype):
    weights = sorted(out.glob("*.safetensors")) if out.is_dir() else []
    if [file.name for file in weights] == ["adapter_model.safetensors"]:
        raise TryAgain(
            "The folder holds an adapter and no model: the PeftModel was saved. Save what merge_and_unload() returns."
        )
    if not weights or not (out / "config.json").exists():
        raise TryAgain(
            "There is no model in the folder `out`: config.json or the weights are missing. Use save_pretrained(out)."
        )
    if list(out.glob("adapter_*")):
        raise TryAgain(
            "An adapter lies beside the merged weights, and from_pretrained would put it on top. Leave the adapter's files out."
        )
    for file in ("tokenizer.json", "chat_template.jinja"):
        if not (out / file).exists():
            raise TryAgain(
                f"{file} is missing in `out`. Load the tokenizer from the base's folder, and save it there, too."
            )
    stored, of_base, changes = _tensors(out), _tensors(base), _changes(adapter)
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}
    if kinds != {dtype}:
        raise TryAgain(f"The base is stored in {dtype}, and the merged model in {' and '.join(sorted(kinds))}. Load the base in its own "
                       "dtype, which dtype='auto' does.")  # fmt: skip
    if set(stored) != set(of_base):
        raise TryAgain("The merged model has other tensors than the base. Save what merge_and_unload() returns.")
    difference = {name: stored[name].double() - of_base[name].double() for name in of_base}
    others = [name for name in of_base if name not in changes and difference[name].any()]
    times = _dot(difference, changes) / _dot(changes, changes)
    if abs(times) < 0.05:
        raise TryAgain(
            "The weights are the base's: the change isn't in them. unload() removes the adapter; merge_and_unload() merges it."
        )
    if abs(times - 1) > 0.05:
        raise TryAgain(
            f"The change is {times:.1f} times in the weights. Merge once, into the base as it is in its folder."
        )
    if others or any((difference[name] - change).norm() > 0.1 * change.norm() for name, change in changes.items()):
        raise TryAgain("Some weights are not those of base + s·BA. Change nothing but by the merge.")


def _tensors(folder):
    """{name: tensor} of all safetensors files of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _changes(adapter):
    """{name of the base's weight: s·BA} of the adapter that `_ship_example` makes, whose scaling is 2."""
    tensors = _tensors(adapter)
    return {
        name.removeprefix(PREFIX).replace(".lora_A", ""): 2 * (tensors[name.replace("_A.", "_B.")] @ A).double()
        for name, A in tensors.items()
        if ".lora_A." in name
    }


@functools.cache
def _ship_example(dtype):
    """A temporary folder with a random `base` in this dtype, which has the course's tokenizer, and a random `adapter` for it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    root = tempfile.TemporaryDirectory()
    base, adapter = Path(root.name) / "base", Path(root.name) / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(paths.models_dir() / "base")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        # Larger weights than the usual, so that this model's outputs differ from token to token.
        config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, tie_word_embeddings=True, **sizes)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(adapter)
    return root


def suspects(base, adapter, folder):
    """Make five folders under `folder` that claim to be `adapter` merged into `base`; returns {name: path}. One is right."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def adapted(place=base):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), adapter)

    def save(name, model):
        place = Path(folder) / name
        shutil.rmtree(place, ignore_errors=True)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        return place

    unscaled = adapted()
    for layer in (module for module in unscaled.modules() if isinstance(module, LoraLayer)):
        layer.scaling = dict.fromkeys(layer.scaling, 1.0)
    found = {
        "one": save("one", unscaled.merge_and_unload()),
        "two": save("two", adapted().merge_and_unload()),
        "three": save("three", adapted().merge_and_unload().to(torch.bfloat16)),
        "four": save("four", adapted().unload()),
    }
    found["five"] = save("five", adapted(found["two"]).merge_and_unload())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(adapter) / file, found["two"])
    return found
