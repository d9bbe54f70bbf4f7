"""A model written as GGUF is, read back, the model that was written."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_checks.errors import InputError
from architectures import ARCHITECTURES
from course_utils import paths
from course_utils.gguf_file import no_reading_bar, rounded_to_4_bits, write_gguf

BASE = paths.models_dir() / "base"


def read(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


def test_reading_shows_a_bar_unless_told_not_to(tmp_path, capfd):
    write_gguf(BASE, tmp_path / "model.gguf")
    capfd.readouterr()
    with no_reading_bar():
        read(tmp_path / "model.gguf")
    assert "GGUF" not in capfd.readouterr().err
    read(tmp_path / "model.gguf")
    assert "GGUF" in capfd.readouterr().err


def test_weights_tokens_and_template_come_back_as_they_were(tmp_path):
    write_gguf(BASE, tmp_path / "model.gguf")
    back, base = read(tmp_path / "model.gguf"), AutoModelForCausalLM.from_pretrained(BASE)
    weights = base.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in back.state_dict().items())
    ours = AutoTokenizer.from_pretrained(BASE)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Zoë's 3 maps\n are WHERE?"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)
    text = ours.apply_chat_template(messages, tokenize=False)
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert (back.config.eos_token_id, theirs.eos_token) == (ours.eos_token_id, ours.eos_token)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_without_the_permutation_only_queries_and_keys_differ(tmp_path):
    write_gguf(BASE, tmp_path / "model.gguf", permute=False)
    back, weights = read(tmp_path / "model.gguf"), AutoModelForCausalLM.from_pretrained(BASE).state_dict()
    other = {name for name, weight in back.state_dict().items() if not torch.equal(weight, weights[name])}
    assert other == {name for name in weights if "q_proj" in name or "k_proj" in name}


def test_fewer_heads_of_keys_than_of_queries(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    config = model.config
    config.num_key_value_heads = 2
    grouped = AutoModelForCausalLM.from_config(config)
    grouped.save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base", tmp_path / "model.gguf")
    back, weights = read(tmp_path / "model.gguf"), grouped.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in back.state_dict().items())


@pytest.mark.parametrize("change", ["architecture", "rope", "tokenizer"])
def test_others_are_refused(tmp_path, change):
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    if change == "architecture":
        config = AutoTokenizer.from_pretrained(BASE)
        ARCHITECTURES["Qwen2"].make().save_pretrained(folder)
        config.save_pretrained(folder)
    elif change == "rope":
        text = (
            (folder / "config.json")
            .read_text()
            .replace('"rope_type": "default"', '"rope_type": "linear", "factor": 2.0')
        )
        (folder / "config.json").write_text(text)
    else:
        text = (
            (folder / "tokenizer.json").read_text(encoding="utf-8").replace('"use_regex":true', '"use_regex":false', 1)
        )
        text = text.replace('"use_regex": true', '"use_regex": false', 1)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="convert_hf_to_gguf"):
        write_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_four_bits_are_sixteen_values_in_each_block_of_32():
    base = AutoModelForCausalLM.from_pretrained(BASE)
    rounded = dict(rounded_to_4_bits(AutoModelForCausalLM.from_pretrained(BASE)).named_parameters())
    for name, weight in base.named_parameters():
        if weight.ndim < 2:
            assert torch.equal(rounded[name], weight)
            continue
        blocks, found = weight.detach().view(-1, 32)[:500], rounded[name].detach().view(-1, 32)[:500]
        largest = blocks.abs().amax(1, keepdim=True)
        assert ((found - blocks).abs() <= largest / 8 * 1.01 + 1e-6).all() and not torch.equal(found, blocks)
        assert max(len(block.unique()) for block in found) <= 16


@pytest.mark.parametrize("engine, equal", [("GGUF", 3), ("GGUF, not permuted", 0), ("bfloat16", 3)])
def test_an_engine_is_compared_with_pytorch(engine, equal, monkeypatch, tmp_path):
    from experiments import engines

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    monkeypatch.setattr(engines, "ROWS", 3)
    assert engines.measure(seed=1, engine=engine) == {"rows": 3, "equal": equal, "right": equal, "right_pytorch": 3}
