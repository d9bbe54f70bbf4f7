"""What the adapters' numbers say: zeros, NaN, one adapter applied twice, a base that is no longer the original."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.errors import InputError
from adapter_checks.initialisation import check_changed_base, check_kept_initialisation, projection
from adapter_checks.model_folder import stored_names
from adapter_checks.names import plain_name
from adapter_checks.report import first_few
from adapter_checks.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    import os

    import torch
    from peft import LoraConfig

    from adapter_checks.report import Report


def check_weights(report: Report, layers: Mapping[str, Any], loaded: Iterable[str]) -> None:
    import torch

    for adapter in loaded:
        tensors = {
            f"{name}.{part}": tensor
            for name, layer in layers.items()
            for part, tensor in adapter_tensors(layer, adapter).items()
        }
        empty = [name for name, tensor in tensors.items() if tensor.is_meta]
        if empty:
            report.fail(
                "meta_weights",
                f"{len(empty)} weights of {adapter!r} are on the meta device, so they hold no numbers: {first_few(empty)}.",
                "The file did not have them, and low_cpu_mem_usage=True left them empty: run check_adapter_folder on it.",
            )
            continue
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            report.fail(
                "non_finite",
                f"{len(broken)} weights of {adapter!r} hold NaN or infinity: {first_few(broken)}.",
                "Training diverged, or the file is damaged: go back to an earlier checkpoint, and lower the learning rate.",
            )
        zero_initialised = re.compile(r"\.(lora_B\.weight|lora_embedding_A)$")
        factors = {name: tensor for name, tensor in tensors.items() if zero_initialised.search(name)}
        zero = [name for name, tensor in factors.items() if not tensor.any()]
        if zero:
            trainable = all(tensor.requires_grad for tensor in factors.values())
            every = len(zero) == len(factors)
            where = (
                f"all {len(factors)} layers" if every else f"{len(zero)} of {len(factors)} layers ({first_few(zero)})"
            )
            cause = "it is not trained yet" if trainable else "nothing was loaded into it, or it was saved untrained"
            report.add(
                "warn" if trainable else "fail",
                "zero_b" if every else "partly_zero_b",
                f"{adapter!r} has an all-zero B in {where}, so it changes nothing there. LoRA starts that way: {cause}.",
                "Train it; or, if it was trained, look at how it was saved and loaded."
                if trainable
                else "Load it again and read missing_keys; run check_adapter_folder on its folder.",
            )


def check_applied_twice(report: Report, layers: Mapping[str, Any], loaded: Iterable[str]) -> None:
    import torch

    in_effect = {
        adapter
        for layer in layers.values()
        for adapter in (layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters))
    }
    for one, other in itertools.combinations(sorted(in_effect & set(loaded)), 2):
        both = [(adapter_tensors(layer, one), adapter_tensors(layer, other)) for layer in layers.values()]
        pairs = [(first[part], second.get(part)) for first, second in both for part in first]
        same = all(b is not None and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
        if pairs and same and any(a.any() for a, _ in pairs):
            report.fail(
                "applied_twice",
                f"{one!r} and {other!r} hold the same weights and are both in effect: the change is applied twice.",
                f"Use one of them: set_adapter({one!r}), then delete_adapter({other!r}).",
            )


def check_base_weights(
    report: Report,
    layers: Mapping[str, Any],
    configs: Mapping[str, LoraConfig],
    original_base: torch.nn.Module | str | os.PathLike[str],
    model: torch.nn.Module,
) -> None:
    """W now = W original? If not, is the difference this adapter's own scaling * B @ A, or an initialisation that an adapter subtracted?

    layers: {name: PEFT's layer, or the base's own} of `model`; configs: {adapter: its configuration}, empty for a base alone.
    """
    import torch

    try:
        original = weight_reader(original_base, model)
    except InputError as error:
        report.fail(
            "bad_argument",
            f"original_base can't be read. {error}",
            "Pass a second copy of the base, or the folder that holds its safetensors.",
        )
        return
    compared, change = 0, 0.0
    moved: list[str] = []
    smallest: Any = None  # of the changed weights: as it was, and how it differs
    merged_in = {adapter: _InnerProducts() for adapter in configs}  # the base's change, and the adapter's own
    initialisation_in = {
        adapter: _InnerProducts() for adapter in configs
    }  # where nothing moved: the initialisation that its B points to, and its change
    with torch.no_grad():
        for name, layer in layers.items():
            weight: Any = getattr(layer.get_base_layer() if configs else layer, "weight", None)
            before: Any = original(plain_name(name) + ".weight")
            merged = layer.merged_adapters if configs else []
            # A merged variant such as DoRA changed the weights by more than scaling * B @ A.
            variant_merged = set(merged) & set(getattr(layer, "lora_variant", ()))
            if (
                not _comparable(weight, before)
                or variant_merged
                or (merged and not hasattr(layer, "get_delta_weight"))  # IA3 scales weights, LN tuning replaces them
            ):
                continue
            if before.data_ptr() == weight.data_ptr():
                report.fail(
                    "same_object",
                    "original_base is this model's own base, so comparing them says nothing.",
                    "Load a second copy of the base with from_pretrained, or pass its folder.",
                )
                return
            compared += 1
            deltas = (
                {adapter: layer.get_delta_weight(adapter).double() for adapter in adapter_names(layer)}
                if configs and hasattr(layer, "get_delta_weight")
                else {}
            )
            now = weight.double() - sum(deltas[adapter] for adapter in merged if adapter in deltas)
            before = before.to(now.device, torch.float64)
            difference = now - before
            # Merging and unmerging leaves rounding behind, of the size of the weights' own precision.
            if difference.norm() <= torch.finfo(weight.dtype).eps * (weight.double().norm() + before.norm()):
                for adapter, delta in deltas.items():
                    B = adapter_tensors(layer, adapter).get("lora_B.weight")
                    if B is not None and B.dim() == 2 and len(B) == len(before):
                        initialisation_in[adapter].add(projection(before, B), delta)
                continue
            moved.append(plain_name(name))
            change += difference.square().sum().item()
            for adapter, delta in deltas.items():
                merged_in[adapter].add(difference, delta)
            if smallest is None or before.numel() < smallest[0].numel():
                smallest = before, -difference
    if not compared:
        report.warn(
            "not_compared",
            "None of the adapted weights could be compared with original_base: other names, shapes or quantised weights.",
            "Pass an unquantised copy of the same base, or the folder that holds its safetensors.",
        )
    elif not moved:
        report.note("base_untouched", f"The base's weights equal the original's in all {compared} adapted layers.")
        check_kept_initialisation(report, initialisation_in)
    else:
        for adapter, alike in merged_in.items():
            # The same direction and at least half the size: that is this adapter, not another change.
            if alike.second and alike.dot > 0.9 * (alike.second * change) ** 0.5 and alike.dot > 0.5 * alike.second:
                report.fail(
                    "already_merged",
                    f"The base already contains {adapter!r}, {alike.dot / alike.second:.2f} times: it was merged and then "
                    "loaded on top again, so the change is applied more than once.",
                    "Load the adapter on the original base, or use the merged model without the adapter.",
                )
                return
        check_changed_base(report, configs, f"in {len(moved)} of {compared} layers: {first_few(moved)}", *smallest)


def check_as_saved(
    report: Report,
    model: torch.nn.Module,
    base: torch.nn.Module,
    config: LoraConfig,
    adapter: str,
    folder: str | os.PathLike[str],
) -> None:
    """Are the weights of this adapter in the model those of the file that it was loaded from? base: the model inside PeftModel."""
    import torch
    from peft import get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    from safetensors.torch import load_file

    file = Path(folder).expanduser() / "adapter_model.safetensors"
    try:
        read_safetensors_header(file)  # says what is wrong with the file
    except InputError as error:
        report.fail("bad_argument", f"The folder of {adapter!r} can't be read. {error}", "Pass the adapter's folder.")
        return
    # PEFT follows what transformers has renamed and stacked since the file was written.
    content = convert_peft_adapter_state_dict_for_transformers(base, config, load_file(file), adapter)
    saved = {plain_name(name): tensor for name, tensor in content.items()}
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    loaded = {plain_name(name): tensor for name, tensor in state.items()}

    def alike(one, other):
        if one.is_meta or one.shape != other.shape:
            return False
        one = one.to(other.device)
        # In which of both types the file or the model is, doesn't matter: one is the other, rounded.
        return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)

    other = sorted(name for name, tensor in loaded.items() if name not in saved or not alike(tensor, saved[name]))
    # save_pretrained adds the whole embedding where it could matter; PEFT loads that into the base.
    unused = sorted(saved.keys() - loaded.keys() - {plain_name(name) for name, _ in base.named_parameters()})
    if other or unused:
        places = (
            f", and {len(unused)} tensors of the file have no place in the model: {first_few(unused)}" if unused else ""
        )
        report.fail(
            "not_as_saved",
            f"{len(other)} of {len(loaded)} weights of {adapter!r} are not those of {Path(folder).name}"
            f"{f': {first_few(other)}' if other else ''}{places}.",
            "If it was not trained since, the file was not loaded, or not whole: run check_adapter_folder on it with the base.",
        )
    else:
        report.note("as_saved", f"All {len(loaded)} weights of {adapter!r} are those of {Path(folder).name}.")


class _InnerProducts:
    """Sums over the layers: of two kinds of matrices the inner products, and the squares of each."""

    def __init__(self):
        self.dot = self.first = self.second = 0.0

    def add(self, first, second):
        self.dot += (first * second).sum().item()
        self.first += first.square().sum().item()
        self.second += second.square().sum().item()

    def cosine(self):
        return self.dot / (self.first * self.second) ** 0.5 if self.first * self.second else 0.0


def _comparable(weight, before) -> bool:
    if weight is None or before is None or weight.shape != before.shape:
        return False
    return weight.is_floating_point() and not (weight.is_meta or before.is_meta)


def weight_reader(
    base: torch.nn.Module | str | os.PathLike[str], model: torch.nn.Module | None = None
) -> Callable[[str], torch.Tensor | None]:
    """A function from a weight's name in the plain base to its tensor, or None if there is none.

    model  one that was loaded from such a folder, with adapters or not: loading renames the weights of some classes
    """
    import torch
    from safetensors import safe_open
    from transformers import PreTrainedModel

    if isinstance(base, torch.nn.Module):
        weights = {plain_name(name): parameter for name, parameter in base.named_parameters()}
        return weights.get
    if not isinstance(base, (str, Path)) or not Path(base).is_dir():
        raise InputError(f"It is {base!r}, neither a model nor a folder.")
    places = {name: path for path in sorted(Path(base).glob("*.safetensors")) for name in read_safetensors_header(path)}
    names = stored_names(model, places) if isinstance(model, PreTrainedModel) else {name: name for name in places}

    def read(name):
        if name not in names:
            return None
        with safe_open(places[names[name]], framework="pt") as file:
            return file.get_tensor(names[name])

    return read


def adapter_names(layer: Any) -> set[str]:
    return {adapter for part in layer.adapter_layer_names for adapter in getattr(layer, part, None) or ()}


def adapter_tensors(layer: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors in this layer: {"lora_A.weight": ..., "lora_B.weight": ...} for LoRA on a linear layer."""
    tensors: dict[str, torch.Tensor] = {}
    for part in layer.adapter_layer_names:
        holder = getattr(layer, part, None) or {}
        if adapter in holder:
            content = holder[adapter]
            inside = dict(content.named_parameters()) if hasattr(content, "named_parameters") else {"": content}
            tensors |= {f"{part}.{name}".rstrip("."): tensor for name, tensor in inside.items()}
    return tensors
