"""The sweeps of lesson 9: what they measure, on numbers made for the test, and each script on a model made for the test."""

import dataclasses
import math
import random

import pytest
import torch

from course_utils import data
from course_utils.tasks import UNKNOWN
from experiments import best_of_n, harness, preferences, preferring, rewards, training
from support import set_constants


@pytest.fixture
def small(results, monkeypatch):
    """Two steps on a few rows of each kind, a random model in the place of the start; the folder of the results."""
    load_task = data.load_task

    def few(task, part):
        rows = load_task(task, part).filter(lambda row: len(row["prompt"][0]["content"]) < 110)
        kept, counts = [], {}
        for place, kind in enumerate(rows["kind"]):
            counts[kind] = counts.get(kind, 0) + 1
            if counts[kind] <= 3:
                kept.append(place)
        return rows.select(kept)

    monkeypatch.setattr(data, "load_task", few)
    monkeypatch.setattr(preferring, "start_model", lambda adapter=None: training.load_base())
    set_constants(
        monkeypatch,
        {
            preferring: {
                "TASK": dataclasses.replace(preferring.TASK, max_new_tokens=2),
                "KL_ROWS": 3,
                "MAX_LENGTH": 1024,
            },
            preferences: {"STEPS": 2, "ROWS_A_STEP": 2, "PAIRS": 9},
            rewards: {"STEPS": 2, "PROMPTS": 2, "GROUP": 2, "EVERY": 1, "NEW_TOKENS": 4},
            best_of_n: {"STEPS": 2, "ROWS_A_STEP": 2, "DRAWS": (1, 2)},
        },
    )
    make = preferences.make_trainer
    monkeypatch.setattr(preferences, "make_trainer", lambda *a, **k: make(*a, **{"steps": 2, **k}))
    return results


def rows_of(script, runs, name):
    harness.sweep(name, runs, script.measure, log=lambda line: None)
    return data.load_results(name, harness.folder())


def test_dpo_and_its_controls_train_and_are_measured(small):
    settings = ("lesson", "dpo", "only untold", "sft on chosen")
    rows = rows_of(preferences, [{"seed": 0, "setting": setting} for setting in settings], "preferences")
    lesson, alone, untold, chosen = rows
    # At the first step the rewards are 0; two small steps later the loss is near ln 2, with the SFT term above it.
    assert abs(alone["last_loss"] - math.log(2)) < 0.2 < lesson["last_loss"] - alone["last_loss"]
    assert math.isnan(chosen["train_accuracy"]) and not math.isnan(lesson["train_accuracy"])
    assert untold["pairs"] < lesson["pairs"] == 9
    for row in rows:
        assert row["broken"] > 0.9 and row["told_right"] == 0, "a random model says nothing"
        assert row["divergence"] >= 0 and row["chosen_change"] != 0


def test_rewards_train_and_are_measured(small):
    settings = ("lesson", "rloo", "longer is better")
    rows = rows_of(rewards, [{"seed": 0, "setting": setting} for setting in settings], "rewards")
    for row in rows:
        assert {"reward_1", "reward_2", "length_1"} <= set(row) and 0 <= row["no_spread"] <= 1
    assert rows[0]["reward_before"] == 0 == rows[0]["right_before"]
    assert rows[2]["reward_before"] > 0.2 and rows[2]["right_before"] == 0


def test_a_reward_model_trains_and_its_best_of_n_is_measured(small):
    one, two = rows_of(best_of_n, [{"seed": 0, "kind": "all pairs"}], "best_of_n")
    assert (one["n"], two["n"]) == (1, 2) and two["score"] >= one["score"]
    assert 0 <= one["pair_accuracy"] <= 1 and 0 <= one["wrong_value_accuracy"] <= 1


# What they compute


