"""What the tests share: a model and a tokenizer small enough to make anew in each test, and a folder for results."""

import os

# Before any library reads it: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib
import pytest

matplotlib.use("agg")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def results_elsewhere(tmp_path_factory):
    """Tests leave a learner's own `runs/` alone, and use the shipped base model unless they say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.delenv("COURSE_BASE_MODEL", raising=False)
        yield


def swept(name, column, *keys):
    """{setting: (mean, lowest, highest)} over the seeds of a committed sweep, by which the lessons' prose is held."""
    import importlib

    from course_utils import data, sweeps
    from experiments import harness

    rows, script = data.load_results(name), importlib.import_module(f"experiments.{name}")
    assert not harness.missing(rows, script.RUNS), f"the sweep {name} is not finished: python -m experiments.run {name}"
    return sweeps.over_seeds(rows, column, *keys)


def make_tiny_tokenizer():
    """One token a byte, four special tokens, and a chat template with generation markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(tokenizer, seed=0):
    """A random two-layer Llama, every linear dimension a multiple of 64 as in the shipped one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # with the usual 0.02 a random model repeats its input, which hides faults
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture
def tiny_model(tiny_tokenizer):
    return make_tiny_model(tiny_tokenizer)


@pytest.fixture
def tiny_model_folder(tiny_model, tiny_tokenizer, tmp_path):
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


# For the scripts of experiments/


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a random model whose context takes a few rows at one token a byte."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tiny_tokenizer()
    model = make_tiny_model(tokenizer)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def results(tiny_base, tmp_path, monkeypatch):
    """Where results go: with another base than the shipped one, never among the committed ones."""
    from experiments import harness

    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_base))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    assert harness.folder().is_relative_to(tmp_path)
    return harness.folder()


def set_constants(monkeypatch, sizes):
    """Set {module: {constant: value}} for the test."""
    for module, constants in sizes.items():
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)


@pytest.fixture
def short_rows(monkeypatch):
    """Eight short rows in the place of every split."""
    from course_utils import data

    load_task = data.load_task
    monkeypatch.setattr(
        data,
        "load_task",
        lambda task, split: (
            load_task(task, split).filter(lambda row: len(row["prompt"][0]["content"]) < 120).select(range(8))
        ),
    )
