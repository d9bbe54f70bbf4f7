"""Each code cell of each lesson: run, interrupted in a second run if it takes long enough for that, and run again.

A learner does this all the time, and no cell may need a kernel that has not seen it before. It takes more than twice the
time of all lessons, so it has a target of its own, `make test-reruns`, which sets TEST_RERUNS.
"""

import os
import re
import signal
import threading
import time

import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from tools import build, editions

LESSONS = sorted((build.ROOT / "lessons").glob("*.py"))
LONG = 2.0  # seconds; a shorter cell is over before somebody has stopped it
slow = pytest.mark.skipif("TEST_RERUNS" not in os.environ, reason="takes many minutes; make test-reruns runs it")


def rerun(notebook, runs, long=LONG):
    """What goes wrong when each code cell is run, interrupted, and run again: sentences that name the cell."""
    found = []
    environment = {**os.environ, "COURSE_RUNS": str(runs)}
    client = NotebookClient(notebook, timeout=1800, extra_arguments=["--log-level=ERROR"])
    with client.setup_kernel(cwd=str(build.ROOT / "solutions"), env=environment):

        def run(index, stop_after=None):
            """The error of this cell, or None."""
            stop = threading.Timer(stop_after or 0, os.kill, (client.km.provisioner.pid, signal.SIGINT))
            if stop_after:
                stop.start()
            try:
                client.execute_cell(notebook.cells[index], index)
            except CellExecutionError as error:
                return error
            finally:
                stop.cancel()

        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            began = time.monotonic()
            if error := run(index):
                return [*found, f"{cell.id} fails: {error.ename}: {error.evalue}"]
            took = time.monotonic() - began
            if took > long:
                stopped = run(index, stop_after=took / 2)
                if stopped and stopped.ename != "KeyboardInterrupt":
                    found.append(f"{cell.id} makes something else of an interrupt: {stopped.ename}: {stopped.evalue}")
            if error := run(index):
                found.append(f"{cell.id} can't be run again: {error.ename}: {error.evalue}")
            steps = re.findall(r"step (\d+) of (\d+)", str(cell.outputs))
            if any(int(done) > int(all_of_them) for done, all_of_them in steps):
                found.append(f"{cell.id} goes beyond its last step when it is run again")
    return found


@slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_cell_can_be_run_again_and_after_an_interrupt(path, tmp_path, monkeypatch):
    monkeypatch.delenv("COURSE_BASE_MODEL", raising=False)
    lesson = editions.solved(editions.parse(path.read_text(encoding="utf-8"), path.name))
    assert rerun(lesson, tmp_path) == []


SOUND = ["import time", "x = 1", "y = x + 1", "for _ in range(10):\n    time.sleep(0.1)", "print('step 3 of 3')"]
FAULTS = {
    "a name that is gone": ("del x", "can't be run again: NameError"),
    "a count that goes on": ("y += 1\nprint(f'step {y} of 3')", "goes beyond its last step"),
    "an interrupt that is taken for another": (
        "try:\n    time.sleep(1)\nexcept KeyboardInterrupt:\n    raise ValueError('no checkpoint')",
        "makes something else of an interrupt: ValueError",
    ),
    "what an interrupt leaves behind": (
        "assert 'half' not in globals()\nhalf = 1\ntime.sleep(1)\ndel half",
        "can't be run again: AssertionError",
    ),
}


@slow
@pytest.mark.parametrize("fault, said", [(None, None), *FAULTS.values()], ids=["sound", *FAULTS])
def test_a_planted_fault_is_found_and_nothing_else(fault, said, tmp_path):
    sources = SOUND if fault is None else [*SOUND[:3], fault, "print('x')"]
    cells = [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    found = rerun(new_notebook(cells=cells), tmp_path, long=0.5)
    assert [text.partition(" ")[0] for text in found] == ([] if fault is None else ["cell-3"])
    assert fault is None or said in found[0]
