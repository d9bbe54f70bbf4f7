"""Checks of lesson 6: start as OLoRA does, read steps off a curve, convert to plain LoRA, ship it. And the folder that the lesson mends."""

import copy
import dataclasses
import difflib
import functools
import math
import shutil
import tempfile
import warnings
from pathlib import Path

from adapter_checks.errors import InputError
from course_utils.exercises import (
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    using,
)


def lend(adapter, folder, base):
    """Write the folder of lesson 6's diagnosis: the trained OLoRA adapter at `adapter`, given to PEFT as the initial one of a conversion.

    folder: where to; base: a fresh base model, which is changed.
    """
    from peft import PeftModel

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    with warnings.catch_warnings(action="ignore"), tempfile.TemporaryDirectory() as out:
        model = PeftModel.from_pretrained(base, adapter)
        model.save_pretrained(out, path_initial_model_for_weight_conversion=str(folder))


def change(folder, settings):
    """The configuration of the adapter in `folder` with `settings`, {name: value}, in place of its own; it is saved there, too.

    Raises InputError if the settings are not a dict, a name is no setting of the configuration, or a number is not one.
    """
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(folder)
    if not isinstance(settings, dict):
        raise InputError(f'A dict is needed, such as {{"lora_alpha": 32}}, not {settings!r:.60}.')
    known = [field.name for field in dataclasses.fields(config)]
    for setting, value in settings.items():
        if setting not in known:
            close = difflib.get_close_matches(str(setting), known, 1)
            advice = f"Do you mean {close[0]!r}?" if close else "Take one of the names in adapter_config.json."
            raise InputError(f"There is no setting {setting!r}. {advice}")
        before = getattr(config, setting)
        if type(before) in (int, float) and not isinstance(value, (int, float)):
            raise InputError(f"{setting} is a number, {before}. Give a number without quotes, not {value!r:.60}.")
        setattr(config, setting, value)
    config.save_pretrained(folder)
    return config


def _parts(value, number, names):
    """The learner's result as a list of `number` parts."""
    parts = expect_list(value, "the result")
    if len(parts) != number:
        raise TryAgain(f"{number} things are to be returned, {names}; this is {describe(value)}.")
    return parts


@exercise("06.olora", title="Start as OLoRA does", level="core", minutes=10)
def olora(function):
    """Compare with PEFT's own start on wide and tall weights; signs of directions are the learner's own choice."""
    import torch

    cases = ((12, 12, 3, 3, "float64"), (20, 8, 2, 6, "float64"), (9, 15, 4, 2, "float64"), (9, 15, 4, 8, "float32"),
             (13, 6, 6, 9, "float64"), (5, 14, 1, 0.5, "float64"))  # fmt: skip
    for seed, (outputs, inputs, rank, alpha, dtype) in enumerate(cases):
        weight = torch.randn(
            outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=getattr(torch, dtype)
        )
        given = weight.clone()
        close = functools.partial(torch.allclose, atol=1e-8 if dtype == "float64" else 1e-4)
        returned = _parts(call_learner(function, given, rank, alpha), 3, "A, B and the new weight")
        shapes = {"A": (rank, inputs), "B": (outputs, rank), "the new weight": (outputs, inputs)}
        returned = [expect_tensor(part, shape, name) for part, (name, shape) in zip(returned, shapes.items())]
        if not torch.equal(given, weight):
            raise TryAgain(
                "The weight that you were given has changed. Return a new one: weight - ..., not weight -= ..."
            )
        for part, name in zip(returned, shapes):
            if part.dtype != weight.dtype:
                raise TryAgain(
                    f"The weight is in {dtype}, and {name} in {str(part.dtype).removeprefix('torch.')}: keep the weight's dtype."
                )
        weight, (A, B, left) = weight.double(), (part.double() for part in returned)
        gram, one = B.T @ B, torch.eye(rank, dtype=torch.float64)
        if not close(gram, one):
            if torch.allclose(gram, one, atol=1e-5):
                raise TryAgain(
                    "B's columns are orthonormal but for float32 rounding: keep the weight's dtype on the way, too."
                )
            raise TryAgain("B's columns should be orthonormal, BᵀB = I. Take them from Q of torch.linalg.qr(weight).")
        scaling, product, directions = alpha / rank, B @ A, _first_directions(weight, rank)
        if scaling != 1 and close(product, scaling * directions):
            raise TryAgain("A has s in it already, and the layer multiplies by s again. Return A = R[:r] as it is.")
        if alpha % rank and close(left, weight - alpha // rank * product):
            raise TryAgain(
                f"You took {alpha // rank} times BA out: {alpha} // {rank} is {alpha // rank}. s is alpha / rank, {scaling:g} here."
            )
        if close(left, weight):
            raise TryAgain(
                "The weight is as it was, so the layer's output would change at step 0. Take s·BA out of it."
            )
        if close(left, weight + scaling * product):
            raise TryAgain("The sign is wrong: the adapter adds s·BA, so it is to be taken out of the weight.")
        if scaling != 1 and close(left, weight - product):
            raise TryAgain("The adapter adds s·BA with s = alpha / rank. Take that out of the weight, not BA alone.")
        if not close(left + scaling * product, weight):
            raise TryAgain("The new weight and s·BA, with s = alpha / rank, don't add up to the weight that was given.")
        if not close(product, directions):
            raise TryAgain(
                "It adds up, but A and B aren't the first r directions of one QR decomposition: B = Q[:, :r], A = R[:r]."
            )


def _first_directions(weight, rank):
    """Q[:, :r] R[:r] as PEFT's start has it; float64 tells that no rounding is taken for a mistake."""
    import torch
    from peft import LoraConfig, get_peft_model

    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    layer[0].weight.data = weight.float().clone()
    model = get_peft_model(layer, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights="olora"))
    started = model.base_model.model[0]
    by_peft = started.lora_B["default"].weight.detach() @ started.lora_A["default"].weight.detach()
    Q, R = torch.linalg.qr(weight)
    exact = Q[:, :rank] @ R[:rank]
    if not torch.allclose(exact.float(), by_peft, atol=1e-4):
        raise RuntimeError("PEFT's start is another one in this version.")
    return exact


