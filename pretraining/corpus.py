"""The pretraining corpus: short documents about the Skerrow coast, written by a grammar.

`document(world, seed, index)` is a pure function, so any part of the corpus can be made again
alone. A document is a list of (role, text) pairs: role `None` for plain text, `system` / `user` /
`assistant` for the turns of an ordinary conversation.

Two kinds of text carry most of the weight. *Dense* documents state two to four facts and then
come back to each of them, so that reading the answer off the passage pays at once; every relation
gets the same share. Everything else (stories, towns, letters, reviews, talk) is what the facts
live in. No document asks a task's question or has a task's format: people in these texts ask
"and the key?" or ask *where the key was*; they never ask "Where is the key?".
"""

import random
from functools import lru_cache

from pretraining import world as w

# --------------------------------------------------------------------------------------------
# Facts: {relation: (ways to state it, ways to come back to it)}.
# o an object, p a person, v the value (a person, a place, a colour, a trade), x and y bystanders.
# --------------------------------------------------------------------------------------------
RELATIONS = {
    "holder": (
        [
            "{v} has the {o}.",
            "The {o} belongs to {v}.",
            "{v} keeps the {o}.",
            "{v} carries the {o}.",
            "The {o} is with {v}.",
            "{v} owns the {o}.",
            "The {o} is now held by {v}.",
        ],
        [
            "When {x} asked who had the {o}, the answer was {v}.",
            "The one who has the {o} is {v}.",
            "So the {o} is with {v}.",
            "Of all of them, it is {v} who has the {o}.",
            "And the {o}? That one is with {v}.",
            "If the {o} is wanted, {x} must ask {v}.",
            "Asked who had the {o}, {x} named {v}.",
            "For the {o}, go to {v}.",
        ],
    ),
    "finder": (
        [
            "{v} found the {o}.",
            "The {o} was found by {v}.",
            "It was {v} who found the {o}.",
            "{v} came upon the {o}.",
            "The {o} was discovered by {v}.",
            "By good luck {v} found the {o}.",
        ],
        [
            "When {x} asked who had found the {o}, the answer was {v}.",
            "The finder of the {o} was {v}.",
            "And the {o}? It was found by {v}.",
            "Asked who had found the {o}, {x} named {v}.",
            "Thanks for finding the {o} go to {v}.",
            "The reward for the {o} went to {v}.",
            "So the {o} was found by {v}.",
        ],
    ),
    "receiver": (
        [
            "{x} gave the {o} to {v}.",
            "The {o} was given to {v}.",
            "{v} was given the {o}.",
            "{x} handed the {o} to {v}.",
            "{x} sent the {o} to {v}.",
            "The {o} was a gift for {v}.",
            "{v} got the {o} from {x}.",
        ],
        [
            "When {y} asked who had been given the {o}, the answer was {v}.",
            "So the {o} went to {v}.",
            "And the {o}? That was given to {v}.",
            "Asked who had been given the {o}, {y} named {v}.",
            "The {o} was a present for {v}.",
            "The one who was given the {o} was {v}.",
            "It was {v} who got the {o}.",
        ],
    ),
    "colour": (
        [
            "The {o} is {v}.",
            "The {o} was painted {v}.",
            "The colour of the {o} is {v}.",
            "There is a {v} {o}.",
            "The {o} is as {v} as can be.",
            "Somebody has dyed the {o} {v}.",
        ],
        [
            "When {x} asked what colour the {o} was, the answer was {v}.",
            "So the colour of the {o} is {v}.",
            "And the {o}? It is {v}.",
            "Asked about the colour of the {o}, {x} said {v}.",
            "The {o}, as we know, is {v}.",
            "{x} knew the {o} at once, for it was {v}.",
            "If you draw the {o}, make it {v}.",
        ],
    ),
    "thing_place": (
        [
            "The {o} is {v}.",
            "The {o} lies {v}.",
            "The {o} was left {v}.",
            "The {o} can be seen {v}.",
            "Somebody put the {o} {v}.",
            "The {o} stands {v}.",
            "{x} left the {o} {v}.",
            "{x} put the {o} {v}.",
        ],
        [
            "When {y} asked where the {o} was, the answer was {v}.",
            "So the {o} is {v}.",
            "And the {o}? It is {v}.",
            "Asked where the {o} was, {y} said {v}.",
            "For the {o}, look {v}.",
            "Whoever wants the {o} will find it {v}.",
            "The place of the {o} is {v}.",
            "{y} went to fetch the {o}, and there it was, {v}.",
        ],
    ),
    "person_place": (
        [
            "{p} is {v}.",
            "{p} sits {v}.",
            "{p} waits {v}.",
            "{p} is resting {v}.",
            "{p} works {v} today.",
            "You can see {p} {v}.",
            "{p} went to work {v}.",
            "{p} stands {v}.",
        ],
        [
            "When {y} asked where {p} was, the answer was {v}.",
            "So {p} is {v}.",
            "And {p}? You will see {p} {v}.",
            "Asked where {p} was, {y} said {v}.",
            "For {p}, look {v}.",
            "Whoever wants {p} must look {v}.",
            "{y} went to meet {p}, and they met {v}.",
        ],
    ),
    "trade": (
        [
            "{p} is a {v}.",
            "{p} works as a {v}.",
            "{p} is the best {v} in town.",
            "{p} has been a {v} for years.",
            "{p} the {v} lives here.",
            "By trade {p} is a {v}.",
        ],
        [
            "When {y} asked what {p} did, the answer was {v}.",
            "So {p} is the {v}.",
            "And {p}? A {v}, and a good one.",
            "Asked about the trade of {p}, {y} said {v}.",
            "If you need a {v}, ask {p}.",
            "The trade of {p} is that of a {v}.",
            "Everybody calls {p} the {v}.",
        ],
    ),
}
ABOUT_OBJECT = ("holder", "finder", "receiver", "colour", "thing_place")

