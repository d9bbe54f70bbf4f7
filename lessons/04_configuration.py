# %% [markdown]
# # Configure LoRA and plan its cost
#
# You have a model, rows to train on, and a GPU with a certain amount of memory. **Which settings do you give LoRA, and how do
# you know beforehand that training will fit?** You can compute much of the answer from the model's config alone, before you
# download a single weight. For the rest, you train for a few steps.
#
# | | |
# |---|---|
# | **What you'll do** | choose target modules for five architectures; see what rank, alpha and other settings change; find the fault in a slow run; count parameters and memory of models that you don't have; write a configuration within a budget |
# | **What you'll learn** | which layers a name matches, and what happens when it matches none; how rank and alpha belong together; what must be saved besides *A* and *B*; where the memory goes, and what to do when it runs out |
# | **What you'll need** | [lesson 2](02_lora_from_scratch.ipynb) for *A*, *B* and the scaling; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import warnings

from adapter_checks import counting, memory
from adapter_checks.errors import InputError
from adapter_checks.model_folder import load_config
from course_utils import data, layers, loop, paths, plotting, runtime, sweeps, validation
from course_utils.exercises import lesson04, progress

runtime.quiet_imports()

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Look at the layers before you name them
#
# `target_modules` names the layers that get an adapter. Each architecture has its own names for them, so print them first. You
# don't need the weights for that: `counting.meta_model` builds a model from its config on PyTorch's [meta
# device](../docs/glossary.md#meta-device), where tensors have a shape but no numbers. The six models below are small; large
# ones have the same names in more blocks.


# %%
def model_of(kind, **sizes):
    """A model of this architecture on the meta device: names and shapes, no numbers."""
    return counting.meta_model(AutoConfig.for_model(kind, **sizes))


small = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
printed = {
    "Llama": model_of("llama", **small),
    "GPT-2": model_of("gpt2", n_embd=256, n_layer=4, n_head=4),
    "Pythia (GPT-NeoX)": model_of("gpt_neox", **small, num_attention_heads=8),
    "Phi-3": model_of("phi3", **small, num_attention_heads=8),
    "Qwen3-MoE": model_of("qwen3_moe", **small, num_experts=4, moe_intermediate_size=64),
    "Qwen3-Next": model_of("qwen3_next", **small, num_experts=4, moe_intermediate_size=64),
}
layers.show_blocks(printed)

# %% [markdown]
# Llama has separate layers for query, key and value. GPT-2, Pythia and Phi-3 have all three in one layer. Qwen3-MoE is a
# mixture of experts: each block has several feed-forward parts, the experts. Their weights are stacked into one tensor, which
# is no linear layer, so they don't appear. Qwen3-Next has two kinds of attention, `linear_attn` in some blocks and `self_attn`
# in the others.
#
# **Predict:** a recipe for a Llama says `target_modules=["q_proj", "v_proj"]`. On which of the six models does it adapt two
# layers in every block? Where is it an error? And where does it adapt less than you would think, without an error?

# %%
rows = []
for name, model in printed.items():
    recipe = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    try:
        found = counting.adapted_layers(model, recipe)
        said = f"adapts {len(found)} layers in 4 blocks"
    except InputError:
        said = "PEFT refuses: not found"
    codes = validation.check_lora_config(model, recipe).codes
    rows.append([name, said, ", ".join(f"`{code}`" for code in codes)])
plotting.table(["model", "PEFT", "`check_lora_config` says"], rows)

# %% [markdown]
# On Llama and Qwen3-MoE the recipe adapts two layers in every block. (On Qwen3-MoE it leaves all experts as they are.) PEFT
# refuses the recipe on GPT-2, Pythia and Phi-3, which is the better outcome, because you notice an error. On Qwen3-Next the recipe
# adapts one block of four, since only that one has a `q_proj`. The run would start, and train a quarter of the blocks;
# `check_lora_config` reports this as `few_layers`.
#
# A list is an error only if *none* of its names matches a layer. On GPT-2, for example, PEFT accepts `["c_attn", "v_proj"]`,
# although there is no `v_proj`:

# %%
half_right = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "v_proj"])
print(validation.check_lora_config(printed["GPT-2"], half_right))

# %% [markdown]
# So run `check_lora_config(model, config)` before every training. It reads both and changes nothing.
#
# ### Write targets in four ways
#
# You can say in four ways which layers you mean:
#
# 1. A list holds the ends of names, cut at a dot: `"attn.c_proj"` matches `transformer.h.0.attn.c_proj`.
# 2. A string is a regular expression for the *whole* name.
# 3. `"all-linear"` takes every linear layer except the output layer. `exclude_modules` leaves some of them out again.
# 4. `layers_to_transform` restricts the choice to the blocks whose numbers you list. PEFT reads a block's number from the first
#    number in a layer's name. If names on your model hold several numbers, `layers_pattern` says which one to read.
#
# Below, each of these is tried on a small Llama whose four blocks are numbered from 0 to 3.

