"""Is a folder a whole, safe adapter, and does it fit this base? Nothing is loaded that could run code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from adapter_checks.base_shapes import check_fit
from adapter_checks.errors import InputError
from adapter_checks.initialisation import changes_base
from adapter_checks.report import Report, never_raises, some
from adapter_checks.safetensors_header import read_safetensors_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What a Trainer leaves in its checkpoints; PEFT does not read these, but Trainer's resume does.
_TRAINER_STATE = re.compile(r"training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth")
_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(\.\w+)*)$")


@never_raises("Adapter's folder")
def check_adapter_folder(folder, base=None) -> Report:
    """Look at an adapter on disk before any library loads it.

    folder  what is given to PeftModel.from_pretrained: holds adapter_config.json and adapter_model.safetensors
    base    optional: the model, its folder, or its transformers config. Shapes are compared on PyTorch's meta device,
            so no weights are read. Names are compared as they stand; the renamings that PEFT applies for a few
            multimodal and mixture-of-experts models are not followed.

    Returns a Report; the finding "adapter" names rank, alpha, layers and size. LoRA adapters are looked at in full,
    other methods for completeness and safety only.
    """
    report = Report("Adapter's folder")
    folder = _existing_folder(report, folder)
    if folder is None:
        return report
    report.title = f"Adapter's folder {folder.name}"
    _check_files(report, folder)
    config = _read_config(report, folder)
    shapes = _read_shapes(report, folder)
    if config is None or shapes is None:
        return report
    if config.get("peft_type") != "LORA":
        report.warn(
            "not_lora",
            f"The adapter's method is {config.get('peft_type')}; only LoRA's tensors are looked at in detail.",
            "Load it and compare outputs with check_changes_output.",
        )
        return report
    pairs = _check_tensors(report, config, shapes)
    if pairs:
        _check_numbers(report, folder)
        _check_ranks(report, config, pairs)
        if base is not None:
            check_fit(report, config, pairs, base)
        if changes_base(config):
            report.warn(
                "changes_base",
                f"Its start is {config['init_lora_weights']!r}: loading it changes the base's weights, and low_cpu_mem_usage=True "
                "fails with an error about tensor types.",
                "Load it on a copy of the base that nothing else uses, and share it converted to plain LoRA "
                "(path_initial_model_for_weight_conversion).",
            )
        size = (folder / WEIGHTS).stat().st_size
        report.note(
            "adapter",
            f"LoRA of rank {config.get('r')}, alpha {config.get('lora_alpha')}, on {len(pairs)} layers, "
            f"{size / 1000:,.0f} kB.",
        )
    return report


def _existing_folder(report, folder) -> Path | None:
    if not isinstance(folder, (str, os.PathLike)) or not str(folder).strip():
        problem, code = f"The folder is given as {folder!r}, which is no path.", "bad_argument"
    elif not (path := Path(folder).expanduser()).exists():
        problem, code = f"There is no folder {folder}. PEFT would take such a name for a hub id.", "no_folder"
    elif not path.is_dir():
        problem, code = f"{folder} is a file, not a folder.", "not_a_folder"
    else:
        return path
    report.fail(code, problem, "Pass the folder that save_pretrained wrote the adapter to.")
    return None


def _check_files(report, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    state = [name for name in names if _TRAINER_STATE.fullmatch(name)]
    pickles = [name for name in names if name.endswith(PICKLES) and name not in state]
    if pickles:
        report.fail(
            "pickle",
            f"The folder holds {some(pickles)}, which is a pickle: reading one can run any code that its author put into "
            "it, unless the reader allows tensors only, as PEFT does today. PEFT would read adapter_model.bin when there is no "
            "safetensors file.",
            "Ask its author for safetensors (save_pretrained writes it), or convert it where that risk is acceptable; "
            "delete the file here.",
        )
    if state:
        report.warn(
            "trainer_state",
            f"The folder holds a Trainer's state in pickles: {some(state)}.",
            "Fine in your own runs; delete them before sharing the folder, and never resume from somebody else's.",
        )
    merged = [n for n in names if re.fullmatch(r"config\.json|model.*\.safetensors(\.index\.json)?|pytorch_model.*", n)]
    if merged:
        report.fail(
            "merged_model_beside",
            f"A whole model lies beside the adapter: {some(merged)}. AutoModelForCausalLM.from_pretrained on this folder "
            "loads the model and puts the adapter on top, so a merged model gets its change twice.",
            "Save the merged model to a folder of its own and move these files there.",
        )


def _read_config(report, folder: Path) -> dict | None:
    if not (folder / CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        report.fail(
            "no_config",
            f"{folder.name} has no {CONFIG}, so it is no adapter.",
            f"Adapters are one level down: {some(inside, 4)}. save_pretrained puts every adapter that is not named 'default' "
            "into a folder of its name."
            if inside
            else "Pass the folder that save_pretrained wrote the adapter to.",
        )
        return None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "peft_type" not in config:
            raise ValueError("it should be an object with a peft_type")
    except (OSError, ValueError) as error:
        report.fail(
            "bad_config",
            f"{folder / CONFIG} is not an adapter's configuration: {error}.",
            "Save the adapter again, or copy the file again.",
        )
        return None
    return config


def _read_shapes(report, folder: Path) -> dict | None:
    """Tensor name -> shape, from the file's header."""
    if not (folder / WEIGHTS).is_file():
        report.fail(
            "no_weights",
            f"{folder.name} has no {WEIGHTS}.",
            "Save the adapter with save_pretrained; a Trainer's checkpoint keeps it in checkpoint-<step>.",
        )
        return None
    try:
        return {name: shape for name, (_, shape) in read_safetensors_header(folder / WEIGHTS).items()}
    except InputError as error:
        report.fail("damaged_weights", str(error), "Do not train or answer with it: no part of it can be trusted.")
        return None


