"""Random models of many architectures, each small enough to be made anew in a test."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Architecture:
    """kind and config: names of classes of transformers; targets: names of layers that LoRA usually goes on; task: PEFT's."""

    kind: str
    config: str
    targets: list
    settings: dict = field(default_factory=dict)
    task: str | None = "CAUSAL_LM"
    inputs: tuple = ("input_ids",)

    def make(self, seed=0) -> Any:
        torch.manual_seed(seed)
        return getattr(transformers, self.kind)(getattr(transformers, self.config)(**self.settings)).eval()

    def example(self) -> dict:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, 60, (2, 6), generator=generator)
        numbers = {
            "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
            "input_features": torch.randn(2, 8, 16, generator=generator),
        }
        return {name: numbers.get(name, ids) for name in self.inputs}


VOCABULARY = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "initializer_range": 0.3}
TEXT = VOCABULARY | SIZE | {"num_hidden_layers": 2, "max_position_embeddings": 64}
LLAMA = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
IMAGE = SIZE | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
SELF_ATTENTION = ["q_proj", "v_proj"]

ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig", ["q_proj", "down_proj"], LLAMA),
    "Qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", SELF_ATTENTION, LLAMA | {"tie_word_embeddings": True}),
    "Qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", SELF_ATTENTION, LLAMA),
    "Gemma 3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", SELF_ATTENTION, LLAMA | {"sliding_window": 4}),
    "Phi": Architecture("PhiForCausalLM", "PhiConfig", ["q_proj", "dense"], TEXT),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig", SELF_ATTENTION, LLAMA),
    "GPT-2": Architecture("GPT2LMHeadModel", "GPT2Config", ["c_attn"], VOCABULARY | {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", ["query_key_value"], TEXT),
    "Mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", SELF_ATTENTION, LLAMA | {"num_local_experts": 2}),
    "Qwen3-MoE": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", [*SELF_ATTENTION, "gate_proj", "up_proj", "down_proj"], LLAMA | EXPERTS),
    "GPT-OSS": Architecture("GptOssForCausalLM", "GptOssConfig", SELF_ATTENTION, LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "Jamba": Architecture("JambaForCausalLM", "JambaConfig", ["q_proj", "in_proj", "down_proj"], LLAMA | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 3, "num_experts": 2, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4}),
    "Qwen3-Next": Architecture("Qwen3NextForCausalLM", "Qwen3NextConfig", ["q_proj", "in_proj_qkvz", "out_proj"], LLAMA | EXPERTS | {"shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}),
    "BERT": Architecture("BertModel", "BertConfig", ["query", "value"], TEXT, "FEATURE_EXTRACTION"),
    "BERT classifier": Architecture("BertForSequenceClassification", "BertConfig", ["query", "value"], TEXT | {"num_labels": 3}, "SEQ_CLS"),
    "BERT tokens": Architecture("BertForTokenClassification", "BertConfig", ["query"], TEXT | {"num_labels": 3}, "TOKEN_CLS"),
    "BERT answers": Architecture("BertForQuestionAnswering", "BertConfig", ["query"], TEXT, "QUESTION_ANS"),
    "RoBERTa": Architecture("RobertaForMaskedLM", "RobertaConfig", ["query", "key"], TEXT | {"pad_token_id": 1}, None),
    "Llama classifier": Architecture("LlamaForSequenceClassification", "LlamaConfig", SELF_ATTENTION, LLAMA | {"num_labels": 3}, "SEQ_CLS"),
    "T5": Architecture("T5ForConditionalGeneration", "T5Config", ["q", "v"], VOCABULARY | {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 3.0}, "SEQ_2_SEQ_LM"),
    "ViT": Architecture("ViTForImageClassification", "ViTConfig", SELF_ATTENTION, IMAGE, None, ("pixel_values",)),
    "CLIP": Architecture("CLIPModel", "CLIPConfig", SELF_ATTENTION, {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}, None, ("input_ids", "pixel_values")),
    "Whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", SELF_ATTENTION, VOCABULARY | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 8, "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": [], "init_std": 0.3}, None, ("input_features",)),
    "Llava": Architecture("LlavaForConditionalGeneration", "LlavaConfig", SELF_ATTENTION, {"text_config": transformers.LlamaConfig(**LLAMA), "vision_config": transformers.CLIPVisionConfig(**IMAGE, projection_dim=16), "image_token_index": 63}, None),
}  # fmt: skip
