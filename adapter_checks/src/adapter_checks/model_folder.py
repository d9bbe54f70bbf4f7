"""Where a model is, a folder or the hub, and what its folder holds. Nothing here reads a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.errors import InputError
from adapter_checks.names import plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# All that a model, a tokenizer or an adapter is made of, and no pickle: what is fetched from the hub.
SAFE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def is_hub_id(name: object) -> bool:
    """Whether a name can only be meant for the hub: `organisation/name` by huggingface_hub's own rule.

    If the part before the slash is a folder here, the name is a mistyped path and must not be sent anywhere; so is a
    name without a slash.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(name, str) or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists() and not Path(name).parent.exists()


def local_folder(name: str | os.PathLike[str], patterns: Sequence[str] = SAFE_FILES) -> Path:
    """A folder as it is; for a hub id a folder with the files that match, from the cache or fetched: never a pickle.

    Raises InputError if it is neither.
    """
    folder = _as_path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name} is a file, not a folder.")
    if not is_hub_id(name):
        raise InputError(f"There is no folder {name}.")
    return Path(_fetched(str(name), patterns))


def load_config(name: str | os.PathLike[str]) -> PreTrainedConfig:
    """The configuration of a model, from its folder, its config.json or its hub id; code in the model's folder never runs.

    Raises InputError if there is none, or transformers can't read it.
    """
    import transformers

    path = _as_path(name)
    shown = str(path.parent if path.is_file() else name)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise InputError(f"{name} has no config.json.")
    elif not path.exists():
        if not is_hub_id(name):
            raise InputError(f"There is no folder or file {name}.")
        path = Path(_fetched(str(name), ["config.json"])) / "config.json"
    read_json(path)  # says what is wrong with the file itself
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # unknown architectures, impossible values, code of its own: each its own exception
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is not a configuration that transformers can read: {reason}") from error
    config.name_or_path = shown
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from a model's folder: the single one, else those of the index.

    Raises InputError if there are none, or the index can't be read.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise InputError(f"{folder} has no model.safetensors and no {index.name}.")
    try:
        names = list(dict.fromkeys(read_json(index)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it lists no files of this folder")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} can't be read as an index of weights: {error}.") from error
    return [folder / name for name in names]


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """{a weight's name in the plain model: its name in the files}, by the renamings that transformers loads this class with.

    Weights that loading stacks, such as experts, are left out. The model may have adapters in its layers.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    own = {plain_name(name): True for name in model.state_dict()}
    names = {}
    for name in stored:
        renamed, stacked = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if stacked is None:
            names[renamed] = name
    return names


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if there is no such file or it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} can't be read as JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold a JSON object, and holds a {type(content).__name__}.")
    return content


def _as_path(name: str | os.PathLike[str]) -> Path:
    if isinstance(name, str) and not name.strip():
        raise InputError("No folder was given: the name is empty.")
    if not isinstance(name, (str, os.PathLike)):
        what = f"a {type(name).__name__}" if hasattr(name, "save_pretrained") else f"{name!r:.60}"
        raise InputError(f"This is {what}, neither a folder nor a hub id.")
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # no permission to look, or no such user after a tilde
        raise InputError(f"{name} can't be looked at: {error}.") from error
    return path


def _fetched(hub_id: str, patterns: Sequence[str]) -> str:
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"There is no folder {hub_id}, and no such model could be fetched: {reason}") from error
