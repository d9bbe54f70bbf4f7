"""Merge an adapter into its base, folder to folder: all in memory, or one tensor at a time.

merge_whole       the usual merge by PEFT, saved atomically: the whole model is in memory
merge_by_shards   the same weights, one tensor at a time
merge_to_folder   the usual merge, and by shards where memory runs out
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import CONFIG
from adapter_checks.adapter_folder import check_adapter_folder
from adapter_checks.base_shapes import load_base, meta_base
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.errors import InputError
from adapter_checks.initialisation import changes_base
from adapter_checks.model_folder import SAFE_FILES, local_folder, read_json, weight_files
from adapter_checks.names import plain_name
from adapter_checks.report import first_few
from adapter_checks.safetensors_header import read_safetensors_header
from adapter_checks.saving import saving
from adapter_checks.soft_prompts import why_not_mergeable

if TYPE_CHECKING:
    import os

    import torch

_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*|vocab\.(json|txt)|merges\.txt|.*\.model"
)
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}  # as safetensors and torch spell them
_FACTOR = re.compile(r"(?P<module>base_model\.model\..+)\.lora_(?P<factor>[AB])\.weight")

# Settings of a LoraConfig that leave the merge at W + scaling * B @ A. Any other that is not at its default is refused.
_HARMLESS = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "peft_type", "auto_mapping",
    "peft_version", "base_model_name_or_path", "revision", "inference_mode", "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
_HARMLESS_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


def merge_whole(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Load base and adapter, `merge_and_unload()`, save with the tokenizer.

    Arguments, result and errors are those of merge_by_shards, and so are the merged weights. Merges all that PEFT does.
    """
    import torch

    quiet_imports()
    from peft import PeftModel

    base, adapter, out = _checked_folders(base, adapter, out)
    dtype = _dtype(dtype)
    for file in weight_files(base):
        read_safetensors_header(file)  # names a file that is cut short, which from_pretrained does not
    _check_adapter(adapter, base)
    with saving(out) as folder:
        merged = PeftModel.from_pretrained(load_base(base, adapter, dtype or "auto"), adapter).merge_and_unload()
        broken = [name for name, weight in merged.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise _not_finite(broken)
        merged.save_pretrained(folder)
        for name in _tokenizer_files(base, adapter):
            shutil.copyfile(name, folder / name.name)
    return out


def merge_by_shards(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write base + scaling * B @ A to `out`, without ever holding the model in memory.

    base     folder of the base, or its hub id: safetensors, one file or shards with an index
    adapter  folder or hub id of a LoRA adapter for it
    out      folder for the merged model; an earlier one is replaced at the end and stays whole until then
             (`saving.saving`)
    dtype    of the merged weights, a torch.dtype or its name; None keeps that of each tensor of the base

    Each file of the base is read and written again tensor by tensor, so no more than a few times the largest tensor is in
    memory. The merged folder has the base's shards, index and configuration, and the tokenizer with its template: the
    adapter's, if its folder has one, else the base's. The weights are those of PEFT's `merge_and_unload()` on a base loaded
    in that dtype, to the bit: the sum is taken in float32 and rounded once.

    Merges LoRA on linear layers and on GPT-2's Conv1D, with rsLoRA, rank and alpha patterns. Refuses anything else in a
    sentence before a byte is written: DoRA and other variants, modules_to_save, biases, embeddings, tied weights,
    initialisations that change the base (OLoRA, PiSSA), quantised bases.

    Returns `out`. Raises InputError if something can't be merged, is damaged or missing, or can't be written.
    """
    base, adapter, out = _checked_folders(base, adapter, out)
    dtype = _dtype(dtype)
    files = weight_files(base)
    shapes = [read_safetensors_header(file) for file in files]
    changes = _changes(base, adapter, {tensor: kind for header in shapes for tensor, kind in header.items()})
    with saving(out) as folder:
        sizes = [_write_merged(file, folder / file.name, changes, dtype) for file in files]
        _copy_rest(base, adapter, folder, dtype, sum(sizes))
    return out


def merge_to_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
) -> str:
    """merge_whole, or merge_by_shards where the whole model doesn't fit into memory; the same arguments and errors.

    By shards at once if the model is larger than the memory available: Linux may kill a process that takes more, and
    then no error is left to catch. Else after an error that says that memory ran out, on the CPU or a GPU.

    Returns "whole" or "shards".
    """
    import psutil

    files = weight_files(_checked_folders(base, adapter, out)[0])
    numbers = sum(math.prod(shape) for file in files for _, shape in read_safetensors_header(file).values())
    kind = _dtype(dtype)
    size = sum(file.stat().st_size for file in files) if kind is None else numbers * kind.itemsize
    if size < psutil.virtual_memory().available:
        try:
            merge_whole(base, adapter, out, dtype=dtype)
            return "whole"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    # Outside of `except`: the error's traceback holds on to the model that was too large.
    try:
        merge_by_shards(base, adapter, out, dtype=dtype)
    except InputError as error:
        raise InputError(
            f"The whole model doesn't fit into memory, so it was to be merged by shards. {error}"
        ) from error
    return "shards"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that memory ran out; libraries say it in several ways."""
    import torch

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        # PyTorch's allocator on the CPU raises a RuntimeError, safetensors an error of its own.
        if re.search(r"can't allocate memory|cannot allocate memory|not enough memory|out of memory", str(cause), re.I):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


# ---------------------------------------------------------------------------------------------- what to merge


@dataclass(frozen=True)
class _Change:
    """What is added to one tensor of the base: scaling * B @ A, transposed for Conv1D, which stores (in, out)."""

    file: Path
    module: str
    scaling: float
    transposed: bool

    def tensor(self):
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            a, b = (file.get_tensor(f"{self.module}.lora_{factor}.weight").float() for factor in "AB")
        product = b @ a
        return (product.T if self.transposed else product) * self.scaling


def _changes(base: Path, adapter: Path, tensors: dict) -> dict[str, _Change]:
    """Name of a tensor in the base's files -> what is added to it. Raises InputError for all that can't be added."""
    import torch
    from peft.utils.other import get_pattern_key
    from transformers.pytorch_utils import Conv1D

    if "quantization_config" in read_json(base / "config.json"):
        raise InputError(f"{base} is quantised. Merge into the 16-bit or 32-bit base that it was made from.")
    config = _check_adapter(adapter, base)
    _refuse_unknown(config)
    file = adapter / "adapter_model.safetensors"
    factors = {name: _FACTOR.fullmatch(name) for name in read_safetensors_header(file)}
    paths = sorted({match["module"] for match in factors.values() if match})
    model: Any = meta_base(base, config, paths)[0]
    modules = dict(model.named_modules())
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    unexpected = [name for name, match in factors.items() if match is None]
    if unexpected:
        raise InputError(
            f"{file} holds {first_few(unexpected)}, which is not a LoRA factor of a linear layer, and only those are merged by shards; "
            "merge_whole merges more."
        )
    changes = {}
    for path in paths:
        name = plain_name(path)
        if not isinstance(modules.get(name), (torch.nn.Linear, Conv1D)):
            kind = f"is {type(modules[name]).__name__}" if name in modules else "has another name in this base"
            raise InputError(f"{name} {kind}, and only linear layers are merged by shards; merge_whole merges more.")
        weight = f"{name}.weight"
        if weight in tied:
            raise InputError(
                f"{weight} is tied to another weight: merging would change both, and the adapter changes one. Save the base with "
                "a head of its own (tie_word_embeddings=False) and merge into that."
            )
        # A base without head is saved without the prefix that its model has inside the model with head.
        short = weight.removeprefix(f"{model.base_model_prefix}.")
        stored = next((candidate for candidate in (weight, short) if candidate in tensors), None)
        if stored is None or tensors[stored][0] not in _FLOATS:
            problem = "is not in the base's files" if stored is None else f"is stored as {tensors[stored][0]}"
            raise InputError(f"{weight} {problem}, so only merge_whole can merge it.")
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], name), config["r"])
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], name), config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        changes[stored] = _Change(file, path, scaling, isinstance(modules[name], Conv1D))
    return changes


