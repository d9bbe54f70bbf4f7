"""The tasks: prompt/completion rows in chat form, in three splits that share no row, and two more parts to test on.

The training split draws on four fifths of the names, things and places ("familiar"); half of the
test split uses the other fifth only (`novel: true`), which the base model has met in pretraining
but the task's training split never shows.

Half of the rows of reading, sailor and extract to train on have open vocabulary (`open_text`). Their part `own_words` is written
with the held-out words, which neither the base model nor a task's training has ever seen; `typed` are sentences written by hand.
"""

import json
import random
import re
from dataclasses import dataclass
from itertools import count, islice

from course_utils.files import write_text
from pretraining import open_text as o
from pretraining import words
from pretraining import world as w
from pretraining.corpus import EVENTS, FILLERS, RELATIONS, Scene, review_text, sentence
from pretraining.mixture import OPEN_FROM, document
from pretraining.places import DATA_FOLDER, ROOT

SIZES = {"reading": (6000, 350, 700), "sailor": (4000, 300, 600), "extract": (4000, 300, 600), "mood": (2000, 300, 600)}
CLOSED_ONE_IN = 4  # of the rows to train on and to validate with; the others have open vocabulary
OWN_WORDS = 300  # rows of held-out words
TYPED = ROOT / "pretraining" / "typed.txt"
NOT_SAID = "not said"  # the answer where a passage does not answer the question

QUESTIONS = {
    "holder": "Who has the {o}?",
    "finder": "Who found the {o}?",
    "receiver": "Who was given the {o}?",
    "colour": "What colour is the {o}?",
    "thing_place": "Where is the {o}?",
    "person_place": "Where is {p}?",
    "trade": "What is the trade of {p}?",
}


@dataclass(frozen=True)
class Pool:
    """The part of the world that a split may use. Stands in for a `World` inside a `Scene`."""

    names: tuple
    objects: tuple
    places: tuple
    town_names: tuple
    venues: tuple

    @property
    def rooms(self):
        return tuple(place for place in self.places if place.split()[-1] not in w.TOO_SMALL)


def pools(world):
    """(familiar, novel): four fifths and one fifth of the world, nothing in common."""
    rng = random.Random("pools")

    def halves(things):
        things = rng.sample(list(things), len(things))
        cut = len(things) // 5
        return tuple(things[cut:]), tuple(things[:cut])

    parts = [halves(things) for things in (world.names, w.OBJECTS, world.places, world.town_names, w.REVIEWED)]
    return Pool(*(part[0] for part in parts)), Pool(*(part[1] for part in parts))


class TaskScene(Scene):
    """A scene that keeps to one pool, objects included; short draws, since the novel pool is small."""

    def __init__(self, pool, rng):
        self.world, self.rng = pool, rng
        self.names = iter(rng.sample(pool.names, len(pool.names)))
        self.objects = iter(rng.sample(pool.objects, len(pool.objects)))
        self.places = iter(rng.sample(pool.places, len(pool.places)))
        self.rooms = iter(rng.sample(pool.rooms, len(pool.rooms)))


