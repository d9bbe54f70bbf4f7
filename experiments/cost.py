"""What do LoRA and all weights cost: seconds a step, peak memory, size of what is saved?

Memory that a process has once had is not all given back, so each run is a process of its own:

    python -m experiments.cost lora 0

On a model this small most of a process is libraries; `training_bytes`, the peak less what was resident when training
began, is gradients, optimizer state, activations, and what libraries load when first used.
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import psutil

from course_utils import data, runtime

STEPS = 30
RUNS = [{"seed": seed, "method": method} for seed in (0, 1, 2) for method in ("lora", "full")]


def measure(seed, method):
    """The columns that a fresh process prints as its last line."""
    return in_fresh_process("experiments.cost", method, seed)


def in_fresh_process(module, *arguments):
    """The JSON that `python -m module arguments` prints as its last line."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes():
    """The most memory that this process has had resident; the system counts it in bytes on macOS, else in 1024."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says on Linux begins with the memory of the process that started this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_here(seed, method):
    """Train a few steps in this process. The rate plays no part in the cost, so both take the same."""
    from experiments import training
    from experiments.learning_rate import lora_config

    trainer, clock = training.make_trainer(
        data.load_task(training.TASK, "train"),
        5e-4,
        seed,
        lora=lora_config() if method == "lora" else None,
        max_steps=STEPS,
    )
    return {**train_and_watch(trainer), **training.size_and_speed(trainer, clock)}


def train_and_watch(trainer):
    """Train; columns: the peak of this process, and what of it came with training."""
    resident, peak_before = psutil.Process().memory_info().rss, peak_bytes()
    trainer.train()
    peak = peak_bytes()
    if peak <= peak_before:
        raise RuntimeError("Loading took more memory than training, so the peak says nothing about training.")
    return {"peak_bytes": peak, "training_bytes": peak - resident}


if __name__ == "__main__":
    runtime.quiet_imports()
    print(json.dumps(measure_here(int(sys.argv[2]), sys.argv[1])))
