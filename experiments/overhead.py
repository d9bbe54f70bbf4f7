"""What does an adapter add to the time of a forward pass, and on what does that depend?

The base model against the same with the `sailor` adapter, in turns, by the number of tokens in the pass, of torch's threads, and
of other processes that keep a core busy meanwhile. The seed draws the tokens.
"""

import contextlib
import subprocess
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from course_utils import paths, runtime, timing

SHAPES = ((1, 1), (1, 64), (8, 64))  # rows × tokens
RUNS = [
    {"seed": seed, "threads": threads, "busy": busy, "rows": rows, "length": length}
    for seed in (0, 1, 2)
    for threads in (1, 2)
    for busy in (0, 2)
    for rows, length in SHAPES
]


@contextlib.contextmanager
def busy_processes(number):
    """So many processes that compute until the block ends."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(seed, threads, busy, rows, length):
    """Median milliseconds of a pass without and with the adapter, and what the adapter adds as a share."""
    runtime.seed_everything(seed)

    def load():
        return AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()).eval()

    base, adapted = load(), PeftModel.from_pretrained(load(), paths.adapter_path("sailor")).eval()
    ids = torch.randint(10, base.config.vocab_size, (rows, length))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), busy_processes(busy):
            times = timing.in_turns({"base": lambda: base(ids), "adapted": lambda: adapted(ids)}, rounds=25)
    finally:
        torch.set_num_threads(before)
    base_ms, adapted_ms = times["base"][0], times["adapted"][0]
    return {"base_ms": base_ms, "adapted_ms": adapted_ms, "overhead": adapted_ms / base_ms - 1}
