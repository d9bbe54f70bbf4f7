"""What an adapter_config.json says, and whether PEFT could take it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_checks.errors import InputError
from adapter_checks.model_folder import read_json
from adapter_checks.report import Report, first_few

CONFIG = "adapter_config.json"
# Heads that PEFT trains and saves for these tasks whether modules_to_save names them or not: each model has one of them.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def read_adapter_config(report: Report, folder: Path) -> dict[str, Any] | None:
    """The configuration with PEFT's defaults for rank and alpha, or None; what is wrong with it goes into the report."""
    if not (folder / CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        report.fail(
            "no_config",
            f"{folder.name} has no {CONFIG}, so it is not an adapter's folder.",
            f"Adapters are one level down: {first_few(inside, 4)}. save_pretrained puts every adapter that is not named 'default' "
            "into a folder of its name."
            if inside
            else "Pass the folder that save_pretrained wrote the adapter to.",
        )
        return None
    try:
        config = read_json(folder / CONFIG)
        if "peft_type" not in config:
            raise InputError(f"{folder / CONFIG} names no peft_type, so it is not an adapter's configuration.")
    except InputError as error:
        report.fail("bad_config", str(error), "Save the adapter again, or copy the file again.")
        return None
    if config["peft_type"] != "LORA":
        return config
    wrong = [
        f"{name} is {config[name]!r:.40} and should be {wanted}"
        for name, (is_valid, wanted) in _SETTINGS.items()
        if name in config and not is_valid(config[name])
    ]
    if wrong:
        report.fail("bad_config", f"In {CONFIG} {first_few(wrong)}.", "Save the adapter again, or correct the file.")
        return None
    if absent := [name for name in ("r", "lora_alpha") if name not in config]:
        report.warn(
            "incomplete_config",
            f"{CONFIG} does not give {' and '.join(absent)}, so PEFT uses its default of 8, and with it another scaling.",
            "Add what the adapter was trained with.",
        )
    config = {"r": 8, "lora_alpha": 8} | config
    if config["lora_alpha"] <= 0:
        report.fail(
            "small_scaling",
            f"lora_alpha is {config['lora_alpha']}, so the scaling is not above 0: the adapter is without effect or reversed.",
            "Put in the value that the adapter was trained with.",
        )
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError):
        return False
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_pattern, value)))


def _is_pattern_or_names(value: Any) -> bool:
    return _is_names(value) or _is_pattern(value)


def _is_layers(value: Any) -> bool:
    return value is None or all(type(item) is int for item in (value if isinstance(value, list) else [value]))


def _is_table_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_table(value: Any) -> bool:
        if value is None:
            return True
        return isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(is_valid, value.values()))

    return is_table


# Settings that decide which tensors belong to the adapter and how it is scaled: PEFT takes wrong values without a word, or
# fails with an error that does not name the setting.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "target_modules": (_is_pattern_or_names, "a regular expression or a list of names"),
    "exclude_modules": (_is_pattern_or_names, "a regular expression or a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (_is_layers, "a whole number or a list of them"),
    "layers_pattern": (_is_pattern_or_names, "a name or a list of names"),
    "rank_pattern": (_is_table_of(_is_rank), "an object of regular expressions and ranks"),
    "alpha_pattern": (_is_table_of(_is_number), "an object of regular expressions and numbers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or a name"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a path or a hub id"),
    "task_type": (lambda value: value is None or isinstance(value, str), "the name of a task"),
}
