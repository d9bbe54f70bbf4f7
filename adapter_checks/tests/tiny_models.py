"""A model and a tokenizer small enough to make anew in each test."""

import pytest

# For TrainingArguments and SFTConfig; TRL's own defaults, bf16 and activation checkpointing, are for a GPU.
CPU_TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "disable_tqdm": True,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tiny_tokenizer(merges=()):
    """One token a byte, and one for each pair in `merges`; four special tokens, and a chat template with generation markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(tokenizer, seed=0):
    """A random two-layer Llama, every linear dimension a multiple of 64, as kernels want it."""
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


def make_tiny_adapter(model, seed=1, **changes):
    """A LoRA adapter on all linear layers that changes the output, as if it had been trained; `model` is wrapped."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    adapted = get_peft_model(model, LoraConfig(**config))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted.eval()


@pytest.fixture(scope="session")
def tiny_folders(tiny_tokenizer, tmp_path_factory):
    """A folder with `base`, `adapter` and `merged`: a healthy set. Tests copy what they spoil."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("tiny folders")
    make_tiny_model(tiny_tokenizer).save_pretrained(root / "base")
    adapted = make_tiny_adapter(AutoModelForCausalLM.from_pretrained(root / "base"))
    adapted.save_pretrained(root / "adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    for folder in ("base", "merged"):
        tiny_tokenizer.save_pretrained(root / folder)
    return root
