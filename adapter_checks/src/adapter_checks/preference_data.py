"""Check of preference pairs, before training with DPO or of a reward model: two whole replies to one prompt that differ?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.sft_rows import EncodedRow, encode_row
from adapter_checks.training import bad_argument
from adapter_checks.training_data import (
    FAULTS,
    Faults,
    counted_from_0,
    find_faults,
    read_facts,
    report_beyond_context,
    report_end_ignored,
    report_faults,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A few of these are in each large collection, and do little harm; one in twenty comes from the code that made the pairs.
MANY = 0.05
HARMLESS_IF_FEW = ("identical_pairs", "both_orders", "prompt_repeated")
# Of fewer pairs a share below all of them says little: of ten, nine lean to one side by chance once in fifty times.
ENOUGH = 20
# Better replies are often somewhat longer (https://arxiv.org/abs/2310.03716); nine in ten is a rule that a model can learn.
ONE_SIDED = 0.9
_SIDES = ("chosen", "rejected")
_WANTED = (
    "Give each row chosen and rejected, both text or both messages, and the prompt in a column of the same kind, or at the "
    "start of both. Rows with prompt, completion and label are for KTOTrainer, with completion alone for SFTTrainer."
)
_FAULTS = FAULTS | {
    "bad_row": ("fail", "there is no pair that DPOTrainer and the chat template can read", _WANTED),
    "mixed_rows": (
        "fail",
        "the form is another one than in the first row, by which TRL decides for all rows",
        "Make all rows text or all messages, and give the prompt a column in all of them or in none.",
    ),
    "no_reply": (
        "fail",
        "a reply is missing or empty, or holds no turn of the assistant. Against an empty reply the model learns to say "
        "anything at all, and nothing from what is said",
        "Write the reply or remove these rows. Name the roles user and assistant.",
    ),
    "no_prompt": (
        "fail",
        "there is no prompt: the column is empty, or without one chosen and rejected do not begin alike",
        "Give the prompt a column of its own, or begin both conversations with it.",
    ),
    "identical_pairs": (
        "fail",
        "chosen and rejected are the same tokens: the gradient of such a pair is zero, and its accuracy counts as 0",
        "Remove these rows, and see that the code which makes pairs takes two different replies.",
    ),
    "both_orders": (
        "fail",
        "the same two replies to the same prompt are there in the other order as well, and cancel each other",
        "See whether the code that makes pairs swaps them, or keep the order that most people chose.",
    ),
    "repeated_pairs": (
        "warn",
        "the same pair is there before, and counts twice; if it is held out as well, it is not new",
        "Remove the copies, before you split off what is held out.",
    ),
    "prompt_repeated": (
        "fail",
        "a reply begins with the prompt, or holds it as a turn, so the model reads the prompt twice and learns to repeat it",
        "Give the replies alone, or leave the prompt's column out: TRL then takes what chosen and rejected begin with.",
    ),
    "prompt_quoted": (
        "warn",
        "the whole prompt stands within a reply",
        "Where the reply is a whole conversation written as text, take its last answer alone.",
    ),
    "cut_to_equal": (
        "fail",
        "max_length cuts off all in which chosen and rejected differ, so the pair teaches nothing",
        "Raise max_length, or shorten the prompts.",
    ),
    "no_loss": (
        "fail",
        "max_length leaves nothing of a reply: DPOTrainer drops rows whose prompt fills it, without a message",
        "Raise max_length, or shorten the prompts.",
    ),
    "truncated": (
        "warn",
        "max_length cuts off the end of a reply. DPOTrainer compares what is left, RewardTrainer drops the row without a message",
        "Raise max_length, or remove these rows; a reply that is cut off is often judged by its missing end.",
    ),
    "not_templated": (
        "warn",
        "the prompt is text without the marks of the chat template. TRL puts messages alone through the template, so "
        "the model is trained on prompts of another form than it is asked with",
        "Give prompt, chosen and rejected as messages: [{'role': 'user', 'content': ...}]. For a model that only "
        "continues text it is right so.",
    ),
}  # fmt: skip


class _Pair(NamedTuple):
    """Of chosen and rejected: a hash of prompt and reply, how many tokens the reply has, and its text."""

    keys: tuple[int, int]
    lengths: tuple[int, int]
    texts: tuple[str, str]


class _Template(NamedTuple):
    """What a chat template writes around a question, and the header before the answer; empty without a template."""

    marks: Sequence[str] = ()
    header: str = ""


@never_raises("Preference pairs")
def check_preference_data(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Report:
    """Look at every pair before DPOTrainer or RewardTrainer does, which take nearly anything without a message.

    rows        list of dicts, or one split of a dataset, with chosen and rejected (all text, or all messages) and the
                prompt in a column of its own, or as the common beginning of both (TRL's formats)
    tokenizer   the one to train with; rows are tokenised as DPOTrainer does it. If its folder holds the model's
                config.json and generation_config.json, its context and its end tokens are looked at, too
    max_length  in tokens of prompt and reply, as given to DPOConfig (its default is 1024); None for no limit

    Returns a Report that numbers rows from 0; its finding "pairs" gives mean lengths. Identical and contradictory pairs,
    and prompts repeated in replies, are failures from 5% of the rows on; fewer occur in any large collection, and are a
    warning. From 20 pairs on it warns where chosen is the longer reply in nine pairs of ten, or the shorter one, and
    the means differ by a quarter; and where at most five texts make up half of one side and are (almost) never on the
    other, which is a failure where a single one makes up nine tenths, or where nine tenths of one side begin with the same
    four words. From 10 pairs on it does so where that holds for all of them.
    That all labels are swapped alike can't be seen from the rows.
    """
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__iter__") or not hasattr(tokenizer, "eos_token_id"):
        wanted = "a list of rows or one split such as dataset['train'], and a tokenizer (of a processor its .tokenizer)"
        return bad_argument(Report("Preference pairs"), (rows, tokenizer), wanted)
    return _check_pairs(enumerate(rows), tokenizer, max_length, counted_from_0)


@never_raises("Preference pairs")
def check_preference_lines(
    rows: Iterable[tuple[int, Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Report:
    """check_preference_data for rows that come with the numbers of their lines in a file, which the Report then names."""
    return _check_pairs(rows, tokenizer, max_length, lambda lines: f"line {first_few(lines)}")


def is_preference_row(row: Mapping[str, Any]) -> bool:
    """Whether a row is a pair for DPOTrainer rather than one for SFTTrainer."""
    return not {"chosen", "rejected"}.isdisjoint(row)


def _check_pairs(rows, tokenizer, max_length, in_words: Callable[[Iterable[int]], str]) -> Report:
    report, faults, facts = Report("Preference pairs"), Faults(), read_facts(tokenizer)
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        report.fail(
            "bad_argument", f"max_length is {max_length!r}.", "Pass a whole number of tokens, or None for no limit."
        )
        return report
    names, lengths, ignored, template = [], [], Counter[int](), _template(tokenizer)
    first, pairs = "", dict[int, _Pair]()
    for number, (name, row) in enumerate(rows):
        names.append(name)
        row = _as_python(row)
        form, code, detail = _read(row)
        first = first or form
        if code:
            faults[code][number] = detail
            continue
        if form != first:
            faults["mixed_rows"][number] = f"{form}, not {first}"
        replies = _encode(row, tokenizer, facts.ends, faults, number, template)
        if not all(reply.ids for _, reply in replies):
            continue
        cut = [(reply.ids[:max_length], reply.labels[:max_length], 0) for _, reply in replies]
        same, same_cut = replies[0][1].ids == replies[1][1].ids, cut[0][0] == cut[1][0]
        if same_cut and not same and any(_taught(cut[0][1])):
            faults["cut_to_equal"][number] = ""
        own = Faults()
        ignored += find_faults(cut, tokenizer, facts, max_length, own)[1]
        for code, sides in own.items():
            for side in sides:
                _add(faults, code, number, _SIDES[side])
        lengths += [len(ids) for ids, *_ in cut]
        pairs[number] = _Pair(
            *zip(*[(hash(tuple(reply.ids)), sum(_taught(reply.labels)), text) for text, reply in replies])
        )
    report_end_ignored(report, tokenizer, facts, ignored, len(lengths))
    report_beyond_context(report, lengths, facts)

    def where(numbers):
        return in_words(names[number] for number in numbers)

    _find_repeats(pairs, faults)
    few = {code for code in HARMLESS_IF_FEW if len(faults[code]) < MANY * len(names)}
    if len(faults["repeated_pairs"]) < 0.01 * len(names):
        del faults["repeated_pairs"]
    table = {code: ("warn" if code in few else level, what, remedy) for code, (level, what, remedy) in _FAULTS.items()}
    report_faults(report, faults, len(names), where, table)
    if not names:
        report.fail("empty", "There are no rows.", "See whether the file is empty, or a filter removed them all.")
    _report_sides(report, list(pairs.values()))
    return report


# ------------------------------------------------------------------------------------------------------ one row


def _read(row) -> tuple[str, str, str]:
    """The form of a row in words, or "" with the code and the detail of what is wrong with it."""
    if not isinstance(row, Mapping):
        return "", "bad_row", f"a {type(row).__name__}, not a dict"
    if missing := [side for side in _SIDES if side not in row]:
        return "", "bad_row", f"no {' and no '.join(missing)}, but {first_few(row, 4) or 'no columns at all'}"
    for side in _SIDES:
        if _is_empty(row[side]):
            return "", "no_reply", side
    given = "prompt" in row and not _is_empty(row["prompt"])
    kinds = {part: _kind(row[part]) for part in (["prompt", *_SIDES] if given else _SIDES)}
    if len(set(kinds.values())) > 1 or not set(kinds.values()) <= {"text", "messages"}:
        return "", "bad_row", ", ".join(f"{part} is {kind}" for part, kind in kinds.items())
    form = f"{kinds['chosen']} {'with' if 'prompt' in row else 'without'} a column for the prompt"
    return form, "" if given or ("prompt" not in row and _common(row)) else "no_prompt", ""


def _as_python(row):
    """Tuples and arrays, as pandas has them, become lists, as they do in a Dataset."""
    if not isinstance(row, Mapping):
        return row
    row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in row.items()}


def _is_empty(value) -> bool:
    return value is None or value != value or (isinstance(value, (str, list)) and not value)


def _kind(value) -> str:
    if isinstance(value, str):
        return "text"
    turns = isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    return (
        "messages"
        if turns
        else f"a {type(value).__name__}" + (" of other things than messages" if isinstance(value, list) else "")
    )


def _common(row) -> int:
    """How many characters or turns TRL takes for the prompt where none is given (data_utils.extract_prompt).

    0 also where it counts from the end: nothing is common, and chosen ends with a space.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    shorter = min(len(chosen), len(rejected))
    differing = next((place for place in range(shorter) if chosen[place] != rejected[place]), None)
    if differing is None:
        return shorter - 1
    return differing - 1 if differing and chosen[differing - 1] == " " else differing


def _encode(row, tokenizer, ends, faults, number, template: _Template) -> list[tuple[str, EncodedRow]]:
    """The text of both replies, and how DPOTrainer reads them; what is wrong goes to `faults`, and what can't be read has no ids."""
    implicit = "prompt" not in row
    common = _common(row) if implicit else 0
    prompt = row["chosen"][:common] if implicit else row["prompt"]
    options = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}
    replies = []
    for side in _SIDES:
        reply = row[side][common:]
        encoded = encode_row({"prompt": prompt, "completion": reply, **options}, tokenizer, ends)
        repeated = "" if implicit else _repeats(prompt, reply, row[_SIDES[side == "chosen"]], template.marks)
        if repeated:
            _add(faults, repeated, number, side)
        # TRL cuts an implicit prompt between characters; a prompt that follows another one is written otherwise.
        if (implicit and isinstance(prompt, str)) or repeated == "prompt_repeated":
            encoded.faults.pop("prompt_differs", None)
        for code, detail in encoded.faults.items():
            _add(faults, "no_reply" if code == "no_completion" else code, number, detail or side)
        replies.append((_text(reply), encoded))
    if isinstance(prompt, str) and template.marks:
        if not any(mark in prompt for mark in template.marks):
            faults["not_templated"][number] = ""
        elif not implicit and template.header not in prompt and not replies[0][0].lstrip().startswith(template.header):
            faults["not_templated"][number] = f"no {template.header!r} before the answer"
    return replies


