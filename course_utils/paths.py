"""The book of paths: what the course ships, the base model and the adapters in use, and the one folder that is written to.

None of them depends on the working directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from adapter_checks.errors import InputError
from adapter_checks.model_folder import is_hub_id, local_folder
from adapter_checks.safetensors_header import read_safetensors_header


def project_root() -> Path:
    """The checkout that this package was installed from, whatever the working directory is."""
    return Path(__file__).resolve().parent.parent


def models_dir() -> Path:
    """The folder of the shipped models."""
    return project_root() / "models"


def pictures_dir() -> Path:
    """The folder of the text-to-image model and its judge."""
    return models_dir() / "pictures"


def data_dir() -> Path:
    """The folder of the shipped task data."""
    return project_root() / "data"


def results_dir() -> Path:
    """The folder of the committed results of `experiments/`."""
    return project_root() / "experiments" / "results"


def runs_dir() -> Path:
    """The one folder that lessons write to; it is created if need be.

    `runs/` in the checkout, or the folder named by COURSE_RUNS. If the checkout can't be written to, a private
    folder in the temporary directory takes its place, and one printed line says so.

    Raises InputError if COURSE_RUNS was given and can't be written to, or if no folder can be.
    """
    chosen = os.environ.get("COURSE_RUNS", "").strip()
    if chosen:
        folder = Path(chosen).expanduser().resolve()
        problem = _why_not_writable(folder)
        if problem:
            raise InputError(
                f"COURSE_RUNS names {folder}, which can't be written to ({problem}). Name another folder or unset it."
            )
        return folder
    folder = project_root() / "runs"
    problem = _why_not_writable(folder)
    return folder if not problem else _fallback_runs_dir(folder, problem)


def _why_not_writable(folder: Path) -> str | None:
    """Try it: permission bits say nothing to root, on network disks or on a read-only mount."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


_told_fallback = set()


def _fallback_runs_dir(wanted: Path, problem: str) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "me"
    folder = Path(tempfile.gettempdir()) / f"lora-course-runs-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    # Training state is resumed from here, so a folder that somebody else put at this name must not be trusted.
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise InputError(f"{folder} belongs to another user. Set COURSE_RUNS to a folder that you can write to.")
    fallback_problem = _why_not_writable(folder)
    if fallback_problem:
        raise InputError(
            f"Neither {wanted} ({problem}) nor {folder} ({fallback_problem}) can be written to. "
            "Set COURSE_RUNS to a folder that you can write to."
        )
    if folder not in _told_fallback:
        _told_fallback.add(folder)
        print(f"{wanted} can't be written to ({problem}), so results go to {folder} (set COURSE_RUNS to change that).")
    return folder


def base_model() -> str:
    """What to pass to `from_pretrained`: the folder of the shipped base model, or COURSE_BASE_MODEL.

    COURSE_BASE_MODEL is a folder or a hub id `organisation/name`; a hub id is returned as it is, unchecked.

    Raises InputError if the folder doesn't exist or isn't a whole model in safetensors.
    """
    chosen = os.environ.get("COURSE_BASE_MODEL", "").strip()
    if not chosen:
        return str(_checked_model_folder(models_dir() / "base", "Restore it with `git checkout -- models`."))
    folder = _chosen_folder(chosen)
    advice = "Point COURSE_BASE_MODEL at a whole model folder, or unset it to use the shipped model."
    if folder.is_dir():
        return str(_checked_model_folder(folder.resolve(), advice))
    # `models/bse` has the form of a hub id too; that `models` exists here or in the course tells that a folder was meant.
    if is_hub_id(chosen) and not folder.exists() and not folder.parent.exists():
        return chosen
    if folder.exists():
        raise InputError(f"COURSE_BASE_MODEL is {chosen}, which is a file, not a model's folder. {advice}")
    raise InputError(
        f"COURSE_BASE_MODEL is {chosen}: there is no such folder, and it is not a hub id like organisation/name. {advice}"
    )


def is_shipped_base() -> bool:
    """True if the lessons run on the model that the course ships, so that its exact expectations hold."""
    chosen = os.environ.get("COURSE_BASE_MODEL", "").strip()
    return not chosen or _chosen_folder(chosen).resolve() == (models_dir() / "base").resolve()


def own_folder(name: str | Path) -> Path:
    """The folder of the reader's own model or adapter: `name` itself, or for a hub id the folder that it is fetched into.

    Raises InputError if there is neither, in place of the many lines of an attempt to reach the hub.
    """
    try:
        return local_folder(name)
    except InputError as error:
        raise InputError(f"{error} Put the path of a folder here, or a hub id such as organisation/name.") from None


def _chosen_folder(chosen: str) -> Path:
    """A relative folder counts from the working directory, else from the course's: a notebook's kernel runs in `notebooks/`."""
    folder = Path(chosen).expanduser()
    in_course = project_root() / folder
    if not folder.exists() and not folder.parent.exists() and in_course.parent.exists():
        return in_course
    return folder


def _checked_model_folder(folder: Path, advice: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"There is no model folder {folder}. {advice}")
    _read_json(folder / "config.json", advice)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index, advice).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} lists no weights. {advice}")
        shards = sorted(set(weight_map.values()))
    else:
        shards = ["model.safetensors"]
    if not (folder / shards[0]).exists() and (any(folder.glob("*.bin")) or any(folder.glob("*.pt"))):
        raise InputError(
            f"{folder} holds its weights in a pickle file (.bin or .pt) only, and a pickle can run code when it is loaded; "
            "the course reads safetensors alone. Convert the weights in a place where you can afford that, or use another model."
        )
    for shard in shards:
        read_safetensors_header(folder / shard)
    return folder


def _read_json(path: Path, advice: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}, so it is not a whole model. {advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as JSON ({error}). {advice}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object. {advice}")
    return content


def adapters_dir() -> Path:
    """The folder of the adapters for the base model in use: the shipped ones, or those trained into `runs/`."""
    if is_shipped_base():
        return models_dir() / "adapters"
    base = base_model()
    slug = base.replace("/", "--")
    if Path(base).is_dir():  # two folders may bear the same name, so a digest of the whole path keeps them apart
        slug = f"{Path(base).name}-{hashlib.sha256(base.encode()).hexdigest()[:8]}"
    return runs_dir() / "adapters" / slug


def adapter_path(name: str) -> Path:
    """The folder of the adapter `name` for the base model in use.

    Raises InputError if there is none, or if its weights are not a whole safetensors file.
    """
    folder = adapters_dir() / name
    if not (folder / "adapter_config.json").is_file():
        if not is_shipped_base():
            raise InputError(
                f"There is no adapter {name!r} for {base_model()} yet: the shipped adapters fit the shipped base only. "
                f"Train them with `python -m pretraining.adapters`, COURSE_BASE_MODEL set as now."
            )
        there = sorted(path.parent.name for path in folder.parent.glob("*/adapter_config.json"))
        raise InputError(
            f"There is no adapter {name!r} in {folder.parent}. "
            + (f"Choose one of: {', '.join(there)}." if there else "Restore them with `git checkout -- models`.")
        )
    read_safetensors_header(folder / "adapter_model.safetensors")
    return folder
