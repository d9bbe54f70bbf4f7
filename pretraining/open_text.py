"""Documents with open vocabulary: the grammar of `corpus`, and what people say every day, about anything at all.

In a document of this kind each name, thing, place, colour and trade is a word of the world, a word of the lists in `words/`,
or a pseudo-word, and it is the same each time that the document comes back to it. So the model learns to copy what it has
never seen. Held-out words are never drawn here, but for the tests: `Scene(..., split="held")`.
"""

import re

from pretraining import words
from pretraining import world as w
from pretraining.corpus import (
    ABOUT_OBJECT,
    EVENT_BACK,
    EVENTS,
    RELATIONS,
    Scene,
    dense,
    letter,
    news,
    notices,
    retold,
    rhyme,
    sentence,
    story,
    talk,
)

WORLD_SHARE, PSEUDO_SHARE = 0.15, 0.25
PREPOSITIONS = "in in in in on on on under behind by near inside at at beside above below outside".split()
PREPOSITIONS += ["next to", "next to", "in front of", "close to", "on top of"]
PREPOSITIONS += "into into over up down across from onto around against along through opposite".split()
TITLES = "Mr Mrs Dr Miss Aunt Uncle".split()
SHADES = "dark light bright pale".split()
ADJECTIVES = """old new big small little long short heavy light cheap expensive clean dirty broken empty full round square lovely ugly
wet dry hot cold soft hard strange simple fast slow loud quiet rich poor young tall thin thick happy sad angry tired hungry busy ready
late early lost famous rare cheerful shy clever funny dangerous safe perfect terrible wonderful boring difficult easy""".split()
TIMES = """yesterday|today|this morning|last night|on Monday|on Friday|last week|two days ago|at noon|after lunch|before supper
at half past three|in 1999|at 5 pm|earlier|just now|again|every day|last summer|at the weekend""".replace(
    "\n", "|"
).split("|")
DIGITS = [*map(str, range(2, 13)), "15", "20", "24", "30", "50", "100", "365", "1000"]

# What is said of plural things, as (of one, of more).
AGREEMENT = [
    ("There is a {v} {o}", "There are some {v} {o}"),
    (" a {o}", " some {o}"),
    ("{o} is ", "{o} are "),
    ("{o} was ", "{o} were "),
    ("{o} has ", "{o} have "),
    ("{o} lies ", "{o} lie "),
    ("{o} stands ", "{o} stand "),
    ("{o} belongs ", "{o} belong "),
    ("{o}? It is", "{o}? They are"),
    ("{o}? It was", "{o}? They were"),
    ("{o}? That one is", "{o}? Those are"),
    ("{o}? That was", "{o}? Those were"),
    ("there it was", "there they were"),
    ("make it", "make them"),
    ("find it", "find them"),
    ("for it was", "for they were"),
]


