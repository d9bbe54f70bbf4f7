"""No lesson outgrows a reader's evening or a laptop: words, cells, predictions, time and memory of the learner's edition."""

import json
import re

import nbformat
import pytest

from tools import build

LESSONS = sorted((build.ROOT / "notebooks").glob("*.ipynb"))
MEASURED = json.loads((build.ROOT / "lessons" / "measured.json").read_text(encoding="utf-8"))


def prose(notebook):
    """The running text: no exercise's text, no quiz, no fold, no table, no picture, no address of a link."""
    texts = []
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None]):
        if cell.cell_type == "markdown" and not (following and following.id.startswith("exercise-")):
            text = cell.source.partition("## Quiz")[0]
            for left_out in (r"<details>.*?</details>", r"^\|.*?$", r"!\[[^\]]*\]\([^)]*\)", r"(?<=\])\([^)]*\)"):
                text = re.sub(left_out, "", text, flags=re.DOTALL | re.MULTILINE)
            texts.append(text)
    return "\n\n".join(texts)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_keeps_its_limits(path):
    notebook, deep = nbformat.read(path, as_version=4), path.stem.startswith("deep_")
    words, predictions = len(prose(notebook).split()), prose(notebook).count("**Predict:**")
    assert 500 < words <= 2500, f"{words} words of running text"
    assert len(notebook.cells) <= 70
    assert (3 if deep else 6) <= predictions <= 10, f"{predictions} predictions"
    run = MEASURED[path.stem]
    assert run["seconds"] <= 180 and run["peak_gb"] <= 3, run


def test_only_running_text_counts():
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# One [two](three four)\n\n| five | six |\n\n![seven](eight.png) nine\n"),
        new.new_markdown_cell("ten\n<details><summary>eleven</summary>\ntwelve\n</details>\n\n## Quiz\nthirteen"),
        new.new_markdown_cell("### Exercise: fourteen"),
        new.new_code_cell("fifteen", id="exercise-01-a"),
    ]
    assert prose(new.new_notebook(cells=cells)).split() == ["#", "One", "[two]", "nine", "ten"]
