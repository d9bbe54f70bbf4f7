"""From a lesson's source to its editions: what is kept, what is stripped, what is measured."""

import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from tools import build, editions
from tools.editions import BEGIN_SOLUTION, END_SOLUTION, BuildError

LESSON = '''\
# %% [markdown]
# # Count the apples
# About {{time}}.

# %%
apples = 3
print(apples)

# %% tags=["measured"]
import time
print(time.time_ns())

# %% [markdown]
# ## Share them

# %% exercise="01.share" points=2
def share(apples, people):
    """Return how many apples each gets."""
    ### BEGIN SOLUTION
    each = apples // people
    return each
    ### END SOLUTION

print(share(6, 2))

# %%
### BEGIN HIDDEN TESTS
assert share(9, 3) == 3
### END HIDDEN TESTS

# %%
print("done")
'''


def code(notebook):
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture
def course(tmp_path):
    """A course of one small lesson."""
    (tmp_path / "lessons").mkdir()
    (tmp_path / "requirements.txt").write_text("peft==1  # all lessons\n")
    path = tmp_path / "lessons" / "01_apples.py"
    path.write_text(LESSON, encoding="utf-8")
    return path


# Editions


def test_the_learners_edition_has_a_stub_and_no_hidden_test():
    cells = code(editions.learner(editions.parse(LESSON)))
    assert list(cells) == ["count-the-apples-1", "count-the-apples-2", "exercise-01-share", "share-them-1"]
    assert cells["exercise-01-share"] == (
        'def share(apples, people):\n    """Return how many apples each gets."""\n'
        "    # YOUR CODE HERE\n    return ...\n\nprint(share(6, 2))"
    )
    assert "hidden" not in str(cells).lower()


def test_the_solved_edition_has_the_solution_without_markers():
    cells = code(editions.solved(editions.parse(LESSON)))
    assert "each = apples // people" in cells["exercise-01-share"]
    assert "###" not in str(cells)
    assert "exercise-01-share-test" not in cells


def test_the_instructors_edition_has_a_solution_cell_and_a_locked_grade_cell():
    notebook = editions.staging(editions.parse(LESSON))
    nbformat.validate(notebook)
    by_id = {cell.id: cell for cell in notebook.cells}
    solution, grade = by_id["exercise-01-share"], by_id["exercise-01-share-test"]
    assert editions.BEGIN_SOLUTION in solution.source and editions.BEGIN_HIDDEN in grade.source
    assert solution.metadata.nbgrader == {
        "schema_version": 3,
        "grade_id": "01-share",
        "grade": False,
        "solution": True,
        "locked": False,
        "task": False,
    }
    assert grade.metadata.nbgrader == {
        "schema_version": 3,
        "grade_id": "01-share-test",
        "grade": True,
        "solution": False,
        "locked": True,
        "task": False,
        "points": 2,
    }
    assert "nbgrader" not in by_id["share-them"].metadata


def test_tags_are_kept_and_the_builds_own_notes_are_not():
    notebook = editions.learner(editions.parse(LESSON))
    metadata = {cell.id: cell.metadata for cell in notebook.cells}
    assert metadata.pop("count-the-apples-2") == {"tags": ["measured"]}
    assert not any(metadata.values())


