"""Checks of lesson 5: plan within a budget, quantise in blocks, bits per parameter, mend a merge."""

import math
import tempfile
from pathlib import Path

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_number,
    expect_tensor,
    expect_type,
    reference,
    using,
)


def small_llama(width=64, words=512):
    """The configuration of a Llama of two layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


PLANS = {
    "lora": ("lora", {}),
    "lora, checkpointing": ("lora", {"gradient_checkpointing": True}),
    "qlora": ("qlora", {"double_quantization": True}),
    "qlora, checkpointing": ("qlora", {"double_quantization": True, "gradient_checkpointing": True}),
}


@reference
def totals(config, lora, **changes):
    """{plan: the bytes that it is estimated to need}, in the order of the plans; `changes` go to `estimate_memory`."""
    from adapter_checks import memory

    common = {"batch_size": 1, "sequence_length": 512, "dtype": "bfloat16"}
    return {
        name: memory.estimate_memory(config, method, lora, **common | options | changes).total
        for name, (method, options) in PLANS.items()
    }


def first_plan(needs, budget):
    """The first of `needs`, {plan: bytes}, that is at most the budget, or None."""
    return next((name for name, need in needs.items() if need <= budget), None)


@exercise("05.plan", title="Plan within a budget", level="core", minutes=10)
def plan(function):
    """Compare on models and cards where each plan is the first that fits, and explain all answers by one mistake if that goes."""
    from peft import LoraConfig

    cases = []  # (config, lora, bytes of the card, the answer)
    # Budgets above a plan's need, and below it by more and by less than the ratio of 2³⁰ to 10⁹.
    for config, rank, shifts in ((small_llama(2048), 8, (1.02, 0.85, 0.98)), (small_llama(1024, 2048), 4, (1.02,))):
        lora = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear")
        for card in (need / 0.8 * shift for shift in shifts for need in totals(config, lora).values()):
            answer = call_learner(function, config, lora, card / 1e9)
            if answer is not None:
                expect_type(answer, str, "the plan")
                if answer not in PLANS:
                    raise TryAgain(f"{answer!r} is none of the plans: {', '.join(map(repr, PLANS))}.")
            cases.append((config, lora, card, answer))
    if not any(answer for *_, answer in cases):
        raise TryAgain("You always return None. Is a return missing, or do you compare bytes with GB?")
    if not _explains(cases):
        for changed, hint in (
            ({"share": 1}, "Leave a fifth of the card free."),
            ({"share": 0.8 * 1.024**3}, "A GB is 10⁹ bytes here, not 2³⁰."),
            ({"order": -1}, "Return the first plan that fits, in the order of the list."),
            ({"double_quantization": False}, "QLoRA is planned with double_quantization=True."),
            ({"gradient_checkpointing": False}, "Ask for checkpointing in the plans that name it."),
            ({"gradient_checkpointing": True}, "Ask for checkpointing only in the plans that name it."),
            ({"dtype": "float32"}, 'Say dtype="bfloat16".'),
            ({"sequence_length": 1024}, "A row has 512 tokens."),
        ):
            if _explains(cases, **changed):
                raise TryAgain(hint)
        _explain_plan(cases)


def _explains(cases, share=0.8, order=1, **changes):
    """Are all answers those of a plan that is made like this?"""
    needs = {
        id(config): totals(config, lora, **changes) for config, lora, _, _ in {id(c[0]): c for c in cases}.values()
    }
    return all(
        answer == first_plan(dict(list(needs[id(config)].items())[::order]), share * card)
        for config, _, card, answer in cases
    )


def _explain_plan(cases):
    for config, lora, card, answer in cases:
        needs = totals(config, lora)
        right = first_plan(needs, 0.8 * card)
        if answer != right:
            of_right = (
                f"{right!r} is expected, which needs {needs[right] / 1e6:.1f}" if right else "No plan is expected"
            )
            of_answer = f"{answer!r}, which needs {needs[answer] / 1e6:.1f} MB" if answer else "None"
            raise TryAgain(
                f"A card of {card / 1e6:.1f} MB has {0.8 * card / 1e6:.1f} MB to fill. {of_right}, and you return {of_answer}."
            )


@exercise("05.bits", title="Bits per parameter", level="warm-up", minutes=5)
def bits(function):
    """Compare with 4 + 32/block, and with double quantisation 4 + 8/block + 32/(block * group)."""
    for block, group in ((64, None), (128, None), (64, 256), (32, 256), (128, 64), (16, 16), (256, None)):
        found = expect_number(call_learner(function, block, group), "the number of bits")
        right = 4 + 32 / block if group is None else 4 + 8 / block + 32 / (block * group)
        if math.isclose(found, right, abs_tol=1e-9):
            continue
        if found == 4:
            raise TryAgain("These are the 4 bits of the number alone. Add its share of the scales.")
        if any(round(right, digits) == found for digits in range(9)):
            raise TryAgain("That is rounded. Return the number as it is.")
        mistakes = [
            (right - 4, "That is the scales' share alone. Add the 4 bits of the number itself."),
            (right / 8, "That is in bytes. Count in bits."),
            (right * block, "That is a whole block. Divide by the numbers in it."),
            (4 + 4 / block, "An absmax in float32 has 4 bytes, and 32 bits."),
        ]
        if group is not None:
            mistakes += [
                (4 + 32 / block, "With double quantisation an absmax has 8 bits, not 32."),
                (
                    4 + 8 / block,
                    "The absmax values are quantised in groups, and each group has a float32 of its own: 32 bits for group × block numbers.",
                ),
                (
                    4 + 8 / block + 32 / group,
                    "A group holds absmax values, each for a whole block. So it stands for group × block numbers.",
                ),
                (
                    4 + 8 / block + 32 / (64 * 256),
                    "Blocks need not have 64 numbers: a group stands for group × block of them.",
                ),
                (
                    4 + 8 / block + 32 / (block * 256),
                    "Groups need not have 256 absmax values: the second number that you are given says how many.",
                ),
                (
                    4 + 32 / block + 8 / block + 32 / (block * group),
                    "The 8 bits stand in place of the 32, they don't come on top.",
                ),
            ]
        for wrong, hint in mistakes:
            if math.isclose(found, wrong, abs_tol=1e-9):
                raise TryAgain(hint)
        side = "many" if found > right else "few"
        raise TryAgain(
            f"For blocks of {block}{f' and groups of {group}' if group else ''} you count {found:.4g} bits, which is too {side}."
        )


@reference
def there_and_back(weight, levels, block):
    """`weight` quantised in blocks of `block` numbers in a row to levels in [-1, 1], and read back, in the same shape."""
    import torch

    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    between = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(rows / absmax, between)] * absmax).reshape(weight.shape)


def level_sets():
    """{name: levels} of NF4, of a plain 4-bit integer, and of two bits that nobody uses, in ascending order."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    return {
        "NF4": get_4bit_type("nf4", device="cpu"),
        "int4": torch.arange(-7, 8) / 7,
        "four uneven": torch.tensor([-1.0, -0.3, 0.05, 1.0]),
    }


