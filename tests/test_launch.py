"""The launcher, on real processes: what they write is shown, each failure gets its sentence, and nothing is left running."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest

from adapter_checks import InputError
from course_utils import launch, paths

TWO = ("--standalone", "--nproc-per-node", "2")


def main():
    """What each process does, by the script's first argument."""
    import os
    import sys
    import time

    what, rank = sys.argv[1], int(os.environ["RANK"])

    def say(text):
        sys.stdout.write(f"{text}\n")  # in one piece: torchrun starts Python without a buffer, and print writes two

    gpus = os.environ["CUDA_VISIBLE_DEVICES"] or "no GPU"
    say(f"process {rank} of {os.environ['WORLD_SIZE']} on {os.environ['OMP_NUM_THREADS']} thread and {gpus}")
    if what == "sum":
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.tensor(float(rank + 1))
        dist.all_reduce(total)
        say(f"the sum is {total.item():g}")
        dist.destroy_process_group()
    if what == "raise" and rank == 1:
        raise ValueError("no such row")
    if what == "die" and rank == 1:
        os.kill(os.getpid(), 9)
    if what in ("raise", "die", "wait"):
        time.sleep(400)


@pytest.fixture
def folder(tmp_path):
    launch.write_script(tmp_path / "script.py", main)
    yield tmp_path
    assert running(tmp_path) == [], "nothing is left running"


def running(folder):
    found = []
    for process in psutil.process_iter(["cwd", "pid", "cmdline"]):
        if process.info["cwd"] == str(folder.resolve()):
            found.append(process.info)
    return found


def test_what_all_processes_write_is_shown_and_no_scratch_is_left(folder, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    launch.torchrun(*TWO, "script.py", "sum", folder=folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "$ torchrun --standalone --nproc-per-node 2 script.py sum"
    shown = [f"process {rank} of 2 on 1 thread and no GPU" for rank in (0, 1)] + ["the sum is 3"] * 2
    assert sorted(lines[1:]) == sorted(shown)
    assert os.listdir(os.environ["TMPDIR"]) == []


@pytest.mark.parametrize(
    ("what", "seconds", "message"),
    [
        ("raise", 200, r"Process 1 ended in the middle, with exit status 1, .*\[rank1\]"),
        ("die", 200, "Process 1 ended in the middle, by signal 9, .*memory runs out"),
        ("wait", 25, "After 25 seconds the processes were ended.*same order"),
    ],
)
def test_a_process_that_ends_in_the_middle_or_never(what, seconds, message, folder, capsys):
    with pytest.raises(InputError, match=message):
        launch.torchrun(*TWO, "script.py", what, folder=folder, seconds=seconds)
    shown = capsys.readouterr().out
    assert "process 0 of 2" in shown and "torch/distributed" not in shown
    assert ("no such row" in shown) == (what == "raise")


def test_a_port_that_is_taken(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match="port .* is taken.*--standalone"):
            launch.torchrun("--master-port", port, "--nproc-per-node", "2", "script.py", "sum", folder=folder)
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["--nproc-per-node 999", "--nproc_per_node=999"])
def test_more_processes_than_cores(form, folder, capsys):
    with pytest.raises(InputError, match="999 processes were asked for, and this machine has .* core"):
        launch.torchrun("--standalone", *form.split(), "script.py", "sum", folder=folder)
    assert capsys.readouterr().out == "", "nothing was started"


def test_two_processes_are_allowed_on_one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    launch._expect_cores(TWO)
    with pytest.raises(InputError, match="has 1 core. .*at most 2"):
        launch._expect_cores(("--nproc-per-node", "3"))


def test_no_torchrun(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="no torchrun beside python.*make setup"):
        launch.torchrun(*TWO, "script.py", "sum", folder=folder)


def test_an_option_that_torchrun_does_not_know(folder, capsys):
    with pytest.raises(InputError, match="torchrun ended with exit status 2; its last lines stand above"):
        launch.torchrun("--frobnicate", "script.py", folder=folder)
    assert "unrecognized arguments" in capsys.readouterr().out


def in_background(folder):
    code = f"""
        from course_utils import launch
        launch.torchrun(*{TWO}, "script.py", "wait", folder={str(folder)!r})
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(paths.project_root()), *sys.path])}
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [run.stdout.readline() for _ in range(3)]  # so both have begun
    assert "process 0 of 2 on 1 thread and no GPU\n" in lines, lines
    return run


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_an_interrupt_ends_all_processes(folder):
    run = in_background(folder)
    assert len(running(folder)) == 3, "torchrun and two processes"
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors and time.monotonic() - began < 15
    assert running(folder) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_a_run_whose_notebook_was_killed_is_found(folder):
    run = in_background(folder)
    try:
        run.kill()
        run.communicate()
        with pytest.raises(InputError, match=r"An earlier run of script.py is still going \(process \d+\).*kill \d+"):
            launch.torchrun(*TWO, "script.py", "sum", folder=folder)
    finally:
        left = [psutil.Process(one["pid"]) for one in running(folder)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)


def test_a_script_is_the_source_of_functions_and_a_call(tmp_path):
    def say(text):
        """Say it."""
        print(text)

    def start():
        say("begun")

    script = tmp_path / "deep" / "script.py"
    launch.write_script(script, say, start)
    assert script.read_text().endswith('def start():\n    say("begun")\n\n\nif __name__ == "__main__":\n    start()\n')
    assert subprocess.run([sys.executable, script], capture_output=True, text=True).stdout == "begun\n"
