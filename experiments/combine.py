"""Adapters made into one by each of PEFT's combination types: what is left of each skill?

The seed draws the rows that are scored and what DARE keeps, so that every type has a spread. `rank` is that of the
combination; `error` is the distance of its change from the weighted sum of the changes, as a share of that sum, over all
layers; then the score on each task. `weights` is "sum" for 1 each and "mean" for one divided by their number.
"""

import itertools
import random

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from course_utils import data, paths, runtime
from experiments import training

ADAPTERS = ("reading", "sailor", "extract", "mood")
TYPES = (
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
DENSITY = 0.5  # what TIES, DARE and pruning by size keep; the others take no density
WITHOUT_DENSITY = ("cat", "svd", "linear")
SCORED = 48
SETS = [*itertools.combinations(ADAPTERS, 2), ADAPTERS]
RUNS = [
    {"seed": seed, "adapters": "+".join(names), "weights": weights}
    for seed in training.SEEDS
    for names in SETS
    for weights in ("sum", "mean")
]


def load_adapters():
    """(model with the four adapters, its tokenizer)."""
    base, tokenizer = training.load_base()
    model = PeftModel.from_pretrained(base, paths.adapter_path(ADAPTERS[0]), adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(paths.adapter_path(name), adapter_name=name)
    return model.eval(), tokenizer


def scored_rows(seed):
    """{task: SCORED of its test rows, drawn by the seed}."""
    rows = {task: data.load_task(task, "test") for task in ADAPTERS}
    return {
        task: all_rows.select(random.Random(seed).sample(range(len(all_rows)), SCORED))
        for task, all_rows in rows.items()
    }


def error_of(model, name, parts):
    """‖change of `name` − Σ weight · change of part‖ / ‖the sum‖ over all layers; parts: {adapter: weight}."""
    off = size = 0.0
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        exact = sum(weight * layer.get_delta_weight(part) for part, weight in parts.items())
        off += (layer.get_delta_weight(name) - exact).square().sum().item()
        size += exact.square().sum().item()
    return (off / size) ** 0.5


def measure(seed, adapters, weights):
    """A row for each combination type."""
    model, tokenizer = load_adapters()
    rows, names = scored_rows(seed), adapters.split("+")
    parts = dict.fromkeys(names, 1.0 if weights == "sum" else 1 / len(names))
    measured = []
    for kind in TYPES:
        runtime.seed_everything(seed)
        density = {} if kind in WITHOUT_DENSITY else {"density": DENSITY}
        # A new name each time: with one that exists the call returns without doing anything.
        model.add_weighted_adapter(names, list(parts.values()), kind, combination_type=kind, **density)
        model.set_adapter(kind)
        scores = {task: training.score(model, tokenizer, task, rows[task])["score"] for task in ADAPTERS}
        measured.append(
            {"combination": kind, "rank": model.peft_config[kind].r, "error": error_of(model, kind, parts), **scores}
        )
        model.set_adapter(names[0])  # else deleting the active one warns, and activates another
        model.delete_adapter(kind)
    return measured
