"""Where a check runs a model that it loads itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapter_checks.errors import InputError

if TYPE_CHECKING:
    import torch


def best_device() -> torch.device:
    """A CUDA or Apple GPU if torch has one, else the CPU, as a torch.device."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: torch.device | str) -> torch.device:
    """The torch.device of this name. Raises InputError if torch can't put a tensor there."""
    import torch

    try:
        return torch.empty(1, device=device).device
    except Exception as error:  # torch raises RuntimeError, AssertionError, TypeError, NotImplementedError
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"torch can't use the device {str(device)!r:.60} here: {reason}.") from error
