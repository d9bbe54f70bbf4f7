"""Is a merged model the model that was trained? Answered from the three folders, before anything is shipped."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.adapter_config import CONFIG
from adapter_checks.adapter_folder import PICKLE_SUFFIXES, check_adapter_folder
from adapter_checks.base_shapes import load_base, token_embedding
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.comparison import MERGE_ATOL, check_changes_output, compare_models, outputs
from adapter_checks.counting import without_weights
from adapter_checks.device import best_device, usable_device
from adapter_checks.errors import InputError
from adapter_checks.merged_report import MergedReport
from adapter_checks.merged_weights import StoredWeights, compare_weights
from adapter_checks.model_classes import model_classes
from adapter_checks.model_folder import local_folder, read_json, weight_files
from adapter_checks.names import same_base
from adapter_checks.report import first_few, never_raises
from adapter_checks.safetensors_header import read_safetensors_header
from adapter_checks.soft_prompts import why_not_mergeable

if TYPE_CHECKING:
    import os

    import torch

# The logits may be off by this many times what one rounding of the weights does to them: a merge may round three times
# (so √3), and of two draws of such errors the largest of one may be twice that of the other.
LOGIT_ROUNDINGS = 4
TEXTS, TOKENS = 8, 64  # on which logits are compared
# For calls without rows or texts. What they say matters little: they are to take the models through many tokens.
PLAIN_TEXTS = (
    "The river rose in the night, and by the morning the lower road was under water.",
    "She opened the letter twice before she understood what it asked of her.",
    "To bake the bread, mix 500 g of flour with water, salt and a little yeast, then wait.",
    "What is the capital of the country, and how many people live there today?",
    "The committee agreed on three points: cost, time, and who would do the work.",
    "def area(width, height):\n    return width * height",
    '{"name": "Ana", "city": "Porto", "age": 31}',
    "Nobody had told him that the train on platform four left ten minutes early.",
)


@never_raises("Merged model", MergedReport)
def check_merged_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    merged: str | os.PathLike[str],
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    texts: Iterable[str] | None = None,
    score: Callable[[str, str], float] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> MergedReport:
    """Is the model in the folder `merged` the base with the trained adapter? One call before you ship it.

    base     folder or hub id of what the adapter was trained on
    adapter  folder or hub id of the adapter; a list of them if all were active together and were merged together
    merged   folder or hub id of the merged model
    rows     held-out rows {"prompt": [messages], "completion": [messages]}: then the answers are compared, too. Some
             thirty will do; both models answer each
    texts    strings on which the logits are compared; None takes the first rows, or else a few plain sentences
    score    function(prediction, answer) -> bool or number from 0 to 1, both strings; None is an exact match
    dtype    of the arithmetic, a torch.dtype or its name. None is float32: then only the rounding of the merged weights
             can differ. Takes 4 bytes a parameter; give "bfloat16" where that is too much.
    device   where the models run; None is a GPU if torch has one, else the CPU
    progress function that is called with a few words on what is done next

    What is looked at, each in findings of its own:
      files    safetensors that are whole, no pickle, no adapter beside the weights, the tokenizer and its template,
               vocabulary sizes that agree, generation that stops where the template ends a reply
      adapter  its folder is healthy (check_adapter_folder), and it changes the base's output (check_changes_output)
      weights  merged - base is the adapter's change, once, in every layer; every other weight is the base's
      output   the same logits within the tolerance (compare_models)
      answers  the same score, if rows are given

    Tolerances. Logits: 1e-4, that of PEFT's own tests in float32, or four times what one rounding of the exact merge to
    the dtype of the merged weights does to these logits, if that is more. It is measured on the model at hand: in
    16 bits no fixed number fits every model, and PEFT's test of a float16 merge asks only that it runs. Weights, by
    layer: a distance of twice one such rounding, since a merge may round three times (base, change, sum), whose errors
    add up as √3. Score: lost answers may outnumber won ones by 2·√(lost + won), two standard deviations of a fair coin.

    Failures (report.codes) of the weights: not_merged, partly_merged, merged_twice, swapped, wrong_scaling,
    adapter_lost, base_mutated, foreign_change, quantised_base, repacked_base, base_changed, tied_head, other_weights, missing_weights;
    of the files: no_folder, not_a_model, damaged_weights, pickle, quantised_weights, adapter_beside, no_tokenizer,
    no_template, other_tokenizer, end_ignored, vocab_mismatch; of the adapter: not_mergeable; of the output: no_change, logits_differ, score_fell; and those of
    check_adapter_folder, such as zero_b. Warnings: change_rounded_away, too_coarse, other_config,
    not_compared, unread_weights, end_ignored if the base stops elsewhere, too.

    One model is in memory at a time. Returns a MergedReport; nothing is written, no pickle is read.
    """
    import torch

    report = MergedReport("Merged model")
    given_adapters = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    folders = _folders(report, base, given_adapters, merged)
    kind = getattr(torch, str(dtype).removeprefix("torch."), None) if dtype is not None else torch.float32
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        report.fail(
            "bad_argument",
            f"dtype is {dtype!r:.60}, which is no floating-point type of torch.",
            "Leave it out, or pass 'float32', 'bfloat16' or 'float16'.",
        )
    if device is not None:
        try:
            usable_device(device)
        except InputError as error:
            report.fail("bad_argument", str(error), "Leave it out, or pass 'cpu'.")
    for what, given, wanted in (
        ("rows", rows, "a list of rows {'prompt': [messages], 'completion': [messages]}"),
        ("texts", texts, "a list of strings"),
    ):
        if given is not None and not _is_list(given):
            report.fail("bad_argument", f"{what} is {given!r:.60}.", f"Leave it out, or pass {wanted}.")
    task = _Given(list(rows or ()), list(texts or ()), score or _same_text) if report.ok else None
    if task and (broken := [number for number, row in enumerate(task.rows, 1) if not _is_row(row)]):
        report.fail(
            "bad_argument",
            f"Row {broken[0]} of {len(task.rows)} is {task.rows[broken[0] - 1]!r:.60}.",
            "Pass rows {'prompt': [messages], 'completion': [messages]}, a message being {'role': str, 'content': str}.",
        )
    if score is not None and not callable(score):
        report.fail(
            "bad_argument", f"score is {score!r:.60}.", "Leave it out, or pass a function(prediction, answer) -> bool."
        )
    if folders is None or task is None or not report.ok:
        return report
    base_folder, adapters, merged_folder = folders
    report.title = f"Merged model {merged_folder.name}"
    files, base_files = _read_files(report, base_folder, adapters, merged_folder)
    _check_unread(report, merged_folder)
    for folder in adapters:
        skipped = {"merged_model_beside", "bad_base" if base_files is None else ""}
        skipped |= {"base_mismatch"} if _trained_on(folder, base) else set()
        found = check_adapter_folder(folder, base=base_folder).findings
        report.findings += [finding for finding in found if finding.level != "ok" and finding.code not in skipped]
    unreadable = {
        "whole_model",
        "not_readable",
        "no_config",
        "bad_config",
        "no_weights",
        "damaged_weights",
        "not_a_model",
        "quantised_weights",
    }
    if files is None or base_files is None or unreadable & set(report.codes):
        return report
    if reasons := [why for folder in adapters if (why := why_not_mergeable(read_json(folder / CONFIG)))]:
        report.fail(
            "not_mergeable", reasons[0], "Ship the adapter's folder beside the base; no merged model stands for it."
        )
        return report
    try:
        with _quiet():
            _compare(
                report,
                base_folder,
                adapters,
                merged_folder,
                files,
                base_files,
                task,
                kind,
                device,
                progress or (lambda line: None),
            )
    except Exception as error:
        report.fail(
            "check_failed",
            f"The models could not be compared to the end: {type(error).__name__}: {error}",
            "See the other findings; load base and adapter by PeftModel.from_pretrained, and the merged folder, to see where it fails.",
        )
    return report


@dataclass(frozen=True)
class _Given:
    rows: list
    texts: list
    score: Callable


def _same_text(prediction: str, answer: str) -> bool:
    return prediction.strip() == answer.strip()


def _is_row(row: object) -> bool:
    """Whether a row has messages to answer and an answer to compare with."""
    if not isinstance(row, Mapping):
        return False
    sides = [row.get(side) for side in ("prompt", "completion")]
    messages = [message for side in sides if isinstance(side, Sequence) for message in side]
    return all(sides) and all(isinstance(message, Mapping) and "content" in message for message in messages)


def _is_list(given) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (Mapping, str))


def _trained_on(adapter: Path, base_name) -> bool:
    """Whether the adapter names this base: a hub id leads to a folder in the cache that bears another name."""
    try:
        return same_base(
            json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"],
            base_name,
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _folders(report, base, adapters, merged):
    found = []
    for role, names in (("base", [base]), ("adapter", adapters), ("merged model", [merged])):
        try:
            found.append([local_folder(name) for name in names])
        except InputError as error:
            unsaved = any(hasattr(name, "save_pretrained") for name in names)
            report.fail(
                "no_folder",
                f"The {role} can't be found. {error}",
                "Save it with save_pretrained, and pass that folder."
                if unsaved
                else "Pass the folder that save_pretrained wrote, or a hub id.",
            )
    if not adapters:
        report.fail("bad_argument", "No adapter was given.", "Pass the adapter's folder.")
    return (found[0][0], found[1], found[2][0]) if report.ok else None


# ---------------------------------------------------------------------------------------------- files


def _check_unread(report, folder: Path) -> None:
    """Weights that transformers passes over: left from an earlier save, or the very ones that were meant."""
    try:
        read = {path.name for path in weight_files(folder)}
    except InputError:  # said by _read_files
        return
    if "model.safetensors" not in read:
        read.add("model.safetensors.index.json")
    names = {path.name for path in folder.glob("*.safetensors*") if not path.name.startswith("adapter_model.")}
    if unread := sorted(names - read):
        report.warn(
            "unread_weights",
            f"{folder.name} holds weights that transformers does not read: {first_few(unread)}. It takes model.safetensors if it is "
            "there, and else the files that model.safetensors.index.json names.",
            "If they are older, delete them. If they are what was merged, the model here is another one: save it again, into an "
            "empty folder.",
        )


def _read_files(report, base: Path, adapters: list[Path], merged: Path):
    """{file: {tensor: (dtype, shape)}} of both folders; None where that can't be read."""
    headers: list[Any] = []
    for role, folder in (("merged model", merged), ("base", base)):
        try:
            config = read_json(folder / "config.json")
            headers.append({file: read_safetensors_header(file) for file in weight_files(folder)})
        except InputError as error:
            alone = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
            code = (
                "damaged_weights"
                if (folder / "config.json").exists() and list(folder.glob("*.safetensors*"))
                else "not_a_model"
            )
            own = folder.resolve() in [adapter.resolve() for adapter in adapters]
            problem = "is the adapter's folder: the same one was given twice" if own else "holds an adapter only"
            report.fail(
                code,
                f"The {role} in {folder.name} {problem}." if alone else f"The {role} can't be read. {error}",
                "Save the model that merge_and_unload returns, with save_pretrained, to a folder of its own."
                if folder == merged
                else "Pass the base that the adapter was trained on, whole and as safetensors.",
            )
            headers.append(None)
            continue
        packed = {kind for header in headers[-1].values() for kind, _ in header.values()} & {
            "U8",
            "I8",
            "F8_E4M3",
            "F8_E5M2",
        }
        if packed or "quantization_config" in config:
            report.fail(
                "quantised_weights",
                f"The {role} in {folder.name} is quantised ({', '.join(sorted(packed)) or 'quantization_config'}), and this check "
                "compares 16-bit and 32-bit weights.",
                "Merge into the 16-bit or 32-bit base and quantise afterwards; compare a quantised model by compare_models and by its "
                "score.",
            )
    names = sorted(path.name for path in merged.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        report.fail(
            "pickle",
            f"Beside the merged weights lies {first_few(pickles)}, a pickle: reading one can run any code.",
            "Delete it: the safetensors files hold the model.",
        )
    if "config.json" in names and (beside := [name for name in names if name.startswith("adapter_")]):
        report.fail(
            "adapter_beside",
            f"{first_few(beside)} lies beside the merged weights. AutoModelForCausalLM.from_pretrained loads the model and puts the "
            "adapter on top, so the change is applied twice.",
            "Keep the merged model in a folder of its own: move the adapter's files out.",
        )
    return headers


def _check_tokenizer(report, wanted, merged: Path):
    """The merged folder's tokenizer against the one that the adapter was trained with; None if it has none."""
    import transformers

    try:
        if not any(merged.glob("tokenizer*")):
            raise InputError("no such file")
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    except Exception as error:
        if wanted is not None:
            report.fail(
                "no_tokenizer",
                f"The merged folder has no tokenizer that could be loaded ({error}): whoever loads it has to guess one.",
                "tokenizer.save_pretrained(folder), with the tokenizer that the adapter was trained with.",
            )
        return None
    if wanted is None:
        return tokenizer
    if wanted.get_vocab() != tokenizer.get_vocab() or wanted.eos_token != tokenizer.eos_token:
        report.fail(
            "other_tokenizer",
            f"The merged folder's tokenizer is another one: {len(tokenizer)} tokens, and {len(wanted)} in the one that the adapter was "
            "trained with, or other tokens, or another end token.",
            "Save the tokenizer that the adapter was trained with.",
        )
    elif wanted.chat_template and tokenizer.chat_template != wanted.chat_template:
        report.fail(
            "other_template" if tokenizer.chat_template else "no_template",
            f"The merged folder's tokenizer has {'another' if tokenizer.chat_template else 'no'} chat template, so prompts reach the "
            "model in a form that it was not trained on.",
            "Save the tokenizer that the adapter was trained with: save_pretrained writes chat_template.jinja, too.",
        )
    return tokenizer


def _check_stop(report, tokenizer, merged: Path, base: Path) -> None:
    """The token with which the template ends a reply has to be one at which generation stops, or replies go on to the limit."""
    end, stops = _end_of_a_reply(tokenizer), _stops(merged)
    if end is None or stops is None or end in stops:
        return
    names = ", ".join(repr(tokenizer.decode([stop])) for stop in sorted(stops)) or "no token at all"
    at_fault = report.fail if end in (_stops(base) or ()) else report.warn
    at_fault(
        "end_ignored",
        f"Generation with the merged model stops at {names}, and its chat template ends a reply with {tokenizer.decode([end])!r}: "
        "a reply goes on until it is cut off.",
        f"model.generation_config.eos_token_id = {end} before save_pretrained, or a list of this and the others.",
    )


def _end_of_a_reply(tokenizer) -> int | None:
    """The first special token after a reply in the tokenizer's chat template; None without a template, or if it adds none."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    reply = "Fine"
    try:
        talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": reply}]
        after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(reply)[2]
    except Exception:  # a template may want other roles, or tools; nothing can be said then
        return None
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next(
        (number for number in tokenizer(after, add_special_tokens=False)["input_ids"] if number in special), None
    )


def _stops(folder: Path) -> set[int] | None:
    """The ids of the tokens at which `generate` stops with the model in this folder; None for one that writes no text."""
    import transformers

    if (folder / "generation_config.json").is_file():
        settings = transformers.GenerationConfig.from_pretrained(folder)
    else:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(settings, "eos_token_id"):
        return None
    stops = settings.eos_token_id
    return set(stops) if isinstance(stops, (list, tuple)) else {stops} - {None}


def _check_vocabulary(report, model, tokenizer, merged: StoredWeights, config) -> None:
    """Rows of embedding and head, the configuration and the tokenizer have to agree."""
    embedding = token_embedding(model)
    if embedding is None:
        return
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {module: name for name, module in model.named_modules()}
    rows = {end: found.shape[0] for end, module in ends.items()
            if module is not None and (found := merged.get(f"{names[module]}.weight")) is not None}  # fmt: skip
    rows |= {"configuration": config.get_text_config().vocab_size, "base": embedding.weight.shape[0]}
    if len(set(rows.values())) > 1 or (tokenizer is not None and len(tokenizer) > min(rows.values())):
        sizes = ", ".join(
            f"{end} {number}" for end, number in (rows | ({"tokenizer": len(tokenizer)} if tokenizer else {})).items()
        )
        report.fail(
            "vocab_mismatch",
            f"The vocabulary sizes don't agree: {sizes}. All but the tokenizer's have to be the same, and its may not be larger.",
            "Tokens were added, or the embedding was resized, on one side only: resize the base alike before merging, and save its "
            "configuration.",
        )


# ---------------------------------------------------------------------------------------------- models


def _compare(report, base, adapters, merged, files, base_files, given, dtype, device, progress) -> None:
    """Base + adapter first, then the merged model, so that one of them is in memory at a time."""
    import torch
    import transformers

    device = torch.device(device) if device is not None else best_device()
    config = transformers.AutoConfig.from_pretrained(merged, trust_remote_code=False)
    source = next((folder for folder in adapters if (folder / "tokenizer_config.json").is_file()), base)
    tokenizer = (
        transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if any(source.glob("tokenizer*"))
        else None
    )
    own_tokenizer = _check_tokenizer(report, tokenizer, merged)
    _check_stop(report, own_tokenizer, merged, base)
    kinds = [kind for header in files.values() for kind, _ in header.values()]
    report.dtype = {"BF16": "bfloat16", "F16": "float16"}.get(max(kinds, key=kinds.count), "float32")

    progress(f"loading base and adapter on {device}")
    model, shown = _load_adapted(base, adapters, dtype, device)
    base_config = model.get_base_model().config
    plain: Any = model.get_base_model()
    kind = _class_for(config, type(plain))
    inputs, rows = _inputs(plain, tokenizer, given), given.rows
    effect: Any = check_changes_output(model, inputs) if inputs else None
    if effect is None or (
        {"base_failed", "model_failed"} & set(effect.codes) and plain.get_output_embeddings() is None
    ):
        report.note(
            "outputs_not_compared",
            f"{type(plain).__name__} does not run on token ids alone, so outputs were not compared, and the weights were.",
        )
        inputs = None
    else:
        report.findings += effect.findings if effect.ok else [f for f in effect.findings if f.level == "fail"]
        progress("running base and adapter")
    logits = _logits(model, inputs)
    answers = _answers(report, model, tokenizer, rows)
    tied, kept = plain.all_tied_weights_keys, without_weights(kind, config).all_tied_weights_keys
    stored = StoredWeights(files, plain, {name: shared for name, shared in tied.items() if name in kept})
    base_stored = StoredWeights(base_files, plain, tied)
    _check_vocabulary(report, plain, own_tokenizer, stored, config)
    progress("comparing the weights")
    del plain
    model = compare_weights(report, model, shown, stored, base_stored, covered=inputs is not None)
    if inputs is None:
        return _compare_configs(report, base_config, config)
    # What rounding alone does: the exact merge, rounded to the dtype of the merged weights.
    report.tolerance = max(MERGE_ATOL, LOGIT_ROUNDINGS * (_logits(model, inputs) - logits).abs().max().item())
    if effect.ok and report.tolerance > (effect.max_abs or 0.0) / 2:
        report.warn(
            "too_coarse",
            f"Rounding alone moves the logits by up to {report.tolerance / LOGIT_ROUNDINGS:.1e}, the adapter by {effect.max_abs:.1e}: "
            "the outputs can't tell them apart.",
            "Judge by the findings on the weights and by the task's score; merge in a dtype of more precision.",
        )
    del model
    gc.collect()  # modules refer to each other in circles

    if (merged / "adapter_config.json").is_file() and not (merged / "adapter_model.safetensors").is_file():
        return  # transformers would look for the adapter's pickle
    progress("loading and running the merged model")
    candidate = _load_merged(report, kind, merged, dtype, device)
    if candidate is not None:
        _compare_outputs(report, logits, candidate, inputs, dtype)
        _compare_answers(report, answers, _answers(report, candidate, own_tokenizer or tokenizer, rows), given)
        _compare_configs(report, base_config, config)


def _load_adapted(base, adapters, dtype, device):
    """The base with all adapters active, and {adapter's name in the model: name to show}."""
    quiet_imports()
    from peft import PeftModel

    model: Any = load_base(base, adapters[0], dtype).to(device)
    names = [folder.resolve().name for folder in adapters]
    shown = {f"adapter_{i}": name if names.count(name) == 1 else str(adapters[i]) for i, name in enumerate(names)}
    for name, folder in zip(shown, adapters, strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    model.base_model.set_adapter(list(shown), inference_mode=True)
    return model.eval(), shown


def _class_for(config, kind):
    """The base's class, if a model with the merged configuration can be of it; else that which the configuration names."""
    return kind if isinstance(config, kind.config_class) else next(iter(model_classes(config)), kind)


def _load_merged(report, kind, merged, dtype, device):
    try:
        model = kind.from_pretrained(merged, dtype=dtype, use_safetensors=True)
        return model.to(device).eval()
    except Exception as error:
        report.fail(
            "merged_failed",
            f"The merged model can't be loaded with transformers: {type(error).__name__}: {error}",
            "Save it again with save_pretrained; weights and config.json belong to one model.",
        )
        return None


def _inputs(model, tokenizer, given):
    """Token ids and mask on which the logits are compared; None for a model that reads something else."""
    import torch

    embedding = token_embedding(model)
    if embedding is None or model.main_input_name != "input_ids":
        return None
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * TOKENS
    tokens = min(TOKENS, context // 2)  # some count positions from a number above 0
    if tokenizer is None:  # any tokens will do to tell two models apart
        vocabulary = len(embedding.weight)
        return {"input_ids": torch.randint(vocabulary, (TEXTS, tokens), generator=torch.Generator().manual_seed(0))}
    texts = given.texts
    if not texts and given.rows and tokenizer.chat_template:
        messages = [[*row["prompt"], *row["completion"]] for row in given.rows[:TEXTS]]
        texts = [tokenizer.apply_chat_template(message, tokenize=False) for message in messages]
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"][:tokens] for text in (texts or PLAIN_TEXTS)]
    longest = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]),
    }


def _logits(model, inputs):
    if inputs is None:
        return None
    logits, mask = outputs(model, inputs).cpu(), inputs.get("attention_mask")
    if mask is None or logits.shape[:2] != mask.shape:
        return logits
    return logits * mask[..., None]  # what is computed at pads means nothing


def _answers(report, model, tokenizer, rows):
    from adapter_checks import generation

    if not rows:
        return None
    try:
        return generation.generate(model, tokenizer, [row["prompt"] for row in rows])
    except Exception as error:
        report.fail("task_failed", f"The task's prompts could not be answered: {type(error).__name__}: {error}",
                    "Pass rows of {'prompt': [messages], 'completion': [messages]} that fit the model's context and template.")  # fmt: skip
        return None


def _compare_outputs(report, logits, candidate, inputs, dtype) -> None:
    import torch

    comparison = compare_models(lambda **_: logits, candidate, inputs, atol=report.tolerance)
    report.max_abs, report.top1_agreement, report.kl = comparison.max_abs, comparison.top1_agreement, comparison.kl
    if report.max_abs is None:
        report.findings += comparison.findings
        return
    coarser = max((report.dtype, str(dtype)[6:]), key=lambda name: torch.finfo(getattr(torch, name)).eps)
    origin = (
        "PEFT's own in float32"
        if report.tolerance == MERGE_ATOL
        else f"{LOGIT_ROUNDINGS} times what one rounding of the weights to {coarser} does here"
    )
    outcome = f"{report.measured()}; tolerance {report.tolerance:.1e}, {origin}."
    if report.max_abs <= report.tolerance:
        report.note("logits_agree", f"Base + adapter and the merged model agree: {outcome}")
    else:
        report.fail(
            "logits_differ",
            f"Base + adapter and the merged model differ: {outcome}",
            "See the findings on weights and files. If there are none, the configurations differ.",
        )


def _compare_answers(report, reference, candidate, given) -> None:
    if reference is None or candidate is None:
        return
    rows, answers = given.rows, [row["completion"][0]["content"] for row in given.rows]
    before, after = (
        [float(given.score(*pair)) for pair in zip(predictions, answers, strict=True)]
        for predictions in (reference, candidate)
    )
    report.scores = {"adapter": sum(before) / len(rows), "merged": sum(after) / len(rows)}
    lost = sum(now < was for was, now in zip(before, after, strict=True))
    won = sum(now > was for was, now in zip(before, after, strict=True))
    same = sum(one == other for one, other in zip(reference, candidate, strict=True))
    outcome = (
        f"score {report.scores['adapter']:.0%} with the adapter and {report.scores['merged']:.0%} merged; {same} of {len(rows)} "
        f"answers are the same, {lost} are worse, {won} better."
    )
    if lost - won > 2 * (lost + won) ** 0.5:
        report.fail(
            "score_fell",
            f"The merged model is worse: {outcome}",
            "It is not the trained model: see the other findings.",
        )
    else:
        report.note("score_kept", f"On the task: {outcome}")


def _compare_configs(report, base, merged) -> None:
    """Settings that the weights don't show, such as the base of the rotary embedding."""
    unimportant = re.compile(
        r"_.*|architectures|transformers_version|(torch_)?dtype|use_cache|tie_word_embeddings|.*_token_id"
    )

    def settings(config: dict) -> dict:  # those of the parts of a multimodal model are inside
        return {
            key: settings(value) if isinstance(value, dict) else value
            for key, value in config.items()
            if not unimportant.fullmatch(str(key))
        }

    ours, theirs = settings(base.to_dict()), settings(merged.to_dict())
    differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if differing:
        report.warn(
            "other_config",
            f"config.json differs from the base's in {first_few(differing, 4)}.",
            "Save the merged model with its own configuration, which is the base's.",
        )


@contextlib.contextmanager
def _quiet():
    """Nothing on stderr: what the libraries would warn of is a finding here."""
    import transformers

    level, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