# %%
tiny = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
).eval()


def show_adapted(*settings):
    """Give a copy of the tiny Llama an adapter with each setting, and show its adapted layers."""
    defaults = {"r": 4, "lora_alpha": 8}
    configs = [LoraConfig(**(defaults | setting)) for setting in settings]
    models = [get_peft_model(copy.deepcopy(tiny), config) for config in configs]
    layers.show_adapted(settings, models)


show_adapted(
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.[13]\.self_attn\.[qo]_proj"},
    {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 3]},
)

# %% [markdown]
# In the second setting, for example, `[13]` picks blocks 1 and 3, and `[qo]_proj` picks `q_proj` and `o_proj`.

# %% [markdown]
# ### Which layers are worth it?
#
# The LoRA paper adapts attention only, and concludes that query and value together do best for a given number of parameters.
# Its table 5 supports that only in part: all four attention matrices at rank 2 are as good on one of its tasks, WikiSQL (73.7),
# and better on another, MNLI (91.7 against 91.3). [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/) finds that all
# linear layers do better than attention alone.
#
# The table below compares three choices on this course's model, with ranks at which each trains about the same number of
# parameters. The task is `sailor` from lesson 2: say a sentence like a sailor. `feed forward` means the three layers
# of a Llama's `mlp`.

# %%
by_choice = data.load_results("targets")
right = "right on test rows, mean (lowest to highest of three seeds)"
sweeps.table(by_choice, ("targets", "rank", "trainable"), {right: ("test", ".1%")})

# %% tags=["claim"]
from tools.claims import swept

by_targets = swept("targets", "test", "targets")
assert by_targets["all_linear"][1] > max(
    by_targets["attention"][2], by_targets["feed_forward"][2]
), "best in every seed"

# %% [markdown]
# All linear layers are best in every seed: their lowest score is above the highest of the others. So `"all-linear"` is a good
# first choice if you have no reason for another one, such as memory, or a server that runs adapters on attention only.

# %% [markdown]
# ### Exercise: choose targets for five architectures (core, 15 min)
#
# A colleague wants adapters on **all linear layers of the attention, and on no other layer**. Return `target_modules` for the
# given architecture: `"llama"`, `"gpt2"`, `"gpt_neox"`, `"phi3"` or `"bert"`. The first table of this lesson has the names of
# the first four. The linear layers in each block of BERT are, in full:
#
# > attention.self.query, attention.self.key, attention.self.value, attention.output.dense, intermediate.dense, output.dense
#
# <details><summary>The check says that a layer of the MLP is adapted, too</summary>
# Two layers may end in the same word, such as <code>c_proj</code>. Give more of the name:
# <code>"attn.c_proj"</code>.
# </details>
# <details><summary>A layer of the attention is missing</summary>
# Besides query, key and value, attention has an output layer: <code>o_proj</code>, <code>dense</code> or <code>c_proj</code>.
# </details>


# %% exercise="04.targets" points=4
def attention_targets(architecture):
    """Return target_modules, a list of names or a regular expression, for all attention layers."""
    ### BEGIN SOLUTION
    return {
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "gpt2": ["c_attn", "attn.c_proj"],
        "gpt_neox": ["query_key_value", "attention.dense"],
        "phi3": ["qkv_proj", "o_proj"],
        "bert": ["query", "key", "value", "attention.output.dense"],
    }[architecture]
    ### END SOLUTION


lesson04.targets(attention_targets)

# %%
### BEGIN HIDDEN TESTS
assert lesson04.targets.outcome(attention_targets).passed
for _kind, _number in (("llama", 8), ("gpt2", 4), ("gpt_neox", 4), ("phi3", 4), ("bert", 8)):
    _config = LoraConfig(r=2, target_modules=attention_targets(_kind))
    _found = counting.adapted_layers(lesson04.architecture(_kind), _config)
    assert len(_found) == _number and all("att" in layer.name for layer in _found), _kind
### END HIDDEN TESTS

# %% [markdown]
# ## Set rank and alpha together
#
# LoRA multiplies its change by the scaling α/r. So if you raise the rank alone, you also lower the scaling. `rank_pattern` and
# `alpha_pattern` set other values for single layers, and `use_rslora=True` divides alpha by √r instead of r.
#
# **Predict:** what is the scaling in each row that the next cell prints? In its last setting, only `v_proj` gets another rank.

