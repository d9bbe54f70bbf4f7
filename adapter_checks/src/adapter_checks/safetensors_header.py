"""What a safetensors file holds, read from its header alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from adapter_checks.errors import InputError


def read_safetensors_header(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype as the file spells it, such as "F32"; shape) of every tensor, without reading the tensors.

    The format: 8 bytes with the header's length, little-endian; the header in JSON; the tensors' bytes
    (https://huggingface.co/docs/safetensors, "Format"). The length that the header promises is compared with the
    file's, which finds a file cut short at any place.

    Raises InputError, naming the file, if it is missing, cut short or not safetensors.
    """
    path = Path(path)
    remedy = "Copy or download the file again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            # Checked before reading: in a file of another kind these 8 bytes may ask for exabytes.
            if 8 + header_length > size:
                raise InputError(
                    f"{path} is cut short or not a safetensors file: its header alone should take {header_length} bytes, "
                    f"and the file has {size}. {remedy}"
                )
            header = json.loads(file.read(header_length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        promised = 8 + header_length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        described = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}
    except FileNotFoundError:
        raise InputError(f"There is no file {path}. {remedy}") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}).") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is not a safetensors file, or it was cut short in its header. {remedy}") from error
    if size != promised:
        raise InputError(
            f"{path} is {'cut short' if size < promised else 'too long'}: it has {size} bytes, and its header promises "
            f"{promised}. {remedy}"
        )
    return described