@exercise("06.reach", title="When was the loss down?", level="warm-up", minutes=5)
def reach(function):
    """Curves that end below, never come down, go down and up again, begin below, or have uneven steps, out of order."""
    curves = (
        ({5: 4.0, 10: 2.0, 15: 0.9, 20: 0.4}, 1.0, 15),
        ({5: 4.0, 10: 2.0}, 2.0, 10),
        ({5: 4.0, 10: 3.0}, 1.0, None),
        ({5: 3.0, 10: 0.8, 15: 1.4, 20: 0.7, 25: 0.2}, 1.0, 10),
        ({20: 0.4, 5: 4.0, 15: 0.9, 10: 2.0}, 1.0, 15),
        ({5: 4.0, 10: math.nan, 15: 0.5}, 1.0, 15),
        ({5: 4.0, 10: 1.04, 15: 0.9, 20: 0.4}, 1.0, 15),
        ({0: 4.0, 7: 0.9, 90: 0.5, 100: 0.3}, 1.0, 7),
        ({5: 3.0, 10: 0.5, 15: 0.9, 20: 0.4}, 1.0, 10),
        ({5: 0.5, 10: 0.45, 15: 0.4}, 1.0, 5),
        ({0: 0.8, 7: 0.6, 14: 0.5}, 1.0, 0),
        ({5: 3.0, 10: 0.5, 15: 0.9, 20: 1.5}, 1.0, 10),
        ({30: 1.2, 3: 0.35, 12: 0.2, 1: 0.9}, 0.3, 12),
        ({1: 6.5, 2: 5.5, 4: 5.0}, 6.0, 2),
    )
    for curve, level, right in curves:
        found = call_learner(function, dict(curve), level)
        case = f"For {curve} and the level {level:g}"
        if right is None:
            if found is not None:
                raise TryAgain(f"{case}, return None: it is never reached. This gave {describe(found)}.")
            continue
        if found is None and right == 0:
            raise TryAgain(
                f"{case}, None came back. Step 0 is a step, too, but Python takes 0 for false: ask `is None`, not `or`."
            )
        if found is None and [*curve.values()][-1] > level:
            raise TryAgain(f"{case}, None came back. It is reached at step {right}, whatever comes after.")
        if found is None:
            raise TryAgain(
                f'{case}, None came back, and the level is reached. "Reached" means at or below it; is a return missing?'
            )
        number = expect_number(found, "the step")
        if number == right:
            continue
        if number in curve.values() and number not in curve:
            raise TryAgain(f"{case}, this is a loss, {number:g}. Return the step.")
        if number not in curve:
            raise TryAgain(
                f"{case}, {number:g} came back, which is no step of it. The steps are the keys, and need not be 5 apart."
            )
        if curve[number] > level:
            raise TryAgain(
                f"{case}, {number:g} came back, and the loss there is above the level. Compare the losses as they are, with <= level."
            )
        below = [step for step in sorted(curve) if curve[step] <= level]
        if number == next((step for step, loss in curve.items() if loss <= level), None):
            raise TryAgain(
                f"{case}, you took the entries in the order of the dict. Go through the steps in ascending order."
            )
        if right == 7 and number == min(below, key=str):
            raise TryAgain(
                f"{case}, {number:g} came back. The steps were sorted as text, where 100 comes before 7. Sort them as numbers."
            )
        if right == min(curve) and number == below[1]:
            raise TryAgain(f"{case}, you left out the first step, {right}. It counts, too.")
        if number == max(below, key=curve.get):
            raise TryAgain(
                f"{case}, you found the loss that is nearest to the level. Return the first step at or below it."
            )
        if number == min(curve, key=curve.get):
            raise TryAgain(f"{case}, you found the lowest loss. Return the first step at or below the level.")
        raise TryAgain(f"{case}, {number:g} came back. Return the first step whose loss is at or below the level.")


