"""Checks on training with LoRA: is the trainer set up to train the adapter, and does training move it?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.base_shapes import in_out
from adapter_checks.names import MAY_REST, plain_name
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.soft_prompts import CACHED, active_prompt

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

# Full fine-tuning's rates lie below (defaults: Trainer 5e-5, TRL 2e-5); QLoRA's authors trained LoRA by Adam at 1e-4
# (33B, 65B) and 2e-4 (7B, 13B parameters): https://arxiv.org/abs/2305.14314, table 9.
LOWEST_RATE = 1e-4
# By this rate Zephyr was trained by DPO with QLoRA (https://github.com/huggingface/alignment-handbook, zephyr-7b-beta); the
# default of TRL's trainers for preferences, 1e-6, is for all weights.
LOWEST_PREFERENCE_RATE = 5e-6
PREFERENCE_TRAINERS = ("DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")


@never_raises("Training")
def check_training(trainer: Trainer | torch.nn.Module, before: Mapping[str, torch.Tensor] | None = None) -> Report:
    """Is this trainer set up to train the adapter, and did it? Call it before `train()` and after a few steps.

    trainer  an SFTTrainer or Trainer; after a loop of your own the model, of which the weights are looked at
    before   copies of weights from before, {name: p.detach().clone() for name, p in model.named_parameters() ...}:
             needed where B doesn't start at zero (OLoRA, PiSSA), for virtual tokens and for methods other than LoRA, IA3,
             VeRA and LN tuning, whose first values are known

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
        report_frozen(report, model)
        return report
    rate = None
    if is_trainer(trainer):
        rate = _check_settings(report, trainer, any("lora_" in name for name in weights))
        state = cast("Trainer", trainer).state
        logs, steps = state.log_history, state.global_step
    # DeepSpeed and FSDP train a copy of the weights in 32 bits.
    if not any(getattr(trainer, name, False) for name in ("is_deepspeed_enabled", "is_fsdp_enabled")):
        _check_precision(report, model, weights, rate)
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
        check_moved(report, model, weights, before)
    return report


def check_rate(report: Report, rate: Any, model: torch.nn.Module, lowest: float = LOWEST_RATE) -> None:
    """Is this a learning rate of Adam at which LoRA learns on this model, with or without an adapter?

    lowest: the lowest rate at which LoRA is known to learn by this kind of training.
    """
    import torch

    linear = [module for module in model.modules() if not isinstance(module, torch.nn.Embedding)]
    widest = max((sizes[0] for sizes in map(in_out, linear) if sizes), default=1)
    if not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        report.fail("bad_rate", f"The learning rate is {rate!r}, not a number above 0.", "For LoRA start with 2e-4.")
    elif rate < lowest:
        report.warn(
            "rate_too_low",
            f"A learning rate of {rate:g} is one of full fine-tuning: LoRA hardly learns at it.",
            "Try ten times as much (https://thinkingmachines.ai/blog/lora/) and compare on the validation set.",
        )
    elif rate > widest**-0.5:  # PEFT draws A between -1/sqrt(inputs) and 1/sqrt(inputs), as nn.Linear does
        report.warn(
            "rate_too_high",
            f"A learning rate of {rate:g} is far too high: Adam moves every number by about as much in a single step, and A "
            f"starts within {widest**-0.5:.1g} of zero.",
            "For LoRA start with 2e-4; look whether a zero or a minus was lost.",
        )


