"""Checks of lesson 13: make chat messages of rows, take out personal data, split without a leak, compare two models, read a server."""

import copy
import random
import re

from course_utils.exercises import (
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_list,
    expect_number,
    expect_type,
    reference,
)


@reference
def chat_messages(row, system=""):
    """The chat messages of a row: one system message in front unless `system` is empty, then the others, without space around them.

    A row has "messages", or "text" and "reply". A content that is null in the file is an empty one.
    """
    turns = row.get("messages") or [
        {"role": "user", "content": row["text"]},
        {"role": "assistant", "content": row["reply"]},
    ]
    front = [{"role": "system", "content": system}] if system else []
    return front + [
        {"role": turn["role"], "content": (turn["content"] or "").strip()} for turn in turns if turn["role"] != "system"
    ]


def _example_rows():
    said = [("user", "I lost my hat. Ida"), ("assistant", " Dear Ida, where did you lose it?"), ("user", "on the bus "),
            ("assistant", "Dear Ida, we will look for your hat on the bus.\n")]  # fmt: skip
    turns = [{"role": role, "content": text} for role, text in said]
    yield {"case": 3, "text": " I found a key. Bo\n", "reply": "Thank you, Bo."}
    yield {"case": 4, "messages": turns}
    yield {"case": 5, "messages": [{"role": "system", "content": "You are a pirate."}, *turns]}
    yield {"case": 6, "messages": turns[:2], "split": "train"}


@exercise("13.messages", title="Make chat messages of a row", level="core", minutes=15)
def messages(function):
    """Compare with the reference: both forms of rows, a system message of the row's own, several turns, space at the ends."""
    for row in _example_rows():
        system = "Answer for the desk."
        given, wanted = copy.deepcopy(row), chat_messages(row, system)
        found = expect_list(call_learner(function, given, system), "what your function returns")
        if given != row:
            raise TryAgain("The row that your function was given has changed. Make new messages.")
        form = "with messages" if "messages" in row else "with text and reply"
        for message in found:
            expect_type(message, dict, "each message")
            if set(message) != {"role", "content"}:
                raise TryAgain(
                    f"A message has a role and a content, and one of yours has: {', '.join(map(str, message))}."
                )
        if found == wanted:
            continue
        roles = [message["role"] for message in found]
        if roles.count("system") != 1:
            raise TryAgain(
                f"Of a row {form} your function makes {roles.count('system')} system messages. Each row needs exactly one, "
                "because the server will send one. A system message of the row's own goes."
            )
        if roles[0] != "system" or found[0]["content"] != system:
            raise TryAgain("The first message is the system message that was given.")
        if roles != [message["role"] for message in wanted]:
            raise TryAgain(
                f"A row {form} should give the roles {', '.join(m['role'] for m in wanted)}; yours: {', '.join(roles)}."
            )
        wrong = next(mine for mine, right in zip(found, wanted) if mine != right)
        if isinstance(wrong["content"], str) and wrong["content"] != wrong["content"].strip():
            raise TryAgain("A content still has space at its ends. The template writes its own: use .strip().")
        raise TryAgain(f"A content is not what the row says: {describe(wrong['content'])}")


_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_PHONE = re.compile(r"\+?\d(?: ?\d){6,}")


@reference
def masked(text):
    """The text with [email] and [phone] for e-mail addresses and phone numbers; see the exercise."""
    return _PHONE.sub("[phone]", _MAIL.sub("[email]", text))


_MASKED = [
    ("Write to ida@example.org.", "Write to [email]."),
    ("Call 0471 55231 in the evening.", "Call [phone] in the evening."),
    ("ida.b-c+x@mail.example.co.uk, or +49 30 1234567", "[email], or [phone]"),
    ("My numbers: 5551234567 and 0123 45678.", "My numbers: [phone] and [phone]."),
    ("It was on 2026-05-12 at 14:30.", "It was on 2026-05-12 at 14:30."),
    ("Case 4711: 3 bags, 12 keys, 100000 steps", "Case 4711: 3 bags, 12 keys, 100000 steps"),
    ("meet me @ the inn, room 7", "meet me @ the inn, room 7"),
    ("(x_1@a-b.example)", "([email])"),
]


