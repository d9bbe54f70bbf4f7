"""check_merged_folder against healthy merges of every kind, and against each fault, planted."""

import gc
import json
import pickle
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from adapter_checks import MergedReport, Report, check_merged_folder, merged_folder, merging
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.generation import generate
from adapter_checks.model_folder import SAFE_FILES, local_folder
from tiny_models import make_tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A base whose weights are not its adapter's: what the checks say of the weights, whatever else goes with it.
WEIGHT_CODES = {
    "not_merged", "partly_merged", "merged_twice", "swapped", "wrong_scaling", "adapter_lost", "base_mutated",
    "foreign_change", "quantised_base", "repacked_base", "base_changed", "tied_head", "other_weights", "missing_weights",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_libraries():
    """PEFT warns of most of the faults while they are being planted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True, scope="module")
def libraries_out_of_the_collectors_way():
    """Each check collects garbage, and going through all that the libraries hold is half of its time on a tiny model."""
    gc.freeze()
    yield
    gc.unfreeze()


def make_adapter(base, folder, seed=1, spread=0.02, **changes):
    """A 'trained' adapter: B is random, and not so large that the model loses itself."""
    torch.manual_seed(seed)
    config = {"r": 8, "lora_alpha": 16, "target_modules": ALL, "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    options = {}
    if config.get("init_lora_weights") == "olora":
        model.save_pretrained(folder / "start")
        options = {"path_initial_model_for_weight_conversion": str(folder / "start")} if changes.get("convert") else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder, **options)
    shutil.rmtree(folder / "start", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_tokenizer):
    """Folders: base, base_tied, and on the base two adapters."""
    root = tmp_path_factory.mktemp("merged")
    make_tiny_model(tiny_tokenizer).save_pretrained(root / "base")
    tied = make_tiny_model(tiny_tokenizer)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(root / "base_tied")
    for name in ("base", "base_tied"):
        tiny_tokenizer.save_pretrained(root / name)
    make_adapter(root / "base", root / "one")
    make_adapter(root / "base", root / "two", seed=2)
    make_adapter(root / "base_tied", root / "on_tied")
    return root


@pytest.fixture(scope="module")
def healthy(root):
    return merging.merge_whole(root / "base", root / "one", root / "healthy")


@pytest.fixture
def out(healthy, tmp_path):
    """A healthy merged folder, to be damaged."""
    return shutil.copytree(healthy, tmp_path / "out")


def load(root, *adapters, base="base", **options):
    model = AutoModelForCausalLM.from_pretrained(root / base, **options)
    for i, adapter in enumerate(adapters):
        if i:
            model.load_adapter(root / adapter, adapter_name=adapter)
        else:
            model = PeftModel.from_pretrained(model, root / adapter, adapter_name=adapter)
    if adapters:
        model.base_model.set_adapter(list(adapters))
    return model.eval()


def save(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(root, folder, *adapters, base="base", **options):
    adapters = [root / name for name in adapters or ("one",)]
    report = check_merged_folder(root / base, adapters if len(adapters) > 1 else adapters[0], folder, **options)
    assert isinstance(report, MergedReport) and "check_failed" not in report.codes, report
    return report


def rewrite(folder, change):
    """Save the folder's tensors again, changed in place by `change(dict)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


def weights_finding(report) -> str:
    (code,) = WEIGHT_CODES & set(report.codes)
    assert "logits_differ" in report.codes and report.max_abs > report.tolerance
    return code


# ------------------------------------------------------------------------------------------------ healthy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("way", ["plain", "safe", "from_float32", "by_shards"])
def test_a_healthy_merge_passes_in_each_dtype(way, dtype, root, tiny_tokenizer, tmp_path, capfd):
    if way == "by_shards":
        folder = merging.merge_by_shards(root / "base", root / "one", tmp_path / "out", dtype=dtype)
    else:
        model = load(root, "one", dtype="float32" if way == "from_float32" else dtype).merge_and_unload(
            safe_merge=way == "safe"
        )
        folder = save(model.to(getattr(torch, dtype)), tmp_path / "out", tiny_tokenizer)
    capfd.readouterr()
    report = check(root, folder)
    assert report.ok and report.codes == [], report
    assert capfd.readouterr().err == ""
    assert report.dtype == dtype and report.times == pytest.approx(1, abs=0.02)
    assert report.max_abs <= report.tolerance and report.top1_agreement > 0.9
    assert (1e-4 <= report.tolerance < 5e-4) == (dtype == "float32")
    assert report.rounding is None if dtype == "float32" else 0.9 < report.rounding < 1.8


@pytest.mark.parametrize(("steps", "accepted"), [(0, True), (1, False), (4, False)])
def test_weights_are_held_to_two_roundings(steps, accepted, root, tmp_path):
    """One bfloat16 step up or down everywhere is about 3.6 times one rounding, which is uniform within half a step."""
    folder = merging.merge_by_shards(root / "base", root / "one", tmp_path / "out", dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)

    def disturb(tensors):
        tensor = tensors["model.layers.0.mlp.up_proj.weight"]
        signs = torch.randint(2, tensor.shape, generator=generator) * 2 - 1
        tensor.view(torch.int16).add_((steps * signs).to(torch.int16))

    rewrite(folder, disturb)
    report = check(root, folder)
    assert (not WEIGHT_CODES & set(report.codes)) == accepted, report
    if not accepted:
        assert "base_changed" in report.codes and "up_proj" in message(report, "base_changed")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.down_proj": 3}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [3, 5]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=["rslora", "patterns", "dora", "head_saved", "embedding", "olora", "tokens", "embedding_saved"],
)
def test_other_healthy_adapters_pass(changes, root, tmp_path):
    make_adapter(root / "base", tmp_path / "adapter", **changes)
    folder = merging.merge_whole(root / "base", tmp_path / "adapter", tmp_path / "out")
    report = check_merged_folder(root / "base", tmp_path / "adapter", folder)
    assert report.ok and set(report.codes) <= {"changes_base"}, report
    assert report.times == pytest.approx(1, abs=0.01)
    assert report.max_abs is not None, "an adapter on the embedding keeps no output from being compared"


