"""Start `transformers serve` from a notebook and stop it again: it listens on this machine only, and is never left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from adapter_checks.errors import InputError
from course_utils.launch import end_processes

_OWNER = "COURSE_SERVER_OF"  # in the environment of each server: the process that started it
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")
_LOCALHOST = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # no proxy stands between a machine and itself


@contextlib.contextmanager
def serving(*arguments: str, seconds: float = 120) -> Iterator[str]:
    """Run `transformers serve` with these arguments, and yield the address to ask: http://127.0.0.1:PORT/v1.

    The arguments are those of the command line, and `--host` and `--port` (a free one) are added. The block begins when the server
    answers, after at most `seconds`. The server and all that it started are ended with the block, whatever happens in it. One whose
    notebook was killed is ended when the next is started.

    Raises InputError with what to do if the program or a package that it needs is missing, if it ends before it answers, and if the
    time is up.
    """
    program = shutil.which("transformers", path=sysconfig.get_path("scripts"))
    if program is None:
        raise InputError(
            f"There is no transformers beside {Path(sys.executable).name}. Run `make setup`, and start the notebook with that "
            "environment's Python."
        )
    _end_orphans()
    port = _free_port()
    command = [program, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    print("$ transformers serve", *arguments, flush=True)
    with tempfile.TemporaryFile() as log:
        run = subprocess.Popen(
            command,
            # What it serves lies in a folder, so it has nothing to ask of the hub.
            env={"HF_HUB_OFFLINE": "1", **os.environ, _OWNER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt reaches the notebook alone, which then ends the server
        )
        try:
            _wait(run, f"http://127.0.0.1:{port}/health", seconds, log)
            yield f"http://127.0.0.1:{port}/v1"
        except Exception:
            # A client is told "Error code: 500" and no more.
            if error := next((line for line in reversed(_lines(log)) if _ERROR.match(line)), None):
                print(f"The server's last error: {error}", flush=True)
            raise
        finally:
            end_processes(run)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_orphans() -> None:
    """End servers whose notebook is gone; those of notebooks that still run, and other people's, stay."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            owner = process.environ().get(_OWNER)
            if owner and not psutil.pid_exists(int(owner)) and "serve" in process.cmdline():
                process.kill()
                process.wait(5)


def _wait(run, address, seconds, log) -> None:
    """Return when the server answers."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if run.poll() is not None:
            last = _last_line(log)
            remedy = "Run `make setup`" if "issing dependencies" in last else "Look at what it was given"
            raise InputError(
                f"The server ended with exit status {run.returncode}: {last} {remedy}, and run this cell again."
            )
        with contextlib.suppress(urllib.error.URLError, OSError):
            with _LOCALHOST.open(address, timeout=2) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.1)
    raise InputError(
        f"After {seconds:g} seconds the server did not answer, and was ended. Its last words: {_last_line(log)}"
    )


def _lines(log) -> list[str]:
    log.seek(0)
    lines = (line.strip(" │╭╰─╯") for line in log.read().decode(errors="replace").splitlines())
    return [line for line in lines if line]


def _last_line(log) -> str:
    return (_lines(log) or ["it wrote nothing."])[-1]
