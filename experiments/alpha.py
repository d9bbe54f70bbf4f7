"""What does alpha do at a fixed rank and learning rate? The scaling goes from 1/2 to 8, alpha / 8."""

from course_utils import data
from experiments import training
from experiments.learning_rate import best_rate, lora_config

RUNS = [{"seed": seed, "alpha": alpha} for seed in training.SEEDS for alpha in (4, 16, 64)]


def measure(seed, alpha):
    """Train once with LoRA of rank 8 and this alpha."""
    rate = best_rate("lora")
    trainer, _ = training.make_trainer(
        data.load_task(training.TASK, "train"), rate, seed, lora=lora_config(alpha=alpha)
    )
    trainer.train()
    return {
        "learning_rate": rate,
        **training.scores(trainer, training.TASK),
        "held_out_after": training.held_out_loss(trainer.model, trainer.processing_class),
        **training.loss_curve(trainer),
    }