def test_two_adapters_merged_together_pass(root, tiny_tokenizer, tmp_path):
    folder = save(load(root, "one", "two").merge_and_unload(), tmp_path / "out", tiny_tokenizer)
    report = check(root, folder, "one", "two")
    assert report.codes == [], report
    assert report.times == {"one": pytest.approx(1, abs=0.01), "two": pytest.approx(1, abs=0.01)}


def test_a_tied_base_and_conv1d_and_shards_pass(root, tiny_tokenizer, tmp_path):
    folder = merging.merge_whole(root / "base_tied", root / "on_tied", tmp_path / "tied")
    assert check(root, folder, "on_tied", base="base_tied").codes == []

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2,
                        bos_token_id=0, eos_token_id=tiny_tokenizer.eos_token_id)  # fmt: skip
    save(GPT2LMHeadModel(config), tmp_path / "gpt2", tiny_tokenizer)
    make_adapter(tmp_path / "gpt2", tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2"), tmp_path / "adapter")
    model = model.merge_and_unload()
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    report = check_merged_folder(tmp_path / "gpt2", tmp_path / "adapter", tmp_path / "out")
    assert report.codes == [] and report.times == pytest.approx(1, abs=0.01), report


def test_without_any_tokenizer_the_models_are_still_compared(root, healthy, tmp_path):
    for name, source in (("base", root / "base"), ("out", healthy)):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    report = check_merged_folder(tmp_path / "base", root / "one", tmp_path / "out")
    assert report.codes == [] and report.max_abs <= report.tolerance


def test_arithmetic_in_16_bits_where_memory_is_short(root, healthy, out):
    report = check(root, healthy, dtype="bfloat16")
    assert report.ok and report.max_abs <= report.tolerance, report
    rewrite(out, lambda tensors: [tensors[name].zero_() for name in tensors if "layers.1.mlp.down_proj" in name])
    assert not check(root, out, dtype=torch.bfloat16).ok


# ------------------------------------------------------------------------------------------------ planted: files of other saves


def sharded(folder, target):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="100KB")
    return target


def unread(folder):
    report = Report("")
    merged_folder._check_unread(report, folder)
    assert report.codes in ([], ["unread_weights"])
    return report.findings[0].message if report.findings else ""


