"""Checks of lesson 12: the weight that a convolution's LoRA makes, which layers to adapt, the loss of a batch of pairs."""

import random

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    expect_type,
)


def _close(found, wanted):
    import torch

    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)


@exercise("12.convolution", title="Merge LoRA into a convolution", level="core", minutes=15)
def convolution(function):
    """Compare with PEFT's own layer, for kernels of several sizes and ranks."""
    import torch
    from peft import LoraConfig, get_peft_model

    for seed, (inputs, outputs, kernel, rank, alpha) in enumerate(
        ((2, 3, 3, 2, 4), (4, 5, 1, 3, 3), (3, 6, 5, 1, 2), (5, 2, 3, 4, 1))
    ):
        torch.manual_seed(seed)
        base = torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, kernel))
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
        layer = get_peft_model(base, config).base_model.model[0]
        weight = layer.base_layer.weight.detach()
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        scaling, given = alpha / rank, (weight.clone(), a.clone(), b.clone())
        found = expect_tensor(call_learner(function, *given, scaling), weight.shape, "the merged weight").float()
        if not all(torch.equal(before, after) for before, after in zip((weight, a, b), given)):
            raise TryAgain("A tensor that you were given has changed. Make a new one.")
        change = layer.get_delta_weight("default").detach()
        if _close(found, weight + change):
            continue
        for value, hint in (
            (change, "That is the change alone. Add it to the base layer's weight."),
            (weight + change / scaling, "The scaling is missing."),
            (weight - change, "The change is added, not taken away."),
            (weight + change * scaling, "The scaling counts once."),
            (weight, "That is the base layer's weight, without the change."),
        ):
            if _close(found, value):
                raise TryAgain(hint)
        raise TryAgain(
            f"For a kernel of {kernel} × {kernel} and rank {rank} the result differs from PEFT's. Sum over the rank: "
            "change[o, i, y, x] = Σ over r of B[o, r] · A[r, i, y, x]."
        )


def _networks():
    """(network, name of its head, names to adapt): layers of several kinds, in several orders and depths."""
    from torch import nn

    rng = random.Random(0)
    for number in range(6):
        layers, wanted = [], []
        for place in range(rng.randint(3, 6)):
            kind = (
                rng.choice(("conv", "linear", "depthwise", "norm", "block")) if place > 1 else ("conv", "linear")[place]
            )
            if kind == "block":
                layers.append(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4)))
                wanted += [f"body.{place}.0", f"body.{place}.2"]
                continue
            layers.append(
                {
                    "conv": nn.Conv2d(4, 4, 1),
                    "linear": nn.Linear(4, 4),
                    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
                    "norm": nn.BatchNorm2d(4),
                }[kind]
            )
            wanted += [f"body.{place}"] * (kind in ("conv", "linear"))
        head = ("head", "classifier", "top")[number % 3]
        network = nn.Module()
        network.body = nn.Sequential(*layers)
        if number % 2:
            network.body.append(nn.Conv2d(4, 4, 3, groups=4))
        setattr(network, head, nn.Linear(4, 2))
        if number == 5:  # a layer whose name only begins like the head's
            network.topping = nn.Linear(4, 4)
            wanted.append("topping")
        yield network, head, wanted


@exercise("12.targets", title="Choose the layers of a network", level="core", minutes=10)
def targets(function):
    """Networks of random layers: convolutions, some of them depthwise, linear layers, norms, blocks, and a head of another name each time."""
    for network, head, wanted in _networks():
        found = [
            expect_type(name, str, "each name")
            for name in expect_list(call_learner(function, network, head), "the names", in_order=False)
        ]
        modules = dict(network.named_modules())
        for name in found:
            if name not in modules:
                raise TryAgain(f"The network has no layer {name!r}. Take the names that named_modules() gives, whole.")
            kind, layer = type(modules[name]).__name__, modules[name]
            if name == head:
                raise TryAgain(f"{head!r} is the head. It is new for each task, so it is trained whole: leave it out.")
            if kind not in ("Conv2d", "Linear"):
                raise TryAgain(f"{name!r} is a {kind}. Only Conv2d and Linear layers are wanted.")
            if kind == "Conv2d" and layer.groups > 1:
                raise TryAgain(f"{name!r} is a convolution with groups={layer.groups}. Leave such layers out.")
        if len(set(found)) < len(found):
            raise TryAgain("A name occurs twice.")
        if missing := [name for name in wanted if name not in found]:
            kind = type(modules[missing[0]]).__name__
            raise TryAgain(
                f"{missing[0]!r} is missing, a {kind}."
                + (" Look into the blocks, too." if missing[0].count(".") > 1 else "")
                + (f" Only the layer whose whole name is {head!r} is the head." if head in missing[0] else "")
            )


@exercise("12.contrastive", title="The loss of a batch of pairs", level="core", minutes=10)
def contrastive(function):
    """Compare with the closed form, over batches in which each typical mistake gives a number of its own."""
    import torch
    from torch.nn import functional

    for seed, (count, width, temperature) in enumerate(((2, 3, 1.0), (4, 6, 0.5), (7, 5, 0.05), (5, 8, 0.2))):
        generator = torch.Generator().manual_seed(seed)
        questions, texts = (
            functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)
            for _ in range(2)
        )
        texts = functional.normalize(texts + 0.7 * questions, dim=1)
        given = questions.clone(), texts.clone()
        found = expect_number(call_learner(function, *given, temperature), "the loss")
        if not (torch.equal(given[0], questions) and torch.equal(given[1], texts)):
            raise TryAgain("A tensor that you were given has changed. Make a new one.")
        scores, wanted = questions @ texts.T, torch.arange(count)

        def loss(scores, reduction="mean", wanted=wanted):
            return functional.cross_entropy(scores, wanted, reduction=reduction).item()

        right = loss(scores / temperature)
        if abs(found - right) < 1e-5 * max(1, abs(right)):
            continue
        for value, hint in (
            (-right, "The sign is wrong: the loss is minus the mean log-probability of the right texts."),
            (loss(scores), "The temperature is missing: divide the scores by it."),
            (loss(scores * temperature), "Divide the scores by the temperature, so that differences between them count more."),
            (loss(scores.T / temperature), "That asks for the right question to each text. Here each question asks for its text: a row a question."),
            ((loss(scores / temperature) + loss(scores.T / temperature)) / 2, "That is the mean of both directions. Here only the questions ask."),
            (loss(scores / temperature) + loss(scores.T / temperature), "That is the sum of both directions. Here only the questions ask."),
            (loss(scores / temperature, "sum"), "That is the sum over the questions. Return the mean."),
            ((-(scores / temperature).diagonal()).mean().item(), "That only pulls pairs together. The other texts of the batch count, too."),
        ):  # fmt: skip
            if abs(found - value) < 1e-5 * max(1, abs(value)):
                raise TryAgain(hint)
        raise TryAgain(
            f"For {count} pairs and temperature {temperature:g} the loss is {right:.4f}; yours is {found:.4g}."
        )
