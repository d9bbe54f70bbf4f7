"""Each check against a planted fault of its kind, and against healthy models and folders."""

import json
import shutil
import struct
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapter_checks import (
    Finding,
    InputError,
    Report,
    check_adapter_folder,
    check_adapters,
    check_changes_output,
    compare_models,
)

IDS = torch.arange(4, 20).view(2, 8)
WEIGHTS = "adapter_model.safetensors"


def make_base(seed=0, size=32, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def lora(**changes):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    )


def make_adapted(seed=1, base=None, adapter_name="default", **changes):
    """A model with a 'trained' adapter: B is random, so that the output changes."""
    model = get_peft_model(base or make_base(), lora(**changes), adapter_name=adapter_name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter_name}" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


def as_if_trained(model):
    """All that begins at zero is random: B, and of an embedding A."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders on disk: the base, and two different adapters trained on it."""
    root = tmp_path_factory.mktemp("saved")
    make_base().save_pretrained(root / "base")
    for name, seed in (("one", 1), ("two", 2)):
        base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
        make_adapted(seed, base).save_pretrained(root / name)
    return root


@pytest.fixture
def loaded(saved):
    return load(saved)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a healthy adapter's folder, to be damaged."""
    return shutil.copytree(saved / "one", tmp_path / "adapter")


def load(saved, **options):
    base = AutoModelForCausalLM.from_pretrained(saved / "base").eval()
    return PeftModel.from_pretrained(base, saved / "one", **options)


def layer(model, index=0, name="q_proj"):
    return getattr(model.base_model.model.model.layers[index].self_attn, name)


def quietly(function, *args, **kwargs):
    """Call something that PEFT warns about, because the fault is what the test plants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def output(model):
    with torch.no_grad():
        return model(IDS).logits


def rewrite(folder, change):
    """Save the adapter's tensors again, changed by `change(dict) -> dict`."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


# ------------------------------------------------------------------------------------------------ report


def test_report_reads_well_and_raises_only_for_failures():
    report = Report(
        "Something", [Finding("ok", "fine", "This is fine."), Finding("warn", "odd", "This is odd.", "Look.")]
    )
    assert report.ok and report.codes == ["odd"]
    report.raise_if_failed()
    report.fail("bad", "This is bad.", "Mend it.")
    assert not report.ok and report.codes == ["odd", "bad"]
    lines = str(report).splitlines()
    assert lines[0] == "Something: 1 problem"
    assert lines[1] == "[FAIL] This is bad." and lines[2].strip() == "-> Mend it."
    assert repr(report) == str(report)
    with pytest.raises(InputError, match="This is bad"):
        report.raise_if_failed()


# ------------------------------------------------------------------------------------------------ check_adapters


def test_healthy_models_pass(loaded, saved):
    result = loaded.load_adapter(saved / "two", adapter_name="other")
    report = check_adapters(
        loaded,
        load_result=result,
        expect_active="default",
        expect_trainable=False,
        base_name=saved / "base",
        original_base=saved / "base",
    )
    assert report.ok and report.codes == [], report
    assert "Loaded: default, other. Active: default." in str(report)
    assert message(report, "base_untouched")

    ready_to_train = make_adapted()
    assert check_adapters(ready_to_train, expect_trainable=True).codes == []
    with ready_to_train.disable_adapter():
        assert check_adapters(ready_to_train, expect_active=[]).codes == []
    ready_to_train.merge_adapter()
    assert check_adapters(ready_to_train, original_base=make_base()).codes == []

    own = make_base()
    own.load_adapter(saved / "one", adapter_name="reading")
    assert check_adapters(own, expect_active="reading").codes == []


