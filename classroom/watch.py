"""Run a command with limits on time and memory that hold for all the processes it starts.

What is watched is resident memory, the memory really in use. A limit on the address space (ulimit -v) would count
what torch only maps, and end an empty notebook. Needs nothing of nbgrader.
"""

import threading
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Limits:
    """What one submission may take: seconds for a cell, seconds and 10**9 bytes for all of it."""

    cell_seconds: int = 240
    seconds: int = 1800
    memory_gb: float = 4.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: `why` is "done", "time", "memory" or "stopped"; `code` is the exit status."""

    why: str
    code: int
    seconds: float
    peak_gb: float


def run(command, limits, stop=None, interval=0.1, **options):
    """Run `command` (a list) and return how it `Ended`; afterwards nothing that it started is left.

    `stop` is a `threading.Event` that ends it early, `options` go to `subprocess.Popen`. Pages that processes share
    count once for each of them. A process that detaches itself between two looks, `interval` seconds apart, is missed:
    this holds off accidents, and is no sandbox.
    """
    stop = stop or threading.Event()
    began, peak, why, family = time.monotonic(), 0, "done", {}
    started = psutil.Popen(command, start_new_session=True, **options)
    try:
        while started.poll() is None:
            peak = max(peak, _resident(_with_children(started, family)))
            if peak > limits.memory_gb * 1e9:
                why = "memory"
            elif time.monotonic() - began > limits.seconds:
                why = "time"
            elif stop.wait(interval):
                why = "stopped"
            if why != "done":
                break
    finally:
        _end(started, family)
    return Ended(why, int(started.wait()), round(time.monotonic() - began, 1), round(peak / 1e9, 2))


def _with_children(process, family):
    """Add `process` and its descendants to `family`, which keeps those that later leave their parent."""
    try:
        for child in [process, *process.children(recursive=True)]:
            family.setdefault((child.pid, child.create_time()), child)
    except psutil.Error:
        pass  # One ended while it was looked at; the next look is soon.
    return family.values()


def _resident(processes):
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            pass  # Ended, and so without memory.
    return total


def _end(started, family):
    """Kill all of `family`, and what its members start meanwhile."""
    _with_children(started, family)
    for _ in range(100):
        for process in list(family.values()):
            _with_children(process, family)
        alive = [process for process in family.values() if _runs(process)]
        if not alive:
            return
        for process in alive:
            try:
                process.kill()
            except psutil.Error:
                pass
        time.sleep(0.05)


def _runs(process):
    try:
        # A zombie is dead, and waits only for its parent to take note.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
