"""Checks of lesson 3: labels for the answer only, a learning rate from a sweep, when to stop, which rows are cut off."""

from types import SimpleNamespace

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    expect_whole_number,
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
def early_stopping(losses, patience):
    """(best, last) as transformers' EarlyStoppingCallback has it, fed with one validation loss after the other.

    best is the number of the evaluation whose checkpoint is kept, last that of the evaluation after which training stops;
    both count from 0.
    """
    from transformers import EarlyStoppingCallback, TrainerControl

    callback, control = EarlyStoppingCallback(early_stopping_patience=patience), TrainerControl()
    arguments = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    state, best = SimpleNamespace(best_metric=None), 0
    for number, loss in enumerate(losses):
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
        # Trainer notes the best after the callbacks were asked.
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, best = loss, number
        if control.should_training_stop:
            return best, number
    return best, len(losses) - 1


def _stops(better, patience=lambda given: given, reset=True):
    """An early stopping with another idea of what is better than before, of patience, or of when to count anew."""

    def run(losses, given):
        best, waited = 0, 0
        for number in range(1, len(losses)):
            waited = (0 if reset else waited) if better(losses, number, best) else waited + 1
            best = min(range(number + 1), key=losses.__getitem__)
            if waited >= patience(given):
                return best, number
        return best, len(losses) - 1

    return run


STOPPING_CASES = [
    ([2.0, 1.0, 0.5, 0.6, 0.7, 0.8, 0.9], 2),
    ([2.0, 1.0, 1.2, 0.9, 1.1, 0.8, 0.9, 1.0, 1.1, 0.7], 3),
    ([1.0, 0.6, 0.9, 0.8, 0.7, 0.65, 0.5], 3),
    ([1.0, 0.5, 0.5, 0.5, 0.4], 2),
    ([3.0, 2.0, 1.0], 2),
    ([1.0], 1),
    ([3.0, 2.0, 2.5, 1.0, 1.5], 1),
    ([1.0, 1.1, 1.05, 1.2, 0.9], 3),
    ([1.0, 0.9999, 0.9998, 0.9997, 0.9996], 2),
]


def _below_best(losses, number, best):
    return losses[number] < losses[best]


@exercise("03.stop", title="When to stop", level="core", minutes=10)
def stop(function):
    """Compare with transformers' own callback, over several curves; recognise what differs."""
    found, right = [], [early_stopping(*case) for case in STOPPING_CASES]
    for losses, patience in STOPPING_CASES:
        answer = expect_list(call_learner(function, list(losses), patience), "the answer")
        if len(answer) != 2:
            raise TryAgain(f"Return two numbers, best and last; you returned {len(answer)}.")
        found.append(tuple(expect_whole_number(value, name) for value, name in zip(answer, ("best", "last"))))
    if found == right:
        return
    mistakes = [
        (
            lambda losses, patience: (early_stopping(losses, patience)[1],) * 2,
            "You keep the last checkpoint. The one to keep is that with the lowest loss so far.",
        ),
        (
            lambda losses, patience: (losses.index(min(losses)), early_stopping(losses, patience)[1]),
            "The best is looked for in the whole list. Evaluations after the last one never take place.",
        ),
        (
            _stops(lambda losses, number, best: losses[number] < losses[best] - 1e-3),
            "A new best is any loss that is lower, by however little.",
        ),
        (
            _stops(_below_best, lambda given: 1),
            "You stop at the first evaluation that is no better. Wait for `patience` of them.",
        ),
        (
            _stops(lambda losses, number, best: losses[number] < losses[number - 1]),
            "You compare with the evaluation before. A loss that falls again but stays above the best is no progress: compare with the best.",
        ),
        (
            _stops(_below_best, reset=False),
            "You count all evaluations without progress. After a new best the count begins anew.",
        ),
        (
            _stops(lambda losses, number, best: losses[number] <= losses[best]),
            "An equal loss is no progress: a new best must be lower.",
        ),
        (
            _stops(_below_best, lambda given: given + 1),
            "You stop one evaluation too late: the one number `patience` without progress is the last.",
        ),
        (
            _stops(_below_best, lambda given: 10**9),
            "You never stop: the last evaluation is always the end of the list.",
        ),
        (
            lambda losses, patience: tuple(number + 1 for number in early_stopping(losses, patience)),
            "Count the evaluations from 0.",
        ),
        (
            lambda losses, patience: early_stopping(losses, patience)[::-1],
            "The two are swapped: first best, then last.",
        ),
    ]
    for wrong, hint in mistakes:
        if found == [wrong(*case) for case in STOPPING_CASES]:
            raise TryAgain(hint)
    case, answer, wanted = next(triple for triple in zip(STOPPING_CASES, found, right) if triple[1] != triple[2])
    raise TryAgain(
        f"For {case[0]} and a patience of {case[1]} the library's callback gives {wanted}, and you {answer}."
    )


