"""Two questions about `dial`, for the pairs that lesson 8 draws.

Is the other skill in the way, or would any change of its size be? `first_beside_random` is the score of the first adapter beside
random matrices in the second one's place, with the same rank and, in each layer, the same size.
Is a skill gone, or only no longer exact? `first` is the score with both adapters active, as in `dial`, and `first_words` the mean word
F1 of the same replies (see `word_f1`). The columns of the second are named likewise.
"""

from collections import Counter

import torch
from peft.tuners.lora import LoraLayer

from course_utils import paths, runtime
from experiments import training
from experiments.combine import load_adapters, scored_rows
from experiments.dial import set_weights

WEIGHTS = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAIRS = ("reading+sailor", "reading+extract", "extract+mood")
RUNS = [{"seed": seed, "pair": pair} for seed in training.SEEDS for pair in PAIRS]


def word_f1(reply, answer):
    """Harmonic mean of precision and recall of the reply's words, from 0 to 1; as in SQuAD, but punctuation and articles stay."""
    said, wanted = (Counter(text.lower().split()) for text in (reply, answer))
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def add_random(model, like, name):
    """Load the adapter `like` once more as `name`, and fill it with a random change of the same rank and size in each layer."""
    model.load_adapter(paths.adapter_path(like), adapter_name=name)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.no_grad():
            size = (B @ A).norm()
            A.normal_()
            B.normal_()
            B.mul_(size / (B @ A).norm())


def measure(seed, pair):
    """A row for each weight."""
    model, tokenizer = load_adapters()
    tasks, rows = pair.split("+"), scored_rows(seed)
    runtime.seed_everything(seed)
    for task in tasks:
        add_random(model, task, f"random {task}")
    measured = []
    for weight in WEIGHTS:
        parts = dict(zip(tasks, (1 - weight, weight)))
        row = {"weight": weight}
        for column, task, other in zip(("first", "second"), tasks, reversed(tasks)):
            set_weights(model, {task: parts[task], f"random {other}": parts[other]})
            row[f"{column}_beside_random"] = training.score(model, tokenizer, task, rows[task])["score"]
            set_weights(model, parts)
            together = training.score(model, tokenizer, task, rows[task])
            row[column] = together["score"]
            answers = [each["completion"][0]["content"] for each in rows[task]]
            row[f"{column}_words"] = sum(map(word_f1, together["predictions"], answers)) / len(answers)
        measured.append(row)
    return measured
