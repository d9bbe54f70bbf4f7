"""Checks of lesson 6: judge a merge, measure agreement, merge a shard, join two adapters, count how often one was merged."""

from course_utils.exercises import TryAgain, call_learner, describe, exercise, expect_number, expect_tensor, expect_type

VERDICTS = ("no effect", "differs", "same")
PREFIX = "base_model.model."


def judged_logits(effect, error, seed=0, negative=False):
    """Logits (6, 20) of base, adapter and merged: the adapter's largest effect is `effect`, the merge's largest error `error`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    sign = -1 if negative else 1
    change = torch.zeros_like(base)
    change[2, 3] = sign * effect
    off = torch.zeros_like(base)
    off[4, 5] = sign * error
    return base, base + change, base + change + off


@exercise("06.verdict", title="Judge a merge", level="warm-up", minutes=10)
def verdict(function):
    """Is the adapter's effect looked at first, and then the largest absolute difference, NaN included?"""
    cases = [
        ("same", 1.0, 1e-5, {}, ""),
        ("differs", 1.0, 0.01, {}, "One logit is off by a hundred tolerances. Take the largest difference: a mean hides it."),
        ("differs", 1.0, 0.01, {"negative": True}, "Here the merged model is off downwards. Take the absolute difference."),
        ("no effect", 0.0, 0.0, {}, "Base, adapter and merged are all the same here, which shows nothing about the merge. Ask first "
                                    "whether the adapter changes the base."),
        ("no effect", 5e-4, 0.0, {}, "The adapter's effect is only five tolerances here. Less than ten count as none."),
        ("same", 0.5, 5e-5, {"negative": True}, "Here the adapter lowers a logit, and the merge agrees. Take absolute differences."),
        ("no effect", 0.0, 0.01, {}, "Here the adapter has no effect, and the merge is off. The first question comes first."),
    ]  # fmt: skip
    for seed, (expected, effect, error, how, hint) in enumerate(cases):
        found = _verdict_of(function, *judged_logits(effect, error, seed, **how))
        if found != expected:
            raise TryAgain(hint or f"With an effect of {effect:g} and a difference of {error:g} the answer is {expected!r}, not {found!r}.")
    base, adapter, merged = judged_logits(1.0, 0.0, seed=9)
    merged[0, 0] = float("nan")
    if _verdict_of(function, base, adapter, merged) != "differs":
        raise TryAgain("A logit of the merged model is NaN here, and no comparison with NaN is true. Ask whether the difference is "
                       "within the tolerance, and say 'differs' if it isn't.")  # fmt: skip


def _verdict_of(function, base, adapter, merged):
    found = call_learner(function, base.clone(), adapter.clone(), merged.clone(), 1e-4)
    if expect_type(found, str, "the verdict") not in VERDICTS:
        raise TryAgain(f"The verdict is one of {', '.join(map(repr, VERDICTS))}, not {found[:40]!r}.")
    return found


@exercise("06.agreement", title="Measure agreement", level="core", minutes=10)
def agreement(function):
    """Compare with top-1 agreement and the mean of KL(reference || candidate), in nats."""
    import torch

    for seed, (positions, vocabulary) in enumerate(((7, 12), (30, 5))):
        reference, candidate = agreement_example(positions, vocabulary, seed)
        found = expect_type(call_learner(function, reference.clone(), candidate.clone()), (tuple, list), "the answer")
        if len(found) != 2:
            raise TryAgain(f"Two numbers are expected, the share and the KL; you returned {len(found)}.")
        share, kl = (expect_number(value, name) for value, name in zip(found, ("the share", "the KL"), strict=True))
        p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
        right = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        terms = p.exp() * (p - q)
        mistakes = {
            (reference.argmax(0) == candidate.argmax(0)).double().mean().item(): "That compares columns. The tokens lie along the last "
                                                                                  "dimension: argmax(-1).",
            (reference.argmax(-1) == candidate.argmax(-1)).sum().item(): "That is the number of positions. Divide by all of them.",
            float(reference.argmax() == candidate.argmax()): "That looks at one place of the whole. Each position has its own argmax(-1).",
        }  # fmt: skip
        if abs(share - right) > 1e-6:
            raise TryAgain(next((hint for value, hint in mistakes.items() if abs(share - value) < 1e-6),
                                f"The share of equal top tokens is {right:.2f} here, and you return {share:.2f}."))  # fmt: skip
        mistakes = {
            terms.sum().item(): "That is the sum over positions. Take the mean.",
            terms.mean().item(): "That is divided by the size of the vocabulary, too: sum over the tokens, then the mean over positions. "
                                 "(kl_div's reduction='mean' does that.)",
            (q.exp() * (q - p)).sum(-1).mean().item(): "That is KL(candidate || reference). The reference stands first: its "
                                                        "probabilities weigh the logarithms.",
            -terms.sum(-1).mean().item(): "The sign is turned: log p - log q.",
            terms.sum(-1).mean().item() / torch.tensor(2.0).log().item(): "That is in bits. Take the natural logarithm.",
            (reference.softmax(-1) * (reference - candidate)).sum(-1).mean().item(): "Logits are no log-probabilities: log_softmax(-1) "
                                                                                     "first.",
        }  # fmt: skip
        if abs(kl - terms.sum(-1).mean().item()) > 1e-5:
            raise TryAgain(next((hint for value, hint in mistakes.items() if abs(kl - value) < 1e-5),
                                "The KL is not right. p and q are softmax over the last dimension; sum p·(log p - log q)."))  # fmt: skip