def rows_to_cut():
    """Conversational prompt/completion rows of many lengths, some with several messages on a side, and some of them twice."""
    words = "the key lies under the old oak by the mill at the end of the long road to the harbour".split()

    def says(role, number):
        return {"role": role, "content": " ".join(words[:number])}

    rows = []
    for number in range(16):
        prompt, completion = [says("user", 2 + 5 * number % 17)], [says("assistant", 1 + 7 * number % 11)]
        if number % 4 == 1:
            prompt = [says("user", 9), says("assistant", number % 3 + 1), *prompt]
        if number % 4 == 2:
            completion += [says("user", 3), says("assistant", 14 - number // 2)]
        rows.append({"prompt": prompt, "completion": completion})
    return rows[:7] + [rows[2], rows[5]] + rows[7:] + [rows[11], rows[0]]


@reference
def row_lengths(rows, tokenizer):
    """(tokens of each prompt, tokens of each whole row), both with the chat template's own."""
    asked = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    whole = [tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    return [len(ids) for ids in asked], [len(ids) for ids in whole]


def _ends(rows, first):
    """The rows with one message on each side: the first, or the last."""
    return [{side: row[side][:1] if first else row[side][-1:] for side in row} for row in rows]


@exercise("03.cut", title="Which rows lose their end?", level="stretch", minutes=15)
def cut(function, *, tokenizer):
    """Compare with the lengths that the chat template gives, at limits where the usual mistakes show."""
    rows = rows_to_cut()
    prompts, lengths = row_lengths(rows, tokenizer)
    contents = [[message["content"] for part in ("prompt", "completion") for message in row[part]] for row in rows]
    bare = [sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) for texts in contents]
    limits = sorted(
        {sorted(lengths)[5], sorted(lengths)[10], sorted(prompts)[8], sorted(prompts)[3], max(lengths), min(lengths)}
    )
    found = []
    for limit in limits:
        answer = call_learner(function, rows_to_cut(), tokenizer, limit)
        if isinstance(answer, (int, float)):
            raise TryAgain("Return the numbers of the rows, as a list, not how many there are.")
        answer = expect_list(answer, "the answer", in_order=False)
        if any(isinstance(entry, dict) for entry in answer):
            raise TryAgain("Return the rows' numbers, counted from 0, not the rows themselves.")
        found.append(sorted(expect_whole_number(entry, "a row's number") for entry in answer))
    if found == [_above(lengths, limit) for limit in limits]:
        return
    mistakes = [
        (
            lambda limit: _above(prompts, limit),
            "You look at the prompt alone. A row whose prompt fits can still lose the end of its answer.",
        ),
        (lambda limit: _above(lengths, limit - 1), "A row that is exactly max_length long fits: nothing of it is cut."),
        (
            lambda limit: _above(bare, limit),
            "You count the tokens of the contents. The chat template adds its own: use apply_chat_template.",
        ),
        (
            lambda limit: _above([sum(map(len, texts)) for texts in contents], limit),
            "You count characters. max_length is in tokens.",
        ),
        *(
            (
                lambda limit, first=first: _above(row_lengths(_ends(rows, first), tokenizer)[1], limit),
                "You look at one message of the prompt and one of the completion. Either may have several: row['prompt'] + row['completion'].",
            )
            for first in (True, False)
        ),
        (
            lambda limit: [
                number for number, row in enumerate(rows) if rows.index(row) == number and lengths[number] > limit
            ],
            "Some rows stand here twice. Each has a number of its own: enumerate(rows).",
        ),
        (
            lambda limit: [number for number in _above(lengths, limit) if prompts[number] <= limit],
            "Rows that lose all of their answer are missing. They lose tokens of it, too.",
        ),
        (
            lambda limit: [number for number, length in enumerate(lengths) if length <= limit],
            "Those are the rows that fit. Return the others.",
        ),
        (lambda limit: [number + 1 for number in _above(lengths, limit)], "Count the rows from 0."),
    ]
    for wrong, hint in mistakes:
        if found == [wrong(limit) for limit in limits]:
            raise TryAgain(hint)
    if strangers := {number for answer in found for number in answer} - set(range(len(rows))):
        raise TryAgain(f"There are rows 0 to {len(rows) - 1}, and you return {min(strangers)}.")
    if any(len(set(answer)) < len(answer) for answer in found):
        raise TryAgain(
            "A number stands in your answer more than once. Some rows stand here twice: number them with enumerate(rows)."
        )
    limit, answer = next((limit, answer) for limit, answer in zip(limits, found) if answer != _above(lengths, limit))
    number = sorted(set(answer) ^ set(_above(lengths, limit)))[0]
    raise TryAgain(
        f"At max_length={limit}, look at row {number} again: it has {lengths[number]} tokens with the chat template."
    )


def _above(lengths, limit):
    return [number for number, length in enumerate(lengths) if length > limit]
