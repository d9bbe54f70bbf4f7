"""A small image classifier, and the one of them that judges what a picture shows and in which style."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from course_utils import paths
from course_utils.pictures import NEW_SUBJECT, STYLES, SUBJECTS

JUDGED = (*SUBJECTS, NEW_SUBJECT)


class SmallCNN(nn.Module):
    """Three convolutions with BatchNorm and two linear layers: (n, 3, 32, 32) to logits of shape (n, classes)."""

    def __init__(self, classes: int):
        super().__init__()
        blocks = [
            layer
            for before, after in ((3, 16), (16, 32), (32, 64))
            for layer in (nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
        ]
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, pictures):
        return self.head(functional.relu(self.hidden(self.features(pictures))))


def new_judge() -> SmallCNN:
    """A judge before its training: its logits are those of the subjects, JUDGED, and then those of the STYLES."""
    return SmallCNN(len(JUDGED) + len(STYLES))


def load_judge(folder=None) -> SmallCNN:
    """The shipped judge. Raises InputError if its file is missing or damaged."""
    from safetensors.torch import load_file

    from adapter_checks.safetensors_header import read_safetensors_header

    file = (paths.pictures_dir() if folder is None else Path(folder)) / "judge.safetensors"
    read_safetensors_header(file)
    judge = new_judge()
    judge.load_state_dict(load_file(file))
    return judge.requires_grad_(False).eval()


@torch.no_grad()
def judged(judge, pictures) -> list[tuple[str, str]]:
    """(subject, style) of each picture, a tensor of shape (n, 3, 32, 32) from -1 to 1, as the judge sees it."""
    subjects, styles = judge(pictures).split([len(JUDGED), len(STYLES)], dim=1)
    return [(JUDGED[a], STYLES[b]) for a, b in zip(subjects.argmax(1).tolist(), styles.argmax(1).tolist())]
