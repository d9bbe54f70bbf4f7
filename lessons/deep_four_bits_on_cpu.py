# %% [markdown]
# # Keep four bits intact on a CPU
#
# On some processors bitsandbytes 0.50 rearranges 4-bit weights in memory the first time that the model is evaluated. From then on
# training, merging and saving may go wrong without an error. **How would you notice, and what do you do about it?** This deep
# dive goes with [lesson 5](05_qlora.ipynb), which needs only one call from it.
#
# | | |
# |---|---|
# | **What you'll do** | make the fault by hand; see what it does to training and to a saved model; prove the remedy |
# | **What you'll learn** | why an evaluation can change what is learned later; what to compare when weights may be damaged |
# | **What you'll need** | [lesson 5](05_qlora.ipynb) to *Train on four bits*; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import logging
import math
import warnings

from adapter_checks.bitsandbytes_workarounds import quiet_int8, stop_repacking
from adapter_checks.saving import saving
from course_utils import data, paths, plotting, runtime, validation
from course_utils.exercises import deep_four_bits_on_cpu, progress
from course_utils.sweeps import over_seeds, spread

runtime.quiet_imports()

import bitsandbytes
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from course_utils.progress import Progress

runtime.seed_everything(0)
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · bitsandbytes {bitsandbytes.__version__}"
)
print("this processor has AVX512-BF16:", bool(functional.has_avx512bf16()))

# %% [markdown]
# ## Compare the weights before and after an evaluation
#
# Processors with AVX512-BF16 (for example recent Xeon and Zen ones) have instructions for products of bfloat16 numbers. For them
# bitsandbytes has a fast 4-bit product, which needs the numbers of a weight in another order. So when a `Linear4bit` first runs
# in eval mode without gradients, it puts its weight into that order, and the weight stays so. The next cell does the same by hand, with
# the function that the layer calls, so that you can see it on any processor.
#
# **Predict:** the numbers are the same, in another order. `dequantize_4bit` reads them in the usual order. What will it give?


