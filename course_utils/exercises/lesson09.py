"""Checks of lesson 9: the loss of DPO, what a dashboard says, pairs that don't teach refusal, advantages of a group."""

import copy
import math
import random

from course_utils.exercises import (
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_list,
    expect_number,
    expect_plain_tensor,
    expect_tensor,
    expect_type,
)
from course_utils.tasks import UNKNOWN


@exercise("09.loss", title="The loss of DPO", level="core", minutes=10)
def loss(function):
    """Compare with the closed form, over batches in which each typical mistake gives a number of its own."""
    import torch

    for seed, (pairs, beta) in enumerate(((1, 0.1), (3, 0.5), (5, 1.3), (4, 0.05))):
        generator = torch.Generator().manual_seed(seed)
        given = [-8 * torch.rand(pairs, generator=generator, dtype=torch.float64) - 0.5 for _ in range(4)]
        chosen, rejected, chosen_before, rejected_before = (part.clone() for part in given)
        found = expect_number(call_learner(function, *given, beta), "the loss")
        margin = (chosen - chosen_before) - (rejected - rejected_before)

        def mean_loss(margins):
            return -torch.nn.functional.logsigmoid(margins).mean().item()

        wanted = mean_loss(beta * margin)
        if abs(found - wanted) < 1e-5 * max(1, abs(wanted)):
            continue
        mistakes = [
            (-wanted, "The sign is wrong: the loss is minus the logarithm of σ."),
            (mean_loss(-beta * margin), "Chosen and rejected are the wrong way round: the chosen reply's gain counts positive."),
            (mean_loss(margin), "Beta is missing: the margin is beta times the difference of the two gains."),
            (mean_loss(beta * (chosen - rejected)), "The reference is missing: take from each log-probability that of the reference."),
            (mean_loss(beta * margin.mean()), "That is the loss of the mean margin. Take the loss of each pair, then the mean."),
            (wanted * pairs, "That is the sum over the pairs. Return the mean."),
            (torch.sigmoid(beta * margin).mean().item(), "That is σ of the margin, a probability. The loss is minus its logarithm."),
            ((beta * margin).mean().item(), "That is the margin. The loss is −log σ(margin)."),
            (wanted / math.log(2), "That is in bits. Take the natural logarithm."),
        ]  # fmt: skip
        for value, hint in mistakes:
            if abs(found - value) < 1e-5 * max(1, abs(value)):
                raise TryAgain(hint)
        raise TryAgain(
            f"For {pairs} pair{'s' * (pairs > 1)} and beta {beta:g} the loss is {wanted:.4f}; yours is {found:.4g}."
        )


CAUSES = ("wrong reference", "learned nothing", "ruined", "refuses everything", "chosen fell", "healthy")
_HEALTHY = {"first_loss": 0.693, "accuracy": 0.97, "chosen_change": -0.4, "refusals": 0.52, "broken": 0.01}


def _dashboards():
    """(run, cause): each cause alone at values that vary, then with each later one as well, then values just within the limits."""
    rng = random.Random(0)
    faults = {
        "wrong reference": {"first_loss": lambda: rng.choice([rng.uniform(0.2, 0.6), rng.uniform(0.8, 4)])},
        "learned nothing": {"accuracy": lambda: rng.uniform(0.02, 0.58)},
        "ruined": {"broken": lambda: rng.uniform(0.12, 0.9)},
        "refuses everything": {"refusals": lambda: rng.uniform(0.83, 1)},
        "chosen fell": {"chosen_change": lambda: rng.uniform(-40, -5.5)},
    }
    for first_loss in (0.4, 2.0):
        yield {**_HEALTHY, "first_loss": first_loss}, "wrong reference"
    for number, cause in enumerate(CAUSES[:-1]):
        for later in (None, *CAUSES[number + 1 : -1]):
            run = dict(_HEALTHY)
            for fault in filter(None, (cause, later)):
                run |= {column: draw() for column, draw in faults[fault].items()}
            yield run, cause
    yield dict(_HEALTHY), "healthy"
    near = {"first_loss": 0.73, "accuracy": 0.62, "broken": 0.09, "refusals": 0.78, "chosen_change": -4.6}
    for column, value in near.items():
        yield {**_HEALTHY, column: value}, "healthy"
    yield {**_HEALTHY, "chosen_change": 6.0, "refusals": 0.05}, "healthy"


