"""Lesson 9's checks: stubs, solutions, other right answers, and typical wrong ones, each with its own hint."""

import math

import pytest
import torch

from course_utils.exercises import lesson09
from course_utils.tasks import UNKNOWN

logsigmoid = torch.nn.functional.logsigmoid


def right_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -logsigmoid(beta * margin).mean()


def right_dashboard(run):
    tests = {
        "wrong reference": abs(run["first_loss"] - math.log(2)) > 0.05,
        "learned nothing": run["accuracy"] < 0.6,
        "ruined": run["broken"] > 0.1,
        "refuses everything": run["refusals"] > 0.8,
        "chosen fell": run["chosen_change"] < -5,
    }
    return next((cause for cause, true in tests.items() if true), "healthy")


def said(role, text):
    return [{"role": role, "content": text}]


def pair(row):
    told = row["answer"] is not None
    chosen, rejected = (row["answer"], UNKNOWN) if told else (UNKNOWN, row["guess"])
    return {
        "prompt": said("user", row["question"]),
        "chosen": said("assistant", chosen),
        "rejected": said("assistant", rejected),
    }


def usable(row):
    return row["answer"] not in (None, UNKNOWN) or (row["answer"] is None and row["guess"] not in (None, UNKNOWN))


def right_pairs(rows):
    rows = [row for row in rows if usable(row)]
    told = [row for row in rows if row["answer"] is not None]
    untold = [row for row in rows if row["answer"] is None]
    fewer = min(len(told), len(untold))
    kept = told[:fewer] + untold[:fewer]
    return [pair(row) for row in rows if row in kept]


