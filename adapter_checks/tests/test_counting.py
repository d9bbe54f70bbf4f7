"""The count from two configs, against PEFT on real models and against what the papers print."""

import copy
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from adapter_checks import InputError, counting

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_config(name):
    import transformers

    own = {
        "Llama": {**SIZES, "num_key_value_heads": 2},
        "GPT2": {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "Bert": SIZES,
        "Roberta": SIZES,
        "OPT": {**SIZES, "ffn_dim": 160, "word_embed_proj_dim": 32},
        "T5": {"vocab_size": 96, "d_model": 64, "d_ff": 160, "d_kv": 16, "num_layers": 3, "num_heads": 4},
        "Mixtral": {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
        "Mamba": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3},
    }[name]
    return getattr(transformers, f"{name}Config")(**own, **TOKENS)


def real_model(config):
    """With weights, and made by the user's own call, not by the function under test."""
    import transformers

    auto = {"bert": "MaskedLM", "roberta": "MaskedLM", "t5": "Seq2SeqLM"}.get(config.model_type, "CausalLM")
    return getattr(transformers, f"AutoModelFor{auto}").from_config(copy.deepcopy(config))


def ask_peft(config, lora_config):
    """(trainable, all parameters, {name: (in, out, rank)}) of the real model, as PEFT itself has them."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(real_model(config), copy.deepcopy(lora_config))
    layers = {
        name.removeprefix("base_model.model."): (layer.in_features, layer.out_features, layer.r["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    return *model.get_nb_trainable_parameters(), layers


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**options)


def agrees(count, trainable, every, layers) -> bool:
    """Whether a count is what PEFT has."""
    ours = {module.name: (module.in_features, module.out_features, module.rank) for module in count.modules}
    return (count.trainable, count.base + count.adapter, ours) == (trainable, every, layers)


CASES = [
    ("Llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    ("Llama", {"target_modules": "all-linear", "r": 3}),
    ("Llama", {"target_modules": r".*\.1\.self_attn\.[kv]_proj"}),
    ("Llama", {}),
    (
        "Llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 5},
        },
    ),
    ("Llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    ("Llama", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("Llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    ("Llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    ("Llama", {"target_modules": ["k_proj"], "r": 1000}),
    ("Llama", {"target_modules": ["q_proj"], "bias": "all"}),
    ("GPT2", {"target_modules": ["c_attn"]}),
    ("GPT2", {"target_modules": "all-linear", "bias": "lora_only"}),
    ("GPT2", {"bias": "all"}),
    ("GPT2", {"target_modules": ["c_proj", "wte"], "rank_pattern": {r"mlp\.c_proj": 16}, "bias": "lora_only"}),
    ("Bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    ("Bert", {"target_modules": "all-linear", "bias": "all"}),
    ("Roberta", {"r": 4}),
    ("Roberta", {"target_modules": "all-linear", "bias": "all"}),
    ("OPT", {"target_modules": "all-linear", "bias": "lora_only"}),
    ("OPT", {"target_modules": ["q_proj", "fc1"], "bias": "all", "exclude_modules": r".*layers\.0\..*"}),
    ("T5", {"task_type": "SEQ_2_SEQ_LM"}),
    ("T5", {"target_modules": "all-linear"}),
    ("Mixtral", {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_count_is_what_peft_trains(name, options):
    config, lora_config = make_config(name), lora(**options)
    count = counting.count_lora_parameters(config, lora_config)
    assert count.modules and agrees(count, *ask_peft(config, lora_config))


@pytest.mark.parametrize("change", [{"r": 7}, {"bias": "none"}, {"target_modules": ["c_attn"]}, {"rank_pattern": {}}])
def test_comparison_sees_every_lever(change):
    options = {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "bias": "lora_only"}
    truth = ask_peft(make_config("GPT2"), lora(**options))
    assert agrees(counting.count_lora_parameters(make_config("GPT2"), lora(**options)), *truth)
    assert not agrees(counting.count_lora_parameters(make_config("GPT2"), lora(**{**options, **change})), *truth)


def test_names_of_the_architecture_decide_which_class_is_built():
    config = make_config("Roberta")
    config.architectures = ["RobertaForSequenceClassification"]
    assert type(counting.meta_model(config)).__name__ == "RobertaForSequenceClassification"
    assert type(counting.meta_model(config, "FEATURE_EXTRACTION")).__name__ == "RobertaModel"
    config.architectures = ["OfAnotherPackage"]
    assert type(counting.meta_model(config)).__name__ == "RobertaForMaskedLM"


def test_no_weight_is_made_and_neither_config_changes():
    config, lora_config = make_config("GPT2"), lora(target_modules="all-linear")
    before = config.to_dict(), lora_config.to_dict()
    counting.count_lora_parameters(config, lora_config)
    assert (config.to_dict(), lora_config.to_dict()) == before
    assert all(parameter.is_meta for parameter in counting.meta_model(config).parameters())


def test_numbers_for_people():
    count = counting.ParameterCount(adapter=96, biases=4, base=904, modules=(counting.ModuleCount("q", 10, 14, 4),))
    assert (count.trainable, count.share, count.modules[0].parameters) == (100, 0.1, 96)
    assert str(count) == "100 of 1,000 parameters are trained (10.0000%), in 1 adapted layer"


# ---------------------------------------------------------------------------------------------- published figures

ROBERTA_BASE = {"vocab_size": 50265, "type_vocab_size": 1}
ROBERTA_LARGE = {
    **ROBERTA_BASE,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
DEBERTA_XXL = {
    "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144, "vocab_size": 128100,
    "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3,
}  # fmt: skip
QUERY_VALUE = {"roberta": ["query", "value"], "deberta-v2": ["query_proj", "value_proj"], "gpt2": ["c_attn"]}


@pytest.mark.parametrize(
    ("kind", "shape", "rank", "exact", "printed", "as_printed"),
    [
        ("Roberta", ROBERTA_BASE, 8, 294_912, "0.3", True),
        ("Roberta", ROBERTA_LARGE, 8, 786_432, "0.8", True),
        ("DebertaV2", DEBERTA_XXL, 16, 4_718_592, "4.7", True),
        # The paper's figures for GPT-2 do not come out of its own formula.
        ("GPT2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 4, 393_216, "0.35", False),
        ("GPT2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 4, 737_280, "0.77", False),
    ],
)
def test_figures_of_the_lora_paper(kind, shape, rank, exact, printed, as_printed):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**shape)
    count = counting.count_lora_parameters(config, lora(r=rank, target_modules=QUERY_VALUE[config.model_type]))
    assert count.trainable == exact
    digits = len(printed.partition(".")[2])
    assert (f"{exact / 1e6:.{digits}f}" == printed) is as_printed


def gpt3_config():
    """GPT-3's shape with separate projections for query, key, value and output, which the paper adapts one by one."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=50257, hidden_size=12288, num_hidden_layers=96, ffn_dim=49152, num_attention_heads=96,
        word_embed_proj_dim=12288, max_position_embeddings=2048,
    )  # fmt: skip


