"""The deep dive on rounding: its checks, and what it says of libraries."""

import math
import re

import numpy
import pytest
import torch

from course_utils.exercises import deep_rounding


def right_tolerance(x, W, A, B, s, dtype):
    size = x.abs() @ (W.abs() + abs(s) * B.abs() @ A.abs()).T
    return 2 * (W.shape[1] + A.shape[0] + 4) * torch.finfo(dtype).eps / 2 * size


def right_agreement(reference, candidate):
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    return (p.argmax(-1) == q.argmax(-1)).double().mean(), (p.exp() * (p - q)).sum(-1).mean()


def log_of_softmax(log, clean=lambda terms: terms):
    def agreement(reference, candidate):
        p, q = reference.softmax(-1), candidate.softmax(-1)
        return right_agreement(reference, candidate)[0], clean(p * (log(p) - log(q))).sum(-1).mean()

    return agreement


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


def all_terms(reference, candidate):  # top-1 agreement, log p, log q
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    return right_agreement(reference, candidate)[0], p, q


def mean_of_all(top_1, p, q):
    return top_1, torch.nn.functional.kl_div(q, p, log_target=True)


# Rounding: other right answers, and typical mistakes


def tolerance_in_steps(x, W, A, B, s, dtype):
    base = torch.nn.functional.linear(x.abs(), W.abs())
    change = (x.abs() @ A.abs().T) @ B.abs().T * abs(s)
    return (x.size(-1) + B.size(-1) + 4) * torch.finfo(dtype).eps * (base + change)


def tolerance_with_numpy(x, W, A, B, s, dtype):
    x, W, A, B = (numpy.abs(matrix.numpy()) for matrix in (x, W, A, B))
    u = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    return 2 * (len(W[0]) + len(A) + 4) * u * (x @ (W + abs(s) * B @ A).T)


def tolerance_by_einsum(x, W, A, B, s, dtype):
    change = torch.einsum("ni,ri,or->no", x.abs(), A.abs(), B.abs())
    size = torch.einsum("ni,oi->no", x.abs(), W.abs()) + math.fabs(s) * change
    return (2 * (W.shape[1] + len(A) + 4) * torch.finfo(dtype).eps / 2 * size).float()


def with_size(size, roundings=lambda W, A: W.shape[1] + A.shape[0] + 4, steps=0.5):
    """A tolerance with one thing of its own."""

    def tolerance(x, W, A, B, s, dtype):
        return 2 * roundings(W, A) * steps * torch.finfo(dtype).eps * size(x, W, A, B, s)

    return tolerance


def right_size(x, W, A, B, s):
    return x.abs() @ (W.abs() + abs(s) * B.abs() @ A.abs()).T


def in_place(x, W, A, B, s, dtype):
    return right_tolerance(x.abs_(), W.abs_(), A, B, s, dtype)


