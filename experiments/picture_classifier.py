"""Ink from sixteen pictures a class, for a classifier that knows drawings by day: the head alone, LoRA on its layers, or all weights.

One base, trained as in the lesson, for all runs: a seed draws the pictures, and the adapter's start. BatchNorm stays in evaluation
mode, but for the run that shows what happens otherwise.
"""

import copy
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional

from course_utils import pictures
from course_utils.picture_judge import SmallCNN
from experiments import training

BASE_STEPS, STEPS, DRAWINGS, TESTS, A_CLASS, MOVED = 300, 200, 1200, 300, 16, 3
CONVOLUTIONS, LINEAR = ["features.0", "features.4", "features.8"], ["hidden", "head"]
METHODS = {
    "head": (None, 1e-2),
    "linear": (LINEAR, 1e-2),
    "convolutions": (CONVOLUTIONS, 1e-2),
    "all": (CONVOLUTIONS + LINEAR, 1e-2),
    "all, BatchNorm trains": (CONVOLUTIONS + LINEAR, 1e-2),
    "full": (None, 1e-3),
}
RUNS = [{"seed": seed, "method": method} for seed in training.SEEDS for method in METHODS]


def rows(style, number, seed):
    """(pictures, classes) of `number` drawings in a style."""
    classes = [place % len(pictures.SUBJECTS) for place in range(number)]
    drawn = [pictures.draw(pictures.SUBJECTS[one], style, seed=seed + place) for place, one in enumerate(classes)]
    return pictures.to_tensor(drawn), torch.tensor(classes)


def train(model, drawn, classes, steps, rate):
    """Train the weights that are free, on batches of 24: each picture is mirrored half of the time, and moved by up to MOVED pixels."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        chosen = torch.randint(len(drawn), (24,))
        batch = drawn[chosen]
        mirrored = torch.rand(24) < 0.5
        batch[mirrored] = batch[mirrored].flip(3)
        right, down = torch.randint(2 * MOVED + 1, (2,)).tolist()
        wider = functional.pad(batch, (MOVED,) * 4, mode="replicate")
        batch = wider[:, :, down : down + pictures.SIZE, right : right + pictures.SIZE]
        loss = functional.cross_entropy(model(batch), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, drawn, classes):
    """Share of pictures whose class the model names."""
    return (model.eval()(drawn).argmax(1) == classes).float().mean().item()


def make_base():
    """The classifier that knows drawings by day."""
    torch.manual_seed(0)
    base = SmallCNN(len(pictures.SUBJECTS)).train()
    train(base, *rows("day", DRAWINGS, 0), BASE_STEPS, 3e-3)
    return base.eval()


def measure(seed, method):
    """Fine-tune once; accuracy in ink, after saving and loading, and by day with the adapter off."""
    base = make_base()
    day, ink = rows("day", TESTS, 50_000), rows("ink", TESTS, 60_000)
    few = rows("ink", A_CLASS * len(pictures.SUBJECTS), 70_000 + 100 * seed)
    torch.manual_seed(seed)
    targets, rate = METHODS[method]
    model = copy.deepcopy(base)
    if targets:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    elif method == "head":
        model.requires_grad_(False).head.requires_grad_(True)
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    train(model.train(method == "all, BatchNorm trains"), *few, STEPS, rate)
    result = {"trainable": trainable, "before": accuracy(base, *ink), "ink": accuracy(model, *ink)}
    result |= {"reloaded": result["ink"], "day_off": accuracy(model, *day)}  # as it is where there is no adapter
    if targets:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            result["reloaded"] = accuracy(PeftModel.from_pretrained(copy.deepcopy(base), folder), *ink)
        with model.disable_adapter():
            result["day_off"] = accuracy(model, *day)
    return result
