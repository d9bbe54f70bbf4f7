"""The checks of lesson 3, each with its typical mistakes; and what the lesson says in prose."""

import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from course_utils import data, runtime
from course_utils.exercises import lesson03
from support import swept
from tools import build

SOURCE = Path(build.ROOT, "lessons", "03_lora_finetuning.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(runtime.models_dir() / "base")


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
    "name, solution", [("labels", right_labels), ("rate", right_rate), ("stop", right_stop), ("cut", right_cut)]
)
def test_stub_is_to_do_and_solution_passes(name, solution, tokenizer):
    check, given = getattr(lesson03, name), {"tokenizer": tokenizer} if name == "cut" else {}
    assert check.outcome(lambda *given: ..., **given).status == "TODO"
    outcome = check.outcome(solution, **given)
    assert outcome.passed, outcome


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


# What the lesson says in prose


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


def test_what_the_lesson_says_of_trls_defaults(tmp_path):
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


# What it says of the sweeps, by their committed results


def test_what_the_lesson_says_of_learning_rates():
    score = swept("learning_rate", "validation", "method", "learning_rate")
    best = {method: max(score[key] for key in score if key[0] == method) for method in ("lora", "full")}
    assert score["lora", 1.5e-2] == best["lora"] and score["full", 1.5e-3] == best["full"], "ten times"
    assert 0.4 < score["lora", 1.5e-3][0] < 0.6, "about half"
    good = {method: [rate for kind, rate in score if kind == method and score[kind, rate][0] > 0.95] for method in best}
    assert {method: sorted(rates) for method, rates in good.items()} == {
        "lora": [5e-3, 1.5e-2],
        "full": [5e-4, 1.5e-3, 5e-3],
    }
    assert score["lora", 5e-2][2] < 0.05, "one step above nothing"
    assert round(900 * (score["full", 1.5e-3][0] - score["full", 5e-3][0])) == 1, "one answer in 900 apart"
    test = swept("learning_rate", "test", "method", "learning_rate")
    lora, full = test["lora", 1.5e-2], test["full", 1.5e-3]
    assert round(test["full", 5e-3][0], 2) == 0.92
    assert max(lora[1], full[1]) <= min(lora[2], full[2]), "agree within their spread"


def test_what_the_lesson_says_of_forgetting():
    score, lost = (
        swept("learning_rate", column, "method", "learning_rate") for column in ("validation", "held_out_after")
    )
    for key, nats in ((("lora", 5e-3), 2.6), (("full", 5e-4), 1.4)):
        assert abs(score[key][0] - 0.97) < 0.015 and round(lost[key][0], 1) == nats, "at about 97% right"
    assert (
        lost["lora", 1.5e-2][1] > lost["full", 1.5e-3][2]
        and round(100 * (score["lora", 1.5e-2][0] - score["lora", 5e-3][0])) == 3
    )


def test_what_the_lesson_says_of_cost():
    trainable, saved = (swept("learning_rate", column, "method") for column in ("trainable", "saved_bytes"))
    assert round(trainable["full"][0] / trainable["lora"][0]) == round(saved["full"][0] / saved["lora"][0]) == 23
    assert round(12 * trainable["full"][0] / 1e6) == 40, "gradients and Adam's two numbers, MB"
    seconds, peak, training = (
        swept("cost", column, "method") for column in ("seconds_per_step", "peak_bytes", "training_bytes")
    )
    for found in (seconds, peak, training):
        assert 1 < found["lora"][0] / found["full"][0] < 1.4, "a little more of both"


def test_what_the_lesson_says_of_speed():
    speed, loss = (swept("throughput", column, "loop") for column in ("tokens_per_second", "last_loss"))
    assert 0.75 < speed["trl"][0] / speed["bare"][0] < 0.85, "four fifths"
    assert 0.93 < speed["trl_model_loss"][0] / speed["bare"][0] < 1.07, "within the spread"
    assert len({f"{mean:.4f}" for mean, _, _ in loss.values()}) == 1


def test_what_the_lesson_says_of_ranks():
    loss = {step: swept("rank", f"loss_{step}", "rank") for step in (25, 50, 75, 100)}
    for step, by_rank in loss.items():
        assert max(by_rank[rank][0] for rank in (4, 8, 16, 64)) < by_rank[1][0], step
    assert 2.5 < loss[50][1][0] / loss[50][4][0] < 3.5, "three times that of rank 4"
    test = swept("rank", "test", "rank")
    assert round(test[1][0], 2) == 0.93 and all(0.98 <= test[rank][0] <= 1 for rank in (4, 8, 16, 64))


def test_what_the_lesson_says_of_facts():
    told, reworded = (swept("recall", column, "rank") for column in ("told", "reworded"))
    assert round(told[1][0], 1) == 0.1 and 0.5 <= told[4][1] < 0.6 and told[4][2] == 1, "a tenth; between half and all"
    assert (
        told[16][1] > 0.97
        and told[64][1] > 0.97
        and abs(reworded[64][0] - 0.5) < 0.05
        and reworded[64][2] - reworded[64][1] > 0.5
    )


def test_what_the_lesson_says_of_alpha_and_layers():
    score, lost = (swept("alpha", column, "alpha") for column in ("test", "held_out_after"))
    assert score[64][2] < 0.05 and 0 < score[16][0] - score[4][0] < 0.02 and lost[4][2] < lost[16][1]
    score, lost = (swept("targets", column, "targets") for column in ("test", "held_out_after"))
    assert (
        round(100 * (score["all_linear"][0] - score["attention"][0])) == 3
        and score["attention"][2] - score["attention"][1] > 0.04
    )
    assert abs(score["all_linear"][0] - score["feed_forward"][0]) < 0.005
    assert lost["attention"][0] < lost["feed_forward"][0] < lost["all_linear"][0]


def test_what_the_lesson_says_of_too_few_rows():
    training, validation = (swept("overfitting", f"{kind}_loss", "rows", "step") for kind in ("training", "validation"))
    on_32 = {step: mean for (rows, step), (mean, _, _) in validation.items() if rows == 32}
    assert max(on_32.values()) < 1.1 * min(on_32.values()), "hardly moves"
    seeds = {
        (row["seed"], row["step"]): row["validation_loss"]
        for row in data.load_results("overfitting")
        if row["rows"] == 32
    }
    assert seeds[0, 200] < seeds[0, 20] and seeds[1, 200] > seeds[1, 20] and seeds[2, 40] < seeds[2, 20] < seeds[2, 200]
    assert training[32, 20][0] / training[32, 200][0] > 1000
    assert round(swept("overfitting", "test", "rows")[32][0], 1) == 0.2
    on_2000 = [validation[2000, step][0] for step in (20, 60, 100, 200)]
    assert on_2000 == sorted(on_2000, reverse=True)


def test_what_the_lesson_says_of_prompts_and_few_examples():
    score = swept("few_shot", "score", "task", "method", "examples")
    assert all(high == 0 for (_, method, _), (_, _, high) in score.items() if method == "prompt")
    for task in ("reading", "extract", "mood"):
        few, many = score[task, "lora", 64][0], score[task, "lora", 2000][0]
        assert 0.95 < few < many and many - few < 0.05, "almost perfectly; a few points"
    assert abs(score["sailor", "lora", 64][0] - 0.4) < 0.03 and round(score["sailor", "lora", 2000][0], 2) == 0.84
