"""When is fine-tuning worth it? A few examples in the prompt of the base model, beside LoRA on 64 and on 2,000 examples.

The examples of a prompt are drawn by the seed and stand before each question as earlier turns of the talk. Four of them fit
the context of 512 tokens in every task. LoRA takes 100 steps of batch 16, 1,600 rows: 25 times each of 64 examples. Its
learning rate is one for all tasks, a step below the best on `sailor`, and was tuned for none of them.
"""

import random

from course_utils import data
from experiments import training
from experiments.learning_rate import lora_config

TEST_ROWS, STEPS, RATE = 200, 100, 5e-3
WAYS = (("prompt", 0), ("prompt", 4), ("lora", 64), ("lora", 2000))
RUNS = [
    {"seed": seed, "task": task, "method": method, "examples": examples}
    for seed in training.SEEDS
    for task in ("reading", "sailor", "extract", "mood")
    for method, examples in WAYS
]


def shown_first(examples, rows):
    """The rows, each with the turns of the examples before its own question."""
    turns = [message for example in examples for message in example["prompt"] + example["completion"]]
    return [{**row, "prompt": turns + row["prompt"]} for row in rows]


def measure(seed, task, method, examples):
    """The score on the first TEST_ROWS test rows."""
    train, test = data.load_task(task, "train"), data.load_task(task, "test").select(range(TEST_ROWS))
    chosen = train.select(random.Random(seed).sample(range(len(train)), examples))
    if method == "prompt":
        model, tokenizer = training.load_base()
        test = shown_first(chosen, test)
    else:
        trainer, _ = training.make_trainer(
            chosen, RATE, seed, lora=lora_config(), max_steps=STEPS, per_device_train_batch_size=16
        )
        trainer.train()
        model, tokenizer = trainer.model, trainer.processing_class
    return {"score": training.score(model, tokenizer, task, test)["score"]}
