"""Is this machine ready for the course?

    python -m course_utils.environment

says so in one line, or says in a line each what is missing and what to do, with exit status 1.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator

from adapter_checks.errors import InputError
from course_utils import paths, runtime

NEEDED_DISK = 2e9  # bytes: checkpoints of a lesson, and the data cache
NEEDED_MEMORY = 3e9  # bytes: the largest lesson's peak


def problems() -> list[str]:
    """A sentence for each thing that stands in a lesson's way, with what to do about it."""
    return [*_packages(), *_disk(), *_memory(), *_model()]


def _packages() -> Iterator[str]:
    from packaging.requirements import Requirement

    found = []
    for name, option in (("requirements.txt", ""), ("requirements-beyond-text.txt", "--no-deps ")):
        lines = (paths.project_root() / name).read_text(encoding="utf-8").splitlines()
        stripped = [line.split("#")[0].strip() for line in lines]
        found += [(Requirement(line), f"{option}-r {name}") for line in stripped if line and not line.startswith("-")]
    for requirement, file in found:
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        # A build's own tag, as in 2.13.0+cpu, is no other version to a specifier.
        if installed == "missing" or not requirement.specifier.contains(installed, prereleases=True):
            yield (
                f"{requirement.name} is {installed}, and the course is written for {requirement.specifier or 'any'}. "
                f"Run `make setup`, or `pip install {file}`."
            )


def _disk() -> Iterator[str]:
    try:
        folder = paths.runs_dir()
    except InputError as error:
        yield str(error)
        return
    free = shutil.disk_usage(folder).free
    if free < NEEDED_DISK:
        yield (
            f"There are {free / 1e9:.1f} GB free for results in {folder}, and a lesson may need {NEEDED_DISK / 1e9:.0f}. "
            "Make room, or set COURSE_RUNS to a folder on another disk."
        )


def _memory() -> Iterator[str]:
    try:
        import psutil
    except ImportError:  # reported among the packages
        return
    available = psutil.virtual_memory().available
    if available < NEEDED_MEMORY:
        yield (
            f"There are {available / 1e9:.1f} GB of memory available, and a lesson may need {NEEDED_MEMORY / 1e9:.0f}. "
            "Close other programs or notebooks."
        )


def _model() -> Iterator[str]:
    try:
        paths.base_model()
    except InputError as error:
        yield str(error)


def main() -> int:
    """Print the report; the exit status is 1 if there is a problem."""
    found = problems()
    for problem in found:
        print(f"[FAIL] {problem}")
    if not found:
        print(f"[OK]   Ready: Python {sys.version.split()[0]}, {runtime.processor()}, base model {paths.base_model()}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
