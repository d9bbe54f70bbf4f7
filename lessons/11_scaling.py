# %% [markdown]
# # Scale to more devices and more tenants
#
# At work a model may not fit into one GPU, a run may take too long on one, and hundreds of customers may each want an adapter.
# **What changes when one machine, or one model for one customer, is no longer enough?** Two processes on your CPU will stand
# for two GPUs.
#
# | | |
# |---|---|
# | **What you'll do** | train on two processes and count every byte they send; find a run that isn't what it claims to be; serve many adapters in one batch; plan for models of 8 and 70 billion parameters |
# | **What you'll learn** | what two ways to share the work, DDP and FSDP, split and send; how to move a batch to more devices; how to save weights that are split; what many adapters on one base cost |
# | **What you'll need** | [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`, [lesson 1](01_load_lora_adapter.ipynb) for several adapters; no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import collections
import json
import logging
import os
import random

from adapter_checks import memory
from course_utils import data, launch, paths, plotting, runtime, serving, sweeps, timing, validation
from course_utils.exercises import lesson11, progress

runtime.quiet_imports()
os.environ["COURSE_DEVICE"] = "cpu"  # two processes share this machine, whatever GPU it has

import accelerate
import peft
import torch
import transformers
from accelerate import cpu_offload, infer_auto_device_map, init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of offloading, which we ask for
torch.set_num_threads(1)  # as in each process below
RUN = paths.runs_dir() / "lesson11"
RUN.mkdir(parents=True, exist_ok=True)
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · accelerate {accelerate.__version__}"
)

# %% [markdown]
# ## One run on two processes
#
# In **data parallel** training each [process](../docs/glossary.md#process-rank), usually one for each GPU, holds the whole model and takes its own rows of each
# step. Then all processes average their gradients by an **all-reduce**, which adds up everybody's tensors and gives everybody
# the sum, and take the same optimizer step, so their weights stay equal. PyTorch calls this [DDP](../docs/glossary.md#ddp), and an operation in which
# all processes take part a [collective](../docs/glossary.md#collective).
#
# `torchrun` starts a script once for each process. The next two cells make this script. Each function imports what it needs,
# because a new process knows nothing of this notebook.


