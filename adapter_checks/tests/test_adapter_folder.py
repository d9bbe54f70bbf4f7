"""What adapter_config.json may say, and what has to be in the file if it says so."""

import copy
import json
import shutil
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from adapter_checks import check_adapter_folder

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def adapter(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders / "adapter", tmp_path / "adapter")


def reconfigure(folder, *without, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in without}))


def rewrite(folder, change):
    """`change` gets {name: tensor} and returns what should be saved instead."""
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


def test_a_healthy_adapter(adapter, tiny_folders):
    for base in (None, tiny_folders / "base", tiny_folders / "base" / "config.json"):
        report = check_adapter_folder(adapter, base)
        assert report.codes == [], report
        assert "LoRA of rank 4, alpha 8, on 14 layers" in message(report, "adapter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", None), ("r", 0), ("r", 4.0), ("r", True), ("r", "4"),
        ("lora_alpha", None), ("lora_alpha", "8"), ("lora_alpha", True), ("lora_alpha", float("nan")),
        ("target_modules", 3), ("target_modules", "("), ("target_modules", ["q_proj", 1]),
        ("exclude_modules", 0.5), ("exclude_modules", "*"),
        ("modules_to_save", True), ("modules_to_save", "lm_head"), ("modules_to_save", ["("]),
        ("layers_to_transform", "1"), ("layers_to_transform", [0.5]),
        ("layers_pattern", 3),
        ("rank_pattern", ["q_proj"]), ("rank_pattern", {"(": 8}), ("rank_pattern", {"q_proj": "8"}), ("rank_pattern", 8),
        ("alpha_pattern", {"q_proj": None}), ("alpha_pattern", "q_proj"),
        ("bias", True), ("bias", "some"), ("bias", None),
        ("init_lora_weights", None), ("init_lora_weights", 3),
        ("use_rslora", "false"), ("use_dora", 1), ("fan_in_fan_out", "x"),
        ("base_model_name_or_path", 3), ("task_type", ["CAUSAL_LM"]),
    ],
)  # fmt: skip
def test_a_setting_of_the_wrong_kind_is_named(name, value, adapter, tiny_folders):
    reconfigure(adapter, **{name: value})
    report = check_adapter_folder(adapter, tiny_folders / "base")
    assert report.codes == ["bad_config"] and f"{name} is {value!r}" in message(report, "bad_config")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_alpha", 8.5), ("target_modules", None), ("target_modules", "all-linear"), ("target_modules", r".*_proj"),
        ("exclude_modules", []), ("modules_to_save", None), ("layers_to_transform", [0, 1]), ("layers_to_transform", None),
        ("rank_pattern", None), ("rank_pattern", {"q_proj": 4}), ("rank_pattern", {r".*\.v_proj": 4}),
        ("alpha_pattern", {"q_proj": 0.5}), ("bias", "lora_only"), ("init_lora_weights", False), ("use_rslora", None),
        ("base_model_name_or_path", None), ("task_type", None), ("a_setting_of_tomorrow", {"x": 1}),
    ],
)  # fmt: skip
def test_what_peft_takes_is_healthy(name, value, adapter, tiny_folders):
    reconfigure(adapter, **{name: value})
    assert check_adapter_folder(adapter, tiny_folders / "base").codes == []


def test_settings_that_are_not_there(adapter, tiny_folders):
    reconfigure(adapter, "lora_alpha")
    report = check_adapter_folder(adapter)
    assert report.ok and report.codes == ["incomplete_config"]
    assert "lora_alpha" in message(report, "incomplete_config") and "r and" not in message(report, "incomplete_config")
    reconfigure(adapter, "lora_alpha", "r")
    assert check_adapter_folder(adapter).codes == ["incomplete_config", "rank_mismatch"]
    rewrite(
        adapter, lambda tensors: {n: t.repeat(2, 1) if "lora_A" in n else t.repeat(1, 2) for n, t in tensors.items()}
    )
    assert check_adapter_folder(adapter).codes == ["incomplete_config"], "a rank of 8, PEFT's default"


