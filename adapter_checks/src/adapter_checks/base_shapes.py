"""Does an adapter on disk fit a base? PEFT puts the adapter on a copy of the base without weights, and names and shapes are compared."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import CONFIG, HEADS
from adapter_checks.counting import without_weights
from adapter_checks.errors import InputError
from adapter_checks.model_classes import model_classes
from adapter_checks.model_folder import load_config, read_json
from adapter_checks.names import plain_name, same_base
from adapter_checks.report import first_few
from adapter_checks.safetensors_header import read_safetensors_header
from adapter_checks.vocabulary import check_vocabulary, report_other_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from adapter_checks.report import Report

    Shapes = dict[str, tuple[int, ...]]
    Pairs = dict[str, Shapes]

# The settings that decide which layers get an adapter, and the shapes of its tensors.
_DECIDES = (
    "task_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "target_parameters", "layer_replication", "fan_in_fan_out", "ensure_weight_tying",
    "use_qalora", "qalora_group_size", "use_bdlora",
)  # fmt: skip
# Classes whose head no pretraining knows: it begins at random unless the checkpoint was saved from the same class.
_NEW_HEAD = re.compile(r"Classification|QuestionAnswering|MultipleChoice|ForCTC")


def check_fit(
    report: Report,
    config: dict[str, Any],
    pairs: Pairs,
    shapes: Shapes,
    folder: Path,
    base: Any,
    *,
    factors_are_whole: bool,
) -> None:
    """Add findings on how an adapter and the base go together.

    pairs              {module: {"A": shape, "B": shape}}
    shapes             {name: shape} of all tensors in the file
    folder             the adapter's: its tokenizer is compared as well, if it has one
    factors_are_whole  if not, their shapes are known to be wrong and only names are compared
    """
    if not (read := meta_base_or_finding(report, base, config, pairs)):
        return
    model, name = read
    pairs = _as_loaded(pairs, model, config)
    layers = {path: sizes for path, module in model.named_modules() if (sizes := in_out(module))}
    tables = _tables(model)
    check_vocabulary(report, config, shapes, pairs, folder, tables, name)
    _check_head(report, config, model, shapes)
    try:
        wanted = _injected(model, config)
    except ValueError as error:  # PEFT finds nothing to adapt, or refuses
        wanted = {}
        if any(_ends_a_name(target, layers) for target in _listed(config)):
            report.fail("bad_config", f"PEFT refuses the configuration: {error}.", "Save the adapter again.")
            return
    _check_names(report, config, pairs, wanted, layers, tables)
    if factors_are_whole:
        _check_shapes(report, config, pairs, wanted, tables)
    trained_on = config.get("base_model_name_or_path")
    if trained_on and name and not same_base(trained_on, name):
        report.warn(
            "base_mismatch",
            f"The adapter says that it was trained on {trained_on}, and this base is {name}.",
            "If the shapes agree it loads without complaint and answers badly: load the base that it names.",
        )


def _tables(model) -> dict[str, int]:
    """Path and rows of the embedding and the output head: the layers that grow when tokens are added."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # a model of images, or none of transformers
            continue
    return {
        path: len(module.weight)
        for path, module in model.named_modules()
        if any(module is end for end in ends) and getattr(module, "weight", None) is not None
    }


def new_head(model: torch.nn.Module) -> list[str]:
    """The parts of a classifier's head, of which the base's checkpoint knows nothing; empty for other models.

    A model whose configuration names its own class was saved as such, with its head.
    """
    kind, backbone = type(model).__name__, str(getattr(model, "base_model_prefix", ""))
    known = getattr(getattr(model, "config", None), "architectures", None) or ()
    if not _NEW_HEAD.search(kind) or not hasattr(model, backbone) or kind in known:
        return []
    return [name for name, part in model.named_children() if name != backbone and any(True for _ in part.parameters())]


def _check_head(report, config, model, shapes) -> None:
    said = {
        *(config.get("modules_to_save") or ()),
        *HEADS.get(config.get("task_type"), ()),
    }  # missing_tensors tells of those
    unsaved = [
        part
        for part in new_head(model)
        if not any(part.endswith(name) for name in said)
        and not any(name.startswith(f"base_model.model.{part}.") and ".lora_" not in name for name in shapes)
    ]
    if unsaved:
        report.warn(
            "head_not_saved",
            f"The file has no weights for {first_few(unsaved)} of this {type(model).__name__}. A new head begins at random, so each "
            "loading gives another classifier.",
            f"Train again with modules_to_save={unsaved} or the task type. If the base's own checkpoint holds the trained head, "
            "all is well.",
        )


