"""The sweeps: what they write and read back, how they go on after an interrupt, and each script on a model made for the test."""

import csv
import importlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapter_checks.errors import InputError
from course_utils import data, evaluation, paths, runtime
from experiments import harness, run
from pretraining import mixture, tasks
from pretraining import world as world_module

MINUTES_FOR_A_LESSON = 90


RUNS = [{"seed": seed, "rank": rank} for seed in (0, 1) for rank in (1, 8)]


class Measure:
    """Counts its runs, and stops as a person would at run number `stop_at`."""

    def __init__(self, stop_at=None, **columns):
        self.done, self.stop_at, self.columns = [], stop_at, columns or {"score": 0.25}

    def __call__(self, **run):
        if len(self.done) == self.stop_at:
            raise KeyboardInterrupt
        self.done.append(run)
        return self.columns


def quiet(line):
    pass


# ---------------------------------------------------------------------------------------------- going on after an interrupt


def test_an_interrupted_sweep_goes_on_and_repeats_nothing(results):
    first = Measure(stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        harness.sweep("demo", RUNS, first, log=quiet)
    assert first.done == RUNS[:1] and len(data.load_results("demo", results)) == 1
    kept = (results / "demo.csv").read_text().splitlines()[1]
    rest = Measure()
    harness.sweep("demo", RUNS, rest, log=quiet)
    assert rest.done == RUNS[1:]
    rows = data.load_results("demo", results)
    assert [{"seed": row["seed"], "rank": row["rank"]} for row in rows] == RUNS
    assert (results / "demo.csv").read_text().splitlines()[1] == kept, "the first run's row was made once"
    again = Measure()
    harness.sweep("demo", RUNS, again, log=quiet)
    assert again.done == []
    # The proof that a missing row is found: without it, its run is done again, and no other.
    lines = (results / "demo.csv").read_text().splitlines(keepends=True)
    (results / "demo.csv").write_text("".join(lines[:2] + lines[3:]))
    harness.sweep("demo", RUNS, again, log=quiet)
    assert again.done == [RUNS[1]]


def test_runs_side_by_side_are_those_in_turn_with_one_thread_each(results, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    rows = harness.sweep("demo", RUNS, dict, at_once=2, log=quiet)  # `dict` gives the settings back as columns
    assert [(row["seed"], row["rank"]) for row in rows] == [(run["seed"], run["rank"]) for run in RUNS], (
        "whichever ended first"
    )
    assert harness.in_order(rows[::-1], RUNS) == rows
    assert {row["cores"] for row in rows} == {1} and os.environ["OMP_NUM_THREADS"] == "7"
    assert complaints(data.load_results("demo", results), RUNS, harness.base_fingerprint()) == []
    with pytest.raises(TypeError):  # what a run raises ends the sweep here, too
        harness.sweep("other", RUNS, int, at_once=2, log=quiet)
    assert not (results / "other.csv").exists()


def test_a_kill_while_writing_leaves_the_old_rows(results, monkeypatch):
    harness.sweep("demo", RUNS[:1], Measure(), log=quiet)
    before = (results / "demo.csv").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        harness.sweep("demo", RUNS, Measure(), log=quiet)
    assert (results / "demo.csv").read_bytes() == before


def test_a_row_says_where_it_was_made_and_names_no_host(results):
    harness.sweep("demo", RUNS[:1], Measure(rate=1.5e-3, loss=math.nan, loop="bare", steps=200), log=quiet)
    (row,) = data.load_results("demo", results)
    assert (
        tuple(row)[:5] == data.RESULT_COLUMNS
        and row["cpu"] == runtime.processor()
        and row["cores"] == torch.get_num_threads()
    )
    assert (row["seed"], row["rank"], row["rate"], row["loop"], row["steps"]) == (
        0,
        1,
        0.0015,
        "bare",
        200,
    ) and math.isnan(row["loss"])
    assert isinstance(row["steps"], int) and row["seconds"] >= 0 and row["base"] == harness.base_fingerprint()
    text = (results / "demo.csv").read_text()
    assert socket.gethostname() not in text and str(results) not in text


def test_a_run_of_several_rows_is_one_run(results):
    measure = Measure()
    measure.columns = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    harness.sweep("demo", RUNS[:2], measure, log=quiet)
    assert [row["step"] for row in data.load_results("demo", results)] == [1, 2, 3] * 2
    harness.sweep("demo", RUNS[:2], measure, log=quiet)
    assert len(measure.done) == 2


def test_results_of_another_base_or_of_other_columns_are_not_mixed(results, monkeypatch):
    harness.sweep("demo", RUNS[:1], Measure(), log=quiet)
    with pytest.raises(InputError, match="other columns"):
        harness.sweep("demo", RUNS, Measure(accuracy=1), log=quiet)
    monkeypatch.setattr(harness, "base_fingerprint", lambda: "sha256-other")
    with pytest.raises(InputError, match="another base model"):
        harness.sweep("demo", RUNS, Measure(), log=quiet)


def test_the_fingerprint_follows_the_weights(results, tiny_base):
    before, weights = harness.base_fingerprint(), tiny_base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert harness.base_fingerprint() != before
    finally:
        weights.write_bytes(content)
    assert harness.base_fingerprint() == before


# ---------------------------------------------------------------------------------------------- reading results

HEALTHY = 'seed,seconds,cpu,cores,base,method,rate,score\n0,1.5,"Chip, 2 GHz",2,sha256-a,lora,0.005,0.5\n1,2,Chip,2,sha256-a,full,5e-05,nan\n'


def test_results_are_read_with_their_numbers(tmp_path):
    (tmp_path / "demo.csv").write_text(HEALTHY)
    first, second = data.load_results("demo", tmp_path)
    assert first == {
        "seed": 0,
        "seconds": 1.5,
        "cpu": "Chip, 2 GHz",
        "cores": 2,
        "base": "sha256-a",
        "method": "lora",
        "rate": 0.005,
        "score": 0.5,
    }
    assert second["rate"] == 5e-5 and math.isnan(second["score"])


@pytest.mark.parametrize(
    "old, new, said",
    [
        (",full,5e-05,nan\n", "", "last line.*cut short"),
        (",full,5e-05,nan", "", "Line 3.*5 values for 8 columns"),
        ("full", "", "Line 3.*7 values for 8 columns"),
        ("5e-05", "5e-0x", "Line 3.*'5e-0x' as rate.*0.005"),
        ("full", "7", "Line 3.*7 as method.*'lora'"),
        ("nan\n", "nan\nseed", "last line.*cut short"),
        ("seconds", "time", "begin with the columns seed, seconds, cpu, cores, base"),
        ("rate", "method", "each name once"),
        ('"Chip, 2 GHz"', '"Chip, 2 GHz', "can't be read as CSV"),
        (HEALTHY, "", "begin with the columns"),
    ],
)
def test_a_broken_file_is_answered_with_what_is_wrong_and_what_to_do(old, new, said, tmp_path):
    assert old in HEALTHY
    (tmp_path / "demo.csv").write_text(HEALTHY.replace(old, new))
    with pytest.raises(InputError, match=f"(?s){said}.*python -m experiments.run demo"):
        data.load_results("demo", tmp_path)


def test_a_missing_file_is_answered_with_those_that_are_there(tmp_path):
    (tmp_path / "rank.csv").write_text(HEALTHY)
    with pytest.raises(InputError, match="no results 'ranks'.*only rank.*python -m experiments.run ranks"):
        data.load_results("ranks", tmp_path)
    with pytest.raises(InputError, match="it has none"):
        data.load_results("rank", tmp_path / "nowhere")


def test_a_broken_file_stops_a_sweep_before_it_computes(results):
    harness.sweep("demo", RUNS[:1], Measure(), log=quiet)
    (results / "demo.csv").write_text((results / "demo.csv").read_text()[:-3])
    measure = Measure()
    with pytest.raises(InputError, match="cut short"):
        harness.sweep("demo", RUNS, measure, log=quiet)
    assert measure.done == []


# ---------------------------------------------------------------------------------------------- each script


def script(name):
    return importlib.import_module(f"experiments.{name}")


@pytest.fixture
def small(results, monkeypatch):
    """Two steps of two short rows, and a learning rate that the first sweep seems to have found."""

    load_task, texts = data.load_task, data.held_out_texts

    def few_rows(task, split=None):
        rows = load_task(task, split)
        return (
            rows
            if task == "recall"
            else rows.filter(lambda row: len(row["prompt"][0]["content"]) < 120).select(range(8))
        )

    monkeypatch.setattr(data, "load_task", few_rows)
    monkeypatch.setattr(data, "held_out_texts", lambda tokenizer: texts(tokenizer)[:4])
    for module, sizes in {
        "training": {"STEPS": 2, "BATCH": 2, "SCORED": 2},
        "cost": {"STEPS": 2},
        "recall": {"EPOCHS": 2},
        "throughput": {"STEPS": 3, "LAST": 1},
        "step_parts": {"STEPS": 2, "WARM": 1},
        "batching": {"STEPS": 3},
        "prompt_loss": {"STEPS": 2, "BATCH": 2, "TEST_ROWS": 2, "COUNTED_ROWS": 4},
        "few_shot": {"STEPS": 2, "TEST_ROWS": 2},
        "overfitting": {"STEPS": 4, "EVERY": 2, "VALIDATION_ROWS": 2},
    }.items():
        for constant, value in sizes.items():
            monkeypatch.setattr(script(module), constant, value)
    for name in ("rank", "alpha", "targets", "recall", "overfitting"):
        monkeypatch.setattr(script(name), "best_rate", lambda method: {"lora": 5e-3}[method])
    return results


SMALL_RUNS = {
    "learning_rate": [
        {"seed": 0, "method": "lora", "learning_rate": 5e-3},
        {"seed": 0, "method": "full", "learning_rate": 5e-4},
    ],
    "rank": [{"seed": 0, "rank": 2}],
    "recall": [{"seed": 0, "people": 1, "rank": 1}],
    "throughput": [{"seed": 0}],
    "step_parts": [{"seed": 0, "method": "lora", "loss": loss} for loss in ("model", "trl")],
    "batching": [{"seed": 0, "way": way} for way in ("padded", "grouped", "packed")],
    "prompt_loss": [{"seed": 0, "task": "sailor", "loss_on": loss_on} for loss_on in ("answer", "all")],
    "few_shot": [
        {"seed": 0, "task": "reading", "method": "prompt", "examples": 2},
        {"seed": 0, "task": "reading", "method": "lora", "examples": 4},
    ],
    "targets": [{"seed": 0, "targets": "attention", "rank": 2}],
    "alpha": [{"seed": 0, "alpha": 64}],
    "overfitting": [{"seed": 0, "rows": 4}],
    "cut_to_rank": [{"seed": 0, "task": "reading", "method": "full"}, {"seed": 0, "task": "reading", "method": "lora"}],
}


@pytest.fixture
def swept(small):
    """Function: the rows of a sweep over its small runs."""
    return lambda name: (
        harness.sweep(name, SMALL_RUNS[name], script(name).measure, log=quiet) and data.load_results(name, small)
    )


def test_learning_rate_trains_both_methods_and_measures_what_the_lesson_shows(swept):
    lora, full = swept("learning_rate")
    base = full["trainable"]
    assert (
        lora["trainable"] == 2 * 8 * (4 * 128 + 3 * 192) and base > 80_000
    )  # layers × r × (in + out) of each linear layer
    assert 4 * base <= full["saved_bytes"] < 4 * base + 20_000 and lora["saved_bytes"] < 4 * lora["trainable"] + 20_000
    for row in (lora, full):
        assert 0 <= row["validation"] <= 1 and 0 <= row["test"] <= 1 and row["seconds_per_step"] > 0
        assert row["held_out_before"] == lora["held_out_before"] and row["held_out_after"] != row["held_out_before"]


@pytest.mark.parametrize("name", ["rank", "alpha", "targets"])
def test_a_sweep_over_lora_varies_what_it_says(swept, name, monkeypatch):
    from experiments import training

    configs, make = [], training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda *a, **k: configs.append(k["lora"]) or make(*a, **k))
    (row,) = swept(name)
    (config,) = configs
    expected = {"rank": (2, 16, 7), "alpha": (8, 64, 7), "targets": (2, 16, 4)}[name]
    assert (config.r, config.lora_alpha) == expected[:2] and row["learning_rate"] == 5e-3
    # PEFT puts the names that it found into the config: seven kinds of linear layers in a Llama block, four of them in attention.
    assert len({module.split(".")[-1] for module in config.target_modules}) == expected[2]


def test_recall_asks_for_each_fact_in_wordings_told_and_new(small, swept):
    recall = script("recall")
    train, told, reworded = recall.facts_of(3, seed=0)
    assert (len(train), len(told), len(reworded)) == (24, 12, 12)

    def facts(rows):
        return {(recall.name_in(row), row["kind"], row["completion"][0]["content"]) for row in rows}

    assert facts(train) == facts(told) == facts(reworded) and len(facts(train)) == 12
    prompts = [{row["prompt"][0]["content"] for row in rows} for rows in (train, told, reworded)]
    assert prompts[1] < prompts[0] and not prompts[0] & prompts[2]
    assert facts(recall.facts_of(3, seed=1)[0]) != facts(train)
    (row,) = swept("recall")
    assert row["facts"] == 4 and 0 <= row["told"] <= 1


def test_throughput_compares_loops_that_do_the_same(swept):
    trl, model_loss, bare = rows = swept("throughput")
    assert [row["loop"] for row in rows] == ["trl", "trl_model_loss", "bare"]
    # The same A, batches and optimizer: after two steps the losses still agree, whichever way they were computed.
    assert trl["last_loss"] == pytest.approx(bare["last_loss"], rel=1e-4) and model_loss["last_loss"] == pytest.approx(
        bare["last_loss"], rel=1e-4
    )
    for row in rows:
        assert row["tokens_per_step"] == bare["tokens_per_step"] <= bare["padded_per_step"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["seconds_per_step"], rel=1e-3)


def test_throughput_finds_that_batches_differ(small, monkeypatch):
    throughput = script("throughput")
    plain = throughput.by_trainer
    monkeypatch.setattr(
        throughput, "by_trainer", lambda cls, seed: plain(cls, seed + (cls is throughput.ModelLossTrainer))
    )
    with pytest.raises(RuntimeError, match="different batches"):
        throughput.measure(seed=0)


def test_step_parts_times_both_losses_and_the_rest(swept):
    for row in swept("step_parts"):
        assert min(row[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")) > 0


def test_batching_counts_tokens_without_the_pads(swept):
    padded, grouped, packed = swept("batching")
    assert [row["way"] for row in (padded, grouped, packed)] == list(script("batching").WAYS)
    for row in (padded, grouped, packed):
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["seconds_per_step"], rel=1e-3)
    assert padded["tokens_per_step"] < padded["places_per_step"]
    assert packed["tokens_per_step"] == packed["places_per_step"], "no pads"


def test_prompt_loss_puts_it_on_the_prompt_too(swept):
    answer, everything = swept("prompt_loss")
    assert 0.3 < answer["with_loss"] < 0.7 and everything["with_loss"] == 1
    assert 0 <= answer["score"] <= 1 and answer["held_out_after"] != everything["held_out_after"]


def test_few_shot_shows_the_examples_as_earlier_turns(swept):
    few_shot = script("few_shot")
    rows = data.load_task("reading", "train").select(range(3))
    (shown,) = few_shot.shown_first(rows.select([0, 1]), rows.select([2]))
    assert [message["role"] for message in shown["prompt"]] == ["user", "assistant"] * 2 + ["user"]
    assert shown["prompt"][-1] == rows[2]["prompt"][0] and shown["prompt"][1] == rows[0]["completion"][0]
    assert [row["method"] for row in swept("few_shot")] == ["prompt", "lora"]


def test_overfitting_writes_both_curves(swept):
    rows = swept("overfitting")
    assert [row["step"] for row in rows] == [2, 4] and all(
        row["training_loss"] > 0 and row["validation_loss"] > 0 for row in rows
    )


def test_a_change_is_cut_to_the_rank_asked_for(small, swept):
    cut_to_rank = script("cut_to_rank")
    tuned = cut_to_rank.train(0, "reading", 0.05).model
    base, _ = script("training").load_base()
    factors = cut_to_rank.changes(base, tuned)
    assert len(factors) == 14 and "lm_head.weight" not in factors
    for name in factors:
        change = tuned.get_parameter(name) - base.get_parameter(name)
        assert change.abs().max() > 1e-3, "full fine-tuning changes it, else any cut would do"
        thin = cut_to_rank.cut(factors, 2).get_parameter(name) - base.get_parameter(name)
        assert torch.linalg.matrix_rank(thin, rtol=1e-3) == 2 and thin.norm() < change.norm()
        assert torch.allclose(cut_to_rank.cut(factors, 256).get_parameter(name), tuned.get_parameter(name), atol=1e-5)
    rows = swept("cut_to_rank")
    assert [row["rank"] for row in rows] == [*cut_to_rank.CUTS, *cut_to_rank.TRAINED]
    kept = [row["kept"] for row in rows if row["method"] == "full"]
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == pytest.approx(1)


def test_cost_measures_in_a_process_of_its_own(small, monkeypatch):
    cost = script("cost")
    asked = {}

    def start(command, **options):
        asked.update(command=command, options=options)
        return type("Done", (), {"stdout": 'a line of a library\n{"peak_bytes": 5}\n'})

    monkeypatch.setattr(cost.subprocess, "run", start)
    assert cost.measure(seed=3, method="lora") == {"peak_bytes": 5}
    assert asked["command"] == [sys.executable, "-m", "experiments.cost", "lora", "3"] and asked["options"]["check"]
    # Two steps of a tiny model take less than loading did, so the peak would be that of loading: this is found.
    with pytest.raises(RuntimeError, match="Loading took more"):
        monkeypatch.setattr(cost, "peak_bytes", lambda: 10**9)
        cost.measure_here(seed=0, method="lora")
    peaks = iter([10**9, 4 * 10**9])
    monkeypatch.setattr(cost, "peak_bytes", lambda: next(peaks))
    measured = json.loads(json.dumps(cost.measure_here(seed=0, method="full")))
    assert (
        measured["peak_bytes"] == 4 * 10**9
        and 0 < measured["training_bytes"] < 4 * 10**9
        and measured["trainable"] > 80_000
    )


def test_the_peak_of_memory_is_in_bytes():
    import psutil

    peak = script("cost").peak_bytes()
    assert 0.9 * psutil.Process().memory_info().rss <= peak < 64e9


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere `getrusage` has to do")
def test_the_peak_of_memory_is_not_that_of_the_process_that_started_this_one():
    """A big parent starts a small child, as a sweep does after another one."""
    child = "import sys; sys.path.insert(0, '.'); from experiments.cost import peak_bytes; print(peak_bytes())"
    parent = f"""
import resource, subprocess, sys
ballast = bytearray(800_000_000)
for place in range(0, len(ballast), 4096):
    ballast[place] = 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=paths.project_root()
    )
    of_parent, of_child = map(int, done.stdout.split())
    assert of_parent > 800e6 and of_child < 700e6


def test_a_loss_beyond_all_bounds_is_infinite(small, monkeypatch):
    training = script("training")
    model, tokenizer = training.load_base()
    assert 0 < training.held_out_loss(model, tokenizer) < math.inf

    def beyond(*_):
        raise OverflowError

    monkeypatch.setattr(evaluation, "perplexity", beyond)
    assert training.held_out_loss(model, tokenizer) == math.inf


def test_the_best_rate_is_that_of_the_validation_split(results):
    learning_rate = script("learning_rate")
    rows = [
        {
            "seed": run["seed"],
            "seconds": 1,
            "cpu": "c",
            "cores": 2,
            "base": "b",
            **run,
            "test": 1 / (1 + run["learning_rate"]),
            "validation": {1.5e-3: 0.5 + 0.1 * run["seed"], 5e-3: 0.6, 1.5e-2: 0.6}.get(run["learning_rate"], 0.4),
        }
        for run in learning_rate.RUNS
    ]
    harness._write(results / "learning_rate.csv", rows)
    # 0.6 on average at three rates of LoRA: the lowest is taken. Test scores, best at the lowest rates, play no part.
    assert learning_rate.best_rate("lora") == 1.5e-3 and learning_rate.best_rate("full") == 1.5e-3
    harness._write(results / "learning_rate.csv", rows[:-1])
    with pytest.raises(InputError, match="1 runs of learning_rate are missing.*experiments.run learning_rate"):
        learning_rate.best_rate("lora")


def test_targets_train_as_many_parameters_as_the_docstring_says():
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    targets = script("targets")
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=4, intermediate_size=576, num_attention_heads=4
    )
    for name, rank, promised in (
        ("attention", 18, "147,456"),
        ("feed_forward", 15, "149,760"),
        ("all_linear", 8, "145,408"),
    ):
        with torch.device("meta"):
            model = get_peft_model(
                AutoModelForCausalLM.from_config(config),
                targets.lora_config(rank, target_modules=targets.TARGETS[name]),
            )
        assert f"{model.get_nb_trainable_parameters()[0]:,}" == promised and promised in targets.__doc__


# ---------------------------------------------------------------------------------------------- what an adapter adds


def test_the_overhead_is_that_of_the_adapter_and_nothing_stays_behind(monkeypatch):
    import psutil
    import torch

    from experiments import overhead

    calls, in_turns = [], overhead.timing.in_turns

    def few_turns(actions, rounds):
        others = psutil.Process().children()
        calls.append(
            (torch.get_num_threads(), len(others), {name: action().logits for name, action in actions.items()})
        )
        return in_turns(actions, rounds=3)

    monkeypatch.setattr(overhead.timing, "in_turns", few_turns)
    before, children = torch.get_num_threads(), len(psutil.Process().children())
    found = overhead.measure(seed=0, threads=1, busy=1, rows=2, length=3)
    ((threads, others, logits),) = calls
    assert (threads, others - children) == (1, 1) and logits["base"].shape[:2] == (2, 3)
    assert not torch.equal(logits["base"], logits["adapted"]), "the adapter is on"
    assert found["overhead"] == pytest.approx(found["adapted_ms"] / found["base_ms"] - 1) and found["base_ms"] > 0
    assert torch.get_num_threads() == before and len(psutil.Process().children()) == children


# ---------------------------------------------------------------------------------------------- all of them


def test_run_does_what_was_named_in_its_own_order(monkeypatch, capsys):
    ran = []
    together = {}
    monkeypatch.setattr(
        harness,
        "sweep",
        lambda name, runs, measure, at_once, base: ran.append(name) or together.update({name: at_once}),
    )
    run.main([])
    assert ran == list(run.ORDER) and run.LESSONS["03"][0] == "learning_rate", (
        "other sweeps train at the rate that it finds"
    )
    assert {together[name] for name in run.TIMED} == {1} and together["rank"] == run.processes() >= 1
    ran.clear()
    run.main(["alpha", "rank"])
    assert ran == ["rank", "alpha"]
    with pytest.raises(SystemExit):
        run.main(["ranks"])
    assert f"no such sweep: ranks; there are {run.ORDER[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", run.ORDER)
def test_every_sweep_has_three_seeds_and_no_run_twice(name):
    runs = script(name).RUNS
    assert len({json.dumps(entry, sort_keys=True) for entry in runs}) == len(runs)
    assert {entry["seed"] for entry in runs} == ({0} if name in run.SEARCHES else {0, 1, 2})
    if name in run.SEARCHES:
        return
    per_seed = [
        sorted(json.dumps({**run, "seed": 0}, sort_keys=True) for run in runs if run["seed"] == seed)
        for seed in (0, 1, 2)
    ]
    assert per_seed[0] == per_seed[1] == per_seed[2]


def complaints(rows, runs, base):
    """What is wrong with committed results: runs without a row, rows without a run, rows of another base model."""
    found = [f"no row for {run}" for run in harness.missing(rows, runs)] + [
        f"no run for {row}" for row in harness.unplanned(rows, runs)
    ]
    return found + [f"made with {row['base']}: {row}" for row in rows if row["base"] != base]


def test_incomplete_and_stale_results_are_found():
    rows = [{"seed": run["seed"], "base": "b", **run} for run in RUNS]
    assert complaints(rows, RUNS, "b") == []
    assert complaints(rows[1:], RUNS, "b") == [f"no row for {RUNS[0]}"]
    assert len(complaints(rows, RUNS[1:], "b")) == 1 and "no run for" in complaints(rows, RUNS[1:], "b")[0]
    assert len(complaints(rows, RUNS, "c")) == len(rows)


def committed(name):
    if not (paths.results_dir() / f"{name}.csv").is_file():
        pytest.skip(f"experiments/results/{name}.csv is not there yet: make experiments")
    return data.load_results(name)


@pytest.mark.parametrize("name", run.ORDER)
def test_committed_results_are_complete_and_of_the_shipped_base(name):
    assert complaints(committed(name), script(name).RUNS, run.fingerprint(script(name))) == []


def test_no_result_is_committed_without_its_script():
    on_a_gpu = {"real_sizes"}  # run by itself, where there is one
    assert {path.stem for path in paths.results_dir().glob("*")} <= set(run.ORDER) | on_a_gpu


def minutes_of(name):
    """The time that a sweep took on two cores, in minutes; the rows of one run all bear that run's time and threads."""
    rows, runs = committed(name), script(name).RUNS
    each = [next(row for row in rows if harness._belongs(row, run)) for run in runs]
    return sum(row["seconds"] * row["cores"] / 2 for row in each) / 60


@pytest.mark.parametrize("lesson", run.LESSONS)
def test_the_sweeps_of_a_lesson_took_no_longer_than_allowed(lesson):
    assert sum(map(minutes_of, run.LESSONS[lesson])) <= MINUTES_FOR_A_LESSON


# ---------------------------------------------------------------------------------------------- held-out text


def test_the_held_out_text_is_what_the_world_says_and_not_in_the_corpus():
    world = world_module.make_world()
    texts = tasks.held_out(world)
    assert (paths.data_dir() / "held_out.txt").read_text(encoding="utf-8").splitlines() == texts, (
        "run python -m pretraining.run tasks"
    )
    assert len(set(texts)) == len(texts) == 256

    read = {
        parts[0][1]
        for i in range(mixture.OPEN_FROM, mixture.OPEN_FROM + 3000)
        for parts in [mixture.document(world, 0, i)]
    }
    assert not read & set(texts) and read & {*texts, mixture.document(world, 0, mixture.OPEN_FROM)[0][1]}


def test_held_out_texts_are_framed_as_the_base_model_read_them(monkeypatch, tmp_path):
    class Tokens:
        bos_token, eos_token = "<|bos|>", "<|end|>"

    from pretraining.tokenizer import render

    world = world_module.make_world()
    assert data.held_out_texts(Tokens) == [render([(None, text)]) for text in tasks.held_out(world)]
    Tokens.bos_token = None
    assert data.held_out_texts(Tokens)[0].startswith(" ")
    monkeypatch.setattr(paths, "data_dir", lambda: tmp_path)
    with pytest.raises(InputError, match="held_out.txt.*git checkout"):
        data.held_out_texts(Tokens)


def test_the_results_folder_is_plain_csv_that_any_reader_takes(results):
    harness.sweep("demo", RUNS[:1], Measure(loop="a, b"), log=quiet)
    with (results / "demo.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["loop"] == "a, b"
