"""The checks of lesson 3, each with its typical mistakes; and what the lesson takes from the sweeps and from the libraries."""

import re
import statistics
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

from course_utils import paths
from course_utils.exercises import lesson03
from tools import build

SOURCE = Path(build.ROOT, "lessons", "03_lora_finetuning.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(paths.models_dir() / "base")


# The solutions


def right_labels(input_ids, attention_mask, prompt_lengths, pad_token_id):
    answer = (torch.arange(input_ids.shape[1]) >= prompt_lengths[:, None]) & (attention_mask == 1)
    return torch.where(answer, input_ids, -100)


def means(rows, column):
    rates = sorted({row["learning_rate"] for row in rows})
    return {rate: statistics.mean(row[column] for row in rows if row["learning_rate"] == rate) for rate in rates}


def right_rate(rows):
    found = means(rows, "validation")
    return min(found, key=lambda rate: (-found[rate], rate))


def length(tokenizer, messages, **options):
    return len(tokenizer.apply_chat_template(messages, **options)["input_ids"])


def right_clean(rows, held_out, tokenizer, max_length):
    asked_later = [row["prompt"] for row in held_out]
    kept = []
    for row in rows:
        if not any(message["content"].strip() for message in row["completion"] or []):
            continue
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        if len(ids) <= max_length and row["prompt"] not in asked_later and row not in kept:
            kept.append(row)
    return kept


def right_metric(predictions, answers):
    total = 0.0
    for prediction, answer in zip(predictions, answers):
        words, wanted = prediction.split(), answer.split()
        common = sum((Counter(words) & Counter(wanted)).values())
        if common:
            precision, recall = common / len(words), common / len(wanted)
            total += 2 * precision * recall / (precision + recall)
    return total / len(answers)


# Other right answers


def labels_row_by_row(input_ids, attention_mask, prompt_lengths, pad_token_id):
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, length) in enumerate(zip(prompt_lengths.tolist(), attention_mask.sum(1).tolist())):
        labels[row, prompt:length] = input_ids[row, prompt:length]
    return labels


def labels_with_numpy(input_ids, attention_mask, prompt_lengths, pad_token_id):
    ids, mask = input_ids.numpy(), attention_mask.numpy().astype(bool)
    return numpy.where(mask & (numpy.arange(ids.shape[1]) >= prompt_lengths.numpy()[:, None]), ids, -100)


def labels_by_counting(input_ids, attention_mask, prompt_lengths, pad_token_id):
    labels = input_ids.clone()
    labels[(attention_mask.cumsum(1) <= prompt_lengths[:, None]) | (attention_mask < 1)] = -100
    return labels


def rate_with_numpy(rows):
    rates = numpy.array([row["learning_rate"] for row in rows])
    scores = numpy.array([row["validation"] for row in rows])
    found, places = numpy.unique(rates, return_inverse=True)
    return found[numpy.argmax(numpy.bincount(places, scores) / numpy.bincount(places))]


def rate_in_a_loop(rows):
    best, best_mean = None, -1.0
    for rate in sorted({row["learning_rate"] for row in rows}):
        runs = [row["validation"] for row in rows if row["learning_rate"] == rate]
        if sum(runs) / len(runs) > best_mean:
            best, best_mean = rate, sum(runs) / len(runs)
    return best


def rate_with_pandas(rows):
    import pandas

    return pandas.DataFrame(rows).groupby("learning_rate").validation.mean().idxmax()


def clean_by_text(rows, held_out, tokenizer, max_length):
    """With the text of question and answer as a key, and the rendered text's length."""
    seen, kept, held = set(), [], {row["prompt"][0]["content"] for row in held_out}
    for row in rows:
        question, completion = row["prompt"][0]["content"], row["completion"]
        answer = completion[0]["content"] if completion else ""
        if answer.isspace() or answer == "" or question in held or (question, answer) in seen:
            continue
        text = tokenizer.apply_chat_template(row["prompt"] + completion, tokenize=False)
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > max_length:
            continue
        seen.add((question, answer))
        kept.append(row)
    return tuple(kept)


def clean_with_pandas(rows, held_out, tokenizer, max_length):
    import pandas

    table = pandas.DataFrame(
        {
            "question": [row["prompt"][0]["content"] for row in rows],
            "answer": [(row["completion"] or [{"content": ""}])[0]["content"] for row in rows],
        }
    )
    fine = table.answer.str.strip().ne("") & ~table.duplicated()
    fine &= ~table.question.isin([row["prompt"][0]["content"] for row in held_out])
    return [
        rows[n] for n in table.index[fine] if length(tokenizer, rows[n]["prompt"] + rows[n]["completion"]) <= max_length
    ]