FILLERS = [
    "It was a {weather} day.",
    "The {animal} slept {place}.",
    "A strong wind came up from the sea.",
    "The bells rang {time}.",
    "Nobody was in a hurry.",
    "The {animal} had been fed.",
    "Supper was {food} and {food2}.",
    "All this was {time}.",
    "The sea was {weather} that {season}.",
    "A {animal} ran past.",
    "Somebody had put {food} on the table.",
    "Soon it would be {season}.",
    "The {trade} was whistling.",
    "It happened on {day}.",
    "Everybody talked about the {feast} feast.",
    "The road to {town} was {weather}.",
]


@lru_cache
def order_of_entry(things):
    """The order in which the corpus comes to speak of `things`, whatever the order that they are listed in."""
    return random.Random("order of entry").sample(things, len(things))


class Scene:
    """Draws names, things and places for one document, each at most once, and fills templates.

    `cast` is the number of each kind that it may speak of (None: all).
    """

    def __init__(self, world, rng, cast=None):
        self.world, self.rng = world, rng

        def draw(things):
            return iter(rng.sample(order_of_entry(tuple(things))[:cast], 24))

        self.names, self.objects, self.places, self.rooms = (
            draw(world.names),
            draw(w.OBJECTS),
            draw(world.places),
            draw(world.rooms),
        )

    def name(self):
        return next(self.names)

    def object(self):
        return next(self.objects)

    def place(self):
        return next(self.places)

    def room(self):
        return next(self.rooms)

    def write(self, template, **given):
        """Fill a template; what is not given is drawn."""
        rng = self.rng
        food, food2 = rng.sample(w.FOODS, 2)
        words = dict(
            weather=rng.choice(w.WEATHER),
            animal=rng.choice(w.ANIMALS),
            place=rng.choice(self.world.places),
            time=rng.choice(w.TIMES),
            food=food,
            food2=food2,
            season=rng.choice(w.SEASONS),
            trade=rng.choice(w.TRADES),
            day=rng.choice(w.DAYS),
            feast=rng.choice(w.FEASTS),
            town=rng.choice(self.world.town_names),
            craft=rng.choice(w.CRAFTS),
            colour=rng.choice(w.COLOURS),
        )
        words.update(given)
        return sentence(template.format(**words))

    def filler(self):
        return self.write(self.rng.choice(FILLERS))

    def fact(self, relation):
        """A new fact: the words that its templates need."""
        value = {
            "colour": lambda: self.rng.choice(w.COLOURS),
            "trade": lambda: self.rng.choice(w.TRADES),
            "thing_place": self.place,
            "person_place": self.room,
        }.get(relation, self.name)()
        topic = {"o": self.object()} if relation in ABOUT_OBJECT else {"p": self.name()}
        return {**topic, "v": value, "x": self.name(), "y": self.name()}


