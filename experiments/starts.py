"""Does the start of A and B matter? LoRA from five starts, and with two other levers, at five learning rates each.

All methods get the same rates, steps, batches and seeds, and the same alpha, so that a start is the only thing that differs;
`rslora` and `dora` start as the default does, and change the scaling and what is trained. `random` is the control for `olora`:
all as there, but for the directions, which are random. Runs are short (100 steps of batch 16), so that not every run ends at
the same score.
"""

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from course_utils import data
from experiments import harness, training

METHODS = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "random": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
RATES = (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)
STEPS, BATCH, EVERY = 100, 16, 5
RUNS = [
    {"seed": seed, "method": method, "learning_rate": rate}
    for seed in training.SEEDS
    for method in METHODS
    for rate in RATES
]


def take_out_random_directions(model):
    """OLoRA's start but for the directions: B of random orthonormal columns, A = BᵀW, and s·BA out of the weight."""
    with torch.no_grad():
        for layer in (layer for layer in model.modules() if isinstance(layer, LoraLayer)):
            weight, rank = layer.get_base_layer().weight, layer.r["default"]
            B = torch.linalg.qr(torch.randn(len(weight), rank, device=weight.device)).Q
            A = B.T @ weight
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
            weight -= layer.scaling["default"] * B @ A


def make_trainer(method, learning_rate, seed, rank=8):
    """A trainer that notes its loss every EVERY steps, with a part of the validation split to measure it on, too."""
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **METHODS[method])
    trainer, _ = training.make_trainer(
        data.load_task(training.TASK, "train"),
        learning_rate,
        seed,
        lora=lora,
        eval_rows=training.scored_rows(training.TASK, "validation"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        logging_steps=EVERY,
        per_device_eval_batch_size=64,
    )
    if method == "random":
        take_out_random_directions(trainer.model)
    return trainer


def measure(seed, method, learning_rate):
    """Train once; the loss on the way and at the end, and the scores."""
    trainer = make_trainer(method, learning_rate, seed)
    trainer.train()
    return {
        **training.scores(trainer, training.TASK),
        "validation_loss": trainer.evaluate()["eval_loss"],
        **training.loss_curve(trainer),
    }


def best_rate(method):
    """The learning rate at which the method is best, see `harness.best_rate`."""
    return harness.best_rate("starts", RUNS, method)
