"""Outputs of all kinds of models, and what an adapter does to them."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from adapter_checks import check_adapters, check_changes_output, compare_models
from architectures import ARCHITECTURES


def adapted(architecture, config, scale=0.3):
    """A model with an adapter of which all that is trainable was moved."""
    torch.manual_seed(0)
    model = get_peft_model(architecture.make(), config).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += scale * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_compared(name):
    architecture = ARCHITECTURES[name]
    assert compare_models(architecture.make(), architecture.make(), architecture.example()).codes == []
    report = compare_models(architecture.make(), architecture.make(seed=1), architecture.example())
    assert report.codes == ["logits_differ"] and report.max_abs > 0.1


def test_what_a_tokenizer_returns_beside_is_left_out():
    inputs = ARCHITECTURES["Llama"].example() | {"token_type_ids": torch.zeros(2, 6, dtype=torch.long)}
    assert compare_models(ARCHITECTURES["Llama"].make(), ARCHITECTURES["Llama"].make(), inputs).codes == []
    bert = ARCHITECTURES["BERT classifier"]
    segments = inputs | {"token_type_ids": torch.ones(2, 6, dtype=torch.long)}

    def with_other_segments(**_):
        return bert.make()(**segments)

    assert compare_models(bert.make(), with_other_segments, inputs).codes == ["logits_differ"], "BERT reads them"


def test_a_decoders_own_mask_counts():
    t5, inputs = ARCHITECTURES["T5"], ARCHITECTURES["T5"].example()
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    assert compare_models(t5.make(), t5.make(), inputs).codes == []
    inputs["decoder_attention_mask"] = torch.ones(2, 2)
    assert compare_models(t5.make(), t5.make(), inputs).codes == ["bad_inputs"]


@pytest.mark.parametrize("method", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT classifier"])
def test_methods_that_put_virtual_tokens_before_the_text(method, name):
    architecture = ARCHITECTURES[name]
    model = adapted(architecture, method(num_virtual_tokens=3, task_type=architecture.task))
    assert check_adapters(model).codes == []
    report = check_changes_output(model, architecture.example())
    assert report.codes == [] and report.max_abs > 0.01
    assert compare_models(architecture.make(), model, architecture.example()).codes == ["logits_differ"]


def test_an_activated_adapter_without_its_invocation():
    llama = ARCHITECTURES["Llama"]
    settings = {"target_modules": llama.targets, "task_type": "CAUSAL_LM"}
    model = adapted(llama, LoraConfig(alora_invocation_tokens=[5, 6], **settings))
    ids = torch.arange(10, 20)[None]
    report = check_changes_output(model, ids)
    assert report.codes == ["no_invocation"] and "[5, 6]" in str(report)
    assert check_changes_output(model, ids[:, :1]).codes == ["no_invocation"], "a text shorter than the invocation"
    ids[0, 4:6] = torch.tensor([5, 6])
    assert check_changes_output(model, ids).codes == []
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    assert check_changes_output(model, ids).codes == ["no_change"]


def test_an_effect_that_is_small():
    llama = ARCHITECTURES["Llama"]
    model = adapted(llama, LoraConfig(target_modules=llama.targets), scale=1e-4)
    report = check_changes_output(model, llama.example())
    assert report.ok and report.codes == ["small_effect"] and 0 < report.max_abs < 1e-3
    assert check_changes_output(model, llama.example(), at_least=1e-6).codes == []