def _check_adapter(adapter: Path, base: Path) -> dict:
    """The adapter's configuration, with defaults filled in; InputError if it is damaged or doesn't fit the base."""
    check_adapter_folder(adapter, base=base).raise_if_failed()
    own = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    filled = {"r": 8, "lora_alpha": 8, "use_rslora": False} | own
    return filled | {name: own.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}


def _refuse_unknown(config: dict) -> None:
    from peft import LoraConfig

    if config["peft_type"] != "LORA":
        raise InputError(
            f"The adapter's method is {config['peft_type']}; only LoRA is merged by shards; merge_whole merges more."
        )
    if changes_base(config):
        raise InputError(
            f"init_lora_weights is {config['init_lora_weights']!r}: PEFT changes the base when it loads such an adapter. "
            "merge_whole can merge it; by shards it must be converted first (path_initial_model_for_weight_conversion)."
        )
    harmless = _HARMLESS | (
        {"init_lora_weights"} if config.get("init_lora_weights", True) in _HARMLESS_INITIALISATIONS else set()
    )
    defaults = vars(LoraConfig())
    # None, False, {} and [] all mean "not used"; newer versions of PEFT bring settings that this list can't know.
    unusual = {
        name: value for name, value in config.items()
        if name not in harmless and value not in (None, False, {}, [], defaults.get(name))
    }  # fmt: skip
    if unusual:
        listed = ", ".join(f"{name}={value!r}" for name, value in unusual.items())
        raise InputError(f"Merging by shards adds scaling * B @ A and does not handle {listed}; merge_whole may.")