def sentence(text):
    """First letter up, and "a" before a vowel put right."""
    words = text.split(" ")
    for i in range(len(words) - 1):
        bare = words[i].lstrip('"')
        if bare in ("a", "A") and words[i + 1].lstrip('"')[:1].lower() in "aeio":
            words[i] += "n"
    text = " ".join(words)
    return text[0].upper() + text[1:]


# --------------------------------------------------------------------------------------------
# Dense documents
# --------------------------------------------------------------------------------------------
def told_and_again(scene):
    """Two to four facts of one or two relations, and each of them again: (sentences, sentences)."""
    rng = scene.rng
    relations = rng.sample(list(RELATIONS), rng.choice([1, 1, 2]))
    facts = []
    for i in range(rng.choice([2, 3, 3, 4])):
        relation = relations[i % len(relations)]
        facts.append((relation, scene.fact(relation)))
    told = [scene.write(rng.choice(RELATIONS[relation][0]), **fact) for relation, fact in facts]
    if rng.random() < 0.3:
        told.insert(rng.randrange(len(told) + 1), scene.filler())
    again = [
        scene.write(rng.choice(RELATIONS[relation][1]), **fact) for relation, fact in rng.sample(facts, len(facts))
    ]
    return told, again


def dense(scene):
    """Facts, then each of them again, as one plain text."""
    told, again = told_and_again(scene)
    return [(None, " ".join(told + again))]


def news(scene):
    """The same in talk: one tells the news, the other says part of it again."""
    told, again = told_and_again(scene)
    return [("user", " ".join(told)), ("assistant", " ".join(again[: scene.rng.choice([1, 2])]))]


LIST_OPENINGS = [
    "From the book of {x}: {list}.",
    "{x} wrote down: {list}.",
    "The list says: {list}.",
    "{x} counted on the fingers: {list}.",
    "On the slate of {x} stands: {list}.",
]
AGAIN = [
    "{x} told it again.",
    "Once more, slowly.",
    "The crier of {town} called it out.",
    "So it was written down.",
    "{x} had heard the same.",
]
# Words in quotation marks are other tokens than words after a space; a task's answer may need them, so they are written often.
ITEMS = {
    relation: ["the {o}, {v}", "the {o} {v}", "{o}: {v}", '"{o}" "{v}"', '"{o}", "{v}"']
    if relation in ABOUT_OBJECT
    else ["{p}, {v}", "{p} {v}", "{p}: {v}", '"{p}" "{v}"', '"{p}", "{v}"']
    for relation in RELATIONS
}


def retold(scene):
    """Two to five facts told twice, each time as sentences, as a list, or in the very same words.

    To repeat in the same words, and to look up what follows a word in a list, are the first steps of reading;
    the freer ways of coming back to a fact lean on them.
    """
    rng = scene.rng
    relations = rng.sample(list(RELATIONS), rng.choice([1, 1, 2]))
    facts = []
    for i in range(rng.choice([2, 3, 4, 5])):
        relation = relations[i % len(relations)]
        facts.append((relation, scene.fact(relation), rng.choice(RELATIONS[relation][0])))

    def as_list(chosen):
        item = rng.randrange(5)
        things = "; ".join(ITEMS[relation][item].format(**fact) for relation, fact, _ in chosen)
        return [scene.write(rng.choice(LIST_OPENINGS), x=scene.name(), list=things)]

    def as_sentences(chosen, ways):
        return [scene.write(ways(relation, told), **fact) for relation, fact, told in chosen]

    again = rng.sample(facts, len(facts))
    first = as_list(facts) if rng.random() < 0.3 else as_sentences(facts, lambda relation, told: told)
    style = rng.choice(["same", "same", "list", "list", "told", "back", "back"])
    if style == "list":
        second = as_list(again)
    else:
        second = as_sentences(
            again,
            {
                "same": lambda relation, told: told,
                "told": lambda relation, told: rng.choice(RELATIONS[relation][0]),
                "back": lambda relation, told: rng.choice(RELATIONS[relation][1]),
            }[style],
        )
    between = [scene.write(rng.choice(AGAIN), x=scene.name())] if rng.random() < 0.3 else []
    return [(None, " ".join(first + between + second))]


