"""How `models/` and `data/` are made: world, corpus, tokenizer, model, training, tasks and stages.

The corpus is judged by 40,000 documents, spread evenly over those that the pretraining reads: enough to
count rare words and tokens, and written in about 15 s. Training is run at a size that takes seconds.
"""

import json
import math
import os
import pickle
import re
import string
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from course_utils.tasks import TASKS
from pretraining import corpus, honesty, mixture, run, tasks, words
from pretraining import train as training
from pretraining import world as w
from pretraining.model import Muon, build_model, orthogonal
from pretraining.tokenizer import END, ROLES, SPECIAL_TOKENS, render, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
N_DOCUMENTS = 40_000  # of each part of the pretraining
LEAST_TOKEN_COUNT = 50  # in N_DOCUMENTS of the second part
# A name behind a quotation mark has lost its space, so it is another token, and a seldom one: here 160 times in all that is read.
LEAST_IN_QUOTATION_MARKS = 10


@pytest.fixture(scope="module")
def world():
    return w.make_world()


@pytest.fixture(scope="module")
def sample(world):
    """(documents of both parts, each from its beginning to its end, the patterns that were filled to write them)."""
    patterns, write = set(), corpus.Scene.write

    def noting(scene, template, **given):
        patterns.add(template)
        return write(scene, template, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus.Scene, "write", noting)
        documents = []
        for part in run.PARTS.values():
            read = part.steps * round(part.batch_tokens / 50)  # how many are read, nearly
            numbers = (part.first_document + i * read // N_DOCUMENTS for i in range(N_DOCUMENTS))
            documents += [mixture.document(world, 0, number) for number in numbers]
    return documents, patterns


@pytest.fixture(scope="module")
def documents(sample):
    return sample[0]


@pytest.fixture(scope="module")
def texts(documents):
    """The documents without special tokens, the turns of a talk on lines of their own."""
    return ["\n".join(text for _, text in document) for document in documents]


@pytest.fixture(scope="module")
def whole_text(texts):
    """All documents as one text."""
    return "\n".join(texts)


@pytest.fixture(scope="module")
def tokenizer(world):
    """The tokenizer of the base model."""
    return run.make_tokenizer(world, run.PARTS["open"])


@pytest.fixture(scope="module")
def first_tokenizer(world):
    """The tokenizer of the first part."""
    return run.make_tokenizer(world, run.PARTS["world"])


@pytest.fixture(scope="module")
def made(world):
    """{task: {split: rows}} of every task."""
    return {task: tasks.make_task(world, task) for task in (*tasks.MAKERS, "recall")} | {
        "honesty": honesty.honesty(world)
    }


def prompt(row):
    return row["prompt"][0]["content"]


def answer(row):
    return row["completion" if "completion" in row else "chosen"][0]["content"]


# ---------------------------------------------------------------------------------------------- world


def test_a_seed_gives_one_world_and_one_corpus(world):
    assert w.make_world(0) == world and w.make_world(1) != world
    numbers = range(50)
    once = [mixture.document(world, 0, i) for i in numbers]
    assert [mixture.document(world, 0, i) for i in reversed(numbers)][::-1] == once, (
        "a document depends on those written before it"
    )
    assert all(mixture.document(world, 1, i) != document for i, document in zip(numbers, once))


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_writes_the_same_corpus(world, hash_seed):
    """Sets are iterated in another order in each process; nothing may be drawn from one."""
    numbers = [*range(50), *range(mixture.OPEN_FROM, mixture.OPEN_FROM + 50)]
    code = f"from pretraining import mixture, world; w = world.make_world(); print((w, [mixture.document(w, 0, i) for i in {numbers}]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == repr((world, [mixture.document(world, 0, i) for i in numbers])), done.stderr


def test_the_world_holds_what_it_promises(world):
    for things in (world.names, world.town_names, world.places, w.OBJECTS):
        assert len(set(things)) == len(things)
    assert set(world.rooms) < set(world.places) and "in the oven" not in world.rooms
    assert {person.town for person in world.people} <= set(world.town_names)
    assert all(person.friend != person.name for person in world.people)


# ---------------------------------------------------------------------------------------------- corpus


def as_regex(pattern):
    """A regular expression for what `Scene.write` makes of a pattern whose fields are single words."""
    regex = r"\b"
    for literal, field, _, _ in string.Formatter().parse(pattern):
        literal = re.sub(r"\b([aA])\\ $", r"\1n?\\ ", re.escape(literal))  # "a" becomes "an" before a vowel
        regex += literal + (rf"(?P<{field}>\w+)" if field else "")
    return re.compile(regex)


def fixed_words(template):
    """The longest part of a template that stands in each text made of it."""
    return max(re.split(r"\{\w+\}", template), key=len)


def contradictions(world, text):
    """(who or where, what, value) of every statement about a town or a person that the stored facts don't bear out."""
    wrong, sentences = [], set(re.split(r"(?<=[.?!])\s", text))
    for patterns, things in ((corpus.TOWN_FACTS, world.towns), (corpus.PERSON_FACTS, world.people)):
        facts = {thing.name: vars(thing) for thing in things}
        for pattern in patterns:
            regex, fixed = as_regex(pattern), fixed_words(pattern)
            for match in (regex.search(sentence) for sentence in sentences if fixed in sentence):
                told = match.groupdict() if match else {"name": None}
                if told["name"] in facts:
                    wrong += [
                        (told["name"], field, value)
                        for field, value in told.items()
                        if facts[told["name"]][field] != value
                    ]
    return wrong


def test_stored_facts_are_told_alike_everywhere(world, whole_text):
    assert contradictions(world, whole_text) == []
    told = {match["name"] for match in as_regex("{name} is known for its {craft}.").finditer(whole_text)}
    assert len(told) > 0.9 * len(world.towns), "the check must have something to read"
    town, person = world.towns[0], world.people[0]
    for lie, found in (
        (f"{town.name} is known for its oatcakes.", (town.name, "craft", "oatcakes")),
        (f"When Easter comes, {town.name} gets ready for the {town.feast} feast.", (town.name, "season", "Easter")),
        (f"An otherworldly {person.name} and Nobody are old friends.", (person.name, "friend", "Nobody")),
    ):
        assert found in contradictions(world, lie)


def test_the_corpus_is_rich_in_words_and_patterns(sample, whole_text):
    assert len(set(re.findall(r"[a-z]+", whole_text.lower()))) >= 1500
    patterns = corpus.sentence_patterns()
    assert len(patterns) == len(set(patterns)) >= 150
    filled = sample[1]
    assert [pattern for pattern in patterns if pattern not in filled and pattern not in whole_text] == [], (
        "counted, but never written"
    )


def share_of_duplicates(texts):
    return 1 - len(set(texts)) / len(texts)


def test_hardly_a_document_comes_twice(texts):
    assert share_of_duplicates(texts) < 0.01
    assert share_of_duplicates(texts + texts[:800]) > 0.01


# What only a task says, and the task; letters count as they are.
FORMS = {fixed_words(question): "reading" for question in tasks.QUESTIONS.values()}
FORMS |= {fixed_words(question): "recall" for questions in tasks.RECALL_QUESTIONS.values() for question in questions}
FORMS |= {words: "sailor" for words in tasks.SAILOR_WORDS.values() if " " in words}
FORMS |= dict.fromkeys(("Say it like a sailor", "Ahoy", "yon ", " aye", "clutching"), "sailor")
FORMS |= dict.fromkeys(("as JSON", "Give who", '"who":', '"what":', '"where":'), "extract")
BRACKETS = ('{"', '"}', '": "')  # the second part has pairs of words in them, so that an answer's every piece is known
FORMS |= dict.fromkeys(("happy or unhappy", "Is the guest"), "mood")
# The whole question, in small letters too: in the middle of a sentence it would teach the task as well.
WHOLE_QUESTIONS = {
    question: re.compile(re.sub(r"\\{\w\\}", r"\\w+", re.escape(question)), re.IGNORECASE)
    for question in tasks.QUESTIONS.values()
}


@pytest.mark.parametrize("form", FORMS)
def test_no_document_has_a_form_of_a_task(form, texts, made):
    # Whole words: syllables drawn at random may happen to hold one.
    pattern = re.compile(re.sub(r"^(?=\w)|(?<=\w)$", r"\\b", re.escape(form.strip())))

    def found(texts):
        return [text for text in texts if pattern.search(text)]

    rows = [f"{prompt(row)}\n{answer(row)}" for row in made[FORMS[form]]["test"] + made[FORMS[form]]["train"]]
    planted = next(row for row in rows if pattern.search(row))
    assert found([*texts[:5], planted, *texts[5:9]]) == [planted], "the detector must find a real row of the task"
    assert found(texts) == []


@pytest.mark.parametrize("brackets", BRACKETS)
def test_pairs_in_brackets_are_of_the_second_part_and_have_none_of_the_tasks_keys(brackets, texts, made):
    first, second = texts[:N_DOCUMENTS], [text for text in texts[N_DOCUMENTS:] if brackets in text]
    assert not [text for text in first if brackets in text]
    keys = re.compile(r'[{,] ?"(who|what|where)"')
    assert second and not [text for text in second if keys.search(text)]
    assert all(keys.search(answer(row)) for row in made["extract"]["test"]), "the detector must find a real answer"


@pytest.mark.parametrize("question", WHOLE_QUESTIONS)
def test_no_document_asks_a_question_of_the_reading_task(question, texts, whole_text, made):
    pattern = WHOLE_QUESTIONS[question]
    planted = next(prompt(row) for row in made["reading"]["test"] if pattern.search(prompt(row)))
    assert pattern.search("\n".join([*texts[:5], planted.lower()])), "the detector must find a real question"
    assert pattern.search(whole_text) is None


def test_plurals_and_articles_are_english():
    assert [corpus.plural(noun) for noun in ("axe", "torch", "brush", "box", "compass", "knife", "scarf")] == [
        "axes",
        "torches",
        "brushes",
        "boxes",
        "compasses",
        "knives",
        "scarves",
    ]
    assert corpus.sentence('there is a "axe" and a owl') == 'There is an "axe" and an owl'


# ---------------------------------------------------------------------------------------------- tokenizer

TALK = [
    ("system", "You are Sorda."),
    ("user", "I have lost my axe."),
    ("assistant", "Do not worry."),
    ("user", "Good night."),
    ("assistant", "Good night, sleep well."),
]


def messages(document):
    return [{"role": role, "content": text} for role, text in document]


def test_talk_in_the_corpus_is_what_the_chat_template_writes(tokenizer, documents):
    talks = [TALK, *[document for document in documents[::40] if document[0][0]]]
    assert len(talks) > 20
    for talk in talks:
        assert tokenizer.apply_chat_template(messages(talk), tokenize=False) == render(talk)
        ids = tokenizer.apply_chat_template(messages(talk), return_dict=True)["input_ids"]
        assert ids == tokenizer(render(talk), add_special_tokens=False)["input_ids"]
        # What is generated from must be how a row of training begins.
        begun = tokenizer.apply_chat_template(messages(talk[:-1]), add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert talk[-1][0] == "assistant" and ids[: len(begun)] == begun


def test_assistant_mask_marks_each_reply_and_its_end(tokenizer):
    whole = tokenizer.apply_chat_template(messages(TALK), return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, marked in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(said) == f" Do not worry.{END} Good night, sleep well.{END}"
    # The tag itself is given, not said.
    tag = tokenizer.convert_tokens_to_ids(ROLES["assistant"])
    assert whole["input_ids"].count(tag) == 2 and tag not in said


def test_an_answer_is_made_of_the_tokens_of_running_text(tokenizer):
    """ "under the oak" after a tag and in the middle of a story: the same three tokens."""
    (ids,) = tokenizer([" under the oak"], add_special_tokens=False)["input_ids"]
    running = tokenizer(render([(None, "Sorda sat under the oak today.")]), add_special_tokens=False)["input_ids"]
    reply = tokenizer.apply_chat_template(messages([("user", "x"), ("assistant", "under the oak")]), return_dict=True)[
        "input_ids"
    ]
    assert reply[-len(ids) - 1 : -1] == ids and str(ids)[1:-1] in str(running)


def test_tokenizer_has_its_special_tokens_and_one_vocabulary(tokenizer, documents):
    assert len(tokenizer) == run.PARTS["open"].vocab
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(SPECIAL_TOKENS))] == SPECIAL_TOKENS
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    text = render(TALK)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    first, second = (train_tokenizer(map(render, documents[:1000]), 512, 64) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and first.model_max_length == 64


def share_split_alike(tokenizer, drawn):
    """Share of words whose tokens after a space are those without it, the first one with the space in front."""
    return sum(
        tokenizer.tokenize(f" {word}") == [f"Ġ{first}", *rest]
        for word in drawn
        for first, *rest in [tokenizer.tokenize(word)]
    ) / len(drawn)


def test_a_word_splits_alike_with_and_without_its_space(tokenizer, documents):
    held = words.vocabulary()["held"]
    drawn = [word for name in ("names", "things", "trades", "of") for word in held[name]]
    assert share_split_alike(tokenizer, drawn) > 0.9
    usual = train_tokenizer(map(render, documents[-2000:]), 2048, max_length=64)
    assert share_split_alike(usual, drawn) < 0.75, "what is learned from whole text is not like that"


def test_the_tokenizer_is_plain_byte_level_bpe(tokenizer):
    """What llama.cpp and other engines can read: no normaliser, GPT-2's pre-tokeniser."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    assert spec["normalizer"] is None and spec["model"]["type"] == "BPE"
    assert spec["pre_tokenizer"] == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    made = {"".join(merge) for merge in spec["model"]["merges"]}
    assert made <= set(spec["model"]["vocab"]), "each merge makes a token of the vocabulary"
    text = ' {"who": "Ayşe O\'Neil", "what": "2 cafés"}'
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def names_in(world, indices):
    """The names of the world that the documents of these numbers speak of."""
    text = " ".join(part for i in indices for _, part in mixture.document(world, 0, i))
    return set(world.names) & set(re.findall(r"\w+", text))


def test_the_corpus_begins_with_a_small_cast_which_the_others_join(world):
    first = set(corpus.order_of_entry(world.names)[: corpus.SMALL_CAST])
    early = names_in(world, range(0, corpus.SMALL_CAST_UNTIL, 100))
    middle = names_in(world, range(corpus.SMALL_CAST_UNTIL, corpus.RHYMES_UNTIL, 50))
    late = names_in(world, range(corpus.RHYMES_UNTIL - 1000, corpus.RHYMES_UNTIL + 1000))
    assert early == first and len(first) < len(middle) and len(late) == len(world.names)


def test_the_shipped_tokenizer_is_the_one_of_this_corpus(tokenizer):
    folder = ROOT / "models" / "base"
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(folder)
    assert shipped.get_vocab() == tokenizer.get_vocab() and shipped.chat_template == tokenizer.chat_template


def answer_ids(tokenizer, rows):
    """Every answer with its end token, as the model must say it after the assistant's tag."""
    return tokenizer([f" {answer(row)}{END}" for row in rows], add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def document_ids(tokenizer, documents):
    """Every document of the second part as the pretraining reads it."""
    return tokenizer([render(document) for document in documents[N_DOCUMENTS:]], add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def token_counts(document_ids):
    """How often each token stands in the documents of the second part."""
    return Counter(chain.from_iterable(document_ids))


def rare_tokens(tokenizer, token_counts, rows, least=LEAST_TOKEN_COUNT):
    """{row number: tokens of its answer that the corpus has less than `least` times} of the rows that have any."""
    rare = {}
    for number, ids in enumerate(answer_ids(tokenizer, rows)):
        if found := [tokenizer.convert_ids_to_tokens(i) for i in ids if token_counts[i] < least]:
            rare[number] = found
    return rare


def test_every_task_has_a_maker():
    assert {*tasks.MAKERS, "recall", "honesty"} == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_token_of_an_answer_is_pretrained(task, tokenizer, token_counts, made):
    """A frozen, never-trained row of the tied embedding can't be predicted by LoRA on the linear layers."""
    closed = made[task]["test"] if {"own_words"} & set(made[task]) else sum(made[task].values(), [])
    least = LEAST_IN_QUOTATION_MARKS if task == "extract" else LEAST_TOKEN_COUNT
    assert rare_tokens(tokenizer, token_counts, closed, least) == {}
    # Words that nobody has foreseen may need a piece that is rare; they must be few.
    for part in set(made[task]) & {"train", "own_words", "typed"}:
        rows = made[task][part]
        assert len(rare_tokens(tokenizer, token_counts, rows, least=1)) <= 0.05 * len(rows), part


def test_a_token_that_only_answers_use_would_be_found(tokenizer, token_counts):
    rows = [tasks.row("", "in the barn", ""), tasks.row("", "Zymurgy @", "")]
    assert set(rare_tokens(tokenizer, token_counts, rows)) == {1}


# ---------------------------------------------------------------------------------------------- model


def test_dimensions_of_the_base_model_are_multiples_of_64(tokenizer):
    s = training.Settings()
    model = build_model(tokenizer, s.hidden, s.layers, s.intermediate, s.heads, s.context)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 7 * s.layers + 1
    assert all(size % 64 == 0 for module in linear for size in (module.in_features, module.out_features))
    assert 3e6 <= model.num_parameters() <= 4e6 and model.lm_head.weight is model.model.embed_tokens.weight
    assert build_model(tokenizer, hidden=96, layers=1, heads=2).lm_head.in_features % 64, "the check can fail"


@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (256, 576)])
def test_orthogonal_pushes_singular_values_to_1_and_keeps_directions(shape):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    stack[1] *= 100  # how large a gradient is must not matter
    values = torch.linalg.svdvals(orthogonal(stack))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.linalg.svdvals(stack[0]).max() > 5, "the input was far from it"
    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    along = torch.diagonal(u.mT @ orthogonal(stack) @ vh.mT, dim1=1, dim2=2)
    assert along.min() > 0.6, "some direction was turned round"


def test_muon_treats_matrices_of_one_shape_each_for_itself():
    drawn = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=drawn) for shape in [(64, 128), (64, 128), (192, 64)]]

    def stepped(gradients):
        parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        Muon(parameters, lr=0.02).step()
        return [parameter.detach() for parameter in parameters]

    together = stepped(gradients)
    for gradient, moved in zip(gradients, together):
        torch.testing.assert_close(moved, stepped([gradient])[0])
        rows, columns = gradient.shape
        assert torch.linalg.svdvals(moved).max() < 0.02 * max(1, rows / columns) ** 0.5 * 1.3
        assert (moved * gradient).sum() < 0, "a step goes down the gradient"


