"""How much memory training takes: predicted from two configs, and counted on a model that was trained for a step."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from adapter_checks import counting
from adapter_checks.errors import InputError
from adapter_checks.generation import context_length

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedConfig

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw_8bit")


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part. `activations` is None where they were not estimated; the total is then without them.

    warning: a sentence about the settings, or an empty string.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None
    warning: str = ""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    def rows(self) -> list[tuple[str, str]]:
        """(part, size) of each part, readable, the total last."""
        return [(name, "not estimated" if size is None else _readable(size)) for name, size in self.sizes().items()]

    def sizes(self) -> dict[str, int | None]:
        """{part: bytes}, the total last."""
        parts = ("weights", "gradients", "optimizer", "activations", "total")
        return {name: getattr(self, name) for name in parts}

    def __str__(self):
        lines = [f"{name:<12}{size:>14}" for name, size in self.rows()]
        return "\n".join([*lines, self.warning] if self.warning else lines)


def _readable(size: int) -> str:
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:,.1f} {unit}"
    return f"{size} B"


def estimate_memory(
    config: PreTrainedConfig,
    method: str,
    lora_config: LoraConfig | None = None,
    *,
    batch_size: int,
    sequence_length: int,
    dtype: torch.dtype | str = "float32",
    optimizer: str = "adamw",
    moment_dtype: torch.dtype | str | None = None,
    gradient_checkpointing: bool = False,
    double_quantization: bool = False,
) -> MemoryEstimate:
    """Predict the bytes that training holds, from configs alone.

    method: "full", "lora" or "qlora"; the last two need lora_config, a `peft.LoraConfig`, which "full" ignores.
    dtype: of the base and its activations, a torch.dtype or its name. PEFT keeps an adapter in float32 at least.
    optimizer: "adamw" (torch) or "adamw_8bit" (bitsandbytes; a paged one holds as much, where the system may move it,
    and a transformers Trainer lets embeddings keep 32 bits).
    moment_dtype: of AdamW's moments; None is that of the parameter, as in torch. Optimizers that keep float32 moments
    for 16-bit parameters need torch.float32 here.

    weights: bytes of all parameters, tied ones once; buffers are left out. For qlora each number that bitsandbytes
    quantises, in every linear layer but the output embedding, has 4 bits and 32/64 for the absmax of its block of 64:
    4.5; with double_quantization (QLoRA paper, section 3) 8/64 + 32/(64 * 256) instead, 4.127. Its tables take 64 bytes a
    layer, with double_quantization 1,092. `prepare_model_for_kbit_training`, if called, makes what is left float32.
    gradients: those of the trained parameters, in their dtype; a parameter that the loss doesn't reach has none.
    optimizer: for each trained number two moments, and 4 bytes a tensor to count steps; in 8 bits two bytes and two
    float32 for each 256 numbers, but two float32 moments for tensors below 4,096 numbers.
    activations: an upper bound on what the forward pass keeps for the backward pass; its formula is at `_activations`.
    warning: set where the rows are longer than the context that config names.

    Full fine-tuning in 16 bits is said to need 12 bytes a parameter (QLoRA paper, section 1: over 780 GB for 65B):
    2 for the weight, 2 for its gradient, 8 for two float32 moments, so dtype="bfloat16" and moment_dtype=torch.float32.

    Raises InputError for an unknown method, optimizer or dtype, for sizes below 1, and like `count_lora_parameters`.
    """
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}. Choose one of: {', '.join(METHODS)}.")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"There is no optimizer {optimizer!r}. Choose one of: {', '.join(OPTIMIZERS)}.")
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{name} is {size!r}; it must be a whole number of at least 1.")
    dtype = _float_type(dtype)
    if method == "full":
        lora_config = None
    elif lora_config is None:
        raise InputError(f"The method {method!r} trains an adapter, so it needs a lora_config.")
    model = counting.meta_model(config, getattr(lora_config, "task_type", None), dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    modules, dropout = None, 0.0
    if lora_config is None:
        trained = [
            (parameter.numel(), parameter.itemsize) for parameter in model.parameters() if parameter.requires_grad
        ]
    else:
        modules, dropout = counting.adapted_layers(model, lora_config), lora_config.lora_dropout
        size = max(dtype.itemsize, 4)
        trained = [
            (module.rank * features, size)
            for module in modules
            for features in (module.in_features, module.out_features)
        ]
        weights += sum(numbers * size for numbers, size in trained)
        biases = counting.trained_biases(model, lora_config, modules)
        trained += [(bias.numel(), bias.itemsize) for bias in biases]
    if method == "qlora":
        weights -= sum(
            weight.nbytes - _quantised(weight.numel(), double_quantization) for weight in _quantised_weights(model)
        )
    context = context_length(config)
    beyond = context is not None and sequence_length > context
    return MemoryEstimate(
        warning=f"Rows of {sequence_length:,} tokens are longer than the model's context of {context:,}."
        if beyond
        else "",
        weights=weights,
        gradients=sum(numbers * size for numbers, size in trained),
        optimizer=_optimizer(trained, optimizer, None if moment_dtype is None else _float_type(moment_dtype).itemsize),
        activations=_activations(
            model, modules, dropout, batch_size, sequence_length, dtype.itemsize, gradient_checkpointing
        ),
    )


def _float_type(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"{dtype!r} is no floating-point dtype of torch; say float32, bfloat16 or float16.")
    return found


def quantised_layers(model: torch.nn.Module) -> dict[str, Any]:
    """{name: layer} of what transformers hands to bitsandbytes: linear layers, but not the output embedding."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    linear = ((name, module) for name, module in model.named_modules() if type(module) in (torch.nn.Linear, Conv1D))
    return {name: module for name, module in linear if should_convert_module(name, kept)}


