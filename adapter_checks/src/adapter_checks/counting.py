"""How many parameters a LoRA adapter trains, from two configs alone: no weight is made and none is downloaded."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapter_checks.errors import InputError
from adapter_checks.model_classes import model_classes

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclasses.dataclass(frozen=True)
class ModuleCount:
    """One adapted layer: A has the shape (rank, in_features), B (out_features, rank)."""

    name: str
    in_features: int
    out_features: int
    rank: int

    @property
    def parameters(self) -> int:
        """Numbers in A and B together: r(d_in + d_out), against d_in * d_out in the layer (LoRA paper, section 4)."""
        return self.rank * (self.in_features + self.out_features)


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """What PEFT would train: `adapter` in A and B, `biases` of the base's own; `base` are all of the base's parameters."""

    adapter: int
    biases: int
    base: int
    modules: tuple[ModuleCount, ...]

    @property
    def trainable(self) -> int:
        return self.adapter + self.biases

    @property
    def share(self) -> float:
        """Trained part of all parameters, from 0 to 1, the adapter's own among them, as PEFT prints it in percent."""
        return self.trainable / (self.base + self.adapter)

    def __str__(self):
        layers = "layer" if len(self.modules) == 1 else "layers"
        return (
            f"{self.trainable:,} of {self.base + self.adapter:,} parameters are trained ({self.share:.4%}), "
            f"in {len(self.modules)} adapted {layers}"
        )


def count_lora_parameters(config: PreTrainedConfig, lora_config: LoraConfig) -> ParameterCount:
    """Count what `get_peft_model` would train, from the configs of a model and of an adapter.

    config: the config of a transformers model; lora_config: a `peft.LoraConfig`. A layer of d_in inputs and d_out
    outputs gets r(d_in + d_out) parameters; which layers, and which r, is decided by PEFT's own rules. Neither config
    is changed.

    Raises InputError where PEFT would refuse (rank below 1, no layer matches, ...), and for what trains other
    tensors than A, B and biases (DoRA, modules_to_save, ...), which are not counted here.
    """
    model = meta_model(config, getattr(lora_config, "task_type", None))
    modules = adapted_layers(model, lora_config)
    return ParameterCount(
        adapter=sum(module.parameters for module in modules),
        biases=sum(bias.numel() for bias in trained_biases(model, lora_config, modules)),
        base=sum(parameter.numel() for parameter in model.parameters()),
        modules=modules,
    )


def meta_model(
    config: PreTrainedConfig, task_type: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that `config` describes, on torch's meta device: every name and shape, no memory for the numbers.

    Its class is that of the task type, else the one that the config names, else the one with a language model's head.
    dtype: of its parameters, a torch.dtype; None is the config's own, else float32.

    Raises InputError if `config` is not a config of a transformers model, or no model can be built from it.
    """
    import transformers

    if not isinstance(config, transformers.PreTrainedConfig):
        raise InputError(
            f"A model's config was expected here and not {type(config).__name__}: "
            "take model.config, or AutoConfig.from_pretrained(...)."
        )
    kind = next(iter(model_classes(config, task_type)), None)
    if kind is None:
        raise InputError(f"No model of transformers is made from a {type(config).__name__}.")
    return without_weights(kind, config, dtype)


def without_weights(
    kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of this class on the meta device. Raises InputError if the configuration describes none."""
    import torch

    config = copy.deepcopy(config)  # building a model writes into its config
    try:
        with torch.device("meta"):
            return kind._from_config(config, dtype=dtype or config.dtype)
    except Exception as error:  # whatever a config with impossible numbers makes the model's code raise
        raise InputError(f"No model can be built from this {type(config).__name__}: {error}") from error


# Fields of LoraConfig that add tensors to A and B or change their shapes; the variants such as DoRA mark themselves.
_OTHER_TENSORS = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias",
    "ensure_weight_tying", "use_qalora", "megatron_config",
)  # fmt: skip
_TASKS_WITH_A_NEW_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def _refuse_what_is_not_counted(lora_config) -> None:
    from peft import LoraConfig, PeftType

    if not isinstance(lora_config, LoraConfig) or lora_config.peft_type != PeftType.LORA:
        raise InputError(f"lora_config must be a peft.LoraConfig and not {type(lora_config).__name__}.")
    variants = [field.name for field in dataclasses.fields(lora_config) if field.metadata.get("is_lora_variant")]
    used = [name for name in (*_OTHER_TENSORS, *variants) if getattr(lora_config, name)]
    if lora_config.init_lora_weights in ("eva", "mica"):
        used.append(f"init_lora_weights={lora_config.init_lora_weights!r}")
    if lora_config.task_type in _TASKS_WITH_A_NEW_HEAD:
        used.append(
            f"task_type {getattr(lora_config.task_type, 'value', lora_config.task_type)}, which trains the head as well"
        )
    if used:
        raise InputError(
            f"Only A, B and biases are counted here, and this LoraConfig asks for more: {', '.join(used)}. Leave it out, "
            "or ask the real model: get_peft_model(model, lora_config).print_trainable_parameters()."
        )


