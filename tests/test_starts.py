"""The sweeps of lesson 6, on a model made for the test."""

import pytest
import torch

from adapter_checks.errors import InputError
from course_utils import data
from experiments import harness, starts, starts_rank, training
from support import set_constants


@pytest.fixture
def small(results, short_rows, monkeypatch):
    """Four steps of two short rows; the folder of the results."""
    set_constants(
        monkeypatch,
        {
            training: {"SCORED": 2},
            starts: {"STEPS": 4, "BATCH": 2, "EVERY": 2},
        },
    )
    return results


def rows_of(script, runs, name):
    harness.sweep(name, runs, script.measure, log=lambda line: None)
    return data.load_results(name, harness.folder())


def test_each_method_is_what_its_name_says_and_only_that(small, monkeypatch):
    configs, make = [], training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda *a, **k: configs.append(k["lora"]) or make(*a, **k))
    rows = rows_of(
        starts, [{"seed": 0, "method": method, "learning_rate": 5e-3} for method in starts.METHODS], "starts"
    )
    said = {
        row["method"]: (config.init_lora_weights, config.use_rslora, config.use_dora, config.r, config.lora_alpha)
        for row, config in zip(rows, configs, strict=True)
    }
    assert said == {
        "default": (True, False, False, 8, 16),
        "gaussian": ("gaussian", False, False, 8, 16),
        "orthogonal": ("orthogonal", False, False, 8, 16),
        "pissa": ("pissa", False, False, 8, 16),
        "olora": ("olora", False, False, 8, 16),
        "rslora": (True, True, False, 8, 16),
        "dora": (True, False, True, 8, 16),
        "random": (True, False, False, 8, 16),
    }
    for row in rows:
        assert row["loss_2"] > 0 and row["loss_4"] > 0 and row["validation_loss"] > 0 and 0 <= row["test"] <= 1
    # All start at the base; the first rate of a warm-up is 0 and the second small, so at first the losses hardly differ.
    assert max(row["loss_2"] for row in rows) < 1.3 * min(row["loss_2"] for row in rows)
    assert len({row["loss_4"] for row in rows}) == len(rows), "each took its own way"


def test_the_control_is_oloras_start_with_other_directions(small):
    from peft.tuners.lora import LoraLayer

    ids = torch.arange(1, 9)[None]
    base = starts.make_trainer("default", 1e-3, seed=0).model.eval()
    found = {}
    for method in ("olora", "random"):
        model = starts.make_trainer(method, 1e-3, seed=0).model.eval()
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-4), "step 0 is the base's"
        for layer, untouched in zip(
            *((part for part in m.modules() if isinstance(part, LoraLayer)) for m in (model, base)), strict=True
        ):
            A, B, W = layer.lora_A["default"].weight, layer.lora_B["default"].weight, untouched.get_base_layer().weight
            assert torch.allclose(B.T @ B, torch.eye(len(A)), atol=1e-5) and torch.allclose(A, B.T @ W, atol=1e-4)
            assert not torch.allclose(layer.get_base_layer().weight, W, atol=1e-3)
        found[method] = B
    assert not torch.allclose(found["olora"].abs(), found["random"].abs(), atol=1e-2)


def test_other_ranks_train_at_the_rate_that_is_best_at_rank_8(small, monkeypatch):
    with pytest.raises(InputError, match="starts"):
        starts.best_rate("olora")
    columns = {"seconds": 1, "cpu": "c", "cores": 2, "base": harness.base_fingerprint()}
    rows = [
        {
            "seed": run["seed"],
            **columns,
            **run,
            "test": 1 / (1 + run["learning_rate"]),
            "validation": {1.5e-3: 0.5 + 0.1 * run["seed"], 5e-3: 0.6, 1.5e-2: 0.6}.get(run["learning_rate"], 0.4),
        }
        for run in starts.RUNS
    ]
    harness._write(small / "starts.csv", rows)
    assert starts.best_rate("olora") == 1.5e-3, (
        "0.6 on average at three rates: the lowest is taken; test scores play no part"
    )
    harness._write(small / "starts.csv", rows[:-1])
    with pytest.raises(InputError, match="1 runs of starts are missing.*experiments.run starts"):
        starts.best_rate("olora")

    harness._write(small / "starts.csv", rows)
    configs, make = [], training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda *a, **k: configs.append(k["lora"]) or make(*a, **k))
    (row,) = rows_of(starts_rank, [{"seed": 0, "method": "pissa", "rank": 4}], "starts_rank")
    assert row["learning_rate"] == 1.5e-3 and row["validation_loss"] > 0 and row["loss_4"] > 0
    assert (configs[0].r, configs[0].lora_alpha, configs[0].init_lora_weights) == (4, 16, "pissa")
