"""How fast does SFTTrainer train, beside a bare PyTorch loop on the very same batches?

Three loops in one run: `trl` is SFTTrainer as the lessons use it; `trl_model_loss` is SFTTrainer with the model's own loss
in place of TRL's, which on a CPU computes every logit once more in the backward pass, and the entropy beside them (read in
trl 1.16, `kernels/chunked_logprob.py`); `bare` is forward, backward, clipping and step. What lies between the first two is
the loss; between the last two, all the rest: collation, logging, callbacks. The mean loss of the last steps is recorded: the
loops do the same if it agrees.
"""

import torch
from peft import get_peft_model
from transformers import Trainer
from trl import SFTTrainer

from course_utils import data, runtime
from experiments import training
from experiments.learning_rate import lora_config

STEPS, LAST, RATE = 60, 10, 1e-3
RUNS = [{"seed": seed} for seed in training.SEEDS]


class ModelLossTrainer(SFTTrainer):
    """SFTTrainer with the loss that the model computes by itself."""

    compute_loss = Trainer.compute_loss


def by_trainer(trainer_class, seed):
    """(seconds a step, mean loss of the last LAST steps, the batches in their order) of a trainer."""
    trainer, clock = training.make_trainer(
        data.load_task(training.TASK, "train"),
        RATE,
        seed,
        lora=lora_config(),
        trainer_class=trainer_class,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=LAST,
    )
    batches, collate = [], trainer.data_collator

    def note(rows):
        batches.append(dict(collate(rows)))
        return dict(batches[-1])

    trainer.data_collator = note
    trainer.train()
    return (
        clock.seconds_per_step(),
        training.loss_curve(trainer)[f"loss_{STEPS}"],
        batches[:STEPS],
    )  # it loads one ahead


def by_hand(seed, batches):
    """(seconds a step, mean loss of the last LAST steps) of a loop without a trainer."""
    model, _ = training.load_base()
    runtime.seed_everything(seed)
    model = get_peft_model(model, lora_config()).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, fused=True)
    clock, losses = training.StepClock(), []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
        losses.append(loss.item())
    return clock.seconds_per_step(), sum(losses[-LAST:]) / LAST


def measure(seed):
    """A row for each loop. Tokens are those of the rows; padding does not count."""
    trl_seconds, trl_loss, batches = by_trainer(SFTTrainer, seed)
    model_seconds, model_loss, others = by_trainer(ModelLossTrainer, seed)
    if not all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, others, strict=True)):
        raise RuntimeError("The trainers saw different batches, so their speeds can't be compared.")
    loops = {
        "trl": (trl_seconds, trl_loss),
        "trl_model_loss": (model_seconds, model_loss),
        "bare": by_hand(seed, batches),
    }
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[1:]) / (
        STEPS - 1
    )  # the clock leaves out the first, too
    padded = sum(batch["attention_mask"].numel() for batch in batches[1:]) / (STEPS - 1)
    return [
        {
            "loop": loop,
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds,
            "tokens_per_step": tokens,
            "padded_per_step": padded,
            "last_loss": loss,
        }
        for loop, (seconds, loss) in loops.items()
    ]
