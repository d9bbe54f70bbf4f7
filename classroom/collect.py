"""Find out whose and which lesson's each submitted notebook is, in a folder or a zip. Needs nothing of nbgrader.

A folder for each learner, at any depth below it, or one flat folder with the learner's name before the lesson's in
the file names; the names that Moodle, Canvas and Blackboard give are known. nbgrader's `zip_collect` has the same aim,
but a class of it stops at the first damaged zip, and at two notebooks of one learner.
"""

import io
import json
import os
import re
import unicodedata
import zipfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

import nbformat

LARGEST = 50_000_000  # bytes of one notebook; also what a zip in a zip may hold
NOT_LEARNERS_OWN = {".ipynb_checkpoints", "__MACOSX"}
# What learning platforms put around a learner's name. The numbers that are cut off differ from lesson to lesson.
PLATFORMS = [
    re.compile(r"(?P<learner>.+)_\d+_assignsubmission_[a-z]+"),  # Moodle: Ada Byron_1234567_assignsubmission_file_
    re.compile(r".+?_(?P<learner>[^_]+)_attempt_[\d-]+"),  # Blackboard: Week 1_abyron_attempt_2026-01-30-15-00-00_
    re.compile(r"(?P<learner>[^_]+?(?:_LATE)?_\d+)_\d+(?=_|$)"),  # Canvas: byronada_LATE_1234_56789_
]


@dataclass(frozen=True)
class File:
    """One file as it came: its path in the folder or zip, its bytes or why they can't be had, when it was changed."""

    path: PurePosixPath
    content: bytes | None
    changed: float
    problem: str = ""


@dataclass(frozen=True)
class Submission:
    """One notebook of one learner. `problem` says why it can't be graded, if it can't; `notes`, what was odd."""

    learner: str
    lesson: str
    file: File
    problem: str = ""
    notes: tuple = ()


def collect(source, lessons, names=None, known=()):
    """Return (submissions, complaints) for a folder or zip `source`.

    `lessons` is {lesson: ids of its marked cells}, `names` a regular expression with a group `learner`, searched in
    a file's path, for platforms that are not known here; `known` are learners who were graded before, whose folder is
    theirs at any depth. A complaint is a sentence about a file that is nobody's
    submission. Raises `FileNotFoundError` and `zipfile.BadZipFile` if `source` itself can't be opened.
    """
    files = _without_wrapper(list(_files(Path(source))))
    known = {name.casefold() for name in known}
    complaints, candidates, idle = [], {}, {}
    for file in files:
        place, learner = _learner(file, lessons, names, known)
        lesson = _lesson(file, lessons) if _suffix(file.path) == ".ipynb" else None
        if lesson and place:
            candidates.setdefault((place, learner), {}).setdefault(lesson, []).append(file)
        elif lesson:
            complaints.append(f"{file.path}: no folder and no part of the name says whose it is.")
        elif _suffix(file.path) == ".ipynb":
            complaints.append(f"{file.path}: neither its name nor its cells are those of a lesson that was handed out.")
        else:
            idle.setdefault((place, learner), []).append(file)
    for (place, learner), others in idle.items():
        damaged = [file for file in others if file.problem]
        complaints += [f"{file.path}: {file.problem}" for file in damaged]
        if place and not damaged and (place, learner) not in candidates:
            complaints.append(f"{place}: no notebook among {', '.join(file.path.name for file in others[:3])}.")
    submissions = []
    for (place, _), learner in _told_apart(candidates).items():
        for lesson, found in candidates[place, _].items():
            submissions.append(_one(learner, lesson, found))
    return sorted(submissions, key=lambda one: (one.lesson, one.learner)), complaints


def _files(source):
    """Yield every file of a folder or zip as a `File`, without hidden ones and links."""
    if source.is_file():
        try:
            archive = zipfile.ZipFile(source)
        except zipfile.BadZipFile as error:
            raise zipfile.BadZipFile(f"{source.name} is neither a folder nor a zip ({error}).") from error
        with archive:
            yield from _zipped(archive, PurePosixPath())
        return
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder or zip {source}.")
    for folder, names, files in os.walk(source):
        names[:] = sorted(name for name in names if not _hidden(name))
        for name in sorted(name for name in files if not _hidden(name)):
            path = Path(folder, name)
            relative = PurePosixPath(path.relative_to(source).as_posix())
            if path.is_symlink():
                yield File(relative.with_suffix(".link"), None, 0, "it is a link, which is not followed.")
            else:
                yield from _opened(relative, path.read_bytes, path.stat().st_size, path.stat().st_mtime, 0)


def _zipped(archive, before, depth=0):
    for entry in archive.infolist():
        path = before / entry.filename.replace("\\", "/").lstrip("/")
        if not entry.is_dir() and not any(_hidden(part) for part in path.parts):
            changed = datetime(*entry.date_time).timestamp()
            yield from _opened(path, lambda entry=entry: archive.read(entry), entry.file_size, changed, depth)


