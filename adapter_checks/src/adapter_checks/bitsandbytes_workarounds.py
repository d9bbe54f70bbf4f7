"""What has to be done about bitsandbytes 0.50 on a CPU, and which of its messages can be hidden."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from adapter_checks.errors import InputError

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")

_KERNEL_NOTICE = "Failed to load CPU gemm_4bit_forward from kernels-community"


def _is_not_kernel_notice(record: logging.LogRecord) -> bool:
    cause = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not (
        str(record.msg).startswith(_KERNEL_NOTICE)
        and isinstance(cause, ModuleNotFoundError)
        and cause.name == "kernels"
    )


def quiet_imports() -> None:
    """Call before importing peft or bitsandbytes: hides two known messages, and nothing else.

    On a processor with AVX512-BF16, bitsandbytes (`backends/cpu/ops.py`) logs a warning while it is imported if the
    optional package `kernels` is missing. With that package bitsandbytes would fetch code from the hub. Any other record of the same logger still shows.

    peft 0.21 asks each model for `is_gradient_checkpointing`, which transformers 5.23 renamed, so every
    `get_peft_model` would warn of a call that the caller never made.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_kernel_notice)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


_INT8_NOTICE = "MatMul8bitLt: inputs will be cast from"


def _is_not_int8_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_INT8_NOTICE)


def quiet_int8() -> None:
    """Hide the line that bitsandbytes 0.50 logs whenever an 8-bit layer runs in eval mode, and nothing else.

    It says that the layer's input is rounded to float16 before it is quantised: true, and the same at every call.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_int8_notice)


def is_repacked(layer: Any) -> bool:
    """Did an eval forward put this `bitsandbytes.nn.Linear4bit` into the layout of AVX512-BF16 processors?"""
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def stop_repacking(model: Model) -> Model:
    """Keep bitsandbytes from repacking 4-bit weights in place; returns the model. Call it right after loading.

    On a processor with AVX512-BF16 the first forward pass of a `Linear4bit` in eval mode without gradients puts its
    weight into another layout (bitsandbytes 0.50.2, `nn/modules.py`). From then on the layer passes no gradient to its
    input, also in training; and what dequantises, merges or saves the weight reads it wrongly, in silence. Layers whose
    size does not fit that layout raise instead. Elsewhere, and on a model without 4-bit layers, this changes nothing.

    Raises InputError if a layer is repacked already: bitsandbytes can't undo that exactly.
    """
    from bitsandbytes.nn import Linear4bit

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    repacked = [name for name, layer in layers.items() if is_repacked(layer)]
    if repacked:
        raise InputError(
            f"{len(repacked)} of {len(layers)} 4-bit layers have been repacked already, {repacked[0]} among them. "
            "Load the model afresh, and call stop_repacking before its first forward pass."
        )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    return model
