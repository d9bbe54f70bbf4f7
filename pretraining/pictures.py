"""The text-to-image model and its judge, `models/pictures`: settings at the top, then data, model, loop, checkpoint. Resumable.

    python -m pretraining.run pictures

The model sees drawings by day and by night. Drawings in ink, and windmills, are left for the adapters of lesson 12.
"""

import copy
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from course_utils import pictures, runtime
from course_utils.files import write_text
from course_utils.picture_judge import JUDGED, judged, new_judge
from course_utils.picture_model import PictureModel, caption, encode, flow_loss, generate_pictures

STYLES = ("day", "night")
JUDGE_SEED, TEST_SEED = 100_000, 900_000  # the judge's drawings, and those that it is tested on, are nobody else's


@dataclass
class Settings:
    """What decides the result; written beside it."""

    seed: int = 0
    drawings: int = 12_000
    steps: int = 6_000
    batch: int = 32
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.5  # share of the steps in which the rate comes down
    average: float = 0.998  # the weights that are kept are a moving average of those that are trained
    judge_drawings: int = 6_300
    judge_steps: int = 900
    judge_tests: int = 1_050
    save_every: int = 250


# --------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------
def drawings(number, seed):
    """(pictures, word ids): `number` drawings by day and by night of all subjects; one caption in eight names no colour."""
    drawn, captions = [], []
    for place in range(number):
        subject, style = pictures.SUBJECTS[place % 6], STYLES[place // 6 % 2]
        rng = random.Random(f"{seed} {place}")
        colour = rng.choice(pictures.colours_of(subject))
        drawn.append(pictures.draw(subject, style, colour, seed + place))
        captions.append(caption(subject, style, colour if rng.random() < 7 / 8 else None))
    return pictures.to_tensor(drawn), encode(captions)


def labelled(number, seed):
    """(pictures, subjects, styles): drawings of every subject in every style, as numbers of JUDGED and STYLES."""
    kinds = [(subject, style) for style in range(len(pictures.STYLES)) for subject in range(len(JUDGED))]
    kinds = [kinds[place % len(kinds)] for place in range(number)]
    drawn = [pictures.draw(JUDGED[a], pictures.STYLES[b], seed=seed + place) for place, (a, b) in enumerate(kinds)]
    return pictures.to_tensor(drawn), *torch.tensor(kinds).T


# --------------------------------------------------------------------------------------------
# The judge
# --------------------------------------------------------------------------------------------
def train_judge(settings):
    """(judge, share of subjects and of styles that it names rightly in drawings that it has not seen)."""
    torch.manual_seed(settings.seed)
    drawn, subjects, styles = labelled(settings.judge_drawings, JUDGE_SEED)
    judge = new_judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    for step in range(settings.judge_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / settings.judge_steps)
        rows = torch.randint(len(drawn), (64,))
        # Noise of several strengths: what a model generates is never as clean as a drawing.
        noisy = drawn[rows] + 0.15 * torch.randn(64, 1, 1, 1).abs() * torch.randn(64, 3, pictures.SIZE, pictures.SIZE)
        of_subjects, of_styles = judge(noisy).split([len(JUDGED), len(pictures.STYLES)], dim=1)
        loss = functional.cross_entropy(of_subjects, subjects[rows]) + functional.cross_entropy(of_styles, styles[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge.eval()
    drawn, subjects, styles = labelled(settings.judge_tests, TEST_SEED)
    seen = judged(judge, drawn)
    right_subjects = np.mean([JUDGED[wanted] == subject for wanted, (subject, _) in zip(subjects, seen)])
    right_styles = np.mean([pictures.STYLES[wanted] == style for wanted, (_, style) in zip(styles, seen)])
    return judge, float(right_subjects), float(right_styles)


# --------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------
def rate(step, settings):
    """Share of the full learning rate at a step."""
    return min(1, (step + 1) / settings.warmup, (settings.steps - step) / (settings.steps * settings.decay))


def samples(model, seed=1):
    """(pictures, captions): what the model draws for each subject by day and by night, in three colours."""
    captions = [
        caption(subject, style, colour)
        for style in STYLES
        for colour in ("red", "yellow", "green")
        for subject in pictures.SUBJECTS
    ]
    return generate_pictures(model, captions, seed), captions


def train(settings, folder, log=print):
    """Train into `folder` (checkpoint.pt is our own, read with weights_only) and return (the averaged model, log rows)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = runtime.device()
    drawn, word_ids = (part.to(device) for part in drawings(settings.drawings, settings.seed))
    torch.manual_seed(settings.seed)
    model = PictureModel().to(device, memory_format=torch.channels_last)
    kept = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    first, rows, seconds = 0, [], 0.0

    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        kept.load_state_dict(saved["kept"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"].cpu())
        first, rows, seconds = saved["step"], json.loads(saved["rows"]), saved["seconds"]
        log(f"resumed at step {first}")

    began, losses = time.time() - seconds, []
    for step in range(first, settings.steps):
        optimizer.param_groups[0]["lr"] = settings.rate * rate(step, settings)
        chosen = torch.randint(len(drawn), (settings.batch,))
        batch = drawn[chosen]
        mirrored = torch.rand(settings.batch) < 0.5
        batch[mirrored] = batch[mirrored].flip(3)
        loss = flow_loss(model, batch, word_ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = min(settings.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(kept.parameters()), list(model.parameters()), 1 - share)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}: lower the learning rate")
        done = step + 1
        if done % 50 == 0 or done == settings.steps:
            rows.append({"step": done, "loss": round(float(np.mean(losses)), 4), "seconds": round(time.time() - began)})
            losses = []
            log(json.dumps(rows[-1]))
        if done % settings.save_every == 0 or done == settings.steps:
            state = {
                "model": model.state_dict(),
                "kept": kept.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "step": done,
                "rows": json.dumps(rows),
                "seconds": time.time() - began,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return kept.cpu().eval(), rows


def make_pictures(settings, folder, work):
    """Train the judge and the model, and write both into `folder`; logs and checkpoints go to `work`."""
    from safetensors.torch import save_file

    work = Path(work)
    judge, right_subjects, right_styles = train_judge(settings)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), Path(folder) / "judge.safetensors")
    model, rows = train(settings, work)
    model.save(folder)
    log = {
        "settings": asdict(settings),
        "machine": runtime.processor(),
        "device": runtime.device().type,
        "threads": torch.get_num_threads(),
        "judge": {"subjects": right_subjects, "styles": right_styles},
        "rows": rows,
    }
    write_text(work / "log.json", json.dumps(log))