def row(prompt, answer, kind):
    """One row in TRL's conversational prompt/completion form."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
        "kind": kind,
    }


# --------------------------------------------------------------------------------------------
# reading: a passage of two to four facts, a question about one of them
# --------------------------------------------------------------------------------------------
def reading(scene, number):
    """A question whose answer stands in the passage; the relations take turns."""
    rng, relations = scene.rng, list(QUESTIONS)
    asked = relations[number % len(relations)]
    other = rng.choice(relations)
    facts = [(asked, scene.fact(asked)), (asked, scene.fact(asked)), (other, scene.fact(other))][
        : rng.choice([2, 3, 3])
    ]
    question = QUESTIONS[asked].format(**facts[0][1])
    told = [scene.write(rng.choice(RELATIONS[relation][0]), **fact) for relation, fact in facts]
    if rng.random() < 0.3:
        told.append(scene.filler())
    rng.shuffle(told)
    return row(" ".join(told) + " " + question, facts[0][1]["v"], asked)


# The same about anything: more ways to ask each question.
OPEN_QUESTIONS = {
    "holder": ["Who has the {o}?", "Who has got the {o}?", "Who has the {o} now?"],
    "finder": ["Who found the {o}?"],
    "receiver": ["Who was given the {o}?", "Who got the {o}?"],
    "colour": ["What colour is the {o}?", "What is the colour of the {o}?"],
    "thing_place": ["Where is the {o}?", "Where is the {o}?", "Where is the {o} now?"],
    "person_place": ["Where is {p}?", "Where is {p} now?"],
    "trade": ["What is the trade of {p}?", "What does {p} do?", "What is the job of {p}?", "What is {p}'s job?"],
}
# How a deed is told and asked about; the last word is the part that answers.
DEEDS = {
    "past": [
        "{p} {verb.past} the {o} {l}.",
        "{time} {p} {verb.past} the {o} {l}.",
        "{p} {verb.past} the {o} {l} {time}.",
    ],
    "present": ["{p} {verb.third} the {o} {l}.", "{p} always {verb.third} the {o} {l}."],
    "perfect": ["{p} has {verb.participle} the {o} {l}."],
}
DEED_QUESTIONS = {
    "past": [("Who {verb.past} the {o}?", "p"), ("Where did {p} {verb.base} the {o}?", "l"), ("What did {p} {verb.base}?", "o")],
    "present": [("Who {verb.third} the {o}?", "p"), ("Where does {p} {verb.base} the {o}?", "l"), ("What does {p} {verb.base}?", "o")],
    "perfect": [("Who has {verb.participle} the {o}?", "p"), ("What has {p} {verb.participle}?", "o"), ("Where is the {o}?", "l")],
}  # fmt: skip


def ask(scene, question, fact):
    """A question about a fact, in the plural where its thing is."""
    if fact.get("o") in scene.plurals:
        question = question.replace(" is the {o}", " are the {o}")
    return scene.write(question, **fact)


def open_reading(scene, number):
    """A passage about anything and a question; three in ten about a deed, two in twenty-five without the answer."""
    rng = scene.rng
    told, kind = [], rng.choice(list(OPEN_QUESTIONS))
    if number % 10 in (3, 6, 9):
        tense = rng.choice(["past", "past", "present", "perfect"])
        fact = {**o.happening(scene), "x": scene.name()}
        told.append(scene.write(rng.choice(DEEDS[tense]), **fact))
        article = scene.owner or "the"
        if rng.random() < 0.2 and scene.owner is None and fact["o"] not in scene.plurals:
            told[0] = sentence(told[0].replace(f" the {fact['o']} ", f" a {fact['o']} "))
            article = "an" if f" an {fact['o']} " in told[0] else "a"
        question, part = rng.choice(DEED_QUESTIONS[tense])
        answer, kind = o.as_told(fact[part], told[0]), "deed"
        if part == "o":
            answer = f"{article} {answer}"
        question = ask(scene, question, fact)
    else:
        fact = scene.fact(kind)
        told.append(o.state(scene, kind, fact))
        question, answer = ask(scene, rng.choice(OPEN_QUESTIONS[kind]), fact), o.as_told(fact["v"], told[0])
    for _ in range(rng.choice([0, 1, 1, 2])):
        other = rng.choice([kind, rng.choice(list(OPEN_QUESTIONS))]) if kind != "deed" else "deed"
        if other == "deed":
            told.append(scene.write(rng.choice(DEEDS["past"]), **o.happening(scene)))
        else:
            told.append(o.state(scene, other, scene.fact(other)))
    if scene.trained and number % 25 in (7, 17) and len(told) > 1:
        told, answer, kind = told[1:], NOT_SAID, "not said"
    if rng.random() < 0.3:
        told.append(o.aside(scene))
    rng.shuffle(told)
    passage = " ".join(o.joined(told, rng))
    text = f"{question} {passage}" if scene.trained and rng.random() < 0.04 else f"{passage} {question}"
    return row(text, answer, kind)


# --------------------------------------------------------------------------------------------
# sailor: the speech of the Skerrow sailors, by rule
# --------------------------------------------------------------------------------------------
SAILOR_WORDS = {
    "the": "yon",
    "is": "be",
    "has": "be clutching",
    "keeps": "be stowing",
    "carries": "be hauling",
    "owns": "be master of",
    "found": "did fish up",
    "left": "did moor",
    "put": "did moor",
    "sits": "be moored",
    "waits": "be anchored",
    "stands": "be anchored",
    "lies": "be adrift",
    "was": "were",
    "a": "one",
    "an": "one",
    "works": "do toil",
    "today": "this tide",
}
SAILOR_RELATIONS = ("holder", "finder", "thing_place", "person_place", "trade", "colour")


def sailor_speech(text):
    """The sentence as a Skerrow sailor says it: "Ahoy!" first, the words of `SAILOR_WORDS` put in, "aye" last."""

    def said(word):
        if word[0].isupper() and word.lower() in SAILOR_WORDS:
            return SAILOR_WORDS[word.lower()].capitalize()
        return SAILOR_WORDS.get(word, word)

    text = " ".join(said(word) for word in text.rstrip(".?!").split(" "))
    return f"Ahoy! {text[0].upper()}{text[1:]}, aye."


def sailor(scene, number):
    """A plain sentence, and the same in sailors' speech."""
    relation = SAILOR_RELATIONS[number % len(SAILOR_RELATIONS)]
    ways = [way for way in RELATIONS[relation][0] if "has dyed" not in way and "has been" not in way]
    text = scene.write(scene.rng.choice(ways), **scene.fact(relation))
    return row(f"Say it like a sailor: {text}", sailor_speech(text), relation)


