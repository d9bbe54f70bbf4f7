"""Checks of the deep dive on rounding."""

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    using,
)


@exercise("deep.tolerance", title="Write the tolerance", level="core", minutes=15)
def tolerance(function):
    """Compare with 2·(inputs + r + 4)·u·(|x||W|ᵀ + |s|·|x||A|ᵀ|B|ᵀ), for several shapes, signs and dtypes."""
    import torch

    for seed, (inputs, outputs, rank, s, dtype) in enumerate(
        ((12, 5, 2, 2.0, torch.float32), (7, 9, 3, 0.5, torch.float16), (20, 4, 1, -1.5, torch.bfloat16))
    ):
        x, W, A, B = given = tolerance_example(inputs, outputs, rank, seed)
        copies = [matrix.clone() for matrix in given]
        found = expect_tensor(call_learner(function, *copies, s, dtype), (len(x), outputs), "the tolerance").double()
        if any(not torch.equal(mine, theirs) for mine, theirs in zip(given, copies, strict=True)):
            raise TryAgain("A matrix that you were given has changed. Take .abs(), without an underscore.")
        u = torch.finfo(dtype).eps / 2

        def bound(roundings=inputs + rank + 4, of_W=W.abs(), of_change=None, size=None, x=x, A=A, B=B, s=s, u=u):
            of_change = abs(s) * B.abs() @ A.abs() if of_change is None else of_change
            return 2 * roundings * u * (x.abs() @ (of_W + of_change).T if size is None else size)

        right = bound()
        if torch.allclose(found, right, rtol=1e-4, atol=0):
            continue
        zero = torch.zeros_like(W)
        mistakes = [
            (2 * right, "That is twice as much. The step above 1, eps, is twice u: a rounding is off by at most half a step."),
            (right / 2, "That is half as much. Both ways may be off, so the formula begins with 2."),
            (bound(size=x.abs() @ (W + s * B @ A).abs().T),
             "Products cancel in W + s·BA, but their roundings don't. Take |W| and |s|·|B||A| by themselves, then add."),
            (bound(size=(x @ (W + s * B @ A).T).abs()),
             "That is the size of the result. Terms of opposite signs cancel in it, and their roundings don't: absolute values first."),
            (bound(of_change=s * B.abs() @ A.abs()), "s is below zero here. Take its absolute value, too."),
            (bound(of_change=B.abs() @ A.abs()), "The scaling is missing: s·|B||A||x|."),
            (bound(of_change=zero), "The change is missing: s·|B||A||x|."),
            (bound(of_W=zero), "The weight's own part is missing: |W||x|."),
            (bound(of_change=abs(s) * (B @ A).abs()), "Products cancel in BA, but their roundings don't: |B||A|, not |BA|."),
            *((bound(roundings), "The number of roundings is inputs + r + 4. inputs is W.shape[1], and r is A.shape[0].")
              for roundings in (outputs + rank + 4, inputs + 4, inputs + rank, inputs + inputs + 4, rank + 4, inputs)),
            *((bound(u=torch.finfo(other).eps / 2), f"The dtype is {str(dtype)[6:]} here. Take u of the dtype that you are given.")
              for other in (torch.float64, torch.float32, torch.float16, torch.bfloat16) if other != dtype),
        ]  # fmt: skip
        for wrong, hint in mistakes:
            if torch.allclose(found, wrong, rtol=1e-4, atol=0):
                raise TryAgain(hint)
        small = (
            " It is too small in places: take absolute values of every matrix first."
            if (found < 0.999 * right).any()
            else ""
        )
        raise TryAgain(f"The first entry is {right[0, 0]:.3g} here, and yours is {found[0, 0]:.3g}.{small}")


def tolerance_example(inputs, outputs, rank, seed):
    """x (3, inputs), W (outputs, inputs), A (rank, inputs) and B (outputs, rank) in float64."""
    import torch

    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(seed)}
    return [
        torch.randn(*shape, **options) for shape in ((3, inputs), (outputs, inputs), (rank, inputs), (outputs, rank))
    ]


@exercise("deep.agreement", title="Measure agreement", level="core", minutes=10)
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
