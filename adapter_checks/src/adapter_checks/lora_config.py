"""Does a LoRA configuration do what it says on this model? PEFT tries it on a copy without weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import HEADS
from adapter_checks.base_shapes import in_out, new_head, token_embedding
from adapter_checks.initialisation import changes_base, check_config
from adapter_checks.names import plain_name
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.training import bad_argument, check_rate

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

LARGEST_SCALING = 32  # the largest in use are those of rsLoRA with alpha = 2r: 32 at rank 256
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_MLP = re.compile(r"(gate|up|down|gate_up)_proj|w[123]|fc_?[12]|w[io]")


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
        check_rate(report, learning_rate, base)
    if not _check_numbers(report, lora_config):
        return report
    _check_task(report, lora_config, base)
    config = copy.deepcopy(lora_config)  # PEFT writes into it
    config.init_lora_weights = False  # OLoRA and its like need numbers, which the meta device does not have
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        skeleton = type(base)(copy.deepcopy(base.config))
        modules = dict(skeleton.named_modules())
        parameters = dict(skeleton.named_parameters())
        own = f"This model's layers: {first_few(_last_parts(_linear(modules)), 9)}."
        try:
            adapted = get_peft_model(skeleton, config)
        except Exception as error:
            is_pattern = isinstance(lora_config.target_modules, str)
            hint = (
                "A string is a pattern for a layer's whole name; for a part of it, give a list. " if is_pattern else ""
            )
            report.fail("refused", f"PEFT refuses it: {error}", f"{hint}{own}")
            return report
    layers: dict[str, Any] = {
        # of a layer on a parameter PEFT matches the parameter's name
        plain_name(name) + (f".{parameter}" if (parameter := getattr(layer, "parameter_name", None)) else ""): layer
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }
    _check_targets(report, lora_config, config, modules, layers, own)
    _check_patterns(report, lora_config, layers, own)
    _check_other_names(report, lora_config, modules, layers)
    _check_coverage(report, lora_config, modules, layers)
    _check_experts(report, lora_config, parameters, layers)
    _check_vocabulary(report, lora_config, base, layers)
    _check_head(report, base, adapted)
    smaller_sides = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    large = [f"{name} ({side})" for name, side in smaller_sides.items() if max(layers[name].r.values()) > side]
    if large:
        report.fail(
            "rank_too_large",
            f"The rank is above the smaller side of {len(large)} layers: {first_few(large)}.",
            "Choose a far lower one: no product BA has such a rank, and A and B cost more than the layer itself.",
        )
    check_config(report, base, layers, lora_config)
    _check_start(report, lora_config)
    scalings = sorted({round(value, 4) for layer in layers.values() for value in layer.scaling.values()})
    _check_scaling(report, lora_config, scalings)
    report.note(
        "lora", f"{len(layers)} layers would be adapted, with a scaling of {first_few(map('{:g}'.format, scalings))}."
    )
    return report


def _check_numbers(report, config) -> bool:
    """Whether PEFT can try it."""
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if any(type(rank) is not int or rank < 1 for rank in ranks):
        report.fail("bad_rank", f"The rank is {first_few(ranks)}, not a whole number of at least 1.", "Start with r=8.")
    dropout = config.lora_dropout
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        report.fail(
            "bad_dropout",
            f"lora_dropout is {dropout!r}. It is the share of the adapter's inputs that are set to 0 in training, and at 1 "
            "nothing is left to learn from.",
            "Take a share from 0 to below 1, such as 0.05.",
        )
    return report.ok or report.codes == ["bad_rate"]


def _linear(modules) -> list[str]:
    return [name for name, module in modules.items() if in_out(module)]


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _ends(name: str, part: str) -> bool:
    return f".{name}".endswith(f".{part}")


def _check_targets(report, given, converted, modules, layers, own) -> None:
    """Does each name in target_modules have an adapted layer? converted: what PEFT made of the given configuration."""
    targets = [] if isinstance(given.target_modules, str) else given.target_modules or []
    absent = [target for target in sorted(targets) if not any(_ends(name, target) for name in layers)]
    # PEFT renames what transformers has stacked to parameters since: such a name need not be a layer's.
    absent = [target for target in absent if target in converted.target_modules]
    nothing = [target for target in absent if not any(_ends(name, target) for name in modules)]
    if nothing:
        report.fail(
            "matches_nothing",
            f"No adapted layer matches {first_few(nothing, 4)}, and training goes on without it.",
            f"Correct target_modules. {own}",
        )
    if left_out := [target for target in absent if target not in nothing]:
        report.warn(
            "target_left_out",
            f"This model has layers named {first_few(left_out, 4)}, and none of them gets an adapter: exclude_modules, "
            "modules_to_save or layers_to_transform keeps them out.",
            "Name a layer in one place only.",
        )
    if converted.target_parameters and not given.target_parameters:
        everything = str(given.target_modules).lower() == "all-linear"
        moved = [
            name
            for name in _linear(modules)
            if name not in layers
            and (any(_ends(name, target) for target in targets) or (everything and re.search(r"\.\d+\.", name)))
        ]
        if moved:
            report.warn(
                "target_left_out",
                f"In this model PEFT turns target_modules into the experts' parameters ({first_few(sorted(converted.target_parameters))}), and "
                f"{len(moved)} linear layers of the same names get no adapter: {first_few(moved)}.",
                f"If they should learn, add target_parameters={[f'{name}.weight' for name in _last_parts(moved)]}.",
            )


def _check_patterns(report, config, layers, own) -> None:
    from peft.utils.other import get_pattern_key

    nothing, shadowed = [], []
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, setting) or {}
        used = {name: get_pattern_key(list(pattern), name) for name in layers}
        for key, value in pattern.items():
            matched = [name for name in layers if re.match(rf"(.*\.)?({key})$", name)]
            if not matched:
                nothing.append(key)
            elif all(used[name] != key and pattern[used[name]] != value for name in matched):
                shadowed.append(f"{key} in {setting} (by {used[matched[0]]})")
    if nothing:
        report.fail(
            "matches_nothing",
            f"No adapted layer matches {first_few(sorted(nothing), 4)}, and training goes on without it.",
            "Correct the pattern. It is matched with the names of adapted layers without base_model.model, from a dot on "
            f"or whole. {own}",
        )
    if shadowed:
        report.warn(
            "shadowed_pattern",
            f"Of the keys that match a layer PEFT takes the first, so these are without effect: {first_few(shadowed)}.",
            "Put the special key before the general one.",
        )


def _check_other_names(report, config, modules, layers) -> None:
    """Names in the other settings that no module bears: PEFT warns at most."""
    idle = []
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        idle += [] if any(re.fullmatch(excluded, name) for name in modules) else [f"exclude_modules={excluded!r}"]
    else:
        idle += [f"exclude_modules: {e}" for e in sorted(excluded) if not any(_ends(name, e) for name in modules)]
    heads = HEADS.get(config.task_type, ())  # PEFT writes all of these into the setting; a model has one of them
    idle += [
        f"modules_to_save: {entry}"
        for entry in sorted(config.modules_to_save or [])
        if entry not in heads and not any(name.endswith(entry) for name in modules)
    ]
    wanted = config.layers_to_transform
    wanted = [] if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    present = {int(number) for name in layers for number in re.findall(r"\.(\d+)\.", name)}
    idle += [f"layers_to_transform: {index}" for index in wanted if index not in present]
    if idle:
        report.warn(
            "without_effect",
            f"No layer of this model answers to {first_few(idle, 4)}, so that part of the configuration does nothing.",
            "Correct the name or the number, or leave it out.",
        )


def _check_coverage(report, config, modules, layers) -> None:
    """In how many of the model's blocks is there an adapted layer at all?"""
    import torch

    chosen = [config.target_modules, config.exclude_modules]
    texts = [text for entry in chosen for text in ([entry] if isinstance(entry, str) else entry or [])]
    # A number that stands for itself, as in layers\.[0-3], and not w1: the blocks were chosen on purpose.
    if config.layers_to_transform is not None or any(re.search(r"(?<![A-Za-z_\d])\d", text) for text in texts):
        return
    for path, blocks in modules.items():
        nested = any(isinstance(modules[outer], torch.nn.ModuleList) for outer in _parents(path))
        if not isinstance(blocks, torch.nn.ModuleList) or nested:
            continue
        reached = {name.removeprefix(f"{path}.").split(".")[0] for name in layers if name.startswith(f"{path}.")}
        if not 0 < len(reached) <= len(blocks) / 2:
            continue
        others = [
            name
            for name in _linear(modules)
            if name.startswith(f"{path}.") and name.removeprefix(f"{path}.").split(".")[0] not in reached
        ]
        report.warn(
            "few_layers",
            f"target_modules matches something in {len(reached)} of the {len(blocks)} layers of {path} only "
            f"({len(reached) / len(blocks):.0%}), and the others stay as they are. Their linear layers are called "
            f"{first_few(_last_parts(others), 9)}.",
            "Add those that should learn to target_modules, or take target_modules='all-linear'.",
        )


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _check_experts(report, config, parameters, layers) -> None:
    """Experts that are stacked in one parameter are no linear layers, so target_modules does not reach them."""
    experts = [name for name, weight in parameters.items() if weight.ndim == 3 and "expert" in name]
    if not experts or any(name in layers for name in experts):
        return
    targets = config.target_modules or []
    whole_mlps = {name.rsplit(".", 2)[0] for name in experts}
    meant = (
        any(_MLP.fullmatch(target.rpartition(".")[2]) for target in targets if not isinstance(targets, str))
        or str(targets).lower() == "all-linear"
        or any(name.rpartition(".")[0].startswith(mlp) for name in layers for mlp in whole_mlps)
    )
    if meant:
        share = sum(parameters[name].numel() for name in experts) / sum(p.numel() for p in parameters.values())
        suffixes = sorted({".".join(name.split(".")[-2:]) for name in experts})
        report.warn(
            "experts_frozen",
            f"The experts, {share:.0%} of the model's parameters, lie in stacked tensors and not in linear layers. "
            "target_modules does not reach them, and they stay as they are.",
            f"If they should learn, add target_parameters={suffixes} and leave lora_dropout at 0.",
        )