@pytest.mark.parametrize("alpha", [0, -8])
def test_an_alpha_that_switches_the_adapter_off_or_around(alpha, adapter):
    reconfigure(adapter, lora_alpha=alpha)
    assert check_adapter_folder(adapter).codes == ["small_scaling"]
    reconfigure(adapter, lora_alpha=1e-3)
    assert check_adapter_folder(adapter).codes == []


def test_patterns_are_read_as_peft_reads_them(tiny_model, tmp_path):
    """By the name in the plain base: a key may begin there with ^, and PEFT ignores one with its own prefix."""
    layer = "model.layers.0.self_attn.q_proj"
    patterns = {f"^{layer}": 2, "base_model.model.model.layers.1.self_attn.q_proj": 3}
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], rank_pattern=patterns))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    ranks = {name: len(t) for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in name}
    assert sorted(ranks.values()) == [2, 4]
    assert check_adapter_folder(tmp_path).codes == []
    reconfigure(tmp_path, rank_pattern={f"base_model.model.{layer}": 2})
    assert check_adapter_folder(tmp_path).codes == ["rank_mismatch"]


def test_a_checkpoint_of_fsdp(adapter):
    """Its whole model in a pickle is a trainer's state: from_pretrained on the folder does not read it."""
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "random_states_1.pkl"):
        (adapter / name).write_bytes(b"")
    assert check_adapter_folder(adapter).codes == ["trainer_state"]
    (adapter / "pytorch_model.bin").write_bytes(b"")
    assert check_adapter_folder(adapter).codes == ["pickle", "trainer_state", "merged_model_beside"]


# ------------------------------------------------------------------------------------------------ random values


@pytest.fixture
def classifier(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    model = get_peft_model(
        LlamaForSequenceClassification(config), LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_a_head_that_was_not_saved(classifier):
    """Loading such a folder gives a classifier with a random head; PEFT only mentions missing keys."""
    assert check_adapter_folder(classifier).codes == []
    rewrite(classifier, lambda tensors: {n: t for n, t in tensors.items() if "score" not in n})
    report = check_adapter_folder(classifier)
    assert report.codes == ["missing_tensors"] and "classifier or score" in message(report, "missing_tensors")
    reconfigure(classifier, modules_to_save=None)
    assert check_adapter_folder(classifier).codes == ["missing_tensors"], "PEFT adds the head itself"
    reconfigure(classifier, task_type="CAUSAL_LM")
    assert check_adapter_folder(classifier).codes == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"modules_to_save": ["head"]}, "head"),  # a part of a name is another name
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"trainable_token_indices": [3]}, "trainable_tokens_delta"),
        ({"task_type": "QUESTION_ANS"}, "qa_outputs"),
        ({"task_type": "TOKEN_CLS"}, "classifier or score"),
    ],
)
def test_what_was_trained_has_to_be_there(changes, named, adapter):
    reconfigure(adapter, **changes)
    report = check_adapter_folder(adapter)
    assert report.codes == ["missing_tensors"] and named in message(report, "missing_tensors")


