"""Grade submissions side by side: each in a process tree of its own that is watched, and none in silence."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import psutil
from nbgrader.api import MissingEntry

from adapter_checks.errors import InputError
from classroom import watch
from classroom.collect import collect
from course_utils.files import write_text
from tools.build import ROOT

ATTEMPTS = 3  # A cell that brings the kernel down is left out, and the rest graded; so often at most.


def grade(course, source, limits=watch.Limits(), jobs=None, only="", learner="", names=None, say=print):
    """Grade every submission in the folder or zip `source`; return (grading.json's content, complaints).

    `jobs` run at a time: as many as there are cores, or as memory allows with each at its limit. `only` and `learner`
    choose lessons (by the beginning of the name) and one learner. A complaint names a file that is no submission.
    Raises `InputError` if there is no submission.
    """
    lessons, record, stop = (
        {name: _marks(course, name) for name in course.lessons()},
        course.record(),
        threading.Event(),
    )
    submissions, complaints = collect(source, lessons, names, known=record)
    submissions = [one for one in submissions if one.lesson.startswith(only) and learner in ("", one.learner)]
    if not submissions:
        raise InputError("\n".join([f"There is no notebook of a staged lesson in {source}.", *complaints]))
    jobs = jobs or default_jobs(limits)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    say(f"{len(submissions)} submissions, {jobs} at a time")
    if record and (new := sorted({one.learner for one in submissions} - set(record))):
        say(f"not graded before: {', '.join(new)}")
    with course.gradebook() as gradebook:
        for one in submissions:
            gradebook.update_or_create_student(one.learner)
    before = {one: record.get(one.learner, {}).get(one.lesson) for one in submissions}
    for (
        one
    ) in submissions:  # until it is done, whatever ends the grading: an old score must not stand for a new notebook
        _note(record, one, _not_graded(one, "grading was stopped before it was done: grade this submission again"))
    _save(course, record)
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_grade_one, course, one, limits, threads, stop): one for one in submissions}
        try:
            for number, future in enumerate(as_completed(running), 1):
                one, found = running[future], _result(future, running[future])
                if (earlier := before[one]) and earlier["file"] != found["file"]:
                    found["problems"].append(
                        f"graded before from {earlier['file']}: look whether that is the same person"
                    )
                _note(record, one, found)
                _save(course, record)
                say(f"{number}/{len(running)} {one.lesson} {one.learner}: {found['status']}, {found['seconds']:.0f} s")
        except BaseException:
            stop.set()
            for future in running:
                future.cancel()
            raise
    return record, complaints


def _note(record, one, found):
    record.setdefault(one.learner, {})[one.lesson] = found


def _save(course, record):
    write_text(course.root / "grading.json", json.dumps(record, indent=1, sort_keys=True) + "\n")


def _not_graded(one, problem):
    return {"status": "not graded", "problems": [problem], "seconds": 0.0, "peak_gb": 0.0, "file": str(one.file.path)}


def _result(future, one):
    """What was found for `one`; a fault of the grader itself is that submission's alone, too."""
    try:
        return future.result()
    except Exception as error:
        return _not_graded(one, f"The grader itself failed: {type(error).__name__}: {error}"[:300])


def default_jobs(limits):
    """One job a core, but no more than fit into the memory that is free now, each at its limit; at least one."""
    return max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available / (limits.memory_gb * 1e9))))


def _marks(course, lesson):
    """The ids by which a lesson's answer and test cells are known, as nbgrader's and as cells."""
    cells = [cell for pair in course.exercises(lesson).values() for cell in pair]
    return {cell.id for cell in cells} | {cell.metadata.nbgrader.grade_id for cell in cells}


