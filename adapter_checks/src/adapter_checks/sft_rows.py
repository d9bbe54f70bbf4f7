"""One row for supervised fine-tuning (SFT) as SFTTrainer reads it: its tokens, those of answers, and what the template does to it."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapter_checks.report import first_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A private character stands for each piece of a row's text while the template is watched at work.
_FIRST_PROBE = 0xF0000
# Ends of widespread models, which are plain text to others. "</s>" may be HTML, so it counts at the end only.
_OTHER_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_GENERATION_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclasses.dataclass
class EncodedRow:
    """ids and labels of a row, labels -100 outside of answers; both empty if it can't be read. faults: {code: detail or ""}."""

    ids: list[int] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Piece:
    """A piece of text in a row: whose turn (-1: the tools), which field, and its places in what the template wrote."""

    turn: int
    field: str
    text: str
    in_parts: bool = False
    places: list[int] = dataclasses.field(default_factory=list)


def encode_row(row: Any, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> EncodedRow:
    """Read a row as TRL's SFTTrainer does. ends: ids that end an answer, such as EOS.

    The answers of `messages` are what the template's generation markers hold, or without markers all turns of the assistant; of
    prompt and completion it is what follows the tokens that both have in common, as in TRL (data_utils.common_prefix_length).
    """
    try:
        return _encode(row, tokenizer, ends)
    except Exception as error:  # whatever a template raises on roles or contents that it does not know
        said = str(error) if type(error).__module__.startswith("jinja2") else ""
        return EncodedRow(faults={"bad_row": said and f"the template says: {said}"})


def _encode(row, tokenizer, ends) -> EncodedRow:
    row = _as_messages(row)
    if "prompt" in row or "completion" in row:
        prompt, answer = row.get("prompt"), row.get("completion")
    else:
        prompt, answer = None, row.get("messages") or row["text"]
    if not isinstance(answer, list):
        return _encode_text(prompt if "prompt" in row or "completion" in row else "", answer, tokenizer, ends)
    turns = [*(prompt or []), *answer] if prompt is None or isinstance(prompt, list) else prompt + answer
    taught = [number for number in range(len(prompt or []), len(turns)) if turns[number]["role"] == "assistant"]
    if not taught or any(map(_is_empty, (turns[number] for number in taught))):
        roles = dict.fromkeys(turn["role"] for turn in answer)
        return EncodedRow(faults={"no_completion": "" if taught or not roles else f"roles: {first_few(roles, 4)}"})
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    options = row.get("chat_template_kwargs") or {}

    def render(turns, tools=tools, **more):
        return tokenizer.apply_chat_template(turns, tools=tools, **{"tokenize": False, **options, **more})

    def render_ids(turns, **more):
        return render(turns, tokenize=True, return_dict=True, **more)["input_ids"]

    text = render(turns)
    pieces, whole = _watch_template(text, turns, tools, render)
    encoded = EncodedRow(faults=_template_faults(pieces, turns, taught, text))
    if turns[-1]["role"] != "assistant":
        encoded.faults["last_not_assistant"] = ""
    _note_ends_inside(encoded, (piece.text for piece in pieces if piece.turn in taught), tokenizer, ends)
    offsets = None
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        encoded.ids, offsets = coded["input_ids"], coded["offset_mapping"]
    else:
        encoded.ids = render_ids(turns)
    marked = offsets and _GENERATION_MARKER.search(tokenizer.get_chat_template(tools=tools))
    if prompt is None and offsets and (whole or marked):
        spans = _spans(pieces, taught, text, _header(render), encoded.ids, offsets, ends) if whole else {}
        if marked:
            coded = render(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            encoded.labels = [token if kept else -100 for token, kept in zip(encoded.ids, coded["assistant_masks"])]
        else:
            encoded.labels = [-100] * len(encoded.ids)
            for start, stop in spans.values():
                encoded.labels[start:stop] = encoded.ids[start:stop]
        # Behind a call of a tool some models stop at a token of its own.
        unheard = [
            number
            for number, (start, stop) in spans.items()
            if any(label != -100 for label in encoded.labels[start:stop])
            and encoded.labels[stop - 1] not in ends
            and not turns[number].get("tool_calls")
        ]
        if unheard and taught[-1] not in unheard:
            encoded.faults["earlier_end_masked"] = ""
        return encoded
    before = turns[: len(prompt) if prompt is not None else taught[-1]]
    return _mask_prompt(encoded, render_ids(before, add_generation_prompt=True) if before else [], prompt is not None)


def _header(render) -> str:
    """What the template writes before an answer."""
    question = [{"role": "user", "content": "a"}]
    try:
        return render(question, tools=None, add_generation_prompt=True).removeprefix(render(question, tools=None))
    except Exception:  # a template that wants other turns
        return ""


def _as_messages(row):
    """TRL makes messages of the older form: conversations, with from and value."""
    old = row.get("conversations")
    if not (isinstance(old, list) and old and "from" in old[0] and "value" in old[0]):
        return row
    names = {"from": "role", "value": "content"}
    turns = [{names.get(key, key): value for key, value in turn.items()} for turn in old]
    return {key: value for key, value in row.items() if key != "conversations"} | {"messages": turns}


def _encode_text(prompt, answer, tokenizer, ends) -> EncodedRow:
    if not (answer or "").strip():
        return EncodedRow(faults={"no_completion": ""})
    eos = tokenizer.eos_token  # TRL puts it behind plain text
    encoded = EncodedRow(tokenizer(prompt + answer.removesuffix(eos) + eos)["input_ids"])
    if prompt:
        core = answer.rstrip()
        for token in tokenizer.convert_ids_to_tokens(sorted(ends)):
            core = core.removesuffix(token)
        _note_ends_inside(encoded, [core], tokenizer, ends)
    return _mask_prompt(encoded, tokenizer(prompt)["input_ids"] if prompt else [], True)


def _mask_prompt(encoded, asked: list[int], named: bool) -> EncodedRow:
    """Loss from the place on where the whole and its prompt alone part. named: the row itself says which part is the prompt."""
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, encoded.ids)))
    if named and common < len(asked):
        encoded.faults["prompt_differs"] = ""
    masked = min(max(common, 1), len(encoded.ids))
    encoded.labels = [-100] * masked + encoded.ids[masked:]
    return encoded


