"""Do engines that serve a model give the greedy replies of PyTorch?

The base with the `reading` adapter merged, asked 50 test questions drawn by the seed: behind `transformers serve`, from a GGUF file read by
transformers and by llama.cpp, both with queries and keys in llama.cpp's order and without, and with weights rounded to 16 and 4 bits.
llama.cpp needs `pip install llama-cpp-python`, which builds it with a compiler; the committed rows were made with version 0.3.36.
"""

import random
import tempfile
from pathlib import Path

import torch
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_checks.generation import generate
from course_utils import data, paths
from course_utils.gguf_file import rounded_to_4_bits, write_gguf
from course_utils.model_server import serving
from course_utils.tasks import get_task

ROWS = 50
ENGINES = ("server", "GGUF", "GGUF, not permuted", "llama.cpp", "llama.cpp, not permuted", "bfloat16", "4 bits")
RUNS = [{"seed": seed, "engine": engine} for seed in (0, 1, 2) for engine in ENGINES]
TOKENS = get_task("reading").max_new_tokens


def merged_model(folder):
    """Save the merged model with its tokenizer to `folder`, and return both."""
    base = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype="float32")
    model = PeftModel.from_pretrained(base, paths.adapter_path("reading")).merge_and_unload().eval()
    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def by_server(folder, prompts):
    """The replies of `transformers serve`."""
    with serving("--device", "cpu", "--dtype", "float32") as address:
        client = OpenAI(base_url=address, api_key="not needed", max_retries=0)
        return [
            client.chat.completions.create(model=str(folder), messages=prompt, temperature=0, max_tokens=TOKENS)
            .choices[0]
            .message.content
            for prompt in prompts
        ]


def by_llama_cpp(file, prompts):
    """The replies of llama.cpp, which applies the template in the file."""
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=512, verbose=False)
    try:
        told = [llama.create_chat_completion(prompt, max_tokens=TOKENS, temperature=0) for prompt in prompts]
    finally:
        llama.close()
    return [reply["choices"][0]["message"]["content"] for reply in told]


def by_gguf(file, prompts):
    """The replies of the file as transformers reads it."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return generate(model, tokenizer, prompts, max_new_tokens=TOKENS)


def measure(seed, engine):
    """Columns: rows asked, how many replies equal those of PyTorch in float32, and how many of each are right."""
    rows = random.Random(seed).sample(list(data.load_task("reading", "test")), ROWS)
    prompts, metric = [row["prompt"] for row in rows], get_task("reading").metric
    with tempfile.TemporaryDirectory(dir=paths.runs_dir()) as place:
        folder, file = Path(place, "merged"), Path(place, "model.gguf")
        model, tokenizer = merged_model(folder)
        wanted = generate(model, tokenizer, prompts, max_new_tokens=TOKENS)
        if "GGUF" in engine or "llama.cpp" in engine:
            write_gguf(folder, file, permute="not" not in engine)
            found = (by_gguf if "GGUF" in engine else by_llama_cpp)(file, prompts)
        elif engine == "server":
            found = by_server(folder, prompts)
        else:
            changed = model.to(torch.bfloat16) if engine == "bfloat16" else rounded_to_4_bits(model)
            found = generate(changed, tokenizer, prompts, max_new_tokens=TOKENS)

    def right(replies):
        return sum(metric(reply, row["completion"][0]["content"]) for reply, row in zip(replies, rows))

    equal = sum(one.strip() == other.strip() for one, other in zip(found, wanted))
    return {"rows": ROWS, "equal": equal, "right": right(found), "right_pytorch": right(wanted)}
