"""Healthy adapters and merges of many architectures, methods and dtypes: no check fails, none crashes, and none warns without cause."""

import contextlib
import itertools

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from adapter_checks import (
    check_adapter_folder,
    check_adapters,
    check_changes_output,
    check_lora_config,
    check_merged_folder,
    compare_models,
    merging,
)
from adapter_checks.errors import InputError
from architectures import ARCHITECTURES

# Each option of LoRA on one architecture, and each architecture with one of them.
LORA = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {r"^.*\.0\..*": 2}, "alpha_pattern": {r".*\.0\..*": 3}},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
]
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = {
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "all-linear": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*\.(q|v)_proj"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "norm saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "repeated layers": {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]},
    "parameters": {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
}
METHODS = {
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(target_modules=["q_proj"], r=2),
    "LoKr": peft.LoKrConfig(target_modules=["q_proj"], r=2),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=5),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}


@pytest.fixture(autouse=True)
def quiet():
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    yield
    if bars:
        transformers.utils.logging.enable_progress_bar()


def trained_and_loaded(architecture, config, dtype, root):
    """The base's folder, the adapter's, and the model with the adapter loaded from there."""
    base, folder = root / "base", root / "adapter"
    model = architecture.make().to(dtype)
    model.save_pretrained(base)
    torch.manual_seed(1)
    model = get_peft_model(type(model).from_pretrained(base), config)
    assert check_adapters(model, expect_trainable=True, base_name=str(base)).ok
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            weight.data += 0.3 * torch.randn_like(weight)
    model.eval().save_pretrained(folder)
    loaded = PeftModel.from_pretrained(architecture.make().from_pretrained(base), folder).eval()
    assert compare_models(model, loaded, architecture.example(), atol=1e-4).ok, "the case itself is healthy"
    return base, folder, loaded


def assert_quiet(report, *allowed):
    assert report.ok and set(report.codes) <= set(allowed), report


def check_all(architecture, config, dtype, root):
    base, folder, loaded = trained_and_loaded(architecture, config, dtype, root)
    is_lora = type(config) is LoraConfig
    assert_quiet(check_adapter_folder(folder), *(() if is_lora else ("not_lora",)))
    assert_quiet(check_adapter_folder(folder, base), *(() if is_lora else ("not_lora",)))
    found = check_adapters(loaded, base_name=str(base), original_base=base)
    assert_quiet(found, *(() if is_lora else ("not_compared", "unsupported_method")))
    assert_quiet(check_changes_output(loaded, architecture.example()))
    return base, folder, loaded


def check_merges(base, folder, loaded, dtype, root, *allowed):
    """In 16 bits rounding may be as large as a change, which is a warning of its own."""
    rounding = allowed if dtype == torch.float32 else ("too_coarse", "change_rounded_away")
    loaded.merge_and_unload().save_pretrained(root / "merged")
    assert_quiet(check_merged_folder(base, folder, root / "merged"), *rounding)
    with contextlib.suppress(InputError):  # what it refuses, it refuses in a sentence
        merging.merge_by_shards(base, folder, root / "shards")
    if (root / "shards").exists():
        assert_quiet(check_merged_folder(base, folder, root / "shards"), *rounding)


# Each option in 32 or 16 bits on one of the first architectures, and the others plainly.
CASES = zip(
    ARCHITECTURES, itertools.chain(list(itertools.product(LORA, DTYPES))[:11], itertools.repeat(({}, torch.float32)))
)


@pytest.mark.parametrize(("name", "options", "dtype"), [(name, *case) for name, case in CASES])
def test_lora_on_every_architecture(name, options, dtype, tmp_path):
    architecture = ARCHITECTURES[name]
    head = {"modules_to_save": ["classifier"]} if name == "ViT" else {}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=architecture.targets, task_type=architecture.task, **options, **head
    )
    report = check_lora_config(architecture.make(), config)
    assert report.ok and "check_failed" not in report.codes, report
    check_merges(*check_all(architecture, config, dtype, tmp_path), dtype, tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_lora(name, tmp_path):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **OPTIONS[name])
    parts = check_all(ARCHITECTURES["Llama"], config, torch.float32, tmp_path)
    if name not in ("repeated layers", "trained tokens"):  # merged, the first is another architecture
        check_merges(*parts, torch.float32, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_other_methods(name, tmp_path):
    parts = check_all(ARCHITECTURES["Llama"], METHODS[name], torch.float32, tmp_path)
    if name in ("IA3", "LoHa", "OFT", "VeRA", "norms"):
        check_merges(*parts, torch.float32, tmp_path, "not_lora")
