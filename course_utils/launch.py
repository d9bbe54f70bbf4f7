"""Start a script on several processes with torchrun, from a notebook: output as it comes, and nothing left running."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
from pathlib import Path

import psutil

from adapter_checks.errors import InputError
from course_utils.files import write_text

# torchrun names the process that ended first; all that it writes after this line is its own traceback.
_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
# Its own log, and the complaint of a machine without a network that its name can't be looked up, which nothing needs.
_OWN = re.compile(
    r"[EWI]\d{4} .*torch/distributed/|(\[rank\d+\]:)?\[W\d{4} .*hostname of the client socket cannot be retrieved"
)
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def write_script(path: str | Path, *functions) -> None:
    """Write the source of `functions` to a file that calls the last of them, as torchrun runs files.

    The functions may call each other, and nothing else of the notebook: what they need they import themselves.
    """
    sources = [textwrap.dedent(inspect.getsource(function)).rstrip() for function in functions]
    last = functions[-1].__name__
    write_text(path, "\n\n\n".join([*sources, f'if __name__ == "__main__":\n    {last}()']) + "\n")


def torchrun(*arguments: str, folder: str | Path, seconds: float = 500) -> None:
    """Run `torchrun` with these arguments in `folder`, and show what the processes write as it comes.

    The arguments are those of the command line. Each process computes on the CPU, on one thread unless OMP_NUM_THREADS says
    otherwise: more processes than GPUs would each ask for one of their own.
    All processes are ended when this is interrupted, fails, or takes more than `seconds`.

    Raises InputError with what to do if torchrun is missing, if more processes than cores are asked for (two are always
    allowed), if an earlier run of the script is still going, if a port is taken, if a process ends in the middle, and if the
    time is up.
    """
    program = shutil.which("torchrun", path=sysconfig.get_path("scripts"))
    if program is None:
        raise InputError(
            f"There is no torchrun beside {Path(sys.executable).name}. It comes with PyTorch: run `make setup`, and start "
            "the notebook with that environment's Python."
        )
    _expect_cores(arguments)
    _expect_no_leftover(arguments, folder)
    print("$ torchrun", *arguments, flush=True)
    late = threading.Event()
    # torchrun makes a folder for logs, though none are asked for, and leaves it behind.
    with tempfile.TemporaryDirectory(prefix="torchrun-") as scratch:
        run = subprocess.Popen(
            [program, *arguments],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # an interrupt reaches this process alone, which then ends the others in order
        )
        clock = threading.Timer(seconds, lambda: (late.set(), end_processes(run)))
        clock.start()
        try:
            failed, port_taken = _show(run.stdout, late)
            status = run.wait()
        finally:
            clock.cancel()
            end_processes(run)
    if late.is_set():
        raise InputError(
            f"After {seconds:g} seconds the processes were ended. Where one waits for another that never comes, they wait "
            "for ever: do all of them reach the same collective calls, in the same order?"
        )
    if port_taken:
        raise InputError(
            "The port that the processes were to meet at is taken, perhaps by a run that is left over. Give --standalone, "
            "with which torchrun takes a free one, or another --master-port."
        )
    if failed:
        exit_status, rank = map(int, failed)
        why = f"with exit status {exit_status}" if exit_status >= 0 else f"by signal {-exit_status}"
        memory = " The system kills with signal 9 when memory runs out." if exit_status == -9 else ""
        raise InputError(
            f"Process {rank} ended in the middle, {why}, and torchrun ended the others.{memory} Its error, if it had one, "
            f"stands above, mostly on lines that begin with [rank{rank}]. Nothing is left running: mend the cause and run this cell again."
        )
    if status:
        raise InputError(f"torchrun ended with exit status {status}; its last lines stand above.")


def _expect_cores(arguments):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = re.search(r"--nproc[-_]per[-_]node[ =](\d+)", " ".join(arguments))
    if given and int(given[1]) > max(2, cores):
        raise InputError(
            f"{given[1]} processes were asked for, and this machine has {cores} core{'s' * (cores > 1)}. They would wait for "
            f"each other and fill the memory: ask for at most {max(2, cores)}."
        )


def _expect_no_leftover(arguments, folder):
    """A run whose notebook was killed goes on, and writes to the same files."""
    script = next((argument for argument in arguments if argument.endswith(".py")), None)
    for process in psutil.process_iter(["cmdline", "cwd", "pid"]) if script else ():
        line, place = process.info["cmdline"] or [], process.info["cwd"]
        if script in line and place and Path(place) == Path(folder).resolve() and process.info["pid"] != os.getpid():
            raise InputError(
                f"An earlier run of {script} is still going (process {process.info['pid']}). Wait for its end, or end it: "
                f"kill {process.info['pid']}"
            )


def _show(lines, late) -> tuple[tuple[str, str] | None, bool]:
    """Print what the processes write; returns (exit status and rank of the one that failed, was a port taken).

    What torchrun writes about itself is left out: its log, its report of a failure, and its own traceback.
    """
    failed, port_taken, silent, held = None, False, False, ""
    for line in lines:
        port_taken = port_taken or bool(_PORT_TAKEN.search(line))
        found = _FAILED.search(line)
        failed = failed or (found.groups() if found else None)
        silent = silent or bool(failed) or port_taken or late.is_set() or bool(held and "torchrun" in line)
        if silent or _OWN.match(line):
            continue
        if line.startswith("Traceback "):
            held = line  # whose it is the next line tells
            continue
        print(held + line, end="", flush=True)
        held = ""
    return failed, port_taken


def end_processes(run) -> None:
    """End a process and all that it started: torchrun's workers have sessions of their own, so no signal to a group reaches them."""
    try:
        family = [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]
    except psutil.NoSuchProcess:
        return
    if run.poll() is None:
        run.terminate()  # it ends its workers, too
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    run.wait()
