"""How many facts does an adapter hold, by its rank?

Each fact is told in two wordings, EPOCHS times each, to every rank alike, so that a smaller score means less room and not
less training. `told` is the share of facts given back in a wording that was trained on, `reworded` in one that was not.

Steps: 25 people make 100 facts, 200 rows, 4 batches of 64, so 160 steps. The learning rate is the one that is best on
`sailor`; it is not tuned again.
"""

import random
import re

from datasets import concatenate_datasets

from course_utils import data
from experiments import training
from experiments.learning_rate import best_rate, lora_config

EPOCHS, PEOPLE = 40, 25
FULL_NAME = re.compile(r"[A-Z]\w+ [A-Z]\w+")
RUNS = [{"seed": seed, "people": PEOPLE, "rank": rank} for seed in training.SEEDS for rank in (1, 4, 16, 64)]


def name_in(row):
    """The person that a row asks about."""
    return FULL_NAME.search(row["prompt"][0]["content"])[0]


def facts_of(people, seed):
    """(rows to train on, one of them a fact; one row a fact in the third wording) for people drawn by the seed."""
    splits = data.load_task("recall")
    names = random.Random(seed).sample(sorted({name_in(row) for row in splits["train"]}), people)
    chosen = {split: rows.filter(lambda row: name_in(row) in names) for split, rows in splits.items()}
    train, first = chosen["train"], {}
    for number, row in enumerate(train):
        first.setdefault((name_in(row), row["kind"]), number)
    return train, train.select(first.values()), concatenate_datasets([chosen["validation"], chosen["test"]])


def measure(seed, people, rank):
    """Teach the facts about so many people, then ask for them."""
    rate = best_rate("lora")
    train, told, reworded = facts_of(people, seed)
    trainer, clock = training.make_trainer(
        train,
        rate,
        seed,
        lora=lora_config(rank=rank),
        max_steps=-1,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
    )
    trainer.train()
    shares = {
        name: training.score(trainer.model, trainer.processing_class, "recall", rows)["score"]
        for name, rows in (("told", told), ("reworded", reworded))
    }
    return {"learning_rate": rate, "facts": len(told), **shares, **training.size_and_speed(trainer, clock)}