def agreement_example(positions, vocabulary, seed):
    """Logits (positions, vocabulary) of two models that mostly agree, in float64."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(positions, vocabulary, dtype=torch.float64, generator=generator)
    return reference, reference + torch.randn(positions, vocabulary, dtype=torch.float64, generator=generator)


@exercise("06.shard", title="Merge one shard", level="core", minutes=15)
def shard(function):
    """Compare with W + scaling * B @ A in the dtype of W, for a file that holds part of the layers and other tensors."""
    import torch

    # bfloat16 comes last: a wrong sum shows first where rounding can't be the reason.
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        tensors, adapter, scaling, expected = shard_example(dtype, seed)
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        found = call_learner(function, given, {name: tensor.clone() for name, tensor in adapter.items()}, scaling)
        expect_type(found, dict, "the shard")
        if any(not torch.equal(given[name], tensors[name]) for name in tensors if name in given) or len(given) != len(tensors):
            raise TryAgain("The shard that you were given has changed. Put the results into a new dictionary.")
        if extra := set(found) - set(expected):
            raise TryAgain(f"{_first(extra)} is no tensor of this shard. A merged file holds the names of the base's, and no others: "
                           "not the adapter's, and not layers of another shard.")  # fmt: skip
        if lost := set(expected) - set(found):
            raise TryAgain(f"{_first(lost)} is missing. A tensor without A and B is copied as it is.")
        for name, wanted in expected.items():
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
        raise TryAgain(f"{name} is {str(found.dtype)[6:]} now and was {str(wanted.dtype)[6:]}: the folder would change its size. Give the "
                       "sum the dtype of the base's tensor.")  # fmt: skip
    if A is None:
        if not torch.equal(found, wanted):
            raise TryAgain(f"{name} has no A and B, and has changed. Copy it as it is.")
        return
    share = 1e-2 if wanted.dtype == torch.bfloat16 else 1e-5
    exactly, found, wanted, weight = torch.equal(found, wanted), found.float(), wanted.float(), weight.float()

    def close(other):
        return (found - other).norm() <= share * wanted.norm()

    if close(wanted):
        if not exactly and share == 1e-2:
            raise TryAgain("Nearly. The product BA was rounded before it was added. Compute in float32, and round the sum once.")
        return
    if close(weight):
        raise TryAgain(f"{name} is as it was. Its A is called {PREFIX}{layer}.lora_A.weight.")
    if close(weight + B.float() @ A.float()):
        raise TryAgain("The scaling is missing: W + scaling·BA.")
    if close(wanted - weight):
        raise TryAgain("That is the change alone. Add it to the weight.")
    raise TryAgain(f"{name} is not W + scaling·BA. B is (outputs, r) and stands first.")


def shard_example(dtype, seed):
    """(tensors of one shard, tensors of the adapter, scaling, merged shard); the adapter has a layer of another shard, too."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "model.layers.1.self_attn.q_proj.weight": random(12, 12).to(dtype),
        "model.layers.1.mlp.up_proj.weight": random(20, 12).to(dtype),
        "model.layers.1.input_layernorm.weight": random(12).to(dtype),
    }
    scaling, rank, adapter, merged = 3.0, 2, {}, dict(tensors)
    for layer, (outputs, inputs) in {"layers.0.self_attn.q_proj": (12, 12), "layers.1.self_attn.q_proj": (12, 12),
                                     "layers.1.mlp.up_proj": (20, 12)}.items():  # fmt: skip
        A, B, name = random(rank, inputs), random(outputs, rank), f"model.{layer}.weight"
        adapter[f"{PREFIX}model.{layer}.lora_A.weight"], adapter[f"{PREFIX}model.{layer}.lora_B.weight"] = A, B
        if name in tensors:
            merged[name] = (tensors[name].float() + scaling * (B @ A)).to(dtype)
    return tensors, adapter, scaling, merged


