"""Faults planted into one healthy set of base, adapter and merge: each is found, under its own code."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adapter_checks import (
    check_adapter_folder,
    check_adapters,
    check_changes_output,
    check_lora_config,
    check_merged_folder,
    compare_models,
)
from architectures import ARCHITECTURES

LLAMA = ARCHITECTURES["Llama"]
IDS = LLAMA.example()["input_ids"]
START = "base_model.model."


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    LLAMA.make().save_pretrained(root / "base")
    for name, seed in (("adapter", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = get_peft_model(load(root), LoraConfig(r=2, lora_alpha=8, target_modules=LLAMA.targets))
        for weight in model.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(root / name)
    PeftModel.from_pretrained(load(root), root / "adapter").merge_and_unload().save_pretrained(root / "merged")
    return root


@pytest.fixture
def root(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "set")


def load(root):
    return LlamaForCausalLM.from_pretrained(root / "base").eval()


def tensors(change, file="adapter/adapter_model.safetensors"):
    def plant(root):
        content = {name: tensor.clone() for name, tensor in change(load_file(root / file)).items()}
        save_file(content, root / file, metadata={"format": "pt"})

    return plant


def each(change, part=""):
    """`change` a tensor where its name has `part` in it."""
    return tensors(lambda all_: {name: change(tensor) if part in name else tensor for name, tensor in all_.items()})


def renamed(change):
    return tensors(lambda all_: {change(name): tensor for name, tensor in all_.items()})


def setting(**changes):
    def plant(root):
        path = root / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


def written(name, content=b"x"):
    return lambda root: (root / name).write_bytes(content)


IN_THE_FOLDER = [
    ("pickle", written("adapter/adapter_model.bin")),
    ("trainer_state", written("adapter/optimizer.pt")),
    ("merged_model_beside", written("adapter/config.json", b"{}")),
    ("no_config", lambda root: (root / "adapter" / "adapter_config.json").unlink()),
    ("bad_config", written("adapter/adapter_config.json", b"{")),
    ("bad_config", setting(r="2")),
    ("no_weights", lambda root: (root / "adapter" / "adapter_model.safetensors").unlink()),
    ("damaged_weights", written("adapter/adapter_model.safetensors")),
    ("adapter_name_in_keys", renamed(lambda name: name.replace(".weight", ".default.weight"))),
    ("empty", tensors(lambda _: {})),
    ("merged_in_disguise", renamed(lambda name: name.replace("lora_A", "a").replace("lora_B", "b"))),
    ("extra_tensors", tensors(lambda all_: all_ | {f"{START}model.norm.weight": torch.ones(16)})),
    ("nested_keys", renamed(lambda name: START + name)),
    ("foreign_keys", renamed(lambda name: f"module.{name}")),
    ("unpaired", tensors(lambda all_: {name: t for name, t in all_.items() if "0.self_attn.q_proj.lora_B" not in name})),
    ("missing_tensors", setting(use_dora=True)),
    ("missing_tensors", setting(task_type="SEQ_CLS")),
    ("non_finite", each(lambda tensor: tensor * float("nan"), "layers.0.self_attn.q_proj.lora_A")),
    ("zero_b", each(torch.zeros_like, "lora_B")),
    ("partly_zero_b", each(torch.zeros_like, "layers.0.self_attn.q_proj.lora_B")),
    ("rank_mismatch", setting(r=4)),
    ("rank_mismatch", setting(rank_pattern={"layers.0.self_attn.q_proj": 1})),
    ("small_scaling", setting(lora_alpha=0)),
    ("changes_base", setting(init_lora_weights="pissa")),
    ("layer_not_in_base", renamed(lambda name: name.replace("layers.1", "layers.7"))),
    ("layers_not_covered", tensors(lambda all_: {name: t for name, t in all_.items() if "layers.1" not in name})),
    ("shape_mismatch", each(lambda tensor: tensor[:, :8], "q_proj.lora_A")),
    ("base_mismatch", setting(base_model_name_or_path="organisation/another-model")),
    ("ungathered", each(lambda tensor: torch.zeros(0))),
    ("partial_shards", each(lambda tensor: tensor[: len(tensor) // 2])),
    ("partial_shards", each(lambda tensor: tensor[:, : tensor.shape[1] // 2])),
    ("malformed_factors", each(torch.flatten, "layers.0.self_attn.q_proj.lora_A")),
    ("zero_rows", each(lambda tensor: torch.cat([tensor[: len(tensor) // 2], torch.zeros_like(tensor[len(tensor) // 2 :])]), "lora_B")),
    ("zero_a", each(torch.zeros_like, "lora_A")),
    ("huge_change", setting(lora_alpha=8000)),
    ("random_start", setting(init_lora_weights=False)),
    ("unknown_settings", setting(a_setting_of_tomorrow=True)),
    ("unknown_method", setting(peft_type="LORRA")),
    ("not_targeted", setting(target_modules=["q_proj"])),
    ("other_prefix", renamed(lambda name: name.replace(".layers.", ".language_model.layers."))),
    ("vocab_mismatch", tensors(lambda all_: all_ | {f"{START}lm_head.weight": torch.ones(72, 16)})),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "plant"), IN_THE_FOLDER, ids=[f"{i} {code}" for i, (code, _) in enumerate(IN_THE_FOLDER)]
)
def test_in_an_adapters_folder(code, plant, root):
    assert check_adapter_folder(root / "adapter", root / "base").codes == []
    plant(root)
    assert code in check_adapter_folder(root / "adapter", root / "base").codes


def weights(change, part="q_proj"):
    """Every merged weight whose name holds `part` is replaced by `change` of it and the base's."""

    def plant(root):
        base = load_file(root / "base" / "model.safetensors")
        tensors(
            lambda all_: {name: change(t, base[name]) if part in name else t for name, t in all_.items()},
            "merged/model.safetensors",
        )(root)

    return plant


