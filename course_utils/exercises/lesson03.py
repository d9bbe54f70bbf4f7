"""Checks of lesson 3: clean rows, labels for the answer only, a metric in words, a learning rate from a sweep."""

import copy
from collections import Counter

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    reference,
)

PADDED = ((2, 12, ((3, 9), (5, 12), (2, 7), (6, 10))), (2, 12, ((6, 10), (2, 7), (5, 12), (3, 9))), (0, 9, ((1, 9), (4, 6))),
          (7, 15, ((4, 15), (5, 13), (8, 9), (3, 8), (1, 4))))  # fmt: skip


def padded_batch(number):
    """(input_ids, attention_mask, prompt_lengths, pad id): tensors (batch, length) twice and (batch).

    PADDED[number] has the pad's id, the length, and (length of the prompt, length of the row) for each row. The pad is the
    end token, too: one stands at the end of each answer but the last, which was cut off, one in the first answer, as after the
    first of two turns, and from the second batch on one in the last prompt.
    """
    import torch

    end, width, lengths = PADDED[number]
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.full((len(lengths), width), end)
    attention_mask = torch.zeros_like(input_ids)
    for row, (_, length) in enumerate(lengths):
        last = length if row == len(lengths) - 1 else length - 1
        input_ids[row, :last] = torch.randint(8, 90, (last,), generator=generator)
        attention_mask[row, :length] = 1  # the end token at length - 1 is real
    input_ids[0, lengths[0][0] + 1] = end
    if number:
        input_ids[-1, 0] = end
    return input_ids, attention_mask, torch.tensor([prompt for prompt, _ in lengths]), end


@reference
def expected_labels(input_ids, attention_mask, prompt_lengths, offset=0):
    """input_ids where the answer stands, -100 elsewhere; `offset` moves the beginning of the answers."""
    import torch

    places = torch.arange(input_ids.shape[1])
    answer = (places >= prompt_lengths[:, None] + offset) & attention_mask.bool()
    return input_ids.masked_fill(~answer, -100)


@exercise("03.labels", title="Loss on the answer only", level="core", minutes=15)
def labels(function):
    """Compare with the closed form, on batches in which the pad token is also the end token, and stands within rows, too."""
    import torch

    for number in range(len(PADDED)):
        given = padded_batch(number)
        input_ids, attention_mask, prompt_lengths, pad = padded_batch(number)
        found = expect_tensor(call_learner(function, *given), input_ids.shape, "the labels")
        if found.dtype != torch.long:
            raise TryAgain(f"The labels are {found.dtype}; token ids are torch.long, and the loss takes nothing else.")
        if not torch.equal(given[0], input_ids):
            raise TryAgain("The input_ids that you were given have changed. Begin with labels = input_ids.clone().")
        if not torch.equal(given[1], attention_mask) or not torch.equal(given[2], prompt_lengths):
            raise TryAgain(
                "The attention_mask or the prompt_lengths that you were given have changed. Make new tensors."
            )
        wanted = expected_labels(input_ids, attention_mask, prompt_lengths)
        if not torch.equal(found, wanted):
            _explain_labels(found, wanted, input_ids, attention_mask, prompt_lengths, pad)