@pytest.mark.parametrize(
    "solution, after, stub",
    [
        ("answer = 3", "check(answer)", "answer = ..."),
        ("hidden = 3\nanswer = hidden", "check(answer)", "answer = ..."),
        ("a, b = 1, 2", "check(a, b)", "a = b = ..."),
        ("a: int = 1\nfor b in range(3):\n    pass", "check(a, b)", "a = b = ..."),
        ("def f():\n    return 1", "check(f)", "f = ..."),
        ("model.eval()", "check(model)", "..."),
        ("def f():\n    return 1\nmodel = f()", "check(model)", "model = ..."),
    ],
)
def test_a_stub_binds_what_the_cell_uses_afterwards(solution, after, stub):
    text = f'# %% exercise="01.x"\n{editions.BEGIN_SOLUTION}\n{solution}\n{editions.END_SOLUTION}\n{after}\n'
    text += f"\n# %%\n{editions.BEGIN_HIDDEN}\nassert True\n{editions.END_HIDDEN}\n"
    (source,) = code(editions.learner(editions.parse(text))).values()
    assert source == f"# YOUR CODE HERE\n{stub}\n{after}"
    ast.parse(source)


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("    ### END SOLUTION\n", "", "needs one line '### BEGIN SOLUTION'"),
        ("    ### BEGIN SOLUTION\n", "", "needs one line '### BEGIN SOLUTION'"),
        (' exercise="01.share" points=2', "", "a solution stands in a cell without an exercise tag"),
        ("### BEGIN HIDDEN TESTS\n", "print(1)\n### BEGIN HIDDEN TESTS\n", "needs a cell of its own"),
        ("### END HIDDEN TESTS\n", "", "needs one line '### BEGIN HIDDEN TESTS'"),
        ("### BEGIN HIDDEN TESTS\nassert share(9, 3) == 3\n### END HIDDEN TESTS", "1", "no hidden test for 01.share"),
        ("01.share", "share", "an exercise is named like 01.size_ratio"),
    ],
)
def test_a_source_that_breaks_a_rule_is_refused(old, new, complaint):
    assert old in LESSON
    with pytest.raises(BuildError, match=complaint):
        editions.parse(LESSON.replace(old, new), "01_apples.py")


def test_two_exercises_of_one_name_are_refused():
    with pytest.raises(BuildError, match="two exercises are called 01.share"):
        editions.parse(LESSON + "\n" + LESSON)


def test_a_hidden_test_without_an_exercise_is_refused():
    with pytest.raises(BuildError, match="a hidden test follows its exercise"):
        editions.parse("# %%\n### BEGIN HIDDEN TESTS\npass\n### END HIDDEN TESTS\n")


def test_a_solution_that_is_no_python_is_refused():
    with pytest.raises(BuildError, match="not whole statements"):
        editions.learner(editions.parse(LESSON.replace("each = apples // people", "each =")))


def test_ids_stay_when_another_section_grows():
    before = code(editions.learner(editions.parse(LESSON)))
    grown = LESSON.replace("# %% [markdown]\n# ## Share", "# %%\nprint(4)\n\n# %% [markdown]\n# ## Share")
    after = code(editions.learner(editions.parse(grown)))
    assert set(after) - set(before) == {"count-the-apples-3"}
    assert all(after[name] == source for name, source in before.items())


def test_headings_of_one_name_get_different_ids():
    notebook = editions.parse("# %% [markdown]\n# ## Try it\n\n# %% [markdown]\n# ## Try it\n")
    assert [cell.id for cell in notebook.cells] == ["try-it", "try-it-again-2"]


PREDICTION = """\
# %% [markdown]
# **Predict:** how many?

# %%
print(3)

# %%
silent = 1

# %% [markdown]
# Three.

# %%
print(4)
"""


def test_the_outputs_that_answer_a_prediction_are_folded():
    notebook = editions.learner(editions.parse(PREDICTION))
    asked, answer, silent, told, other = notebook.cells
    for cell in (answer, other):
        cell.outputs = [nbformat.v4.new_output("stream", text="3\n")]
    for _ in range(2):  # Folding what is folded changes nothing.
        editions.fold_answers(notebook)
        nbformat.validate(notebook)
        assert answer.metadata == editions.FOLDED and answer.outputs[0] == editions.COVER
        assert not silent.metadata and not silent.outputs and not other.metadata
        assert [len(cell.outputs) for cell in (answer, other)] == [2, 1]
    again = nbformat.reads(nbformat.writes(notebook), as_version=4)
    editions.fold_answers(again)
    assert again == notebook
    told.source = "**Predict:** and now?"
    asked.source = "Three."
    editions.fold_answers(notebook)
    assert not answer.metadata and len(answer.outputs) == 1 and other.metadata == editions.FOLDED