@exercise("05.quantise", title="Quantise in blocks", level="core", minutes=15)
def quantise(function):
    """Compare with the nearest level times the block's absmax; for NF4 that is what bitsandbytes' kernel gives, to the bit."""
    import torch

    generator = torch.Generator().manual_seed(6)
    for shape, block in (((16, 128), 64), ((12, 96), 32), ((6, 64), 128), ((4, 96), 64), ((3, 32), 16)):
        for name, levels in level_sets().items():
            weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[0])[:, None]
            given, known = weight.clone(), levels.clone()
            found = expect_tensor(call_learner(function, given, known, block), shape, "the result").float()
            if not torch.equal(given, weight) or not torch.equal(known, levels):
                raise TryAgain("The weight or the levels that you were given have changed. Make a new tensor.")
            right = there_and_back(weight, levels, block)
            if not torch.allclose(found, right, rtol=1e-5, atol=1e-9):
                _explain_quantised(weight, levels, block, found, right, name)


def _explain_quantised(weight, levels, block, found, right, name):
    import torch

    def close(other):
        return (
            other is not None
            and other.shape == found.shape
            and torch.allclose(found, other.to(found), rtol=1e-4, atol=1e-8)
        )

    rows = weight.reshape(-1, block)
    absmax = rows.abs().amax(1, keepdim=True)
    between, inside = (levels[1:] + levels[:-1]) / 2, rows / absmax
    codes = torch.bucketize(inside, between)
    largest = rows.amax(1, keepdim=True)
    steps = ((inside + 1) / 2 * (len(levels) - 1)).round().long()
    mistakes = [
        (weight, "Nothing was rounded: this is the weight itself."),
        (
            codes.reshape(weight.shape),
            "These are the numbers of the levels. Look the levels up, and multiply by the block's absmax.",
        ),
        (
            levels[codes].reshape(weight.shape),
            "These are levels from -1 to 1. Multiply each block by its absmax again.",
        ),
        (there_and_back(weight, levels, weight.numel()), "One absmax for the whole matrix. Each block has its own."),
        (
            there_and_back(weight, levels, weight.shape[1]),
            "One absmax for each row. A block has `block` numbers, may be shorter than a row, "
            "and may run on into the next: weight.reshape(-1, block).",
        ),
        (
            there_and_back(weight, levels, weight.numel() // block),
            "These are `block` pieces. Pieces of `block` numbers are weight.reshape(-1, block).",
        ),
        (
            there_and_back(weight.T.contiguous(), levels, block).T if weight.numel() % block == 0 else None,
            "Your blocks run down the columns. They run along the rows: weight.reshape(-1, block).",
        ),
        (
            there_and_back(weight.reshape(block, -1).T.contiguous(), levels, block).T.reshape(weight.shape),
            "reshape(block, -1) puts the blocks into columns. Use reshape(-1, block).",
        ),
        (
            (levels[torch.bucketize(rows / largest, between)] * largest).reshape(weight.shape),
            "You divide by the largest number. A block's largest size may be that of a negative one: take abs() first.",
        ),
        (
            (levels[torch.bucketize(inside, levels).clamp(max=len(levels) - 1)] * absmax).reshape(weight.shape),
            "Each number goes up to the next level. Take the nearest one: the borders lie half-way between levels.",
        ),
        (
            (levels[(torch.bucketize(inside, levels, right=True) - 1).clamp(min=0)] * absmax).reshape(weight.shape),
            "Each number goes down to the level below. Take the nearest one: the borders lie half-way between levels.",
        ),
        (
            (levels[steps] * absmax).reshape(weight.shape),
            "You round to equal steps and look the level up by its number. The levels are not equally far apart: take the nearest.",
        ),
        (
            there_and_back(weight, level_sets()["int4"], block),
            "You round to the equal steps of int4. Take the nearest of the levels that you are given.",
        ),
        (
            there_and_back(weight, level_sets()["NF4"], block),
            "You use the levels of NF4. Take those that you are given.",
        ),
        (
            there_and_back(weight, levels, 64) if weight.numel() % 64 == 0 else None,
            "Your blocks have 64 numbers. Here they have `block`.",
        ),
    ]
    for wrong, hint in mistakes:
        if close(wrong):
            raise TryAgain(hint)
    off = (found - right).abs().amax(1) / right.abs().amax(1)
    raise TryAgain(
        f"With {name} levels and blocks of {block} row {int(off.argmax())} is off by {off.max():.1%} of its largest number. "
        "Divide each block by its absmax, take the nearest level, multiply by the absmax."
    )


def make_folders(folder, config, rank, alpha, seed):
    """Save a random base and an adapter with B filled in; return (the base's folder, the adapter's)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        base.save_pretrained(Path(folder, "base"))
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        model.save_pretrained(Path(folder, "adapter"))
    return str(Path(folder, "base")), str(Path(folder, "adapter"))


@reference
def merged_weights(base_folder, adapter_folder, scaling, **quantised):
    """{layer: (base, change)} of all adapted layers; the base is read back from `quantised`, settings of `quantize_4bit`, if any."""
    import torch
    from bitsandbytes import functional
    from safetensors.torch import load_file

    base = load_file(Path(base_folder, "model.safetensors"))
    adapter = load_file(Path(adapter_folder, "adapter_model.safetensors"))
    found = {}
    for key in adapter:
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = base[f"{name}.weight"].to(torch.float32)
        if quantised:
            weight = functional.dequantize_4bit(*functional.quantize_4bit(weight, **quantised))
        found[name] = weight, scaling * adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
    return found


@exercise("05.merge", title="Mend the merge", level="core", minutes=15)
def merge(function):
    """Compare each weight with the one read back from NF4 plus the adapter's change, on two small models."""
    import torch
    import transformers
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel

    shown = transformers.utils.logging.get_verbosity()
    for config, rank, alpha, seed in ((small_llama(), 4, 8, 0), (small_llama(128, 256), 2, 16, 1)):
        with tempfile.TemporaryDirectory() as folder:
            given = make_folders(folder, config, rank, alpha, seed)
            try:
                transformers.utils.logging.set_verbosity_error()  # else dequantize() logs its dtype
                model = call_learner(function, *given)
            finally:
                transformers.utils.logging.set_verbosity(shown)
            expect_type(model, torch.nn.Module, "the merged model")
            with using("the merged model"):
                layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
                adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
                weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
            if isinstance(model, PeftModel) or adapted:
                raise TryAgain(
                    "There is still an adapter beside the base. merge_and_unload() returns the merged model."
                )
            if layers:
                raise TryAgain(
                    f"{len(layers)} layers are still in 4 bits, so the change was rounded. "
                    "Make the base plain first: base = base.dequantize()."
                )
            _compare_merged(weights, given, alpha / rank)


def _there_and_back_in_nf4(weight):
    from bitsandbytes import functional

    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))


