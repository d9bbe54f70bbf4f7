"""What the report on the environment says."""

import importlib.metadata
from types import SimpleNamespace

import pytest

from course_utils import environment, paths


@pytest.mark.pinned
def test_all_is_well_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(environment, "NEEDED_MEMORY", 0)  # other work on the machine is no fault of the report
    assert environment.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("[OK]   Ready: Python 3.") and line.endswith(f"base model {paths.base_model()}.")


@pytest.fixture
def requirements(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    (tmp_path / "requirements-beyond-text.txt").write_text("no-such-picture==2.0  # lesson 12\n")
    return tmp_path / "requirements.txt"


def test_packages_are_held_to_the_requirements(requirements):
    release = importlib.metadata.version("torch").split("+")[0]
    requirements.write_text(
        f"# comment\n-c constraints.txt\n-e .\n\ntorch=={release}  # every lesson\npytest==0.1\n"
        "no-such-package>=1.0 # x\nno-such-elsewhere==1; sys_platform == 'plan9'\n"
    )
    assert importlib.metadata.version("pytest") != "0.1"
    first, second, third = environment._packages()  # a build's own tag, as in +cpu, is no other version
    assert first.startswith("pytest is ") and "written for ==0.1" in first and "pip install" in first
    assert second.startswith("no-such-package is missing, and the course is written for >=1.0")
    assert third.startswith("no-such-picture is missing") and "install --no-deps -r requirements-beyond" in third


@pytest.mark.pinned
def test_little_disk_little_memory_and_a_broken_base_fail_with_a_remedy(monkeypatch, capsys):
    import psutil

    monkeypatch.setattr(environment.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e8))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    monkeypatch.setenv("COURSE_BASE_MODEL", "/no/such/folder")
    assert environment.main() == 1
    failed = capsys.readouterr().out.splitlines()
    assert len(failed) == 3 and all(line.startswith("[FAIL] ") for line in failed)
    assert "0.1 GB free" in failed[0] and "Close other programs" in failed[1] and "/no/such/folder" in failed[2]


def test_no_folder_for_results_is_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "file"))
    (problem,) = environment._disk()
    assert "can't be written to" in problem
