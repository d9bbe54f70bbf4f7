"""Does an adapter on disk fit a base? PEFT puts the adapter on a copy of the base without weights, and names and shapes are compared."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import HEADS
from adapter_checks.counting import without_weights
from adapter_checks.errors import InputError
from adapter_checks.model_classes import model_classes
from adapter_checks.model_folder import load_config
from adapter_checks.names import plain_name, same_base
from adapter_checks.report import first_few

if TYPE_CHECKING:
    import torch

    from adapter_checks.report import Report

    Pairs = dict[str, dict[str, tuple[int, ...]]]

# The settings that decide which layers get an adapter, and the shapes of its tensors.
_DECIDES = (
    "task_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "target_parameters", "layer_replication", "fan_in_fan_out", "ensure_weight_tying",
    "use_qalora", "qalora_group_size", "use_bdlora",
)  # fmt: skip


def check_fit(report: Report, config: dict[str, Any], pairs: Pairs, base: Any) -> None:
    """Add findings on how `pairs` ({module: {"A": shape, "B": shape}}) and the base's layers go together."""
    try:
        model, name = meta_base(base, config, pairs)
    except Exception as error:
        report.fail(
            "bad_base",
            f"The base can't be read: {error}",
            "Pass the loaded model, its folder with config.json, or a transformers configuration.",
        )
        return
    pairs = _as_loaded(pairs, model, config)
    layers = {path: shapes for path, module in model.named_modules() if (shapes := in_out(module))}
    try:
        wanted = _injected(model, config)
    except ValueError as error:  # PEFT finds nothing to adapt, or refuses
        wanted = {}
        if any(_ends_a_name(target, layers) for target in _listed(config)):
            report.fail("bad_config", f"PEFT refuses the configuration: {error}.", "Save the adapter again.")
            return
    _check_names(report, config, pairs, wanted, layers)
    stacked = bool(config.get("target_parameters"))
    wrong = []
    for module, pair in pairs.items():
        if module not in wanted:
            continue
        # The rank is not the base's matter; stacked experts hold rank times the number of experts.
        for factor, rank in (("A", slice(0, 1)), ("B", slice(1, 2))):
            found, expected = list(pair[factor]), list(wanted[module][factor])
            if not stacked:
                del found[rank], expected[rank]
            if found != expected:
                side = "input" if factor == "A" else "output"
                sizes = [shape[0] if len(shape) == 1 else tuple(shape) for shape in (expected, found)]
                wrong.append(
                    f"{module}: {side} size expected {sizes[0]}, found {sizes[1]} (lora_{factor} is {pair[factor]})"
                )
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


def _check_names(report, config, adapted, wanted, layers) -> None:
    absent = sorted(adapted.keys() - wanted.keys())
    strange = [module for module in absent if module not in layers]
    if strange:
        report.fail(
            "layer_not_in_base",
            f"{len(strange)} of the {len(adapted)} adapted layers do not exist in this base: {first_few(strange)}. PEFT drops "
            "their tensors without an error.",
            "This is another architecture, or one with fewer layers: load the base that the adapter was trained on.",
        )
    uncovered = sorted(wanted.keys() - adapted.keys())
    targets = _listed(config)
    unknown = [target for target in targets if not _ends_a_name(target, layers)]
    if unknown and not wanted:
        own = sorted({name.rsplit(".", 1)[-1] for name in layers})
        report.fail(
            "target_not_in_base",
            f"This base has no layers named {first_few(unknown, 4)}. It has {first_few(own, 8)}.",
            "The adapter belongs to another architecture; for a new one choose target_modules among these names.",
        )
    if uncovered:
        report.fail(
            "layers_not_covered",
            f"The adapter should sit on {len(wanted)} layers of this base and has no weights for {len(uncovered)} of them: "
            f"{first_few(uncovered)}. PEFT initialises A and B anew there"
            + (", both at random." if config.get("init_lora_weights") is False else ", B with zeros."),
            "This base has more layers than the one that the adapter was trained on, or the file is incomplete.",
        )