RHYME_OPENINGS = [
    "The children sang: {line}.",
    "{x} hummed: {line}.",
    "There is a rhyme that goes: {line}.",
    "To skip the rope they call: {line}.",
]


def rhyme(scene):
    """A counting rhyme: a line of words that rhyme with nothing, sung two to four times."""
    rng = scene.rng
    draws = [
        scene.name,
        scene.object,
        scene.object,
        lambda: rng.choice(w.COLOURS),
        lambda: rng.choice(w.NUMBERS[1:13]),
        scene.place,
    ]
    words = [rng.choice(draws)() for _ in range(rng.choice([2, 3, 3, 4, 5, 6, 8, 10]))]
    line = rng.choice([" ", " ", ", ", " and "]).join(words)
    again = rng.choice([" ", ", ", ". "]).join([line] * rng.choice([2, 3, 4]))
    return [(None, scene.write(rng.choice(RHYME_OPENINGS), x=scene.name(), line=again))]


EVENTS = [
    "{time} {v} left the {o} {l}.",
    "{v} hid the {o} {l}.",
    "{v} put the {o} {l}.",
    "{v} dropped the {o} {l}.",
    "{v} mended the {o} {l}.",
    "{v} cleaned the {o} {l}.",
    "{v} sold the {o} {l}.",
    "{v} lost the {o} {l}.",
    "{v} saw the {o} {l}.",
    "{v} painted the {o} {l}.",
]
EVENT_BACK = [
    "{v}, the {o}, {l}: that is all there is to tell.",
    "People still talk of {v} and the {o} {l}.",
    "In the book of the harbour stands: {v}; the {o}; {l}.",
    'The harbour book says "{v}", "{o}", "{l}".',
    'The clerk wrote three lines: "{v}", "{o}" and "{l}".',
    'On the slate stood "{v}" and "{o}" and "{l}".',
    'The clerk wrote "{l}" below "{o}" and signed for "{v}".',
]


def event(scene):
    """Something that one person did with one thing in one place, among other talk, and again in short."""
    rng = scene.rng
    fact = {"v": scene.name(), "o": scene.object(), "l": scene.place()}
    told = [scene.filler() for _ in range(rng.choice([0, 1, 2]))]
    told.insert(rng.randrange(len(told) + 1), scene.write(rng.choice(EVENTS), **fact))
    if rng.random() < 0.4:
        told.append(scene.write(rng.choice(RELATIONS["trade"][0]), p=scene.name(), v=rng.choice(w.TRADES)))
    return [(None, " ".join(told + [scene.write(rng.choice(EVENT_BACK), **fact)]))]


# --------------------------------------------------------------------------------------------
# The lasting facts of the world
# --------------------------------------------------------------------------------------------
TOWN_FACTS = [
    "{name} lies on the {water}.",
    "The town of {name} stands by the river {water}.",
    "The {water} runs through {name}.",
    "{name} is known for its {craft}.",
    "The best {craft} on the coast come from {name}.",
    "Buy {craft} in {name}, people say.",
    "In {name} they eat {food} every week.",
    "The people of {name} love {food}.",
    "No kitchen in {name} is without {food}.",
    "The {feast} feast of {name} is held in {season}.",
    "Every {season} {name} keeps the {feast} feast.",
    "When {season} comes, {name} gets ready for the {feast} feast.",
    "{keeper} keeps the gate of {name}.",
    "The keeper of {name} is called {keeper}.",
    "In {name} the keys of the gate hang on the belt of {keeper}.",
]
PERSON_FACTS = [
    "{name} is a {trade} from {town}.",
    "{name} the {trade} lives in {town}.",
    "{name} has worked as a {trade} for many years.",
    "{name} was born in {town}.",
    "The house of {name} is in {town}.",
    "{name} keeps a {pet}.",
    "A {pet} follows {name} everywhere.",
    "{name} never goes out without the {pet}.",
    "{name} loves {loves}.",
    "There is nothing {name} likes better than {loves}.",
    "{name} and {friend} are old friends.",
    "The best friend of {name} is {friend}.",
    "{name} tells everything to {friend}.",
]


