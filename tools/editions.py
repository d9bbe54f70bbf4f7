"""Turn one lesson's source into its three editions. Nothing is run or written here.

A lesson is plain text in jupytext's percent format, solved. Two marker rules, no more:

    # %% exercise="01.size_ratio" points=2
    def size_ratio(base_bytes, adapter_bytes):
        ### BEGIN SOLUTION
        return base_bytes / adapter_bytes
        ### END SOLUTION

    lesson01.size_ratio(size_ratio)

    # %%
    ### BEGIN HIDDEN TESTS
    assert size_ratio(6, 2) == 3
    ### END HIDDEN TESTS

An exercise cell holds one solution and the visible check. The hidden test is a cell of
its own that follows; only the instructor's edition keeps it. A cell with the tag `claim`
holds the text below it (see `tools.claims`); no edition keeps it.
"""

import ast
import copy
import platform
import re
import textwrap

import jupytext
import nbformat

BEGIN_SOLUTION, END_SOLUTION = "### BEGIN SOLUTION", "### END SOLUTION"
BEGIN_HIDDEN, END_HIDDEN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
LEFT_OF_TEST = "# Graded here, by a test that is put in later. Leave this cell as it is.\n"
# What JupyterLab writes into a notebook that it opens; with anything else, to open a notebook would change its file.
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": platform.python_version(),
    },
}
# JupyterLab hides the outputs of a cell with this metadata until they are clicked or the cell is run; elsewhere they show.
FOLDED = {"collapsed": True, "jupyter": {"outputs_hidden": True}}
# In their place JupyterLab shows the first line of the first output. This one nothing else shows: "text" is no type of
# content, and the LaTeX is there for nbconvert, which warns of an output that it can't show at all.
COVER = nbformat.v4.new_output("display_data", data={"text": "Predict first, then click here.", "text/latex": ""})


class BuildError(Exception):
    """A lesson's source does not keep the rules, or a lesson failed while it was run."""


def label(stem):
    """Return how lists call the lesson of this file name: its number, or that it is a deep dive."""
    return "Deep dive:" if stem.startswith("deep_") else stem[:2]


def parse(text, where="the lesson"):
    """Return the lesson's cells as a notebook: stable ids, tags, and roles under `metadata.lesson`.

    `text` is the source, `where` names it in messages. Raises `BuildError` when a marker
    is unbalanced or stands where it may not, and when an exercise lacks its hidden test.
    """
    source = jupytext.reads(text, fmt="py:percent")
    cells, headings, exercise = [], {}, None
    section, position, tested = "start", 0, set()
    for cell in source.cells:
        heading = re.match(r"#{1,6} +(.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            section, position = _unique(_slug(heading[1]), headings), 0
        role = {}
        if "exercise" in cell.metadata:
            exercise = {"name": cell.metadata["exercise"], "points": cell.metadata.get("points", 1)}
            role = {"role": "exercise", **exercise}
            if any(exercise["name"] == made.metadata.lesson.get("name") for made in cells):
                raise BuildError(f"{where}: two exercises are called {exercise['name']}.")
            if not re.fullmatch(r"(\d\d|deep)\.[a-z0-9_]+", exercise["name"]):
                raise BuildError(f"{where}: an exercise is named like 01.size_ratio, not {exercise['name']}.")
            split(cell.source, BEGIN_SOLUTION, END_SOLUTION, f"{where}, exercise {exercise['name']}")
            identity = "exercise-" + _slug(exercise["name"])
        elif BEGIN_HIDDEN in cell.source or END_HIDDEN in cell.source:
            if exercise is None or exercise["name"] in tested:
                raise BuildError(f"{where}: a hidden test follows its exercise, one for each.")
            before, _, after = split(cell.source, BEGIN_HIDDEN, END_HIDDEN, where)
            if before.strip() or after.strip():
                raise BuildError(f"{where}: the hidden test of {exercise['name']} needs a cell of its own.")
            tested.add(exercise["name"])
            role = {"role": "hidden test", **exercise}
            identity = f"exercise-{_slug(exercise['name'])}-test"
        elif "claim" in cell.metadata.get("tags", []):
            role = {"role": "claim"}
            # Not counted with the others: a claim must not change the ids of the lesson's own cells.
            identity = _unique(f"{section}-claim", headings)
        else:
            identity = section if heading else f"{section}-{(position := position + 1)}"
        if role.get("role") != "exercise" and (BEGIN_SOLUTION in cell.source or END_SOLUTION in cell.source):
            raise BuildError(f"{where}: a solution stands in a cell without an exercise tag ({identity}).")
        metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        new = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
        cells.append(new(cell.source, id=identity, metadata={**metadata, "lesson": role}))
    untested = {made.metadata.lesson.name for made in cells if "name" in made.metadata.lesson} - tested
    if untested:
        raise BuildError(f"{where}: no hidden test for {', '.join(sorted(untested))}.")
    return nbformat.v4.new_notebook(cells=cells, metadata=NOTEBOOK_METADATA)


def learner(lesson):
    """Return the learner's edition of a parsed lesson: stubs for solutions, no hidden tests."""
    return _edition(lesson, stubbed)


def solved(lesson):
    """Return the solved edition of a parsed lesson: solutions without markers, no hidden tests.

    It writes to folders of its own, so that neither edition resumes a run of the other.
    """

    def without_markers(source, name):
        before, solution, after = split(source, BEGIN_SOLUTION, END_SOLUTION, name)
        return before + solution + after

    notebook = _edition(lesson, without_markers)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"\bruns_dir\(\)", 'runs_dir() / "solved"', cell.source)
    return notebook


