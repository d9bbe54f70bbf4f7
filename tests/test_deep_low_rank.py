"""The check of the deep dive on low rank: each typical mistake gets its own hint."""

import re

import numpy
import pytest
import torch

from course_utils.exercises import deep_low_rank
from tools import build


def right_truncate(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def truncate_from_eigenvectors(matrix, rank):
    kept = torch.linalg.eigh(matrix.T @ matrix)[1][:, -rank:]
    return matrix @ kept @ kept.T


def truncate_a_direction_at_a_time(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix)
    return sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank))


def truncate_with_numpy(matrix, rank):
    U, S, Vh = numpy.linalg.svd(matrix.numpy(), full_matrices=False)
    S[rank:] = 0
    return U @ numpy.diag(S) @ Vh


def only_first_rows(matrix, rank):
    kept = torch.zeros_like(matrix)
    kept[:rank] = matrix[:rank]
    return kept


def closest_by_size(matrix, below):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U * S * (S > below) @ Vh


def by_division(matrix, rank):
    """U from M V / S, which is 0 / 0 where there is nothing to keep."""
    squares, V = torch.linalg.eigh(matrix.T @ matrix)
    sizes, V = squares[-rank:].clamp(min=0).sqrt(), V[:, -rank:]
    return (matrix @ V / sizes.round(decimals=6)) * sizes @ V.T


def in_place(matrix, rank):
    return matrix.copy_(right_truncate(matrix, rank))


def turned(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:, :rank].T


def smallest(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, -rank:] * S[-rank:] @ Vh[-rank:]


SOLUTIONS = {"deep.truncate": right_truncate}
RIGHT = {"deep.truncate": [truncate_from_eigenvectors, truncate_a_direction_at_a_time, truncate_with_numpy]}


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda matrix, rank: matrix.clone(), "whole matrix again"),
        (
            lambda matrix, rank: right_truncate(matrix.float(), rank),
            "is in float32, and what you were given in float64",
        ),
        (lambda matrix, rank: right_truncate(matrix, rank + 1), "was asked for"),
        (lambda matrix, rank: right_truncate(matrix, rank - 1), "only, and 3"),
        (
            lambda matrix, rank: torch.linalg.svd(matrix)[0][:, :rank] @ torch.linalg.svd(matrix)[2][:rank],
            "sizes are missing",
        ),
        (smallest, "descending order"),
        (turned, "transposed already"),
        (only_first_rows, "there is a closer matrix"),
        (in_place, "has changed"),
        (lambda matrix, rank: torch.linalg.svd(matrix)[1][:rank], "has shape"),
        (lambda matrix, rank: matrix * float("nan"), "NaN"),
        (
            lambda matrix, rank: closest_by_size(matrix, torch.linalg.svdvals(matrix)[rank]),
            "stopped with IndexError",
        ),
        (by_division, "NaN|rank is right"),
        (lambda matrix, rank: right_truncate(matrix.double(), rank), "is in float64"),
    ],
)
def test_a_wrong_cut_gets_its_own_hint(wrong, hint):
    outcome = deep_low_rank.truncate.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


@pytest.mark.parametrize("right", [right_truncate, *RIGHT["deep.truncate"]])
def test_the_lesson_can_use_whatever_its_check_passes(right):
    source = (build.ROOT / "lessons" / "deep_low_rank.py").read_text(encoding="utf-8")
    line = re.search(r"cut_model\.get_submodule\(name\)\.weight \+= .*", source).group()
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    before, change = model[0].weight.detach().clone(), torch.randn(4, 6)
    with torch.no_grad():
        exec(line, {"cut_model": model, "name": "0", "change": change, "cut": right, "r": 2, "torch": torch})
    assert torch.allclose(model[0].weight, before + right_truncate(change, 2), atol=1e-5)
