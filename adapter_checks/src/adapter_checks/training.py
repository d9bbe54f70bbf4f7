"""Checks on training with LoRA: is the trainer set up to train the adapter, and does training move it?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.names import plain_name
from adapter_checks.report import Report, first_few, never_raises

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

# Full fine-tuning's rates lie below (defaults: Trainer 5e-5, TRL 2e-5); QLoRA's authors trained LoRA by Adam at 1e-4
# (33B, 65B) and 2e-4 (7B, 13B parameters): https://arxiv.org/abs/2305.14314, table 9.
LOWEST_RATE = 1e-4


@never_raises("Training")
def check_training(trainer: Trainer | torch.nn.Module, before: Mapping[str, torch.Tensor] | None = None) -> Report:
    """Is this trainer set up to train the adapter, and did it? Call it before `train()` and after a few steps.

    trainer  an SFTTrainer or Trainer; after a loop of your own the model, of which the weights are looked at
    before   copies of weights from before, {name: p.detach().clone() for name, p in model.named_parameters() ...}:
             needed where B doesn't start at zero (OLoRA, PiSSA), and without LoRA

    Returns a Report. With a trainer, weights count from three steps on: the first rate of a warm-up is 0.
    """
    import torch

    report, steps = Report("Training"), math.inf
    logs: list[dict[str, Any]] = []
    model: Any = cast(Any, trainer).model if is_trainer(trainer) else trainer
    if not isinstance(model, torch.nn.Module) or not isinstance(before, (Mapping, type(None))):
        return bad_argument(report, (trainer, before), "a trainer or a model, and a dict of tensors or nothing")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        report.fail(
            "nothing_trainable",
            "No weight of this model is trainable.",
            "Use get_peft_model or peft_config; load an adapter with is_trainable=True.",
        )
        return report
    if is_trainer(trainer):
        _check_settings(report, trainer, any("lora_" in name for name in weights))
        state = cast("Trainer", trainer).state
        logs, steps = state.log_history, state.global_step
    losses = [log[key] for log in logs for key in ("loss", "train_loss", "eval_loss") if key in log]
    not_finite = [plain_name(name) for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if not_finite or not all(map(math.isfinite, losses)):
        report.fail(
            "not_finite",
            f"There is NaN or infinity in {first_few(not_finite, 1) or 'the loss'}. Trainer leaves NaN out of the "
            "loss that it logs (logging_nan_inf_filter), so the log may look healthy.",
            "Load the model afresh and lower the learning rate; look for batches without loss.",
        )
    elif without_gradient := [log["step"] for log in logs if log.get("grad_norm") == 0]:
        report.fail(
            "no_gradient",
            f"At step {without_gradient[0]} the gradient is exactly 0, so nothing is learned from there on.",
            "A far too high learning rate does this (activations overflow, and the norms turn them to 0), or a batch "
            "without loss: load the model afresh and lower the rate; run check_supervision.",
        )
    elif steps < 3:
        report.note("steps", f"{steps} steps done; from three steps on this check can see whether the weights move.")
    else:
        _check_moved(report, model, weights, before)
    return report


def check_rate(report: Report, rate: Any) -> None:
    """Is this a learning rate of Adam at which LoRA learns?"""
    if not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        report.fail("bad_rate", f"The learning rate is {rate!r}, not a number above 0.", "For LoRA start with 2e-4.")
    elif rate < LOWEST_RATE:
        report.warn(
            "rate_too_low",
            f"A learning rate of {rate:g} is one of full fine-tuning: LoRA hardly learns at it.",
            "Try ten times as much (https://thinkingmachines.ai/blog/lora/) and compare on the validation set.",
        )


def _check_settings(report, trainer, lora) -> None:
    args, optimizer = trainer.args, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    groups = optimizer.param_groups if optimizer else [{"lr": args.learning_rate}]
    if lora and "adam" in (type(optimizer).__name__ if optimizer else str(args.optim)).lower():
        check_rate(report, max(group.get("initial_lr", group["lr"]) for group in groups))
    slow = [name for name in ("bf16", "fp16", "activation_checkpointing") if getattr(args, name, False)]
    if slow and args.device.type == "cpu":
        report.warn(
            "slow_on_cpu",
            f"{' and '.join(slow)} (TRL's defaults are for a GPU) can slow a CPU down.",
            f"Give SFTConfig use_cpu=True, {', '.join(f'{name}=False' for name in slow)}; time both.",
        )


def _check_moved(report, model, weights, before) -> None:
    import torch

    pairs = {name: (weights[name], old) for name, old in (before or {}).items() if name in weights}
    initialisations = {
        str(getattr(config, "init_lora_weights", None)) for config in getattr(model, "peft_config", {}).values()
    }
    if before is None and initialisations <= {"True", "gaussian", "eva"}:  # with these B begins at zero
        pairs = {
            name: (weight, torch.zeros_like(weight))
            for name, weight in weights.items()
            if re.search(r"\.(lora_B\.\w+\.weight|lora_embedding_A\.\w+)$", name)
        }
    if not pairs or any(weight.data_ptr() == old.data_ptr() for weight, old in pairs.values()):
        report.warn(
            "cannot_tell",
            "It can't be decided whether the weights moved: B did not start at zero, there is no LoRA, or "
            "`before` holds other names, or the weights themselves.",
            "Pass copies from before training.",
        )
        return
    unmoved = [plain_name(name) for name, (weight, old) in pairs.items() if torch.equal(weight, old.to(weight))]
    if unmoved:
        report.add(
            "fail" if len(unmoved) == len(pairs) else "warn",
            "not_moved",
            f"{len(unmoved)} of {len(pairs)} weights have not moved: {first_few(unmoved, 1)}.",
            "See that the learning rate is above 0, that the optimizer was made after get_peft_model, and that "
            "p.grad is not None after backward().",
        )
    else:
        report.note("moved", f"{len(pairs)} weights looked at; all have moved.")


def is_trainer(thing: object) -> bool:
    return all(hasattr(thing, name) for name in ("train_dataset", "data_collator", "state"))


def bad_argument(report: Report, given: Iterable[object], wanted: str) -> Report:
    kinds = " and ".join(type(thing).__name__ for thing in given)
    report.fail("bad_argument", f"This check was given {kinds}, which it can't examine.", f"Pass {wanted}.")
    return report