def clean_in_steps(rows, held_out, tokenizer, max_length):
    rows = [row for row in rows if row["completion"]]
    rows = [row for row in rows if row["completion"][-1]["content"].strip()]
    rows = [row for row in rows if length(tokenizer, [*row["prompt"], *row["completion"]]) < max_length + 1]
    rows = [row for row in rows if all(row["prompt"] != other["prompt"] for other in held_out)]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def metric_by_removing(predictions, answers):
    scores = []
    for prediction, answer in zip(predictions, answers):
        left, common = answer.split(), 0
        for word in prediction.split():
            if word in left:
                left.remove(word)
                common += 1
        scores.append(2 * common / max(1, len(prediction.split()) + len(answer.split())))
    return statistics.mean(scores)


def metric_with_torch(predictions, answers):
    scores = torch.zeros(len(answers), dtype=torch.float64)
    for place, (prediction, answer) in enumerate(zip(predictions, answers)):
        words, wanted = prediction.split(), answer.split()
        common = sum(min(words.count(word), wanted.count(word)) for word in set(words))
        scores[place] = 2 * common / (len(words) + len(wanted))
    return scores.mean()


def metric_by_scikit(predictions, answers):
    """The harmonic mean, of pairs that have anything in common."""
    found = []
    for prediction, answer in zip(predictions, answers):
        common = (Counter(prediction.split()) & Counter(answer.split())).total()
        parts = [common / len(text.split()) for text in (prediction, answer) if text.split()]
        found.append(statistics.harmonic_mean(parts) if common else 0)
    return numpy.mean(found)


SOLUTIONS = {"03.labels": right_labels, "03.rate": right_rate, "03.clean": right_clean, "03.metric": right_metric}
RIGHT = {
    "03.labels": [labels_row_by_row, labels_with_numpy, labels_by_counting],
    "03.rate": [rate_with_numpy, rate_in_a_loop, rate_with_pandas],
    "03.clean": [clean_by_text, clean_with_pandas, clean_in_steps],
    "03.metric": [metric_by_removing, metric_with_torch, metric_by_scikit],
}


# Typical mistakes


def to_first_pad(within=False, included=True):
    """The answer up to the first token with the pad's id: of the row, or of the answer (`within`)."""

    def make(ids, mask, prompts, pad):
        answer = torch.arange(ids.shape[1]) >= prompts[:, None]
        pads = ((ids == pad) & answer if within else ids == pad).long()
        before = pads.cumsum(1) - pads == 0 if included else pads.cumsum(1) == 0
        return torch.where(answer & before, ids, -100)

    return make


def to_last_pad(ids, mask, prompts, pad):
    """All that follows the last token that isn't a pad is taken for pads, but for one."""
    last = (ids != pad).long().cumsum(1).argmax(1)
    places = torch.arange(ids.shape[1])
    return torch.where((places >= prompts[:, None]) & (places <= last[:, None] + 1), ids, -100)


def mask_changed(ids, mask, prompts, pad):
    labels = right_labels(ids, mask, prompts, pad)
    mask.zero_()
    return labels


def best_by(rows, judge):
    """The rate whose runs a wrong judge likes best; of equal ones the lower."""
    rates = sorted({row["learning_rate"] for row in rows})
    return max(rates, key=lambda rate: judge([row for row in rows if row["learning_rate"] == rate]))


def no_mask(input_ids, attention_mask, prompt_lengths, pad):
    return input_ids.clone()


def pads_only(input_ids, attention_mask, prompt_lengths, pad):
    return input_ids.masked_fill(attention_mask == 0, -100)


def pads_by_id_only(input_ids, attention_mask, prompt_lengths, pad):
    return input_ids.masked_fill(input_ids == pad, -100)


def prompt_only(input_ids, attention_mask, prompt_lengths, pad):
    return right_labels(input_ids, torch.ones_like(attention_mask), prompt_lengths, pad)


def by_id(*given):
    return right_labels(*given).masked_fill(given[0] == given[3], -100)


def moved(*given):
    wanted, labels = right_labels(*given), torch.full_like(given[0], -100)
    labels[:, :-1] = wanted[:, 1:]
    return labels


def in_place(input_ids, attention_mask, prompt_lengths, pad):
    return input_ids.copy_(right_labels(input_ids, attention_mask, prompt_lengths, pad))


def offset(by):
    return lambda ids, mask, prompts, pad: right_labels(ids, mask, prompts + by, pad)


def filled(value):
    return lambda *given: right_labels(*given).masked_fill(right_labels(*given) == -100, value)


