"""The checks of lesson 3, each with its typical mistakes; and what the lesson takes from the sweeps and from the libraries."""

import math
import re
import statistics
from pathlib import Path

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


# Typical mistakes


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


def bare_lengths(rows, tokenizer, max_length):
    texts = [row["prompt"][0]["content"] + row["completion"][0]["content"] for row in rows]
    return [number for number, text in enumerate(texts) if len(text) > max_length]


def without_template(rows, tokenizer, max_length):
    pairs = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]
    sizes = [sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in pair) for pair in pairs]
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
            "Two rates share the best mean",
        ),
        (
            "rate",
            lambda rows: best_by(rows, lambda runs: statistics.median(r["validation"] for r in runs)),
            "Two rates share the best mean",
        ),
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
        ("cut", lambda *given: [n for n in range(16) if n not in right_cut(*given)], "the rows that fit"),
        ("cut", lambda *given: [n + 1 for n in right_cut(*given)], "Count the rows from 0"),
        ("cut", lambda rows, tok, limit: right_cut(rows, tok, limit + 1), "look at row"),
        ("cut", lambda *given: [99], "rows 0 to 15"),
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


def test_the_made_up_sweep_misleads_as_it_says():
    rows = lesson03.swept_rows()
    found = means(rows, "validation")
    assert math.isclose(found[2e-3], found[1e-2]) and lesson03.chosen_rate(rows) == 2e-3
    assert lucky_seed(rows) == 5e-2 and max(rows, key=lambda row: row["test"])["learning_rate"] == 1e-3


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
