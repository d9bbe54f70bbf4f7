"""Is the reference of DPO, GRPO or RLOO the model that training begins from, and does it stay where it is?"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from adapter_checks.generation import evaluating
from adapter_checks.initialisation import changes_base, check_shared
from adapter_checks.names import plain_name
from adapter_checks.report import Report, first_few

if TYPE_CHECKING:
    import torch


def check_reference(report: Report, trainer: Any) -> None:
    """What the parts of a trainer say of its reference, before any step is made."""
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    configs = getattr(model, "peft_config", {})
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    check_shared(report, {name: config for name, config in configs.items() if hasattr(config, "init_lora_weights")})
    changing = [name for name, config in configs.items() if changes_base(config)]
    if reference is None and changing and "ref" not in configs:
        report.fail(
            "reference_moved_base",
            f"The reference is the base with {first_few(changing)!r} switched off, and that adapter's initialisation "
            f"({configs[changing[0]].init_lora_weights}) took a part out of the base's weights: the reference is a damaged model.",
            "Give a ref_model that was loaded separately, or take the default initialisation.",
        )
    if getattr(trainer, "precompute_ref_logps", False):
        return  # it is not asked again once training moves weights
    # Without a ref_model the reference is the same weights with another adapter or none: what is trained outside of adapters
    # stays in it.
    moving = [name for name in trained if ".ref." in name or not any(f".{one}." in f"{name}." for one in configs)]
    if configs and reference is None and moving:
        report.fail(
            "reference_trains",
            f"{len(moving)} weights of the reference are trainable as well, such as {plain_name(moving[0])}: it moves with the "
            "policy, and nothing holds the policy where it began.",
            "Freeze the adapter 'ref' (requires_grad_(False)). Biases, norms and other weights of the base change in place: leave "
            "them frozen (bias='none'), or pass a ref_model with weights of its own.",
        )
    own = {weight.data_ptr() for weight in trained.values() if weight.numel()}
    if reference is not None and any(weight.data_ptr() in own for weight in reference.parameters()):
        report.fail(
            "reference_is_policy",
            "ref_model holds the very weights that are trained, so the reference is the policy at each step: margins stay 0 "
            "and the loss stays where it begins. PEFT puts adapters into the base in place: the base that you gave to "
            "get_peft_model has them, too.",
            "Leave ref_model out: TRL then switches the adapter off. Or load the reference a second time.",
        )


def starting_metrics(trainer: Any) -> dict[str, float]:
    """What DPOTrainer would log of one batch before any step; empty if that can't be found out. Nothing is trained."""
    import torch

    args, kept = trainer.args, trainer._metrics
    rows = [row for row, _ in zip(trainer.train_dataset, range(args.per_device_train_batch_size))]
    if not rows or "prompt_ids" not in rows[0]:
        return {}
    trainer._metrics = {"train": collections.defaultdict(list), "eval": collections.defaultdict(list)}
    try:
        with evaluating(trainer.model), torch.no_grad(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
        return {"loss": float(loss), **{name: values[0] for name, values in trainer._metrics["eval"].items() if values}}
    finally:
        trainer._metrics = kept


def why_reference_differs(trainer: Any) -> tuple[str, str]:
    """Where a reference comes from that is not the model as training begins, and what to do. trainer: None if unknown."""
    if trainer is None:
        return (
            "It may be another model than the one that training began from, or a copy that was loaded from disk while the "
            "policy had been merged or changed in memory.",
            "Look at ref_model and at where the policy's weights come from; run this check on the trainer itself.",
        )
    if not getattr(trainer.model, "peft_config", None):
        return (
            f"Without a ref_model TRL loads one from {_origin(trainer.model)!r}; merges and other changes that were made in memory "
            "are not in it.",
            "Save the model that training begins from and load it from there, or pass a deep copy of it as ref_model.",
        )
    if trainer.ref_model is not None:
        return (
            "The ref_model that was passed is not the policy with its adapter as it is at the start: often the bare base, "
            "while the adapter was trained before, or the same model in another precision.",
            "Leave ref_model out: TRL takes a copy of an adapter that was trained before, and else the base without adapter.",
        )
    return (
        "The reference is the base with the adapter switched off, and the adapter changes the output from the start: it was "
        "trained before, its B is not zero (init_lora_weights), or its initialisation moved the base (OLoRA, PiSSA).",
        "Merge what was trained before into the base, and begin with a new adapter whose B is zero; or give a ref_model.",
    )


def _origin(model: torch.nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "the name in its config")