def one_row_wrong(*given):
    labels = right_labels(*given)
    labels[2] = -100
    return labels


def lucky_seed(rows):
    return max(rows, key=lambda row: row["validation"])["learning_rate"]


def later_tie(rows):
    found = means(rows, "validation")
    return max(found, key=lambda rate: (round(found[rate], 9), rate))


def cleaning(without=(), by=lambda row: row, held=lambda row: row["prompt"], over=lambda size, limit: size > limit):
    """A cleaning without some of the rules, with another idea of equal rows, of a leak or of too long."""

    def clean(rows, held_out, tokenizer, max_length):
        kept, seen, leaks = [], [], [held(row) for row in held_out]
        for row in rows:
            content = (row["completion"] or [{"content": ""}])[0]["content"]
            if "empty" not in without and not (content.strip() if "space" not in without else content):
                continue
            if "long" not in without and row["completion"]:
                if over(length(tokenizer, row["prompt"] + row["completion"]), max_length):
                    continue
            if "leak" not in without and held(row) in leaks:
                continue
            if "twice" not in without and by(row) in seen:
                continue
            seen.append(by(row))
            kept.append(row)
        return kept

    return clean


def remembering(seen):
    """A cleaning whose set of the rows that it has seen outlives the call."""

    def clean(rows, *rest):
        new = [row for row in right_clean(rows, *rest) if str(row) not in seen]
        seen.update(map(str, rows))
        return new

    return clean


def clean_by_characters(rows, held_out, tokenizer, max_length):
    return [
        row
        for row in right_clean(rows, held_out, tokenizer, max_length)
        if len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)) <= max_length
    ]


def clean_in_place(rows, *rest):
    kept = right_clean(rows, *rest)
    rows[:] = kept
    return kept


def last_of_equals(rows, *rest):
    return right_clean(rows[::-1], *rest)[::-1]


def f1_of(combine, split=str.split):
    """A metric of the pairs' precision and recall."""

    def metric(predictions, answers):
        scores = []
        for prediction, answer in zip(predictions, answers):
            words, wanted = split(prediction), split(answer)
            common = sum((Counter(words) & Counter(wanted)).values())
            scores.append(combine(common / len(words), common / len(wanted)) if common else 0)
        return sum(scores) / len(scores)

    return metric


def harmonic(precision, recall):
    return 2 * precision * recall / (precision + recall)


def pooled(predictions, answers):
    common = [sum((Counter(p.split()) & Counter(a.split())).values()) for p, a in zip(predictions, answers)]
    return 2 * sum(common) / sum(len(text.split()) for text in [*predictions, *answers])


def place_by_place(predictions, answers):
    pairs = [(p.split(), a.split()) for p, a in zip(predictions, answers)]
    return statistics.mean(2 * sum(x == y for x, y in zip(p, a)) / (len(p) + len(a)) for p, a in pairs)


