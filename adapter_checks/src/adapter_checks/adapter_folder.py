"""Is a folder a whole, safe adapter, and does it fit this base? Nothing is loaded that could run code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import CONFIG, HEADS, rank_of, read_adapter_config
from adapter_checks.adapter_numbers import check_numbers
from adapter_checks.base_shapes import check_fit, check_targets, report_partial_shards
from adapter_checks.errors import InputError
from adapter_checks.initialisation import changes_base
from adapter_checks.other_methods import check_other_method
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

WEIGHTS = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What Trainer and Accelerate leave in their checkpoints; PEFT does not read these, but resuming does.
_TRAINER_STATE = re.compile(
    r"training_args\.bin|optimizer(_\d+)?\.(pt|bin)|scheduler(_\d+)?\.(pt|bin)|scaler\.pt|rng_state.*\.pth|random_states_\d+\.pkl"
    r"|sampler.*\.bin|pytorch_model_fsdp(_\d+)?\.bin"
)
_SPOILED = {"ungathered", "malformed_factors", "partial_shards"}
# What wrappers put into the names of parameters. A layer may be called "module", too, but not the whole model.
_WRAPPER = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."
    r"|(?<=^base_model\.)module\.|(?<=^base_model\.model\.)module\."
)
_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(\.\w+)*)$")


@never_raises("Adapter's folder")
def check_adapter_folder(
    folder: str | os.PathLike[str], base: torch.nn.Module | PreTrainedConfig | str | os.PathLike[str] | None = None
) -> Report:
    """Look at an adapter on disk before any library loads it.

    folder  what is given to PeftModel.from_pretrained: holds adapter_config.json and adapter_model.safetensors
    base    optional: the model, its folder, config.json or hub id, or its transformers configuration. Shapes are compared
            on PyTorch's meta device, so no weights are read. Which names and shapes are right there is PEFT's own word.
            A tokenizer that lies beside the adapter is compared with the base's vocabulary.

    Returns a Report; the finding "adapter" names rank, alpha, layers and size. LoRA adapters are looked at in full; of prompt tuning,
    P-tuning, prefix tuning, IA3, VeRA and LN tuning numbers and shapes; other methods for completeness and safety only.
    """
    report = Report("Adapter's folder")
    path = _existing_folder(report, folder)
    if path is None:
        return report
    report.title = f"Adapter's folder {path.name}"
    if not _check_files(report, path):
        return report
    config = read_adapter_config(report, path)
    shapes = _read_shapes(report, path)
    if config is None or shapes is None:
        return report
    if config.get("peft_type") != "LORA":
        if "unknown_method" not in report.codes:
            check_other_method(report, config, shapes, path, base)
        return report
    pairs = _check_tensors(report, config, shapes)
    if pairs:
        _check_complete(report, config, pairs, shapes)
        whole = _check_shapes(report, config, pairs)
        check_numbers(report, config, path / WEIGHTS, whole)
        # The wrapper is told; names are compared without it, so that it hides nothing else.
        pairs = {_WRAPPER.sub("", module): pair for module, pair in pairs.items()}
        if base is None:
            check_targets(report, config, pairs)
        else:
            check_fit(report, config, pairs, shapes, path, base, factors_are_whole=not _SPOILED & set(report.codes))
        if changes_base(config):
            report.warn(
                "changes_base",
                f"Its initialisation is {config['init_lora_weights']!r}: loading it changes the base's weights, and low_cpu_mem_usage=True "
                "fails with an error about tensor types.",
                "Load it on a copy of the base that nothing else uses, and share it converted to plain LoRA "
                "(path_initial_model_for_weight_conversion).",
            )
        size = (path / WEIGHTS).stat().st_size
        report.note(
            "adapter",
            f"LoRA of rank {config.get('r')}, alpha {config.get('lora_alpha')}, on {len(pairs)} layers, "
            f"{size / 1000:,.0f} kB.",
        )
    return report


def _existing_folder(report, folder: Any) -> Path | None:
    if not isinstance(folder, (str, os.PathLike)) or not str(folder).strip():
        problem, code = f"The folder is given as {folder!r:.60}, which is not a path.", "bad_argument"
    else:
        try:
            path = Path(folder).expanduser()
            if path.is_dir():
                next(path.iterdir(), None)
                return path
            problem, code = f"There is no folder {folder}. PEFT would take such a name for a hub id.", "no_folder"
            if path.exists():
                problem, code = f"{folder} is a file, not a folder.", "not_a_folder"
        except (OSError, RuntimeError) as error:  # no permission, or no such user after a tilde
            problem, code = f"{folder} can't be read: {error}.", "not_readable"
    report.fail(code, problem, "Pass the folder that save_pretrained wrote the adapter to.")
    return None


def _check_files(report, folder: Path) -> bool:
    """Whether there is an adapter to look at; what else lies in the folder goes into the report."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    trainer_state = [name for name in names if _TRAINER_STATE.fullmatch(name)]
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and name not in trainer_state]
    if pickles:
        report.fail(
            "pickle",
            f"The folder holds {first_few(pickles)}, which is a pickle: reading one can run any code that its author put into "
            "it, unless the reader allows tensors only, as PEFT does today. PEFT would read adapter_model.bin when there is no "
            "safetensors file.",
            "Ask its author for safetensors (save_pretrained writes it), or convert it where that risk is acceptable; "
            "delete the file here.",
        )
    if trainer_state:
        report.warn(
            "trainer_state",
            f"The folder holds a Trainer's state in pickles: {first_few(trainer_state)}.",
            "Fine in your own runs; delete them before sharing the folder, and never resume from somebody else's.",
        )
    whole = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?|pytorch_model.*")
    merged = [name for name in names if whole.fullmatch(name) and name not in trainer_state]
    if merged and not {CONFIG, WEIGHTS, "adapter_model.bin"} & set(names):
        report.fail(
            "whole_model",
            f"{folder.name} holds a whole model ({first_few(merged)}) and no adapter.",
            "Load it as a model, without PEFT. If an adapter was to be saved here, save what get_peft_model returned, before "
            "merge_and_unload.",
        )
        return False
    if merged:
        report.fail(
            "merged_model_beside",
            f"A whole model lies beside the adapter: {first_few(merged)}. AutoModelForCausalLM.from_pretrained on this folder "
            "loads the model and puts the adapter on top, so a merged model gets its change twice.",
            "Save the merged model to a folder of its own and move these files there.",
        )
    return True


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
        if isinstance(error.__cause__, OSError):
            report.fail("not_readable", str(error), "See who may read the file, and whether the disk is well.")
            return None
        report.fail("damaged_weights", str(error), "Do not train or generate with it: no part of it can be trusted.")
        return None