def test_layers_that_would_begin_anew(adapter, tiny_folders):
    rewrite(adapter, lambda tensors: {n: t for n, t in tensors.items() if "layers.1" not in n})
    assert check_adapter_folder(adapter).codes == [], "without the base nothing tells"
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        reconfigure(adapter, target_modules=targets, init_lora_weights=True)
        report = check_adapter_folder(adapter, tiny_folders / "base")
        assert report.codes == ["layers_not_covered"] and "B with zeros" in message(report, "layers_not_covered")
    reconfigure(adapter, init_lora_weights=False)
    assert "at random" in message(check_adapter_folder(adapter, tiny_folders / "base"), "layers_not_covered")


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"exclude_modules": ["down_proj"]}, lambda name: "down_proj" not in name),
        ({"target_modules": NAMES, "layers_to_transform": [0]}, lambda name: "layers.0" in name),
        (
            {"target_modules": NAMES, "layers_to_transform": 1, "layers_pattern": "layers"},
            lambda name: "layers.1" in name,
        ),
        ({"target_modules": r".*(q|v)_proj"}, lambda name: "q_proj" in name or "v_proj" in name),
    ],
)
def test_layers_that_were_left_out_on_purpose(changes, kept, adapter, tiny_folders):
    rewrite(adapter, lambda tensors: {n: t for n, t in tensors.items() if kept(n)})
    assert check_adapter_folder(adapter, tiny_folders / "base").codes == ["layers_not_covered"]
    reconfigure(adapter, **changes)
    assert check_adapter_folder(adapter, tiny_folders / "base").codes == []


# ------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("spoil", [lambda tensor: tensor.flatten(), lambda tensor: tensor.sum()])
def test_factors_that_are_no_matrices(spoil, adapter, tiny_folders):
    rewrite(
        adapter, lambda tensors: {n: spoil(t) if "layers.0.mlp.up_proj.lora_B" in n else t for n, t in tensors.items()}
    )
    report = check_adapter_folder(adapter, tiny_folders / "base")
    assert report.codes == ["malformed_factors"] and "up_proj" in message(report, "malformed_factors")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("model.embed_tokens.weight", {}, True),
        ("transformer.wte.weight", {}, True),
        ("lm_head.weight", {}, True),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector", {}, True),
        ("shared.trainable_tokens_delta", {}, True),
        ("model.norm.weight", {}, False),
        ("model.norm.weight", {"modules_to_save": ["norm"]}, True),
        ("model.layers.0.mlp.up_proj.bias", {}, False),
        ("model.layers.0.mlp.up_proj.bias", {"bias": "all"}, True),
        ("model.norm.weight", {"bias": "lora_only"}, False),
    ],
)
def test_other_tensors_that_an_adapter_may_hold(name, changes, expected, adapter):
    rewrite(adapter, lambda tensors: tensors | {f"base_model.model.{name}": torch.ones(4)})
    reconfigure(adapter, **changes)
    assert check_adapter_folder(adapter).codes == ([] if expected else ["extra_tensors"])


def test_a_folder_that_may_not_be_read(adapter, monkeypatch):
    from pathlib import Path

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    report = check_adapter_folder(adapter)
    assert report.codes == ["not_readable"] and "Permission denied" in message(report, "not_readable")


