"""The fine-tuning that the sweeps repeat, with TRL in the open, and what they measure of it."""

import math
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from course_utils import data, evaluation, paths, runtime

SEEDS = (0, 1, 2)
TASK = "sailor"
STEPS, BATCH = 120, 32
SCORED = 350  # rows of the validation and of the test split that are scored, at most


class StepClock(TrainerCallback):
    """Notes when each step ended. The first is left out of the speed: it also waits for memory and kernels."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        """The mean over all steps but the first, data loading and logging included."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def load_base():
    """(base model, its tokenizer)."""
    base = paths.base_model()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=runtime.dtype())
    return model.to(runtime.device()), AutoTokenizer.from_pretrained(base)


def make_trainer(rows, learning_rate, seed, lora=None, eval_rows=None, trainer_class=SFTTrainer, load=None, **changes):
    """(trainer, its StepClock): LoRA with the config `lora`, or all weights if it is None; `changes` go to SFTConfig.

    load: in place of `load_base`, to train on another form of the base.
    """
    runtime.seed_everything(seed)  # before the trainer, which draws A
    model, tokenizer = (load or load_base)()
    settings = dict(
        output_dir=str(paths.runs_dir() / "experiments" / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        warmup_steps=10,
        lr_scheduler_type="linear",
        completion_only_loss=True,
        max_length=256,
        save_strategy="no",
        logging_steps=25,
        seed=seed,
        **runtime.trainer_settings(),
        logging_nan_inf_filter=False,  # a loss that is no longer a number is a result, too
    )
    columns, clock = ["prompt", "completion"], StepClock()
    trainer = trainer_class(
        model=model,
        args=SFTConfig(**settings | changes),
        train_dataset=rows.select_columns(columns),
        processing_class=tokenizer,
        eval_dataset=None if eval_rows is None else eval_rows.select_columns(columns),
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)  # a sweep prints a line a run
    return trainer, clock


def score(model, tokenizer, task, rows):
    """The result of `evaluation.evaluate_task` on these rows."""
    return evaluation.evaluate_task(model, tokenizer, task, rows, batch_size=64)


def scored_rows(task, split):
    """The first SCORED rows of a split; it is shuffled, so these are any."""
    rows = data.load_task(task, split)
    return rows.select(range(min(SCORED, len(rows))))


def scores(trainer, task):
    """Columns: score on validation and test, and on the test rows whose names and things training never used."""
    validation, test = (
        score(trainer.model, trainer.processing_class, task, scored_rows(task, split))
        for split in ("validation", "test")
    )
    return {"validation": validation["score"], "test": test["score"], "novel": test["novel"]}


def size_and_speed(trainer, clock):
    """Columns: parameters trained, seconds a step, and bytes of what `save_pretrained` writes of the weights."""
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as saved:
        trainer.model.save_pretrained(saved)
        size = sum(file.stat().st_size for file in Path(saved).glob("*.safetensors"))
    return {"trainable": trainable, "seconds_per_step": clock.seconds_per_step(), "saved_bytes": size}


def loss_curve(trainer):
    """Columns `loss_25`, `loss_50`...: the training loss in nats a token, each the mean over the steps since the one before."""
    return {f"loss_{entry['step']}": float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry}


def held_out_loss(model, tokenizer):
    """Nats a token on text like that of the pretraining: a model that forgets gets worse at it."""
    try:
        return math.log(evaluation.perplexity(model, tokenizer, data.held_out_texts(tokenizer)))
    except OverflowError:  # exp of a loss beyond 709, which too high a learning rate does reach
        return math.inf