@pytest.mark.parametrize(
    "config",
    [
        lora(init_lora_weights=False, bias="all", modules_to_save=["lm_head"]),
        lora(init_lora_weights=False, use_dora=True),
        lora(init_lora_weights=False, target_modules=["embed_tokens", "q_proj"]),
        lora(init_lora_weights=False, trainable_token_indices=[1, 2]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["bias_and_head", "dora", "embedding", "tokens", "ia3"],
)
def test_other_healthy_configurations_pass(config):
    model = get_peft_model(make_base(), config)
    assert check_adapters(model, expect_trainable=True).codes == []


def test_layers_with_different_adapters_are_healthy():
    model = make_adapted(target_modules=["q_proj"])
    model.add_adapter("other", lora(target_modules=["v_proj"], init_lora_weights=False))
    assert check_adapters(model, expect_active="default").codes == []


@pytest.mark.parametrize("thing", [None, "models/base", 3, [], torch.zeros(2)])
def test_not_a_model(thing):
    assert check_adapters(thing).codes == ["not_a_model"]


def test_plain_and_merged_models_have_no_adapters(loaded):
    assert check_adapters(make_base()).codes == ["no_adapters"]
    assert check_adapters(torch.nn.Linear(2, 2)).codes == ["no_adapters"]
    wrapper = loaded
    loaded.merge_and_unload()  # the model that it returns is thrown away: the wrapper is an empty shell now
    assert check_adapters(wrapper).codes == ["no_adapters"]


def test_last_adapter_deleted(loaded):
    quietly(loaded.delete_adapter, "default")
    assert "no_adapters" in check_adapters(loaded).codes


def test_methods_outside_the_layers_are_named():
    model = get_peft_model(make_base(), AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1))
    report = check_adapters(model)
    assert report.ok and report.codes == ["unsupported_method"]
    assert "ADAPTION_PROMPT" in str(report)


def test_name_in_the_keys_loads_nothing(loaded, folder):
    """Saved from state_dict under a name, loaded under another: load_adapter says so in its result only."""
    rewrite(folder, lambda tensors: {name.replace(".weight", ".sailor.weight"): t for name, t in tensors.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # so: not a word from PEFT
        result = loaded.load_adapter(folder, adapter_name="mood")
    assert len(result.missing_keys) == 8
    report = check_adapters(loaded, load_result=result)
    assert report.codes == ["missing_keys", "unexpected_keys", "zero_b"]
    # Without the result, the zeros give it away.
    loaded.set_adapter("mood", inference_mode=True)
    assert torch.equal(output(loaded), output(make_base()))
    assert check_adapters(loaded).codes == ["zero_b"]
    # from_pretrained warns.
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(make_base(), folder)


def test_transformers_own_load_result(folder):
    rewrite(folder, lambda tensors: {name.replace(".weight", ".sailor.weight"): t for name, t in tensors.items()})
    model = make_base()
    report = check_adapters(model, load_result=model.load_adapter(folder))
    assert "missing_keys" in report.codes and "unexpected_keys" in report.codes


def test_false_alarm_of_a_short_name_is_filtered(loaded, saved):
    result = quietly(loaded.load_adapter, saved / "two", adapter_name="a")
    assert result.missing_keys, "PEFT no longer lists other adapters' keys: load_result's docstring can be shortened"
    assert "missing_keys" in check_adapters(loaded, load_result=result).codes
    assert check_adapters(loaded, load_result={"a": result}).codes == []


def test_dropped_tensors(saved):
    """An adapter of a base with more layers loads in silence."""
    model = make_adapted(base=make_base(layers=1))
    result = model.load_adapter(saved / "one", adapter_name="other")
    assert check_adapters(model, load_result=result).codes == ["unexpected_keys"]


def test_bad_load_result(loaded):
    assert check_adapters(loaded, load_result=loaded).codes == ["bad_argument"]


def test_zero_b_warns_before_training_and_fails_after_loading(tmp_path):
    fresh = get_peft_model(make_base(), lora())
    report = check_adapters(fresh)
    assert report.ok and report.codes == ["zero_b"]
    fresh.save_pretrained(tmp_path)
    report = check_adapters(PeftModel.from_pretrained(make_base(), tmp_path))
    assert not report.ok and report.codes == ["zero_b"]


def test_partly_loaded(saved):
    model = quietly(PeftModel.from_pretrained, make_base(layers=3), saved / "one")
    report = check_adapters(model)
    assert not report.ok and report.codes == ["partly_zero_b"]
    assert "2 of 6 layers" in message(report, "partly_zero_b") and "layers.2" in message(report, "partly_zero_b")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(loaded, value):
    layer(loaded).lora_A["default"].weight.data[0, 0] = value
    report = check_adapters(loaded)
    assert report.codes == ["non_finite"]
    assert "layers.0.self_attn.q_proj.lora_A" in message(report, "non_finite")


def test_meta_weights(folder):
    rewrite(folder, lambda tensors: {name.replace(".weight", ".sailor.weight"): t for name, t in tensors.items()})
    model = quietly(PeftModel.from_pretrained, make_base(), folder, low_cpu_mem_usage=True)
    assert check_adapters(model).codes == ["meta_weights"]


def test_other_base_and_revision(loaded, saved):
    report = check_adapters(loaded, base_name="somebody/other-model")
    assert report.ok and report.codes == ["base_mismatch"]
    assert check_adapters(loaded, base_name="somebody/base").codes == []  # the folder moved, its name did not
    loaded.peft_config["default"].revision = "v1"
    assert check_adapters(loaded, base_revision="v2").codes == ["base_revision"]
    assert check_adapters(loaded, base_revision="v1").codes == []
    loaded.get_base_model().config._commit_hash = "b" * 40
    assert check_adapters(loaded).codes == []  # a tag may well be that commit
    loaded.peft_config["default"].revision = "a" * 40
    assert check_adapters(loaded).codes == ["base_revision"]


def test_same_weights_active_twice(loaded, saved):
    loaded.load_adapter(saved / "one", adapter_name="again")
    before = output(loaded)
    assert check_adapters(loaded).codes == []  # loaded twice, used once
    loaded.base_model.set_adapter(["default", "again"], inference_mode=True)
    assert not torch.allclose(before, output(loaded), atol=1e-3)
    assert check_adapters(loaded).codes == ["applied_twice"]
    loaded.merge_adapter()
    assert check_adapters(loaded).codes == ["applied_twice"]


def test_two_different_adapters_together_are_fine(loaded, saved):
    loaded.load_adapter(saved / "two", adapter_name="other")
    loaded.base_model.set_adapter(["default", "other"], inference_mode=True)
    assert check_adapters(loaded, expect_active=["default", "other"]).codes == []


def test_adapter_on_a_base_that_contains_it(loaded, saved):
    twice = PeftModel.from_pretrained(loaded.merge_and_unload(), saved / "one")
    assert check_adapters(twice).codes == []  # nothing to see without the original
    for original in (make_base(), saved / "base", str(saved / "base")):
        report = check_adapters(twice, original_base=original)
        assert report.codes == ["already_merged"], report
        assert "1.00 times" in message(report, "already_merged")
    # On bfloat16 weights rounding must not hide it.
    half = PeftModel.from_pretrained(load(saved).merge_and_unload().to(torch.bfloat16), saved / "one")
    assert check_adapters(half, original_base=saved / "base").codes == ["already_merged"]


def test_base_changed_otherwise(saved):
    other = PeftModel.from_pretrained(make_base(seed=5), saved / "one")
    assert check_adapters(other, original_base=saved / "base").codes == ["base_changed"]
    olora = get_peft_model(make_base(), lora(init_lora_weights="olora"))
    assert check_adapters(olora, original_base=make_base()).codes == ["start_taken_out"]
    merged_other = PeftModel.from_pretrained(make_adapted(seed=9).merge_and_unload(), saved / "one")
    assert check_adapters(merged_other, original_base=saved / "base").codes == ["base_changed"]


def test_original_base_that_cannot_serve(loaded, saved, tmp_path):
    assert check_adapters(loaded, original_base=loaded.get_base_model()).codes == ["same_object"]
    assert check_adapters(loaded, original_base=make_base(size=64)).codes == ["not_compared"]
    for wrong in (3, tmp_path / "nowhere"):
        assert check_adapters(loaded, original_base=wrong).codes == ["bad_argument"]
    (tmp_path / "model.safetensors").write_bytes((saved / "base" / "model.safetensors").read_bytes()[:-8])
    report = check_adapters(loaded, original_base=tmp_path)
    assert report.codes == ["bad_argument"] and "model.safetensors" in str(report)


def test_what_is_loaded_is_what_was_saved(loaded, saved):
    assert check_adapters(loaded, folder=saved / "one").codes == []
    assert "as_saved" in [finding.code for finding in check_adapters(loaded, folder=str(saved / "one")).findings]
    report = check_adapters(loaded, folder=saved / "two")
    assert report.codes == ["not_as_saved"] and "8 of 8 weights" in message(report, "not_as_saved")
    loaded.load_adapter(saved / "two", adapter_name="second")
    assert check_adapters(loaded, folder={"default": saved / "one", "second": saved / "two"}).codes == []
    report = check_adapters(loaded, folder={"default": saved / "one", "second": saved / "one"})
    assert report.codes == ["not_as_saved"] and "'second'" in message(report, "not_as_saved")
    for odd in (
        saved / "one",
        {"third": saved / "one"},
        {"default": 3},
        {"default": saved / "nowhere"},
        {"default": saved / "base"},
    ):
        assert check_adapters(loaded, folder=odd).codes == ["bad_argument"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_saved_in_another_type(dtype, folder, saved):
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    assert check_adapters(PeftModel.from_pretrained(base, folder), folder=folder).codes == []
    half = AutoModelForCausalLM.from_pretrained(saved / "base", dtype=dtype)
    model = PeftModel.from_pretrained(half, saved / "one", autocast_adapter_dtype=False)
    assert check_adapters(model, folder=saved / "one").codes == []


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_other_adapters_as_they_were_saved(changes, saved, tmp_path):
    as_if_trained(get_peft_model(make_base(), lora(**changes))).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_base(), tmp_path)
    assert "not_as_saved" not in check_adapters(model, folder=tmp_path).codes
    own = make_base()
    own.load_adapter(str(tmp_path), adapter_name="own")
    assert "not_as_saved" not in check_adapters(own, folder={"own": tmp_path}).codes


def test_a_random_adapter_in_the_place_of_the_saved_one(folder, saved):
    """The names don't fit, so PEFT loads nothing; and B did not begin at zero."""
    reconfigure(folder, init_lora_weights=False)
    rewrite(folder, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    model = quietly(PeftModel.from_pretrained, AutoModelForCausalLM.from_pretrained(saved / "base"), folder)
    assert check_adapters(model).codes == [], "nothing tells without the file"
    report = check_adapters(model, folder=folder)
    assert report.codes == ["not_as_saved"] and "8 of 8 weights" in message(report, "not_as_saved")
    assert "8 tensors of the file have no place" in message(report, "not_as_saved")


def test_peft_model_in_a_peft_model(loaded, saved):
    twice = quietly(PeftModel.from_pretrained, loaded, saved / "one")
    assert torch.equal(output(twice), output(make_base()))  # the first adapter's weights are gone, too
    report = check_adapters(twice)
    assert report.codes == ["nested_wrapper", "zero_b"]
    assert "nested_wrapper" in check_adapters(quietly(get_peft_model, make_adapted(), lora())).codes


def test_adapter_layer_in_an_adapter_layer(loaded):
    inner, outer = layer(loaded, 0), layer(loaded, 1)
    outer.base_layer = inner
    assert "nested_layers" in check_adapters(loaded).codes


def test_second_wrapper_on_the_same_base(saved):
    base = make_base()
    first = PeftModel.from_pretrained(base, saved / "one")
    second = quietly(PeftModel.from_pretrained, base, saved / "two", adapter_name="other")
    assert torch.equal(output(first), output(second))  # the first now answers with the second's adapter
    assert check_adapters(first).codes == ["wrapper_out_of_step"]
    assert check_adapters(second, expect_active="other").codes == []


def test_get_peft_model_again_wipes_the_first_adapter(saved):
    base = make_base()
    PeftModel.from_pretrained(base, saved / "one")
    assert check_adapters(quietly(get_peft_model, base, lora())).codes == ["zero_b"]


def test_base_object_with_adapter_inside(loaded):
    base = loaded.get_base_model()
    report = check_adapters(base)
    assert report.ok and report.codes == ["base_changed_in_place"]


def test_trainable_base(loaded):
    loaded.get_base_model().model.norm.weight.requires_grad_(True)
    report = check_adapters(loaded)
    assert report.codes == ["base_trainable"]
    assert "norm.weight" in message(report, "base_trainable")


def test_frozen_adapter_and_unexpected_training(loaded):
    assert check_adapters(loaded, expect_trainable=True).codes == ["adapter_frozen"]
    with loaded.disable_adapter():
        pass
    assert check_adapters(loaded).codes == []
    assert check_adapters(loaded, expect_trainable=False).codes == ["adapter_trainable"]
    loaded.set_adapter("default", inference_mode=True)  # the remedy that the report gives
    assert check_adapters(loaded, expect_trainable=False).codes == []


def test_partly_frozen():
    model = make_adapted()
    layer(model).lora_A["default"].requires_grad_(False)
    assert check_adapters(model).codes == []  # freezing A everywhere or somewhere is a method (LoRA-FA)
    layer(model).lora_B["default"].requires_grad_(False)
    assert check_adapters(model).codes == ["partly_trainable"]


def test_disabled(loaded):
    with loaded.disable_adapter():
        assert check_adapters(loaded).codes == ["adapters_disabled"]
    layer(loaded).enable_adapters(False)
    report = check_adapters(loaded)
    assert report.codes[0] == "partly_disabled" and "1 of 4" in message(report, "partly_disabled")


def test_partly_merged(loaded):
    layer(loaded).merge()
    report = check_adapters(loaded)
    assert report.codes == ["partly_merged"] and "1 of 4" in message(report, "partly_merged")


def test_active_adapter_silenced_by_a_merged_one(loaded, saved):
    loaded.load_adapter(saved / "two", adapter_name="other")
    alone = output(loaded)
    loaded.base_model.set_adapter(["default", "other"], inference_mode=True)
    loaded.merge_adapter(adapter_names=["default"])
    assert torch.allclose(output(loaded), alone, atol=1e-5)
    report = check_adapters(loaded)
    assert report.codes == ["active_not_merged"] and "other" in message(report, "active_not_merged")


def test_mixed_active(loaded, saved):
    loaded.load_adapter(saved / "two", adapter_name="other")
    layer(loaded).set_adapter("other", inference_mode=True)
    assert check_adapters(loaded).codes == ["mixed_active"]


def test_expected_adapters(loaded, saved):
    loaded.load_adapter(saved / "two", adapter_name="other")
    assert check_adapters(loaded, expect_active="other").codes == ["not_active"]
    assert check_adapters(loaded, expect_active=["default", "other"]).codes == ["not_active"]
    assert check_adapters(loaded, expect_active="sailor").codes == ["not_loaded"]
    for wrong in (3, [None], {"other": 1}):
        assert check_adapters(loaded, expect_active=wrong).codes == ["bad_argument"]
    loaded.base_model.set_adapter([])
    assert check_adapters(loaded).codes == ["none_active"]
    assert check_adapters(loaded, expect_active=[]).codes == []


def test_check_leaves_the_model_alone(loaded):
    before = {name: (p.clone(), p.requires_grad) for name, p in loaded.named_parameters()}
    loaded.train()
    check_adapters(loaded, original_base=make_base())
    check_changes_output(loaded, IDS)
    compare_models(loaded, make_base(), IDS)
    assert loaded.training and all(module.training for module in loaded.modules())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]


def test_unforeseen_errors_become_findings(loaded):
    loaded.peft_config["default"] = SimpleNamespace()
    report = check_adapters(loaded)
    assert report.codes == ["check_failed"] and "AttributeError" in str(report)


# ------------------------------------------------------------------------------------------------ compare


def test_merged_model_agrees_and_the_adapter_has_an_effect(loaded, saved):
    effect = check_changes_output(loaded, IDS)
    assert effect.ok and effect.codes == [] and effect.max_abs > 0.01
    same = compare_models(loaded, load(saved).merge_and_unload(), IDS)
    assert same.ok and same.codes == [] and same.max_abs < 1e-5
    assert same.top1_agreement == 1.0 and same.kl < 1e-9
    assert "PEFT's own tests" in str(same)


def test_numbers_against_a_direct_calculation():
    first, second = torch.randn(2, 8, 64), torch.randn(2, 8, 64)
    report = compare_models(lambda **inputs: first, lambda **inputs: second, IDS, atol=0.5)
    assert report.codes == ["logits_differ"] and "given by the caller" in str(report)
    assert report.max_abs == pytest.approx((first - second).abs().max().item())
    assert report.top1_agreement == pytest.approx((first.argmax(-1) == second.argmax(-1)).float().mean().item())
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (first, second))
    assert report.kl == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item(), rel=1e-4)


def test_pads_do_not_count():
    first = torch.zeros(2, 8, 64)
    second = first.clone()
    second[0, 2] = torch.arange(64.0)
    mask = torch.ones(2, 8, dtype=torch.long)
    assert compare_models(lambda **inputs: first, lambda **inputs: second, IDS, mask).codes == ["logits_differ"]
    mask[0, 2] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    assert compare_models(lambda **inputs: first, lambda **inputs: second, batch).codes == []


def test_only_the_positions_that_are_named_count():
    first = torch.zeros(2, 8, 64)
    second = first.clone()
    second[0, 2] = torch.arange(64.0)
    everywhere = torch.ones(2, 8, dtype=torch.bool)
    elsewhere = everywhere.clone()
    elsewhere[0, 2] = False

    def codes(positions):
        return compare_models(lambda **inputs: first, lambda **inputs: second, IDS, positions=positions).codes

    assert codes(everywhere) == ["logits_differ"] and codes(elsewhere) == []
    for wrong in (elsewhere.long(), everywhere[:1], ~everywhere):
        assert codes(wrong) == ["bad_inputs"]


def test_base_changed_in_place_is_no_reference(saved):
    """'Base and tuned give the same output': the base was kept as a reference, and PEFT changed it in place."""
    base = make_base()
    tuned = PeftModel.from_pretrained(base, saved / "one")
    assert torch.equal(output(base), output(tuned))
    assert compare_models(base, tuned, IDS).codes == ["same_object"]
    assert compare_models(tuned, tuned, IDS).codes == ["same_object"]
    assert compare_models(make_base(), tuned, IDS).codes == ["logits_differ"]


def test_no_change(saved):
    untrained = get_peft_model(make_base(), lora())
    report = check_changes_output(untrained, IDS)
    assert report.codes == ["no_change"] and report.max_abs == 0.0
    own = make_base()
    own.load_adapter(saved / "one")
    assert check_changes_output(own, IDS).codes == []


def test_effect_of_prefix_tuning():
    model = get_peft_model(make_base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert check_changes_output(model, IDS).codes == []


def test_states_in_which_no_effect_can_be_measured(loaded):
    with loaded.disable_adapter():
        assert check_changes_output(loaded, IDS).codes == ["adapters_disabled"]
    loaded.merge_adapter()
    assert check_changes_output(loaded, IDS).codes == ["merged"]
    assert layer(loaded).merged  # and it stays merged
    assert check_changes_output(make_base(), IDS).codes == ["no_adapters"]
    assert check_changes_output(None, IDS).codes == ["no_adapters"]


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        "a text",
        ["texts"],
        [[1.5, 2.0]],
        {},
        torch.zeros(0, 3, dtype=torch.long),
        torch.zeros(1, 2, 3, dtype=torch.long),
    ],
    ids=str,
)
def test_bad_inputs(loaded, inputs):
    assert compare_models(loaded, make_base(), inputs).codes == ["bad_inputs"]
    assert check_changes_output(loaded, inputs).codes == ["bad_inputs"]


