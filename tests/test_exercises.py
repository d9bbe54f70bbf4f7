"""The machinery of the exercises: what a learner sees for every kind of answer."""

import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import pytest

from course_utils import exercises
from course_utils.exercises import (
    NotPassed,
    Todo,
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    expect_type,
    expect_whole_number,
    reference,
    using,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_record(tmp_path, monkeypatch):
    """Each test has its own runs/ folder and its own list of exercises."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    monkeypatch.setattr(exercises, "_registry", {})
    monkeypatch.setattr(exercises, "__path__", [])
    return tmp_path / "runs" / "progress.json"


@pytest.fixture
def ratio():
    @exercise("00.ratio", title="How many times larger?", level="warm-up", minutes=5)
    def check(function):
        """Compare with plain division."""
        found = expect_number(call_learner(function, 200, 100), "the ratio")
        if found == 0.5:
            raise TryAgain("Turn the fraction over.")
        if found != 2:
            raise TryAgain(f"{found:g} is not right.")

    return check


def raises(base, adapter):
    return base / 0


class Hostile:
    """An object that refuses every look."""

    def __getattr__(self, name):
        raise RuntimeError("no")

    def __eq__(self, other):
        raise RuntimeError("no")


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")


def raises_unprintable(base, adapter):
    raise Unprintable


def leaves(base, adapter):
    sys.exit(3)


def only_a_docstring(base, adapter):
    """Return the ratio."""


def works_but_forgets_return(base, adapter):
    base / adapter


def test_a_right_answer_passes(ratio, capsys, own_record):
    ratio(lambda base, adapter: base / adapter)
    assert capsys.readouterr().out == "PASS · How many times larger? (00.ratio)\n"
    assert list(json.loads(own_record.read_text())["passed"]) == ["00.ratio"]


@pytest.mark.parametrize("stub", [..., lambda base, adapter: ..., only_a_docstring])
def test_a_stub_is_to_do(ratio, stub, own_record):
    assert ratio.outcome(stub).status == "TODO"
    ratio(stub)
    assert not own_record.exists()


@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda base, adapter: adapter / base, "Turn the fraction over"),
        (lambda base, adapter: base, "200 is not right"),
        (works_but_forgets_return, "Is a return missing?"),
        (lambda base, adapter: float("nan"), "The ratio is nan"),
        (lambda base, adapter: float("inf"), "The ratio is inf"),
        (lambda base, adapter: "2", "should be a number, but is text: '2'"),
        (lambda base, adapter: True, "should be a number, but is a bool: True"),
        (lambda base, adapter: [2, 2], "a list with 2 items"),
        (lambda base: base, "TypeError"),
        (raises, "ZeroDivisionError: division by zero (at: return base / 0)"),
        (raises_unprintable, "Unprintable"),
        (leaves, "SystemExit: 3"),
        (2.0, "A function is expected here, but this is a float: 2.0."),
        (None, "A function is expected here, but this is None."),
    ],
)
def test_every_wrong_answer_gets_its_own_hint(ratio, answer, hint, capsys, own_record):
    outcome = ratio.outcome(answer)
    assert outcome.status == "TRY AGAIN"
    assert hint in outcome.hint
    ratio(answer)
    assert str(outcome) in capsys.readouterr().out
    assert not own_record.exists()


def test_an_object_that_refuses_every_look_gets_a_sentence(ratio):
    assert "a Hostile" in ratio.outcome(Hostile()).hint


def test_no_answer_at_all_gets_a_sentence(ratio):
    assert "no answer" in ratio.outcome().hint


# Whose fault it is


def checked_with(reference):
    """An exercise whose check calls the learner's function, and then `reference`."""

    @exercise("00.against", title="Against a reference", level="core", minutes=5)
    def check(function):
        found = expect_number(call_learner(function, 2), "the number")
        if found != reference(function):
            raise TryAgain("This is another number.")

    return check


LIBRARY_FAILS = Mock(side_effect=RuntimeError("no such kernel"))  # its frames are those of the standard library


def test_a_check_whose_reference_fails_says_so_and_does_not_blame_the_answer(own_record, capsys):
    check = checked_with(LIBRARY_FAILS)
    check(lambda number: number)
    said = capsys.readouterr().out
    assert said.startswith("CHECK BROKEN · Against a reference (00.against)\nThe check itself failed")
    assert "nothing about your answer: RuntimeError: no such kernel (test_exercises.py, line " in said
    versions = [
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers", "peft", "trl")
    ]
    assert ", ".join([f"Python {platform.python_version()}", *versions]) in said
    assert not own_record.exists()


def test_versions_are_told_as_far_as_there_are_any(monkeypatch):
    version = importlib.metadata.version

    def without_peft(package):
        if package == "peft":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_peft)
    hint = checked_with(LIBRARY_FAILS).outcome(lambda number: number).hint
    assert " torch " in hint and "peft" not in hint