@exercise("06.convert", title="Convert to plain LoRA by hand", level="core", minutes=10)
def convert(function):
    """s2·B2·A2 must be s·(B·A − B0·A0), of rank 2r, with s2 = alpha2 / 2r."""
    import torch

    for seed, (outputs, inputs, rank, alpha) in enumerate(
        ((7, 9, 2, 4), (12, 5, 3, 3), (6, 6, 2, 7), (8, 5, 2, 4.3), (4, 11, 1, 16))
    ):
        generator = torch.Generator().manual_seed(seed)
        A0, A = (torch.randn(rank, inputs, generator=generator, dtype=torch.float64) for _ in range(2))
        B0, B = (torch.randn(outputs, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        given = [matrix.clone() for matrix in (A0, B0, A, B)]
        returned = _parts(call_learner(function, *given, alpha), 3, "the new A, the new B and the new alpha")
        if any(not torch.equal(*pair) for pair in zip(given, (A0, B0, A, B))):
            raise TryAgain("One of the matrices that you were given has changed. Make new ones with torch.cat.")
        if getattr(returned[0], "shape", None) == (rank, inputs):
            raise TryAgain(
                "The new A has rank r still. A difference of two products of rank r needs 2r: lay A over A0, with torch.cat."
            )
        new_A = expect_tensor(returned[0], (2 * rank, inputs), "the new A")
        new_B = expect_tensor(returned[1], (outputs, 2 * rank), "the new B")
        for matrix, name in ((new_A, "A"), (new_B, "B")):
            if matrix.dtype != A.dtype:
                raise TryAgain(
                    f"The matrices that you were given are float64, and the new {name} is {str(matrix.dtype)[6:]}. Keep their dtype."
                )
        new_alpha = expect_number(returned[2], "the new alpha")
        if new_alpha <= 0:
            raise TryAgain(
                f"The new alpha is {new_alpha:g}. It stays above 0: the minus goes into one of the matrices, -B0 or -A0."
            )
        wanted, product = alpha / rank * (B @ A - B0 @ A0), new_B @ new_A
        if torch.allclose(new_alpha / (2 * rank) * product, wanted, atol=1e-8):
            continue
        if torch.allclose(product, B @ A + B0 @ A0, atol=1e-8):
            raise TryAgain(
                "The products are added. The start was taken out of the base, so take it out of the adapter: turn one sign."
            )
        if torch.allclose(product, B0 @ A0 - B @ A, atol=1e-8):
            raise TryAgain("The signs are the wrong way round: what was learned counts plus, the start minus.")
        if alpha % 1 and not new_alpha % 1 and torch.allclose(product, B @ A - B0 @ A0, atol=1e-8):
            raise TryAgain(f"Alpha is {alpha:g} here, and your new one {new_alpha:g}. Don't make it a whole number.")
        if torch.allclose(product, B @ A - B0 @ A0, atol=1e-8) or torch.allclose(
            product, 2 * (B @ A - B0 @ A0), atol=1e-8
        ):
            raise TryAgain(
                f"The product is right, the scaling is not: the new rank is {2 * rank}, and alpha / rank has to stay "
                f"{alpha / rank:g}."
            )
        if torch.allclose(product, (B - B0) @ (A - A0), atol=1e-8):
            raise TryAgain(
                "This is the product of the differences. The difference of the products is wanted, BA − B0A0."
            )
        if any(torch.allclose(product, x * B @ A0 + y * B0 @ A, atol=1e-8) for x in (1, -1) for y in (1, -1)):
            raise TryAgain(
                "A's and B's halves stand in different order. With matrices laid side by side, [B, B0] times [A over A0] is BA + B0A0."
            )
        raise TryAgain(
            "s·BA of the new adapter is not s·(BA − B0A0). Write the product of two matrices laid side by side: "
            "[B, B0] times [A over A0] is BA + B0A0."
        )


@exercise("06.ship", title="Ship the folder", level="core", minutes=15)
def ship(function):
    """What is in `out` must give the trained model on an untouched base; folder and model stay as they were.

    The initial folder is called like nothing else, like the adapter, and ends with a slash.
    """
    cases = (("start", "", 4), ("default", "", 8), ("start", "/", 6), ("olora_initial", "", 3))
    for seed, (name, end, alpha) in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            _check_shipped(function, Path(folder), name, end, alpha, seed)


def _check_shipped(function, folder, name, end, alpha, seed):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.arange(1, 9)[None]

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=32,
                initializer_range=0.3,
            )
        ).eval()
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "up_proj"], init_lora_weights="olora")
        model = get_peft_model(copy.deepcopy(base), config).eval()
        initial, out = folder / "initial" / name, folder / "out"
        model.save_pretrained(initial)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    trained, untouched = logits(model), logits(base)
    before = {path.name: path.read_bytes() for path in initial.iterdir()}

    where = f"With the initial folder …/initial/{name}{end}"
    try:
        call_learner(function, model, f"{initial}{end}", out)
    except TryAgain as wrong:
        if list(getattr(model, "peft_config", [])) == ["default"]:
            raise TryAgain(f"{where}: {wrong}") from None
        raise TryAgain(
            f"{where}: {wrong}. And the trained adapter is gone: PEFT deletes what has the last name of the path that you give it. "
            "Give it a copy with a name of its own."
        ) from None
    with using("the model after your function"):
        same = list(model.peft_config) == ["default"] and torch.equal(logits(model), trained)
    if not same:
        raise TryAgain(
            f"{where}: the model has lost its adapter, or gives another output than before. Leave it as it was."
        )
    now = {path.name: path.read_bytes() for path in initial.glob("*") if path.is_file()}
    if now != before:
        raise TryAgain(
            f"{where}: the initial folder has changed. PEFT rewrites the configuration in the folder that it is given; give it a copy."
        )
    _check_out(out, base, trained, untouched, logits, where)


