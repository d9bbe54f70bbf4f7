"""The checks of lesson 4: each typical mistake gets its own hint; and what the lesson says of PEFT and of a paper's figures."""

import re

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapter_checks import counting, memory
from course_utils import layers
from course_utils.exercises import lesson02, lesson04

# The solutions

ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
    "phi3": ["qkv_proj", "o_proj"],
    "bert": ["query", "key", "value", "attention.output.dense"],
}


def right_targets(architecture):
    return ATTENTION[architecture]


def right_count(shapes, rank):
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def for_rank(rank, **changes):
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | changes)


def needed(config, lora, **changes):
    size = {"batch_size": 1, "sequence_length": 1024, "dtype": "bfloat16", "gradient_checkpointing": True}
    return memory.estimate_memory(config, "lora", lora, **size | changes)


def right_budget(config, budget):
    fitting = (rank for rank in (64, 32, 16, 8, 4) if needed(config, for_rank(rank)).total <= 0.9 * budget)
    rank = next(fitting, None)
    return rank and for_rank(rank)


# Other right answers


def targets_by_patterns(architecture):
    return {
        "llama": r".*\.self_attn\..*_proj",
        "gpt2": r".*\.attn\.c_\w+",
        "gpt_neox": r".*\.attention\.(dense|query_key_value)",
        "phi3": r".*self_attn\.\w+",
        "bert": r".*attention\.(self|output)\.(query|key|value|dense)",
    }[architecture]


def targets_as_sets(architecture):
    return (
        {f"self_attn.{name}" for name in ATTENTION["llama"]}
        if architecture == "llama"
        else set(ATTENTION[architecture])
    )


def targets_by_branches(architecture):
    if architecture in ("llama", "phi3"):
        return ("o_proj", "qkv_proj") if architecture == "phi3" else ("v_proj", "o_proj", "k_proj", "q_proj")
    if architecture == "bert":
        return ["self.query", "self.key", "self.value", "attention.output.dense"]
    return (
        ["attn.c_attn", "attn.c_proj"] if architecture == "gpt2" else ["attention.query_key_value", "attention.dense"]
    )


def count_on_meta(shapes, rank):
    with torch.device("meta"):
        pairs = [(nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)) for i, o in shapes]
    return sum(part.weight.numel() for pair in pairs for part in pair)


def budget_from_below(config, budget):
    best = None
    for rank in (4, 8, 16, 32, 64):
        if needed(config, for_rank(rank)).total <= budget * 9 / 10:
            best = rank
    return None if best is None else for_rank(best)


def budget_by_parts(config, budget):
    for rank in (64, 32, 16, 8, 4):
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank * 2, target_modules=names)
        parts = needed(config, lora, dtype=torch.bfloat16)
        if parts.weights + parts.gradients + parts.optimizer + parts.activations <= 0.9 * budget:
            return lora


def budget_by_max(config, budget):
    ranks = [2**power for power in range(2, 7) if needed(config, for_rank(2**power)).total / budget <= 0.9]
    return for_rank(max(ranks)) if ranks else None


SOLUTIONS = {"04.targets": right_targets, "04.count": right_count, "04.budget": right_budget}
RIGHT = {
    "04.targets": [targets_by_patterns, targets_as_sets, targets_by_branches],
    "04.count": [
        count_on_meta,
        lambda shapes, rank: rank * numpy.array(shapes).sum(),
        lambda shapes, rank: sum(map(sum, shapes)) * rank,
    ],
    "04.budget": [budget_from_below, budget_by_parts, budget_by_max],
}


# Typical mistakes


def but(kind, names):
    """The right targets, except for one architecture."""
    return lambda architecture: names if architecture == kind else ATTENTION[architecture]


def budget_with(**changes):
    def within(config, budget):
        lora = right_budget(config, budget)
        return lora and for_rank(lora.r, **{name: change(lora.r) for name, change in changes.items()})

    return within


def budget_if(fits):
    def within(config, budget):
        return next(
            (for_rank(rank) for rank in (64, 32, 16, 8, 4) if fits(needed(config, for_rank(rank)), budget)), None
        )

    return within


