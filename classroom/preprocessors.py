"""nbgrader preprocessors of this course: the stub, and what keeps one learner's mishap from costing points in silence.

What they find is kept in the graded notebook, under `metadata.classroom.notes`.
"""

import copy
import json
from pathlib import Path

import nbformat
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from traitlets import Dict, Unicode

from tools import editions


class Stub(NbGraderPreprocessor):
    """Put the course's own stub for each solution, in place of nbgrader's `raise NotImplementedError()`."""

    def preprocess_cell(self, cell, resources, index):
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = editions.stubbed(cell.source, cell.metadata.nbgrader.grade_id)
        return cell, resources


class MakeWhole(NbGraderPreprocessor):
    """Give a submission its answer and test cells back, as they were released, and note what was amiss.

    Answer cells are known by nbgrader's metadata or, where that was stripped, by the cell's id, which JupyterLab
    keeps; so a plain notebook of `notebooks/` can be graded, too. nbgrader's own `OverwriteCells.add_missing_cells`
    fails when the answer cell is missing as well.
    """

    def preprocess(self, nb, resources):
        directory = self.parent.parent.coursedir  # this, the exporter, Autograde, its folders
        names = resources["nbgrader"]
        folder = Path(directory.format_path(directory.release_directory, ".", names["assignment"]))
        released = nbformat.read(folder / f"{names['notebook']}.ipynb", as_version=4)
        nb, notes = whole(nb, released)
        nb.metadata["classroom"] = {"notes": notes}
        return nb, resources


def whole(submitted, released):
    """Return a copy of the notebook `submitted` with every test of `released`, and sentences on what was amiss.

    A marked cell keeps the learner's source if it is an answer, and loses it if it is a test; its metadata are the
    released ones, whatever the learner's said. A missing test is put where it stood, by the released cells around it.
    A missing answer is not: its stub would undo an answer that the learner wrote elsewhere.
    """
    submitted, notes = copy.deepcopy(submitted), []
    cells = submitted.cells
    _give_ids(submitted)
    marked = {cell.metadata.nbgrader.grade_id: cell for cell in released.cells if "nbgrader" in cell.metadata}
    found = _find(cells, marked)
    unmarked = all(by_id for _, by_id in found.values())  # A plain notebook of the course, or stripped on its way.
    if not found:
        notes.append("The notebook came without grading marks and cell ids; the tests were run at its end.")
    elif unmarked:
        notes.append("The notebook came without grading marks; its answers were known by their cell ids.")
    changed = {name for name, (cell, _) in found.items() if _marks(cell) != _marks(marked[name])}
    for cell in cells:
        cell.metadata.pop("nbgrader", None)
    for name, original in marked.items():
        is_test, exercise = original.metadata.nbgrader.grade, original.metadata.exercise
        what = "test" if is_test else "answer"
        if name not in found:
            if is_test:
                cells.insert(_place(cells, released, original), copy.deepcopy(original))
            if found and not (is_test and unmarked):
                notes.append(f"{exercise}: the {what} cell is missing{'; it was put back' if is_test else ''}.")
            continue
        cell, _ = found[name]
        cell.metadata = copy.deepcopy(original.metadata)
        if name in changed and not unmarked:
            notes.append(f"{exercise}: the grading marks of the {what} cell were changed; the original ones were used.")
        if cell.cell_type != original.cell_type:
            notes.append(f"{exercise}: the {what} cell was turned into {cell.cell_type}; it was turned back.")
            source = cell.source
            cell.clear()
            cell.update(copy.deepcopy(original), source=source)
        if is_test and cell.source.strip() != original.source.strip():
            notes.append(f"{exercise}: the test cell was changed; the original was used.")
            cell.source = original.source
    return submitted, notes


def _marks(cell):
    """What of a cell's metadata decides about points; a tag can keep a cell from being run."""
    marks = cell.metadata.get("nbgrader")
    marks = marks if isinstance(marks, dict) else {}
    return [marks.get(name) for name in ("grade", "solution", "locked", "points")], cell.metadata.get("tags")


def _give_ids(notebook):
    """Notebooks of before format 4.5 have no cell ids; the same notebook must get the same ones each time."""
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    used = set()
    for number, cell in enumerate(notebook.cells):
        if cell.get("id") in used or "id" not in cell:
            cell["id"] = f"cell-{number}"
        used.add(cell["id"])


def _find(cells, marked):
    """Return {grade_id: (cell, whether only its id told)}; of copies of a cell the last counts, as in nbgrader."""
    ids = {cell.id: name for name, cell in marked.items()}
    found = {}
    for cell in cells:
        marks = cell.metadata.get("nbgrader")
        name = marks.get("grade_id") if isinstance(marks, dict) else None
        if isinstance(name, str) and name in marked:
            found[name] = (cell, False)
    taken = [id(cell) for cell, _ in found.values()]
    for cell in cells:
        name = ids.get(cell.id)
        if name and name not in found and id(cell) not in taken:
            found[name] = (cell, True)
    return found


def _place(cells, released, missing):
    """Return the index at which `missing` belongs: before the next released cell that is still there, or the end."""
    order = [cell.id for cell in released.cells]
    here = {cell.id: index for index, cell in reversed(list(enumerate(cells)))}
    later = order[order.index(missing.id) + 1 :]
    return next((here[identity] for identity in later if identity in here), len(cells))


class ExecuteTraced(Execute):
    """nbgrader's Execute, which also writes down which cell is running, and leaves out cells that brought it down."""

    trace = Unicode("", help="file that holds the id of the cell now running").tag(config=True)
    blocked = Dict(help="{cell id: why it is not to be run again}").tag(config=True)

    def preprocess_cell(self, cell, resources, index):
        if cell.id in self.blocked:
            reason = self.blocked[cell.id]
            cell.outputs = [nbformat.v4.new_output("error", ename="Stopped", evalue=reason, traceback=[reason])]
            return cell, resources
        if self.trace:
            Path(self.trace).write_text(json.dumps(cell.id), encoding="utf-8")
        return super().preprocess_cell(cell, resources, index)


class ForgiveStderr(NbGraderPreprocessor):
    """Show as stdout, and note, what a test wrote to stderr: nbgrader gives 0 for it, be the answer right or wrong."""

    def preprocess(self, nb, resources):
        for cell in nb.cells:
            if not cell.metadata.get("nbgrader", {}).get("grade"):
                continue
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stderr":
                    output.name = "stdout"
                    note = (
                        f"{cell.metadata.exercise}: the answer writes to stderr when tested; no point is lost for that."
                    )
                    if note not in nb.metadata.classroom.notes:
                        nb.metadata.classroom.notes.append(note)
        return nb, resources
