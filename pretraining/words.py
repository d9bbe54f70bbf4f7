"""Open vocabulary: lists of common words, a fifth of each held out of everything that is trained on.

The lists lie in `words/`, in plain text. A word is followed by its irregular forms after slashes: a noun by its plural ("-"
for none), a verb by its past tense and its participle. Whether a word is held out depends on its spelling alone, so
"watch", the noun and the verb, is held out from both lists or from neither.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pretraining import world as w

FOLDER = Path(__file__).parent / "words"
HELD_OUT_ONE_IN = 5
# Prepositions of a place that has none of its own; "of" marks towns and lands.
PLACE_KINDS = ("in", "on", "of")
# What the other text says of people and things anyway, so it can't be held out.
PRONOUNS = "my your his her our their".split()
KIN = """mother father mum mom dad sister brother aunt uncle cousin niece nephew grandma grandpa grandmother grandfather wife husband son
daughter boss friend flatmate colleague girlfriend boyfriend""".split()
EVERYDAY_VERBS = "count enjoy follow like stow send/sent/sent"

ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr q qu r s sc sh sk sl sm sn sp st str t th tr v w wh x y z".split()
VOWELS = "a e i o u a e i o u ai au ea ee ei ia ie io oa oo ou ue y".split()
ACCENTS = [
    ("a", "á"),
    ("e", "é"),
    ("o", "ö"),
    ("u", "ü"),
    ("n", "ñ"),
    ("a", "å"),
    ("c", "ç"),
    ("s", "ş"),
    ("i", "í"),
    ("e", "è"),
]
CODAS = "b ck d ff g k l ll m n nd ng nk nt p r rd rk rn rt s sh ss st t th x z".split()

RUDE = re.compile(
    "shit|fuc|fuk|cunt|nig|fag|rape|dick|cock|puss|slut|whor|tit|piss|arse|ass$|anus|penis|nazi|sex|porn|cum|wank|poo"
)


@dataclass(frozen=True)
class Verb:
    """A verb and its forms: to park, parks, parked, (has) parked, parking."""

    base: str
    third: str
    past: str
    participle: str
    ing: str


def plural(noun):
    """English plural by rule."""
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def conjugate(base, past=None, participle=None):
    """The forms of a verb, regular as far as none is given."""
    # One short vowel before one last consonant: it is doubled ("chop", "unwrap"; not "open").
    stem = base + base[-1] if re.fullmatch("(un|re)?[^aeiou]*[aeiou][^aeiouwxy]", base.replace("qu", "q")) else base
    ends_in_y = re.search("[^aeiou]y$", base)
    ing = (base[:-2] + "y" if base.endswith("ie") else base[:-1] if re.search("[^eoy]e$", base) else stem) + "ing"
    past = past or (base[:-1] + "ied" if ends_in_y else base + "d" if base.endswith("e") else stem + "ed")
    return Verb(base, plural(base), past, participle or past, ing)


def read(name):
    """The entries of a list in `words/`, each as (word, irregular forms...); lines that begin with # are headings."""
    lines = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(entry.split("/")) for line in lines if not line.startswith("#") for entry in line.split()]


def is_held_out(word):
    """Whether a word of a list is kept from all text that is trained on."""
    return int(hashlib.sha1(word.lower().encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


@cache
def vocabulary():
    """{split: {list: entries}} for the splits "train" and "held".

    Entries are strings; of `verbs` they are `Verb`s, and `plurals` has those of the nouns. A held-out word that is spelled
    like a form of another word in training ("leaves") belongs to neither.
    """
    lists = {name: [entry[0] for entry in read(name)] for name in ("names", "trades", "colours")}
    lists["things"] = [entry[0] for entry in read("nouns")]
    kind = None
    for name in PLACE_KINDS:
        lists[name] = []
    for (word,) in read("places"):
        kind = word[:-1] if word.endswith(":") else kind
        lists[kind] += [] if word.endswith(":") else [word]
    verbs = {entry[0]: conjugate(*entry) for entry in read("verbs")}
    everyday = [conjugate(*entry.split("/")) for entry in EVERYDAY_VERBS.split()]
    lists["verbs"] = list(verbs)
    plurals = {entry[0]: entry[1] if entry[1:] else plural(entry[0]) for entry in read("nouns") if entry[1:] != ("-",)}
    forms = {word: {plurals.get(word, word)} for words in lists.values() for word in words}
    for base, verb in verbs.items():
        forms[base] |= {verb.third, verb.past, verb.participle, verb.ing}
    trained = {form.lower() for word in forms if not is_held_out(word) for form in (word, *forms[word])}

    def in_split(word, split):
        if split == "train":
            return not is_held_out(word)
        return is_held_out(word) and not any(form.lower() in trained for form in (word, *forms[word]))

    result = {}
    for split in ("train", "held"):
        chosen = {name: tuple(word for word in words if in_split(word, split)) for name, words in lists.items()}
        chosen["verbs"] = tuple(verbs[base] for base in chosen["verbs"]) + (
            tuple(everyday * 4) if split == "train" else ()
        )
        chosen["plurals"] = tuple(plurals[word] for word in chosen["things"] if word in plurals)
        result[split] = chosen
    return result


@cache
def held_out_forms():
    """Every held-out word in all its forms, in small letters."""
    words = vocabulary()["held"]
    forms = {form for verb in words["verbs"] for form in vars(verb).values()}
    return forms | {word.lower() for name, list_ in words.items() if name != "verbs" for word in list_}


WORLD_WORDS = (
    w.OBJECTS,
    w.TRADES,
    w.COLOURS,
    w.ANIMALS,
    w.FOODS,
    w.CRAFTS,
    *(nouns.split() for nouns in w.PLACES.values()),
)


@cache
def known_words():
    """Words that a made-up one must not be by chance: the held-out ones, and those of the world, some of which are new to a task."""
    return held_out_forms().union(*WORLD_WORDS, (name.lower() for name in w.make_world().names))


@cache
def sources():
    """Words whose beginnings and ends are put together to new ones.

    Those of the world weigh more: as they are tokens of their own, their parts are hardly read otherwise.
    """
    lists = vocabulary()["train"]
    listed = (*lists["names"], *lists["things"], *lists["trades"], *lists["of"])
    return (*listed, *w.NAME_STARTS * 20, *w.TOWN_STARTS * 5, *(word for words in WORLD_WORDS for word in words * 3))


def pseudo_word(rng):
    """A made-up word, of random syllables, of parts of two words or of two whole ones, which no list holds out.

    The parts matter for the tokenizer: the beginning of a known name must have been read in other words, too.
    """
    while True:
        drawn, first, second = rng.random(), rng.choice(sources()).lower(), rng.choice(sources()).lower()
        if drawn < 0.1:
            word = first + second
        elif drawn < 0.65:
            word = first[: rng.randint(2, 5)] + (second[-rng.randint(2, 4) :] if rng.random() < 0.7 else syllable(rng))
        else:
            word = "".join(syllable(rng) for _ in range(rng.choice([1, 2, 2, 2, 3, 3, 4])))
        if rng.random() < 0.03:
            word = word.replace(*rng.choice(ACCENTS))
        if 2 < len(word) <= 14 and word not in known_words() and not RUDE.search(word):
            return word


def pseudo_verb(rng):
    """A made-up verb with regular forms."""
    while True:
        verb = conjugate(pseudo_word(rng))
        if not set(vars(verb).values()) & known_words():
            return verb


def syllable(rng):
    """Consonants, a vowel, and often consonants again."""
    return rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.6 else "")