def _listed(config) -> list[str]:
    targets = config.get("target_modules") or []
    return [targets] if isinstance(targets, str) else sorted(targets)


def _ends_a_name(target: str, layers) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in layers)


def _injected(model: torch.nn.Module, config: dict[str, Any]) -> Pairs:
    """{module: {"A": shape, "B": shape}} of the adapter that PEFT makes on this base by this configuration; `model` is used up.

    Raises ValueError, of PEFT's own words, if it makes none.
    """
    import torch
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    settings = {name: copy.deepcopy(config[name]) for name in _DECIDES if config.get(name) is not None}
    # As PEFT's classes for these tasks do; of those classes some ask for more than a model without weights has.
    if heads := HEADS.get(settings.pop("task_type", None)):
        settings["modules_to_save"] = [*settings.get("modules_to_save", ()), *heads]
    settings["init_lora_weights"] = False  # others need the base's numbers
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        try:
            adapted = PeftModel(model, LoraConfig(**settings))
        except Exception as error:
            raise ValueError(str(error)) from error
    shapes: Pairs = {}
    for path, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            kinds = (layer.lora_A, layer.lora_B) if "default" in layer.lora_A else (layer.lora_embedding_A, layer.lora_embedding_B)  # fmt: skip
            factors: Any = [getattr(kind["default"], "weight", kind["default"]) for kind in kinds]
            shapes[_inside(path)] = {part: tuple(factor.shape) for part, factor in zip("AB", factors)}
    return shapes


def _as_loaded(pairs: Pairs, model: torch.nn.Module, config: dict[str, Any]) -> Pairs:
    """The modules and shapes that PEFT makes of those in the file: it follows what transformers renamed and stacked since."""
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    tensors = {
        f"base_model.model.{_inside(module)}.lora_{factor}.weight": torch.empty(shape, device="meta")
        for module, pair in pairs.items()
        for factor, shape in pair.items()
    }
    try:
        tensors = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    except Exception:  # names or shapes that it can't stack: as they stand they will not fit
        pass
    loaded: Pairs = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        loaded.setdefault(_inside(module), {})[factor] = tuple(tensor.shape)
    return {module: pair for module, pair in loaded.items() if pair.keys() == {"A", "B"}}


def _inside(name: str) -> str:
    """A module's name inside PeftModel. Wrappers of stacked experts sit in each other, so `.base_layer` counts here."""
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    return name


def meta_base(base: Any, adapter: dict[str, Any], modules: Any = ()) -> tuple[torch.nn.Module, str | None]:
    """The base as a plain model on the meta device, and its name or path.

    base     the model, its folder, config.json or hub id, or its configuration
    adapter  the adapter's configuration
    modules  names of the layers that its file has tensors for: of the classes that such a base may be loaded with, the
             first that has most of them is taken, since nothing else tells an encoder from a model around it

    Raises InputError if `base` is none of these.
    """
    import torch
    import transformers

    if isinstance(base, torch.nn.Module):
        return _copy_without_weights(base), getattr(base, "name_or_path", None)
    config = base if isinstance(base, transformers.PreTrainedConfig) else load_config(base)
    mapping = adapter.get("auto_mapping") or {}
    kinds = model_classes(config, adapter.get("task_type"), mapping.get("base_model_class"))
    wanted, best, missing = {plain_name(module) for module in modules}, None, None
    for kind in kinds:
        model = without_weights(kind, config)
        lacking = len(wanted - {name for name, _ in model.named_modules()})
        if missing is None or lacking < missing:
            best, missing = model, lacking
        if not missing:
            break
    if best is None:
        raise InputError(f"No model of transformers is made from a {type(config).__name__}.")
    return best, config.name_or_path


def _copy_without_weights(model: torch.nn.Module) -> torch.nn.Module:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, PreTrainedModel):
        return without_weights(type(model), model.config)
    numbers = [*model.parameters(), *model.buffers()]
    empty = {id(tensor): torch.nn.Parameter(tensor.detach().to("meta"), requires_grad=False) for tensor in numbers}
    return copy.deepcopy(model, empty)


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