def budget_estimated_with(**changes):
    return lambda config, budget: next(
        (
            for_rank(rank)
            for rank in (64, 32, 16, 8, 4)
            if needed(config, for_rank(rank), **changes).total <= 0.9 * budget
        ),
        None,
    )


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (lesson04.targets, but("gpt2", ["c_attn", "c_proj"]), "gpt2: mlp.c_proj is adapted as well"),
        (lesson04.targets, but("gpt2", ["c_attn"]), "gpt2: attn.c_proj is a layer of the attention"),
        (lesson04.targets, but("gpt2", ["q_proj", "v_proj"]), "gpt2: PEFT finds no layer of GPT2LMHeadModel.*c_attn"),
        (lesson04.targets, but("gpt2", "attn.c_proj"), "A string is a pattern for a layer's whole name"),
        (lesson04.targets, but("gpt2", ["attn"]), "gpt2: target_modules match transformer.h.0.attn"),
        (lesson04.targets, but("gpt_neox", ["query_key_value"]), "gpt_neox: attention.dense is a layer"),
        (lesson04.targets, but("gpt_neox", r".*dense.*"), "is adapted as well"),
        (
            lesson04.targets,
            but("bert", ["query", "key", "value", "dense"]),
            "bert: intermediate.dense is adapted as well",
        ),
        (lesson04.targets, but("bert", ["query", "key", "value"]), "bert: attention.output.dense"),
        (lesson04.targets, but("phi3", ["q_proj", "k_proj", "v_proj", "o_proj"]), "phi3: self_attn.qkv_proj"),
        (lesson04.targets, but("llama", "all-linear"), "llama: mlp"),
        (lesson04.targets, but("llama", ["q_proj", "v_proj"]), "llama: self_attn"),
        (lesson04.targets, but("llama", r".*layers\.0\.self_attn\..*"), "llama: self_attn|of every block"),
        (lesson04.targets, but("llama", []), "has none"),
        (lesson04.targets, but("llama", [3]), "give names of layers as text"),
        (lesson04.targets, but("llama", for_rank(4)), "not a LoraConfig"),
        (lesson04.targets, lambda architecture: print(end=""), "Is a return missing"),
        (
            lesson04.count,
            lambda shapes, rank: sum(
                rank * (i + o) for i, o in [s for n, s in enumerate(shapes) if s != shapes[n - 1]]
            ),
            "count every layer|count is not right",
        ),
        (lesson04.count, lambda shapes, rank: sum(2 * rank * max(pair) for pair in shapes), "count is not right"),
        (lesson04.count, lambda shapes, rank: sum(i * o for i, o in shapes), "full weights"),
        (lesson04.count, lambda shapes, rank: sum(rank * i * o for i, o in shapes), "multiplies the two sides"),
        (lesson04.count, lambda shapes, rank: sum(rank * i for i, o in shapes), "A only"),
        (lesson04.count, lambda shapes, rank: sum(rank * o for i, o in shapes), "B only"),
        (lesson04.count, lambda shapes, rank: sum(2 * rank * i for i, o in shapes), "square one"),
        (lesson04.count, lambda shapes, rank: right_count(set(shapes), rank), "count every layer"),
        (lesson04.count, lambda shapes, rank: right_count(shapes, 1), "for rank 1"),
        (lesson04.count, lambda shapes, rank: right_count(shapes[:1], rank), "first layer only"),
        (lesson04.count, lambda shapes, rank: right_count(shapes, rank) + 1, "for one layer first"),
        (lesson04.count, lambda shapes, rank: [right_count(shapes, rank)], "should be a number"),
        (lesson04.budget, budget_with(lora_alpha=lambda rank: 16), "alpha is 16; twice the rank"),
        (lesson04.budget, budget_with(lora_alpha=lambda rank: rank), "twice the rank was asked for"),
        (lesson04.budget, budget_with(target_modules=lambda rank: ["q_proj", "v_proj"]), 'give "all-linear"'),
        (lesson04.budget, budget_with(task_type=lambda rank: None), "task_type is None"),
        (lesson04.budget, budget_with(task_type=lambda rank: "SEQ_CLS"), "task_type is 'SEQ_CLS'"),
        (lesson04.budget, budget_if(lambda parts, budget: parts.total <= budget), "a tenth of it is to stay free"),
        (
            lesson04.budget,
            budget_if(lambda parts, budget: parts.weights <= 0.9 * budget),
            "that is more than there is|a tenth of it",
        ),
        (lesson04.budget, budget_if(lambda parts, budget: parts.total <= 0.5 * budget), "you returned None|fits, too"),
        (
            lesson04.budget,
            lambda config, budget: for_rank(4) if needed(config, for_rank(4)).total <= 0.9 * budget else None,
            "rank 64 fits, too",
        ),
        (lesson04.budget, lambda config, budget: right_budget(config, budget) or for_rank(4), "Return None where"),
        (
            lesson04.budget,
            lambda config, budget: getattr(right_budget(config, budget), "r", None),
            "of type LoraConfig",
        ),
        (lesson04.budget, budget_estimated_with(gradient_checkpointing=False), "compare its settings"),
        (lesson04.budget, budget_estimated_with(dtype="float32"), "compare its settings"),
        (lesson04.budget, lambda config, budget: for_rank(10), "Choose from 64, 32, 16, 8, 4"),
        (lesson04.budget, lambda config, budget: print(end=""), "Is a return missing"),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


# What the lesson takes from elsewhere


def test_frozen_norms_and_a_frozen_head_keep_less_for_the_backward_pass():
    """Of a model with trained norms and a trained output layer autograd keeps more: their inputs."""
    ids = torch.arange(12).reshape(2, 6)
    kept = {}
    for trained in ("", "norm", "lm_head"):
        model = lesson02.tiny_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("proj" in name or (bool(trained) and trained in name))
        kept[trained] = layers.loss_and_kept(model, {"input_ids": ids, "labels": ids})[1]
    assert kept[""] < kept["norm"] and kept[""] < kept["lm_head"]