def _check_vocabulary(report, config, base, layers) -> None:
    embedding, head = token_embedding(base), base.get_output_embeddings()
    text_config = base.config.get_text_config()
    ends = [module for module in (embedding, head) if module is not None]
    shared = {plain_name(name) for name, module in base.named_modules() if module in ends}
    if getattr(text_config, "tie_word_embeddings", False) and (found := sorted(shared & layers.keys())):
        report.warn(
            "tied_head",
            f"The embedding and the output head of this model are one matrix, and an adapter would sit on "
            f"{first_few(found)}: merged into that matrix, it changes the other one, too.",
            "Name them in modules_to_save instead, or never merge this adapter.",
        )
    given = config.trainable_token_indices or []
    tables = given if isinstance(given, dict) else {"": given}
    outside = []
    for table, indices in tables.items():
        module = next((module for name, module in base.named_modules() if table and _ends(name, table)), embedding)
        if module is None:  # a model that reads no tokens
            continue
        rows = getattr(module, "num_embeddings", None) or module.weight.shape[0]
        outside += [f"{index} (of {rows} rows)" for index in indices if not 0 <= index < rows]
    if outside:
        report.fail(
            "token_outside",
            f"trainable_token_indices names tokens beyond the embedding: {first_few(outside)}.",
            "Call model.resize_token_embeddings(len(tokenizer)) after adding tokens, and before get_peft_model.",
        )


