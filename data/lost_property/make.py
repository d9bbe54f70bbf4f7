"""Write the messages of a lost-property desk to `messages.jsonl`, faults and all, and where each fault is to `faults.json`.

    python data/lost_property/make.py

The file is what a mailbox might give: a message and its reply in most lines, and in some a whole conversation. Each fault is planted
on purpose, in lines that have no other, so that a reader of lesson 13 can count how many were found.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CASES = 620  # conversations without a fault, before follow-ups and faults are added
PLANTED = {
    "broken JSON": 9,
    "empty reply": 14,
    "too long": 7,
    "wrong reply": 18,
    "personal data": 31,
}
REPEATED = 26
FOLLOW_UPS = 90  # a second message about the same case, in other words, with the same reply
CONVERSATIONS = 60  # cases in the form of chat messages, in which the desk had to ask back
SYSTEMS = ["You are the desk.", "Answer briefly and politely.", "You are a helpful assistant."]

NAMES = """Adela Anton Astrid Bela Bruno Carla Cedric Clara Dora Edgar Elif Emil Esra Felix Flora Georg Greta Hana Hugo Ines Ivan Jana Jasper Karim
Katja Lars Leila Linus Lotte Malik Marta Milo Mira Nadia Nils Nora Olaf Omar Paula Petra Pilar Rafael Rosa Ruben Samira Selma Sven Tamara
Theo Tomas Ursula Viktor Vera Walter Wanda Yusuf Zora""".split()
COLOURS = "black blue brown green grey orange pink purple red silver white yellow".split()
THINGS = """bag basket belt blanket book bottle bracelet camera cap clock coat cup drum fan flute glove guitar hammer hat helmet jacket kettle key
kite knife lamp map mirror necklace notebook pan parcel pen phone pillow purse ribbon ring rope sack scarf shirt shoe spade spoon stick
suitcase sweater ticket torch towel toy umbrella violin wallet watch whistle""".split()
PLACES = """on the ferry|at the station|in the market|on the beach|in the library|behind the mill|at the harbour|in the church|on the bridge
in the garden|at the school|in the bakery|under the bench|on the bus|in the museum|at the lighthouse|in the waiting room|near the well
in the theatre|on the train|at the post office|in the park|beside the fountain|in the kitchen of the inn|on the stairs|at the bank
in the swimming pool|on the platform|in the hall|at the campsite""".replace("\n", "|").split("|")
FILLERS = """It was raining that day.|We were in a hurry.|The sun was out.|I hope you can help.|There was a long queue.|My sister was with me.
It was late in the evening.|It was a present.|The place was crowded.|We had just had lunch.""".replace("\n", "|").split(
    "|"
)

LOST = [
    "I left my {thing} {place}. {name}",
    "Hello, my {thing} is missing. I think it is still {place}. My name is {name}.",
    "I am {name}. Yesterday I lost my {thing} {place}.",
    "Has anybody seen my {thing}? I had it {place}. Yours, {name}",
    "my {thing} must be {place}, i forgot it there. {name}",
    "This is {name}. I can't find my {thing}. I last had it {place}.",
]
FOUND = [
    "I found {a_thing} {place}. {name}",
    "Somebody forgot {a_thing} {place}, and I have it here. My name is {name}.",
    "There was {a_thing} {place}. I took it with me. I am {name}.",
    "This is {name}. I have {a_thing} that is not mine. It was {place}.",
    "who misses {a_thing}? i picked it up {place}. {name}",
]
# Three people answer, each in words of their own.
REPLIES = {
    "lost": [
        "Dear {name}, we will look for your {thing} {place}.",
        "Hello {name}! Your {thing} was lost {place}, and we will do our best to find it.",
        "We are sorry, {name}. We have noted your {thing} {place}.",
    ],
    "found": [
        "Dear {name}, thank you for the {thing} that you found {place}.",
        "Hello {name}! The {thing} was found {place}, and we will do our best to find its owner.",
        "Thank you, {name}. We have noted the {thing} {place}.",
    ],
}
CONTACTS = [
    "Write to {mail}.",
    "You can reach me at {mail} or {phone}.",
    "My number is {phone}.",
    "Please call {phone} in the evening.",
]


class Desk:
    """Makes cases, each with its own number and facts."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.cases = 0
        self.known = set()

    def facts(self):
        """Facts that no other case has."""
        rng = self.rng
        while True:
            thing = rng.choice(THINGS)
            if rng.random() < 0.7:
                thing = f"{rng.choice(COLOURS)} {thing}"
            facts = {"name": rng.choice(NAMES), "thing": thing, "place": rng.choice(PLACES)}
            key = tuple(facts.values())
            if key not in self.known:
                self.known.add(key)
                return facts

    def message(self, kind, facts, extra=()):
        """A message with these facts, among up to two sentences that say nothing of them."""
        rng = self.rng
        thing = facts["thing"]
        a_thing = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
        text = rng.choice(LOST if kind == "lost" else FOUND).format(**facts, a_thing=a_thing)
        around = [*rng.sample(FILLERS, rng.choice([0, 0, 1, 1, 2])), *extra]
        rng.shuffle(around)
        before = rng.randrange(len(around) + 1)
        return " ".join([*around[:before], text, *around[before:]])

    def reply(self, kind, facts):
        """The reply of one of the three."""
        return self.rng.choice(REPLIES[kind]).format(**facts)

    def row(self, case, text, reply):
        return {"case": case, "text": text, "reply": reply}

    def case(self):
        """(kind, facts, row) of a new case."""
        kind, facts = self.rng.choice(["lost", "lost", "found"]), self.facts()
        self.cases += 1
        return kind, facts, self.row(self.cases, self.message(kind, facts), self.reply(kind, facts))

    def conversation(self):
        """A case in which the desk asked for the place, as chat messages; half of them begin with a system message."""
        rng, facts = self.rng, self.facts()
        self.cases += 1
        messages = [
            {"role": "user", "content": f"I lost my {facts['thing']}. {facts['name']}"},
            {"role": "assistant", "content": f"Dear {facts['name']}, where did you lose it?"},
            {"role": "user", "content": rng.choice(["It was {place}.", "I think {place}.", "{place}"]).format(**facts)},
            {"role": "assistant", "content": self.reply("lost", facts)},
        ]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
        return {"case": self.cases, "messages": messages}


