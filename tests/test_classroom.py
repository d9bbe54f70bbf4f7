"""The classroom: who handed in what, limits that hold, and nbgrader's road from hand-out to feedback.

What needs nbgrader is skipped where it is not installed; `make test-classroom` installs it and skips nothing.
"""

import csv
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import nbformat
import psutil
import pytest

from adapter_checks.errors import InputError
from classroom import collect, watch
from classroom.__main__ import main, parser
from tools import build, editions

ALL = os.environ.get("TEST_CLASSROOM") == "1"
HAS_NBGRADER = importlib.util.find_spec("nbgrader") is not None
needs_nbgrader = pytest.mark.skipif(not HAS_NBGRADER and not ALL, reason="needs nbgrader: make test-classroom")
slow = pytest.mark.skipif(not ALL, reason="takes a minute: make test-classroom")

LESSON = '''\
# %% [markdown]
# # Count the apples

# %%
import sys
import time

from course_utils.exercises import TryAgain, call_learner, exercise


def check(name, *cases):
    """A visible check like those of the lessons."""
    @exercise(name, title=name, level="core", minutes=5)
    def test(function):
        for given, expected in cases:
            if call_learner(function, *given) != expected:
                raise TryAgain(f"Not {expected}.")
    return test

# %% [markdown]
# ### Exercise: share (core, 5 min)

# %% exercise="01.share" points=2
def share(apples, people):
    """Return how many apples each gets."""
    ### BEGIN SOLUTION
    return apples // people
    ### END SOLUTION


check("01.share", ((6, 2), 3))(share)

# %%
### BEGIN HIDDEN TESTS
assert share(9, 2) == 4
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise: eat one (core, 5 min)

# %% exercise="01.eat_one" points=3
def eat(apples):
    """Return what is left."""
    ### BEGIN SOLUTION
    return apples - 1
    ### END SOLUTION


check("01.eat_one", ((6,), 5))(eat)

# %%
### BEGIN HIDDEN TESTS
assert eat(2) == 1
### END HIDDEN TESTS

# %%
print("done")
'''
MARKS = {"01_apples": {"exercise-01-share", "01-share"}, "02_pears": {"exercise-02-peel", "02-peel"}}


# Whose is it? ---------------------------------------------------------------------------------------------------


def empty_notebook(ids=()):
    cells = [nbformat.v4.new_code_cell("1", id=identity) for identity in ids]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells)).encode()


def collected(source, **options):
    submissions, complaints = collect.collect(source, MARKS, **options)
    return {(one.learner, one.lesson) for one in submissions}, complaints


def folder_of(tmp_path, *paths, content=None):
    for number, path in enumerate(paths):
        target = tmp_path / "in" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(empty_notebook() if content is None else content)
        os.utime(target, (1_000_000 + number, 1_000_000 + number))
    return tmp_path / "in"


def zip_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


ADA = {("ada", "01_apples")}


@pytest.mark.parametrize(
    "path, learner",
    [
        ("ada/01_apples.ipynb", "ada"),
        ("ada/01_apples/01_apples.ipynb", "ada"),  # nbgrader's own folder "submitted"
        ("ada/week 1/notebooks/01_apples.ipynb", "ada"),
        ("ada/01_apples (1).ipynb", "ada"),
        ("ada/01_apples-Copy1.ipynb", "ada"),
        ("Zoë Müller/01_apples.ipynb", "Zoë-Müller"),
        ("../x;[*]/01_apples.ipynb".replace("../", ""), "x"),
        ("Ada Byron_1234567_assignsubmission_file_/01_apples.ipynb", "Ada-Byron"),  # Moodle, folders
        ("Ada Byron_1234567_assignsubmission_file_01_apples.ipynb", "Ada-Byron"),  # Moodle, flat
        ("byronada_1234_56789_01_apples.ipynb", "byronada_1234"),  # Canvas
        ("byronada_LATE_1234_56789_01_apples-2.ipynb", "byronada_1234"),
        ("Week 1_abyron_attempt_2026-01-30-15-00-00_01_apples.ipynb", "abyron"),  # Blackboard
        ("ada_01_apples.ipynb", "ada"),
    ],
)
def test_a_learner_is_known_by_folder_or_name(tmp_path, path, learner):
    assert collected(folder_of(tmp_path, path)) == ({(learner, "01_apples")}, [])


def test_a_zip_is_read_like_a_folder_and_so_is_a_zip_in_it(tmp_path):
    inner = zip_of(tmp_path / "inner.zip", {"work/02_pears.ipynb": empty_notebook()}).read_bytes()
    archive = zip_of(
        tmp_path / "all.zip",
        {
            "week 1/ada/01_apples.ipynb": empty_notebook(),
            "week 1/ben/my work.zip": inner,
            "week 1/__MACOSX/._x.ipynb": b"",
        },
    )
    assert collected(archive) == ({("ada", "01_apples"), ("ben", "02_pears")}, [])


