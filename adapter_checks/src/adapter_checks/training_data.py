"""Checks for supervised fine-tuning (SFT), before training: is each row whole, and which of its tokens carry loss?"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from adapter_checks.generation import context_length, eos_ids
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.sft_rows import encode_row
from adapter_checks.soft_prompts import active_prompt, virtual_tokens
from adapter_checks.training import bad_argument, is_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

# Rows of a training set that check_supervision collates: enough to meet a fault that one row in twenty has.
ROWS = 64
# Code of a fault in single rows -> its level, what is wrong in them, and what to do.
FAULTS: dict[str, tuple[str, str, str]] = {
    "bad_row": (
        "fail",
        "there is nothing that TRL and the chat template can read",
        "Give prompt and completion (both text, or both messages that the template takes), messages, or text; make these "
        "of other columns first (instruction and output, say). For messages the tokenizer needs a chat template, for text "
        "an EOS token.",
    ),
    "no_completion": (
        "fail",
        "there is no answer: no completion, an empty one, or none with the role assistant",
        "Write the answers or remove these rows; a prompt alone teaches nothing. Name the roles user and assistant. Rows "
        "with chosen and rejected are for DPOTrainer: check_preference_data looks at them.",
    ),
    "content_dropped": (
        "fail",
        "the chat template leaves out something that the row holds, so the model never sees it",
        "Take a template that knows this field (the model's own, or one of TRL's), or write it into content yourself.",
    ),
    "content_printed": (
        "fail",
        "the chat template prints a list of parts as Python or JSON writes it, brackets, quotes and names included",
        "Make content a string by joining the texts of its parts.",
    ),
    "no_loss": (
        "fail",
        "no token carries loss: max_length cut the answer off, or a mask covers it; TRL may drop such a row without a message",
        "Raise max_length, shorten the prompts, or mend the mask. A batch of such rows has a loss of NaN.",
    ),
    "truncated": (
        "fail",
        "max_length cuts off the end of the answer, so the model learns to break off instead of stopping",
        "Raise max_length, or shorten or remove these rows.",
    ),
    "end_masked": (
        "fail",
        "the end of the answer is there but carries no loss, so the model never learns to stop",
        "If pad is the EOS token, the collator took EOS for a pad: give pads a token of their own. Else put "
        "the end of turn inside the template's generation markers.",
    ),
    "no_end": (
        "fail",
        "the answer does not end with EOS or the end of turn, so the model never learns to stop",
        "See whether it was cut off; else let the chat template or your own code end each answer so.",
    ),
    "labels_shifted": (
        "fail",
        "labels are not the tokens at their own places",
        "Copy input_ids and set -100 where no loss is wanted; the model itself shifts labels by one.",
    ),
    "loss_on_prompt": (
        "warn",
        "the prompt carries loss as well, so the model learns to write prompts, too",
        "If you mean that, or the text has no prompt, it is right. Else give SFTTrainer prompt and completion and leave "
        "completion_only_loss alone, or messages with assistant_only_loss=True.",
    ),
    "loss_on_pads": (
        "warn",
        "pads carry loss, so the model learns to write pads, and the mean over all tokens says little about answers",
        "Set the labels to -100 where attention_mask is 0.",
    ),
    "prompt_differs": (
        "warn",
        "the end of the prompt has other tokens when the answer follows than alone, so the model is trained on another "
        "prompt than it will be asked with",
        "Let a text prompt end without a space, and the answer begin with it. For messages take a template that writes the "
        "prompt alike in both cases (a generation prompt that opens a thought needs answers with thoughts).",
    ),
    "pads_before_text": (
        "warn",
        "pads stand before the text, and the virtual tokens before the pads, so that a text is as far from them as its row is short",
        "Pad on the right in training (tokenizer.padding_side='right'). To generate in batches use "
        "adapter_checks.generation.generate, or rows of one length.",
    ),
    "double_bos": (
        "warn",
        "the begin-of-text token is there twice: from the template or the text and from the tokenizer, or before prompt and answer",
        "Give the trainer messages, or take the token off the rendered text (text.removeprefix(tokenizer.bos_token)); in a "
        "loop of your own tokenise rendered text, and answers, with add_special_tokens=False.",
    ),
    "end_inside": (
        "warn",
        "an answer's text holds an end token itself, so the model learns to stop there, or to write it twice; or that of "
        "another model, which it learns to spell out",
        "Take it out: template and trainer write the end. If it stands between turns, make the row a list of messages.",
    ),
    "earlier_end_masked": (
        "warn",
        "the end of an earlier answer is missing or carries no loss; only that of the last one teaches the model to stop",
        "Put the end of turn inside the template's generation markers, for every turn, or train on the last answer only "
        "(prompt and completion).",
    ),
    "turns_cut": (
        "warn",
        "max_length cuts off whole answers at the conversation's end, which teach nothing",
        "Raise max_length, or split long conversations.",
    ),
    "last_not_assistant": (
        "warn",
        "the last turn is not the assistant's, so no answer follows it",
        "Cut the conversation off behind its last answer; what stands there can teach nothing but to ask.",
    ),
    "thoughts_dropped": (
        "warn",
        "the chat template leaves out the thoughts of earlier answers, which are trained as answers without thoughts",
        "Make one row of each answer, with the turns before it as prompt, or train on the last answer only.",
    ),
}


@never_raises("Rows for SFT")
def check_sft_data(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Report:
    """Look at every row before a trainer does, which drops some in silence and fails unclearly on others.

    rows        list of dicts, or one split of a dataset, with prompt and completion, messages, or text (TRL's formats)
    tokenizer   the one to train with; rows are tokenised as SFTTrainer does it. If its folder holds the model's
                config.json and generation_config.json, its context and its end tokens are looked at, too
    max_length  in tokens, as given to SFTConfig (its default is 1024); None for no limit

    Returns a Report that numbers rows from 0; its finding "supervision" gives the share of tokens in answers. Of messages
    these are what the template's generation markers hold, as with assistant_only_loss=True, or without markers all turns of
    the assistant.
    """
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__iter__") or not hasattr(tokenizer, "eos_token_id"):
        wanted = "a list of rows or one split such as dataset['train'], and a tokenizer (of a processor its .tokenizer)"
        return bad_argument(Report("Rows for SFT"), (rows, tokenizer), wanted)
    return _check_rows(enumerate(rows), tokenizer, max_length, counted_from_0)


@never_raises("Rows for SFT")
def check_sft_lines(
    rows: Iterable[tuple[int, Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Report:
    """check_sft_data for rows that come with the numbers of their lines in a file, which the Report then names."""
    return _check_rows(rows, tokenizer, max_length, lambda lines: f"line {first_few(lines)}")


def counted_from_0(numbers: Iterable[int]) -> str:
    return f"number {first_few(numbers)}, counted from 0"


def _check_rows(rows, tokenizer, max_length, in_words) -> Report:
    """in_words: function from some of the numbers that come with the rows to where these are."""
    report, texts, faults = Report("Rows for SFT"), [], Faults()
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        report.fail(
            "bad_argument", f"max_length is {max_length!r}.", "Pass a whole number of tokens, or None for no limit."
        )
        return report
    facts, names = read_facts(tokenizer), []
    for number, (name, row) in enumerate(rows):
        names.append(name)
        encoded = encode_row(row, tokenizer, facts.ends)
        for code, detail in encoded.faults.items():
            faults[code][number] = detail
        labels, cut = encoded.labels, len(encoded.labels[:max_length])
        kept, lost = (any(label != -100 for label in part) for part in (labels[:cut], labels[cut:]))
        if kept and lost and -100 in labels[cut - 1 : cut + 1]:
            faults["turns_cut"][number] = ""
        texts.append((encoded.ids[:cut], labels[:cut], 0))
    return _judge(
        report, texts, tokenizer, facts, max_length, faults, where=lambda rows: in_words(names[row] for row in rows)
    )


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
    faults = Faults()
    texts = [text for batch in batches for text in _texts(batch, tokenizer.pad_token_id)]
    padded = itertools.chain.from_iterable(map(_pads_with_loss, batches))
    faults["loss_on_pads"] |= {number: "" for number, found in enumerate(padded) if found}
    model = getattr(trainer, "model", None)
    if active_prompt(model):
        padded = itertools.chain.from_iterable(map(_begins_with_pads, batches))
        faults["pads_before_text"] |= {number: "" for number, found in enumerate(padded) if found}
    args, facts = getattr(given, "args", None), read_facts(tokenizer, model)
    limit = getattr(args, "max_length", None)
    packing = getattr(args, "packing_strategy", "") if getattr(args, "packing", False) else ""
    unfinished = {
        number
        for number, (ids, *_) in enumerate(texts)
        if packing == "bfd_split" and limit and len(ids) >= limit and ids[-1] not in facts.ends
    }
    if unfinished:
        report.warn(
            "rows_split",
            f"packing_strategy='bfd_split' cuts rows of more than {limit} tokens (max_length), here at least {len(unfinished)}: what "
            "follows is trained without what stands before it. For pretraining on plain text this is usual.",
            "For conversations and answers raise max_length, or take packing_strategy='bfd' and shorten these rows.",
        )
    if packing == "wrapped":
        masked = any(-100 in labels[1:] for _, labels, _ in texts)
        report.add(
            "fail" if masked else "warn",
            "wrapped_packing",
            "packing_strategy='wrapped' writes the rows one behind another and cuts wherever max_length falls: texts see "
            "each other, and begin and end anywhere."
            + ("" if masked else " For pretraining on plain text this is usual."),
            "For conversations and answers take packing_strategy='bfd', or packing=False.",
        )
    return _judge(report, texts, tokenizer, facts, limit, faults, wrapped=packing == "wrapped", unfinished=unfinished)


class Faults(defaultdict[str, dict[int, str]]):
    """{code: {row number: detail, often ""}}"""

    def __init__(self) -> None:
        super().__init__(dict)


def _judge(
    report, texts, tokenizer, facts, limit, faults, *, wrapped=False, unfinished=(), where=counted_from_0
) -> Report:
    """Add the faults of `texts`, as of `_texts`, to `faults`, and all of them to the report; for the rest see find_faults."""
    counts, ignored = find_faults(texts, tokenizer, facts, limit, faults, wrapped=wrapped, unfinished=unfinished)
    report_end_ignored(report, tokenizer, facts, ignored, len(texts))
    report_beyond_context(report, [len(ids) for ids, *_ in texts], facts)
    report_faults(report, faults, len(texts), where)
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


def find_faults(
    texts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    limit: int | None,
    faults: Faults,
    *,
    wrapped: bool = False,
    unfinished: Collection[int] = (),
) -> tuple[list[int], Counter[int]]:
    """Add the faults of single texts to `faults`. Returns how many tokens of each carry loss, and ends at which generate() goes on.

    texts       (ids, labels, first place at which a label is kept) of each
    limit       max_length in tokens, or None
    wrapped     where texts begin and end means nothing
    unfinished  numbers of texts that go on in another one
    """
    counts: list[int] = []
    ignored: Counter[int] = Counter()
    for number, (ids, labels, first) in enumerate(texts):
        places = [place for place, label in enumerate(labels) if label != -100]
        counts.append(len(places))
        if number in faults.get("bad_row", ()) or number in faults.get("no_completion", ()):
            continue
        bos = tokenizer.bos_token_id
        # Prompt and answer that were tokenised apart have one each.
        before_answer = bos not in facts.ends and places and places[0] > first and ids[places[0]] == bos
        if bos is not None and (ids[:2] == [bos, bos] or before_answer):
            faults["double_bos"][number] = ""
        if any(labels[place] != ids[place] for place in places):
            faults["labels_shifted"][number] = ""
        if not places:
            if number not in faults["content_dropped"] and number not in unfinished:
                faults["no_loss"][number] = ""
            continue
        if wrapped:
            continue
        if places[0] <= first:
            faults["loss_on_prompt"][number] = ""
        if number in unfinished:
            continue
        last, after = places[-1], ids[places[-1] + 1 :][:1]
        while last > places[0] and ids[last] not in facts.ends and not str(tokenizer.decode([ids[last]])).strip():
            last -= 1  # many templates put a line break behind the end of turn
        if ids[last] not in facts.ends or labels[last] == -100:
            cut = "truncated" if limit and len(ids) >= limit else "no_end"
            faults["end_masked" if ids[last] in facts.ends or set(after) & facts.ends else cut][number] = ""
        elif any(end + 1 < start and _unheard(ids, end, facts.ends) for end, start in itertools.pairwise(places)):
            faults["earlier_end_masked"][number] = ""
        elif facts.stops and ids[last] not in facts.stops:
            ignored[ids[last]] += 1
    if unfinished and len(faults["loss_on_prompt"]) < len(texts):  # what goes on within an answer begins with loss
        del faults["loss_on_prompt"]
    return counts, ignored


def report_beyond_context(report: Report, lengths: list[int], facts: Facts) -> None:
    """Warn if texts of these lengths in tokens exceed what virtual tokens leave of the model's context."""
    context = facts.context
    if context is not None and max(lengths, default=0) > context:
        taken = f", of which {facts.virtual} virtual tokens take their part" if facts.virtual else ""
        report.warn(
            "beyond_context",
            f"{sum(length > context for length in lengths)} of {len(lengths)} rows are longer than the model's context of "
            f"{context + facts.virtual:,} tokens{taken}; the longest has {max(lengths):,}.",
            f"Set max_length to at most {context} and shorten these rows. Beyond it a model with learned positions "
            "raises an error, and one with rotary positions goes on, badly.",
        )


def report_faults(
    report: Report,
    faults: Faults,
    rows: int,
    where: Callable[[Iterable[int]], str],
    table: Mapping[str, tuple[str, str, str]] = FAULTS,
) -> None:
    """One finding for each code. table: {code: (level, what is wrong, what to do)}; where: function from row numbers to words."""
    for code, numbers in filter(lambda fault: fault[1], faults.items()):
        level, what, remedy = table[code]
        details = list(dict.fromkeys(filter(None, numbers.values())))
        more = f": {first_few(details)}" if details else ""
        report.add(level, code, f"In {len(numbers)} of {rows} rows {what} ({where(numbers)}){more}.", remedy)


def _unheard(ids, end, ends) -> bool:
    """Whether an answer whose last token with loss is at `end` stops one token short of its end."""
    return ids[end] not in ends and ids[end + 1] in ends


def report_end_ignored(
    report: Report, tokenizer: PreTrainedTokenizerBase, facts: Facts, ignored: Counter[int], rows: int
) -> None:
    """Warn if answers end with tokens at which generate() goes on. ignored: {token: how many rows end with it}."""
    if not ignored or facts.stops is None:
        return
    name, stops = tokenizer.convert_ids_to_tokens(ignored.most_common(1)[0][0]), sorted(facts.stops)
    report.warn(
        "end_ignored",
        f"In {ignored.total()} of {rows} rows the answer ends with {name}, and generate() stops at "
        f"{first_few(tokenizer.convert_ids_to_tokens(stops), 4)} only: answers will run on to max_new_tokens.",
        f"Give SFTConfig eos_token='{name}', or set tokenizer.eos_token and add its id to "
        "model.generation_config.eos_token_id. An adapter's folder does not hold these: set them again after loading.",
    )


class Facts(NamedTuple):
    """ends: ids that end an answer; stops: those at which generate() stops, and context in tokens for a text, None if unknown.

    virtual: how many tokens of the whole context virtual tokens take.
    """

    ends: set[int]
    stops: set[int] | None
    context: int | None
    virtual: int = 0


def read_facts(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> Facts:
    """What is known of a model, or else of the one whose folder the tokenizer came from: nothing is fetched."""
    import transformers

    config, generation_config = getattr(model, "config", None), getattr(model, "generation_config", None)
    folder = getattr(tokenizer, "name_or_path", "")
    if model is None and folder:
        with contextlib.suppress(Exception):  # a tokenizer may come alone, and a config may need code of its own
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            generation_config = transformers.GenerationConfig.from_model_config(config)
            generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    context = None if config is None else context_length(config)
    limit = getattr(tokenizer, "model_max_length", None) or math.inf
    if config is None and limit < 1e9:  # transformers writes 1e30 where nothing is known
        context = int(limit)
    listed = eos_ids(generation_config)
    stops = listed | eos_ids(tokenizer) if listed else None
    virtual = virtual_tokens(model)
    context = None if context is None else max(0, context - virtual)
    return Facts(_ends(tokenizer) | listed, stops, context, virtual)


def _ends(tokenizer) -> set[int]:
    """Ids that end an answer: EOS, and the token that the template puts after an answer."""
    ends = eos_ids(tokenizer)
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


def _begins_with_pads(batch) -> list[bool]:
    """Of each row of a batch, whether the mask begins with a pad."""
    import torch

    mask = batch.get("attention_mask")
    return [] if mask is None else (torch.as_tensor(mask)[:, 0] == 0).tolist()


def _pads_with_loss(batch) -> list[bool]:
    """Of each row of a batch, whether a label is kept where the mask says that nothing stands."""
    import torch

    labels, mask = torch.as_tensor(batch["labels"]), batch.get("attention_mask")
    return [] if mask is None else ((labels != -100) & ~torch.as_tensor(mask).bool()).any(-1).tolist()
