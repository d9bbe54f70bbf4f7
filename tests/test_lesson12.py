"""Lesson 12's checks: stubs, solutions, other right answers, and typical wrong ones, each with its own hint."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from course_utils.exercises import lesson12


def right_convolution(weight, a, b, scaling):
    return weight + scaling * (b[:, :, 0, 0] @ a.flatten(1)).view_as(weight)


def right_targets(model, head):
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and getattr(layer, "groups", 1) == 1 and name != head
    ]


def right_contrastive(questions, texts, temperature):
    return functional.cross_entropy(questions @ texts.T / temperature, torch.arange(len(questions)))


SOLUTIONS = {
    "12.convolution": right_convolution,
    "12.targets": right_targets,
    "12.contrastive": right_contrastive,
}


def walked(model, head, before=""):
    """The names by a walk over children instead of named_modules."""
    found = set()
    for name, layer in model.named_children():
        if type(layer).__name__ in ("Conv2d", "Linear"):
            if before + name != head and (type(layer) is nn.Linear or layer.groups == 1):
                found.add(before + name)
        else:
            found |= walked(layer, head, f"{before}{name}.")
    return found


def by_layers(weight, a, b, scaling):
    """The change as what the two small convolutions do to each unit picture."""
    side = weight.shape[-1]
    unit = torch.eye(side * side * weight.shape[1]).view(-1, weight.shape[1], side, side)
    change = functional.conv2d(functional.conv2d(unit, a), b)[:, :, 0, 0].T
    return weight + scaling * change.reshape(weight.shape)


RIGHT = {
    "12.convolution": [
        lambda weight, a, b, scaling: weight + scaling * torch.einsum("or,riyx->oiyx", b.flatten(1), a),
        by_layers,
        lambda weight, a, b, scaling: weight + sum(b[:, r, :, :, None] * a[r] for r in range(len(a))) * scaling,
    ],
    "12.targets": [
        walked,
        lambda model, head: tuple(reversed(right_targets(model, head))),
        lambda model, head: {name: None for name in right_targets(model, head)}.keys(),
    ],
    "12.contrastive": [
        lambda q, t, temperature: -(q @ t.T / temperature).log_softmax(1).diagonal().mean(),
        lambda q, t, temperature: (torch.logsumexp(q @ t.T / temperature, 1) - (q * t).sum(1) / temperature).mean().item(),
        lambda q, t, temperature: -sum(
            ((q[i] @ t[i] / temperature).exp() / sum((q[i] @ one / temperature).exp() for one in t)).log() for i in range(len(q))
        ) / len(q),
    ],
}  # fmt: skip
CHECKS = {check.name: check for check in (lesson12.convolution, lesson12.targets, lesson12.contrastive)}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_stub_solution_and_other_right_answers(name):
    check = CHECKS[name]
    assert check.outcome(lambda *given: ...).status == "TODO"
    assert check.outcome(SOLUTIONS[name]).passed
    for right in RIGHT[name]:
        assert check.outcome(right).passed, check.outcome(right)


def without_groups(model, head):
    return [n for n, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear)) and n != head]


def by_prefix(model, head):
    return [name for name in right_targets(model, "") if not name.startswith(head)]


WRONG = [
    ("12.convolution", lambda weight, a, b, scaling: right_convolution(weight, a, b, scaling) - weight, "the change alone"),
    ("12.convolution", lambda weight, a, b, scaling: right_convolution(weight, a, b, 1), "scaling is missing"),
    ("12.convolution", lambda weight, a, b, scaling: right_convolution(weight, a, b, -scaling), "not taken away"),
    ("12.convolution", lambda weight, a, b, scaling: right_convolution(weight, a, b, scaling**2), "counts once"),
    ("12.convolution", lambda weight, a, b, scaling: weight, "without the change"),
    ("12.convolution", lambda weight, a, b, scaling: weight + scaling * (b[:, :, 0, 0] @ a.transpose(2, 3).flatten(1)).view_as(weight), "differs from PEFT"),
    ("12.convolution", lambda weight, a, b, scaling: b.flatten(1) @ a.flatten(1), "shape"),
    ("12.convolution", lambda weight, a, b, scaling: weight.add_(scaling * (b[:, :, 0, 0] @ a.flatten(1)).view_as(weight)), "has changed"),
    ("12.targets", without_groups, "groups="),
    ("12.targets", lambda model, head: right_targets(model, ""), "is the head"),
    ("12.targets", lambda model, head: [n for n in right_targets(model, head) if isinstance(model.get_submodule(n), nn.Linear)], "a Conv2d"),
    ("12.targets", lambda model, head: [n for n in right_targets(model, head) if isinstance(model.get_submodule(n), nn.Conv2d)], "a Linear"),
    ("12.targets", lambda model, head: [n for n in right_targets(model, head) if n.count(".") < 2], "Look into the blocks"),
    ("12.targets", lambda model, head: [n.split(".")[-1] for n in right_targets(model, head)], "no layer"),
    ("12.targets", lambda model, head: [n for n, layer in model.named_modules() if n and n != head], "Only Conv2d and Linear"),
    ("12.targets", lambda model, head: right_targets(model, head) * 2, "occurs twice"),
    ("12.targets", by_prefix, "whose whole name is 'top'"),
    ("12.targets", lambda model, head: [n for n in right_targets(model, "") if head not in n], "whose whole name is 'top'"),
    ("12.targets", lambda model, head: "all-linear", "should be of type"),
    ("12.contrastive", lambda q, t, temperature: -right_contrastive(q, t, temperature), "sign is wrong"),
    ("12.contrastive", lambda q, t, temperature: right_contrastive(q, t, 1), "temperature is missing"),
    ("12.contrastive", lambda q, t, temperature: right_contrastive(q, t, 1 / temperature), "Divide the scores"),
    ("12.contrastive", lambda q, t, temperature: right_contrastive(t, q, temperature), "a row a question"),
    ("12.contrastive", lambda q, t, temperature: (right_contrastive(q, t, temperature) + right_contrastive(t, q, temperature)) / 2, "mean of both directions"),
    ("12.contrastive", lambda q, t, temperature: right_contrastive(q, t, temperature) + right_contrastive(t, q, temperature), "sum of both directions"),
    ("12.contrastive", lambda q, t, temperature: right_contrastive(q, t, temperature) * len(q), "Return the mean"),
    ("12.contrastive", lambda q, t, temperature: -((q * t).sum(1) / temperature).mean(), "only pulls pairs together"),
    ("12.contrastive", lambda q, t, temperature: 0.25, "the loss is"),
    ("12.contrastive", lambda q, t, temperature: q.mul_(0).sum(), "has changed"),
]  # fmt: skip


@pytest.mark.parametrize("name, wrong, hint", WRONG)
def test_a_wrong_answer_gets_its_own_hint(name, wrong, hint):
    outcome = CHECKS[name].outcome(wrong)
    assert outcome.status == "TRY AGAIN" and hint in outcome.hint, outcome
