"""Names of modules and of bases, made comparable."""

from __future__ import annotations

import re


def plain_name(name: str) -> str:
    """A module's or weight's name in the plain base: without PeftModel's prefix and the layers that PEFT adds."""
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "")


def same_base(one: str, other: str) -> bool:
    """Whether two paths or hub ids end alike; the rest of a path changes when a folder moves to another machine."""
    first, second = (re.split(r"[\\/]", str(name).rstrip("\\/"))[-1] for name in (one, other))
    return first == second
