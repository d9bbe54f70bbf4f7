"""Five loops that train LoRA on two processes, of which four let the adapters drift apart. Lesson 11 runs this with torchrun:
read it after you have said which run has which fault.

    torchrun --standalone --nproc-per-node 2 -m course_utils.drifting
"""

import json

from course_utils import data, paths, runtime

runtime.quiet_imports()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

STEPS = 3
RUNS = ("a", "b", "c", "d", "mended")


def batch(rank):
    """Eight rows of its own for each process, as the model takes them."""
    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    rows = data.load_task("sailor", "train").select(range(8 * rank, 8 * rank + 8))
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    made = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    return {**made, "labels": labels}


def apart(tensors):
    """How far the two processes are apart in these tensors: |difference| / |tensors|, and in how many of them at all."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    first, second = torch.empty_like(flat), torch.empty_like(flat)
    dist.all_gather([first, second], flat)
    sizes = [tensor.numel() for tensor in tensors]
    differ = [not torch.equal(one, other) for one, other in zip(first.split(sizes), second.split(sizes))]
    return {"apart": ((first - second).norm() / first.norm()).item(), "tensors": sum(differ)}


def run(name, rank):
    """Train a few steps in one way; what is apart at the start, in the first gradients, and in the adapters after each step."""
    torch.manual_seed(rank if name in ("c", "mended") else 0)
    model = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    names, trained = zip(*((key, weight) for key, weight in model.named_parameters() if weight.requires_grad))
    if name == "mended":
        model = DistributedDataParallel(model)
    last_layer = f"layers.{model.config.num_hidden_layers - 1}." if name == "d" else None
    averaged = {"a": [], "mended": []}.get(
        name, [w for k, w in zip(names, trained) if not last_layer or last_layer not in k]
    )
    optimizer = torch.optim.SGD(trained, lr=0.5 * (1 + rank) if name == "b" else 0.5)
    found = {"start": apart(trained), "of": len(trained)}
    rows = batch(rank)
    for step in range(1, STEPS + 1):
        model(**rows).loss.backward()
        for weight in averaged:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        if step == 1:
            found["gradients"] = apart([weight.grad for weight in trained])
        optimizer.step()
        optimizer.zero_grad()
        found[f"step {step}"] = apart(trained)
    return found


def main():
    """All runs; the first process writes what was found to drifting.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: run(name, dist.get_rank()) for name in RUNS}
    if dist.get_rank() == 0:
        with open("drifting.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