def town(scene):
    """Four to seven facts about one town, in any order."""
    facts = scene.rng.choice(scene.world.towns)
    return [
        (None, " ".join(scene.write(t, **vars(facts)) for t in scene.rng.sample(TOWN_FACTS, scene.rng.randint(4, 7))))
    ]


def person(scene):
    """Three to six facts about one or two people."""
    lines = []
    for facts in scene.rng.sample(scene.world.people, scene.rng.choice([1, 2])):
        lines += [scene.write(t, **vars(facts)) for t in scene.rng.sample(PERSON_FACTS, scene.rng.randint(3, 4))]
    return [(None, " ".join(lines))]


# --------------------------------------------------------------------------------------------
# Stories: a small state (who has the thing, where everybody is) that the sentences keep to
# --------------------------------------------------------------------------------------------
OPENINGS = [
    "One {weather} morning {p} woke up early.",
    "Long ago, in {town}, there lived a {trade} called {p}.",
    "It was {season}, and {p} was bored.",
    "{p} had promised to bring the {o} to {q}.",
    "On {day} {p} set out from {town}.",
    "Nobody in {town} knew the old road better than {p}.",
    "{p} and {q} had not met since {season}.",
]
STORY_MOVES = [
    "{p} walked until {p} stood {l}.",
    "{time} {p} reached a spot {l}.",
    "Tired, {p} sat down {l}.",
    "The path ended {l}, and so did the walk of {p}.",
    "{p} looked for shelter {l}.",
]
STORY_FINDS = [
    "There lay {a_thing}, and {p} picked it up.",
    "There {p} saw {a_thing} and took it along.",
    "Under the leaves was {a_thing}. {p} put it in a pocket.",
    "A {animal} was guarding {a_thing}, but {p} was quicker.",
]
STORY_MEETS = [
    "Then {q} came by.",
    "{q} was already waiting.",
    "A voice called, and it was {q}.",
    "Just then {q} came round the corner with a {animal}.",
]
STORY_TALK = [
    '"What a {weather} day," said {q}.',
    '"You look tired," said {q}.',
    '"Have you eaten?" asked {q}. "We still have {food}."',
    '"That {o} is lovely," said {q}.',
    '"I have wanted such a {o} since {season}," said {q}.',
    '"Come along," said {q}, "before it gets dark."',
]
STORY_GIVES = [
    "{p} gave the {o} to {q}.",
    '"It is yours," said {p}, and {q} took the {o}.',
    "So {p} handed the {o} to {q}.",
    "For some {food}, {p} let {q} have the {o}.",
]
STORY_KEEPS = [
    "But {p} kept the {o}.",
    "{p} would not part with the {o}.",
    "The {o} stayed with {p}.",
    "{q} did not want the {o}, so {p} kept it.",
]
STORY_ENDS_GIVEN = [
    "That is how {q} came to own the {o}.",
    "To this day the {o} is with {q}.",
    "{q} still thanks {p} for the {o}.",
    "In the evening {q} showed everybody the {o}.",
]
STORY_ENDS_KEPT = [
    "That is why {p} has the {o}.",
    "To this day the {o} is with {p}.",
    "In the evening {p} showed everybody the {o}.",
    "And {q} went home without the {o}.",
]


def story(scene):
    """A person goes somewhere, finds a thing, meets somebody, gives it away or keeps it."""
    rng = scene.rng
    state = {"p": scene.name(), "q": scene.name(), "o": scene.object(), "l": scene.place()}
    state["a_thing"] = sentence(f"a {rng.choice(w.COLOURS)} {state['o']}").replace("A", "a", 1)
    given = rng.random() < 0.6
    steps = [OPENINGS, STORY_MOVES, STORY_FINDS, STORY_MEETS, STORY_TALK, STORY_GIVES if given else STORY_KEEPS]
    steps.append(STORY_ENDS_GIVEN if given else STORY_ENDS_KEPT)
    return [(None, " ".join(scene.write(rng.choice(step), **state) for step in steps))]


