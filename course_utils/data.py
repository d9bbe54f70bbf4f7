"""The shipped tasks, loaded with `datasets` from local files: no network, nothing written into the checkout."""

from __future__ import annotations

import glob

from course_utils import runtime
from course_utils.runtime import CourseError

TASKS = ("reading", "sailor", "extract", "mood", "recall")
SPLITS = ("train", "validation", "test")


def task_files(task: str) -> dict[str, str]:
    """Split -> path of its JSONL file.

    A row is {"prompt": [{"role": "user", "content": str}], "completion": [{"role": "assistant", "content": str}],
    "kind": str, "novel": bool}: `kind` is what sort of question it is, and a `novel` row uses names and objects that
    the train split never does.

    Raises CourseError if there is no such task or a file is missing.
    """
    if task not in TASKS:
        raise CourseError(f"There is no task {task!r}. Choose one of: {', '.join(TASKS)}.")
    files = {split: runtime.data_dir() / task / f"{split}.jsonl" for split in SPLITS}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise CourseError(f"There is no file {', '.join(missing)}. Restore it with `git checkout -- data`.")
    return {split: str(path) for split, path in files.items()}


def load_task(task: str, split: str | None = None):
    """A task as a `datasets.DatasetDict` with train, validation and test, or one split as a `datasets.Dataset`.

    The prepared copy is kept under `runs/`, so a read-only checkout will do.

    Raises CourseError if there is no such task or split, or if a file is missing or isn't JSON lines.
    """
    if split is not None and split not in SPLITS:
        raise CourseError(f"There is no split {split!r}. Choose one of: {', '.join(SPLITS)}.")
    files = task_files(task)

    import datasets

    # Escaped, since datasets takes a file name for a pattern: a checkout in "courses [old]" would not be found.
    patterns = {name: glob.escape(path) for name, path in files.items()}
    # Else datasets tells a server, in a request of its own, that the JSON loader was used.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    bars_were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # they write to stderr, or are widgets that leave nothing in a saved notebook
    try:
        loaded = datasets.load_dataset("json", data_files=patterns, cache_dir=str(runtime.runs_dir() / "cache" / "datasets"))
    except datasets.exceptions.DatasetGenerationError as error:
        raise CourseError(
            f"The files of {task!r} in {runtime.data_dir() / task} can't be read as JSON lines ({error.__cause__}). "
            "Restore them with `git checkout -- data`."
        ) from error
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()
    return loaded if split is None else loaded[split]
