"""Checks of lesson 8: stack two adapters, combine without surprises, choose the weights."""

from course_utils.exercises import (
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_list,
    expect_number,
    expect_plain_tensor,
    using,
)


@exercise("08.join", title="Stack adapters", level="core", minutes=10)
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
        if min(weights) < 0 and any(torch.is_tensor(matrix) and matrix.is_complex() for matrix in parts):
            raise TryAgain(
                "A weight is below zero here, and its root is complex. Multiply one of A and B by the whole weight."
            )
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


@exercise("08.combine", title="Combine without surprises", level="core", minutes=15)
def combine(function):
    """Is the new adapter the weighted sum, and active, also where the name exists or rsLoRA is used; and is all else as it was?"""
    import torch

    cases = [
        ({}, "free", "one", [0.5, -0.25], ""),
        ({}, "taken", "one", [1.0, 2.0], " Here an adapter of this name exists already: then add_weighted_adapter does nothing. Delete it first."),
        ({}, "taken", "mix", [0.3, 0.7], " Here an adapter of this name exists already, and is active. Delete it first."),
        ({"use_rslora": True}, "free", "two", [1.0, 0.5], " Here the adapters use rsLoRA. The scaling of the new adapter has to be 1 in each layer."),
    ]  # fmt: skip
    for seed, (settings, name_is, active, weights, hint) in enumerate(cases):
        model = combine_example(seed, taken=name_is == "taken", **settings)
        model.set_adapter(active)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mix." not in name}
        wanted = [
            sum(weight * layer.get_delta_weight(part) for part, weight in zip(("one", "two"), weights, strict=True))
            for layer in _lora_layers(model)
        ]
        call_learner(function, model, ["one", "two"], list(weights), "mix")
        with using("the model after your function"):
            after, layers = model.state_dict(), _lora_layers(model)
            if len(layers) != len(wanted) or not {"one", "two"} <= set(model.peft_config):
                raise TryAgain(
                    "An adapter is gone that was there before, or the layers are. Delete no adapter but an old one of the new name."
                )
            if any(name not in after or not torch.equal(after[name], tensor) for name, tensor in before.items()):
                raise TryAgain(
                    "The base or one of the two adapters has changed. Make a new adapter, and leave these as they are."
                )
            if "mix" not in model.peft_config:
                raise TryAgain(
                    "There is no adapter of the new name. Call model.add_weighted_adapter(names, weights, name, ...)."
                )
            found = [layer.get_delta_weight("mix") for layer in layers]
            off = [(one - other).norm() / other.norm() for one, other in zip(found, wanted, strict=True)]
            if max(off) > 1e-4:
                half = " Only some layers are right: go through all of them." if min(off) <= 1e-4 else ""
                kind = "" if hint else " combination_type='cat' gives it."
                raise TryAgain(
                    f"The new adapter is not the weighted sum: it is off by {max(off):.0%}.{half}{hint or kind}"
                )
            if model.active_adapters != ["mix"]:
                raise TryAgain(
                    f"Active is {', '.join(model.active_adapters)}, and not the new adapter. Set it at the end."
                )


def _lora_layers(model):
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def combine_example(seed, taken=False, **settings):
    """A tiny random model with the adapters `one` and `two`, of rank 3 and alpha 6 and 9, and if `taken` also `mix`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = None
        for name, alpha in (("one", 6), ("two", 9), ("mix", 3))[: 3 if taken else 2]:
            config = LoraConfig(r=3, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], **settings)
            if model is None:
                base = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@exercise("08.choose", title="Choose the weights", level="warm-up", minutes=10)
def choose(function):
    """Compare with the weight whose weaker skill is best, None if that is below `least`; of equal ones that of the better mean."""
    cases = [
        ({0.2: (0.9, 0.1), 0.5: (0.7, 0.6), 0.8: (0.2, 0.95)}, 0.5, 0.5, "The weaker skill is best at 0.5 here: take the smaller of the two scores at "
                                                                         "each weight, then the largest of those."),
        ({0.1: (1.0, 0.55), 0.6: (0.6, 0.6)}, 0.5, 0.6, "At 0.1 the mean is better here, but at 0.6 the weaker skill is. The weaker one decides."),
        ({0.1: (1.0, 0.1), 0.9: (0.2, 1.0)}, 0.5, None, "No weight keeps both skills at 0.5 here. Return None."),
        ({0.4: (0.7, 0.9)}, 0.7, 0.4, "The weaker skill is exactly `least` here, which is enough."),
        ({0.7: (0.8, 0.9), 0.3: (0.8, 0.8)}, 0.5, 0.7, "The weaker skill is equal at both weights here. The better one for the other skill wins."),
        ({0.3: (0.8, 0.8), 0.7: (0.9, 0.8)}, 0.5, 0.7, "The weaker skill is equal at both weights here. The better one for the other skill wins."),
        ({0.0: (1.0, 0.95), 0.5: (0.9, 0.9)}, 0.9, 0.0, "The best weight is 0.0 here, and 0.0 counts as false in Python. Compare with None."),
        ({}, 0.5, None, "There is no weight at all here: return None. max() of nothing raises an error, unless it has a default."),
        ({0.9: (0.3, 0.4), 0.1: (0.2, 0.45)}, 0.25, 0.9, "`least` is 0.25 here. Compare with the number that you are given."),
    ]  # fmt: skip
    for scores, least, right, hint in cases:
        given = dict(scores)
        found = call_learner(function, given, least)
        if given != scores:
            raise TryAgain("The dict that you were given has changed. Read it, and leave it as it is.")
        if right is None:
            if found is not None:
                raise TryAgain(f"{hint} You return {describe(found)}.")
        elif found is None:
            raise TryAgain(f"{hint} You return None.")
        elif abs(expect_number(found, "the weight") - right) > 1e-9:
            raise TryAgain(f"{hint} You return {float(found):g}.")
