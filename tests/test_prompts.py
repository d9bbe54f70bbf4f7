"""The sweeps on prompt tuning and its relatives, on a model made for the test."""

import pytest
import torch

from adapter_checks.errors import InputError
from adapter_checks.generation import generate
from course_utils import data
from course_utils.tasks import get_task
from experiments import harness, prompts, prompts_cost, prompts_rate, prompts_start, run, training
from support import set_constants


@pytest.fixture
def small(results, short_rows, monkeypatch):
    """Two steps of two short rows; the folder of the results."""
    sizes = {
        training: {"SCORED": 2, "BATCH": 2},
        prompts_rate: {"STEPS": 2, "SCORED": 2},
        prompts: {"SCORED": 4},
        prompts_cost: {"ROWS": 2, "NEW": 2, "CALLS": 2},
    }
    set_constants(monkeypatch, sizes)
    load_task = data.load_task
    # `short_rows` looks for rows of fewer characters than some tasks have
    monkeypatch.setattr(data, "load_task", lambda task, split: load_task("reading", split))
    make = training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda *a, **k: make(*a, **k | {"logging_steps": 1}))
    return results


def rows_of(script, runs, name):
    harness.sweep(name, runs, script.measure, log=lambda line: None)
    return data.load_results(name, harness.folder())


def searched(folder, validation=lambda run: 0.5, loss=lambda run: 1.0):
    """A search as if it had been made; functions from a run to what it found."""
    columns = {"seconds": 1, "cpu": "c", "cores": 2, "base": harness.base_fingerprint()}
    rows = [
        {"seed": 0, **columns, **run, "validation": validation(run), f"loss_{prompts_rate.STEPS}": loss(run)}
        for run in prompts_rate.RUNS
    ]
    harness._write(folder / "prompts_rate.csv", rows)
    return rows


def test_each_method_trains_what_its_name_says(small, monkeypatch):
    """Parameters by hand, on a model of 2 layers, width 64, 128 in the feed-forward part, 2 heads for keys and values."""
    expected = {
        "prompt": 20 * 64,
        "p_tuning": 20 * 64 + (64 * 256 + 256) + (256 * 256 + 256) + (256 * 64 + 64),
        "prefix": 20 * 2 * 2 * 64,
        "prefix_projected": 20 * 64 + (64 * 256 + 256) + (256 * 256 + 256),
        "ia3": 2 * (64 + 64 + 128),
        "norms": (2 * 2 + 1) * 64,
        "vera": 2 * 2 * (64 + 64),
        "lora_1": 2 * 2 * (64 + 64),
        "lora_8": 2 * 8 * (4 * 128 + 3 * 192),
    }
    assert set(expected) == set(prompts_rate.RATES)
    searched(small)
    rows = rows_of(prompts, [{"seed": 0, "task": "reading", "method": method} for method in expected], "prompts")
    assert {row["method"]: row["trainable"] for row in rows} == expected
    for row in rows:
        assert row["learning_rate"] == prompts_rate.RATES[row["method"]][0], "of equal rates the first"
        assert row["loss_2"] > 0 and 0 <= row["test"] <= 1 and 0 <= row["test_padded"] <= 1
        assert row["method"] in prompts.EMBEDDED or row["test"] == row["test_padded"]
    kept = {row["method"]: row["saved_bytes"] for row in rows}
    assert kept["p_tuning"] == kept["prompt"] and kept["prefix_projected"] == kept["prefix"], "the network is not saved"


def test_the_search_keeps_the_losses_and_scores_validation_rows(small, monkeypatch):
    scored = []
    monkeypatch.setattr(
        training, "score", lambda model, tokenizer, task, rows: scored.append(rows) or {"score": 0.25, "novel": 0.0}
    )
    (row,) = rows_of(prompts_rate, [prompts_rate.RUNS[0]], "prompts_rate")
    assert row["validation"] == 0.25 and row["loss_2"] > 0
    assert scored[0].to_list() == data.load_task("reading", "validation").select(range(2)).to_list()


