"""A sweep: runs whose rows go into one CSV file, each run once, whatever interrupts it."""

import csv
import hashlib
import os
import time
from pathlib import Path

from course_utils import data, runtime
from course_utils.runtime import CourseError


def folder():
    """Where results go: beside the scripts for the shipped base model, under `runs/` for another."""
    return data.results_dir() if runtime.is_shipped_base() else runtime.runs_dir() / "experiments" / runtime.adapters_dir().name


def sweep(name, runs, measure, log=print):
    """Do each run that has no row yet, and write its rows before the next run starts.

    runs: the settings of each run, a dict with `seed` among them; measure(**run) -> the columns measured, as one dict
    or as a list of them, a row each.

    Raises CourseError if the file that is there is broken, is of another base model or has other columns.
    """
    path, here = folder() / f"{name}.csv", machine()
    rows = data.load_results(name, folder()) if path.exists() else []
    if any(row["base"] != here["base"] for row in rows):
        raise CourseError(f"{path} holds results of another base model. Delete it to make them anew.")
    todo = missing(rows, runs)
    log(f"{name}: {len(todo)} of {len(runs)} runs to do")
    for number, run in enumerate(todo, 1):
        began = time.perf_counter()
        measured = measure(**run)
        took = time.perf_counter() - began
        new = [{"seed": run["seed"], "seconds": took, **here, **run, **columns} for columns in _as_list(measured)]
        if set(new[0]) != set((rows or new)[0]):
            raise CourseError(f"{path} has other columns than {name}.py writes now. Delete it to make the results anew.")
        rows += new
        _write(path, rows)
        log(f"{name} {number}/{len(todo)}: " + ", ".join(f"{column} {_text(value)}" for column, value in _shown(new[-1])))
    return rows


def missing(rows, runs):
    """Those of `runs` that no row belongs to."""
    return [run for run in runs if not any(_belongs(row, run) for row in rows)]


def unplanned(rows, runs):
    """Those of `rows` that belong to none of `runs`: left over from another version of the script."""
    return [row for row in rows if not any(_belongs(row, run) for run in runs)]


def machine():
    """Processor model, cores that torch computes on, and base model: a host's name has no place in a result."""
    import torch

    return {"cpu": runtime.processor(), "cores": torch.get_num_threads(), "base": base_fingerprint()}


def base_fingerprint():
    """The beginning of the SHA-256 of the base model's weights, or a hub model's id."""
    base = runtime.base_model()
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
    """The whole file anew beside the old one, then in its place: a kill leaves one of the two, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([_text(row[column]) for column in rows[0]] for row in rows)
    os.replace(fresh, path)