def _check_tensors(report, config, shapes) -> dict:
    """Sort the tensors into {module: {"A": shape, "B": shape}}; say what does not belong into a LoRA adapter."""
    pairs, named, strangers = {}, [], []
    for name, shape in shapes.items():
        match = _FACTOR.match(name)
        if match and match["rest"] not in ("", ".weight", ".bias"):
            named.append(name)
        elif match and match["rest"] != ".bias":
            pairs.setdefault(match["module"], {})[match["factor"][-1]] = shape
        elif not match and not _allowed(config, name):
            strangers.append(name)
    if named:
        report.fail(
            "adapter_name_in_keys",
            f"{len(named)} tensors carry an adapter's name in theirs: {some(named, 1)}. PEFT inserts the name itself on "
            "loading, so under any other name nothing is found and B stays zero.",
            "Save with model.save_pretrained(folder), not from model.state_dict().",
        )
    elif not shapes:
        report.fail(
            "empty",
            "The weights' file holds no tensor at all: the adapter was gone from the model when it was saved.",
            "Save before merge_and_unload(); what that returns is the merged model.",
        )
    elif not pairs:
        report.fail(
            "merged_in_disguise",
            f"None of the {len(shapes)} tensors is a LoRA factor (lora_A, lora_B); there are {some(shapes)}. This is a "
            "whole model under an adapter's name.",
            "Load it as a model, without PEFT, or save the adapter before merging.",
        )
    elif strangers:
        report.warn(
            "extra_tensors",
            f"{len(strangers)} tensors are neither LoRA factors nor announced by the configuration: {some(strangers)}.",
            "PEFT drops them in silence: see where the file comes from.",
        )
    doubled = [module for module in pairs if module.startswith("base_model.model.base_model.")]
    if doubled:
        report.fail(
            "nested_keys",
            f"The tensors' names carry PeftModel's prefix twice: {some(doubled, 1)}. The adapter was saved from a "
            "PeftModel inside a PeftModel and fits no plain base.",
            "Train and save again from a model that was wrapped once.",
        )
    unpaired = [module for module, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if unpaired:
        report.fail(
            "unpaired",
            f"{len(unpaired)} layers have only one of A and B: {some(unpaired)}.",
            "Part of the file is missing: save the adapter again.",
        )
    return {module: pair for module, pair in pairs.items() if pair.keys() == {"A", "B"}}


def _allowed(config, name: str) -> bool:
    """Other tensors that a LoRA adapter may hold: DoRA's magnitudes, heads, embeddings, trained tokens, biases."""
    usual = ("embed", "wte", "lm_head", "lora_", "trainable_tokens", "token_adapter")
    if any(part in name for part in (*usual, *(config.get("modules_to_save") or ()))):
        return True
    return config.get("bias", "none") != "none" and name.endswith(".bias")


def _check_numbers(report, folder: Path) -> None:
    import torch
    from safetensors import safe_open

    zero, starts, broken = [], [], []
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if not torch.isfinite(tensor.float()).all():
                broken.append(name)
            if re.search(r"\.(lora_B\.weight|lora_embedding_A)$", name):  # the factor that starts at zero
                starts.append(name)
                if not tensor.any():
                    zero.append(name)
    if broken:
        report.fail(
            "non_finite",
            f"{len(broken)} tensors hold NaN or infinity: {some(broken)}.",
            "Training diverged: take an earlier checkpoint, and lower the learning rate.",
        )
    if zero and len(zero) == len(starts):
        report.fail(
            "zero_b",
            f"B is all zero in all {len(zero)} layers: this adapter changes nothing.",
            "It was saved before training, or training did not reach it: check for trainable parameters and train again.",
        )
    elif zero:
        report.warn(
            "partly_zero_b",
            f"B is all zero in {len(zero)} of {len(starts)} layers, which the adapter leaves unchanged: {some(zero)}.",
            "Training did not reach them: check that they were trainable, and that this adapter was loaded whole before.",
        )


def _check_ranks(report, config, pairs) -> None:
    from peft.utils.other import get_pattern_key

    if config.get("target_parameters"):  # stacked experts: their factors hold rank times the number of experts
        return
    patterns = config.get("rank_pattern") or {}
    wrong = []
    for module, pair in pairs.items():
        rank = patterns.get(get_pattern_key(patterns.keys(), module), config.get("r"))
        if (found := (pair["A"][0], pair["B"][1])) != (rank, rank):
            wrong.append(f"{module} has rank {found[0] if found[0] == found[1] else found}, expected {rank}")
    if wrong:
        report.fail(
            "rank_mismatch",
            f"In {len(wrong)} layers the tensors' rank is not the one that {CONFIG} states: {some(wrong, 1)}.",
            "Configuration and weights come from two different runs: restore the pair that belongs together.",
        )
