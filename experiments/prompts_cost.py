"""What do virtual tokens cost at every call? Time of an answer and places of the context, beside LoRA merged and not.

Each call answers the same 32 prompts of `reading` with exactly NEW tokens. The median of CALLS calls counts; the first is left out.
"""

import statistics
import time

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig

from adapter_checks.generation import padded
from course_utils import data, runtime
from experiments import training

ROWS, NEW, CALLS = 32, 16, 9
METHODS = (
    ("base or merged", 0),
    ("lora_8", 0),
    *(("prompt", tokens) for tokens in (5, 20, 50, 100, 200)),
    *(("prefix", tokens) for tokens in (20, 100)),
)
RUNS = [{"seed": seed, "method": method, "tokens": tokens} for seed in training.SEEDS for method, tokens in METHODS]


def measure(seed, method, tokens):
    """Columns: seconds of a call, and how many places of the context its virtual tokens take."""
    runtime.seed_everything(seed)
    model, tokenizer = training.load_base()
    configs = {
        "lora_8": lambda: LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        "prompt": lambda: PromptTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM"),
        "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM"),
    }
    if method in configs:
        model = get_peft_model(model, configs[method]())
    rows = data.load_task("reading", "test").select(range(ROWS))
    encoded = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    ids, mask = padded(model, tokenizer, encoded, side="right")  # the sums are the same, whichever side
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **ends)
    seconds = []
    with torch.no_grad():
        for _ in range(CALLS + 1):
            began = time.perf_counter()
            model.eval().generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            seconds.append(time.perf_counter() - began)
    return {"seconds_per_call": statistics.median(seconds[1:]), "prompt_tokens": ids.shape[1]}