def test_bad_masks(loaded):
    assert compare_models(loaded, make_base(), IDS, torch.ones(2, 3)).codes == ["bad_inputs"]
    assert compare_models(loaded, make_base(), IDS, torch.zeros(2, 8)).codes == ["bad_inputs"]
    assert compare_models(loaded, make_base(), IDS[0], [1] * 8).codes == ["logits_differ"]


@pytest.mark.parametrize("atol", [None, "1e-4", -1, float("nan"), True])
def test_bad_tolerance(atol):
    assert compare_models(make_base(), make_base(), IDS, atol=atol).codes == ["bad_argument"]


def test_models_that_do_not_run(loaded):
    assert compare_models(loaded, None, IDS).codes == ["candidate_failed"]
    assert compare_models("model", loaded, IDS).codes == ["reference_failed"]
    assert compare_models(loaded, lambda **inputs: "logits", IDS).codes == ["candidate_failed"]
    assert compare_models(make_base(), make_base(), IDS + 1000).codes == ["reference_failed"]
    assert compare_models(lambda **i: torch.zeros(2, 8, 5), lambda **i: torch.zeros(2, 8, 6), IDS).codes == [
        "shape_mismatch"
    ]
    report = compare_models(lambda **i: torch.zeros(2, 8, 5), lambda **i: torch.full((2, 8, 5), torch.nan), IDS)
    assert report.codes == ["non_finite"] and "candidate" in str(report) and report.max_abs is None