def right_advantages(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


SOLUTIONS = {
    "09.loss": right_loss,
    "09.dashboard": right_dashboard,
    "09.pairs": right_pairs,
    "09.advantages": right_advantages,
}


def counted_pairs(rows):
    rows, room, made = [row for row in rows if usable(row)], {}, []
    for row in rows:
        room[row["answer"] is None] = room.get(row["answer"] is None, 0) + 1
    room = {kind: min(room.get(True, 0), room.get(False, 0)) for kind in (True, False)}
    for row in rows:
        if room[row["answer"] is None]:
            room[row["answer"] is None] -= 1
            made.append(pair(row))
    return tuple(made)


RIGHT = {
    "09.loss": [
        lambda pc, pr, rc, rr, beta: torch.log1p(torch.exp(-beta * (pc - rc - pr + rr))).mean().item(),
        lambda pc, pr, rc, rr, beta: torch.nn.functional.softplus(beta * ((pr - rr) - (pc - rc))).mean(),
        lambda pc, pr, rc, rr, beta: sum(
            -math.log(1 / (1 + math.exp(-beta * float(a - c - b + d)))) for a, b, c, d in zip(pc, pr, rc, rr)
        ) / len(pc),
    ],
    "09.dashboard": [
        lambda run: right_dashboard(dict(run)),
        lambda run: (
            "wrong reference" if not 0.643 < run["first_loss"] < 0.744
            else "learned nothing" if run["accuracy"] < 0.6
            else "ruined" if run["broken"] > 0.1
            else "refuses everything" if run["refusals"] > 0.8
            else "chosen fell" if run["chosen_change"] < -5 else "healthy"
        ),
        lambda run: next(
            cause for cause, true in (
                ("wrong reference", abs(run["first_loss"] + math.log(0.5)) > 0.05), ("learned nothing", run["accuracy"] < 0.6),
                ("ruined", run["broken"] > 0.1), ("refuses everything", run["refusals"] > 0.8),
                ("chosen fell", run["chosen_change"] < -5), ("healthy", True),
            ) if true
        ),
    ],
    "09.pairs": [
        counted_pairs,
        lambda rows: list(counted_pairs(rows)),
        lambda rows: [dict(reversed(list(one.items()))) for one in right_pairs(rows)],
    ],
    "09.advantages": [
        lambda rewards: torch.stack([(row - row.mean()) / (row.std() + 1e-4) for row in rewards]),
        lambda rewards: (rewards - rewards.sum(1)[:, None] / rewards.shape[1]) / (rewards.var(1).sqrt()[:, None] + 1e-4),
        lambda rewards: ((rewards.T - rewards.mean(1)) / (rewards.std(1) + 1e-4)).T.contiguous(),
    ],
}  # fmt: skip
CHECKS = {check.name: check for check in (lesson09.loss, lesson09.dashboard, lesson09.pairs, lesson09.advantages)}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_stub_solution_and_other_right_answers(name):
    check = CHECKS[name]
    assert check.outcome(lambda *given: ...).status == "TODO"
    assert check.outcome(SOLUTIONS[name]).passed
    for right in RIGHT[name]:
        assert check.outcome(right).passed, check.outcome(right)


def changed_pairs(change):
    return lambda rows: change(right_pairs(rows))


def without(key):
    return changed_pairs(lambda made: [{k: v for k, v in one.items() if k != key} for one in made])


def mutating(rows):
    made = right_pairs(rows)
    rows.clear()
    return made


WRONG = [
    ("09.loss", lambda pc, pr, rc, rr, beta: logsigmoid(beta * (pc - rc - pr + rr)).mean(), "sign is wrong"),
    ("09.loss", lambda pc, pr, rc, rr, beta: right_loss(pr, pc, rr, rc, beta), "wrong way round"),
    ("09.loss", lambda pc, pr, rc, rr, beta: right_loss(pc, pr, rc, rr, 1), "Beta is missing"),
    ("09.loss", lambda pc, pr, rc, rr, beta: right_loss(pc, pr, 0 * rc, 0 * rr, beta), "reference is missing"),
    ("09.loss", lambda pc, pr, rc, rr, beta: -logsigmoid(beta * (pc - rc - pr + rr).mean()), "loss of the mean margin"),
    ("09.loss", lambda pc, pr, rc, rr, beta: -logsigmoid(beta * (pc - rc - pr + rr)).sum(), "Return the mean"),
    ("09.loss", lambda pc, pr, rc, rr, beta: torch.sigmoid(beta * (pc - rc - pr + rr)).mean(), "a probability"),
    ("09.loss", lambda pc, pr, rc, rr, beta: (beta * (pc - rc - pr + rr)).mean(), "That is the margin"),
    ("09.loss", lambda pc, pr, rc, rr, beta: right_loss(pc, pr, rc, rr, beta) / math.log(2), "in bits"),
    ("09.loss", lambda pc, pr, rc, rr, beta: 0.7, "For 1 pair and beta 0.1 the loss is"),
    ("09.loss", lambda pc, pr, rc, rr, beta: -logsigmoid(beta * (pc - rc - pr + rr)), "should be a number"),
    ("09.dashboard", lambda run: "fine", "none of the causes"),
    ("09.dashboard", lambda run: "healthy", "as wrong as one above"),
    ("09.dashboard", lambda run: "healthy" if run["accuracy"] < 0.6 else right_dashboard(run), "This run is"),
    ("09.dashboard", lambda run: "ruined" if run["broken"] > 0.1 else right_dashboard(run), "comes first in the list"),
    ("09.dashboard", lambda run: right_dashboard({**run, "first_loss": max(run["first_loss"], 0.69)}), "as wrong as"),
    ("09.dashboard", lambda run: right_dashboard({**run, "chosen_change": -abs(run["chosen_change"])}), "only if it is negative"),
    ("09.dashboard", lambda run: right_dashboard({**run, "accuracy": run["accuracy"] - 0.2}), "all limits are kept"),
    ("09.dashboard", lambda run: 1, "should be of type str"),
    ("09.pairs", without("rejected"), "prompt, chosen and rejected"),
    ("09.pairs", changed_pairs(lambda made: [{**one, "prompt": one["prompt"][0]["content"]} for one in made]), "prompt should be"),
    ("09.pairs", changed_pairs(lambda made: [{**one, "chosen": said("user", one["chosen"][0]["content"])} for one in made]), "the role is 'assistant'"),
    ("09.pairs", changed_pairs(lambda made: [{**one, "chosen": one["prompt"] + one["chosen"]} for one in made]), "a list with one message"),
    ("09.pairs", lambda rows: [pair(row) for row in rows if usable(row)], "Keep as many"),
    ("09.pairs", lambda rows: [pair(row) for row in rows if row["answer"] is not None or row["guess"]][:2 * len(rows)], "Keep as many"),
    ("09.pairs", changed_pairs(lambda made: [{**one, "chosen": one["rejected"], "rejected": one["chosen"]} for one in made]), "the answer is the chosen reply"),
    ("09.pairs", changed_pairs(lambda made: made[::-1]), "another order"),
    ("09.pairs", changed_pairs(lambda made: []), "pairs can be made"),
    ("09.pairs", lambda rows: [{**one, "prompt": said("user", "?")} for one in right_pairs(rows)], "no question of the rows"),
    ("09.pairs", lambda rows: [{**pair(row), "rejected": said("assistant", row["guess"])} for row in rows if row["answer"] and row["guess"]] or right_pairs(rows), "does not learn to refuse"),
    ("09.pairs", lambda rows: [pair(row) for row in rows if row in [*filter(usable, rows)][::-1]][:0] + right_pairs(rows[::-1])[::-1], "keep those rows that come first"),
    ("09.pairs", mutating, "have changed"),
    ("09.advantages", lambda rewards: rewards - rewards.mean(1, keepdim=True), "not divided"),
    ("09.advantages", lambda rewards: rewards - rewards.mean(), "mean of all rewards|not divided"),
    ("09.advantages", lambda rewards: (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-4), "n − 1"),
    ("09.advantages", lambda rewards: (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True), "NaN"),
    ("09.advantages", lambda rewards: (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4), "whose rewards differ"),
    ("09.advantages", lambda rewards: -right_advantages(rewards), "sign is wrong"),
    ("09.advantages", lambda rewards: rewards / (rewards.std(1, keepdim=True) + 1e-4), "taken off first"),
    ("09.advantages", lambda rewards: (rewards - rewards.mean(1, keepdim=True)) / (rewards.var(1, keepdim=True) + 1e-4), "variance"),
    ("09.advantages", lambda rewards: rewards.mean(1), "shape"),
    ("09.advantages", lambda rewards: right_advantages(rewards) + 1, "the advantages are"),
    ("09.advantages", lambda rewards: rewards.sub_(rewards.mean(1, keepdim=True)).div_(rewards.std(1, keepdim=True) + 1e-4), "have changed"),
]  # fmt: skip


@pytest.mark.parametrize("name, wrong, hint", WRONG)
def test_a_wrong_answer_gets_its_own_hint(name, wrong, hint):
    outcome = CHECKS[name].outcome(wrong)
    assert outcome.status == "TRY AGAIN" and any(part in outcome.hint for part in hint.split("|")), outcome