START = "base_model.model."


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.removeprefix(START),
        lambda name: name.replace("base_model.model.", "model."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace(START, f"{START}module."),
        lambda name: name.replace(START, f"{START}_orig_mod."),
        lambda name: name.replace(START, "base_model._orig_mod.model."),
        lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
        lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    ],
)
def test_names_under_which_peft_finds_no_layer(renamed, adapter, tiny_folders):
    """PEFT is asked as well: what the check fails for really leaves B at zero."""
    base = tiny_folders / "base"

    def loaded():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        attention = {
            name: weight for name, weight in model.named_parameters() if "self_attn" in name and "lora_B" in name
        }
        return sum(weight.abs().sum().item() for weight in attention.values())

    assert loaded() > 0
    rewrite(adapter, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    assert loaded() == 0
    assert "foreign_keys" in check_adapter_folder(adapter).codes
    assert "foreign_keys" in check_adapter_folder(adapter, base).codes


def test_a_layer_called_module_is_no_wrapper(adapter):
    rewrite(adapter, lambda tensors: {name.replace("self_attn", "module"): tensor for name, tensor in tensors.items()})
    assert "foreign_keys" not in check_adapter_folder(adapter).codes


# ------------------------------------------------------------------------------------------------ layers and their names


def trained(model, folder, **settings):
    """A LoRA adapter on `model` with B not zero, saved to `folder`."""
    model = get_peft_model(model, LoraConfig(r=4, **settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return folder


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("BertForSequenceClassification", {"task_type": "SEQ_CLS"}),
        ("BertForQuestionAnswering", {"task_type": "QUESTION_ANS"}),
        ("BertForMaskedLM", {}),
        ("BertModel", {"task_type": "FEATURE_EXTRACTION"}),
        ("BertModel", {}),
    ],
)
def test_names_of_layers_depend_on_the_class(kind, settings, tmp_path):
    """An encoder's folder names the bare encoder, and a classifier around it puts `bert.` before each name."""
    config = transformers.BertConfig(**SMALL)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    folder = trained(getattr(transformers, kind)(config), tmp_path / "adapter", target_modules=["query"], **settings)
    assert check_adapter_folder(folder, tmp_path / "base").codes == []
    assert check_adapter_folder(folder, getattr(transformers, kind)(config)).codes == []
    rewrite(folder, lambda tensors: {n.replace("encoder.layer", "encoder.block"): t for n, t in tensors.items()})
    assert "layer_not_in_base" in check_adapter_folder(folder, tmp_path / "base").codes


def test_names_that_peft_translates(tmp_path):
    """Of transformers 4: a vision-language model's layers, and experts that were modules of their own."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, **vision),
        image_token_index=63,
    )
    llava = transformers.LlavaForConditionalGeneration(config)
    folder = trained(llava, tmp_path / "llava", target_modules=r".*language_model.*q_proj")
    rewrite(
        folder,
        lambda tensors: {n.replace("model.language_model.", "language_model.model."): t for n, t in tensors.items()},
    )
    assert check_adapter_folder(folder, config).codes == []
    rewrite(folder, lambda tensors: {n.replace("language_model.model.", "language."): t for n, t in tensors.items()})
    assert "layer_not_in_base" in check_adapter_folder(folder, config).codes

    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
    )
    folder = shutil.copytree(folder, tmp_path / "mixtral")
    reconfigure(folder, target_modules=["w1", "w2", "w3"], auto_mapping=None)
    rewrite(
        folder,
        lambda _: {
            f"{START}model.layers.{layer}.block_sparse_moe.experts.{expert}.w{i}.lora_{factor}.weight": torch.ones(
                shape
            )
            for layer in range(2)
            for expert in range(2)
            for i in (1, 2, 3)
            for factor, shape in (("A", (4, 32)), ("B", (32, 4)))
        },
    )
    assert check_adapter_folder(folder, mixtral).codes == []
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.1" not in n})
    assert check_adapter_folder(folder, mixtral).codes == ["layers_not_covered"]


def test_layers_of_the_adapter_only(tiny_model, tmp_path):
    """Layer replication gives the base more layers, and two stacked parameters of one module get one wrapper inside the other."""
    config = copy.deepcopy(tiny_model.config)
    settings = {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]}
    folder = trained(tiny_model, tmp_path / "replicated", **settings)
    assert check_adapter_folder(folder, config).codes == []
    reconfigure(folder, layer_replication=None)
    assert check_adapter_folder(folder, config).codes == ["layer_not_in_base"]

    experts = transformers.GptOssConfig(
        **SMALL, num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1
    )
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    settings = {"target_modules": ["q_proj"], "target_parameters": parameters}
    folder = trained(transformers.GptOssForCausalLM(experts), tmp_path / "experts", **settings)
    assert check_adapter_folder(folder, experts).codes == []
    experts.num_local_experts = 4
    assert check_adapter_folder(folder, experts).codes == ["shape_mismatch"]


def test_a_base_of_another_library(tmp_path):
    """Any module may be a base, with an adapter in it or not; its numbers are not copied."""
    base = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
    folder = trained(base, tmp_path, target_modules=["0"])
    assert check_adapter_folder(folder, torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))).codes == []
    assert check_adapter_folder(folder, torch.nn.Sequential(torch.nn.Linear(6, 4))).codes == ["shape_mismatch"]