def _is_empty(turn: Mapping[str, Any]) -> bool:
    contents = [turn.get("content"), turn.get("tool_calls")]
    return not any(content.strip() if isinstance(content, str) else content for content in contents)


def _note_ends_inside(encoded, texts, tokenizer, ends) -> None:
    tokens = {*tokenizer.convert_ids_to_tokens(sorted(ends)), *_OTHER_ENDS}
    texts = list(texts)
    inside = {token for token in tokens if any(token in text for text in texts)}
    inside |= {token for token in ("</s>",) if any(text.endswith(token) for text in texts)}
    if inside:
        encoded.faults["end_inside"] = first_few(sorted(inside))


# ------------------------------------------------------------------------------------------ what a template does to a row


def _watch_template(text, turns, tools, render: Callable[..., str]) -> tuple[list[_Piece], bool]:
    """The row's pieces with their places in `text`, found by a second rendering in which a character stands for each.

    And whether all of the text is explained so; else (a template that rewrites its input) the places mean nothing.
    """
    pieces: list[_Piece] = []

    def probe(turn: int, field: str, content: Any, in_parts: bool = False) -> Any:
        if not isinstance(content, str) or not content.strip():
            return content
        pieces.append(_Piece(turn, field, content.strip(), in_parts))
        return content.replace(content.strip(), chr(_FIRST_PROBE + len(pieces) - 1), 1)

    marked, marked_tools = [copy.deepcopy(turn) for turn in turns], copy.deepcopy(tools)
    for number, turn in enumerate(marked):
        for field in _THOUGHTS:
            if field in turn:
                turn[field] = probe(number, "thoughts", turn[field])
        content, role = turn.get("content"), turn["role"]
        if isinstance(content, str) and role == "assistant" and "</think>" in content:
            thought, closing, rest = content.partition("</think>")
            begin, opening, thought = thought.rpartition("<think>")
            thought, rest = probe(number, "thoughts", thought), probe(number, f"content of {role}", rest)
            turn["content"] = begin + opening + thought + closing + rest
        elif isinstance(content, list):
            for part in content:
                if isinstance(part, dict) and "text" in part:
                    part["text"] = probe(number, f"content of {role}", part["text"], in_parts=True)
        elif "content" in turn:
            turn["content"] = probe(number, f"content of {role}", content)
        _probe_names(turn.get("tool_calls"), lambda name, number=number: probe(number, "tool_calls", name))
    _probe_names(marked_tools, lambda name: probe(-1, "tools", name))
    try:
        written = render(marked, tools=marked_tools)
    except Exception:  # a template that parses its input
        return [], False
    for number in range(len(pieces)):  # Python escapes a private character where it writes a list
        character = chr(_FIRST_PROBE + number)
        written = written.replace(character.encode("unicode_escape").decode(), character)
    rebuilt, at = [], 0
    for part in re.split(f"([{chr(_FIRST_PROBE)}-{chr(_FIRST_PROBE + len(pieces))}])", written):
        if len(part) == 1 and ord(part) >= _FIRST_PROBE:
            piece = pieces[ord(part) - _FIRST_PROBE]
            piece.places.append(at)
            part = piece.text
        rebuilt.append(part)
        at += len(part)
    return pieces, "".join(rebuilt) == text


