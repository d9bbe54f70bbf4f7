"""Checks for supervised fine-tuning (SFT), before training: is each row whole, and which of its tokens carry loss?"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.training import bad_argument, is_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

# Rows of a training set that check_supervision collates: enough to meet a fault that one row in twenty has.
ROWS = 64
# Code of a fault in single rows -> what is wrong in them, and what to do.
_FAULTS = {
    "bad_row": (
        "there is nothing that TRL and the chat template can read",
        "Give prompt and completion (both text, or both messages that the template takes), messages, or text. For "
        "messages the tokenizer needs a chat template, for text an EOS token.",
    ),
    "no_completion": (
        "there is no answer: no completion, an empty one, or the last message is not the assistant's",
        "Write the answers or remove these rows; a prompt alone teaches nothing.",
    ),
    "no_loss": (
        "no token carries loss: max_length cut the answer off, or a mask covers it; TRL may drop such a row without a message",
        "Raise max_length, shorten the prompts, or mend the mask. A batch of such rows has a loss of NaN.",
    ),
    "truncated": (
        "max_length cuts off the end of the answer, so the model learns to break off instead of stopping",
        "Raise max_length, or shorten or remove these rows.",
    ),
    "end_masked": (
        "the end of the answer is there but carries no loss, so the model never learns to stop",
        "If pad is the EOS token, the collator took EOS for a pad: give pads a token of their own. Else put "
        "the end of turn inside the template's generation markers.",
    ),
    "no_end": (
        "the answer does not end with EOS or the end of turn, so the model never learns to stop",
        "See whether it was cut off; else let the chat template or your own code end each answer so.",
    ),
    "loss_on_prompt": (
        "the prompt carries loss as well, so the model learns to ask as much as to answer",
        "Give SFTTrainer prompt and completion and leave completion_only_loss alone, or messages with "
        "assistant_only_loss=True. For plain text without a prompt it is right.",
    ),
    "labels_shifted": (
        "labels are not the tokens at their own places",
        "Copy input_ids and set -100 where no loss is wanted; the model itself shifts labels by one.",
    ),
}


@never_raises("Rows for SFT")
def check_sft_data(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Report:
    """Look at every row before a trainer does, which drops some in silence and fails unclearly on others.

    rows        list of dicts, or one split of a dataset, with prompt and completion, messages, or text (TRL's formats)
    tokenizer   the one to train with; rows are tokenised as SFTTrainer does it
    max_length  in tokens, as given to SFTConfig (its default is 1024); None for no limit

    Returns a Report that numbers rows from 0; its finding "supervision" gives the share of tokens in answers.
    """
    report, texts, unread = Report("Rows for SFT"), [], defaultdict(list)
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__iter__") or not hasattr(tokenizer, "decode"):
        return bad_argument(
            report, (rows, tokenizer), "a list of rows or one split such as dataset['train'], and a tokenizer"
        )
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        report.fail(
            "bad_argument", f"max_length is {max_length!r}.", "Pass a whole number of tokens, or None for no limit."
        )
        return report
    for number, row in enumerate(rows):
        try:
            encoded = _encode(row, tokenizer)
        except Exception:  # whatever a template raises on roles or contents that it does not know
            encoded = "bad_row"
        if isinstance(encoded, str):
            unread[encoded].append(number)
            encoded = [], []
        prompt, ids = encoded
        masked = min(max(len(prompt), 1), len(ids))
        texts.append((ids[:max_length], ([-100] * masked + ids[masked:])[:max_length], 0))
    return _judge(report, texts, tokenizer, _ends(tokenizer), max_length, unread)


@never_raises("Tokens with loss")
def check_supervision(trainer: Trainer | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Report:
    """Which tokens carry loss? Looks at rows as a trainer's own collator makes them, or at one batch.

    trainer    an SFTTrainer or Trainer, of whose training set 64 rows are collated; or one batch of a DataLoader:
               input_ids, labels (batch, length) and attention_mask, or position_ids where rows are packed
    tokenizer  needed with a batch, or if the trainer has no processing_class

    Returns a Report; its finding "supervision" gives the share of tokens with loss. Trainer and random state stay as
    they were. Rows that TRL dropped can't be seen here: use check_sft_data before.
    """
    report, whole, given = Report("Tokens with loss"), is_trainer(trainer), cast(Any, trainer)
    processor: Any = given.processing_class if whole and tokenizer is None else tokenizer
    tokenizer = getattr(processor, "tokenizer", processor)  # of a multimodal model's processor
    if not (whole or isinstance(trainer, Mapping)) or tokenizer is None or not hasattr(tokenizer, "decode"):
        return bad_argument(report, (trainer, tokenizer), "a trainer, or next(iter(dataloader)) and its tokenizer")
    batches = _collated(given) if whole else [given]
    if any("labels" not in batch or "input_ids" not in batch for batch in batches):
        report.fail(
            "no_labels",
            f"The batch has {first_few(batches[0], 5)}, not input_ids and labels: there is no loss.",
            "Use a collator that makes labels, such as DataCollatorForLanguageModeling(tokenizer, mlm=False).",
        )
        return report
    texts = [text for batch in batches for text in _texts(batch, tokenizer.pad_token_id)]
    limit = getattr(given.args, "max_length", None) if whole else None
    return _judge(report, texts, tokenizer, _ends(tokenizer, getattr(trainer, "model", None)), limit, defaultdict(list))


def _judge(report, texts, tokenizer, ends, limit, faults) -> Report:
    """Add the faults of `texts`, as of `_texts`, to `faults` {code: row numbers}, and all of them to the report."""
    known, counts = set(itertools.chain(*faults.values())), []
    for number, (ids, labels, first) in enumerate(texts):
        places = [place for place, label in enumerate(labels) if label != -100]
        counts.append(len(places))
        if number in known:
            continue
        if any(labels[place] != ids[place] for place in places):
            faults["labels_shifted"].append(number)
        if not places:
            faults["no_loss"].append(number)
            continue
        if places[0] <= first:
            faults["loss_on_prompt"].append(number)
        last, after = places[-1], ids[places[-1] + 1 :][:1]
        while last > places[0] and ids[last] not in ends and not tokenizer.decode([ids[last]]).strip():
            last -= 1  # many templates put a line break behind the end of turn
        if ids[last] not in ends or labels[last] == -100:
            cut = "truncated" if limit and len(ids) >= limit else "no_end"
            faults["end_masked" if ids[last] in ends or set(after) & ends else cut].append(number)
    for code, numbers in faults.items():
        what, remedy = _FAULTS[code]
        report.fail(code, f"In {len(numbers)} of {len(texts)} rows {what} (number {first_few(numbers)}).", remedy)
    if not texts:
        report.fail(
            "empty",
            "There are no rows.",
            "See whether the file is empty, or a filter removed them all; TRL itself "
            "drops those without loss (run check_sft_data on the rows that you gave it).",
        )
    else:
        share = sum(counts) / max(1, sum(len(ids) for ids, *_ in texts))
        report.note("supervision", f"In {len(texts)} rows {sum(counts)} tokens, {share:.0%} of all, carry loss.")
    return report


def _encode(row, tokenizer):
    """The ids of a row's prompt, and of the whole, as SFTTrainer makes them; or the code of a fault."""
    if "prompt" in row or "completion" in row:
        prompt, answer = row.get("prompt"), row.get("completion")
    else:
        turns = row.get("messages")
        prompt, answer = (turns[:-1], turns[-1:]) if turns else ("", row["text"])
    last = answer[-1] if answer and isinstance(answer, list) else {"role": "assistant", "content": answer}
    content = last.get("content") or last.get("tool_calls")
    if last["role"] != "assistant" or not (content.strip() if isinstance(content, str) else content):
        return "no_completion"
    if isinstance(answer, str):  # SFTTrainer puts EOS behind plain text
        whole = prompt + answer.removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        return tokenizer(prompt)["input_ids"], tokenizer(whole)["input_ids"]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True) if prompt else {}
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)
    return asked.get("input_ids", []), whole["input_ids"]


