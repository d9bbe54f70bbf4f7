"""Checks of lesson 3: labels for the answer only, a learning rate from a sweep, when to stop, which rows are cut off."""

from types import SimpleNamespace

from course_utils.exercises import TryAgain, call_learner, exercise, expect_number, expect_tensor, expect_type


def padded_batch(seed=0):
    """(input_ids, attention_mask, prompt_lengths, pad id): tensors (4, 12), (4, 12), (4); the pad is the end token, too."""
    import torch

    generator, end = torch.Generator().manual_seed(seed), 2
    input_ids, attention_mask = torch.full((4, 12), end), torch.zeros(4, 12, dtype=torch.long)
    prompt_lengths, lengths = torch.tensor([3, 5, 2, 6]), (9, 12, 7, 10)
    for row, length in enumerate(lengths):
        input_ids[row, : length - 1] = torch.randint(3, 90, (length - 1,), generator=generator)
        attention_mask[row, :length] = 1  # the end token at length - 1 is real
    return input_ids, attention_mask, prompt_lengths, end


def expected_labels(input_ids, attention_mask, prompt_lengths, offset=0):
    """input_ids where the answer stands, -100 elsewhere; `offset` moves the beginning of the answers."""
    import torch

    places = torch.arange(input_ids.shape[1])
    answer = (places >= prompt_lengths[:, None] + offset) & attention_mask.bool()
    return input_ids.masked_fill(~answer, -100)


@exercise("03.labels", title="Loss on the answer only", level="core", minutes=15)
def labels(function):
    """Compare with the closed form, on batches in which the pad token is also the end token."""
    import torch

    for seed in range(2):
        given = padded_batch(seed)
        input_ids, attention_mask, prompt_lengths, pad = padded_batch(seed)
        found = expect_tensor(call_learner(function, *given), input_ids.shape, "the labels")
        if found.dtype != torch.long:
            raise TryAgain(f"The labels are {found.dtype}; token ids are torch.long, and the loss takes nothing else.")
        if not torch.equal(given[0], input_ids):
            raise TryAgain("The input_ids that you were given have changed. Begin with labels = input_ids.clone().")
        wanted = expected_labels(input_ids, attention_mask, prompt_lengths)
        if torch.equal(found, wanted):
            continue
        no_pads, everywhere = attention_mask == 0, torch.full_like(input_ids, -100)
        by_id = wanted.masked_fill(input_ids == pad, -100)
        prompt_only = expected_labels(input_ids, torch.ones_like(attention_mask), prompt_lengths)
        shifted = everywhere.clone()
        shifted[:, :-1] = wanted[:, 1:]
        mistakes = [
            (input_ids, "Every token carries loss, prompt and pads among them. Write -100 where no loss is wanted."),
            (everywhere, "No token carries loss. The answer, from prompt_lengths on, keeps its ids."),
            (
                input_ids.masked_fill(no_pads, -100),
                "The prompt carries loss. Its first prompt_lengths[row] places are to be -100, too.",
            ),
            (
                input_ids.masked_fill(input_ids == pad, -100),
                "The prompt carries loss, and the end of the answer carries none.",
            ),
            (prompt_only, "The pads carry loss. They are where attention_mask is 0."),
            (
                by_id,
                "The end of each answer carries no loss: here the pad is the end token, too. Tell pads by attention_mask, not by id.",
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
            f"{int(attention_mask[row].sum())} of its places are no pads."
        )


def chosen_rate(rows):
    """The learning rate with the best mean `validation` over its seeds; of equal ones the lowest.

    rows: results of a sweep of one method, dicts with learning_rate and validation.
    """
    return min(_means(rows, "validation").items(), key=lambda entry: (-entry[1], entry[0]))[0]


def _means(rows, column):
    rates = sorted({row["learning_rate"] for row in rows})
    scores = {rate: [row[column] for row in rows if row["learning_rate"] == rate] for rate in rates}
    return {rate: sum(values) / len(values) for rate, values in scores.items()}


def swept_rows(seed=0):
    """Rows of a made-up sweep: 2e-3 and 1e-2 share the best mean validation; 5e-2 has the best seed, 1e-3 the best test and most seeds."""
    import random

    # Sums of these are exact, so the tie is one in whatever order they are added.
    validation = {
        1e-3: (0.625, 0.5, 0.625, 0.75, 0.625),
        2e-3: (0.75, 0.75, 0.9375),
        1e-2: (0.8125, 0.8125, 0.8125),
        5e-2: (1.0, 0.125, 0.25),
    }
    test = {1e-3: 1.0, 2e-3: 0.2, 1e-2: 0.2, 5e-2: 0.1}
    rows = [
        {"seed": number, "learning_rate": rate, "validation": score, "test": test[rate]}
        for rate, scores in validation.items()
        for number, score in enumerate(scores)
    ]
    random.Random(seed).shuffle(rows)
    return rows


@exercise("03.rate", title="Choose a learning rate", level="warm-up", minutes=5)
def rate(function):
    """Compare with the best mean on validation, where test, a lucky seed and a tie would mislead."""
    for seed in range(3):
        rows = swept_rows(seed)
        found = expect_number(call_learner(function, [dict(row) for row in rows]), "the learning rate")
        if found == chosen_rate(rows):
            continue
        mistakes = {
            max(rows, key=lambda row: row["validation"])[
                "learning_rate"
            ]: "That rate has the best single run, and its other seeds are poor. Take the mean over the seeds.",
            max(rows, key=lambda row: row["test"])[
                "learning_rate"
            ]: "That is the best on test, or has the most runs. Choose by the mean on validation alone: a test set that chose "
            "something, even in part, can't judge it any more.",
            1e-2: "Two rates share the best mean. Take the lower one: the higher is nearer to the edge.",
        }
        if found <= 1 and found not in {row["learning_rate"] for row in rows}:
            raise TryAgain("That is none of the learning rates. Return the rate, not its score.")
        raise TryAgain(mistakes.get(found, "That rate's mean on validation is not the best."))


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
]


def _below_best(losses, number, best):
    return losses[number] < losses[best]


@exercise("03.stop", title="When to stop", level="core", minutes=10)
def stop(function):
    """Compare with transformers' own callback, over several curves; recognise what differs."""
    found, right = [], [early_stopping(*case) for case in STOPPING_CASES]
    for losses, patience in STOPPING_CASES:
        answer = expect_type(call_learner(function, list(losses), patience), (tuple, list), "the answer")
        if len(answer) != 2:
            raise TryAgain(f"Return two numbers, best and last; you returned {len(answer)}.")
        found.append(tuple(int(expect_number(value, name)) for value, name in zip(answer, ("best", "last"))))
    if found == right:
        return
    mistakes = [
        (
            lambda losses, patience: (early_stopping(losses, patience)[1],) * 2,
            "You keep the last checkpoint. The one to keep is that with the lowest loss so far.",
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
    """Conversational prompt/completion rows of many lengths."""
    words = "the key lies under the old oak by the mill at the end of the long road to the harbour".split()
    return [
        {
            "prompt": [{"role": "user", "content": " ".join(words[: 2 + 5 * number % 17])}],
            "completion": [{"role": "assistant", "content": " ".join(words[: 1 + 7 * number % 11])}],
        }
        for number in range(16)
    ]


def row_lengths(rows, tokenizer):
    """(tokens of each prompt, tokens of each whole row), both with the chat template's own."""
    asked = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    whole = [tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    return [len(ids) for ids in asked], [len(ids) for ids in whole]


@exercise("03.cut", title="Which rows lose their end?", level="stretch", minutes=15)
def cut(function, *, tokenizer):
    """Compare with the lengths that the chat template gives, at limits where the usual mistakes show."""
    rows = rows_to_cut()
    prompts, lengths = row_lengths(rows, tokenizer)
    contents = [[row[part][0]["content"] for part in ("prompt", "completion")] for row in rows]
    bare = [sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in pair) for pair in contents]
    limits = sorted({sorted(lengths)[5], sorted(lengths)[10], sorted(prompts)[8], max(lengths), min(lengths)})
    found = []
    for limit in limits:
        answer = call_learner(function, rows_to_cut(), tokenizer, limit)
        if isinstance(answer, (int, float)):
            raise TryAgain("Return the numbers of the rows, as a list, not how many there are.")
        answer = list(expect_type(answer, (list, tuple, set), "the answer"))
        if any(isinstance(entry, dict) for entry in answer):
            raise TryAgain("Return the rows' numbers, counted from 0, not the rows themselves.")
        found.append(sorted(int(expect_number(entry, "a row's number")) for entry in answer))
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
            lambda limit: _above([sum(map(len, pair)) for pair in contents], limit),
            "You count characters. max_length is in tokens.",
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
    limit, answer = next((limit, answer) for limit, answer in zip(limits, found) if answer != _above(lengths, limit))
    number = sorted(set(answer) ^ set(_above(lengths, limit)))[0]
    raise TryAgain(
        f"At max_length={limit}, look at row {number} again: it has {lengths[number]} tokens with the chat template."
    )


def _above(lengths, limit):
    return [number for number, length in enumerate(lengths) if length > limit]