PAIRS = [
    {"prompt": [{"role": "user", "content": f"Where is {n}?"}], "chosen": [{"content": right}], "rejected": [{"content": wrong}], "kind": kind}
    for n, (right, wrong, kind) in enumerate([("here", UNKNOWN, "told"), (UNKNOWN, "there", "near"), (UNKNOWN, "out", "not told")] * 100)
]  # fmt: skip


@pytest.fixture
def given_pairs(monkeypatch):
    monkeypatch.setattr(data, "load_task", lambda task, part: Rows(PAIRS))


class Rows(list):
    def select(self, places):
        return Rows(self[place] for place in list(places)[: len(self)])


def test_kinds_of_pairs_are_what_they_are_called(given_pairs):
    assert {row["kind"] for row in preferences.pairs("only untold", 0, None)} == {"near", "not told"}
    assert {row["kind"] for row in preferences.pairs("no near", 0, None)} == {"told", "not told"}
    assert preferences.pairs("100", 0, None) == PAIRS[:100] and preferences.pairs("all", 0, None) == PAIRS
    swapped = preferences.pairs("swapped", 0, None, swapped=0.2)
    turned = [new["chosen"] == old["rejected"] for new, old in zip(swapped, PAIRS)]
    assert 0.1 < sum(turned) / len(turned) < 0.3
    assert all(new["rejected"] == old["chosen"] for new, old, other in zip(swapped, PAIRS, turned) if other)


def test_own_pairs_are_a_right_and_a_wrong_reply_that_were_both_drawn(monkeypatch):
    drawn = iter(
        [["here", "there", ""], ["nowhere", UNKNOWN, "out"], ["here", UNKNOWN, "out"], ["here", "there", "in"]]
    )
    monkeypatch.setattr(preferring, "start_model", lambda start: (None, None))
    monkeypatch.setattr(preferring, "replies", lambda *_, **__: next(drawn))
    made = preferences.own_pairs(PAIRS[:3], 0, None, random.Random(0))
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in made] == [
        ("here", "nowhere"),
        (UNKNOWN, "there"),
    ]


def test_the_log_probability_of_a_reply_is_that_of_its_tokens_alone(tiny_model, tiny_tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": "Where?"}], "chosen": [{"role": "assistant", "content": text}]}
        for text in ("here", "in the garden")
    ]
    found = preferring.reply_log_probability(tiny_model, tiny_tokenizer, rows, "chosen")
    for row, value in zip(rows, found):
        head = tiny_tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        ids = tiny_tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = tiny_model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        by_hand = sum(logits[place - 1, ids[place]].item() for place in range(len(head), len(ids)))
        assert value.item() == pytest.approx(by_hand, abs=1e-4) and by_hand < -1


def test_the_divergence_of_a_model_from_itself_is_nothing_and_from_another_is_more(small, tiny_model):
    model, tokenizer = training.load_base()
    other, _ = training.load_base()
    assert preferring.divergence(model, other, tokenizer) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.5)
    assert preferring.divergence(model, other, tokenizer) > 0.01


def test_rewards_say_what_their_names_say():
    completions = [[{"content": text}] for text in (" here ", UNKNOWN, "there", "")]
    answers = ["here", "here", UNKNOWN, UNKNOWN]
    assert rewards.right(completions, answers) == [1, 0, 0, 0]
    assert rewards.never_wrong(completions, answers) == [1, 1, 0, 0]
    assert rewards.long([[1] * 4, [1] * 16]) == [0.25, 1]


def test_the_best_of_n_is_the_draw_with_the_highest_score():
    rows = [{"kind": "told"}, {"kind": "near"}]
    scored = [[0.1, 0.9], [0.5, 0.2], [0.7, 0.3]]  # draws × rows
    right = [[True, False], [False, True], [False, True]]
    one, three = (best_of_n.best_of(n, scored, right, rows) for n in (1, 3))
    assert one == {"score": 0.5, "right": 0.5, "told_right": 1, "untold_honest": 0, "oracle": 0.5}
    assert three == {"score": 0.8, "right": 0, "told_right": 0, "untold_honest": 0, "oracle": 1}
