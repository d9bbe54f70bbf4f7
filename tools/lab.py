"""Copy the lessons to work/, where a learner works on them, so that `git pull` and a learner never meet.

    python -m tools.lab         copies what is missing, and says which lessons have a newer edition
    python -m tools.lab 01      takes the new edition of lesson 01, and keeps the old copy beside it

A copy in which nothing was written is replaced by a newer edition without a word; any other is never touched.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"
RECORD = ".copied.json"  # {file: digest of the edition that it was copied from}


def digest(path):
    """Return a digest of what a person can have written or run in a notebook: sources and outputs, not metadata."""
    content = path.read_bytes()
    try:
        cells = json.loads(content)["cells"]
        content = json.dumps([(cell["source"], cell.get("outputs")) for cell in cells]).encode()
    except (ValueError, KeyError, TypeError):
        pass  # Not a whole notebook: whatever it is, it is the learner's.
    return hashlib.sha256(content).hexdigest()


def refresh(root=ROOT, update=None):
    """Bring work/ up to date with notebooks/; return what there is to say, a list of lines.

    `update` is the beginning of the names whose new edition is wanted.
    """
    work = Path(root, "work")
    work.mkdir(exist_ok=True)
    record, newer, said = _read(work / RECORD), [], []
    for edition in sorted(Path(root, "notebooks").glob("*.ipynb")):
        copy, latest, origin = work / edition.name, digest(edition), record.get(edition.name)
        mine = digest(copy) if copy.exists() else None
        if mine not in (None, latest, origin):  # Something was written in it.
            if origin == latest:
                continue
            if update is None or not edition.name.startswith(update):
                newer.append(edition.stem)
                continue
            kept = next(path for path in _free_names(copy) if not path.exists())
            copy.rename(kept)
            said.append(f"{copy.name} is the new edition; yours is kept as {kept.name}.")
        if mine != latest:
            shutil.copyfile(edition, work / ".new")
            os.replace(work / ".new", copy)  # In one step: a full disk must not leave half a notebook.
        record[edition.name] = latest
    (work / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    if newer:
        shortest = newer[0] if newer[0].startswith("deep_") else newer[0][:2]
        said.append(
            f"There is a newer edition of {', '.join(newer)}. Yours stays as it is; to take the new one and keep yours "
            f"beside it: make lab UPDATE={shortest} (or python -m tools.lab {shortest})."
        )
    return said


def without_news(prefix=sys.prefix):
    """Keep the JupyterLab of the environment at `prefix` from asking whether to fetch news; no other is touched."""
    path = Path(prefix, "etc", "jupyter", "labconfig", "page_config.json")
    settings = _read(path)
    disabled = settings.setdefault("disabledExtensions", {})
    if ANNOUNCEMENTS not in disabled:  # Else it is as wanted, or as somebody wants it.
        disabled[ANNOUNCEMENTS] = True
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _read(record):
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # Then each copy that differs counts as the learner's own.


def _free_names(copy):
    yield copy.with_name(f"{copy.stem} (yours).ipynb")
    number = 1
    while number := number + 1:
        yield copy.with_name(f"{copy.stem} (yours {number}).ipynb")


def main(arguments=None, root=ROOT):
    """Refresh work/. Returns an exit status or a sentence for stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("update", nargs="?", help="the beginning of a lesson's name, such as 01")
    update = parser.parse_args(arguments).update
    if update and not any(Path(root, "notebooks").glob(f"{update}*.ipynb")):
        return f"There is no lesson notebooks/{update}*.ipynb."
    try:
        for line in refresh(root, update):
            print(line)
    except OSError as error:
        return f"The lessons can't be copied to {Path(root, 'work')} ({error.strerror}). Put the course where you can write."
    return 0


if __name__ == "__main__":
    if sys.prefix != sys.base_prefix:  # The course's own environment, not the machine's.
        with contextlib.suppress(OSError):
            without_news()
    sys.exit(main())
