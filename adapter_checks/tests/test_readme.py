"""What the README shows can be run from top to bottom, and does what it says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from adapter_checks import Report
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.command import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def folders(tiny_folders, tmp_path, monkeypatch):
    for name in ("base", "adapter", "merged"):
        shutil.copytree(tiny_folders / name, tmp_path / f"my-{name}")
    state = {"log_history": [{"step": 1, "loss": 0.693, "rewards/margins": 0.0, "rewards/accuracies": 0.0}]}
    (tmp_path / "my-runs" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "my-runs" / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Where? ", "completion": "Here."}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_examples(folders, capsys):
    quiet_imports()
    names, reports = {}, []
    names["print"] = lambda *values: reports.extend(value for value in values if isinstance(value, Report))
    assert len(blocks("python")) == 10
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert len(reports) == 13 and [report.codes for report in reports if not report.ok] == [], reports


def test_the_commands(folders, capsys):
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    commands = [words[1:] for words in commands if words[:1] == ["adapter-checks"]]
    assert [words[0] for words in commands] == [
        "folder",
        "merged",
        "data",
        "run",
        "config",
        "count",
        "memory",
        "memory",
    ]
    for words in commands:
        assert main(words) == 0, capsys.readouterr()


def test_the_comparison_has_each_fault_once():
    from compare import FAULTS, HEALTHY

    shown = re.search("<!-- comparison -->(.*)<!-- end of comparison -->", README, re.S).group(1)
    assert [line.split(" | ")[0].removeprefix("| ") for line in shown.strip().splitlines()[2:-1]] == [*FAULTS, *HEALTHY]
    for line in shown.strip().splitlines()[2:-1]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2] == ("reported" if cells[0] in FAULTS else "passes"), f"adapter-checks with the base: {line}"


@pytest.mark.parametrize("fault", ["a setting of the wrong kind", "the trained head was not saved", "alpha is 0"])
def test_a_fault_of_the_comparison_is_still_found(fault, folders, capsys):
    from compare import FAULTS

    FAULTS[fault](folders / "my-adapter")
    assert main(["folder", "my-adapter"]) == 1
