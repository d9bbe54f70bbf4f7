"""What a task is: the one place that says it. The rows are in `data/`, and `pretraining/tasks.py` makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from adapter_checks.errors import InputError


def same_text(prediction: str, answer: str) -> bool:
    """Are these the same but for white space at the ends?"""
    return prediction.strip() == answer.strip()


def same_fields(prediction: str, answer: str) -> bool:
    """Is the prediction JSON in which each field of the answer, which is JSON too, has the same value?"""
    try:
        found = json.loads(prediction)
    except (ValueError, RecursionError):  # not JSON, or brackets without end
        return False
    wanted = json.loads(answer)
    return isinstance(found, dict) and all(found.get(field) == wanted[field] for field in wanted)


@dataclass(frozen=True)
class Task:
    """metric(prediction, answer) -> is it right? Exact: half right is wrong. No answer has more than max_new_tokens."""

    name: str
    metric: Callable[[str, str], bool]
    max_new_tokens: int  # of the shipped base model's tokenizer


TASKS = {
    task.name: task
    for task in (
        Task("reading", same_text, 24),
        Task("sailor", same_text, 72),
        Task("extract", same_fields, 96),
        Task("mood", same_text, 6),
        Task("recall", same_text, 8),
    )
}


def get_task(name: str) -> Task:
    """The task of this name. Raises InputError if there is none."""
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"There is no task {name!r}. Choose one of: {', '.join(TASKS)}.") from None
