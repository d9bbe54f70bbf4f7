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
        ("rank_pattern", None), ("alpha_pattern", None),
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
        ("lora_alpha", 8.5), ("target_modules", "all-linear"), ("target_modules", r".*_proj"),
        ("exclude_modules", []), ("modules_to_save", None), ("layers_to_transform", [0, 1]), ("layers_to_transform", None),
        ("rank_pattern", {}), ("rank_pattern", {"q_proj": 4}), ("rank_pattern", {r".*\.v_proj": 4}),
        ("alpha_pattern", {"q_proj": 0.5}), ("bias", "lora_only"), ("use_rslora", None),
        ("base_model_name_or_path", None), ("task_type", None), ("a_setting_of_tomorrow", None), ("merge_weights", False), ("enable_lora", []),
    ],
)  # fmt: skip
def test_what_peft_takes_is_healthy(name, value, adapter, tiny_folders):
    reconfigure(adapter, **{name: value})
    assert check_adapter_folder(adapter, tiny_folders / "base").codes == []


UNSET = {
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "auto_mapping": None,
    "revision": None,
}
PATTERNS = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
}


@pytest.mark.parametrize(
    "more",
    [
        {"modules_to_save": None, "enable_lora": None, "merge_weights": False},  # 0.3
        UNSET,  # 0.5
        UNSET | PATTERNS | {"use_rslora": False},  # 0.8
        UNSET | PATTERNS | {"use_rslora": False, "use_dora": False, "layer_replication": None},  # 0.13
        UNSET | PATTERNS | {"corda_config": None, "eva_config": None, "lora_bias": False, "target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"},  # 0.15
    ],
    ids=["0.3", "0.5", "0.8", "0.13", "0.15"],
)  # fmt: skip
def test_configurations_that_older_peft_wrote(more, adapter, tiny_folders):
    core = {
        "base_model_name_or_path": str(tiny_folders / "base"), "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "target_modules": NAMES, "task_type": "CAUSAL_LM", "inference_mode": True, "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(core | more))
    for base in (None, tiny_folders / "base"):
        assert check_adapter_folder(adapter, base).codes == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folders / "base"), adapter)
    assert all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)


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
        others = [] if targets == "all-linear" else ["not_targeted"]
        assert report.codes == [*others, "layers_not_covered"]
        assert "B with zeros" in message(report, "layers_not_covered")
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
    assert check_adapter_folder(adapter).codes == ["foreign_keys"]
    assert set(check_adapter_folder(adapter, base).codes) <= {"foreign_keys", "other_prefix"}
    rewrite(adapter, lambda tensors: {name: t for name, t in tensors.items() if "layers.1" not in name})
    assert "layers_not_covered" in check_adapter_folder(adapter, base).codes, "the wrapper hides nothing else"


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
    assert check_adapter_folder(folder, tmp_path / "base").codes == ["other_prefix"]


