"""Checks of lesson 7: judge a merge, measure agreement, merge a shard, join two adapters, count how often one was merged."""

from course_utils.exercises import (
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_list,
    expect_number,
    expect_plain_tensor,
    expect_tensor,
    expect_type,
    using,
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


@exercise("07.agreement", title="Measure agreement", level="core", minutes=10)
def agreement(function):
    """Compare with top-1 agreement and the mean of KL(reference || candidate), in nats."""
    import torch

    for seed, (positions, vocabulary, gap) in enumerate(
        ((7, 12, 0), (30, 5, 0), (1, 40, 0), (7, 12, 80), (9, 15, 1500))
    ):
        reference, candidate = agreement_example(positions, vocabulary, seed)
        row = seed % (positions - 1) if gap else 0
        reference[row, seed] += gap  # With a large gap softmax is 0 at the other tokens of this row,
        candidate[row, seed] += gap
        if gap:
            candidate[row + 1, reference[row + 1].argmax()] -= (
                gap  # and that of the candidate at the reference's top token of the next.
            )
        found = expect_list(call_learner(function, reference.clone(), candidate.clone()), "the answer")
        if len(found) != 2:
            raise TryAgain(f"Two numbers are expected, the share and the KL; you returned {len(found)}.")
        p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
        right = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        terms = p.exp() * (p - q)
        right_kl = terms.sum(-1).mean().item()
        share, kl = expect_number(found[0], "the share"), found[1]
        if gap:
            with using("the KL"):
                kl = float(kl.item() if hasattr(kl, "item") else kl)
            # torch.distributions gives inf where the candidate's softmax is 0, which is no mistake of whoever uses it.
            if not (abs(kl - right_kl) <= 1e-5 * right_kl or (gap > 700 and kl == float("inf"))):
                raise TryAgain(f"Here some logits lie {gap} apart. softmax gives {'0' if gap > 700 else 'next to 0'} for the lower one, and "
                               "log(0) is -inf; to add a little or to clamp makes the KL too small. Use log_softmax(-1), which keeps the "
                               "true number.")  # fmt: skip
            kl = right_kl
        kl = expect_number(kl, "the KL")
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
        if abs(kl - right_kl) > 1e-5 * max(1, right_kl):
            raise TryAgain(next((hint for value, hint in mistakes.items() if abs(kl - value) < 1e-5),
                                "The KL is not right. p and q are softmax over the last dimension; sum p·(log p - log q)."))  # fmt: skip


def agreement_example(positions, vocabulary, seed):
    """Logits (positions, vocabulary) of two models that mostly agree, in float64."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(positions, vocabulary, dtype=torch.float64, generator=generator)
    return reference, reference + torch.randn(positions, vocabulary, dtype=torch.float64, generator=generator)


@exercise("07.shard", title="Merge one shard", level="core", minutes=15)
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


@exercise("07.join", title="Make two adapters one", level="core", minutes=10)
def join(function):
    """Compare BA of the answer with the weighted sum of scaling·BA, for ranks that differ and weights below zero."""
    import torch

    for seed, (ranks, scalings, weights) in enumerate((
        ((3, 3), (1.0, 1.0), (1.0, 1.0)), ((3, 2), (2.0, 3.0), (0.5, 1.5)), ((2, 4), (0.5, 3.0), (0.7, 0.2)),
        ((2, 2), (2.0, 1.5), (1.0, -0.6)), ((1, 2, 3), (2.0, 1.0, 0.5), (0.2, 0.3, 0.5)), ((3,), (2.0,), (-1.5,)), ((2, 1), (2.0, 4.0), (0.0, 1.0)),
    )):  # fmt: skip
        adapters = join_example(ranks, scalings, seed)
        given = [(A.clone(), B.clone(), scaling) for A, B, scaling in adapters]
        found = call_learner(function, list(given), list(weights))
        if any(
            not torch.equal(mine[i], theirs[i]) for mine, theirs in zip(adapters, given, strict=True) for i in (0, 1)
        ):
            raise TryAgain(
                "An A or B that you were given has changed. Multiply without an underscore, and not with *=."
            )
        parts = expect_list(found, "the answer")
        if len(parts) != 2:
            raise TryAgain(f"A and B are expected, and you returned {describe(found)}.")
        A, B = (expect_plain_tensor(matrix, name) for matrix, name in zip(parts, "AB"))
        for matrix, name in ((A, "A"), (B, "B")):
            if matrix.dim() != 2:
                raise TryAgain(f"{name} should be a matrix, and has the shape {tuple(matrix.shape)}.")
        rank, outputs, inputs = sum(ranks), adapters[0][1].shape[0], adapters[0][0].shape[1]
        products = [w * s * (b @ a) for (a, b, s), w in zip(adapters, weights, strict=True)]
        U, S, V = torch.linalg.svd(sum(products), full_matrices=False)
        has = A.shape[0]
        nearest = (U[:, :has] * S[:has]) @ V[:has]  # of all matrices of this rank
        if tuple(A.shape) == (rank, inputs) and tuple(B.shape) == (outputs, rank):
            if {A.dtype, B.dtype} != {torch.float64}:
                raise TryAgain(
                    f"A is {str(A.dtype)[6:]} and B {str(B.dtype)[6:]}; those that you were given are float64. Keep their dtype."
                )
            _check_joined(B @ A, products, adapters, weights)
        elif tuple(A.shape) == (outputs, rank) and tuple(B.shape) == (rank, inputs):
            raise TryAgain("A and B have changed places: return A first.")
        elif (
            A.shape[1] == inputs
            and B.shape == (outputs, has)
            and torch.allclose(B.double() @ A.double(), nearest, atol=1e-5)
        ):
            what = "the sum" if S[has:].sum() < 1e-9 else "only the nearest to the sum"
            raise TryAgain(f"BA is {what}, at rank {has}. Rank {rank} is asked for, since the ranks add up. No decomposition is needed: "
                           "stack A and B.")  # fmt: skip
        elif (A.shape, B.shape) == (adapters[0][0].shape, adapters[0][1].shape):
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
        raise TryAgain(
            "The scaling is missing. The new adapter has scaling 1, so each part brings its own: weight · scaling."
        )
    if agrees(sum(s * p for (_, _, s), p in zip(adapters, plain, strict=True))):
        raise TryAgain("The weights are missing.")
    if agrees(sum(w * s * p for w, (_, _, s), p in zip(weights, adapters, products, strict=True))):
        raise TryAgain(
            "Weight and scaling were multiplied into A and into B, so they count twice. Take one of the two."
        )
    if agrees(sum(w * p for w, p in zip(weights, products, strict=True))):
        raise TryAgain("The weight counts twice: it was multiplied into A and into B. Take one of the two.")
    if agrees(sum(s * p for (_, _, s), p in zip(adapters, products, strict=True))):
        raise TryAgain("The scaling counts twice: it was multiplied into A and into B. Take one of the two.")
    if agrees(sum(abs(w) * s * p for (_, _, s), p, w in zip(adapters, plain, weights, strict=True))):
        raise TryAgain("A weight is below zero here, and its sign was lost.")
    raise TryAgain(
        "The shapes are right, and BA is not the sum of weight · scaling · BA. Are A and B stacked in the same order?"
    )


def join_example(ranks, scalings, seed):
    """[(A (rank, 9), B (7, rank), scaling)] in float64."""
    import torch

    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(seed)}
    return [
        (torch.randn(rank, 9, **options), torch.randn(7, rank, **options), scaling)
        for rank, scaling in zip(ranks, scalings, strict=True)
    ]


@exercise("07.times", title="How often was it merged?", level="stretch", minutes=15)
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
        coarse = (f"Here the change is {pooled:.6g} times in the weights, and you find {found:.6g}. That is rounded. Return the number as it "
                  "is, and compute in the dtype that you are given: bfloat16 holds two or three digits only.")  # fmt: skip
        if near and _has_few_digits(found, getattr(answer, "dtype", None)):
            raise TryAgain(coarse)
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
