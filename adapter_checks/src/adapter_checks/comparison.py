"""Do two models, or two routes through one model, give the same output? And does the adapter change it at all?"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.generation import evaluating
from adapter_checks.report import Report, never_raises
from adapter_checks.soft_prompts import CACHED, active_prompt, is_switched_off, without_pads

if TYPE_CHECKING:
    import torch

    TokenIds = torch.Tensor | Sequence[Any] | Mapping[str, Any]

# PEFT's own tests hold merged, unmerged and separate LoRA in float32 to 1e-4 (tests/testing_common.py,
# `_test_merge_layers`): both routes add the same products in another order, and only rounding differs.
MERGE_ATOL = 1e-4
# An adapter that counts must stand out ten times above the tolerance that two routes are then compared with.
SMALLEST_EFFECT = 10 * MERGE_ATOL
# Of the largest logit: what float32 itself can't hold.
ROUNDING = 1e-6


@dataclass(repr=False)
class Comparison(Report):
    """A Report with what was measured over all real tokens; None where nothing could be measured.

    max_abs         largest absolute difference of two logits
    top1_agreement  share of the positions where both find the same token most likely, 0 to 1
    kl              mean over positions of KL(reference || candidate), in nats
    """

    max_abs: float | None = None
    top1_agreement: float | None = None
    kl: float | None = None

    def measured(self) -> str:
        return (
            f"largest logit difference {self.max_abs:.2e}, same top-1 token at {self.top1_agreement:.1%} of positions, "
            f"mean KL {self.kl:.2e} nats"
        )


@never_raises("Same output", Comparison)
def compare_models(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    input_ids: TokenIds,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    *,
    positions: torch.Tensor | Sequence[Any] | None = None,
    atol: float = MERGE_ATOL,
) -> Comparison:
    """Compare the logits of two models on the same tokens; fails if any differs by more than `atol`.

    reference, candidate  models, or functions called as f(input_ids=..., attention_mask=...) that return logits or
                          an object with `.logits`; use functions for two routes through one model
    input_ids             (batch, length) token ids, or what a tokenizer or processor returned: its mask is then used, and
                          whatever else the models take, such as pixel_values or decoder_input_ids
    attention_mask        (batch, length), 0 at pads, which do not count
    positions             (batch, length), true where to compare: such as at the tokens before those of an answer, which
                          is where the answer is predicted; None for all that are no pads
    atol                  in units of logits; the default is that of PEFT's tests in float32. For bfloat16 and float16
                          models no absolute tolerance is right everywhere: look at top1_agreement and kl.

    What has no logits is compared by the first numbers that it returns, such as an encoder's hidden states: then only max_abs means
    something. An encoder-decoder without decoder_input_ids reads its input ids on both sides. Virtual tokens, which prompt
    methods put before the text, do not count, and such a model gets each row without its pads: pads on the left would
    stand between them and the text.

    Returns a Comparison. Models run in eval mode without gradients and are left as they were. Show with
    check_changes_output that the adapter has an effect before trusting that two routes agree.
    """
    report = Comparison("Same output")
    if _share_all_weights(reference, candidate):
        report.fail(
            "same_object",
            "Both share all their weights: one is the other, or its base, which PEFT changes in place. They agree "
            "whatever the adapter does.",
            "Load a second copy of the base with from_pretrained, or compare with disable_adapter() in a function.",
        )
        return report
    if isinstance(atol, bool) or not isinstance(atol, (int, float)) or not atol >= 0:
        report.fail("bad_argument", f"atol is {atol!r}, not a number of at least 0.", "Leave it out: 1e-4.")
        return report
    logits = _logits_of_both(
        report, {"reference": reference, "candidate": candidate}, input_ids, attention_mask, positions
    )
    if logits is None:
        return report
    dtype = _measure(report, *logits)
    origin = "as in PEFT's own tests of merged LoRA in float32" if atol == MERGE_ATOL else "given by the caller"
    assert report.max_abs is not None  # measured above
    if report.max_abs > atol:
        report.fail(
            "logits_differ",
            f"The outputs differ: {report.measured()}; tolerance {atol:.0e} ({origin}).",
            "Check that both use the same base, adapter, scaling and dtype, and that the adapter is applied once.",
        )
    else:
        report.note("logits_agree", f"The outputs agree: {report.measured()}; tolerance {atol:.0e} ({origin}).")
    if dtype in ("bfloat16", "float16") and atol <= MERGE_ATOL:
        report.warn(
            "low_precision",
            f"The logits are {dtype}, whose rounding alone can exceed {atol:.0e}.",
            "Judge by top-1 agreement, KL and the task's score, or compare in float32.",
        )
    return report


@never_raises("Effect of the adapter", Comparison)
def check_changes_output(
    model: torch.nn.Module,
    input_ids: TokenIds,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    *,
    at_least: float = SMALLEST_EFFECT,
) -> Comparison:
    """Does the adapter change the model's output at all? Compares it with the same model, adapters switched off.

    Equality proves something only after this: with B = 0 every merge "works". No difference but rounding is a failure, and
    a largest difference of logits below `at_least` a warning. The inputs are those of compare_models, the reference being the base.

    Returns a Comparison; the model, its requires_grad flags included, is left as it was.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    report = Comparison("Effect of the adapter")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if _is_module(model) else []
    prompts = getattr(model, "prompt_encoder", None) if isinstance(model, PeftModel) else None
    if (not layers and not isinstance(model, PeftModel)) or (prompts is not None and not len(prompts)):
        report.fail(
            "no_adapters",
            f"This {type(model).__name__} has no adapters to switch off.",
            "Pass the model that PeftModel.from_pretrained or get_peft_model returned.",
        )
        return report
    if any(layer.merged_adapters for layer in layers):
        report.fail(
            "merged",
            "An adapter is merged into the base's weights, and switching it off would unmerge it.",
            "Call unmerge_adapter() first, or compare with a second copy of the base by compare_models.",
        )
        return report
    if any(layer.disable_adapters for layer in layers) or (prompts is not None and is_switched_off(model)):
        report.fail(
            "adapters_disabled",
            "The adapters are switched off already, at least in some layers.",
            "Leave the disable_adapter() block, or call model.base_model.enable_adapter_layers().",
        )
        return report

    def base(**inputs):
        if (
            prompts is not None
        ):  # which leave the base alone; disable_adapter() fails for models that don't generate (PEFT 0.21)
            return cast(Any, model).get_base_model()(**inputs)
        with _adapters_off(model, layers):
            return model(**inputs)

    routes = {"base": _Route(base, model), "model": model}
    logits = _logits_of_both(report, routes, input_ids, attention_mask)
    if logits is None:
        return report
    _measure(report, *logits)
    assert report.max_abs is not None  # measured above
    if report.max_abs <= ROUNDING * logits[0].abs().max().item():
        if invocation := _missing_invocation(model, input_ids):
            report.fail(
                "no_invocation",
                f"The adapter acts after its invocation tokens {invocation} only, and none of these texts holds them.",
                "Put the invocation at the end of each prompt, as in training.",
            )
        else:
            report.fail(
                "no_change",
                f"With and without the adapter the output is the same: {report.measured()}.",
                "Nothing was loaded or trained (all-zero B), or no adapter is active: run check_adapters on this model.",
            )
    elif report.max_abs < at_least:
        report.warn(
            "small_effect",
            f"The adapter hardly changes the output: {report.measured()}; to be told from none it should be {at_least:.0e}.",
            "Train on, or raise the learning rate; such an adapter can't show whether a merge is right.",
        )
    else:
        report.note("changes_output", f"The adapter changes the output: {report.measured()}.")
    return report


