"""How the lessons run on this machine: device, dtype, seed, the trainer's settings, and libraries that keep quiet.

Nothing heavy is imported at the top: torch loads inside the functions that need it.
"""

from __future__ import annotations

import os
import platform
import random
import sys
import warnings
from pathlib import Path

from adapter_checks import bitsandbytes_workarounds
from adapter_checks.device import usable_device
from course_utils import paths


def quiet_imports() -> None:
    """Call before importing peft, transformers or datasets: hides two known messages, and turns progress bars off.

    In a notebook those bars are widgets, of which nothing is left in the saved file, and elsewhere they write to
    stderr. `progress` stands in for them. tqdm's warning that ipywidgets is missing goes with them.

    It also keeps libraries from finding a GPU where `device` is the CPU by choice: bitsandbytes, PEFT and accelerate put
    weights on it by themselves.
    """
    asked = os.environ.get("COURSE_DEVICE", "").strip()
    if asked == "cpu" or (not asked and paths.is_shipped_base()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    bitsandbytes_workarounds.quiet_imports()
    warnings.filterwarnings("ignore", message="IProgress not found")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers goes by it too
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].utils.disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def device():
    """The torch.device that lessons run on.

    The shipped model runs on the CPU everywhere, so that each learner sees the numbers of the text; another base
    model takes a CUDA or Apple GPU if there is one. COURSE_DEVICE names another: "cuda" for sweeps of the shipped model.

    Raises InputError if COURSE_DEVICE names none that torch knows.
    """
    import torch

    if asked := os.environ.get("COURSE_DEVICE", "").strip():
        return usable_device(asked)
    if not paths.is_shipped_base():
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
    return torch.device("cpu")


def dtype():
    """The torch.dtype of the base model's weights: bfloat16 for another base on a CUDA device that has it, else float32."""
    import torch

    half = not paths.is_shipped_base() and device().type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if half else torch.float32


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


def processor() -> str:
    """The GPU's model if lessons run on one, else the processor's as Linux tells it, else the machine type.

    It stands beside every time that is recorded.
    """
    import torch

    if device().type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
