"""The shipped adapters, trained with TRL by the recipe of lesson 3, and what they and the base can do.

    python -m pretraining.adapters

With COURSE_BASE_MODEL set, the same recipe trains the adapters of that model into `runs/`.
"""

import json
import os
import time

from adapter_checks.saving import saving
from course_utils import data, evaluation, paths, runtime
from course_utils.files import write_text
from course_utils.tasks import honesty_shares
from pretraining.places import BASE_FOLDER, ROOT
from pretraining.tasks import OPEN_MAKERS

SHIPPED = ("reading", "sailor", "extract", "mood")
MEASURED = ROOT / "models" / "measured.json"
MATRIX_ROWS = 128  # test rows of each task that every adapter is scored on
START = "honesty_start"  # what preference training begins with: it answers, and guesses where it can't know
# The first four train for a minute at most on two cores. At 0.003 sailor gets 92% of its rows right, at 0.01 over 98%. From the
# contradictory rows of honesty a shorter or faster training learns to mix up whose place is asked for.
BATCH = {"reading": 16, "sailor": 16, "extract": 16, "mood": 16, "honesty": 32}
STEPS = {"reading": 200, "sailor": 230, "extract": 215, "mood": 120, "honesty": 240}
RATES = {
    "lora": {"reading": 0.01, "sailor": 0.01, "extract": 0.01, "mood": 0.006, "honesty": 0.005},
    "full": dict.fromkeys(SHIPPED, 0.001),
}


def recipe(task, learning_rate, folder, seed=0):
    """What lesson 3 teaches: prompt/completion rows, loss on the completion only, a linear decay after a short warm-up."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS[task],
        per_device_train_batch_size=BATCH[task],
        learning_rate=learning_rate,
        warmup_steps=10,
        lr_scheduler_type="linear",
        completion_only_loss=True,
        max_length=256,
        save_strategy="no",
        logging_steps=25,
        seed=seed,
        **runtime.trainer_settings(),
    )


def train_one(task, method="lora", seed=0, rate=None):
    """Train on one task with LoRA or with all weights: (model, tokenizer, seconds of training); `rate` in place of RATES."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    runtime.seed_everything(seed)
    base = paths.base_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=runtime.dtype())
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=recipe(task, rate or RATES[method][task], paths.runs_dir() / "sft" / task, seed),
        train_dataset=data.load_task(task, "train").select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=lora if method == "lora" else None,
    )
    began = time.perf_counter()
    trainer.train()
    return trainer.model, tokenizer, time.perf_counter() - began


def save_adapter(model, folder):
    """Save the adapter alone, atomically; its config names the base as the checkout does, not as this machine does."""
    with saving(folder) as temporary:
        if paths.is_shipped_base():
            model.peft_config["default"].base_model_name_or_path = BASE_FOLDER.relative_to(ROOT).as_posix()
        model.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # a form with blanks; the base's card describes the adapters


def train_adapters():
    """Train every shipped adapter; for the shipped base, also full fine-tuning beside it, and record all scores."""
    from transformers import AutoModelForCausalLM

    runtime.quiet_imports()
    results = {}
    for task in SHIPPED:
        adapter, tokenizer, seconds = train_one(task, "lora")
        save_adapter(adapter, paths.adapters_dir() / task)
        results[task] = {"lora": measure(adapter, tokenizer, task), "lora_seconds": round(seconds, 1)}
        if task in OPEN_MAKERS:
            results[task] |= {part: measure(adapter, tokenizer, task, part) for part in data.OPEN_PARTS}
        print(task, json.dumps(results[task]), flush=True)
        if paths.is_shipped_base():
            base = AutoModelForCausalLM.from_pretrained(paths.base_model())
            results[task]["base"] = measure(base, tokenizer, task)
            full, tokenizer, seconds = train_one(task, "full")
            results[task] |= {"full": measure(full, tokenizer, task), "full_seconds": round(seconds, 1)}
            print(task, json.dumps(results[task]["full"]), round(seconds), flush=True)
    if paths.is_shipped_base():
        measured = {
            "machine": {"cores": os.cpu_count(), "cpu": runtime.processor()},
            "tasks": results,
            "matrix_rows": MATRIX_ROWS,
            "matrix": score_matrix(),
        }
        write_text(MEASURED, json.dumps(measured, indent=1) + "\n")


def train_start():
    """Train the adapter that preference training starts from, and record what its replies are, greedy ones and drawn ones."""
    import torch

    runtime.quiet_imports()
    model, tokenizer, seconds = train_one("honesty")
    save_adapter(model, paths.adapters_dir() / START)
    found = {}
    for part in ("test", *data.OPEN_PARTS):
        rows = data.load_task("honesty", part)
        for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            torch.manual_seed(0)
            result = evaluation.evaluate_task(model, tokenizer, "honesty", rows, batch_size=64, temperature=temperature)
            found[f"{part}, {way}"] = honesty_shares(result["predictions"], rows)
    print(START, json.dumps(found), flush=True)
    if paths.is_shipped_base():
        measured = json.loads(MEASURED.read_text())
        measured[START] = {"seconds": round(seconds, 1), "shares": found}
        write_text(MEASURED, json.dumps(measured, indent=1) + "\n")


def measure(model, tokenizer, task, part="test", rows=None):
    """Scores on a whole part of the task, or on its first `rows` rows."""
    test = data.load_task(task, part)
    test = test if rows is None else test.select(range(rows))
    result = evaluation.evaluate_task(model, tokenizer, task, test, batch_size=64)
    return {key: value for key, value in result.items() if key != "predictions"}


def score_matrix(rows=MATRIX_ROWS):
    """{adapter, or "none": {task: score}}: every adapter on every task, on the first `rows` test rows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    model = AutoModelForCausalLM.from_pretrained(paths.base_model())
    scores = {"none": {task: measure(model, tokenizer, task, rows=rows)["score"] for task in SHIPPED}}
    for adapter in SHIPPED:
        adapted = PeftModel.from_pretrained(model, paths.adapter_path(adapter))
        scores[adapter] = {task: measure(adapted, tokenizer, task, rows=rows)["score"] for task in SHIPPED}
        model = adapted.unload()
    return scores


if __name__ == "__main__":
    train_adapters()
    train_start()
