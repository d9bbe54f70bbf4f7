"""How much memory does a merge take, in one piece and by shards? `peak_mb` is what it adds at its highest point.

On random Llamas of some blocks, in shards of 50 MB, since the course's model is too small to tell. Each merge has a process of its own,
which merges the course's model first, so that loading the libraries doesn't count, and is looked at every millisecond. The seed repeats.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from course_utils import paths, runtime
from experiments import training

SHARD = "50MB"
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
RUNS = [{"seed": seed, "blocks": blocks} for seed in training.SEEDS for blocks in (2, 4, 8)]
MEASURE = """
import sys, threading, time
import psutil
from adapter_checks import merging
merge, small, large, out = getattr(merging, sys.argv[1]), sys.argv[2:4], sys.argv[4:6], sys.argv[6]
merge(*small, out + "_small")
process, done = psutil.Process(), threading.Event()
before = peak = process.memory_info().rss
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
merge(*large, out)
done.set()
watcher.join()
print((peak - before) / 1e6)
"""


def make_large(folder, blocks, seed):
    """A random model in shards under `folder`/base, and a random adapter for it under `folder`/adapter."""
    runtime.seed_everything(seed)
    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=blocks, **SIZES))
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")


def measure(seed, blocks):
    """A row for each way of merging."""
    measured = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        make_large(folder, blocks, seed)
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")) / 1e6
        folders = [paths.base_model(), paths.adapter_path("sailor"), folder / "base", folder / "adapter"]
        for way in ("merge_whole", "merge_by_shards"):
            child = subprocess.run(
                [sys.executable, "-c", MEASURE, way, *map(str, folders), str(folder / way)],
                capture_output=True,
                text=True,
            )
            if child.returncode:
                raise RuntimeError(f"The process that was to measure {way} ended: {child.stderr[-500:]}")
            measured.append({"way": way, "model_mb": size, "peak_mb": float(child.stdout.split()[-1])})
    return measured
