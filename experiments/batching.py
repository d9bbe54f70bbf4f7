"""How many tokens a second train when short and long rows share a batch, and what do grouping and packing change?

Each way is SFTTrainer with TRL's loss on the same rows, 32 rows a step: `padded` in random order, `grouped` by length,
`packed` end to end into rows of MAX_LENGTH tokens, which TRL then lays into one row without a pad. A packed batch of as many
tokens as a padded one has on average makes the steps comparable. Tokens are those of the rows; padding does not count.
"""

from course_utils import data
from experiments import training
from experiments.learning_rate import lora_config

STEPS, MAX_LENGTH, RATE = 40, 128, 1e-3
WAYS = {
    "padded": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    # About 45 tokens a row, so 32 rows are some 1,430 tokens: eleven rows of 128.
    "packed": {"packing": True, "per_device_train_batch_size": 11},
}
RUNS = [{"seed": seed, "way": way} for seed in training.SEEDS for way in WAYS]


def measure(seed, way):
    """Tokens a second, and how many tokens and places a step had, over all steps but the first."""
    trainer, clock = training.make_trainer(
        data.load_task(training.TASK, "train"),
        RATE,
        seed,
        lora=lora_config(),
        max_steps=STEPS,
        max_length=MAX_LENGTH,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=STEPS,
        **WAYS[way],
    )
    places, tokens, collate = [], [], trainer.data_collator

    def note(rows):
        batch = collate(rows)
        mask = batch.get("attention_mask")  # a packed batch has none, and no pad
        places.append(batch["input_ids"].numel())
        tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
        return batch

    trainer.data_collator = note
    trainer.train()
    seconds = clock.seconds_per_step()
    per_step = sum(tokens[1:STEPS]) / (STEPS - 1)  # it loads one ahead
    return {
        "tokens_per_second": per_step / seconds,
        "seconds_per_step": seconds,
        "tokens_per_step": per_step,
        "places_per_step": sum(places[1:STEPS]) / (STEPS - 1),
    }
