"""4-bit and 8-bit models: the helper that stops repacking, the checks, and the whole road from loading to merging.

Everything that follows a repacked weight is planted with bitsandbytes' own function, so that it is tested on every
processor; what an eval forward does by itself is seen on one with AVX512-BF16 only.
"""

import copy
import importlib.util
import logging
import warnings

import pytest
import torch

from adapter_checks import InputError, check_quantised, check_quantization_config
from adapter_checks.bitsandbytes_workarounds import quiet_imports, quiet_int8, stop_repacking
from adapter_checks.comparison import MERGE_ATOL
from adapter_checks.names import plain_name
from adapter_checks.quantised import dequantised
from tiny_models import CPU_TRAINING

quiet_imports()

import bitsandbytes
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig
from trl import SFTConfig, SFTTrainer

avx512bf16 = pytest.mark.skipif(
    not has_avx512bf16(), reason="this processor has no AVX512-BF16, so nothing is repacked on it"
)


def four_bit(**settings):
    return BitsAndBytesConfig(
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **settings}
    )


def load(folder, settings=None, **options):
    """As a person would: nothing keeps it from being repacked."""
    options = {"dtype": torch.float32, "quantization_config": settings or four_bit(), **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def read(model):
    """The numbers that the 4-bit layers stand for."""
    return {
        name: bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in layers_of(model).items()
    }


def plant_repacking(layer):
    """What the first eval forward on an AVX512-BF16 processor does to a layer, and nothing else of it."""
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def text(report):
    """A report without its line breaks."""
    return " ".join(str(report).split())


IDS = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def evaluate(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------------------------------------- stop_repacking


@avx512bf16
@pytest.mark.parametrize("helped", [False, True])
def test_an_eval_forward_cuts_gradients_and_spoils_weights_unless_it_is_stopped(helped, tiny_model_folder):
    model = load(tiny_model_folder)
    if helped:
        assert stop_repacking(model) is model
    torch.manual_seed(0)
    model = get_peft_model(model, lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before, weights = gradients(model), read(model)
    assert all(torch.equal(before[name], gradients(model)[name]) for name in before)
    evaluate(model)
    with warnings.catch_warnings(record=True, action="always") as caught:
        after = gradients(model)
    assert before.keys() == after.keys()
    same = [torch.equal(before[name], after[name]) for name in before]
    spoilt = {
        name: (weight.reshape(weights[name].shape) - weights[name]).norm() / weights[name].norm()
        for name, weight in read(model).items()
    }
    if helped:
        assert all(same) and max(spoilt.values()) == 0 and not [w for w in caught if "gemv_4bit" in str(w.message)]
    else:
        assert (
            not all(same)
            and min(spoilt.values()) > 0.5
            and [w for w in caught if "autograd kernel was not registered" in str(w.message)]
        )


def test_a_repacked_model_is_refused(tiny_model_folder):
    model = load(tiny_model_folder)
    plant_repacking(layers_of(model)["model.layers.1.mlp.up_proj"])
    with pytest.raises(InputError, match="1 of 14 4-bit layers.*model.layers.1.mlp.up_proj.*afresh"):
        stop_repacking(model)


def test_models_without_4_bit_layers_are_left_alone(tiny_model, tiny_model_folder):
    before = copy.deepcopy(tiny_model.state_dict())
    assert stop_repacking(tiny_model) is tiny_model and all(
        torch.equal(before[name], weight) for name, weight in tiny_model.state_dict().items()
    )
    assert stop_repacking(load(tiny_model_folder, BitsAndBytesConfig(load_in_8bit=True)))


@pytest.mark.parametrize("inputs, outputs", [(96, 64), (64, 48), (101, 64)])
def test_sizes_that_the_kernel_refuses_work_when_it_is_stopped(inputs, outputs):
    model = (
        torch.nn.Sequential(Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4"))
        .to("cpu")
        .eval()
    )
    x = torch.randn(3, inputs)
    if has_avx512bf16():
        with pytest.raises((RuntimeError, AssertionError)), torch.no_grad():
            copy.deepcopy(model)(x)
    stop_repacking(model)
    with torch.no_grad():
        assert torch.allclose(model(x), x @ read(model)["0"].T, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the notice of int8


def test_the_notice_of_int8_is_hidden_and_nothing_else(tiny_model_folder):
    logger, seen = logging.getLogger("bitsandbytes.autograd._functions"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    before = list(logger.filters)
    try:
        model = load(tiny_model_folder, BitsAndBytesConfig(load_in_8bit=True))
        evaluate(model)
        assert len(seen) == 14 and all("cast from torch.float32 to float16" in line for line in seen)
        seen.clear()
        quiet_int8()
        evaluate(model)
        logger.warning("MatMul8bitLt: something else")
        assert seen == ["MatMul8bitLt: something else"]
    finally:
        logger.filters[:] = before
        logger.removeHandler(handler)


# ---------------------------------------------------------------------------------------------- check_quantised


def test_a_healthy_model(tiny_model_folder):
    for settings, kind in (
        (four_bit(), "NF4"),
        (four_bit(bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="fp4"), "FP4"),
        (BitsAndBytesConfig(load_in_8bit=True), "int8"),
    ):
        model = stop_repacking(load(tiny_model_folder, settings))
        quiet_int8()
        evaluate(model)
        report = check_quantised(model, tiny_model_folder)
        assert report.ok and report.codes == [], report
        assert f"14 layers are quantised ({kind})" in text(report) and "14 weights are those of the base" in text(
            report
        )
        assert check_quantised(get_peft_model(model, lora()), tiny_model_folder).codes == []


def test_an_adapter_merged_into_8_bits(tiny_model_folder):
    quiet_int8()
    model = get_peft_model(load(tiny_model_folder, BitsAndBytesConfig(load_in_8bit=True)), lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert check_quantised(model, tiny_model_folder).codes == []
    with warnings.catch_warnings(action="ignore"):
        merged = model.merge_and_unload()
    assert check_quantised(merged, tiny_model_folder).codes == ["damaged"]


def test_a_base_in_bf16_is_compared_in_bf16(tiny_model_folder):
    model = stop_repacking(load(tiny_model_folder, dtype=torch.bfloat16))
    assert check_quantised(model, tiny_model_folder).codes == []


@avx512bf16
def test_a_model_that_will_be_repacked_and_one_that_was(tiny_model_folder):
    model = load(tiny_model_folder)
    report = check_quantised(model)
    assert report.ok and report.codes == ["will_be_repacked"]
    evaluate(model)
    report = check_quantised(model, tiny_model_folder)
    assert (
        not report.ok
        and report.codes[0] == "repacked"
        and "14 of 14" in text(report)
        and "stop_repacking" in text(report)
    )


@pytest.mark.parametrize("double", [False, True])
def test_planted_repacking_is_found(double, tiny_model_folder):
    model = stop_repacking(load(tiny_model_folder, four_bit(bnb_4bit_use_double_quant=double)))
    plant_repacking(layers_of(model)["model.layers.0.self_attn.k_proj"])
    report = check_quantised(get_peft_model(model, lora()), tiny_model_folder)
    assert (
        report.codes == ["repacked"] and "1 of 14" in text(report) and "model.layers.0.self_attn.k_proj" in text(report)
    )


@pytest.mark.parametrize("double, codes", [(False, ["damaged"]), (True, [])])
def test_what_was_saved_after_repacking_is_found(double, codes, tiny_model_folder, tmp_path):
    """bitsandbytes undoes the layout when it saves, but puts the scales of NF4 without double quantisation in a wrong order."""
    model = load(tiny_model_folder, four_bit(bnb_4bit_use_double_quant=double))
    for layer in layers_of(model).values():
        plant_repacking(layer)
    model.save_pretrained(tmp_path / "saved")
    back = stop_repacking(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    report = check_quantised(back, tiny_model_folder)
    assert report.codes == codes, report
    assert check_quantised(back).codes == [], "without the base there is nothing to compare with"


def test_a_changed_weight_and_another_base_are_found(tiny_model_folder, tiny_model):
    model = stop_repacking(load(tiny_model_folder))
    weight = layers_of(model)["model.layers.1.mlp.down_proj"].weight
    weight.data = weight.data.flip(0)
    report = check_quantised(model, tiny_model_folder)
    assert report.codes == ["damaged"] and "1 of 14" in text(report) and "model.layers.1.mlp.down_proj" in text(report)
    other = copy.deepcopy(tiny_model)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    assert check_quantised(stop_repacking(load(tiny_model_folder)), other).codes == ["damaged"]


def test_gpt2s_layers_that_lie_on_their_side_are_compared_upright(tmp_path):
    config = GPT2Config(vocab_size=90, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = stop_repacking(load(tmp_path / "gpt2"))
    report = check_quantised(model, tmp_path / "gpt2")
    assert report.codes == [] and "4 weights are those of the base" in text(report)


def test_a_merge_into_4_bits_is_announced_and_found(tiny_model_folder):
    torch.manual_seed(0)
    model = get_peft_model(stop_repacking(load(tiny_model_folder)), lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert "would merge into the quantised weights" in text(check_quantised(model))
    with warnings.catch_warnings(action="ignore"):
        model.merge_adapter()
    report = check_quantised(model, tiny_model_folder)
    assert (
        "merged_into_quantised" in report.codes
        and "14 quantised layers" in text(report)
        and "dequantize()" in text(report)
    )
    with warnings.catch_warnings(action="ignore"):
        merged = model.merge_and_unload()
    assert check_quantised(merged, tiny_model_folder).codes == ["damaged"]


@pytest.mark.parametrize(
    "thing, code", [(None, "bad_argument"), ("model", "bad_argument"), (torch.nn.Linear(4, 4), "not_quantised")]
)
def test_what_is_no_quantised_model_gets_a_sentence(thing, code):
    assert check_quantised(thing).codes == [code]


@pytest.mark.parametrize("original", [3, "no/such/folder"])
def test_an_original_that_is_none_gets_a_sentence(original, tiny_model_folder):
    report = check_quantised(stop_repacking(load(tiny_model_folder)), original)
    assert report.codes == ["bad_argument"] and "original_base" in text(report)
    assert check_quantised(stop_repacking(load(tiny_model_folder)), torch.nn.Linear(4, 4)).codes == ["not_compared"]


# ---------------------------------------------------------------------------------------------- check_quantization_config


@pytest.mark.parametrize(
    "settings, codes, said",
    [
        ({}, [], "14 layers with"),
        ({"bnb_4bit_quant_type": "nf5"}, ["bad_quant_type"], "no 4-bit type 'nf5'"),
        ({"bnb_4bit_quant_type": None}, ["bad_quant_type"], "no 4-bit type None"),
        ({"bnb_4bit_quant_type": "fp4"}, ["fp4"], "the default"),
        ({"load_in_4bit": False}, ["no_bits"], "loads NF4 all the same"),
        ({"load_in_4bit": False, "load_in_8bit": True}, [], "14 layers with"),
    ],
)
def test_settings(settings, codes, said, tiny_model):
    given = four_bit()
    for name, value in settings.items():
        setattr(given, name, value)
    for model in (tiny_model, tiny_model.config):
        report = check_quantization_config(model, given)
        assert report.codes == codes and said in text(report), report


def test_what_one_gets_without_asking(tiny_model_folder):
    """The two sentences about defaults, on real models."""
    assert BitsAndBytesConfig(load_in_4bit=True).bnb_4bit_quant_type == "fp4"
    model = load(tiny_model_folder, BitsAndBytesConfig())
    assert {layer.weight.quant_type for layer in layers_of(model).values()} == {"fp4"}
    with pytest.raises(ValueError, match="nf4.*fp4.*nf5"):
        bitsandbytes.functional.quantize_4bit(torch.ones(64, 64), quant_type="nf5")


@pytest.mark.parametrize("hidden, odd", [(128, 0), (96, 12)])
def test_sizes_that_some_processors_refuse_are_named(hidden, odd):
    config = LlamaConfig(
        vocab_size=90, hidden_size=hidden, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2
    )
    report = check_quantization_config(config, four_bit())
    assert report.ok and report.codes == (["odd_size"] if odd else []), report
    if odd:
        assert f"{odd} layers" in text(report) and "(96 → 96)" in text(report) and "stop_repacking" in text(report)
    assert check_quantization_config(config, BitsAndBytesConfig(load_in_8bit=True)).codes == []


def test_a_missing_package_and_a_missing_build_get_a_sentence(tiny_model, monkeypatch):
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("planted"))
    report = check_quantization_config(tiny_model, four_bit())
    assert report.ok and report.codes == ["no_build"] and "plain PyTorch" in text(report)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = check_quantization_config(tiny_model, four_bit())
    assert not report.ok and report.codes == ["no_build"] and "python -m bitsandbytes" in text(report)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = check_quantization_config(tiny_model, four_bit())
    assert report.codes == ["not_installed"] and "Install bitsandbytes" in text(report)


@pytest.mark.parametrize("model, settings", [(None, None), ("x", four_bit()), (LlamaConfig(), {"load_in_4bit": True})])
def test_wrong_arguments_get_a_sentence(model, settings):
    assert check_quantization_config(model, settings).codes == ["bad_argument"]


# ---------------------------------------------------------------------------------------------- the whole road


def walk(folder, tokenizer, output_dir, helped=True):
    """Load, score, train with an evaluation in the middle, score, merge, compare.

    Returns the largest logit difference of the merged model and the trained one; whether the weights are those that were
    loaded; and whether the gradients are those of a fresh model with the same adapter, on which nothing was evaluated.
    """
    model = load(folder)
    if helped:
        stop_repacking(model)
    weights = read(model)
    evaluate(model)  # the score before
    rows = Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"Is {number} odd or even?"}],
         "completion": [{"role": "assistant", "content": ("even", "odd")[number % 2]}]}
        for number in range(24)
    ])  # fmt: skip
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(output_dir),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            max_length=256,
            seed=0,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=3,
            **CPU_TRAINING,
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    in_float32(trainer.model)  # TRL makes the adapter bf16
    trainer.train()
    model = trainer.model
    trained = evaluate(model)
    fresh = in_float32(get_peft_model(stop_repacking(load(folder)), lora()))
    fresh.load_state_dict({name: weight for name, weight in model.named_parameters() if "lora_" in name}, strict=False)
    healthy, found = gradients(fresh), gradients(model)
    same_gradients = all(torch.allclose(healthy[name], found[name], rtol=1e-4, atol=1e-6) for name in healthy)
    same_weights = all(torch.equal(weight, weights[plain_name(name)]) for name, weight in read(model).items())
    merged = load(folder, quantization_config=None)
    assert (evaluate(merged) - trained).abs().max() > 0.1, (
        "the adapter must change something, or a merge proves nothing"
    )
    for name, layer in layers_of(model).items():  # into the dequantised weights, by hand
        change = model.get_submodule(name.removesuffix(".base_layer")).get_delta_weight("default").detach()
        merged.get_submodule(plain_name(name)).weight.data = dequantised(layer).float() + change
    return (evaluate(merged) - trained).abs().max().item(), same_weights, same_gradients


def in_float32(model):
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    return model


@pytest.fixture
def road_folder(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.config.max_position_embeddings = 512
    tiny_model.save_pretrained(tmp_path / "road")
    return tmp_path / "road"


@pytest.mark.parametrize("processor", ["this one", "one without AVX512-BF16"])
def test_the_road_is_right_with_the_helper(processor, road_folder, tiny_tokenizer, tmp_path, monkeypatch):
    if processor != "this one":
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    difference, same_weights, same_gradients = walk(road_folder, tiny_tokenizer, tmp_path / "out")
    assert same_weights and same_gradients and difference < MERGE_ATOL


def test_the_road_is_right_without_the_helper_on_other_processors(road_folder, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    difference, same_weights, same_gradients = walk(road_folder, tiny_tokenizer, tmp_path / "out", helped=False)
    assert same_weights and same_gradients and difference < MERGE_ATOL


@avx512bf16
def test_the_road_goes_wrong_without_the_helper_on_this_processor(road_folder, tiny_tokenizer, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        difference, same_weights, same_gradients = walk(road_folder, tiny_tokenizer, tmp_path / "out", helped=False)
    assert not same_weights and not same_gradients and difference > 1


def test_the_dequantised_route_of_the_libraries_is_the_road_by_hand(road_folder):
    torch.manual_seed(0)
    trained = get_peft_model(stop_repacking(load(road_folder)), lora())
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapter = {name: weight.detach().clone() for name, weight in trained.named_parameters() if "lora_" in name}
    dequantised = get_peft_model(stop_repacking(load(road_folder)).dequantize(), lora())
    dequantised.load_state_dict(adapter, strict=False)
    merged = dequantised.merge_and_unload()
    assert not layers_of(merged) and isinstance(merged.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert (evaluate(merged) - evaluate(trained)).abs().max() < MERGE_ATOL
    assert not any(isinstance(layer, Linear8bitLt) for layer in merged.modules())