@exercise("09.dashboard", title="Read the dashboard", level="core", minutes=10)
def dashboard(function):
    """Each fault alone, each with a later one beside it, and healthy runs at the edge of each limit."""
    for run, cause in _dashboards():
        found = expect_type(call_learner(function, dict(run)), str, "the cause")
        shown = ", ".join(f"{column} {value:.3g}" for column, value in run.items())
        if found == cause:
            continue
        if found not in CAUSES:
            raise TryAgain(f"{found[:40]!r} is none of the causes. Return one of: {', '.join(CAUSES)}.")
        if cause == "healthy":
            hint = "chosen_change counts only if it is negative" if run["chosen_change"] > 0 else "all limits are kept"
            raise TryAgain(f"This run is healthy, and you return {found!r}: {shown}. There {hint}.")
        if found == "healthy" and cause == "wrong reference" and run["first_loss"] < 0.69:
            raise TryAgain(f"A first loss below ln 2 is as wrong as one above it: {shown}.")
        if CAUSES.index(found) > CAUSES.index(cause) and found != "healthy":
            raise TryAgain(f"Two things are true of this run, and {cause!r} comes first in the list: {shown}.")
        raise TryAgain(f"This run is {cause!r}, and you return {found!r}: {shown}.")


def _question_rows(rng, told, untold):
    """Rows of a made-up questionnaire: some without a guess, some whose guess or answer is the refusal itself."""
    rows = []
    for number, is_told in enumerate([True] * told + [False] * untold):
        guess = rng.choice([None, UNKNOWN, f"place {number}", f"place {number}", f"place {number}"])
        answer = rng.choice([UNKNOWN, *[f"answer {number}"] * 4]) if is_told else None
        rows.append({"question": f"Passage {number}. Where is it?", "answer": answer, "guess": guess})
    rng.shuffle(rows)
    return rows


def _message(value, role, name):
    """The text of a conversation of one message; TryAgain if it is not that."""
    form = f'{name} should be [{{"role": "{role}", "content": ...}}]'
    if isinstance(value, (str, dict)):
        raise TryAgain(f"{form}, but is {describe(value)}.")
    messages = expect_list(value, name)
    if len(messages) != 1 or not isinstance(messages[0], dict) or set(messages[0]) != {"role", "content"}:
        raise TryAgain(f"{form}: a list with one message.")
    if messages[0]["role"] != role:
        raise TryAgain(f"{form}: the role is {role!r}.")
    return expect_type(messages[0]["content"], str, f"the content of {name}")


def _right_pairs(rows):
    """(question, chosen, rejected) of each pair that is wanted, in the order of the rows."""
    kinds = {True: [], False: []}
    for place, row in enumerate(rows):
        told = row["answer"] is not None
        chosen, rejected = (row["answer"], UNKNOWN) if told else (UNKNOWN, row["guess"])
        if rejected is not None and chosen != rejected:
            kinds[told].append((place, row["question"], chosen, rejected))
    fewer = min(map(len, kinds.values()))
    return [one[1:] for one in sorted(kinds[True][:fewer] + kinds[False][:fewer])]


@exercise("09.pairs", title="Build pairs that don't teach refusal", level="core", minutes=15)
def pairs(function):
    """Compare with the pairs that are wanted, for more told rows than others and the other way round, and for none of a kind."""
    for seed, (told, untold) in enumerate(((2, 1), (12, 5), (4, 15), (8, 8), (6, 0), (0, 0))):
        rows = _question_rows(random.Random(seed), told, untold)
        if seed == 0:
            rows = [
                {"question": f"Passage {n}. Where is it?", "answer": answer, "guess": f"place {n}"}
                for n, answer in enumerate(("here", None, "there"))
            ]
        wanted = _right_pairs(rows)
        given = copy.deepcopy(rows)
        made = []
        for pair in expect_list(call_learner(function, given), "the pairs"):
            if not isinstance(pair, dict) or set(pair) != {"prompt", "chosen", "rejected"}:
                raise TryAgain("Each pair should be a dict with the keys prompt, chosen and rejected.")
            made.append(
                (
                    _message(pair["prompt"], "user", "prompt"),
                    _message(pair["chosen"], "assistant", "chosen"),
                    _message(pair["rejected"], "assistant", "rejected"),
                )
            )
        if given != rows:
            raise TryAgain("The rows that you were given have changed. Make new dicts.")
        if made != wanted:
            _explain_pairs(made, wanted, rows)


