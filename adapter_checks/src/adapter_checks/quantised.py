"""Checks on 4-bit and 8-bit models: is the quantisation that was asked for possible, and are the weights still what they were?"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, cast

from adapter_checks import bitsandbytes_workarounds, counting, memory
from adapter_checks.errors import InputError
from adapter_checks.loaded_weights import weight_reader
from adapter_checks.names import plain_name
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.training import bad_argument

if TYPE_CHECKING:
    import os

    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

TYPES = ("nf4", "fp4")
# Of a weight's size: how far the same quantisation of the same base may lie off, for absmax values that were rounded to 16
# bits or kernels that round ties otherwise. Scales in a wrong order, the mildest damage that was seen, are 0.1 off and more.
LARGEST_DIFFERENCE = 0.02


@never_raises("Quantisation settings")
def check_quantization_config(model: PreTrainedModel | PreTrainedConfig, settings: BitsAndBytesConfig) -> Report:
    """Can this model be loaded with this BitsAndBytesConfig here, and will it be what you want? Nothing is loaded.

    model     a transformers model or its config
    settings  the transformers.BitsAndBytesConfig

    Returns a Report; its finding "size" says how much of the model is quantised.
    """
    from transformers import BitsAndBytesConfig, PreTrainedConfig

    report = Report("Quantisation settings")
    if importlib.util.find_spec("bitsandbytes") is None:
        report.fail(
            "not_installed",
            "The package bitsandbytes is missing; it does the 4-bit and 8-bit work.",
            "Install bitsandbytes; on a platform without it, load the model in 16 bits.",
        )
        return report
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig) or not isinstance(settings, BitsAndBytesConfig):
        return bad_argument(report, (model, settings), "a model or its config, and a transformers.BitsAndBytesConfig")
    _check_build(report)
    kind = settings.bnb_4bit_quant_type
    if not (settings.load_in_4bit or settings.load_in_8bit):
        report.fail(
            "no_bits",
            f"Neither load_in_4bit nor load_in_8bit is set, and transformers 5.23 loads {str(kind).upper()} "
            "all the same.",
            "Say load_in_4bit=True or load_in_8bit=True.",
        )
    elif settings.load_in_4bit and kind not in TYPES:
        report.fail("bad_quant_type", f"There is no 4-bit type {kind!r}.", "Say bnb_4bit_quant_type='nf4' (or 'fp4').")
    elif settings.load_in_4bit and kind == "fp4":
        report.warn(
            "fp4",
            "The 4-bit type is FP4, which is the default.",
            "Say bnb_4bit_quant_type='nf4': its error on weights is smaller by a quarter.",
        )
    skeleton = counting.meta_model(config)
    layers = memory.quantised_layers(skeleton)
    if not layers:
        report.fail("no_linear", "This model has no linear layer that bitsandbytes would take.", "Load it in 16 bits.")
        return report
    if not settings.load_in_8bit:
        _check_sizes(report, layers)
    numbers = sum(layer.weight.numel() for layer in layers.values())
    every = sum(parameter.numel() for parameter in skeleton.parameters())
    report.note(
        "size",
        f"{len(layers)} layers with {numbers / every:.0%} of all {every:,} parameters would be quantised; "
        "embeddings, norms and the output layer stay as they are.",
    )
    return report


def _check_build(report) -> None:
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if not isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return
    message = "bitsandbytes has no library for this platform, or could not load it."
    if torch.cuda.is_available():
        report.fail("no_build", message, "Run `python -m bitsandbytes`, which says which one it looks for.")
    else:
        report.warn(
            "no_build",
            f"{message} On a CPU plain PyTorch takes its place, with the same numbers, but slowly.",
            "Run `python -m bitsandbytes`, which says which one it looks for; or load the model in 16 bits.",
        )


def _check_sizes(report, layers) -> None:
    from bitsandbytes.functional import has_avx512bf16

    odd = [
        f"{name} ({layer.weight.shape[1]} → {layer.weight.shape[0]})"
        for name, layer in layers.items()
        if layer.weight.shape[1] % 64 or layer.weight.shape[0] % 32
    ]
    if odd:
        here = "This processor is one of them" if has_avx512bf16() else "This processor is none of them"
        report.warn(
            "odd_size",
            f"{len(odd)} layers have inputs that are no multiple of 64, or outputs that are none of 32: "
            f"{first_few(odd)}. In eval mode the 4-bit kernel of processors with AVX512-BF16 refuses them. {here}.",
            "Call stop_repacking(model) right after loading.",
        )


@never_raises("Quantised model")
def check_quantised(
    model: torch.nn.Module, original_base: torch.nn.Module | str | os.PathLike[str] | None = None
) -> Report:
    """Are the 4-bit and 8-bit weights of this model still what they were when it was loaded?

    model          a transformers model or a PeftModel around one; it isn't changed, and no forward pass is made
    original_base  the unquantised base, or its folder of safetensors: each weight is then read back and compared, which
                   finds damage whatever caused it, also in a model that was saved and loaded since

    Returns a Report; its finding "quantised" says how many layers of which type there are.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    report = Report("Quantised model")
    if not isinstance(model, torch.nn.Module):
        return bad_argument(report, (model,), "a transformers model that was loaded with a quantization_config")
    layers = {
        plain_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, (Linear4bit, Linear8bitLt))
    }
    four_bit = {name: layer for name, layer in layers.items() if isinstance(layer, Linear4bit)}
    if not layers:
        report.fail(
            "not_quantised",
            "No layer of this model is in 4 or 8 bits.",
            "Pass quantization_config=BitsAndBytesConfig(...) to from_pretrained; load_in_4bit=True is not an argument of it.",
        )
        return report
    repacked = [name for name, layer in four_bit.items() if bitsandbytes_workarounds.is_repacked(layer)]
    if repacked:
        report.fail(
            "repacked",
            f"A forward pass in eval mode has repacked {len(repacked)} of {len(four_bit)} 4-bit weights: "
            f"{first_few(repacked, 1)}. They pass no gradient on, and to merge, dequantise or save them gives wrong numbers.",
            "Load the model afresh, and call stop_repacking(model) before its first forward pass.",
        )
    elif any(layer.support_avx512bf16_for_cpu and layer.weight.device.type == "cpu" for layer in four_bit.values()):
        report.warn(
            "will_be_repacked",
            "This processor has AVX512-BF16: the first forward pass in eval mode will repack the "
            "4-bit weights, for good.",
            "Call stop_repacking(model) now.",
        )
    changed = {*repacked, *_check_adapters(report, model)}
    if original_base is not None:
        _check_weights(report, {name: layer for name, layer in layers.items() if name not in changed}, original_base)
    types = sorted({cast(Any, layer.weight).quant_type.upper() for layer in four_bit.values()}) + ["int8"] * (
        len(four_bit) < len(layers)
    )
    report.note("quantised", f"{len(layers)} layers are quantised ({first_few(types)}).")
    return report


