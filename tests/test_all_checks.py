"""What holds of the checks of all lessons: whatever an answer returns or leaves behind, the learner gets a sentence about it,
and when a library fails in the check itself, a sentence about that."""

import functools
import importlib
import math
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy
import pytest
import torch

from course_utils import paths
from course_utils.exercises import Outcome, all_exercises, deep_low_rank, lesson03, lesson05

# A file of tests for each lesson that has exercises: SOLUTIONS has a right answer to each by its name, RIGHT others.
LESSONS = [
    importlib.import_module(path.stem)
    for pattern in ("test_lesson??.py", "test_deep_*.py")
    for path in sorted(Path(__file__).parent.glob(pattern))
]
SOLUTIONS = {name: solution for lesson in LESSONS for name, solution in lesson.SOLUTIONS.items()}
OTHERS = {
    name: answers for lesson in LESSONS for name, answers in lesson.RIGHT.items()
}  # right, and written differently
CHECKS = {check.name: check for check in all_exercises()}


class Hostile:
    """An object that refuses every look."""

    def __getattr__(self, name):
        raise RuntimeError("no")

    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


VALUES = (None, 0, -1, 1e30, 1j, 10**400, True, "text", b"", [], [1], (1, 2), (1, 2, 3), ("a", None), {}, {"a": 1}, {1}, range(2),
          object(), Hostile(), [Hostile()] * 2, (Hostile(),) * 3, [[1], [2]], [{}, {}], {"a": Hostile()}, int, len, iter("ab"),
          torch.zeros(()), torch.zeros(0), torch.ones(3), torch.ones(2, 2), (torch.ones(2, 2),) * 2, (torch.ones(1),) * 3,
          torch.ones(2, device="meta"), torch.tensor(1j), torch.nn.Linear(2, 2), numpy.ones(2), math.inf, -math.inf)  # fmt: skip


def each(change):
    """Change every tensor in a result, and every number."""

    def changed(result):
        if isinstance(result, dict):
            return {name: changed(part) for name, part in result.items()}
        if isinstance(result, (tuple, list)):
            return type(result)(changed(part) for part in result)
        if isinstance(result, torch.Tensor):
            return change(result)
        if isinstance(result, (int, float)) and not isinstance(result, bool):
            return change(torch.tensor(result))
        return Hostile() if isinstance(result, str) else result

    return changed


CHANGES = {
    "complex": each(lambda tensor: tensor + 0j),
    "whole": each(lambda tensor: tensor.int()),
    "bool": each(lambda tensor: tensor.bool()),
    "half": each(lambda tensor: tensor.half()),
    "sparse": each(lambda tensor: tensor.to_sparse()),
    "meta": each(lambda tensor: tensor.to("meta")),
    "gradient": each(lambda tensor: tensor.detach().clone().double().requires_grad_()),
    "NumPy": each(lambda tensor: tensor.detach().float().numpy()),
    "list": each(lambda tensor: tensor.tolist()),
    "turned": each(lambda tensor: tensor.T if tensor.dim() == 2 else tensor),
    "shorter": each(lambda tensor: tensor[:-1] if tensor.dim() else tensor),
    "deeper": each(lambda tensor: tensor[None]),
    "huge": each(lambda tensor: tensor * 1e30),
    "nothing": each(lambda tensor: tensor[..., :0]),
    "words": each(lambda tensor: str(tensor)),
    "hostile": each(lambda tensor: Hostile()),
    "twice": lambda result: (result, result),
    "half of it": lambda result: result[:1] if isinstance(result, (tuple, list)) else result,
}


def spoil(given):
    """Leave behind what was given in a state that nobody asked for."""
    for thing in given:
        if isinstance(thing, torch.nn.Module):
            for name, _ in list(thing.named_children()):
                delattr(thing, name)
        elif isinstance(thing, (dict, list)):
            thing.clear()
        elif isinstance(thing, torch.Tensor):
            thing.data = torch.zeros(1, dtype=torch.long)


@pytest.fixture(scope="module")
def judge():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.models_dir() / "base")
    return lambda name, answer: CHECKS[name].outcome(answer, **({"tokenizer": tokenizer} if name == "03.clean" else {}))


def test_no_exercise_is_forgotten():
    assert set(SOLUTIONS) == set(CHECKS), "each exercise has its solution in SOLUTIONS above"


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_to_do_and_the_solution_passes(name, judge):
    assert judge(name, lambda *given: ...).status == "TODO"
    assert judge(name, SOLUTIONS[name]) == Outcome(name, CHECKS[name].title, "PASS")


