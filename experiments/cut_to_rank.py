"""How low is the rank of a change that nobody forced to be low?

All weights are trained; then each linear layer's change is cut to its r strongest directions (singular value
decomposition) and the score on test rows measured. Embeddings and norms go back to the base's, where LoRA leaves them, so
even with nothing cut the score is not that of the trained model. Beside it LoRA of that rank, with the same rows, steps and
seed: to cut is not to train.
"""

import torch
from torch import nn

from course_utils import data
from experiments import training
from experiments.learning_rate import lora_config

CUTS = (0, 1, 2, 4, 8, 16, 32, 64, 256)  # 256 is the smaller side of every layer: nothing is cut
TRAINED = (1, 8)
TASKS = ("reading", "sailor")
# One recipe for all tasks, or the spectra would show the recipes. Of the rates of `learning_rate`, on `sailor`, the best
# for all weights, and for LoRA the one below the best.
RATES = {"full": 1.5e-3, "lora": 5e-3}
RUNS = [
    {"seed": seed, "task": task, "method": method}
    for seed in training.SEEDS
    for task in TASKS
    for method in ("full", "lora")
]


def changes(base, tuned):
    """{name: (U, S, Vh)} of what training did to each linear layer but the output layer, which is tied to the embedding."""
    after = dict(tuned.named_parameters())
    return {
        f"{name}.weight": torch.linalg.svd(
            after[f"{name}.weight"].detach() - layer.weight.detach(), full_matrices=False
        )
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and layer is not base.get_output_embeddings()
    }


def cut(factors, rank):
    """A base model whose linear layers have the first `rank` directions of their change."""
    model, _ = training.load_base()
    with torch.no_grad():
        for name, (U, S, Vh) in factors.items():
            model.get_parameter(name).add_((U[:, :rank] * S[:rank]) @ Vh[:rank])
    return model


def train(seed, task, rate, lora=None):
    """The trainer of one training run, done."""
    trainer, _ = training.make_trainer(data.load_task(task, "train"), rate, seed, lora=lora)
    trainer.train()
    return trainer


def measure(seed, task, method):
    """A row for each rank: the score on test rows, and for `full` the mean share of each squared change that is kept."""
    rows, results = training.scored_rows(task, "test"), []
    if method == "lora":
        for rank in TRAINED:
            trainer = train(seed, task, RATES["lora"], lora_config(rank=rank))
            result = training.score(trainer.model, trainer.processing_class, task, rows)
            results.append({"rank": rank, "test": result["score"], "kept": 1.0})
        return results
    trainer = train(seed, task, RATES["full"])
    base, tokenizer = training.load_base()
    factors = changes(base, trainer.model)
    for rank in CUTS:
        kept = [(S[:rank].square().sum() / S.square().sum()).item() for _, S, _ in factors.values()]
        result = training.score(cut(factors, rank), tokenizer, task, rows)
        results.append({"rank": rank, "test": result["score"], "kept": sum(kept) / len(kept)})
    return results