def test_the_best_rate_is_that_of_the_task_and_of_the_validation_rows(small):
    with pytest.raises(InputError, match="prompts_rate"):
        prompts_rate.best_rate("reading", "prompt")

    def validation(run):
        if (run["task"], run["method"]) == ("mood", "prompt"):
            return {0.1: 0.75, 0.3: 0.75}.get(run["learning_rate"], 0.25)
        return run["learning_rate"]

    rows = searched(small, validation, loss=lambda run: 1 - run["learning_rate"])
    assert prompts_rate.best_rate("mood", "prompt") == 0.3, "of equal scores the lower loss"
    assert prompts_rate.best_rate("reading", "prompt") == prompts_rate.RATES["prompt"][-1]
    harness._write(small / "prompts_rate.csv", rows[:-1])
    with pytest.raises(InputError, match="1 runs of prompts_rate are missing.*experiments.run prompts_rate"):
        prompts_rate.best_rate("reading", "prompt")


def test_padded_batches_give_other_answers_than_each_row_alone(small):
    """The trap itself: with embedded virtual tokens only, and not in a batch of one."""
    rows = data.load_task("reading", "test").select(range(4))
    for method in ("prompt", "lora_8"):
        trainer, _ = prompts_rate.make_trainer("reading", method, 0.1, 0)
        torch.manual_seed(0)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data += torch.randn_like(weight)
        model, tokenizer = trainer.model, trainer.processing_class
        size = {"max_new_tokens": get_task("reading").max_new_tokens}
        alone = [generate(model, tokenizer, [row["prompt"]], **size)[0] for row in rows]
        assert generate(model, tokenizer, [row["prompt"] for row in rows], **size) == alone
        padded = prompts.answers_of_padded_batches(model, tokenizer, "reading", rows)
        assert (padded == alone) == (method == "lora_8")
        single = [prompts.answers_of_padded_batches(model, tokenizer, "reading", rows.select([i]))[0] for i in range(4)]
        assert single == alone


def test_starts_and_numbers_of_virtual_tokens(small):
    searched(small)
    runs = [run for run in prompts_start.RUNS if run["seed"] == 0 and (run["tokens"] == 20 or run["tokens"] == 5)]
    rows = rows_of(prompts_start, runs, "prompts_start")
    said = {(row["tokens"], row["start"], row["rate"]): row for row in rows}
    assert len(said) == 4 and {row["learning_rate"] for row in rows} == {0.03, 1.0}
    embedding = training.load_base()[0].get_input_embeddings().weight.norm(dim=1).mean().item()
    text = said[5, "TEXT", "best"]["norm_before"]
    drawn, normal = (said[20, start, "best"]["norm_before"] for start in ("SAMPLE_VOCAB", "RANDOM"))
    assert text == pytest.approx(embedding, rel=0.2) and drawn == pytest.approx(embedding, rel=0.2)
    assert normal == pytest.approx(8, rel=0.1), "64 numbers from a normal distribution"
    assert all(row["norm_after"] != row["norm_before"] for row in rows)


def test_cost_is_that_of_a_call(small):
    runs = [{"seed": 0, "method": method, "tokens": tokens} for method, tokens in prompts_cost.METHODS]
    rows = rows_of(prompts_cost, runs, "prompts_cost")
    assert len({row["prompt_tokens"] for row in rows}) == 1 and all(row["seconds_per_call"] > 0 for row in rows)
    assert "prompts_cost" in run.TIMED


def test_every_description_gives_the_virtual_tokens_words():
    """Of the shipped tokenizer: shorter ones would be repeated, longer ones lose their end, which is no fault, but should be seen."""
    from transformers import AutoTokenizer

    from course_utils import paths

    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    counts = {task: len(tokenizer(text)["input_ids"]) for task, text in prompts_rate.DESCRIPTIONS.items()}
    assert all(15 <= count <= 45 for count in counts.values()), counts
