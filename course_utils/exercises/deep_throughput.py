"""Checks of the deep dive on throughput: tokens a second, and packing."""

import random

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_number,
    expect_whole_number,
    reference,
)

# ---------------------------------------------------------------------------- where the time goes


@reference
def useful_speed(ends, tokens):
    """Tokens a second over all steps but the first.

    ends: seconds at which each step ended; tokens: real tokens of each step, equally long.
    """
    return sum(tokens[1:]) / (ends[-1] - ends[0])


def timed_steps(seed):
    """(ends, tokens, places): seconds at which the steps ended, the first a slow one, and what their batches held."""
    rng = random.Random(seed)
    steps = 4 + seed
    now, ends = rng.uniform(50, 90), []
    tokens = [rng.randrange(900, 1800) for _ in range(steps)]
    places = [count + rng.randrange(200, 900) for count in tokens]
    for step in range(steps):
        now += rng.uniform(2.5, 4) if step == 0 else rng.uniform(0.3, 0.6)
        ends.append(now)
    return ends, tokens, places


@exercise("deep.speed", title="Tokens a second", level="warm-up", minutes=5)
def speed(function):
    """Compare with the closed form, on clocks that don't begin at 0; recognise what else could be divided by what."""
    cases = [timed_steps(seed) for seed in range(5)]
    found = [
        expect_number(call_learner(function, list(ends), list(tokens), list(places)), "the speed")
        for ends, tokens, places in cases
    ]
    right = [useful_speed(ends, tokens) for ends, tokens, _ in cases]

    def gives(wrong):
        return all(abs(one - wrong(*case)) <= 1e-6 * abs(one) for one, case in zip(found, cases))

    if all(abs(one - wanted) <= 1e-6 * wanted for one, wanted in zip(found, right)):
        return
    mistakes = [
        (
            lambda ends, tokens, places: sum(places[1:]) / (ends[-1] - ends[0]),
            "You count the pads. They cost time and teach nothing: count tokens, not places.",
        ),
        (
            lambda ends, tokens, places: sum(tokens) / (ends[-1] - ends[0]),
            "The first step's tokens are counted, and its time is not: ends[0] is when that step ended.",
        ),
        (
            lambda ends, tokens, places: sum(tokens) / ends[-1],
            "The clock does not begin at 0 with the first step. Take the time between the first end and the last.",
        ),
        (
            lambda ends, tokens, places: sum(tokens[1:]) / ends[-1],
            "The clock does not begin at 0 with the first step. Take the time between the first end and the last.",
        ),
        (
            lambda ends, tokens, places: (ends[-1] - ends[0]) / sum(tokens[1:]),
            "Those are seconds for a token. Tokens a second are the other way round.",
        ),
        (
            lambda ends, tokens, places: (len(ends) - 1) / (ends[-1] - ends[0]),
            "Those are steps a second. Batches differ in size, so count their tokens.",
        ),
        (
            lambda ends, tokens, places: (
                sum(count / (end - begin) for count, begin, end in zip(tokens[1:], ends, ends[1:])) / (len(ends) - 1)
            ),
            "You take the mean of each step's speed, in which a short step counts as much as a long one. Divide all tokens by all seconds.",
        ),
        (
            lambda ends, tokens, places: sum(tokens[1:]) / (ends[-1] - ends[1]),
            "One step is missing from the time: step 1 began when step 0 ended.",
        ),
    ]
    for wrong, hint in mistakes:
        if gives(wrong):
            raise TryAgain(hint)
    (ends, tokens, _), one, wanted = cases[0], found[0], right[0]
    raise TryAgain(
        f"Steps that ended at {', '.join(f'{end:.2f}' for end in ends)} with {tokens} tokens make {wanted:.1f} tokens a second "
        f"without the first step, and you return {one:.1f}."
    )


@reference
def first_fit_decreasing(lengths, limit):
    """Rows, longest first, each put into the first pack that has room: lists of row numbers."""
    packs, room = [], []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((place for place, left in enumerate(room) if left >= lengths[number]), None)
        if place is None:
            packs.append([])
            room.append(limit)
            place = len(packs) - 1
        packs[place].append(number)
        room[place] -= lengths[number]
    return packs


PACKS = (([60, 50, 40, 40, 50, 20], 100), ([100, 1, 99, 2, 98], 100), ([7], 8), ([5, 5, 5, 5], 5))


def _lengths(seed):
    rng = random.Random(seed)
    return [rng.randrange(20, 90) for _ in range(40 + 20 * seed)], 128


@exercise("deep.pack", title="Pack rows", level="core", minutes=15)
def pack(function):
    """Any packing that is one will do, if it needs no more packs than first fit decreasing does."""
    for lengths, limit in [*PACKS, *map(_lengths, range(4))]:
        answer = expect_list(call_learner(function, list(lengths), limit), "the answer")
        packs = [
            [expect_whole_number(number, "a row's number") for number in expect_list(one, "a pack", in_order=False)]
            for one in answer
        ]
        numbers = [number for one in packs for number in one]
        where = f"For {lengths if len(lengths) < 9 else f'{len(lengths)} rows'} and a limit of {limit}: "
        if [] in packs:
            raise TryAgain(f"{where}a pack is empty. Begin a new one only for a row that fits nowhere.")
        if strangers := sorted(set(numbers) - set(range(len(lengths)))):
            hint = "Return the rows' numbers, counted from 0, not their lengths." if strangers[0] in lengths else ""
            raise TryAgain(
                f"{where}there are rows 0 to {len(lengths) - 1}, and you return {strangers[0]}. {hint}".strip()
            )
        if len(set(numbers)) < len(numbers):
            twice = next(number for number in numbers if numbers.count(number) > 1)
            raise TryAgain(f"{where}row {twice} is in your packs more than once.")
        if missing := sorted(set(range(len(lengths))) - set(numbers)):
            raise TryAgain(f"{where}row {missing[0]} is in no pack. Is the last pack returned, too?")
        for one in packs:
            if (total := sum(lengths[number] for number in one)) > limit:
                raise TryAgain(f"{where}a pack has {total} tokens.")
        best = len(first_fit_decreasing(lengths, limit))
        if len(packs) > best:
            if packs == [[number] for number in range(len(lengths))]:
                raise TryAgain(f"{where}each row has a pack of its own, which is no packing.")
            raise TryAgain(
                f"{where}you need {len(packs)} packs, and {best} are enough. Take the longest rows first, and put each "
                "into the first pack that still has room, not only into the last one."
            )
