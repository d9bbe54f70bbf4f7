"""What check_lora_config says of healthy configurations, and of those that do not do what they say."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    JambaConfig,
    Lfm2Config,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Qwen3MoeConfig,
)

from adapter_checks import check_lora_config


def lora(**changes):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    )


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


def remedy(report, code):
    return next(finding.remedy for finding in report.findings if finding.code == code)


def gpt2():
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*self_attn\.(q|v)_proj", "use_dora": True},
        {"target_modules": None},
        {"r": 64, "init_lora_weights": "olora"},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 32}},
        {"target_modules": ["embed_tokens", "q_proj"], "bias": "all"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head", "down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"},
        {"target_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r".*layers\.0\..*(q|v)_proj"},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"trainable_token_indices": [0, 3]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
        {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 16, ".*_proj": 2}},
        {"rank_pattern": {".*_proj": 4, "q_proj": 4}},  # in each other's shadow, and alike
        {"r": 4, "lora_alpha": 128},
        {"r": 64, "lora_alpha": 128, "use_rslora": True},
        {"lora_dropout": 0.1},
        {"lora_dropout": 0},
        {"task_type": None},
        {"r": 256, "lora_alpha": 32, "target_modules": ["down_proj"], "rank_pattern": {"down_proj": 32}},
    ],
)
def test_healthy_configurations(changes, tiny_model):
    config = lora(**changes)
    before, state = config.to_dict(), torch.random.get_rng_state()
    report = check_lora_config(tiny_model, config, 2e-4)
    assert report.codes == [] and "layers would be adapted" in message(report, "lora")
    assert config.to_dict() == before and torch.equal(torch.random.get_rng_state(), state)
    assert not any("lora" in name for name, _ in tiny_model.named_modules())


def test_numbers_of_the_configuration(tiny_model):
    assert message(check_lora_config(tiny_model, lora()), "lora").startswith(
        "4 layers would be adapted, with a scaling of 2."
    )
    wrapped = get_peft_model(tiny_model, lora())
    assert message(check_lora_config(wrapped, lora(r=2)), "lora").startswith(
        "4 layers would be adapted, with a scaling of 4."
    )
    assert check_lora_config(gpt2(), lora(target_modules=["c_attn"], fan_in_fan_out=True)).codes == []


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"r": 0}, "bad_rank", "rank is 0"),
        ({"r": -3}, "bad_rank", "-3"),
        ({"r": 4.5}, "bad_rank", "4.5"),
        ({"rank_pattern": {"q_proj": 0}}, "bad_rank", "4, 0"),
        ({"r": 65}, "rank_too_large", "4 layers: model.layers.0.self_attn.q_proj (64)"),
        ({"rank_pattern": {"v_proj": 128}}, "rank_too_large", "2 layers"),
        ({"target_modules": ["query"]}, "refused", "query"),
        ({"target_modules": r".*attention\.q"}, "refused", "not found"),
        ({"target_modules": ["q_proj", "query"]}, "matches_nothing", "query"),
        ({"rank_pattern": {"k_proj": 2}}, "matches_nothing", "k_proj"),
        ({"alpha_pattern": {"query": 2}}, "matches_nothing", "query"),
        ({"lora_alpha": 0}, "small_scaling", "scaling of 0"),
        ({"lora_alpha": 2, "r": 16}, "small_scaling", "0.125"),
        ({"lora_alpha": 512}, "large_scaling", "128"),
        ({"alpha_pattern": {"q_proj": 1000}}, "large_scaling", "250"),
        ({"lora_dropout": 1.0}, "bad_dropout", "1.0"),
        ({"lora_dropout": -0.1}, "bad_dropout", "-0.1"),
        ({"lora_dropout": None}, "bad_dropout", "None"),
        ({"init_lora_weights": False}, "random_start", "at random"),
        ({"inference_mode": True}, "inference_mode", "freezes"),
        ({"task_type": "SEQ_CLS"}, "wrong_task_type", "LlamaForCausalLM is for CAUSAL_LM"),
        ({"exclude_modules": ["query", "lm_head"]}, "without_effect", "exclude_modules: query,"),
        ({"exclude_modules": "lm_heed"}, "without_effect", "lm_heed"),
        ({"modules_to_save": ["score"]}, "without_effect", "modules_to_save: score"),
        ({"layers_to_transform": [0, 2, 3]}, "without_effect", "layers_to_transform: 2, layers_to_transform: 3"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "target_left_out", "lm_head"),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, "target_left_out", "k_proj"),
        ({"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]}, "target_left_out", "embed_tokens"),
        ({"rank_pattern": {".*_proj": 8, "q_proj": 16}}, "shadowed_pattern", "q_proj in rank_pattern (by .*_proj)"),
        (
            {"alpha_pattern": {".*": 8, r"layers\.1\..*": 16}},
            "shadowed_pattern",
            r"layers\.1\..* in alpha_pattern (by .*)",
        ),
        ({"trainable_token_indices": [5, 260]}, "token_outside", "260 (of 260 rows)"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "token_outside", "-1"),
    ],
)
def test_faulty_configurations(changes, code, words, tiny_model):
    report = check_lora_config(tiny_model, lora(**changes))
    assert report.codes == [code] and words in message(report, code)
    if code in ("refused", "matches_nothing"):
        assert "q_proj" in remedy(report, code)
    if code == "refused":
        assert ("is a pattern" in remedy(report, code)) == isinstance(changes["target_modules"], str)


@pytest.mark.parametrize(
    ("rate", "code"),
    [
        (2e-5, "rate_too_low"),
        (0.1, "rate_too_high"),
        (2, "rate_too_high"),
        (0, "bad_rate"),
        (float("nan"), "bad_rate"),
        ("1e-4", "bad_rate"),
    ],
)
def test_learning_rate(rate, code, tiny_model):
    assert check_lora_config(tiny_model, lora(), rate).codes == [code]


@pytest.mark.parametrize(("rate", "codes"), [(9.9e-5, ["rate_too_low"]), (1e-4, []), (2e-4, []), (1.5e-2, [])])
def test_the_rates_that_qloras_authors_used_are_healthy(rate, codes, tiny_model):
    """1e-4 for 33B and 65B parameters, 2e-4 below (QLoRA paper, table 9): the bound itself belongs to LoRA."""
    assert check_lora_config(tiny_model, lora(), rate).codes == codes


def test_neither_a_model_nor_a_configuration(tiny_model):
    for model, config in (
        (None, lora()),
        (tiny_model, None),
        (tiny_model, {"r": 8}),
        ("models/base", lora()),
        (torch.nn.Linear(2, 2), lora()),
    ):
        assert check_lora_config(model, config).codes == ["bad_argument"]


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_told(initialisation, tiny_model):
    """A choice and no fault, but one to know of before the adapter is shared."""
    report = check_lora_config(tiny_model, lora(init_lora_weights=initialisation))
    assert report.codes == [] and "changes the base's weights" in message(report, "changes_base")
    assert "changes_base" not in str(check_lora_config(tiny_model, lora()).findings)


# ------------------------------------------------------------------------------------------------ which layers


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def jamba(**changes):
    """Attention in one of four layers; Mamba in the others, and a mixture of experts in every second."""
    return JambaConfig(
        **SMALL | {"attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8, "mamba_dt_rank": 8} | changes
    )


def checked(config, **changes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return check_lora_config(model, lora(**changes))


def test_a_hybrid_model_of_which_most_layers_stay_as_they_are():
    report = checked(jamba())
    assert report.ok and report.codes == ["few_layers"]
    said = message(report, "few_layers")
    assert "1 of the 4 layers of model.layers" in said and "25%" in said
    assert "in_proj" in said and "x_proj" in said and "q_proj" not in said
    assert "few_layers" in checked(Lfm2Config(**SMALL, full_attn_idxs=[3])).codes


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": [*ATTENTION, "in_proj", "x_proj"]},
        {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj"]},
        {"layers_to_transform": [2]},
        {"target_modules": r".*layers\.2\..*(q|v)_proj"},
        {"target_modules": ["layers.2.self_attn.q_proj"]},
    ],
)
def test_a_hybrid_model_adapted_throughout_or_in_chosen_layers(changes):
    assert "few_layers" not in checked(jamba(), **changes).codes


def test_layers_of_another_kind_of_model_do_not_count():
    """Text layers alone, of a model that sees: its other tower was left out on purpose."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **SMALL},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32},
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert check_lora_config(model, lora(target_modules=r".*language_model.*\.(q|v)_proj")).codes == []