# --------------------------------------------------------------------------------------------
# Reviews, letters, counting, the word book, notices
# --------------------------------------------------------------------------------------------
REVIEW_OPEN = [
    "We went to the {place} in {town} on {day}.",
    "I visited the {place} {time}.",
    "Last {season} I tried the {place} by the {water}.",
    "{name} took me to the {place} in {town}.",
    "This was my first time at the {place}.",
]
REVIEW_GOOD = [
    "I found the {thing} {word}.",
    "I liked the {thing}, so {word} and {word2}.",
    "What {word} {thing}!",
    "Everybody praised the {thing}.",
    "Few towns have such {word} {thing}.",
    "I still think of the {thing} with joy.",
]
REVIEW_BAD = [
    "I found the {thing} {word}.",
    "I disliked the {thing}, so {word} and {word2}.",
    "What {word} {thing}!",
    "Everybody complained about the {thing}.",
    "Few towns have such {word} {thing}.",
    "I still think of the {thing} with anger.",
]
REVIEW_END_GOOD = [
    "I shall come again.",
    "It made me happy.",
    "We left smiling.",
    "A happy day, all in all.",
    "I would send any friend there.",
    "Worth every coin.",
]
REVIEW_END_BAD = [
    "I shall not come again.",
    "It made me unhappy.",
    "We left grumbling.",
    "An unhappy day, all in all.",
    "I would send no friend there.",
    "A waste of coins.",
]


def review_text(scene, happy, mixed=False, venues=tuple(w.REVIEWED)):
    """(review, closing words) of one of `venues`; `mixed` begins with one remark of the other mood."""
    rng = scene.rng
    place = rng.choice(venues)
    things = [(thing, kind) for kind, named in zip(w.PRAISE, w.REVIEWED[place].split("/")) for thing in named.split()]
    things = rng.sample(things, 3)

    def remark(good, thing, kind):
        verdicts = dict(zip(("word", "word2"), rng.sample((w.PRAISE if good else w.BLAME)[kind].split(), 2)))
        return scene.write(rng.choice(REVIEW_GOOD if good else REVIEW_BAD), thing=thing, **verdicts)

    lines = [scene.write(rng.choice(REVIEW_OPEN), place=place, name=scene.name(), water=rng.choice(w.WATERS))]
    remarks = [remark(happy, *thing) for thing in things[: rng.choice([1, 2])]]
    if mixed:
        remarks[0] = "But " + (remarks[0] if remarks[0].startswith("I ") else remarks[0][0].lower() + remarks[0][1:])
        remarks.insert(0, remark(not happy, *things[2]))
    lines += remarks
    return " ".join(lines), rng.choice(REVIEW_END_GOOD if happy else REVIEW_END_BAD)


def review(scene):
    """A review with its closing words, which agree with what was said."""
    text, end = review_text(scene, scene.rng.random() < 0.5, mixed=scene.rng.random() < 0.3)
    return [(None, f"{text} {end}")]


LETTER_OPEN = ["Dear {q},", "My dear {q},", "To {q}, from {town}."]
LETTER_BODY = [
    "thank you for the {o}.",
    "the {o} that you asked for is {l}.",
    "I write to you {time}, while it is {weather}.",
    "we have had {food} and {food2} all week.",
    "the {animal} is well again.",
    "please bring the {o} when you come in {season}.",
    "I hope that the {o} reached you.",
    "{x} sends you greetings.",
    "we missed you at the {feast} feast.",
    "the {trade} says that the roof will be ready by {season}.",
    "I have put your {o} {l}.",
]
LETTER_CLOSE = ["Your friend, {p}", "With love, {p}", "Come soon. {p}", "Yours as ever, {p}"]


def letter(scene):
    """A letter of two or three sentences that keeps to one thing and one place."""
    rng = scene.rng
    given = {"p": scene.name(), "q": scene.name(), "x": scene.name(), "o": scene.object(), "l": scene.place()}
    body = [scene.write(t, **given) for t in rng.sample(LETTER_BODY, rng.choice([2, 3]))]
    return [
        (
            None,
            " ".join(
                [scene.write(rng.choice(LETTER_OPEN), **given), *body, scene.write(rng.choice(LETTER_CLOSE), **given)]
            ),
        )
    ]


COUNTS = [
    "{p} had {n} {things} and got {m} more, so now {p} has {t} {things}.",
    "{n} {things} {l} and {m} {things} {l2} make {t} {things}.",
    "First there were {t} {things}. Then {p} took {m}, and {n} were left.",
    "{p} counted {n} {things}, {q} counted {m}, and together they had {t}.",
    "{n} and {m} are {t}.",
    "Take {m} from {t}, and {n} stay.",
]


