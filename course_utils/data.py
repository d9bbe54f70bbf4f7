"""What the course ships beside models: tasks, held-out text, results of the experiments.

Everything is read from local files: no network, nothing written into the checkout.
"""

from __future__ import annotations

import csv
import glob
from pathlib import Path

from adapter_checks.errors import InputError
from course_utils import paths
from course_utils.tasks import get_task

SPLITS = ("train", "validation", "test")
# Further parts of some tasks: words that nothing was trained on, and sentences as people type them; then pairs of a better and a worse reply.
OPEN_PARTS = ("own_words", "typed")
PARTS = (*OPEN_PARTS, "pairs", "test_pairs")

# What every file of results begins with: seed; seconds of the whole run; processor model; cores that torch computed on;
# base model (the beginning of its weights' digest, or its hub id).
RESULT_COLUMNS = ("seed", "seconds", "cpu", "cores", "base")


def task_files(task: str, splits: tuple[str, ...] = SPLITS) -> dict[str, str]:
    """Split -> path of its JSONL file.

    A row is {"prompt": [{"role": "user", "content": str}], "completion": [{"role": "assistant", "content": str}],
    "kind": str, "novel": bool}: `kind` is what sort of question it is, and a `novel` row uses names and objects that
    the train split never does. A preference pair has "chosen" and "rejected" in place of
    "completion", and "guess", a wrong answer that the passage suggests.

    Raises InputError if there is no such task or a file is missing.
    """
    files = {split: paths.data_dir() / get_task(task).name / f"{split}.jsonl" for split in splits}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise InputError(f"There is no file {', '.join(missing)}. Restore it with `git checkout -- data`.")
    return {split: str(path) for split, path in files.items()}


def load_task(task: str, split: str | None = None):
    """A task as a `datasets.DatasetDict` with train, validation and test, or one split or one of PARTS as a `datasets.Dataset`.

    The prepared copy is kept under `runs/`, so a read-only checkout will do.

    Raises InputError if there is no such task or split, or if a file is missing or isn't JSON lines.
    """
    if split is not None and split not in SPLITS + PARTS:
        raise InputError(f"There is no split {split!r}. Choose one of: {', '.join(SPLITS + PARTS)}.")
    files = task_files(task, (split,) if split in PARTS else SPLITS)

    import datasets

    # Escaped, since datasets takes a file name for a pattern: a checkout in "courses [old]" would not be found.
    patterns = {name: glob.escape(path) for name, path in files.items()}
    # Else datasets tells a server, in a request of its own, that the JSON loader was used.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    bars_were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # they write to stderr, or are widgets that leave nothing in a saved notebook
    try:
        loaded = datasets.load_dataset(
            "json", data_files=patterns, cache_dir=str(paths.runs_dir() / "cache" / "datasets")
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise InputError(
            f"The files of {task!r} in {paths.data_dir() / task} can't be read as JSON lines ({error.__cause__}). "
            "Restore them with `git checkout -- data`."
        ) from error
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()
    return loaded if split is None else loaded[split]


def held_out_texts(tokenizer) -> list[str]:
    """Documents like those of the pretraining, which it never read; loss on them tells what a fine-tuned model forgot.

    Each is framed as the shipped base model read its documents: begin token, space, text, end token, as far as the
    tokenizer has them.

    Raises InputError if the file is missing.
    """
    path = paths.data_dir() / "held_out.txt"
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"There is no file {path}. Restore it with `git checkout -- data`.") from None
    return [f"{tokenizer.bos_token or ''} {text}{tokenizer.eos_token or ''}" for text in texts]


def check_texts(texts) -> None:
    """Check the texts that a reader has typed into a cell. A lone text would be taken letter by letter.

    Raises InputError unless they are a list with at least one text, and none is empty.
    """
    if isinstance(texts, str):
        raise InputError(f"This is one text, {texts!r:.60}. Put it into a list: [{texts!r:.60}].")
    if not isinstance(texts, (list, tuple)) or not texts:
        raise InputError(
            f'A list with at least one text is needed, such as ["Fenna keeps the lantern."], not {texts!r:.60}.'
        )
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"One of the texts is {text!r:.60}. Put words between quotes, or take it out of the list.")


def load_results(name: str, folder: str | Path | None = None) -> list[dict]:
    """The rows of the results `name` of an experiment, committed ones unless a `folder` is given.

    A row is {column: int, float or str}; the columns begin with RESULT_COLUMNS.

    Raises InputError if there are no such results, or if a line is cut short, lacks a value, or holds a word where
    the others hold a number; the message names the line.
    """
    folder = paths.results_dir() if folder is None else Path(folder)
    path = folder / f"{name}.csv"
    remedy = f"Restore it with `git checkout -- experiments/results`, or delete it and run `python -m experiments.run {name}`."
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        reader = csv.reader(text.splitlines(keepends=True), strict=True)
        header, *rows = [(reader.line_num, cells) for cells in reader] or [(1, [])]
    except FileNotFoundError:
        there = sorted(other.stem for other in folder.glob("*.csv"))
        raise InputError(
            f"There are no results {name!r} in {folder} ({'only ' + ', '.join(there) if there else 'it has none'}). "
            f"Make them with `python -m experiments.run {name}`."
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} can't be read as CSV ({error}). {remedy}") from error
    columns = header[1]
    if tuple(columns[: len(RESULT_COLUMNS)]) != RESULT_COLUMNS or len(set(columns)) < len(columns):
        raise InputError(f"{path} doesn't begin with the columns {', '.join(RESULT_COLUMNS)}, each name once. {remedy}")
    if not text.endswith("\n"):
        raise InputError(f"The last line of {path} is cut short. {remedy}")
    results = []
    for line, cells in rows:
        if len(cells) != len(columns) or not all(cell.strip() for cell in cells):
            filled = sum(bool(cell.strip()) for cell in cells)
            raise InputError(f"Line {line} of {path} has {filled} values for {len(columns)} columns. {remedy}")
        result = dict(zip(columns, map(_number, cells)))
        for column, value in result.items():
            if results and isinstance(value, str) != isinstance(results[0][column], str):
                raise InputError(
                    f"Line {line} of {path} has {value!r} as {column}, where the first line has {results[0][column]!r}. {remedy}"
                )
        results.append(result)
    return results


def _number(text: str):
    """The number that `text` spells, else `text` itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
