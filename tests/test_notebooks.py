"""The form of the committed notebooks, and of the checks of their notebook_lint."""

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import build, notebook_lint
from tools.editions import COVER, FOLDED, NOTEBOOK_METADATA

NOTEBOOKS = sorted((build.ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((build.ROOT / "solutions").glob("*.ipynb"))


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_there_is_a_lesson_in_both_editions():
    assert NOTEBOOKS and [path.name for path in NOTEBOOKS] == [path.name for path in SOLUTIONS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_learners_edition_is_well_formed(path):
    assert notebook_lint.complaints(read(path), path, executed=True) == []


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_the_solved_edition_is_well_formed(path):
    assert notebook_lint.complaints(read(path), path, executed=False) == []


def test_the_metadata_is_what_jupyterlab_learns_from_the_installed_kernel():
    """JupyterLab writes what the kernel reports into each notebook that it opens, and saves it if that was a change."""
    from ipykernel.ipkernel import IPythonKernel
    from ipykernel.kernelspec import get_kernel_dict

    kernel = get_kernel_dict()
    assert NOTEBOOK_METADATA["language_info"] == IPythonKernel.language_info
    assert NOTEBOOK_METADATA["kernelspec"] == {
        "display_name": kernel["display_name"],
        "language": kernel["language"],
        "name": "python3",
    }


def prose():
    """The project's Markdown pages."""
    hidden = (".venv", "runs", "node_modules")
    return [
        path
        for path in sorted(build.ROOT.rglob("*.md"))
        if not any(part in hidden or part.startswith(".") for part in path.relative_to(build.ROOT).parts)
    ]


def test_every_link_and_image_of_the_pages_holds():
    assert prose()
    for path in prose():
        text = path.read_text(encoding="utf-8")
        assert notebook_lint.broken_links(text, path.parent) == [], path.name
        assert notebook_lint.missing_alt(text) == [], path.name


# Each check finds its planted fault, and nothing else in a sound notebook


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a picture.svg").write_text("<svg/>")
    path = tmp_path / "lesson.ipynb"
    path.write_text("{}")
    return path


@pytest.fixture
def sound():
    """A notebook with every kind of thing that is allowed."""
    image = '<img alt="A line that falls" src="data:image/png;base64,/home/aaaa">'
    outputs = [
        new_output("stream", name="stdout", text="see runs/progress.json and https://a.example/home/x\n"),
        new_output("display_data", data={"text/html": image, "text/plain": "A line that falls", "image/png": "aaaa"}),
    ]
    answer = [copy.deepcopy(COVER), new_output("stream", text="2\n")]
    cells = [
        new_markdown_cell(
            "# Title\n![A picture](<a picture.svg>) ![Again](a%20picture.svg) [page](https://a.example) [up](#title) `![](x)`",
            id="title",
        ),
        new_code_cell("print(1)", id="title-1", execution_count=1, outputs=outputs, metadata={"tags": ["measured"]}),
        new_code_cell("x = f'{{1}}'", id="title-2", execution_count=2),
        new_markdown_cell("**Predict:** how many?", id="title-3"),
        new_code_cell("2", id="title-4", execution_count=3, outputs=answer, metadata=copy.deepcopy(FOLDED)),
    ]
    return new_notebook(cells=cells, metadata=copy.deepcopy(NOTEBOOK_METADATA))


def test_a_sound_notebook_has_no_complaint(sound, path):
    nbformat.validate(sound)
    assert notebook_lint.complaints(sound, path, executed=True) == []
    for cell in build.code_cells(sound):
        cell.outputs, cell.execution_count = [], None
        for name in FOLDED:
            cell.metadata.pop(name, None)
    assert notebook_lint.complaints(sound, path, executed=False) == []


def output(**data):
    def plant(notebook):
        notebook.cells[1].outputs.append(new_output("display_data", data=data))

    return plant


def stream(text, name="stdout"):
    def plant(notebook):
        notebook.cells[1].outputs.append(new_output("stream", name=name, text=text))

    return plant


def text(source):
    def plant(notebook):
        notebook.cells[0].source += source

    return plant


def change(number, **values):
    def plant(notebook):
        notebook.cells[number].update(values)

    return plant


def failed(notebook):
    notebook.cells[1].outputs.append(new_output("error", ename="E", evalue="e", traceback=[]))


def plain_kernel(notebook):
    notebook.metadata["kernelspec"]["display_name"] = "Python 3"


def unfolded(notebook):
    notebook.cells[4].metadata.clear()


def uncovered(notebook):
    del notebook.cells[4].outputs[0]


def folded(notebook):
    notebook.cells[1].metadata |= copy.deepcopy(FOLDED)


def time_stamps(notebook):
    notebook.cells[1].metadata["execution"] = {"iopub.execute_input": "2025-01-01"}


FAULTS = {
    "not run": (change(2, execution_count=None), "run counts are [1, None, 3], not 1 to 3"),
    "run twice": (change(2, execution_count=7), "run counts are [1, 7, 3], not 1 to 3"),
    "out of order": (change(1, execution_count=4), "run counts are [4, 2, 3], not 1 to 3"),
    "stderr": (stream("warning", "stderr"), "title-1 has text on stderr"),
    "error": (failed, "title-1 has an error"),
    "widget": (output(**{"application/vnd.jupyter.widget-view+json": {}}), "title-1 shows a widget"),
    "time stamps": (time_stamps, "title-1 holds time stamps"),
    "another kernel": (plain_kernel, "the notebook's metadata is not that which JupyterLab writes"),
    "answer in sight": (unfolded, "title-4 should have its outputs folded"),
    "answer as the fold's title": (uncovered, "title-4 should have its outputs folded"),
    "folded without a prediction": (folded, "title-1 should not have its outputs folded"),
    "same id": (change(2, id="title-1"), "the id 'title-1' occurs twice"),
    "chance id": (change(2, id="1f0c9a3e"), "the id '1f0c9a3e' is not derived from a name"),
    "chance uuid": (change(2, id="1f0c9a3e-aa11"), "the id '1f0c9a3e-aa11' is not derived from a name"),
    "bare image": (output(**{"image/png": "aaaa"}), "title-1: an image output without alt text"),
    "no alt": (output(**{"text/html": '<img src="data:image/png;base64,a">'}), "title-1: an <img> has no alt text"),
    "blank alt": (output(**{"text/html": '<img alt=" " src="data:,a">'}), "title-1: an <img> has no alt text"),
    "no alt in text": (text("![](a%20picture.svg)"), "title: the image a%20picture.svg has no alt text"),
    "broken link": (text("[x](gone.md#there)"), "title: the link gone.md#there leads nowhere"),
    "broken image": (text('<img alt="a" src="gone.png">'), "title: the link gone.png leads nowhere"),
    "broken reference": (text("\n[x]: gone.md"), "title: the link gone.md leads nowhere"),
    "broken link shown": (output(**{"text/html": '<a href="gone">x</a>'}), "title-1: the link gone leads nowhere"),
    "long line": (change(2, source="x = " + "1" * 97), "title-2 has a line of 101 characters"),
    "path": (stream("saved to /home/someone/runs\n"), "title-1 shows the path /home/someone/runs"),
    "path in quotes": (output(**{"text/plain": "'/tmp/x'"}), "title-1 shows the path /tmp/x'"),
    "path of Windows": (stream("C:\\Users\\someone"), "title-1 shows the path C:\\Users\\someone"),
    "address": (output(**{"text/plain": "<A at 0x7f00aa11bb>"}), "title-1 shows a memory address"),
    "placeholder": (text("{{minutes}}"), "title still holds {{minutes}}"),
    "placeholder with a format": (text("{{a[1]:.0%}}"), "title still holds {{a[1]:.0%}}"),
    "marker": (change(2, source="### BEGIN SOLUTION"), "title-2 still holds ### BEGIN SOLUTION"),
}


@pytest.mark.parametrize("plant, complaint", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(sound, path, plant, complaint):
    plant(sound)
    assert notebook_lint.complaints(sound, path, executed=True) == [complaint]


def test_widget_state_is_found(sound, path):
    sound.metadata["widgets"] = {}
    assert "the notebook holds widget state" in notebook_lint.complaints(sound, path, executed=True)


def test_outputs_in_the_solved_edition_are_found(sound, path):
    assert notebook_lint.complaints(sound, path, executed=False) == [
        f"title-{number} has outputs" for number in (1, 2, 4)
    ]


def test_a_large_file_is_found(sound, path):
    path.write_text("x" * notebook_lint.LARGEST)
    assert notebook_lint.complaints(sound, path, executed=True) == [
        "the file has 1,000,000 bytes, not less than 1,000,000"
    ]