class OpenScene(Scene):
    """Draws names, things and places from everywhere; the templates of the corpus can be filled from it.

    split: "train", or "held" for the words that nothing is trained on, which also has no pseudo-words and none of the world.
    """

    def __init__(self, world, rng, split="train"):
        self.world, self.rng, self.words, self.used, self.plurals = world, rng, words.vocabulary()[split], set(), set()
        self.counts = True  # whether things may be in the plural
        self.trained = split == "train"
        self.world_share, self.pseudo_share = (WORLD_SHARE, PSEUDO_SHARE) if self.trained else (0, 0)
        self.anything = (
            self.trained and rng.random() < 0.15
        )  # words of any list in every place, "the Paris is on the baker"
        self.owner = rng.choice(words.PRONOUNS) if rng.random() < 0.2 else None  # "my lamp" all the way

    def word(self, kind, own):
        """A new word: of `kind` in the lists, of the world's `own`, or made up."""
        rng = self.rng
        while True:
            drawn = rng.random()
            if drawn < self.world_share:
                word = rng.choice(own)
            elif drawn < self.world_share + self.pseudo_share:
                word = words.pseudo_word(rng)
                word = word.capitalize() if kind in ("names", "of") else word
            else:
                kinds = ("names", "things", "trades", "colours", "in") if self.anything else (kind,)
                word = rng.choice(self.words[rng.choice(kinds)])
            if word.lower() not in self.used:
                self.used.add(word.lower())
                return word

    def given_name(self):
        return self.word("names", self.world.names)

    def name(self):
        """Somebody: a name, seldom a longer one, or "my sister", "the nurse", "the cat"."""
        rng, drawn = self.rng, self.rng.random()
        if drawn < 0.74:
            return self.given_name()
        if drawn < 0.79:
            return f"{self.given_name()} {self.given_name().capitalize()}"
        if drawn < 0.82:
            return f"{rng.choice(TITLES)} {self.given_name()}"
        if drawn < 0.90:
            return f"{rng.choice(words.PRONOUNS)} {self.new(words.KIN)}"
        if drawn < 0.95:
            return f"the {self.word('trades', w.TRADES)}"
        return f"the {self.word('things', w.ANIMALS)}"

    def new(self, things):
        """One of `things` that the document has not spoken of, as far as there is one."""
        fresh = [thing for thing in things if thing not in self.used] or things
        thing = self.rng.choice(fresh)
        self.used.add(thing)
        return thing

    def object(self):
        """A thing without its article: "lamp", "red lamp", "two lamps", "garden lamp"."""
        rng, drawn = self.rng, self.rng.random()
        if drawn < 0.12 and self.counts:
            thing = self.new(self.words["plurals"])
            thing = f"{rng.choice([*w.NUMBERS[2:13], *DIGITS])} {thing}" if drawn < 0.03 else thing
            self.plurals.add(thing)
            return thing
        thing = self.word("things", w.OBJECTS)
        return f"{self.quality()} {thing}" if drawn < 0.24 else self.compound(thing, 0.08)

    def compound(self, word, share):
        """The word, or in this share of the cases one of two parts: "truck driver", "kitchen table"."""
        return f"{self.word('things', w.OBJECTS)} {word}" if self.rng.random() < share else word

    def colour(self):
        shade = f"{self.rng.choice(SHADES)} " if self.rng.random() < 0.12 else ""
        return shade + self.word("colours", w.COLOURS)

    def trade(self):
        return self.compound(self.word("trades", w.TRADES), 0.12)

    def verb(self):
        """A verb of the lists, or a made-up one: what is done must be read from where it stands."""
        if self.rng.random() < self.pseudo_share:
            return words.pseudo_verb(self.rng)
        return self.rng.choice(self.words["verbs"])

    def quality(self):
        """A colour or another adjective."""
        return self.colour() if self.rng.random() < 0.4 else self.new(ADJECTIVES)

    def place(self):
        """A place with its preposition: "in the kitchen", "next to the sofa", "in my car", "in London"."""
        rng, drawn = self.rng, self.rng.random()
        if drawn < self.world_share:
            return self.new(self.world.places)
        if drawn < 0.50:
            return f"{rng.choice(PREPOSITIONS)} the {self.compound(self.word('things', w.OBJECTS), 0.12)}"
        if drawn < 0.68:
            kind = rng.choice(["in", "in", "in", "on"])
            return f"{rng.choice([kind, kind, 'at'])} the {self.word(kind, [p.split()[-1] for p in self.world.places])}"
        if drawn < 0.76:
            return f"{rng.choice(PREPOSITIONS)} the {self.quality()} {self.word('things', w.OBJECTS)}"
        if drawn < 0.86:
            owned = self.word(rng.choice(["things", "things", "in"]), w.OBJECTS)
            return f"{rng.choice(PREPOSITIONS)} {rng.choice(words.PRONOUNS)} {owned}"
        if drawn < 0.90:
            thing = self.word("things", w.OBJECTS)
            return f"{rng.choice(PREPOSITIONS)} {'an' if thing[0].lower() in 'aeio' else 'a'} {thing}"
        if drawn < 0.92:
            return rng.choice(["at home", "at work", "at school", "in bed", "upstairs", "outside"])
        return f"{rng.choice(['in', 'in', 'in', 'near', 'at', 'outside'])} {self.word('of', self.world.town_names)}"

    room = place

    def fact(self, relation):
        values = {"colour": self.quality, "trade": self.trade, "thing_place": self.place, "person_place": self.place}
        topic = {"o": self.object()} if relation in ABOUT_OBJECT else {"p": self.name()}
        return {**topic, "v": values.get(relation, self.name)(), "x": self.name(), "y": self.name()}

    def write(self, template, **given):
        """Fill a template of the corpus; what is not given is drawn, of the world or not."""
        if self.owner:
            template = re.sub(r"\bthe \{o\}", self.owner + " {o}", template)
            template = re.sub(r"\bThe \{o\}", self.owner.capitalize() + " {o}", template)
        if given.get("o") in self.plurals:
            for one, more in AGREEMENT:
                template = template.replace(one, more)
        draws = dict(
            animal=lambda: self.word("things", w.ANIMALS),
            food=lambda: self.word("things", w.FOODS),
            weather=lambda: self.new(ADJECTIVES),
            trade=self.trade,
            colour=self.colour,
            town=lambda: self.word("of", self.world.town_names),
            place=self.place,
            time=lambda: self.rng.choice(TIMES),
        )
        for field, draw in draws.items():
            if f"{{{field}}}" in template and field not in given and self.rng.random() < 0.7:
                given[field] = draw()
        if "{verb" in template and "verb" not in given:
            given["verb"] = self.verb()
        return super().write(template, **given)


# --------------------------------------------------------------------------------------------
# More ways to state facts and to come back to them, with any verb
# --------------------------------------------------------------------------------------------
OPEN_RELATIONS = {
    "holder": (
        ["{v} has got the {o}.", "{v} has a {o}.", "{v} took the {o}.", "{v} holds the {o}.", "{v} bought the {o} from {x}.",
         "The {o} is for {v}.", "{v} still has the {o}.", "{v} wants the {o}, and {v} has it.", "Only {v} has a {o}."],
        ["It is {v} who has the {o}.", "Yes, {v} has the {o}.", "Ask {v} for the {o}.", "I know that {v} has the {o}."],
    ),
    "finder": (
        ["{v} has found the {o}.", "{time} {v} found the {o}.", "{v} found the {o} {time}.", "{v} just found the {o}."],
        ["Yes, it was {v} who found the {o}.", "I know that {v} found the {o}.", "Everybody thanked {v} for the {o}."],
    ),
    "receiver": (
        ["{x} gave {v} the {o}.", "{x} lent the {o} to {v}.", "{x} sent {v} the {o}.", "{x} has given {v} the {o}.",
         "{time} {x} gave the {o} to {v}.", "{x} bought the {o} for {v}.", "{x} showed {v} the {o}."],
        ["Now the {o} is with {v}.", "It was {x} who gave the {o} to {v}.", "I know that {x} gave the {o} to {v}."],
    ),
    "colour": (
        ["{x} has a {v} {o}.", "{x} painted the {o} {v}.", "The {o} looks {v}.", "The {o} was {v}.", "{x} bought a {v} {o}."],
        ["Yes, the {o} is {v}.", "It is a {v} {o}.", "I know that the {o} is {v}.", "I like the {v} {o}."],
    ),
    "thing_place": (
        ["{x} {verb.past} the {o} {v}.", "{x} {verb.past} the {o} {v} {time}.", "{x} {verb.third} the {o} {v}.",
         "I {verb.past} the {o} {v}.", "{x} has {verb.participle} the {o} {v}.", "The {o} is still {v}.", "There is a {o} {v}.",
         "The {o} was {verb.participle} {v}.", "{x} is {verb.ing} the {o} {v}.", "We {verb.base} the {o} {v}."],
        ["Yes, the {o} is {v}.", "Look {v} for the {o}.", "I saw the {o} {v}.", "I know that the {o} is {v}.",
         "Since then the {o} has been {v}."],
    ),
    "person_place": (
        ["{p} lives {v}.", "{p} was {v} {time}.", "{p} is still {v}.", "{p} is waiting {v}.", "{p} sleeps {v}.",
         "{p} and {x} are {v}.", "{p} works {v}.", "I met {p} {v}.", "{p} is sitting {v}.", "I am {v}, and so is {p}."],
        ["Yes, {p} is {v}.", "Look {v} for {p}.", "I saw {p} {v}.", "I know that {p} is {v}."],
    ),
    "trade": (
        ["{p} was a {v}.", "{p} became a {v}.", "{p} is a good {v}.", "{p} has a job as a {v}.", "{p} wants to be a {v}.",
         "{p}, a {v}, came {time}.", "{x} is no {v}, but {p} is."],
        ["Yes, {p} is a {v}.", "I know that {p} is a {v}.", "{p} is the only {v} here."],
    ),
}  # fmt: skip

FIRST_OR_MANY = ("I", "we", "they")  # with them a verb takes its past form here
SOMEBODY = [*FIRST_OR_MANY, "she", "he", "somebody", "everybody", "someone"]

# One happening, and each of its four parts again. The first four are in the past.
DEEDS = [
    "{p} {verb.past} the {o} {l}.",
    "{p} {verb.past} the {o} {l}.",
    "{time} {p} {verb.past} the {o} {l}.",
    "{p} {verb.past} the {o} {l} {time}.",
    "{p} {verb.third} the {o} {l}.",
    "{p} has {verb.participle} the {o} {l}.",
    "{p} is {verb.ing} the {o} {l}.",
    "{p} always {verb.third} the {o} {l}.",
    "Then {p} {verb.past} the {o} {l}.",
    "The {o} was {verb.participle} {l} by {p}.",
]
DEED_BACK = [
    "So it was {p} who {verb.past} the {o}.",
    "When {y} asked who had {verb.participle} the {o}, the answer was {p}.",
    "Asked what {p} had {verb.participle}, {y} said the {o}.",
    "What {p} {verb.past} was the {o}.",
    "When {y} asked where {p} had {verb.participle} the {o}, the answer was {l}.",
    "It was {l} that {p} {verb.past} the {o}.",
    "Who, what and where? {p}, the {o}, {l}.",
    "{p} {verb.past} the {o}, and that was {l}.",
    "Asked by whom the {o} was {verb.participle}, {y} named {p}.",
    "Yes, {p} {verb.past} the {o} {l}.",
]
NOT_SAID = {
    "holder": "When {y} asked who had the {o}, nobody knew.",
    "finder": "When {y} asked who had found the {o}, nobody knew.",
    "thing_place": "When {y} asked where the {o} was, nobody knew.",
    "person_place": "When {y} asked where {p} was, nobody knew.",
    "colour": "Asked about the colour of the {o}, nobody knew.",
    "trade": "Asked about the trade of {p}, nobody knew.",
    "receiver": "When {y} asked who had been given the {o}, nobody knew.",
}


def state(scene, relation, fact):
    """A sentence that states a fact, in a way of the corpus or one with any verb."""
    ways = RELATIONS if scene.rng.random() < 0.5 else OPEN_RELATIONS
    return scene.write(scene.rng.choice(ways[relation][0]), **fact)


def come_back(scene, relation, fact):
    """A sentence that comes back to a fact."""
    ways = RELATIONS if scene.rng.random() < 0.7 else OPEN_RELATIONS
    return scene.write(scene.rng.choice(ways[relation][1]), **fact)


# Words that begin a sentence with a capital and are written small within one.
OPENERS = {*"the a an there it you we if somebody nobody only by yes then".split(), *words.PRONOUNS}
OPENERS |= {time.split()[0] for time in TIMES}


def joined(lines, rng, share=0.15):
    """The sentences, in this share of the cases the first two of them made into one: "Anna has the map, and Peter has the tickets."."""
    if len(lines) < 2 or rng.random() >= share:
        return lines
    first, second, *rest = lines
    if second.split()[0].lower() in OPENERS:
        second = second[0].lower() + second[1:]
    return [first.removesuffix(".") + rng.choice([" and ", ", and ", ", ", "; "]) + second, *rest]