def _check_tensors(report, config, shapes) -> dict:
    """Sort the tensors into {module: {"A": shape, "B": shape}}; say what does not belong into a LoRA adapter."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    with_adapter_name, unexpected = [], []
    for name, shape in shapes.items():
        match = _FACTOR.match(name)
        if match and match["rest"] not in ("", ".weight", ".bias"):
            with_adapter_name.append(name)
        elif match and match["rest"] != ".bias":
            pairs.setdefault(match["module"], {})[match["factor"][-1]] = shape
        elif not match and not _is_expected(config, name):
            unexpected.append(name)
    if with_adapter_name:
        report.fail(
            "adapter_name_in_keys",
            f"{len(with_adapter_name)} tensors carry an adapter's name in their own: {first_few(with_adapter_name, 1)}. PEFT inserts the name itself on "
            "loading, so under any other name nothing is found and B stays zero.",
            "Save with model.save_pretrained(folder), not from model.state_dict().",
        )
    elif not shapes:
        report.fail(
            "empty",
            "The weights' file holds no tensor at all: the adapter was gone from the model when it was saved, or its weights lay "
            "in parts on several processes (DeepSpeed ZeRO-3, FSDP) and were not gathered.",
            "Save before merge_and_unload(), which returns the merged model. After ZeRO-3 or FSDP save through the trainer or "
            "accelerator.get_state_dict.",
        )
    elif not pairs:
        report.fail(
            "merged_in_disguise",
            f"None of the {len(shapes)} tensors is a LoRA factor (lora_A, lora_B); there are {first_few(shapes)}. This is a "
            "whole model under the name of an adapter.",
            "Load it as a model, without PEFT, or save the adapter before merging.",
        )
    elif unexpected:
        report.warn(
            "extra_tensors",
            f"{len(unexpected)} tensors are neither LoRA factors nor named by the configuration: {first_few(unexpected)}.",
            "PEFT drops them without a message: see where the file comes from.",
        )
    nested = [module for module in pairs if module.startswith("base_model.model.base_model.")]
    if nested:
        report.fail(
            "nested_keys",
            f"The tensors' names carry PeftModel's prefix twice: {first_few(nested, 1)}. The adapter was saved from a "
            "PeftModel inside a PeftModel and fits no plain base.",
            "Train and save again from a model that was wrapped once.",
        )
    wrapped = [name for name in shapes if _WRAPPER.search(name)]
    strange = [name for name in shapes if not name.startswith("base_model.model.")]
    if pairs and (wrapped or strange):
        report.fail(
            "foreign_keys",
            f"{len({*wrapped, *strange})} of {len(shapes)} tensors have names under which PEFT finds no layer, such as "
            f"{(wrapped or strange)[0]}: "
            + (
                "the name of a wrapper (torch.compile, DDP, FSDP or checkpointing) is in them."
                if wrapped
                else "they don't begin with base_model.model."
            )
            + " Loading drops them, and the base answers alone.",
            "Save again from the model inside its wrapper, with save_pretrained; or rename the tensors.",
        )
    unpaired = [module for module, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if unpaired:
        report.fail(
            "unpaired",
            f"{len(unpaired)} layers have only one of A and B: {first_few(unpaired)}.",
            "Part of the file is missing: save the adapter again.",
        )
    return {module: pair for module, pair in pairs.items() if pair.keys() == {"A", "B"}}


def _check_shapes(report, config, pairs) -> list[str]:
    """The modules whose A and B are the matrices that the rank asks for, in so far as shapes tell without the base."""
    malformed = [module for module, pair in pairs.items() if min(map(len, pair.values())) < 2]
    malformed += [module for module, pair in pairs.items() if 0 in (*pair["A"], *pair["B"]) and module not in malformed]
    matrices = {module: pair for module, pair in pairs.items() if module not in malformed}
    if malformed:
        shapes = f"{len(malformed)} layers: {malformed[0]} {tuple(pairs[malformed[0]].values())}"
        flat = [module for module in malformed if max(map(len, pairs[module].values())) == 1]
        if any(0 in (*pairs[module]["A"], *pairs[module]["B"]) for module in malformed) or 2 * len(flat) > len(pairs):
            report.fail(
                "ungathered",
                f"A and B are empty or flat in {shapes}. They were saved while several processes each held a part of them (DeepSpeed "
                "ZeRO-3, FSDP), so the file does not hold what was trained.",
                "Gather before saving: stage3_gather_16bit_weights_on_model_save, FULL_STATE_DICT, or accelerator.get_state_dict. "
                "The whole weights may still be in the checkpoint (zero_to_fp32.py).",
            )
        else:
            report.fail(
                "malformed_factors",
                f"A or B is not a matrix in {shapes}.",
                "They were cut, flattened or packed by some other program: save the adapter again.",
            )
    if config.get("target_parameters"):  # stacked experts: their factors hold rank times the number of experts
        return list(matrices)
    wrong = {
        module: (rank, pair["A"][0], pair["B"][1])
        for module, pair in matrices.items()
        if (pair["A"][0], pair["B"][1]) != ((rank := rank_of(config, module)),) * 2
    }
    # Processes share the rows of each tensor: A (rank, inputs) loses a part of its rank, B (outputs, rank) does not. Or the columns.
    by_rows = all(a < rank == b for rank, a, b in wrong.values())
    by_columns = all(b < rank == a for rank, a, b in wrong.values())
    if wrong and len(wrong) == len(matrices) and (by_rows or by_columns):
        rank, a, b = next(iter(wrong.values()))
        cut, other, lay = (
            (f"A has {a} of {rank} rows", f"B has all its {rank} columns", "rows")
            if by_rows
            else (f"B has {b} of {rank} columns", f"A has all its {rank} rows", "columns")
        )
        report_partial_shards(
            report,
            f"{cut} in the first of all {len(wrong)} layers, and {other}: the {lay} lay on several processes, and the file holds one "
            "process's part.",
        )
    elif wrong:
        module, (rank, a, b) = next(iter(wrong.items()))
        rest = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        report.fail(
            "rank_mismatch",
            f"In {len(wrong)} layers the tensors' rank is not the one that {CONFIG} states: {module} has rank "
            f"{a if a == b else (a, b)}, expected {rank}{rest}.",
            "Configuration and weights come from two different runs: restore the pair that belongs together.",
        )
    return [module for module in matrices if module not in wrong]


def _check_complete(report, config, pairs, shapes) -> None:
    """Are there tensors of all that the configuration says was trained? PEFT fills what is missing with initial values."""

    def absent(names) -> list[str]:
        return [name for name in names if not any(f".{name}." in f".{tensor}." for tensor in shapes)]

    heads = HEADS.get(config.get("task_type"), ())
    missing = absent(set(config.get("modules_to_save") or ()) - set(heads))
    if heads and absent(heads) == list(heads):
        missing.append(" or ".join(heads))
    if config.get("use_dora"):
        missing += absent(f"{module}.lora_magnitude_vector" for module in pairs)
    if config.get("lora_bias"):
        missing += absent(f"{module}.lora_B.bias" for module in pairs)
    if config.get("trainable_token_indices"):
        missing += absent(["trainable_tokens_delta"])
    if missing:
        report.fail(
            "missing_tensors",
            f"{CONFIG} says that {first_few(sorted(missing))} was trained as well, and the file has no tensor of it. Loading "
            "gives it initial values, which for a new head are random ones.",
            "Save again from the trained model, with save_pretrained.",
        )


def _is_expected(config, name: str) -> bool:
    """Other tensors that a LoRA adapter may hold: DoRA's magnitudes, heads, embeddings, trained tokens, biases."""
    usual = ("embed", "wte", "lm_head", "lora_", "trainable_tokens")
    if any(part in name for part in (*usual, *(config.get("modules_to_save") or ()))):
        return True
    return config.get("bias", "none") != "none" and name.endswith(".bias")