def _task(base) -> str | None:
    """The task type of this class of models, where its name tells."""
    return next((task for ending, task in _TASKS.items() if type(base).__name__.endswith(ending)), None)


def _check_task(report, config, base) -> None:
    given, expected = getattr(config.task_type, "value", config.task_type), _task(base)
    if given and expected and given != expected:
        report.warn(
            "wrong_task_type",
            f"task_type is {given}, and a {type(base).__name__} is for {expected}: PEFT wraps the model for the other task, and takes "
            "the heads of that task for the ones to train.",
            f"Set task_type={expected!r}.",
        )


def _check_head(report, base, adapted) -> None:
    """A head that is new is trained and saved only if modules_to_save or the task type says so."""
    tuned, unsaved = adapted.get_base_model(), []
    for name in new_head(base):
        weights = [key for key, _ in tuned.get_submodule(name).named_parameters()]
        if not all(re.search(r"(^|\.)(modules_to_save|original_module)\.", key) for key in weights):
            unsaved.append(name)
    if unsaved:
        by_task = set(unsaved) <= set(HEADS.get(_task(base) or "", ()))
        report.warn(
            "head_not_saved",
            f"{first_few(unsaved)} of this {type(base).__name__} is neither trained whole nor saved with the adapter. A new head begins "
            "at random, and at another random place at each loading.",
            f"Add modules_to_save={unsaved}{f', or set task_type={_task(base)!r}' if by_task else ''}. A head that the base was "
            "trained with may stay as it is.",
        )


def _check_start(report, config) -> None:
    if config.init_lora_weights is False:
        report.warn(
            "random_start",
            "init_lora_weights is False, so A and B both begin at random: the model is another one at step 0, and whatever a "
            "later loading does not find in the file is random, too.",
            "Leave it out, unless you test something: LoRA begins with B = 0.",
        )
    if changes_base(config):
        report.note(
            "changes_base",
            f"The initialisation {config.init_lora_weights!r} changes the base's weights when the adapter is made and at each loading. "
            "Convert it to plain LoRA when you save it (path_initial_model_for_weight_conversion).",
        )
    if config.inference_mode:
        report.warn(
            "inference_mode",
            "inference_mode is True, as in each configuration that PEFT has saved: get_peft_model freezes the adapter, and training "
            "changes nothing.",
            "For training set inference_mode=False; to go on with a saved adapter use from_pretrained(..., is_trainable=True).",
        )


def _check_scaling(report, config, scalings) -> None:
    if config.lora_alpha <= 0 or (config.lora_alpha <= 4 and scalings[0] < 0.25):
        report.add(
            "warn" if config.lora_alpha > 0 else "fail",
            "small_scaling",
            f"lora_alpha={config.lora_alpha} gives a scaling of {scalings[0]:g}, since alpha is divided by the rank.",
            "For a scaling of 2 set lora_alpha to 2 * r.",
        )
    if scalings[-1] > LARGEST_SCALING:
        report.warn(
            "large_scaling",
            f"The scaling is up to {scalings[-1]:g}: each step of training moves the output that many times further than at 1, and "
            "it is likely to diverge.",
            "For a scaling of 2 set lora_alpha to 2 * r, or with use_rslora to 2 * √r.",
        )