def report_partial_shards(report: Report, what: str, more: str = "") -> None:
    """what: which part the file holds, in a sentence; more: another remedy."""
    report.fail(
        "partial_shards",
        what,
        "Gather before saving (FSDP: FULL_STATE_DICT, or accelerator.get_state_dict). The other parts may still be in the "
        f"checkpoint's folder.{more}",
    )


def _tensor_parallel(pairs, wanted) -> str:
    """What part is left where each layer is short of its outputs or else of its inputs, all by one factor: "half", say; else ""."""
    cuts = set()
    for module in pairs.keys() & wanted.keys():
        found, whole = ((pair["A"][1:], pair["B"][:1]) for pair in (pairs[module], wanted[module]))
        shares = [
            full[0] / part[0] if len(full) == len(part) == 1 else 0 for full, part in zip(whole, found) if full != part
        ]
        cuts.add(shares[0] if len(shares) == 1 else 0)
    share = cuts.pop() if len(cuts) == 1 else 0
    return f"a {share:.0f}th" if share > 2 and share == int(share) else "half" if share == 2 else ""


def _check_shapes(report, config, pairs, wanted, tables) -> None:
    stacked = bool(config.get("target_parameters"))
    wrong, vocabulary = [], []
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
                if expected == [tables.get(module)]:
                    vocabulary.append((module, found[0]))
    if wrong and len(wrong) == len(vocabulary):
        report_other_vocabulary(report, vocabulary, tables)
    elif wrong and not stacked and (part := _tensor_parallel(pairs, wanted)):
        report_partial_shards(
            report,
            f"In each layer either the inputs of A or the outputs of B are {part} of this base's: {wrong[0]}. The layers lay in parts on "
            "several processes (tensor parallelism), and the file holds one process's part.",
            " If it was trained in one process, this is another base: load the one that base_model_name_or_path names.",
        )
    elif wrong:
        report.fail(
            "shape_mismatch",
            f"{len(wrong)} tensors do not fit this base's layers: {first_few(wrong, 1)}.",
            "The adapter was trained on a base of another size: load the one that base_model_name_or_path names.",
        )


def _check_names(report, config, adapted, wanted, layers, tables) -> None:
    absent = sorted(adapted.keys() - wanted.keys())
    strange = [module for module in absent if module not in layers]
    uncovered = wanted.keys() - adapted.keys()
    prefixes = _other_prefix(strange, adapted, layers, tables)
    if prefixes:
        theirs, own = prefixes
        rename = (
            f"replace {theirs!r} by {own!r} in the tensors' names after base_model.model."
            if theirs and own
            else f"{f'take {theirs!r} off' if theirs else f'put {own!r} before'} the tensors' names, after base_model.model."
        )
        report.fail(
            "other_prefix",
            f"The names differ from this base's by their beginning only: {len(strange)} adapted layers are called {strange[0]} and the "
            f"like, and this base has {own}{strange[0].removeprefix(theirs)}. PEFT finds no place for them, and the base answers alone.",
            "Load the class of model that the adapter was trained on (a text model alone is called otherwise than in a model "
            f"that sees or hears, and an encoder otherwise than in a classifier), or {rename}",
        )
        uncovered = uncovered - {own + module.removeprefix(theirs) for module in strange}
    elif strange:
        report.fail(
            "layer_not_in_base",
            f"{len(strange)} of the {len(adapted)} adapted layers do not exist in this base: {first_few(strange)}. PEFT drops "
            "their tensors without an error.",
            "This is another architecture, or one with fewer layers: load the base that the adapter was trained on.",
        )
    if wanted:
        _report_not_targeted(report, [module for module in absent if module in layers])
    targets = _listed(config)
    unknown = [target for target in targets if not _ends_a_name(target, layers)]
    if unknown and not wanted and not prefixes:
        own_names = sorted({name.rsplit(".", 1)[-1] for name in layers})
        report.fail(
            "target_not_in_base",
            f"This base has no layers named {first_few(unknown, 4)}. It has {first_few(own_names, 8)}.",
            "The adapter belongs to another architecture; for a new one choose target_modules among these names.",
        )
    if uncovered:
        report.fail(
            "layers_not_covered",
            f"The adapter should sit on {len(wanted)} layers of this base and has no weights for {len(uncovered)} of them: "
            f"{first_few(sorted(uncovered))}. PEFT initialises A and B anew there"
            + (", both at random." if config.get("init_lora_weights") is False else ", B with zeros."),
            "This base has more layers than the one that the adapter was trained on, or the file is incomplete.",
        )


