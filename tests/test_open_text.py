"""The open vocabulary: its lists, the documents written with it, how the tokenizer splits it, and what is held out of everything."""

import json
import random
import re
from itertools import chain
from pathlib import Path

import pytest

from pretraining import corpus, mixture, open_text, tasks, words
from pretraining import train as training
from pretraining import world as w

ROOT = Path(__file__).resolve().parent.parent
WORD = re.compile(r"[^\W\d_]+")
OPEN_TASKS = tuple(tasks.OPEN_MAKERS)


@pytest.fixture(scope="module")
def world():
    return w.make_world()


@pytest.fixture(scope="module")
def texts(world):
    """Documents of the main mix, two fifths of them in the words of the world alone."""
    documents = (mixture.document(world, 0, i) for i in range(mixture.OPEN_FROM, mixture.OPEN_FROM + 12_000))
    return [" ".join(text for _, text in document) for document in documents]


@pytest.fixture(scope="module")
def made(world):
    return {task: tasks.make_task(world, task) for task in tasks.MAKERS}


def scene(world, seed=0, split="train"):
    return open_text.OpenScene(world, random.Random(seed), split)


def told(row):
    return f"{row['prompt'][0]['content']} {row['completion'][0]['content']}"


# ---------------------------------------------------------------------------------------------- words


LEAST = {"nouns": 1500, "names": 600, "places": 300, "trades": 200, "colours": 60, "verbs": 200}


@pytest.mark.parametrize("name", LEAST)
def test_lists_are_long_and_hold_each_word_once(name):
    entries = [entry[0].lower() for entry in words.read(name) if not entry[0].endswith(":")]
    assert len(set(entries)) == len(entries) >= LEAST[name]
    assert all(WORD.fullmatch(entry) for entry in entries)


def test_a_fifth_of_each_list_is_held_out_and_stands_in_no_other():
    split = words.vocabulary()
    for name in ("things", "names", "trades", "colours", "verbs", "of", "in", "on"):
        held, trained = (len(split[part][name]) for part in ("held", "train"))
        assert held >= 8 and 0.1 < held / (held + trained) < 0.3, name
    trained = {word.lower() for name, list_ in split["train"].items() if name != "verbs" for word in list_}
    trained |= {form for verb in split["train"]["verbs"] for form in vars(verb).values()}
    assert len(words.held_out_forms()) > 900 and not words.held_out_forms() & trained


@pytest.mark.parametrize(
    "verb, forms",
    [
        (("park",), "park parks parked parked parking"),
        (("carry",), "carry carries carried carried carrying"),
        (("chop",), "chop chops chopped chopped chopping"),
        (("unwrap",), "unwrap unwraps unwrapped unwrapped unwrapping"),
        (("open",), "open opens opened opened opening"),
        (("bake",), "bake bakes baked baked baking"),
        (("tie",), "tie ties tied tied tying"),
        (("free",), "free frees freed freed freeing"),
        (("polish",), "polish polishes polished polished polishing"),
        (("take", "took", "taken"), "take takes took taken taking"),
    ],
)
def test_verbs_have_english_forms(verb, forms):
    assert " ".join(vars(words.conjugate(*verb)).values()) == forms


def test_nouns_have_english_plurals():
    assert [
        words.plural(noun) for noun in "sofa fly toy box church".split()
    ] == "sofas flies toys boxes churches".split()
    plurals = words.vocabulary()["train"]["plurals"] + words.vocabulary()["held"]["plurals"]
    assert {"mice", "children", "teeth"} & set(plurals) == {"children", "teeth"} and "furnitures" not in plurals


# ---------------------------------------------------------------------------------------------- documents


def held_out_in(texts):
    """Held-out words that the texts use, in any form and in any letters."""
    return set(WORD.findall("\n".join(texts).lower())) & words.held_out_forms()


def test_no_training_text_has_a_held_out_word(texts, made, world):
    early = [text for i in range(0, mixture.OPEN_FROM, 20) for _, text in mixture.document(world, 0, i)]
    assert held_out_in(texts) == held_out_in(early) == set()
    for task, splits in made.items():
        assert held_out_in(told(row) for row in splits["train"] + splits["validation"] + splits["test"]) == set(), task
    held = words.vocabulary()["held"]
    planted = {held["names"][0].lower(), held["plurals"][0], held["verbs"][0].ing}
    assert held_out_in([f"{held['names'][0]} is {held['verbs'][0].ing} the {held['plurals'][0]}."]) == planted


def test_open_documents_draw_from_everywhere(texts, world):
    known = {
        word for i in range(20_000) for _, text in mixture.document(world, 0, i) for word in WORD.findall(text.lower())
    }
    listed = {word.lower() for name, list_ in words.vocabulary()["train"].items() if name != "verbs" for word in list_}
    found = set(WORD.findall("\n".join(texts).lower()))
    assert len(found & listed) > 0.85 * len(listed), "words of the lists that are never written"
    assert len(found - listed - known) > 5000, "pseudo-words"


def test_the_open_vocabulary_begins_with_its_share(world):
    def is_open(i):
        return mixture.document(world, 0, i) != corpus.closed_document(world, 0, i)

    assert not any(is_open(i) for i in range(0, mixture.OPEN_FROM, 97))
    share = sum(is_open(i) for i in range(mixture.OPEN_FROM, mixture.OPEN_FROM + 2000)) / 2000
    assert abs(share - mixture.OPEN_SHARE) < 0.05