def test_figures_of_the_lora_paper_for_gpt3():
    model = counting.meta_model(gpt3_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(175e9, rel=0.005)

    def count(letters, rank):
        names = [{"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}[letter] for letter in letters]
        return sum(module.parameters for module in counting.adapted_layers(model, lora(r=rank, target_modules=names)))

    assert count("v", 2) == count("qv", 1) == 4_718_592
    assert count("qv", 2) == count("qkvo", 1) == 9_437_184
    assert count("qv", 4) == 18_874_368
    assert round(175e9 / count("qv", 4)) == 9_272  # the "10,000 times"
    # 37.7M is rank 8 on q and v, or rank 4 on all four, as the paper's table has it; its appendix says 2, which is half.
    assert count("qv", 8) == count("qkvo", 4) == 37_748_736
    assert count("qkvo", 2) == 18_874_368
    assert count("qv", 64) == 301_989_888


def test_gpt3_counts_in_five_seconds_and_two_gigabytes():
    code = """
        import json, resource, sys, time
        import torch, transformers, peft
        from tests.test_counting import gpt3_config
        from adapter_checks.counting import count_lora_parameters
        start = time.process_time()  # of this process alone: other work on the machine must not fail the test
        count = count_lora_parameters(gpt3_config(), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        taken = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps([count.trainable, taken, peak]))
    """
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True, check=True, timeout=300
    )
    trainable, taken, peak = json.loads(done.stdout.splitlines()[-1])
    assert trainable == 37_748_736
    assert taken < 5 and peak < 2e9


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "Llama",
            {"target_modules": ["c_attn"]},
            r"no layer of LlamaForCausalLM .*c_attn.* are called down_proj, gate_proj",
        ),
        ("Llama", {"target_modules": "q_proj"}, "A string is a pattern for a layer's whole name; .*give a list"),
        ("Llama", {"target_modules": []}, "no layer"),
        ("Llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules"),
        ("Llama", {"target_modules": ["q_proj"], "layers_to_transform": [3]}, "layers_to_transform"),
        ("Llama", {"target_modules": "*_proj"}, "PEFT refuses"),
        ("Llama", {"target_modules": ["mlp"]}, "model.layers.0.mlp, a LlamaMLP"),
        ("Llama", {"target_modules": ["q_proj"], "r": 0}, "rank of model.layers.0.self_attn.q_proj is 0"),
        ("Llama", {"target_modules": ["q_proj"], "r": -1}, "is -1"),
        ("Llama", {"target_modules": ["q_proj"], "r": 2.5}, "whole number"),
        ("Llama", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}}, "is 0"),
        ("Llama", {"target_modules": ["q_proj"], "bias": "some"}, "bias is 'some'"),
        ("Llama", {"target_modules": ["q_proj"], "r": 65, "init_lora_weights": "olora"}, "64 directions and not 65"),
        ("Llama", {"target_modules": ["q_proj"], "use_dora": True}, "asks for more: use_dora"),
        ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("Llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
        ("Llama", {"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        ("Llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}, "mica"),
        ("Bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}, "task_type SEQ_CLS, which trains the head"),
        ("Mixtral", {"target_modules": "all-linear"}, "experts"),
        ("Mixtral", {"target_modules": ["w1"]}, "PEFT refuses"),
        ("Mamba", {"target_modules": ["out_proj"]}, "PEFT refuses.*Mamba"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_a_sentence(name, options, message):
    with pytest.raises(InputError, match=message):
        counting.count_lora_parameters(make_config(name), lora(**options))


def test_unknown_architecture_needs_targets():
    from transformers import FNetConfig

    with pytest.raises(InputError, match="target_modules=None"):
        counting.count_lora_parameters(FNetConfig(hidden_size=64, num_hidden_layers=1), lora())


@pytest.mark.parametrize("config", ["org/model", None, {"model_type": "llama"}])
def test_what_is_no_model_config_is_named(config):
    with pytest.raises(InputError, match=f"not {type(config).__name__}: take model.config"):
        counting.count_lora_parameters(config, lora(target_modules=["q_proj"]))


def test_a_config_that_no_model_fits_is_refused():
    config = make_config("Bert")
    config.hidden_size = 65
    with pytest.raises(InputError, match="No model can be built from this BertConfig"):
        counting.count_lora_parameters(config, lora(target_modules=["query"]))


@pytest.mark.parametrize("kind", ["AdaLoraConfig", "IA3Config", None])
def test_another_method_is_refused(kind):
    import peft

    options = {"total_step": 9} if kind == "AdaLoraConfig" else {}
    given = getattr(peft, kind)(target_modules=["q_proj"], **options) if kind else {"r": 8}
    with pytest.raises(InputError, match=f"not {type(given).__name__}"):
        counting.count_lora_parameters(make_config("Llama"), given)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_tasks_with_a_head_of_their_own_are_refused(task):
    with pytest.raises(InputError, match=f"task_type {task}, which trains the head"):
        counting.count_lora_parameters(make_config("Llama"), lora(target_modules=["q_proj"], task_type=task))