def _probe_names(calls, probe) -> None:
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") or call
        if "name" in function:
            function["name"] = probe(function["name"])


def _template_faults(pieces: Sequence[_Piece], turns, taught, text) -> dict[str, str]:
    faults = {}
    lost = [piece for piece in pieces if not piece.places]
    # A template may well leave thoughts out of earlier turns, as it does when the model is asked.
    gone = [piece.field for piece in lost if piece.field != "thoughts" or piece.turn == taught[-1] == len(turns) - 1]
    if gone:
        faults["content_dropped"] = first_few(dict.fromkeys(gone), 3)
    if any(piece.field == "thoughts" and piece.turn in taught for piece in lost) and "thoughts" not in gone:
        faults["thoughts_dropped"] = ""
    printed = [
        piece
        for piece in pieces
        if piece.in_parts and any(re.search(r"""text['"]: ?['"]$""", text[max(at - 9, 0) : at]) for at in piece.places)
    ]
    if printed:
        faults["content_printed"] = ""
    return faults


def _spans(pieces, taught, text, header, ids, offsets, ends) -> dict[int, tuple[int, int]]:
    """{turn: (first token, token behind the last)} of each answer that the template wrote, with its end if it has one."""
    begins, spans = [start for start, _ in offsets], {}
    for number in taught:
        own = [(at, at + len(piece.text)) for piece in pieces if piece.turn == number for at in piece.places]
        if not own:
            continue
        first, last = min(own)[0], max(stop for _, stop in own)
        others = [(at, at + len(piece.text)) for piece in pieces if piece.turn != number for at in piece.places]
        after_header = text.rfind(header, max((stop for _, stop in others if stop <= first), default=0), first)
        if header and after_header >= 0:  # what the model writes before the answer's own text: an empty thought, say
            first = after_header + len(header)
        start = max(bisect.bisect_right(begins, first) - 1, 0)
        while offsets[start][1] <= first:
            start += 1
        next_turn = min((at for at, _ in others if at >= last), default=len(text) + 1)
        tail = range(bisect.bisect_left(begins, last), bisect.bisect_left(begins, next_turn))
        stop = next((token + 1 for token in tail if ids[token] in ends), tail.start)
        spans[number] = (start, max(stop, start + 1))
    return spans
