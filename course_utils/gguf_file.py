"""Write a model as one GGUF file, the format that llama.cpp, Ollama and LM Studio read.

For real models llama.cpp's own `convert_hf_to_gguf.py` does this, which knows each architecture and each tokenizer. This module does it
for models as plain as the course's, and refuses all others.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from adapter_checks.errors import InputError


def write_gguf(folder: str | os.PathLike[str], path: str | os.PathLike[str], permute: bool = True) -> None:
    """Write the model in `folder`, with its tokenizer and chat template, to the GGUF file `path`, in float32, whole or not at all.

    permute: transformers rotates the first half of a head's numbers with the second half (RoPE), llama.cpp each even one with the
    next. So the rows of queries and keys change places in the file; without that the file is whole and the model talks nonsense.

    Raises InputError if the model is no plain Llama with untouched RoPE, or its tokenizer no byte-level BPE split as GPT-2's.
    """
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer, config = AutoTokenizer.from_pretrained(folder), model.config
    parts = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    _refuse_others(config, parts)
    target = Path(path)
    fresh = target.with_name(f".{target.name}.part")
    writer = gguf.GGUFWriter(fresh, "llama")
    try:
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        _add_tokenizer(writer, tokenizer, parts, config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, weight in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # llama.cpp takes the embedding where the file has no output matrix
            kind = name.split(".")[-2]
            if permute and kind in heads:
                weight = _interleaved(weight, heads[kind])
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def _refuse_others(config, parts) -> None:
    plain = (
        config.model_type == "llama"
        and config.rope_parameters.get("rope_type") == "default"
        and not (config.attention_bias or config.mlp_bias)
    )
    split = parts["pre_tokenizer"] or {}
    as_gpt2 = (
        parts["model"]["type"] == "BPE"
        and split.get("type") == "ByteLevel"
        and split.get("use_regex")
        and not split.get("add_prefix_space")
        and not parts["normalizer"]
    )
    if not (plain and as_gpt2):
        raise InputError(
            "Only a plain Llama with a byte-level BPE tokenizer like GPT-2's can be written here. For other models run "
            "convert_hf_to_gguf.py, which comes with llama.cpp."
        )


def _add_tokenizer(writer, tokenizer, parts, size) -> None:
    import gguf

    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how text is cut into words before BPE
    writer.add_token_list([tokenizer.convert_ids_to_tokens(number) for number in range(size)])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in parts["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_chat_template(tokenizer.chat_template)


def _interleaved(weight, heads: int):
    """The rows of each head in llama.cpp's order: 0, half, 1, half + 1, …"""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


@contextlib.contextmanager
def no_reading_bar() -> Iterator[None]:
    """Inside the block transformers shows no bar while it reads a GGUF file.

    The bar is tqdm's own, which no setting of transformers turns off; in a saved notebook a broken widget is left of it.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    shown = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = shown


def rounded_to_4_bits(model):
    """Round the matrices of a model, in place, to what a GGUF file of type Q4_0 holds, and return it.

    A block of 32 numbers shares one scale, in float16, and each number takes 4 bits. Vectors, such as norms, stay as they are.
    """
    import gguf
    import torch

    kind = gguf.GGMLQuantizationType.Q4_0
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                packed = gguf.quantize(weight.float().cpu().numpy(), kind)
                weight.copy_(torch.from_numpy(gguf.dequantize(packed, kind)))
    return model
