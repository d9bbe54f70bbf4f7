"""What check_lora_config says of healthy configurations, and of those that do not do what they say."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from adapter_checks import check_lora_config


def lora(**changes):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    )


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


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
        {"target_modules": ["embed_tokens", "q_proj"], "bias": "all", "layers_to_transform": [1]},
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
    ],
)
def test_faulty_configurations(changes, code, words, tiny_model):
    report = check_lora_config(tiny_model, lora(**changes))
    assert report.codes == [code] and words in message(report, code)
    if code in ("refused", "matches_nothing"):
        assert "q_proj" in next(finding.remedy for finding in report.findings if finding.code == code)


@pytest.mark.parametrize(
    ("rate", "code"), [(2e-5, "rate_too_low"), (0, "bad_rate"), (float("nan"), "bad_rate"), ("1e-4", "bad_rate")]
)
def test_learning_rate(rate, code, tiny_model):
    assert check_lora_config(tiny_model, lora(), rate).codes == [code]


@pytest.mark.parametrize(("rate", "codes"), [(9.9e-5, ["rate_too_low"]), (1e-4, []), (2e-4, []), (1, [])])
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
