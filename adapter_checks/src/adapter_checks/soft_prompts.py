"""Prompt tuning, P-tuning, prefix tuning and their kin: what PEFT puts before a model's input instead of into its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapter_checks.errors import InputError

if TYPE_CHECKING:
    import torch

# These hand their virtual tokens to the layers as keys and values of a cache; the others as embeddings before those of the text.
CACHED = ("PREFIX_TUNING", "CARTRIDGE")
VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", *CACHED)


def active_prompt(model: Any) -> Any:
    """The configuration of the virtual tokens that this model puts before its input; None without such, or while they are off."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or is_switched_off(model):
        return None
    active: Any = model.active_adapter  # a list, if empty, after delete_adapter
    config: Any = model.peft_config.get(active) if isinstance(active, str) else None
    return config if config is not None and config.is_prompt_learning else None


def is_switched_off(model: Any) -> bool:
    """Whether a PeftModel with a prompt method is inside disable_adapter(), which lets the base's forward stand in for its own."""
    return model.forward == model.base_model.forward


def virtual_tokens(model: Any) -> int:
    """How many places of the context the virtual tokens take, 0 without any."""
    config = active_prompt(model)
    return config.num_virtual_tokens if config is not None else 0


def why_not_mergeable(config: Mapping[str, Any]) -> str | None:
    """A sentence if an adapter with this adapter_config.json has no change of the base's weights to merge; None otherwise."""
    if (method := config.get("peft_type")) in VIRTUAL_TOKENS:
        return f"The adapter's method is {method}: its virtual tokens stand before the input, so there is nothing to merge into weights."
    return None


def prompt_before_text(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and mask of a batch that is padded on the left, with the virtual tokens between the pads and the text.

    PEFT 0.21 puts them before the pads and drops position_ids, so that a text stands further from them the shorter it is,
    and a batch gives other answers than each of its rows alone.

    input_ids, attention_mask: (batch, longest). Returns (batch, longest + virtual tokens, width) and (batch, longest + virtual
    tokens), to be given to the model inside. Raises InputError for a method whose prompt depends on the row's task.
    """
    import torch

    config = active_prompt(model)
    if config.peft_type == "MULTITASK_PROMPT_TUNING":
        raise InputError(
            "Multitask prompt tuning needs task_ids, which can't be given here. Call model.generate yourself."
        )
    text = model.word_embeddings(input_ids)
    prompt = model.get_prompt(batch_size=1)[0].to(text.dtype)
    pads = (attention_mask == 0).sum(1).tolist()
    rows = [torch.cat([row[:before], prompt, row[before:]]) for row, before in zip(text, pads)]
    return torch.stack(rows), torch.cat([attention_mask, attention_mask.new_ones(len(text), len(prompt))], 1)


def without_pads(call: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]) -> Any:
    """What `call` returns for these inputs if rows are given without pads, those of one length together.

    call    function from inputs to a tensor, the first dimension being that of the rows
    inputs  {name: tensor}; where attention_mask is 0 before or after a row's text, the result is 0
    """
    import torch

    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return call(inputs)
    spans: dict[tuple[int, int], list[int]] = {}
    for row, places in enumerate(mask.bool()):
        real = places.nonzero().flatten()
        spans.setdefault((int(real[0]), int(real[-1]) + 1) if len(real) else (0, mask.shape[1]), []).append(row)
    if list(spans) == [(0, mask.shape[1])]:
        return call(inputs)
    result = None
    for (start, stop), rows in spans.items():
        part = {
            name: tensor[rows, start:stop]
            if tensor.shape[:2] == mask.shape and not name.startswith("decoder_")
            else tensor[rows]
            for name, tensor in inputs.items()
        }
        found = call(part)
        if not torch.is_tensor(found) or found.dim() < 2:
            return found
        by_token = found.dim() > 2 and found.shape[1] >= stop - start and "decoder_input_ids" not in inputs
        if by_token:  # virtual tokens may come first
            found = found[:, start - stop :]
        if result is None:
            result = found.new_zeros(len(mask), *(mask.shape[1:] if by_token else found.shape[1:2]), *found.shape[2:])
        result[rows, slice(start, stop) if by_token else slice(None)] = found
    return result
