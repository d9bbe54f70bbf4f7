"""Checks on training with LoRA: does the configuration do what it says, and does training move the adapter?"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.base_shapes import in_out
from adapter_checks.initialisation import check_config
from adapter_checks.names import plain_name
from adapter_checks.report import Report, first_few, never_raises

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, Trainer

# Full fine-tuning's rates lie below (defaults: Trainer 5e-5, TRL 2e-5); QLoRA's authors trained LoRA by Adam at 1e-4
# (33B, 65B) and 2e-4 (7B, 13B parameters): https://arxiv.org/abs/2305.14314, table 9.
LOWEST_RATE = 1e-4


@never_raises("LoRA configuration")
def check_lora_config(
    model: PreTrainedModel | PeftModel, lora_config: LoraConfig, learning_rate: float | None = None
) -> Report:
    """Will this LoraConfig do what it says? PEFT tries it on a copy of the model without weights.

    model          a transformers model, or a PeftModel around one; neither it nor the configuration is changed
    lora_config    the peft.LoraConfig
    learning_rate  Adam's, to be judged too

    Returns a Report; its finding "lora" gives the number of adapted layers and the scaling.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    report = Report("LoRA configuration")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel) or not isinstance(lora_config, LoraConfig):
        return bad_argument(report, (model, lora_config), "a transformers model and a peft.LoraConfig")
    if learning_rate is not None:
        _check_rate(report, learning_rate)
    rank_pattern, alpha_pattern = lora_config.rank_pattern or {}, lora_config.alpha_pattern or {}
    ranks = [lora_config.r, *rank_pattern.values()]
    if any(type(rank) is not int or rank < 1 for rank in ranks):
        report.fail("bad_rank", f"The rank is {first_few(ranks)}, not a whole number of at least 1.", "Start with r=8.")
        return report
    config = copy.deepcopy(lora_config)  # PEFT writes into it
    config.init_lora_weights = False  # OLoRA and its like need numbers, which the meta device does not have
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        skeleton = type(base)(copy.deepcopy(base.config))
        names = [f".{name}" for name, _ in skeleton.named_modules()]
        own = first_few(sorted({n.rpartition(".")[2] for n, m in skeleton.named_modules() if in_out(m)}), 9)
        try:
            adapted = get_peft_model(skeleton, config)
        except Exception as error:
            report.fail("refused", f"PEFT refuses it: {error}", f"This model's layers for target_modules: {own}.")
            return report
    layers: dict[str, Any] = {
        plain_name(name): layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)
    }
    targets = [] if isinstance(lora_config.target_modules, str) else lora_config.target_modules or []
    unmatched = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    unmatched += [
        key
        for key in (*rank_pattern, *alpha_pattern)
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers)
    ]
    if unmatched:
        report.fail(
            "matches_nothing",
            f"No adapted layer matches {first_few(sorted(unmatched), 4)}, and training goes on without it.",
            f"Correct target_modules or the pattern. This model's layers: {own}.",
        )
    smaller_sides = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    large = [f"{name} ({side})" for name, side in smaller_sides.items() if max(layers[name].r.values()) > side]
    if large:
        report.fail(
            "rank_too_large",
            f"The rank is above the smaller side of {len(large)} layers: {first_few(large)}.",
            "Choose a far lower one: no product BA has such a rank, and A and B cost more than the layer itself.",
        )
    check_config(report, base, layers, lora_config)
    scalings = sorted({round(value, 4) for layer in layers.values() for value in layer.scaling.values()})
    if lora_config.lora_alpha <= 0 or (lora_config.lora_alpha <= 4 and scalings[0] < 0.25):
        report.add(
            "warn" if lora_config.lora_alpha > 0 else "fail",
            "small_scaling",
            f"lora_alpha="
            f"{lora_config.lora_alpha} gives a scaling of {scalings[0]:g}, since alpha is divided by the rank.",
            "For a scaling of 2 set lora_alpha to 2 * r.",
        )
    report.note(
        "lora", f"{len(layers)} layers would be adapted, with a scaling of {first_few(map('{:g}'.format, scalings))}."
    )
    return report


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


def _check_rate(report, rate) -> None:
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
        _check_rate(report, max(group.get("initial_lr", group["lr"]) for group in groups))
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