def test_the_solved_edition_writes_to_a_folder_of_its_own():
    source = '# %%\nfolder = paths.runs_dir() / "lesson01"\n'
    folders = []
    for make in (editions.learner, editions.solved):
        names = {"paths": SimpleNamespace(runs_dir=lambda: Path("runs"))}
        exec(make(editions.parse(source)).cells[0].source, names)
        folders.append(names["folder"])
    assert folders == [Path("runs", "lesson01"), Path("runs", "solved", "lesson01")]


@pytest.mark.parametrize("path", build.sources(build.ROOT), ids=lambda path: path.stem)
def test_no_lesson_shares_a_folder_between_its_editions(path):
    learner, solved = (
        "\n".join(code(make(build.read_lesson(path))).values()) for make in (editions.learner, editions.solved)
    )
    assert '"solved"' not in learner and learner.count("runs_dir") == solved.count('runs_dir() / "solved"')


# The whole build


@pytest.mark.parametrize("path", build.sources(build.ROOT), ids=lambda path: path.stem)
def test_the_instructors_edition_runs_all_that_the_solved_one_runs(path):
    """`make test` runs the former alone: it has the hidden tests besides."""
    lesson = build.read_lesson(path)
    solved = [cell.source for cell in editions.solved(lesson).cells if cell.cell_type == "code"]
    staged = [
        "".join(line for line in cell.source.splitlines(True) if line.strip() not in (BEGIN_SOLUTION, END_SOLUTION))
        for cell in editions.staging(lesson).cells
        if cell.cell_type == "code" and not cell.metadata.get("nbgrader", {}).get("grade")
    ]
    assert staged == [source.replace('runs_dir() / "solved"', "runs_dir()") for source in solved]


def test_two_builds_are_the_same_but_for_measured_outputs(course, tmp_path):
    assert build.build(course, tmp_path) == []
    names = ["notebooks/01_apples.ipynb", "solutions/01_apples.ipynb", "lessons/measured.json"]
    first = [(tmp_path / name).read_text(encoding="utf-8") for name in names]
    assert build.build(course, tmp_path, force=True) == []
    second = [(tmp_path / name).read_text(encoding="utf-8") for name in names]
    assert first[1] == second[1]
    notebooks = [nbformat.reads(text, as_version=4) for text in (first[0], second[0])]
    measured = [[cell for cell in notebook.cells if cell.metadata.get("tags")] for notebook in notebooks]
    assert measured[0][0].outputs != measured[1][0].outputs  # The test sees a difference where there is one.
    for (cell,) in measured:
        cell.outputs = []
    assert notebooks[0] == notebooks[1]


def built(root):
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.ipynb")}


def test_a_changed_word_is_all_that_changes(course, tmp_path, monkeypatch):
    build.build(course, tmp_path)
    before = built(tmp_path)
    monkeypatch.setattr(build, "execute", lambda *given: pytest.fail("the lesson was run again"))
    course.write_text(LESSON.replace("Share them", "Split them"), encoding="utf-8")
    assert build.build(course, tmp_path) == [] and drift(tmp_path) == []  # A heading changes ids, too.
    course.write_text(LESSON.replace("# About {{time}}", "# Around {{time}}"), encoding="utf-8")
    assert build.build(course, tmp_path) == []
    for name, text in built(tmp_path).items():
        lines = zip(before[name].splitlines(), text.splitlines(), strict=True)
        (changed,) = [(old, new) for old, new in lines if old != new]
        assert changed == ('    "About 1 minute."', '    "Around 1 minute."')


@pytest.mark.parametrize(
    "old, new",
    [("share(9, 3) == 3", "share(8, 2) == 4"), ("each = apples // people", "each = int(apples / people)")],
    ids=["hidden test", "solution"],
)
def test_a_change_that_the_learners_code_does_not_show_runs_nothing(old, new, course, tmp_path, monkeypatch):
    build.build(course, tmp_path)
    monkeypatch.setattr(build, "execute", lambda *given: pytest.fail("the lesson was run again"))
    course.write_text(LESSON.replace(old, new), encoding="utf-8")
    assert build.build(course, tmp_path) == [] and drift(tmp_path) == []