def test_a_zip_cannot_place_files_elsewhere(tmp_path):
    archive = zip_of(
        tmp_path / "all.zip", {"../../evil/01_apples.ipynb": empty_notebook(), "ada/01_apples.ipynb": empty_notebook()}
    )
    found, _ = collected(archive)
    assert all(re.fullmatch(r"[\w.-]*", learner) and learner.strip(".") == learner for learner, _ in found)


def test_a_renamed_notebook_is_known_by_its_cells(tmp_path):
    source = folder_of(tmp_path, "ada/homework.ipynb", content=empty_notebook(["exercise-02-peel"]))
    assert collected(source) == ({("ada", "02_pears")}, [])


def test_another_platforms_names_can_be_given(tmp_path):
    source = folder_of(tmp_path, "x-77-ada-01_apples.ipynb")
    assert collected(source, names=r"x-\d+-(?P<learner>[^-]+)-") == (ADA, [])


def test_of_two_notebooks_the_newest_counts_and_it_is_said(tmp_path):
    source = folder_of(tmp_path, "ada/01_apples.ipynb", "ada/01_apples (1).ipynb")
    (one,), complaints = collect.collect(source, MARKS)
    assert one.file.path.name == "01_apples (1).ipynb" and not complaints
    assert one.notes == ("2 notebooks of this lesson; the newest, 01_apples (1).ipynb, was graded.",)


def test_two_people_of_one_name_stay_two(tmp_path):
    names = [f"Ada Byron_{number}_assignsubmission_file_" for number in (11, 22)]
    source = folder_of(tmp_path, *(f"{name}/01_apples.ipynb" for name in names), "Ada-Byron/02_pears.ipynb")
    found, _ = collected(source)
    assert len({learner for learner, lesson in found if lesson == "01_apples"}) == 2


@pytest.mark.parametrize(
    "path, known",
    [
        ("week1/Ada Byron_1_assignsubmission_file_/01_apples.ipynb", ()),
        ("class/Ada-Byron/01_apples.ipynb", ["Ada-Byron"]),
        ("Ada Byron/work_1_2/01_apples.ipynb", ()),
        ("Ada Byron/01_APPLES.IPYNB", ()),
        ("x/y/ada byron/old/01_apples.ipynb", ["Ada-Byron"]),
    ],
)
def test_one_mended_file_goes_to_its_learner(tmp_path, path, known):
    found, complaints = collected(folder_of(tmp_path, path), known=known)
    assert {(learner.casefold(), lesson) for learner, lesson in found} == {
        ("ada-byron", "01_apples")
    } and not complaints


def test_what_is_nobodys_submission_is_named(tmp_path):
    source = folder_of(
        tmp_path,
        "01_apples.ipynb",
        "ada/other.ipynb",
        "ben/report.pdf",
        "cy/damaged.zip",
        "dee/01_apples.ipynb",
        "dee/photo.png",
    )
    found, complaints = collected(source)
    assert found == {("dee", "01_apples")}
    said = "\n".join(complaints)
    for part in (
        "01_apples.ipynb: no folder",
        "ada/other.ipynb: neither",
        "ben: no notebook among report.pdf",
        "cy/damaged.zip: the zip is damaged",
    ):
        assert part in said
    assert len(complaints) == 4 and "dee" not in said


def test_a_link_is_not_followed(tmp_path):
    source = folder_of(tmp_path, "ben/01_apples.ipynb")
    (source / "ada").mkdir()
    (source / "ada" / "01_apples.ipynb").symlink_to(source / "ben" / "01_apples.ipynb")
    found, complaints = collected(source)
    assert found == {("ben", "01_apples")} and "a link, which is not followed" in complaints[0]


def test_no_such_folder_and_a_damaged_zip_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder or zip"):
        collected(tmp_path / "gone")
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(zipfile.BadZipFile):
        collected(tmp_path / "x.zip")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "the file is empty"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"<html>", "not JSON"),
        (b'{"cells": [', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not in the form of a notebook"),
        (
            b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}',
            "Not a sound notebook",
        ),
        (b'{"nbformat": "x"}', "Not a sound notebook"),
        (empty_notebook(), ""),
        (b"\xef\xbb\xbf" + empty_notebook(), ""),
    ],
)
def test_what_is_no_notebook_is_told_why(content, said):
    assert said in collect.unreadable(content) and bool(said) == bool(collect.unreadable(content))


# Limits that hold -----------------------------------------------------------------------------------------------


def python(code, stop=None, **limits):
    return watch.run([sys.executable, "-c", code], watch.Limits(**limits), stop, stdout=subprocess.PIPE)


def test_a_process_within_its_limits_is_left_alone():
    ended = python("x = bytearray(60_000_000)\nfor i in range(0, len(x), 4096): x[i] = 1\nimport time; time.sleep(.4)")
    assert (ended.why, ended.code) == ("done", 0) and 0.05 < ended.peak_gb < 0.5


