"""Lesson 7: its checks, its sweeps on a model made for the test, and what PEFT does, as the lesson shows it."""

import math
import re
import warnings

import numpy
import pytest
import torch

from course_utils import data, paths
from course_utils.exercises import lesson07
from experiments import combine, dial, harness, training
from support import short_answers
from tiny_models import make_tiny_model, make_tiny_tokenizer

# The solutions


def right_verdict(base, adapter, merged, tolerance, least=10, size=lambda difference: difference.abs().max()):
    if size(adapter - base) < least * tolerance:
        return "no effect"
    return "same" if size(merged - adapter) <= tolerance else "differs"


def right_agreement(reference, candidate):
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    return (p.argmax(-1) == q.argmax(-1)).double().mean(), (p.exp() * (p - q)).sum(-1).mean()


def right_shard(
    tensors, adapter, scaling, add=lambda weight, B, A, scaling: (weight.float() + scaling * (B @ A)).to(weight.dtype)
):
    merged = {}
    for name, tensor in tensors.items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        A, B = (adapter.get(f"{prefix}.lora_{factor}.weight") for factor in "AB")
        merged[name] = tensor.clone() if A is None else add(tensor, B, A, scaling)
    return merged


def right_join(adapters, weights, of_A=lambda w, s: w * s, of_B=lambda w, s: 1.0):
    A = torch.cat([of_A(w, s) * A for (A, _, s), w in zip(adapters, weights)])
    return A, torch.cat([of_B(w, s) * B for (_, B, s), w in zip(adapters, weights)], dim=1)


def right_times(base, merged, changes):
    above = sum(((merged[name] - base[name]) * change).sum() for name, change in changes.items())
    return above / sum(change.square().sum() for change in changes.values())


# Typical mistakes


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


def added(adapters, weights):
    return sum(w * s * A for (A, _, s), w in zip(adapters, weights)), sum(B for _, B, _ in adapters)


def joined(of_A, of_B=lambda w, s: 1.0):
    return lambda adapters, weights: right_join(adapters, weights, of_A, of_B)


def swapped(adapters, weights):
    A, B = right_join(adapters, weights)
    return B, A


def other_order(adapters, weights):
    A, _ = right_join(adapters, weights)
    return A, right_join(adapters[::-1], weights[::-1])[1]


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


def log_of_softmax(log, clean=lambda terms: terms):
    def agreement(reference, candidate):
        p, q = reference.softmax(-1), candidate.softmax(-1)
        return right_agreement(reference, candidate)[0], clean(p * (log(p) - log(q))).sum(-1).mean()

    return agreement


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


def joined_in_place(adapters, weights):
    return torch.cat([A for A, _, _ in adapters]), torch.cat(
        [B.mul_(w * s) for (_, B, s), w in zip(adapters, weights)], dim=1
    )


def by_svd(rank_of):
    def join(adapters, weights):
        U, S, V = torch.linalg.svd(sum(w * s * B @ A for (A, B, s), w in zip(adapters, weights)), full_matrices=False)
        rank = rank_of(adapters)
        return V[:rank], U[:, :rank] * S[:rank]

    return join


def joined_in(dtype):
    return lambda adapters, weights: tuple(part.to(dtype) for part in right_join(adapters, weights))


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


def verdict_with_numpy(base, adapter, merged, tolerance):
    base, adapter, merged = base.numpy(), adapter.numpy(), merged.numpy()
    if numpy.max(numpy.abs(adapter - base)) < 10 * tolerance:
        return numpy.str_("no effect")
    return numpy.array(["differs", "same"])[int(numpy.allclose(merged, adapter, rtol=0, atol=tolerance))]


def verdict_in_steps(base, adapter, merged, tolerance):
    if not ((adapter - base).abs() >= 10 * tolerance).any():
        return "no effect"
    return "same" if ((merged - adapter).abs() <= tolerance).all() else "differs"


def agreement_by_distributions(reference, candidate):
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (reference, candidate))
    share = (p.logits.argmax(-1) == q.logits.argmax(-1)).double().mean()
    return share, torch.distributions.kl_divergence(p, q).mean()


def agreement_by_kl_div(reference, candidate):
    p, q = (logits.float().log_softmax(-1) for logits in (reference, candidate))
    share = (reference.argmax(-1) == candidate.argmax(-1)).sum() / len(reference)
    return torch.stack([share, torch.nn.functional.kl_div(q, p.exp(), reduction="batchmean")])


def agreement_with_numpy(reference, candidate):
    def log_softmax(logits):
        logits = logits.numpy() - logits.numpy().max(-1, keepdims=True)
        return logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(candidate)
    return numpy.array([(p.argmax(-1) == q.argmax(-1)).mean(), (numpy.exp(p) * (p - q)).sum(-1).mean()])


