"""The checks of the deep dive on throughput, each with its typical mistakes."""

import random

import numpy
import pytest
import torch

from course_utils.exercises import deep_throughput

# ---------------------------------------------------------------------------- where the time goes


def right_speed(ends, tokens, places):
    return sum(tokens[1:]) / (ends[-1] - ends[0])


def speed_by_steps(ends, tokens, places):
    seconds = [end - begin for begin, end in zip(ends, ends[1:])]
    return sum(tokens[1:]) / sum(seconds)


def speed_with_numpy(ends, tokens, places):
    return numpy.sum(tokens[1:]) / numpy.ptp(ends)


def speed_with_torch(ends, tokens, places):
    return torch.tensor(tokens[1:], dtype=torch.float64).mean() / torch.tensor(ends, dtype=torch.float64).diff().mean()


def right_pack(lengths, limit):
    packs = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        for pack in packs:
            if sum(lengths[other] for other in pack) + lengths[number] <= limit:
                pack.append(number)
                break
        else:
            packs.append([number])
    return packs


def pack_best_fit(lengths, limit):
    """Into the fullest pack that has room, as TRL does."""
    packs = {}
    for number in numpy.argsort(lengths)[::-1]:
        rooms = [pack for pack, members in packs.items() if sum(lengths[m] for m in members) + lengths[number] <= limit]
        pack = max(rooms, key=lambda pack: sum(lengths[m] for m in packs[pack]), default=len(packs))
        packs.setdefault(pack, []).append(number)
    return list(packs.values())


def pack_recursively(lengths, limit, left=None):
    """Fill one pack with the longest rows that fit, then go on with the rest."""
    left = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True) if left is None else left
    if not left:
        return []
    chosen, room = [], limit
    for number in left:
        if lengths[number] <= room:
            chosen.append(number)
            room -= lengths[number]
    return [set(chosen), *pack_recursively(lengths, limit, [number for number in left if number not in chosen])]


def pack_by_room(lengths, limit):
    room, packs = [], []
    for size, number in sorted(((size, -number) for number, size in enumerate(lengths)), reverse=True):
        fits = [place for place, free in enumerate(room) if free >= size]
        if not fits:
            fits, room, packs = [len(packs)], [*room, limit], [*packs, ()]
        room[fits[0]] -= size
        packs[fits[0]] += (-number,)
    return tuple(packs)


SOLUTIONS = {"deep.speed": right_speed, "deep.pack": right_pack}
RIGHT = {
    "deep.speed": [speed_by_steps, speed_with_numpy, speed_with_torch],
    "deep.pack": [pack_best_fit, pack_recursively, pack_by_room],
}


def next_fit(lengths, limit):
    """Each row into the last pack, or into a new one."""
    packs, room = [], 0
    for number, size in enumerate(lengths):
        if size > room:
            packs.append([])
            room = limit
        packs[-1].append(number)
        room -= size
    return packs


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (deep_throughput.speed, lambda ends, tokens, places: right_speed(ends, places, tokens), "You count the pads"),
        (deep_throughput.speed, lambda ends, tokens, places: sum(tokens) / (ends[-1] - ends[0]), "its time is not"),
        (deep_throughput.speed, lambda ends, tokens, places: sum(tokens) / ends[-1], "does not begin at 0"),
        (deep_throughput.speed, lambda ends, tokens, places: sum(tokens[1:]) / ends[-1], "does not begin at 0"),
        (deep_throughput.speed, lambda *given: 1 / right_speed(*given), "seconds for a token"),
        (deep_throughput.speed, lambda ends, *rest: (len(ends) - 1) / (ends[-1] - ends[0]), "steps a second"),
        (
            deep_throughput.speed,
            lambda ends, tokens, places: numpy.mean(numpy.array(tokens[1:]) / numpy.diff(ends)),
            "the mean of each step's speed",
        ),
        (
            deep_throughput.speed,
            lambda ends, tokens, places: sum(tokens[1:]) / (ends[-1] - ends[1]),
            "One step is missing",
        ),
        (deep_throughput.speed, lambda *given: right_speed(*given) * 2, "tokens a second without the first step"),
        (deep_throughput.speed, lambda *given: print(right_speed(*given)), "Is a return missing"),
        (deep_throughput.pack, next_fit, "packs, and"),
        (deep_throughput.pack, lambda lengths, limit: [[number] for number in range(len(lengths))], "no packing"),
        (deep_throughput.pack, lambda lengths, limit: [list(range(len(lengths)))], "a pack has"),
        (deep_throughput.pack, lambda *given: [*right_pack(*given), []], "a pack is empty"),
        (
            deep_throughput.pack,
            lambda *given: [[given[0][n] for n in pack] for pack in right_pack(*given)],
            "not their lengths",
        ),
        (deep_throughput.pack, lambda *given: [[n + 1 for n in pack] for pack in right_pack(*given)], "and you return"),
        (deep_throughput.pack, lambda *given: [*right_pack(*given), [0]], "more than once"),
        (deep_throughput.pack, lambda *given: right_pack(*given)[:-1], "in no pack"),
        (deep_throughput.pack, lambda *given: len(right_pack(*given)), "should be of type"),
        (deep_throughput.pack, lambda *given: print(right_pack(*given)), "Is a return missing"),
    ],
)
def test_typical_mistakes_of_throughput_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN" and hint in outcome.hint, outcome


@pytest.mark.parametrize("seed", range(20))
def test_packing_by_first_fit_is_a_packing(seed):
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 100) for _ in range(50)]
    packs = deep_throughput.first_fit_decreasing(lengths, 100)
    assert sorted(number for pack in packs for number in pack) == list(range(50))
    assert all(sum(lengths[number] for number in pack) <= 100 for pack in packs)
    assert sum(lengths) / 100 <= len(packs) <= 2 * sum(lengths) / 100 + 1


@pytest.mark.parametrize("cache, mixed", [(False, False), (True, True)])
def test_packed_rows_are_kept_apart_only_without_the_cache(cache, mixed, tiny_model):
    ids = torch.randint(10, 90, (1, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[*range(10), *range(14)]])
    with torch.no_grad():
        together = tiny_model(ids, position_ids=positions, use_cache=cache).logits[0, 10:]
        alone = tiny_model(ids[:, 10:]).logits[0]
    assert ((together - alone).abs().max() > 1e-2) == mixed