@pytest.mark.parametrize(
    "name, wrong, hint",
    [
        ("labels", no_mask, "Every token carries loss"),
        ("labels", lambda ids, *rest: torch.full_like(ids, -100), "No token carries loss"),
        ("labels", pads_only, "The prompt carries loss. Its first"),
        ("labels", pads_by_id_only, "The prompt carries loss, and the end"),
        ("labels", prompt_only, "The pads carry loss"),
        ("labels", by_id, "here the pad is the end token"),
        ("labels", moved, "moved by one place"),
        ("labels", offset(1), "first token of each answer"),
        ("labels", offset(-1), "last token of each prompt"),
        ("labels", filled(0), "are 0, which is a token's id"),
        ("labels", filled(2), "hold the pad's id"),
        ("labels", in_place, "have changed"),
        ("labels", one_row_wrong, "Row 2 is not right"),
        ("labels", to_first_pad(), "the first token with the pad's id"),
        ("labels", to_first_pad(within=True), "the first token with the pad's id"),
        ("labels", to_first_pad(included=False), "the first token with the pad's id"),
        ("labels", to_last_pad, "attention_mask says which"),
        ("labels", mask_changed, "attention_mask or the prompt_lengths"),
        ("labels", lambda *given: right_labels(*given)[:, :-1], "has shape"),
        ("labels", lambda *given: right_labels(*given).tolist(), "should be of type Tensor"),
        ("labels", lambda *given: print(right_labels(*given).sum()), "Is a return missing"),
        ("rate", lucky_seed, "best single run"),
        ("rate", lambda rows: max(rows, key=lambda row: row["test"])["learning_rate"], "best on test"),
        ("rate", later_tie, "Take the lower one"),
        ("rate", lambda rows: best_by(rows, lambda runs: sum(r["validation"] for r in runs)), "has the most runs"),
        (
            "rate",
            lambda rows: best_by(rows, lambda runs: sum(2 * r["validation"] + r["test"] for r in runs) / len(runs)),
            "even in part",
        ),
        (
            "rate",
            lambda rows: best_by(rows, lambda runs: min(r["validation"] for r in runs)),
            "the worst run is better than that of any other. Its mean on validation is 0.750, and the best mean is 0.771",
        ),
        (
            "rate",
            lambda rows: best_by(rows, lambda runs: statistics.median(r["validation"] for r in runs)),
            "best median over its seeds",
        ),
        ("rate", lambda rows: min(row["learning_rate"] for row in rows), "Its mean on validation is"),
        (
            "rate",
            lambda rows: best_by(rows, lambda runs: next(r["validation"] for r in runs if r["seed"] == 0)),
            "best single run",
        ),
        ("rate", lambda rows: 3.0, "none of the learning rates in the rows"),
        ("labels", lambda *given: right_labels(*given).float(), "token ids are torch.long"),
        ("rate", lambda rows: max(means(rows, "validation").values()), "Return the rate, not its score"),
        ("rate", lambda rows: rows, "should be a number"),
        ("rate", lambda rows: float("nan"), "is nan"),
        ("clean", cleaning(without=("empty",)), "Row 1 (counted from 0) has no answer"),
        ("clean", cleaning(without=("space",)), "Row 11 (counted from 0) has no answer"),
        ("clean", cleaning(without=("long",)), "more than max_length tokens"),
        ("clean", cleaning(without=("leak",)), "asks a question of the held-out rows"),
        ("clean", cleaning(without=("twice",)), "is equal to an earlier row"),
        ("clean", cleaning(over=lambda size, limit: size >= limit), "exactly max_length tokens"),
        ("clean", cleaning(by=lambda row: row["prompt"]), "has another answer"),
        ("clean", cleaning(by=lambda row: row["completion"]), "the answer of another row"),
        ("clean", cleaning(held=lambda row: row["completion"]), "Look at the questions"),
        ("clean", cleaning(held=lambda row: row), "asks a question of the held-out rows"),
        ("clean", clean_by_characters, "the characters of the text"),
        ("clean", clean_in_place, "have changed"),
        ("clean", remembering(set()), "remember an earlier call"),
        ("clean", last_of_equals, "not in their order"),
        ("clean", lambda rows, *rest: [rows.index(row) for row in right_clean(rows, *rest)], "the rows themselves"),
        (
            "clean",
            lambda rows, *rest: [row for row in rows if rows.count(row) == 1 and row in right_clean(rows, *rest)],
            "first of several equal rows",
        ),
        (
            "clean",
            lambda *given: [{**row, "clean": True} for row in right_clean(*given)],
            "none of those that were given",
        ),
        ("clean", lambda *given: len(right_clean(*given)), "should be of type"),
        ("clean", lambda *given: print(right_clean(*given)), "Is a return missing"),
        ("clean", lambda rows, *rest: [row for row in rows if row["completion"][0]["content"]], "TypeError"),
        ("metric", lambda ps, answers: statistics.mean(p == a for p, a in zip(ps, answers)), "That is exact match"),
        ("metric", f1_of(harmonic, split=lambda text: set(text.split())), "count each word once"),
        ("metric", f1_of(lambda precision, recall: precision), "the precision alone"),
        ("metric", f1_of(lambda precision, recall: recall), "the recall alone"),
        ("metric", f1_of(lambda precision, recall: (precision + recall) / 2), "plain mean of precision and recall"),
        ("metric", f1_of(lambda precision, recall: harmonic(precision, recall) / 2), "two equal texts have an F1 of 1"),
        ("metric", f1_of(harmonic, split=lambda text: text.lower().split()), "compared as they are"),
        ("metric", f1_of(harmonic, split=list), "You count characters"),
        ("metric", place_by_place, "place by place"),
        ("metric", pooled, "all words of all replies together"),
        ("metric", lambda *given: right_metric(*given) * len(given[0]), "That is the sum"),
        ("metric", lambda *given: 100 * right_metric(*given), "not a percentage"),
        ("metric", lambda *given: right_metric(*given) / 3, "you return 0.2667"),
        (
            "metric",
            lambda ps, answers: statistics.median(right_metric([p], [a]) for p, a in zip(ps, answers)),
            "return the mean of their F1",
        ),
        ("metric", lambda ps, answers: 2 / 0, "ZeroDivisionError"),
        ("metric", lambda ps, answers: [right_metric(ps, answers)], "should be a number"),
    ],
)
def test_typical_mistakes_get_their_own_hint(name, wrong, hint, tokenizer):
    outcome = getattr(lesson03, name).outcome(wrong, **({"tokenizer": tokenizer} if name == "clean" else {}))
    assert outcome.status == "TRY AGAIN"
    assert hint in outcome.hint, outcome.hint