RIGHT = {
    "deep.tolerance": [tolerance_in_steps, tolerance_with_numpy, tolerance_by_einsum],
    "deep.agreement": [
        agreement_by_distributions,
        agreement_by_kl_div,
        agreement_with_numpy,
        agreement_by_cross_entropy,
    ],
}
SOLUTIONS = {"deep.tolerance": right_tolerance, "deep.agreement": right_agreement}


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (deep_rounding.agreement, log_of_softmax(lambda p: p.clamp(1e-30).log()), "Use log_softmax"),
        (deep_rounding.agreement, lambda r, c: (right_agreement(r.T, c.T)[0], 0), "compares columns"),
        (deep_rounding.agreement, lambda r, c: (len(r) * right_agreement(r, c)[0], 0), "number of positions"),
        (
            deep_rounding.agreement,
            lambda r, c: (r.argmax() == c.argmax(), 0.0),
            "of type|should be a number|one place of the whole",
        ),
        (deep_rounding.agreement, lambda r, c: (0.123, 0), "you return 0.12"),
        (
            deep_rounding.agreement,
            lambda r, c: (right_agreement(r, c)[0], len(r) * right_agreement(r, c)[1]),
            "sum over positions",
        ),
        (deep_rounding.agreement, lambda r, c: mean_of_all(*all_terms(r, c)), "size of the vocabulary"),
        (
            deep_rounding.agreement,
            lambda r, c: (right_agreement(r, c)[0], right_agreement(c, r)[1]),
            "The reference stands first",
        ),
        (deep_rounding.agreement, lambda r, c: (right_agreement(r, c)[0], -right_agreement(r, c)[1]), "sign is turned"),
        (
            deep_rounding.agreement,
            lambda r, c: (right_agreement(r, c)[0], right_agreement(r, c)[1] / math.log(2)),
            "in bits",
        ),
        (
            deep_rounding.agreement,
            lambda r, c: (right_agreement(r, c)[0], (r.softmax(-1) * (r - c)).sum(-1).mean()),
            "no log-probabilities",
        ),
        (deep_rounding.agreement, lambda r, c: (right_agreement(r, c)[0], 7.0), "KL is not right"),
        (deep_rounding.agreement, lambda r, c: (right_agreement(r, c)[0], float("nan")), "is nan"),
        (deep_rounding.agreement, lambda r, c: right_agreement(r, c)[0], "of type tuple or list"),
        (deep_rounding.agreement, lambda r, c: (1, 2, 3), "you returned 3"),
        (deep_rounding.agreement, log_of_softmax(torch.log), "Use log_softmax"),
        (deep_rounding.agreement, log_of_softmax(lambda p: (p + 1e-9).log()), "Use log_softmax"),
        (deep_rounding.agreement, log_of_softmax(lambda p: p.clamp(1e-12).log()), "Use log_softmax"),
        (deep_rounding.agreement, log_of_softmax(torch.log, torch.nan_to_num), "Use log_softmax"),
        (
            deep_rounding.agreement,
            log_of_softmax(torch.log, lambda terms: terms.nan_to_num(0, 0, 0)),
            "Use log_softmax",
        ),
        (deep_rounding.tolerance, with_size(right_size, steps=1), "eps, is twice u"),
        (deep_rounding.tolerance, with_size(right_size, steps=0.25), "begins with 2"),
        (deep_rounding.tolerance, with_size(lambda x, W, A, B, s: x.abs() @ (W + s * B @ A).abs().T), "cancel in W"),
        (deep_rounding.tolerance, with_size(lambda x, W, A, B, s: (x @ (W + s * B @ A).T).abs()), "size of the result"),
        (
            deep_rounding.tolerance,
            with_size(lambda x, W, A, B, s: x.abs() @ (W.abs() + s * B.abs() @ A.abs()).T),
            "below zero",
        ),
        (
            deep_rounding.tolerance,
            with_size(lambda x, W, A, B, s: x.abs() @ (W.abs() + B.abs() @ A.abs()).T),
            "scaling is missing",
        ),
        (deep_rounding.tolerance, with_size(lambda x, W, A, B, s: x.abs() @ W.abs().T), "change is missing"),
        (
            deep_rounding.tolerance,
            with_size(lambda x, W, A, B, s: x.abs() @ (abs(s) * B.abs() @ A.abs()).T),
            "own part is missing",
        ),
        (
            deep_rounding.tolerance,
            with_size(lambda x, W, A, B, s: x.abs() @ (W.abs() + abs(s) * (B @ A).abs()).T),
            "not ",
        ),
        (
            deep_rounding.tolerance,
            with_size(lambda x, W, A, B, s: x @ (W.abs() + abs(s) * B.abs() @ A.abs()).T),
            "absolute values of every",
        ),
        (
            deep_rounding.tolerance,
            with_size(right_size, roundings=lambda W, A: len(W) + len(A) + 4),
            "inputs is W.shape",
        ),
        (deep_rounding.tolerance, with_size(right_size, roundings=lambda W, A: W.shape[1] + 4), "inputs \\+ r \\+ 4"),
        (
            deep_rounding.tolerance,
            lambda x, W, A, B, s, dtype: right_tolerance(x, W, A, B, s, torch.float32),
            "dtype is float16 here",
        ),
        (
            deep_rounding.tolerance,
            lambda x, W, A, B, s, dtype: right_tolerance(x, W, A, B, s, dtype).max(),
            "has shape",
        ),
        (deep_rounding.tolerance, in_place, "has changed"),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint
