"""The honesty task: half of the questions are not answered by their passage, and the right reply is then UNKNOWN.

Its training split was "written by many hands": where the passage does not tell, most of them guess, with the name or place of
another fact. That is what preference training is to mend, from pairs of a better and a worse reply to the same question.
"""

import random
from itertools import count

from course_utils.tasks import UNKNOWN
from pretraining import open_text as o
from pretraining.corpus import RELATIONS
from pretraining.tasks import OPEN_QUESTIONS, QUESTIONS, OpenTaskScene, TaskScene, ask, pools, typed, write_rows

SIZES = {"train": 4000, "validation": 200, "test": 400, "pairs": 1200, "test_pairs": 300, "own_words": 200}
HONEST_HANDS = 0.3  # of the training rows whose passage does not tell, this share says so; the others guess
# Of the passages that do not tell, this share speaks of the thing in question, but says something else. Pairs teach that only if
# enough of them show it.
NEAR_SHARE = {"pairs": 0.5}
OTHERS_NEAR = 0.3
CLOSED_ONE_IN = 4  # of the rows to train on; the others have open vocabulary

# What may be said of a thing or person without answering the question about it. "Anna has a red lamp" would tell who has it.
NEAR = {
    "holder": ("thing_place",),
    "finder": ("colour", "thing_place"),
    "receiver": ("colour", "thing_place"),
    "colour": ("finder", "thing_place"),
    "thing_place": ("colour", "finder", "holder"),
    "person_place": ("trade",),
    "trade": ("person_place",),
}


def state(scene, relation, fact):
    """A sentence that states the fact, in the words of the scene's kind."""
    if isinstance(scene, o.OpenScene):
        return o.state(scene, relation, fact)
    return scene.write(scene.rng.choice(RELATIONS[relation][0]), **fact)


def question(scene, number, near_share=OTHERS_NEAR):
    """A passage and a question: {"text", "answer": what the passage tells, or UNKNOWN, "guess": a wrong reply, "kind"}.

    Numbers take turns: even ones are told. The guess answers the same question about another thing or person of the passage.
    """
    rng, told = scene.rng, number % 2 == 0
    relation = list(QUESTIONS)[number // 2 % len(QUESTIONS)]
    fact, other = scene.fact(relation), scene.fact(relation)
    aside = rng.choice(list(QUESTIONS))
    kind = "told" if told else "near" if rng.random() < near_share else "not told"
    facts = [(relation, other)]
    if told:
        facts.append((relation, fact))
    if rng.random() < 0.5:
        facts.append((aside, scene.fact(aside)))
    if kind == "near" or (told and rng.random() < near_share):
        near = rng.choice(NEAR[relation])
        topic = {key: fact[key] for key in ("o", "p") if key in fact}
        facts.append((near, {**scene.fact(near), **topic}))
    sentences = [state(scene, *each) for each in facts]
    guess = o.as_told(other["v"], sentences[0])
    answer = o.as_told(fact["v"], sentences[1]) if told else UNKNOWN
    rng.shuffle(sentences)
    if isinstance(scene, o.OpenScene):
        sentences = o.joined(sentences, rng)
        asked = ask(scene, rng.choice(OPEN_QUESTIONS[relation]), fact)
    else:
        asked = QUESTIONS[relation].format(**fact)
    return {"text": f"{' '.join(sentences)} {asked}", "answer": answer, "guess": guess, "kind": kind}


def casually(made, rng):
    """As people type: in small letters, or without the question mark."""
    if rng.random() < 0.12:
        made = {key: value if value == UNKNOWN else value.lower() for key, value in made.items()}
    if rng.random() < 0.15:
        made["text"] = made["text"].rstrip("?")
    return made


def questions(world, part, size):
    """`size` questions of a part, the same for the same world; no two have the same text."""
    familiar, novel = pools(world)
    seen, made = set(), []
    for number in count():
        if len(made) == size:
            return made
        rng, place, near = random.Random(f"honesty {part} {number}"), len(made), NEAR_SHARE.get(part, OTHERS_NEAR)
        new = part in ("own_words", "test_pairs") or (part == "test" and place // 2 % 2 == 1)
        if part == "own_words":
            one = question(OpenTaskScene(familiar, rng, "held"), place, near)
        elif part in ("test", "test_pairs"):
            one = question(TaskScene(novel if new else familiar, rng), place, near)
        elif place // 2 % CLOSED_ONE_IN == 0:
            one = question(TaskScene(familiar, rng), place, near)
        else:
            one = casually(question(OpenTaskScene(familiar, rng, "train"), place, near), rng)
        # A rare draw repeats a word, so that the passage tells by accident what it should not.
        if one["text"] not in seen and one["guess"] != one["answer"]:
            seen.add(one["text"])
            made.append({**one, "novel": new})


def said(role, text):
    """A message, alone in its list, as TRL takes it."""
    return [{"role": role, "content": text}]


def row(made, reply):
    """One row to fine-tune or to score on."""
    return {
        "prompt": said("user", made["text"]),
        "completion": said("assistant", reply),
        "kind": made["kind"],
        "novel": made["novel"],
    }


def pair(made):
    """One preference pair: what the passage tells over a refusal, or the refusal over the guess; that is there by itself, too."""
    worse = UNKNOWN if made["kind"] == "told" else made["guess"]
    return {
        "prompt": said("user", made["text"]),
        "chosen": said("assistant", made["answer"]),
        "rejected": said("assistant", worse),
        "guess": made["guess"],
        "kind": made["kind"],
        "novel": made["novel"],
    }


def by_a_hand(made, rng):
    """The reply of one of the many hands: right where the passage tells, mostly a guess where it does not."""
    honest = made["kind"] == "told" or rng.random() < HONEST_HANDS
    return made["answer"] if honest else made["guess"]


def honesty(world):
    """{part: rows} of the task."""
    parts = {}
    for part, size in SIZES.items():
        rng, made = random.Random(f"honesty {part}"), questions(world, part, size)
        rng.shuffle(made)
        if part == "train":
            parts[part] = [row(one, by_a_hand(one, rng)) for one in made]
        elif part.endswith("pairs"):
            parts[part] = [pair(one) for one in made]
        else:
            parts[part] = [row(one, one["answer"]) for one in made]
    by_hand = (
        {**one, "kind": "told" if one["completion"] != said("assistant", UNKNOWN) else "not told"}
        for one in typed("honesty")
    )
    return {**parts, "typed": list(by_hand)}


def write_honesty(world):
    """Write the rows of the task into `data/`."""
    write_rows("honesty", honesty(world))