# %%
show_adapted(
    {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8},
    {"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8},
    {"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8, "use_rslora": True},
    {
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"v_proj": 16},
    },
)

# %% [markdown]
# The first three scalings are 2, 0.5 and, since √16 is 4, again 2. In the last setting `v_proj` has rank 16 but keeps alpha 8, so its
# scaling falls to 0.5. If you change the rank, revisit alpha. With alpha = 2r the scaling is always 2.
#
# Two more things to know: `lora_dropout` sets a share of the adapter's inputs to zero at random during training, against
# [overfitting](../docs/glossary.md#overfitting). And PEFT accepts a rank above the smaller side of a layer, although *A* and
# *B* then hold more numbers than the layer; `check_lora_config` reports that as `rank_too_large`.
#
# Why does LoRA divide by the rank at all? The paper (section 4.1) says that you then need no new learning rate when you change
# the rank. You can test that. The next cells train adapters of four ranks for eight steps each, and measure how far their
# [logits](../docs/glossary.md#logits) move. The module `loop` has the training loop of lesson 2. Its learning rate of 1e-3
# suits the course's small model, while models of billions of parameters take about 1e-4.

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
batches = loop.batches(tokenizer, data.load_task("sailor", "train").select(range(640)), size=16)


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()).to(
        device
    )


# %% [markdown]
# **Predict:** alpha is 4 throughout. Does the change of the logits grow, shrink or stay the same from rank 1 to rank 64 if the
# scaling is α/r? And if it is α/√r?

# %%
base_model = load_base()
probe = {key: value for key, value in batches[-1].items() if key != "labels"}
ranks, moved = (1, 4, 16, 64), {"α/r": [], "α/√r": []}
with torch.no_grad():
    base_logits = base_model(**probe).logits
for label, use_rslora in (("α/r", False), ("α/√r", True)):
    for rank in ranks:
        runtime.seed_everything(1)
        config = LoraConfig(
            r=rank, lora_alpha=4, use_rslora=use_rslora, target_modules="all-linear"
        )
        model = get_peft_model(load_base(), config)
        loop.train(model, batches[:8])
        with torch.no_grad():
            moved[label].append((model(**probe).logits - base_logits).abs().mean().item())

# %%
growth = {label: values[-1] / values[0] for label, values in moved.items()}
title = (
    f"From rank 1 to 64 the change becomes\n{growth['α/r']:.1f} times as large with α/r"
    f" and {growth['α/√r']:.1f} times as large with α/√r"
)
series = {label: (ranks, values) for label, values in moved.items()}
plotting.show_curves(series, title, "rank (alpha 4)", "mean change of a logit", ticks=ranks, log=2)

# %% [markdown]
# With α/r the change stays nearly the same at every rank, so the paper is right for these first steps. The reason is Adam,
# whose first steps have about the same size for every number in *B*. At rank r, *B* has r columns, which together make about r
# times the change of one, and α/r divides by that r. With α/√r the change grows with the rank.
# [rsLoRA](https://arxiv.org/abs/2312.03732) argues that long training at high ranks needs this, which eight steps can't show.
#
# ### Find the fault in a run that learns slowly
#
# A colleague has read that "a scaling of 2 is usual", and sends you the configuration in the next cell's first line, with its
# losses. There was no error and no warning.
#
# **Predict:** what is wrong with the configuration?

# %%
colleagues = LoraConfig(r=32, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
runtime.seed_everything(1)
slow = loop.train(get_peft_model(load_base(), copy.deepcopy(colleagues)), batches[:20])
print("losses:", ", ".join(f"{loss:.2f}" for loss in slow[::3]))
print(validation.check_lora_config(base_model, colleagues))

# %% [markdown]
# The colleague took alpha for the scaling itself. But alpha is divided by the rank, so the scaling is 2/32 instead of 2, which
# is 32 times too small. `check_lora_config` warns of that. The loss falls all the same, only slowly, so you might look for the
# fault in the data. The next cell repeats the run with alpha 64.

# %%
runtime.seed_everything(1)
mended = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
fast = loop.train(get_peft_model(load_base(), mended), batches[:20])
steps = range(1, 21)
series = {"alpha 2, scaling 0.0625": (steps, slow), "alpha 64, scaling 2": (steps, fast)}
title = f"With alpha 64 the loss falls to {fast[-1]:.2f}, with alpha 2 to {slow[-1]:.2f}"
plotting.show_curves(series, title, "step", "training loss (nats)", ticks=(1, 5, 10, 15, 20))

# %% [markdown]
# ## Train more than A and B
#
# Some settings train other numbers besides *A* and *B*. The next cell tries four of them on a tiny model of another
# architecture, OPT, because its layers have biases and a Llama's have none.
#
# - `use_dora`: [DoRA](../docs/glossary.md#dora) ([Liu et al. 2024](https://arxiv.org/abs/2402.09353)) puts one more trained
#   number beside each output of an adapted layer.
# - `bias`: the model's biases are trained in place, here those of the adapted layers.
# - `modules_to_save`: a copy of a whole layer is trained.
# - `trainable_token_indices`: copies of single rows of the embedding are trained, for example those of tokens that you added.
#
# **Predict:** after one training step the adapter is switched off with `disable_adapter()`. Which of these settings leave a
# model that no longer gives the base model's output?

# %%
opt_config = transformers.OPTConfig(
    vocab_size=60,
    hidden_size=64,
    ffn_dim=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    word_embed_proj_dim=64,
    max_position_embeddings=64,
    dropout=0.0,
)
ids = torch.arange(24).reshape(2, 12)
rows = []
for setting in (
    {},
    {"use_dora": True},
    {"bias": "lora_only"},
    {"modules_to_save": ["fc2"]},
    {"trainable_token_indices": [7, 9]},
):
    opt = transformers.OPTForCausalLM(opt_config).eval()
    with torch.no_grad():
        before = opt(ids).logits
    model = get_peft_model(opt, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **setting))
    in_a_and_b, elsewhere = layers.count_trained(model)
    loop.train(model, [{"input_ids": ids, "labels": ids}])
    with torch.no_grad(), warnings.catch_warnings(record=True), model.disable_adapter():
        restored = torch.equal(model(ids).logits, before)
    label = layers.as_code(setting) if setting else "LoRA alone"
    rows.append([label, f"{in_a_and_b:,}", f"{elsewhere:,}", restored])