def test_the_table_of_adapted_layers_says_rank_scaling_and_numbers():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    rows = layers.adapted(get_peft_model(lesson02.tiny_model(), config))
    assert [dict(zip(layers.COLUMNS, row)) for row in rows] == [
        {
            "layer": "q_proj",
            "blocks": "0,\u00a01",
            "in → out": "16\u00a0→\u00a016",
            "rank": 4,
            "scaling": "2",
            "parameters": "256",
        },
        {
            "layer": "v_proj",
            "blocks": "0,\u00a01",
            "in → out": "16\u00a0→\u00a08",
            "rank": 2,
            "scaling": "4",
            "parameters": "96",
        },
    ]


def test_layers_of_the_blocks_are_named_once_and_leave_out_the_head():
    assert layers.of_the_blocks(lesson04.architecture("gpt2")) == {
        "attn": ["c_attn", "c_proj"],
        "mlp": ["c_fc", "c_proj"],
    }
    named = layers.of_the_blocks(lesson04.architecture("bert"))
    assert named == {"self": ["query", "key", "value"], "output": ["dense"], "intermediate": ["dense"]}
    assert layers.of_the_blocks(nn.Sequential(nn.Linear(2, 3))) == {"": ["0"]}, "a number is what tells a block"


def test_tables_of_layers_name_the_model_or_the_setting_once(capsys):
    layers.show_blocks({"GPT-2": lesson04.architecture("gpt2")})
    setting = {"target_modules": r".*\.(q|v)_proj", "r": 4}
    layers.show_adapted([setting], [get_peft_model(lesson02.tiny_model(), LoraConfig(**setting))])
    blocks, adapted = capsys.readouterr().out.split("| model | linear layers of the blocks |")[1].split("| setting ")
    assert "| GPT-2 | **attn**: c_attn, c_proj; **mlp**: c_fc, c_proj |" in blocks
    first, second = adapted.splitlines()[2:]
    assert first.startswith(r"| `target_modules='.*\.(q\|v)_proj', r=4` | q_proj |") and second.startswith(
        "|  | v_proj |"
    )


def test_what_is_trained_is_counted_in_a_and_b_and_elsewhere():
    model = get_peft_model(
        lesson02.tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["v_proj"])
    )
    assert layers.count_trained(model) == (128, 256)  # two blocks of 2 x (16 + 16), and of 16 x 8


def test_the_loop_puts_loss_on_answers_pads_on_the_right_and_trains():
    from transformers import AutoTokenizer

    from course_utils import data, loop, paths

    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    rows = list(data.load_task("sailor", "train").select(range(5)))
    first, second = loop.batches(tokenizer, rows, size=3)
    assert [len(batch["labels"]) for batch in (first, second)] == [3, 2]
    for row, ids, labels, mask in zip(rows, first["input_ids"], first["labels"], first["attention_mask"]):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert (ids[length:] == tokenizer.pad_token_id).all() and (labels[length:] == -100).all()
        answer = tokenizer.decode(ids[:length][labels[:length] != -100], skip_special_tokens=True)
        assert answer.strip() == row["completion"][0]["content"]
    tiny = lesson02.tiny_model()
    frozen = tiny.lm_head.weight.requires_grad_(False).clone()
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.arange(12).reshape(2, 6)}
    losses = loop.train(tiny, [batch] * 5, learning_rate=1e-2)
    assert len(losses) == 5 and losses[-1] < losses[0] and not tiny.training
    assert torch.equal(tiny.lm_head.weight, frozen)


@pytest.mark.parametrize("width, blocks", [(1024, 24), (1280, 36)])
def test_lora_on_gpt2s_c_attn_costs_as_much_as_on_query_and_value(width, blocks):
    from transformers import GPT2Config

    config = GPT2Config(n_embd=width, n_layer=blocks, n_head=16 if width == 1024 else 20)
    counts = [
        counting.count_lora_parameters(config, LoraConfig(r=r, target_modules=["c_attn"])).trainable for r in (1, 4)
    ]
    q_and_v = 2 * blocks * (width + width)  # for rank 1
    assert counts == [q_and_v, 4 * q_and_v]


def test_pefts_silence_and_refusals():
    """Only a list without any right name is refused; rank 0 is, and a rank above the layer's size is not."""
    import warnings

    def said(**settings):
        with warnings.catch_warnings(record=True, action="always") as caught:
            get_peft_model(lesson02.tiny_model(), LoraConfig(lora_alpha=8, **settings))
        return [str(warning.message) for warning in caught if "is_gradient_checkpointing" not in str(warning.message)]

    assert said(target_modules=["q_proj", "c_attn"]) == []
    assert said(target_modules=["q_proj"], r=1000) == []
    assert "did not match any targeted module" in said(target_modules=["q_proj"], rank_pattern={"value": 2})[0]
    with pytest.raises(ValueError, match="not found in the base model"):
        said(target_modules=["c_attn"])
    with pytest.raises(ValueError, match="positive integer"):
        said(target_modules=["q_proj"], r=0)
