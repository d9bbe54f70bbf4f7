"""The checks of lesson 5, each with its typical mistakes; and that its run is one of the sweep's."""

import re
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch

from adapter_checks import memory
from adapter_checks.bitsandbytes_workarounds import quiet_imports, stop_repacking
from course_utils.exercises import lesson05
from tools import build

quiet_imports()

from bitsandbytes.functional import dequantize_4bit, quantize_4bit

SOURCE = Path(build.ROOT, "lessons", "05_qlora.py").read_text(encoding="utf-8")


# The solutions


def right_bits(block, group):
    return 4 + 32 / block if group is None else 4 + 8 / block + 32 / (block * group)


def right_quantise(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    codes = ((rows / absmax)[..., None] - levels).abs().argmin(-1)
    return (levels[codes] * absmax).reshape(weight.shape)


def needs_of(config, lora, **changes):
    """Bytes of the four plans."""
    options = dict(batch_size=1, sequence_length=512, dtype="bfloat16")
    return {
        f"{method}, checkpointing" if checkpointing else method: memory.estimate_memory(
            config,
            method,
            lora,
            **options | dict(gradient_checkpointing=checkpointing, double_quantization=method == "qlora") | changes,
        ).total
        for method in ("lora", "qlora")
        for checkpointing in (False, True)
    }


def plans(share=0.8, unit=1e9, order=None, **changes):
    """`right_plan` with something changed."""

    def plan(config, lora, card_gb):
        needs = needs_of(config, lora, **changes)
        return next((name for name in order or needs if needs[name] <= share * card_gb * unit), None)

    return plan


right_plan = plans()


def base_in(settings, folder):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    return stop_repacking(base)


def in_4_bits(kind="nf4", double=False):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def right_merge(base_folder, adapter_folder):
    from peft import PeftModel

    base = base_in(in_4_bits(), base_folder).dequantize()
    return PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()


# Other right answers


def plan_with_a_list(config, lora, card_gb):
    fitting = [name for name, need in needs_of(config, lora).items() if need / 1e9 <= card_gb * 4 / 5]
    return fitting[0] if fitting else None


def plan_step_by_step(config, lora, card_gb):
    needs, left = needs_of(config, lora), card_gb * 10**9 - card_gb * 10**9 / 5
    if needs["lora"] <= left:
        return "lora"
    if needs["lora, checkpointing"] <= left:
        return "lora, checkpointing"
    if needs["qlora"] <= left:
        return "qlora"
    if needs["qlora, checkpointing"] <= left:
        return "qlora, checkpointing"


def plan_by_position(config, lora, card_gb):
    needs = needs_of(config, lora)
    fits = [need < 0.8e9 * card_gb for need in needs.values()]
    return list(needs)[fits.index(True)] if any(fits) else None


def merge_by_hand(base_folder, adapter_folder):
    from peft import LoraConfig
    from safetensors.torch import load_file

    model, config = base_in(in_4_bits(), base_folder).dequantize(), LoraConfig.from_pretrained(adapter_folder)
    adapter = load_file(Path(adapter_folder, "adapter_model.safetensors"))
    for key, A in adapter.items():
        if "lora_A" in key:
            layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight.data += config.lora_alpha / config.r * adapter[key.replace("lora_A", "lora_B")] @ A
    return model


def merge_by_rounding_the_original(base_folder, adapter_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    for layer in memory.quantised_layers(base).values():
        layer.weight.data = dequantize_4bit(*quantize_4bit(layer.weight.data, quant_type="nf4"))
    merged = PeftModel.from_pretrained(base, adapter_folder)
    merged.merge_adapter()
    return merged.unload()


def merge_with_load_adapter(base_folder, adapter_folder):
    from peft import PeftModel

    base = base_in(in_4_bits(), base_folder).dequantize()
    model = PeftModel.from_pretrained(base, adapter_folder, adapter_name="mine")
    return model.merge_and_unload(safe_merge=True, adapter_names=["mine"]).eval()


def bits_by_counting(block, group=None):
    numbers = block * (group or 1)
    if group is None:
        return Fraction(4 * numbers + 32, numbers)
    return Fraction(4 * numbers + 8 * group + 32, numbers)


def bits_in_decimals(block, group):
    scale = Decimal(32) if group is None else 8 + Decimal(32) / group
    return 4 + scale / block


def quantise_with_borders(weight, levels, block):
    rows = weight.view(-1, block)
    absmax = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    codes = torch.searchsorted((levels[1:] + levels[:-1]) / 2, rows / absmax.unsqueeze(1))
    return (levels[codes] * absmax.unsqueeze(1)).view_as(weight)


def quantise_with_numpy(weight, levels, block):
    rows, table = weight.numpy().reshape(-1, block), levels.numpy()
    absmax = numpy.abs(rows).max(axis=1, keepdims=True)
    codes = numpy.abs(rows[..., None] / absmax[..., None] - table).argmin(axis=-1)
    return (table[codes] * absmax).reshape(weight.shape)


def quantise_block_by_block(weight, levels, block):
    read_back = []
    for piece in weight.flatten().split(block):
        scaled = levels * piece.abs().max()
        read_back.append(scaled[(piece[:, None] - scaled[None]).abs().argmin(dim=1)])
    return torch.cat(read_back).reshape(*weight.shape)


RIGHT = {
    "05.plan": [plan_with_a_list, plan_step_by_step, plan_by_position],
    "05.bits": [bits_by_counting, bits_in_decimals, lambda block, group: torch.tensor(right_bits(block, group))],
    "05.quantise": [quantise_with_borders, quantise_with_numpy, quantise_block_by_block],
    "05.merge": [merge_by_hand, merge_by_rounding_the_original, merge_with_load_adapter],
}


# Typical mistakes


LEVELS = lesson05.level_sets()


def one_scale(weight, levels, block):
    return right_quantise(weight, levels, weight.numel())


def a_scale_a_row(weight, levels, block):
    return right_quantise(weight, levels, weight.shape[1])


def down_the_columns(weight, levels, block):
    return right_quantise(weight.T.contiguous(), levels, block).T


def wrong_reshape(weight, levels, block):
    columns = weight.reshape(block, -1)
    absmax = columns.abs().amax(0)
    codes = ((columns / absmax)[..., None] - levels).abs().argmin(-1)
    return (levels[codes] * absmax).reshape(weight.shape)


def pieces(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return absmax, ((rows / absmax)[..., None] - levels).abs().argmin(-1)


def numbers_of_levels(weight, levels, block):
    return pieces(weight, levels, block)[1].reshape(weight.shape)


def without_scales(weight, levels, block):
    return levels[pieces(weight, levels, block)[1]].reshape(weight.shape)


def signed_largest(weight, levels, block):
    rows = weight.reshape(-1, block)
    largest = rows.amax(1, keepdim=True)
    return (levels[((rows / largest)[..., None] - levels).abs().argmin(-1)] * largest).reshape(weight.shape)


def next_level(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return (levels[torch.bucketize(rows / absmax, levels).clamp(max=len(levels) - 1)] * absmax).reshape(weight.shape)


def level_below(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return (levels[(torch.bucketize(rows / absmax, levels, right=True) - 1).clamp(min=0)] * absmax).reshape(
        weight.shape
    )


def with_absmax(change):
    def quantise(weight, levels, block):
        rows = weight.reshape(-1, block)
        absmax = change(rows.abs().amax(1, keepdim=True))
        return (levels[((rows / absmax)[..., None] - levels).abs().argmin(-1)] * absmax).reshape(weight.shape)

    return quantise


def equal_steps(weight, levels, block):
    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    return (levels[((rows / absmax + 1) / 2 * (len(levels) - 1)).round().long()] * absmax).reshape(weight.shape)


def in_place(weight, levels, block):
    return weight.copy_(right_quantise(weight, levels, block))


def one_block_wrong(weight, levels, block):
    found = right_quantise(weight, levels, block)
    found[3] *= 1.1
    return found


def merged_into(settings, plain=False, **how):
    """`right_merge` with another base."""

    def merge(base_folder, adapter_folder):
        from peft import PeftModel

        base = base_in(settings, base_folder)
        base = base.dequantize() if plain else base
        with warnings.catch_warnings(action="ignore"):  # PEFT's, of rounding
            return PeftModel.from_pretrained(base, adapter_folder).merge_and_unload(**how)

    return merge


def merged_not(base_folder, adapter_folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_in(in_4_bits(), base_folder).dequantize(), adapter_folder)
    model.merge_and_unload()
    return model


def unloaded(base_folder, adapter_folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(base_in(in_4_bits(), base_folder).dequantize(), adapter_folder).unload()


def merged_twice(base_folder, adapter_folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(right_merge(base_folder, adapter_folder), adapter_folder).merge_and_unload()


def merged_base_model(base_folder, adapter_folder):
    return right_merge(base_folder, adapter_folder).model.layers[0]


BACKWARDS = ("qlora, checkpointing", "qlora", "lora, checkpointing", "lora")

SOLUTIONS = {"05.plan": right_plan, "05.bits": right_bits, "05.quantise": right_quantise, "05.merge": right_merge}


@pytest.mark.parametrize(
    "name, wrong, hint",
    [
        ("plan", plans(share=1), "Leave a fifth of the card free"),
        ("plan", plans(unit=2**30), "not 2³⁰"),
        ("plan", plans(double_quantization=False), "double_quantization=True"),
        ("plan", plans(gradient_checkpointing=False), "Ask for checkpointing in the plans"),
        ("plan", plans(gradient_checkpointing=True), "only in the plans that name it"),
        ("plan", plans(dtype="float32"), 'Say dtype="bfloat16"'),
        ("plan", plans(sequence_length=1024), "A row has 512 tokens"),
        ("plan", plans(order=BACKWARDS), "the first plan that fits"),
        ("plan", plans(share=0.75), "is expected, which needs"),
        ("plan", lambda config, lora, card_gb: "lora", "MB to fill"),
        ("plan", lambda config, lora, card_gb: "QLoRA", "is none of the plans"),
        ("plan", lambda config, lora, card_gb: ("lora", True), "should be of type str"),
        ("plan", lambda config, lora, card_gb: print(end=""), "Is a return missing"),
        ("plan", lambda config, lora, card_gb: right_plan(config, lora, card_gb / 1e9), "compare bytes with GB"),
        ("merge", merged_into(None), "the original weights"),
        ("merge", merged_into(in_4_bits()), "still in 4 bits"),
        ("merge", lambda *given: merged_into(in_4_bits())(*given).dequantize(), "before dequantize()"),
        ("merge", merged_into(in_4_bits("fp4"), plain=True), "in FP4, the default"),
        ("merge", merged_into(in_4_bits(double=True), plain=True), "double quantisation"),
        ("merge", merged_not, "There is still an adapter"),
        ("merge", unloaded, "change is missing"),
        ("merge", merged_twice, "added twice"),
        ("merge", lambda *given: right_merge(*given).bfloat16(), "right to 16 bits"),
        ("merge", merged_base_model, "Return the whole model"),
        ("merge", lambda *given: print(end=""), "Is a return missing"),
        ("merge", lambda *given: given[0], "should be of type Module"),
        ("bits", lambda block, group: right_bits(block, group) - 4, "the scales' share alone"),
        ("bits", lambda block, group: right_bits(block, group) / 8, "in bytes"),
        ("bits", lambda block, group: right_bits(block, group) * block, "a whole block"),
        ("bits", lambda block, group: 4 + 4 / block, "4 bytes, and 32 bits"),
        ("bits", lambda block, group: 4 + 32 / block, "has 8 bits, not 32"),
        (
            "bits",
            lambda block, group: right_bits(block, None) if group is None else 4 + 8 / block + 32 / (64 * 256),
            "need not have 64 numbers",
        ),
        ("bits", lambda block, group: round(right_bits(block, group), 3), "That is rounded"),
        (
            "bits",
            lambda block, group: right_bits(block, None) if group is None else 4 + 8 / block,
            "a float32 of its own",
        ),
        (
            "bits",
            lambda block, group: right_bits(block, None) if group is None else 4 + 8 / block + 32 / group,
            "each for a whole block",
        ),
        ("bits", lambda block, group: right_bits(block, group) + (32 / block if group else 0), "don't come on top"),
        ("bits", lambda block, group: right_bits(block, group and 256), "need not have 256"),
        *(
            ("bits", lambda block, group, digits=digits: round(right_bits(block, group), digits), "That is rounded")
            for digits in (2, 4, 5)
        ),
        ("bits", lambda block, group: 4, "4 bits of the number alone"),
        ("bits", lambda block, group: 5, "too many"),
        ("quantise", lambda weight, levels, block: right_quantise(weight, LEVELS["NF4"], block), "the levels of NF4"),
        ("quantise", lambda weight, levels, block: right_quantise(weight, LEVELS["int4"], block), "steps of int4"),
        ("quantise", lambda weight, levels, block: right_quantise(weight, levels, 64), "have 64 numbers"),
        ("bits", lambda block, group: print(end=""), "Is a return missing"),
        ("bits", lambda block, group: float("nan"), "is nan"),
        ("bits", lambda block, group: 32 / group, "TypeError"),
        ("bits", lambda block, group: "4.5", "should be a number"),
        ("quantise", lambda weight, levels, block: weight.clone(), "Nothing was rounded"),
        ("quantise", one_scale, "Each block has its own"),
        ("quantise", a_scale_a_row, "One absmax for each row"),
        ("quantise", numbers_of_levels, "numbers of the levels"),
        ("quantise", without_scales, "levels from -1 to 1"),
        ("quantise", signed_largest, "take abs() first"),
        ("quantise", next_level, "goes up to the next level"),
        ("quantise", equal_steps, "not equally far apart"),
        ("quantise", wrong_reshape, "reshape(block, -1) puts the blocks into columns"),
        ("quantise", in_place, "have changed"),
        (
            "quantise",
            lambda weight, levels, block: right_quantise(weight, levels, weight.numel() // block),
            "Pieces of `block` numbers",
        ),
        ("quantise", level_below, "goes down to the level below"),
        ("quantise", with_absmax(lambda absmax: absmax + 1e-6), "of its largest number"),
        ("quantise", with_absmax(lambda absmax: absmax.clamp(min=0.05)), "of its largest number"),
        ("quantise", one_block_wrong, "row 3 is off by"),
        ("quantise", lambda *given: right_quantise(*given).reshape(-1), "has shape"),
        ("quantise", lambda *given: right_quantise(*given).tolist(), "should be of type Tensor"),
        ("quantise", lambda *given: right_quantise(*given) * float("nan"), "holds NaN"),
        ("quantise", lambda *given: print(end=""), "Is a return missing"),
        ("quantise", lambda weight, levels, block: weight.reshape(7, 7), "RuntimeError"),
    ],
)
def test_typical_mistakes_get_their_own_hint(name, wrong, hint):
    outcome = getattr(lesson05, name).outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert any(part in outcome.hint for part in hint.split("|")), outcome.hint


@pytest.mark.parametrize("kind, name", [("nf4", "NF4")])
def test_the_reference_of_the_exercise_is_bitsandbytes_kernel(kind, name):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    ours = lesson05.there_and_back(weight, lesson05.level_sets()[name], 64)
    assert torch.equal(ours, dequantize_4bit(*quantize_4bit(weight, quant_type=kind)))


def test_the_lessons_run_is_the_sweeps():
    from experiments import quantised, training

    steps, batch, rate = map(
        float, re.search(r"^STEPS, BATCH, RATE = (\d+), (\d+), (\S+)$", SOURCE, flags=re.MULTILINE).groups()
    )
    assert (steps, batch, rate) == (quantised.STEPS, training.BATCH, quantised.RATE)
