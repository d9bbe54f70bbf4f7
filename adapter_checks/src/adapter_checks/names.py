"""Names of modules and of bases, made comparable."""

from __future__ import annotations

import re

# Experts that no token was sent to, and towers for images and sound that no row has: training may well leave them alone.
MAY_REST = re.compile(r"\.experts\.|vision|visual|image|audio")


def plain_name(name: str) -> str:
    """A module's or weight's name in the plain base: without PeftModel's prefix and the layers that PEFT adds."""
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "")


def same_base(one: str, other: str) -> bool:
    """Whether two paths or hub ids name the same base, as far as names tell.

    The folder of a path changes when a model moves, the hub's cache keeps a model in models--organisation--name/snapshots/
    and a commit, capitals don't count on the hub, and a quantised upload is the same base in fewer bits.
    """
    return _own_name(one) == _own_name(other)


_QUANTISED = re.compile(r"-((unsloth-)?bnb-[48]bit|awq|gptq(-int[48])?|fp8)$")


def _own_name(name: str) -> str:
    parts = re.split(r"[\\/]", str(name).rstrip("\\/"))
    cached = next((part for part in reversed(parts) if part.startswith("models--")), None)
    last = cached.rpartition("--")[2] if cached and "snapshots" in parts[-2:] else parts[-1]
    return _QUANTISED.sub("", last.lower())