@exercise("06.join", title="Make two adapters one", level="core", minutes=10)
def join(function):
    """Compare BA of the answer with the weighted sum of scaling·BA, for ranks that differ and weights below zero."""
    import torch

    for seed, (ranks, scalings, weights) in enumerate((
        ((3, 3), (1.0, 1.0), (1.0, 1.0)), ((3, 2), (2.0, 3.0), (0.5, 1.5)), ((2, 4), (0.5, 3.0), (0.7, 0.2)),
        ((2, 2), (2.0, 1.5), (1.0, -0.6)), ((1, 2, 3), (2.0, 1.0, 0.5), (0.2, 0.3, 0.5)),
    )):  # fmt: skip
        adapters = join_example(ranks, scalings, seed)
        found = call_learner(function, [(A.clone(), B.clone(), scaling) for A, B, scaling in adapters], list(weights))
        if len(expect_type(found, (tuple, list), "the answer")) != 2:
            raise TryAgain(f"A and B are expected, and you returned {describe(found)}.")
        A, B = found
        for matrix, name in ((A, "A"), (B, "B")):
            if expect_type(matrix, torch.Tensor, name).dim() != 2:
                raise TryAgain(f"{name} should be a matrix, and has the shape {tuple(matrix.shape)}.")
        rank, outputs, inputs = sum(ranks), adapters[0][1].shape[0], adapters[0][0].shape[1]
        products = [w * s * (b @ a) for (a, b, s), w in zip(adapters, weights, strict=True)]
        if tuple(A.shape) == (rank, inputs) and tuple(B.shape) == (outputs, rank):
            _check_joined(B @ A, products, adapters, weights)
        elif tuple(A.shape) == (outputs, rank) and tuple(B.shape) == (rank, inputs):
            raise TryAgain("A and B have changed places: return A first.")
        elif A.shape[0] == ranks[0] and set(ranks) == {ranks[0]}:
            raise TryAgain(f"A has rank {ranks[0]} still, so A and B were added up. (B₁+B₂)(A₁+A₂) has the products B₁A₂ and B₂A₁, which "
                           "nobody asked for. Stack them instead: the ranks add up.")  # fmt: skip
        else:
            raise TryAgain(f"For ranks {ranks} A should be {(rank, inputs)} and B {(outputs, rank)}; yours are {tuple(A.shape)} and "
                           f"{tuple(B.shape)}. Stack the A as rows (dim=0) and the B as columns (dim=1).")  # fmt: skip