def test_strict_raises_for_a_broken_check_with_what_broke_it(monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(NotPassed, match="CHECK BROKEN") as caught:
        checked_with(LIBRARY_FAILS)(lambda number: number)
    assert "no such kernel" in str(caught.value.__cause__)


WRAPS = """
def reference(function):
    try:
        return max("ab", key=function)
    except TypeError as error:
        raise RuntimeError("the library's own words") from error
"""


@pytest.mark.parametrize("code", ["def reference(function):\n    return max('ab', key=function)", WRAPS])
def test_what_the_answer_raises_later_is_its_own_fault_though_others_call_it(code, monkeypatch):
    names, notebook = {"__name__": "course_utils.made_up"}, {"__name__": "__main__"}
    exec(code, names)
    exec("def picky(number):\n    return number + len(number) if isinstance(number, str) else number", notebook)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", pytest.__file__, raising=False)  # as `python -m` sets it
    outcome = checked_with(names["reference"]).outcome(notebook["picky"])
    assert outcome.status == "TRY AGAIN" and "The check could not use what it was given (a function)" in outcome.hint
    assert checked_with(names["reference"]).outcome(float).status == "CHECK BROKEN"  # no line of a learner's is in it


def test_an_object_that_can_not_be_used_is_no_broken_check():
    @exercise("00.used", title="Used", level="core", minutes=5)
    def check(answer):
        with using("the answer"):
            answer.missing.attribute  # noqa: B018 (reading it is what fails)

    assert check.outcome({"a": 1}) == exercises.Outcome(
        "00.used",
        "Used",
        "TRY AGAIN",
        "The answer can't be used: AttributeError: 'dict' object has no attribute 'missing'",
    )


@pytest.mark.parametrize("answer", [..., lambda base, adapter: 7])
def test_strict_raises_for_todo_and_for_wrong(ratio, answer, monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(NotPassed, match="How many times larger"):
        ratio(answer)


def test_strict_lets_a_pass_through(ratio, monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    ratio(lambda base, adapter: base / adapter)


def test_nothing_reaches_stderr(ratio, capfd):
    handler = logging.StreamHandler()
    logger = logging.getLogger("a library that logs")
    logger.addHandler(handler)

    def noisy(base, adapter):
        print("print", file=sys.stderr)
        warnings.warn("warning", stacklevel=1)
        logger.warning("logged")
        return base / adapter

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            # pytest keeps warnings for itself; a notebook writes them to stderr.
            warnings.showwarning = lambda message, *rest: print(message, file=sys.stderr)
            ratio(noisy)
        assert handler.stream is sys.stderr
    finally:
        logger.removeHandler(handler)
    seen = capfd.readouterr()
    assert seen.err == ""
    assert all(word in seen.out for word in ("print", "warning", "logged", "PASS"))


def test_handlers_without_a_stream_of_their_own_are_left_alone(ratio):
    handler = logging._StderrHandler()  # What logging itself falls back to: its stream can't be set.
    logging.getLogger("another library").addHandler(handler)
    try:
        solve(ratio)
    finally:
        logging.getLogger("another library").removeHandler(handler)


def test_an_answer_may_come_with_things_given_by_the_lesson():
    @exercise("00.given", title="Given", level="core", minutes=5)
    def check(answer, model):
        if answer != model:
            raise TryAgain("This is not what was given.")

    assert check.outcome(3.0, model=3).passed
    assert check.outcome(..., model=3).status == "TODO"


# The record


def solve(ratio):
    ratio(lambda base, adapter: base / adapter)


def test_progress_shows_what_is_done(ratio, capsys):
    @exercise("00.second", title="Another", level="stretch", minutes=20)
    def second(answer):
        raise Todo

    solve(ratio)
    capsys.readouterr()
    exercises.progress()
    assert capsys.readouterr().out == (
        "done  00.ratio   How many times larger? (warm-up, 5 minutes)\n"
        "      00.second  Another (stretch, 20 minutes)\n"
        "1 of 2 exercises done.\n"
    )


def test_a_lesson_shows_its_own_exercises_only(ratio, capsys):
    exercise("01.other", title="Another lesson's", level="core", minutes=5)(lambda answer: None)
    exercises.progress("00")
    assert capsys.readouterr().out == (
        "      00.ratio  How many times larger? (warm-up, 5 minutes)\n0 of 1 exercises done.\n"
    )


@pytest.mark.parametrize("lesson", sorted(ROOT.glob("lessons/*.py")), ids=lambda path: path.stem)
def test_each_lesson_asks_for_its_own(lesson):
    """Its number; a deep dive may name its one exercise instead, since all dives share the number's place."""
    name = lesson.stem.split("_")[0]
    assert re.search(rf'^progress\("{name}(\.\w+)?"\)$', lesson.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_first_pass_is_the_one_that_counts(ratio, own_record):
    own_record.parent.mkdir()
    own_record.write_text('{"passed": {"00.ratio": "2020-01-01T00:00:00"}}')
    solve(ratio)
    assert "2020" in own_record.read_text()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"passed": 3}', '{"other": {}}', "\x00\xff"])
def test_a_damaged_record_is_kept_aside_and_said(ratio, own_record, damage, capsys):
    own_record.parent.mkdir()
    own_record.write_bytes(damage.encode("latin-1"))
    solve(ratio)
    out = capsys.readouterr().out
    assert "PASS" in out and "was damaged" in out
    (aside,) = own_record.parent.glob("progress.damaged-*.json")
    assert aside.name in out and aside.read_bytes() == damage.encode("latin-1")
    assert "00.ratio" in own_record.read_text()


def test_a_failed_write_keeps_the_old_record_and_is_said(ratio, own_record, monkeypatch, capsys):
    own_record.parent.mkdir()
    own_record.write_text('{"passed": {"00.before": "2020-01-01T00:00:00"}}')

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    solve(ratio)
    out = capsys.readouterr().out
    assert "PASS" in out and "could not be recorded: No space left on device." in out
    assert "00.before" in own_record.read_text()
    assert [path.name for path in own_record.parent.iterdir()] == ["progress.json"]


def test_a_record_that_cannot_be_read_is_said(ratio, own_record, capsys):
    own_record.mkdir(parents=True)  # A folder where the file should be.
    exercises.progress()
    assert "can't be read" in capsys.readouterr().out
    solve(ratio)
    assert "could not be recorded" in capsys.readouterr().out


# What the machinery refuses


def test_two_exercises_of_one_name_are_refused(ratio):
    with pytest.raises(ValueError, match="Two exercises are called 00.ratio"):

        @exercise("00.ratio", title="Twin", level="core", minutes=5)
        def twin(answer):
            pass


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="the level is one of warm-up, core, stretch, not 'easy'"):
        exercise("00.easy", title="Easy", level="easy", minutes=5)(lambda answer: None)


# What checks use


def test_expect_number_takes_what_counts_as_one_number():
    torch = pytest.importorskip("torch")
    assert expect_number(3, "x") == 3.0
    assert expect_number(torch.tensor([2.5]), "x") == 2.5
    assert expect_number(torch.tensor(2.5).numpy(), "x") == 2.5
    assert expect_number(Fraction(5, 2), "x") == expect_number(Decimal("2.5"), "x") == 2.5
    with pytest.raises(TryAgain, match=r"a Tensor of shape \(2,\)"):
        expect_number(torch.zeros(2), "x")
    with pytest.raises(Todo):
        expect_number(..., "x")


def test_expect_tensor_checks_type_shape_and_values():
    torch = pytest.importorskip("torch")
    good = torch.zeros(2, 3)
    assert expect_tensor(good, (2, 3)) is good
    with pytest.raises(TryAgain, match=r"has shape \(2, 3\), but \(3, 2\) is expected"):
        expect_tensor(good, (3, 2))
    with pytest.raises(TryAgain, match="NaN or infinity"):
        expect_tensor(torch.full((2,), float("nan")), (2,))
    with pytest.raises(TryAgain, match="of type Tensor, but is a list with 1 item"):
        expect_tensor([1], (1,))
    with pytest.raises(Todo):
        expect_tensor(..., (1,))


def test_an_array_counts_as_a_tensor_and_shares_nothing_with_it():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    array = numpy.arange(6.0).reshape(3, 2).T
    array.setflags(write=False)
    tensor = expect_tensor(array, (2, 3))
    assert tensor.dtype is torch.float64 and tensor.tolist() == array.tolist()
    assert expect_tensor(numpy.array([1, 2]), (2,)).dtype is torch.long
    for wrong in (numpy.array(["a", "b"]), numpy.array([None, 1]), numpy.array([1j, 2])):
        with pytest.raises(TryAgain):
            expect_tensor(wrong, (2,))


def test_expect_list_takes_what_holds_things_in_order():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for right in ([1, 2], (1, 2), numpy.array([1, 2]), torch.tensor([1, 2])):
        assert expect_list(right, "x") == [1, 2]
    for names in ({"a"}, frozenset("a"), {"a": 1}.keys(), numpy.array(["a"])):
        assert expect_list(names, "x", in_order=False) == ["a"]
    for wrong in ({1, 2}, "ab", torch.tensor(1), {"a": 1}, iter("ab"), None):
        with pytest.raises(TryAgain, match="The answer should be of type tuple or list"):
            expect_list(wrong, "the answer")
    with pytest.raises(Todo):
        expect_list(..., "x")


def test_expect_whole_number():
    assert expect_whole_number(3.0, "x") == expect_whole_number(Fraction(3), "x") == 3
    with pytest.raises(TryAgain, match="The step should be a whole number, but is 2.5"):
        expect_whole_number(2.5, "the step")


def test_a_reference_may_be_called_everywhere_but_in_an_answer():
    @reference
    def double(number):
        return 2 * number

    assert double(2) == 4
    for answer in (double, lambda number: double(number)):
        with pytest.raises(TryAgain, match="double is the check's own solution"):
            call_learner(answer, 2)
        assert double(2) == 4  # also after an answer that was stopped
    with pytest.raises(TryAgain, match="ZeroDivisionError"):
        call_learner(lambda number: number / 0, 2)
    assert double(2) == 4


def test_expect_type_names_what_it_wants():
    assert expect_type("a", str, "the answer") == "a"
    with pytest.raises(TryAgain, match="The answer should be of type str or list, but is an int: 3."):
        expect_type(3, (str, list), "the answer")
    with pytest.raises(TryAgain, match="Is a return missing"):
        expect_type(None, str, "the answer")


def test_describe_shortens_long_text():
    assert len(describe("x" * 1000)) < 60
