"""What does the validation loss say when there are too few examples? LoRA on 32 rows, beside 2,000, for 200 steps."""

from course_utils import data
from experiments import training
from experiments.learning_rate import best_rate, lora_config

STEPS, EVERY, VALIDATION_ROWS = 200, 20, 200
RUNS = [{"seed": seed, "rows": rows} for seed in training.SEEDS for rows in (32, 2000)]


def measure(seed, rows):
    """A row of results every EVERY steps: training and validation loss in nats a token; the scores are those at the end."""
    chosen = data.load_task(training.TASK, "train").shuffle(seed=seed).select(range(rows))
    validation = data.load_task(training.TASK, "validation").select(range(VALIDATION_ROWS))
    trainer, _ = training.make_trainer(
        chosen,
        best_rate("lora"),
        seed,
        lora=lora_config(),
        eval_rows=validation,
        max_steps=STEPS,
        per_device_train_batch_size=16,
        logging_steps=EVERY,
        eval_strategy="steps",
        eval_steps=EVERY,
        per_device_eval_batch_size=64,
    )
    trainer.train()
    validation_loss = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    end = training.scores(trainer, training.TASK)
    return [
        {"step": step, "training_loss": training.loss_curve(trainer)[f"loss_{step}"], "validation_loss": loss, **end}
        for step, loss in validation_loss.items()
    ]