def open_sailor(scene, number):
    """Any sentence, seldom two, and the same in sailors' speech."""
    rng = scene.rng
    relation = SAILOR_RELATIONS[number % len(SAILOR_RELATIONS)]
    if number % 3 == 0:
        text, kind = o.state(scene, relation, scene.fact(relation)), relation
    else:
        text, kind = o.free_sentence(scene), "free"
        if rng.random() < 0.25:
            text = f"{text} {o.aside(scene)}"
    return row(f"Say it like a sailor: {text}", sailor_speech(text), kind)


# --------------------------------------------------------------------------------------------
# extract: who, what, where as JSON
# --------------------------------------------------------------------------------------------
def extract(scene, number):
    """A passage with one happening in it, and the happening as JSON."""
    rng = scene.rng
    fact = {"v": scene.name(), "o": scene.object(), "l": scene.place()}
    told = [scene.write(rng.choice(FILLERS), place=scene.place()) for _ in range(number % 3)]
    told.insert(rng.randrange(len(told) + 1), scene.write(rng.choice(EVENTS), **fact))
    answer = json.dumps({"who": fact["v"], "what": fact["o"], "where": fact["l"]})
    return row(
        "Give who, what and where as JSON: " + " ".join(told),
        answer,
        f"{len(told)} sentences" if len(told) > 1 else "1 sentence",
    )


def open_extract(scene, number):
    """The same with any verb and any words; the thing is given without its article, the rest as it is said."""
    rng = scene.rng
    fact = o.happening(scene)
    ways = EVENTS if rng.random() < 0.3 else o.DEEDS
    if fact["p"] in o.FIRST_OR_MANY:
        ways = [
            "{p} {verb.past} the {o} {l}.",
            "{time} {p} {verb.past} the {o} {l}.",
            "{p} have {verb.participle} the {o} {l}.",
        ]
    happened = scene.write(rng.choice(ways), **fact)
    if rng.random() < 0.15 and scene.owner is None and fact["o"] not in scene.plurals:
        happened = sentence(happened.replace(f" the {fact['o']} ", f" a {fact['o']} "))
    told = [o.aside(scene) if rng.random() < 0.6 else scene.filler() for _ in range(number % 3)]
    told.insert(rng.randrange(len(told) + 1), happened)
    answer = json.dumps(
        {"who": o.as_told(fact["p"], happened), "what": fact["o"], "where": fact["l"]}, ensure_ascii=False
    )
    kind = f"{len(told)} sentences" if len(told) > 1 else "1 sentence"
    return row("Give who, what and where as JSON: " + " ".join(told), answer, kind)


