"""Times that can be compared."""

import pytest

from course_utils import timing


def test_actions_take_turns_and_the_first_round_does_not_count(monkeypatch):
    clock, called = [0.0], []

    def action(name, seconds):
        def act():
            called.append(name)
            clock[0] += seconds if len(called) > 2 else 100  # the first call of each is slow

        return act

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    times = timing.in_turns({"a": action("a", 0.001), "b": action("b", 0.002)}, rounds=4)
    assert called == ["a", "b"] * 5
    assert times["a"] == pytest.approx((1, 1, 1)) and times["b"] == pytest.approx((2, 2, 2))


def test_quartiles_lie_around_the_median(monkeypatch):
    ticks = iter([0, 0, *(tick for second in (5, 1, 4, 2, 3) for tick in (0, second))])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    assert timing.in_turns({"a": lambda: None}, rounds=5)["a"] == (3000, 2000, 4000)
