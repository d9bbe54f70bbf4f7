"""What an adapter_config.json says, and whether PEFT could take it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapter_checks.errors import InputError
from adapter_checks.model_folder import read_json
from adapter_checks.names import plain_name
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
        code = "not_readable" if isinstance(error.__cause__, OSError) else "bad_config"
        report.fail(code, str(error), "Save the adapter again, or copy the file again.")
        return None
    if not _is_known_method(report, config["peft_type"]) or config["peft_type"] != "LORA":
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
    if unknown := unknown_settings(config):
        by = f" It was written by PEFT {config['peft_version']}." if config.get("peft_version") else ""
        report.warn(
            "unknown_settings",
            f"The installed PEFT {_peft_version()} does not know {first_few(unknown, 4)}, and leaves it out.{by}",
            "Use the version of PEFT that wrote the file, or correct the name.",
        )
    if config.get("init_lora_weights") is False:
        report.warn(
            "random_start",
            "init_lora_weights is false: each loading draws A and B at random before it reads the file, so whatever it does not "
            "find there is random.",
            "Set it to true in the file, and see by check_adapters(model, folder=...) that what is loaded is what was saved.",
        )
    config = {"r": 8, "lora_alpha": 8} | config
    if config["lora_alpha"] <= 0:
        report.fail(
            "small_scaling",
            f"lora_alpha is {config['lora_alpha']}, so the scaling is not above 0: the adapter is without effect or reversed.",
            "Put in the value that the adapter was trained with.",
        )
    return config


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """The names in a LoRA configuration that the installed PEFT drops although they are set to something."""
    import peft

    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    return sorted(
        name for name, value in config.items() if name not in known and value not in (None, False, "", [], {})
    )


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that a configuration gives a module, by its name with or without PEFT's prefix."""
    return _by_pattern(config.get("rank_pattern"), module, config["r"])


def scaling_of(config: Mapping[str, Any], module: str) -> float:
    """What BA is multiplied by in this module: alpha over the rank, or with rsLoRA over its root."""
    rank, alpha = rank_of(config, module), _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return (pattern or {}).get(get_pattern_key(list(pattern or ()), plain_name(module)), default)


def _is_known_method(report: Report, method: Any) -> bool:
    from peft import PeftType

    if method in list(PeftType):
        return True
    alike = next((known.value for known in PeftType if known.value == str(method).upper()), None)
    report.fail(
        "unknown_method",
        f"peft_type is {method!r:.40}, and the installed PEFT {_peft_version()} has no such method"
        + (f"; it has {alike!r}." if alike else "."),
        "Correct the name in the file, or use the version of PEFT that wrote it.",
    )
    return False


def _peft_version() -> str:
    import peft

    return peft.__version__


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
    def is_table(value: Any) -> bool:  # null is none either: PEFT fails with an error about NoneType
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
