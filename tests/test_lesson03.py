"""The checks of lesson 3, each with its typical mistakes; and what the lesson takes from the sweeps and from the libraries."""

import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from course_utils import paths, runtime
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


def right_stop(losses, patience):
    best = 0
    for number, loss in enumerate(losses):
        if loss < losses[best]:
            best = number
        if number - best >= patience:
            return best, number
    return best, len(losses) - 1


def length(tokenizer, messages, **options):
    return len(tokenizer.apply_chat_template(messages, **options)["input_ids"])


def right_cut(rows, tokenizer, max_length):
    return [
        number for number, row in enumerate(rows) if length(tokenizer, row["prompt"] + row["completion"]) > max_length
    ]


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


def stop_by_counting(losses, patience):
    lowest, kept, waited = math.inf, 0, 0
    for number in range(len(losses)):
        if losses[number] < lowest:
            lowest, kept, waited = losses[number], number, 0
        else:
            waited += 1
        if waited == patience:
            break
    return [kept, number]


def stop_by_prefixes(losses, patience):
    best = [losses.index(min(losses[: number + 1])) for number in range(len(losses))]
    ends = [number for number in range(len(losses)) if number - best[number] >= patience] or [len(losses) - 1]
    return numpy.array([best[ends[0]], ends[0]])


def stop_by_the_callback(losses, patience):
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

    arguments = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    callback, control, state = EarlyStoppingCallback(patience), TrainerControl(), TrainerState()
    for number, loss in enumerate(losses):
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, number
        if control.should_training_stop:
            break
    return torch.tensor([state.best_global_step, number])


def cut_by_text(rows, tokenizer, max_length):
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return numpy.flatnonzero(numpy.array(sizes) > max_length)


def cut_by_truncating(rows, tokenizer, max_length):
    def ids(row, **options):
        return tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=False, **options)

    return {n for n, row in enumerate(rows) if ids(row) != ids(row, truncation=True, max_length=max_length)}


def cut_as_a_batch(rows, tokenizer, max_length):
    batch = tokenizer.apply_chat_template([row["prompt"] + row["completion"] for row in rows], padding=True, return_tensors="pt",
                                          return_dict=True)  # fmt: skip
    return (batch["attention_mask"].sum(1) > max_length).nonzero()[:, 0]


RIGHT = {
    "03.labels": [labels_row_by_row, labels_with_numpy, labels_by_counting],
    "03.rate": [rate_with_numpy, rate_in_a_loop, rate_with_pandas],
    "03.stop": [stop_by_counting, stop_by_prefixes, stop_by_the_callback],
    "03.cut": [cut_by_text, cut_by_truncating, cut_as_a_batch],
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


def one_message(first):
    def cut(rows, tokenizer, max_length):
        return right_cut(
            [{k: v[:1] if first else v[-1:] for k, v in row.items()} for row in rows], tokenizer, max_length
        )

    return cut


def one_field(rows, tokenizer, max_length):
    """The first message of the prompt, all of the completion."""
    return right_cut([row | {"prompt": row["prompt"][:1]} for row in rows], tokenizer, max_length)


def by_index(rows, tokenizer, max_length):
    return [rows.index(rows[number]) for number in right_cut(rows, tokenizer, max_length)]


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


def counted(better, anew=True, waits=lambda patience: patience):
    """Early stopping that goes by `better`(losses, number, best so far)."""

    def run(losses, patience):
        best, waited = 0, 0
        for number in range(1, len(losses)):
            waited = (0 if anew else waited) if better(losses, number, best) else waited + 1
            best = number if losses[number] < losses[best] else best
            if waited >= waits(patience):
                return best, number
        return best, len(losses) - 1

    return run


def below_best(losses, number, best):
    return losses[number] < losses[best]


def contents(row):
    return [message["content"] for message in row["prompt"] + row["completion"]]


def bare_lengths(rows, tokenizer, max_length):
    return [number for number, row in enumerate(rows) if len("".join(contents(row))) > max_length]


def without_template(rows, tokenizer, max_length):
    sizes = [sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in contents(row)) for row in rows]
    return [number for number, size in enumerate(sizes) if size > max_length]