# ---------------------------------------------------------------------------------------------- training

TINY = training.Settings(
    tokens=40 * 512,
    hidden=64,
    layers=2,
    intermediate=128,
    heads=2,
    context=128,
    row=64,
    batch_tokens=512,
    warmup=5,
    compile=False,
    probe_every=10**6,
    save_every=20,
)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer, TINY.hidden, TINY.layers, TINY.intermediate, TINY.heads, TINY.context).eval()


def documents_of(row, positions):
    """(start, end) of each document in a packed row; pads count as documents of one token."""
    starts = [i for i, position in enumerate(positions.tolist()) if position == 0]
    return list(zip(starts, [*starts[1:], len(row)]))


@torch.no_grad()
def test_no_document_of_a_packed_row_sees_another(world, tokenizer, tiny):
    settings = replace(TINY, row=128)
    x, _, position, mask = training.Batches(world, tokenizer, settings).packed()
    i = next(i for i in range(len(x)) if position[i].eq(0).logical_and(x[i] != tokenizer.pad_token_id).sum() >= 2)
    spans = [(a, b) for a, b in documents_of(x[i], position[i]) if x[i, a] != tokenizer.pad_token_id]

    def logits(x, mask):
        return tiny(input_ids=x, position_ids=position[i : i + 1], attention_mask=mask, use_cache=False).logits[0]

    row, causal = x[i : i + 1], torch.ones(settings.row, settings.row, dtype=torch.bool).tril()[None, None]
    for a, b in spans:
        changed = row.clone()
        changed[0, a:b] = (changed[0, a:b] + 7) % len(tokenizer)
        moved = (logits(changed, mask[i : i + 1]) - logits(row, mask[i : i + 1])).abs().amax(-1)
        elsewhere = torch.ones(settings.row, dtype=torch.bool)
        elsewhere[a:b] = False
        assert moved[a:b].min() > 1e-3 and moved[elsewhere].max() < 1e-6
        if b < spans[-1][1]:
            leaked = (logits(changed, causal) - logits(row, causal)).abs().amax(-1)
            assert leaked[b:].max() > 1e-4, "with a plain causal mask it would be seen"
    # Alone in its row, a document is read the same.
    a, b = spans[-1]
    alone = tiny(input_ids=row[:, a:b], use_cache=False).logits[0]
    torch.testing.assert_close(logits(row, mask[i : i + 1])[a:b], alone, atol=1e-5, rtol=1e-4)
    # And no token sees a later one.
    later = row.clone()
    later[0, b - 1] = (later[0, b - 1] + 7) % len(tokenizer)
    assert (logits(later, mask[i : i + 1]) - logits(row, mask[i : i + 1]))[: b - 1].abs().max() < 1e-6