plotting.table(
    ["setting", "trained in A and B", "trained elsewhere", "switched off, equals the base"], rows
)

# %% [markdown]
# Only `bias` doesn't give the base back. The other settings train copies, or further numbers beside the base's own. Biases are
# trained in place, so switching the adapter off can't restore them. PEFT warns of that (the cell hides the warning). With
# `bias="none"`, the default, it can't happen.
#
# ### A new head
#
# A classifier needs an output layer that the base model doesn't have, called a **head**. It begins with random numbers, and
# LoRA freezes it like the rest unless you say otherwise. The task is `mood`: is the guest who wrote a review happy? The next
# cells train LoRA around a frozen head, and then with a trained head, for which there are two settings. Each adapter is then
# loaded into five fresh copies of the model, whose heads have new random numbers, as in a program that starts again.
#
# **Predict:** can LoRA learn around a frozen random head? What is left of its accuracy after loading?


# %%
pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def classifier(seed):
    """The base with a new, random head of two outputs."""
    runtime.seed_everything(seed)
    transformers.utils.logging.set_verbosity_error()  # else it reports that the head is new
    model = AutoModelForSequenceClassification.from_pretrained(
        paths.base_model(), num_labels=2, pad_token_id=pad_id, dtype=runtime.dtype()
    ).to(device)
    transformers.utils.logging.set_verbosity_warning()
    return model


def reviews(rows):
    """Token ids (batch, longest) with their mask, and labels (batch): 1 is happy."""
    texts = [row["prompt"][0]["content"] for row in rows]
    ids = [{"input_ids": tokenizer(text)["input_ids"], "labels": []} for text in texts]
    happy = [int(row["completion"][0]["content"] == "happy") for row in rows]
    return {**loop.collate(tokenizer, ids), "labels": torch.tensor(happy, device=device)}


def accuracy(model, batch):
    """The share of reviews that get the right label."""
    with torch.no_grad():
        return (model.eval()(**batch).logits.argmax(-1) == batch["labels"]).float().mean().item()


train_rows, check_rows = (list(data.load_task("mood", part)) for part in ("train", "validation"))
train_batches = [reviews(train_rows[start : start + 16]) for start in range(0, 320, 16)]
check_batch = reviews(check_rows[:64])

# %%
rows = []
for label, setting in {
    "LoRA alone": {},
    '`modules_to_save=["score"]`': {"modules_to_save": ["score"]},
    '`task_type="SEQ_CLS"`': {"task_type": "SEQ_CLS"},
}.items():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, **setting)
    model = get_peft_model(classifier(seed=1), copy.deepcopy(config))
    loop.train(model, train_batches, learning_rate=3e-3)
    saved = get_peft_model_state_dict(model)
    found = []
    for seed in range(2, 7):
        tomorrow = get_peft_model(classifier(seed), copy.deepcopy(config))
        set_peft_model_state_dict(tomorrow, saved)
        found.append(accuracy(tomorrow, check_batch))
    loaded = ", ".join(f"{value:.0%}" for value in sorted(found))
    has_head = any("score" in name for name in saved)
    rows.append([label, has_head, f"{accuracy(model, check_batch):.0%}", loaded])
plotting.table(
    ["setting", "head in the file", "accuracy after 20 steps", "loaded on five new heads"], rows
)

