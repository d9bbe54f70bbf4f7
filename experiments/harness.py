"""A sweep: runs whose rows go into one CSV file, each run once, whatever interrupts it."""

import csv
import hashlib
import io
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from adapter_checks.errors import InputError
from course_utils import data, paths, runtime
from course_utils.files import write_text


def folder():
    """Where results go: beside the scripts for the shipped base model, under `runs/` for another."""
    return (
        paths.results_dir() if paths.is_shipped_base() else paths.runs_dir() / "experiments" / paths.adapters_dir().name
    )


def prepare():
    """What every process that trains does first: quiet libraries, and no network for the shipped model."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if paths.is_shipped_base() else "0")
    runtime.quiet_imports()


def sweep(name, runs, measure, at_once=1, log=print, base=None):
    """Do each run that has no row yet, and write its rows as soon as it is done.

    runs: the settings of each run, a dict with `seed` among them; measure(**run) -> the columns measured, as one dict
    or as a list of them, a row each. With at_once > 1 so many processes of one thread each do the runs side by side:
    a model of this size gains little from a second thread, so that is faster, but its times are not those of a run alone.
    base: the fingerprint of the model that the runs begin with, if that isn't the course's language model.

    Raises InputError if the file that is there is broken, is of another base model or has other columns.
    """
    path = folder() / f"{name}.csv"
    rows = data.load_results(name, folder()) if path.exists() else []
    base = base or base_fingerprint()
    if any(row["base"] != base for row in rows):
        raise InputError(f"{path} holds results of another base model. Delete it to make them anew.")
    todo = missing(rows, runs)
    log(f"{name}: {len(todo)} of {len(runs)} runs to do")
    results = (
        _side_by_side(measure, todo, base, at_once) if at_once > 1 else (_rows_of(measure, run, base) for run in todo)
    )
    for number, new in enumerate(results, 1):
        if set(new[0]) != set((rows or new)[0]):
            raise InputError(f"{path} has other columns than {name}.py writes now. Delete it to make the results anew.")
        rows = in_order(rows + new, runs)
        _write(path, rows)
        log(
            f"{name} {number}/{len(todo)}: "
            + ", ".join(f"{column} {_text(value)}" for column, value in _shown(new[-1]))
        )
    return rows


def _rows_of(measure, run, base):
    """Do one run; its rows as they go into the file: model of the processor or GPU, and cores that torch computes on, but no host's name."""
    import torch

    began = time.perf_counter()
    measured = measure(**run)
    took = time.perf_counter() - began
    machine = {"cpu": runtime.processor(), "cores": torch.get_num_threads(), "base": base}
    return [{"seed": run["seed"], "seconds": took, **machine, **run, **columns} for columns in _as_list(measured)]


def _side_by_side(measure, runs, base, at_once):
    """The rows of each run, in the order in which they end."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes when they import torch
    pool = ProcessPoolExecutor(at_once, mp_context=get_context("spawn"), initializer=prepare)
    try:
        for done in as_completed([pool.submit(_rows_of, measure, run, base) for run in runs]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for all the runs to come
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


def in_order(rows, runs):
    """The rows in the order of their runs, whichever run ended first."""
    return sorted(
        rows, key=lambda row: next((place for place, run in enumerate(runs) if _belongs(row, run)), len(runs))
    )


def missing(rows, runs):
    """Those of `runs` that no row belongs to."""
    return [run for run in runs if not any(_belongs(row, run) for row in rows)]


def unplanned(rows, runs):
    """Those of `rows` that belong to none of `runs`: left over from another version of the script."""
    return [row for row in rows if not any(_belongs(row, run) for run in runs)]


def complete(name, runs):
    """The rows of a sweep. Raises InputError if one of its runs has none."""
    rows = data.load_results(name, folder())
    if left := missing(rows, runs):
        raise InputError(f"{len(left)} runs of {name} are missing. Run `python -m experiments.run {name}` first.")
    return rows


def best_rate(name, runs, method):
    """The learning rate with the best mean score on the validation split in this sweep; of equal ones the lowest.

    Raises InputError if the sweep is not complete.
    """
    rows = complete(name, runs)

    def mean_score(rate):
        found = [row["validation"] for row in rows if (row["method"], row["learning_rate"]) == (method, rate)]
        return round(sum(found) / len(found), 9)  # a sum in another order is not another mean

    return max(
        sorted({run["learning_rate"] for run in runs if run["method"] == method}), key=mean_score
    )  # `max` takes the first of equals


def base_fingerprint(base=None):
    """The beginning of the SHA-256 of the weights in the folder `base`, the language model's by default, or a hub model's id."""
    base = paths.base_model() if base is None else base
    digest = hashlib.sha256()
    for file in sorted(Path(base).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return f"sha256-{digest.hexdigest()[:12]}" if Path(base).is_dir() else base


def _as_list(measured):
    return [measured] if isinstance(measured, dict) else measured


def _belongs(row, run):
    return all(setting in row and _text(row[setting]) == _text(value) for setting, value in run.items())


def _shown(row):
    return [(column, value) for column, value in row.items() if column not in ("cpu", "cores", "base")]


def _text(value):
    """Six digits are more than any of these measurements is good for."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write(path, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_text(row[column]) for column in rows[0]] for row in rows)
    write_text(path, text.getvalue())
