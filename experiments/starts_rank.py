"""How does the head start of PiSSA and OLoRA depend on the rank?

The runs of `starts`, which are of rank 8, at other ranks; each method at the learning rate that is best for it at rank 8. Alpha stays 16, as in `rank`.
"""

from experiments import starts, training

RUNS = [
    {"seed": seed, "method": method, "rank": rank}
    for seed in training.SEEDS
    for method in ("default", "pissa", "olora")
    for rank in (1, 4, 16, 64)
]


def measure(seed, method, rank):
    """Train once; the loss on the way and at the end."""
    rate = starts.best_rate(method)
    trainer = starts.make_trainer(method, rate, seed, rank)
    trainer.train()
    return {"learning_rate": rate, "validation_loss": trainer.evaluate()["eval_loss"], **training.loss_curve(trainer)}