# %% [markdown]
# LoRA does learn around a frozen random head. But what it learned fits that one head, and the head is not in the file. With
# five new heads the accuracy is no better than guessing, and with one of them far worse, because that head swaps the labels.
# You get no error message. With `modules_to_save` the head is trained and saved with the adapter. `task_type="SEQ_CLS"` does
# the same for heads that are called `classifier` or `score`. **If a layer is new, it must be trained and saved.**
#
# ## Count parameters from the config
#
# Each adapted layer gets an *A* of shape (r, inputs) and a *B* of shape (outputs, r). So the shapes of the layers are enough to
# count what LoRA will train.
#
# ### Exercise: count before you train (warm-up, 5 min)
#
# You get the shapes of the layers to adapt, a list of (inputs, outputs), and the rank. Return how many parameters LoRA trains.
# Expected for `[(256, 256), (256, 576)]` and rank 8: 10752.
#
# <details><summary>My count is far too large</summary>
# <em>A</em> and <em>B</em> are two matrices: their sizes add up.
# </details>
# <details><summary>My count is right for square layers only</summary>
# <em>A</em> has as many columns as the layer has inputs, <em>B</em> as many rows as it has outputs.
# </details>


# %% exercise="04.count" points=2
def count_lora(shapes, rank):
    """Return how many parameters are trained; `shapes` is a list of (inputs, outputs)."""
    ### BEGIN SOLUTION
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)
    ### END SOLUTION


lesson04.count(count_lora)

# %%
### BEGIN HIDDEN TESTS
assert lesson04.count.outcome(count_lora).passed
assert count_lora([(256, 256), (256, 576)], 8) == 10752
_model = get_peft_model(copy.deepcopy(tiny), LoraConfig(r=3, target_modules=["k_proj", "up_proj"]))
_trained = sum(p.numel() for p in _model.parameters() if p.requires_grad)
assert count_lora([(64, 64), (64, 128)] * 4, 3) == _trained
### END HIDDEN TESTS

# %% [markdown]
# `counting.count_lora_parameters` does this for a whole model: it builds the model on the meta device, and asks PEFT which
# layers would get an adapter. The next cell compares it with what PEFT really trains.

# %%
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(load_base(), config)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
own = counting.count_lora_parameters(base_model.config, config)
print(f"course model, r = 8: PEFT trains {trained:,}, counted are {own.trainable:,}")

# %% [markdown]
# Both counts are the same. Now count for models that you don't have. GPT-3's weights are not public, but its sizes are: 96
# layers of width 12,288. The next cell writes down these sizes, and those of Llama 3.1 8B.

# %%
gpt3 = AutoConfig.for_model(
    "opt",
    hidden_size=12288,
    ffn_dim=49152,
    num_hidden_layers=96,
    num_attention_heads=96,
    word_embed_proj_dim=12288,
    max_position_embeddings=2048,
    vocab_size=50257,
)
llama = AutoConfig.for_model(
    "llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
)

# %% [markdown]
# **Predict:** you may read that LoRA trains "10,000 times fewer" parameters than full fine-tuning, that it trains "99% fewer",
# and that its files have "a few megabytes". Which of these hold for GPT-3 at rank 4, Llama 3.1 8B at ranks 8 and 64, and the
# course's model at rank 8?

# %%
cases = {
    "GPT-3, q and v, r = 4": (gpt3, 4, ["q_proj", "v_proj"]),
    "Llama 3.1 8B, q and v, r = 8": (llama, 8, ["q_proj", "v_proj"]),
    "Llama 3.1 8B, all linear, r = 64": (llama, 64, "all-linear"),
    "this course's model, all linear, r = 8": (base_model.config, 8, "all-linear"),
}
rows = []
for case, (shape, rank, targets) in cases.items():
    size = counting.count_lora_parameters(shape, LoraConfig(r=rank, target_modules=targets))
    times, megabytes = size.base / size.adapter, 2 * size.adapter / 1e6
    rows.append(
        [case, f"{size.adapter:,}", f"{size.share:.3%}", f"{times:,.0f}", f"{megabytes:,.1f} MB"]
    )
plotting.table(["", "LoRA's parameters", "share of all", "times fewer", "file in 16 bits"], rows)

# %% tags=["claim"]
fewer = 175e9 / (96 * 2 * 4 * (12288 + 12288))
assert 9000 < fewer < 10_000, "rounded up"

# %% [markdown]
# None of them holds in all cases. "10,000 times" is the LoRA paper's figure for GPT-3 at rank 4: 175 billion divided by the
# adapter's parameters is {{fewer:,.0f}}, rounded up. (The config in the cell has slightly fewer than 175 billion.) A narrow
# model or a high rank gives far less. "99% fewer" means a share of 1%: the first two rows are far below it, and the last two
# above. "A few megabytes" holds for Llama at rank 8 and for ours, but not for the other two.
#
# You can check a paper with the same count. The next table has figures that the LoRA paper prints, with ours beside them.