def test_time_and_memory_limits_hold():
    assert python("while True: pass", seconds=1).why == "time"
    assert python("x = []\nwhile True: x.append(bytearray(10**7))", memory_gb=0.3).why == "memory"


CHILD = """
import subprocess, sys, time
code = 'x = bytearray(MB * 10**6)\\nfor i in range(0, len(x), 4096): x[i] = 1\\nimport time; time.sleep(60)'
print(subprocess.Popen([sys.executable, '-c', code], start_new_session=True).pid, flush=True)
"""


def test_memory_of_children_counts_and_they_end_too():
    assert python(CHILD.replace("MB", "400") + "time.sleep(60)", memory_gb=0.3, seconds=50).why == "memory"
    reading, writing = os.pipe()
    code = CHILD.replace("MB", "1") + "time.sleep(1)"
    ended = watch.run([sys.executable, "-c", code], watch.Limits(), stdout=writing)
    left = int(os.read(reading, 99))
    assert ended.why == "done"
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def test_an_address_space_far_beyond_the_limit_is_no_offence():
    assert (
        python(
            "import mmap; x = mmap.mmap(-1, 20 * 10**9, flags=0x4022)\nimport time; time.sleep(.3)", memory_gb=0.3
        ).why
        == "done"
    )


def test_grading_can_be_stopped():
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    assert python("import time; time.sleep(60)", stop).why == "stopped"


# The command line -----------------------------------------------------------------------------------------------


def test_without_nbgrader_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    monkeypatch.setitem(sys.modules, "nbgrader.api", None)
    for name in [name for name in sys.modules if name.startswith("classroom.") and name != "classroom.__main__"]:
        monkeypatch.delitem(sys.modules, name)
    assert "requirements-instructor.txt" in main(["report"])


def test_grading_without_submissions_does_not_take_the_working_directory():
    assert "SUBMISSIONS=" in main(["grade", ""])


def test_the_guide_names_every_command():
    commands = next(action for action in parser()._actions if action.dest == "command").choices
    assert set(commands) == {"stage", "grade", "report", "feedback"}
    for name in (
        "make classroom",
        "make grade",
        "make report",
        "make feedback",
        "make formgrader",
        "make test-classroom",
    ):
        assert name in GUIDE, name


# From hand-out to feedback, on submissions of every kind ------------------------------------------------------------


def cells(notebook):
    return {cell.id: cell for cell in notebook.cells}


def solve(notebook, *exercises):
    """Put the solution into the answer cells of those exercises."""
    answers = {"share": "return apples // people", "eat-one": "return apples - 1"}
    for name in exercises:
        cell = cells(notebook)[f"exercise-01-{name}"]
        cell.source = cell.source.replace("return ...", answers[name])
    return notebook


def answer(notebook, name, body):
    cell = cells(notebook)[f"exercise-01-{name}"]
    cell.source = cell.source.replace("return ...", body)


def without(notebook, *ids):
    notebook.cells = [cell for cell in notebook.cells if cell.id not in ids]


def stripped(notebook):
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()


def unidentified(notebook):
    stripped(notebook)
    without(notebook, "exercise-01-share-test", "exercise-01-eat-one-test")
    notebook.nbformat_minor = 4
    for cell in notebook.cells:
        del cell["id"]


def tampered(notebook):
    cells(notebook)["exercise-01-share-test"].source = "assert True"
    answer(notebook, "share", "return 3")


def marked_up(notebook):
    """Points raised, the test to be skipped, the answer no answer."""
    test = cells(notebook)["exercise-01-share-test"].metadata
    test.nbgrader.points, test.tags = 100, ["skip-execution"]
    cells(notebook)["exercise-01-eat-one-test"].metadata.nbgrader = 5
    answer(notebook, "share", "return 3")


def moved(notebook):
    index = next(i for i, cell in enumerate(notebook.cells) if cell.id == "exercise-01-share")
    own = nbformat.v4.new_code_cell(notebook.cells[index].source, id="my-own")
    notebook.cells[index] = own


def doubled(notebook):
    index = next(i for i, cell in enumerate(notebook.cells) if cell.id == "exercise-01-share")
    twin = nbformat.from_dict(json.loads(json.dumps(notebook.cells[index])))
    twin.id = "twin"
    twin.source = twin.source.replace("apples // people", "0")
    notebook.cells.insert(index, twin)


def turned(notebook):
    cell = cells(notebook)["exercise-01-share"]
    cell.cell_type = "raw"
    del cell["outputs"], cell["execution_count"]


