"""Build the notebooks from lessons/*.py, the only source.

    make notebooks              both editions of every lesson (ONLY=01 for one)
    make classroom              the instructor's edition, for nbgrader

The learner's edition is run top to bottom, unsolved, and saved with its outputs; the
solved one is saved without. Nothing is replaced before the whole lesson ran. The time
and memory of each run are kept in lessons/measured.json, and shown in the lesson's
header and in README.md.

A lesson is not run again when the learner's code cells are those of the stored edition,
and the models, data, libraries and the results that it names are those of its last run:
then the outputs are kept. So a changed sentence, solution or hidden test takes seconds. A change
in `course_utils` is not noticed: FORCE=1 runs the lesson whatever has changed.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import nbformat

from course_utils import paths
from course_utils.files import write_text
from tools import claims, editions, notebook_lint
from tools.editions import BuildError
from tools.execute import execute

ROOT = paths.project_root()
TABLE_BEGIN, TABLE_END = "<!-- lessons:begin -->", "<!-- lessons:end -->"
NOTICEABLE = 0.3  # A measurement is recorded when it moved by more than this fraction.
INPUTS = ("models/base", "models/adapters")  # What all outputs depend on, beside code and libraries.
UNMEASURED = {"minutes": 1, "seconds": 0, "peak_gb": 0, "cores": 0}  # Stands in until a lesson has run once.


def sources(root, only=""):
    """Return the lessons' source files in order, those whose name begins with `only`.

    Raises `BuildError` when there is none.
    """
    found = sorted(Path(root, "lessons").glob(f"{only}*.py"))
    if not found:
        raise BuildError(f"There is no lesson lessons/{only}*.py.")
    return found


def read_lesson(path):
    """Return the parsed lesson at `path`."""
    return editions.parse(path.read_text(encoding="utf-8"), path.name)


def read_record(root):
    """Return lessons/measured.json: {lesson: {minutes, seconds, peak_gb, cpu, cores}}."""
    path = Path(root, "lessons", "measured.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def updated(old, new):
    """Return the entry to keep: `old`, unless there is none or `new` differs noticeably."""

    def moved(name):
        return abs(new[name] - old[name]) > NOTICEABLE * old[name]

    names = [name for name in ("seconds", "peak_gb", "first_text_s") if name in new]
    if old and all(name in old for name in names) and not any(moved(name) for name in names):
        return old
    return {"minutes": max(1, round(new["seconds"] / 60)), **new}


def filled(path, record):
    """Return the parsed lesson at `path`, its claims tried and its texts filled in, also from the record of its runs."""
    values = dict(record.get(path.stem, UNMEASURED))
    values["time"] = f"{values['minutes']} minute{'' if values['minutes'] == 1 else 's'}"
    return claims.fill(read_lesson(path), values, path.name)


def inputs(root, text):
    """Return a digest of what the outputs of the lesson with this source depend on, beside the code: files, and libraries.

    Of tasks, sweeps' results and models beside base and adapters only those count that the lesson names.
    """
    requirements = "\n".join(file.read_text(encoding="utf-8") for file in sorted(Path(root).glob("requirements*.txt")))
    libraries = re.findall(r"^(\S+==\S+) +# (?:all )?lessons?\b", requirements, flags=re.MULTILINE)
    digest = hashlib.sha256(" ".join(libraries).encode())
    made = [*Path(root, "models").glob("*"), *Path(root, "data").glob("*")]
    named = [path for path in made if re.search(rf"\b{re.escape(path.stem)}\b", text)]
    named += [path for path in Path(root, "experiments", "results").glob("*") if f'"{path.stem}"' in text]
    for path in sorted({*(Path(root, name) for name in INPUTS), *named}):
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix != ".md":
                digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def code_cells(notebook):
    """Return the notebook's code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_outputs(notebook, path):
    """Return the notebook stored at `path` if it holds outputs of the same code as that of `notebook`, else None.

    A cell's id changes with the heading above it, and no output with the id.
    """
    if not path.exists():
        return None
    stored = nbformat.read(path, as_version=4)
    same = [cell.source for cell in code_cells(stored)] == [cell.source for cell in code_cells(notebook)]
    return stored if same and all(cell.execution_count for cell in code_cells(stored)) else None


