"""What does quantising the base cost and save in training: seconds a step, and memory of the process?

The recipe of `quantised`, a few steps of it, in a process of its own:

    python -m experiments.quantised_cost nf4 0

Beside the forms of the base: `nf4_checkpointing` computes activations again in the backward pass instead of keeping them,
and `nf4_adamw8bit` keeps the optimizer's numbers in 8 bits. `state_bytes` are weights, gradients and optimizer state
together, counted after the last step; `footprint` is what `get_memory_footprint` says of the model.
"""

import json
import sys

from adapter_checks import memory
from course_utils import runtime
from experiments import cost

STEPS = 20
VARIANTS = ("fp32", "bf16", "int8", "nf4", "nf4_double", "nf4_checkpointing", "nf4_adamw8bit")
RUNS = [{"seed": seed, "variant": variant} for seed in (0, 1, 2) for variant in VARIANTS]
CHANGES = {"nf4_checkpointing": {"activation_checkpointing": True}, "nf4_adamw8bit": {"optim": "adamw_8bit"}}


def measure(seed, variant):
    """The columns that a fresh process prints as its last line."""
    return cost.in_fresh_process("experiments.quantised_cost", variant, seed)


def measure_here(seed, variant):
    """Train a few steps in this process."""
    from experiments import quantised

    weights = "nf4" if variant in CHANGES else variant
    trainer, clock = quantised.make_trainer(seed, weights, max_steps=STEPS, warmup_steps=2, **CHANGES.get(variant, {}))
    watched = cost.train_and_watch(trainer)
    held = memory.measure_training_state(trainer.model, trainer.optimizer.optimizer)
    return {
        **watched,
        "seconds_per_step": clock.seconds_per_step(),
        "footprint": trainer.model.get_memory_footprint(),
        "state_bytes": held.weights + held.optimizer + _gradients(trainer.model),
    }


def _gradients(model):
    """Bytes of the gradients during a step; after one the trainer has thrown them away."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    runtime.quiet_imports()
    print(json.dumps(measure_here(int(sys.argv[2]), sys.argv[1])))
