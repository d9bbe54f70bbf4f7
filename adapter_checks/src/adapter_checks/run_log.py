"""The metrics that a trainer logged, and which kind of preference training they are of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# From so many steps at the highest rate on, a metric that has not moved says something.
STEPS_TO_JUDGE = 20


class RunLog:
    """What a trainer logged while it trained (its `state.log_history`), without evaluations and the summary at the end."""

    def __init__(self, history: Sequence[Mapping[str, Any]]) -> None:
        self.training = [entry for entry in history if "loss" in entry]
        self.evaluations = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
        self.steps = max((int(entry.get("step") or 0) for entry in self.training), default=0)

    def kind(self) -> str:
        """The trainer that logs such metrics: "DPO", "reward model", "GRPO" (and RLOO), or "" for others."""
        names = {name for entry in self.training for name in entry}
        if "rewards/margins" in names:
            kto = "kl" in names and "rewards/accuracies" not in names  # which has no pairs
            return "" if kto or self._without_reference() else "DPO"
        if "frac_reward_zero_std" in names or {"reward", "completions/mean_length"} <= names:
            return "GRPO"
        return "reward model" if {"accuracy", "margin"} <= names else ""

    def _without_reference(self) -> bool:
        """Whether rewards are log-probabilities times a number, as those of CPO, SimPO and ORPO: nothing is subtracted."""
        sides = [
            [self.values(f"{what}/{side}")[:1] for what in ("rewards", "logps")] for side in ("chosen", "rejected")
        ]
        if not all(values and values[0] for side in sides for values in side):
            return False
        chosen, rejected = (reward[0] / logps[0] for reward, logps in sides)
        return math.isclose(chosen, rejected, rel_tol=1e-3)

    def values(self, name: str) -> list[float]:
        """A metric over the run, without the logs in which it is missing or not finite."""
        found = [entry.get(name) for entry in self.training]
        return [float(value) for value in found if isinstance(value, (int, float)) and math.isfinite(value)]

    def start(self, name: str) -> float | None:
        """Mean of the first fifth of the logs, at least one; None if it was never logged."""
        values = self.values(name)
        return statistics.fmean(values[: _fifth(values)]) if values else None

    def end(self, name: str) -> float | None:
        """Mean of the last fifth of the logs, at least one; None if it was never logged."""
        values = self.values(name)
        return statistics.fmean(values[-_fifth(values) :]) if values else None

    def broken(self, name: str) -> list[int]:
        """The steps at which a metric was logged without being a finite number."""
        return [
            int(entry.get("step") or 0)
            for entry in self.training
            if name in entry and not (isinstance(entry[name], (int, float)) and math.isfinite(entry[name]))
        ]

    def past_warm_up(self) -> bool:
        """Whether enough steps were made since the rate was highest for the first time; without a rate since the start."""
        rates = [
            (entry["learning_rate"], int(entry.get("step") or 0)) for entry in self.training if "learning_rate" in entry
        ]
        highest = max((rate for rate, _ in rates), default=0)
        return self.steps - next((step for rate, step in rates if rate == highest), 0) >= STEPS_TO_JUDGE - 1


def _fifth(values) -> int:
    return max(1, len(values) // 5)