def _other_prefix(strange: list[str], adapted: Pairs, layers, tables) -> tuple[str, str] | None:
    """(beginning in the file, beginning in the base) if that is all by which the names of `strange` differ from layers of the base."""
    found = {}
    parts = strange[0].split(".") if strange else []
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        if not re.search(r"\.\d+\.", f".{tail}"):
            break
        for name in layers:
            if not _ends_a_name(tail, [name]):
                continue
            theirs, own = strange[0].removesuffix(tail), name.removesuffix(tail)
            if all(module.startswith(theirs) and own + module.removeprefix(theirs) in layers for module in strange):
                misfits = sum(
                    (adapted[module]["A"][-1:], adapted[module]["B"][:1])
                    != tuple((size,) for size in layers[own + module.removeprefix(theirs)])
                    for module in strange
                )
                # Of two towers with layers alike, the text's is meant: the one that the embedding lies in.
                found[theirs, own] = (misfits, not any(path.startswith(own) for path in tables))
    return min(found, key=found.__getitem__) if found else None


def check_targets(report: Report, config: dict[str, Any], pairs: Pairs) -> None:
    """Without the base: are there tensors of layers that the configuration doesn't name?"""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = config.get("target_modules")
    elsewhere = ("target_parameters", "layer_replication", "ensure_weight_tying")  # these say more than the names do
    if not targets or str(targets).lower() == "all-linear" or any(config.get(name) for name in elsewhere):
        return
    choices = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    try:
        settings = LoraConfig(**{name: config[name] for name in choices if config.get(name) is not None})
    except (TypeError, ValueError) as error:
        report.fail("bad_config", f"PEFT refuses the configuration: {error}.", "Save the adapter again.")
        return
    # A name with .base_layer lies inside a layer that PEFT took apart.
    names = [plain_name(module) for module in pairs if ".base_layer" not in module]
    _report_not_targeted(report, [name for name in names if not check_target_module_exists(settings, name)])


def _report_not_targeted(report, modules) -> None:
    if modules:
        report.fail(
            "not_targeted",
            f"The file has tensors for {len(modules)} layers that the configuration does not target: {first_few(modules)}. PEFT "
            "drops them without an error.",
            "Configuration and weights come from two different runs, or target_modules was edited: restore it.",
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


def meta_base_or_finding(
    report: Report, base: Any, adapter: dict[str, Any], modules: Any = ()
) -> tuple[torch.nn.Module, str | None] | None:
    """What `meta_base` gives, or None with a finding that the base can't be read."""
    try:
        return meta_base(base, adapter, modules)
    except Exception as error:
        report.fail(
            "bad_base",
            f"The base can't be read: {error}",
            "Pass the loaded model, its folder with config.json, or a transformers configuration.",
        )
        return None


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


def load_base(base: Path, adapter: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The base in a folder as the adapter in another was trained on it: of that class, and with as many labels as a new head has."""
    config, shapes = read_json(adapter / CONFIG), read_safetensors_header(adapter / "adapter_model.safetensors")
    model: Any = meta_base(base, config, {name.rpartition(".lora_")[0] for name in shapes if ".lora_" in name})[0]
    heads = "|".join(HEADS.get(config.get("task_type") or "", ()))
    labels = [
        shape[0]
        for name, (_, shape) in shapes.items()
        if shape and re.search(rf"\.({heads})(\.out_proj)?\.weight$", name)
    ]
    options: Any = {}
    if heads and labels and labels[0] != model.config.num_labels:
        options = {"num_labels": labels[0], "ignore_mismatched_sizes": True}
    return type(model).from_pretrained(base, dtype=dtype, use_safetensors=True, **options)


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


def token_embedding(model: Any) -> torch.nn.Embedding | None:
    """The base's embedding of tokens, inside an adapter if one sits on it; None in a model that has none, or several."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    while isinstance(found, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        found = found.get_base_layer() if isinstance(found, BaseTunerLayer) else found.original_module
    return found if isinstance(found, torch.nn.Embedding) else None