def test_weights_that_nothing_reads(root, healthy, tmp_path):
    """Two saves in one folder: transformers takes one of them in silence, and not always the newer one."""
    one, shards = shutil.copytree(healthy, tmp_path / "one"), sharded(healthy, tmp_path / "shards")
    assert unread(one) == unread(shards) == ""
    for name in ("adapter_model.safetensors", "training_args.bin"):
        (one / name).touch()
    assert unread(one) == "", "no weights of a model"
    mixed = shutil.copytree(shards, tmp_path / "mixed")
    shutil.copy(one / "model.safetensors", mixed)
    assert "model-00001-of" in unread(mixed)
    older = shutil.copytree(shards, tmp_path / "older")
    shutil.copy(one / "model.safetensors", older / "model-00099-of-00099.safetensors")
    assert "model-00099-of-00099.safetensors" in unread(older)
    index = shutil.copytree(healthy, tmp_path / "index")
    shutil.copy(shards / "model.safetensors.index.json", index)
    assert "model.safetensors.index.json" in unread(index)
    assert unread(tmp_path) == "", "no model: said elsewhere"
    report = check(root, mixed)
    assert set(report.codes) == {"no_tokenizer", "unread_weights"}


# ------------------------------------------------------------------------------------------------ planted: the amount


def test_merged_twice(root, healthy, tiny_tokenizer, tmp_path):
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(healthy), root / "one").merge_and_unload()
    report = check(root, save(again, tmp_path / "out", tiny_tokenizer))
    assert weights_finding(report) == "merged_twice" and report.times == pytest.approx(2, abs=0.01)
    assert "2.00 times" in message(report, "merged_twice")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_and_merged_swapped(dtype, root, tmp_path):
    folder = merging.merge_by_shards(root / "base", root / "one", tmp_path / "out", dtype=dtype)
    report = check_merged_folder(folder, root / "one", root / "base")
    assert WEIGHT_CODES & set(report.codes) == {"swapped"} | ({"other_weights"} if dtype == "bfloat16" else set()), (
        report
    )
    assert "-1.00 times: base and merged look swapped" in message(report, "swapped")


@pytest.mark.parametrize(
    ("change", "times", "cause"),
    [
        (lambda layer: layer.lora_alpha["one"], 8, "alpha and not divided"),
        (lambda layer: layer.lora_alpha["one"] / layer.r["one"] ** 0.5, 8**0.5, "rsLoRA's"),
        (lambda layer: 1.0, 0.5, "left out"),
        (lambda layer: 1.4 * layer.scaling["one"], 1.4, "once is right."),
    ],
    ids=["alpha", "root_r", "none", "other"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_scaling(change, times, cause, dtype, root, tiny_tokenizer, tmp_path):
    model = load(root, "one", dtype=dtype)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["one"] = change(module)
    report = check(root, save(model.merge_and_unload(), tmp_path / "out", tiny_tokenizer))
    assert weights_finding(report) == "wrong_scaling" and report.times == pytest.approx(times, rel=0.03)
    assert cause in message(report, "wrong_scaling")


def test_wrong_scaling_of_an_rslora_adapter_with_a_rank_pattern(root, tiny_tokenizer, tmp_path):
    make_adapter(root / "base", tmp_path / "adapter", use_rslora=True, rank_pattern={"q_proj": 2})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(tmp_path / "adapter", tmp_path / "wrong")
    (tmp_path / "wrong" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))
    folder = merging.merge_whole(root / "base", tmp_path / "wrong", tmp_path / "out")
    report = check_merged_folder(root / "base", tmp_path / "adapter", folder)
    assert weights_finding(report) == "wrong_scaling" and "has rsLoRA's alpha/√r" in message(report, "wrong_scaling")


def test_where_twice_may_be_a_wrong_scaling_both_are_named(root, tiny_tokenizer, tmp_path):
    make_adapter(root / "base", tmp_path / "adapter", r=4)  # √4 = 2
    shutil.copytree(tmp_path / "adapter", tmp_path / "wrong")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "wrong" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    folder = merging.merge_whole(root / "base", tmp_path / "wrong", tmp_path / "out")
    report = check_merged_folder(root / "base", tmp_path / "adapter", folder)
    assert weights_finding(report) == "merged_twice" and "alpha/√r" in message(report, "merged_twice")


def test_merged_an_untrained_adapter(root, healthy, tiny_tokenizer, tmp_path):
    fresh = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "base"), LoraConfig(target_modules=ALL, task_type="CAUSAL_LM")
    )
    fresh.save_pretrained(tmp_path / "untrained")
    folder = save(fresh.merge_and_unload(), tmp_path / "out", tiny_tokenizer)
    # The adapter that was merged: everything agrees, and that proves nothing.
    report = check_merged_folder(root / "base", tmp_path / "untrained", folder)
    assert {"zero_b", "no_change"} <= set(report.codes) and "logits_differ" not in report.codes
    # An untrained adapter was given, and a trained one merged.
    report = check_merged_folder(root / "base", tmp_path / "untrained", root / "healthy")
    assert {"zero_b", "no_change", "foreign_change", "logits_differ"} <= set(report.codes)
    # The adapter that should have been merged.
    report = check(root, folder)
    assert weights_finding(report) == "not_merged" and report.times == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_of_two_adapters_lost(dtype, root, tiny_tokenizer, tmp_path):
    model = load(root, "one", "two", dtype=dtype)
    model.set_adapter("two")
    report = check(root, save(model.merge_and_unload(), tmp_path / "out", tiny_tokenizer), "one", "two")
    assert weights_finding(report) == "adapter_lost" and "nothing of one" in message(report, "adapter_lost")
    assert report.times == {"one": pytest.approx(0, abs=0.02), "two": pytest.approx(1, abs=0.02)}