def test_low_precision_is_said():
    half = make_base().to(torch.bfloat16)
    report = compare_models(make_base(), half, IDS)
    assert report.codes == ["logits_differ", "low_precision"]
    assert compare_models(make_base(), half, IDS, atol=0.1).codes == []


# ------------------------------------------------------------------------------------------------ check_adapter_folder


def test_healthy_folder(saved):
    for base in (None, make_base(), make_base().config, saved / "base", load(saved), load(saved).get_base_model()):
        report = check_adapter_folder(saved / "one", base)
        assert report.ok and report.codes == [], report
    assert "rank 4, alpha 16, on 4 layers" in str(report)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"], "bias": "all"},
        {"target_modules": r".*\.0\.self_attn\.(q|v)_proj"},
        {"layers_to_transform": [1]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_other_healthy_folders(changes, tmp_path):
    model = as_if_trained(get_peft_model(make_base(), lora(**changes)))
    quietly(model.save_pretrained, tmp_path)
    report = check_adapter_folder(tmp_path, make_base())
    assert report.codes == [], report


def test_healthy_on_conv1d(tmp_path):
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0))
    config = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    as_if_trained(get_peft_model(base, config)).save_pretrained(tmp_path)
    assert check_adapter_folder(tmp_path, base.config).codes == []