# %%
bert = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
xxl = dict(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144)
all_four = ["q_proj", "k_proj", "v_proj", "out_proj"]
models = {
    "RoBERTa base": AutoConfig.for_model("roberta", **bert),
    "DeBERTa XXL": AutoConfig.for_model("deberta-v2", **xxl),
    "GPT-2 medium": AutoConfig.for_model("gpt2", n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 large": AutoConfig.for_model("gpt2", n_embd=1280, n_layer=36, n_head=20),
    "GPT-3": gpt3,
}
published = [  # model, adapted layers, rank, as printed, where
    ("RoBERTa base", ["query", "value"], 8, "0.3M", "table 2"),
    ("DeBERTa XXL", ["query_proj", "value_proj"], 16, "4.7M", "table 2"),
    ("GPT-2 medium", ["c_attn"], 4, "0.35M", "table 3"),
    ("GPT-2 large", ["c_attn"], 4, "0.77M", "table 3"),
    ("GPT-3", ["q_proj", "v_proj"], 8, "37.7M", "table 15"),
    ("GPT-3", all_four, 4, "37.7M", "table 15"),
    ("GPT-3", all_four, 2, "37.7M", "appendix D.4"),
]
rows = []
for name, targets, rank, printed_as, where in published:
    lora = LoraConfig(r=rank, target_modules=targets)
    counted = counting.count_lora_parameters(models[name], lora).adapter
    decimals = len(printed_as.removesuffix("M").partition(".")[2])
    agrees = "yes" if printed_as == f"{counted / 1e6:.{decimals}f}M" else "**no**"
    adapted = f"{', '.join(targets)}, r = {rank}"
    rows.append([name, adapted, f"{counted:,}", f"{printed_as} ({where})", agrees])
plotting.table(["model", "adapted", "counted", "printed", "agrees"], rows)

# %% tags=["claim"]
for _printed, _width, _blocks in (("0.35", 1024, 24), ("0.77", 1280, 36)):
    _for_rank_1 = 2 * _blocks * (_width + _width)
    assert _printed not in {f"{_rank * _for_rank_1 / 1e6:.2f}" for _rank in range(1, 20)}, (
        "no whole rank"
    )

# %% [markdown]
# Most agree. For GPT-2, no whole rank on these layers gives the printed figures. For GPT-3, appendix D.4 states rank 2 for
# 37.7M parameters, where the paper's own table 15 has rank 4, and 4 agrees with the count.
#
# ## Plan the memory
#
# Training holds four things in memory: the weights, their gradients, the optimizer's state, and the
# [activations](../docs/glossary.md#activations), which are intermediate results that the backward pass needs. Adam's state is
# two numbers for each trained parameter. So in float32 a trained parameter takes 4 + 4 + 8 = 16 bytes, and a frozen one takes
# 4. `memory.estimate_memory` predicts all four parts from the config, the activations as an upper bound. The next cell compares
# it with a real training step of the course's model, on a batch of 16 rows.
#
# **Predict:** LoRA trains under 4% of the parameters here. How much memory does it take, compared with training all weights:
# 4%, a quarter, or most of it?

# %%
rows, total, batch = [], {}, batches[0]
for method, lora in (("full", None), ("lora", config)):
    model = get_peft_model(load_base(), lora) if lora else load_base()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss, activations = layers.loss_and_kept(model, batch)
    loss.backward()
    optimizer.step()
    held = memory.measure_training_state(model, optimizer)
    measured = {**held.sizes(), "activations": activations, "total": held.total + activations}
    total[method] = measured["total"]
    size = dict(batch_size=16, sequence_length=batch["input_ids"].shape[1], dtype=runtime.dtype())
    estimate = memory.estimate_memory(base_model.config, method, lora, **size).sizes()
    for part in measured:
        rows.append([method, part, f"{estimate[part] / 1e6:.1f}", f"{measured[part] / 1e6:.1f}"])
del model, optimizer, loss
plotting.table(["method", "part", "predicted, MB", "measured, MB"], rows)
print(f"LoRA takes {total['lora'] / total['full']:.0%} of the memory of full fine-tuning.")

# %% [markdown]
# LoRA takes most of it. Gradients and optimizer state shrink to almost nothing, but the weights stay in memory, and so do most of
# the activations. Activations grow with the number of tokens in a batch, and on a small model with 16 rows they are the largest
# part. (Their prediction is an upper bound, so it lies above what was measured.)
#
# On a model of 8 billion parameters the proportions are different. The next cell draws predictions for Llama 3.1 8B in
# bfloat16, which takes 2 bytes a number, with one row of 1,024 tokens. There are four bars: training all weights, LoRA,
# [QLoRA](../docs/glossary.md#qlora), and QLoRA with [gradient checkpointing](../docs/glossary.md#gradient-checkpointing). QLoRA
# holds the frozen weights in 4 bits (lesson 5). Checkpointing drops most activations, and computes them again in the backward
# pass.
#
# **Predict:** which part is the largest in each of the first three bars?

# %%
narrow = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def estimate(method, rows=1, tokens=1024, **settings):
    """Predicted bytes of training Llama 3.1 8B with bfloat16 weights."""
    size = dict(batch_size=rows, sequence_length=tokens, dtype="bfloat16")
    return memory.estimate_memory(llama, method, narrow, **size, **settings)


bars = {
    "all weights": estimate("full"),
    "LoRA, r = 16": estimate("lora"),
    "QLoRA, r = 16": estimate("qlora", double_quantization=True),
    "QLoRA with checkpointing": estimate(
        "qlora", double_quantization=True, gradient_checkpointing=True
    ),
}
title = "LoRA removes gradients and optimizer state, QLoRA most of the weights"
plotting.show_memory(bars, title, "for Llama 3.1 8B and one row of 1,024 tokens")

# %% tags=["claim"]
paper_bytes = 1.2e12 / 175e9  # per parameter: section 4.2 of the paper, GPT-3 with Adam
assert 175e9 * 2 == 350e9, "350 GB are the frozen weights at 2 bytes each"
assert 6.5 < paper_bytes < 7, "less than 7 bytes"
assert 2 + 2 + 2 * 4 == 12, "take 12 bytes"

# %% [markdown]
# If all weights are trained, the optimizer's state is the largest part. LoRA shrinks it and the gradients to almost nothing, so
# the frozen weights are the largest part in the second bar. In 4 bits the weights shrink too, and the activations are the largest
# part. Neither LoRA nor QLoRA reduces the activations: here they even grow, because each adapted layer keeps its input in float32.
#
# You may read that LoRA cuts memory "to a third". The LoRA paper reports 350 GB instead of 1.2 TB for GPT-3. The 350 GB are the
# frozen weights at 2 bytes each. But 1.2 TB are less than 7 bytes a parameter, while weights and gradients in 16 bits and
# Adam's state in 32 bits take 12 bytes. Counted with 12, LoRA saves more than the paper says.
#
# The bars count bytes of tensors. A GPU also needs memory for CUDA itself, and loses some in gaps between tensors
# (fragmentation). So leave about a tenth free. That is a rule of thumb, which we did not measure.
#
# ### When memory runs out
#
# ![A ladder of six rungs. From the bottom: LoRA instead of all weights; one row at a time with gradient accumulation; gradient checkpointing; the base in 4 bits; shorter rows; a smaller model. Each rung names what it shrinks and what it costs](../images/memory_ladder.png)
#
# If training doesn't fit, go up this ladder one rung at a time, because each one costs something. The second rung keeps the
# [effective batch](../docs/glossary.md#effective-batch): with `per_device_train_batch_size=1` and
# `gradient_accumulation_steps=16` the optimizer still steps after 16 rows. Each row of the table adds one rung to the row
# above, and its last column says which size of GPU would do.

# %%
ladder = {
    "all weights, 16 rows at once": estimate("full", rows=16),
    "LoRA, 16 rows at once": estimate("lora", rows=16),
    "1 row at a time, 16 accumulated": estimate("lora"),
    "and checkpointing": estimate("lora", gradient_checkpointing=True),
    "and 4 bits": bars["QLoRA with checkpointing"],
    "and rows of 512 tokens": estimate(
        "qlora", tokens=512, double_quantization=True, gradient_checkpointing=True
    ),
}
rows = []
for rung, needed in ladder.items():
    large_enough = [gb for gb in (8, 12, 16, 24, 48, 80) if needed.total <= 0.9 * gb * 1e9]
    card = f"{large_enough[0]} GB" if large_enough else "none of 8 to 80 GB"
    rows.append([rung, f"{needed.total / 1e9:,.1f}", card])
plotting.table(["Llama 3.1 8B", "GB in all", "with a tenth left free, fits into"], rows)

# %% [markdown]
# With 16 rows at once most of the memory goes to activations, so LoRA alone hardly helps, and the second rung helps most.

# %% [markdown]
# ### Exercise: write a configuration within a budget (core, 15 min)
#
# You get a model's config and a GPU's memory in bytes. Return a `LoraConfig` for a causal language model with all linear
# layers, alpha twice the rank, and the **highest** of the ranks 64, 32, 16, 8 and 4 that fits. It fits if the `total` of
# `memory.estimate_memory` is at most nine tenths of the budget. Estimate for `"lora"`, `batch_size=1`, `sequence_length=1024`,
# `dtype="bfloat16"` and `gradient_checkpointing=True`. If no rank fits, return `None`: that is a case for QLoRA.
#
# <details><summary>The check says that a higher rank would fit</summary>
# Try the ranks from the highest to the lowest, and return the first that fits.
# </details>
# <details><summary>The check says that it does not fit</summary>
# Compare with <code>0.9 * budget</code>, and take <code>.total</code>, which has all four parts.
# </details>


# %% exercise="04.budget" points=4
def config_within(model_config, budget):
    """Return the LoraConfig of the highest rank that fits into `budget` bytes, or None."""
    ### BEGIN SOLUTION
    for rank in (64, 32, 16, 8, 4):
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        needed = memory.estimate_memory(
            model_config,
            "lora",
            lora,
            batch_size=1,
            sequence_length=1024,
            dtype="bfloat16",
            gradient_checkpointing=True,
        )
        if needed.total <= 0.9 * budget:
            return lora
    return None
    ### END SOLUTION


lesson04.budget(config_within)

# %%
### BEGIN HIDDEN TESTS
assert lesson04.budget.outcome(config_within).passed
assert config_within(tiny.config, 1000) is None
assert config_within(tiny.config, 10**12).r == 64
assert config_within(llama, 24e9).lora_alpha == 128
### END HIDDEN TESTS

# %% [markdown]
# ## Recap
#
# Print the model's layers, name targets that exist on it, and let `check_lora_config` confirm that each name matches. Without a
# reason for other layers, take all linear ones. Choose a rank and let alpha follow it, because the scaling is α/r. Train and
# save whatever is new, such as a head. You can compute from the config whether training fits: LoRA removes gradients and
# optimizer state of the frozen weights, a 4-bit base removes most of the weights, and smaller batches and checkpointing reduce
# the activations.

# %%
scores = sweeps.over_seeds(by_choice, "test", "targets")
three_bars = ", ".join(f"{bar.total / 1e9:.0f} GB" for bar in list(bars.values())[:3])
plotting.table(
    ["", "measured or computed"],
    [
        ["right on `sailor`: all linear layers", sweeps.spread(scores["all_linear"], ".1%")],
        ["right on `sailor`: attention alone", sweeps.spread(scores["attention"], ".1%")],
        ["loss after 20 steps at rank 32: alpha 2, alpha 64", f"{slow[-1]:.2f}, {fast[-1]:.2f}"],
        ["trained parameters of the course's model, r = 8", f"{own.share:.1%} of all"],
        ["LoRA's memory, all weights = 100%", f"{total['lora'] / total['full']:.0%}"],
        ["Llama 3.1 8B, one row: all weights, LoRA, QLoRA", three_bars],
    ],
)
progress("04")

# %% [markdown]
# ## Take it to work
#
# Put the folder or the hub id of one of your models between the quotes, and your own configuration below it. The cell reads
# only the model's config, no weights.

# %%
my_model = ""
my_lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
my_config = load_config(my_model or paths.base_model())
print(validation.check_lora_config(counting.meta_model(my_config), my_lora))
print(counting.count_lora_parameters(my_config, my_lora))
print(
    memory.estimate_memory(
        my_config, "lora", my_lora, batch_size=1, sequence_length=512, dtype="bfloat16"
    )
)

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · You raise the rank from 8 to 64 and leave alpha alone. What else has changed?</summary>
# The scaling, which is now an eighth of what it was. In the first steps the size of the change stays about the same, because Adam's
# steps add up over the larger rank. But you have changed two settings at once, so decide on alpha, too.
# </details>
# <details><summary>2 · LoRA trains one parameter in a hundred. Why doesn't it take a hundredth of the memory?</summary>
# Gradients and optimizer state shrink with the trained parameters. The frozen weights stay in memory, and so do nearly all
# activations. These two are what 4-bit weights, checkpointing and smaller batches reduce.
# </details>
# <details><summary>3 · A recipe for a Llama runs on another model without an error. Is it right there?</summary>
# Not necessarily. PEFT raises an error only if no name matches. It passes over a single name that matches nothing, and a name that
# only some blocks have adapts only those. Look at the table of adapted layers, or let <code>check_lora_config</code> do so.
# </details>
#
# ## Where to read on
#
# - [Every field of LoraConfig](https://huggingface.co/docs/peft/main/en/package_reference/lora), in PEFT's documentation
# - [LoRA](https://arxiv.org/abs/2106.09685), Hu et al. 2021: section 4.2 on memory, table 15 for its settings
# - [A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA](https://arxiv.org/abs/2312.03732), Kalajdzievski 2023
# - [Recipes](../docs/recipes.md) with values for real models, and [Decide](../docs/decide.md)
#
# Next: [lesson 5](05_qlora.ipynb) trains on a base in four bits. [Lesson 3](03_lora_finetuning.ipynb) compares ranks and
# learning rates. A [deep dive](deep_low_rank.ipynb) looks at why a low rank can be enough.
