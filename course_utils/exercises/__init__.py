"""Exercises: checks that judge a learner's answer kindly, and the record of what passed.

A check is a function that receives the learner's object or function, compares it with a
reference that can be trusted, and raises `TryAgain` with a hint that fits the mistake:

    @exercise("01.size_ratio", title="How small is it?", level="warm-up", minutes=5)
    def size_ratio(function):
        ratio = expect_number(call_learner(function, 200, 100), "the ratio")
        if ratio == 0.5:
            raise TryAgain("This is adapter over base. Turn the fraction over.")
        if ratio != 2:
            raise TryAgain("This is not the larger number over the smaller.")

In a lesson, `size_ratio(my_answer)` shows PASS, TRY AGAIN with the hint, or TODO. What
the learner's code raises is a TRY AGAIN, too; where the check itself fails, it shows
CHECK BROKEN with the versions that are installed. So a check calls the learner's
function with `call_learner`, and uses what came back in a `with using("the answer"):`
where that may raise. A solution of its own, which a lesson may call, is a `reference`.

It raises only when the environment variable COURSE_STRICT is 1.
"""

import contextlib
import decimal
import dis
import functools
import importlib.metadata
import json
import logging
import math
import numbers
import os
import pkgutil
import platform
import sys
import traceback
from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from adapter_checks.errors import InputError
from course_utils import paths
from course_utils.files import write_text

LEVELS = ("warm-up", "core", "stretch")
_registry = {}
_answering = False  # while a learner's function runs


class TryAgain(Exception):
    """Raised by a check: the answer is not right yet. Its message is the learner's hint."""


class Todo(Exception):
    """Raised by a check: the learner has not begun."""


class NotPassed(InputError):
    """Raised under COURSE_STRICT=1 by a check that did not pass."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: `status` is "PASS", "TRY AGAIN", "TODO" or "CHECK BROKEN", with the `error` that broke it."""

    name: str
    title: str
    status: str
    hint: str = ""
    error: BaseException | None = None

    @property
    def passed(self):
        """True for PASS only."""
        return self.status == "PASS"

    def __str__(self):
        line = f"{self.status} · {self.title} ({self.name})"
        return f"{line}\n{self.hint}" if self.hint else line


class Exercise:
    """A check with its name, title, level and minutes. Call it with the learner's answer."""

    def __init__(self, test, name, title, level, minutes):
        if level not in LEVELS:
            raise ValueError(f"Exercise {name}: the level is one of {', '.join(LEVELS)}, not {level!r}.")
        self.test, self.name, self.title, self.level, self.minutes = test, name, title, level, minutes
        functools.update_wrapper(self, test)

    def outcome(self, *answers, **given):
        """Judge `answers` without showing or recording anything, and return an `Outcome`.

        `given` is what the lesson hands over beside the answers (the base model, say).
        Whatever the answer is or does, this returns: no exception of the learner's code
        or of the check itself gets out.
        """
        with _stderr_to_stdout():
            try:
                if any(answer is ... or _does_nothing(answer) for answer in answers):
                    raise Todo
                self.test(*answers, **given)
            except Todo:
                return self._outcome("TODO", "Replace the ... with your answer, then run this cell again.")
            except TryAgain as wrong:
                return self._outcome("TRY AGAIN", str(wrong))
            except (Exception, SystemExit) as error:
                if not answers or _comes_from_a_learner(error, self.test):
                    got = ", ".join(describe(answer) for answer in answers) or "no answer"
                    return self._outcome(
                        "TRY AGAIN", f"The check could not use what it was given ({got}): {_error_text(error)}"
                    )
                return self._outcome("CHECK BROKEN", _what_broke(error), error)
        return self._outcome("PASS")

    def __call__(self, *answers, **given):
        """Judge `answers`, show the outcome, and record a pass in runs/progress.json.

        Raises `NotPassed` under COURSE_STRICT=1 when the outcome is not PASS.
        """
        outcome = self.outcome(*answers, **given)
        print(outcome)
        if outcome.passed:
            _record(self.name)
        elif os.environ.get("COURSE_STRICT") == "1":
            raise NotPassed(str(outcome)) from outcome.error

    def _outcome(self, status, hint="", error=None):
        return Outcome(self.name, self.title, status, hint, error)


def exercise(name, *, title, level, minutes):
    """Turn a function that receives the learner's answer into an `Exercise`.

    `name` is "NN.slug" or "deep.slug" (lesson, exercise), `level` one of `LEVELS`, `minutes` a whole
    number. The function raises `TryAgain(hint)` or `Todo`, or returns to say PASS.
    Raises ValueError for an unknown level and for a name that another function has.
    """

    def decorate(test):
        made = Exercise(test, name, title, level, minutes)
        other = _registry.get(name)
        # The same function again is a module being reloaded while a lesson is written.
        if other and (other.__module__, other.__qualname__) != (made.__module__, made.__qualname__):
            raise ValueError(f"Two exercises are called {name}.")
        _registry[name] = made
        return made

    return decorate


