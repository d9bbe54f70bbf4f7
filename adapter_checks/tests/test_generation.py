"""Generation, against greedy decoding of each prompt alone."""

import warnings

import pytest
from transformers import GPT2Config, LlamaConfig, LlavaConfig, MambaConfig

from adapter_checks.errors import InputError
from adapter_checks.generation import context_length, generate

PROMPTS = ["a", "a much longer prompt than the first", "three words here", "é"]


def reference(model, tokenizer, prompt, max_new_tokens=8):
    """Greedy decoding of one prompt without padding, cache or `generate`."""
    import torch

    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens and tokenizer.eos_token_id not in new:
            new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_generate_equals_greedy_decoding_of_each_prompt_alone(batch_size, tiny_model, tiny_tokenizer):
    expected = [reference(tiny_model, tiny_tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(expected)) > 1  # a model that says the same to all would prove nothing
    assert generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size) == expected


def test_generate_takes_strings_and_messages_alike(tiny_model, tiny_tokenizer):
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    both = [generate(tiny_model, tiny_tokenizer, given, max_new_tokens=4) for given in (PROMPTS, messages)]
    assert both[0] == both[1]
    dialogue = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert generate(tiny_model, tiny_tokenizer, [dialogue], 4) != generate(tiny_model, tiny_tokenizer, ["c"], 4)


def test_generate_of_nothing_is_nothing(tiny_model, tiny_tokenizer):
    assert generate(tiny_model, tiny_tokenizer, []) == []


def _prefer(model, token):
    """Make the model say this token whatever comes before."""
    import torch

    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([token]), 1.0)
    )


def test_generate_stops_at_the_end_of_the_turn(tiny_model, tiny_tokenizer):
    calls = []
    _prefer(tiny_model, tiny_tokenizer.eos_token_id)
    tiny_model.register_forward_hook(lambda *_: calls.append(1))
    assert generate(tiny_model, tiny_tokenizer, ["a", "b"], max_new_tokens=8) == ["", ""]
    assert len(calls) == 1


def test_generate_stops_at_a_turn_token_that_only_the_generation_config_names(tiny_model, tiny_tokenizer):
    other = tiny_tokenizer.convert_tokens_to_ids("<|user|>")
    assert other != tiny_tokenizer.eos_token_id
    calls = []
    _prefer(tiny_model, other)
    tiny_model.register_forward_hook(lambda *_: calls.append(1))
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, other]
    generate(tiny_model, tiny_tokenizer, ["a"], max_new_tokens=8)
    assert len(calls) == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_generate_is_greedy_and_quiet_though_the_model_has_settings_of_its_own(
    wrapped, tiny_model, tiny_tokenizer, caplog
):
    from peft import LoraConfig, get_peft_model

    expected = generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    settings = tiny_model.generation_config
    settings.update(do_sample=True, temperature=5.0, top_p=0.9, top_k=7, repetition_penalty=9.0, num_beams=2)
    model = (
        get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        if wrapped
        else tiny_model
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert not caplog.records
    assert model.generation_config is settings and tiny_model.generation_config is settings


def test_generate_leaves_model_and_tokenizer_as_they_were(tiny_model, tiny_tokenizer):
    tiny_model.train()
    tiny_model.model.layers[0].eval()  # somebody froze this one
    modes = {name: module.training for name, module in tiny_model.named_modules()}
    side, padding = tiny_tokenizer.padding_side, tiny_tokenizer.pad_token
    during = []
    tiny_model.model.layers[1].register_forward_hook(lambda module, *_: during.append(module.training))
    generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=2)
    assert {name: module.training for name, module in tiny_model.named_modules()} == modes
    assert True in modes.values() and False in modes.values() and not any(during)
    assert (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token) == (side, padding)


def test_modes_come_back_after_an_error_too(tiny_model, tiny_tokenizer):
    tiny_model.train()
    with pytest.raises(ValueError, match="adapter_names"):
        generate(tiny_model, tiny_tokenizer, ["a"], max_new_tokens=2, adapter_names=["x"])  # not a PEFT model
    assert tiny_model.training and tiny_model.lm_head.training


def test_generate_without_a_pad_token(tiny_model):
    from tiny_models import make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer()
    expected = generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=4)
    tokenizer.pad_token = None
    assert generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=4) == expected


def test_generate_refuses_what_can_not_work(tiny_model, tiny_tokenizer):
    from tiny_models import make_tiny_tokenizer

    with pytest.raises(InputError, match="context of 256"):
        generate(tiny_model, tiny_tokenizer, ["a" * 250], max_new_tokens=48)
    with pytest.raises(ValueError, match="4 prompts and 1 adapter names"):
        generate(tiny_model, tiny_tokenizer, PROMPTS, adapter_names=["reading"])
    with pytest.raises(InputError, match=r"one text, 'Who\?'. Give a list of texts"):
        generate(tiny_model, tiny_tokenizer, "Who?")
    with pytest.raises(InputError, match="One of the prompts is 7. Each has to be a text"):
        generate(tiny_model, tiny_tokenizer, ["Who?", 7])
    bare = make_tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        generate(tiny_model, bare, ["a"])


def test_mixed_adapter_batches_equal_one_adapter_at_a_time(tiny_model, tiny_tokenizer):
    import torch
    from peft import LoraConfig, get_peft_model

    before = generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(tiny_model, config, adapter_name="one")
    model.add_adapter("two", config)
    alone = {"__base__": before}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    assert all(len({answers[i] for answers in alone.values()}) == 3 for i in range(4))
    names = ["two", "__base__", "one", "two"]
    mixed = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=3, adapter_names=names)
    assert mixed == [alone[name][i] for i, name in enumerate(names)]


def test_drawn_answers_follow_the_models_own_distribution(tiny_model, tiny_tokenizer, monkeypatch):
    import torch

    drawn_from, multinomial = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *a, **k: drawn_from.append(p) or multinomial(p, *a, **k))
    ids = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    with torch.no_grad():
        logits = tiny_model(input_ids=torch.tensor([ids])).logits[0, -1]
    for temperature in (1.0, 0.5):
        generate(tiny_model, tiny_tokenizer, PROMPTS[:1], max_new_tokens=1, temperature=temperature)
        torch.testing.assert_close(drawn_from[-1][0], (logits / temperature).softmax(-1))
    assert (drawn_from[-1] > 0).sum() > 50, "nothing is cut off, as the library's top_k of 50 would"


def test_drawn_answers_go_by_the_seed_and_greedy_ones_do_not(tiny_model, tiny_tokenizer):
    import torch

    def drawn(seed, temperature):
        torch.manual_seed(seed)
        return generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8, temperature=temperature)

    assert drawn(0, 1.0) == drawn(0, 1.0) != drawn(1, 1.0)
    assert drawn(0, 0.0) == drawn(1, 0.0) == drawn(0, 1e-4)
    with pytest.raises(ValueError, match="temperature is -1"):
        generate(tiny_model, tiny_tokenizer, PROMPTS, temperature=-1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=256), 256),
        (LlamaConfig(max_position_embeddings=256, rope_scaling={"rope_type": "linear", "factor": 4.0}), 1024),
        (
            LlamaConfig(
                max_position_embeddings=1024,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            ),
            1024,
        ),
        (GPT2Config(n_positions=128), 128),
        (MambaConfig(), None),
        (LlavaConfig(text_config=LlamaConfig(max_position_embeddings=256).to_dict()), 256),
    ],
)
def test_context_of_a_configuration(config, expected):
    assert context_length(config) == expected
