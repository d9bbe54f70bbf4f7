"""How does the rank, from 1 to 64, change the loss on the way and the score at the end?

Alpha stays 16, so the scaling falls as the rank grows: with Adam the first updates of BA then have the same size at every
rank, and one learning rate fits all ("LoRA Without Regret", 2025). Curves may part later, not at the start.
"""

from course_utils import data
from experiments import training
from experiments.learning_rate import best_rate, lora_config

RUNS = [{"seed": seed, "rank": rank} for seed in training.SEEDS for rank in (1, 4, 8, 16, 64)]


def measure(seed, rank):
    """Train once with LoRA of this rank on all linear layers."""
    rate = best_rate("lora")
    trainer, clock = training.make_trainer(
        data.load_task(training.TASK, "train"), rate, seed, lora=lora_config(rank=rank)
    )
    trainer.train()
    return {
        "learning_rate": rate,
        **training.scores(trainer, training.TASK),
        **training.size_and_speed(trainer, clock),
        "held_out_after": training.held_out_loss(trainer.model, trainer.processing_class),
        **training.loss_curve(trainer),
    }