FILL = "kept = []\n    while True: kept.append(bytearray(10**7))"
STUBBORN = "while True:\n        try:\n            while True: time.sleep(0.1)\n        except KeyboardInterrupt:\n            pass"
# name: what is done to the solved notebook, the scores of both exercises, what the report must say of it
KINDS = {
    "solved": (None, "2", "3", None),
    "hard-coded": (lambda n: answer(n, "share", "return 3"), "0", "3", None),
    "wrong": (lambda n: answer(n, "share", "return apples / 0"), "0", "3", None),
    "tampered": (tampered, "0", "3", "01.share: the test cell was changed"),
    "marked-up": (marked_up, "0", "3", "01.share: the grading marks of the test cell were changed"),
    "no-test-cell": (lambda n: without(n, "exercise-01-share-test"), "2", "3", "01.share: the test cell is missing"),
    "no-answer-cell": (lambda n: without(n, "exercise-01-share"), "0", "3", "01.share: the answer cell is missing"),
    "moved": (moved, "2", "3", "01.share: the answer cell is missing"),
    "stripped": (stripped, "2", "3", "came without grading marks; its answers were known by their cell ids"),
    "unidentified": (unidentified, "2", "3", "without grading marks and cell ids"),
    "doubled": (doubled, "2", "3", None),
    "turned": (turned, "2", "3", "01.share: the answer cell was turned into raw"),
    "endless": (lambda n: answer(n, "share", "while True: pass"), "0", "3", None),
    "stubborn": (lambda n: answer(n, "share", STUBBORN), "0", "3", "01.share: it ran longer than"),
    "memory": (lambda n: answer(n, "share", FILL), "0", "3", "01.share: it took more than 1 GB of memory"),
    "exits": (lambda n: answer(n, "share", "import os; os._exit(3)"), "0", "3", "01.share: the kernel died"),
    "stderr": (
        lambda n: answer(n, "share", "print('hm', file=sys.stderr)\n    return apples // people"),
        "2",
        "3",
        "01.share: the answer writes to stderr",
    ),
}
HALF_SOLVED = {"hard-coded", "wrong", "tampered", "marked-up", "endless", "stubborn", "memory", "exits", "stderr"}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class of one small lesson, staged, graded and given feedback; (course, rows by learner and exercise, report)."""
    from classroom import grade, report, stage
    from classroom.course import Course

    root = tmp_path_factory.mktemp("une école")
    (root / "lessons").mkdir()
    (root / "lessons" / "01_apples.py").write_text(LESSON, encoding="utf-8")
    course = Course(root / "la classe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "HANDED_OUT", ())
        stage.stage(course, root)
    handed_in = root / "handed in"
    files = {}
    for name, (change, *_) in KINDS.items():
        notebook = nbformat.read(course.notebook("release", "01_apples"), as_version=4)
        solve(notebook, *(["eat-one"] if name in HALF_SOLVED else ["share", "eat-one"]))
        if change:
            change(notebook)
        files[f"{name}/01_apples.ipynb"] = nbformat.writes(notebook)
    lesson = build.read_lesson(root / "lessons" / "01_apples.py")
    files["plain/01_apples.ipynb"] = nbformat.writes(editions.solved(lesson))
    untouched = nbformat.read(course.notebook("release", "01_apples"), as_version=4)
    files["untouched/01_apples.ipynb"] = nbformat.writes(untouched)
    files["partly/01_apples.ipynb"] = nbformat.writes(solve(untouched, "share"))
    files["not-json/01_apples.ipynb"] = "{cells"
    files["empty-handed/essay.pdf"] = ""
    for name, content in files.items():
        (handed_in / name).parent.mkdir(parents=True)
        (handed_in / name).write_text(content, encoding="utf-8")
    limits = watch.Limits(cell_seconds=15, seconds=300, memory_gb=1)
    _, complaints = grade.grade(course, handed_in, limits, jobs=3, say=lambda text: None)
    text = report.write(course, handed_in, complaints)
    rows = {
        (row["learner"], row["exercise"]): row
        for row in csv.DictReader(io.StringIO((course.root / "scores.csv").read_text("utf-8")))
    }
    return course, rows, text


@needs_nbgrader
def test_the_hand_out_is_the_courses_own_stub_with_locked_test_cells(graded):
    course, _, _ = graded
    released = nbformat.read(course.notebook("release", "01_apples"), as_version=4)
    learner = editions.learner(editions.parse(LESSON))
    tests = [cell for cell in released.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    assert [cell.source for cell in tests] == [editions.LEFT_OF_TEST.strip()] * 2
    assert all(cell.metadata.editable is False and cell.metadata.deletable is False for cell in tests)
    assert [(cell.id, cell.source) for cell in released.cells if cell not in tests] == [
        (cell.id, cell.source) for cell in learner.cells
    ]


@needs_nbgrader
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_submission_gets_its_points_and_a_word(graded, name):
    _, rows, report = graded
    _, share, eat, said = KINDS[name]
    assert (rows[name, "01.share"]["score"], rows[name, "01.eat_one"]["score"]) == (share, eat), rows[name, "01.share"]
    lines = [line for line in report.splitlines() if line.startswith(f"- **{name}**")]
    assert (said in lines[0]) if said else not lines


@needs_nbgrader
def test_a_broken_check_is_not_the_learners_fault():
    from classroom import report

    output = nbformat.v4.new_output("stream", text="CHECK BROKEN · Share (01.share)\nThe check itself failed\n")
    given = nbformat.v4.new_code_cell(outputs=[output])
    assert report._why(given, nbformat.v4.new_code_cell()).startswith("the visible check is broken here")


@needs_nbgrader
def test_no_zero_is_without_a_reason(graded):
    _, rows, _ = graded
    for row in rows.values():
        assert row["score"] != "0" or row["status"] == "not attempted" or (row["status"] == "failed" and row["note"]), (
            row
        )
    notes = {learner: rows[learner, "01.share"]["note"] for learner, _ in rows}
    assert notes["hard-coded"] == "it passes the visible check and fails the hidden test"
    assert notes["wrong"] == "fails the hidden test, stopped by ZeroDivisionError: division by zero"
    assert notes["endless"] == "the answer was stopped by the time limit of a cell"
    assert "more than 1 GB" in notes["memory"] and "kernel died" in notes["exits"]
    assert notes["no-answer-cell"] == "the answer cell is missing"


@needs_nbgrader
def test_what_was_not_attempted_is_told_from_what_failed(graded):
    _, rows, _ = graded
    assert [rows["untouched", name]["status"] for name in ("01.share", "01.eat_one")] == ["not attempted"] * 2
    assert [rows["partly", name]["status"] for name in ("01.share", "01.eat_one")] == ["passed", "not attempted"]


@needs_nbgrader
def test_a_notebook_of_the_course_itself_can_be_graded(graded):
    _, rows, report = graded
    assert [rows["plain", name]["score"] for name in ("01.share", "01.eat_one")] == ["2", "3"]
    assert "**plain**, 01_apples: The notebook came without grading marks" in report


@needs_nbgrader
def test_what_is_no_notebook_gets_no_score_and_is_named(graded):
    course, rows, report = graded
    assert [rows["not-json", name]["score"] for name in ("01.share", "01.eat_one")] == ["", ""]
    assert rows["not-json", "01.share"]["status"] == "not graded" and "not JSON" in rows["not-json", "01.share"]["note"]
    assert "**not-json**, 01_apples (not graded): Not a notebook: the file is not JSON" in report
    assert "empty-handed: no notebook among essay.pdf" in report
    assert course.notebook("submitted", "01_apples", "not-json").read_text() == "{cells"


@needs_nbgrader
def test_every_learner_has_a_row_for_every_exercise(graded):
    _, rows, _ = graded
    assert set(rows) == {
        (name, one)
        for name in [*KINDS, "plain", "untouched", "partly", "not-json"]
        for one in ("01.share", "01.eat_one")
    }


@needs_nbgrader
def test_a_learners_own_record_and_files_are_left_alone(graded):
    assert not (Path(os.environ["COURSE_RUNS"]) / "progress.json").exists()


@needs_nbgrader
def test_a_fixed_notebook_replaces_the_one_that_could_not_be_graded_and_others_stay(graded, tmp_path):
    from classroom import grade, report

    course, _, _ = graded
    again = tmp_path / "again" / "not-json"
    again.mkdir(parents=True)
    solved = nbformat.read(course.notebook("release", "01_apples"), as_version=4)
    (again / "01_apples.ipynb").write_text(nbformat.writes(solve(solved, "share", "eat-one")), encoding="utf-8")
    before = (course.root / "scores.csv").read_text("utf-8")
    grade.grade(course, tmp_path / "again", watch.Limits(), jobs=1, say=lambda text: None)
    report.write(course)
    after = (course.root / "scores.csv").read_text("utf-8")
    changed = set(after.splitlines()) - set(before.splitlines())
    assert changed == {"not-json,01_apples,01.share,2,2,passed,", "not-json,01_apples,01.eat_one,3,3,passed,"}
    (again / "01_apples.ipynb").write_text("{cells", encoding="utf-8")
    grade.grade(course, tmp_path / "again", watch.Limits(), jobs=1, say=lambda text: None)
    report.write(course)
    assert (course.root / "scores.csv").read_text("utf-8") == before  # The old grade does not stand for a new notebook.


@needs_nbgrader
def test_a_grading_that_is_stopped_marks_what_it_did_not_do_and_can_be_done_again(graded, tmp_path, monkeypatch):
    from classroom import grade, report
    from classroom.course import Course

    course = Course(shutil.copytree(graded[0].root, tmp_path / "copy"))
    kept = {(row["learner"], row["exercise"]): row["score"] for row in report.rows(course)}
    for name in ("solved", "plain"):
        (tmp_path / "again" / name).mkdir(parents=True)
        shutil.copy(course.notebook("submitted", "01_apples", name), tmp_path / "again" / name)

    def interrupted(text):
        if text.startswith("1/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(
        grade,
        "_grade_one",
        lambda course, one, *_: {
            "status": "graded",
            "problems": [],
            "seconds": 1.0,
            "peak_gb": 0.1,
            "file": str(one.file.path),
            "version": course.version(one.lesson),
        },
    )
    with pytest.raises(KeyboardInterrupt):
        grade.grade(course, tmp_path / "again", watch.Limits(), jobs=1, say=interrupted)
    states = {name: course.record()[name]["01_apples"] for name in ("solved", "plain", "untouched")}
    assert sorted(states[name]["status"] for name in ("solved", "plain")) == ["graded", "not graded"]
    assert (
        any("grading was stopped" in states[name]["problems"][0] for name in ("solved", "plain"))
        and states["untouched"]["status"] == "graded"
    )
    assert "Grading was stopped" in report.write(course)  # and no other command fails
    grade.grade(course, tmp_path / "again", watch.Limits(), jobs=1, say=lambda text: None)
    assert {(row["learner"], row["exercise"]): row["score"] for row in report.rows(course)} == kept


@needs_nbgrader
def test_what_was_graded_by_other_tests_is_not_told_as_a_learners_fault(graded, tmp_path):
    from classroom import report
    from classroom.course import Course

    course = Course(shutil.copytree(graded[0].root, tmp_path / "copy"))
    path = course.notebook("source", "01_apples")
    path.write_text(path.read_text("utf-8").replace('"points": 3', '"points": 4'), encoding="utf-8")
    assert {row["status"] for row in report.rows(course) if row["learner"] == "solved"} == {"not graded"}
    assert "was staged anew" in report.write(course)


@needs_nbgrader
def test_complaints_stay_until_their_folder_is_graded_again(graded, tmp_path):
    from classroom import report
    from classroom.course import Course

    course = Course(shutil.copytree(graded[0].root, tmp_path / "copy"))
    assert "essay.pdf" in graded[2] and "essay.pdf" in report.write(course)
    report.write(course, tmp_path, ["zed.zip: damaged."])
    assert "essay.pdf" in report.write(course) and "zed.zip" in report.write(course)
    assert "zed.zip" not in report.write(course, tmp_path, [])


@needs_nbgrader
def test_commands_without_anything_to_work_on_say_so(graded, tmp_path):
    from classroom import grade, report
    from classroom.course import Course

    for call in (report.rows, report.write, report.feedback):
        with pytest.raises(InputError, match="Nothing is graded yet"):
            call(Course(tmp_path / "new"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no notebook of a staged lesson in .*empty"):
        grade.grade(graded[0], tmp_path / "empty", say=lambda text: None)


@needs_nbgrader
def test_points_given_by_hand_count(graded):
    from classroom import report

    course, _, _ = graded
    with course.gradebook() as gradebook:
        grade = gradebook.find_grade("01-share-test", "01_apples", "01_apples", "moved")
        grade.manual_score = 1
        gradebook.db.commit()
    row = next(row for row in report.rows(course) if (row["learner"], row["exercise"]) == ("moved", "01.share"))
    assert (row["score"], row["status"], row["note"]) == ("1", "partly", "graded by hand")
    with course.gradebook() as gradebook:
        gradebook.find_grade("01-share-test", "01_apples", "01_apples", "moved").manual_score = None
        gradebook.db.commit()


@needs_nbgrader
def test_everyone_gets_a_feedback_page(graded):
    from classroom import report

    course, rows, _ = graded
    pages, complaints = report.feedback(course)
    assert pages == len({learner for learner, _ in rows}) and complaints == ""
    page = (course.root / "feedback" / "hard-coded" / "01_apples" / "01_apples.html").read_text("utf-8")
    assert "01_apples (Score: 3.0 / 5.0)" in page and "AssertionError" in page
    page = (course.root / "feedback" / "not-json" / "01_apples" / "01_apples.html").read_text("utf-8")
    assert "not graded" in page and "not JSON" in page


@needs_nbgrader
def test_formgrader_opens_on_the_result(graded, tmp_path):
    """The real server extension, with the course's configuration, answers with its pages and the class's scores."""
    import urllib.request

    course, _, _ = graded
    config = (build.ROOT / "classroom" / "nbgrader_config.py").read_text("utf-8")
    (tmp_path / "nbgrader_config.py").write_text(
        config.replace("Path(__file__).resolve().parent\n", f"Path({str(build.ROOT / 'classroom')!r})\n", 1).replace(
            'str(here / "staging")', repr(str(course.root))
        ),
        encoding="utf-8",
    )
    port = free_port()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyter",
            "server",
            "--no-browser",
            "--allow-root",
            f"--port={port}",
            "--IdentityProvider.token=t",
            f"--ServerApp.root_dir={course.root.parent}",
            "--ServerApp.jpserver_extensions={'nbgrader.server_extensions.formgrader': True}",
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config")},
    )
    try:

        def get(path):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": "token t"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read().decode()

        deadline = time.monotonic() + 90
        while True:
            try:
                get("/api/status")
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, "the server did not start"
                time.sleep(0.5)
        assert "nbgrader" in get("/formgrader/manage_assignments").lower()
        (assignment,) = json.loads(get("/formgrader/api/assignments"))
        assert assignment["name"] == "01_apples" and assignment["max_score"] == 5
        students = {one["id"]: one["score"] for one in json.loads(get("/formgrader/api/students"))}
        assert students["solved"] == 5 and students["hard-coded"] == 3
        (submission,) = [
            one for one in json.loads(get("/formgrader/api/submissions/01_apples")) if one["student"] == "solved"
        ]
        (notebook,) = json.loads(get("/formgrader/api/student_notebook_submissions/solved/01_apples"))
        assert submission["score"] == 5
        assert "return apples // people" in as_text(get(f"/formgrader/submissions/{notebook['id']}/"))
    finally:
        server.terminate()
        server.wait(20)


# The course's own lessons ------------------------------------------------------------------------------------------


def secrets():
    """{exercise: (the lines of its hidden test that assert, its solution)} of every lesson."""
    found = {}
    for path in build.sources(build.ROOT):
        for cell in build.read_lesson(path).cells:
            role = cell.metadata.lesson
            if role.get("role") == "exercise":
                _, solution, _ = editions.split(
                    cell.source, editions.BEGIN_SOLUTION, editions.END_SOLUTION, role["name"]
                )
                found[role["name"]] = ([], solution.strip())
            elif role.get("role") == "hidden test":
                found[role["name"]][0].extend(line.strip() for line in cell.source.splitlines() if "assert" in line)
    return found


def test_every_exercise_has_a_hidden_test_and_none_shows_in_the_notebooks():
    known = secrets()
    assert len(known) >= 11 and all(lines for lines, _ in known.values())
    for edition in ("notebooks", "solutions"):
        for path in sorted((build.ROOT / edition).glob("*.ipynb")):
            text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
            for name, (lines, solution) in known.items():
                assert not [line for line in lines if line in text], f"{name} in {path}"
                assert edition == "solutions" or solution not in text, f"{name} in {path}"


def test_progress_is_shown_in_one_call_across_lessons(tmp_path):
    """Two lessons in two processes, as two notebooks would be, and a third that asks."""

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=build.ROOT,
            env={**os.environ, "COURSE_RUNS": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert run(
        "from course_utils.exercises import lesson04\n"
        "lesson04.count(lambda shapes, rank: rank * sum(i + o for i, o in shapes))"
    ).startswith("PASS")
    assert "PASS" in run(
        "from course_utils.exercises import lesson01\n"
        "lesson01.weigh(lambda t: (sum(x.numel() for x in t.values()), "
        "next(x.shape[0] for n, x in t.items() if 'lora_A' in n)))"
    )
    said = run("from course_utils.exercises import progress; progress()")
    assert [line.split()[1] for line in said.splitlines() if line.startswith("done")] == ["01.weigh", "04.count"]
    assert re.search(r"^ +03\.\w+", said, re.MULTILINE) and re.search(
        r"^2 of \d+ exercises done\.$", said, re.MULTILINE
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The course itself, every lesson staged."""
    from classroom.course import Course
    from classroom.stage import stage

    course = Course(tmp_path_factory.mktemp("real") / "class")
    return course, stage(course)


