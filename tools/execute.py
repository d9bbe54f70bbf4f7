"""Run a notebook top to bottom in a fresh kernel, and measure its time and memory."""

import os
import threading
import time

import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from course_utils import runtime
from tools.editions import BuildError

LONGEST_CELL = 60  # seconds: the course's own limit
FIRST_TEXT = "first-text"  # tag of the cell that shows a lesson's first generated text


def execute(notebook, folder, runs):
    """Run `notebook` in place, with `folder` as working directory, and return what was measured.

    What the lesson writes goes to the folder `runs`. Returns a dict: `seconds` from the
    start of the kernel, `peak_gb` resident memory of the kernel (10**9 bytes), `cpu`,
    `cores`, and `first_text_s` if a cell has the tag "first-text".
    Raises `BuildError` naming the cell when one fails.
    """
    environment = {**os.environ, "COURSE_RUNS": str(runs)}
    # The committed outputs are those of an unsolved lesson on the shipped model.
    for name in ("COURSE_STRICT", "COURSE_BASE_MODEL"):
        environment.pop(name, None)
    # The kernel's own log, not the notebook's: it would warn that it listens on a local port.
    client = NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, extra_arguments=["--log-level=ERROR"]
    )
    measured = {}
    start = time.perf_counter()
    with client.setup_kernel(cwd=str(folder), env=environment), _PeakMemory(client.km.provisioner.pid) as memory:
        for index, cell in enumerate(notebook.cells):
            began = time.perf_counter()
            try:
                client.execute_cell(cell, index)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                raise BuildError(f"Cell {cell.id} failed:\n{error}") from error
            now = time.perf_counter()
            if now - began > LONGEST_CELL:
                print(f"  cell {cell.id} took {now - began:.0f} s, over the limit of {LONGEST_CELL} s")
            if FIRST_TEXT in cell.metadata.get("tags", []):
                measured["first_text_s"] = round(now - start, 1)
        measured["seconds"] = round(time.perf_counter() - start, 1)
    return {**measured, "peak_gb": round(memory.peak / 1e9, 2), "cpu": runtime.processor(), "cores": os.cpu_count()}


class _PeakMemory:
    """Watches the resident memory of a process and its children; `peak` is in bytes."""

    def __init__(self, pid, interval=0.1):
        self.process, self.interval, self.peak = psutil.Process(pid), interval, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        stopped = False
        while True:
            try:
                family = [self.process, *self.process.children(recursive=True)]
                self.peak = max(self.peak, sum(one.memory_info().rss for one in family))
            except psutil.Error:
                pass  # A child may end between being listed and being looked at.
            if stopped:
                return  # After a last look: on a busy machine the thread may have had no turn for a while.
            stopped = self._stop.wait(self.interval)