def agreement_by_cross_entropy(reference, candidate):
    """Cross entropy minus entropy."""
    p = reference.softmax(-1)
    terms = [torch.nn.functional.cross_entropy(logits, p) for logits in (candidate, reference)]
    return (reference.argmax(1) == candidate.argmax(1)).float().mean().item(), (terms[0] - terms[1]).item()


def join_by_blocks(adapters, weights):
    A = torch.vstack([A for A, _, _ in adapters])
    B = torch.hstack([B for _, B, _ in adapters])
    factors = [weight * scaling for (_, _, scaling), weight in zip(adapters, weights)]
    repeats = torch.tensor([A.shape[0] for A, _, _ in adapters])
    return A, B * torch.tensor(factors, dtype=B.dtype).repeat_interleave(repeats)


def join_with_numpy(adapters, weights):
    A, B = right_join(adapters[::-1], weights[::-1])
    return [A.numpy(), B.numpy()]


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


RIGHT = {
    "07.verdict": [close_to(rtol=0, effect_too=True), verdict_with_numpy, verdict_in_steps],
    "07.agreement": [
        agreement_by_distributions,
        agreement_by_kl_div,
        agreement_with_numpy,
        agreement_by_cross_entropy,
    ],
    "07.shard": [
        lambda t, a, s: right_shard(t, a, s, lambda w, B, A, s: torch.addmm(w.float(), s * B, A).to(w.dtype)),
        lambda t, a, s: right_shard(t, a, s, lambda w, B, A, s: (w.double() + (A.T @ B.T).T * s).to(w.dtype)),
        shard_by_kind(lambda name, adapter, A: A in adapter),
    ],
    "07.join": [by_svd(lambda adapters: sum(len(A) for A, _, _ in adapters)), join_by_blocks, join_with_numpy],
    "07.times": [times_by_least_squares, times_with_numpy, times_in_float32],
}


def all_terms(reference, candidate):  # top-1 agreement, log p, log q
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    return right_agreement(reference, candidate)[0], p, q


def mean_of_all(top_1, p, q):
    return top_1, torch.nn.functional.kl_div(q, p, log_target=True)