def _add(faults: Faults, code: str, number: int, detail: str) -> None:
    """Note a fault; if it was noted of the other side, too, of both."""
    before = faults[code].get(number, "")
    faults[code][number] = f"{before} and {detail}" if before and before != detail else detail


def _text(reply) -> str:
    if isinstance(reply, str):
        return reply
    contents = [turn.get("content") or turn.get("tool_calls") or "" for turn in reply]
    return "\n".join(content if isinstance(content, str) else _text_of_parts(content) for content in contents)


def _text_of_parts(parts) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    return "\n".join(map(str, filter(None, texts))) or repr(parts)


def _repeats(prompt, reply, other, marks) -> str:
    """The code of how a reply holds its prompt: at its start or as a turn of its own, or somewhere; "" if not. other: the other reply."""
    if isinstance(prompt, list):
        asked = [turn for turn in prompt if turn["role"] != "assistant"]
        if any(turn in asked for turn in reply):
            return "prompt_repeated"
        prompt = _text(prompt[-1:])
    prompt, text, other = (_plain(one, marks) for one in (prompt, _text(reply), _text(other)))
    # A reply may well begin with a word that was asked about, or with a greeting.
    long = len(prompt) >= 20 and prompt.count(" ") >= 3
    if text.startswith(prompt) and (long or (len(prompt) >= 8 and other.startswith(prompt))):
        return "prompt_repeated"
    return "prompt_quoted" if long and prompt in text else ""


