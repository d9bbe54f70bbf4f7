"""The control for combining: one adapter trained on the rows of both tasks, instead of two that are combined.

As many steps as for one task, so each task is seen half as often. Rows are drawn as in `combine`, so that scores compare.
"""

import datasets

from course_utils import data
from experiments import training
from experiments.combine import scored_rows
from experiments.learning_rate import best_rate, lora_config

RUNS = [{"seed": seed, "pair": pair} for seed in training.SEEDS for pair in ("reading+sailor", "reading+extract")]


def measure(seed, pair):
    """Train once on the mixed rows of a pair; the score of each task, and of the shipped adapter's rank."""
    rate, tasks = best_rate("lora"), pair.split("+")
    columns = ["prompt", "completion"]
    rows = datasets.concatenate_datasets([data.load_task(task, "train").select_columns(columns) for task in tasks])
    trainer, _ = training.make_trainer(rows.shuffle(seed=seed), rate, seed, lora=lora_config())
    trainer.train()
    held_out = scored_rows(seed)
    scores = [training.score(trainer.model, trainer.processing_class, task, held_out[task])["score"] for task in tasks]
    return {"learning_rate": rate, **dict(zip(("first", "second"), scores)), **training.loss_curve(trainer)}