@dataclass
class _Route:
    """A way of calling `model`, so that eval mode and device are those of the model behind the function."""

    call: Callable[..., Any]
    model: torch.nn.Module


def _logits_of_both(report, routes, input_ids, attention_mask, positions=None):
    """The logits of both routes at the positions to compare, each (positions, vocabulary), or None."""
    import torch

    try:
        inputs, mask = _as_inputs(input_ids, attention_mask)
        compared = _as_positions(positions, mask)
    except ValueError as error:
        report.fail("bad_inputs", str(error), "Pass tokenizer(texts, padding=True, return_tensors='pt').")
        return None
    found = []
    for role, route in routes.items():
        try:
            logits = outputs(route, inputs)
        except Exception as error:
            report.fail(
                f"{role}_failed",
                f"The {role} did not run on these inputs: {type(error).__name__}: {error}",
                "Run it alone on the same inputs; the token ids must lie inside its vocabulary.",
            )
            return None
        if not torch.is_tensor(logits) or logits.dim() < 2 or not logits.numel() or not logits.is_floating_point():
            report.fail(
                f"{role}_failed",
                f"The {role} returned {type(logits).__name__}, not logits of shape (batch, length, vocabulary).",
                "Pass a model with a head, or a function that returns logits.",
            )
            return None
        if (
            compared is not None and logits.dim() == 3
        ):  # a classifier has one row a text, which the mask does not apply to
            logits = logits[:, -compared.shape[1] :]
            if logits.shape[:2] == compared.shape:
                logits = logits[compared.to(logits.device)]
        found.append(logits.flatten(0, -2).detach().cpu())
    first, second = found
    if first.shape != second.shape:
        names = list(routes)
        report.fail(
            "shape_mismatch",
            f"Over the same tokens the {names[0]} gives logits {tuple(first.shape)}, the {names[1]} {tuple(second.shape)}.",
            "They have different vocabularies or heads: compare models of one architecture and tokenizer.",
        )
        return None
    broken = [role for role, logits in zip(routes, found, strict=True) if not torch.isfinite(logits).all()]
    if broken:
        report.fail(
            "non_finite",
            f"The logits of the {' and the '.join(broken)} hold NaN or infinity.",
            "Run check_adapters for broken weights; in float16 try bfloat16 or float32.",
        )
        return None
    return found


