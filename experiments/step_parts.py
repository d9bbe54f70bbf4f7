"""What does one training step spend its time on: the forward pass, the backward pass, or the optimizer?

The same batches for LoRA with the model's own loss, for LoRA with TRL's, which computes every logit once more in the backward
pass, and for all weights with the model's own. Loading and collating are done before the clock starts.
"""

import statistics
import time

import torch
from transformers import Trainer

from course_utils import data
from experiments import training
from experiments.learning_rate import lora_config

STEPS, WARM, RATE = 12, 2, 1e-3
RUNS = [
    {"seed": seed, "method": method, "loss": loss}
    for seed in training.SEEDS
    for method, loss in (("lora", "model"), ("lora", "trl"), ("full", "model"))
]


def measure(seed, method, loss):
    """Median seconds of each part over STEPS steps, after WARM that are not counted."""
    trainer, _ = training.make_trainer(
        data.load_task(training.TASK, "train"), RATE, seed, lora=lora_config() if method == "lora" else None
    )
    model = trainer.model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=True)
    batches = iter(trainer.get_train_dataloader())
    compute_loss = trainer.compute_loss if loss == "trl" else lambda *given: Trainer.compute_loss(trainer, *given)
    parts = {"forward": [], "backward": [], "optimizer": []}
    for _ in range(WARM + STEPS):
        batch = trainer._prepare_inputs(next(batches))
        clock = [time.perf_counter()]
        value = compute_loss(model, batch)
        clock.append(time.perf_counter())
        value.backward()
        clock.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.append(time.perf_counter())
        for part, begin, end in zip(parts, clock, clock[1:]):
            parts[part].append(end - begin)
    return {f"{part}_seconds": statistics.median(seconds[WARM:]) for part, seconds in parts.items()}
