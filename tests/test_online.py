"""The course in a browser: Colab's lessons, the links at the head of README, and what Binder and Codespaces run."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from tools import colab, install, online
from tools.build import ROOT

ADDRESS = "https://github.com/someone/course"


# Colab


def test_every_lesson_for_colab_is_the_lesson_after_one_cell(tmp_path):
    online.write_colab(ROOT, tmp_path, ADDRESS)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")) and written
    for name in written:
        first, *rest = nbformat.read(tmp_path / name, as_version=4).cells
        assert f"git clone --quiet --depth 1 {ADDRESS} course" in first.source
        assert rest == nbformat.read(ROOT / "notebooks" / name, as_version=4).cells
        assert "git clone" not in "".join(cell.source for cell in rest if cell.cell_type == "code")


def test_colab_gets_what_lessons_import_and_keeps_its_own_pytorch():
    pins = colab.needed((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    names = {pin.split("==")[0] for pin in pins}
    assert {"transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes"} <= names
    assert not names & {"torch", "numpy", "matplotlib", "jupyterlab", "pytest", "nbmake", "uv"}
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)


def test_the_first_cell_fetches_the_course_and_makes_it_importable(tmp_path):
    """In a kernel, in an empty folder, from a local copy; pip stands in, as nothing is to be installed."""
    origin, empty = tmp_path / "origin", tmp_path / "empty"
    for folder in ("tools", "course_utils", "adapter_checks/src", "notebooks"):
        shutil.copytree(ROOT / folder, origin / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", origin)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "Copy"]):
        subprocess.run([*git, *command], cwd=origin, check=True)
    (empty / "pip").mkdir(parents=True)
    (empty / "pip" / "__init__.py").touch()
    (empty / "pip" / "__main__.py").write_text(
        "import pathlib, sys; pathlib.Path('asked').write_text(str(sys.argv[1:]))"
    )
    where = "import course_utils, adapter_checks; print(course_utils.__file__, adapter_checks.__file__)"
    cell = online.FIRST_CELL.format(address=origin.as_uri())
    (empty / "cells.ipy").write_text("\n".join([cell, cell, where, f"!{sys.executable} -c '{where}'"]))
    environment = {**os.environ, "PYTHONPATH": str(empty), "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "cells.ipy"], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Error" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert sorted(path.name for path in empty.iterdir()) == ["cells.ipy", "course", "pip"], "fetched once"
    assert "transformers==" in (empty / "course" / "notebooks" / "asked").read_text()
    assert done.stdout.count(str(empty / "course" / "course_utils")) == 2, "here, and in what a lesson starts"
    assert done.stdout.count(str(empty / "course" / "adapter_checks" / "src")) == 2


# README


def test_readme_has_a_place_for_the_links_and_they_open_the_first_lesson(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(online.BEGIN) == readme.count(online.END) == 1
    (tmp_path / "README.md").write_text(f"# A\n\n{online.BEGIN}\n{online.END}\n\ntext\n")
    (tmp_path / "notebooks").mkdir()
    for name in ("01_first.ipynb", "02_second.ipynb"):
        (tmp_path / "notebooks" / name).touch()
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/course")
    for _ in range(2):
        assert online.main(["readme"], tmp_path) == 0
        written = (tmp_path / "README.md").read_text()
        assert written.startswith(f"# A\n\n{online.BEGIN}\n[Open in Colab](") and written.endswith(
            f"{online.END}\n\ntext\n"
        )
        assert written.count("01_first.ipynb") == 2 and "02_second" not in written


@pytest.mark.parametrize("wrong", ["", "course", "https://github.com/someone/course", "a/b/c"])
def test_a_wrong_repository_is_said(monkeypatch, wrong):
    monkeypatch.setenv("GITHUB_REPOSITORY", wrong)
    assert "GITHUB_REPOSITORY=owner/name" in online.main(["readme"])


# Binder and Codespaces


def test_binder_and_codespaces_run_what_is_there():
    post_build = ROOT / ".binder" / "postBuild"
    assert os.access(post_build, os.X_OK)
    assert post_build.read_text().splitlines()[-2:] == ["python tools/install.py", "python -m tools.lab"]
    assert re.fullmatch(r"python-3\.\d+\n", (ROOT / ".binder" / "runtime.txt").read_text())
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["postCreateCommand"].startswith("make setup && ")


# Which build of PyTorch


@pytest.mark.parametrize(
    ("system", "driver", "settings", "installed", "wanted"),
    [
        ("linux", False, [], False, True),
        ("linux", False, ["global.timeout='60'", ":env:.extra-index-url=''"], False, True),
        ("linux", True, [], False, False),
        ("darwin", False, [], False, False),
        ("win32", False, [], False, False),
        ("linux", False, [], True, False),
        ("linux", False, ["global.index-url='https://mirror.example/simple'"], False, False),
        ("linux", False, [":env:.find-links='/wheels'"], False, False),
    ],
)
def test_the_cpu_build_is_for_linux_without_a_driver(system, driver, settings, installed, wanted):
    chosen, why = install.cpu_build_wanted(system, driver, settings, installed)
    assert chosen == wanted and why.endswith(".")


@pytest.fixture
def commands(monkeypatch):
    """What install runs, and a dict with the exit status of each that fails, by a word of it."""
    ran, failing = [], {}

    def run(command, **options):
        ran.append(" ".join(map(str, command[1:])).replace(sys.executable, "python").replace(str(ROOT) + os.sep, ""))
        status = next((status for word, status in failing.items() if word in ran[-1]), 0)
        return subprocess.CompletedProcess(command, status, stdout="", stderr="")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    if os.path.exists("/proc/driver/nvidia/version"):
        pytest.skip("this machine has an NVIDIA driver")
    return ran, failing


PIP = "-m pip --disable-pip-version-check"
REST = [f"{PIP} install -r requirements.txt", f"{PIP} install --no-deps -r requirements-beyond-text.txt"]


def test_uv_finds_the_cpu_build_and_pip_installs_the_rest(commands, capfd):
    ran, _ = commands
    assert install.main() == 0
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
    assert ran == [
        f"{PIP} config list",
        f"{PIP} install -c constraints.txt uv",
        f"-m uv pip install --python python --torch-backend=cpu --no-deps {torch}",
        *REST,
    ]
    assert capfd.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("broken", ["install -c constraints.txt uv", "--torch-backend=cpu"])
def test_without_the_cpu_build_the_default_follows_and_it_is_said(commands, capfd, broken):
    ran, failing = commands
    failing[broken] = 2
    assert install.main() == 0 and ran[-2:] == REST
    assert "The CPU build could not be had; the default one follows" in capfd.readouterr().out


@pytest.mark.parametrize("step", REST)
def test_a_failed_step_is_a_failure_and_the_last_one(commands, step):
    ran, failing = commands
    failing[step.partition("install ")[2]] = 3
    assert install.main() == 3 and ran[-1] == step


def test_uv_knows_the_cpu_build():
    said = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "--help"], capture_output=True, text=True
    ).stdout
    assert "--torch-backend" in said and "auto, cpu," in " ".join(said.split())