def _opened(path, read, size, changed, depth):
    """Yield the file at `path`, or the files in it if it is a zip; only notebooks and zips are read."""
    if _suffix(path) not in (".ipynb", ".zip"):
        yield File(path, None, changed)
    elif size > LARGEST:
        yield File(path, None, changed, f"it has {size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f}.")
    elif _suffix(path) == ".ipynb" or depth > 1:
        try:
            yield File(path, read(), changed)
        except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            yield File(path, None, changed, f"it can't be read ({error}).")
    else:
        try:
            with zipfile.ZipFile(io.BytesIO(read())) as archive:
                yield from _zipped(archive, path, depth + 1)
        except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            yield File(path, None, changed, f"the zip is damaged or locked ({error}).")


def _suffix(path):
    return path.suffix.lower()


def _hidden(name):
    return name.startswith(".") or name in NOT_LEARNERS_OWN


def _without_wrapper(files):
    """Take off the one folder that some platforms and people put around all learners' folders."""
    inside = {file.path.parts[1] for file in files if len(file.path.parts) > 2}
    if len({file.path.parts[0] for file in files}) != 1 or len(inside) < 2 or any(len(f.path.parts) < 3 for f in files):
        return files
    return [File(PurePosixPath(*file.path.parts[1:]), file.content, file.changed, file.problem) for file in files]


def _learner(file, lessons, names, known):
    """Return (the part of the path that stands for the learner, the learner's id), both "" if none does."""
    if names:
        found = re.search(names, str(file.path))
        return (found["learner"], _slug(found["learner"])) if found else ("", "")
    for depth, folder in enumerate(file.path.parts[:-1]):  # a platform's own form, or a learner who was graded before
        patterns = PLATFORMS if depth == 0 else PLATFORMS[:2]  # Canvas' form is hardly one: work_1_2 has it, too
        found = next((match for match in (pattern.match(folder) for pattern in patterns) if match), None)
        learner = _slug(found["learner"].replace("_LATE", "") if found else folder.removesuffix(".zip"))
        if found or learner.casefold() in known:
            return folder, learner
    place = file.path.parts[0]
    if len(file.path.parts) == 1:
        lesson = next((name for name in lessons if name.lower() in place.lower()), None)
        if lesson:
            place = place[: place.lower().index(lesson.lower())]
        elif not any(pattern.match(place) for pattern in PLATFORMS):
            place = ""
    found = next((match for match in (pattern.match(place) for pattern in PLATFORMS) if match), None)
    learner = found["learner"].replace("_LATE", "") if found else place.removesuffix(".zip")
    return place, _slug(learner)


def _slug(name):
    """A name that is safe as a folder, in nbgrader's file patterns and in a spreadsheet; accents stay."""
    return re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name)).strip("-._")[:100]


def _lesson(file, lessons):
    """Return the lesson that a notebook's name or, failing that, its cells belong to, or None."""
    named = [lesson for lesson in lessons if lesson.lower() in file.path.name.lower()]
    if named:
        return max(named, key=len)
    text = (file.content or b"").decode("utf-8", "replace")
    counts = {lesson: sum(f'"{identity}"' in text for identity in ids) for lesson, ids in lessons.items()}
    best = max(counts, key=counts.get, default=None)
    return best if best and counts[best] else None


def _told_apart(candidates):
    """Return {(place, learner): learner}; two places are one learner only if no lesson is in both."""
    chosen, taken = {}, {}
    for (place, learner), found in sorted(candidates.items()):
        name = learner
        if taken.get(name.casefold(), set()) & set(found):
            name = _slug(re.sub(r"_assignsubmission_.*", "", place))
        number = 1
        while taken.get(name.casefold(), set()) & set(found):
            number += 1
            name = f"{learner}-{number}"
        taken.setdefault(name.casefold(), set()).update(found)
        chosen[place, learner] = name
    return chosen


def _one(learner, lesson, files):
    """Make a submission of the newest of one or more notebooks."""
    *left, file = sorted(files, key=lambda file: (file.changed, file.path.name == f"{lesson}.ipynb", str(file.path)))
    notes = []
    if left:
        notes.append(f"{len(files)} notebooks of this lesson; the newest, {file.path.name}, was graded.")
    return Submission(learner, lesson, file, file.problem or unreadable(file.content), tuple(notes))


def unreadable(content):
    """Return a sentence that says why these bytes are no notebook, or "" if they are one."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "Not a notebook: the file is not text in UTF-8."
    if not text.strip():
        return "Not a notebook: the file is empty."
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"Not a notebook: the file is not JSON ({error})."
    if not isinstance(data, dict) or "nbformat" not in data:
        return "Not a notebook: the file is JSON, but not in the form of a notebook."
    try:
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # Each part of nbformat raises errors of its own.
        return f"Not a sound notebook: {str(error).splitlines()[0][:150]}"
    return ""