def _plain(text, marks) -> str:
    """Without a template's marks, capitals and white space, in which a copy of a text may differ."""
    for mark in marks:
        text = text.replace(mark, " ")
    return " ".join(text.split()).casefold()


def _template(tokenizer) -> _Template:
    question = [{"role": "user", "content": "@@"}]
    try:
        asked, written = (
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=header)
            for header in (False, True)
        )
    except Exception:  # no template, or one that wants other turns
        return _Template()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content in written]
    marks = [token for token in special if token != tokenizer.bos_token]
    around = [part.replace(tokenizer.bos_token or "@@", "").strip() for part in written.split("@@")]
    return _Template(marks or list(filter(None, around)), written.removeprefix(asked).strip())


def _taught(labels) -> list[bool]:
    return [label != -100 for label in labels]


# ------------------------------------------------------------------------------------------------------ all rows


def _find_repeats(pairs, faults) -> None:
    """Pairs that are no pairs, or are there twice, or in both orders."""
    seen: dict[tuple[int, int], int] = {}
    for number, pair in pairs.items():
        key = pair.keys
        if key[0] == key[1]:
            faults["identical_pairs"][number] = ""
        elif key in seen:
            faults["repeated_pairs"][number] = ""
        elif key[::-1] in seen:
            faults["both_orders"] |= {seen[key[::-1]]: "", number: ""}
        seen.setdefault(key, number)


