"""From the gradebook to a table of scores, a report in words, and feedback pages."""

import base64
import csv
import html
import io
import json
import re
from pathlib import Path

import nbformat
from nbgrader.converters import GenerateFeedback
from nbgrader.utils import capture_log

from adapter_checks.errors import InputError
from course_utils.files import write_text
from tools import build

COLUMNS = ["learner", "lesson", "exercise", "score", "max_score", "status", "note"]


def rows(course):
    """Return one dict of `COLUMNS` for each learner, lesson and exercise, from the gradebook and grading.json.

    `status` is passed, partly, failed, not attempted, not graded or not submitted. The last two have no score: they
    are for a person to settle, and no 0. Raises `InputError` if nothing is graded yet.
    """
    record, found = _record(course), []
    handed_in = sorted({lesson for lessons in record.values() for lesson in lessons})
    with course.gradebook() as gradebook:
        for learner in sorted(record):
            for lesson in handed_in:
                entry = record[learner].get(lesson)
                for name, pair in course.exercises(lesson).items():
                    row = dict.fromkeys(COLUMNS, "") | {"learner": learner, "lesson": lesson, "exercise": name}
                    row["max_score"] = pair[-1].metadata.nbgrader.points
                    if not entry:
                        row["status"] = "not submitted"
                    elif entry["status"] == "not graded":
                        row |= {"status": "not graded", "note": entry["problems"][-1]}
                    else:
                        row |= _graded(course, gradebook, learner, lesson, pair)
                    found.append(row)
    return found


def _record(course):
    """What was graded so far. Raises `InputError` if that is nothing."""
    record = course.record()
    if not record:
        raise InputError("Nothing is graded yet: run `make grade SUBMISSIONS=folder-or-zip` first.")
    return record


def _graded(course, gradebook, learner, lesson, pair):
    answer, test = pair
    grade = gradebook.find_grade(test.metadata.nbgrader.grade_id, lesson, lesson, learner)
    notebook = nbformat.read(course.notebook("autograded", lesson, learner), as_version=4)
    cells = {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}
    given = cells.get(answer.metadata.nbgrader.grade_id)
    if grade.manual_score is not None:
        note = "graded by hand"
    elif grade.score >= grade.max_score:
        note = ""
    else:
        note = _why(given, cells[test.metadata.nbgrader.grade_id])
    status = "passed" if grade.score >= grade.max_score else "partly" if grade.score else "failed"
    if status == "failed" and given and given.source.strip() == answer.source.strip():
        status, note = "not attempted", ""
    return {"score": f"{grade.score:g}", "status": status, "note": note}


def _why(given, test):
    """Say in one line why an answer has no points: its own error, or the test's."""
    if given is None:
        return "the answer cell is missing"
    error = _error(given)
    if error:
        return f"the answer was stopped by {error}"
    printed = "".join(output.text for output in given.get("outputs", []) if output.output_type == "stream")
    if re.search(r"^CHECK BROKEN ·", printed, re.MULTILINE):
        return "the visible check is broken here, which says nothing about the answer"
    passes = "it passes the visible check and " if re.search(r"^PASS ·", printed, re.MULTILINE) else ""
    error = _error(test)
    return f"{passes}fails the hidden test" + ("" if error in ("", "AssertionError") else f", stopped by {error}")


def _error(cell):
    """What stopped a cell, in one line, or ""."""
    errors = {output.ename: output.evalue for output in cell.get("outputs", []) if output.output_type == "error"}
    if "Stopped" in errors:  # by the grader, which left the cell out
        return f"the grader: {errors['Stopped']}"
    if "CellTimeoutError" in errors:
        return "the time limit of a cell"
    for name, value in errors.items():
        return " ".join(f"{name}: {value}".split())[:150] if value else name
    return ""


def write(course, source=None, complaints=()):
    """Write scores.csv and report.md into the course's folder; return the report's text.

    `complaints` about files of `source` are kept for the reports to come, in the place of earlier ones about it.
    """
    found, kept = rows(course), course.root / "complaints.json"
    about = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if source is not None:
        about[str(Path(source).resolve())] = list(complaints)
        write_text(kept, json.dumps(about, indent=1, sort_keys=True) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_text(course.root / "scores.csv", text.getvalue())
    summary = _summary(course.record(), found, [one for said in about.values() for one in said])
    write_text(course.root / "report.md", summary)
    return summary


def _summary(record, found, complaints):
    lines = ["# Grading", "", "| Lesson | Submissions | Not graded | Mean score |", "| --- | --- | --- | --- |"]
    for lesson in sorted({row["lesson"] for row in found}):
        entries = [lessons[lesson] for lessons in record.values() if lesson in lessons]
        scored = [row for row in found if row["lesson"] == lesson and row["score"] != ""]
        possible = sum(row["max_score"] for row in scored)
        mean = f"{sum(float(row['score']) for row in scored) / possible:.0%}" if possible else "none"
        ungraded = sum(entry["status"] == "not graded" for entry in entries)
        lines.append(f"| {lesson} | {len(entries)} | {ungraded} | {mean} |")
    lines += ["", "## To look at", ""]
    marks = {"graded": "", "not graded": " (not graded)"}
    seen = [
        f"- **{learner}**, {lesson}{marks[entry['status']]}: {' '.join(map(_sentence, entry['problems']))}"
        for learner, lessons in sorted(record.items())
        for lesson, entry in sorted(lessons.items())
        if entry["problems"]
    ]
    lines += seen + [f"- {complaint}" for complaint in complaints] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _sentence(text):
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!")) else ".")


def feedback(course, images=build.ROOT / "images"):
    """Write a page for each submission into feedback/; return how many, and nbgrader's complaints as one text.

    Whoever could not be graded gets a page, too, which says why. The lessons' pictures, from the folder `images`, are
    put into the pages.
    """
    pages, complaints = 0, []
    for learner, lessons in sorted(_record(course).items()):
        for lesson, entry in sorted(lessons.items()):
            page = course.root / "feedback" / learner / lesson / f"{lesson}.html"
            if entry["status"] == "not graded":
                problems = "".join(f"<li>{html.escape(_sentence(one))}</li>" for one in entry["problems"])
                write_text(
                    page,
                    f"<!doctype html><meta charset='utf-8'><title>{lesson}</title>\n"
                    f"<h1>{lesson}: not graded</h1><ul>{problems}</ul>\n",
                )
            else:
                generate = GenerateFeedback(coursedir=course.directory(lesson, learner), config=course.config())
                generate.force = True
                result = capture_log(generate)
                if not result["success"]:
                    complaints.append(f"{learner}, {lesson}: {result.get('log', result['error'])}")
                    continue
                write_text(page, _with_pictures(page.read_text(encoding="utf-8"), images))
            pages += 1
    return pages, "\n".join(complaints)


def _with_pictures(page, images):
    """Put the pictures into the page, so that it can be sent as one file; nbconvert does not look outside its folder."""
    for path in sorted(images.glob("*.png")):
        link = f'src="../images/{path.name}"'
        if link in page:
            data = base64.b64encode(path.read_bytes()).decode()
            page = page.replace(link, f'style="max-width: 100%" src="data:image/png;base64,{data}"')
    return page