def _explain_pairs(made, wanted, rows):
    answers = {row["question"]: row["answer"] for row in rows}
    for question, chosen, rejected in made:
        if question not in answers:
            raise TryAgain(f"The prompt {question[:40]!r} is no question of the rows. Take it as it is.")
        told = answers[question] is not None
        if chosen == rejected:
            raise TryAgain(f"Chosen and rejected are both {chosen!r}. Such a pair teaches nothing: leave the row out.")
        if told and (chosen, rejected) == (UNKNOWN, answers[question]):
            raise TryAgain("Where something is told, the answer is the chosen reply, and the refusal the rejected one.")
        if told and rejected != UNKNOWN:
            raise TryAgain(
                f"Where something is told, the answer stands against {UNKNOWN!r}, so that the model does not learn to refuse; "
                f"yours is against {rejected!r}."
            )
        if not told and chosen != UNKNOWN:
            raise TryAgain(f"Where nothing is told, {UNKNOWN!r} is the chosen reply; yours is {chosen!r}.")
    kinds = [answers[question] is not None for question, _, _ in made]
    if kinds.count(True) != kinds.count(False):
        raise TryAgain(
            f"{kinds.count(True)} pairs have the answer on the chosen side, and {kinds.count(False)} the refusal. Keep as many of "
            "the one kind as of the other."
        )
    if len(made) != len(wanted):
        raise TryAgain(f"From these rows {len(wanted)} pairs can be made; you return {len(made)}.")
    if sorted(made) == sorted(wanted):
        raise TryAgain("These are the right pairs in another order. Keep the order of the rows.")
    raise TryAgain("Of the more frequent kind, keep those rows that come first.")


@exercise("09.advantages", title="The advantages of a group", level="warm-up", minutes=10)
def advantages(function):
    """Compare with the closed form, on groups of several sizes, some of which have no spread."""
    import torch

    for seed, shape in enumerate(((1, 4), (3, 6), (4, 3), (2, 2))):
        generator = torch.Generator().manual_seed(seed)
        rewards = (
            (torch.rand(shape, generator=generator) > 0.5).double()
            if seed < 2
            else torch.rand(shape, generator=generator, dtype=torch.float64) * 3
        )
        rewards[-1] = 1.0 if shape[0] > 1 else rewards[-1]
        given = rewards.clone()
        returned = expect_plain_tensor(call_learner(function, given), "the advantages")
        if bool(returned.isnan().any()):
            if not bool((rewards.amax(1) == rewards.amin(1)).any()):
                raise TryAgain(
                    "There is NaN in a group whose rewards differ. Mean and standard deviation are those of each group: dim=1, keepdim=True."
                )
            raise TryAgain("There is NaN in a group whose rewards are all alike. Add 1e-4 to the standard deviation.")
        found = expect_tensor(returned, shape, "the advantages").double()
        if not torch.equal(given, rewards):
            raise TryAgain("The rewards that you were given have changed. Make a new tensor.")
        centred = rewards - rewards.mean(1, keepdim=True)
        wanted = centred / (rewards.std(1, keepdim=True) + 1e-4)
        if torch.allclose(found, wanted, atol=1e-5):
            continue
        mistakes = (
            (centred / rewards.std(1, keepdim=True), "Add 1e-4 to the standard deviation, or a group without spread gives NaN."),
            (centred, "The rewards are centred, but not divided by the group's standard deviation."),
            (rewards - rewards.mean(), "That is the mean of all rewards. Each group has its own: dim=1, keepdim=True."),
            ((rewards - rewards.mean()) / (rewards.std() + 1e-4), "Mean and standard deviation are those of each group: dim=1, keepdim=True."),
            (centred / (rewards.std(1, keepdim=True, correction=0) + 1e-4), "The standard deviation is with n − 1, as torch's std has it by default."),
            (centred / (rewards.std() + 1e-4), "The standard deviation is that of each group, too: dim=1, keepdim=True."),
            (rewards / (rewards.std(1, keepdim=True) + 1e-4), "The group's mean is to be taken off first."),
            (-wanted, "The sign is wrong: a reward above the mean gives a positive advantage."),
            (centred / (rewards.var(1, keepdim=True) + 1e-4), "That is divided by the variance. Take its root, the standard deviation."),
        )  # fmt: skip
        for value, hint in mistakes:
            if torch.allclose(found, value, atol=1e-5):
                raise TryAgain(hint)
        raise TryAgain(
            f"For rewards {rewards[0].tolist()} the advantages are {[round(v, 3) for v in wanted[0].tolist()]}."
        )
