"""work/, where learners work: what is copied, what is replaced, and that nothing that a learner wrote is ever lost."""

import json
import subprocess
import sys

import nbformat
import pytest

from tools import lab, notebook_lint
from tools.build import ROOT


def notebook(*sources, output=None, **metadata):
    outputs = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
    cells = [{"cell_type": "code", "source": source, "outputs": outputs, "metadata": metadata} for source in sources]
    return json.dumps({"cells": cells, "metadata": metadata})


@pytest.fixture
def course(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("01_apples", "02_pears"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(notebook("print(1)", output="1"))
    return tmp_path


def edition(course, text):
    (course / "notebooks" / "01_apples.ipynb").write_text(text)


def copies(course):
    """{name: text} of the notebooks in work/."""
    return {path.name: path.read_text() for path in (course / "work").glob("*.ipynb")}


MINE = notebook("print('mine')", output="mine")
NEW, NEWER = notebook("print(2)", output="2"), notebook("print(3)", output="3")


def test_what_is_missing_is_copied_and_nothing_is_said(course):
    assert lab.refresh(course) == []
    assert copies(course) == {path.name: path.read_text() for path in (course / "notebooks").glob("*.ipynb")}
    (course / "work" / "02_pears.ipynb").unlink()
    assert lab.refresh(course) == [] and len(copies(course)) == 2


def test_a_copy_in_which_nothing_was_written_is_replaced_without_a_word(course):
    lab.refresh(course)
    copy = course / "work" / "01_apples.ipynb"
    # What JupyterLab changes when it is opened, or an output unfolded, is not written by the learner.
    copy.write_text(notebook("print(1)", output="1", language_info={"version": "3.99"}))
    edition(course, NEW)
    assert lab.refresh(course) == [] and copies(course)["01_apples.ipynb"] == NEW
    unchanged = copy.stat().st_mtime_ns
    assert lab.refresh(course) == [] and copy.stat().st_mtime_ns == unchanged


@pytest.mark.parametrize("written", [MINE, notebook("print(1)", output="my run"), "{ cut off", ""])
def test_what_a_learner_wrote_stays_and_the_newer_edition_is_told(course, written):
    lab.refresh(course)
    copy = course / "work" / "01_apples.ipynb"
    copy.write_text(written)
    assert lab.refresh(course) == [] and copy.read_text() == written, "there is no newer edition"
    edition(course, NEW)
    for _ in range(2):
        (said,) = lab.refresh(course)
        assert said.startswith("There is a newer edition of 01_apples. ") and "make lab UPDATE=01" in said
        assert copy.read_text() == written


def test_an_update_takes_the_new_edition_and_keeps_the_old_copies(course):
    lab.refresh(course)
    for number, new in enumerate((NEW, NEWER)):
        (course / "work" / "01_apples.ipynb").write_text(MINE + " " * number)
        edition(course, new)
        assert lab.refresh(course, "02")[0].startswith("There is a newer edition of 01_apples.")
        assert "yours is kept as 01_apples (yours" in lab.refresh(course, "01")[0]
        assert lab.refresh(course) == []
    kept = copies(course)
    assert kept.pop("02_pears.ipynb") and kept == {
        "01_apples.ipynb": NEWER,
        "01_apples (yours).ipynb": MINE,
        "01_apples (yours 2).ipynb": MINE + " ",
    }


@pytest.mark.parametrize("record", [None, "{ cut off"])
def test_without_a_record_every_copy_that_differs_is_the_learners(course, record):
    lab.refresh(course)
    (course / "work" / "01_apples.ipynb").write_text(MINE)
    (course / "work" / lab.RECORD).unlink()
    if record:
        (course / "work" / lab.RECORD).write_text(record)
    assert lab.refresh(course)[0].startswith("There is a newer edition of 01_apples.")
    assert copies(course)["01_apples.ipynb"] == MINE


def test_a_full_disk_leaves_the_copy_whole(course, monkeypatch):
    lab.refresh(course)
    before = copies(course)

    def full(source, target):
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lab.shutil, "copyfile", full)
    edition(course, NEW)
    assert "No space left on device" in lab.main([], course)
    assert copies(course) == before


def test_the_command_says_what_is_wrong_in_a_sentence(course, capsys):
    assert lab.main([], course) == 0 and capsys.readouterr().out == ""
    assert lab.main(["07"], course) == "There is no lesson notebooks/07*.ipynb."
    (course / "work" / "01_apples.ipynb").write_text(MINE)
    edition(course, NEW)
    assert lab.main(["01"], course) == 0
    assert capsys.readouterr().out == (
        "01_apples.ipynb is the new edition; yours is kept as 01_apples (yours).ipynb.\n"
    )


def test_jupyterlab_asks_nobody_about_news_and_keeps_other_settings(tmp_path):
    path = tmp_path / "etc" / "jupyter" / "labconfig" / "page_config.json"
    lab.without_news(tmp_path)
    assert json.loads(path.read_text()) == {"disabledExtensions": {lab.ANNOUNCEMENTS: True}}
    path.write_text(json.dumps({"a": 1, "disabledExtensions": {"b": True}}))
    lab.without_news(tmp_path)
    assert json.loads(path.read_text()) == {"a": 1, "disabledExtensions": {"b": True, lab.ANNOUNCEMENTS: True}}
    wanted_back = json.dumps({"disabledExtensions": {lab.ANNOUNCEMENTS: False}})
    path.write_text(wanted_back)
    lab.without_news(tmp_path)
    assert path.read_text() == wanted_back


def test_it_needs_nothing_but_pythons_own_library():
    """It runs before anything else, and must not keep a learner waiting; a hand-out has no other tool."""
    subprocess.run([sys.executable, "-S", "-c", "import tools.lab"], cwd=ROOT, check=True)


def test_every_link_of_the_lessons_holds_from_work(tmp_path):
    """work/ stands where notebooks/ stands, and holds the other lessons."""
    for folder in ("images", "docs", "models"):
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks", target_is_directory=True)
    lab.refresh(tmp_path)
    lessons = sorted((tmp_path / "work").glob("*.ipynb"))
    assert lessons
    for path in lessons:
        assert notebook_lint.links_resolve(nbformat.read(path, as_version=4), path) == []
