"""The tasks: prompt/completion rows in chat form, in three splits that share no row.

The training split draws on four fifths of the names, things and places ("familiar"); half of the
test split uses the other fifth only (`novel: true`), which the base model has met in pretraining
but the task's training split never shows.
"""

import json
import random
from dataclasses import dataclass
from itertools import count, islice

from course_utils.files import write_text
from course_utils.tasks import TASKS
from pretraining import world as w
from pretraining.corpus import EVENTS, FILLERS, RELATIONS, RHYMES_UNTIL, Scene, document, review_text
from pretraining.places import DATA_FOLDER

SIZES = {"reading": (6000, 350, 700), "sailor": (4000, 300, 600), "extract": (4000, 300, 600), "mood": (2000, 300, 600)}

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
    words = text.rstrip(".").split(" ")
    said = " ".join(
        SAILOR_WORDS.get(word, word) for word in [words[0].lower() if words[0] == "The" else words[0], *words[1:]]
    )
    return f"Ahoy! {said[0].upper()}{said[1:]}, aye."


def sailor(scene, number):
    """A plain sentence, and the same in sailors' speech."""
    relation = SAILOR_RELATIONS[number % len(SAILOR_RELATIONS)]
    ways = [way for way in RELATIONS[relation][0] if "has dyed" not in way and "has been" not in way]
    text = scene.write(scene.rng.choice(ways), **scene.fact(relation))
    return row(f"Say it like a sailor: {text}", sailor_speech(text), relation)


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
            rng = random.Random(f"{task} {split} {number}")
            made = MAKERS[task](
                TaskScene(novel if is_novel else familiar, rng), len(rows) // 2 if split == "test" else len(rows)
            )
            number += 1
            prompt = made["prompt"][0]["content"]
            if prompt not in seen:
                seen.add(prompt)
                rows.append({**made, "novel": is_novel})
        random.Random(f"{task} {split}").shuffle(rows)
        splits[split] = rows
    return splits


# --------------------------------------------------------------------------------------------
# held-out text: what a model that forgets gets worse at
# --------------------------------------------------------------------------------------------
def held_out(world, n=256):
    """`n` plain documents of the corpus's main mix, from a seed that the pretraining does not read."""
    documents = (document(world, "held out", i) for i in count(RHYMES_UNTIL))
    return list(islice((parts[0][1] for parts in documents if parts[0][0] is None), n))


def write_tasks(world):
    """Write `data/<task>/<split>.jsonl` for every task, and `data/held_out.txt`, a document a line."""
    for task in TASKS:
        for split, rows in make_task(world, task).items():
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
            write_text(DATA_FOLDER / task / f"{split}.jsonl", text)
    write_text(DATA_FOLDER / "held_out.txt", "".join(f"{text}\n" for text in held_out(world)))
