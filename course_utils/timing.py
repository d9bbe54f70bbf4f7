"""Times that can be compared."""

from __future__ import annotations

import time


def in_turns(actions: dict, rounds: int = 15) -> dict:
    """{name: (median, lower quartile, upper quartile)} of the milliseconds that each action takes.

    actions: {name: function without arguments}. Each round calls every action once, so a machine that warms up, slows
    down or has other work treats all alike; timed one after another, the same model differs from itself by a tenth and
    more. A first round is not counted.
    """
    taken = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            taken[name].append(1e3 * (time.perf_counter() - began))
    ordered = {name: sorted(values[1:]) for name, values in taken.items()}
    return {
        name: tuple(values[int(place * (rounds - 1))] for place in (0.5, 0.25, 0.75))
        for name, values in ordered.items()
    }