def report_frozen(report: Report, model: Any) -> None:
    """Say why nothing is trainable, of a model without a trainable weight."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        what, remedy = "No weight of this model is trainable.", "Use get_peft_model, or give the trainer a peft_config."
    elif all(config.inference_mode for config in configs.values()):
        what = "No weight of this model is trainable: the adapter was loaded for inference."
        remedy = "Load it with is_trainable=True; for a new one leave inference_mode alone."
    else:
        what = "No weight of this model is trainable: the adapter was frozen after it was made."
        remedy = (
            "Call prepare_model_for_kbit_training before get_peft_model, as it freezes all that it finds; the same holds "
            "for a loop of your own that sets requires_grad."
        )
    report.fail("nothing_trainable", what, remedy)


def _check_precision(report, model, weights, rate) -> None:
    import torch

    prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")  # PEFT's, of this method's weights
    low = [w for name, w in weights.items() if f".{prefix}" in name and w.dtype in (torch.bfloat16, torch.float16)]
    if not low:
        return
    share = sum(_too_small_a_step(w, rate or 0) for w in low) / sum(w.numel() for w in low)
    # TRL casts an adapter on a quantised base, as QLoRA's authors did: at usual rates that loses little.
    if any(hasattr(weight, "quant_state") for weight in model.parameters()) and share < 0.1:
        return
    lost = f" A step of the learning rate {rate:g} leaves {share:.0%} of its numbers as they are." if rate else ""
    report.warn(
        "adapter_in_16_bits",
        f"The adapter is trained in {str(low[0].dtype).removeprefix('torch.')}, without a copy in 32 bits: small steps "
        f"are rounded away, and more of them as the rate falls.{lost}",
        "Leave autocast_adapter_dtype alone, and cast the base before get_peft_model, not the model after it; bf16=True "
        "computes in 16 bits all the same. Of an adapter that is there, set p.data = p.data.float() before training.",
    )


def _too_small_a_step(weight, step: float) -> int:
    """How many numbers of a weight a step leaves where they are: it is less than half their distance to the next one."""
    import torch

    weight = weight.detach()
    distance = torch.exp2(torch.frexp(weight.float()).exponent - 1.0) * torch.finfo(weight.dtype).eps
    return int(((step < distance / 2) & (weight != 0)).sum())


def highest_rate(trainer: Any) -> tuple[float, bool]:
    """A trainer's highest learning rate, before any schedule, and whether it is one of Adam's."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    groups = optimizer.param_groups if optimizer else [{"lr": trainer.args.learning_rate}]
    rate = max(group.get("initial_lr", group["lr"]) for group in groups)
    return rate, "adam" in (type(optimizer).__name__ if optimizer else str(trainer.args.optim)).lower()


def _check_settings(report, trainer, lora) -> float:
    """Returns the highest learning rate, before any schedule."""
    args = trainer.args
    rate, adam = highest_rate(trainer)
    if lora and adam:
        prefers = any(kind.__name__ in PREFERENCE_TRAINERS for kind in type(trainer).__mro__)
        check_rate(report, rate, trainer.model, LOWEST_PREFERENCE_RATE if prefers else LOWEST_RATE)
    if prompt := active_prompt(trainer.model):
        _check_prompt_settings(report, trainer, prompt, rate)
    slow = [name for name in ("bf16", "fp16", "activation_checkpointing") if getattr(args, name, False)]
    if slow and args.device.type == "cpu":
        report.warn(
            "slow_on_cpu",
            f"{' and '.join(slow)} (TRL's defaults are for a GPU) can slow a CPU down.",
            f"Give SFTConfig use_cpu=True, {', '.join(f'{name}=False' for name in slow)}; time both.",
        )
    return rate


def _check_prompt_settings(report, trainer, prompt, rate) -> None:
    """What virtual tokens don't bear, and a rate at which they stay where they began."""
    import torch

    args, method = trainer.args, prompt.peft_type.value
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        report.fail(
            "packed_prompt",
            f"Rows are packed, and {method} puts its virtual tokens once before each packed row, without the positions that keep texts "
            "apart: all texts but the first are trained without a prompt of their own, and see those before them.",
            "Give SFTConfig packing=False and padding_free=False.",
        )
    checkpointed = getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)
    if prompt.peft_type in CACHED and checkpointed:
        report.fail(
            "checkpointed_prefix",
            f"{method} hands its virtual tokens to the layers in a cache, which activation checkpointing switches off: the first step "
            "raises an error about the sizes of tensors.",
            "Give the trainer's arguments activation_checkpointing=False.",
        )
    numbers = [weight.detach().float() for weight in trainer.model.prompt_encoder.parameters()]
    steps = max(args.max_steps, trainer.state.max_steps)
    if method != "PROMPT_TUNING" or not numbers or not isinstance(rate, (int, float)) or steps < 1:
        return
    size, reach = torch.cat([weight.flatten() for weight in numbers]).square().mean().sqrt().item(), rate * steps
    if reach < size:
        report.warn(
            "rate_too_low",
            f"Adam moves a number by about the learning rate in a step, so {steps} steps at {rate:g} move it by {reach:.2g} at most, "
            f"and the virtual tokens begin at {size:.2g} (root mean square): they will hardly move.",
            "Prompt tuning takes far higher rates than LoRA: its authors took 0.3 (https://arxiv.org/abs/2104.08691).",
        )


