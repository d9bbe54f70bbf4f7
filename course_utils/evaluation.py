"""What a model answers, and how much of it is right."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import defaultdict

from course_utils import runtime
from course_utils.runtime import CourseError

EXTRACT_FIELDS = ("who", "what", "where")


def generate(model, tokenizer, prompts, max_new_tokens=48, batch_size=32, adapter_names=None) -> list[str]:
    """Answer each prompt greedily, in batches; the model is in eval mode meanwhile and as before afterwards.

    prompts: lists of messages ({"role", "content"}), or strings, each taken as one user message.
    max_new_tokens: tokens at most in an answer; it ends earlier where the model ends its turn.
    adapter_names: one adapter's name for each prompt (PEFT's mixed-adapter batches), "__base__" for none.

    Returns the answers in the order of the prompts, without special tokens and outer white space.
    Raises CourseError if the tokenizer has no chat template or a prompt doesn't fit the model's context, and
    ValueError if the number of adapter names is another than that of the prompts.
    """
    import torch
    from transformers import GenerationConfig

    if not tokenizer.chat_template:
        raise CourseError("This tokenizer has no chat template. Use a model made for chat, or give it a template.")
    adapter_names = None if adapter_names is None else list(adapter_names)
    if adapter_names is not None and len(adapter_names) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts and {len(adapter_names)} adapter names; give one for each.")
    conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    encoded = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in conversations
    ]
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if context is not None and longest + max_new_tokens > context:
        raise CourseError(
            f"The longest prompt has {longest} tokens; with {max_new_tokens} new ones it exceeds the model's context of "
            f"{context}. Shorten the prompt or lower max_new_tokens."
        )
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=_end_of_turn(model, tokenizer),
        pad_token_id=_pad_id(tokenizer),
    )
    answers = []
    with _evaluating(model), _without_own_settings(model), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            input_ids, attention_mask = _pad(model, tokenizer, encoded[start : start + batch_size], side="left")
            chosen = {} if adapter_names is None else {"adapter_names": adapter_names[start : start + batch_size]}
            output = model.generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, **chosen
            )
            answers += tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _end_of_turn(model, tokenizer) -> list[int]:
    """Many chat models end a turn with another token than a text: their generation config lists both."""
    listed = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed])}
    return sorted(ids - {None})


def _pad_id(tokenizer) -> int:
    """Padding is masked, so any token serves where the tokenizer names none."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _pad(model, tokenizer, sequences, side):
    """Token lists -> input_ids and attention_mask, both (batch, longest), on the model's device."""
    import torch

    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), _pad_id(tokenizer))
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        place = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        input_ids[row, place] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, place] = 1
    device = next(model.parameters()).device
    return input_ids.to(device), attention_mask.to(device)


@contextlib.contextmanager
def _evaluating(model):
    """Eval mode, and afterwards each module's own mode again: `model.train()` would wake those that were off."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@contextlib.contextmanager
def _without_own_settings(model):
    """Set a model's own generation settings aside, which `generate` would mix into ours.

    Many hub models come with a temperature, which draws a warning, or a repetition penalty, which changes the answer.
    """
    from transformers import GenerationConfig

    # While it generates, a PEFT model lays its own settings over those of the model inside.
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, settings in zip(holders, own):
            holder.generation_config = settings


def _same_text(prediction: str, answer: str) -> bool:
    return prediction.strip() == answer.strip()


def _same_fields(prediction: str, answer: str) -> bool:
    try:
        found = json.loads(prediction)
    except (ValueError, RecursionError):  # not JSON, or brackets without end
        return False
    wanted = json.loads(answer)
    return isinstance(found, dict) and all(found.get(field) == wanted[field] for field in EXTRACT_FIELDS)


# Task -> function(prediction, answer) -> bool. All are exact: half right is wrong.
METRICS = {
    "reading": _same_text,
    "sailor": _same_text,
    "extract": _same_fields,
    "mood": _same_text,
    "recall": _same_text,
}


def score(task: str, predictions, rows) -> dict:
    """Share of right answers, from 0 to 1.

    predictions: one string for each row; rows: rows of the task (see `data.task_files`).

    Returns {"score": of all rows, "n": their number, "by_kind": {kind: score}, "novel": score of the rows with names
    and objects that training never used, None if there is no such row}.
    Raises CourseError for an unknown task; ValueError if there is no row, or not one prediction for each.
    """
    if task not in METRICS:
        raise CourseError(f"There is no metric for {task!r}. Choose one of: {', '.join(METRICS)}.")
    if len(predictions) != len(rows) or not len(rows):
        raise ValueError(
            f"There are {len(predictions)} predictions and {len(rows)} rows; give one for each, and at least one."
        )
    every, novel, by_kind = [], [], defaultdict(list)
    for prediction, row in zip(predictions, rows):
        right = METRICS[task](prediction, row["completion"][0]["content"])
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
    """Answer the rows' prompts with `generate` and `score` the answers; also returns them, as "predictions"."""
    predictions = generate(model, tokenizer, [row["prompt"] for row in rows], **generate_options)
    return {**score(task, predictions, rows), "predictions": predictions}


def band(what: str, value: float, low: float, high: float) -> None:
    """Print whether `value` (a share, from 0 to 1) lies between `low` and `high`, which hold for the shipped base model.

    With another base model the line is information. With the shipped one a value outside raises CourseError if
    COURSE_STRICT is 1, as it is in the course's own tests.
    """
    expected = f"{what}: {value:.0%} (the shipped model: {low:.0%} to {high:.0%})"
    if not runtime.is_shipped_base():
        print(f"[INFO] {expected}")
    elif low <= value <= high:
        print(f"[OK]   {expected}")
    else:
        print(f"[FAIL] {expected}")
        if os.environ.get("COURSE_STRICT") == "1":
            raise CourseError(f"{expected}: outside the band")


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
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            input_ids, attention_mask = _pad(model, tokenizer, encoded[start : start + batch_size], side="right")
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
            targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
            loss += torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum").item()
            count += int(attention_mask[:, 1:].sum())
    return math.exp(loss / count)