@pytest.mark.parametrize("thing", [None, 3, "", [], b"\xff"], ids=str)
def test_no_path(thing):
    assert check_adapter_folder(thing).codes == ["bad_argument"]


def test_missing_places(folder, tmp_path):
    assert check_adapter_folder(tmp_path / "nowhere").codes == ["no_folder"]
    assert check_adapter_folder(folder / WEIGHTS).codes == ["not_a_folder"]
    assert check_adapter_folder(str(folder)).codes == []
    (folder / WEIGHTS).unlink()
    assert check_adapter_folder(folder).codes == ["no_weights"]
    (folder / "adapter_config.json").unlink()
    assert check_adapter_folder(folder).codes == ["no_config", "no_weights"]


def test_named_adapter_is_one_folder_down(tmp_path):
    make_adapted(adapter_name="sailor").save_pretrained(tmp_path)
    report = check_adapter_folder(tmp_path)
    assert "no_config" in report.codes and "sailor" in report.findings[0].remedy
    assert check_adapter_folder(tmp_path / "sailor").codes == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"', "\x00"])
def test_malformed_config(folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert check_adapter_folder(folder).codes == ["bad_config"]
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe")
    assert check_adapter_folder(folder).codes == ["bad_config"]


def test_pickle_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "adapter_model.bin")
    report = check_adapter_folder(folder)
    assert report.codes == ["pickle"] and "any code" in message(report, "pickle")
    (folder / WEIGHTS).unlink()
    assert check_adapter_folder(folder).codes == ["pickle", "no_weights"]
    # And this is why it has to be checked before: PEFT itself loads it without a word.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not torch.equal(output(PeftModel.from_pretrained(make_base(), folder)), output(make_base()))


