"""The run on the newest libraries: what is installed, what is reported, and that a failure ends in a failure."""

import json
import re
from types import SimpleNamespace

import pytest

from tools import newest
from tools.build import ROOT

REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_everything_is_installed_and_nothing_is_held():
    lines = newest.unpinned(REQUIREMENTS).splitlines()
    assert not [line for line in lines if "==" in line or line.startswith("-c")]
    assert [line for line in lines if line.startswith("-e")] == ["-e ./adapter_checks", "-e ."]
    assert len(lines) == len(REQUIREMENTS.splitlines()) - 1
    assert any(re.match("torch +# ", line) for line in lines)


def test_what_changed_is_what_no_line_of_the_constraints_holds():
    constraints = (
        "# head\npeft==0.21.2\nsoup==2.10 ; x < '3.12'\nsoup==4.1 ; x >= '3.12'\ntorch==2.13.0\nmy-name==1.0\n"
    )
    installed = {"peft": "0.22.0", "soup": "4.1", "torch": "2.13.0+cpu", "My.Name": "2.0", "extra": "9"}
    found = newest.changed(constraints, [{"name": name, "version": version} for name, version in installed.items()])
    assert found == [("peft", "0.21.2", "0.22.0"), ("my-name", "1.0", "2.0")]


def test_what_broke_is_every_failed_test_and_goal():
    output = """\
FAILED tests/test_a.py::test_b - AssertionError: no
ERROR tests/test_c.py
PASSED tests/test_d.py::test_e
  FAILED as a word
make[1]: *** [Makefile:70: test-code] Error 1
make[1]: Target 'test-notebooks' not remade because of errors.
"""
    assert newest.broken(output) == [
        "FAILED tests/test_a.py::test_b - AssertionError: no",
        "ERROR tests/test_c.py",
        "make[1]: *** [Makefile:70: test-code] Error 1",
    ]


def test_the_report_says_so_when_nothing_changed_and_nothing_broke():
    assert newest.report([], []) == "## What changed\n\nEvery version is the pinned one.\n\n## What broke\n\nNothing.\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout in which nothing is installed; `checkout.results` are the answers to what is run, in order."""
    for name in ("requirements.txt", "requirements-beyond-text.txt", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    found = SimpleNamespace(root=tmp_path, results=[], commands=[])

    def run(command, **environment):
        found.commands.append((command[0], environment))
        return found.results.pop(0)

    monkeypatch.setattr(newest, "ROOT", tmp_path)
    monkeypatch.setattr(newest, "run", run)
    monkeypatch.setattr(newest.venv, "create", lambda folder, **options: folder.mkdir(parents=True))
    listing = json.dumps([{"name": "peft", "version": "99"}])
    monkeypatch.setattr(newest.subprocess, "check_output", lambda command, **options: listing)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return found


def test_a_failed_test_is_in_the_summary_and_in_the_exit_status(checkout):
    checkout.results = [(0, ""), (0, ""), (2, "FAILED tests/test_a.py::test_b\n")]
    assert newest.main() == 2
    summary = (checkout.root / "summary.md").read_text()
    assert re.search(r"\| peft \| [\d.]+ \| 99 \|", summary) and "- `FAILED tests/test_a.py::test_b`" in summary
    _, _, (command, environment) = checkout.commands
    assert command == "make" and environment == {"PYTEST_ADDOPTS": "-m 'not pinned'"}
    assert (checkout.root / "runs" / "newest" / ".installed").read_text() == str(checkout.root), "make installs nothing"


def test_what_lesson_12_needs_is_installed_without_its_pins(checkout):
    checkout.results = [(0, ""), (1, "ERROR: No matching distribution\n")]
    assert newest.main() == 1 and len(checkout.commands) == 2
    text = (checkout.root / "runs" / "newest" / "requirements-beyond-text.txt").read_text()
    assert re.search("^diffusers +#", text, re.MULTILINE) and "==" not in text


def test_libraries_that_do_not_go_together_are_a_failure(checkout):
    checkout.results = [(1, "ERROR: Cannot install peft and transformers\n")]
    assert newest.main() == 1 and len(checkout.commands) == 1
    assert "- `ERROR: Cannot install peft and transformers`" in (checkout.root / "summary.md").read_text()
