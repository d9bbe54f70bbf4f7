"""Initialisations of A and B that change the base: OLoRA and PiSSA subtract the product that A and B begin with from the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapter_checks.report import first_few

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from adapter_checks.report import Report

# As in PEFT 0.21 (tuners/lora/layer.py, update_layer): each of these writes to the base layer's weight.
CHANGES_BASE = ("olora", "pissa", "corda", "loftq", "lora_ga")
COMPUTED_FROM_WEIGHT = (*CHANGES_BASE, "mica", "orthogonal")


def changes_base(config: LoraConfig | Mapping[str, Any]) -> bool:
    """Whether an adapter with this configuration, a dict or a LoraConfig, changes the base when it is made or loaded."""
    return _initialisation(config).startswith(CHANGES_BASE)


def check_shared(report: Report, configs: Mapping[str, LoraConfig]) -> None:
    """Of several adapters on one base, does one change it? configs: {adapter: its configuration}."""
    changing = [adapter for adapter, config in configs.items() if changes_base(config)]
    if changing and len(configs) > 1:
        report.fail(
            "start_not_shared",
            f"{first_few(changing)} subtracted the product that A and B begin with from the base's weights ({_initialisation(configs[changing[0]])}), and "
            f"{len(configs)} adapters compute on that base: at most one of them can be right.",
            "Load the base afresh and convert that adapter to plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion); then several can share a base.",
        )


def check_config(report: Report, base: torch.nn.Module, layers: Mapping[str, Any], config: LoraConfig) -> None:
    """Can this initialisation be computed on these layers? layers: {name: PEFT's layer on a copy of the base without weights}."""
    import torch
    from transformers.pytorch_utils import Conv1D

    initialisation = _initialisation(config)
    if not initialisation.startswith(COMPUTED_FROM_WEIGHT):
        return
    if initialisation == "orthogonal" and any(rank % 2 for layer in layers.values() for rank in layer.r.values()):
        report.fail(
            "odd_rank",
            "The orthogonal initialisation gives half of the rank to A and half to B, so the rank must be even.",
            "Take the next even rank.",
        )
    transposed = [name for name, layer in layers.items() if isinstance(layer.get_base_layer(), Conv1D)]
    if transposed and initialisation == "olora":
        report.fail(
            "start_conv1d",
            f"PEFT's OLoRA does not transpose the weight of a Conv1D ({first_few(transposed)}), so A and B get the "
            "shapes of each other; on a square weight no error says so, and the output at step 0 is wrong.",
            "Take init_lora_weights='pissa', which transposes it, or the default initialisation.",
        )
    weights = [base.get_submodule(name).weight for name in layers if _has_weight(base, name)]
    if any(hasattr(weight, "quant_state") or not weight.is_floating_point() for weight in weights):
        report.fail(
            "start_quantised",
            f"The initialisation {initialisation!r} is computed from the base's weights, and these are quantised. PEFT "
            "refuses, or quantises what is left of them anew, and the output at step 0 is no longer the base's.",
            "Use the default initialisation on a quantised base, or convert the adapter after training on the unquantised one.",
        )
    elif (
        weights and changes_base(config) and any(weight.dtype in (torch.bfloat16, torch.float16) for weight in weights)
    ):
        report.warn(
            "start_rounded",
            f"The initialisation {initialisation!r} changes the base, and its weights are rounded anew to "
            f"{str(weights[0].dtype).removeprefix('torch.')}: the output at step 0 is not quite the base's.",
            "Load the base in float32 to make the adapter, or live with a difference of the size of that rounding.",
        )


def check_changed_base(
    report: Report, configs: Mapping[str, LoraConfig], where: str, original: torch.Tensor, difference: torch.Tensor
) -> None:
    """The base's weights are not the original's. original, difference: of one of those layers, as for `subtracted_initialisation`."""
    found = subtracted_initialisation(original, difference)
    if found is None:
        report.warn(
            "base_changed",
            f"The base's weights differ from the original's {where}.",
            "OLoRA and PiSSA change the base on purpose, each time that one is made or loaded. Otherwise this is another base, or "
            "one with another adapter merged into it.",
        )
    elif len(configs) == 1 and all(map(changes_base, configs.values())):
        report.warn(
            "start_taken_out",
            f"The base lacks what the initialisation of an adapter subtracted, {found}, {where}. {next(iter(configs))!r} gives it back while it is active; "
            "disable_adapter(), unload() and a reference model made in that way do not.",
            "Convert the adapter when you save it (path_initial_model_for_weight_conversion), and load a second copy of the base "
            "where you need the base itself.",
        )
    else:
        report.fail(
            "start_taken_out",
            f"The base lacks what the initialisation of an adapter subtracted, {found}, {where}. What was trained on the whole base is wrong on this one.",
            "Load the base afresh. unload() and delete_adapter() do not put back what OLoRA and PiSSA subtracted.",
        )


def check_kept_initialisation(report: Report, products: Mapping[str, Any]) -> None:
    """The base's weights are the original's. products: {adapter: sums over the layers of the initialisation that B points to, and of s·BA}."""
    # B begins as directions of W, and A as what W has in them; A of a plain LoRA knows nothing of W.
    inside = [adapter for adapter, sums in products.items() if sums.cosine() > 0.5]
    if inside:
        report.fail(
            "start_missing",
            f"{first_few(inside)} still contains an initialisation by OLoRA or PiSSA. The base that it was trained on lacked that part; "
            "this one has it, so it counts twice.",
            "Put init_lora_weights back into its adapter_config.json (save_pretrained sets it to true in the folder that it is "
            "given as path_initial_model_for_weight_conversion), load it on a fresh base, and convert it.",
        )


def subtracted_initialisation(original: torch.Tensor, difference: torch.Tensor) -> str | None:
    """The initialisation whose product is missing from a weight, in words, or None if it is none that is known.

    original: the weight as it was, (outputs, inputs); difference: that weight less the one that is there now.
    OLoRA subtracts s·Q[:, :r]·R[:r] of W = QR (https://arxiv.org/abs/2406.01775, algorithm 1, with s = 1), PiSSA the r largest
    singular directions (https://arxiv.org/abs/2404.02948, equations 2 to 4).
    """
    import torch

    original, difference = original.double(), difference.double()

    def is_all(product):
        return bool((difference - product).norm() < 0.05 * difference.norm())

    Q, R = torch.linalg.qr(original)
    shares = (Q.T @ difference * R).sum(1) / R.square().sum(
        1
    )  # how much of each direction was subtracted: s or nothing
    rank = int((shares > 0.5 * shares[0]).sum())
    scaling = float(shares[0])
    if is_all(scaling * Q[:, :rank] @ R[:rank]):
        return f"OLoRA of rank {rank} and scaling {scaling:.3g}"
    U, S, Vh = torch.linalg.svd(original, full_matrices=False)
    rank = int(((U.T @ difference * Vh).sum(1) > 0.5 * S).sum())
    if rank and is_all(U[:, :rank] * S[:rank] @ Vh[:rank]):
        return f"PiSSA of rank {rank}"
    return None


def projection(original: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The part of a weight (outputs, inputs) in the columns of B (outputs, r): as OLoRA and PiSSA initialise them, BA times a number."""
    import torch

    directions = torch.linalg.qr(B.double()).Q
    return directions @ (directions.T @ original.double())


def _initialisation(config) -> str:
    value = config.get("init_lora_weights") if isinstance(config, dict) else getattr(config, "init_lora_weights", None)
    return str(value).lower()


def _has_weight(model, name) -> bool:
    try:
        return hasattr(model.get_submodule(name), "weight")
    except AttributeError:
        return False
