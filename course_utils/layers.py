"""The layers of a model in tables: those of its blocks, and those with an adapter; and what a training step keeps of them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from course_utils import plotting

if TYPE_CHECKING:
    import torch

COLUMNS = ("layer", "blocks", "in → out", "rank", "scaling", "parameters")


def of_the_blocks(model) -> dict[str, list[str]]:
    """{"mlp": ["up_proj", ...]}: the linear layers of a model's blocks by the part that they belong to, each name once.

    They come in the model's order. Layers outside the numbered blocks, such as the head, are left out.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    parts = defaultdict(list)
    for name, layer in model.named_modules():
        above, _, last = name.rpartition(".")
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split(".")):
            names = parts[above.rpartition(".")[2]]
            names += [last] * (last not in names)
    return dict(parts)


def show_blocks(models) -> None:
    """Show what `of_the_blocks` finds in each of {name: model}, a line for each model."""
    rows = []
    for model_name, model in models.items():
        parts = [f"**{part}**: {', '.join(names)}" for part, names in of_the_blocks(model).items()]
        rows.append([model_name, "; ".join(parts)])
    plotting.table(["model", "linear layers of the blocks"], rows)


def adapted(model) -> list[list]:
    """One row of COLUMNS for each kind of layer that has an adapter called "default"."""
    from peft.tuners.lora import LoraLayer

    groups = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            block = ".".join(part for part in name.split(".") if part.isdigit())
            sides = f"{A.shape[1]}\u00a0→\u00a0{B.shape[0]}"  # spaces that no line breaks at
            kind = (name.split(".")[-1], sides, layer.r["default"], f"{layer.scaling['default']:g}")
            groups[kind].append((block, A.numel() + B.numel()))
    return [
        [
            name,
            ",\u00a0".join(block for block, _ in found),
            sides,
            rank,
            scaling,
            f"{sum(numbers for _, numbers in found):,}",
        ]
        for (name, sides, rank, scaling), found in groups.items()
    ]


def as_code(setting) -> str:
    """{"r": 4} as the Markdown text `r=4`, the way that it is given to a LoraConfig."""
    written = ", ".join(f"{key}={value!r}" for key, value in setting.items())
    return f"`{written}`".replace(r"\\", "\\")  # as it was typed, in a raw string


def show_adapted(settings, models) -> None:
    """Show which layers of each model have an adapter; settings: what stands beside each, as for `as_code`."""
    rows = []
    for setting, model in zip(settings, models):
        for line, row in enumerate(adapted(model)):
            rows.append(["" if line else as_code(setting), *row])
    plotting.table(["setting", *COLUMNS], rows)


def count_trained(model) -> tuple[int, int]:
    """How many numbers are trained in the matrices *A* and *B*, and how many elsewhere."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[".lora_A." not in name and ".lora_B." not in name] += parameter.numel()
    return counts[0], counts[1]


def loss_and_kept(model, batch) -> tuple[torch.Tensor, int]:
    """The loss of a batch, and the bytes of the activations, weights aside, that its backward pass will need."""
    import torch

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # each storage once, however many tensors share it

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    return loss, sum(storage.nbytes() for storage in kept.values())