# %%
def train(rows_at_once, accumulation=1, distributed_config=None, **options):
    """Eight steps of LoRA on the task `sailor`; returns the trainer."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from course_utils import data, paths, runtime

    runtime.seed_everything(0)
    base = paths.base_model()
    rows = data.load_task("sailor", "train").select_columns(["prompt", "completion"])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, distributed_config=distributed_config),
        args=SFTConfig(
            output_dir=str(paths.runs_dir() / "lesson11" / "trainer"),
            max_steps=8,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=accumulation,
            learning_rate=5e-3,
            warmup_steps=4,
            save_strategy="no",
            ddp_find_unused_parameters=False,  # LoRA uses all that it trains
            **runtime.trainer_settings(),
            **options,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


# %%
def main():
    """In each process: train in the ways that the command line names, count bytes, and save."""
    import json
    import sys

    from course_utils import runtime

    runtime.quiet_imports()
    import torch
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    from adapter_checks import memory

    torch.set_num_threads(1)
    ways = {
        "DDP": {},
        "own_tokens": {"average_tokens_across_devices": False},
        "fsdp=True": {"fsdp": True},
        "fsdp_size=2": {"distributed_config": DistributedConfig(fsdp_size=2)},
    }
    for way in sys.argv[1:]:
        with memory.measure_collectives() as handed:
            trainer = train(rows_at_once=16, **ways[way])
        held = memory.measure_training_state(trainer.model, trainer.optimizer)
        trainer.save_model(way)
        if dist.get_rank() == 0:
            print(f"{way}: loss {trainer.state.log_history[-1]['train_loss']:.4f}", flush=True)
            in_a_step = {name: size // 8 for name, size in handed.items()}
            report = {"held": held.sizes(), "handed": in_a_step}
            with open(f"{way}.json", "w") as file:
                json.dump(report, file)
    dist.destroy_process_group()


launch.write_script(RUN / "train.py", train, main)

# %% [markdown]
# The next cell runs what you would type in a terminal. Of its four runs, you need the first two for now: plain DDP, and
# `own_tokens`, which is DDP with `average_tokens_across_devices=False`.

# %% tags=["measured"]
two = ("--standalone", "--nproc-per-node", "2")  # on this computer, with any free port
launch.torchrun(*two, "train.py", "DDP", "own_tokens", "fsdp=True", "fsdp_size=2", folder=RUN)

# %% [markdown]
# The next cell trains the same eight steps in one process, with 32 rows at once, and with 16 rows at once and two accumulated
# passes. In each run the [effective batch](../docs/glossary.md#effective-batch), the rows of one optimizer step over all devices and passes, is 32.
#
# **Predict:** which of these two adapters will be equal to DDP's to the bit?

# %%
train(rows_at_once=32).save_model(str(RUN / "one_32"))
train(rows_at_once=16, accumulation=2).save_model(str(RUN / "one_2x16"))


def relative_difference(one, other):
    """|a - b| / |a| over all tensors of two adapters."""
    a, b = (load_file(RUN / name / "adapter_model.safetensors") for name in (one, other))
    squares = sum((a[key] - b[key]).square().sum() for key in a)
    return (squares / sum(weight.square().sum() for weight in a.values())).sqrt().item()


compared = {
    "one process, 32 rows | two processes, 16 each (DDP)": ("one_32", "DDP"),
    "one process, 2 passes of 16 | DDP": ("one_2x16", "DDP"),
    "one process, 2 passes | DDP, average_tokens_across_devices=False": ("one_2x16", "own_tokens"),
}
apart = {label: relative_difference(*pair) for label, pair in compared.items()}
plotting.table(
    ["adapters of", "and of", "relative difference"],
    [
        [*label.split(" | "), f"{value:.1e}" if value else "0, to the bit"]
        for label, value in apart.items()
    ],
)

# %% [markdown]
# The adapter of two passes is equal, because one process with two passes and two processes with one pass add the same numbers
# in the same order. A batch of 32 adds them in another order, which changes the last digits.
#
# The third line is a real difference, and no error shows it. With `average_tokens_across_devices=False` each process divides by
# the number of *its own* tokens, so a token counts for more in the process that has fewer. Keep the default, `True`.
#
# **More devices don't change the result as long as the effective batch stays the same.** If it grows with them, choose the
# learning rate again.
#
# ### Exercise: move a batch to more devices (core, 10 min)
#
# A recipe asks for `effective` rows a step. Each of your `devices` devices has room for at most `fits` rows at once. Return
# `(rows at once, accumulation, steps)`: the rows at once on each device, as many as possible; the accumulated passes; and the
# optimizer steps of `epochs` epochs over `rows` rows. The last batch of an epoch may be smaller, and is a step of its own. If
# the devices can't share the effective batch equally, return `None`. Expected for 64, 4, 6, 1000, 3: `(4, 4, 48)`.
#
# <details><summary>The check says that my rows don't fit, or that there are too many in all</summary>
# Divide the effective batch by the devices first. Then look for the largest divisor of that share that is at most <code>fits</code>.
# </details>


# %% exercise="11.plan" points=3
def plan(effective, devices, fits, rows, epochs):
    """Return (rows at once, accumulation, optimizer steps), or None."""
    ### BEGIN SOLUTION
    if effective % devices:
        return None
    share = effective // devices
    at_once = max(size for size in range(1, min(fits, share) + 1) if share % size == 0)
    steps_an_epoch = -(-rows // effective)  # rounded up
    return at_once, share // at_once, epochs * steps_an_epoch
    ### END SOLUTION


lesson11.plan(plan)

# %%
### BEGIN HIDDEN TESTS
assert lesson11.plan.outcome(plan).passed
assert tuple(plan(128, 8, 5, 10_001, 2)) == (4, 4, 158)
assert plan(10, 4, 8, 100, 1) is None
### END HIDDEN TESTS

# %% [markdown]
# ## What each process holds and sends
#
# DDP splits only the rows: each process holds all weights, gradients and optimizer state. [FSDP](../docs/glossary.md#fsdp-sharding) (fully sharded data parallel,
# PyTorch's `fully_shard`) splits these as well. Just before a layer is used, an **all-gather** puts its weights together, once
# in the forward and once in the backward pass. Then a **reduce-scatter** adds up everybody's gradients and leaves each process
# its own part of the sum.
#
# The next script takes one step with LoRA and one with all weights, each under DDP and FSDP, and tries to save the adapters.


# %%
def share(model, strategy):
    """Let the processes share the work: DDP wraps a model, and fully_shard splits its weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if strategy == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def one_step(method, strategy):
    """The model after one step, what a process held, and what it handed over to collectives."""
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from adapter_checks import memory
    from course_utils import paths

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=torch.float32)
    if method == "lora":
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model = share(model, strategy)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(10, 1000, (4, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    with memory.measure_collectives() as handed:
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    if strategy == "FSDP":
        model.reshard()  # give back what was gathered
    held = memory.measure_training_state(model, optimizer)
    return model, {"held": held.sizes(), "handed": handed}


# %%
def save(model, strategy):
    """Save an adapter in the ways that people try; the first process says what came of it."""
    import warnings

    import torch.distributed as dist
    from peft import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    first = dist.get_rank() == 0
    if strategy == "DDP":
        if first:
            model.module.save_pretrained("DDP, model.module.save_pretrained")
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            model.save_pretrained("FSDP, model.save_pretrained")
    except Exception as error:
        if first:
            print(f"save_pretrained under FSDP: {type(error).__name__}: {error}", flush=True)
    own = {key: weight.to_local() for key, weight in get_peft_model_state_dict(model).items()}
    if first:
        model.save_pretrained("FSDP, this process's part", state_dict=own)
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if first:
        model.save_pretrained("FSDP, gathered first", state_dict=whole)


def compare():
    """In each process: one step in each way."""
    import json

    from course_utils import runtime

    runtime.quiet_imports()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for method in ("lora", "full"):
        for strategy in ("DDP", "FSDP"):
            model, found[f"{method} {strategy}"] = one_step(method, strategy)
            if method == "lora":
                save(model, strategy)
    if dist.get_rank() == 0:
        with open("compare.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


launch.write_script(RUN / "compare.py", share, one_step, save, compare)

# %% [markdown]
# **Predict:** LoRA trains 4% of the numbers here. To what share does it reduce the bytes handed over under DDP, and under FSDP?

# %% tags=["measured"]
launch.torchrun(*two, "compare.py", folder=RUN)

# %%
found = json.loads((RUN / "compare.json").read_text())
base_config = AutoConfig.from_pretrained(paths.base_model())
lora_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
rows, right = [], True
for case, measured in found.items():
    method, strategy = case.split()
    predicted = memory.estimate_memory(
        base_config,
        method,
        lora_config,
        batch_size=4,
        sequence_length=32,
        devices=2,
        strategy=strategy.lower(),
    )
    state = [measured["held"][part] for part in ("weights", "gradients", "optimizer")]
    right &= measured["handed"] == dict(predicted.collectives)
    right &= state == [predicted.weights, predicted.gradients, predicted.optimizer]
    handed = ", ".join(
        f"{name.replace('_', '-')} {size / 1e6:.2f}" for name, size in measured["handed"].items()
    )
    rows.append([case, *(f"{size / 1e6:.2f}" for size in state), handed])
plotting.table(["", "weights, MB", "gradients", "optimizer", "handed over in a step, MB"], rows)
print(f"estimate_memory predicts each of these numbers to the byte: {right}")

# %% tags=["claim"]
from peft import LoraConfig as _Lora
from transformers import AutoConfig as _Config

from adapter_checks.memory import estimate_memory as _estimate
from course_utils import paths as _paths

_eight = _Lora(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def _two(method, strategy):
    sizes = {"batch_size": 4, "sequence_length": 32, "devices": 2, "strategy": strategy}
    made = _estimate(_Config.from_pretrained(_paths.base_model()), method, _eight, **sizes)
    return sum(made.collectives.values())


fewer = _two("full", "ddp") / _two("lora", "ddp")
assert abs(_two("lora", "fsdp") / _two("full", "fsdp") - 2 / 3) < 0.02, "two thirds"

# %% [markdown]
# Under DDP only gradients travel, so LoRA reduces the bytes to {{1 / fewer:.0%}}, the share of the numbers that it trains. FSDP halves what a
# process holds, but with LoRA it still hands over two thirds of what it hands over with all weights, because the *frozen*
# weights are gathered, too, twice in each step.
# **LoRA makes DDP cheap, but not FSDP.** So use DDP while the base fits on each device, and FSDP when it doesn't.
#
# DeepSpeed's [ZeRO](../docs/glossary.md#zero) ([Rajbhandari et al. 2019](https://arxiv.org/abs/1910.02054)) splits the optimizer state (stage 1), also the gradients (2), and also the
# weights (3), as FSDP does. With LoRA, stages 1 and 2 save almost nothing, because an adapter's gradients and optimizer state are small.
#
# ## Save what lies in parts
#
# The script tried to save the adapter in four ways: from the DDP model; from the FSDP model by plain `save_pretrained`, which
# stopped with the error above; as the part of one process; and gathered first.
#
# **Predict:** which folders hold an adapter that you can load?

# %%
base = AutoModelForCausalLM.from_pretrained(paths.base_model())
rows = []
for folder in sorted(RUN.glob("*, *")):
    report = validation.check_adapter_folder(folder, base)
    weights = folder / "adapter_model.safetensors"
    size = f"{weights.stat().st_size / 1e6:.2f}" if weights.exists() else "no file"
    rows.append([folder.name, size, ", ".join(report.codes) or "fine"])
plotting.table(["saved as", "MB", "check_adapter_folder"], rows)

# %% [markdown]
# Two folders do: DDP's, and the one that was *gathered first*. One process's part has half of the rows of each matrix, which
# the check reports as `partial_shards`. To gather, *all* processes call `get_model_state_dict` with `full_state_dict=True`, and
# one of them writes.
#
# ## The run that wasn't sharded
#
# Two of the first four runs asked for *sharding*, that is, for weights that are split over the processes: one by
# `SFTConfig(fsdp=True)`, the other by `from_pretrained` with `DistributedConfig(fsdp_size=2)`. Both ended without a warning, and with DDP's loss.
#
# **Predict:** what would you look at to tell whether they were really sharded?

# %%
rows = []
for way in ("DDP", "fsdp=True", "fsdp_size=2"):
    report = json.loads((RUN / f"{way}.json").read_text())
    handed = ", ".join(f"{k.replace('_', '-')} {v / 1e6:.2f}" for k, v in report["handed"].items())
    difference = relative_difference("DDP", way)
    rows.append([way, f"{report['held']['weights'] / 1e6:.2f}", handed, f"{difference:.1g}"])
plotting.table(
    ["run", "weights held, MB", "handed over in a step, MB", "adapter, against DDP's"], rows
)

# %% [markdown]
# Look at the bytes, since all three adapters are equal. With `fsdp=True` each process held all weights and made no all-gather,
# so this was plain DDP: accelerate doesn't switch FSDP on without a GPU, and doesn't say so. With `fsdp_size=2` each process
# held half of the base and the whole adapter, whose gradients the Trainer averaged. **Before a long run, compare what a process
# holds with what it should hold.**
#
# ### Exercise: which strategy is this really? (core, 10 min)
#
# You get a dict about one process of a run, with sizes in bytes:
#
# - `weights` and `trained`: all weights of the model, and those that are trained;
# - `held_weights` and `held_optimizer`: what this process holds of the weights, and of Adam's state, which is 2 × `trained` in all;
# - `all_reduce`, `all_gather` and `reduce_scatter`: what it hands over in a step. Up to 10,000 bytes of each are for the log only,
#   while `trained` is more than 20,000.
#
# It also says what was `asked` for, and the number of `processes`. Return `"not synchronised"`, `"DDP"`, `"ZeRO-1"` or
# `"FSDP"`. The part of a process can be a few percent larger than an equal share.
#
# <details><summary>The check says FSDP where I say DDP, because the optimizer's state is whole</summary>
# That is the run with <code>fsdp_size=2</code> above: look at the weights first.
# </details>


# %% exercise="11.strategy" points=3
def which_strategy(run):
    """Return what the run really did."""
    ### BEGIN SOLUTION
    if run["held_weights"] < 0.75 * run["weights"]:
        return "FSDP"
    if run["held_optimizer"] < 0.75 * 2 * run["trained"]:
        return "ZeRO-1"
    reduced = run["all_reduce"] + run["reduce_scatter"]
    return "DDP" if reduced >= run["trained"] else "not synchronised"
    ### END SOLUTION


lesson11.strategy(which_strategy)

# %%
### BEGIN HIDDEN TESTS
assert lesson11.strategy.outcome(which_strategy).passed
_run = dict(asked="fsdp", processes=4, weights=16_000_000, trained=600_000)
_run |= dict(held_weights=16_000_000, held_optimizer=1_200_000, all_gather=900, reduce_scatter=0)
assert which_strategy(_run | {"all_reduce": 700}) == "not synchronised"
assert which_strategy(_run | {"all_reduce": 600_700}) == "DDP"
assert which_strategy(_run | {"all_reduce": 600_700, "held_optimizer": 301_000}) == "ZeRO-1"
### END HIDDEN TESTS

# %% [markdown]
# ## Break it: adapters that drift apart
#
# In a loop that you write yourself, nothing keeps the processes equal. The module `course_utils.drifting` (don't read it yet)
# runs four loops, *a* to *d*, on two processes. Each has one of these faults, but not in this order:
#
# 1. each process draws a random *A* of its own;
# 2. the gradients are not averaged;
# 3. the gradients of the last layer's adapter are not averaged, because it was added too late;
# 4. each process has a learning rate of its own.
#
# **Predict:** for each fault, where will the processes differ first: at the start, in the first gradients, or after step 1?
# Then match the runs with the faults before you read on. Each entry says how large the relative difference is, and in how many
# tensors.

# %% tags=["measured"]
launch.torchrun(*two, "-m", "course_utils.drifting", folder=RUN)
drift = json.loads((RUN / "drifting.json").read_text())
moments = ("start", "gradients", "step 1", "step 3")


def show_drift(*names):
    rows = []
    for name in names:
        one = drift[name]
        cells = [f"{one[at]['apart']:.1e} in {one[at]['tensors']} of {one['of']}" for at in moments]
        rows.append([name, *("equal" if " in 0 of" in cell else cell for cell in cells)])
    plotting.table(["run", "at the start", "first gradients", "after step 1", "after step 3"], rows)


show_drift("a", "b", "c", "d")

# %% [markdown]
# Read each line from the left, because the first difference shows the cause:
#
# - Run *c* differs at the start, so it has fault 1. Its gradients are equal, because they are averaged.
# - In run *a* the gradients differ (fault 2), but only in half of the tensors: *B* is still zero, so *A* gets no gradient yet.
# - In run *d* the gradients differ in one layer only (fault 3).
# - In run *b* even the gradients are equal, so the fault lies in the step (fault 4).
#
# DDP prevents the first three, because it copies the first process's weights to all others and averages every gradient. In the
# next cell each process has a seed of its own, as in *c*, and the model is wrapped in DDP.

# %%
show_drift("mended")

# %% [markdown]
# With DDP the two processes stay equal throughout.
#
# ## One process, several places: device_map
#
# With a [device map](../docs/glossary.md#device-map) one process spreads *one* model over GPUs, memory and disk. The layers still run one after the other, so
# nothing gets faster, but a larger model fits. `"auto"` fills the GPUs first, `{"": "cuda:0"}` puts everything on one, and
# `max_memory` limits each place. You can plan for GPUs that you don't have, because on the
# [device `meta`](../docs/glossary.md#meta-device) a model has shapes but no numbers.


# %%
def llama(width, inner, layers, heads, words):
    """The configuration of a Llama of this shape; no weights."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=words,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


llama_8b = llama(4096, 14336, 32, 32, 128256)
with init_empty_weights():
    empty = AutoModelForCausalLM.from_config(llama_8b, dtype=torch.bfloat16)
plans = {
    "one GPU of 24 GB": {0: "22GB"},
    "two GPUs of 12 GB": {0: "11GB", 1: "11GB"},
    "one GPU of 12 GB, 32 GB of memory": {0: "11GB", "cpu": "30GB"},
    "one GPU of 12 GB, 4 GB of memory": {0: "11GB", "cpu": "3GB"},
}
gpus, rows = {0: "GPU 0", 1: "GPU 1"}, []
for name, room in plans.items():
    placed = infer_auto_device_map(
        empty, max_memory=room, no_split_module_classes=empty._no_split_modules
    )
    # A single entry with an empty name stands for the whole model.
    layers = [place for name_of, place in placed.items() if ".layers." in name_of]
    counts = collections.Counter(layers or [placed[""]] * llama_8b.num_hidden_layers)
    places = [f"{number} on {gpus.get(place, place)}" for place, number in counts.items()]
    rows.append([name, ", ".join(places)])
plotting.table(["8B in bfloat16 on", "layers"], rows)

# %% [markdown]
# What doesn't fit on GPU 0 goes to GPU 1, to memory, or to disk. Can you still train then? The next cell puts the upper two of
# our model's four layers on disk.
#
# **Predict:** will LoRA train if it adapts all layers? And if it adapts only the lower two?

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
text = "Fenna left the lantern in the boathouse."
inputs = tokenizer([text] * 4, return_tensors="pt")
number_of_layers = base.config.num_hidden_layers
half = {f"model.layers.{n}": "cpu" if n < 2 else "disk" for n in range(number_of_layers)}
half |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


def losses(layers, device_map=None, hooks=None):
    """The losses of three steps of LoRA on these layers, or the error."""
    runtime.seed_everything(0)
    folder = str(RUN / "offload") if device_map else None
    model = AutoModelForCausalLM.from_pretrained(
        paths.base_model(), device_map=device_map, offload_folder=folder
    )
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=8, target_modules=attention, layers_to_transform=layers)
    model = get_peft_model(model, config)
    if hooks:
        hooks(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    try:
        for _ in range(3):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(f"{loss.item():.4f}")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:110]}"
    return ", ".join(found)


every = list(range(number_of_layers))
tried = {
    "all in memory; LoRA on all layers": losses(every),
    "upper half on disk; LoRA on all layers": losses(every, half),
    "upper half on disk; LoRA on the lower half": losses([0, 1], half),
    "all in memory; LoRA on the lower half": losses([0, 1]),
    "accelerate's cpu_offload of everything": losses(
        every, hooks=lambda model: cpu_offload(model, execution_device="cpu")
    ),
}
plotting.table(["", "losses, or the error"], [list(pair) for pair in tried.items()])

# %% [markdown]
# LoRA on all layers stops with an error, because an adapter on an [offloaded](../docs/glossary.md#offloaded) layer has no numbers. On the lower two it trains
# as it would without offloading. But the gradient has to pass through the upper layers, so their weights are loaded in each
# step and stay in memory until the backward pass. With accelerate's `cpu_offload` the loss doesn't change, and there is no
# error: between steps the weights are put away, so the optimizer changes empty tensors. **Offload to run a model; to train one,
# use QLoRA or FSDP.**
#
# Two more ways are not shown. *Tensor parallel* splits each matrix (`DistributedConfig(tp_size=2)`), but in these versions a
# model with LoRA can only generate that way, not train. *Pipeline parallel* gives each device some of the layers.
#
# ## Many tenants, one base
#
# Suppose that each of your customers, called [tenants](../docs/glossary.md#tenant), has an adapter. The server writes the next token for a batch with rows
# of several tenants. There are four simple ways:
#
# - keep a merged model for each tenant;
# - call `set_adapter` for each tenant in turn, with that tenant's rows;
# - use PEFT's mixed batch of lesson 1, `adapter_names=[...]`: the base works on all rows together, each adapter on its own rows;
# - [gather](../docs/glossary.md#gather-serving): stack all tenants' *A* and *B*, let each row pick its own, and multiply all rows at once. This is the idea of Punica
#   ([Chen et al. 2023](https://arxiv.org/abs/2310.18547)) and of S-LoRA ([Sheng et al. 2023](https://arxiv.org/abs/2311.03285)), on which servers such as vLLM build.
#
# ### Exercise: one batch, many adapters (core, 20 min)
#
# Write the core of the gather layer. Given are `x` of shape (rows, tokens, inputs), `A` (adapters, rank, inputs), `B`
# (adapters, outputs, rank), `scaling` (adapters), and `rows`, whole numbers that say which adapter each row takes, −1 for none.
# Return the change that is added to the base layer's output, of shape (rows, tokens, outputs): scalingₖ · xᵢ Aₖᵀ Bₖᵀ for row
# *i* with adapter *k*, and 0 for a row without. A loop over the rows is right but slow, so avoid it.
#
# <details><summary>The shapes don't fit</summary>
# <code>A[rows]</code> has the shape (rows, rank, inputs): one matrix for each row. <code>x @ A[rows].transpose(1, 2)</code> multiplies each
# row by its own.
# </details>
# <details><summary>A row with −1 gets the last adapter</summary>
# In Python, −1 picks the last entry. Multiply each row's change by a factor that is 0 for such a row.
# </details>


# %% exercise="11.gather" points=5
def gather(x, A, B, scaling, rows):
    """Return the change that each row's adapter makes: (rows, tokens, outputs)."""
    ### BEGIN SOLUTION
    factor = torch.where(rows >= 0, scaling[rows], 0)
    change = (x @ A[rows].transpose(1, 2)) @ B[rows].transpose(1, 2)
    return change * factor[:, None, None]
    ### END SOLUTION


lesson11.gather(gather)

# %%
### BEGIN HIDDEN TESTS
assert lesson11.gather.outcome(gather).passed
_x, _A, _B, _scaling, _rows = lesson11.gather_example(9, 3, 4, 6, 5, [2, 2, -1, 0], 3)
_found = gather(_x, _A, _B, _scaling, _rows)
assert _found[2].abs().max() == 0
assert torch.allclose(_found[1], _x[1] @ _A[2].T @ _B[2].T * _scaling[2])
### END HIDDEN TESTS

# %% [markdown]
# The next cell puts your function into every LoRA layer (or ours, until yours passes) and compares the logits with those of
# PEFT's mixed batch. It also shows that the adapters change the logits at all.

# %%
tenants = ["reading", "sailor", "extract", "mood"]
fresh = AutoModelForCausalLM.from_pretrained(paths.base_model())
model = PeftModel.from_pretrained(fresh, paths.adapter_path(tenants[0]), adapter_name=tenants[0])
for name in tenants[1:]:
    model.load_adapter(paths.adapter_path(name), adapter_name=name)
model.eval()
yours = gather if lesson11.gather.outcome(gather).passed else lesson11.gathered
served, rows_of = serving.with_gathered(model, tenants, yours)

picked = torch.tensor([0, 1, 2, 3, 1, 1, -1, 2, 0, 3, 2, 1, 0, 3, 2, 1])
names = [tenants[number] if number >= 0 else "__base__" for number in picked.tolist()]
generator = torch.Generator().manual_seed(0)
ids = torch.randint(10, base.config.vocab_size, (len(names), 8), generator=generator)
with torch.no_grad():
    rows_of[0] = picked
    of_peft, of_gather = model(ids, adapter_names=names).logits, served(ids).logits
    rows_of[0] = torch.full_like(picked, -1)
    of_base = served(ids).logits
print(f"the adapters change logits by up to {(of_peft - of_base).abs().max():.1f}")
print(f"gathered and PEFT's mixed batch differ by at most {(of_peft - of_gather).abs().max():.0e}")
assert (of_peft - of_gather).abs().max() < 1e-4 < (of_peft - of_base).abs().max()

# %% [markdown]
# Both ways agree up to rounding. What does a step cost as the number of tenants grows from 1 to 16? The figure shows stored results of
# three seeds: the processor's time, on one thread, for 16 rows with one token each. In brackets is the memory for the weights
# with 16 adapters.
#
# **Predict:** which line stays flat, and which way needs the most memory?

# %%
results = data.load_results("serving")
ways = {
    "merged_ms": "a merged model each",
    "switch_ms": "set_adapter in turn",
    "peft_ms": "PEFT's mixed batch",
    "gather_ms": "gathered",
}
adapters, copies = (
    sweeps.over_seeds(results, column, "adapters") for column in ("adapters_mb", "merged_mb")
)
lines = {}
for column, label in ways.items():
    at_16, _, _ = (copies if column == "merged_ms" else adapters)[16]
    lines[f"{label} ({at_16:.0f} MB)"] = sweeps.over_seeds(results, column, "adapters")
title = "Gathered, sixteen tenants cost hardly more than one"
figure, alt = sweeps.curves(
    lines, title, "adapters in the batch", "time of a step (ms)", log=2, log_y=True
)
plotting.show(figure, f"{alt} In brackets: the weights held for 16 adapters.")

# %% tags=["claim"]
from tools.claims import swept

gather_time = swept("serving", "gather_ms", "adapters")
peft_time = swept("serving", "peft_ms", "adapters")
switch_time = swept("serving", "switch_ms", "adapters")
merged_time = swept("serving", "merged_ms", "adapters")
adapters_mb = swept("serving", "adapters_mb", "adapters")
merged_mb = swept("serving", "merged_mb", "adapters")
assert gather_time[16][0] < 1.35 * gather_time[1][0], "hardly grows"
assert merged_time[1][0] < gather_time[1][0], "For one tenant"
assert max(peft_time[16][0], merged_time[16][0]) < switch_time[16][0], "slowest"

# %% [markdown]
# With gathered adapters the time hardly grows, from {{gather_time[1][0]:.0f}} ms for one tenant to {{gather_time[16][0]:.0f}} for sixteen. PEFT's mixed batch goes from {{peft_time[1][0]:.0f}} to
# {{peft_time[16][0]:.0f}} ms, because on each layer every adapter is a small multiplication of its own. One merged model takes {{merged_time[1][0]:.0f}} ms, but sixteen
# take {{merged_time[16][0]:.0f}}, since each works on a single row, and they hold {{merged_mb[16][0]:.0f}} MB in place of {{adapters_mb[16][0]:.0f}}. `set_adapter` in turn is slowest ({{switch_time[16][0]:.0f}} ms). **For one
# tenant, merge; for many, keep one base and gather.**
#
# ## More tenants than memory
#
# A server without room for all adapters keeps some, and loads others when they are asked for. How long does that take? A
# [hot swap](../docs/glossary.md#hot-swap) writes the new weights into the old adapter's place.

# %% tags=["measured"]
swapped = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(paths.base_model()), paths.adapter_path("sailor")
)
folders = [str(paths.adapter_path(name)) for name in ("mood", "sailor")]


def swap():
    for folder in folders:
        hotswap_adapter(swapped, folder, adapter_name="default", torch_device="cpu")


def load_and_delete():
    model.load_adapter(folders[0], adapter_name="guest")
    model.delete_adapter("guest")


actions = {
    "set_adapter, already loaded": lambda: [model.set_adapter(name) for name in tenants[:2]],
    "hotswap_adapter, from disk": swap,
    "load_adapter and delete_adapter": load_and_delete,
    "load a whole model": lambda: AutoModelForCausalLM.from_pretrained(paths.base_model()),
}
times = timing.in_turns(actions, rounds=5)
each = [2, 2, 1, 1]  # adapters that an action brings in
plotting.table(
    ["", "ms for one adapter"],
    [[name, f"{times[name][0] / number:.0f}"] for name, number in zip(times, each)],
)

# %% [markdown]
# A hot swap is quick, because it only copies numbers into layers that exist. So it needs an adapter on the same layers, while
# `load_adapter` first has to add its own. (A whole model loads quickly only because ours is tiny.)
#
# Which adapters should stay? The usual rule drops the one that hasn't been used for longest (an [LRU cache](../docs/glossary.md#lru-cache), least recently
# used). Often the k-th most popular tenant sends a share of the requests proportional to 1/kˢ (Zipf's law): with s = 0 all are
# alike, and the larger s is, the more requests come from a few. The next cell simulates 20,000 requests of a thousand tenants.
#
# **Predict:** with room for 100 adapters, what share of the requests finds its adapter in memory for s = 0, and for s = 1.2?


# %%
def hit_rate(room, s, seed, tenants=1000, requests=20_000):
    """The share of requests whose adapter is in a cache that drops the least recently used."""
    weights = [1 / (k + 1) ** s for k in range(tenants)]
    cache, hits = collections.OrderedDict(), 0
    for tenant in random.Random(seed).choices(range(tenants), weights, k=requests):
        hits += tenant in cache
        cache[tenant] = None
        cache.move_to_end(tenant)
        if len(cache) > room:
            cache.popitem(last=False)
    return hits / requests


def over_three(room, s):
    rates = [hit_rate(room, s, seed) for seed in range(3)]
    return sum(rates) / 3, min(rates), max(rates)


rooms = (10, 30, 100, 300)
lines = {f"s = {s:g}": {room: over_three(room, s) for room in rooms} for s in (0, 0.8, 1.2)}
title = "The more uneven the traffic, the fewer adapters must be in memory"
figure, alt = sweeps.curves(lines, title, "adapters in memory, of 1,000", "share of hits", log=10)
plotting.show(figure, alt)
at_100 = {label: points[100][0] for label, points in lines.items()}
print("room for 100: " + ", ".join(f"{rate:.0%} with {label}" for label, rate in at_100.items()))

# %% [markdown]
# With s = 0 a tenth of the requests find their adapter, because a tenth of the adapters fit. With s = 1.2 most requests do, because
# most of them come from a few tenants. So measure your traffic before you buy memory.
#
# ## Plan for 8 and 70 billion parameters
#
# `estimate_memory` was right to the byte for two processes. Is it right for real GPUs, too? It knows all tensors and an upper
# bound for the activations, but not what the libraries need besides. The next cell predicts [three runs with Llama 2 70B](https://huggingface.co/docs/peft/accelerate/fsdp) that
# PEFT's documentation reports.


# %%
def estimate(shape, method, devices, strategy, rows_at_once=1, rank=16, **options):
    """Memory in training on rows of 2,048 tokens, in bfloat16 with activation checkpointing."""
    return memory.estimate_memory(
        shape,
        method,
        LoraConfig(r=rank, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
        batch_size=rows_at_once,
        sequence_length=2048,
        dtype="bfloat16",
        gradient_checkpointing=True,
        devices=devices,
        strategy=strategy,
        **options,
    )


GB = 1e9
llama_2_70b = llama(8192, 28672, 80, 64, 32000)
lora_8 = estimate(llama_2_70b, "lora", 8, "fsdp", rows_at_once=8, rank=8)
qlora_2 = estimate(
    llama_2_70b, "qlora", 2, "fsdp", rows_at_once=2, rank=8, double_quantization=True
)
# Offloaded to the computer's memory are weights, gradients and optimizer state.
on_gpu = qlora_2.buffers + qlora_2.activations
plotting.table(
    ["Llama 2 70B, GB on each GPU", "published", "predicted"],
    [
        ["LoRA, FSDP on 8", "72 to 80", f"{lora_8.total / GB:.1f}"],
        ["QLoRA, FSDP on 2", "35.6", f"{qlora_2.total / GB:.1f}"],
        ["QLoRA, FSDP on 2, offloaded to memory", "19.6", f"{on_gpu / GB:.1f}"],
    ],
)


# %% tags=["claim"]
def _llama(width, inner, layers, heads, words):
    return _Config.for_model("llama", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                             num_attention_heads=heads, num_key_value_heads=8, vocab_size=words,
                             tie_word_embeddings=False, max_position_embeddings=8192)  # fmt: skip


def _on(devices, shape, method, strategy, rank=16, rows_at_once=1, **options):
    lora = _Lora(r=rank, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return _estimate(shape, method, lora, batch_size=rows_at_once, sequence_length=2048, dtype="bfloat16",
                     gradient_checkpointing=True, devices=devices, strategy=strategy, **options)  # fmt: skip


_llama_2 = _llama(8192, 28672, 80, 64, 32000)
_lora_8 = _on(8, _llama_2, "lora", "fsdp", 8, 8).total / 1e9
_qlora_2 = _on(2, _llama_2, "qlora", "fsdp", 8, 2, double_quantization=True)
_short = [1 - _lora_8 / 72, 1 - _lora_8 / 80, 1 - _qlora_2.total / 35.6e9]
short_by, short_at_most = min(_short), max(_short)
assert abs(1 - (_qlora_2.buffers + _qlora_2.activations) / 19.6e9 - 1 / 3) < 0.02, "a third"
_llama_8b, _llama_70b = _llama(4096, 14336, 32, 32, 128256), _llama(8192, 28672, 80, 64, 128256)
times_as_much = _on(8, _llama_8b, "lora", "fsdp").sent / _on(8, _llama_8b, "lora", "ddp").sent

# %% [markdown]
# Without offloading the predictions fall short by {{100 * short_by:.0f}} to {{short_at_most:.0%}}, and with it by a third. So plan to leave a fifth of each GPU free,
# and try one step before a long run.
#
# Now take eight GPUs of 80 GB and one row at a time. A weight takes 2 bytes, and if it is trained, another 10 for its gradient
# and Adam's state.
#
# **Predict:** what stays below 64 GB, four fifths of a GPU: all weights of the 8B model with DDP, and with FSDP? LoRA of the 70B model
# with DDP, and with FSDP?

# %%
shapes = {
    "8B": llama_8b,
    "70B": llama(8192, 28672, 80, 64, 128256),
}
extra = {"full": {"moment_dtype": "float32"}, "lora": {}, "qlora": {"double_quantization": True}}
rows = []
for name, shape in shapes.items():
    for method, options in extra.items():
        for strategy in ("ddp", "zero2", "fsdp"):
            one = estimate(shape, method, 8, strategy, **options)
            fits = "yes" if one.total < 0.8 * 80 * GB else "no"
            cells = [f"{one.total / GB:.0f}", fits, f"{one.sent / GB:.1f}"]
            rows.append([name, method, f"{strategy} on 8", *cells, "computed"])
for strategy in ("DDP", "FSDP"):
    one = found[f"lora {strategy}"]
    held = sum(one["held"][part] for part in ("weights", "gradients", "optimizer"))
    # Each of k devices sends (k - 1)/k of what it hands over, and twice that for an all-reduce.
    sent = (sum(one["handed"].values()) + one["handed"].get("all_reduce", 0)) / 2
    cells = [f"{held / GB:.3f}", "yes", f"{sent / GB:.4f}"]
    rows.append(["this course's", "lora", f"{strategy.lower()} on 2", *cells, "measured above"])
for method, strategy, one, published in (
    ("lora", "fsdp on 8, 8 rows at once", lora_8, "72 to 80"),
    ("qlora", "fsdp on 2, 2 rows at once", qlora_2, "35.6"),
):
    fits = "yes" if one.total < 0.8 * 80 * GB else "no"
    cells = [f"{one.total / GB:.0f}", fits, f"{one.sent / GB:.1f}"]
    rows.append(["Llama 2 70B", method, strategy, *cells, f"published: {published} GB"])
header = ["model", "method", "strategy", "GB on each", "below 64 GB", "GB sent in a step", "basis"]
plotting.table(header, rows)

# %% tags=["claim"]
_all_8b = {
    name: _on(8, _llama_8b, "full", name, moment_dtype="float32") for name in ("ddp", "fsdp")
}
assert _all_8b["ddp"].total > 80e9 > 64e9 > _all_8b["fsdp"].total, (
    "don't fit with DDP, but fit with FSDP"
)
assert _on(8, _llama_70b, "full", "fsdp", moment_dtype="float32").total > 80e9, (
    "don't fit into eight GPUs"
)

# %% [markdown]
# All weights of the 8B model don't fit with DDP, but fit with FSDP, which is what FSDP is for. LoRA of the 8B model fits with
# both, and FSDP sends {{times_as_much:.0f}} times as much in each step. LoRA of the 70B model needs FSDP, or 4 bits, and all its weights don't fit
# into eight GPUs. Most lines are only computed.
#
# ## Internet scale, on paper
#
# Suppose that 1,000 tenants share an 8B model. Nothing here was run. Assume GPUs of 80 GB, of which you can use 90%, and
# bfloat16. One GPU holds the base, 100 adapters of rank 16, and in the rest of its memory attention's keys and values for
# conversations of 2,000 tokens.
#
# **Predict:** which of the three takes most? How many such GPUs would 1,000 merged models fill?

# %%
shape = shapes["8B"]
alone = estimate(shape, "lora", 1, "ddp")
weights = alone.weights - alone.gradients  # without the adapter, which training keeps in float32
adapter = alone.gradients / 2  # 16 bits in place of 32
kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2  # bytes a token
usable = 0.9 * 80 * GB
room = usable - weights - 100 * adapter
plotting.table(
    ["8B, 1,000 tenants, on paper", "GB"],
    [
        ["base", f"{weights / GB:.1f}"],
        [
            "one adapter; 100; 1,000",
            f"{adapter / GB:.3f}; {100 * adapter / GB:.1f}; {1000 * adapter / GB:.0f}",
        ],
        ["one conversation's keys and values", f"{2000 * kv / GB:.2f}"],
        [f"room for {room / (2000 * kv):.0f} conversations at a time", f"{room / GB:.1f}"],
        [
            f"merged models: {1000 * weights / usable:.0f} GPUs' worth",
            f"{1000 * weights / GB:,.0f}",
        ],
    ],
)

# %% [markdown]
# The conversations take most. All thousand adapters fit into a server's main memory, so one GPU serves all tenants while
# traffic is low. Merged models would fill hundreds of GPUs, most of them idle. S-LoRA reports up to four times the throughput
# of earlier servers, and Punica 12 times, with 2 ms more for each token. [Recipes](../docs/recipes.md) has the commands for several hosts and for
# vLLM's server, which we couldn't run here.
#
# ## Recap
#
# With more devices, weights and gradients have to travel, but the result should not change: keep the effective batch, and
# compare a small run on one process and on two. With LoRA use DDP while the base fits on each device, because only the
# adapter's gradients travel. FSDP makes a larger base fit, but sends the frozen weights again in each step. Check what a
# process holds and what it saved, because neither a run that wasn't sharded nor an adapter saved in parts gives an error. For
# many tenants keep one base, gather the adapters of a batch, and keep in memory those that were asked for last.


# %%
def megabytes(*cases):
    """What each process handed over in a step, in these cases."""
    return ", ".join(f"{sum(found[case]['handed'].values()) / 1e6:.1f} MB" for case in cases)


weights_mb = [found[f"lora {one}"]["held"]["weights"] / 1e6 for one in ("DDP", "FSDP")]
at_16 = [
    sweeps.over_seeds(results, column, "adapters")[16][0] for column in ("peft_ms", "gather_ms")
]
rows = [
    ["two processes with DDP, against one with two passes", f"{apart[list(compared)[1]]:.1g}"],
    ["handed over in a step, DDP: LoRA, all weights", megabytes("lora DDP", "full DDP")],
    ["the same, FSDP", megabytes("lora FSDP", "full FSDP")],
    ["weights held with LoRA: DDP, FSDP", ", ".join(f"{size:.1f} MB" for size in weights_mb)],
    ["a step with 16 adapters: PEFT, gathered", ", ".join(f"{one:.0f} ms" for one in at_16)],
]
plotting.table(["", "measured"], rows)
progress("11")

# %% [markdown]
# ## Take it to work
#
# Fill in the folder of an adapter that a distributed run saved, its base, and the number of your devices. In a terminal,
# `adapter-checks memory MODEL --devices 8 --strategy fsdp` makes such an estimate, too.

# %%
my_adapter, my_base, my_devices = None, None, 8
print(validation.check_adapter_folder(my_adapter or RUN / "DDP", my_base or base))
my_config = AutoConfig.from_pretrained(my_base) if my_base else shapes["8B"]
print(estimate(my_config, "lora", my_devices, "ddp"))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · You go from one GPU to four and change nothing else. The loss falls more slowly in each epoch. Why?</summary>
# The effective batch is four times as large, so an epoch has a quarter of the steps. Divide the accumulation by four, or choose the
# learning rate again.
# </details>
# <details><summary>2 · Your 8B model fits on each of your GPUs. LoRA with FSDP is slow. What do you try?</summary>
# DDP. FSDP gathers the frozen base twice in each step, while DDP sends the adapter's gradients only.
# </details>
# <details><summary>3 · A run on eight GPUs ends without an error, but each <em>A</em> in the saved adapter has 1 row instead of 8. What happened?</summary>
# One process saved only its own part, an eighth of the rows of each matrix. Gather first (<code>full_state_dict=True</code>), and check the folder.
# </details>

# %% [markdown]
# ## Where to read on
#
# - PyTorch on [DDP](https://docs.pytorch.org/docs/stable/notes/ddp.html) and [FSDP2](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)
# - [PEFT with FSDP](https://huggingface.co/docs/peft/accelerate/fsdp) and [with DeepSpeed](https://huggingface.co/docs/peft/accelerate/deepspeed)
# - [S-LoRA](https://arxiv.org/abs/2311.03285), [Punica](https://arxiv.org/abs/2310.18547), and [vLLM on LoRA](https://docs.vllm.ai/en/latest/features/lora.html)
# - [Recipes](../docs/recipes.md), [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# Next: [lesson 12](12_beyond_text.ipynb) asks whether LoRA is about language at all.
