"""The shipped adapters, trained with TRL by the recipe of lesson 3, and what they and the base can do.

    python -m pretraining.adapters

With COURSE_BASE_MODEL set, the same recipe trains the adapters of that model into `runs/`.
"""

import json
import os
import time

from course_utils import data, evaluation, runtime
from pretraining.places import BASE_FOLDER, ROOT

SHIPPED = ("reading", "sailor", "extract", "mood")
MEASURED = ROOT / "models" / "measured.json"
LONGEST_ANSWER = {"reading": 12, "sailor": 40, "extract": 48, "mood": 6}  # new tokens
STEPS = {"reading": 200, "sailor": 150, "extract": 150, "mood": 100}


def recipe(task, learning_rate, folder, seed=0):
    """What lesson 3 teaches: prompt/completion rows, loss on the completion only, a linear decay after a short warm-up."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder), max_steps=STEPS[task], per_device_train_batch_size=32, learning_rate=learning_rate, warmup_steps=10,
        lr_scheduler_type="linear", completion_only_loss=True, max_length=256, save_strategy="no", logging_steps=25, seed=seed,
        **runtime.trainer_settings(),
    )


def train_one(task, method="lora", seed=0):
    """Train on one task with LoRA or with all weights: (model, tokenizer, seconds of training, last training loss)."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    runtime.seed_everything(seed)
    base = runtime.base_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=runtime.dtype())
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=recipe(task, {"lora": 5e-3, "full": 5e-4}[method], runtime.runs_dir() / "sft" / task, seed),
        train_dataset=data.load_task(task, "train").select_columns(["prompt", "completion"]), processing_class=tokenizer,
        peft_config=lora if method == "lora" else None,
    )
    began = time.perf_counter()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, tokenizer, time.perf_counter() - began, losses[-1]


def save_adapter(model, folder):
    """Save the adapter alone, atomically; its config names the base as the checkout does, not as this machine does."""
    with runtime.saving(folder) as temporary:
        if runtime.is_shipped_base():
            model.peft_config["default"].base_model_name_or_path = BASE_FOLDER.relative_to(ROOT).as_posix()
        model.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # a form with blanks; the base's card describes the adapters


def train_adapters():
    """Train every shipped adapter; for the shipped base, also full fine-tuning beside it, and record all scores."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    runtime.quiet_imports()
    runtime.disable_progress_bars()
    shipped = runtime.is_shipped_base()
    measured = {"machine": {"cores": os.cpu_count(), "cpu": processor()}, "tasks": {}}
    for task in SHIPPED:
        rows, tokens = data.load_task(task, "test"), LONGEST_ANSWER[task]

        def measure(model, tokenizer):
            result = evaluation.evaluate_task(model, tokenizer, task, rows, max_new_tokens=tokens, batch_size=64)
            return {key: value for key, value in result.items() if key != "predictions"}

        adapter, tokenizer, seconds, loss = train_one(task, "lora")
        save_adapter(adapter, runtime.adapters_dir() / task)
        entry = {"rows": len(rows), "lora": measure(adapter, tokenizer), "lora_seconds": round(seconds, 1), "lora_loss": round(loss, 4)}
        print(task, json.dumps(entry), flush=True)
        if shipped:
            base = AutoModelForCausalLM.from_pretrained(runtime.base_model())
            entry["base"] = measure(base, AutoTokenizer.from_pretrained(runtime.base_model()))
            full, tokenizer, seconds, loss = train_one(task, "full")
            entry |= {"full": measure(full, tokenizer), "full_seconds": round(seconds, 1), "full_loss": round(loss, 4)}
            print(task, "base", entry["base"]["score"], "full", entry["full"]["score"], round(seconds), flush=True)
        measured["tasks"][task] = entry
    if shipped:
        MEASURED.write_text(json.dumps(measured, indent=1) + "\n")


def processor():
    """The processor's model as Linux tells it, else the machine type."""
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.machine()


if __name__ == "__main__":
    train_adapters()
