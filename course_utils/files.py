"""The one way to write a text file; folders are written with `adapter_checks.saving`."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8; line breaks stay as they are, and missing folders are made.

    Raises OSError if the place can't be written to or has no room; the earlier file is unchanged then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        fresh.write_text(text, encoding="utf-8", newline="")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
