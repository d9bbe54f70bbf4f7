"""What do LoRA and QLoRA cost on models of real size? Tokens a second and peak memory, beside what `estimate_memory` predicts.

Each is measured twice: in a plain loop, and in TRL's SFTTrainer on the same model.

    python -m experiments.real_sizes           on a CUDA GPU; nothing is downloaded

The models have the shapes of Llama 3.2 1B and Llama 3.1 8B and random weights, which cost as much as learned ones. Each step
takes one row of 2,048 random tokens, with activation checkpointing, in bfloat16. The disk needs room for 16 GB, the card 24 GB.
It is no sweep of `experiments.run`, whose results need no GPU. Rows go to real_sizes.csv beside theirs, a seed each, with the card's name.
"""

import gc
import itertools
import os
import shutil
import sys
import tempfile
import time

from adapter_checks.bitsandbytes_workarounds import stop_repacking
from adapter_checks.errors import InputError
from course_utils import paths, runtime
from experiments import harness

LENGTH, STEPS, WARM_UP, RATE = 2048, 10, 3, 1e-4
SHAPES = {
    "1B": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, tie_word_embeddings=True
    ),
    "8B": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}
COMMON = dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
RUNS = [
    {"seed": seed, "size": size, "method": method}
    for size, method, seed in itertools.product(SHAPES, ("lora", "qlora"), (0, 1, 2))
]


def load(config, method, device):
    """A model of this config with random weights in bfloat16, for QLoRA in NF4 with double quantisation, and an adapter of rank 16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if method == "qlora":
        with tempfile.TemporaryDirectory(dir=paths.runs_dir()) as folder:
            model.save_pretrained(folder)
            del model
            settings = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            model = stop_repacking(
                AutoModelForCausalLM.from_pretrained(
                    folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": device}
                )
            )
    model.activation_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train(), lora


def plain_loop(model, length):
    """Tokens a second of forward pass, backward pass and AdamW."""
    import torch

    on_gpu = model.device.type == "cuda"
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            if on_gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    return STEPS * length / (time.perf_counter() - began)


def with_trl(model, length):
    """Tokens a second of SFTTrainer, with its own loss, metrics and data loader, at the same steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from experiments.training import StepClock

    on_gpu, clock = model.device.type == "cuda", StepClock()
    SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(paths.runs_dir() / "experiments" / "trainer"),
            max_steps=WARM_UP + STEPS,
            per_device_train_batch_size=1,
            learning_rate=RATE,
            max_length=length,
            save_strategy="no",
            **runtime.trainer_settings() | {"use_cpu": not on_gpu, "bf16": on_gpu, "activation_checkpointing": True},
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": torch.randint(model.config.vocab_size, (WARM_UP + STEPS, length)).tolist()}
        ),
        processing_class=AutoTokenizer.from_pretrained(paths.base_model()),  # for padding; the rows are tokens
        callbacks=[clock],
    ).train()
    return length / clock.seconds_per_step()


def measure(seed, size, method, device="cuda", length=LENGTH):
    """Columns: tokens_a_second and peak_gb, as CUDA counts it (0 on a CPU), of either loop, and predicted_gb."""
    import torch
    from transformers import AutoConfig

    from adapter_checks.memory import estimate_memory

    runtime.seed_everything(seed)
    config = AutoConfig.for_model("llama", **COMMON | SHAPES[size])
    model, lora = load(config, method, device)
    found = {}
    for prefix, loop in (("", plain_loop), ("trl_", with_trl)):
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found[f"{prefix}tokens_a_second"] = loop(model, length)
        found[f"{prefix}peak_gb"] = (
            torch.cuda.max_memory_allocated() / 1e9 if torch.device(device).type == "cuda" else 0.0
        )
    predicted = estimate_memory(
        config,
        method,
        lora,
        batch_size=1,
        sequence_length=length,
        dtype="bfloat16",
        gradient_checkpointing=True,
        double_quantization=method == "qlora",
    )
    return found | {"predicted_gb": predicted.total / 1e9}


def main():
    """Do the runs that have no row yet. Raises InputError without a CUDA GPU, or without room on the disk."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("This needs a CUDA GPU, and torch sees none here. Nothing was run.")
    if shutil.disk_usage(paths.runs_dir()).free < 20e9:
        raise InputError(
            f"Less than 20 GB are free in {paths.runs_dir()}, and the 8B model is written there for QLoRA."
        )
    os.environ["COURSE_DEVICE"] = "cuda"  # so that the card is named in each row
    harness.prepare()
    harness.sweep("real_sizes", RUNS, measure, base="random weights")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{error}")