def facts(scene):
    """One to four facts and each of them again, seldom with one that was not told."""
    rng = scene.rng
    relations = rng.sample(list(RELATIONS), rng.choice([1, 1, 2]))
    told = [relations[i % len(relations)] for i in range(rng.choice([1, 1, 2, 2, 3]))]
    told = [(relation, scene.fact(relation)) for relation in told]
    lines = joined([state(scene, *each) for each in told], rng, 0.3)
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines) + 1), free_sentence(scene) if rng.random() < 0.5 else scene.filler())
    again = [come_back(scene, *each) for each in rng.sample(told, len(told))]
    if rng.random() < 0.12:
        unknown = rng.choice(list(NOT_SAID))
        again.insert(rng.randrange(len(again) + 1), scene.write(NOT_SAID[unknown], **scene.fact(unknown)))
    if rng.random() < 0.2:
        return [("user", " ".join(lines)), ("assistant", " ".join(again[: rng.choice([1, 2])]))]
    return [(None, " ".join(lines + again))]


def deed(scene):
    """Something that somebody did, among other talk, and its parts again: in sentences, or as words between quotation marks."""
    rng = scene.rng
    happenings = [happening(scene) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    known = rng.random() < 0.2  # as the rest of the corpus tells it
    lines = [scene.filler() if rng.random() < 0.5 else aside(scene) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    for fact in happenings:
        ways = EVENTS if known else DEEDS[:4] if fact["p"] in FIRST_OR_MANY else DEEDS
        line = scene.write(rng.choice(ways), **fact)
        fact["v"] = as_told(fact["p"], line)
        lines.insert(rng.randrange(len(lines) + 1), line)
    if known or rng.random() < 0.45:
        return [(None, " ".join(lines + [scene.write(rng.choice(EVENT_BACK), **fact) for fact in happenings]))]
    back = [scene.write(rng.choice(DEED_BACK), **rng.choice(happenings)) for _ in range(rng.choice([1, 2, 2, 3]))]
    return [(None, " ".join(lines + back))]


def happening(scene):
    """Who did what with which thing and where."""
    drawn = scene.rng.random()
    who = scene.name()
    if drawn < 0.06:
        who = f"{scene.given_name()} and {scene.given_name()}"
    elif drawn < 0.14:
        who = scene.rng.choice(SOMEBODY)
    fact = {"p": who, "o": scene.object(), "l": scene.place(), "y": scene.name()}
    return {**fact, "v": fact["p"], "verb": scene.verb()}


def as_told(part, telling):
    """A part as it stands in the sentence that tells it, which may begin with it: "My sister"."""
    return sentence(part) if telling.startswith(f"{sentence(part)} ") else part


# --------------------------------------------------------------------------------------------
# Plain sentences, said and said again
# --------------------------------------------------------------------------------------------
SMALL_WORDS = """the the the a a to of and in is was for it I you we they he she that this my your not with on at but have has had are be
will can do very so all when if from by about up out what there no one two as or his her our its been who which would then now""".split()
SUBJECTS = {"I": "am", "you": "are", "we": "are", "they": "are", "he": "is", "she": "is", "it": "is"}
NEGATIONS = ["do not", "don't", "did not", "didn't", "can't", "cannot", "won't", "never"]
MODALS = ["will", "can", "must", "should", "would", "may", "want to", "have to", "need to", "would like to"]


def thing_said(scene):
    """A thing with its article: "a lamp", "my old lamp", "two lamps"."""
    thing = scene.object()
    if thing in scene.plurals:
        return (
            thing
            if thing.split()[0] in (*w.NUMBERS, *DIGITS)
            else f"{scene.rng.choice(['the', 'some', 'my', 'these'])} {thing}"
        )
    return f"{scene.rng.choice(['the', 'the', 'the', 'a', 'a', 'this', 'that', *words.PRONOUNS])} {thing}"


def free_sentence(scene):
    """A plain sentence of everyday life: one clause with any words."""
    rng = scene.rng
    drawn = rng.random()
    if drawn < 0.45:
        subject = rng.choice(list(SUBJECTS))
        be, third = SUBJECTS[subject], subject in ("he", "she", "it")
    else:
        subject = thing_said(scene) if drawn < 0.65 else scene.name()
        many = subject.split()[-1] in {plural.split()[-1] for plural in scene.plurals}
        be, third = ("are" if many else "is"), not many
    was = "was" if be in ("is", "am") else "were"
    verb = scene.verb()
    kind = rng.randrange(15)
    if kind == 0:
        said = f"{be} {rng.choice(['', 'very ', 'not ', 'so '])}{scene.quality()}"
    elif kind == 1:
        said = f"{was} {scene.quality()} and {scene.quality()}"
    elif kind == 2:
        said = f"{rng.choice([be, was])} {scene.place()}"
    elif kind == 3:
        said = f"{rng.choice([be, was])} a {scene.trade() if rng.random() < 0.5 else scene.word('things', w.OBJECTS)}"
    elif kind == 4:
        said = f"{'has' if third else 'have'} {thing_said(scene)}"
    elif kind == 5:
        said = f"{be} {verb.ing} {thing_said(scene)}"
    elif kind == 6:
        said = f"{verb.third if third else verb.base} {thing_said(scene)}"
    elif kind == 7:
        said = f"{rng.choice(MODALS)} {verb.base} {thing_said(scene)}"
    elif kind == 8:
        said = f"{rng.choice(NEGATIONS)} {verb.base} {thing_said(scene)}"
    elif kind == 9:
        said = f"{verb.past} {scene.given_name()} {scene.place()}"
    elif kind == 10:
        said = f"{rng.choice([*MODALS, *NEGATIONS[2:]])} {verb.base}"
    elif kind == 11:
        said = f"{rng.choice([verb.third if third else verb.base, verb.past])} {scene.place()}"
    else:
        said = f"{verb.past} {thing_said(scene)} {rng.choice([scene.place(), scene.place(), ''])}".strip()
    text = f"{subject} {said}"
    if kind == 12:
        text = f"there {rng.choice(['is', 'was'])} a {scene.word('things', w.OBJECTS)} {scene.place()}"
    elif kind == 13:
        who = f"{scene.given_name()} and {scene.given_name()}"
        text = f"{who} {rng.choice(['are', 'were'])} {rng.choice([scene.place, scene.quality])()}"
    if rng.random() < 0.2:
        text = f"{text} {rng.choice(TIMES)}" if rng.random() < 0.6 else f"{rng.choice(TIMES)} {text}"
    if rng.random() < 0.06:
        return sentence(
            f"{rng.choice(['is', 'was'])} {thing_said(scene)} {rng.choice([scene.place, scene.quality])()}?"
        )
    return sentence(f"{text}.")


def aside(scene):
    """A sentence in which nobody does anything with a thing, so that a happening beside it is the only one."""
    rng = scene.rng
    return rng.choice(
        [
            lambda: scene.write("The {x} was {y}.", x=scene.object(), y=scene.quality()),
            lambda: scene.write("{x} was {y}.", x=scene.name(), y=scene.quality()),
            lambda: scene.write("It was {y} {time}.", y=scene.quality()),
            lambda: scene.write("{x} is a {y}.", x=scene.name(), y=scene.trade()),
            lambda: scene.write("We were {l}.", l=scene.place()),
            lambda: scene.write("I am {y}.", y=scene.quality()),
        ]
    )()


def mixed_words(scene):
    """Small words and open ones in no order at all: whatever is typed can be said again."""
    rng = scene.rng
    drawn = []
    for _ in range(rng.choice([2, 3, 4, 5, 6, 7, 8])):
        kind = rng.random()
        verb = scene.verb()
        drawn.append(
            rng.choice(SMALL_WORDS)
            if kind < 0.4
            else rng.choice([scene.given_name, scene.object, scene.colour, scene.trade, scene.object])()
            if kind < 0.8
            else rng.choice([verb.base, verb.past, verb.third, verb.ing])
            if kind < 0.95
            else rng.choice(DIGITS)
        )
    return sentence(f"{' '.join(drawn)}.")


ECHOES = ["You say", "So", "I heard", "Yes", "Well", "Once more", "I repeat", "They say", "In other words"]


def echo(scene):
    """Sentences said again, after each other or at once, in quotation marks or without."""
    rng = scene.rng
    said = [(mixed_words if rng.random() < 0.25 else free_sentence)(scene) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
    bare = [text[:-1] for text in said]
    style = rng.randrange(7)
    if style == 0:
        return [(None, " ".join(said + said))]
    if style == 1:
        speaker = scene.name()
        return [(None, " ".join(f'{text}. "{text}," said {speaker}.' for text in bare))]
    if style == 2:
        return [(None, " ".join(f'"{text}." And again: {text}.' for text in bare))]
    if style in (3, 4):
        reply = f"{rng.choice(ECHOES)}: {bare[0]}{rng.choice(['.', ', yes.', ', they say.', ', of course.'])}"
        return [("user", " ".join(said)), ("assistant", reply)]
    if style == 5:
        return [("user", f"{rng.choice(ECHOES)}: {said[0]}"), ("assistant", said[0])]
    return [(None, " ".join(said + rng.sample(said, len(said))))]


# Words in quotation marks and after brackets, which begin with other tokens than words after a space.
QUOTED = [
    '"{a}" is written {a}.',
    'Write {a} as "{a}".',
    'The word {a} stands here: "{a}".',
    '{a} and {b}: "{a}", "{b}".',
    '"{a}", "{b}". That is {a} and {b}.',
    '{a}, {b}, {c}: ["{a}", "{b}", "{c}"].',
    "{a} ({b}), {c} ({a}), {b} ({c}).",
    '"{a}" ("{b}"), that is {a} and {b}.',
    '{b} and {a}. In the book: name "{b}"; note "{a}".',
    '{a} / {b} / {c}: "{c}", "{a}", "{b}".',
    'One word is "{a}", the other is {b}. Then "{b}" and {a}.',
    '{a} and {b}, {c}. {{"{a}": "{b}", "{c}": "{a}"}}',
    '{a}, {b}. "{b}": "{a}".',
    '{{"{a}": "{b}"}} is {a} and {b}.',
    'name: "{a}", note: "{b}". So {b} and {a}.',
]


def quoted(scene):
    """Words, names and places again between quotation marks or in brackets."""
    rng = scene.rng
    lines = []
    for _ in range(rng.choice([1, 2, 3])):
        draws = [scene.given_name, scene.name, scene.object, scene.object, scene.place, scene.quality]
        draws += [scene.trade, lambda: scene.verb().past, lambda: rng.choice(SOMEBODY)]
        a, b, c = (rng.choice(draws)() for _ in range(3))
        if rng.random() < 0.1:
            a, b = sentence(a), sentence(b)
        lines.append(rng.choice(QUOTED).format(a=a, b=b, c=c))
    return [(None, " ".join(lines))]


def casually(document, rng):
    """As people type: all in small letters, or without the last full stop, or with "'s" for "is"."""
    drawn = rng.random()
    if drawn < 0.06:
        return [(role, text.lower()) for role, text in document]
    if drawn < 0.10:
        return [(role, text.lower().replace(".", "")) for role, text in document]
    if drawn < 0.14:
        return [(role, text.removesuffix(".")) for role, text in document]
    if drawn < 0.20:
        return [
            (role, re.sub(r"(?<=\w) is (?=not |a |the |in |on |at |under )", "'s ", text)) for role, text in document
        ]
    return document


OPEN_MIX = {
    facts: 26,
    dense: 10,
    retold: 12,
    news: 3,
    rhyme: 6,
    deed: 20,
    echo: 16,
    quoted: 20,
    story: 3,
    letter: 1,
    notices: 1,
    talk: 4,
}


def open_document(world, rng):
    """A document with open vocabulary: a list of (role or None, text)."""
    kind = rng.choices(list(OPEN_MIX), weights=list(OPEN_MIX.values()))[0]
    scene = OpenScene(world, rng)
    scene.counts = kind is not story  # "There lay a golden lamp"
    return casually(kind(scene), rng)