def _measure(report, reference, candidate) -> str:
    """Fill in the numbers; returns the less precise dtype's name."""
    import torch

    max_abs, same, kl = 0.0, 0, 0.0
    # In slices: at a vocabulary of 150,000 a thousand positions in float64 would take gigabytes.
    for p, q in zip(reference.split(256), candidate.split(256), strict=True):
        p, q = p.double(), q.double()
        max_abs = max(max_abs, (p - q).abs().max().item())
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
    report.max_abs, report.top1_agreement, report.kl = max_abs, same / len(reference), max(kl / len(reference), 0.0)
    least_precise = max((reference.dtype, candidate.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return str(least_precise).removeprefix("torch.")


def _as_inputs(input_ids, attention_mask):
    """What the models are called with, {name: tensor}, and which tokens of it are real, (batch, length); None for inputs without tokens."""
    import torch

    given = dict(input_ids) if isinstance(input_ids, Mapping) else {"input_ids": input_ids}
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
    try:
        inputs = {name: torch.as_tensor(value) for name, value in given.items() if value is not None}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The inputs are no token ids: {error}.") from error
    if not any(name != "attention_mask" for name in inputs):
        raise ValueError("There are no inputs.")
    if "input_ids" in inputs:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    for side in ("", "decoder_"):
        ids, mask = inputs.get(f"{side}input_ids"), inputs.get(f"{side}attention_mask")
        if ids is None:
            continue
        if ids.dim() == 1:
            inputs[f"{side}input_ids"] = ids = ids[None]
            if mask is not None:
                inputs[f"{side}attention_mask"] = mask = mask.reshape(1, -1)
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2 or not ids.numel():
            raise ValueError(
                f"{side}input_ids must be whole numbers of shape (batch, length), not {ids.dtype} {tuple(ids.shape)}."
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"{side}attention_mask has shape {tuple(mask.shape)}, and {side}input_ids {tuple(ids.shape)}."
            )
        if mask is not None and not mask.any():
            raise ValueError(f"{side}attention_mask masks every token, so there is nothing to compare.")
    side = "decoder_" if "decoder_input_ids" in inputs else ""
    ids = inputs.get(f"{side}input_ids")
    return inputs, None if ids is None else inputs.get(f"{side}attention_mask", torch.ones_like(ids)).bool()


def _as_positions(positions, mask):
    """Where to compare: the real tokens, of those the given ones."""
    import torch

    if positions is None:
        return mask
    positions = torch.as_tensor(positions)
    shape = None if mask is None else tuple(mask.shape)
    if tuple(positions.shape) != shape or positions.dtype != torch.bool:
        raise ValueError(
            f"positions must be true or false for each token, {shape}, not {positions.dtype} {tuple(positions.shape)}."
        )
    if not (positions.to(mask.device) & mask).any():
        raise ValueError("positions names no token, so there is nothing to compare.")
    return positions.to(mask.device) & mask


def outputs(route: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """What a model gives on these inputs, a tensor if it is one that can be compared; in eval mode, without gradients."""
    import torch

    call, model = (route.call, route.model) if isinstance(route, _Route) else (route, route)
    mode: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(model, torch.nn.Module):
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        inputs = {name: tensor.to(device) for name, tensor in _taken(model, inputs).items()}
        mode = evaluating(model)  # dropout would make any two calls differ
    with mode, torch.no_grad():
        prompt = active_prompt(call)
        if prompt is None:
            return _numbers(call(**inputs))
        if prompt.peft_type not in CACHED:  # PEFT would drop them as well, with a warning
            inputs = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
        return without_pads(lambda part: _numbers(call(**part)), inputs)


def _taken(model, inputs) -> dict:
    """Of the inputs those that this model takes: a tokenizer may return more. An encoder-decoder gets what its decoder reads."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(inner.forward).parameters
    inputs = {
        name: tensor for name, tensor in inputs.items() if name in names or name in ("input_ids", "attention_mask")
    }
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        start: Any = getattr(config, "decoder_start_token_id", None) or 0
        first = next(iter(inputs.values()))
        inputs.setdefault("decoder_input_ids", inputs.get("input_ids", torch.full((len(first), 1), start)))
    return inputs


def _numbers(output):
    """The logits; of answers in a text both ends; else the first numbers that there are."""
    import torch

    if torch.is_tensor(logits := getattr(output, "logits", output)):
        return logits
    if torch.is_tensor(getattr(output, "end_logits", None)):
        return torch.stack([output.start_logits, output.end_logits], -1)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((part for part in parts if torch.is_tensor(part) and part.is_floating_point()), output)


def _missing_invocation(model, input_ids) -> list[int] | None:
    """The tokens after which an activated LoRA begins to act, if there are such and no text holds them."""
    ids = _as_inputs(input_ids, None)[0].get("input_ids")
    for config in getattr(model, "peft_config", {}).values():
        tokens = getattr(config, "alora_invocation_tokens", None)
        if tokens and ids is not None:
            windows = ids.unfold(1, len(tokens), 1) if ids.shape[1] >= len(tokens) else ids[:, :0, None]
            return None if (windows == ids.new_tensor(tokens)).all(-1).any() else list(tokens)
    return None


@contextlib.contextmanager
def _adapters_off(model, layers):
    """Like disable_adapter(), for any model with adapters; that one also leaves frozen adapters trainable (PEFT 0.21)."""
    from peft import PeftModel

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as stack:
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        else:
            for layer in layers:
                layer.enable_adapters(False)
                stack.callback(layer.enable_adapters, True)
        yield
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _share_all_weights(first, second) -> bool:
    if first is second:
        return True
    if not (_is_module(first) and _is_module(second)):
        return False
    sets = [{id(parameter) for parameter in model.parameters()} for model in (first, second)]
    return bool(sets[0] & sets[1]) and (sets[0] <= sets[1] or sets[1] <= sets[0])


def _is_module(model) -> bool:
    import torch

    return isinstance(model, torch.nn.Module)