@exercise("13.mask", title="Take personal data out of a text", level="warm-up", minutes=10)
def mask(function):
    """Addresses and numbers in several forms and places, and what only looks like them."""
    for text, wanted in _MASKED:
        found = expect_type(call_learner(function, text), str, "the text")
        if found == wanted:
            continue
        if text == wanted:
            raise TryAgain(f"{text!r} holds no personal data, and yours changes it to {found!r}.")
        if wanted.count("[phone]") > 1 and found.count("[phone]") == 1:
            raise TryAgain(f"{text!r} holds two numbers; mask all of them. Yours: {found!r}.")
        raise TryAgain(f"{text!r} should become {wanted!r}, and yours is {found!r}.")


@reference
def held_out(cases, share, seed):
    """One bool for each row: is it held out? Whole cases are, round(share · cases) of them, drawn with `seed`.

    Numbers and names may stand among the cases of one file.
    """
    different = sorted(set(cases), key=lambda case: (isinstance(case, str), case))
    drawn = set(random.Random(seed).sample(different, round(share * len(different))))
    return [case in drawn for case in cases]


@exercise("13.split", title="Split without a leak", level="core", minutes=10)
def split(function):
    """Rows that share a case, in any order: no case on both sides, the right number of cases, drawn at random, and again the same."""
    rng = random.Random(0)
    for count, share in ((10, 0.3), (40, 0.25), (100, 0.1)):
        numbers = rng.sample(range(1000), count)
        cases = [case for case in numbers for _ in range(rng.choice([1, 1, 2, 4]))]
        rng.shuffle(cases)
        found = _marks(call_learner(function, list(cases), share, 1), cases)
        out = {case for case, held in zip(cases, found) if held}
        both = {case for case, held in zip(cases, found) if not held} & out
        if both:
            raise TryAgain(
                f"{len(both)} of {count} cases have rows on both sides, for example case {min(both)}. Draw cases, not rows."
            )
        wanted = round(share * count)
        if len(out) != wanted:
            raise TryAgain(
                f"Of {count} cases and a share of {share}, {wanted} should be held out; yours are {len(out)}."
            )
        if _marks(call_learner(function, list(cases), share, 1), cases) != found:
            raise TryAgain("Called again with the same seed, your function draws other cases. Use random.Random(seed).")
    others = [_marks(call_learner(function, list(cases), share, seed), cases) for seed in range(2, 6)]
    if all(other == found for other in others):
        raise TryAgain("Another seed gives the same cases: are they drawn at random?")
    repeated = [number for number in range(200) for _ in range(2)]
    half = _marks(call_learner(function, repeated, 0.5, 3), repeated)
    if sum(half[:200]) in (0, 200):
        raise TryAgain("The cases are taken in their order. Draw them at random, because files are often sorted.")


def _marks(value, cases):
    marks = expect_list(value, "what your function returns")
    if len(marks) != len(cases):
        raise TryAgain(f"Return one bool for each row: {len(cases)} were given, and yours are {len(marks)}.")
    marks = [mark.item() if hasattr(mark, "item") else mark for mark in marks]
    if any(mark not in (True, False) for mark in marks):
        raise TryAgain("Return True for a row that is held out, and False for one that is not.")
    return [bool(mark) for mark in marks]


@reference
def preference(verdicts):
    """(mean, low, high): the mean of verdicts that are 1, 0 or -1, and its 95% interval, mean ± 1.96 · s / √n with s over n - 1."""
    n = len(verdicts)
    mean = sum(verdicts) / n
    deviation = (sum((verdict - mean) ** 2 for verdict in verdicts) / (n - 1)) ** 0.5
    half = 1.96 * deviation / n**0.5
    return mean, mean - half, mean + half