@pytest.mark.parametrize("relation", corpus.RELATIONS)
def test_a_document_comes_back_to_what_it_told(world, relation):
    """Each value of a fact is told in the same words as it is come back to, my or the, one or more."""
    for seed in range(200):
        drawn = scene(world, seed)
        fact = drawn.fact(relation)
        said = [open_text.state(drawn, relation, fact), open_text.come_back(drawn, relation, fact)]
        topic = fact.get("o", fact.get("p"))
        # Some ways to come back leave the value or the topic out: "A nurse, and a good one."
        assert topic.lower() in said[0].lower() and fact["v"].lower() in said[0].lower(), said
        assert fact["v"].lower() in said[1].lower() or topic.lower() in said[1].lower(), said
        if "o" in fact and drawn.owner:
            assert f"the {fact['o']}" not in " ".join(said), "the owner is kept through the document"
        if fact.get("o") in drawn.plurals:
            assert not re.search(rf"{fact['o']} (is|was|has|lies) ", " ".join(said)), said


def test_a_held_out_scene_draws_held_out_words_only(world):
    for seed in range(100):
        drawn = scene(world, seed, "held")
        for word in (drawn.given_name(), drawn.word("things", w.OBJECTS), drawn.trade(), drawn.word("of", ["Dunbay"])):
            known, said = words.held_out_forms(), word.lower()
            assert said in known or {*said.split()} <= known, "a word of two parts has two that are held out"


def test_pseudo_words_are_no_held_out_words_and_none_of_the_world(monkeypatch):
    rng = random.Random(0)
    drawn = {words.pseudo_word(rng) for _ in range(2000)}
    assert len(drawn) > 1800 and not drawn & words.known_words()
    assert words.held_out_forms() | {*w.OBJECTS, *w.TRADES} <= words.known_words()
    monkeypatch.setattr(words, "known_words", lambda: drawn)
    rng = random.Random(0)
    assert not drawn & {words.pseudo_word(rng) for _ in range(1000)}


def test_made_up_verbs_are_regular_and_none_of_a_held_out_scene(world):
    rng = random.Random(0)
    for _ in range(300):
        verb = words.pseudo_verb(rng)
        assert verb == words.conjugate(verb.base) and not set(vars(verb).values()) & words.known_words()
    listed = {split: set(words.vocabulary()[split]["verbs"]) for split in ("train", "held")}
    drawn = [scene(world, seed).verb() for seed in range(400)]
    assert 0.15 < sum(verb not in listed["train"] for verb in drawn) / 400 < 0.35
    assert {scene(world, seed, "held").verb() for seed in range(100)} <= listed["held"]


# ---------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_three_quarters_of_the_training_rows_are_open(task, made, world):
    familiar, _ = tasks.pools(world)
    known = {word.lower() for name in ("names", "objects") for word in getattr(familiar, name)}
    rows = made[task]["train"]
    of_the_world = sum(bool(known & set(WORD.findall(told(row).lower()))) for row in rows) / len(rows)
    assert 0.2 < of_the_world < 0.4


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_own_words_are_held_out_and_in_each_answer(task, made):
    rows = made[task]["own_words"]
    assert len(rows) == tasks.OWN_WORDS and all(row["novel"] for row in rows)
    for row in rows:
        assert held_out_in([row["completion"][0]["content"]]), row


@pytest.mark.parametrize("part", ["train", "own_words", "typed"])
def test_answers_stand_in_the_passage_word_for_word(part, made):
    for row in made["reading"][part]:
        answer, prompt = row["completion"][0]["content"], row["prompt"][0]["content"]
        # Where two sentences became one, "The engraver" stands in its middle as "the engraver".
        said = rf"(?<!\w)(?i:{re.escape(answer[0])}){re.escape(answer[1:])}(?!\w)"
        assert answer == tasks.NOT_SAID or re.search(said, prompt), row
    for row in made["extract"][part]:
        passage = row["prompt"][0]["content"].removeprefix(tasks.INSTRUCTION["extract"])
        for value in json.loads(row["completion"][0]["content"]).values():
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", passage), row


@pytest.mark.parametrize("part", ["train", "own_words", "typed", "test"])
def test_sailors_follow_their_rule(part, made):
    for row in made["sailor"][part]:
        text = row["prompt"][0]["content"].removeprefix(tasks.INSTRUCTION["sailor"])
        assert row["completion"][0]["content"] == tasks.sailor_speech(text)


def test_typed_sentences_are_150_and_no_row_to_train_on(made):
    typed = [row["prompt"][0]["content"] for task in OPEN_TASKS for row in made[task]["typed"]]
    assert len(set(typed)) == len(typed) == 150
    trained = {row["prompt"][0]["content"] for task in OPEN_TASKS for row in made[task]["train"]}
    assert not trained & set(typed)
    answers = [row["completion"][0]["content"] for row in made["reading"]["typed"]]
    assert 1 <= answers.count(tasks.NOT_SAID) <= 5


def test_unanswerable_questions_are_answered_so(made):
    unanswered = [row for row in made["reading"]["train"] if row["kind"] == "not said"]
    assert 0.02 < len(unanswered) / len(made["reading"]["train"]) < 0.08
    assert all(row["completion"][0]["content"] == tasks.NOT_SAID for row in unanswered)


# ---------------------------------------------------------------------------------------------- probes


def test_probes_of_held_out_words_end_before_them(world):
    pairs = [
        pair
        for relation in corpus.RELATIONS
        for pair in training.probe_texts(world, relation, 10, training.held_out_scene)
    ]
    assert all(value.strip().lower() in before.lower() for before, value in pairs)
    quoted = training.quoted_texts(world, 20)
    assert all(value[-2:] == '",' and before[-1] == '"' and value[:-2] in before for before, value in quoted)
    assert held_out_in(chain.from_iterable(pairs)) and held_out_in(value for _, value in quoted)
