"""Tokens that were added: to the base, to the tokenizer, to both, and what of them was saved with the adapter."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_checks import check_adapter_folder
from tiny_models import make_tiny_adapter

ROWS = 260


@pytest.fixture
def base(tiny_folders):
    def load(rows=ROWS):
        model = AutoModelForCausalLM.from_pretrained(tiny_folders / "base")
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    return load


@pytest.fixture
def saved(base, tmp_path, tiny_folders):
    """An adapter trained on a base of so many rows, with a tokenizer that has `added` tokens more."""

    def save(rows=ROWS, added=(), pad=None, embeddings=False, **settings):
        folder = tmp_path / f"adapter {len(list(tmp_path.iterdir()))}"
        model = make_tiny_adapter(base(rows), **{"target_modules": ["q_proj"]} | settings)
        for name, weight in model.named_parameters():
            if "lora_embedding_A" in name:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(folder, save_embedding_layers=embeddings)
        tokenizer = AutoTokenizer.from_pretrained(tiny_folders / "base")
        tokenizer.add_tokens(list(added))
        if pad:
            tokenizer.add_special_tokens({"pad_token": pad})
        tokenizer.save_pretrained(folder)
        return folder

    return save


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize(("trained", "loaded"), [(ROWS + 4, ROWS), (ROWS, ROWS + 4), (ROWS, 320)])
def test_lora_on_a_vocabulary_of_another_size(target, trained, loaded, saved, base):
    folder = saved(trained, target_modules=["q_proj", target])
    assert check_adapter_folder(folder, base(trained)).codes == []
    report = check_adapter_folder(folder, base(loaded))
    assert report.codes == ["vocab_mismatch"]
    assert f"{trained} rows in the file and {loaded} in this base" in message(report, "vocab_mismatch")


def test_a_base_of_another_size_altogether(saved, base, tiny_model):
    folder = saved(target_modules=["q_proj", "lm_head"])
    smaller = type(tiny_model)(type(tiny_model.config)(**tiny_model.config.to_dict() | {"hidden_size": 32}))
    assert "shape_mismatch" in check_adapter_folder(folder, smaller).codes


@pytest.mark.parametrize(
    "settings",
    [
        {"embeddings": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [260, 261, 262, 263]},
    ],
)
def test_rows_that_were_saved_and_a_base_without_them(settings, saved, base):
    folder = saved(ROWS + 4, ["<a>", "<b>", "<c>", "<d>"], **settings)
    tokens = "trainable_token_indices" in settings
    assert check_adapter_folder(folder, base(ROWS + 4)).codes == []
    report = check_adapter_folder(folder, base())
    assert report.codes == ["token_outside" if tokens else "vocab_mismatch"]


def test_rows_that_were_not_saved(saved, base, tiny_folders):
    """The embedding was enlarged for the training, its new rows began at random, and are lost."""
    folder = saved(ROWS + 4, ["<a>", "<b>", "<c>", "<d>"])
    for plain in (base(), tiny_folders / "base"):
        report = check_adapter_folder(folder, plain)
        assert report.codes == ["tokenizer_larger"]
        assert "has 264 tokens, the base's embedding 260 rows" in message(report, "tokenizer_larger")
    report = check_adapter_folder(folder, base(ROWS + 4))
    assert report.ok and report.codes == ["rows_not_saved"] and "4 tokens" in message(report, "rows_not_saved")


def test_new_tokens_in_rows_that_were_free(saved, base, tiny_folders):
    """A base padded to 320 rows has a row for each new token, which nothing trained."""
    assert check_adapter_folder(saved(320, ["<a>"]), base(320)).codes == ["rows_not_saved"]
    for healthy in (
        saved(320, ["<a>"], trainable_token_indices=[260]),
        saved(320, ["<a>"], target_modules=["q_proj", "embed_tokens"]),
        saved(320, ["<a>"], modules_to_save=["embed_tokens"]),
        saved(320, pad="<fill>"),
        saved(320),
    ):
        assert check_adapter_folder(healthy, base(320)).codes == []
    assert check_adapter_folder(saved(320, ["<a>"], trainable_token_indices=[3]), base(320)).codes == ["rows_not_saved"]


def test_a_padding_token_beyond_the_embedding(saved, base):
    """It is never looked at, and looked up all the same."""
    assert check_adapter_folder(saved(pad="<fill>"), base()).codes == ["tokenizer_larger"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": [["a", 0.5]]}, "added_tokens": null}']
)
def test_tokenizers_of_other_kinds(text, saved, base):
    folder = saved()
    (folder / "tokenizer.json").write_text(text)
    assert check_adapter_folder(folder, base()).codes == []
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [[str(i), -1.0] for i in range(300)]}}))
    assert check_adapter_folder(folder, base()).codes == ["tokenizer_larger"]


def test_tokens_beyond_the_base_in_the_configuration(saved, base):
    folder = shutil.copytree(saved(trainable_token_indices={"embed_tokens": [1, 2]}), saved().parent / "copy")
    assert check_adapter_folder(folder, base()).codes == []
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": {"embed_tokens": [1, 270]}}))
    report = check_adapter_folder(folder, base())
    assert report.codes == ["token_outside"] and "270" in message(report, "token_outside")
