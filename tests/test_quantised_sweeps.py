"""The sweeps of lesson 5, on a model made for the test."""

import json

import pytest
import torch

from adapter_checks import memory
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from course_utils import data
from support import set_constants

quiet_imports()

from bitsandbytes.nn import Linear4bit, Linear8bitLt

from experiments import cost, harness, quantised, quantised_cost, quantised_merge, training


@pytest.fixture
def small(results, short_rows, monkeypatch):
    """Four steps of two short rows; the folder of the results."""
    monkeypatch.setattr(data, "held_out_texts", lambda tokenizer: ["A lamp is in the mill."] * 2)
    set_constants(
        monkeypatch,
        {
            training: {"SCORED": 2, "BATCH": 2},
            quantised: {"STEPS": 4, "CHECKED": 2},
            quantised_merge: {"COMPARED": 2},
            quantised_cost: {"STEPS": 4},
        },
    )
    return results


def rows_of(script, runs, name):
    harness.sweep(name, runs, script.measure, log=lambda line: None)
    return data.load_results(name, harness.folder())


def test_each_form_is_what_its_name_says_and_only_that(small, monkeypatch):
    seen, make = {}, training.make_trainer

    def watched(*arguments, **options):
        trainer, clock = make(*arguments, **options)
        seen["model"] = trainer.model
        return trainer, clock

    monkeypatch.setattr(training, "make_trainer", watched)
    for weights in quantised.WEIGHTS:
        quantised.make_trainer(0, weights)
        model = seen["model"]
        four = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
        assert len(four) == (14 if weights.startswith("nf4") else 0), weights
        assert sum(isinstance(layer, Linear8bitLt) for layer in model.modules()) == (14 if weights == "int8" else 0)
        assert {layer.weight.quant_type for layer in four} <= {"nf4"} and {layer.compute_dtype for layer in four} <= {
            torch.float32
        }
        assert all(layer.weight.quant_state.nested == (weights == "nf4_double") for layer in four)
        assert not any(layer.support_avx512bf16_for_cpu for layer in four), "the processor's own layout is off"
        assert model.get_input_embeddings().weight.dtype == (torch.bfloat16 if weights == "bf16" else torch.float32)
        adapter = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert adapter == {torch.bfloat16 if weights == "nf4_trl" else torch.float32}, weights


def test_repacked_layers_pass_no_gradient_on_after_a_look(small):
    ids = torch.tensor([[3, 1, 4, 1]])

    def gradients(model):
        model.zero_grad()
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        return {
            name: weight.grad.clone()
            for name, weight in model.named_parameters()
            if weight.grad is not None and weight.grad.any()
        }

    for weights, cut in (("nf4", False), ("nf4_repacked", True)):
        model = quantised.make_trainer(0, weights)[0].model
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(0.01)
        before, logits = gradients(model), model(ids).logits.detach()
        model(ids)  # no look: in training
        assert all(torch.equal(one, gradients(model)[name]) for name, one in before.items())
        with torch.no_grad():
            model.eval()(ids)
        after = gradients(model)
        assert torch.equal(model(ids).logits, logits), "the loss stays right"
        changed = {name for name, one in before.items() if not torch.equal(one, after[name])}
        assert bool(changed) == cut, weights


def test_the_sweep_measures_what_the_lesson_shows(small):
    rows = rows_of(
        quantised, [{"seed": 0, "weights": weights} for weights in ("fp32", "nf4", "nf4_double")], "quantised"
    )
    full, nf4, double = rows
    assert full["footprint"] > nf4["footprint"] == double["footprint"], "get_memory_footprint leaves out the scales"
    assert full["weights_bytes"] > nf4["weights_bytes"]
    for row in rows:
        assert 0 <= row["test"] <= 1 and 0 <= row["novel"] <= 1 and row["validation_loss"] > 0
        assert row["held_out_after"] != row["held_out_before"]
    assert full["held_out_before"] != nf4["held_out_before"]