def build(path, root, force=False):
    """Save both editions of the lesson at `path`, run again if need be; return what is wrong with their form."""
    root = Path(root)
    record, now = read_record(root), inputs(root, path.read_text(encoding="utf-8"))
    notebook = editions.learner(filled(path, record))  # A claim that does not hold is found before a long run.
    unchanged = not force and record.get(path.stem, {}).get("inputs") == now
    if stored := unchanged and with_outputs(notebook, root / "notebooks" / f"{path.stem}.ipynb"):
        notebook = stored
        print(f"{path.stem}: outputs kept, as no code cell has changed")
    else:
        folder = root / "notebooks"
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as runs:
            measured = execute(notebook, folder, runs)
        record[path.stem] = {**updated(record.get(path.stem), measured), "inputs": now}
        print(f"{path.stem}: {measured['seconds']} s, {measured['peak_gb']} GB")
    lesson = filled(path, record)
    learner, solved = editions.learner(lesson), editions.solved(lesson)
    for cell, run in zip(code_cells(learner), code_cells(notebook), strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
    editions.fold_answers(learner)
    found = []
    for name, edition in (("notebooks", learner), ("solutions", solved)):
        edition.metadata = notebook.metadata
        target = root / name / f"{path.stem}.ipynb"
        save_notebook(target, edition)
        complaints = notebook_lint.complaints(edition, target, name == "notebooks")
        found += [f"{name}: {complaint}" for complaint in complaints]
    # Last, as it says which inputs the saved outputs are of.
    write_text(root / "lessons" / "measured.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    return found


def build_classroom(path, root, source=None):
    """Save the instructor's edition where nbgrader looks for an assignment's source: in `source`, a folder."""
    notebook = editions.staging(filled(path, read_record(root)))
    source = Path(source or Path(root, "classroom", "staging", "source"))
    save_notebook(source / path.stem / f"{path.stem}.ipynb", notebook)


def table(root):
    """Return README's table of lessons as Markdown."""
    record = read_record(root)
    lines = ["| Lesson | Time | Peak memory |", "| --- | --- | --- |"]
    for path in sources(root):
        entry = record.get(path.stem)
        cost = f"{entry['minutes']} min | {entry['peak_gb']:.1f} GB" if entry else "not measured | not measured"
        notebook = f"notebooks/{path.stem}.ipynb"
        target = notebook if Path(root, notebook).exists() else f"lessons/{path.name}"
        lines.append(f"| [{editions.label(path.stem)} {editions.title(read_lesson(path))}]({target}) | {cost} |")
    return "\n".join(lines)


def with_table(readme, text):
    """Return the README's text with `text` between the two markers. Raises `BuildError` without them."""
    if readme.count(TABLE_BEGIN) != 1 or readme.count(TABLE_END) != 1:
        raise BuildError(f"README.md needs the lines {TABLE_BEGIN} and {TABLE_END}, once each.")
    before, rest = readme.split(TABLE_BEGIN)
    return f"{before}{TABLE_BEGIN}\n{text}\n{TABLE_END}{rest.split(TABLE_END)[1]}"


def save_notebook(path, notebook):
    """Check the notebook against the format and save it in one step."""
    nbformat.validate(notebook)
    write_text(path, nbformat.writes(notebook, version=4) + "\n")


def main(arguments=None, root=ROOT):
    """Build what the command line asks for. Returns an exit status or a sentence for stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("edition", choices=["notebooks", "classroom"])
    parser.add_argument("only", nargs="?", default="", help="the beginning of a lesson's name, such as 01")
    parser.add_argument("--force", action="store_true", help="run lessons whose code has not changed, too")
    chosen = parser.parse_args(arguments)
    found = []
    try:
        for path in sources(root, chosen.only):
            if chosen.edition == "classroom":
                build_classroom(path, root)
            else:
                found += [f"{path.stem}, {complaint}" for complaint in build(path, root, chosen.force)]
        if chosen.edition == "notebooks":
            readme = Path(root, "README.md")
            write_text(readme, with_table(readme.read_text(encoding="utf-8"), table(root)))
    except (BuildError, OSError) as error:
        return str(error)
    return "\n".join(found) or 0


if __name__ == "__main__":
    sys.exit(main())
