"""Checks of lesson 5: start as OLoRA does, start with a product of zero, read steps off a curve, convert to plain LoRA."""

import math

from course_utils.exercises import TryAgain, call_learner, describe, exercise, expect_number, expect_tensor, expect_type


def _parts(value, number, names):
    """The learner's result as a tuple of `number` parts."""
    expect_type(value, (tuple, list), "the result")
    if len(value) != number:
        raise TryAgain(f"{number} things are to be returned, {names}; this is {describe(value)}.")
    return tuple(value)


@exercise("05.olora", title="Start as OLoRA does", level="core", minutes=15)
def olora(function):
    """Compare with PEFT's own start on wide and tall weights, in float64; signs of directions are the learner's own choice."""
    import torch

    for seed, (outputs, inputs, rank, alpha) in enumerate(((12, 12, 3, 3), (20, 8, 2, 6), (9, 15, 4, 2))):
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        given = weight.clone()
        returned = _parts(call_learner(function, given, rank, alpha), 3, "A, B and the new weight")
        shapes = {"A": (rank, inputs), "B": (outputs, rank), "the new weight": (outputs, inputs)}
        A, B, left = (expect_tensor(part, shape, name).double() for part, (name, shape) in zip(returned, shapes.items()))
        if not torch.equal(given, weight):
            raise TryAgain("The weight that you were given has changed. Return a new one: weight - ..., not weight -= ...")
        if not torch.allclose(B.T @ B, torch.eye(rank, dtype=torch.float64), atol=1e-8):
            raise TryAgain("B's columns should be orthonormal, BᵀB = I. Take them from Q of torch.linalg.qr(weight).")
        scaling, product = alpha / rank, B @ A
        if torch.allclose(left, weight, atol=1e-8):
            raise TryAgain("The weight is as it was, so the layer's output would change at step 0. Take s·BA out of it.")
        if torch.allclose(left, weight + scaling * product, atol=1e-8):
            raise TryAgain("The sign is wrong: the adapter adds s·BA, so it is to be taken out of the weight.")
        if scaling != 1 and torch.allclose(left, weight - product, atol=1e-8):
            raise TryAgain("The adapter adds s·BA with s = alpha / rank. Take that out of the weight, not BA alone.")
        if not torch.allclose(left + scaling * product, weight, atol=1e-8):
            raise TryAgain("The new weight and s·BA, with s = alpha / rank, don't add up to the weight that was given.")
        if not torch.allclose(product, _first_directions(weight, rank), atol=1e-8):
            raise TryAgain("It adds up, but A and B aren't the first r directions of one QR decomposition: B = Q[:, :r], A = R[:r].")


def _first_directions(weight, rank):
    """Q[:, :r] R[:r] as PEFT's start has it; float64 tells that no rounding is taken for a mistake."""
    import torch
    from peft import LoraConfig, get_peft_model

    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    layer[0].weight.data = weight.float().clone()
    model = get_peft_model(layer, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights="olora"))
    started = model.base_model.model[0]
    by_peft = started.lora_B["default"].weight.detach() @ started.lora_A["default"].weight.detach()
    Q, R = torch.linalg.qr(weight)
    exact = Q[:, :rank] @ R[:rank]
    if not torch.allclose(exact.float(), by_peft, atol=1e-4):
        raise RuntimeError("PEFT's start is another one in this version.")
    return exact


@exercise("05.quiet", title="A start that says nothing", level="stretch", minutes=20)
def quiet(function):
    """B·A must be 0 with neither of them 0, each with as many directions as it can have, and anew with each seed."""
    import torch

    for inputs, outputs, rank in ((10, 14, 4), (9, 6, 2), (20, 20, 6)):
        torch.manual_seed(rank)
        first = _factors(function, inputs, outputs, rank)
        second = _factors(function, inputs, outputs, rank)
        A, B = first
        for name, matrix in (("A", A), ("B", B)):
            if not matrix.any():
                raise TryAgain(f"{name} is zero. Both are to be something, and only their product nothing.")
        largest = float((B @ A).abs().max())
        if largest > 1e-5 * float(B.norm() * A.norm()):
            raise TryAgain(f"BA is not zero: its largest entry is {largest:.2g}. What A writes into the r numbers between the two, "
                           "B must not read.")
        half = rank // 2
        for name, matrix in (("A", A), ("B", B)):
            found = int(torch.linalg.matrix_rank(matrix, rtol=1e-5))
            if found != half:
                raise TryAgain(f"{name} has {found} directions here. With r = {rank}, give each of the two half of them, {half}.")
        if (A == 0).all(1).any() or (B == 0).all(0).any():
            raise TryAgain("Whole rows of A or columns of B are zero, so some of the r numbers between them begin unused. Turn "
                           "them: a random orthogonal matrix (rank, rank), half of its rows for A, the others for B.")
        if all(torch.equal(*pair) for pair in zip(first, second)):
            raise TryAgain("Two calls give the same matrices. Draw them at random, or all layers of a shape begin alike.")


