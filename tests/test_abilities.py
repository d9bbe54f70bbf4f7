"""What the card says beside scores: that it is measured as it says, in a small run of each part."""

import json
import re

import pytest

from course_utils import evaluation
from pretraining import abilities, adapters, card, corpus, mixture, words
from pretraining import world as w
from pretraining.tokenizer import render


@pytest.fixture(scope="module")
def world():
    return w.make_world()


def test_limits_ask_for_what_the_passage_tells(world, monkeypatch):
    asked = []

    def scored(model, tokenizer, task, rows):
        asked.append(rows)
        return {"score": len(asked)}

    monkeypatch.setattr(evaluation, "evaluate_task", scored)
    assert abilities.limits(world) == {"told": {1: 1, 2: 2, 4: 3, 8: 4}, "denied": {1: 5, 2: 6, 4: 7, 8: 8}}
    for number, rows in enumerate(asked):
        denied, facts = number >= 4, abilities.FACTS[number % 4]
        for row in rows:
            text, place = row["prompt"][0]["content"], row["completion"][0]["content"]
            thing = text.rpartition("Where is the ")[2].rstrip("?")
            passage = text.rpartition(" Where is the ")[0]
            assert passage.count(" is ") == facts * (2 if denied else 1), "as many facts as it is said to have"
            said = passage.partition(f"The {thing} is ")[2]
            assert (" it is " + place if denied else place) in said.partition(". ")[0], text
            assert said.startswith("not ") == denied


def test_texts_to_forget_are_not_those_that_were_read(world):
    texts = abilities.held_out_documents(world)
    numbers = range(mixture.OPEN_FROM, mixture.OPEN_FROM + 3 * abilities.TEXTS)
    read = {render(write(world, 0, i)) for i in numbers for write in (mixture.document, corpus.closed_document)}
    for kind in ("world", "open"):
        assert len(texts[kind]) == abilities.TEXTS and len(set(texts[kind])) > 0.9 * abilities.TEXTS
        assert not read & set(texts[kind])
    held = words.held_out_forms()
    assert not any(held & set(re.findall(r"\w+", text.lower())) for text in texts["open"]), (
        "no word is new, but the texts"
    )


def test_all_of_it_is_written_beside_the_scores_and_has_what_the_card_reads(world, monkeypatch, tmp_path):
    shipped = json.loads(adapters.MEASURED.read_text())
    small = tmp_path / "measured.json"
    small.write_text(json.dumps({key: value for key, value in shipped.items() if key != "abilities"}))
    monkeypatch.setattr(adapters, "MEASURED", small)
    for name, value in {"ROWS": 2, "TEXTS": 2, "FACTS": (1,), "RATES": (0.001,)}.items():
        monkeypatch.setattr(abilities, name, value)
    monkeypatch.setattr(adapters, "STEPS", dict.fromkeys(adapters.STEPS, 1))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(abilities.speed, "__defaults__", (8,))
    abilities.add_abilities(world)
    measured = json.loads(small.read_text())
    assert {**measured, "abilities": None} == {**shipped, "abilities": None}, "the scores stay as they were"
    found = measured["abilities"]
    assert set(found) == set(shipped["abilities"]) and found["words_per_second"] > 0
    assert set(found["forgetting"]) == {"base", *abilities.OPEN_TASKS}
    base, sailor = (found["forgetting"][name]["world"] for name in ("base", "sailor"))
    assert 0 < base < sailor - 1, "an adapter that is on changes the loss"
    assert all(
        0 <= score <= 1 for task in found["few_shot"].values() for part in task.values() for score in part.values()
    )


def test_the_card_says_what_was_measured():
    measured, text = json.loads(adapters.MEASURED.read_text()), (adapters.BASE_FOLDER / "README.md").read_text()
    for task, found in measured["tasks"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {task} | "))
        shown = [cell.strip() for cell in line.split("|")[1:-1]]
        assert shown[1:3] == [card.percent(found[how]["score"]) for how in ("base", "lora")]
        assert shown[7:9] == [str(adapters.STEPS[task]), f"{found['lora_seconds']:.0f} s"]
    for way in measured["abilities"]["limits"].values():
        assert " | ".join(card.percent(score) for score in way.values()) in text
    assert f"{card.parameters():,} parameters" in text