IN_A_MERGE = [
    ("not_merged", weights(lambda merged, base: base, "")),
    ("partly_merged", weights(lambda merged, base: base, "layers.0.self_attn.q_proj")),
    ("merged_twice", weights(lambda merged, base: 2 * merged - base, "")),
    ("swapped", weights(lambda merged, base: 2 * base - merged, "")),
    ("wrong_scaling", weights(lambda merged, base: base + 0.25 * (merged - base), "")),
    ("foreign_change", weights(lambda merged, base: merged + torch.outer(base[:, 0], base[0]))),
    ("base_changed", weights(lambda merged, base: merged + 0.05 * base.sign())),
    ("other_weights", weights(lambda merged, base: base * 1.1, "norm")),
    ("missing_weights", tensors(lambda all_: {n: t for n, t in all_.items() if "o_proj" not in n}, "merged/model.safetensors")),
    ("adapter_beside", lambda root: shutil.copytree(root / "adapter", root / "merged", dirs_exist_ok=True)),
    ("damaged_weights", written("merged/model.safetensors")),
]  # fmt: skip


def test_the_healthy_merge(healthy):
    assert check_merged_folder(healthy / "base", healthy / "adapter", healthy / "merged").codes == []


@pytest.mark.parametrize(("code", "plant"), IN_A_MERGE, ids=[code for code, _ in IN_A_MERGE])
def test_in_a_merge(code, plant, root):
    plant(root)
    report = check_merged_folder(root / "base", root / "adapter", root / "merged")
    assert code in report.codes and not report.ok, report


def test_in_a_loaded_model(root):
    model = PeftModel.from_pretrained(load(root), root / "adapter").eval()
    assert (
        check_adapters(model, expect_active="default", expect_trainable=False, original_base=root / "base").codes == []
    )
    assert check_changes_output(model, IDS).codes == []
    assert check_adapters(model, expect_trainable=True).codes == ["adapter_frozen"]
    assert check_adapters(model, expect_active="reading").codes == ["not_loaded"]
    model.load_adapter(root / "other", adapter_name="other")
    assert check_adapters(model, expect_active="other").codes == ["not_active"]
    with model.disable_adapter():
        assert check_adapters(model).codes == ["adapters_disabled"]
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(root / "merged"), root / "adapter")
    assert "already_merged" in check_adapters(merged, original_base=root / "base").codes
    assert compare_models(load(root), merged, IDS).codes == ["logits_differ"]
    tensors(lambda all_: {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in all_.items()})(root)
    untrained = PeftModel.from_pretrained(load(root), root / "adapter").eval()
    assert check_adapters(untrained).codes == ["zero_b"]
    assert check_changes_output(untrained, IDS).codes == ["no_change"]


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("refused", {"target_modules": ["query"]}),
        ("matches_nothing", {"target_modules": ["q_proj", "query"]}),
        ("matches_nothing", {"rank_pattern": {"query": 2}}),
        ("bad_rank", {"rank_pattern": {"q_proj": 0}}),
        ("rank_too_large", {"r": 64}),
        ("small_scaling", {"lora_alpha": 0}),
        ("odd_rank", {"r": 3, "init_lora_weights": "orthogonal"}),
        ("bad_dropout", {"lora_dropout": 1.0}),
        ("inference_mode", {"inference_mode": True}),
        ("large_scaling", {"lora_alpha": 512}),
        ("random_start", {"init_lora_weights": False}),
        ("shadowed_pattern", {"rank_pattern": {".*_proj": 2, "q_proj": 3}}),
        ("target_left_out", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
        ("token_outside", {"trainable_token_indices": [64]}),
        ("without_effect", {"exclude_modules": ["query"]}),
        ("wrong_task_type", {"task_type": "SEQ_CLS"}),
    ],
)
def test_in_a_configuration(code, settings):
    healthy = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    assert check_lora_config(LLAMA.make(), LoraConfig(**healthy)).codes == []
    assert code in check_lora_config(LLAMA.make(), LoraConfig(**healthy | settings)).codes