def _checked_folders(base, adapter, out) -> tuple[Path, Path, Path]:
    base, adapter, out = local_folder(base), local_folder(adapter), Path(out).expanduser().absolute()
    for role, folder in (("base", base), ("adapter", adapter)):
        if folder.resolve().is_relative_to(out.resolve()):
            raise InputError(
                f"Saving to {out} would replace the {role} in {folder}. Give the merged model a folder of its own."
            )
    if (out.parent / "adapter_config.json").exists():
        raise InputError(
            f"{out.parent} is an adapter's folder. Give the merged model a folder of its own, outside of it."
        )
    if (adapter / CONFIG).is_file() and (why := why_not_mergeable(read_json(adapter / CONFIG))):
        raise InputError(f"{why} Ship the adapter's folder beside the base.")
    return base, adapter, out


def _dtype(dtype: Any) -> torch.dtype | None:
    """A torch.dtype from itself or its name; None stays None."""
    import torch

    found = getattr(torch, str(dtype).removeprefix("torch."), None) if dtype is not None else None
    if dtype is not None and (not isinstance(found, torch.dtype) or str(found)[6:] not in _FLOATS.values()):
        raise InputError(f"dtype is {dtype!r}. Choose one of: {', '.join(_FLOATS.values())}.")
    return found


# ---------------------------------------------------------------------------------------------- reading and writing


def _write_merged(source: Path, target: Path, changes: dict[str, _Change], dtype) -> int:
    """Copy one safetensors file tensor by tensor, with the changes added; returns the bytes of its tensors."""
    with source.open("rb") as read, target.open("wb") as write:
        (length,) = struct.unpack("<Q", read.read(8))
        old = json.loads(read.read(length))
        metadata = old.pop("__metadata__", {"format": "pt"})
        start = 8 + length
        # The widest numbers first, as safetensors' own writer does it: each tensor then lies at a multiple of their width.
        kinds = {name: _kind_after(entry["dtype"], dtype) for name, entry in old.items()}
        order = sorted(old, key=lambda name: (-_width(old[name], kinds[name]), old[name]["data_offsets"]))
        new, end = {"__metadata__": metadata}, 0
        for name in order:
            size = _width(old[name], kinds[name]) * math.prod(old[name]["shape"])
            new[name] = {"dtype": kinds[name], "shape": old[name]["shape"], "data_offsets": [end, end := end + size]}
        header = json.dumps(new, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        write.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            first, last = old[name]["data_offsets"]
            read.seek(start + first)
            content = bytearray(last - first)
            read.readinto(content)
            if content and (name in changes or kinds[name] != old[name]["dtype"]):
                content = _changed(content, old[name], kinds[name], changes.get(name), name)
            write.write(content)
    return end


def _changed(content: bytearray, entry: dict, kind: str, change: _Change | None, name: str):
    """The tensor's bytes after change and conversion."""
    import torch

    tensor = torch.frombuffer(content, dtype=getattr(torch, _FLOATS[entry["dtype"]])).reshape(entry["shape"])
    tensor = tensor.to(getattr(torch, _FLOATS[kind]))
    if change is not None:
        # In place on a narrower tensor torch computes in float32 and rounds once: so does PEFT's merge.
        tensor += change.tensor()
        if not torch.isfinite(tensor).all():
            raise _not_finite([name])
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _kind_after(kind: str, dtype) -> str:
    names = {torch_name: name for name, torch_name in _FLOATS.items()}
    return names[str(dtype)[6:]] if dtype is not None and kind in _FLOATS else kind


def _width(entry: dict, kind: str) -> int:
    """Bytes of one number."""
    first, last = entry["data_offsets"]
    now = (last - first) // max(math.prod(entry["shape"]), 1)
    return {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(kind, now)


def _copy_rest(base: Path, adapter: Path, folder: Path, dtype, total_size: int) -> None:
    """Configuration, index and tokenizer."""
    tokenizer = _tokenizer_files(base, adapter)
    for file in (*tokenizer, *base.glob("*generation_config.json")):
        shutil.copyfile(file, folder / file.name)
    config = read_json(base / "config.json")
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    index = base / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = (content.get("metadata") or {}) | {"total_size": total_size}
        _write_json(folder / index.name, content)


def _tokenizer_files(base: Path, adapter: Path) -> list[Path]:
    """The adapter's own tokenizer if it has one, as trainers save it: its template is what the adapter was trained with."""
    source = adapter if (adapter / "tokenizer_config.json").is_file() else base
    files = {file for pattern in SAFE_FILES for file in source.glob(pattern) if _TOKENIZER.fullmatch(file.name)}
    return sorted(files)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _not_finite(names) -> InputError:
    return InputError(
        f"After the merge {first_few(names)} would hold NaN or infinity: the change is too large for this dtype, or the base is damaged. "
        "In float16 try bfloat16."
    )