def make(seed=13):
    """(rows, of which one that is broken is text; {fault: numbers of the rows that have it, counted from 1})."""
    desk, rng = Desk(seed), random.Random(seed + 1)
    cases = [desk.case() for _ in range(CASES)]
    rows = [(None, row) for _, _, row in cases]
    rows += [(None, desk.conversation()) for _ in range(CONVERSATIONS)]
    for kind, facts, row in rng.sample(cases, FOLLOW_UPS):
        again = desk.message(kind, facts)
        while again == row["text"]:
            again = desk.message(kind, facts)
        rows.append((None, desk.row(row["case"], again, row["reply"])))
    rows += [(fault, row) for fault, number in PLANTED.items() for row in planted(fault, number, desk)]
    rng.shuffle(rows)
    for _, _, row in rng.sample(
        cases, REPEATED
    ):  # somewhere behind the line that it repeats, half of them in other letters and spaces
        text = row["text"].upper().replace(". ", ".  ") if rng.random() < 0.5 else row["text"]
        first = next(place for place, (_, other) in enumerate(rows) if other is row)
        rows.insert(rng.randrange(first + 1, len(rows) + 1), ("repeated", {**row, "text": text}))
    faults = {
        fault: [place for place, (other, _) in enumerate(rows, 1) if other == fault] for fault in [*PLANTED, "repeated"]
    }
    return [row for _, row in rows], faults


def planted(fault, number, desk):
    """Rows with this fault."""
    rng = desk.rng
    for _ in range(number):
        kind, facts, row = desk.case()
        if fault == "empty reply":
            row["reply"] = rng.choice(["", " ", "\n"])
        elif fault == "too long":  # an earlier correspondence hangs below
            older = " ".join(desk.message(kind, desk.facts()) for _ in range(12))
            row["text"] += f" > {older}"
        elif fault == "wrong reply":
            row["reply"] = desk.reply(kind, facts | wrong(rng, desk.facts(), facts))
        elif fault == "personal data":
            name = facts["name"].lower()
            contact = {
                "mail": f"{name}@example.org",
                "phone": f"0{rng.randrange(100, 999)} {rng.randrange(10000, 99999)}",
            }
            row["text"] = desk.message(kind, facts, [rng.choice(CONTACTS).format(**contact)])
        elif fault == "broken JSON":
            row = json.dumps(row, ensure_ascii=False)
            row = rng.choice(
                [row[: rng.randrange(20, len(row) - 2)], row.replace('"reply"', "reply"), row.replace('", "', '" "')]
            )
        yield row


def wrong(rng, other, facts):
    """One of the facts, taken from another case."""
    name = rng.choice([name for name in facts if other[name] != facts[name]])
    return {name: other[name]}


def main():
    """Write both files."""
    rows, faults = make()
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (FOLDER / "messages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (FOLDER / "faults.json").write_text(json.dumps(faults, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
