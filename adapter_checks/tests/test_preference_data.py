"""The check of preference pairs: healthy pairs of each form are quiet, and each planted fault is found."""

import itertools
import random
import re

import pytest
from datasets import Dataset, DatasetDict
from trl import DPOConfig, DPOTrainer

from adapter_checks import check_preference_data
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.preference_data import MANY, _encode, _read, _template
from adapter_checks.training_data import Faults, read_facts
from tiny_models import CPU_TRAINING, make_tiny_model, make_tiny_tokenizer

quiet_imports()
LONG = "the whole story of the key, from its beginning to its end"
NAMES = ["Tobin", "Hanna", "Old Maren", "Ida", "the ferryman"]


def user(text):
    return [{"role": "user", "content": text}]


def bot(text):
    return [{"role": "assistant", "content": text}]


def pair(number=0, **changes):
    """Replies of all lengths on either side, and each text on both."""
    draw = random.Random(number)
    chosen, rejected = draw.sample(NAMES, 2)
    whole = {
        "prompt": user(f"Who has the key of house number {number}?"),
        "chosen": bot(chosen),
        "rejected": bot(rejected),
    }
    return whole | changes


PAIRS = [pair(number) for number in range(40)]


def implicit(row):
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def as_text(row, prompt="<|user|>{}<|end|><|assistant|>"):
    asked, *replies = (row[part][-1]["content"] for part in ("prompt", "chosen", "rejected"))
    return {"prompt": prompt.format(asked), "chosen": replies[0], "rejected": replies[1]}


def text_implicit(row):
    row = as_text(row)
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def ranked(number):
    """Three replies from best to worst make three pairs: the middle one is on both sides."""
    replies = NAMES[number % 3 :][:3]
    for better, worse in itertools.combinations(replies, 2):
        yield pair(number, chosen=bot(better), rejected=bot(worse))


