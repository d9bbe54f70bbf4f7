"""Lesson 13's checks: stubs, solutions, other right answers, and typical wrong ones, each with its own hint; and its rows."""

import json
import random
import re
import runpy
import statistics
from collections import Counter

import pytest
import torch

from course_utils import paths
from course_utils.exercises import lesson13
from course_utils.judging import biased_judge
from tools import build, editions

LESSON = editions.parse((build.ROOT / "lessons" / "13_at_work.py").read_text(encoding="utf-8"))


def right_messages(row, system):
    turns = row.get("messages") or [
        {"role": "user", "content": row["text"]},
        {"role": "assistant", "content": row["reply"]},
    ]
    kept = [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": system}, *kept]


def right_mask(text):
    text = re.sub(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "[email]", text)
    return re.sub(r"\+?\d(?: ?\d){6,}", "[phone]", text)


def right_split(cases, share, seed):
    different = sorted(set(cases))
    drawn = set(random.Random(seed).sample(different, round(share * len(different))))
    return [case in drawn for case in cases]


def right_interval(verdicts):
    values = torch.tensor(verdicts, dtype=torch.float64)
    mean, half = values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5
    return mean, mean - half, mean + half


def right_cause(rows):
    more = {row["served_tokens"] - row["expected_tokens"] for row in rows}
    if more != {0}:
        return "BOS twice" if more == {1} else "another template"
    if sum(row["finish"] == "length" for row in rows) > len(rows) / 2:
        return "stop token"
    return "fine" if all(row["same"] for row in rows) else "dtype"


SOLUTIONS = {
    "13.messages": right_messages,
    "13.mask": right_mask,
    "13.split": right_split,
    "13.interval": right_interval,
    "13.served": right_cause,
}


def looped_messages(row, system):
    found = [dict(role="system", content=system)]
    if "text" in row:
        for role, key in (("user", "text"), ("assistant", "reply")):
            found.append({"content": row[key].strip(), "role": role})
        return found
    for turn in row["messages"]:
        if turn["role"] == "system":
            continue
        found.append({**turn, "content": turn["content"].strip()})
    return found


def copied_messages(row, system):
    row = json.loads(json.dumps(row))
    turns = row.pop("messages", None)
    if turns is None:
        turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["reply"]}]
    if turns[0]["role"] == "system":
        turns.pop(0)
    for turn in turns:
        turn["content"] = turn["content"].strip()
    turns.insert(0, {"role": "system", "content": system})
    return tuple(turns)


def one_pattern_mask(text):
    both = re.compile(r"(?P<mail>[a-zA-Z0-9_.+-]+@(?:[a-zA-Z0-9-]+\.)+[a-zA-Z0-9]+)|\+?[0-9](?: ?[0-9]){6,}")
    return both.sub(lambda found: "[email]" if found["mail"] else "[phone]", text)


def runs_mask(text):
    """Runs of digits and single spaces, masked if they hold seven digits."""

    def number(found):
        return "[phone]" if sum(map(str.isdigit, found[0])) >= 7 else found[0]

    text = re.sub(r"\+?\d+(?: \d+)*", number, re.sub(r"\S+@[\w.-]*\w", lambda found: mail(found[0]), text))
    return text


def mail(word):
    opened = re.match(r"[^\w]*", word)[0]
    return f"{opened}[email]"


def shuffled_split(cases, share, seed):
    different = list(dict.fromkeys(cases))
    random.Random(seed).shuffle(different)
    held = different[: round(share * len(different))]
    return tuple(case in held for case in cases)


def torch_split(cases, share, seed):
    names, place = torch.tensor(cases).unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(len(names), dtype=torch.bool)
    out[order[: round(share * len(names))]] = True
    return out[place]


def by_statistics(verdicts):
    mean, error = statistics.mean(verdicts), statistics.stdev(verdicts) / len(verdicts) ** 0.5
    return [mean, mean - 1.96 * error, mean + 1.96 * error]


