"""Save a folder whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from adapter_checks.errors import InputError
from adapter_checks.safetensors_header import read_safetensors_header

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextlib.contextmanager
def saving(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Save a folder whole or not at all: `with saving(path) as folder: model.save_pretrained(folder)`.

    Gives an empty folder beside `path`; at the end it takes the name `path`, and the earlier result is deleted. If
    anything fails or the process is killed before that, the earlier result stays as it was.

    Raises InputError if the place can't be written to or has no room, or if a safetensors file came out broken;
    any other exception of the body goes through unchanged.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and (not path.is_dir() or path.is_symlink()):
        raise InputError(f"{path} is not a plain folder, so no folder can be saved in its place. Choose another name.")
    if (path / ".git").exists():
        raise InputError(f"{path} is a git repository, which saving would replace. Choose a folder of its own.")
    if Path.cwd().resolve().is_relative_to(path.resolve()):
        raise InputError(f"Saving to {path} would replace the folder that you work in. Choose a folder of its own.")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        except OSError as error:
            raise InputError(f"{path.parent} can't be written to ({error.strerror}). Choose another place.") from error
        try:
            yield temporary
        except Exception as error:
            # safetensors reports a full disk as an error of its own, with the system's number in the text
            number = re.search(r"os error (\d+)", str(error))
            code = error.errno if isinstance(error, OSError) else int(number.group(1)) if number else None
            if code in _NO_ROOM:
                raise InputError(
                    f"There was no room to save {path} ({os.strerror(code)}). {_what_remains(path)} Make room and save again."
                ) from error
            raise
        for file in temporary.rglob("*.safetensors"):
            read_safetensors_header(file)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _what_remains(path: Path) -> str:
    return "The earlier result is unchanged." if path.exists() else "Nothing was left behind."


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`. Whatever was at `path` is then at the name `temporary`, or gone."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        # No exchange in one step here (Windows, some network disks): between the two renames a kill leaves the
        # earlier result whole, but under the name `previous`.
        previous = temporary.with_name(f"{temporary.name}.old")
        path.rename(previous)
        try:
            temporary.rename(path)
        except OSError:
            previous.rename(path)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders' names in one step; False where the system can't. rename(2) refuses a folder that is not empty."""
    names = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "linux":
            here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
            return library.renameat2(here, names[0], here, names[1], exchange) == 0
        if sys.platform == "darwin":
            return library.renamex_np(names[0], names[1], 2) == 0  # RENAME_SWAP
    except (AttributeError, OSError, TypeError):  # no such function in this C library
        pass
    return False