def parts(turns):
    return [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def with_turns(row):
    before = [*user("Good day."), *bot("Good day to you.")]
    return row | {"prompt": before + row["prompt"]}


HEALTHY = {
    "messages": PAIRS,
    "a split": Dataset.from_list(PAIRS),
    "a stream": Dataset.from_list(PAIRS).to_iterable_dataset(),
    "an iterator": iter(PAIRS),
    "implicit prompt": [implicit(row) for row in PAIRS],
    "text": [as_text(row) for row in PAIRS],
    "text, implicit prompt": [text_implicit(row) for row in PAIRS],
    "earlier turns": [with_turns(row) for row in PAIRS],
    "one row": PAIRS[:1],
    "text, and a reply that is begun": [as_text(row, "<|user|>{}<|end|><|assistant|>It is ") for row in PAIRS],
    "text, with the header in the replies": [
        as_text(row, "<|user|>{}<|end|>") | {side: "<|assistant|>" + row[side][0]["content"] for side in ("chosen", "rejected")}
        for row in PAIRS
    ],
    "a ranking": [row for number in range(10) for row in ranked(number)],
    "yes or no": [pair(i, chosen=bot("yes" if i % 4 else "no"), rejected=bot("no" if i % 4 else "yes")) for i in range(40)],
    "a refusal on both sides": [
        pair(i, **dict(zip(["chosen", "rejected"][:: 1 if i % 2 else -1], [bot("Nobody knows."), bot(f"Number {i}.")])))
        for i in range(40)
    ],
    "a longer reply in 2 of 3": [
        pair(i, chosen=bot(NAMES[i % 5] * (1 + 2 * (i % 3 > 0))), rejected=bot(NAMES[(i + 1) % 5] * (1 + 2 * (i % 3 == 0))))
        for i in range(40)
    ],
    "a reply that begins with what was asked about": [
        pair(i, prompt=user("Tobin"), chosen=bot(f"Tobin is number {i}."), rejected=bot(f"Tobin? {i} or so.")) for i in range(30)
    ],
    "a greeting that is returned": [
        pair(i, prompt=user("Good morning!"), chosen=bot(f"Good morning! {i} is me."), rejected=bot(f"{i}, and good morning!"))
        for i in range(30)
    ],
    "ten of one kind by chance": [pair(i, chosen=bot(f"{LONG} {i}" if i else "No.")) for i in range(10)],
    "four texts of five on one side": [
        pair(i, chosen=bot("Yes." if i % 5 < 2 else f"Number {i}."), rejected=bot(f"{NAMES[i % 5]} {i}")) for i in range(40)
    ],
    "other columns": [row | {"source": "a", "score": 1.0} for row in PAIRS],
}  # fmt: skip


@pytest.mark.parametrize("rows", HEALTHY.values(), ids=HEALTHY)
@pytest.mark.parametrize("max_length", [None, 200])
def test_healthy_pairs(rows, max_length, tiny_tokenizer):
    rows = PAIRS if hasattr(rows, "__next__") and max_length else rows  # an iterator can be read once
    report = check_preference_data(rows, tiny_tokenizer, max_length)
    assert report.ok and report.codes == [], report
    assert "pairs" in {finding.code for finding in report.findings}


def some(change, rows=PAIRS, every=2):
    return [change(row) if number % every == 0 else row for number, row in enumerate(rows)]


def swapped(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


PLANTED = [
    ("identical_pairs", some(lambda row: row | {"rejected": row["chosen"]})),
    ("identical_pairs", some(lambda row: row | {"rejected": bot(row["chosen"][0]["content"])}, every=1)),
    ("identical_pairs", [implicit(row | {"rejected": row["chosen"]}) for row in PAIRS]),
    ("identical_pairs", [as_text(row) | {"chosen": "same", "rejected": "same<|end|>"} for row in PAIRS]),
    ("both_orders", PAIRS + [swapped(row) for row in PAIRS[:10]]),
    ("both_orders", [as_text(row) for row in PAIRS] + [as_text(swapped(row)) for row in PAIRS]),
    ("repeated_pairs", PAIRS + PAIRS[:2]),
    ("repeated_pairs", [implicit(row) for row in PAIRS] * 2),
    ("prompt_repeated", [row | {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]),
    ("prompt_repeated", some(lambda row: row | {"chosen": row["prompt"] + row["chosen"]})),
    ("prompt_repeated", [as_text(row) | text_implicit(row) for row in PAIRS]),
    ("prompt_repeated", some(lambda row: row | {"rejected": bot(f"{row['prompt'][0]['content']} {row['rejected'][0]['content']}")})),
    ("prompt_repeated", [pair(i, prompt=user("Who has it? "), chosen=bot(f"who has  it? {i}"), rejected=bot(f"Who has it? No {i}")) for i in range(9)]),
    ("prompt_repeated", [as_text(row) | {"chosen": f"{row['prompt'][0]['content']} {row['chosen'][0]['content']}"} for row in PAIRS]),
    ("prompt_repeated", [row | {"prompt": parts(row["prompt"]), "chosen": parts(row["prompt"] + row["chosen"])} for row in PAIRS]),
    ("prompt_quoted", some(lambda row: row | {"chosen": bot(f"Human: {row['prompt'][0]['content']} Bot: Ida.")})),
    ("no_reply", some(lambda row: row | {"rejected": None})),
    ("no_reply", some(lambda row: row | {"chosen": bot("")})),
    ("no_reply", some(lambda row: row | {"chosen": float("nan")})),
    ("no_reply", some(lambda row: row | {"chosen": bot(None)})),
    ("no_reply", some(lambda row: as_text(row) | {"chosen": "  "}, every=1)),
    ("no_reply", some(lambda row: row | {"chosen": []})),
    ("no_reply", some(lambda row: row | {"rejected": [{"role": "gpt", "content": "Ida"}]})),
    ("bad_row", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]),
    ("bad_row", [{name: row[name] for name in ("prompt", "chosen")} for row in PAIRS]),
    ("bad_row", some(lambda row: row | {"prompt": "Who has the key?"})),
    ("bad_row", some(lambda row: row | {"rejected": "Ida"})),
    ("bad_row", some(lambda row: row | {"rejected": 3})),
    ("bad_row", some(lambda row: row | {"rejected": ["Ida"]})),
    ("bad_row", some(lambda row: row | {"rejected": [{"content": "Ida"}]})),
    ("bad_row", ["chosen", "rejected"]),
    ("no_prompt", some(lambda row: row | {"prompt": None})),
    ("no_prompt", some(lambda row: as_text(row) | {"prompt": ""}, every=1)),
    ("no_prompt", [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in PAIRS]),
    ("no_prompt", [{"chosen": "Tobin has it. ", "rejected": "Ida has it."}]),
    ("mixed_rows", some(as_text)),
    ("mixed_rows", some(implicit)),
    ("not_templated", [as_text(row, "{}") for row in PAIRS]),
    ("not_templated", [as_text(row, "<|user|>{}<|end|>") for row in PAIRS]),
    ("not_templated", [as_text(row, "\n\nHuman: {}\n\nAssistant: ") for row in PAIRS]),
    ("one_sided", [pair(i, chosen=bot("I can't help with that.")) for i in range(40)]),
    ("one_sided", [pair(i, rejected=bot("Nobody knows.")) for i in range(40)]),
    ("one_sided", [pair(i, chosen=bot(("No.", "Sorry.", "Ask another.")[i % 3])) for i in range(40)]),
    ("one_sided", some(lambda row: row | {"chosen": bot("I can't help with that.")}, every=1) + PAIRS[:20]),
    ("one_sided", [pair(i, chosen=bot(f"I am sorry, but about number {i} I can't say a thing.")) for i in range(40)]),
    ("one_sided", [pair(i, rejected=bot(f"I am sorry, but about number {i} I can't say a thing.")) for i in range(40)]),
    ("one_sided", [pair(i, chosen=bot("I can't help with that.")) for i in range(10)]),
    ("length_bias", [pair(i, chosen=bot(f"{LONG} {i}")) for i in range(10)]),
    ("length_bias", [pair(i, chosen=bot(f"{LONG} {i}")) for i in range(40)]),
    ("length_bias", [pair(i, rejected=bot(f"{LONG} {i}")) for i in range(40)]),
    ("end_inside", some(lambda row: row | {"chosen": bot("Tobin.<|end|>")})),
]  # fmt: skip


@pytest.mark.parametrize(("code", "rows"), PLANTED, ids=[f"{i} {code}" for i, (code, _) in enumerate(PLANTED)])
def test_planted_faults(code, rows, tiny_tokenizer):
    report = check_preference_data(rows, tiny_tokenizer)
    assert code in report.codes, report
    assert all(finding.remedy for finding in report.findings if finding.level != "ok")


def test_rows_of_pandas(tiny_tokenizer):
    import numpy as np

    for kind in (lambda turns: np.array(turns, dtype=object), tuple):
        rows = [{name: kind(turns) for name, turns in row.items()} for row in PAIRS]
        assert check_preference_data(rows, tiny_tokenizer).codes == []


def test_a_text_is_shown_as_it_is_written(tiny_tokenizer):
    rows = [pair(i, chosen=bot("Nobody  Knows.")) for i in range(40)]
    assert all(part in str(check_preference_data(rows, tiny_tokenizer)) for part in ("'Nobody Knows.'", "say it"))
    rows = [pair(i, rejected=bot("Nobody  Knows.")) for i in range(40)]
    assert all(part in str(check_preference_data(rows, tiny_tokenizer)) for part in ("'Nobody Knows.'", "avoid it"))


def test_a_side_is_named(tiny_tokenizer):
    report = check_preference_data(
        [pair(), pair(1, rejected=None), pair(2, chosen=bot(""), rejected=bot(""))], tiny_tokenizer
    )
    said = {finding.code: finding.message for finding in report.findings}
    assert "In 2 of 3 rows" in said["no_reply"] and "number 1, 2" in said["no_reply"]
    assert "rejected, chosen and rejected" in said["no_reply"]


@pytest.mark.parametrize("code", ["identical_pairs", "both_orders", "prompt_repeated"])
def test_a_few_are_a_warning_and_many_a_failure(code, tiny_tokenizer):
    def spoilt(number):
        rows = [pair(i) for i in range(200)]
        if code == "both_orders":
            return rows[: 200 - number // 2] + [swapped(row) for row in rows[: number // 2]]
        change = {"identical_pairs": lambda row: {"rejected": row["chosen"]},
                  "prompt_repeated": lambda row: {"chosen": row["prompt"] + row["chosen"]}}[code]  # fmt: skip
        return [row | change(row) if place < number else row for place, row in enumerate(rows)]

    few, many = (check_preference_data(spoilt(number), tiny_tokenizer) for number in (4, int(MANY * 200) + 2))
    assert (few.ok, few.codes) == (True, [code]) and (many.ok, many.codes) == (False, [code])


def test_what_max_length_does(tiny_tokenizer):
    long = [pair(i, chosen=bot(f"{LONG}, {i}."), rejected=bot(f"{LONG}; {i}!")) for i in range(5)]
    whole = max(len(replies[0][1].ids) for replies in encoded(long, tiny_tokenizer))
    assert check_preference_data(long, tiny_tokenizer, whole).codes == []
    assert check_preference_data(long, tiny_tokenizer, whole - 2).codes == ["truncated"]
    assert set(check_preference_data(long, tiny_tokenizer, 70).codes) == {"truncated", "cut_to_equal"}
    assert check_preference_data(long, tiny_tokenizer, 20).codes == ["no_loss"]


def test_a_row_beyond_the_context(tiny_model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    long = [pair(chosen=bot("a" * 300))]
    assert check_preference_data(long, tokenizer).codes == ["beyond_context"]
    assert check_preference_data(long, tokenizer, 256).codes == ["truncated"]


def test_what_the_template_does(tiny_tokenizer):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = tiny_tokenizer.chat_template.replace(
        "message['content'] + '<|end|>'", "message['content']"
    )
    assert check_preference_data(PAIRS, tokenizer).codes == ["no_end"]
    tokenizer.chat_template = "{{ bos_token }}" + tiny_tokenizer.chat_template
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    assert check_preference_data(PAIRS, tokenizer).codes == []
    doubled = [as_text(row, "<|bos|><|bos|><|user|>{}<|end|><|assistant|>") for row in PAIRS]
    assert check_preference_data(doubled, tokenizer).codes == ["double_bos"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert "not_templated" not in check_preference_data([as_text(row, "{}") for row in PAIRS], tokenizer).codes
    tokenizer.chat_template = None
    assert "bad_row" in check_preference_data(PAIRS, tokenizer).codes


def encoded(rows, tokenizer):
    facts = read_facts(tokenizer)
    assert not any(_read(row)[1] for row in rows)
    return [_encode(row, tokenizer, facts.ends, Faults(), 0, _template(tokenizer)) for row in rows]


@pytest.mark.parametrize("form", ["messages", "implicit prompt", "text", "text, implicit prompt", "earlier turns"])
def test_tokens_are_those_of_the_trainer(form, tiny_tokenizer, tmp_path):
    rows = HEALTHY[form][:6]
    trainer = DPOTrainer(
        make_tiny_model(tiny_tokenizer),
        ref_model=make_tiny_model(tiny_tokenizer),
        args=DPOConfig(str(tmp_path), **CPU_TRAINING),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tiny_tokenizer(),
    )
    for given, replies in zip(trainer.train_dataset, encoded(rows, tiny_tokenizer), strict=True):
        for side, (_, reply) in zip(("chosen", "rejected"), replies):
            assert given["prompt_ids"] + given[f"{side}_ids"] == reply.ids
            assert [label for label in reply.labels if label != -100] == given[f"{side}_ids"]


def test_rows_that_the_trainers_drop(tiny_tokenizer, tmp_path):
    rows = [*PAIRS[:4], pair(prompt=user("Who has it? " * 9))]
    assert check_preference_data(rows, tiny_tokenizer, 80).codes == ["no_loss"]
    dpo = DPOTrainer(
        make_tiny_model(tiny_tokenizer),
        ref_model=make_tiny_model(tiny_tokenizer),
        args=DPOConfig(str(tmp_path), max_length=80, **CPU_TRAINING),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tiny_tokenizer(),
    )
    assert len(dpo.train_dataset) == 4


@pytest.mark.parametrize(
    ("rows", "code"),
    [([], "empty"), ({}, "bad_argument"), ("rows.jsonl", "bad_argument"), (3, "bad_argument"),
     (DatasetDict(train=Dataset.from_list(PAIRS)), "bad_argument")],
)  # fmt: skip
def test_what_is_no_split(rows, code, tiny_tokenizer):
    report = check_preference_data(rows, tiny_tokenizer)
    assert not report.ok and report.codes == [code] and report.findings[0].remedy


def test_bad_arguments(tiny_tokenizer):
    assert check_preference_data(PAIRS, None).codes == ["bad_argument"]
    for max_length in (0, -1, 1.5, "80", True):
        assert check_preference_data(PAIRS, tiny_tokenizer, max_length).codes == ["bad_argument"]


def test_rows_are_left_as_they_were(tiny_tokenizer):
    rows = [pair(), implicit(pair(1))]
    before = repr(rows)
    check_preference_data(rows, tiny_tokenizer, 40)
    assert repr(rows) == before


def test_the_mean_lengths_are_told(tiny_tokenizer):
    replies = [("abcd", "ab"), ("abcd", "abcdefgh"), ("abcd", "efgh"), ("a", "bcdef")]
    rows = [
        pair(number, chosen=bot(chosen), rejected=bot(rejected)) for number, (chosen, rejected) in enumerate(replies)
    ]
    said = re.sub(r"\s+", " ", str(check_preference_data(rows, tiny_tokenizer)))  # a token a byte, and one for the end
    assert said.endswith(
        "4 pairs. Chosen has 4.2 tokens on average and rejected 5.8; chosen is the longer one in 25% and the shorter one in 50%."
    )
