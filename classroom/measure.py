"""How long does a class take to grade?

    python -m classroom.measure 01 30       (a lesson, how many submissions)

Makes that many submissions of the lesson, a third each solved, half solved and untouched, in a folder of its own,
grades them as `make grade` does, and prints the time. Nothing else should run meanwhile.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from classroom.course import Course
from classroom.grade import grade
from classroom.stage import stage
from course_utils import runtime
from tools import editions


def with_answers(course, lesson, count=None):
    """Return the released notebook of `lesson` with the first `count` exercises solved, or all."""
    notebook = nbformat.read(course.notebook("release", lesson), as_version=4)
    source = {cell.id: cell.source for cell in nbformat.read(course.notebook("source", lesson), as_version=4).cells}
    chosen = [answer.id for answer, _ in course.exercises(lesson).values()][:count]
    for cell in notebook.cells:
        if cell.id in chosen:
            cell.source = "".join(
                editions.split(source[cell.id], editions.BEGIN_SOLUTION, editions.END_SOLUTION, lesson)
            )
    return notebook


def main(only, learners):
    """Stage the lesson, make the submissions, grade them; return a line with the time."""
    with tempfile.TemporaryDirectory() as folder:
        course, handed_in = Course(Path(folder, "class")), Path(folder, "handed in")
        stage(course, only=only)
        (lesson,) = course.lessons()
        exercises = len(course.exercises(lesson))
        for number in range(learners):
            notebook = with_answers(course, lesson, (exercises, exercises // 2, 0)[number % 3])
            path = handed_in / f"learner-{number:02}" / f"{lesson}.ipynb"
            path.parent.mkdir(parents=True)
            nbformat.write(notebook, path)
        began = time.perf_counter()
        record, _ = grade(course, handed_in)
        minutes = (time.perf_counter() - began) / 60
        entries = [lessons[lesson] for lessons in record.values()]
        if problems := {problem for entry in entries if entry["status"] != "graded" for problem in entry["problems"]}:
            sys.exit("Not all were graded, so there is no time to state: " + "; ".join(sorted(problems)))
        longest, peak = max(entry["seconds"] for entry in entries), max(entry["peak_gb"] for entry in entries)
        return (
            f"{lesson}: {learners} submissions in {minutes:.1f} min on {os.cpu_count()} cores ({runtime.processor()}); "
            f"the longest took {longest:.0f} s, the largest {peak:.1f} GB"
        )


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2])))
