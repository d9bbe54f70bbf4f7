"""A judge of replies with biases planted in it, to practise on: what a test of a judge should find is known."""

from __future__ import annotations

from collections.abc import Callable


def biased_judge(quality: Callable, *, first: float = 0, per_word: float = 0, phrase: str = "") -> Callable:
    """A judge(row, one, other) that returns 1 where it prefers the reply `one`, -1 for `other`, and 0 for a tie.

    It prefers the reply with the higher quality(row, reply), a number, and adds to that for what has nothing to do with it:
    `first` to the reply that stands first, `per_word` for each word, and 1 to a reply that begins with `phrase`.
    """

    def judge(row, one, other) -> int:
        def points(reply):
            return quality(row, reply) + per_word * len(reply.split()) + bool(phrase and reply.startswith(phrase))

        difference = points(one) + first - points(other)
        return (difference > 1e-9) - (difference < -1e-9)

    return judge