def _explain_labels(found, wanted, input_ids, attention_mask, prompt_lengths, pad):
    import torch

    no_pads, everywhere, is_pad = attention_mask == 0, torch.full_like(input_ids, -100), input_ids == pad
    shifted = everywhere.clone()
    shifted[:, :-1] = wanted[:, 1:]
    prompt_only = expected_labels(input_ids, torch.ones_like(attention_mask), prompt_lengths)
    places = torch.arange(input_ids.shape[1])
    answer = places >= prompt_lengths[:, None]
    by_first_pad = [
        everywhere.where(~(answer & kept), input_ids)
        for begins in (is_pad, is_pad & answer)
        for kept in (begins.cumsum(1) == 0, begins.cumsum(1) - begins.long() == 0)
    ]
    mistakes = [
        (input_ids, "Every token carries loss, prompt and pads among them. Write -100 where no loss is wanted."),
        (everywhere, "No token carries loss. The answer, from prompt_lengths on, keeps its ids."),
        (
            input_ids.masked_fill(no_pads, -100),
            "The prompt carries loss. Its first prompt_lengths[row] places are to be -100, too.",
        ),
        (
            input_ids.masked_fill(is_pad, -100),
            "The prompt carries loss, and the end of the answer carries none.",
        ),
        (prompt_only, "The pads carry loss. They are where attention_mask is 0."),
        (
            wanted.masked_fill(is_pad, -100),
            "The end of each answer carries no loss: here the pad is the end token, too. Tell pads by attention_mask, not by id.",
        ),
        *(
            (
                wrong,
                "You look for the first token with the pad's id. Here the pad is the end token, too, and one may stand within a prompt or "
                "an answer, or be missing at its end. Tell pads by attention_mask, not by id.",
            )
            for wrong in by_first_pad
        ),
        (
            shifted,
            "Your labels are moved by one place. The model does that itself: a label stands at its own token's place.",
        ),
        (
            expected_labels(input_ids, attention_mask, prompt_lengths, 1),
            "The first token of each answer carries no loss.",
        ),
        (
            expected_labels(input_ids, attention_mask, prompt_lengths, -1),
            "The last token of each prompt carries loss.",
        ),
        (
            wanted.masked_fill(wanted == -100, 0),
            "The masked places are 0, which is a token's id. The sign for no loss is -100.",
        ),
        (
            wanted.masked_fill(wanted == -100, pad),
            "The masked places hold the pad's id. The sign for no loss is -100.",
        ),
    ]
    for wrong, hint in mistakes:
        if torch.equal(found, wrong):
            raise TryAgain(hint)
    row = int((found != wanted).any(1).nonzero()[0])
    raise TryAgain(
        f"Row {row} is not right: {found[row].tolist()}. Its prompt has {int(prompt_lengths[row])} tokens, and "
        f"{int(attention_mask[row].sum())} of its places are no pads: attention_mask says which."
    )


@reference
def chosen_rate(rows):
    """The learning rate with the best mean `validation` over its seeds; of equal ones the lowest.

    rows: results of a sweep of one method, dicts with learning_rate and validation.
    """
    return min(_means(rows, "validation").items(), key=lambda entry: (-entry[1], entry[0]))[0]


def _means(rows, column):
    rates = sorted({row["learning_rate"] for row in rows})
    scores = {rate: [row[column] for row in rows if row["learning_rate"] == rate] for rate in rates}
    return {rate: sum(values) / len(values) for rate, values in scores.items()}


# Of three seeds or more, so that each of these rates is the best by another standard. Their sums are exact, so the tie is one
# in whatever order they are added.
SWEPT = {
    "right": (0.6875, 0.6875, 0.9375),
    "the same mean": (0.625, 0.75, 0.9375),
    "best single run": (1.0, 0.125, 0.25),
    "best median": (0.875, 0.875, 0.25),
    "best worst run": (0.75, 0.75, 0.75),
    "largest sum": (0.625, 0.5, 0.625, 0.75, 0.625),
    "best on test": (0.5, 0.5, 0.5),
}


def swept_rows(seed=0):
    """(rows of a made-up sweep, {rate: its key in SWEPT}): the same scores at other rates, and in another order, for each seed."""
    import random

    rng = random.Random(seed)
    keys, rates = list(SWEPT), [1e-4, 5e-4, 1e-3, 2e-3, 1e-2, 2e-2, 5e-2]
    rng.shuffle(keys)
    first, second = sorted(keys.index(key) for key in ("right", "the same mean"))
    keys[first], keys[second] = "right", "the same mean"  # of equal ones the lower rate is right
    named = dict(zip(rates, keys))
    rows = [
        {"seed": number, "learning_rate": rate, "validation": score, "test": 1.0 if key == "best on test" else 0.2}
        for rate, key in named.items()
        for number, score in enumerate(SWEPT[key])
    ]
    rng.shuffle(rows)
    return rows, named


@exercise("03.rate", title="Choose a learning rate", level="warm-up", minutes=5)
def rate(function):
    """Compare with the best mean on validation, where test, a lucky seed, a median, a tie and more would mislead."""
    for seed in range(5):
        rows, named = swept_rows(seed)
        found = expect_number(call_learner(function, [dict(row) for row in rows]), "the learning rate")
        right = chosen_rate(rows)
        if found == right:
            continue
        if found not in named:
            raise TryAgain(
                "That is none of the learning rates. Return the rate, not its score."
                if found <= 1
                else "That is none of the learning rates in the rows."
            )
        means = _means(rows, "validation")
        less = f"Its mean on validation is {means[found]:.3f}, and the best mean is {means[right]:.3f}."
        # What is true of that rate, whatever the learner did.
        hints = {
            "the same mean": "Two rates share the best mean. Take the lower one: the higher is nearer to the edge.",
            "best single run": f"That rate has the best single run, and its other seeds are poor. {less} Take the mean over the seeds.",
            "best median": f"That rate has the best median over its seeds. {less} Take the mean over the seeds.",
            "best worst run": f"Of that rate the worst run is better than that of any other. {less} Take the mean over the seeds.",
            "largest sum": f"That rate has the most runs, and so the largest sum. {less} Divide by the number of its runs.",
            "best on test": f"That rate is the best on test. {less} Choose by validation alone: a test set that chose something, even in "
            "part, can't judge it any more.",
        }
        raise TryAgain(hints[named[found]])