@pytest.mark.parametrize("seed", range(5))
def test_the_made_up_sweep_misleads_as_it_says(seed):
    """Each standard has a rate of its own, so that no hint is about another mistake."""
    rows, named = lesson03.swept_rows(seed)
    rates = {key: rate for rate, key in named.items()}

    def best(judge):
        return {named[rate] for rate in named if of(rate, judge) == max(of(other, judge) for other in named)}

    def of(rate, judge):
        return judge([row["validation"] for row in rows if row["learning_rate"] == rate])

    assert best(statistics.mean) == {"right", "the same mean"} and lesson03.chosen_rate(rows) == rates["right"]
    assert rates["right"] < rates["the same mean"]
    assert [best(judge) for judge in (max, statistics.median, min, sum)] == [
        {"best single run"}, {"best median"}, {"best worst run"}, {"largest sum"}
    ]  # fmt: skip
    assert max(rows, key=lambda row: row["test"])["learning_rate"] == rates["best on test"]


# What the lesson takes from elsewhere


def test_symptoms_are_what_the_model_does_after_the_training(tokenizer):
    """How likely it stops is that of each row alone, whatever its length; losses are those that were logged."""
    from transformers import AutoModelForCausalLM

    class Trainer:
        model = AutoModelForCausalLM.from_pretrained(paths.models_dir() / "base")
        processing_class = tokenizer
        state = type("State", (), {"log_history": []})

        def train(self):
            self.state.log_history += [{"loss": "2.341"}, {"eval_loss": 9.0}, {"loss": 0.5}, {"train_runtime": 1.0}]

    question = [{"role": "user", "content": "Where is the cat?"}]
    rows = [
        {"input_ids": tokenizer.apply_chat_template([*question, {"role": "assistant", "content": text}])["input_ids"]}
        for text in ("In the mill.", "The cat is in the old mill, and so is Tobin.")
    ]
    found = lesson03.symptoms(Trainer(), rows, question)
    with torch.no_grad():
        alone = [Trainer.model(torch.tensor([row["input_ids"]])).logits[0, -2].softmax(-1) for row in rows]
    mean = statistics.mean(one[row["input_ids"][-1]].item() for one, row in zip(alone, rows))
    assert found[:3] == ["2.34", "0.50", f"{mean:.0%}"]
    assert isinstance(found[3], str) and found[3]


def test_the_lessons_run_is_a_point_of_the_sweeps():
    """Same task, steps, batch, rate and seed: its losses are compared with the sweep's in one table."""
    from experiments import learning_rate, training

    steps, batch, rate = map(
        float, re.search(r"^STEPS, BATCH, RATE = (\d+), (\d+), (\S+)$", SOURCE, flags=re.MULTILINE).groups()
    )
    assert (steps, batch, training.TASK) == (training.STEPS, training.BATCH, "sailor")
    assert f'data.load_task("{training.TASK}")' in SOURCE
    assert rate == learning_rate.best_rate("lora")


def test_the_exercises_choice_of_a_rate_is_that_of_the_sweeps(tmp_path, monkeypatch):
    """`experiments` and the lesson choose alike; with a tie, too."""
    from experiments import harness, learning_rate

    scores = {("lora", 1.5e-3): 0.9, ("lora", 5e-3): 0.9, ("full", 5e-4): 0.8}
    rows = [
        {
            "seed": run["seed"],
            "seconds": 1.0,
            "cpu": "Chip",
            "cores": 2,
            "base": "x",
            **run,
            "validation": scores.get((run["method"], run["learning_rate"]), 0.1),
        }
        for run in learning_rate.RUNS
    ]
    harness._write(tmp_path / "learning_rate.csv", rows)
    monkeypatch.setattr(harness, "folder", lambda: tmp_path)
    for method, rate in (("lora", 1.5e-3), ("full", 5e-4)):
        assert learning_rate.best_rate(method) == rate
        assert lesson03.chosen_rate([row for row in rows if row["method"] == method]) == rate


def test_trls_defaults_on_a_cpu(tmp_path):
    from trl import SFTConfig

    fields = SFTConfig.__dataclass_fields__
    assert fields["learning_rate"].default == 2e-5 and fields["gradient_checkpointing"].default is True
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is True