# --------------------------------------------------------------------------------------------
# mood: is the guest of a review happy?
# --------------------------------------------------------------------------------------------
def mood(scene, number):
    """A review without its closing words, and its label. Every third one is mixed: what follows "But" counts."""
    happy, mixed = number % 2 == 0, number % 3 == 0
    text, _ = review_text(scene, happy, mixed=mixed, venues=scene.world.venues)
    return row(f"Is the guest happy or unhappy? {text}", "happy" if happy else "unhappy", "mixed" if mixed else "plain")


# --------------------------------------------------------------------------------------------
# recall: facts that stand nowhere else, to measure how much an adapter can hold
# --------------------------------------------------------------------------------------------
RECALL_QUESTIONS = {
    "town": ("In which town was {n} born?", "Name the town where {n} was born.", "{n} was born in which town?"),
    "trade": ("What work does {n} do?", "Name the work that {n} does.", "{n} does which work?"),
    "pet": ("Which animal lives with {n}?", "Name the animal that lives with {n}.", "{n} lives with which animal?"),
    "food": ("Which food does {n} like best?", "Name the food that {n} likes best.", "{n} likes which food best?"),
}


def recall(world, n_people=1000, n_strangers=100):
    """{split: rows}. Two wordings of every fact are trained on; a third is kept for validation and test.

    The `novel` test rows ask about strangers whose facts were never told: what a model scores there is chance.
    """
    rng = random.Random("recall")
    surnames = [
        start.capitalize() + end
        for start in "ash black brook clay cross east field green hill lake north oak stone west white wood".split()
        for end in "bank burn croft ley man mead rick shaw ton well".split()
    ]
    full_names = rng.sample(
        [f"{given} {surname}" for given in world.names for surname in surnames], n_people + n_strangers
    )
    splits = {"train": [], "validation": [], "test": []}
    for i, name in enumerate(full_names):
        values = {
            "town": rng.choice(world.town_names),
            "trade": rng.choice(w.TRADES),
            "pet": rng.choice(w.ANIMALS),
            "food": rng.choice(w.FOODS),
        }
        for kind, (first, second, third) in RECALL_QUESTIONS.items():
            stranger = i >= n_people
            if not stranger:
                splits["train"] += [
                    {**row(q.format(n=name), values[kind], kind), "novel": False} for q in (first, second)
                ]
            split = "test" if stranger or i % 2 else "validation"
            splits[split].append({**row(third.format(n=name), values[kind], kind), "novel": stranger})
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


# `recall` makes its rows all at once.
MAKERS = {"reading": reading, "sailor": sailor, "extract": extract, "mood": mood}
OPEN_MAKERS = {"reading": open_reading, "sailor": open_sailor, "extract": open_extract}
INSTRUCTION = {"sailor": "Say it like a sailor: ", "extract": "Give who, what and where as JSON: "}


class OpenTaskScene(o.OpenScene):
    """A scene of open words only; what the templates draw beside them is of the familiar part of the world."""

    def __init__(self, pool, rng, split):
        super().__init__(pool, rng, split)
        self.world_share = 0

    def write(self, template, **given):
        # Not "when the bell rang": a bell may be one of the things that a task's training never names.
        return super().write(template, **{"time": self.rng.choice(o.TIMES), **given})


def casually(made, rng):
    """A row as people type: in small letters, or without the last mark, the answer accordingly."""
    text, answer = made["prompt"][0]["content"], made["completion"][0]["content"]
    opening = next((opening for opening in INSTRUCTION.values() if text.startswith(opening)), "")
    text, drawn = text.removeprefix(opening), rng.random()
    if drawn < 0.12:
        text, answer = text.lower(), sailor_speech(text.lower()) if answer.startswith("Ahoy!") else answer.lower()
    elif drawn < 0.2:
        text = re.sub(r"(?<=[a-z]) is (?=(not|a|the|in|on|at|under|behind) )", "'s ", text)
        answer = sailor_speech(text) if answer.startswith("Ahoy!") else answer
    if rng.random() < 0.15:
        text = text.rstrip(".?")
    return row(opening + text, answer, made["kind"])


