"""Adapters on disk that are not LoRA: virtual tokens (prompt tuning, P-tuning, prefix tuning), IA3, VeRA, norms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import CONFIG
from adapter_checks.base_shapes import meta_base_or_finding
from adapter_checks.generation import context_length
from adapter_checks.names import plain_name, same_base
from adapter_checks.report import first_few

if TYPE_CHECKING:
    from adapter_checks.report import Report

    Shapes = Mapping[str, tuple[int, ...]]

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
# Method -> the part of a tensor's name, and the value at which it begins and changes nothing.
NEUTRAL = {"IA3": ("ia3_l", 1.0), "VERA": ("vera_lambda_b", 0.0)}
IN_LAYERS = (*NEUTRAL, "LN_TUNING")


def check_other_method(report: Report, config: dict[str, Any], shapes: Shapes, folder: Path, base: Any) -> None:
    """Add findings on an adapter that is not LoRA.

    config  of adapter_config.json, with a method that PEFT knows
    shapes  {name: shape} of the tensors in the file
    base    as for check_adapter_folder, or None
    """
    from safetensors import safe_open

    method, file = config["peft_type"], folder / "adapter_model.safetensors"
    if not shapes:
        report.fail(
            "empty",
            "The weights' file holds no tensor at all: the adapter was gone from the model when it was saved, or its weights lay "
            "in parts on several processes.",
            "Save what get_peft_model returned, before merge_and_unload.",
        )
        return
    with safe_open(file, framework="pt") as tensors:
        broken = [name for name in shapes if not tensors.get_tensor(name).float().isfinite().all()]
        part, value = NEUTRAL.get(method, ("", 0.0))
        own = [tensors.get_tensor(name) for name in shapes if part and part in name]
    if broken:
        report.fail(
            "non_finite",
            f"{len(broken)} tensors hold NaN or infinity: {first_few(broken)}.",
            "Training diverged: take an earlier checkpoint, and lower the learning rate.",
        )
    if own and all((tensor == value).all() for tensor in own):
        report.fail(
            "untrained",
            f"Every number of {part} is {value:g}, as it was before training: this adapter changes nothing.",
            "It was saved before training, or training did not reach it: check for trainable parameters and train again.",
        )
    if method not in (*PROMPTS, *IN_LAYERS):
        report.warn(
            "not_lora",
            f"The adapter's method is {method}; only LoRA's tensors are looked at in detail.",
            "Load it and compare outputs with check_changes_output.",
        )
        return
    if method in PROMPTS and not _is_whole_prompt(report, config, shapes):
        return
    if base is not None:
        _check_fit(report, config, shapes, folder, base)
    what = f"{config['num_virtual_tokens']} virtual tokens" if method in PROMPTS else f"{len(shapes)} tensors"
    report.note("adapter", f"{method}, {what}, {file.stat().st_size / 1000:,.0f} kB.")


def _is_whole_prompt(report, config, shapes) -> bool:
    """Do configuration and file agree on the virtual tokens?"""
    count = config.get("num_virtual_tokens")
    if config.get("task_type") is None or type(count) is not int or count < 1:
        name, value = ("task_type", None) if config.get("task_type") is None else ("num_virtual_tokens", count)
        report.fail(
            "bad_config",
            f"In {CONFIG} {name} is {value!r}: PEFT {'needs the task to know' if value is None else 'reads from it'} "
            "where the virtual tokens go.",
            "Put in what the adapter was trained with, such as CAUSAL_LM for a model that generates.",
        )
        return False
    if "prompt_embeddings" not in shapes:
        report.fail(
            "missing_tensors",
            f"The file has no tensor prompt_embeddings, in which PEFT keeps the virtual tokens; it has {first_few(shapes)}.",
            "Save with model.save_pretrained(folder), not from model.state_dict().",
        )
        return False
    rows, width = (*shapes["prompt_embeddings"], 0)[:2]
    wanted = count * (config.get("num_transformer_submodules") or 1)
    if config["peft_type"] == "PREFIX_TUNING":
        wanted = count
    if rows != wanted or width != (_width(config) or width):
        report.fail(
            "shape_mismatch",
            f"prompt_embeddings has the shape {shapes['prompt_embeddings']}, and {CONFIG} says {wanted} virtual tokens"
            f"{f' of {_width(config)} numbers' if _width(config) else ''}.",
            "Configuration and weights come from two different runs: restore the pair that belongs together.",
        )
        return False
    return True


def _width(config) -> int:
    """Numbers of a virtual token: an embedding, or with prefix tuning a key and a value for each layer; 0 if not said."""
    width = config.get("token_dim") or 0
    return width * 2 * (config.get("num_layers") or 0) if config["peft_type"] == "PREFIX_TUNING" else width


def _check_fit(report, config, shapes, folder, base) -> None:
    if not (read := meta_base_or_finding(report, base, config)):
        return
    model, name = read
    base_config: Any = getattr(model, "config", None)
    context = (base_config and context_length(base_config)) or math.inf
    try:
        wanted = _made_by_peft(model, config, folder)
    except Exception as error:
        report.fail(
            "does_not_fit",
            f"PEFT can't put this adapter on the base: {error}",
            "Load the base that the adapter was trained on.",
        )
        return
    found = {plain_name(tensor): shape for tensor, shape in shapes.items()}
    wrong = [tensor for tensor in wanted.keys() & found.keys() if wanted[tensor] != found[tensor]]
    if wrong:
        worst = min(wrong)
        report.fail(
            "shape_mismatch",
            f"{len(wrong)} tensors do not fit this base: {worst} has the shape {found[worst]}, and here it would be {wanted[worst]}.",
            "The adapter was trained on a base of another size: load the one that base_model_name_or_path names.",
        )
    strange, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    if strange:
        report.fail(
            "layer_not_in_base",
            f"{len(strange)} of {len(found)} tensors have no place in this base: {first_few(strange)}. PEFT drops them without an error.",
            "This is another architecture, or one with fewer layers: load the base that the adapter was trained on.",
        )
    if missing:
        report.fail(
            "layers_not_covered",
            f"{len(missing)} of the {len(wanted)} tensors that belong on this base are not in the file: {first_few(missing)}.",
            "This base has more layers than the one that the adapter was trained on, or the file is incomplete.",
        )
    if config["peft_type"] in PROMPTS and config["num_virtual_tokens"] >= context:
        report.fail(
            "beyond_context",
            f"{config['num_virtual_tokens']} virtual tokens fill the base's context of {context}, and leave no place for a text.",
            "Train with fewer virtual tokens.",
        )
    trained_on = config.get("base_model_name_or_path")
    if trained_on and name and not same_base(trained_on, name):
        report.warn(
            "base_mismatch",
            f"The adapter says that it was trained on {trained_on}, and this base is {name}.",
            "If the shapes agree it loads without complaint and answers badly: load the base that it names.",
        )


def _made_by_peft(model, config, folder) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what PEFT saves of such an adapter on this base; `model` is used up. Raises what PEFT raises."""
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        settings: Any = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True  # an initialisation from a text would load a tokenizer
        if config["peft_type"] in PROMPTS:
            settings.token_dim = settings.num_layers = settings.num_attention_heads = (
                None  # this base's, not the file's
            )
        adapted = PeftModel(model, settings)
        if config["peft_type"] not in PROMPTS:
            state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            return {plain_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    made: Any = adapted.peft_config["default"]
    rows = made.num_virtual_tokens * (1 if made.peft_type == "PREFIX_TUNING" else made.num_transformer_submodules)
    return {"prompt_embeddings": (rows, _width(vars(made)))}