def side_by_side(adapters, weights):
    return torch.cat([A for A, _, _ in adapters], dim=1), adapters[0][1]


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
        (lesson07.agreement, log_of_softmax(lambda p: p.clamp(1e-30).log()), "Use log_softmax"),
        (lesson07.shard, with_bias, "bias has got a change"),
        (lesson07.agreement, lambda r, c: (right_agreement(r.T, c.T)[0], 0), "compares columns"),
        (lesson07.agreement, lambda r, c: (len(r) * right_agreement(r, c)[0], 0), "number of positions"),
        (
            lesson07.agreement,
            lambda r, c: (r.argmax() == c.argmax(), 0.0),
            "of type|should be a number|one place of the whole",
        ),
        (lesson07.agreement, lambda r, c: (0.123, 0), "you return 0.12"),
        (
            lesson07.agreement,
            lambda r, c: (right_agreement(r, c)[0], len(r) * right_agreement(r, c)[1]),
            "sum over positions",
        ),
        (lesson07.agreement, lambda r, c: mean_of_all(*all_terms(r, c)), "size of the vocabulary"),
        (
            lesson07.agreement,
            lambda r, c: (right_agreement(r, c)[0], right_agreement(c, r)[1]),
            "The reference stands first",
        ),
        (lesson07.agreement, lambda r, c: (right_agreement(r, c)[0], -right_agreement(r, c)[1]), "sign is turned"),
        (
            lesson07.agreement,
            lambda r, c: (right_agreement(r, c)[0], right_agreement(r, c)[1] / math.log(2)),
            "in bits",
        ),
        (
            lesson07.agreement,
            lambda r, c: (right_agreement(r, c)[0], (r.softmax(-1) * (r - c)).sum(-1).mean()),
            "no log-probabilities",
        ),
        (lesson07.agreement, lambda r, c: (right_agreement(r, c)[0], 7.0), "KL is not right"),
        (lesson07.agreement, lambda r, c: (right_agreement(r, c)[0], float("nan")), "is nan"),
        (lesson07.agreement, lambda r, c: right_agreement(r, c)[0], "of type tuple or list"),
        (lesson07.agreement, lambda r, c: (1, 2, 3), "you returned 3"),
        (lesson07.agreement, log_of_softmax(torch.log), "Use log_softmax"),
        (lesson07.agreement, log_of_softmax(lambda p: (p + 1e-9).log()), "Use log_softmax"),
        (lesson07.agreement, log_of_softmax(lambda p: p.clamp(1e-12).log()), "Use log_softmax"),
        (lesson07.agreement, log_of_softmax(torch.log, torch.nan_to_num), "Use log_softmax"),
        (lesson07.agreement, log_of_softmax(torch.log, lambda terms: terms.nan_to_num(0, 0, 0)), "Use log_softmax"),
        (lesson07.shard, in_place, "has changed. Put the results"),
        (lesson07.shard, everything, "is no tensor of this shard"),
        (lesson07.shard, other_shards_too, "layers.0.self_attn.q_proj.weight is no tensor of this shard"),
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
        (lesson07.join, added, "nobody asked for"),
        (
            lesson07.join,
            joined(lambda w, s: 1.0),
            "Neither weight nor scaling|scaling is missing|weights? (is|are) missing",
        ),
        (lesson07.join, joined(lambda w, s: w), "scaling is missing|Neither"),
        (lesson07.join, joined(lambda w, s: s), "weights are missing"),
        (lesson07.join, joined(lambda w, s: w * s, lambda w, s: w * s), "count twice"),
        (lesson07.join, joined(lambda w, s: w * s, lambda w, s: w), "The weight counts twice"),
        (lesson07.join, joined(lambda w, s: w * s, lambda w, s: s), "The scaling counts twice"),
        (lesson07.join, joined(lambda w, s: abs(w) * s), "its sign was lost"),
        (
            lesson07.join,
            joined(lambda w, s: torch.tensor(w * s).sqrt(), lambda w, s: torch.tensor(w * s).sqrt()),
            "its root is NaN",
        ),
        (lesson07.join, joined(lambda w, s: 3.0), "stacked in the same order"),
        (lesson07.join, other_order, "stacked in the same order"),
        (lesson07.join, swapped, "changed places"),
        (lesson07.join, side_by_side, "nobody asked for|Stack the A as rows"),
        (lesson07.join, lambda adapters, w: (torch.zeros(2, 2), torch.zeros(2, 2)), "Stack the A as rows"),
        (lesson07.join, lambda adapters, w: right_join(adapters, w)[0], "A and B are expected|of type tuple"),
        (lesson07.join, lambda adapters, w: (None, None), "of type Tensor"),
        (lesson07.join, lambda adapters, w: (torch.zeros(3), torch.zeros(3)), "should be a matrix"),
        (lesson07.join, joined_in_place, "you were given has changed"),
        (lesson07.join, by_svd(lambda adapters: len(adapters[0][0])), "only the nearest to the sum, at rank 3"),
        (lesson07.join, by_svd(lambda adapters: 7), "BA is the sum, at rank 7"),
        (lesson07.join, joined_in(torch.bfloat16), "A is bfloat16"),
        (lesson07.join, joined_in(torch.float32), "Keep their dtype"),
        (
            lesson07.join,
            lambda adapters, w: (right_join(adapters, w)[0], right_join(adapters, w)[1].float()),
            "B float32",
        ),
        (lesson07.times, ratio_of_norms, "no sign"),
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
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


# The sweeps, on a model made for the test