@pytest.mark.parametrize("name", SOLUTIONS)
def test_other_right_answers_pass(name, judge):
    assert len(OTHERS[name]) >= 3
    for answer in OTHERS[name]:
        outcome = judge(name, answer)
        assert outcome.passed, (answer, outcome)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_what_the_check_itself_goes_by_is_no_answer(name, judge):
    """Not as it is, and not in a function around it."""
    module = sys.modules[CHECKS[name].__module__]
    own = [thing for thing in vars(module).values() if getattr(thing, "__module__", "") == module.__name__]
    for thing in own:
        for answer in (thing, lambda *given, thing=thing: thing(*given)):
            assert judge(name, answer).status == "TRY AGAIN", thing


@pytest.mark.parametrize("name, solution", [
    ("deep.truncate", deep_low_rank.closest), ("03.labels", lesson03.expected_labels), ("03.rate", lesson03.chosen_rate),
    ("03.metric", lesson03.word_f1), ("05.quantise", lesson05.there_and_back),
])  # fmt: skip
def test_a_lesson_may_call_the_checks_own_solution_and_an_answer_may_not(name, solution, judge):
    arguments = []
    judge(name, lambda *given: arguments.append(given) or SOLUTIONS[name](*given))
    solution(*arguments[0][: 3 if name == "03.labels" else None])
    assert f"{solution.__name__} is the check's own solution" in judge(name, solution).hint
    solution(*arguments[0][: 3 if name == "03.labels" else None])  # still


def raises(*given):
    raise RuntimeError("boom")


@pytest.mark.parametrize("name", SOLUTIONS)
def test_what_is_none_of_the_things_expected_gets_a_sentence(name, judge):
    returned = (functools.partial(lambda value, *given: value, value) for value in VALUES)
    for answer in (None, 3, "text", Hostile(), raises, lambda: 1, *returned):
        outcome = judge(name, answer)
        assert outcome.status == "TRY AGAIN" and len(outcome.hint) > 20, outcome


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_right_result_in_another_guise_breaks_no_check(name, judge):
    for label, change in CHANGES.items():
        outcome = judge(name, lambda *given, change=change: change(SOLUTIONS[name](*given)))
        assert outcome.status in ("PASS", "TRY AGAIN"), (label, outcome)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_right_result_and_what_was_given_in_ruins(name, judge):
    def ruin(*given):
        result = SOLUTIONS[name](*given)
        spoil(given)
        return result

    def ruin_first(*given):
        spoil(given[:1])
        return 1

    for answer in (ruin, ruin_first):
        outcome = judge(name, answer)
        assert outcome.status in ("PASS", "TRY AGAIN"), outcome


@pytest.mark.parametrize("name, library", [
    ("04.targets", "adapter_checks.counting.adapted_layers"), ("deep.truncate", "torch.linalg.svd"), ("05.quantise", "torch.bucketize"),
    ("05.merge", "bitsandbytes.functional.dequantize_4bit"),
    ("06.olora", "peft.get_peft_model"), ("06.olora", "torch.linalg.qr"), ("08.join", "torch.linalg.svd"),
])  # fmt: skip
def test_a_library_that_fails_in_the_check_breaks_the_check_and_not_the_answer(name, library, judge, monkeypatch):
    results = []  # of the right function, which may need itself what fails below

    def remembered(*given):
        results.append(SOLUTIONS[name](*given))
        return results[-1]

    assert judge(name, remembered).passed
    again = iter(results)
    monkeypatch.setattr(library, Mock(side_effect=RuntimeError("no such kernel")))
    outcome = judge(name, lambda *given: next(again))
    assert outcome.status == "CHECK BROKEN" and "RuntimeError: no such kernel" in outcome.hint
    assert re.search(r"\((lesson\d\d|deep_\w+)\.py, line ", outcome.hint)


@pytest.mark.parametrize("name", sorted(SOLUTIONS.keys() - {"01.borrow"}))  # whose second call is meant to fail
def test_an_answer_that_fails_at_a_later_call_is_not_right(name, judge):
    calls = []

    def fails_later(*given):
        calls.append(given)
        if len(calls) > 1:
            raise RuntimeError("no such kernel")
        return SOLUTIONS[name](*given)

    outcome = judge(name, fails_later)
    assert outcome.status == "TRY AGAIN" and "Your code stopped with RuntimeError" in outcome.hint