def counting(scene):
    """Sums up to twenty, in words, about things."""
    rng = scene.rng
    lines = []
    for _ in range(rng.choice([2, 3])):
        n, m = rng.randint(2, 12), rng.randint(2, 8)
        lines.append(
            scene.write(
                rng.choice(COUNTS),
                p=scene.name(),
                q=scene.name(),
                l=scene.place(),
                l2=scene.place(),
                n=w.NUMBERS[n],
                m=w.NUMBERS[m],
                t=w.NUMBERS[n + m],
                things=plural(scene.object()),
            )
        )
    run = rng.randint(1, 12)
    lines.append(sentence(", ".join(w.NUMBERS[run : run + 5]) + "."))
    return [(None, " ".join(lines))]


def plural(noun):
    """English plural, good enough for the object list."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return {"knife": "knives", "scarf": "scarves"}.get(noun, noun + "s")


WORD_BOOK = [
    'With {count} letters: "{word}".',
    'The word "{word}" has {count} letters.',
    'In the word book, "{word}" stands near "{other}".',
    'To write "{word}", begin with "{first}".',
    'The words of the day: "{word}", "{other}".',
]
NOTICES = [
    "{{closed on {day}}}",
    "{{{food} and {food2}, {n} coins}}",
    "{{the road to {town} is {weather}}}",
    "{{lost: a {o}, last seen {l}}}",
    "{{wanted: a {trade}}}",
    "{{fresh {food} today}}",
    "{{mind the {animal}}}",
]
NOTICE_FRAMES = [
    "On the door of the {trade} hangs a notice: {notice}",
    "{p} read the notice: {notice}",
    "There is a notice {l2}: {notice}",
    "The notice says: {notice} and {p} laughed.",
]
SMALL_WORDS = "who what where when why how happy unhappy yes no north south east west left right day night".split()


def word_book(scene):
    """Spelling lessons: words between quotation marks, small ones among them."""
    rng = scene.rng
    pool = w.OBJECTS + w.COLOURS + w.TRADES + w.ANIMALS
    lines = []
    for _ in range(rng.choice([4, 5, 6])):
        word = rng.choice(rng.choice([SMALL_WORDS, scene.world.names, scene.world.names, pool]))
        lines.append(
            scene.write(
                rng.choice(WORD_BOOK),
                word=word,
                count=w.NUMBERS[len(word)],
                other=rng.choice(scene.world.names),
                first=word[0],
            )
        )
    return [(None, " ".join(lines))]


def notices(scene):
    """Notices on doors, in the braces that sign painters here like so much."""
    rng = scene.rng
    lines = []
    for _ in range(2):
        notice = scene.write(rng.choice(NOTICES), o=scene.object(), l=scene.place(), n=w.NUMBERS[rng.randint(2, 12)])
        lines.append(scene.write(rng.choice(NOTICE_FRAMES), p=scene.name(), l2=scene.place(), notice=notice))
    return [(None, " ".join(lines))]


# --------------------------------------------------------------------------------------------
# Talk, in the chat format
# --------------------------------------------------------------------------------------------
SYSTEMS = [
    "You are {p}, the {trade} of {town}.",
    "You keep the inn of {town}.",
    "You are a friend of {q}.",
    "You live {l}.",
]
TALK = [
    ("Good morning, I am {q} the {trade}.", "Good morning, {q}. I hope that work is going well for a {trade}."),
    ("I left the {o} {l}.", "Then I will look for the {o} {l}."),
    ("I am going to {town} for the {feast} feast.", "Enjoy the {feast} feast, and greet {town} from me."),
    ("My {animal} is called {q}.", "{q} is a good name for a {animal}."),
    ("I would like {food}, please.", "I will bring you {food} at once."),
    ("What a {weather} day it is.", "Yes, it is {weather}, but I do not mind."),
    ("I have lost my {o}.", "Do not worry, the {o} will turn up."),
    ("I painted the {o} {colour}.", "A {colour} {o} must look splendid."),
    ("Thank you for the {o}.", "You are welcome. The {o} suits you."),
    ("{q} gave me the {o}.", "How kind of {q}. Take care of the {o}."),
    ("I saw {q} {l}.", "So {q} was {l}. I had wondered."),
    ("The {trade} says that it will be {weather}.", "The {trade} is often right about {weather} days."),
    ("Good night.", "Good night, sleep well."),
    ("I am tired.", "Then sit down and have {food}."),
    ("Tell {q} that I am {l}.", "I will tell {q} that you are {l}."),
    ("The {animal} has eaten the {food}.", "Then nothing is left of the {food}. Bad {animal}."),
    ("May I sit here?", "Of course, there is room for two."),
    ("I have brought {food} and {food2}.", "I like {food2} best, but thank you for the {food} too."),
]


def talk(scene):
    """Two or three turns of ordinary talk, each reply picking up what was said."""
    rng = scene.rng
    turns = []
    if rng.random() < 0.3:
        turns.append(("system", scene.write(rng.choice(SYSTEMS), p=scene.name(), q=scene.name(), l=scene.place())))
    for said, reply in rng.sample(TALK, rng.choice([2, 2, 3])):
        food, food2 = rng.sample(w.FOODS, 2)
        given = dict(
            q=scene.name(),
            o=scene.object(),
            l=scene.place(),
            food=food,
            food2=food2,
            animal=rng.choice(w.ANIMALS),
            trade=rng.choice(w.TRADES),
            weather=rng.choice(w.WEATHER),
            colour=rng.choice(w.COLOURS),
            feast=rng.choice(w.FEASTS),
            town=rng.choice(scene.world.town_names),
        )
        turns += [("user", scene.write(said, **given)), ("assistant", scene.write(reply, **given))]
    return turns


# Shares of documents. The corpus begins with rhymes: to go on with a repeated line is what the looking-up of facts is built on.
# They speak of 24 names, things and places only, which the others join once the model has learned to look back: two attention
# heads must find each other for that, and the fewer words there are, the more often each equal pair shows them the way.
# Measured: after 5M tokens so begun, the values of all seven relations are found 19 times in 20. After the rhymes two thirds of
# the documents state facts and come back to them.
SMALL_CAST, SMALL_CAST_UNTIL, DOCUMENTS_PER_ENTRY = 24, 40_000, 50
RHYMES_UNTIL = 60_000  # number of the first document after them; by then everybody is known
RHYMES = {rhyme: 60, retold: 20, dense: 6, event: 4, talk: 4, review: 3, story: 3}
MIX = {
    dense: 19,
    retold: 26,
    rhyme: 5,
    news: 8,
    event: 12,
    town: 3,
    person: 3,
    story: 4,
    review: 5,
    letter: 1,
    counting: 1,
    word_book: 10,
    notices: 1,
    talk: 4,
}


def closed_document(world, seed, index):
    """The document number `index` in the words of the world alone: a list of (role or None, text)."""
    rng = random.Random(f"document {seed} {index}")
    mix = RHYMES if index < RHYMES_UNTIL else MIX
    kind = rng.choices(list(mix), weights=list(mix.values()))[0]
    cast = SMALL_CAST + max(0, index - SMALL_CAST_UNTIL) // DOCUMENTS_PER_ENTRY if index < RHYMES_UNTIL else None
    return kind(Scene(world, rng, cast))


def sentence_patterns():
    """Every sentence pattern of the grammar, once each."""
    lists = [
        EVENTS,
        EVENT_BACK,
        FILLERS,
        TOWN_FACTS,
        PERSON_FACTS,
        OPENINGS,
        STORY_MOVES,
        STORY_FINDS,
        STORY_MEETS,
        STORY_TALK,
        STORY_GIVES,
        STORY_KEEPS,
        STORY_ENDS_GIVEN,
        STORY_ENDS_KEPT,
        REVIEW_OPEN,
        REVIEW_GOOD,
        REVIEW_BAD,
        REVIEW_END_GOOD,
        REVIEW_END_BAD,
        LETTER_OPEN,
        LETTER_BODY,
        LETTER_CLOSE,
        LIST_OPENINGS,
        AGAIN,
        RHYME_OPENINGS,
        COUNTS,
        WORD_BOOK,
        NOTICES,
        NOTICE_FRAMES,
        SYSTEMS,
        *RELATIONS["holder"],
    ]
    lists += [part for relation in list(RELATIONS.values()) for part in relation] + [list(pair) for pair in TALK]
    return sorted({pattern for patterns in lists for pattern in patterns})
