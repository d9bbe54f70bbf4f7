"""Stage the lessons as nbgrader's assignments, and pack what learners get."""

import re
import zipfile
from pathlib import Path

import nbformat
from nbgrader.converters import GenerateAssignment
from nbgrader.utils import capture_log

from adapter_checks.errors import InputError
from tools import build, editions

HERE = Path(__file__).resolve().parent
# What a learner needs. Not in it: lessons/, solutions/, tests/ and docs/template/, which hold answers.
HANDED_OUT = (
    "course_utils",
    "adapter_checks/README.md",
    "adapter_checks/pyproject.toml",
    "adapter_checks/src",
    "models",
    "data",
    "experiments/results",
    "images",
    "docs/*.md",
    "tools/check_python.py",
    "tools/install.py",
    "tools/lab.py",
    "Makefile",
    "pyproject.toml",
    "requirements.txt",
    "requirements-beyond-text.txt",
    "constraints.txt",
    "LICENSE",
)


def stage(course, root=build.ROOT, only=""):
    """Stage the lessons of the checkout `root` whose name begins with `only`, and pack the hand-out; return its path.

    Raises `InputError` with nbgrader's own words where it refuses, and `BuildError` for a faulty lesson.
    """
    for path in build.sources(root, only):
        build.build_classroom(path, root, course.root / "source")
        generate = GenerateAssignment(coursedir=course.directory(path.stem), config=course.config())
        generate.force = True
        result = capture_log(generate)
        if not result["success"]:
            raise InputError(f"nbgrader could not stage {path.stem}:\n{result.get('log', result['error'])}")
    return pack(course, root)


def pack(course, root=build.ROOT):
    """Write the hand-out of all staged lessons, a zip, and return its path. It holds no solution and no hidden test."""
    target = course.root / "handout" / "lora-course.zip"
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(HERE / "handout.md", "lora-course/README.md")
        for path in _files(root):
            archive.write(path, f"lora-course/{path.relative_to(root).as_posix()}")
        for lesson in course.lessons():
            notebook = nbformat.read(course.notebook("release", lesson), as_version=4)
            _with_outputs(notebook, Path(root, "notebooks", f"{lesson}.ipynb"))
            archive.writestr(f"lora-course/notebooks/{lesson}.ipynb", nbformat.writes(notebook, version=4) + "\n")
    return target


def _files(root):
    for path in (path for name in HANDED_OUT for path in sorted(Path(root).glob(name))):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (
            file for file in found if file.is_file() and not re.search(r"__pycache__|\.egg-info$", file.parent.name)
        )


def _with_outputs(notebook, built):
    """Give the released notebook the outputs of the built one: in a lesson they are what to expect."""
    if not built.exists():
        return
    outputs = {cell.id: cell for cell in nbformat.read(built, as_version=4).cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        twin = outputs.get(cell.id)
        if twin and twin.source == cell.source:
            cell.outputs, cell.execution_count = twin.outputs, twin.execution_count
    editions.fold_answers(notebook)
