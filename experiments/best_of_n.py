"""A reward model trained on the pairs, and the best of n replies by its score: is what it likes best what was meant?"""

import tempfile

import torch
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from adapter_checks.generation import evaluating, padded
from course_utils import data, runtime
from experiments import preferring, training

STEPS, ROWS_A_STEP, RATE = 60, 16, 3e-3
DRAWS = (1, 2, 4, 8, 16, 32)
RUNS = [{"seed": seed, "kind": kind} for seed in training.SEEDS for kind in ("all pairs", "100 pairs")]


def reward_model(seed, pairs):
    """(reward model, its tokenizer): the start's weights, with LoRA and a new head of one output, trained on these pairs."""
    runtime.seed_everything(seed)
    merged, tokenizer = preferring.start_model()
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id  # the score is read at the last token that is no pad
    settings = preferring.trainer_settings(
        seed,
        RATE,
        STEPS,
        per_device_train_batch_size=ROWS_A_STEP,
        max_length=preferring.MAX_LENGTH,
        logging_steps=min(10, STEPS),
    )
    trainer = RewardTrainer(
        model=model.to(runtime.device()),
        args=RewardConfig(**settings),
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
        peft_config=preferring.lora_config("SEQ_CLS"),
    )
    return preferring.train(trainer).model, tokenizer


def scores(model, tokenizer, rows, texts):
    """The reward model's score of each text as the reply to its row's prompt."""
    found = []
    for start in range(0, len(rows), preferring.BATCH):
        part = zip(rows[start : start + preferring.BATCH], texts[start : start + preferring.BATCH])
        whole = [
            tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": text}], return_dict=True)["input_ids"]
            for row, text in part
        ]  # fmt: skip
        input_ids, attention_mask = padded(model, tokenizer, whole, side="right")
        with evaluating(model), torch.no_grad():
            found += model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].tolist()
    return found


def ranks_right(model, tokenizer, rows, better, worse):
    """The share of rows whose better reply scores higher."""
    pairs = zip(scores(model, tokenizer, rows, better), scores(model, tokenizer, rows, worse))
    return sum(one > other for one, other in pairs) / len(rows)


def measure(seed, kind):
    """Train a reward model, and take the best of n replies by its score; a row for each n."""
    pairs = data.load_task("honesty", "pairs")
    model, tokenizer = reward_model(seed, pairs if kind == "all pairs" else pairs.select(range(100)))
    held_out = list(data.load_task("honesty", "test_pairs"))
    chosen, rejected = ([row[side][0]["content"] for row in held_out] for side in ("chosen", "rejected"))
    told = [row for row in held_out if row["kind"] == "told"]
    accuracy = {
        "pair_accuracy": ranks_right(model, tokenizer, held_out, chosen, rejected),
        # What no pair showed: what is told of the thing in question against what is told of another.
        "wrong_value_accuracy": ranks_right(
            model, tokenizer, told, [row["chosen"][0]["content"] for row in told], [row["guess"] for row in told]
        ),
    }
    policy, _ = preferring.start_model()
    rows = list(data.load_task("honesty", "validation"))
    torch.manual_seed(seed)
    draws = [preferring.replies(policy, tokenizer, rows, temperature=1.0) for _ in range(max(DRAWS))]
    scored = [scores(model, tokenizer, rows, draw) for draw in draws]
    right = [[preferring.is_right(reply, row) for reply, row in zip(draw, rows)] for draw in draws]
    return [{"n": n, **accuracy, **best_of(n, scored, right, rows)} for n in DRAWS]


def best_of(n, scored, right, rows):
    """Columns for the best of the first n draws: its score, and whether it is right; `oracle` if one of them is right at all."""
    best = [max(range(n), key=lambda draw: scored[draw][place]) for place in range(len(rows))]
    found = {"told": [], "untold": []}
    for place, row in enumerate(rows):
        found["told" if row["kind"] == "told" else "untold"].append(right[best[place]][place])
    return {
        "score": sum(scored[draw][place] for place, draw in enumerate(best)) / len(rows),
        "right": sum(map(sum, found.values())) / len(rows),
        "told_right": sum(found["told"]) / len(found["told"]),
        "untold_honest": sum(found["untold"]) / len(found["untold"]),
        "oracle": sum(any(right[draw][place] for draw in range(n)) for place in range(len(rows))) / len(rows),
    }