@exercise("13.interval", title="Is the new model better?", level="core", minutes=15)
def interval(function):
    """Compare with the closed form, over lists in which each typical mistake gives a number of its own."""
    rng = random.Random(5)
    cases = [[1, 1, 0, -1], [1] * 7 + [0] * 3, [0, 0, 0], [-1, 1] * 8, [rng.choice([1, 1, 0, -1]) for _ in range(90)]]
    for verdicts in cases:
        value = expect_list(call_learner(function, list(verdicts)), "what your function returns")
        if len(value) != 3:
            raise TryAgain(f"Return three numbers: the mean, the low and the high end. Yours are {len(value)}.")
        found = [expect_number(number, "each of the three") for number in value]
        wanted = preference(verdicts)
        if all(abs(mine - right) < 1e-6 for mine, right in zip(found, wanted)):
            continue
        shown = f"{len(verdicts)} verdicts with the sum {sum(verdicts)}"
        n, mean = len(verdicts), wanted[0]
        if abs(found[0] - mean) > 1e-6:
            decided = [verdict for verdict in verdicts if verdict]
            if decided and abs(found[0] - sum(decided) / len(decided)) < 1e-6:
                raise TryAgain(f"For {shown} the mean is {mean:.3f}: ties count as rows, too.")
            raise TryAgain(f"For {shown} the mean is {mean:.3f}, and yours is {found[0]:.3f}.")
        half, mine = wanted[2] - mean, found[2] - mean
        if abs((mean - found[1]) - mine) > 1e-6:
            raise TryAgain(
                f"For {shown} your interval is not symmetric around the mean: {found[1]:.3f} to {found[2]:.3f}."
            )
        hints = {
            half * n**0.5: "Divide the standard deviation by √n: the mean of many rows is surer than one row.",
            half / 1.96: "That is one standard error. The interval reaches 1.96 of them to each side.",
            half * ((n - 1) / n) ** 0.5: "Divide the sum of squares by n - 1, not by n.",
            half / n**0.5: "Divide by √n, not by n.",
        }
        why = next((hint for size, hint in hints.items() if half and abs(mine - size) < 1e-6), "")
        raise TryAgain(f"For {shown} the interval is {wanted[1]:.3f} to {wanted[2]:.3f}. {why}".strip())


CAUSES = ("another template", "BOS twice", "stop token", "dtype", "fine")


@reference
def cause_of(rows):
    """What is wrong with a server, from its rows: see the exercise."""
    more = [row["served_tokens"] - row["expected_tokens"] for row in rows]
    if all(number == 1 for number in more):
        return "BOS twice"
    if any(more):
        return "another template"
    if sum(row["finish"] == "length" for row in rows) > len(rows) / 2:
        return "stop token"
    return "fine" if all(row["same"] for row in rows) else "dtype"


def _served():
    """(rows, cause): with few and with most answers changed, a long answer here and there, and templates that add the same everywhere."""
    rng = random.Random(2)
    for cause in CAUSES * 4:
        n, spoilt = rng.choice([8, 30, 50]), rng.choice([0.1, 0.5, 1.0])
        added = {"another template": rng.choice([[5], [-1], [2, 3, 7], [0, 0, 1]]), "BOS twice": [1]}.get(cause, [0])
        rows = [
            {
                "expected_tokens": (expected := rng.randrange(20, 90)),
                "served_tokens": expected + rng.choice(added),
                "finish": "length" if rng.random() < (0.9 if cause == "stop token" else 0.05) else "stop",
                "same": cause == "fine" or rng.random() > spoilt,
            }
            for _ in range(n)
        ]
        if cause == "dtype":
            rows[rng.randrange(n)]["same"] = False
        if cause_of(rows) == cause:  # a draw may hide its cause, as one that changes no count does
            yield rows, cause
    yield [{"expected_tokens": 30, "served_tokens": 30, "finish": "length", "same": True}, *rows_fine(3)], "fine"


def rows_fine(number):
    """Rows of a server on which nothing is wrong."""
    return [{"expected_tokens": 40 + n, "served_tokens": 40 + n, "finish": "stop", "same": True} for n in range(number)]


@exercise("13.served", title="What is wrong with this server?", level="stretch", minutes=10)
def served(function):
    """Each cause several times, and a server on which nothing is wrong, though one of its answers is long."""
    why = {
        "BOS twice": "each prompt is exactly one token longer than ours",
        "another template": "prompts have other lengths than ours, and not by one token each",
        "stop token": "prompts are as long as ours, and most answers end with their length",
        "dtype": "prompts and ends are right, and some answers are others",
        "fine": "prompts are as long as ours, most answers stop, and all are the same",
    }
    for rows, wanted in _served():
        found = expect_type(call_learner(function, copy.deepcopy(rows)), str, "the cause")
        if found not in CAUSES:
            raise TryAgain(f"{found[:40]!r} is none of them. Return one of: {', '.join(CAUSES)}.")
        if found == wanted:
            continue
        more = sorted({row["served_tokens"] - row["expected_tokens"] for row in rows})
        ends = sum(row["finish"] == "length" for row in rows)
        same = sum(row["same"] for row in rows)
        raise TryAgain(
            f"You return {found!r}, and it is {wanted!r}: {why[wanted]}. Of {len(rows)} rows, tokens more than ours: "
            f"{', '.join(map(str, more))}; ended by length: {ends}; answers as ours: {same}."
        )
