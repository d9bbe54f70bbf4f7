"""Where things are, which machine this is, and how to write results without losing the old ones.

Nothing heavy is imported at the top: torch and transformers load inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from adapter_checks.bitsandbytes_workarounds import quiet_imports as quiet_imports
from adapter_checks.bitsandbytes_workarounds import quiet_int8 as quiet_int8
from adapter_checks.bitsandbytes_workarounds import stop_repacking as stop_repacking
from adapter_checks.errors import InputError
from adapter_checks.safetensors_header import read_safetensors_header
from adapter_checks.saving import saving as saving

TRAIN_ADAPTERS_COMMAND = "python -m pretraining.adapters"


def __getattr__(name):
    # Progress derives from a transformers class, and importing that takes seconds: only on first use.
    if name == "Progress":
        from course_utils.progress import Progress

        return Progress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------------------------------------- places


def project_root() -> Path:
    """The checkout that this package was installed from, whatever the working directory is."""
    return Path(__file__).resolve().parent.parent


def models_dir() -> Path:
    """The folder of the shipped models."""
    return project_root() / "models"


def data_dir() -> Path:
    """The folder of the shipped task data."""
    return project_root() / "data"


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


# ---------------------------------------------------------------------------------------------- models

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
    # `models/bse` has the form of a hub id too; that `models` exists here tells that a folder was meant.
    if _HUB_ID.fullmatch(chosen) and not folder.exists() and not folder.parent.exists():
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
                f"Train them with `{TRAIN_ADAPTERS_COMMAND}`, COURSE_BASE_MODEL set as now."
            )
        there = sorted(path.parent.name for path in folder.parent.glob("*/adapter_config.json"))
        raise InputError(
            f"There is no adapter {name!r} in {folder.parent}. "
            + (f"Choose one of: {', '.join(there)}." if there else "Restore them with `git checkout -- models`.")
        )
    read_safetensors_header(folder / "adapter_model.safetensors")
    return folder


# ---------------------------------------------------------------------------------------------- machine


def device():
    """The torch.device that lessons run on.

    The shipped model runs on the CPU everywhere, so that each learner sees the numbers of the text; another base
    model takes a CUDA or Apple GPU if there is one.
    """
    import torch

    if not is_shipped_base():
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
    return torch.device("cpu")


def dtype():
    """The torch.dtype of the base model's weights: bfloat16 on a CUDA device that has it, else float32."""
    import torch

    return torch.bfloat16 if device().type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def disable_progress_bars() -> None:
    """Turn off the progress bars of datasets, huggingface_hub and transformers, best before they are imported.

    In a notebook those bars are widgets, of which nothing is left in the saved file, and elsewhere they write to
    stderr. `Progress` and `ProgressLine` stand in for them. tqdm's warning that ipywidgets is missing goes with them.
    """
    warnings.filterwarnings("ignore", message="IProgress not found")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers goes by it too
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].utils.disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators; call it before `get_peft_model`, which draws A."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # seeds every device


def trainer_settings() -> dict:
    """Keywords for `TrainingArguments` or `SFTConfig` that fit this machine.

    TRL's own defaults, bf16 and activation checkpointing on, fail on a CPU or slow a small model down.
    """
    import torch

    kind = device().type
    return {
        "use_cpu": kind == "cpu",
        "bf16": dtype() is torch.bfloat16,
        "activation_checkpointing": False,
        "dataloader_pin_memory": kind == "cuda",
        "report_to": "none",
        "disable_tqdm": True,
    }


# ---------------------------------------------------------------------------------------------- environment


def processor() -> str:
    """The processor's model as Linux tells it, else the machine type: it stands beside every time that is recorded."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


_NEEDED_DISK = 2e9  # bytes: checkpoints of a lesson, and the data cache
_NEEDED_MEMORY = 3e9  # bytes: the largest lesson's peak


@dataclass(frozen=True)
class Check:
    """One line of the environment report; `remedy` says what to do if `ok` is false."""

    ok: bool
    what: str
    remedy: str = ""

    def __str__(self):
        return f"[OK]   {self.what}" if self.ok else f"[FAIL] {self.what}. {self.remedy}"


class EnvironmentReport(list):
    """A list of Check that prints as one line each; `ok` tells if all of them hold."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self)

    def __str__(self):
        return "\n".join(str(check) for check in self)

    __repr__ = __str__


def environment_report() -> EnvironmentReport:
    """Check Python, the pinned packages, disk, memory, device and base model; print it to see the lines."""
    report = EnvironmentReport()
    report.append(
        Check(
            sys.version_info >= (3, 11),
            f"Python {sys.version.split()[0]} (3.11 or newer is needed)",
            "Install a newer Python and make the environment again with it.",
        )
    )
    report.extend(_package_checks(project_root() / "requirements.txt"))
    report.extend([_disk_check(), _memory_check(), _device_check(), _base_model_check()])
    return report


def _package_checks(requirements: Path) -> list[Check]:
    import importlib.metadata  # a third of this module's import time, so only here

    pins = re.findall(
        r"^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;#]+)", requirements.read_text(encoding="utf-8"), re.M
    )
    checks = []
    for name, wanted in pins:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        # "2.13.0+cpu" is PyTorch's CPU build of 2.13.0
        same = installed is not None and installed.split("+")[0] == wanted
        what = (
            f"{name} {installed}" if same else f"{name} is {installed or 'missing'}, the course is written for {wanted}"
        )
        checks.append(Check(same, what, f"Run `{Path(sys.executable).name} -m pip install -r requirements.txt`."))
    return checks


def _disk_check() -> Check:
    try:
        folder = runs_dir()
    except InputError as error:
        return Check(False, "no folder for results", str(error))
    free = shutil.disk_usage(folder).free
    return Check(
        free >= _NEEDED_DISK,
        f"{free / 1e9:.1f} GB free for results in {folder} ({_NEEDED_DISK / 1e9:.0f} GB are needed)",
        "Make room, or set COURSE_RUNS to a folder on another disk.",
    )


def _memory_check() -> Check:
    try:
        import psutil
    except ImportError:
        return Check(False, "memory is unknown, psutil is missing", "Install requirements.txt.")
    available = psutil.virtual_memory().available
    return Check(
        available >= _NEEDED_MEMORY,
        f"{available / 1e9:.1f} GB of memory available ({_NEEDED_MEMORY / 1e9:.0f} GB are needed)",
        "Close other programs or notebooks.",
    )


def _device_check() -> Check:
    try:
        return Check(True, f"device {device().type}, weights in {str(dtype()).removeprefix('torch.')}")
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return Check(False, f"torch can't be imported ({error})", "Install requirements.txt.")


def _base_model_check() -> Check:
    try:
        base = base_model()
    except InputError as error:
        return Check(False, "base model", str(error))
    kind = "folder" if Path(base).is_dir() else "hub id, fetched when first loaded"
    return Check(True, f"base model {base} ({kind})")