def _check_joined(found, products, adapters, weights):
    import torch

    def agrees(total):
        return torch.allclose(found, total, atol=1e-9)

    if agrees(sum(products)):
        return
    if not bool(torch.isfinite(found).all()):
        raise TryAgain("A weight is below zero here, and its root is NaN. Multiply one of A and B by the whole weight.")
    plain = [b @ a for a, b, _ in adapters]
    if agrees(sum(plain)):
        raise TryAgain("Neither weight nor scaling is in it: each part counts weight · scaling · BA.")
    if agrees(sum(w * p for w, p in zip(weights, plain, strict=True))):
        raise TryAgain("The scaling is missing. The new adapter has scaling 1, so each part brings its own: weight · scaling.")
    if agrees(sum(s * p for (_, _, s), p in zip(adapters, plain, strict=True))):
        raise TryAgain("The weights are missing.")
    if agrees(sum(w * s * p for w, (_, _, s), p in zip(weights, adapters, products, strict=True))):
        raise TryAgain("Weight and scaling were multiplied into A and into B, so they count twice. Take one of the two.")
    if agrees(sum(w * p for w, p in zip(weights, products, strict=True))):
        raise TryAgain("The weight counts twice: it was multiplied into A and into B. Take one of the two.")
    if agrees(sum(s * p for (_, _, s), p in zip(adapters, products, strict=True))):
        raise TryAgain("The scaling counts twice: it was multiplied into A and into B. Take one of the two.")
    if agrees(sum(abs(w) * s * p for (_, _, s), p, w in zip(adapters, plain, weights, strict=True))):
        raise TryAgain("A weight is below zero here, and its sign was lost.")
    raise TryAgain("The shapes are right, and BA is not the sum of weight · scaling · BA. Are A and B stacked in the same order?")


def join_example(ranks, scalings, seed):
    """[(A (rank, 9), B (7, rank), scaling)] in float64."""
    import torch

    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(seed)}
    return [
        (torch.randn(rank, 9, **options), torch.randn(7, rank, **options), scaling)
        for rank, scaling in zip(ranks, scalings, strict=True)
    ]


@exercise("06.times", title="How often was it merged?", level="stretch", minutes=15)
def times(function):
    """Compare with the least-squares factor of the changes in (merged - base), pooled over all layers."""
    for seed, factor in enumerate((1.0, 2.0, 0.0, -1.0, 16.0, 2**0.5)):
        base, merged, changes = times_example(factor, seed)
        copies = [{name: tensor.clone() for name, tensor in given.items()} for given in (base, merged, changes)]
        found = expect_number(call_learner(function, *copies), "the number")
        difference = {name: merged[name] - base[name] for name in changes}
        pooled = _dot(difference, changes) / _dot(changes, changes)
        if abs(found - pooled) < 0.02:
            continue
        single = [(difference[n] * changes[n]).sum().item() / changes[n].square().sum().item() for n in changes]
        norms = (_dot(difference, difference) / _dot(changes, changes)) ** 0.5
        mistakes = {
            _dot(difference, changes): "That is the dot product. Divide it by that of the change with itself.",
            _dot(difference, changes) / (_dot(difference, difference) * _dot(changes, changes)) ** 0.5:
                "That is the cosine, 1 for any number of times above 0. Divide by the change's own size only.",
            _dot(merged, changes) / _dot(changes, changes): "Take the base away first: merged - base.",
            norms: "The ratio of the norms has no sign, and it counts the noise, too. Project: the dot product of difference and change.",
            sum(single) / len(single): "The mean over layers lets a layer with a tiny change count as much as any, and there the noise is "
                                       "everything. Sum above and below the fraction over all layers, and divide once.",
            **{one: "That is one layer only. Sum over all of them." for one in single},
        }  # fmt: skip
        hint = next((hint for value, hint in mistakes.items() if abs(found - value) < 1e-6 * max(1, abs(value))), None)
        raise TryAgain(hint or f"Here the change is {factor:.3g} times in the weights, and you find {found:.3g}. Sum the dot products of "
                       "difference and change over all layers, and divide by the changes' own.")  # fmt: skip


def _dot(first, second):
    return sum((first[name] * second[name]).sum().item() for name in second)


def times_example(factor, seed):
    """{layer: weight} of base and merged, {layer: change}: the change `factor` times, with noise; in the first and the last it is tiny."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    base, merged, changes = {}, {}, {}
    layers = {"k_proj": ((8, 8), 1e-4), "q_proj": ((8, 8), 0.5), "up_proj": ((12, 8), 0.3), "down_proj": ((8, 12), 1e-4)}
    for name, (shape, size) in layers.items():
        base[name] = torch.randn(*shape, dtype=torch.float64, generator=generator)
        changes[name] = size * torch.randn(*shape, dtype=torch.float64, generator=generator)
        noise = 0.005 * torch.randn(*shape, dtype=torch.float64, generator=generator)
        merged[name] = base[name] + factor * changes[name] + noise
    base["norm"] = torch.ones(8, dtype=torch.float64)  # a weight without a change
    merged["norm"] = base["norm"].clone()
    return base, merged, changes