def _factors(function, inputs, outputs, rank):
    A, B = _parts(call_learner(function, inputs, outputs, rank), 2, "A and B")
    return expect_tensor(A, (rank, inputs), "A").double(), expect_tensor(B, (outputs, rank), "B").double()


@exercise("05.reach", title="When was the loss down?", level="warm-up", minutes=5)
def reach(function):
    """Curves that end below, that never come down, that go down and up again, and whose steps are out of order."""
    curves = (
        ({5: 4.0, 10: 2.0, 15: 0.9, 20: 0.4}, 1.0, 15), ({5: 4.0, 10: 2.0}, 2.0, 10), ({5: 4.0, 10: 3.0}, 1.0, None),
        ({5: 3.0, 10: 0.8, 15: 1.4, 20: 0.7, 25: 0.2}, 1.0, 10), ({20: 0.4, 5: 4.0, 15: 0.9, 10: 2.0}, 1.0, 15),
        ({5: 4.0, 10: math.nan, 15: 0.5}, 1.0, 15),
    )
    for curve, level, right in curves:
        found = call_learner(function, dict(curve), level)
        case = f"For {curve} and the level {level:g}"
        if right is None:
            if found is not None:
                raise TryAgain(f"{case}, return None: it is never reached. This gave {describe(found)}.")
            continue
        if found is None:
            raise TryAgain(f"{case}, None came back, and the level is reached. \"Reached\" means at or below it; is a return missing?")
        number = expect_number(found, "the step")
        if number == right:
            continue
        if number in curve.values() and number not in curve:
            raise TryAgain(f"{case}, this is a loss, {number:g}. Return the step.")
        if number == next((step for step, loss in curve.items() if loss <= level), None):
            raise TryAgain(f"{case}, you took the entries in the order of the dict. Go through the steps in ascending order.")
        if number == min(curve, key=curve.get):
            raise TryAgain(f"{case}, you found the lowest loss. Return the first step at or below the level.")
        raise TryAgain(f"{case}, {number:g} came back. Return the first step whose loss is at or below the level.")


@exercise("05.convert", title="Convert to plain LoRA by hand", level="core", minutes=15)
def convert(function):
    """s2·B2·A2 must be s·(B·A − B0·A0), of rank 2r, with s2 = alpha2 / 2r."""
    import torch

    for seed, (outputs, inputs, rank, alpha) in enumerate(((7, 9, 2, 4), (12, 5, 3, 3), (6, 6, 2, 7))):
        generator = torch.Generator().manual_seed(seed)
        A0, A = (torch.randn(rank, inputs, generator=generator, dtype=torch.float64) for _ in range(2))
        B0, B = (torch.randn(outputs, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        given = [matrix.clone() for matrix in (A0, B0, A, B)]
        returned = _parts(call_learner(function, *given, alpha), 3, "the new A, the new B and the new alpha")
        if any(not torch.equal(*pair) for pair in zip(given, (A0, B0, A, B))):
            raise TryAgain("One of the matrices that you were given has changed. Make new ones with torch.cat.")
        if isinstance(returned[0], torch.Tensor) and tuple(returned[0].shape) == (rank, inputs):
            raise TryAgain("The new A has rank r still. A difference of two products of rank r needs 2r: lay A over A0, with torch.cat.")
        new_A = expect_tensor(returned[0], (2 * rank, inputs), "the new A").double()
        new_B = expect_tensor(returned[1], (outputs, 2 * rank), "the new B").double()
        new_alpha = expect_number(returned[2], "the new alpha")
        wanted, product = alpha / rank * (B @ A - B0 @ A0), new_B @ new_A
        if torch.allclose(new_alpha / (2 * rank) * product, wanted, atol=1e-8):
            continue
        if torch.allclose(product, B @ A + B0 @ A0, atol=1e-8):
            raise TryAgain("The products are added. The start was taken out of the base, so take it out of the adapter: turn one sign.")
        if torch.allclose(product, B0 @ A0 - B @ A, atol=1e-8):
            raise TryAgain("The signs are the wrong way round: what was learned counts plus, the start minus.")
        if torch.allclose(product, B @ A - B0 @ A0, atol=1e-8) or torch.allclose(product, 2 * (B @ A - B0 @ A0), atol=1e-8):
            raise TryAgain(f"The product is right, the scaling is not: the new rank is {2 * rank}, and alpha / rank has to stay "
                           f"{alpha / rank:g}.")
        if torch.allclose(product, (B - B0) @ (A - A0), atol=1e-8):
            raise TryAgain("This is the product of the differences. The difference of the products is wanted, BA − B0A0.")
        raise TryAgain("s·BA of the new adapter is not s·(BA − B0A0). Write the product of two matrices laid side by side: "
                       "[B, B0] times [A over A0] is BA + B0A0.")
