"""Metrics and perplexity, each against a plain computation of the same thing."""

import json
import math

import pytest

from adapter_checks.errors import InputError
from course_utils import evaluation
from course_utils.tasks import TASKS

# ---------------------------------------------------------------------------------------------- metrics

ANSWER = json.dumps({"who": "Mara Tull", "what": "a brass lamp", "where": "the mill"})


@pytest.mark.parametrize("task", ["reading", "sailor", "mood", "recall"])
def test_text_metrics_compare_stripped_text(task):
    same = TASKS[task].metric
    assert same("happy", "happy") and same(" happy\n", "happy")
    assert not same("unhappy", "happy") and not same("Happy", "happy") and not same("", "happy")
    assert not same("happy or unhappy", "happy")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (ANSWER, True),
        ('{"where":"the mill",\n "who":"Mara Tull","what":"a brass lamp"}', True),  # order and spaces are no matter
        (ANSWER.replace("mill", "mall"), False),
        (ANSWER.replace('"where"', '"place"'), False),
        (ANSWER[:-1], False),
        (ANSWER + " and more", False),
        (f"[{ANSWER}]", False),
        ("null", False),
        ("NaN", False),
        ("", False),
        ("[" * 100_000, False),
        ('{"who": ["Mara Tull"], "what": {}, "where": null}', False),
    ],
)
def test_extract_metric_parses_and_compares_fields(prediction, right):
    assert TASKS["extract"].metric(prediction, ANSWER) is right


def make_rows():
    told = [("happy", "stay", False), ("unhappy", "meal", False), ("happy", "stay", True), ("unhappy", "meal", True)]
    return [
        {
            "prompt": [{"role": "user", "content": "?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "kind": kind,
            "novel": novel,
        }
        for answer, kind, novel in told
    ]


def test_score_counts_all_kinds_and_novel_rows():
    result = evaluation.score("mood", ["happy", "unhappy", "happy", "happy"], make_rows())
    assert result == {"score": 0.75, "n": 4, "by_kind": {"meal": 0.5, "stay": 1.0}, "novel": 0.5}
    assert evaluation.score("mood", ["happy"], make_rows()[:1])["novel"] is None


def test_score_takes_a_dataset():
    from datasets import Dataset

    rows = Dataset.from_list(make_rows())
    assert evaluation.score("mood", ["happy"] * 4, rows) == evaluation.score("mood", ["happy"] * 4, make_rows())


def test_score_refuses_what_it_can_not_count():
    with pytest.raises(ValueError, match="3 predictions and 4 rows"):
        evaluation.score("mood", ["happy"] * 3, make_rows())
    with pytest.raises(ValueError, match="at least one"):
        evaluation.score("mood", [], [])
    with pytest.raises(InputError, match="no task 'moood'"):
        evaluation.score("moood", ["happy"] * 4, make_rows())


def test_evaluate_task_scores_what_the_model_says(tiny_model, tiny_tokenizer):
    rows = make_rows()
    said = evaluation.generate(tiny_model, tiny_tokenizer, [row["prompt"] for row in rows], max_new_tokens=6)
    rows[2]["completion"][0]["content"] = said[2]
    for row in (rows[0], rows[1], rows[3]):
        row["completion"][0]["content"] = said[2] + " not"
    result = evaluation.evaluate_task(tiny_model, tiny_tokenizer, "mood", rows)  # six are what a mood's answer may take
    assert result["score"] == 0.25 and result["predictions"] == said
    short = evaluation.evaluate_task(tiny_model, tiny_tokenizer, "mood", rows, max_new_tokens=2)
    assert short["predictions"] != said


# ---------------------------------------------------------------------------------------------- perplexity

TEXTS = ["A short one.", "A text that is a good deal longer than the first, so that padding matters.", "Third"]


def test_perplexity_weighs_each_token_the_same_and_ignores_padding(tiny_model, tiny_tokenizer):
    import torch

    losses = []
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probabilities = tiny_model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        losses += (-log_probabilities[range(ids.shape[1] - 1), ids[0, 1:]]).tolist()
    expected = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 2, 16):
        assert evaluation.perplexity(tiny_model, tiny_tokenizer, TEXTS, batch_size) == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary_size(tiny_model, tiny_tokenizer):
    import torch

    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    assert evaluation.perplexity(tiny_model, tiny_tokenizer, TEXTS) == pytest.approx(len(tiny_tokenizer), rel=1e-5)


def test_perplexity_cuts_long_texts_and_skips_those_with_nothing_to_predict(tiny_model, tiny_tokenizer):
    whole = evaluation.perplexity(tiny_model, tiny_tokenizer, [TEXTS[1][:9]])
    assert evaluation.perplexity(tiny_model, tiny_tokenizer, [TEXTS[1], "", "x"], max_length=9) == pytest.approx(
        whole, rel=1e-5
    )
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluation.perplexity(tiny_model, tiny_tokenizer, ["", "x"])
    assert not tiny_model.training


def test_band_fails_outside_only_for_the_shipped_model_and_only_strictly(monkeypatch, capsys):
    monkeypatch.delenv("COURSE_BASE_MODEL", raising=False)
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    evaluation.band("reading", 0.95, 0.9, 1)
    evaluation.band("reading", 0.5, 0.9, 1)
    assert [line[:6] for line in capsys.readouterr().out.splitlines()] == ["[OK]  ", "[FAIL]"]
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(InputError, match="outside the band"):
        evaluation.band("reading", 0.5, 0.9, 1)
    monkeypatch.setenv("COURSE_BASE_MODEL", "organisation/model")
    evaluation.band("reading", 0.5, 0.9, 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("[INFO]")


def test_a_quiet_band_prints_only_what_is_outside(monkeypatch, capsys):
    monkeypatch.delenv("COURSE_BASE_MODEL", raising=False)
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    evaluation.band("reading", 0.95, 0.9, 1, quiet=True)
    assert capsys.readouterr().out == ""
    evaluation.band("reading", 0.5, 0.9, 1, quiet=True)
    assert capsys.readouterr().out.startswith("[FAIL]")
    monkeypatch.setenv("COURSE_BASE_MODEL", "organisation/model")
    evaluation.band("reading", 0.5, 0.9, 1, quiet=True)
    assert capsys.readouterr().out == ""