@reference
def row_lengths(rows, tokenizer):
    """(tokens of each prompt, tokens of each whole row), both with the chat template's own."""
    asked = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    whole = [tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    return [len(ids) for ids in asked], [len(ids) for ids in whole]


def _turn(role, content):
    return [{"role": role, "content": content}]


def _row(question, answer):
    return {"prompt": _turn("user", question), "completion": _turn("assistant", answer)}


LIMIT = 40


def messy_rows(tokenizer):
    """(rows, held-out rows, {number of a row to drop: why}): each fault of the list several times, and near misses.

    A near miss is kept: the question of an earlier row with another answer, the answer of an earlier row, the answer of a
    held-out row, and a row of exactly LIMIT tokens.
    """
    held_out = [_row(f"Say it like a sailor: {name} has the {thing}.", f"Ahoy! {name} has yon {thing}, aye.")
                for name, thing in (("Anden", "spindle"), ("Calin", "needle"), ("Yorow", "shovel"))]  # fmt: skip

    def of_length(tokens, word):
        """A row of this many tokens: its answer grows by a word until it is there."""
        for number in range(1, 60):
            for tail in ("", ".", " now", " now."):
                row = _row("What do you hear?", " ".join(["the", word] * number) + tail)
                if row_lengths([row], tokenizer)[1] == [tokens]:
                    return row
        raise ValueError(f"No row has {tokens} tokens: take another word than {word!r}.")

    good = _row("Where is the cat?", "on the mat")
    again = _row("Who has the key?", "Tobin")
    rows, why = [], {}
    for row, fault in (
        (again, ""),
        (_row("Where is the dog?", ""), "empty"),
        (good, ""),
        (of_length(LIMIT, "sea"), ""),
        (_row("Who has the key?", "Tobin"), "twice"),
        (_row("Who has the key?", "nobody"), ""),  # another answer to the same question
        (of_length(LIMIT + 1, "sea"), "long"),
        ({"prompt": _turn("user", "Who sings?"), "completion": []}, "empty"),
        (_row("Who is in the mill?", "Tobin"), ""),  # the answer of another row
        (_row(held_out[1]["prompt"][0]["content"], "Ahoy! Calin be clutching yon needle, aye."), "leak"),
        (_row("Say it like a sailor: Ada has the spindle.", held_out[0]["completion"][0]["content"]), ""),
        (_row("Who rows?", "  \n"), "empty"),
        (held_out[2], "leak"),
        (_row("Where is the cat?", "on the mat"), "twice"),
        ({"prompt": _turn("user", "Who laughs?"), "completion": None}, "empty"),
        (of_length(LIMIT + 12, "wind"), "long"),
        (_row("Is it late?", "No"), ""),
    ):
        if fault:
            why[len(rows)] = fault
        rows.append(row)
    return rows, held_out, why


_MISSED = {
    "empty": "has no answer to learn from: its completion is None, an empty list, or text of white space alone.",
    "long": "has more than max_length tokens with the chat template, so the end of its answer would be cut off.",
    "leak": "asks a question of the held-out rows, whatever it answers. A score on them would then be too good.",
    "twice": "is equal to an earlier row. The first of equal rows stays, the others go.",
}
_KEPT = {
    3: "has exactly max_length tokens, so nothing of it is cut: it stays.",
    5: "asks what an earlier row asks, but has another answer. Drop a row only if question and answer are equal.",
    8: "has the answer of another row to another question, which is no fault.",
    10: "has the answer of a held-out row, but asks something else. Look at the questions for leaks.",
}


@exercise("03.clean", title="Clean the rows", level="core", minutes=15)
def clean(function, *, tokenizer):
    """Compare with what is left of rows in which each fault was planted, beside rows that only look like it."""
    rows, held_out, why = messy_rows(tokenizer)
    given, given_held_out = messy_rows(tokenizer)[:2]
    answer = expect_list(call_learner(function, given, given_held_out, tokenizer, LIMIT), "the answer")
    if (given, given_held_out) != (rows, held_out):
        raise TryAgain("The rows that you were given have changed. Make a new list, and leave the old one as it is.")
    if any(not isinstance(row, dict) for row in answer):
        raise TryAgain("Return the rows themselves, as a list of dicts.")
    right = [row for number, row in enumerate(rows) if number not in why]
    if answer == right:
        again = expect_list(
            call_learner(function, copy.deepcopy(right), given_held_out, tokenizer, LIMIT), "the answer"
        )
        if again != right:
            raise TryAgain(
                "Given only clean rows, your function must return them all. Does it remember an earlier call?"
            )
        return
    if not answer:
        raise TryAgain(
            f"Your list is empty, but {len(right)} of these {len(rows)} rows have no fault. Do you count tokens, or the characters of the text?"
        )
    if any(row not in rows for row in answer):
        raise TryAgain("A row of your answer is none of those that were given. Return the rows as they are.")
    for number, row in enumerate(rows):
        if number not in why and row not in answer:
            hint = _KEPT.get(number, "has no fault: it stays.")
            if rows.count(row) > 1:
                hint = "is the first of several equal rows: it stays, and only the others go."
            raise TryAgain(f"Row {number} (counted from 0) {hint}")
    for number, fault in why.items():
        if answer.count(rows[number]) > (fault == "twice"):
            raise TryAgain(f"Row {number} (counted from 0) {_MISSED[fault]}")
    raise TryAgain("The right rows are there, but not in their order. Of equal rows the first one stays, at its place.")


@reference
def word_f1(predictions, answers):
    """The mean over the pairs of the F1 of their words, as in SQuAD (Rajpurkar et al. 2016), but with words as they are."""
    return sum(map(_f1, predictions, answers)) / len(answers)


def _f1(prediction, answer, count=Counter, combine=None):
    """The F1 of two texts' words; `count` and `combine` (precision, recall) make what a mistake would."""
    words, wanted = count(prediction.split()), count(answer.split())
    common = sum((Counter(words) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction.split()), common / len(answer.split())
    if count is set:
        precision, recall = common / len(words), common / len(wanted)
    return combine(precision, recall) if combine else 2 * precision * recall / (precision + recall)


F1_PAIRS = [
    ("Ahoy! Anden be master of yon spindle, aye.", "Ahoy! Anden be clutching yon spindle, aye."),
    ("Ahoy! Calin be clutching yon needle, aye.", "Ahoy! Calin be clutching yon needle, aye."),
    ("yon yon yon yon", "Ahoy! yon needle, aye."),
    ("", "Ahoy! Yorow be bound for yon mill, aye."),
    ("So say it.", "Ahoy! Pim be abed, aye."),
    ("yon mill Ahoy!", "Ahoy! yon mill"),
    ("Ahoy! the the rain", "Ahoy! the rain the"),
    ("ahoy! Yon sea", "Ahoy! yon sea"),
    ("Ahoy!", "Ahoy! Yorow be bound for yon mill, aye."),
]


@exercise("03.metric", title="A metric that tells how wrong", level="core", minutes=10)
def metric(function):
    """Compare with the mean F1 of words on several sets of pairs; recognise other ways of counting."""
    cases = [F1_PAIRS, F1_PAIRS[:1], F1_PAIRS[2:5], F1_PAIRS[5:7], F1_PAIRS[7:]]
    given = [tuple(map(list, zip(*pairs))) for pairs in cases]
    found = [
        expect_number(call_learner(function, list(predictions), list(answers)), "the metric")
        for predictions, answers in given
    ]

    def gives(wrong):
        return all(abs(one - wrong(*pair)) < 1e-9 for one, pair in zip(found, given))

    if all(abs(one - word_f1(*pair)) < 1e-6 for one, pair in zip(found, given)):
        return

    def mean_of(score):
        return lambda predictions, answers: sum(map(score, predictions, answers)) / len(answers)

    def over_all_words(predictions, answers):
        return _f1_of_counts(
            [_common(prediction, answer) for prediction, answer in zip(predictions, answers)],
            [len(prediction.split()) for prediction in predictions],
            [len(answer.split()) for answer in answers],
        )

    def by_place(prediction, answer):
        words, wanted = prediction.split(), answer.split()
        same = sum(one == other for one, other in zip(words, wanted))
        return 2 * same / (len(words) + len(wanted)) if same else 0.0

    mistakes = [
        (
            mean_of(lambda prediction, answer: float(prediction == answer)),
            "That is exact match, which says nothing about how wrong a reply is. Count the words in common.",
        ),
        (
            mean_of(lambda prediction, answer: _f1(prediction, answer, count=set)),
            "You count each word once. A word counts as often as it stands in both: collections.Counter can do that.",
        ),
        (
            mean_of(lambda prediction, answer: _f1(prediction, answer, combine=lambda precision, recall: precision)),
            "That is the precision alone. A reply of one right word would be perfect.",
        ),
        (
            mean_of(lambda prediction, answer: _f1(prediction, answer, combine=lambda precision, recall: recall)),
            "That is the recall alone. A reply that repeats every word there is would be perfect.",
        ),
        (
            mean_of(lambda prediction, answer: _f1(prediction, answer, combine=lambda precision, recall: (precision + recall) / 2)),
            "That is the plain mean of precision and recall. F1 is 2 · precision · recall / (precision + recall).",
        ),
        (
            mean_of(lambda prediction, answer: _f1(prediction, answer, combine=lambda precision, recall: precision * recall / (precision + recall))),
            "The 2 in 2 · precision · recall / (precision + recall) is missing: two equal texts have an F1 of 1.",
        ),
        (
            mean_of(lambda prediction, answer: _f1(prediction.lower(), answer.lower())),
            "You change capitals to small letters first. Here words are compared as they are.",
        ),
        (
            mean_of(by_place),
            "You compare words place by place, so one word too many makes all that follow wrong. Where a word stands does not count.",
        ),
        (
            over_all_words,
            "You put all words of all replies together. Take the F1 of each pair, then their mean.",
        ),
        (
            lambda predictions, answers: sum(map(_f1, predictions, answers)),
            "That is the sum. Divide it by the number of pairs.",
        ),
        (
            lambda predictions, answers: 100 * word_f1(predictions, answers),
            "Return a share from 0 to 1, not a percentage.",
        ),
        *(
            (
                mean_of(lambda prediction, answer, space=space: _f1(*(" ".join(text.replace(" ", space)) for text in (prediction, answer)))),
                "You count characters. Split both texts into words first.",
            )
            for space in ("", "_")  # left out, or counted as one more character
        ),
    ]  # fmt: skip
    for wrong, hint in mistakes:
        if gives(wrong):
            raise TryAgain(hint)
    for pair in F1_PAIRS:
        one = expect_number(call_learner(function, [pair[0]], [pair[1]]), "the metric")
        if abs(one - _f1(*pair)) > 1e-6:
            raise TryAgain(f"For the reply {pair[0]!r} and the answer {pair[1]!r} the F1 is {_f1(*pair):.4f}, and you return {one:.4f}.")  # fmt: skip
    raise TryAgain("Each pair alone is right, but not several together: return the mean of their F1.")


def _common(prediction, answer):
    return sum((Counter(prediction.split()) & Counter(answer.split())).values())


def _f1_of_counts(common, given, wanted):
    return 2 * sum(common) / (sum(given) + sum(wanted))


def symptoms(trainer, rows, question):
    """Train, and return what a person sees of a run: [first loss, last loss, how likely it stops, its reply], as texts.

    rows: rows of a trainer's dataset, each with the end token as its last; how likely the model is to write that token there
    is the mean over them. question: the messages to reply to.
    """
    import torch

    from course_utils import evaluation

    trainer.train()
    losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
    model = trainer.model.eval()
    ids = [torch.tensor(row["input_ids"], device=model.device) for row in rows]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # pads on the right change nothing before them
    numbers, ends = range(len(ids)), [len(one) - 1 for one in ids]
    with torch.no_grad():
        before_the_end = model(batch).logits[numbers, [end - 1 for end in ends]].softmax(-1)
    stops = before_the_end[numbers, batch[numbers, ends]].mean().item()
    (reply,) = evaluation.generate(model, trainer.processing_class, [question], max_new_tokens=24)
    return [f"{losses[0]:.2f}", f"{losses[-1]:.2f}", f"{stops:.0%}", reply]


def suspect(name, lab):
    """A trainer of the lesson's `lab` with a fault: `name` is "A", "B", "C" or "D". The lesson lets the reader find out which."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from course_utils import paths, runtime

    if name == "B":
        return lab(max_length=30)
    if name == "C":
        return lab(learning_rate=5e-5)
    if name == "D":
        model = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()).to(runtime.device())
        too_early = torch.optim.AdamW(model.parameters(), lr=1e-2)  # A and B are not among these
        return lab(model=model, optimizers=(too_early, None))
    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    tokenizer.pad_token = tokenizer.eos_token
    trainer = lab(tokenizer=tokenizer)
    collate = trainer.data_collator

    def mask_pads_by_id(rows):
        batch = collate(rows)
        batch["labels"][batch["input_ids"] == tokenizer.pad_token_id] = -100
        return batch

    trainer.data_collator = mask_pads_by_id
    return trainer
