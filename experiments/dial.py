"""From one skill to another: (1 − w) of the first adapter's change and w of the second's, from w = 0 to 1.

The weighted sum is exact: two adapters that are active together add up, each with its scaling times its weight, which is
what `combination_type="cat"` makes into one. `first` and `second` are the scores on the two tasks; `first_alone` and
`second_alone` those of each adapter alone with the same weight, so that weakness and interference can be told apart.
"""

import itertools

from peft.tuners.lora import LoraLayer

from experiments import training
from experiments.combine import ADAPTERS, load_adapters, scored_rows

WEIGHTS = tuple(step / 10 for step in range(11))
RUNS = [
    {"seed": seed, "pair": "+".join(pair)} for seed in training.SEEDS for pair in itertools.combinations(ADAPTERS, 2)
]


def set_weights(model, weights):
    """Make just these adapters active; weights: {adapter: factor on its own scaling}."""
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for adapter, weight in weights.items():
            layer.set_scale(adapter, weight)
    model.base_model.set_adapter(list(weights))


def measure(seed, pair):
    """A row for each weight."""
    model, tokenizer = load_adapters()
    tasks, rows = pair.split("+"), scored_rows(seed)
    measured = []
    for weight in WEIGHTS:
        parts = dict(zip(tasks, (1 - weight, weight)))
        set_weights(model, parts)
        row = {"weight": weight}
        for column, task in zip(("first", "second"), tasks):
            row[column] = training.score(model, tokenizer, task, rows[task])["score"]
        for column, task in zip(("first_alone", "second_alone"), tasks):
            set_weights(model, {task: parts[task]})
            row[column] = training.score(model, tokenizer, task, rows[task])["score"]
        measured.append(row)
    return measured
