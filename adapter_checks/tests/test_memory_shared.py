"""The estimate for several devices, against what two processes hold and hand to collectives, to the byte."""

import json

import pytest

from adapter_checks import InputError, counting, memory
from test_memory import estimate, llama_65b, lora, loss_of, make_config, parts, real_model

# Neither the rank, nor the words, nor the feed-forward layer can be split in two without a row over.
ODD = {"vocab_size": 261, "intermediate_size": 191, "tie_word_embeddings": False}
CASES = {
    "lora": (lambda: lora(r=5, target_modules="all-linear", task_type="CAUSAL_LM"), {}),
    "full": (lambda: None, {}),
    "lora, odd": (lambda: lora(r=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), ODD),
    "full, odd": (lambda: None, ODD),
}
STRATEGIES = ("ddp", "fsdp")


def one_process(rank, folder):
    """What process `rank` of two holds and sends in the second step of each case and strategy, as JSON in `folder`."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for case, (make_lora, options) in CASES.items():
        for strategy in STRATEGIES:
            model, buckets = real_model(make_config(**options), make_lora()), {}
            if strategy == "ddp":
                wrapped = DistributedDataParallel(model)

                def keep(state, bucket, buckets=buckets):
                    buckets[bucket.index()] = bucket.buffer().nbytes
                    return allreduce_hook(None, bucket)

                wrapped.register_comm_hook(None, keep)
                wrapped.config = model.config
            else:
                for layer in model.get_submodule("base_model.model.model" if make_lora() else "model").layers:
                    fully_shard(layer, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
            for _ in range(2):
                optimizer.zero_grad()
                with memory.measure_collectives() as collectives:
                    loss_of(wrapped).backward()
                optimizer.step()
            if strategy == "fsdp":
                wrapped.reshard()
            held = parts(memory.measure_training_state(wrapped, optimizer))
            found[f"{case}, {strategy}"] = {"held": held, "collectives": collectives, "buckets": sum(buckets.values())}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    import torch.multiprocessing

    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_process, (folder,), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_prediction_is_what_two_processes_hold_and_hand_over(case, strategy, measured):
    make_lora, options = CASES[case]
    method = "lora" if make_lora() else "full"
    predicted = estimate(make_config(**options), method, make_lora(), devices=2, strategy=strategy)
    both = [one[f"{case}, {strategy}"] for one in measured]
    assert list(parts(predicted)) == [max(held) for held in zip(*(one["held"] for one in both))]
    assert both[0]["collectives"] == both[1]["collectives"] == predicted.collectives
    if strategy == "ddp":
        assert predicted.buffers == both[0]["buckets"] > 0
    elif "odd" in case:
        assert both[0]["held"] != both[1]["held"], "one row is over, and the first process has it"
    alone = estimate(make_config(**options), method, make_lora())
    assert (predicted.weights < 0.6 * alone.weights) == (strategy == "fsdp")


def billions(strategy, devices=64, **options):
    import torch

    made = estimate(
        llama_65b(), dtype="bfloat16", moment_dtype=torch.float32, devices=devices, strategy=strategy, **options
    )
    return [size / 1e9 for size in parts(made)]


def test_zero_stages_split_what_the_paper_splits():
    """ZeRO paper, section 5 and figure 1: of weights, gradients and moments the last, the last two, all."""
    numbers = sum(parameter.numel() for parameter in counting.meta_model(llama_65b()).parameters()) / 1e9
    whole = [2 * numbers, 2 * numbers, 8 * numbers]
    for strategy, split in (("ddp", ()), ("zero1", (2,)), ("zero2", (1, 2)), ("zero3", (0, 1, 2))):
        wanted = [size / 64 if place in split else size for place, size in enumerate(whole)]
        assert billions(strategy) == pytest.approx(wanted, rel=1e-5), strategy
    assert billions("fsdp") == pytest.approx(billions("zero3"), rel=1e-3)


@pytest.mark.parametrize(("strategy", "times"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3)])
def test_bytes_sent_are_those_of_the_paper(strategy, times):
    """ZeRO paper, section 7: stages 1 and 2 send as much as plain data parallelism, stage 3 half as much again."""
    made = estimate(make_config(), devices=4, strategy=strategy)
    gradients = estimate(make_config()).gradients
    assert made.sent == pytest.approx(times * gradients * 3 / 4, rel=1e-3)


def test_lora_makes_ddp_cheap_and_not_fsdp():
    ddp, fsdp = (estimate(make_config(), "lora", lora(), devices=2, strategy=name) for name in ("ddp", "fsdp"))
    full = estimate(make_config(), devices=2, strategy="fsdp")
    assert ddp.sent < 0.05 * fsdp.sent and fsdp.sent > 0.6 * full.sent


def test_what_reads_4_bit_weights_stays_whole():
    config, adapter = llama_65b(), lora(target_modules="all-linear")
    one, two, many = (
        estimate(config, "qlora", adapter, dtype="bfloat16", devices=devices, strategy="fsdp") for devices in (1, 2, 64)
    )
    scales = sum(
        memory._quantised(w.numel(), False) - w.numel() // 2
        for w in memory._quantised_weights(counting.meta_model(config))
    )
    assert one.weights - scales == pytest.approx(2 * (two.weights - scales), rel=1e-6)
    assert many.weights > scales > 0.8 * many.weights


def test_more_devices_than_rows_hold_a_row_or_nothing():
    made = estimate(make_config(), "lora", lora(r=2), devices=16, strategy="fsdp")
    alone = estimate(make_config(), "lora", lora(r=2))
    assert alone.gradients / 16 < made.gradients < alone.gradients / 2


@pytest.mark.parametrize("strategy", memory.STRATEGIES)
def test_one_device_shares_nothing(strategy):
    assert estimate(make_config(), "lora", lora(), strategy=strategy) == estimate(make_config(), "lora", lora())


def test_the_table_says_what_is_sent():
    made = estimate(make_config(), devices=2, strategy="fsdp")
    assert ("buffers" in made.sizes(), "buffers" in estimate(make_config()).sizes()) == (True, False)
    assert made.total == sum(size for name, size in made.sizes().items() if name != "total")
    last = str(made).splitlines()[-1]
    assert last.startswith("a step, each of 2 devices: all_gather ") and "reduce_scatter" in last and "sent" in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices is 0"),
        ({"devices": 2.0}, "devices is 2.0"),
        ({"devices": 2, "strategy": "fsdp1"}, "no strategy 'fsdp1'.*ddp, zero1, zero2, zero3, fsdp"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        estimate(make_config(), **options)