def all_exercises():
    """Import every lesson's checks and return the exercises, ordered by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return [_registry[name] for name in sorted(_registry)]


def progress(lesson=""):
    """Print which exercises of a lesson ("01") are done, or which of all, from runs/progress.json."""
    passed = _read_record()
    exercises = [one for one in all_exercises() if one.name.startswith(lesson)]
    width = max((len(one.name) for one in exercises), default=0)
    for one in exercises:
        mark = "done" if one.name in passed else "    "
        print(f"{mark}  {one.name:<{width}}  {one.title} ({one.level}, {one.minutes} minutes)")
    print(f"{sum(one.name in passed for one in exercises)} of {len(exercises)} exercises done.")


# What checks use


def reference(function):
    """Mark `function` as a check's own solution. Lessons may call it; called from an answer, it is a `TryAgain`."""

    @functools.wraps(function)
    def guarded(*arguments, **keywords):
        if _answering:
            raise TryAgain(f"{function.__name__} is the check's own solution. Write one of your own.")
        return function(*arguments, **keywords)

    return guarded


def call_learner(function, *arguments, **keywords):
    """Call the learner's function and return what it returns.

    Raises `TryAgain` when it is not a function or raises (the hint names the error and
    the learner's line), or calls a check's `reference`, and `Todo` when it still returns
    the stub's `...`.
    """
    global _answering
    if not callable(function):
        raise TryAgain(f"A function is expected here, but this is {describe(function)}.")
    _answering = True
    try:
        value = function(*arguments, **keywords)
    except TryAgain:
        raise
    except (Exception, SystemExit) as error:
        raise TryAgain(f"Your code stopped with {_error_text(error)}{_where(error, function)}") from None
    finally:
        _answering = False
    if value is ...:
        raise Todo
    return value


@contextlib.contextmanager
def using(name):
    """Use the learner's object in here: what goes wrong is that it can't be used, and no fault of the check.

    `name` says in the hint what it is ("the model after your function").
    """
    try:
        yield
    except (TryAgain, Todo):
        raise
    except (Exception, SystemExit) as error:
        raise TryAgain(f"{_capital(name)} can't be used: {_error_text(error)}") from None


def expect_type(value, types, name):
    """Return `value` if it is an instance of `types` (a type or a tuple of types).

    `name` says in the hint what it is ("the answer"). Raises `TryAgain`, or `Todo` for `...`.
    """
    if value is ...:
        raise Todo
    if not isinstance(value, types):
        wanted = " or ".join(kind.__name__ for kind in (types if isinstance(types, tuple) else (types,)))
        raise TryAgain(f"{_capital(name)} should be of type {wanted}, but is {describe(value)}.{_forgot(value)}")
    return value


def expect_list(value, name, *, in_order=True):
    """Return `value` as a list: a list, a tuple, or a tensor or array with at least one dimension.

    Unless it counts which stands first (`in_order`), a set or a dict's keys will do, too.
    `name` says in the hint what it is. Raises `TryAgain` for anything else, and `Todo` for `...`.
    """
    import numpy
    import torch

    if isinstance(value, (numpy.ndarray, torch.Tensor)) and value.ndim:
        with using(name):
            return list(value)
    expect_type(value, (tuple, list) if in_order else (tuple, list, Set), name)
    return list(value)


def expect_number(value, name):
    """Return `value` as a float: any real number of Python's, or a tensor or array with one element.

    `name` says in the hint what it is. Raises `TryAgain` for anything else, for NaN and
    for infinity, and `Todo` for `...`.
    """
    if value is ...:
        raise Todo
    number = value
    if hasattr(value, "item"):
        try:
            number = value.item()
        except (RuntimeError, ValueError):
            pass  # More than one element: described below as what it is.
    if isinstance(number, bool) or not isinstance(number, (numbers.Real, decimal.Decimal)):
        raise TryAgain(f"{_capital(name)} should be a number, but is {describe(value)}.{_forgot(value)}")
    with using(name):
        number = float(number)  # A whole number may be too large for it.
    if not math.isfinite(number):
        raise TryAgain(f"{_capital(name)} is {number}. Look for a division by zero or an empty mean.")
    return number


def expect_whole_number(value, name):
    """Return `value` as an int, if it is a whole number in any of the forms that `expect_number` takes.

    Raises `TryAgain`, or `Todo` for `...`.
    """
    number = expect_number(value, name)
    if not number.is_integer():
        raise TryAgain(f"{_capital(name)} should be a whole number, but is {number:g}.")
    return int(number)


def expect_plain_tensor(value, name):
    """Return `value`, a torch tensor of real numbers that are in memory, not sparse, or an array made into one.

    Raises `TryAgain`, or `Todo` for `...`.
    """
    import numpy
    import torch

    if isinstance(value, numpy.ndarray):
        with using(name):
            value = torch.from_numpy(value.copy())  # shares nothing, and may be turned or read-only
    expect_type(value, torch.Tensor, name)
    if value.layout is not torch.strided or value.is_meta or value.is_complex() or value.dtype is torch.bool:
        kind = f"{value.dtype}, {value.layout}, on {value.device}".replace("torch.", "")
        raise TryAgain(f"{_capital(name)} should hold plain real numbers, but is {kind}.")
    return value