@needs_nbgrader
def test_the_hand_out_has_what_a_learner_needs_and_no_answer(real):
    course, path = real
    assert course.lessons() == [path.stem for path in build.sources(build.ROOT)]
    with zipfile.ZipFile(path) as archive:
        names = [name.removeprefix("lora-course/") for name in archive.namelist()]
        notebooks = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".ipynb")}
    assert not [name for name in names if re.match("(lessons|solutions|tests|classroom|runs|docs/template)/", name)]
    installed = re.findall(r"^-e \./(\S+)", (build.ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for needed in (
        *(f"{package}/pyproject.toml" for package in installed),
        "README.md",
        "Makefile",
        "requirements.txt",
        "requirements-beyond-text.txt",
        "tools/check_python.py",
        "tools/install.py",
        "tools/lab.py",
        "models/base/config.json",
        "course_utils/runtime.py",
    ):
        assert needed in names, needed
    assert path.stat().st_size < 60_000_000
    for lesson in course.lessons():
        notebook = nbformat.reads(notebooks[f"lora-course/notebooks/{lesson}.ipynb"], as_version=4)
        nbformat.validate(notebook)
        text = "\n".join(cell.source for cell in notebook.cells)
        for name, (lines, solution) in secrets().items():
            assert solution not in text and not [line for line in lines if line in text], name
        marked = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
        assert [cell.metadata.exercise for cell in marked] == list(course.exercises(lesson))
        built = nbformat.read(build.ROOT / "notebooks" / f"{lesson}.ipynb", as_version=4)
        handed = {(cell.id, cell.source): cell.get("outputs") for cell in notebook.cells}
        same = [cell for cell in built.cells if cell.get("outputs") and (cell.id, cell.source) in handed]
        assert same and all(handed[cell.id, cell.source] == cell.outputs for cell in same)


@needs_nbgrader
@slow
def test_lesson_1_is_graded_on_the_real_model(real, tmp_path):
    from classroom import grade, measure, report

    course, _ = real
    for name, count in (("solved", None), ("untouched", 0)):
        path = tmp_path / name / "01_load_lora_adapter.ipynb"
        path.parent.mkdir()
        nbformat.write(measure.with_answers(course, "01_load_lora_adapter", count), path)
    grade.grade(course, tmp_path, say=lambda text: None)
    text = report.write(course)
    assert text.endswith("## To look at\n\nNothing.\n"), text
    rows = report.rows(course)
    assert {row["status"] for row in rows if row["learner"] == "solved"} == {"passed"}
    assert {(row["status"], row["score"]) for row in rows if row["learner"] == "untouched"} == {("not attempted", "0")}
    assert report.feedback(course) == (2, "")
    page = (course.root / "feedback" / "solved" / "01_load_lora_adapter" / "01_load_lora_adapter.html").read_text(
        "utf-8"
    )
    assert 'src="../images/' not in page and "data:image/png;base64," in page


# The guide and what goes with it ----------------------------------------------------------------------------------

GUIDE = (build.ROOT / "classroom" / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (build.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(heading, language, text=GUIDE):
    """Return the first fenced block of `language` below `heading`."""
    below = text.split(f"\n{heading}\n", 1)[1]
    return textwrap.dedent(re.search(rf"^ *```{language}\n(.*?)^ *```", below, re.MULTILINE | re.DOTALL)[1])


def test_the_guides_table_has_every_lesson_with_its_minutes():
    from course_utils.exercises import all_exercises

    for path in build.sources(build.ROOT):
        if not (build.ROOT / "notebooks" / f"{path.stem}.ipynb").exists():
            continue  # A lesson that is still being written.
        notebook = editions.learner(build.read_lesson(path))
        names = {cell.metadata.lesson.get("name") for cell in build.read_lesson(path).cells}
        exercises = sum(one.minutes for one in all_exercises() if one.name in names)
        words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
        code_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        rule = words / 200 + 2 * code_cells + exercises  # minutes, as the guide says; it rounds to half an hour
        row = next(
            (
                line
                for line in GUIDE.splitlines()
                if line.startswith(f"| [{editions.label(path.stem)} ") and f"/{path.stem}.ipynb)" in line
            ),
            "no row",
        )
        wanted = f"| [{editions.label(path.stem)} …](../notebooks/{path.stem}.ipynb) | … | {exercises} min | {rule:.0f} min, rounded |"
        assert f"](../notebooks/{path.stem}.ipynb)" in row and f"| {exercises} min |" in row, f"not {wanted}"
        hours, minutes = re.search(r"\| (?:(\d+) h)? ?(?:(\d+) min)? \|$", row).groups("0")
        assert abs(60 * int(hours) + int(minutes) - rule) <= 20, f"not {wanted}"


def test_the_guide_has_an_answer_to_every_exercise():
    assert [name for name in secrets() if f"| `{name}` |" not in GUIDE] == []


def test_the_guides_worked_change_fits_the_lesson():
    lesson = (build.ROOT / "lessons" / "01_load_lora_adapter.py").read_text(encoding="utf-8")
    lines = block("## Change an exercise", "diff").splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] in " -")
    after = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert lesson.count(before) == 1 or lesson.count(after) == 1  # somebody may have done it
    editions.parse(lesson.replace(before, after))


def test_the_dockerfile_copies_what_is_there_and_what_is_installed():
    lines = (build.ROOT / "classroom" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert [name for name in copied if not list(build.ROOT.glob(name))] == []
    installed = re.findall(r"^-e \./(\S+)", (build.ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert installed and set(installed) <= set(copied)


@slow
def test_a_lesson_is_added_by_the_commands_of_contributing(tmp_path):
    """A copy of the checkout, in which CONTRIBUTING's own lines are run as they stand."""
    root = tmp_path / "course"
    for name in (
        "lessons",
        "notebooks",
        "solutions",
        "course_utils",
        "adapter_checks",
        "tools",
        "tests",
        "classroom",
        "images",
        "docs",
        "experiments",
    ):
        shutil.copytree(build.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "staging"))
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "requirements.txt",
        "requirements-beyond-text.txt",
        "constraints.txt",
        "requirements-instructor.txt",
    ):
        shutil.copy(build.ROOT / name, root / name)
    for name in ("models", "data"):
        (root / name).symlink_to(build.ROOT / name)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (root / ".venv" / ".installed").write_text(str(root))
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "TEST_", "PYTEST"))
    }
    done = subprocess.run(
        ["bash", "-e", "-x", "-c", block("## Add a lesson", "bash", CONTRIBUTING)],
        cwd=root,
        text=True,
        env={**kept, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "[99 Ask one question](notebooks/99_new_lesson.ipynb)" in (root / "README.md").read_text(encoding="utf-8")
    notebook = nbformat.read(root / "notebooks" / "99_new_lesson.ipynb", as_version=4)
    assert "TODO · What fraction?" in str(notebook.cells)


def as_text(page):
    return re.sub(r"<[^>]*>", "", page)


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
