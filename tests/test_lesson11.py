"""Lesson 11's checks: stubs, solutions, other right answers, and typical wrong ones, each with its own hint."""

import math

import pytest
import torch

from course_utils import drifting, paths, serving
from course_utils.exercises import lesson11


def right_plan(effective, devices, fits, rows, epochs):
    if effective % devices:
        return None
    share = effective // devices
    at_once = max(size for size in range(1, min(fits, share) + 1) if share % size == 0)
    return at_once, share // at_once, epochs * math.ceil(rows / effective)


def right_gather(x, A, B, scaling, rows):
    factor = torch.where(rows >= 0, scaling[rows], 0)
    return (x @ A[rows].transpose(1, 2)) @ B[rows].transpose(1, 2) * factor[:, None, None]


def right_strategy(run):
    if run["held_weights"] < 0.75 * run["weights"]:
        return "FSDP"
    if run["held_optimizer"] < 1.5 * run["trained"]:
        return "ZeRO-1"
    return "DDP" if run["all_reduce"] + run["reduce_scatter"] >= run["trained"] else "not synchronised"


SOLUTIONS = {"11.plan": right_plan, "11.gather": right_gather, "11.strategy": right_strategy}


def counted_plan(effective, devices, fits, rows, epochs):
    if effective // devices * devices != effective:
        return
    at_once = min(fits, effective // devices)
    while effective // devices % at_once:
        at_once -= 1
    steps = 0
    for _ in range(epochs):
        steps += len(range(0, rows, effective))
    return [at_once, effective // devices // at_once, steps]


def loop_gather(x, A, B, scaling, rows):
    found = []
    for row, number in zip(x, rows.tolist()):
        found.append(row @ A[number].T @ B[number].T * scaling[number] if number >= 0 else row @ A[0].T @ B[0].T * 0)
    return torch.stack(found)


def padded_gather(x, A, B, scaling, rows):
    """An adapter of zeros behind the others, which -1 picks."""
    A, B = (torch.cat([matrix, torch.zeros_like(matrix[:1])]) for matrix in (A, B))
    scaling = torch.cat([scaling, scaling.new_zeros(1)])
    return torch.einsum("bti,bri,bor,b->bto", x, A[rows], B[rows], scaling[rows])


def listed_strategy(run):
    split = {"FSDP": run["held_weights"] / run["weights"], "ZeRO-1": run["held_optimizer"] / run["trained"] / 2}
    for name, share in split.items():
        if share < 0.8:
            return name
    return ("not synchronised", "DDP")[max(run["all_reduce"], run["reduce_scatter"]) > 0.9 * run["trained"]]


RIGHT = {
    "11.plan": [
        counted_plan,
        lambda *given: None if (plan := right_plan(*given)) is None else list(plan),
        lambda *given: None if (plan := counted_plan(*given)) is None else torch.tensor(plan),
    ],
    "11.gather": [
        loop_gather,
        padded_gather,
        lambda x, A, B, scaling, rows: torch.where(
            (rows < 0)[:, None, None],
            0.0,
            torch.bmm(torch.bmm(x, A[rows].mT), (B * scaling[:, None, None])[rows].mT),
        ),
    ],
    "11.strategy": [
        listed_strategy,
        lambda run: right_strategy(dict(run)),
        lambda run: (
            "FSDP" if run["held_weights"] * 4 < run["weights"] * 3
            else "ZeRO-1" if run["held_optimizer"] * 4 < run["trained"] * 6
            else "not synchronised" if run["all_reduce"] + run["reduce_scatter"] < run["trained"] / 2 else "DDP"
        ),
    ],
}  # fmt: skip
CHECKS = {check.name: check for check in (lesson11.plan, lesson11.gather, lesson11.strategy)}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_stub_solution_and_other_right_answers(name):
    check = CHECKS[name]
    assert check.outcome(lambda *given: ...).status == "TODO"
    assert check.outcome(SOLUTIONS[name]).passed, check.outcome(SOLUTIONS[name])
    for right in RIGHT[name]:
        assert check.outcome(right).passed, check.outcome(right)


def planned(change):
    """The right plan, changed where there is one: change(at_once, accumulation, steps, what was given)."""

    def answer(*given):
        plan = right_plan(*given)
        return plan and change(*plan, *given)

    return answer


def changed_run(**changes):
    return lambda run: right_strategy({**run, **{key: change(run) for key, change in changes.items()}})


def in_place(x, A, B, scaling, rows):
    x *= 2
    return right_gather(x / 2, A, B, scaling, rows)


def right_change(x, A, B, rows):
    return right_gather(x, A, B, torch.ones(len(A), dtype=x.dtype), rows)


def every_adapter(x, A, B, scaling, rows):
    return (x @ A[rows].mT @ B[rows].mT) * scaling[rows][:, None, None]


WRONG = [
    ("11.plan", planned(lambda at_once, n, steps, effective, *_: (at_once, effective // at_once, steps)), "Divide by the devices first"),
    ("11.plan", planned(lambda at_once, n, steps, effective, devices, fits, *_: (effective // devices, 1, steps)), "don't fit"),
    ("11.plan", planned(lambda at_once, n, steps, *_: (1, at_once * n, steps)), "fit as well"),
    ("11.plan", planned(lambda at_once, n, steps, effective, d, f, rows, epochs: (at_once, n, rows // effective * epochs)), "smaller batch of an epoch"),
    ("11.plan", planned(lambda at_once, n, steps, effective, d, f, rows, epochs: (at_once, n, math.ceil(rows * epochs / effective))), "Each epoch ends"),
    ("11.plan", planned(lambda at_once, n, steps, effective, d, f, rows, epochs: (at_once, n, epochs * math.ceil(rows / at_once / d))), "forward passes"),
    ("11.plan", planned(lambda at_once, n, steps, effective, d, f, rows, epochs: (at_once, n, math.ceil(rows / effective))), "one epoch"),
    ("11.plan", planned(lambda at_once, n, steps, *_: (at_once, n, steps + 7)), "steps are not right"),
    ("11.plan", planned(lambda at_once, n, steps, *_: (at_once, n + 1, steps)), "rows, not"),
    ("11.plan", planned(lambda at_once, n, steps, *_: (at_once, n)), "Return three numbers"),
    ("11.plan", planned(lambda at_once, n, steps, *_: (at_once, n, steps + 0.5)), "whole number"),
    ("11.plan", lambda *given: right_plan(*given) or (1, 1, 1), "return None there"),
    ("11.plan", planned(lambda *_: None), "returns None"),
    ("11.plan", lambda effective, *_: effective, "should be of type"),
    ("11.gather", every_adapter, "takes no adapter"),
    ("11.gather", lambda x, A, B, scaling, rows: right_change(x, A, B, rows), "scaling is missing"),
    ("11.gather", lambda x, A, B, scaling, rows: right_change(x, A, B, rows) * scaling[0], "scaling[rows]"),
    ("11.gather", lambda x, A, B, scaling, rows: right_gather(x, A, B, scaling, torch.arange(len(x)) % len(A)), "Row i takes adapter rows[i]|Row i is x[i]"),
    ("11.gather", lambda x, A, B, scaling, rows: right_gather(x, A, B, scaling, rows) + x.mean(), "Row i is x[i]"),
    ("11.gather", lambda x, A, B, scaling, rows: right_gather(x, A, B, scaling, rows.flip(0)), "Row i is x[i]"),
    ("11.gather", lambda x, A, B, scaling, rows: (x @ A[rows].mT), "has shape"),
    ("11.gather", lambda x, A, B, scaling, rows: x @ A.mT @ B.mT * scaling[:, None, None], "stopped with RuntimeError"),
    ("11.gather", in_place, "has changed"),
    ("11.gather", lambda *given: print(end=""), "Is a return missing?"),
    ("11.strategy", lambda run: {"ddp": "DDP", "fsdp": "FSDP", "zero1": "ZeRO-1"}.get(run["asked"], "DDP"), "What was asked for|not synchronised"),
    ("11.strategy", lambda run: "DDP" if run["all_reduce"] else right_strategy(run), "not synchronised|FSDP"),
    ("11.strategy", lambda run: "DDP" if run["held_optimizer"] >= 2 * run["trained"] else right_strategy(run), "part of the weights only|not synchronised"),
    ("11.strategy", changed_run(held_weights=lambda run: run["weights"]), "part of the weights only"),
    ("11.strategy", changed_run(held_optimizer=lambda run: 2 * run["trained"]), "a part: this is ZeRO-1|asked for"),
    ("11.strategy", changed_run(all_reduce=lambda run: 0), "this is DDP"),
    ("11.strategy", changed_run(all_reduce=lambda run: 10**12), "not synchronised"),
    ("11.strategy", lambda run: "zero", "none of them"),
    ("11.strategy", lambda run: print(end=""), "should be of type str"),
]  # fmt: skip


@pytest.mark.parametrize("name, wrong, hint", WRONG)
def test_a_wrong_answer_gets_its_own_hint(name, wrong, hint):
    outcome = CHECKS[name].outcome(wrong)
    assert outcome.status == "TRY AGAIN" and any(part in outcome.hint for part in hint.split("|")), outcome


def test_the_plan_is_what_the_trainer_does(tmp_path):
    """Steps of a real Trainer, on one device: with accumulation, a smaller last batch, and several epochs."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    for effective, fits, rows, epochs in ((6, 3, 13, 2), (4, 4, 8, 3), (6, 2, 7, 1)):
        at_once, accumulation, steps = right_plan(effective, 1, fits, rows, epochs)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        ids = Dataset.from_dict({"input_ids": [[1, 2]] * rows, "labels": [[1, 2]] * rows})
        trainer = Trainer(model=LlamaForCausalLM(tiny), args=arguments, train_dataset=ids)
        trainer.train()
        assert trainer.state.global_step == steps


@pytest.fixture(scope="module")
def tenants(tmp_path_factory):
    """A tiny PEFT model with adapters of two ranks and of other layers, one with rsLoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    common = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        LlamaForCausalLM(tiny), LoraConfig(r=4, target_modules="all-linear", **common), adapter_name="one"
    )
    model.add_adapter(
        "two", LoraConfig(r=2, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "down_proj"], **common)
    )
    return model.eval()


def test_gathered_layers_equal_pefts_mixed_batch(tenants):
    picked = torch.tensor([1, 0, -1, 1, 0])
    names = ["one" if number == 0 else "two" if number == 1 else "__base__" for number in picked.tolist()]
    ids = torch.randint(0, 32, (5, 7))
    served, rows = serving.with_gathered(tenants, ["one", "two"], right_gather)
    with torch.no_grad():
        of_peft = tenants(ids, adapter_names=names).logits
        rows[0] = picked
        assert torch.allclose(served(ids).logits, of_peft, atol=1e-5)
        rows[0] = torch.full_like(picked, -1)
        of_base = served(ids).logits
        assert (of_base - of_peft).abs().max() > 1e-2, "the adapters change something"
        assert torch.equal(of_base[2], of_peft[2]) or torch.allclose(of_base[2], of_peft[2], atol=1e-6)
        with tenants.disable_adapter():
            assert torch.allclose(tenants(ids).logits, of_base, atol=1e-6)


def test_gathered_layers_share_the_base_and_leave_the_model_as_it_was(tenants):
    before = {name: weight.clone() for name, weight in tenants.named_parameters()}
    served, _ = serving.with_gathered(tenants, ["two", "one"], right_gather)
    own = {weight.data_ptr() for weight in tenants.parameters()}
    assert all(weight.data_ptr() in own for weight in served.parameters()), "no weight is there twice"
    after = dict(tenants.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_each_drifting_run_differs_first_where_its_fault_is(tmp_path):
    import json

    from course_utils import launch

    launch.torchrun("--standalone", "--nproc-per-node", "2", "-m", "course_utils.drifting", folder=tmp_path)
    found = json.loads((tmp_path / "drifting.json").read_text())
    assert set(found) == set(drifting.RUNS)
    all_of_them = 56 if paths.is_shipped_base() else None
    differ = {name: [one[at]["tensors"] for at in ("start", "gradients", "step 1")] for name, one in found.items()}
    assert differ["mended"] == [0, 0, 0] and found["mended"]["step 3"]["apart"] == 0
    assert differ["c"][0] > 0, "each process draws its own A"
    assert differ["a"][0] == 0 and differ["a"][1] > all_of_them / 4, "no gradient is averaged"
    assert differ["d"][0] == 0 and 0 < differ["d"][1] <= 7, "those of the last layer are not averaged"
    assert differ["b"][:2] == [0, 0] and differ["b"][2] > 0, "the steps differ"
