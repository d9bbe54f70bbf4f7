"""Serve rows of many adapters in one pass: the LoRA layers of a PEFT model, replaced by layers that pick an adapter for each row."""

from __future__ import annotations

import copy

import torch
from peft.tuners.lora import Linear as LoraLinear


class GatherLayer(torch.nn.Module):
    """A linear layer and the stacked adapters beside it.

    change: the function (x, A, B, scaling, rows) -> (rows, tokens, outputs) that is added to the layer's output.
    A: (adapters, rank, inputs); B: (adapters, outputs, rank); adapters of a lower rank are filled up with zeros, and one that has
    nothing on this layer is all zeros.
    """

    def __init__(self, layer: LoraLinear, names: list[str], rows: list, change):
        super().__init__()
        self.base, self.rows, self.change = layer.get_base_layer(), rows, change
        weight, rank = self.base.weight, max(layer.r.values())
        self.A = weight.new_zeros(len(names), rank, weight.shape[1])
        self.B = weight.new_zeros(len(names), weight.shape[0], rank)
        self.scaling = weight.new_zeros(len(names))
        for place, name in enumerate(names):
            if name in layer.lora_A:
                self.A[place, : layer.r[name]] = layer.lora_A[name].weight.detach()
                self.B[place, :, : layer.r[name]] = layer.lora_B[name].weight.detach()
                self.scaling[place] = layer.scaling[name]

    def forward(self, x):
        return self.base(x) + self.change(x, self.A, self.B, self.scaling, self.rows[0])


def with_gathered(model, names: list[str], change):
    """(a copy of a PEFT model's base, its LoRA layers replaced by `GatherLayer`s; a list whose one entry says which adapter each
    row takes: a tensor of numbers into `names`, -1 for none). The weights of the base are shared with `model`, not copied."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    served, rows = copy.deepcopy(model.get_base_model(), shared), [None]
    for name, layer in list(served.named_modules()):
        if isinstance(layer, LoraLinear):
            parent, _, last = name.rpartition(".")
            setattr(served.get_submodule(parent), last, GatherLayer(layer, names, rows, change))
    return served, rows