def staging(lesson):
    """Return the instructor's edition: everything, marked with nbgrader's metadata (schema 3).

    `metadata.exercise` keeps the exercise's own name, which a grade_id can't hold. A line before each hidden test
    is what the learner sees of it.
    """
    notebook = copy.deepcopy(lesson)
    notebook.cells = [cell for cell in notebook.cells if cell.metadata.lesson.get("role") != "claim"]
    for cell in notebook.cells:
        role = cell.metadata.pop("lesson")
        if not role:
            continue
        graded = role["role"] == "hidden test"
        identity = _slug(role["name"])
        cell.metadata["exercise"] = role["name"]
        if graded:
            cell.source = LEFT_OF_TEST + cell.source
        cell.metadata["nbgrader"] = {
            "schema_version": 3,
            "grade_id": f"{identity}-test" if graded else identity,
            "grade": graded,
            "solution": not graded,
            "locked": graded,
            "task": False,
            **({"points": role["points"]} if graded else {}),
        }
    return notebook


def fold_answers(notebook):
    """Hide, in place, the outputs between each text that says **Predict** and the next text."""
    asked = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            asked = "**Predict" in cell.source
            continue
        outputs = [output for output in cell.outputs if output != COVER]
        cell.outputs = [copy.deepcopy(COVER), *outputs] if asked and outputs else outputs
        for name, value in FOLDED.items():
            cell.metadata.pop(name, None)
            if asked and outputs:
                cell.metadata[name] = copy.deepcopy(value)


def title(lesson):
    """Return the text of the lesson's first heading. Raises `BuildError` when it has none."""
    for cell in lesson.cells:
        heading = re.match(r"# +(.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            return heading[1].strip()
    raise BuildError("The lesson has no title: its first text cell begins with '# '.")


def _edition(lesson, of_exercise):
    notebook = copy.deepcopy(lesson)
    left_out = ("hidden test", "claim")
    notebook.cells = [cell for cell in notebook.cells if cell.metadata.lesson.get("role") not in left_out]
    for cell in notebook.cells:
        role = cell.metadata.pop("lesson")
        if role:
            cell.source = of_exercise(cell.source, role["name"])
    return notebook


def split(source, begin, end, where):
    """Return what stands before, between and after two marker lines, which occur once each."""
    lines = source.splitlines(keepends=True)
    found = [(i, line.strip()) for i, line in enumerate(lines) if begin in line or end in line]
    if [text for _, text in found] != [begin, end]:
        raise BuildError(f"{where}: needs one line '{begin}' and, after it, one line '{end}'.")
    (first, _), (last, _) = found
    return "".join(lines[:first]), "".join(lines[first + 1 : last]), "".join(lines[last + 1 :])


def stubbed(source, name):
    """Return an exercise cell with its solution replaced by `...`: for what it returns, or for the names used later.

    `name` is the exercise's, for the message of the `BuildError` that unusable markers raise.
    """
    before, solution, after = split(source, BEGIN_SOLUTION, END_SOLUTION, name)
    try:
        body = ast.parse(textwrap.dedent(solution)).body
    except SyntaxError as error:
        raise BuildError(f"{name}: the solution is not whole statements of Python: {error.msg}.") from error
    if any(isinstance(node, ast.Return) for statement in body for node in _own_nodes(statement)):
        stub = "return ..."
    else:
        used = [made for made in bound_names(body) if re.search(rf"\b{made}\b", after)]
        stub = " = ".join([*used, "..."])
    indent = re.match(r"[ \t]*", solution)[0]
    return f"{before}{indent}# YOUR CODE HERE\n{indent}{stub}\n{after}"


def bound_names(body):
    """Return the names that the statements of `body` bind, in order, each once."""
    names = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names[statement.name] = None
        for node in _own_nodes(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names[node.id] = None
    return list(names)


def _own_nodes(statement):
    """Walk a statement without entering the functions and classes that it defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
        return
    yield statement
    for child in ast.iter_child_nodes(statement):
        yield from _own_nodes(child)


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "section"


def _unique(name, seen):
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name}-again-{seen[name]}"