def prompts_alone(rows, tokenizer, max_length):
    sizes = [length(tokenizer, row["prompt"], add_generation_prompt=True) for row in rows]
    return [number for number, size in enumerate(sizes) if size > max_length]


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
        ("stop", lambda *given: (right_stop(*given)[0] + 0.5, right_stop(*given)[1]), "whole number, but is 2.5"),
        ("stop", lambda *given: (given[0].index(min(given[0])), right_stop(*given)[1]), "never take place"),
        ("stop", counted(lambda losses, number, best: losses[number] < losses[best] - 1e-3), "by however little"),
        ("cut", one_message(first=True), "Either may have several"),
        ("cut", one_message(first=False), "Either may have several"),
        ("cut", one_field, "look at row"),
        ("cut", by_index, "stand here twice"),
        ("cut", lambda *given: sorted(set(by_index(*given))), "stand here twice"),
        (
            "cut",
            lambda *given: [n for n in right_cut(*given) if n not in prompts_alone(*given)],
            "lose all of their answer",
        ),
        ("cut", lambda *given: [n + 0.5 for n in right_cut(*given)], "should be a whole number"),
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
        ("stop", lambda losses, patience: (right_stop(losses, patience)[1],) * 2, "keep the last checkpoint"),
        ("stop", counted(below_best, waits=lambda patience: 1), "first evaluation that is no better"),
        ("stop", counted(lambda losses, number, best: losses[number] < losses[number - 1]), "compare with the best"),
        ("stop", counted(below_best, anew=False), "count begins anew"),
        ("stop", counted(lambda losses, number, best: losses[number] <= losses[best]), "equal loss is no progress"),
        ("stop", counted(below_best, waits=lambda patience: patience + 1), "one evaluation too late"),
        ("stop", counted(below_best, waits=lambda patience: math.inf), "You never stop"),
        ("stop", lambda losses, patience: tuple(n + 1 for n in right_stop(losses, patience)), "from 0"),
        ("stop", lambda losses, patience: right_stop(losses, patience)[::-1], "swapped"),
        ("stop", lambda losses, patience: (0, 0), "the library's callback gives"),
        ("stop", lambda losses, patience: right_stop(losses, patience)[0], "should be of type tuple"),
        ("stop", lambda losses, patience: (1, 2, 3), "you returned 3"),
        ("stop", lambda losses, patience: losses[10], "IndexError"),
        ("cut", lambda *given: len(right_cut(*given)), "not how many there are"),
        ("cut", lambda *given: [given[0][number] for number in right_cut(*given)], "not the rows themselves"),
        ("cut", prompts_alone, "look at the prompt alone"),
        ("cut", lambda rows, tok, limit: right_cut(rows, tok, limit - 1), "exactly max_length long fits"),
        ("cut", without_template, "The chat template adds its own"),
        ("cut", bare_lengths, "You count characters"),
        ("cut", lambda *given: [n for n in range(len(given[0])) if n not in right_cut(*given)], "the rows that fit"),
        ("cut", lambda *given: [n + 1 for n in right_cut(*given)], "Count the rows from 0"),
        ("cut", lambda rows, tok, limit: right_cut(rows, tok, limit + 1), "look at row"),
        ("cut", lambda *given: [99], "rows 0 to 19"),
        ("cut", lambda *given: ["none"], "should be a number"),
        ("cut", lambda *given: print(right_cut(*given)), "Is a return missing"),
    ],
)
def test_typical_mistakes_get_their_own_hint(name, wrong, hint, tokenizer):
    outcome = getattr(lesson03, name).outcome(wrong, **({"tokenizer": tokenizer} if name == "cut" else {}))
    assert outcome.status == "TRY AGAIN"
    assert hint in outcome.hint, outcome.hint


def test_the_reference_of_early_stopping_is_what_a_trainer_does(tmp_path, tiny_model, tiny_tokenizer):
    """A real Trainer, fed with planted validation losses, stops where the reference says, and keeps that checkpoint."""
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    losses, patience = lesson03.STOPPING_CASES[1]

    class Planted(Trainer):
        def evaluate(self, *_, **__):
            metrics = {"eval_loss": losses[self.state.global_step - 1]}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    ids = tiny_tokenizer("a key")["input_ids"]
    trainer = Planted(
        tiny_model,
        TrainingArguments(
            str(tmp_path),
            max_steps=len(losses),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            **runtime.trainer_settings(),
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
        eval_dataset=[{"input_ids": ids}],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)],
    )
    trainer.train()
    best, last = lesson03.early_stopping(losses, patience)
    assert trainer.state.global_step == last + 1 < len(losses)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")


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


@pytest.mark.parametrize("cache, mixed", [(False, False), (True, True)])
def test_packed_rows_are_kept_apart_only_without_the_cache(cache, mixed, tiny_model):
    ids = torch.randint(10, 90, (1, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[*range(10), *range(14)]])
    with torch.no_grad():
        together = tiny_model(ids, position_ids=positions, use_cache=cache).logits[0, 10:]
        alone = tiny_model(ids[:, 10:]).logits[0]
    assert ((together - alone).abs().max() > 1e-2) == mixed
