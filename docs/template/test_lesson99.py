"""Lesson 99's checks: the stub, the solution, and typical wrong answers, each with its own hint."""

from fractions import Fraction

import pytest

from course_utils.exercises import lesson99


def right_share(inputs, outputs, rank):
    return rank * (inputs + outputs) / (inputs * outputs)


def test_the_stub_is_to_do():
    assert lesson99.share.outcome(lambda inputs, outputs, rank: ...).status == "TODO"


def test_the_solution_passes():
    assert lesson99.share.outcome(right_share).passed


RIGHT = {
    "99.share": [
        lambda inputs, outputs, rank: rank / inputs + rank / outputs,
        lambda inputs, outputs, rank: (rank * inputs + outputs * rank) / (inputs * outputs),
        lambda inputs, outputs, rank: Fraction(rank * (inputs + outputs), inputs * outputs),
    ]
}


@pytest.mark.parametrize("right", RIGHT["99.share"])
def test_other_right_answers_pass(right):
    assert lesson99.share.outcome(right).passed


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda inputs, outputs, rank: rank * (inputs + outputs), "the count"),
        (lambda inputs, outputs, rank: rank, "add up"),
        (lambda inputs, outputs, rank: (inputs + outputs) / (inputs * outputs), "rank 1"),
        (lambda inputs, outputs, rank: print(end=""), "Is a return missing?"),
        (lambda inputs, outputs, rank: 1 / 0, "ZeroDivisionError"),
        (3, "A function is expected"),
    ],
)
def test_a_wrong_answer_gets_its_own_hint(wrong, hint):
    outcome = lesson99.share.outcome(wrong)
    assert outcome.status == "TRY AGAIN" and hint in outcome.hint