def test_a_pickle_is_never_opened(folder, tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    for name in ("adapter_model.bin", "weights.pt"):
        torch.save({"weight": Bomb()}, folder / name)
    assert check_adapter_folder(folder, make_base()).codes == ["pickle"]
    assert not ran.exists()


def test_trainer_state_is_a_warning(folder):
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"pickle")
    report = check_adapter_folder(folder)
    assert report.ok and report.codes == ["trainer_state"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_truncated_weights(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    report = check_adapter_folder(folder)
    assert report.codes == ["damaged_weights"] and WEIGHTS in message(report, "damaged_weights")


def test_not_safetensors(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{}" + b"x" * 50)
    assert check_adapter_folder(folder).codes == ["damaged_weights"]


def test_merged_model_saved_into_the_folder(saved, folder):
    model = load(saved)
    single = output(model)
    model.merge_and_unload().save_pretrained(folder)
    assert check_adapter_folder(folder).codes == ["merged_model_beside"]
    # What goes wrong without the check: transformers finds both files and applies the change twice.
    assert (output(AutoModelForCausalLM.from_pretrained(folder).eval()) - single).abs().max() > 1e-2


def test_merged_model_under_the_adapters_name(saved, folder):
    rewrite(folder, lambda tensors: load_file(saved / "base" / "model.safetensors"))
    assert check_adapter_folder(folder, make_base()).codes == ["merged_in_disguise"]


def test_wrapper_saved_after_its_adapter_was_merged_away(saved, folder):
    rewrite(folder, lambda tensors: {})
    assert check_adapter_folder(folder).codes == ["empty"]


def test_extra_tensors(folder):
    rewrite(folder, lambda tensors: tensors | {"base_model.model.model.norm.weight": torch.ones(32)})
    report = check_adapter_folder(folder)
    assert report.ok and report.codes == ["extra_tensors"]


def test_adapter_name_in_keys(folder):
    rewrite(folder, lambda tensors: {name.replace(".weight", ".sailor.weight"): t for name, t in tensors.items()})
    assert check_adapter_folder(folder).codes == ["adapter_name_in_keys"]


def test_saved_from_a_nested_model(saved, tmp_path):
    nested = as_if_trained(quietly(get_peft_model, load(saved), lora()))
    nested.save_pretrained(tmp_path)
    assert check_adapter_folder(tmp_path, make_base()).codes == ["nested_keys"]


def test_half_a_pair(folder):
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if "0.self_attn.q_proj.lora_B" not in name})
    assert "unpaired" in check_adapter_folder(folder).codes


def test_rank_of_the_config(folder):
    reconfigure(folder, r=8)
    report = check_adapter_folder(folder)
    assert report.codes == ["rank_mismatch"] and "rank 4, expected 8" in message(report, "rank_mismatch")
    reconfigure(folder, r=4, rank_pattern={"v_proj": 2})
    assert check_adapter_folder(folder).codes == ["rank_mismatch"]


def test_zero_b_in_the_file(folder):
    zero = {}

    def blank(tensors):
        zero.update(
            {name: torch.zeros_like(t) if "layers.0" in name and "lora_B" in name else t for name, t in tensors.items()}
        )
        return zero

    rewrite(folder, blank)
    report = check_adapter_folder(folder)
    assert report.ok and report.codes == ["partly_zero_b"]
    rewrite(
        folder, lambda tensors: {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    )
    assert check_adapter_folder(folder).codes == ["zero_b"]


def test_nan_in_the_file(folder):
    rewrite(folder, lambda tensors: {name: t * float("nan") if "lora_A" in name else t for name, t in tensors.items()})
    assert check_adapter_folder(folder).codes == ["non_finite"]


def test_base_of_another_size(folder, tmp_path):
    wide = make_base(size=64)
    wide.save_pretrained(tmp_path / "base")
    for base in (wide, wide.config, tmp_path / "base"):
        report = check_adapter_folder(folder, base)
        assert report.codes == ["shape_mismatch"]
        text = message(report, "shape_mismatch")
        assert "model.layers.0.self_attn.q_proj" in text and "expected 64, found 32" in text and "(4, 32)" in text


def test_base_with_fewer_or_more_layers(folder):
    """Both load without an error in PEFT 0.21; fewer layers even without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(make_base(layers=1), folder)
    assert check_adapter_folder(folder, make_base(layers=1)).codes == ["layer_not_in_base"]
    report = check_adapter_folder(folder, make_base(layers=3))
    assert report.codes == ["layers_not_covered"] and "layers.2" in message(report, "layers_not_covered")


def test_base_of_another_architecture(folder):
    gpt2 = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    report = check_adapter_folder(folder, gpt2)
    assert report.codes == ["layer_not_in_base", "target_not_in_base"]
    assert "c_attn" in message(report, "target_not_in_base")
    reconfigure(folder, target_modules=r".*self_attn\.(q|v)_proj")
    assert check_adapter_folder(folder, gpt2).codes == ["layer_not_in_base", "target_not_in_base"]


def test_name_of_the_base(saved, folder):
    reconfigure(folder, base_model_name_or_path="somebody/another")
    report = check_adapter_folder(folder, saved / "base")
    assert report.ok and report.codes == ["base_mismatch"]
    reconfigure(folder, base_model_name_or_path="/elsewhere/base/")
    assert check_adapter_folder(folder, saved / "base").codes == []


def test_base_that_cannot_be_read(folder, tmp_path):
    for base in (3, tmp_path, "models/nowhere"):
        assert check_adapter_folder(folder, base).codes == ["bad_base"]
    (tmp_path / "config.json").write_text("{")
    assert check_adapter_folder(folder, tmp_path).codes == ["bad_base"]


def test_config_that_peft_refuses(folder):
    reconfigure(folder, target_modules=".*(", r=4)
    assert not check_adapter_folder(folder, make_base()).ok
    reconfigure(folder, target_modules=["q_proj", "v_proj"], r="four")
    assert check_adapter_folder(folder).codes == ["bad_config"]


def test_loading_by_state_dict_without_the_name(saved):
    """set_peft_model_state_dict without adapter_name means 'default', and says so only by a KeyError."""
    model = get_peft_model(make_base(), lora(), adapter_name="sailor")
    with pytest.raises(KeyError, match="default"):
        set_peft_model_state_dict(model, load_file(saved / "one" / WEIGHTS))
    assert check_adapters(model).codes == ["zero_b"]
