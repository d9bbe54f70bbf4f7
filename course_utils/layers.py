"""The layers of a model as rows of a table: those of its blocks, those with an adapter; and what a training step keeps of them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

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
