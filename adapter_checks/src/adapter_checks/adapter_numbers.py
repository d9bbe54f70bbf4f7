"""What the numbers in an adapter's file say: NaN, zeros, one process's part of them, and changes out of all proportion."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import scaling_of
from adapter_checks.names import MAY_REST
from adapter_checks.report import first_few

if TYPE_CHECKING:
    import torch

    from adapter_checks.report import Report

# Of a layer's output for inputs of root mean square 1. A base's own weights give about 1, and a trained adapter far less.
LARGEST_CHANGE = 10


def check_numbers(report: Report, config: Mapping[str, Any], file: Path, modules: Iterable[str]) -> None:
    """Add findings on the tensors in `file`; modules: names of those whose A and B are both there and whole."""
    import torch
    from safetensors import safe_open

    zero: dict[str, list[str]] = {"A": [], "B": []}
    seen: dict[str, list[str]] = {"A": [], "B": []}
    broken, nonzero_rows = [], {}
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        for name in names:
            tensor = tensors.get_tensor(name)
            if not torch.isfinite(tensor.float()).all():
                broken.append(name)
            # B begins at zero, and of an embedding A does
            if match := re.search(r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)$", name):
                begins_at_zero = match[1] in ("lora_B.weight", "lora_embedding_A")
                factor = "B" if begins_at_zero else "A"
                if tensor.numel():
                    seen[factor].append(name)
                if tensor.numel() and not tensor.any():
                    zero[factor].append(name)
                elif match[1] == "lora_B.weight" and tensor.dim() > 1 and tensor.numel():
                    nonzero_rows[name] = tensor.flatten(1).any(1)
        changes = {} if broken else _changes(tensors, config, set(names), modules)
    if broken:
        report.fail(
            "non_finite",
            f"{len(broken)} tensors hold NaN or infinity: {first_few(broken)}.",
            "Training diverged: take an earlier checkpoint, and lower the learning rate.",
        )
    for factor, cause in (
        ("B", "It was saved before training, or training did not reach it: check for trainable parameters and train again."),
        ("A", "A begins at random, so this was not trained away: see how it was saved, and save it again."),
    ):  # fmt: skip
        if zero[factor] and len(zero[factor]) == len(seen[factor]):
            report.fail(
                f"zero_{factor.lower()}",
                f"{factor} is all zero in all {len(seen[factor])} layers: this adapter changes nothing.",
                cause,
            )
        elif zero[factor]:
            expected = [name for name in seen[factor] if not MAY_REST.search(name)]
            most = 2 * len(set(zero[factor]) & set(expected)) > len(expected)
            report.add(
                "fail" if most else "warn",
                f"partly_zero_{factor.lower()}",
                f"{factor} is all zero in {len(zero[factor])} of {len(seen[factor])} layers, which the adapter leaves unchanged: {first_few(zero[factor])}.",
                "Training did not reach them: check that they were trainable, and that this adapter was loaded whole before. With "
                "gradient checkpointing, call model.enable_input_require_grads() before training.",
            )
    _check_rows(report, nonzero_rows)
    large = {module: change for module, change in changes.items() if change > LARGEST_CHANGE}
    if large:
        worst = max(large, key=large.__getitem__)
        report.warn(
            "huge_change",
            f"In {len(large)} of {len(changes)} layers the change is out of all proportion: {worst} would give an output about "
            f"{large[worst]:,.0f} times as large as its input, where a base's own weights give about 1.",
            "Training diverged, or the file was scaled by hand, or alpha is another one than in training: compare the outputs with "
            "check_changes_output, and take an earlier checkpoint.",
        )


def _changes(tensors: Any, config: Mapping[str, Any], names: set[str], modules: Iterable[str]) -> dict[str, float]:
    """{module: root mean square of s·BAx for inputs x of root mean square 1}, for linear and convolutional layers."""
    if config.get("target_parameters"):  # all experts of a layer lie in one A and one B
        return {}
    found = {}
    for module in modules:
        if f"{module}.lora_A.weight" in names:
            A, B = (tensors.get_tensor(f"{module}.lora_{factor}.weight").double().flatten(1) for factor in "AB")
            if A.shape[0] == B.shape[1]:
                square = ((B.T @ B) * (A @ A.T)).sum().item() / len(B)  # ‖BA‖² through two matrices of the rank's size
                found[module] = abs(scaling_of(config, module)) * math.sqrt(max(square, 0.0))
    return found


def _check_rows(report: Report, rows: Mapping[str, torch.Tensor]) -> None:
    """Rows that one of several processes holds, and zeros for the others'. rows: {name of B: which of its rows are not zero}"""
    blocks = []
    for nonzero in rows.values():
        places = nonzero.nonzero().flatten()
        first, last = int(places[0]), int(places[-1]) + 1
        blocks.append((first / len(nonzero), (last - first) / len(nonzero), 1 / len(nonzero)))
    if len(blocks) < 2 or min(share for _, share, _ in blocks) > 0.75:
        return
    start, share, _ = blocks[0]
    alike = all(abs(a - start) < 2 * row and abs(b - share) < 2 * row for a, b, row in blocks)
    if alike:
        report.warn(
            "zero_rows",
            f"In all {len(blocks)} layers the same part of B's rows is zero: only {share:.0%} of them, one after the other, hold "
            "numbers. Several processes shared these rows, and only one process's part was saved or loaded.",
            "Gather the weights before saving (FSDP: FULL_STATE_DICT), go back to a checkpoint that is whole, and train from there.",
        )