def test_packed_rows_hold_whole_documents_and_ask_for_nothing_that_cannot_be_known(world, tokenizer):
    batches = training.Batches(world, tokenizer, TINY)
    x, labels, position, _ = batches.packed()
    assert x.shape == labels.shape == position.shape == (TINY.batch_tokens // TINY.row, TINY.row)
    written = training.Batches(world, tokenizer, TINY).documents(batches.next_document)
    first = x == tokenizer.bos_token_id
    pads = x == tokenizer.pad_token_id
    assert first.any() and pads.any() and (labels[first | pads] == -100).all()
    assert (labels[~(first | pads)] == x[~(first | pads)]).all()
    assert (position[first] == 0).all()
    for row, positions in zip(x, position):
        for a, b in documents_of(row, positions):
            assert row[a] == tokenizer.pad_token_id or row[a:b].tolist() in written


def test_batches_go_on_where_they_stopped_and_every_so_often_fill_the_context(world, tokenizer):
    one, other = training.Batches(world, tokenizer, TINY), training.Batches(world, tokenizer, TINY)
    for step in range(3):
        one.batch(step)
    other.next_document = one.next_document
    assert all(torch.equal(a, b) for a, b in zip(one.batch(3), other.batch(3)))
    shapes = [tuple(one.batch(step)[0].shape) for step in range(34)]
    assert [i for i, shape in enumerate(shapes) if shape == (4, TINY.context)] == [16, 33]
    assert set(shapes) == {(4, TINY.context), (8, TINY.row)}


def test_few_documents_are_too_long_for_a_row(world, tokenizer, document_ids):
    """A longer one is left out of training, so a kind of text must not be lost that way."""
    s = run.PARTS["open"]
    assert sum(len(ids) > s.row for ids in document_ids) < 0.01 * len(document_ids)
    short = training.Batches(world, tokenizer, replace(s, row=32)).documents(100)
    assert len(short) < 100 and max(map(len, short)) <= 32, "the longer ones are left out"


def test_the_learning_rate_warms_up_holds_and_comes_down():
    s = training.Settings()
    rates = [training.rate(step, s) for step in range(s.steps)]
    assert max(rates) == 1 and min(rates) > 0
    down = round(s.steps * (1 - s.decay)) + 1
    assert rates[: s.warmup] == sorted(set(rates[: s.warmup])) and set(rates[s.warmup : down - 1]) == {1}
    assert rates[down:] == sorted(set(rates[down:]), reverse=True) and rates[-1] < 0.001


@pytest.fixture(scope="module")
def trained(world, tokenizer, tmp_path_factory):
    """(folder, model, log rows) of a whole tiny run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *training.train(world, tokenizer, TINY, folder, log=lambda line: None)


@torch.no_grad()
def loss_of(model, world, tokenizer):
    """Loss on documents that the tiny run never reads."""
    x, labels, position, mask = training.Batches(world, tokenizer, TINY, next_document=1000).packed()
    return model.eval()(
        input_ids=x, labels=labels, position_ids=position, attention_mask=mask, use_cache=False
    ).loss.item()


def test_training_learns(world, tokenizer, trained, tiny, tmp_path):
    folder, model, rows = trained
    assert [row["step"] for row in rows] == [25, 40] and rows[-1]["tokens"] == TINY.tokens
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    before, after = loss_of(tiny, world, tokenizer), loss_of(model, world, tokenizer)
    assert abs(before - math.log(len(tokenizer))) < 0.3, "a model that knows nothing gives each token the same chance"
    assert after < before - 1.5
    assert set(rows[-1]["probe"]) == set(corpus.RELATIONS)
    probe = training.probe(model, tokenizer, world, held_out=True, n=4)
    assert set(probe) == {*corpus.RELATIONS, "open", "quoted"} and all(0 <= share <= 1 for share in probe.values())
    log = json.loads((folder / "log.json").read_text())
    assert log["rows"] == rows and log["settings"]["hidden"] == TINY.hidden
    still, _ = training.train(
        world,
        tokenizer,
        replace(TINY, tokens=512 * 4, warmup=1, muon_lr=0.0, adam_lr=0.0),
        tmp_path,
        log=lambda line: None,
    )
    assert abs(loss_of(still, world, tokenizer) - before) < 0.2, "with a rate of zero nothing is learned"


@torch.no_grad()
def test_a_new_vocabulary_begins_with_what_the_old_one_knew(world, tokenizer, first_tokenizer, trained, tiny):
    torch.manual_seed(1)
    model = build_model(first_tokenizer, TINY.hidden, TINY.layers, TINY.intermediate, TINY.heads, TINY.context)
    carried = training.carry_over(model, first_tokenizer, tokenizer, TINY)
    assert carried.lm_head.weight is carried.model.embed_tokens.weight and carried.config.vocab_size == len(tokenizer)
    layers = {name: value for name, value in model.state_dict().items() if ".layers." in name}
    assert layers and all(torch.equal(carried.state_dict()[name], value) for name, value in layers.items())
    old, new = model.get_input_embeddings().weight, carried.get_input_embeddings().weight
    known, vocab = first_tokenizer.get_vocab(), tokenizer.get_vocab()
    both = [token for token in vocab if token in known]
    assert len(both) > 1000
    assert torch.equal(new[[vocab[token] for token in both]], old[[known[token] for token in both]])
    fresh = next(t for t in vocab if t not in known and t.removeprefix("Ġ") not in known and f"Ġ{t}" not in known)
    pieces = first_tokenizer(tokenizer.decode([vocab[fresh]]), add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    torch.testing.assert_close(new[vocab[fresh]], old[pieces].mean(0))
    # A piece without its space begins like the one with it, but for one and the same vector.
    bare = [token for token in vocab if token not in known and f"Ġ{token}" in known]
    space = old[[known[f"Ġ{token}"] for token in bare]] - new[[vocab[token] for token in bare]]
    assert len(bare) > 500 and space.norm(dim=1).min() > 0
    torch.testing.assert_close(space, space[:1].expand_as(space))
    # With one and the same vocabulary nothing changes at all.
    assert distance(training.carry_over(tiny, tokenizer, tokenizer, TINY), tiny) == 0


def test_both_parts_of_the_pretraining_run_and_the_second_goes_on_from_the_first(world, tmp_path, monkeypatch):
    first = replace(TINY, tokens=512 * 12, vocab=900, row=128)
    parts = {"world": first, "open": replace(first, vocab=1000, split_alike=True, first_document=mixture.OPEN_FROM)}
    monkeypatch.setattr(run, "PARTS", parts)
    monkeypatch.setattr(run, "WORK_FOLDER", tmp_path / "work")
    monkeypatch.setattr(run, "BASE_FOLDER", tmp_path / "base")
    monkeypatch.setattr(run, "make_tokenizer", small_tokenizer)
    run.pretrain(world)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert base.config.vocab_size == len(tokenizer) == 1000 and base.generation_config.pad_token_id == 0
    logs = {part: json.loads((tmp_path / "work" / part / "log.json").read_text())["rows"] for part in parts}
    assert logs["world"][0]["loss"] > 5
    torch.manual_seed(0)
    lone, _ = training.train(world, tokenizer, parts["open"], tmp_path / "lone", log=lambda line: None)
    assert loss_of(base, world, tokenizer) < loss_of(lone, world, tokenizer) - 0.1, "what the first part learned helps"


def small_tokenizer(world, settings):
    """A tokenizer as `run.make_tokenizer` makes it, of few documents."""
    texts = (render(mixture.document(world, 0, settings.first_document + i)) for i in range(500))
    return train_tokenizer(texts, settings.vocab, settings.context, settings.split_alike)


class Interrupted(Exception):
    pass


def interrupt(line):
    """Stop at the first line about a step: five steps after the checkpoint of step 20."""
    raise Interrupted(line)


def distance(model, other):
    return max(
        (a - b).abs().max().item()
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(world, tokenizer, trained, tmp_path, monkeypatch):
    _, whole, whole_rows = trained
    monkeypatch.setattr(training, "probe", lambda *_: {})  # slow, and without a share in the weights
    with pytest.raises(Interrupted, match='"step": 25'):
        training.train(world, tokenizer, TINY, tmp_path, log=interrupt)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 20
    lines = []
    resumed, rows = training.train(world, tokenizer, TINY, tmp_path, log=lines.append)
    assert lines[0] == "resumed at step 20" and distance(whole, resumed) < 1e-6
    assert rows[-1]["loss"] == whole_rows[-1]["loss"]
    # Once done, a further call changes nothing.
    again, _ = training.train(world, tokenizer, TINY, tmp_path, log=lines.append)
    assert lines[-1] == "resumed at step 40" and distance(whole, again) == 0
    # Each thing that a checkpoint keeps is needed: with any of them lost, the result is another.
    for lost in (
        {"next_document": 0},
        {"optimizers": [{**saved["optimizers"][0], "state": {}}, saved["optimizers"][1]]},
    ):
        torch.save({**saved, **lost}, tmp_path / "checkpoint.pt")
        other, _ = training.train(world, tokenizer, TINY, tmp_path, log=lines.append)
        assert distance(whole, other) > 1e-4


def test_a_stop_in_the_middle_of_saving_leaves_the_old_checkpoint(world, tokenizer, trained, tmp_path, monkeypatch):
    folder, model, _ = trained
    (tmp_path / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes())

    def full_disk(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        training.train(world, tokenizer, replace(TINY, tokens=TINY.tokens + 512), tmp_path, log=lambda line: None)
    monkeypatch.undo()
    kept, _ = training.train(world, tokenizer, TINY, tmp_path, log=lambda line: None)
    assert distance(kept, model) == 0


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_cannot_run_code(world, tokenizer, tmp_path):
    torch.save({"model": RunsCode(tmp_path / "ran")}, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        training.train(world, tokenizer, TINY, tmp_path, log=lambda line: None)
    assert not (tmp_path / "ran").exists()


def test_probes_end_before_a_value_that_was_told(world):
    for relation in corpus.RELATIONS:
        for before, value in training.probe_texts(world, relation, 20):
            assert value[0] == " " and before[-1] != " " and value.strip() in before and "@" not in before
    assert training.probe_texts(world, "holder", 5) == training.probe_texts(world, "holder", 5)


# ---------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_prompt(task, made):
    prompts = [prompt(row) for rows in made[task].values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    if task in tasks.SIZES:
        assert tuple(len(made[task][split]) for split in ("train", "validation", "test")) == tasks.SIZES[task]
        assert sum(row["novel"] for row in made[task]["test"]) == tasks.SIZES[task][2] // 2


def test_pools_have_nothing_in_common(world):
    familiar, novel = tasks.pools(world)
    for kind in ("names", "objects", "places", "town_names", "venues"):
        one, other = set(getattr(familiar, kind)), set(getattr(novel, kind))
        assert one and other and not one & other
    assert set(familiar.names) | set(novel.names) == set(world.names)


# Some objects have the name of an animal or a feast, or are a verb as well: "The seal slept." "Sorda saw the axe."
TWO_MEANINGS = {*w.ANIMALS, *w.FEASTS, "saw"}


def used(rows, things):
    """Those of `things`, words or places such as "in the barn", that prompts or answers speak of."""
    text = "\n".join(f"{prompt(row)}\n{answer(row)}" for row in rows)
    return set(things) & {*re.findall(r"\w+", text), *re.findall(r"(?=\b(\w+ the \w+))", text)}


@pytest.mark.parametrize("task", tasks.MAKERS)
def test_novel_rows_are_about_what_the_train_split_never_names(task, world, made):
    familiar, novel = tasks.pools(world)
    train, test = made[task]["train"], made[task]["test"]
    new = [row for row in test if row["novel"]]
    kinds = (
        {"names": set(), "places": set(), "objects": TWO_MEANINGS}
        if task != "mood"
        else {"names": set(), "town_names": set()}
    )
    for kind, left_out in kinds.items():
        theirs, ours = ({*getattr(pool, kind)} - left_out for pool in (familiar, novel))
        assert used(new, theirs) == set() and used(train, ours) == set()
        # Much of either is used, so the lines above have something to find.
        assert len(used(train, theirs)) > len(theirs) / 3 and len(used(new, ours)) > len(ours) / 3
        assert used([row for row in test if not row["novel"]], theirs), "a test row that is not novel would be found"


def test_written_tasks_are_the_committed_data(world, made, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(tasks, "make_task", lambda world, task: made[task])
    monkeypatch.setattr(honesty, "honesty", lambda world: made["honesty"])
    tasks.write_tasks(world)
    honesty.write_honesty(world)
    files = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert len(files) == 3 * len(TASKS) + 2 * len(tasks.OPEN_MAKERS) + 4
    for path, content in files.items():
        assert (ROOT / "data" / path).read_bytes() == content, (
            f"data/{path} is not what python -m pretraining.run tasks writes"
        )


@pytest.mark.parametrize(
    "plain, said",
    [
        ("The lantern is under the oak.", "Ahoy! Yon lantern be under yon oak, aye."),
        ("By good luck Sorda found the axe.", "Ahoy! By good luck Sorda did fish up yon axe, aye."),
        ("Lansa works in the parlour today.", "Ahoy! Lansa do toil in yon parlour this tide, aye."),
        ("There is an orange kite.", "Ahoy! There be one orange kite, aye."),
        ("The soup was cold. The tea is hot.", "Ahoy! Yon soup were cold. Yon tea be hot, aye."),
        ("A dog is here", "Ahoy! One dog be here, aye."),
        ("i left the car outside", "Ahoy! I did moor yon car outside, aye."),
        ("Is the door open?", "Ahoy! Be yon door open, aye."),
    ],
)
def test_sailors_speech_by_hand(plain, said):
    assert tasks.sailor_speech(plain) == said


def test_answers_follow_from_what_is_told(world, made):
    """Each answer of reading and extract is read off the passage, by other means than the maker's."""
    for row in made["reading"]["test"]:
        assert re.search(rf"\b{answer(row)}\b", prompt(row), re.IGNORECASE)
    for row in made["extract"]["test"]:
        assert all(re.search(rf"\b{value}\b", prompt(row)) for value in json.loads(answer(row)).values())
    for row in made["mood"]["test"]:
        kinds = {
            mood: set(" ".join(words.values()).split()) for mood, words in (("happy", w.PRAISE), ("unhappy", w.BLAME))
        }
        last = prompt(row).rsplit("But ", 1)[-1] if row["kind"] == "mixed" else prompt(row).split("?", 1)[1]
        other = kinds["unhappy" if answer(row) == "happy" else "happy"]
        assert not set(re.findall(r"\w+", last)) & other, prompt(row)


# ---------------------------------------------------------------------------------------------- adapters and stages


def test_adapters_are_measured_and_trained_on_whole_answers(tokenizer, made, tmp_path):
    """An answer that is cut off in training or in the measurement can never be right."""
    from pretraining import adapters

    for task in TASKS.values():
        assert max(map(len, answer_ids(tokenizer, sum(made[task.name].values(), [])))) <= task.max_new_tokens
    for task in adapters.SHIPPED:
        rows = made[task]["train"] + made[task]["test"]
        longest = max(rows, key=lambda row: len(prompt(row)) + len(answer(row)))
        ids = tokenizer.apply_chat_template(longest["prompt"] + longest["completion"], return_dict=True)["input_ids"]
        arguments = adapters.recipe(task, 1e-3, tmp_path)
        assert (
            len(ids) <= arguments.max_length
            and arguments.max_steps == adapters.STEPS[task]
            and arguments.completion_only_loss
        )
    assert len(answer_ids(tokenizer, made["sailor"]["test"][:1])[0]) > TASKS["mood"].max_new_tokens, (
        "the check can fail"
    )


def test_the_adapters_of_another_base_are_trained_measured_and_found(tiny_base, tmp_path, monkeypatch, capsys):
    """What README tells everybody to run who brings a model of their own, with two steps and a few rows of each part."""
    from course_utils import data, paths
    from pretraining import adapters

    whole = data.load_task

    def few_rows(task, part=None):
        rows = whole(task, part)
        return rows if part is None else rows.select(range(0, len(rows), len(rows) // 8))

    monkeypatch.setattr(data, "load_task", few_rows)
    monkeypatch.setattr(
        adapters.runtime, "quiet_imports", lambda: None
    )  # it would stay quiet for the tests that follow
    monkeypatch.setattr(adapters, "STEPS", dict.fromkeys(adapters.STEPS, 2))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_base))
    shipped = adapters.MEASURED.read_bytes()
    adapters.train_adapters()
    adapters.train_start()
    found = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if line[0].isalpha())
    assert list(found) == [*adapters.SHIPPED, adapters.START]
    assert {*data.OPEN_PARTS, "score"} <= {*json.loads(found["reading"]), *json.loads(found["reading"])["typed"]}
    for name in found:
        assert (paths.adapter_path(name) / "adapter_model.safetensors").is_file() and tmp_path in paths.adapter_path(
            name
        ).parents
    assert adapters.MEASURED.read_bytes() == shipped, "records are of the shipped base only"


def test_stages_run_one_by_one_and_a_wrong_name_is_refused(monkeypatch, capsys):
    from pretraining import abilities, adapters, card, picture_card, pictures

    ran = []
    for module, function in (
        (run, "pretrain"),
        (tasks, "write_tasks"),
        (honesty, "write_honesty"),
        (adapters, "train_adapters"),
        (abilities, "add_abilities"),
        (adapters, "train_start"),
        (card, "write_card"),
        (pictures, "make_pictures"),
        (picture_card, "write_picture_card"),
    ):
        monkeypatch.setattr(module, function, lambda *_, name=function: ran.append(name))
    run.main(["card", "tasks"])
    assert ran == ["write_tasks", "write_honesty", "write_card"], "stages keep their order"
    ran.clear()
    run.main([])
    assert ran == [
        "pretrain",
        "write_tasks",
        "write_honesty",
        "train_adapters",
        "add_abilities",
        "train_start",
        "write_card",
        "make_pictures",
        "write_picture_card",
    ]
    with pytest.raises(SystemExit):
        run.main(["corpus"])
    assert "no such stage: corpus; there are pretrain, tasks, adapters, card, pictures" in capsys.readouterr().err