def test_the_routes_of_merging(small, monkeypatch):
    monkeypatch.setattr(quantised_merge, "DRAWS", 1)
    runs = [{"seed": 0, "trained_on": base} for base in ("nf4", "fp32")]
    every = rows_of(quantised_merge, runs, "quantised_merge")
    rows = {row["way"]: row for row in every if row["trained_on"] == "nf4"}
    assert list(rows) == ["trained", "original", "dequantised", "four_bit", "noise"]
    assert rows["trained"]["kl"] == 0 and rows["trained"]["top1"] == rows["trained"]["top1_question"] == 1
    for kl in ("kl", "kl_question"):
        assert rows["dequantised"][kl] < 1e-8 < 1e-5 < min(rows[way][kl] for way in ("original", "four_bit", "noise"))
    differences = {way: abs(row["loss"] - rows["trained"]["loss"]) for way, row in rows.items()}
    assert differences["dequantised"] < 1e-4 < differences["original"]
    rows = {row["way"]: row for row in every if row["trained_on"] == "fp32"}
    assert list(rows) == ["trained", "rounded", "noise"] and rows["trained"]["kl"] == 0
    assert min(rows["rounded"]["kl"], rows["noise"]["kl"]) > 1e-5


def test_noise_is_as_large_as_the_rounding_and_lies_elsewhere(small):
    original, rounded = quantised.load_base("fp32")[0], quantised_merge.dequantised()
    noisy, other, again = (quantised_merge.with_noise(rounded, draw) for draw in (0, 1, 0))
    for name, layer in memory.quantised_layers(original).items():
        base, error = rounded.get_submodule(name).weight, rounded.get_submodule(name).weight - layer.weight
        added = noisy.get_submodule(name).weight - base
        assert torch.allclose(added.abs(), error.abs(), atol=1e-6) and error.norm() > 0
        alike = (added * error).sum() / (added.norm() * error.norm())
        assert abs(alike) < 0.1, "the signs are random"
        assert torch.equal(noisy.get_submodule(name).weight, again.get_submodule(name).weight)
        assert not torch.equal(noisy.get_submodule(name).weight, other.get_submodule(name).weight)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(noisy.get_parameter(embedding), original.get_parameter(embedding))


def test_answers_are_told_from_questions(tiny_tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": said}]}
        for asked, said in (("Who?", "Edan"), ("Where, and why?", "Here"))
    ]
    batch, answers = quantised_merge.witnesses(tiny_tokenizer, rows)
    said = [tiny_tokenizer.decode(ids[1:][where[:-1]]) for ids, where in zip(batch["input_ids"], answers)]
    assert [text.replace(" ", "") for text in said] == ["Edan<|end|>", "Here<|end|>"]


def test_cost_measures_in_a_process_of_its_own(small, monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "in_fresh_process", lambda *arguments: asked.append(arguments) or {"peak_bytes": 1})
    assert quantised_cost.measure(seed=2, variant="nf4") == {"peak_bytes": 1} and asked == [
        ("experiments.quantised_cost", "nf4", 2)
    ]
    peaks = iter([10**9, 4 * 10**9] * 3)
    monkeypatch.setattr(cost, "peak_bytes", lambda: next(peaks))
    plain, checkpointing, adamw8bit = (
        json.loads(json.dumps(quantised_cost.measure_here(seed=0, variant=variant)))
        for variant in ("nf4", "nf4_checkpointing", "nf4_adamw8bit")
    )
    for row in (plain, checkpointing, adamw8bit):
        assert row["peak_bytes"] == 4 * 10**9 and row["seconds_per_step"] > 0
    assert plain["state_bytes"] == checkpointing["state_bytes"] > plain["footprint"]
    assert set(plain) == set(adamw8bit)


def test_variants_of_the_cost_change_what_they_say(small):
    from bitsandbytes.optim import AdamW

    for variant, optimizer, checkpointing in (
        ("nf4", torch.optim.AdamW, False),
        ("nf4_checkpointing", torch.optim.AdamW, True),
        ("nf4_adamw8bit", AdamW, False),
    ):
        trainer, _ = quantised.make_trainer(
            0, "nf4", max_steps=1, warmup_steps=0, **quantised_cost.CHANGES.get(variant, {})
        )
        trainer.train()
        assert (
            type(trainer.optimizer.optimizer) is optimizer
            and trainer.model.get_base_model().is_activation_checkpointing == checkpointing
        )