def _check_adapters(report, model) -> list[str]:
    """The names of the quantised layers that an adapter is merged into."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {
        plain_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), (Linear4bit, Linear8bitLt))
    }
    merged = [name for name, layer in adapted.items() if layer.merged]
    if merged:
        report.warn(
            "merged_into_quantised",
            f"An adapter is merged into {len(merged)} quantised layers, so its change was rounded to their few levels.",
            "To keep the change, merge it into the dequantised base: model.dequantize() "
            "of a fresh copy, then the adapter, then merge_and_unload().",
        )
    elif adapted:
        report.note(
            "merge", "merge_and_unload() would merge into the quantised weights, and round the adapter's change."
        )
    return merged


def _check_weights(report, layers, original_base) -> None:
    from transformers.pytorch_utils import Conv1D

    try:
        original, differences = weight_reader(original_base), {}
    except InputError as error:
        report.fail(
            "bad_argument", f"original_base can't be read. {error}", "Pass the unquantised base, or its folder."
        )
        return
    for name, layer in layers.items():
        before = original(f"{name}.weight")
        if before is None or before.numel() != layer.in_features * layer.out_features:
            continue
        if (
            getattr(layer, "source_cls", None) is Conv1D
        ):  # GPT-2 stores its weights transposed, and transformers turned them
            before = before.T
        fresh = _requantised(layer, before.detach().to(layer.weight.device))
        differences[name] = ((dequantised(layer).float() - fresh).norm() / fresh.norm()).item()
    wrong = [name for name, difference in differences.items() if not difference < LARGEST_DIFFERENCE]
    if not differences:
        report.warn(
            "not_compared",
            "No quantised weight has a counterpart in original_base.",
            "Pass the base that was quantised.",
        )
    elif wrong:
        report.fail(
            "damaged",
            f"{len(wrong)} of {len(differences)} weights are not those of the base. {wrong[0]} is off by "
            f"{differences[wrong[0]]:.0%} of its size.",
            "Load the model afresh from the unquantised base. A copy that was "
            "saved after an evaluation may hold repacked weights; or something was merged, or this is another base.",
        )
    else:
        report.note("intact", f"{len(differences)} weights are those of the base, quantised.")


def dequantised(layer: Any) -> torch.Tensor:
    """The numbers that a 4-bit or 8-bit layer stands for, (outputs, inputs), as PEFT reads them for a merge."""
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))


def _requantised(layer, weight):
    """`weight` (outputs, inputs) quantised as the layer's own was, and read back in float32."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    if not isinstance(layer, Linear4bit):
        numbers, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return functional.int8_vectorwise_dequant(numbers, scales)
    state = cast(Any, layer.weight).quant_state
    again = functional.quantize_4bit(
        weight.to(state.dtype).contiguous(),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        compress_statistics=state.nested,
    )
    return functional.dequantize_4bit(*again).float()
