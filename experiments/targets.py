"""Which layers should get an adapter: attention only, the feed-forward layers only, or all linear ones?

Each at the rank that gives it about the same number of parameters: 147,456 in attention at rank 18, 149,760 in the
feed-forward layers at rank 15, 145,408 in all linear layers at rank 8.
"""

from course_utils import data
from experiments import training
from experiments.learning_rate import best_rate, lora_config

TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "feed_forward": ["gate_proj", "up_proj", "down_proj"],
    "all_linear": "all-linear",
}
CHOICES = (("attention", 18), ("feed_forward", 15), ("all_linear", 8))
RUNS = [{"seed": seed, "targets": targets, "rank": rank} for seed in training.SEEDS for targets, rank in CHOICES]


def measure(seed, targets, rank):
    """Train once with LoRA on these layers."""
    rate = best_rate("lora")
    trainer, clock = training.make_trainer(
        data.load_task(training.TASK, "train"), rate, seed, lora=lora_config(rank=rank, target_modules=TARGETS[targets])
    )
    trainer.train()
    return {
        "learning_rate": rate,
        **training.scores(trainer, training.TASK),
        **training.size_and_speed(trainer, clock),
        "held_out_after": training.held_out_loss(trainer.model, trainer.processing_class),
        **training.loss_curve(trainer),
    }