@pytest.mark.parametrize(
    ("made_on", "used_on", "words"),
    [
        ("BertModel", "BertForMaskedLM", "are called encoder.layer.0.attention.self.query and the like, and this base has bert.encoder"),
        ("BertForMaskedLM", "BertModel", "are called bert.encoder.layer.0.attention.self.query and the like, and this base has encoder"),
    ],
)  # fmt: skip
def test_an_encoder_alone_and_inside_another_model(made_on, used_on, words, tmp_path):
    config = transformers.BertConfig(**SMALL)
    folder = trained(getattr(transformers, made_on)(config), tmp_path, target_modules=["query"])
    report = check_adapter_folder(folder, getattr(transformers, used_on)(config))
    assert report.codes == ["other_prefix"] and words in message(report, "other_prefix")
    remedy = next(finding.remedy for finding in report.findings if finding.code == "other_prefix")
    assert ("put 'bert.' before" if made_on == "BertModel" else "take 'bert.' off") in remedy


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
    assert check_adapter_folder(folder, config).codes == ["other_prefix"]

    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
    )
    folder = shutil.copytree(folder, tmp_path / "mixtral")
    reconfigure(folder, target_modules=["w1", "w2", "w3"], auto_mapping=None)
    rewrite(
        folder,
        lambda _: {
            f"{START}model.layers.{layer}.block_sparse_moe.experts.{expert}.w{i}.lora_{factor}.weight": torch.full(
                shape, 0.1
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


def test_names_that_differ_by_their_beginning(tmp_path):
    """A text model's adapter on the model that sees, and the other way round: PEFT fills nothing and warns only."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(**SMALL),
        # as many layers of the same size and names as the text has
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, **vision),
        image_token_index=63,
    )
    text = trained(
        transformers.LlamaForCausalLM(config.text_config), tmp_path / "text", target_modules=["q_proj", "v_proj"]
    )
    sees = trained(
        transformers.LlavaForConditionalGeneration(config),
        tmp_path / "sees",
        target_modules=r".*language_model.*(q|v)_proj",
    )
    for folder, base, theirs, own in (
        (text, transformers.LlavaForConditionalGeneration(config), "model.", "model.language_model."),
        (sees, config.text_config, "model.language_model.", "model."),
    ):
        report = check_adapter_folder(folder, base)
        assert report.codes == ["other_prefix", *(["layers_not_covered"] if base is not config.text_config else [])], (
            report
        )
        assert f"called {theirs}layers.0" in message(report, "other_prefix")
        assert f"has {own}layers.0" in message(report, "other_prefix")
    rewrite(text, lambda tensors: {n.replace("layers.1", "layers.7"): t for n, t in tensors.items()})
    report = check_adapter_folder(text, transformers.LlavaForConditionalGeneration(config))
    assert "layer_not_in_base" in report.codes, "not the beginning alone"


# ------------------------------------------------------------------------------------------------ the configuration


def test_a_random_start_that_each_loading_repeats(adapter):
    reconfigure(adapter, init_lora_weights=False)
    report = check_adapter_folder(adapter)
    assert report.ok and report.codes == ["random_start"]


@pytest.mark.parametrize("value", [True, {"x": 1}, "newest", 3])
def test_settings_that_the_installed_peft_does_not_know(value, adapter):
    reconfigure(adapter, a_setting_of_tomorrow=value, peft_version="99.0.0")
    report = check_adapter_folder(adapter)
    assert report.ok and report.codes == ["unknown_settings"]
    said = message(report, "unknown_settings")
    assert "a_setting_of_tomorrow" in said and "written by PEFT 99.0.0" in said


@pytest.mark.parametrize(
    ("method", "words"), [("LORRA", "'LORRA'"), ("lora", "it has 'LORA'"), (["LORA"], "['LORA']"), (None, "None")]
)
def test_a_method_that_peft_does_not_know(method, words, adapter):
    reconfigure(adapter, peft_type=method)
    report = check_adapter_folder(adapter)
    assert report.codes == ["unknown_method"] and words in message(report, "unknown_method")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": NAMES[:2]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": NAMES, "layers_to_transform": [0]},
    ],
)
def test_tensors_that_the_configuration_does_not_target(changes, adapter, tiny_folders):
    """PEFT is asked as well: it makes no adapter there, and drops them."""
    reconfigure(adapter, **changes)
    assert check_adapter_folder(adapter).codes == ["not_targeted"]
    assert check_adapter_folder(adapter, tiny_folders / "base").codes == ["not_targeted"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folders / "base"), adapter)
    loaded = sum("lora_B" in name for name, _ in model.named_parameters())
    assert f"for {14 - loaded} layers" in message(check_adapter_folder(adapter), "not_targeted")


def test_no_targets_stand_for_peft_s_own(adapter, tiny_folders):
    reconfigure(adapter, target_modules=None)
    assert check_adapter_folder(adapter).codes == [], "which those are depends on the base"
    report = check_adapter_folder(adapter, tiny_folders / "base")
    assert report.codes == ["not_targeted"] and "for 10 layers" in message(report, "not_targeted")
    rewrite(adapter, lambda tensors: {n: t for n, t in tensors.items() if "q_proj" in n or "v_proj" in n})
    assert check_adapter_folder(adapter, tiny_folders / "base").codes == []


def test_a_whole_model_in_the_place_of_an_adapter(adapter, tiny_folders):
    report = check_adapter_folder(tiny_folders / "base")
    assert report.codes == ["whole_model"] and "and no adapter" in message(report, "whole_model")
    shutil.copy(tiny_folders / "base" / "config.json", adapter)
    assert check_adapter_folder(adapter).codes == ["merged_model_beside"]


def test_a_classifier_on_a_base_whose_head_is_new(adapter, classifier):
    """The configuration knows nothing of a head, and the file has none; only the base's class tells."""
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3,
    }  # fmt: skip
    base = LlamaForSequenceClassification(LlamaConfig(**settings))
    assert check_adapter_folder(classifier, base).codes == []
    rewrite(classifier, lambda tensors: {n: t for n, t in tensors.items() if "score" not in n})
    assert check_adapter_folder(classifier, base).codes == ["missing_tensors"]
    reconfigure(classifier, task_type=None, modules_to_save=None)
    report = check_adapter_folder(classifier, base)
    assert report.ok and report.codes == ["head_not_saved"] and "score" in message(report, "head_not_saved")
    base.config.architectures = ["LlamaForSequenceClassification"]
    assert check_adapter_folder(classifier, base).codes == []


# ------------------------------------------------------------------------------------------------ several processes


def each(change):
    return lambda tensors: {name: change(name, tensor) for name, tensor in tensors.items()}


def large_only(change):
    """As with a threshold below which tensors stay whole."""
    return lambda name, tensor: change(name, tensor) if tensor.numel() > 300 else tensor


def empty(name, tensor):
    return torch.zeros(0)


def flat_part(name, tensor):
    return tensor.flatten()[: tensor.numel() // 4]


@pytest.mark.parametrize("change", [empty, large_only(empty), flat_part, lambda name, tensor: tensor[:0]])
def test_weights_that_were_not_gathered(change, adapter, tiny_folders):
    """The other findings are there all the same."""
    reconfigure(adapter, base_model_name_or_path="someone/else", init_lora_weights=False)
    rewrite(adapter, each(change))
    assert check_adapter_folder(adapter).codes == ["random_start", "ungathered"]
    report = check_adapter_folder(adapter, tiny_folders / "base")
    assert report.codes == ["random_start", "ungathered", "base_mismatch"]
    assert "ZeRO-3, FSDP" in message(report, "ungathered")


def test_an_empty_file_has_two_causes(adapter):
    rewrite(adapter, lambda tensors: {})
    report = check_adapter_folder(adapter)
    assert report.codes == ["empty"] and "ZeRO-3, FSDP" in message(report, "empty")


@pytest.mark.parametrize(("processes", "rows"), [(2, 2), (4, 1), (3, 2)])
def test_one_process_s_rows(processes, rows, adapter, tiny_folders):
    rewrite(adapter, each(lambda name, tensor: tensor[: -(-len(tensor) // processes)]))
    for base in (None, tiny_folders / "base"):
        report = check_adapter_folder(adapter, base)
        assert report.codes == ["partial_shards"] and f"{rows} of 4 rows" in message(report, "partial_shards")


@pytest.mark.parametrize(("processes", "columns"), [(2, 2), (4, 1)])
def test_one_process_s_columns(processes, columns, adapter, tiny_folders):
    rewrite(adapter, each(lambda name, tensor: tensor[:, : tensor.shape[1] // processes]))
    for base in (None, tiny_folders / "base"):
        report = check_adapter_folder(adapter, base)
        assert report.codes == ["partial_shards"] and f"{columns} of 4 columns" in message(report, "partial_shards")


# Of layers that lie in parts on several processes these are cut along their inputs, the others along their outputs.
BEHIND = ("o_proj", "down_proj")


@pytest.mark.parametrize(("processes", "words"), [(2, "are half of"), (4, "are a 4th of")])
def test_one_process_s_part_of_each_layer(processes, words, adapter, tiny_folders):
    def part(name, tensor):
        behind = any(layer in name for layer in BEHIND)
        if behind and "lora_A" in name:
            return tensor[:, : tensor.shape[1] // processes]
        return tensor[: len(tensor) // processes] if "lora_B" in name and not behind else tensor

    rewrite(adapter, each(part))
    report = check_adapter_folder(adapter, tiny_folders / "base")
    assert report.codes == ["partial_shards"] and words in message(report, "partial_shards")


@pytest.mark.parametrize(
    "cut",
    [
        lambda name, t: t[:, :32] if "lora_A" in name else t[:32],  # a base of half the size
        lambda name, t: t[:32] if "v_proj.lora_B" in name else t,  # fewer heads for keys and values
        lambda name, t: t[:, :48] if "lora_A" in name else t,
        lambda name, t: t[:, :32] if "lora_A" in name and "layers.0" in name else t[:, :16] if "lora_A" in name else t,
        lambda name, t: t.repeat(1, 2) if "lora_A" in name else t,
    ],
)
def test_other_shapes_are_those_of_another_base(cut, adapter, tiny_folders):
    rewrite(adapter, each(cut))
    assert check_adapter_folder(adapter, tiny_folders / "base").codes == ["shape_mismatch"]


def test_ranks_that_are_short_in_one_layer_are_another_matter(adapter):
    rewrite(adapter, each(lambda name, tensor: tensor[:2] if "layers.0.mlp.up_proj.lora_A" in name else tensor))
    assert check_adapter_folder(adapter).codes == ["rank_mismatch"]


@pytest.mark.parametrize("part", [slice(0, 0.5), slice(0.5, 1), slice(0.25, 0.5)])
def test_rows_of_one_process_among_zeros(part, adapter):
    def keep(name, tensor):
        if "lora_B" not in name:
            return tensor
        kept = torch.zeros_like(tensor)
        rows = slice(int(part.start * len(tensor)), int(part.stop * len(tensor)))
        kept[rows] = tensor[rows]
        return kept

    rewrite(adapter, each(keep))
    report = check_adapter_folder(adapter)
    assert report.ok and report.codes == ["zero_rows"]
    assert f"only {part.stop - part.start:.0%}" in message(report, "zero_rows")


def test_zeros_here_and_there_are_healthy(adapter):
    """Rows of units that never fire, in other places in each layer."""

    def silence(name, tensor):
        if "lora_B" in name:
            tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(0))[: len(tensor) // 2]] = 0
        return tensor

    rewrite(adapter, each(silence))
    assert check_adapter_folder(adapter).codes == []


# ------------------------------------------------------------------------------------------------ numbers


def test_factors_that_are_zero(adapter):
    for factor in "AB":
        whole = each(lambda name, tensor, factor=factor: tensor * 0 if f"lora_{factor}" in name else tensor)
        part = each(lambda name, tensor, factor=factor: tensor * 0 if f"up_proj.lora_{factor}" in name else tensor)
        for change, code in ((part, f"partly_zero_{factor.lower()}"), (whole, f"zero_{factor.lower()}")):
            folder = shutil.copytree(adapter, adapter.parent / code)
            rewrite(folder, change)
            report = check_adapter_folder(folder)
            assert report.codes == [code] and f"{factor} is all zero" in message(report, code)


@pytest.mark.parametrize(
    ("named", "healthy"),
    [
        (lambda name: "layers.1" in name, True),  # 7 of 14
        (lambda name: "layers.1" in name or "layers.0.mlp.up_proj" in name, False),  # 8 of 14
        (lambda name: "mlp" in name, True),  # 6 of 14
    ],
)
def test_an_adapter_of_which_most_was_never_trained(named, healthy, adapter):
    """As reentrant checkpointing leaves it: only what lies behind the blocks learns."""
    rewrite(adapter, each(lambda name, tensor: tensor * 0 if "lora_B" in name and named(name) else tensor))
    report = check_adapter_folder(adapter)
    assert report.codes == ["partly_zero_b"] and report.ok is healthy


@pytest.mark.parametrize("part", ["mlp.experts.{}", "vision_tower.{}"])
def test_parts_that_may_rest_in_training(part, adapter):
    def silence(tensors):
        whole = f"{START}model.layers.0.mlp.up_proj.lora_"
        A, B = (tensors[f"{whole}{factor}.weight"] for factor in "AB")
        names = [f"{START}model.layers.0.{part.format(number)}.up_proj.lora_" for number in range(20)]
        return tensors | {f"{name}A.weight": A.clone() for name in names} | {f"{name}B.weight": B * 0 for name in names}

    reconfigure(adapter, target_modules=NAMES)
    rewrite(adapter, silence)
    report = check_adapter_folder(adapter)
    assert "20 of 34 layers" in message(report, "partly_zero_b") and report.ok


@pytest.mark.parametrize(
    ("settings", "factor"), [({}, 1000), ({"lora_alpha": 8000}, 1), ({"alpha_pattern": {".*": 8000}}, 1)]
)
def test_a_change_out_of_all_proportion(settings, factor, adapter):
    reconfigure(adapter, **settings)
    rewrite(adapter, each(lambda name, tensor: tensor * factor if "lora_B" in name else tensor))
    report = check_adapter_folder(adapter)
    assert report.ok and report.codes == ["huge_change"]
    assert "in 14 of 14 layers" in message(report, "huge_change").lower()


def test_the_size_of_a_change_against_a_direct_calculation(adapter):
    from safetensors import safe_open

    from adapter_checks.adapter_numbers import _changes

    module = f"{START}model.layers.0.mlp.up_proj"
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"up_proj": 12}, "use_rslora": True}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        A, B = (file.get_tensor(f"{module}.lora_{factor}.weight").double() for factor in "AB")
        found = _changes(file, config, set(file.keys()), [module])[module]
    inputs = torch.randn(100_000, A.shape[1], generator=torch.Generator().manual_seed(0)).double()
    assert found == pytest.approx((12 / 2 * inputs @ A.T @ B.T).square().mean().sqrt().item(), rel=0.01)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_may_not_be_read(name, adapter, monkeypatch):
    from pathlib import Path

    opened = Path.open

    def refuse(path, *given, **named):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", refuse)
    report = check_adapter_folder(adapter)
    assert report.codes == ["not_readable"] and f"{name} can't be read" in message(report, "not_readable")