def _report_sides(report, pairs) -> None:
    """Is there a rule that tells chosen from rejected without reading the prompt: one text, or the length?"""
    if not pairs:
        return
    longer, shorter = (sum(a > b for a, b in (pair.lengths[::order] for pair in pairs)) for order in (1, -1))
    means = [sum(side) / len(pairs) for side in zip(*[pair.lengths for pair in pairs])]
    report.note(
        "pairs",
        f"{len(pairs)} pairs. Chosen has {means[0]:.1f} tokens on average and rejected {means[1]:.1f}; chosen is the longer "
        f"one in {longer / len(pairs):.0%} and the shorter one in {shorter / len(pairs):.0%}.",
    )
    if len(pairs) < ENOUGH // 2:
        return
    many = ONE_SIDED if len(pairs) >= ENOUGH else 1  # of the share
    if max(longer, shorter) >= many * len(pairs) and max(means) >= 1.25 * min(means):
        word = "longer" if longer > shorter else "shorter"
        report.warn(
            "length_bias",
            f"Chosen is the {word} reply in {max(longer, shorter) / len(pairs):.0%} of the pairs (on average {means[0]:.1f} tokens "
            f"against {means[1]:.1f}), so the model may learn to write {word} replies and nothing else.",
            f"Add pairs in which the better reply is the {'shorter' if word == 'longer' else 'longer'} one, or compare lengths before and after training; "
            "loss_type='sigmoid_norm' and ld_alpha weaken the effect.",
        )
    for side, other in ((0, 1), (1, 0)):
        texts = [[" ".join(pair.texts[k].split()) for pair in pairs] for k in (side, other)]
        _report_one_sided(report, texts, _SIDES[side], 0.5 if many < 1 else 1, many)


def _report_one_sided(report, texts, side, least: float, many: float) -> None:
    """texts: of this side and of the other; least, many: shares of a side from which on texts, and beginnings, are too many."""
    learned = "say it whatever is asked" if side == "chosen" else "avoid it, whatever else is chosen"
    # At most five texts: that many different replies are a kind, and no longer one text.
    common, share = _only_here(texts)
    if share >= least:
        report.add(
            "fail" if common[0][1] >= ONE_SIDED * len(texts[0]) else "warn",
            "one_sided",
            f"{share:.0%} of what is {side} is the same {'text' if len(common) == 1 else f'{len(common)} texts'} "
            f"({' / '.join(repr(text[:40]) for text, _ in common[:2])}), which "
            f"{'is' if len(common) == 1 else 'are'} (almost) never on the other side: the model can learn to {learned}.",
            "Add pairs in which it is the other way round: prompts to which this reply is the worse one"
            f"{'' if side == 'chosen' else ', or other replies to reject'}.",
        )
        return
    common, share = _only_here(
        [[" ".join(text.split()[:4]) for text in one if text.count(" ") >= 3] for one in texts], 1
    )
    if share * sum(text.count(" ") >= 3 for text in texts[0]) >= many * len(texts[0]):
        report.warn(
            "one_sided",
            f"{share:.0%} of what is {side} begins with {common[0][0]!r}, and what is on the other side (almost) never does: the model can learn to "
            f"{learned}.",
            "If that beginning is what you want to teach, well; else add pairs in which it is the worse one.",
        )


def _only_here(texts, most: int = 5) -> tuple[list[tuple[str, int]], float]:
    """The most common texts of one side that are (almost) never on the other, with their counts, and their share of the side."""
    here, there = [Counter(text.casefold() for text in one) for one in texts]
    found = [(text, count) for text, count in here.most_common(most) if count > 2 and there[text] * 20 <= count]
    as_written = {text.casefold(): text for text in reversed(texts[0])}
    return [(as_written[text], count) for text, count in found], sum(count for _, count in found) / max(1, here.total())