def expect_tensor(value, shape, name="the result"):
    """Return `value`, a plain torch tensor or array of `shape` (a tuple) with finite numbers, as a tensor.

    Raises `TryAgain`, or `Todo` for `...`.
    """
    import torch

    value = expect_plain_tensor(value, name)
    if tuple(value.shape) != tuple(shape):
        raise TryAgain(f"{_capital(name)} has shape {tuple(value.shape)}, but {tuple(shape)} is expected.")
    if not bool(torch.isfinite(value).all()):
        raise TryAgain(f"{_capital(name)} holds NaN or infinity.")
    return value


def describe(value):
    """Return a few words that say what `value` is, whatever it is."""
    if value is None or value is ...:
        return str(value)
    kind = type(value).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    try:
        if isinstance(value, (bool, int, float)):
            return f"{article} {kind}: {value}"
        if isinstance(value, str):
            return f"text: {value if len(value) <= 40 else value[:40] + '...'!r}"
        if hasattr(value, "shape"):
            return f"{article} {kind} of shape {tuple(value.shape)}"
        if isinstance(value, (list, tuple, dict, set)):
            return f"{article} {kind} with {len(value)} item{'' if len(value) == 1 else 's'}"
    except Exception:
        pass  # An object may refuse to be looked at; its type is still worth saying.
    return f"{article} {kind}"


def _capital(text):
    return text[:1].upper() + text[1:]


def _forgot(value):
    return " Is a return missing?" if value is None else ""


def _error_text(error):
    # format_exception_only copes with exceptions that cannot be printed.
    lines = traceback.format_exception_only(error)
    return next(line for line in lines if not line.startswith(" ")).strip().split("\n")[0]


def _where(error, function):
    """Say on which of the learner's own lines `error` arose, if that can be told."""
    code = getattr(function, "__code__", None)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename
    ]
    return f" (at: {frames[-1].line})" if frames and frames[-1].line else ""


def _comes_from_a_learner(error, check):
    """Did a line of code that is neither the check's nor a library's lead to the error, or to its cause?"""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code is not check.__code__ and not _is_installed(frame.f_globals.get("__name__") or "builtins"):
                return True
        error = error.__cause__ or error.__context__
    return False


def _is_installed(module):
    """Does the module of this name come with the course, with Python, or with a package? What learners write does not."""
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names or root in ("course_utils", "adapter_checks"):
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""  # a notebook has none
    return root != "__main__" and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _what_broke(error):
    """Say that the check failed, where, and with which versions."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is this module's own
    return (
        f"The check itself failed, which says nothing about your answer: {_error_text(error)} "
        f"({Path(frames[0].filename).name}, line {frames[0].lineno}). Installed are {_versions()}. "
        "`make setup` installs what the course is written for."
    )


def _versions():
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def _does_nothing(answer):
    """True for a function whose body is only `...`, `pass` or a docstring."""
    if not hasattr(answer, "__code__"):
        return False
    return all(
        step.opname in ("RESUME", "NOP", "COPY_FREE_VARS", "RETURN_VALUE")
        or (step.opname in ("LOAD_CONST", "RETURN_CONST") and step.argval is None)
        for step in dis.get_instructions(answer)
    )


@contextlib.contextmanager
def _stderr_to_stdout():
    """Send what the learner's code writes to stderr to stdout: a grader counts stderr as failure.

    Log handlers keep the stream that they were made with, so those on stderr are moved.
    """
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    moved = {
        handler
        for logger in loggers
        for handler in getattr(logger, "handlers", [])
        # Some look sys.stderr up at each record; those hold no stream, and follow by themselves.
        if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") in (sys.stderr, sys.__stderr__)
    }
    streams = {handler: handler.setStream(sys.stdout) for handler in moved}
    try:
        with contextlib.redirect_stderr(sys.stdout):
            yield
    finally:
        for handler, stream in streams.items():
            handler.setStream(stream)


# The record


def _record_path():
    return Path(paths.runs_dir()) / "progress.json"


def _read_record():
    """Return {name: when it first passed}. A damaged record is kept aside, and said so."""
    path = _record_path()
    try:
        passed = json.loads(path.read_text(encoding="utf-8"))["passed"]
        return {str(name): str(when) for name, when in passed.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        print(f"The record of passed exercises can't be read: {error.strerror}.")
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        aside = path.with_name(f"progress.damaged-{datetime.now():%Y%m%d-%H%M%S}.json")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        print(f"The record of passed exercises was damaged. It is kept as {aside.name}, and a new one begins.")
        return {}


def _record(name):
    """Add `name` to the record in one step, so that a crash leaves the old record whole."""
    try:
        passed = _read_record()
        if name in passed:
            return
        passed[name] = datetime.now().isoformat(timespec="seconds")
        write_text(_record_path(), json.dumps({"passed": passed}, indent=1))
    except (OSError, InputError) as error:
        print(f"This pass could not be recorded: {getattr(error, 'strerror', None) or error}.")