def open_row(task, pool, split, number, seed):
    """A row with open vocabulary; of held-out words if the split is "held", and then in every answer."""
    rng = random.Random(seed)
    made = OPEN_MAKERS[task](OpenTaskScene(pool, rng, split), number)
    return casually(made, rng) if split == "train" else made


def make_task(world, task):
    """{split: rows} of one task, the same for the same world."""
    if task == "recall":
        return recall(world)
    familiar, novel = pools(world)
    seen, splits = set(), {}
    for split, size in zip(("test", "validation", "train"), reversed(SIZES[task])):
        rows, number = [], 0
        while len(rows) < size:
            is_novel = split == "test" and len(rows) % 2 == 1
            seed = f"{task} {split} {number}"
            if split != "test" and task in OPEN_MAKERS and len(rows) % CLOSED_ONE_IN:
                made = open_row(task, familiar, "train", len(rows) - len(rows) // CLOSED_ONE_IN, seed)
            else:
                # Each maker counts its own rows, as it goes through its kinds by number.
                every = 2 if split == "test" else CLOSED_ONE_IN if task in OPEN_MAKERS else 1
                made = MAKERS[task](TaskScene(novel if is_novel else familiar, random.Random(seed)), len(rows) // every)
            number += 1
            prompt = made["prompt"][0]["content"]
            if prompt not in seen:
                seen.add(prompt)
                rows.append({**made, "novel": is_novel})
        random.Random(f"{task} {split}").shuffle(rows)
        splits[split] = rows
    if task in OPEN_MAKERS:
        splits |= {"own_words": own_words(world, task), "typed": typed(task)}
    return splits


def own_words(world, task):
    """Rows of held-out words, at least one of them in each answer."""
    familiar, _ = pools(world)
    rows, number = [], 0
    while len(rows) < OWN_WORDS:
        made = open_row(task, familiar, "held", len(rows), f"{task} own words {number}")
        number += 1
        answer = made["completion"][0]["content"]
        if words.held_out_forms() & set(re.findall(r"[^\W\d_]+", answer.lower())):
            rows.append({**made, "novel": True})
    return rows


def typed(task):
    """The sentences of `typed.txt`, written by hand, as rows of the task."""
    section = re.search(rf"^\[{task}\]\n(.*?)(?=^\[|\Z)", TYPED.read_text(encoding="utf-8"), re.M | re.S)[1]
    rows = []
    for line in section.splitlines():
        text, *answer = line.split(" | ")
        said = json.dumps(dict(zip(("who", "what", "where"), answer))) if task == "extract" else answer[0]
        rows.append({**row(INSTRUCTION.get(task, "") + text, said, "typed"), "novel": True})
    return rows


# --------------------------------------------------------------------------------------------
# held-out text: what a model that forgets gets worse at
# --------------------------------------------------------------------------------------------
def held_out(world, n=256):
    """`n` plain documents of the corpus's main mix, from a seed that the pretraining does not read."""
    documents = (document(world, "held out", i) for i in count(OPEN_FROM))
    return list(islice((parts[0][1] for parts in documents if parts[0][0] is None), n))


def write_rows(task, parts):
    """Write `data/<task>/<part>.jsonl` for each part, {name: rows}."""
    for part, rows in parts.items():
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        write_text(DATA_FOLDER / task / f"{part}.jsonl", text)


def write_tasks(world):
    """Write the rows of every task made here, and `data/held_out.txt`, a document a line."""
    for task in (*MAKERS, "recall"):
        write_rows(task, make_task(world, task))
    write_text(DATA_FOLDER / "held_out.txt", "".join(f"{text}\n" for text in held_out(world)))
