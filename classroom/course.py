"""One class's folder: where nbgrader keeps everything, and what is known of its lessons.

source/      the instructor's edition     submitted/   what learners handed in, as it came
release/     the learner's edition        autograded/  the same, run and graded
handout/     what to give to learners     feedback/    a page for each
gradebook.db, grading.json                scores.csv, report.md
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import nbformat
from nbgrader.api import Gradebook
from nbgrader.coursedir import CourseDirectory
from traitlets.config.loader import PyFileConfigLoader

from adapter_checks.errors import InputError

HERE = Path(__file__).resolve().parent
DEFAULT_ROOT = HERE / "staging"


class Course:
    """The folder `root` of a class, laid out as nbgrader wants it, under `classroom/nbgrader_config.py`."""

    def __init__(self, root=DEFAULT_ROOT):
        self.root = Path(root).resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        # nbgrader calls `alembic` by name when it makes a gradebook, and an environment need not be activated.
        if not shutil.which("alembic"):
            os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    def config(self):
        """Return nbgrader's configuration for this folder, as traitlets' `Config`."""
        config = PyFileConfigLoader("nbgrader_config.py", path=str(HERE)).load_config()
        config.CourseDirectory.root = str(self.root)
        # Graders that run side by side wait for each other's writing, a minute if need be.
        config.CourseDirectory.db_url = f"sqlite:///{self.root / 'gradebook.db'}?timeout=60"
        return config

    def directory(self, lesson, learner="*"):
        """Return nbgrader's `CourseDirectory`, set to one assignment and to one learner or all."""
        directory = CourseDirectory(config=self.config())
        directory.assignment_id, directory.student_id = lesson, learner
        return directory

    def gradebook(self):
        """Open the gradebook; use it in a `with`."""
        return Gradebook(self.config().CourseDirectory.db_url)

    def notebook(self, step, lesson, learner="."):
        """The path of a lesson's notebook at one of nbgrader's steps, such as "release" or "autograded"."""
        return self.root / step / learner / lesson / f"{lesson}.ipynb"

    def lessons(self):
        """Return the names of the lessons that were handed out, in order. Raises `InputError` when there is none."""
        found = sorted(path.stem for path in self.root.glob("release/*/*.ipynb") if path.stem == path.parent.name)
        if not found:
            raise InputError("No lesson is staged yet: run `make classroom` first.")
        return found

    def exercises(self, lesson):
        """Return {exercise: (answer cell, test cell)} of a lesson as it was released, in order."""
        cells = {}
        for cell in nbformat.read(self.notebook("release", lesson), as_version=4).cells:
            if "exercise" in cell.metadata:
                cells.setdefault(cell.metadata.exercise, []).append(cell)
        return {name: tuple(pair) for name, pair in cells.items()}

    def version(self, lesson):
        """A fingerprint of a lesson's exercises as they are staged now: answers, hidden tests and points."""
        marked = [
            (cell.metadata.exercise, cell.source, cell.metadata.get("nbgrader", {}).get("points"))
            for cell in nbformat.read(self.notebook("source", lesson), as_version=4).cells
            if "exercise" in cell.metadata
        ]
        return hashlib.sha256(json.dumps(marked).encode()).hexdigest()[:12]

    def record(self):
        """Return {learner: {lesson: what the last grading found}} from grading.json.

        What was graded by another version of a lesson than is staged now counts as not graded.
        """
        path = self.root / "grading.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        versions = {
            lesson: self.version(lesson) for lesson in {name for lessons in record.values() for name in lessons}
        }
        for lessons in record.values():
            for lesson, entry in lessons.items():
                if entry["status"] == "graded" and entry["version"] != versions[lesson]:
                    entry["status"] = "not graded"
                    entry["problems"].append(
                        "the lesson was staged anew with other tests or points since: grade this submission again"
                    )
        return record
