"""What a check hands back: findings that say what is wrong and what to do about it."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar, cast

from adapter_checks.errors import InputError

_MARKS = {"ok": "[OK]", "warn": "[WARN]", "fail": "[FAIL]"}


@dataclass(frozen=True)
class Finding:
    """One thing that a check saw. `level` is "ok", "warn" or "fail"; `code` is stable, for programs and tests."""

    level: str
    code: str
    message: str
    remedy: str = ""


@dataclass(repr=False)
class Report:
    """The findings of one check. Printed or shown by a notebook, it reads as one line a finding, worst first."""

    title: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing failed; warnings alone leave it true."""
        return all(finding.level != "fail" for finding in self.findings)

    @property
    def codes(self) -> list[str]:
        """The codes of the findings that are not ok, so an empty list for a healthy thing."""
        return [finding.code for finding in self.findings if finding.level != "ok"]

    def add(self, level: str, code: str, message: str, remedy: str = "") -> None:
        self.findings.append(Finding(level, code, message, remedy))

    def fail(self, code: str, message: str, remedy: str) -> None:
        self.add("fail", code, message, remedy)

    def warn(self, code: str, message: str, remedy: str) -> None:
        self.add("warn", code, message, remedy)

    def note(self, code: str, message: str) -> None:
        self.add("ok", code, message)

    def raise_if_failed(self) -> None:
        """Raise InputError, with the whole report as its message, if anything failed."""
        if not self.ok:
            raise InputError(str(self))

    def __str__(self) -> str:
        failed = sum(finding.level == "fail" for finding in self.findings)
        verdict = "ok" if not failed else f"{failed} problem{'s' if failed > 1 else ''}"
        lines = [f"{self.title}: {verdict}"]
        for finding in sorted(self.findings, key=lambda finding: ("fail", "warn", "ok").index(finding.level)):
            lines.append(_wrapped(f"{_MARKS[finding.level]:<7}{finding.message}", 7))
            if finding.remedy:
                lines.append(_wrapped(f"       -> {finding.remedy}", 10))
        return "\n".join(lines)

    __repr__ = __str__


def _wrapped(line: str, indent: int) -> str:
    # Paths and parameter names stay in one piece, so that they can be copied.
    return textwrap.fill(line, 90, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


Arguments = ParamSpec("Arguments")
AnyReport = TypeVar("AnyReport", bound=Report)


def first_few(names: Iterable[object], shown: int = 2) -> str:
    """The first few names in a sentence: "a, b and 6 more"."""
    words = [str(name) for name in names]
    rest = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {rest} more" if rest > 0 else "")


def never_raises(
    title: str, kind: type[Report] = Report
) -> Callable[[Callable[Arguments, AnyReport]], Callable[Arguments, AnyReport]]:
    """Decorator for a check: an error that it did not foresee becomes a finding, not a traceback."""

    def decorate(check: Callable[Arguments, AnyReport]) -> Callable[Arguments, AnyReport]:
        @functools.wraps(check)
        def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> AnyReport:
            try:
                return check(*args, **kwargs)
            except InputError as error:  # it says itself what to do
                report = cast(AnyReport, kind(title))
                report.add("fail", "check_failed", str(error))
                return report
            except Exception as error:
                report = cast(AnyReport, kind(title))
                report.fail(
                    "check_failed",
                    f"The check could not be carried out: {type(error).__name__}: {error}",
                    "See whether the model runs at all, and whether the arguments are what the docstring asks for.",
                )
                return report

        return wrapped

    return decorate
