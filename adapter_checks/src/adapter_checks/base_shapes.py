"""Does an adapter on disk fit a base? Compared by names and shapes on the meta device, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapter_checks import counting
from adapter_checks.model_folder import load_config
from adapter_checks.names import plain_name, same_base
from adapter_checks.report import first_few

if TYPE_CHECKING:
    import torch

    from adapter_checks.report import Report


def check_fit(report: Report, config: dict[str, Any], pairs: dict[str, dict[str, tuple[int, ...]]], base: Any) -> None:
    """Add findings on how `pairs` ({module: {"A": shape, "B": shape}}) and the base's layers go together."""
    try:
        model, name = meta_base(base)
    except Exception as error:
        report.fail(
            "bad_base",
            f"The base can't be read: {error}",
            "Pass the loaded model, its folder with config.json, or a transformers configuration.",
        )
        return
    layers = {
        plain_name(path): shapes
        for path, module in model.named_modules()
        if (shapes := in_out(module)) and ".lora_" not in path
    }
    _check_names(report, config, pairs, layers, model)
    wrong = []
    for module, pair in pairs.items():
        inside, outside = layers.get(plain_name(module), (None, None))
        if inside is None:
            continue
        expected = {"A": inside, "B": outside}
        found = {"A": pair["A"][1], "B": pair["B"][0]}
        wrong += [
            f"{plain_name(module)}: {'input' if factor == 'A' else 'output'} size expected {expected[factor]}, found "
            f"{found[factor]} (lora_{factor} is {pair[factor]})"
            for factor in "AB"
            if expected[factor] != found[factor]
        ]
    if wrong:
        report.fail(
            "shape_mismatch",
            f"{len(wrong)} tensors do not fit this base's layers: {first_few(wrong, 1)}.",
            "The adapter was trained on a base of another size: load the one that base_model_name_or_path names.",
        )
    trained_on = config.get("base_model_name_or_path")
    if trained_on and name and not same_base(trained_on, name):
        report.warn(
            "base_mismatch",
            f"The adapter says that it was trained on {trained_on}, and this base is {name}.",
            "If the shapes agree it loads without complaint and answers badly: load the base that it names.",
        )


def _check_names(report, config, pairs, layers, model) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    adapted = {plain_name(module) for module in pairs}
    absent = sorted(adapted - layers.keys())
    if absent:
        report.fail(
            "layer_not_in_base",
            f"{len(absent)} of the {len(adapted)} adapted layers do not exist in this base: {first_few(absent)}. PEFT drops "
            "their tensors without an error.",
            "This is another architecture, or one with fewer layers: load the base that the adapter was trained on.",
        )
    targets = config.get("target_modules")
    if not targets or config.get("layer_replication"):
        return
    choices = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    try:
        settings = LoraConfig(**{name: config[name] for name in choices if config.get(name) is not None})
        _maybe_include_all_linear_layers(settings, model)
        if isinstance(settings.target_modules, set):
            settings.target_modules = {plain_name(name) for name in settings.target_modules}
    except (TypeError, ValueError) as error:
        report.fail("bad_config", f"PEFT refuses the configuration: {error}.", "Save the adapter again.")
        return
    wanted = {name for name in layers if check_target_module_exists(settings, name)}
    names = [targets] if isinstance(targets, str) else sorted(targets)
    unknown = [] if isinstance(targets, str) and wanted else [n for n in names if not _ends_a_name(n, layers)]
    if unknown:
        own = sorted({name.rsplit(".", 1)[-1] for name in layers})
        report.fail(
            "target_not_in_base",
            f"This base has no layers named {first_few(unknown, 4)}. It has {first_few(own, 8)}.",
            "The adapter belongs to another architecture; for a new one choose target_modules among these names.",
        )
    uncovered = sorted(wanted - adapted)
    if uncovered:
        report.fail(
            "layers_not_covered",
            f"The adapter should sit on {len(wanted)} layers of this base and has no weights for {len(uncovered)} of them: "
            f"{first_few(uncovered)}. PEFT initialises A and B anew there"
            + (", both at random." if config.get("init_lora_weights") is False else ", B with zeros."),
            "This base has more layers than the one that the adapter was trained on, or the file is incomplete.",
        )


def _ends_a_name(target: str, layers) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in layers)


def meta_base(base: Any) -> tuple[torch.nn.Module, str | None]:
    """The base as a model, its weights on the meta device unless it was loaded already, and its name or path.

    base: the model, its folder, config.json or hub id, or its configuration. Raises InputError if it is none of these.
    """
    import torch
    import transformers

    if isinstance(base, torch.nn.Module):
        return base, getattr(base, "name_or_path", None)
    config = base if isinstance(base, transformers.PreTrainedConfig) else load_config(base)
    return counting.meta_model(config), config.name_or_path


def in_out(module: torch.nn.Module) -> tuple[int, int] | None:
    """What LoRA's A reads and what its B writes on this layer; None if LoRA does not go on such a layer."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        return module.in_channels, module.out_channels
    return None