# %%
def four_bits(double=False):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def load(settings=None, folder=base_folder):
    """A fresh model on the CPU, just as bitsandbytes leaves it."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )


def four_bit_layers(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, Linear4bit)}


def repack(layer):
    """What the first eval forward does to a Linear4bit on a processor with AVX512-BF16."""
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def read(layer):
    """The weight that a Linear4bit stands for."""
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.float().reshape(layer.out_features, layer.in_features)


base_model = load()
model = load(four_bits())
name, layer = next(iter(four_bit_layers(model).items()))
healthy = read(layer)
repack(layer)
off = (read(layer) - healthy).norm() / healthy.norm()
title = f"Read after repacking, the weight is off by {off:.0%} of its size"
figure = plotting.weight_picture(
    {"before": healthy[:48, :48], "after": read(layer)[:48, :48]}, title
)
plotting.show(figure, f"{title}. A corner of {name}, 48 × 48, before and after: nothing is alike.")
print(validation.check_quantised(model, base_model))

# %% [markdown]
# `dequantize_4bit` gives another matrix, off by more than the size of the weights themselves, and there is no error
# message. The same happens to everything that reads the weight: `dequantize()`, a merge, a save. `check_quantised` finds
# it, because bitsandbytes notes the new order beside the weight.

# %% [markdown]
# ## Train after an evaluation
#
# The fast product passes no gradient on to its input. So if you score the model *before* training, as a careful person
# does, then later training steps pass no gradient through the 4-bit layers. The next cell runs 20 steps three times, each
# after an evaluation: first with `stop_repacking` right after loading, then as bitsandbytes leaves the model, and last with
# a hook that cuts the gradients of every layer that has been evaluated. The hook shows on any processor what AVX512-BF16
# does.
#
# **Predict:** without gradients through the layers, will the loss still fall?

# %%
COLUMNS = ["prompt", "completion"]
train_rows, check_rows = (data.load_task("sailor", split) for split in ("train", "validation"))


def cut_after_evaluation(model):
    """Let each 4-bit layer pass no gradient on, once it ran in eval mode."""
    evaluated = set()

    def cut(layer, inputs, output):
        if not layer.training:
            evaluated.add(layer)
        return output.detach() if layer in evaluated else output

    for layer in four_bit_layers(stop_repacking(model)).values():
        layer.register_forward_hook(cut)


def run(prepare):
    """Evaluate, train, evaluate: the trainer, both losses, and what was warned of."""
    model = load(four_bits())
    prepare(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(paths.runs_dir() / "deep_four_bits" / "trainer"),
            seed=0,
            max_steps=20,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            warmup_steps=2,
            max_length=256,
            logging_steps=5,
            save_strategy="no",
            **runtime.trainer_settings()
            | dict(use_cpu=True, bf16=False, dataloader_pin_memory=False),
        ),
        processing_class=tokenizer,
        train_dataset=train_rows.select(range(320)).select_columns(COLUMNS),
        eval_dataset=check_rows.select(range(64)).select_columns(COLUMNS),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    Progress().attach(trainer)
    with warnings.catch_warnings(record=True, action="default") as caught:
        started = trainer.evaluate()["eval_loss"]
        trainer.train()
    warned = any("gemv" in str(one.message) for one in caught)  # PyTorch: no gradient is known
    return trainer, started, trainer.evaluate()["eval_loss"], warned


runs = {
    "`stop_repacking`": run(stop_repacking),
    "as loaded, on this processor": run(lambda model: None),
    "gradients cut by hand": run(cut_after_evaluation),
}
plotting.table(
    ["after loading", "loss before", "loss after 20 steps", "PyTorch warned"],
    [
        [label, f"{started:.2f}", f"{ended:.2f}", "yes" if warned else "no"]
        for label, (_, started, ended, warned) in runs.items()
    ],
)

# %%
learned = over_seeds(data.load_results("quantised"), "test", "weights")
for form, label in (("nf4", "with stop_repacking"), ("nf4_repacked", "gradients cut by hand")):
    print(f"80 steps, three seeds, {label}: {spread(learned[form])} right on test rows")

# %% tags=["claim"]
from tools.claims import swept

_right = swept("quantised", "test", "weights")
assert _right["nf4_repacked"][2] == 0, "not one answer right"
assert swept("quantised", "validation_loss", "weights")["nf4_repacked"][1] > 2, "above 2 nats"

# %% [markdown]
# The loss still falls, which is why the fault is hard to see. The adapters and the residual connections still pass
# gradients on, so something is learned, but far less. After the 80 steps of lesson 5's sweep, three seeds have not one
# answer right, and their loss stays above 2 nats. On a processor with AVX512-BF16 the second run learns as little as the
# third, and PyTorch warns once, in a line about `gemv_4bit`. On other processors it learns as much as the first.

# %% [markdown]
# ## Stop it, and prove it
#
# `stop_repacking(model)` sets `support_avx512bf16_for_cpu = False` on every `Linear4bit`, and refuses a model that has been
# repacked already, since bitsandbytes can't undo that exactly. The environment variable `ATEN_CPU_CAPABILITY`, which limits
# the instructions that PyTorch uses, doesn't help, because bitsandbytes asks the processor itself.
#
# **Predict:** with that call, do gradients and weights before and after an evaluation agree to the bit?


# %%
def gradients_of(model, batch):
    model.zero_grad()
    model.train()(**batch, use_cache=False).loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


trainer = runs["`stop_repacking`"][0]
model, batch = trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
layers = four_bit_layers(model).values()
first, stored = gradients_of(model, batch), [read(layer) for layer in layers]
with torch.no_grad():
    model.eval()(batch["input_ids"])
second = gradients_of(model, batch)
same_gradients = all(torch.equal(first[name], second[name]) for name in first)
same_weights = all(torch.equal(one, read(layer)) for one, layer in zip(stored, layers))
print("to the bit: gradients agree:", same_gradients, "· weights agree:", same_weights)
assert same_gradients and same_weights

# %% [markdown]
# Gradients and weights agree to the bit. On a machine without such a processor, or with a GPU, the call changes nothing, so
# you can leave it in your code.
#
# ### Exercise: which weights were spoilt? (stretch, 15 min)
#
# Write a detector that works on any processor. You get a model and an `action`, a function without arguments that does
# something to the model, for example an evaluation. Call it once, and return the names of the `Linear4bit` layers whose
# weight differs afterwards, as a list or a set. Expected for an action that does nothing: an empty list.
#
# <details><summary>The check says that scales were changed, and I found nothing</summary>
# A 4-bit weight is its numbers <em>and</em> its scales. Compare what <code>dequantize_4bit</code> gives.
# </details>
# <details><summary>It stops with "Float did not match BFloat16"</summary>
# What is read back from a repacked layer may have another dtype. Add <code>.float()</code>.
# </details>
# <details><summary>I compare the weight with itself</summary>
# <code>layer.weight.data</code> changes with the model. Keep what was read back, or a <code>clone()</code>.
# </details>


# %% exercise="deep.spoilt" points=4
def spoilt_layers(model, action):
    """Return the names of the 4-bit layers whose weight is another one after action()."""

    ### BEGIN SOLUTION
    def weights():
        return {
            name: functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            for name, layer in model.named_modules()
            if isinstance(layer, Linear4bit)
        }

    before = weights()
    action()
    after = weights()
    return [name for name in before if not torch.equal(before[name], after[name])]
    ### END SOLUTION


deep_four_bits_on_cpu.spoilt(spoilt_layers)

# %%
### BEGIN HIDDEN TESTS
assert deep_four_bits_on_cpu.spoilt.outcome(spoilt_layers).passed
_model = nn.Sequential(
    deep_four_bits_on_cpu.four_bit_layer(64, 96),
    nn.Linear(96, 64),
    deep_four_bits_on_cpu.four_bit_layer(64, 64),
)
assert list(spoilt_layers(_model, lambda: None)) == []
assert list(spoilt_layers(_model, lambda: repack(_model[2]))) == ["2"]
### END HIDDEN TESTS

# %% [markdown]
# ## Save after an evaluation
#
# When a model is *saved*, bitsandbytes notices the other order and undoes it. The next cell repacks, saves, loads again, and
# compares with a fresh model.
#
# **Predict:** is the model that comes back the one that was loaded first?

# %%
line = tokenizer("Fenna keeps the lantern.", return_tensors="pt")
rows, reports = [], {}
for form, double in (("NF4", False), ("NF4, double quantisation", True)):
    model, fresh = load(four_bits(double)), stop_repacking(load(four_bits(double)))
    for layer in four_bit_layers(model).values():
        repack(layer)
    folder = paths.runs_dir() / "deep_four_bits" / "saved"
    with saving(folder) as temporary:
        model.save_pretrained(temporary)
    back = stop_repacking(AutoModelForCausalLM.from_pretrained(folder).to("cpu"))
    reports[form] = validation.check_quantised(back, base_model)
    pairs = list(zip(four_bit_layers(back).values(), four_bit_layers(fresh).values()))
    same_numbers = all(torch.equal(one.weight.data, two.weight.data) for one, two in pairs)
    same_scales = all(
        torch.equal(one.weight.quant_state.absmax, two.weight.quant_state.absmax)
        for one, two in pairs
    )
    seen = validation.compare_models(fresh, back, line, atol=math.inf)
    words = ("as before" if same else "changed" for same in (same_numbers, same_scales))
    rows.append([form, *words, f"{seen.kl:.2g}", ", ".join(reports[form].codes) or "ok"])
plotting.table(
    ["repacked, saved, loaded", "numbers", "scales", "KL, nats", "check_quantised"], rows
)
print(reports["NF4"])

# %% [markdown]
# Without double quantisation another model comes back: its numbers are in order, but its *scales* are not, and the [KL
# divergence](../docs/glossary.md#kl-divergence-in-nats) from the fresh model is large. With double quantisation there is
# only a small difference from rounding. The damage is in the file, so anybody who downloads it has a damaged model, on any
# processor. **Compare a quantised model with the base that it was made from.**

# %% [markdown]
# ## Meet a size that the fast product refuses
#
# The fast product has another limit: it only takes layers whose inputs are a multiple of 64 and whose outputs are a multiple of
# 32. The next model has layers of 96 × 96, which don't fit.

# %%
odd_config = AutoConfig.for_model(
    "llama",
    vocab_size=60,
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=2,
)
odd_folder = paths.runs_dir() / "deep_four_bits" / "odd"
with saving(odd_folder) as temporary:
    AutoModelForCausalLM.from_config(odd_config).save_pretrained(temporary)
for label, prepare in (("as loaded", lambda model: model), ("stop_repacking", stop_repacking)):
    odd, said = prepare(load(four_bits(), odd_folder)), {}
    for mode in ("train", "eval"):
        try:
            with torch.set_grad_enabled(mode == "train"):
                getattr(odd, mode)()(torch.tensor([[3, 1, 4]]))
            said[mode] = "works"
        except (RuntimeError, AssertionError) as error:
            said[mode] = f"{type(error).__name__}: {error}"
    print(f"{label:15} train {said['train']} · eval {said['eval']}")
print(validation.check_quantization_config(odd_config, four_bits()))

# %% [markdown]
# On a processor with AVX512-BF16 the model as loaded can be trained, but it stops with an error at the first evaluation. On
# others it works. The cause is the other order again, and `stop_repacking` helps here, too. `check_quantization_config`
# tells you before you load.

# %% [markdown]
# ## See what 8 bits do in eval mode
#
# Layers in 8 bits aren't repacked, but on a CPU they compute differently in the two modes. In training bitsandbytes reads the weights
# back and multiplies in float32; in eval mode it also rounds the inputs, to 8 bits by way of float16, and logs a line about it at
# every call. `quiet_int8()` hides this one message.

# %%
heard, listener = [], logging.Handler()
listener.emit = lambda record: heard.append(record.getMessage())
logger = logging.getLogger("bitsandbytes.autograd._functions")
logger.addHandler(listener)
in_8_bits = load(BitsAndBytesConfig(load_in_8bit=True))
logits = {}
with torch.no_grad():
    for mode in ("train", "eval"):
        heard.clear()
        logits[mode] = getattr(in_8_bits, mode)()(**line).logits
        print(f"{mode}: {len(heard)} lines", *heard[:1])
logger.removeHandler(listener)
quiet_int8()
apart = (logits["train"] - logits["eval"]).abs().max()
print(f"logits of the two modes differ by up to {apart:.2f}")

# %% [markdown]
# So a model in 8 bits answers with a slightly different forward pass than it was trained with. Lesson 5's sweep shows no
# harm from the difference. But don't expect the loss in training and in evaluation to agree to the last digit.

# %% [markdown]
# ## Recap
#
# You notice the fault if you compare: gradients before and after an evaluation, or the dequantised weights with the base
# that they were made from, which `check_quantised(model, base)` does. The loss alone doesn't show it, because it still
# falls. Call `stop_repacking(model)` right after loading, and check once before you train and once before you merge. A
# model that was saved after an evaluation may be damaged on every machine, so load it afresh from the unquantised base.

# %%
plotting.table(
    ["", "measured"],
    [
        ["error of a weight that was repacked and read", f"{off:.0%}"],
        [
            "loss after 20 steps: stop_repacking, gradients cut",
            ", ".join(
                f"{runs[label][2]:.2f}" for label in ("`stop_repacking`", "gradients cut by hand")
            ),
        ],
        [
            "right after 80 steps, three seeds each",
            ", ".join(spread(learned[form]) for form in ("nf4", "nf4_repacked")),
        ],
    ],
)
progress("deep")

# %% [markdown]
# ## Take it to work
#
# Replace the two models by your own 4-bit model and its unquantised base, or by the base's folder.

# %%
my_model, my_base = stop_repacking(load(four_bits())), base_model
print(validation.check_quantised(my_model, my_base))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · A QLoRA run learns well on one machine and slowly on another, with the same seed. What do you look at?</summary>
# Whether the 4-bit weights were repacked by an evaluation: <code>check_quantised(model)</code>. The processors differ in
# AVX512-BF16.
# </details>
# <details><summary>2 · The loss falls. Does that show that gradients reach all adapters in the right size?</summary>
# No. It shows that some do. Compare the gradients with those of a run that you trust, or train a few steps on both machines.
# </details>
# <details><summary>3 · You downloaded a 4-bit model, and it is worse than its authors say. How do you find out whether the file is
# damaged?</summary>
# Quantise the original base yourself and compare: <code>check_quantised(model, base)</code> reads each weight back and does that.
# </details>

# %% [markdown]
# ## Where to read on
#
# - The layer's own code, `bitsandbytes/nn/modules.py`, `Linear4bit.forward`
# - A [relative of the fault](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078), seen when a model moves to another device
# - [Symptom, cause, check](../docs/symptoms.md), *In 4 and 8 bits*
# - Back to [lesson 5](05_qlora.ipynb), or on to [lesson 6](06_olora.ipynb)