def test_a_lesson_runs_again_when_its_outputs_may_have_changed(course, tmp_path, monkeypatch):
    runs = []
    execute = build.execute
    monkeypatch.setattr(build, "execute", lambda *given: runs.append(1) or execute(*given))

    def ran(**options):
        runs.clear()
        build.build(course, tmp_path, **options)
        return bool(runs)

    assert ran() and not ran() and ran(force=True) and not ran()
    course.write_text(LESSON.replace('print("done")', 'print("over")'), encoding="utf-8")
    assert ran() and not ran()
    results = tmp_path / "experiments" / "results"
    results.mkdir(parents=True)
    (results / "apples.csv").write_text("seed\n")
    (results / "pears.csv").write_text("seed\n")
    assert not ran()  # the lesson names neither
    course.write_text(course.read_text(encoding="utf-8") + '\nresults = "apples"\n', encoding="utf-8")
    assert ran() and not ran()
    (results / "pears.csv").write_text("seed\n1\n")
    assert not ran()
    (results / "apples.csv").write_text("seed\n1\n")
    assert ran() and not ran()
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "README.md").write_text("A card is read by no lesson.")
    (tmp_path / "models" / "pears").mkdir()
    (tmp_path / "models" / "pears" / "config.json").write_text("{}")
    assert not ran()
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    assert ran() and not ran()
    (tmp_path / "requirements.txt").write_text("peft==9  # all lessons\nruff==1  # tests: form\n")
    assert ran() and not ran()
    (tmp_path / "requirements.txt").write_text("peft==9  # all lessons\nruff==2  # tests: form\n")
    assert not ran()
    path = tmp_path / "notebooks" / "01_apples.ipynb"
    path.unlink()
    assert ran() and not ran()
    cleared = nbformat.read(path, as_version=4)
    for cell in build.code_cells(cleared):
        cell.outputs, cell.execution_count = [], None
    build.save_notebook(path, cleared)
    assert ran() and not ran()