def test_one_of_two_adapters_lost_where_they_sit_on_other_layers(root, tiny_tokenizer, tmp_path):
    for name, targets in (("attention", ["q_proj", "v_proj"]), ("mlp", ["up_proj", "q_proj"])):
        make_adapter(root / "base", tmp_path / name, target_modules=targets)
    shutil.copytree(root / "base", tmp_path / "base")
    folder = save(load(tmp_path, "mlp").merge_and_unload(), tmp_path / "out", tiny_tokenizer)
    report = check(tmp_path, folder, "attention", "mlp")
    assert weights_finding(report) == "adapter_lost" and "nothing of attention" in message(report, "adapter_lost")
    folder = save(load(tmp_path, "attention", "mlp").merge_and_unload(), tmp_path / "both", tiny_tokenizer)
    assert check(tmp_path, folder, "attention", "mlp").codes == []


def test_a_merge_that_stopped_midway(root, tiny_tokenizer, tmp_path):
    model = load(root, "one")
    for name, module in model.named_modules():
        if "layers.0" in name and hasattr(module, "lora_A"):
            module.merge()
    report = check(root, save(model.unload(), tmp_path / "out", tiny_tokenizer))
    assert weights_finding(report) == "partly_merged" and "7 of 14 layers" in message(report, "partly_merged")