def by_sums(verdicts):
    n, total, squares = len(verdicts), sum(verdicts), sum(verdict**2 for verdict in verdicts)
    half = 1.96 * (max(0.0, squares - total**2 / n) / (n - 1) / n) ** 0.5
    return torch.tensor([total / n, total / n - half, total / n + half], dtype=torch.float64)


def cause_by_loops(rows):
    longer = other = ended = changed = 0
    for row in rows:
        difference = row["served_tokens"] - row["expected_tokens"]
        longer += difference == 1
        other += difference != 0
        ended += row["finish"] == "length"
        changed += not row["same"]
    for found, name in (
        (longer == len(rows), "BOS twice"),
        (other, "another template"),
        (2 * ended > len(rows), "stop token"),
        (changed, "dtype"),
    ):
        if found:
            return name
    return "fine"


RIGHT = {
    "13.messages": [looped_messages, copied_messages, lambda row, system: list(right_messages(dict(row), system))],
    "13.mask": [one_pattern_mask, runs_mask, lambda text: right_mask(str(text))],
    "13.split": [shuffled_split, torch_split, lambda *given: [int(mark) for mark in right_split(*given)]],
    "13.interval": [by_statistics, by_sums, lambda verdicts: list(right_interval([float(v) for v in verdicts]))],
    "13.served": [cause_by_loops, lambda rows: right_cause(list(rows)), lambda rows: str(cause_by_loops(rows))],
}
CHECKS = {
    check.name: check
    for check in (lesson13.messages, lesson13.mask, lesson13.split, lesson13.interval, lesson13.served)
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_stub_solution_and_other_right_answers(name):
    check = CHECKS[name]
    assert check.outcome(lambda *given: ...).status == "TODO"
    assert check.outcome(SOLUTIONS[name]).passed, check.outcome(SOLUTIONS[name])
    for right in RIGHT[name]:
        assert check.outcome(right).passed, check.outcome(right)


def in_place(row, system):
    turns = row.get("messages") or right_messages(row, system)[1:]
    for turn in turns:
        turn["content"] = turn["content"].strip()
    return [{"role": "system", "content": system}, *(turn for turn in turns if turn["role"] != "system")]


def keeps_system(row, system):
    turns = row.get("messages", [])
    own = [turn for turn in turns if turn["role"] == "system"]
    return [{"role": "system", "content": system}, *own, *right_messages(row, system)[1:]]


def two_turns(row, system):
    return right_messages(row, system)[:3]


def not_stripped(row, system):
    found = right_messages(row, system)
    return [{**turn, "content": turn["content"] + (" " if turn["role"] == "user" else "")} for turn in found]


def by_row(cases, share, seed):
    drawn = set(random.Random(seed).sample(range(len(cases)), round(share * len(cases))))
    return [place in drawn for place in range(len(cases))]


def in_order(cases, share, seed):
    different = sorted(set(cases))
    different = different[: round(share * len(different))]
    return [case in different for case in cases]


def interval_with(change):
    def answer(verdicts):
        mean, _, high = right_interval(verdicts)
        half = change(high - mean, len(verdicts))
        return mean, mean - half, mean + half

    return answer


def decided_only(verdicts):
    return right_interval([verdict for verdict in verdicts if verdict] * 2 or [0, 0])


WRONG = [
    ("13.messages", in_place, "has changed"),
    ("13.messages", keeps_system, "exactly one"),
    ("13.messages", two_turns, "should give the roles"),
    ("13.messages", not_stripped, "strip"),
    ("13.messages", lambda row, system: right_messages(row, system)[1:], "0 system messages"),
    ("13.messages", lambda row, system: right_messages(row, system + "!"), "that was given"),
    ("13.messages", lambda row, system: row["messages"], "KeyError"),
    ("13.messages", lambda row, system: [{**turn, "x": 1} for turn in right_messages(row, system)], "a role and a content"),
    ("13.mask", lambda text: re.sub(r"\S+@\S+", "[email]", text), "should become"),
    ("13.mask", lambda text: re.sub(r"\d[\d -]{6,}", "[phone]", re.sub(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", "[email]", text)), "should become|holds no"),
    ("13.mask", lambda text: re.sub(r"\+?\d(?: ?\d){6,}", "[phone]", re.sub(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", "[email]", text), count=1), "mask all"),
    ("13.mask", lambda text: re.sub(r"\d[\d-]{6,}", "[phone]", right_mask(text)), "no personal data"),
    ("13.split", by_row, "on both sides"),
    ("13.split", in_order, "Another seed"),
    ("13.split", lambda cases, share, seed: right_split(cases, share / 2, seed), "should be held out"),
    ("13.split", lambda cases, share, seed: right_split(cases, share, None), "same seed"),
    ("13.split", lambda cases, share, seed: right_split(sorted(set(cases)), share, seed), "one bool for each row"),
    ("13.split", lambda cases, share, seed: ["test"] * len(cases), "Return True"),
    ("13.interval", interval_with(lambda half, n: half * n**0.5), "surer than one row"),
    ("13.interval", interval_with(lambda half, n: half / 1.96), "one standard error"),
    ("13.interval", interval_with(lambda half, n: half * ((n - 1) / n) ** 0.5), "n - 1"),
    ("13.interval", interval_with(lambda half, n: half / n**0.5), "not by n"),
    ("13.interval", decided_only, "ties count"),
    ("13.interval", lambda verdicts: right_interval(verdicts)[0], "should be of type"),
    ("13.interval", lambda verdicts: (0, *right_interval(verdicts)[1:]), "the mean is"),
    ("13.interval", lambda verdicts: (right_interval(verdicts)[0], 0, right_interval(verdicts)[2]), "symmetric"),
    ("13.served", lambda rows: "fine", "it is"),
    ("13.served", lambda rows: right_cause(rows) if right_cause(rows) != "dtype" else "another template", "prompts and ends are right"),
    ("13.served", lambda rows: "BOS twice" if any(r["served_tokens"] - r["expected_tokens"] == 1 for r in rows) else right_cause(rows), "not by one token each"),
    ("13.served", lambda rows: "stop token" if any(r["finish"] == "length" for r in rows) else right_cause(rows), "it is"),
    ("13.served", lambda rows: "template", "none of them"),
]  # fmt: skip


@pytest.mark.parametrize("name, wrong, hint", WRONG)
def test_wrong_answers_get_a_hint(name, wrong, hint):
    outcome = CHECKS[name].outcome(wrong)
    assert outcome.status == "TRY AGAIN" and re.search(hint, outcome.hint), outcome


def test_a_reference_is_no_answer():
    for name, reference in (
        ("13.mask", lesson13.masked),
        ("13.split", lesson13.held_out),
        ("13.served", lesson13.cause_of),
    ):
        assert "the check's own solution" in CHECKS[name].outcome(reference).hint


def test_the_rows_of_a_stranger_are_read():
    """What files of one's own hold and the desk's file doesn't: a reply that is null, and cases with and without a number."""
    assert lesson13.chat_messages({"text": "Hi", "reply": None})[-1]["content"] == ""
    cases = [7, "line 2", 7, "A3", "line 2", 1]
    marks = lesson13.held_out(cases, 0.5, 0)
    assert sum({case: mark for case, mark in zip(cases, marks)}.values()) == 2
    assert marks[0] == marks[2] and marks[1] == marks[4]


NAMES = [first + second for first in "BDFGL" for second in ("a", "e", "i", "o", "u")]
GOOD = [{"case": n, "text": f"My lid is loose. {name}", "reply": f"{name}: lid."} for n, name in enumerate(NAMES)]
STRANGE = [
    ({"text": "Hi", "reply": None}, "empty reply"),
    ([1, 2], "broken JSON"),
    ({"from": "user", "value": "Hi"}, "broken JSON"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Anybody?"}]}, "empty reply"),
    ({"text": "MY LID IS LOOSE. ba", "reply": "Ba: lid."}, "repeated"),
    ({"text": "My lid is loose. Zo", "reply": "Ma: lid."}, "wrong reply"),
]  # fmt: skip


def cleaned(rows):
    """The lesson's own cells, from the tokenizer to the table of faults, on a file with these rows."""
    from transformers import AutoTokenizer

    from course_utils import plotting

    space = dict(
        json=json, re=re, paths=paths, lesson13=lesson13, Counter=Counter, AutoTokenizer=AutoTokenizer, plotting=plotting,
        lines=[json.dumps(row) for row in rows], SYSTEM="Be brief.", MY_FILE="mine.jsonl",
    )  # fmt: skip
    cells = [cell.source for cell in LESSON.cells if cell.cell_type == "code"]
    starts = [
        next(n for n, cell in enumerate(cells) if cell.startswith(first)) for first in ("tokenizer =", "planted =")
    ]
    for cell in cells[starts[0] : starts[1] + 1]:
        exec(cell, space)
        exec(cell, space)  # as a learner does who has changed something in it
    return space


@pytest.mark.parametrize("row, fault", STRANGE)
def test_the_lesson_cleans_a_file_of_ones_own(row, fault, capsys):
    space = cleaned([*GOOD, row])
    assert space["found"] == {each: [26] if each == fault else [] for each in space["found"]}
    assert len(space["rows"]) == 25 and "25 rows of 25 cases are left" in capsys.readouterr().out


def test_a_file_without_a_row_that_can_be_read_says_so():
    with pytest.raises(AssertionError, match="No row is left"):
        cleaned(["text,reply", "Hi,Hello"])


def test_what_fits_only_the_desk_is_marked():
    """The page and the lesson send readers to comments, so they are there: a cell that names the desk's things has one."""
    cells = [cell.source for cell in LESSON.cells if cell.cell_type == "code"]
    for held in (
        "MY_FILE =",
        "MAX_LENGTH =",
        "wrong =",
        "SHARE =",
        "max_steps=",
        "WORDINGS =",
        "def rubric",
        "POLITE =",
        "MUST =",
        "CARD =",
    ):
        (cell,) = (cell for cell in cells if re.search(rf"^ *{held}", cell, re.MULTILINE))
        assert "# Own rows: " in cell, held


def test_each_cause_is_asked_for():
    assert {cause for _, cause in lesson13._served()} == set(lesson13.CAUSES)


def test_the_rows_are_what_their_script_writes():
    """The committed files, and each fault on the lines that are said to have it and on no other."""
    folder = paths.data_dir() / "lost_property"
    script = runpy.run_path(str(folder / "make.py"))
    rows, faults = script["make"]()
    lines = (folder / "messages.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    assert faults == json.loads((folder / "faults.json").read_text(encoding="utf-8"))
    assert {fault: len(places) for fault, places in faults.items()} == script["PLANTED"] | {
        "repeated": script["REPEATED"]
    }
    broken = [place for place, row in enumerate(rows, 1) if isinstance(row, str)]
    assert broken == faults["broken JSON"]
    for place in broken:
        with pytest.raises(ValueError):
            json.loads(lines[place - 1])
    masked = [place for place, line in enumerate(lines, 1) if lesson13.masked(line) != line]
    assert masked == faults["personal data"]
    repeated = {rows[place - 1]["case"] for place in faults["repeated"]}
    assert len(repeated) == len(faults["repeated"])


@pytest.mark.parametrize(
    "bias, swapped_same, longer_wins, phrase_wins",
    [
        ({}, True, False, False),
        ({"first": 0.5}, False, False, False),
        ({"per_word": 0.2}, True, True, False),
        ({"phrase": "Dear"}, True, False, True),
    ],
)
def test_a_judge_has_the_bias_that_it_was_given(bias, swapped_same, longer_wins, phrase_wins):
    judge = biased_judge(lambda row, reply: "good" in reply, **bias)
    assert judge({}, "good", "bad") == 1
    assert (judge({}, "one reply", "one other") == -judge({}, "one other", "one reply")) == swapped_same
    both = judge({}, "good and long", "good"), -judge({}, "good", "good and long")
    assert (both == (1, 1)) == longer_wins
    both = judge({}, "Dear you", "Hello you"), -judge({}, "Hello you", "Dear you")
    assert (both == (1, 1)) == phrase_wins