def mixtral():
    return MixtralConfig(**SMALL, num_local_experts=4)


def qwen3_moe():
    return Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16)


def test_experts_that_stay_frozen():
    """Their usual names match nothing in Mixtral, where today's transformers stacks them in one tensor."""
    report = checked(mixtral(), target_modules=[*ATTENTION, *MLP])
    assert report.codes == ["matches_nothing", "experts_frozen"] and "down_proj, gate_proj" in str(report)
    assert "target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in remedy(report, "experts_frozen")
    assert "experts_frozen" in checked(jamba(), target_modules=[*ATTENTION, "in_proj", *MLP]).codes


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (mixtral(), {"target_modules": "all-linear"}),
        (mixtral(), {"target_modules": ATTENTION}),
        (mixtral(), {"target_modules": [*ATTENTION, "w1", "w2", "w3"]}),  # PEFT knows these as the experts
        (mixtral(), {"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        (mixtral(), {"target_modules": ATTENTION, "target_parameters": ["experts.down_proj"]}),
        (qwen3_moe(), {"target_modules": [*ATTENTION, *MLP]}),
        (qwen3_moe(), {"target_modules": "all-linear"}),
    ],
    ids=str,
)
def test_experts_that_are_adapted_or_not_asked_for(config, changes):
    assert checked(config, **changes).codes == []


