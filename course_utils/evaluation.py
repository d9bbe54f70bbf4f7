"""What a model answers, and how much of it is right."""

from __future__ import annotations

import math
import os
from collections import defaultdict

from adapter_checks.errors import InputError
from adapter_checks.generation import evaluating, generate, padded
from course_utils import paths
from course_utils.tasks import get_task


def score(task: str, predictions, rows) -> dict:
    """Share of right answers, from 0 to 1.

    predictions: one string for each row; rows: rows of the task (see `data.task_files`).

    Returns {"score": of all rows, "n": their number, "by_kind": {kind: score}, "novel": score of the rows with names
    and objects that training never used, None if there is no such row}.
    Raises InputError if there is no such task; ValueError if there is no row, or not one prediction for each.
    """
    metric = get_task(task).metric
    if len(predictions) != len(rows) or not len(rows):
        raise ValueError(
            f"There are {len(predictions)} predictions and {len(rows)} rows; give one for each, and at least one."
        )
    every, novel, by_kind = [], [], defaultdict(list)
    for prediction, row in zip(predictions, rows):
        right = metric(prediction, row["completion"][0]["content"])
        every.append(right)
        by_kind[row["kind"]].append(right)
        if row["novel"]:
            novel.append(right)
    return {
        "score": _mean(every),
        "n": len(every),
        "by_kind": {kind: _mean(by_kind[kind]) for kind in sorted(by_kind)},
        "novel": _mean(novel) if novel else None,
    }


def _mean(values) -> float:
    return sum(values) / len(values)


def evaluate_task(model, tokenizer, task: str, rows, **generate_options) -> dict:
    """Answer the rows' prompts with `generate` and `score` the answers; also returns them, as "predictions".

    An answer is cut at the tokens that the task's longest answer takes, unless `max_new_tokens` is given.
    """
    options = {"max_new_tokens": get_task(task).max_new_tokens, **generate_options}
    predictions = generate(model, tokenizer, [row["prompt"] for row in rows], **options)
    return {**score(task, predictions, rows), "predictions": predictions}


def band(what: str, value: float, low: float, high: float, *, quiet: bool = False) -> None:
    """Print whether `value` (a share, from 0 to 1) lies between `low` and `high`, which hold for the shipped base model.

    With another base model the line is information. With the shipped one a value outside raises InputError if
    COURSE_STRICT is 1, as it is in the course's own tests. quiet: print only what is outside.
    """
    expected = f"{what}: {value:.0%} (the shipped model: {low:.0%} to {high:.0%})"
    if not paths.is_shipped_base():
        if not quiet:
            print(f"[INFO] {expected}")
    elif low <= value <= high:
        if not quiet:
            print(f"[OK]   {expected}")
    else:
        print(f"[FAIL] {expected}")
        if os.environ.get("COURSE_STRICT") == "1":
            raise InputError(f"{expected}: outside the band")


def perplexity(model, tokenizer, texts, batch_size=16, max_length=512) -> float:
    """exp of the mean negative log-likelihood of a token, in nats, given those before it in its text.

    Every predicted token of every text weighs the same; padding counts for nothing. A text is cut after
    `max_length` tokens. Raises ValueError if no text has two tokens, so that there is nothing to predict.
    """
    import torch

    encoded = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    encoded = [ids for ids in encoded if len(ids) > 1]
    if not encoded:
        raise ValueError("No text has two tokens or more, so there is nothing to predict.")
    loss, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            input_ids, attention_mask = padded(model, tokenizer, encoded[start : start + batch_size], side="right")
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
            targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
            loss += torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum").item()
            count += int(attention_mask[:, 1:].sum())
    return math.exp(loss / count)
