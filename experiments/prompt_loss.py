"""Loss on the answer alone, or on the prompt as well: which learns a task faster, and does it depend on what the prompt holds?

The same rows, steps and batches for both, and one learning rate, a step below the best on `sailor`, tuned for neither. In `sailor` about half of the tokens are the answer's, in `reading` a tenth: a passage to be read, and a few
words to be copied from it.
"""

from course_utils import data
from experiments import training
from experiments.learning_rate import lora_config

STEPS, BATCH, RATE, TEST_ROWS, COUNTED_ROWS = 100, 16, 5e-3, 200, 200
RUNS = [
    {"seed": seed, "task": task, "loss_on": loss_on}
    for seed in training.SEEDS
    for task in ("sailor", "reading")
    for loss_on in ("answer", "all")
]


def measure(seed, task, loss_on):
    """The share of tokens with loss, the score on the first TEST_ROWS test rows, and the loss on held-out text (nats a token)."""
    trainer, _ = training.make_trainer(
        data.load_task(task, "train"),
        RATE,
        seed,
        lora=lora_config(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        completion_only_loss=loss_on == "answer",
    )
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(COUNTED_ROWS)])
    with_loss = ((batch["labels"] != -100).sum() / batch["attention_mask"].sum()).item()
    trainer.train()
    test = data.load_task(task, "test").select(range(TEST_ROWS))
    return {
        "with_loss": with_loss,
        "score": training.score(trainer.model, trainer.processing_class, task, test)["score"],
        "held_out_after": training.held_out_loss(trainer.model, trainer.processing_class),
    }