def test_a_save_that_fails_does_not_pass_old_outputs_for_new_ones(course, tmp_path, monkeypatch):
    build.build(course, tmp_path)
    (tmp_path / "requirements.txt").write_text("peft==2  # all lessons\n")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(build, "save_notebook", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
        build.build(course, tmp_path)
    assert build.read_record(tmp_path)["01_apples"]["inputs"] != build.inputs(
        tmp_path, course.read_text(encoding="utf-8")
    )


def test_a_claim_that_does_not_hold_stops_the_build_before_the_lesson_runs(course, tmp_path, monkeypatch):
    claim = '# %% tags=["claim"]\nassert 3 > 4, "Share them"\n\n# %% [markdown]\n# ## Share them'
    course.write_text(LESSON.replace("# %% [markdown]\n# ## Share them", claim), encoding="utf-8")
    monkeypatch.setattr(build, "execute", lambda *given: pytest.fail("the lesson was run"))
    with pytest.raises(BuildError, match='it no longer holds that "Share them"'):
        build.build(course, tmp_path)
    with pytest.raises(BuildError, match='it no longer holds that "Share them"'):
        build.build_classroom(course, tmp_path)


def test_the_build_runs_the_unsolved_lesson_and_keeps_its_outputs(course, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    course.write_text(
        LESSON.replace(
            'print("done")', 'import os\nprint(os.environ.get("COURSE_STRICT"), os.path.basename(os.getcwd()))'
        ),
        encoding="utf-8",
    )
    build.build(course, tmp_path)
    learner = nbformat.read(tmp_path / "notebooks" / "01_apples.ipynb", as_version=4)
    outputs = {cell.id: cell.outputs[0].text for cell in learner.cells if cell.get("outputs")}
    assert outputs["count-the-apples-1"] == "3\n"
    assert outputs["exercise-01-share"] == "Ellipsis\n"
    assert outputs["share-them-1"] == "None notebooks\n"
    assert "About 1 minute" in learner.cells[0].source
    solved = nbformat.read(tmp_path / "solutions" / "01_apples.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in solved.cells)
    record = json.loads((tmp_path / "lessons" / "measured.json").read_text(encoding="utf-8"))["01_apples"]
    assert record["minutes"] >= 1 and record["seconds"] > 0
    assert 0.01 < record["peak_gb"] < 3 and record["cpu"] and record["cores"] == os.cpu_count()


def test_a_lesson_that_fails_leaves_the_old_notebooks_whole(course, tmp_path):
    build.build(course, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.ipynb")}
    course.write_text(LESSON.replace('print("done")', "print(1 / 0)"), encoding="utf-8")
    with pytest.raises(BuildError, match="Cell share-them-1 failed(.|\n)*ZeroDivisionError"):
        build.build(course, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.ipynb")} == before


def test_peak_memory_is_that_of_the_kernel(course, tmp_path):
    course.write_text(
        LESSON.replace("apples = 3", "apples = 3\nheavy = bytearray(b'x') * 400_000_000"),
        encoding="utf-8",
    )
    build.build(course, tmp_path)
    assert 0.4 < build.read_record(tmp_path)["01_apples"]["peak_gb"] < 0.8


def test_the_build_tells_what_is_wrong_with_a_notebooks_form(course, tmp_path):
    course.write_text(LESSON.replace("print(apples)", "import sys\nprint(1, file=sys.stderr)"), encoding="utf-8")
    assert build.build(course, tmp_path) == ["notebooks: count-the-apples-1 has text on stderr"]


def test_the_classroom_edition_goes_where_nbgrader_looks(course, tmp_path):
    course.write_text(LESSON.replace("{{time}}", "2"), encoding="utf-8")
    build.build_classroom(course, tmp_path)
    path = tmp_path / "classroom" / "staging" / "source" / "01_apples" / "01_apples.ipynb"
    assert "exercise-01-share-test" in code(nbformat.read(path, as_version=4))


def test_a_measurement_is_recorded_only_when_it_moved_noticeably():
    old = {"minutes": 2, "seconds": 100.0, "peak_gb": 1.0, "cpu": "then", "cores": 2}
    assert build.updated(old, {"seconds": 129.0, "peak_gb": 0.8, "cpu": "now", "cores": 4}) is old
    slower = {"seconds": 131.0, "peak_gb": 1.0, "cpu": "now", "cores": 4}
    assert build.updated(old, slower) == {"minutes": 2, **slower}
    assert build.updated(old, {"seconds": 100.0, "peak_gb": 1.4, "cpu": "now", "cores": 4})["cpu"] == "now"
    assert build.updated(None, {"seconds": 20.0, "peak_gb": 1.0})["minutes"] == 1
    assert "first_text_s" in build.updated(old, {"seconds": 100.0, "peak_gb": 1.0, "first_text_s": 9.0})


def test_the_time_to_the_first_text_is_recorded(course, tmp_path):
    course.write_text(LESSON.replace('["measured"]', '["measured", "first-text"]'), encoding="utf-8")
    build.build(course, tmp_path)
    entry = build.read_record(tmp_path)["01_apples"]
    assert 0 < entry["first_text_s"] <= entry["seconds"]


# README's table


def test_the_table_is_written_between_its_markers(course, tmp_path):
    record = {"01_apples": {"minutes": 2, "seconds": 100, "peak_gb": 1.25}}
    (tmp_path / "lessons" / "measured.json").write_text(json.dumps(record))
    assert "| [01 Count the apples](lessons/01_apples.py) | 2 min | 1.2 GB |" in build.table(tmp_path)
    (tmp_path / "notebooks").mkdir(exist_ok=True)
    (tmp_path / "notebooks" / "01_apples.ipynb").touch()
    table = build.table(tmp_path)
    assert "| [01 Count the apples](notebooks/01_apples.ipynb) | 2 min | 1.2 GB |" in table
    readme = build.with_table(f"before\n{build.TABLE_BEGIN}\nold\n{build.TABLE_END}\nafter\n", table)
    assert readme == f"before\n{build.TABLE_BEGIN}\n{table}\n{build.TABLE_END}\nafter\n"
    assert build.with_table(readme, table) == readme
    with pytest.raises(BuildError, match="README.md needs the lines"):
        build.with_table("no markers", table)


def test_a_lesson_without_a_title_is_refused():
    with pytest.raises(BuildError, match="has no title"):
        editions.title(editions.parse("# %%\nprint(1)\n"))


def test_the_command_builds_all_and_writes_the_table(course, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Course\n{build.TABLE_BEGIN}\n{build.TABLE_END}\n", encoding="utf-8")
    assert build.main(["notebooks"], tmp_path) == 0
    assert " min | 0.1 GB |" in readme.read_text(encoding="utf-8")
    assert build.main(["classroom", "01"], tmp_path) == 0
    assert len(list(tmp_path.rglob("*.ipynb"))) == 3


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path):
    assert build.main(["notebooks", "99"], tmp_path) == "There is no lesson lessons/99*.py."


# The committed notebooks are those of the source


def outline(notebook):
    """Return what the source alone decides: all but the outputs, and whether they are folded."""
    return [
        (cell.id, cell.cell_type, {name: cell.metadata[name] for name in cell.metadata if name not in editions.FOLDED})
        + (cell.source,)
        for cell in notebook.cells
    ]


def drift(root):
    """Return what differs between the lessons' sources and the stored notebooks."""
    paths = build.sources(root)
    record = build.read_record(root)
    found, lessons = [], {path: build.filled(path, record) for path in paths}
    for edition, make in (("notebooks", editions.learner), ("solutions", editions.solved)):
        stored = {path.stem: path for path in (root / edition).glob("*.ipynb")}
        found += [f"{edition}/{name}: no such lesson" for name in sorted(set(stored) - {path.stem for path in paths})]
        for path in paths:
            if path.stem not in stored:
                found.append(f"{edition}/{path.stem}: not built")
            elif outline(nbformat.read(stored[path.stem], as_version=4)) != outline(make(lessons[path])):
                found.append(f"{edition}/{path.stem}: differs from its source, run make notebooks")
    return found


def test_the_drift_test_sees_drift(course, tmp_path):
    build.build(course, tmp_path)
    assert drift(tmp_path) == []
    course.write_text(LESSON.replace('print("done")', 'print("over")'), encoding="utf-8")
    assert [line.split(":")[0] for line in drift(tmp_path)] == ["notebooks/01_apples", "solutions/01_apples"]
    course.write_text(LESSON.replace("each = apples // people", "each = int(apples / people)"), encoding="utf-8")
    assert [line.split(":")[0] for line in drift(tmp_path)] == ["solutions/01_apples"]
    course.write_text(LESSON, encoding="utf-8")
    (tmp_path / "solutions" / "01_apples.ipynb").rename(tmp_path / "solutions" / "02_pears.ipynb")
    assert drift(tmp_path) == ["solutions/02_pears: no such lesson", "solutions/01_apples: not built"]


def test_the_committed_notebooks_are_those_of_the_source():
    assert drift(build.ROOT) == []


def test_the_readmes_table_is_that_of_the_record():
    readme = (build.ROOT / "README.md").read_text(encoding="utf-8")
    assert build.with_table(readme, build.table(build.ROOT)) == readme


def test_every_exercise_of_the_lessons_has_its_check_and_says_what_it_takes():
    from course_utils.exercises import all_exercises

    known = {one.name: one for one in all_exercises()}
    used = []
    for path in build.sources(build.ROOT):
        text = ""
        for cell in build.read_lesson(path).cells:
            if cell.cell_type == "markdown":
                text = cell.source
            role = cell.metadata.lesson
            if role.get("role") == "exercise":
                assert role["name"] in known and role["name"].split(".")[0] == path.stem.split("_")[0]
                one = known[role["name"]]
                assert one.level in text.lower() and f"{one.minutes} min" in text, f"{one.name}: header"
                used.append(one.name)
    assert sorted(used) == sorted(known)