def adapted_layers(model: torch.nn.Module, lora_config: LoraConfig) -> tuple[ModuleCount, ...]:
    """The layers of `model` that PEFT would adapt, in the model's order, each with its rank; nothing is changed.

    Raises InputError like `count_lora_parameters`.
    """
    _refuse_what_is_not_counted(lora_config)
    lora_config = copy.deepcopy(lora_config)  # PEFT's functions write the targets that they find into it
    try:
        return tuple(_match(model, lora_config))
    except (ValueError, re.error) as error:
        raise InputError(f"PEFT refuses this LoraConfig: {error}") from error


def _match(model, lora_config):
    import torch
    from peft.tuners import tuners_utils
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from peft.utils.other import get_pattern_key
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.pytorch_utils import Conv1D

    # The steps of PEFT's `BaseTuner.inject_adapter`, in its order and with its functions.
    convert_peft_config_for_transformers(lora_config, model, conversions=None)
    if lora_config.target_parameters:
        raise InputError("Here PEFT adapts the experts' own parameters (target_parameters), which are not counted.")
    if lora_config.target_modules is None:
        lora_config.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
    wanted = lora_config.target_modules
    tuners_utils._maybe_include_all_linear_layers(lora_config, model)
    found = False
    for name, module in model.named_modules():
        if not name or not tuners_utils.check_target_module_exists(lora_config, name):
            continue
        found = True
        tuners_utils._check_lora_target_modules_mamba(lora_config, model, name.rpartition(".")[2])
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding, Conv1D)):
            raise InputError(
                f"target_modules match {name}, a {type(module).__name__}; only linear, Conv1D and embedding layers are counted."
            )
        rank = lora_config.rank_pattern.get(get_pattern_key(lora_config.rank_pattern, name), lora_config.r)
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"The rank of {name} is {rank}; it must be a whole number of at least 1.")
        # GPT-2's Conv1D and an embedding keep their weight as (in, out), a linear layer as (out, in).
        in_features, out_features = (
            module.weight.shape[::-1] if isinstance(module, torch.nn.Linear) else module.weight.shape
        )
        if rank > min(in_features, out_features) and lora_config.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                f"init_lora_weights={lora_config.init_lora_weights!r} takes A and B from the weight of {name}, which has "
                f"{min(in_features, out_features)} directions and not {rank}. Lower the rank."
            )
        yield ModuleCount(name, in_features, out_features, rank)
    if not found:
        linear = (name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
        called = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        hint = (
            " A string is a pattern for a layer's whole name; for a part of it, give a list."
            if isinstance(wanted, str)
            else ""
        )
        raise InputError(
            f"PEFT finds no layer of {type(model).__name__} to adapt with target_modules={wanted or None}.{hint} "
            f"Its linear layers are called {called}. Look at exclude_modules and layers_to_transform, too."
        )


def trained_biases(
    model: torch.nn.Module, lora_config: LoraConfig, modules: Iterable[ModuleCount]
) -> list[torch.nn.Parameter]:
    """The base's own biases that PEFT would train beside `modules`, by the config's `bias`: none, all or lora_only.

    Raises InputError for another value.
    """
    if lora_config.bias == "none":
        return []
    if lora_config.bias == "all":
        return [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if lora_config.bias == "lora_only":
        biases = [getattr(model.get_submodule(module.name), "bias", None) for module in modules]
        return [bias for bias in biases if bias is not None]
    raise InputError(f"bias is {lora_config.bias!r}; choose none, all or lora_only.")