@pytest.fixture(scope="module")
def tiny_course(tmp_path_factory):
    """A random base with four random adapters, and folders for runs; one token a byte."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_BASE_MODEL", str(root / "base"))
        patch.setenv("COURSE_RUNS", str(root / "runs"))
        tokenizer = make_tiny_tokenizer()
        model = make_tiny_model(tokenizer)
        model.config.max_position_embeddings = 4096
        model.save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")
        for name in combine.ADAPTERS:
            adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
            for parameter_name, parameter in adapted.named_parameters():
                if ".lora_B." in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.1)
            adapted.save_pretrained(paths.adapters_dir() / name)
            model = adapted.unload()
        patch.setattr(combine, "SCORED", 2)
        short_answers(patch)
        yield


@pytest.mark.parametrize("adapters, weights", [("reading+sailor", "sum"), ("reading+sailor+extract+mood", "mean")])
def test_combine_measures_every_type(tiny_course, adapters, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns if the adapter that is deleted is active
        rows = combine.measure(0, adapters, weights)
    assert [row["combination"] for row in rows] == list(combine.TYPES)
    by_type = {row["combination"]: row for row in rows}
    number = adapters.count("+") + 1
    assert by_type["cat"]["error"] < 1e-5 and by_type["cat"]["rank"] == 2 * number and by_type["svd"]["rank"] == 2
    assert all(row["error"] > 0.01 for row in rows if row["combination"] != "cat")
    assert all(0 <= row[task] <= 1 for row in rows for task in combine.ADAPTERS)


def test_dial_sets_the_weights_that_it_says(tiny_course, monkeypatch):
    from peft.tuners.lora import LoraLayer

    seen = []

    def score(model, tokenizer, task, rows):
        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        seen.append((task, {name: layer.scaling[name] / 3 for name in layer.active_adapters}))
        return {"score": 0.5}

    monkeypatch.setattr(training, "score", score)
    monkeypatch.setattr(dial, "WEIGHTS", (0.25,))
    (row,) = dial.measure(1, "sailor+mood")
    assert row == {"weight": 0.25, "first": 0.5, "second": 0.5, "first_alone": 0.5, "second_alone": 0.5}
    both = {"sailor": 0.75, "mood": 0.25}
    assert seen == [("sailor", both), ("mood", both), ("sailor", {"sailor": 0.75}), ("mood", {"mood": 0.25})]


def test_the_seed_draws_the_rows_that_are_scored(tiny_course):
    first, again, other = (combine.scored_rows(seed) for seed in (0, 0, 1))
    assert {task: list(rows) for task, rows in first.items()} == {task: list(rows) for task, rows in again.items()}
    assert any(list(first[task]) != list(other[task]) for task in combine.ADAPTERS)


def test_the_sweeps_resume_and_are_read_back(tiny_course, monkeypatch):
    monkeypatch.setattr(combine, "TYPES", ("cat", "linear"))
    runs = combine.RUNS[:1]
    rows = harness.sweep("combine", runs, combine.measure, log=lambda line: None)
    assert len(rows) == 2 and harness.missing(data.load_results("combine", harness.folder()), runs) == []


# What PEFT does, as the lesson shows it


def two_adapters(**settings):
    """A tiny Llama in float64 with two random adapters, alpha not r, and the function that measures a combination."""
    from peft import LoraConfig, get_peft_model

    model = make_tiny_model(make_tiny_tokenizer()).double()
    first, second = (LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], **settings) for alpha in (12, 6))
    model = get_peft_model(model, first, adapter_name="one", autocast_adapter_dtype=False)
    model.add_adapter("two", second, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


PARTS = {"one": 0.5, "two": -0.25}


def combined(model, kind, **given):
    """The error of a combination with the weights PARTS."""
    model.add_weighted_adapter(list(PARTS), list(PARTS.values()), kind, combination_type=kind, **given)
    return combine.error_of(model, kind, PARTS)


def test_cat_is_exact_and_svd_with_the_sum_of_the_ranks_and_no_type_is_with_rslora():
    assert combined(two_adapters(), "cat") < 1e-12 and combined(two_adapters(), "svd", svd_rank=8) < 1e-6
    assert combined(two_adapters(), "svd") > 0.05 and combined(two_adapters(), "linear") > 0.2
    for kind in combine.TYPES:
        density = {} if kind in combine.WITHOUT_DENSITY else {"density": 0.5}
        assert combined(two_adapters(use_rslora=True), kind, **density) > 0.3, kind
    assert combined(two_adapters(use_rslora=True), "cat") == pytest.approx(8**0.5 - 1)


def test_the_types_are_all_that_peft_offers():
    import inspect
    import typing

    from peft.tuners.lora import LoraModel

    offered = inspect.signature(LoraModel.add_weighted_adapter, eval_str=True).parameters["combination_type"].annotation
    assert set(typing.get_args(offered)) == set(combine.TYPES) and len(combine.TYPES) == 11


def test_linear_makes_cross_terms_and_scales_by_roots():
    model = two_adapters()
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type="linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    (A1, B1), (A2, B2) = ((layer.lora_A[name].weight, layer.lora_B[name].weight) for name in ("one", "two"))
    c1, c2 = 0.5 * 12 / 4, 0.5 * 6 / 4
    wanted = c1 * B1 @ A1 + c2 * B2 @ A2 + (c1 * c2) ** 0.5 * (B1 @ A2 + B2 @ A1)
    assert torch.allclose(layer.get_delta_weight("mix"), wanted, atol=1e-6)  # PEFT keeps the roots in float32


def test_a_name_that_exists_is_passed_over_even_after_an_error():
    model = two_adapters()
    with pytest.raises(TypeError):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="ties")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="ties", density=0.5)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not layer.get_delta_weight("mix").any() and model.active_adapters == ["one"]
    model.delete_adapter("mix")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="ties", density=0.5)
    assert layer.get_delta_weight("mix").any() and model.active_adapters == ["one"]


def test_linear_needs_equal_ranks_and_cat_and_svd_do_not():
    from peft import LoraConfig, get_peft_model

    for kind in combine.TYPES:
        model = make_tiny_model(make_tiny_tokenizer())
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="one")
        model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
        density = {} if kind in combine.WITHOUT_DENSITY else {"density": 0.5}
        if kind == "cat" or "svd" in kind:
            model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type=kind, **density)
        else:
            with pytest.raises(ValueError, match="same r value"):
                model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type=kind, **density)


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