def _check_out(out, base, trained, untouched, logits, where):
    """Raise `TryAgain` unless the folder `out` holds a plain LoRA that gives the trained model."""
    import torch
    from peft import LoraConfig, PeftModel

    if not (out / "adapter_config.json").is_file():
        there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        raise TryAgain(
            f"{where}: out holds no adapter_config.json, but {', '.join(there) or 'nothing'}. Save the adapter right into `out`."
        )
    with using("the folder out"):
        initialisation = LoraConfig.from_pretrained(out).init_lora_weights
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
        found = logits(loaded)
        with loaded.disable_adapter():
            alone = logits(loaded)
    right = torch.allclose(found, trained, atol=1e-3)
    if initialisation == "olora":
        raise TryAgain(
            f"{where}: the adapter in out is still an OLoRA adapter, and loading it moves the base. Convert it: save_pretrained with "
            "path_initial_model_for_weight_conversion."
        )
    if torch.allclose(found, untouched, atol=1e-3):
        raise TryAgain(
            f"{where}: the adapter in out changes nothing. Was the trained adapter given as the initial one?"
        )
    if not right:
        raise TryAgain(
            f"{where}: on an untouched base the adapter in out doesn't give the trained model. Its change should be the trained "
            "product less the initial one."
        )
    if not torch.equal(alone, untouched):
        raise TryAgain(f"{where}: loading out changes the base's weights.")
