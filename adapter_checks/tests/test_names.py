"""Names that mean the same module or base, and those that only look alike."""

import pytest

from adapter_checks.model_folder import is_hub_id
from adapter_checks.names import plain_name, same_base


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("base_model.model.base_model.model.lm_head", "lm_head"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens.weight"),
        ("model.base_model.model.up_proj", "model.base_model.model.up_proj"),
    ],
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("org/name", "/models/name/", True),
        ("org/name", "C:\\models\\name\\", True),
        ("org/name", "another/name", True),
        ("org/name", "org/name-it", False),
        ("org/name", "name/org", False),
        ("org/name", f"/home/user/.cache/huggingface/hub/models--org--name/snapshots/{'0' * 40}", True),
        ("org/a--name", f"/cache/models--org--name/snapshots/{'0' * 40}/", False),
        ("org/name", f"/models--org--name/snapshots/{'0' * 40}/merged", False),
        ("org/Model-8B", "org/model-8b", True),
        ("unsloth/model-8b-bnb-4bit", "org/Model-8B", True),
        ("unsloth/model-8b-unsloth-bnb-4bit", "unsloth/model-8b", True),
        ("org/Model-8B-GPTQ-Int4", "org/Model-8B", True),
        ("org/Model-8B-AWQ", "org/Model-8B-Instruct", False),
    ],
)
def test_names_of_one_base(one, other, same):
    assert same_base(one, other) is same_base(other, one) is same


@pytest.mark.parametrize("name", ["organisation/name", "Org.x/na_me-1.5B"])
def test_hub_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name)
    (tmp_path / name.split("/")[0]).mkdir()
    assert not is_hub_id(name), "the first part is a folder here, so this is a mistyped path"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gpt2",
        "./a",
        "../a",
        "a/b/c",
        "/a",
        "a/",
        "~/a",
        "a\\b",
        "C:/a",
        "a--b/c",
        "a/b.git",
        "a b/c",
        "ä/b",
        None,
        3,
        b"a/b",
    ],
)
def test_what_is_no_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name)