def _checkpoints_without_gradient(model) -> bool:
    """Whether blocks are checkpointed in the reentrant way, and nothing makes their inputs need the gradient that it asks for."""
    import torch

    functions = [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    needed = any(
        getattr(module, "_require_grads_hooks", None)
        or (isinstance(module, torch.nn.Embedding) and module.weight.requires_grad)
        for module in model.modules()
    )
    return not needed and any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)


def check_moved(
    report: Report, model: Any, weights: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor] | None
) -> None:
    """Have the trainable weights {name: weight} moved since `before`, or without it B from zero?"""
    import torch

    pairs = {name: (weights[name], old) for name, old in (before or {}).items() if name in weights}
    if before is None:
        pairs = _from_the_beginning(model, weights)
    if not pairs or any(weight.data_ptr() == old.data_ptr() for weight, old in pairs.values()):
        report.warn(
            "cannot_tell",
            "It can't be decided whether the weights moved: their first values are not known (B did not start at zero, they are "
            "virtual tokens, or there is no adapter), or `before` holds other names, or the weights themselves.",
            "Pass copies from before training.",
        )
        return
    unmoved = [name for name, (weight, old) in pairs.items() if torch.equal(weight, old.to(weight))]
    if unmoved:
        expected = [name for name in pairs if not MAY_REST.search(name)]
        most = len(unmoved) == len(pairs) or 2 * len(set(unmoved) & set(expected)) > len(expected)
        what = f"{len(unmoved)} of {len(pairs)} weights have not moved: {first_few(map(plain_name, unmoved), 1)}."
        remedy = (
            "See that the learning rate is above 0, that the optimizer was made after get_peft_model, and that "
            "p.grad is not None after backward(). With checkpointing of your own, call model.enable_input_require_grads()."
        )
        if _checkpoints_without_gradient(model):
            what += (
                " Gradient checkpointing is on, and what its blocks are given needs no gradient, so they pass none on."
            )
            remedy = "Call model.enable_input_require_grads() before training, or checkpoint with use_reentrant=False."
        report.add("fail" if most else "warn", "not_moved", what, remedy)
    else:
        report.note("moved", f"{len(pairs)} weights looked at; all have moved.")


def _from_the_beginning(model, weights) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{name: (weight, its value before training)} of those whose first value is known: with it the adapter changes nothing."""
    import torch

    configs = [*getattr(model, "peft_config", {}).values()]

    def all_have(option, *values):
        return all(str(getattr(config, option, None)) in values for config in configs)

    known = {
        r"\.(lora_B\.\w+\.weight|lora_embedding_A\.\w+)$": (
            all_have("init_lora_weights", "True", "gaussian", "eva"),
            0.0,
        ),
        r"\.ia3_l\.\w+$": (all_have("init_ia3_weights", "True"), 1.0),
        r"\.vera_lambda_b\.\w+$": (all_have("init_weights", "True"), 0.0),
    }
    pairs = {
        name: (weight, torch.full_like(weight, value))
        for pattern, (certain, value) in known.items()
        for name, weight in weights.items()
        if certain and re.search(pattern, name)
    }
    everything = dict(model.named_parameters())
    for name, weight in weights.items():  # a copy of the norm, beside the norm itself
        original = everything.get(re.sub(r"\.ln_tuning_layers\.\w+\.", ".base_layer.", name))
        if original is not None and original is not weight:
            pairs[name] = (weight, original)
    return pairs


def is_trainer(thing: object) -> bool:
    return all(hasattr(thing, name) for name in ("train_dataset", "data_collator", "state"))


def bad_argument(report: Report, given: Iterable[object], wanted: str) -> Report:
    kinds = " and ".join(type(thing).__name__ for thing in given)
    report.fail("bad_argument", f"This check was given {kinds}, which it can't examine.", f"Pass {wanted}.")
    return report