def test_a_weak_adapter_drowns_in_bfloat16(root, tiny_tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    save(base, tmp_path / "base", tiny_tokenizer)
    make_adapter(tmp_path / "base", tmp_path / "adapter", spread=2e-5)
    folder = merging.merge_whole(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    report = check_merged_folder(tmp_path / "base", tmp_path / "adapter", folder)
    assert "change_rounded_away" in report.codes and not WEIGHT_CODES & set(report.codes), report
    assert report.times < 0.9


# ------------------------------------------------------------------------------------------------ planted: the base


@pytest.mark.parametrize(("start", "name"), [("olora", "OLoRA"), ("pissa", "PiSSA")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_into_a_mutated_base(start, name, dtype, root, tiny_tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    other = LoraConfig(r=8, lora_alpha=8, target_modules=ALL, init_lora_weights=start, task_type="CAUSAL_LM")
    mutated = get_peft_model(base, other).unload()  # the adapter is gone, and its start stays taken out of the base
    merged = PeftModel.from_pretrained(mutated, root / "one").merge_and_unload().to(getattr(torch, dtype))
    report = check(root, save(merged, tmp_path / "out", tiny_tokenizer))
    assert weights_finding(report) == "base_mutated"
    assert f"{name} of rank 8" in message(report, "base_mutated")


def test_an_olora_adapter_whose_start_was_forgotten(root, tmp_path):
    make_adapter(root / "base", tmp_path / "adapter", init_lora_weights="olora", lora_alpha=8)
    shutil.copytree(tmp_path / "adapter", tmp_path / "reset")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "reset" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
    folder = merging.merge_by_shards(root / "base", tmp_path / "reset", tmp_path / "out")
    report = check_merged_folder(root / "base", tmp_path / "adapter", folder)
    assert weights_finding(report) == "base_mutated" and "OLoRA" in message(report, "base_mutated")


def test_merged_with_another_adapter_besides_or_instead(root, tiny_tokenizer, tmp_path):
    report = check(root, save(load(root, "one", "two").merge_and_unload(), tmp_path / "both", tiny_tokenizer))
    assert weights_finding(report) == "foreign_change" and "1.0" in message(report, "foreign_change")
    report = check(root, save(load(root, "two").merge_and_unload(), tmp_path / "other", tiny_tokenizer))
    assert weights_finding(report) == "foreign_change"


def test_merged_into_another_base(root, tiny_tokenizer, tmp_path):
    save(make_tiny_model(tiny_tokenizer, seed=5), tmp_path / "other", tiny_tokenizer)
    folder = merging.merge_whole(tmp_path / "other", root / "one", tmp_path / "out")
    report = check(root, folder)
    assert {"base_changed", "other_weights", "logits_differ"} <= set(report.codes)
    assert "another base" in message(report, "base_changed")


def four_bit(weight):
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    return bitsandbytes.functional.dequantize_4bit(packed, state)


def scrambled(weight):
    """As after bitsandbytes packed anew: the same 4-bit numbers in another order."""
    packed = four_bit(weight)
    order = torch.randperm(packed.shape[0], generator=torch.Generator().manual_seed(0))
    return (
        packed[order]
        .reshape(-1, 64)[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
        .reshape(packed.shape)
    )


@pytest.mark.parametrize(("damage", "code"), [(four_bit, "quantised_base"), (scrambled, "repacked_base")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_into_a_dequantised_base(damage, code, dtype, root, tiny_tokenizer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    for name, module in base.named_modules():
        if name.endswith("proj"):
            module.weight.data = damage(module.weight.data)
    merged = PeftModel.from_pretrained(base, root / "one").merge_and_unload().to(getattr(torch, dtype))
    report = check(root, save(merged, tmp_path / "out", tiny_tokenizer))
    assert weights_finding(report) == code, report


@pytest.mark.parametrize("forward_first", [False, True])
def test_merged_after_a_4_bit_forward(forward_first, root, tiny_tokenizer, tmp_path):
    """The real thing: where the processor has AVX512-BF16, an eval forward leaves weights that are dequantised wrongly."""
    quiet_imports()
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = load(root, "one", quantization_config=quantisation, dtype=torch.float32)
    if forward_first:
        with torch.no_grad():
            model(input_ids=torch.arange(4, 20)[None])
    plain = model.merge_and_unload().dequantize()
    plain.config.__dict__.pop("quantization_config", None)
    report = check(root, save(plain, tmp_path / "out", tiny_tokenizer))
    repacked = forward_first and bitsandbytes.functional.has_avx512bf16()
    assert weights_finding(report) == ("repacked_base" if repacked else "quantised_base"), report


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantised_merged_model_is_not_compared(bits, root, tiny_tokenizer, tmp_path):
    quiet_imports()
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(**bits)
    model = load(root, "one", quantization_config=quantisation, dtype=torch.float32).merge_and_unload()
    report = check(root, save(model, tmp_path / "out", tiny_tokenizer))
    assert report.codes == ["quantised_weights"]


# ------------------------------------------------------------------------------------------------ planted: the head


def on_tied(root, folder):
    return merging.merge_whole(root / "base_tied", root / "on_tied", folder)


def test_a_tied_head_broken_in_the_folder(root, tmp_path):
    folder = on_tied(root, tmp_path / "out")
    reconfigure(folder, tie_word_embeddings=False)  # and no head in the files: it is random on loading
    report = check(root, folder, "on_tied", base="base_tied")
    assert weights_finding(report) == "tied_head" and "lm_head.weight" in message(report, "tied_head")

    folder = on_tied(root, tmp_path / "out")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 1.1}))
    assert weights_finding(check(root, folder, "on_tied", base="base_tied")) == "tied_head"


def test_an_untied_head_tied_by_the_configuration(root, out):
    reconfigure(out, tie_word_embeddings=True)
    rewrite(out, lambda tensors: tensors.pop("lm_head.weight"))
    assert weights_finding(check(root, out)) == "tied_head"


@pytest.mark.parametrize("untied", [False, True])
def test_an_adapter_on_a_tied_head(untied, root, tiny_tokenizer, tmp_path):
    make_adapter(root / "base_tied", tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(root / "base_tied")
    if untied:  # what PEFT advises: a head of its own before the merge
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    if untied:
        merged._tied_weights_keys, merged.all_tied_weights_keys = {}, {}
    report = check_merged_folder(
        root / "base_tied", tmp_path / "adapter", save(merged, tmp_path / "out", tiny_tokenizer)
    )
    if untied:
        assert report.codes == [], report
    else:
        assert weights_finding(report) == "tied_head"


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"modules_to_save": ["embed_tokens"]}, []),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, []),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, []),
        ({"trainable_token_indices": [3, 5]}, []),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, ["tied_head", "logits_differ"]),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, ["tied_head", "logits_differ"]),
    ],
    ids=["embedding", "both", "kept_tied", "tokens", "lora_kept_tied", "lora_on_both"],
)
def test_adapters_on_an_embedding_that_is_the_head_as_well(changes, codes, root, tiny_tokenizer, tmp_path):
    adapter = make_adapter(root / "base_tied", tmp_path / "adapter", **{"target_modules": ["q_proj"], **changes})
    with warnings.catch_warnings(action="ignore"):
        merged = PeftModel.from_pretrained(load(root, base="base_tied"), adapter).merge_and_unload()
    report = check_merged_folder(root / "base_tied", adapter, save(merged, tmp_path / "out", tiny_tokenizer))
    assert report.codes == codes and report.max_abs is not None, report


