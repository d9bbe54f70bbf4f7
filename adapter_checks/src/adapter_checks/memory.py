"""How much memory training takes, on one device or on several: predicted from two configs, and counted after a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
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
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part, on the fullest device. `activations` is None where they were not estimated; the total is then
    without them.

    warning: a sentence about the settings, or an empty string.
    buffers: with several devices, what the strategy holds beside the parts, such as gathered weights; else 0.
    collectives: with several devices, {"all_reduce", "all_gather" or "reduce_scatter": bytes that each device hands over
    in an optimizer step}. An all-gather counts as what it returns, a reduce-scatter as what it takes.
    devices: how many there are.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None
    warning: str = ""
    buffers: int = 0
    collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)
    devices: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers + (self.activations or 0)

    @property
    def sent(self) -> int:
        """Bytes that each of k devices sends in a step where the collectives run as rings: (k - 1)/k of what is handed
        over, and twice that for an all-reduce, which is a reduce-scatter and an all-gather (ZeRO paper, section 7.1)."""
        twice = self.collectives.get("all_reduce", 0)
        return (sum(self.collectives.values()) + twice) * (self.devices - 1) // self.devices

    def rows(self) -> list[tuple[str, str]]:
        """(part, size) of each part, readable, the total last."""
        return [(name, "not estimated" if size is None else _readable(size)) for name, size in self.sizes().items()]

    def sizes(self) -> dict[str, int | None]:
        """{part: bytes}, the total last; buffers are left out where there is one device."""
        parts = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
        return {name: getattr(self, name) for name in parts if name != "buffers" or self.devices > 1}

    def __str__(self):
        lines = [f"{name:<12}{size:>14}" for name, size in self.rows()]
        if self.devices > 1:
            handed = ", ".join(f"{name} {_readable(size)}" for name, size in self.collectives.items())
            lines.append(f"a step, each of {self.devices} devices: {handed}; sent in rings {_readable(self.sent)}")
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
    devices: int = 1,
    strategy: str = "ddp",
) -> MemoryEstimate:
    """Predict the bytes that training holds, from configs alone; with several devices, those of the fullest one.

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

    devices, strategy: how many processes train together, each on `batch_size` rows of its own, and how they share the
    work. Parts that a strategy splits are those of the device that holds most; buffers and collectives are explained at
    `_shared`.
    - "ddp" (torch's DistributedDataParallel) splits nothing;
    - "zero1", "zero2", "zero3" (DeepSpeed; ZeRO paper, section 5) split the optimizer's state, the gradients, too, and the
      weights, too. The float32 copy that DeepSpeed keeps of 16-bit trained weights is not counted;
    - "fsdp" (torch's fully_shard, on each transformer block and on the whole) splits all three, each tensor by rows. Of
      4-bit weights only the packed numbers are split: what is needed to read them is no parameter, and stays whole.

    Full fine-tuning in 16 bits is said to need 12 bytes a parameter (QLoRA paper, section 1: over 780 GB for 65B):
    2 for the weight, 2 for its gradient, 8 for two float32 moments, so dtype="bfloat16" and moment_dtype=torch.float32.

    Raises InputError for an unknown method, optimizer or dtype, for sizes below 1, and like `count_lora_parameters`.
    """
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}. Choose one of: {', '.join(METHODS)}.")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"There is no optimizer {optimizer!r}. Choose one of: {', '.join(OPTIMIZERS)}.")
    if strategy not in STRATEGIES:
        raise InputError(f"There is no strategy {strategy!r}. Choose one of: {', '.join(STRATEGIES)}.")
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length), ("devices", devices)):
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{name} is {size!r}; it must be a whole number of at least 1.")
    dtype = _float_type(dtype)
    if method == "full":
        lora_config = None
    elif lora_config is None:
        raise InputError(f"The method {method!r} trains an adapter, so it needs a lora_config.")
    model = counting.meta_model(config, getattr(lora_config, "task_type", None), dtype)
    modules, dropout = None, 0.0
    if lora_config is not None:
        modules, dropout = counting.adapted_layers(model, lora_config), lora_config.lora_dropout
    quantised = [] if method != "qlora" else _quantised_weights(model)
    tensors = _tensors(model, modules, lora_config, max(dtype.itemsize, 4), quantised, double_quantization)
    moment_size = None if moment_dtype is None else _float_type(moment_dtype).itemsize
    context = context_length(config)
    beyond = context is not None and sequence_length > context
    return MemoryEstimate(
        warning=f"Rows of {sequence_length:,} tokens are longer than the model's context of {context:,}."
        if beyond
        else "",
        **_shared(tensors, devices, strategy, optimizer, moment_size),
        activations=_activations(
            model, modules, dropout, batch_size, sequence_length, dtype.itemsize, gradient_checkpointing
        ),
        devices=devices,
    )


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A parameter: `size` is the bytes of a number, `block` the transformer block that it is in, or None; `whole` are bytes
    that belong to it and that no strategy splits."""

    rows: int
    numbers: int
    size: int
    trained: bool
    block: int | None
    whole: int = 0

    @property
    def bytes(self) -> int:
        return self.numbers * self.size

    def shard(self, devices: int, by_rows: bool) -> int:
        """Numbers that the fullest device has; torch's fully_shard splits by rows, DeepSpeed anywhere."""
        if not by_rows:
            return math.ceil(self.numbers / devices)
        return math.ceil(self.rows / devices) * (self.numbers // self.rows)


def _tensors(model, modules, lora_config, adapter_size, quantised, double_quantization) -> list[_Tensor]:
    """All parameters of a meta model and of the adapter that `modules` describe; without modules the model is trained."""
    blocks = {
        f"{name}.": place
        for place, (name, _) in enumerate((name, module) for name, module in model.named_modules() if _is_block(module))
    }

    def block_of(name):
        return next((place for start, place in blocks.items() if name.startswith(start)), None)

    biases = [] if modules is None else counting.trained_biases(model, lora_config, modules)
    trained, packed = {id(bias) for bias in biases}, {id(weight) for weight in quantised}
    found = []
    for name, parameter in model.named_parameters():
        numbers, size, whole = parameter.numel(), parameter.itemsize, 0
        rows = parameter.shape[0] if parameter.dim() else 1
        if id(parameter) in packed:  # two numbers a byte, in one column
            whole = _quantised(numbers, double_quantization) - math.ceil(numbers / 2)
            rows, numbers, size = math.ceil(numbers / 2), math.ceil(numbers / 2), 1
        is_trained = parameter.requires_grad if modules is None else id(parameter) in trained
        found.append(_Tensor(rows, numbers, size, is_trained, block_of(name), whole))
    for module in modules or ():
        place = block_of(module.name)
        for rows, columns in ((module.rank, module.in_features), (module.out_features, module.rank)):
            found.append(_Tensor(rows, rows * columns, adapter_size, True, place))
    return found


def _is_block(module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _shared(tensors: list[_Tensor], devices: int, strategy: str, optimizer: str, moment_size: int | None) -> dict:
    """The parts of a MemoryEstimate that depend on how devices share the work, those of the fullest device.

    With G the bytes of all gradients, one backward pass in each step, and everything outside of transformer blocks called
    the rest:
    - ddp: an all-reduce of G, from buckets that hold the gradients once more (G);
    - zero1, zero2: a reduce-scatter of G and an all-gather of the trained weights (ZeRO paper, section 7.2.1). Their
      buckets have the size that DeepSpeed's configuration names, and are not counted;
    - fsdp: an all-gather of each block for the forward pass and once more for the backward pass, of the rest once, as it
      stays gathered in between, and a reduce-scatter of G; zero3 gathers the rest twice, too (section 7.2.2). Gathered at
      a time are the rest and two blocks, one of them ahead, and what is trained of the rest and of one block has its whole
      gradient beside it. This size of the buffers is a rule of thumb.
    """
    trained = [tensor for tensor in tensors if tensor.trained]
    by_rows, split = strategy == "fsdp", strategy in ("zero3", "fsdp") and devices > 1

    def local(tensor, always=False):
        return tensor.shard(devices, by_rows) if always or split else tensor.numbers

    def gathered(some: Iterable[_Tensor]) -> int:
        return sum(devices * local(tensor) * tensor.size for tensor in some)  # a shard that is not full is padded

    whole_gradients = sum(tensor.bytes for tensor in trained)
    parts = {
        "weights": sum(local(tensor) * tensor.size + tensor.whole for tensor in tensors),
        "gradients": sum(local(tensor, strategy == "zero2") * tensor.size for tensor in trained),
        "optimizer": _optimizer(
            [(local(tensor, strategy in ("zero1", "zero2")), tensor.size) for tensor in trained], optimizer, moment_size
        ),
    }
    if devices == 1:
        return parts
    if strategy == "ddp":
        return parts | {"buffers": whole_gradients, "collectives": {"all_reduce": whole_gradients}}
    if not split:
        return parts | {"collectives": {"reduce_scatter": whole_gradients, "all_gather": whole_gradients}}
    blocks: dict[int | None, list[_Tensor]] = {}
    for tensor in tensors:
        blocks.setdefault(tensor.block, []).append(tensor)
    rest = blocks.pop(None, [])
    largest = max(blocks.values(), key=gathered, default=[])
    in_blocks, of_rest = sum(map(gathered, blocks.values())), gathered(rest)
    gradients = gathered(tensor for tensor in [*rest, *largest] if tensor.trained)
    return parts | {
        "buffers": of_rest + min(2, len(blocks)) * gathered(largest) + gradients,
        "collectives": {
            "all_gather": 2 * in_blocks + (1 if by_rows else 2) * of_rest,
            "reduce_scatter": gathered(trained),
        },
    }


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
    from transformers.pytorch_utils import Conv1D

    config = model.config
    blocks = [module for module in model.modules() if _is_block(module)]
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
    state), gradients, and the optimizer's state. A tensor that several share counts once, and of a tensor that is split over
    processes only this process's part; activations are not measured.
    """
    parameters = list(model.parameters())
    states = [] if optimizer is None else optimizer.state.values()
    quantised = [tensor for p in parameters for tensor in _state_tensors(getattr(p, "quant_state", None))]
    return MemoryEstimate(
        weights=_bytes(parameters + quantised),
        gradients=_bytes(p.grad for p in parameters),
        optimizer=_bytes(value for state in states for value in state.values()),
    )


@contextlib.contextmanager
def measure_collectives() -> Iterator[dict[str, int]]:
    """Count what this process hands to collectives of torch.distributed in a `with`: a dict that fills up while they run,
    {"all_reduce", "all_gather" or "reduce_scatter": bytes}, counted as `MemoryEstimate.collectives` are.

    Seen is what DDP, fully_shard and all_reduce send; the small lists of tensors that a trainer gathers for its log are not.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    names = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
    found: dict[str, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = names.get(function._opname) if function.namespace == "c10d" else None
            if name:
                tensors = [one for one in tree_leaves([args, kwargs or {}]) if isinstance(one, torch.Tensor)]
                found[name] = found.get(name, 0) + max(tensor.nbytes for tensor in tensors)
            return function(*args, **(kwargs or {}))

    with Count():
        yield found


def _state_tensors(state) -> list:
    """Tensors of bitsandbytes' QuantState: absmax and levels, and those of the absmax's own quantisation."""
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, *_state_tensors(state.state2)]


def _bytes(values) -> int:
    import torch

    tensors = [
        getattr(value, "_local_tensor", value) for value in values if isinstance(value, torch.Tensor)
    ]  # of a DTensor
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
