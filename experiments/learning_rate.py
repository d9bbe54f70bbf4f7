"""Which learning rate is best for LoRA and which for all weights, and what each costs at its best?

Same task, steps, batches and seeds for both. The grids go up by half a power of ten, and LoRA's stands one power
higher, since "LoRA Without Regret" (Thinking Machines, 2025) finds its best rate at about ten times the other.
"""

from peft import LoraConfig

from course_utils import data
from experiments import harness, training

RATES = {"lora": (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2), "full": (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3)}
RUNS = [
    {"seed": seed, "method": method, "learning_rate": rate}
    for seed in training.SEEDS
    for method, rates in RATES.items()
    for rate in rates
]


def lora_config(rank=8, alpha=16, target_modules="all-linear"):
    """The LoRA that the sweeps vary, one thing at a time."""
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, task_type="CAUSAL_LM")


def measure(seed, method, learning_rate):
    """Train once, and measure score, size, speed and forgetting. The peak memory is in `cost`."""
    trainer, clock = training.make_trainer(
        data.load_task(training.TASK, "train"), learning_rate, seed, lora=lora_config() if method == "lora" else None
    )
    before = training.held_out_loss(trainer.model, trainer.processing_class)  # B is zero still: this is the base
    trainer.train()
    return {
        **training.scores(trainer, training.TASK),
        **training.size_and_speed(trainer, clock),
        "held_out_before": before,
        "held_out_after": training.held_out_loss(trainer.model, trainer.processing_class),
        **training.loss_curve(trainer),
    }


def best_rate(method):
    """The learning rate at which the method is best, see `harness.best_rate`."""
    return harness.best_rate("learning_rate", RUNS, method)