def test_linear_layers_whose_names_went_to_the_experts():
    config = DeepseekV3Config(
        **SMALL, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    for targets in (["o_proj", *MLP], "all-linear"):
        report = checked(config, target_modules=targets)
        assert report.codes == ["target_left_out"] and "mlp.gate_proj" in message(report, "target_left_out")
    assert "down_proj.weight" in remedy(report, "target_left_out")
    parameters = [f"{name}.weight" for name in MLP]
    assert checked(config, target_modules=["o_proj", *MLP], target_parameters=parameters).codes == []


# ------------------------------------------------------------------------------------------------ embedding and heads


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]])
def test_lora_on_one_matrix_that_is_two_layers(targets, tiny_model):
    assert check_lora_config(tiny_model, lora(target_modules=targets)).codes == []
    tiny_model.config.tie_word_embeddings = True
    tiny_model.tie_weights()
    assert check_lora_config(tiny_model, lora(target_modules=targets)).codes == ["tied_head"]
    assert check_lora_config(tiny_model, lora(modules_to_save=["embed_tokens", "lm_head"])).codes == []
    adapted = get_peft_model(tiny_model, lora(target_modules=["embed_tokens"]))
    assert check_lora_config(adapted, lora(target_modules=targets)).codes == ["tied_head"], "one sits there already"


TINY_BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lambda model: LlamaForSequenceClassification(model.config), {"target_modules": ["q_proj"]}),
        (lambda model: LlamaForSequenceClassification(model.config), {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        (lambda model: BertForSequenceClassification(BertConfig(**TINY_BERT)), {"target_modules": ["query"]}),
    ],
)  # fmt: skip
def test_a_new_head_that_would_not_be_saved(make, changes, tiny_model):
    model = make(tiny_model)
    report = check_lora_config(model, lora(task_type=None, **changes))
    assert report.ok and report.codes == ["head_not_saved"]
    assert "or set task_type='SEQ_CLS'" in remedy(report, "head_not_saved")
    assert check_lora_config(model, lora(task_type="SEQ_CLS", **changes)).codes == []
    head = next(name for name in ("score", "classifier") if hasattr(model, name))
    saved = {"modules_to_save": [*changes.get("modules_to_save", []), head]}
    assert check_lora_config(model, lora(task_type=None, **changes | saved)).codes == []
    model.config.architectures = [type(model).__name__]  # saved from this class, so the head was trained
    assert check_lora_config(model, lora(task_type=None, **changes)).codes == []


def test_lora_on_a_random_head_is_lost_with_it(tiny_model):
    model = LlamaForSequenceClassification(tiny_model.config)
    report = check_lora_config(model, lora(task_type=None, target_modules=["q_proj", "score"], r=2))
    assert report.codes == ["head_not_saved"]


def test_a_head_that_the_task_type_does_not_know():
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_labels=2,
    )  # fmt: skip
    model = BartForSequenceClassification(config)
    report = check_lora_config(model, lora(task_type="SEQ_CLS"))
    assert report.codes == ["head_not_saved"] and "classification_head" in message(report, "head_not_saved")
    assert "task_type" not in remedy(report, "head_not_saved")
    assert check_lora_config(model, lora(task_type="SEQ_CLS", modules_to_save=["classification_head"])).codes == []


def test_a_head_of_two_layers_that_peft_saves_by_the_end_of_their_names():
    model = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=2, hidden_dim=64, num_labels=2)
    )
    assert check_lora_config(model, lora(target_modules=["q_lin"], task_type="SEQ_CLS")).codes == []
    assert "pre_classifier, classifier" in str(check_lora_config(model, lora(target_modules=["q_lin"], task_type=None)))


def test_the_wrong_task_for_a_classifier(tiny_model):
    report = check_lora_config(LlamaForSequenceClassification(tiny_model.config), lora(task_type="CAUSAL_LM"))
    assert report.codes == ["wrong_task_type", "refused"]