def _quantised_weights(model) -> list:
    return [layer.weight for layer in quantised_layers(model).values()]


def _quantised(numbers: int, double: bool) -> int:
    """Bytes of a matrix in NF4 or FP4: two numbers a byte, one absmax a block, and the table of the 16 levels."""
    blocks = math.ceil(numbers / 64)
    absmax = blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * 256 if double else 4 * blocks
    return math.ceil(numbers / 2) + absmax + 4 * 16


def _optimizer(trained, optimizer: str, moment_size: int | None) -> int:
    """trained: (numbers, bytes of one) for each trained tensor."""
    if optimizer == "adamw":
        return sum(2 * numbers * (moment_size or size) + 4 for numbers, size in trained)
    small = [numbers for numbers, _ in trained if numbers < 4096]
    large = [numbers for numbers, _ in trained if numbers >= 4096]
    tables = 2 * 4 * 256 if large else 0  # the levels of an 8-bit number, signed and unsigned, shared by all tensors
    return (
        sum(8 * numbers for numbers in small)
        + sum(2 * numbers + 8 * math.ceil(numbers / 256) for numbers in large)
        + tables
    )


# Activation functions that transformers writes as a chain of operations, each of which keeps a tensor.
_CHAINED = {"NewGELUActivation", "FastGELUActivation", "QuickGELUActivation"}
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def _activations(model, modules, dropout, batch_size, length, size, checkpointing) -> int | None:
    """Upper bound, in bytes, on what the backward pass needs of a forward pass over n = batch_size * length tokens.

    With s the bytes of a number of the base and a those of one of the adapter:
    - a linear layer: n s (in + 2 out), as its input is kept, and two tensors of its output's size by what follows it
      (norm, activation function, attention); 4 instead of 2 if the activation function is a chain of operations, as
      GPT-2's is. With an adapter the base's input isn't kept, so n s 2 out; each adapter adds n a (in + rank), and n a in
      for its dropout;
    - an attention layer: 4 batch_size * heads * length with a fused kernel, else (4 + s) batch_size * heads * length**2,
      with dropout on the attention 12 instead of 4 + s (float32 weights, mask, and what is left of them);
    - around the layers: 3 n h max(s, 4) for the embeddings and the last norm, h the hidden size;
    - the output: n s (in + vocabulary), and 8 n * vocabulary for float32 logits and their log-probabilities.
    With gradient checkpointing a transformer layer keeps its input, n s h, and only one at a time the rest.

    None for what this doesn't describe: encoder-decoders, experts, convolutions, layers run more than once or with an
    attention of their own. Measured on tiny Llama, GPT-2, OPT and BERT models, it is at most 2.2 times what was kept.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

    config = model.config
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    unknown = not model._supports_sdpa or any(parameter.dim() > 2 for parameter in model.parameters())
    if unknown or len(blocks) != getattr(config, "num_hidden_layers", None):
        return None
    tokens = batch_size * length
    followers = 4 if _CHAINED & {type(module).__name__ for module in model.modules()} else 2
    adapters = {module.name: module for module in modules or ()}
    kept = {}
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        if module is model.get_output_embeddings():
            kept[module] = tokens * (size * (inputs + outputs) + 8 * outputs)
        else:
            kept[module] = tokens * size * (followers * outputs + (inputs if modules is None else 0))
        if name in adapters:
            kept[module] += tokens * max(size, 4) * (inputs * (2 if dropout else 1) + adapters[name].rank)
    attention = 4 * batch_size * config.num_attention_heads * length
    if any(getattr(config, name, 0) for name in _ATTENTION_DROPOUTS):
        attention *= 3 * length
    elif config._attn_implementation == "eager":
        attention = attention // 4 * length * (4 + size)
    inside = [attention + sum(kept.pop(module, 0) for module in block.modules()) for block in blocks]
    if checkpointing:
        inside = [tokens * size * config.hidden_size * len(blocks), max(inside)]
    return sum(inside) + sum(kept.values()) + 3 * tokens * config.hidden_size * max(size, 4)


def measure_training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> MemoryEstimate:
    """Bytes of the tensors that a model and its optimizer hold now: parameters (4-bit ones with their quantisation
    state), gradients, and the optimizer's state. A tensor that several share counts once; activations are not measured.
    """
    parameters = list(model.parameters())
    states = [] if optimizer is None else optimizer.state.values()
    quantised = [tensor for p in parameters for tensor in _state_tensors(getattr(p, "quant_state", None))]
    return MemoryEstimate(
        weights=_bytes(parameters + quantised),
        gradients=_bytes(p.grad for p in parameters),
        optimizer=_bytes(value for state in states for value in state.values()),
    )


def _state_tensors(state) -> list:
    """Tensors of bitsandbytes' QuantState: absmax and levels, and those of the absmax's own quantisation."""
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, *_state_tensors(state.state2)]


def _bytes(values) -> int:
    import torch

    tensors = {value.data_ptr(): value for value in values if isinstance(value, torch.Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
