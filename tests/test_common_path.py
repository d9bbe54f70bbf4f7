"""The path that every lesson takes, on small random models of architectures that people use, each with its kind of chat template."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from architectures import ARCHITECTURES
from course_utils import data, evaluation, paths, runtime, validation
from tiny_models import make_tiny_tokenizer

# How a turn is written: special tokens, then the template. `generation` marks what the loss falls on with assistant_only_loss.
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}\
{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_3 = """{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}\
{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role.') }}{% endif %}\
{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}{% generation %}\
{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}{% else %}\
{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
# An answer is preceded by a block of thoughts, which is empty in training, and left out of earlier turns.
THINKING = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}\
{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# template, tokens of its own, token at the beginning, token at the end of a turn
KINDS = {
    "ChatML": (CHATML, ["<|im_start|>", "<|endoftext|>"], None, "<|im_end|>"),
    "Llama 3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>", "<|eot_id|>"),
    "Gemma": (GEMMA, ["<start_of_turn>"], "<bos>", "<end_of_turn>"),
    "Mistral": (MISTRAL, [], "<s>", "</s>"),
    "thinking": (THINKING, ["<|im_start|>", "<|endoftext|>"], None, "<|im_end|>"),
}
TEMPLATES = {
    "Llama": "Llama 3",
    "Qwen2": "ChatML",
    "Qwen3": "thinking",
    "Gemma 3": "Gemma",
    "Phi": "ChatML",
    "Mistral": "Mistral",
    "GPT-NeoX": "ChatML",
    "GPT-2": "ChatML",
    "Qwen3-MoE": "thinking",
    "Qwen3-Next": "ChatML",
}


def tokenizer_with(kind):
    template, own, bos, eos = KINDS[kind]
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": eos, "additional_special_tokens": own} | ({"bos_token": bos} if bos else {})
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def base_folder(request, tmp_path, monkeypatch):
    """The folder of a model with its tokenizer, which COURSE_BASE_MODEL names."""
    tokenizer = tokenizer_with(TEMPLATES[request.param])
    chosen = ARCHITECTURES[request.param]
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}  # fmt: skip
    longer = {} if request.param == "GPT-2" else {"max_position_embeddings": 1024}
    model = replace(chosen, settings=chosen.settings | ends | longer).make()
    model.generation_config.update(**{name: ends[name] for name in ("eos_token_id", "pad_token_id")})
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("COURSE_BASE_MODEL", str(folder))
    return folder


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_the_path_of_the_lessons(base_folder, tmp_path):
    base_model = paths.base_model()
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    rows = data.load_task("reading", "train").select(range(8)).select_columns(["prompt", "completion"])
    report = validation.check_sft_data(rows, tokenizer)
    assert report.ok, report

    runtime.seed_everything(0)
    settings = SFTConfig(
        output_dir=str(tmp_path / "trainer"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=runtime.dtype())
    trainer = SFTTrainer(model=model, args=settings, peft_config=lora, train_dataset=rows, processing_class=tokenizer)
    for check in (validation.check_training, validation.check_supervision):
        report = check(trainer)
        assert report.ok, report
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    trained = trainer.model.eval()
    prompts = [row["prompt"] for row in rows.select(range(3))]
    inputs = tokenizer(["Who keeps the lantern?"], return_tensors="pt", return_token_type_ids=False)
    assert validation.check_changes_output(trained, inputs).ok
    trained.save_pretrained(tmp_path / "adapter")
    assert (report := validation.check_adapter_folder(tmp_path / "adapter", base_model)).ok, report
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trained(**inputs).logits)
    answers = evaluation.generate(loaded, tokenizer, prompts, max_new_tokens=6)
    assert answers == [evaluation.generate(loaded, tokenizer, [one], max_new_tokens=6)[0] for one in prompts]

    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    report = validation.check_merged_folder(base_model, tmp_path / "adapter", tmp_path / "merged")
    assert report.ok, report