def _grade_one(course, one, limits, threads, stop):
    """Grade one submission; return {status, problems, seconds, peak_gb, file, version}."""
    problems, blocked, seconds, peak = list(one.notes), {}, 0.0, 0.0
    _take_in(course, one)
    failure = one.problem
    attempts = 0 if failure else ATTEMPTS
    for attempt in range(attempts):
        ended, result, cell = _attempt(course, one, limits, threads, stop, blocked)
        seconds, peak = seconds + ended.seconds, max(peak, ended.peak_gb)
        failure = _failure(ended, result, limits)
        if not failure:
            break
        name = _suspect(course, one, cell)
        if stop.is_set() or not name or attempt == ATTEMPTS - 1:
            break
        blocked[cell] = failure
        problems.append(f"{name}: {failure}; the cell was left out, and the rest graded.")
    if failure:
        problems.append(failure)
        _forget(course, one)
    else:
        problems += nbformat.read(
            course.notebook("autograded", one.lesson, one.learner), as_version=4
        ).metadata.classroom.notes
    status = "not graded" if failure else "graded"
    return {
        "status": status,
        "problems": problems,
        "seconds": round(seconds, 1),
        "peak_gb": peak,
        "file": str(one.file.path),
        "version": course.version(one.lesson),
    }


def _take_in(course, one):
    """Put the submission where nbgrader looks for it, byte for byte but for a byte order mark."""
    path = course.notebook("submitted", one.lesson, one.learner)
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir(parents=True)
    path.write_bytes((one.file.content or b"").removeprefix(b"\xef\xbb\xbf"))


def _attempt(course, one, limits, threads, stop, blocked):
    """Run nbgrader once; return how it ended, what it reported or None, and the cell that ran last or None."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        scratch = Path(scratch)
        job = {
            "root": str(course.root),
            "lesson": one.lesson,
            "learner": one.learner,
            "cell_seconds": limits.cell_seconds,
            "blocked": blocked,
            "trace": str(scratch / "trace"),
            "result": str(scratch / "result"),
        }
        # What a learner's code passes and writes stays out of the instructor's own records.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
        environment |= {
            "COURSE_RUNS": str(scratch / "runs"),
            "IPYTHONDIR": str(scratch / "ipython"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        with open(scratch / "log", "wb") as log:
            ended = watch.run(
                [sys.executable, "-m", "classroom.worker", json.dumps(job)],
                limits,
                stop,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return ended, _read(scratch / "result") or {"error": _last_line(scratch / "log")}, _read(scratch / "trace")


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _last_line(path):
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _failure(ended, result, limits):
    """Return why there is no grade, in a few words, or ""."""
    if ended.why == "memory":
        return f"it took more than {limits.memory_gb:g} GB of memory"
    if ended.why == "time":
        return f"the notebook took longer than {limits.seconds} s"
    if ended.why == "stopped":
        return "grading was stopped"
    if result.get("success"):
        return ""
    log = result.get("log", "") + result.get("error", "")
    if "DeadKernelError" in log:
        return "the kernel died"
    if "CellTimeoutError" in log:  # Where an interrupt helps, nbgrader itself notes the timeout, and goes on.
        return f"it ran longer than {limits.cell_seconds} s and could not be interrupted"
    causes = [line for line in log.splitlines() if line.split(":")[0].endswith(("Error", "Exception"))]
    return f"nbgrader failed: {(causes[-2:] or [log[-200:] or 'it said nothing'])[0][:200]}"


def _suspect(course, one, cell):
    """Return a name for the cell if it is a learner's doing, else None: then leaving it out would not be fair."""
    released = {known.id: known for known in nbformat.read(course.notebook("release", one.lesson), as_version=4).cells}
    if cell is None:
        return None
    if cell not in released:
        return f"the learner's own cell {cell}"
    return released[cell].metadata.get("exercise")


def _forget(course, one):
    """Take an earlier grading of this submission away: an old grade must not stand for a new notebook."""
    shutil.rmtree(course.root / "autograded" / one.learner / one.lesson, ignore_errors=True)
    with course.gradebook() as gradebook:
        try:
            gradebook.remove_submission(one.lesson, one.learner)
        except MissingEntry:
            pass