def _compare_merged(weights, given, scaling):
    import torch

    right = merged_weights(*given, scaling, quant_type="nf4")
    missing = [name for name in right if f"{name}.weight" not in weights]
    if missing:
        raise TryAgain(f"The model has no weight {missing[0]}.weight. Return the whole model, not a part of it.")
    with using("the merged model"):
        found = {name: weights[f"{name}.weight"].float() for name in right}

        def close(others, tolerance=1e-5):
            return all(
                found[name].shape == other.shape and torch.allclose(found[name], other, atol=tolerance)
                for name, other in others.items()
            )

        if close({name: base + change for name, (base, change) in right.items()}):
            return
        other_bases = {
            "It was merged into the original weights. The adapter was trained on those read back from NF4.": {},
            "The base was in FP4, the default. Say bnb_4bit_quant_type='nf4'.": {"quant_type": "fp4"},
            "The base was quantised with double quantisation, and the adapter was trained without.": {
                "quant_type": "nf4",
                "compress_statistics": True,
            },
        }
        for hint, settings in other_bases.items():
            made = merged_weights(*given, scaling, **settings)
            if close({name: base + change for name, (base, change) in made.items()}):
                raise TryAgain(hint)
            if close({name: base for name, (base, _) in made.items()}):
                raise TryAgain(f"The adapter's change is missing. And: {hint}")
        if close({name: base for name, (base, _) in right.items()}):
            raise TryAgain("This is the base read back: the adapter's change is missing.")
        if close({name: base + 2 * change for name, (base, change) in right.items()}):
            raise TryAgain("The adapter's change was added twice.")
        if close({name: _there_and_back_in_nf4(base + change) for name, (base, change) in right.items()}):
            raise TryAgain(
                "The change was rounded: it was merged into 4 bits before dequantize(). "
                "Make the base plain first: base = base.dequantize()."
            )
        if close({name: base + change for name, (base, change) in right.items()}, tolerance=1e-2):
            raise TryAgain("This is right to 16 bits. Load the base with dtype=torch.float32.")
        name = next(iter(right))
        off = (found[name] - sum(right[name])).abs().max()
    raise TryAgain(
        f"{name}.weight is off by up to {off:.2g}. Load the base in NF4, dequantise it, load the adapter on it, and merge."
    )
