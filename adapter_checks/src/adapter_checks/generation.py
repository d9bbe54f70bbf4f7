"""What a model answers, greedily or by sampling, in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.errors import InputError
from adapter_checks.soft_prompts import CACHED, active_prompt, prompt_before_text, virtual_tokens

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    max_new_tokens: int = 48,
    batch_size: int = 32,
    adapter_names: Sequence[str] | None = None,
    temperature: float = 0.0,
) -> list[str]:
    """Answer each prompt, in batches; the model is in eval mode meanwhile and as before afterwards.

    prompts: lists of messages ({"role", "content"}), or strings, each taken as one user message.
    max_new_tokens: tokens at most in an answer; it ends earlier where the model ends its turn.
    adapter_names: one adapter's name for each prompt (PEFT's mixed-adapter batches), "__base__" for none.
    temperature: 0 takes the likeliest token each time; above 0 each token is drawn from the distribution at that
    temperature, with torch's random numbers (1 is the model's own distribution).

    Returns the answers in the order of the prompts, without special tokens and outer white space. They are those that each prompt
    gets alone, with virtual tokens as well (prompt tuning, P-tuning), where PEFT's own generate gives others.
    Raises InputError if the prompts aren't a list of such, the tokenizer has no chat template, a prompt with the virtual tokens and
    the answer doesn't fit the model's context, or the adapter's method can't be mixed in a batch, and ValueError if the number of
    adapter names is another than that of the prompts, or the temperature is below 0.
    """
    import torch
    from transformers import GenerationConfig

    if temperature < 0:
        raise ValueError(f"The temperature is {temperature}; give 0 for the likeliest answer, or a number above 0.")

    if isinstance(prompts, str):
        raise InputError(
            f"The prompts are one text, {prompts!r:.60}. Give a list of texts, even if it is one: [{prompts!r:.60}]."
        )
    for prompt in prompts:
        if not isinstance(prompt, (str, Sequence)):
            raise InputError(f"One of the prompts is {prompt!r:.60}. Each has to be a text, or a list of messages.")
    if not tokenizer.chat_template:
        raise InputError("This tokenizer has no chat template. Use a model made for chat, or give it a template.")
    adapter_names = None if adapter_names is None else list(adapter_names)
    if adapter_names is not None and len(adapter_names) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts and {len(adapter_names)} adapter names; give one for each.")
    soft_prompt = active_prompt(model)
    if adapter_names is not None and (method := _method_that_does_not_mix(model)):
        raise InputError(
            f"A batch can't mix adapters of {method}: PEFT answers every row with the active one, without an error. Call generate "
            "once for each adapter, after set_adapter."
        )
    conversations: list[Any] = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    encoded: list[list[int]] = []
    for messages in conversations:
        tokens: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        encoded.append(tokens["input_ids"])
    context = context_length(model.config)
    longest = max(map(len, encoded), default=0)
    virtual = virtual_tokens(model)
    if context is not None and longest + virtual + max_new_tokens > context:
        raise InputError(
            f"The longest prompt has {longest} tokens; with {f'{virtual} virtual and ' if virtual else ''}{max_new_tokens} new ones it "
            f"exceeds the model's context of {context}. Shorten the prompt or lower max_new_tokens."
        )
    settings = GenerationConfig(
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),  # the library's top_k of 50 would cut
        max_new_tokens=max_new_tokens,
        # Many chat models end a turn with another token than a text: their generation config lists both.
        eos_token_id=sorted(eos_ids(tokenizer) | eos_ids(model.generation_config)),
        pad_token_id=_pad_id(tokenizer),
    )
    answers = [""] * len(encoded)
    with evaluating(model), _without_own_settings(model), torch.no_grad():
        for rows in _batches(model, soft_prompt, encoded, batch_size):
            input_ids, attention_mask = padded(model, tokenizer, [encoded[row] for row in rows], side="left")
            options: dict[str, Any] = {"attention_mask": attention_mask, "generation_config": settings}
            if soft_prompt is not None and soft_prompt.peft_type not in CACHED:
                embedded, options["attention_mask"] = prompt_before_text(model, input_ids, attention_mask)
                new = cast(Any, model).get_base_model().generate(inputs_embeds=embedded, **options)
            else:
                if adapter_names is not None:
                    options["adapter_names"] = [adapter_names[row] for row in rows]
                new = cast(Any, model).generate(input_ids=input_ids, **options)[:, input_ids.shape[1] :]
            for row, answer in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True)):
                answers[row] = answer.strip()
    return answers


def _method_that_does_not_mix(model) -> str | None:
    """The adapters' method if PEFT has no mixed batches for it; None if it has, or there are no adapters."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    mixes = layers and all(hasattr(layer, "_mixed_batch_forward") for layer in layers)
    if mixes or not isinstance(model, PeftModel):
        return None
    return next((config.peft_type.value for config in cast(Any, model).peft_config.values()), None)


def _batches(model, soft_prompt, encoded, batch_size) -> Iterator[list[int]]:
    """Numbers of the rows to answer together.

    Pads count in a sliding window, so that a prefix in the cache, which stands before them, may fall out of it: then rows of one
    length only, without pads.
    """
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    groups: dict[int, list[int]] = {}
    for row, ids in enumerate(encoded):
        alike = soft_prompt is not None and soft_prompt.peft_type in CACHED and getattr(text, "sliding_window", None)
        groups.setdefault(len(ids) if alike else 0, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def eos_ids(source: object) -> set[int]:
    """The ids that a generation config or a tokenizer gives for the end, one or several; empty if it names none."""
    listed = getattr(source, "eos_token_id", None)
    return {*(listed if isinstance(listed, (list, tuple)) else [listed])} - {None}


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens a model is made for, from its config; None if that names no limit (Mamba, ALiBi).

    Rotary positions may be stretched beyond max_position_embeddings: by a factor, from the length of pretraining.
    """
    text = (
        config.get_text_config() if hasattr(config, "get_text_config") else config
    )  # a model that is not transformers' own
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]  # one for each kind of layer in some
    stretched = [(kind.get("factor") or 1) * (kind.get("original_max_position_embeddings") or length) for kind in kinds]
    return int(max(length, *stretched))


def _pad_id(tokenizer) -> int:
    """Padding is masked, so any token serves where the tokenizer names none."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def padded(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]], side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists -> input_ids and attention_mask, both (batch, longest), on the model's device."""
    import torch

    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), _pad_id(tokenizer))
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        place = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        input_ids[row, place] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, place] = 1
    device = next(model.parameters()).device
    return input_ids.to(device), attention_mask.to(device)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own mode again: `model.train()` would wake those that were off."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@contextlib.contextmanager
def _without_own_settings(model):
    """Set a model's own generation settings aside, which `generate` would mix into ours.

    Many hub models come with a temperature, which draws a warning, or a repetition penalty, which changes the answer.
    """
    from transformers import GenerationConfig

    # While it generates, a PEFT model lays its own settings over those of the model inside.
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, settings in zip(holders, own):
            holder.generation_config = settings
