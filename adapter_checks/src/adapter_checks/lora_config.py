"""Does a LoRA configuration do what it says on this model? PEFT tries it on a copy without weights."""

from __future__ import annotations

import copy
import re
import warnings
from typing import TYPE_CHECKING, Any

from adapter_checks.base_shapes import in_out
from adapter_checks.initialisation import check_config
from adapter_checks.names import plain_name
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.training import bad_argument, check_rate

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


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
        check_rate(report, learning_rate)
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
