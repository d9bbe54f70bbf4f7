"""What does DPO make of a model that guesses, and what do its dashboards hide?

One setting of the lesson, and each of the others changed in one thing: the rate, beta, the length, the loss, the pairs, the model that it
starts from. Beside them two controls that need no pairs: fine-tuning on the preferred replies, and on the model's own right replies.
"""

import random

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from course_utils import data, runtime
from experiments import preferring, training

STEPS, ROWS_A_STEP, RATE, BETA, PAIRS = 80, 8, 1e-3, 0.1, 1200
DRAWS = 4  # replies that are drawn for each prompt, where the model's own are trained on
OWN_PROMPTS = 640

PLAIN, WITH_SFT = ("sigmoid",), ("sigmoid", "sft")
# name: what differs from the lesson's own run, {}.
SETTINGS = {
    "lesson": {},
    "rate 0.0003": {"rate": 3e-4},
    "rate 0.003": {"rate": 3e-3},
    "dpo": {"loss": PLAIN},
    "dpo, rate 0.0003": {"loss": PLAIN, "rate": 3e-4},
    "dpo, rate 0.003": {"loss": PLAIN, "rate": 3e-3},
    "dpo, rate 0.01": {"loss": PLAIN, "rate": 1e-2},
    "dpo, beta 0.01": {"loss": PLAIN, "beta": 0.01},
    "dpo, beta 1": {"loss": PLAIN, "beta": 1.0},
    "20 steps": {"steps": 20},
    "160 steps": {"steps": 160},
    "ipo": {"loss": ("ipo",)},
    "only untold": {"pairs": "only untold"},
    "no near": {"pairs": "no near"},
    "100 pairs": {"pairs": "100"},
    "a fifth swapped": {"pairs": "swapped", "swapped": 0.2},
    "half swapped": {"pairs": "swapped", "swapped": 0.5},
    "a fifth swapped, robust": {"pairs": "swapped", "swapped": 0.2, "loss": ("robust", "sft")},
    "own pairs": {"pairs": "own", "loss": PLAIN},
    "from reading": {"start": "reading"},
    "sft on chosen": {"loss": None, "rate": 3e-3},
    "sft on own": {"loss": None, "pairs": "own", "rate": 3e-3},
}
RUNS = [{"seed": seed, "setting": setting} for seed in training.SEEDS for setting in SETTINGS]


def swap(row):
    """The pair with its labels the wrong way round."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def pairs(kind, seed, start, swapped=0.0):
    """The pairs to train on, a list of rows."""
    rows = list(data.load_task("honesty", "pairs").select(range(PAIRS)))
    rng = random.Random(seed)
    if kind == "only untold":
        return [row for row in rows if row["kind"] != "told"]
    if kind == "no near":
        return [row for row in rows if row["kind"] != "near"]
    if kind == "100":
        return rows[:100]
    if kind == "swapped":
        return [swap(row) if rng.random() < swapped else row for row in rows]
    if kind == "own":
        return own_pairs(rows[:OWN_PROMPTS], seed, start, rng)
    return rows


def own_pairs(rows, seed, start, rng):
    """A right and a wrong reply of the model's own for each prompt, where it drew both."""
    model, tokenizer = preferring.start_model(start)
    torch.manual_seed(seed)
    draws = [preferring.replies(model, tokenizer, rows, temperature=1.0) for _ in range(DRAWS)]
    made = []
    for number, row in enumerate(rows):
        drawn = sorted({replies[number] for replies in draws} - {""})
        right = [reply for reply in drawn if preferring.is_right(reply, row)]
        wrong = [reply for reply in drawn if not preferring.is_right(reply, row)]
        if right and wrong:
            chosen, rejected = ([{"role": "assistant", "content": rng.choice(group)}] for group in (right, wrong))
            made.append({**row, "chosen": chosen, "rejected": rejected})
    return made


def make_trainer(rows, seed, model, tokenizer, loss=WITH_SFT, rate=RATE, beta=BETA, steps=STEPS):
    """DPO with these losses, or fine-tuning on the chosen replies if `loss` is None."""
    settings = preferring.trainer_settings(
        seed,
        rate,
        steps,
        per_device_train_batch_size=ROWS_A_STEP,
        max_length=preferring.MAX_LENGTH,
        logging_steps=min(10, steps),
    )
    settings["logging_nan_inf_filter"] = False  # a loss that is no longer a number is a result, too
    common = dict(model=model, processing_class=tokenizer, peft_config=preferring.lora_config())
    if loss is None:
        chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        return SFTTrainer(
            args=SFTConfig(**settings, completion_only_loss=True), train_dataset=Dataset.from_list(chosen), **common
        )
    config = DPOConfig(**settings, beta=beta, loss_type=list(loss), label_smoothing=0.2 if "robust" in loss else 0.0)
    columns = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    return DPOTrainer(args=config, train_dataset=Dataset.from_list(columns), **common)


def measure(seed, setting):
    """Train once; what the replies are afterwards, and what the dashboard said."""
    changes = {"pairs": "all", "start": preferring.START, "swapped": 0.0, **SETTINGS[setting]}
    kind, start, swapped = (changes.pop(key) for key in ("pairs", "start", "swapped"))
    rows = pairs(kind, seed, start, swapped)
    runtime.seed_everything(seed)
    model, tokenizer = preferring.start_model(start)
    trainer = preferring.train(make_trainer(rows, seed, model, tokenizer, **changes))
    reference, _ = preferring.start_model(start)
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    return {
        "pairs": len(rows),
        **preferring.shares(trainer.model, tokenizer),
        **preferring.on_pairs(trainer.model, reference, tokenizer),
        "divergence": preferring.divergence(trainer.model, reference, tokenizer),
        "last_loss": float(last["loss"]),
        "train_accuracy": float(last.get("rewards/accuracies", "nan")),
    }