def _ends(tokenizer, model=None) -> set[int]:
    """Ids that end an answer: those at which generate() stops, and the token that the template puts after an answer."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed])} - {None}
    with contextlib.suppress(Exception):  # no template, or one that takes other roles
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "@@"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("@@")[2]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        ends.update([token for token in ids if token in tokenizer.added_tokens_decoder][:1])
    return ends


def _collated(trainer) -> list:
    """Batches of rows from all over the training set, made by the trainer's own collator of the columns it uses."""
    import torch

    dataset, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if hasattr(dataset, "__len__"):
        rows = [dataset[place] for place in range(0, len(dataset), -(-len(dataset) // ROWS) or 1)]
    else:  # a stream
        rows = list(itertools.islice(dataset, ROWS))
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    with torch.random.fork_rng(devices=[]):  # a collator may draw
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def _texts(batch, pad):
    """The texts of a batch without pads, as (ids, labels, first place at which a label is kept).

    A packed row holds several texts, each beginning at position 0, where TRL masks the label whatever it is.
    """
    import torch

    ids, labels = torch.as_tensor(batch["input_ids"]), torch.as_tensor(batch["labels"])
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    real = (ids != pad) | (labels != -100) if mask is None else torch.as_tensor(mask).bool()
    parts = torch.zeros_like(ids) if positions is None else (torch.as_tensor(positions) == 0).cumsum(-1)
    for row in range(len(ids)):
        for part in parts[row].unique():
            if (keep := real[row] & (parts[row] == part)).any():
                yield ids[row][keep].tolist(), labels[row][keep].tolist(), int(positions is not None)