# ------------------------------------------------------------------------------------------------ planted: the files


def test_truncated_files(root, out):
    whole = (out / "model.safetensors").read_bytes()
    for part in (whole[: len(whole) // 2], whole[:5], b""):
        (out / "model.safetensors").write_bytes(part)
        report = check(root, out)
        assert report.codes == ["damaged_weights"] and "model.safetensors" in message(report, "damaged_weights")


def test_a_lost_shard_and_a_lost_tensor(root, healthy, tmp_path, out):
    AutoModelForCausalLM.from_pretrained(healthy).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    sorted((tmp_path / "shards").glob("*.safetensors"))[1].unlink()
    assert check(root, tmp_path / "shards").codes == ["damaged_weights"]
    rewrite(out, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert weights_finding(check(root, out)) == "missing_weights"


def test_other_weights_changed(root, out):
    rewrite(out, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    report = check(root, out)
    assert weights_finding(report) == "other_weights" and "model.norm.weight" in message(report, "other_weights")


def test_saved_into_the_adapters_folder(root, healthy, tiny_tokenizer, tmp_path):
    folder = shutil.copytree(root / "one", tmp_path / "one")
    save(AutoModelForCausalLM.from_pretrained(healthy), folder, tiny_tokenizer)
    for adapter in (root / "one", folder):
        report = check_merged_folder(root / "base", adapter, folder)
        assert {"adapter_beside", "logits_differ"} == set(report.codes), report
        assert "applied twice" in message(report, "adapter_beside")


def test_tokenizer_and_template(root, out, tiny_tokenizer):
    (out / "chat_template.jinja").unlink()
    assert check(root, out).codes == ["no_template"]
    (out / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert check(root, out).codes == ["other_template"]
    other = AutoTokenizer.from_pretrained(root / "base")
    other.add_tokens(["<|more|>"])
    other.save_pretrained(out)
    assert check(root, out).codes == ["other_tokenizer", "vocab_mismatch"]
    for file in out.glob("*token*"):
        file.unlink()
    assert check(root, out).codes == ["no_tokenizer"]


def test_generation_stops_where_the_template_ends_a_reply(root, out, tiny_tokenizer, tmp_path):
    end, other = tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id
    base = shutil.copytree(root / "base", tmp_path / "base")

    def stop_at(folder, stops):
        settings = GenerationConfig.from_pretrained(folder)
        settings.eos_token_id = stops
        settings.save_pretrained(folder)

    def finding():
        report = check_merged_folder(base, root / "one", out)
        return [(one.level, one.message) for one in report.findings if one.code == "end_ignored"]

    assert other is not None and other != end
    stop_at(base, end)
    for right in (end, [other, end]):
        stop_at(out, right)
        assert finding() == []
    for wrong in (other, [other]):
        stop_at(out, wrong)
        ((kind, message),) = finding()
        assert (
            kind == "fail" and repr(tiny_tokenizer.eos_token) in message and repr(tiny_tokenizer.pad_token) in message
        )
    stop_at(base, other)
    assert [kind for kind, _ in finding()] == ["warn"], "the base does so, too"

    # Without the file the model's configuration says where to stop; a template that can't be rendered says nothing.
    (out / "generation_config.json").unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    assert finding() == []
    (out / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert "no token at all" in finding()[0][1]
    for folder in (base, out):
        (folder / "chat_template.jinja").write_text("{{ raise_exception('tools only') }}")
    assert finding() == []


def test_the_adapters_own_tokenizer_counts(root, healthy, tmp_path, tiny_tokenizer):
    adapter = shutil.copytree(root / "one", tmp_path / "adapter")
    own = AutoTokenizer.from_pretrained(root / "base")
    own.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    own.save_pretrained(adapter)
    assert check_merged_folder(root / "base", adapter, healthy).codes == ["other_template"]
    folder = merging.merge_by_shards(root / "base", adapter, tmp_path / "out")
    assert check_merged_folder(root / "base", adapter, folder).codes == []


def test_vocabulary_sizes(root, healthy, tmp_path, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(healthy)
    model.resize_token_embeddings(len(tiny_tokenizer) + 8)
    report = check(root, save(model, tmp_path / "out", tiny_tokenizer))
    assert {"vocab_mismatch", "other_weights"} <= set(report.codes)
    assert f"embedding {len(tiny_tokenizer) + 8}" in message(report, "vocab_mismatch")


def test_vocabulary_sizes_where_an_adapter_sits_on_the_embedding(root, tmp_path, tiny_tokenizer):
    for changes in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}):
        adapter = tmp_path / next(iter(changes))
        make_adapter(root / "base", adapter, **changes)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), adapter)
        merged = model.merge_and_unload()
        merged.resize_token_embeddings(len(tiny_tokenizer) + 8)
        folder = save(merged, tmp_path / f"out_{adapter.name}", tiny_tokenizer)
        report = check_merged_folder(root / "base", adapter, folder)
        assert f"embedding {len(tiny_tokenizer) + 8}" in message(report, "vocab_mismatch")


def test_another_configuration(root, out):
    reconfigure(out, rms_norm_eps=0.5)
    report = check(root, out)
    assert set(report.codes) == {"other_config", "logits_differ"} and "rms_norm_eps" in message(report, "other_config")


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_no_pickle_is_ever_read(root, out, tmp_path):
    bomb = Bomb()
    bomb.path = str(tmp_path / "exploded")
    content = pickle.dumps(bomb)
    (out / "pytorch_model.bin").write_bytes(content)
    report = check(root, out)
    assert report.codes == ["pickle"] and report.max_abs <= report.tolerance
    (out / "model.safetensors").unlink()
    assert set(check(root, out).codes) == {"not_a_model", "pickle"}
    adapter = shutil.copytree(root / "one", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (adapter / "adapter_model.bin").write_bytes(content)
    assert {"pickle", "no_weights"} <= set(check_merged_folder(root / "base", adapter, root / "healthy").codes)
    base = shutil.copytree(root / "base", tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)
    assert "not_a_model" in check_merged_folder(base, root / "one", root / "healthy").codes
    # An adapter's pickle in the merged folder, which transformers would put on top.
    beside = shutil.copytree(root / "healthy", tmp_path / "beside")
    shutil.copyfile(root / "one" / "adapter_config.json", beside / "adapter_config.json")
    (beside / "adapter_model.bin").write_bytes(content)
    assert {"pickle", "adapter_beside"} == set(check(root, beside).codes)
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------------------ answers


@pytest.fixture(scope="module")
def rows(root):
    """Prompts with the adapter's own answers as the right ones."""
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    prompts = [[{"role": "user", "content": f"word {i}"}] for i in range(8)]
    answers = generate(load(root, "one"), tokenizer, prompts)
    return [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_the_score_of_the_readers_own_rows(rows, root, healthy, out):
    report = check(root, healthy, rows=rows)
    assert report.codes == [] and report.scores == {"adapter": 1, "merged": 1}
    rewrite(out, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].zero_())
    report = check(root, out, rows=rows)
    assert "score_fell" in report.codes and report.scores["adapter"] == 1 > report.scores["merged"]


def test_rows_that_are_none(root, healthy):
    for task in (["a"], [{"prompt": "x"}]):
        report = check_merged_folder(root / "base", root / "one", healthy, rows=task)
        assert not report.ok and isinstance(report, MergedReport)


# ------------------------------------------------------------------------------------------------ manners


@pytest.mark.parametrize("wrong", [None, 3, "", "no/such/place", "nowhere/at-all", [], {}, float("nan")])
def test_it_never_raises_on_wrong_arguments(wrong, root, healthy):
    right = [root / "base", root / "one", healthy]
    for place in range(3):
        report = check_merged_folder(*right[:place], wrong, *right[place + 1 :])
        assert not report.ok and report.findings[0].remedy and "check_failed" not in report.codes, report


@pytest.mark.parametrize(
    ("options", "said", "advice"),
    [
        ({"dtype": "int8"}, "dtype is 'int8',", "'float32', 'bfloat16' or 'float16'"),
        ({"dtype": "bf17"}, "dtype is 'bf17',", "'float32', 'bfloat16' or 'float16'"),
        ({"rows": 3}, "rows is 3.", "list of rows"),
        ({"rows": {"prompt": []}}, "rows is {'prompt': []}.", "list of rows"),
        ({"rows": "nonsense"}, "rows is 'nonsense'.", "list of rows"),
        ({"texts": "nonsense"}, "texts is 'nonsense'.", "list of strings"),
        ({"score": 3}, "score is 3.", "function(prediction, answer)"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(options, said, advice, root, healthy):
    report = check(root, healthy, **options)
    assert (
        report.codes == ["bad_argument"] and said in report.findings[0].message and advice in report.findings[0].remedy
    )


@pytest.mark.parametrize(
    ("given", "said", "advice"),
    [
        (load, "is a LlamaForCausalLM, neither a folder nor", "Save it with save_pretrained"),
        (lambda root: "", "No folder was given", "Pass the folder"),
        (lambda root: root / "base" / "config.json", "config.json is a file, not a folder", "Pass the folder"),
    ],
    ids=["model", "empty", "file"],
)
def test_something_else_than_a_folder_is_named(given, said, advice, root):
    for place, role in enumerate(("base", "adapter", "merged model")):
        folders = [root / "base", root / "one", root / "base"]
        folders[place] = given(root)
        (finding,) = check_merged_folder(*folders).findings
        assert finding.code == "no_folder" and f"The {role}" in finding.message
        assert said in finding.message and advice in finding.remedy


def test_folders_that_are_no_models(root, healthy, tmp_path):
    (tmp_path / "file").touch()
    assert check(root, tmp_path / "file").codes == ["no_folder"]
    assert check(root, tmp_path).codes == ["not_a_model"]
    for name, said in (
        ("one", "is the adapter's folder: the same one was given twice"),
        ("two", "holds an adapter only"),
    ):
        for report in (check(root, root / name), check_merged_folder(root / name, root / "one", healthy)):
            assert report.codes == ["not_a_model"] and said in message(report, "not_a_model")
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        for report in (check(root, tmp_path), check_merged_folder(tmp_path, root / "one", healthy)):
            assert f"{tmp_path / 'config.json'} " in message(report, "not_a_model")
    index = {"weight_map": {"a": "../../somewhere.safetensors"}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check(root, tmp_path).codes == ["damaged_weights"]


def test_what_was_found_is_kept_when_the_comparison_fails(root, out, monkeypatch):
    (out / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(merged_folder, "_load_adapted", lambda *args: 1 / 0)
    report = check_merged_folder(root / "base", root / "one", out)
    assert report.codes == ["adapter_beside", "check_failed"] and "ZeroDivisionError" in message(report, "check_failed")


def test_code_of_a_model_is_never_run(root, out, tmp_path):
    (out / "code.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    reconfigure(out, model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    report = check_merged_folder(root / "base", root / "one", out)
    assert not report.ok and not (tmp_path / "exploded").exists()


def test_one_model_in_memory_at_a_time_and_nothing_written(root, healthy, monkeypatch):
    models, alive = [], []
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    def watched(cls, *args, **kwargs):
        alive.append(sum(model() is not None for model in models))
        model = from_pretrained(cls, *args, **kwargs)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert check(root, healthy).ok
    assert alive == [0, 0] and len(models) == 2
    assert files == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_hub_id_is_fetched_without_its_pickles(root, healthy, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "someone/model":
            return str(root / "base")
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder("someone/model") == root / "base"
    assert all(not pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked[0][1])
    report = check_merged_folder("someone/base", root / "one", root / "healthy")
    assert report.codes == ["no_folder"]
    shutil.copytree(root / "one", tmp_path / "one")
    for trained_on, codes in (("someone/model", []), ("someone/other", ["base_mismatch"])):
        config = json.loads((root / "one" / "adapter_config.json").read_text()) | {
            "base_model_name_or_path": trained_on
        }
        (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config))
        assert check_merged_folder("someone/model", tmp_path / "one", healthy).codes == codes
    report = check_merged_folder("someone/model", root / "one", "someone/else")
    assert report.codes == ["no_folder"] and "someone/else" in str(report) and "offline" in str(report)
    assert tuple(asked[0][1]) == SAFE_FILES
