"""What a safetensors file holds, read from its header alone."""

from __future__ import annotations

from pathlib import Path


def read_safetensors_header(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype as the file spells it, such as "F32"; shape) of every tensor, without reading the tensors.

    safetensors compares the sizes that the header promises with the file's, so a file cut short at any place is found.

    Raises InputError, naming the file, if it is missing, cut short or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    from adapter_checks.errors import InputError

    path = Path(path)
    remedy = "Copy or download the file again."
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a safetensors file.")
    try:
        with path.open("rb"), safe_open(path, framework="numpy") as file:  # open() says why a file can't be read
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    except FileNotFoundError:
        raise InputError(f"There is no file {path}. {remedy}") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}).") from error
    except SafetensorError as error:
        raise InputError(
            f"{path} is cut short, has bytes after its last tensor, or is not a safetensors file ({error}). {remedy}"
        ) from error
