"""Which adapters a model holds, and whether they are in effect."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.initialisation import check_shared
from adapter_checks.loaded_weights import (
    adapter_names,
    check_applied_twice,
    check_as_saved,
    check_base_weights,
    check_weights,
)
from adapter_checks.names import same_base
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.soft_prompts import is_switched_off

if TYPE_CHECKING:
    import torch


@never_raises("Adapters in the model")
def check_adapters(
    model: torch.nn.Module,
    *,
    load_result: Any = None,
    expect_active: str | Collection[str] | None = None,
    expect_trainable: bool | None = None,
    base_name: str | None = None,
    base_revision: str | None = None,
    original_base: torch.nn.Module | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
) -> Report:
    """Look at a model with adapters (LoRA, other methods in its layers, virtual tokens) for all that commonly goes wrong.

    model            a PeftModel, or a transformers model with adapters of its own (`model.load_adapter`)
    load_result      what `load_adapter` returned, or {adapter name: what it returned}. Give the name: PEFT 0.21
                     lists keys of other adapters as missing if the new name is a part of theirs ("a" of "lora_a").
    expect_active    the name, or names, that should be active; [] if the base alone should answer
    expect_trainable True before training, False before inference
    base_name        what the model was loaded from, if its own `name_or_path` does not say
    base_revision    the revision that it was loaded with
    original_base    another copy of the base, or its folder of safetensors: shows whether this model's base has the
                     adapter merged into it already, lacks what an OLoRA or PiSSA adapter subtracted from it, or was changed otherwise;
                     of a model without adapters, too. Costs a pass over the adapted weights.
    folder           what the adapter was loaded from, or {adapter name: folder}: are its weights those of the file? Shows
                     what is left at random values where the configuration has init_lora_weights false

    Returns a Report; the finding "adapters" names what is loaded and active. All-zero B matrices are a failure in a
    frozen adapter (nothing was loaded: LoRA starts with B = 0, https://arxiv.org/abs/2106.09685, section 4.1) and a
    warning in a trainable one (not trained yet). The model is not changed.
    """
    import torch
    from peft import PeftModel, get_layer_status
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    report = Report("Adapters in the model")
    if not isinstance(model, torch.nn.Module):
        report.fail(
            "not_a_model",
            f"This is {model!r:.60}, not a model.",
            "Pass what PeftModel.from_pretrained returned, or the transformers model that holds the adapters.",
        )
        return report
    if isinstance(model, PeftModel) and hasattr(model, "prompt_encoder"):
        return _check_prompts(
            report, model, load_result, expect_active, expect_trainable, base_name, base_revision, original_base, folder
        )
    if isinstance(model, PeftModel) and not isinstance(model.base_model, BaseTuner):
        method: Any = next(iter(model.peft_config.values())).peft_type
        report.warn(
            "unsupported_method",
            f"{method.value} does not sit in the model's layers, and this check looks there.",
            "Compare outputs with check_changes_output instead.",
        )
        return report

    # get_base_model() asks for the active adapter, which may have been deleted.
    base: Any = cast("Any", model).base_model.model if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    statuses = get_layer_status(model) if layers else []
    loaded = sorted({adapter for status in statuses for adapter in status.available_adapters})
    _check_load_result(report, load_result)
    _check_wrappers(report, model, layers)
    if not loaded:
        report.fail(
            "no_adapters",
            f"This {type(model).__name__} has no adapter in any of its layers.",
            "It is a plain base, or merge_and_unload, unload or delete_adapter was called on it. Load an adapter with "
            "PeftModel.from_pretrained, and keep what it returns.",
        )
        if original_base is not None:
            linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
            check_base_weights(report, linear, {}, original_base, model)
        return report

    active = _check_state(report, model, layers, loaded, expect_active)
    _check_trainable(report, model, statuses, active, expect_trainable)
    check_weights(report, layers, loaded)
    check_applied_twice(report, layers, loaded)
    configs: dict[str, Any] = {adapter: _configs(model).get(adapter) for adapter in loaded}
    check_shared(report, configs)
    _check_base_name(report, model, base_name, base_revision)
    if original_base is not None:
        check_base_weights(report, layers, configs, original_base, base)
    if folder is not None:
        _check_as_saved(report, model, base, configs, folder)
    report.note("adapters", f"Loaded: {', '.join(loaded)}. Active: {', '.join(active) or 'none'}.")
    return report


def _check_prompts(
    report, model, load_result, expect_active, expect_trainable, base_name, base_revision, original_base, folder
) -> Report:
    """check_adapters for virtual tokens (prompt tuning, P-tuning, prefix tuning), which PEFT keeps beside the model inside."""
    import torch

    base, loaded = model.base_model, sorted(model.prompt_encoder)
    _check_load_result(report, load_result)
    if not loaded:
        report.fail(
            "no_adapters",
            "This PeftModel has no adapter: the last one was deleted.",
            "Load an adapter with PeftModel.from_pretrained, and keep what it returns.",
        )
        return report
    switched_off = is_switched_off(model)
    active = [] if switched_off else [name for name in model.active_adapters if name in loaded]
    if switched_off and expect_active != []:
        report.fail(
            "adapters_disabled", "The virtual tokens are switched off: the base alone answers.", "Leave the disable_adapter() block."
        )  # fmt: skip
    _check_expected_active(report, active, loaded, expect_active)
    trainable = [name for name, weight in base.named_parameters() if weight.requires_grad]
    _report_base_trainable(report, [name for name in trainable if ".modules_to_save." not in name])
    for adapter in loaded:
        weights = dict(model.prompt_encoder[adapter].named_parameters())
        broken = [name for name, weight in weights.items() if weight.is_meta or not torch.isfinite(weight).all()]
        if broken:
            report.fail(
                "non_finite",
                f"{len(broken)} weights of {adapter!r} hold NaN, infinity or nothing at all: {first_few(broken)}.",
                "Training diverged, or the file is damaged: go back to an earlier checkpoint, and lower the learning rate.",
            )
        frozen = not any(weight.requires_grad for weight in weights.values())
        if adapter in active and expect_trainable is True and frozen:
            report.fail(
                "adapter_frozen",
                f"{adapter!r} is frozen, so training would change nothing.",
                "Call model.prompt_encoder.requires_grad_(True). PEFT 0.21 refuses is_trainable=True for virtual tokens.",
            )
        elif adapter in active and expect_trainable is False and not frozen:
            report.warn(
                "adapter_trainable",
                f"{adapter!r} is trainable: PEFT 0.21 does not freeze the virtual tokens that it loads for inference.",
                "Call model.prompt_encoder.requires_grad_(False) if something here trains.",
            )
    _check_base_name(report, model, base_name, base_revision)
    if original_base is not None:
        linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
        check_base_weights(report, linear, {}, original_base, base)
    if folder is not None:
        _check_as_saved(report, model, base, {adapter: model.peft_config[adapter] for adapter in loaded}, folder)
    report.note("adapters", f"Loaded: {', '.join(loaded)}. Active: {', '.join(active) or 'none'}.")
    return report


def _check_as_saved(report, model, base, configs, folder) -> None:
    folders = folder if isinstance(folder, Mapping) else dict.fromkeys(configs, folder)
    if not (
        set(folders) <= set(configs) and all(isinstance(path, (str, os.PathLike)) for path in folders.values())
    ) or (folders is not folder and len(folders) > 1):
        report.fail(
            "bad_argument",
            f"folder is {folder!r:.60}, and the model holds {', '.join(configs)}.",
            "Pass the folder of the only adapter, or {adapter name: folder}.",
        )
        return
    for adapter, path in folders.items():
        check_as_saved(report, model, base, configs[adapter], adapter, path)


def _check_load_result(report, load_result) -> None:
    if load_result is None:
        return
    results = load_result if isinstance(load_result, dict) else {None: load_result}
    for name, result in results.items():
        if not hasattr(result, "missing_keys"):
            report.fail(
                "bad_argument",
                f"load_result is {type(result).__name__}, which has no missing_keys.",
                "Pass what load_adapter returned; PeftModel.from_pretrained returns the model and only warns.",
            )
            continue
        missing = sorted(key for key in result.missing_keys if name is None or f".{name}." in f"{key}.")
        if missing:
            report.fail(
                "missing_keys",
                f"{len(missing)} adapter weights were not in the file and still have their initial values: {first_few(missing)}.",
                "The file was saved for another base, from a wrapped model, or with the adapter's name in its keys: "
                "run check_adapter_folder on it.",
            )
        if result.unexpected_keys:
            unexpected = sorted(result.unexpected_keys)
            report.fail(
                "unexpected_keys",
                f"{len(unexpected)} tensors of the file found no place in this model and were dropped: {first_few(unexpected)}.",
                "The adapter was trained on another architecture or a base with more layers, or its keys carry a name: run "
                "check_adapter_folder(folder, base).",
            )


def _check_wrappers(report, model, layers) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    if sum(isinstance(module, PeftModel) for module in model.modules()) > 1:
        report.fail(
            "nested_wrapper",
            "A PeftModel is wrapped in another one: get_peft_model or PeftModel.from_pretrained was called on a PeftModel. "
            "Weights are then looked for under doubled names, and saved under them.",
            "Load the base afresh and wrap it once; use model.load_adapter or model.add_adapter for a further adapter.",
        )
    # PEFT itself puts the wrappers of several stacked parameters of one module (target_parameters) into each other.
    inner = {name: getattr(layer, "base_layer", None) for name, layer in layers.items()}
    nested = [
        name
        for name, layer in layers.items()
        if isinstance(inner[name], BaseTunerLayer)
        and getattr(layer, "parameter_name", None) == getattr(inner[name], "parameter_name", None)
    ]
    if nested:
        report.fail(
            "nested_layers",
            f"Adapter layers are wrapped in adapter layers: {first_few(nested)}.",
            "Load the base afresh and put all adapters into it with one PeftModel.",
        )
    in_place = isinstance(model, PreTrainedModel) and layers and not getattr(model, "_hf_peft_config_loaded", False)
    if in_place:
        report.warn(
            "base_changed_in_place",
            "This is the base object, and it has adapter layers inside: PEFT puts them into the base itself, so calling "
            "it gives the adapter's output, not the base's.",
            "For the base's own output use `with peft_model.disable_adapter():`, or load a second copy.",
        )


def _check_state(report, model, layers, loaded, expect_active) -> list[str]:
    """Active, merged, enabled: the same in all layers, and as expected? Returns the active adapters' names."""
    from peft import PeftModel

    off = [name for name, layer in layers.items() if layer.disable_adapters]
    if 0 < len(off) < len(layers):
        report.fail(
            "partly_disabled",
            f"The adapters are switched off in {len(off)} of {len(layers)} layers: {first_few(off)}.",
            "Switch all on or off: model.base_model.enable_adapter_layers() or disable_adapter_layers().",
        )
    elif off and expect_active != []:
        report.fail(
            "adapters_disabled",
            "All adapters are switched off: the base alone answers.",
            "Leave the disable_adapter() block, or call model.base_model.enable_adapter_layers().",
        )

    ways: dict[tuple[str, ...], list[str]] = {}
    for name, layer in layers.items():
        ways.setdefault(tuple(layer.active_adapters), []).append(name)
    active = sorted(set(itertools.chain(*ways)))
    if len(ways) > 1:
        listed = "; ".join(f"{list(way)} in {first_few(names, 1)}" for way, names in ways.items())
        report.fail(
            "mixed_active",
            f"Different adapters are active in different layers: {listed}.",
            "Call set_adapter on the whole model, not on single layers.",
        )
    elif isinstance(model, PeftModel) and sorted(model.active_adapters) != active:
        report.fail(
            "wrapper_out_of_step",
            f"This PeftModel believes that {model.active_adapters} is active, but its layers use {active}: a second "
            "PeftModel was made on the same base, which changed the layers of both.",
            "Keep one PeftModel for a base and use load_adapter and set_adapter on it; or load the base twice.",
        )
    if not active and expect_active != []:
        report.fail(
            "none_active",
            f"No adapter is active, though {', '.join(loaded)} is loaded.",
            f"Call set_adapter({loaded[0]!r}).",
        )
    _check_expected_active(report, active, loaded, expect_active)

    for adapter in loaded:
        holders = [layer for layer in layers.values() if adapter in adapter_names(layer)]
        merged = [layer for layer in holders if adapter in layer.merged_adapters]
        if 0 < len(merged) < len(holders):
            report.fail(
                "partly_merged",
                f"{adapter!r} is merged into the base's weights in {len(merged)} of {len(holders)} layers only.",
                "Call unmerge_adapter(), then merge_adapter() again; if a merge failed midway, load the base afresh.",
            )
    silent = sorted(
        {
            adapter
            for layer in layers.values()
            for adapter in set(layer.active_adapters) & adapter_names(layer)
            if layer.merged_adapters and adapter not in layer.merged_adapters
        }
    )
    if silent:
        report.fail(
            "active_not_merged",
            f"{', '.join(silent)}: active but without effect, since another adapter is merged in the same layers, and a "
            "merged layer runs its base weights alone.",
            "Merge all active adapters, or call unmerge_adapter().",
        )
    return active


def _check_expected_active(report, active, loaded, expect_active) -> None:
    if expect_active is None:
        return
    if isinstance(expect_active, str):
        expect_active = [expect_active]
    if not isinstance(expect_active, (list, tuple, set)) or not all(isinstance(name, str) for name in expect_active):
        report.fail(
            "bad_argument",
            f"expect_active is {expect_active!r}, not a name or a list of names.",
            "Pass the names that you gave when loading, such as expect_active='reading'.",
        )
        return
    absent = sorted(set(expect_active) - set(loaded))
    if absent:
        report.fail(
            "not_loaded",
            f"{', '.join(absent)}: expected, but not loaded. Loaded: {', '.join(loaded)}.",
            "Load it with model.load_adapter(folder, adapter_name=...); without a name, from_pretrained calls it 'default'.",
        )
    elif expect_active and set(expect_active) != set(active):
        report.fail(
            "not_active",
            f"Active: {', '.join(active) or 'none'}; expected: {', '.join(expect_active)}.",
            "load_adapter does not activate what it loads: call set_adapter.",
        )


def _check_trainable(report, model, statuses, active, expect_trainable) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapter_weights = set()
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own = cast("torch.nn.Module", module).named_parameters()
            adapter_weights |= {id(p) for name, p in own if not name.startswith(("base_layer.", "original_module."))}
    biases_too = any(getattr(config, "bias", "none") != "none" for config in _configs(model).values())
    others = [(name, p) for name, p in model.named_parameters() if id(p) not in adapter_weights]
    base = [name for name, p in others if p.requires_grad and not (biases_too and name.endswith("bias"))]
    _report_base_trainable(report, base)

    for adapter in active:
        per_layer = [status.requires_grad[adapter] for status in statuses if adapter in status.requires_grad]
        frozen = [flag is False for flag in per_layer]
        if any(frozen) and not all(frozen):
            report.fail(
                "partly_trainable",
                f"{adapter!r} is frozen in {sum(frozen)} of {len(frozen)} layers and trainable in the others.",
                f"Call set_adapter({adapter!r}): it makes the whole adapter trainable.",
            )
        elif all(frozen) and expect_trainable is True:
            report.fail(
                "adapter_frozen",
                f"{adapter!r} is frozen, so training would change nothing.",
                "Load it with is_trainable=True, or call set_adapter, which makes it trainable. Call "
                "prepare_model_for_kbit_training before get_peft_model, as it freezes all that it finds.",
            )
        elif not all(frozen) and expect_trainable is False:
            report.fail(
                "adapter_trainable",
                f"{adapter!r} is trainable. PEFT's set_adapter and the end of disable_adapter() switch that on, also for "
                "an adapter that was loaded for inference.",
                f"Call set_adapter({adapter!r}, inference_mode=True).",
            )


def _report_base_trainable(report, names: list[str]) -> None:
    if names:
        report.fail(
            "base_trainable",
            f"{len(names)} weights of the base are trainable: {first_few(names)}. Training would change them, and saving the "
            "adapter would not save that.",
            "Freeze them (requires_grad_(False)), or name the module in modules_to_save if it should be trained.",
        )


def _check_base_name(report, model, base_name, base_revision) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    own_name = base_name or getattr(base, "name_or_path", None)
    own_revision = base_revision or getattr(config, "_commit_hash", None)
    for adapter, adapter_config in _configs(model).items():
        trained_on, revision = adapter_config.base_model_name_or_path, adapter_config.revision
        if trained_on and own_name and not same_base(trained_on, own_name):
            report.warn(
                "base_mismatch",
                f"{adapter!r} says that it was trained on {trained_on}, and this base is {own_name}.",
                "On another base an adapter loads without complaint if the shapes agree, and gives poor answers: "
                "load the base that it names.",
            )
        # A branch's name says nothing about a commit, so without base_revision only two commits can be compared.
        comparable = base_revision or re.fullmatch(r"[0-9a-f]{40}", revision or "")
        if revision and own_revision and comparable and revision != own_revision:
            report.warn(
                "base_revision",
                f"{adapter!r} was trained on revision {revision} of its base, and this base is revision {own_revision}.",
                f"Load the base with revision={revision!r}.",
            )


def _configs(model) -> dict:
    configs = getattr(model, "peft_config", None)
    return configs if isinstance(configs, dict) else {}
