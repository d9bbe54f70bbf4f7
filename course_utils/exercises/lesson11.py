"""Checks of lesson 11: plan a batch for several devices, serve many adapters from one batch, tell which strategy a run used."""

import random

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_tensor,
    expect_type,
    expect_whole_number,
    reference,
)


@reference
def _planned(effective, devices, fits, rows, epochs):
    if effective % devices:
        return None
    share = effective // devices
    at_once = max(size for size in range(1, min(fits, share) + 1) if share % size == 0)
    return at_once, share // at_once, epochs * -(-rows // effective)


@exercise("11.plan", title="Move a batch to more devices", level="core", minutes=10)
def plan(function):
    """Compare with the closed form, over cases in which each typical mistake gives a number of its own."""
    cases = [(64, 4, 6, 1000, 3), (64, 1, 16, 1000, 2), (32, 2, 16, 320, 1), (48, 3, 100, 500, 2), (30, 4, 8, 100, 1),
             (56, 8, 4, 57, 5), (90, 2, 30, 1001, 1), (8, 8, 3, 100, 1)]  # fmt: skip
    for case in cases:
        effective, devices, fits, rows, epochs = case
        shown = f"an effective batch of {effective} on {devices} devices, each with room for {fits} rows"
        wanted = _planned(*case)
        value = call_learner(function, *case)
        if wanted is None:
            if value is not None:
                raise TryAgain(f"{effective} rows can't be shared equally by {devices} devices: return None there.")
            continue
        if value is None:
            raise TryAgain(f"For {shown} a plan exists, and your function returns None.")
        found = expect_list(value, "the plan")
        if len(found) != 3:
            raise TryAgain(f"Return three numbers: rows at once, accumulation, steps. Yours are {len(found)}.")
        at_once, accumulation, steps = (expect_whole_number(number, "each number of the plan") for number in found)
        if at_once > fits:
            raise TryAgain(f"For {shown}: {at_once} rows at once don't fit.")
        if at_once * accumulation * devices != effective:
            product = at_once * accumulation
            if product == effective:
                raise TryAgain(
                    f"For {shown}: {product} rows on each device are {product * devices} in all. Divide by the devices first."
                )
            raise TryAgain(
                f"For {shown}: {at_once} × {accumulation} × {devices} devices are {product * devices} rows, not {effective}."
            )
        if at_once != wanted[0]:
            raise TryAgain(
                f"For {shown}: {at_once} rows at once are right, but {wanted[0]} fit as well, and take fewer passes."
            )
        hints = {
            epochs * (rows // effective): "The last, smaller batch of an epoch is a step, too.",
            -(-rows * epochs // effective): "Each epoch ends with a step of its own: round up for each epoch, then multiply.",
            epochs * -(-rows // (at_once * devices)): "Those are forward passes. A step comes after `accumulation` of them.",
            -(-rows // effective): "That is one epoch.",
            epochs * -(-rows // at_once): "Those are the passes of one device alone.",
        }  # fmt: skip
        if steps != wanted[2]:
            raise TryAgain(
                f"For {shown}, {rows} rows and {epochs} epochs, {steps} steps are not right. {hints.get(steps, '')}".strip()
            )


@reference
def gathered(x, A, B, scaling, rows):
    """The change that each row's own adapter makes, of shape (rows, tokens, outputs); see the exercise."""
    used = (rows >= 0).to(x.dtype) * scaling[rows]
    return (x @ A[rows].transpose(1, 2)) @ B[rows].transpose(1, 2) * used[:, None, None]


def gather_example(seed, adapters, rank, inputs, outputs, rows, tokens):
    """(x, A, B, scaling, rows) with random numbers; rows is a list of adapter numbers, -1 for none."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, A, B = draw(len(rows), tokens, inputs), draw(adapters, rank, inputs), draw(adapters, outputs, rank)
    return x, A, B, torch.rand(adapters, generator=generator, dtype=torch.float64) + 0.5, torch.tensor(rows)


@exercise("11.gather", title="One batch, many adapters", level="core", minutes=20)
def gather(function):
    """Compare with a loop over the rows: adapters used twice or not at all, as many rows as adapters, rows without one."""
    import torch

    cases = [(3, 2, 5, 7, [2, 0, 2, 1], 4), (4, 4, 6, 6, [3, 1, 0, 2], 1), (2, 3, 8, 4, [1, -1, 0, -1, 1], 3), (5, 1, 3, 3, [4], 2),
             (1, 2, 4, 5, [-1, -1], 1)]  # fmt: skip
    for seed, (adapters, rank, inputs, outputs, rows, tokens) in enumerate(cases):
        given = gather_example(seed, adapters, rank, inputs, outputs, rows, tokens)
        kept = [tensor.clone() for tensor in given]
        x, A, B, scaling, _ = kept
        name = f"the change of {len(rows)} rows with the adapters {rows}"
        found = expect_tensor(call_learner(function, *given), (len(rows), tokens, outputs), name).double()
        if any(not torch.equal(now, before) for now, before in zip(given, kept)):
            raise TryAgain("What your function was given has changed. Make new tensors.")
        each = [
            (x[place] @ A[row].T @ B[row].T, scaling[row]) if row >= 0 else (x.new_zeros(tokens, outputs), 0.0)
            for place, row in enumerate(rows)
        ]
        wanted = torch.stack([change * factor for change, factor in each])
        if torch.allclose(found, wanted, atol=1e-5):
            continue
        last = torch.stack([x[place] @ A[row].T @ B[row].T * scaling[row] for place, row in enumerate(rows)])
        mistakes = [
            (last, "A row with -1 takes no adapter, and in Python -1 is the last one. Set its change to 0."),
            (torch.stack([change for change, _ in each]), "The scaling is missing: each adapter has its own."),
            (
                torch.stack([change for change, _ in each]) * scaling[0],
                "Each row needs the scaling of its own adapter: scaling[rows].",
            ),
        ]
        if len(rows) == adapters:
            in_order = torch.stack([x[place] @ A[place].T @ B[place].T * scaling[place] for place in range(len(rows))])
            mistakes.append(
                (in_order, "That gives the first row the first adapter and so on. Row i takes adapter rows[i].")
            )
            own = torch.stack([change for change, _ in each]) * scaling[:, None, None]
            mistakes.append((own, "The scaling is that of adapter i for row i. Take scaling[rows]."))
        for value, hint in mistakes:
            if torch.allclose(found, value, atol=1e-5):
                raise TryAgain(hint)
        raise TryAgain(f"This is not {name}. Row i is x[i] @ A[rows[i]].T @ B[rows[i]].T, times scaling[rows[i]].")


STRATEGIES = ("not synchronised", "DDP", "ZeRO-1", "FSDP")


def _runs():
    """(run, strategy): of LoRA and of all weights, on 2 to 64 processes, with the small traffic of logs, asked for by any name."""
    rng = random.Random(0)
    for strategy in STRATEGIES:
        for number, processes in enumerate((2, 2, 8, 3, 64)):
            weights = rng.randrange(10**7, 10**11)
            trained = weights if number % 2 else weights // rng.randrange(30, 400)
            split = rng.uniform(1, 1.02) / processes
            log = rng.randrange(100, 5000)
            run = {
                "asked": rng.choice(["ddp", "fsdp", "zero1", "auto"]), "processes": processes, "weights": weights, "trained": trained,
                "held_weights": weights, "held_optimizer": 2 * trained, "all_reduce": log, "all_gather": 2 * log, "reduce_scatter": 0,
            }  # fmt: skip
            if strategy == "DDP":
                run["all_reduce"] += trained
            elif strategy == "ZeRO-1":
                run |= {"held_optimizer": int(2 * trained * split), "all_gather": trained + log}
                run |= {"reduce_scatter": trained} if number % 2 else {"all_reduce": trained + log}
            elif strategy == "FSDP" and number == 0:  # transformers' own way: the base is split, and the adapter is not
                run |= {
                    "held_weights": int(weights * split) + trained,
                    "all_gather": 2 * weights,
                    "all_reduce": trained + log,
                }
            elif strategy == "FSDP":
                run |= {"held_weights": int(weights * split), "held_optimizer": int(2 * trained * split)}
                run |= {"all_gather": int(1.9 * weights), "reduce_scatter": trained}
            yield run, strategy


@exercise("11.strategy", title="Which strategy is this really?", level="core", minutes=10)
def strategy(function):
    """Each strategy on several numbers of processes, of LoRA and of all weights; what was asked for says nothing."""
    for run, wanted in _runs():
        found = expect_type(call_learner(function, dict(run)), str, "the strategy")
        if found not in STRATEGIES:
            raise TryAgain(f"{found[:40]!r} is none of them. Return one of: {', '.join(STRATEGIES)}.")
        if found == wanted:
            continue
        shown = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in run.items()
        )
        if {"ddp": "DDP", "fsdp": "FSDP", "zero1": "ZeRO-1"}.get(run["asked"]) == found:
            why = f"What was asked for is not what happened; this is {wanted}."
        elif wanted == "FSDP":
            why = "Each process holds a part of the weights only, so this is FSDP."
        elif wanted == "ZeRO-1":
            why = "The weights are whole, and of the optimizer's state each process holds a part: this is ZeRO-1."
        elif wanted == "DDP":
            why = "All is whole on each process, and the gradients were averaged: this is DDP."
        else:
            why = "Nothing as large as the gradients went through a collective: the processes were not synchronised."
        raise TryAgain(f"{why} You return {found!r} for: {shown}.")
