# %% [markdown]
# # Configure LoRA and plan its cost
#
# You have a model, some rows, and a GPU with so much memory. **Which settings do you give LoRA, and how do you know beforehand
# that training will fit?** Much of the answer can be computed from the model's config alone, before you download a single
# weight. The rest takes a short run and a look at one table.
#
# | | |
# |---|---|
# | **What you'll do** | choose target modules for printed models; see what rank, alpha and other settings change; find the fault in a slow run; count parameters and memory of models that you don't have; write a configuration within a budget |
# | **What you'll learn** | which layers a name matches, and what happens when it matches none; how rank and alpha belong together; what must be saved besides *A* and *B*; where the memory goes, and what to do when it runs out |
# | **What you'll need** | [lesson 2](02_lora_from_scratch.ipynb) for *A*, *B* and the scaling; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import copy
import warnings

from adapter_checks import counting, memory
from adapter_checks.errors import InputError
from course_utils import data, layers, paths, plotting, runtime, sweeps, validation
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

from course_utils.progress import ProgressLine

runtime.seed_everything(1)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · on {device}"
)

# %% [markdown]
# ## Look at the layers before you name them
#
# `target_modules` names the layers that get an adapter. Architectures call the same thing by different names, so the first step
# is to print them. You don't need the weights for that: `counting.meta_model` builds a model from its config on PyTorch's [meta
# device](../docs/glossary.md#meta-device), where tensors have a shape and no numbers. The six models below are small ones of
# real architectures; larger ones have the same names.


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
plotting.table(
    ["model", "linear layers of the blocks"],
    [
        [
            name,
            "; ".join(
                f"**{part}**: {', '.join(names)}"
                for part, names in layers.of_the_blocks(model).items()
            ),
        ]
        for name, model in printed.items()
    ],
)

# %% [markdown]
# Llama has separate layers for query, key and value. GPT-2, Pythia and Phi-3 have all three in one layer. Qwen3-MoE is a
# mixture of experts, whose experts are stacked into one tensor and are no linear layers, so they don't appear. Qwen3-Next mixes
# two kinds of attention.
#
# **Predict:** a recipe for a Llama says `target_modules=["q_proj", "v_proj"]`. On which of the six does this adapt two layers
# in every block, where is it an error, and where does it do less than you would think, without an error?

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
# An error is the better outcome, because you notice it. On Qwen3-Next the recipe adapts one block of four, since only that one
# has a `q_proj`. The run would start and train a quarter of the blocks. The check says `few_layers` there. On Qwen3-MoE it
# adapts the attention and leaves all experts as they are.
#
# Names that match nothing are an error only if *all* of them do. On GPT-2, for example, `["c_attn", "v_proj"]` is accepted:

# %%
half_right = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "v_proj"])
print(validation.check_lora_config(printed["GPT-2"], half_right))

# %% [markdown]
# So run `check_lora_config(model, config)` before every training; it reads both and changes nothing.
#
# ### Write targets in four ways
#
# A list holds the ends of names, up to a dot: `"attn.c_proj"` matches `transformer.h.0.attn.c_proj`. A string is a regular
# expression for the *whole* name. `"all-linear"` takes every linear layer but the output layer. `exclude_modules` and
# `layers_to_transform` take some away again. (The latter takes the first number in a name for the block's; on a model with
# several, `layers_pattern` says which one.) Below, each is tried on a small Llama with four blocks, numbered from 0 to 3.

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
    """Wrap a copy of the tiny Llama with each setting, and show which layers got an adapter."""
    rows = []
    for setting in settings:
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, **setting})
        adapted = layers.adapted(get_peft_model(copy.deepcopy(tiny), config))
        written = ", ".join(f"{key}={value!r}" for key, value in setting.items())
        labels = [f"`{written}`".replace(r"\\", "\\")] + [""] * (len(adapted) - 1)
        rows += [[label, *row] for label, row in zip(labels, adapted)]
    plotting.table(["setting", *layers.COLUMNS], rows)


show_adapted(
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.[13]\.self_attn\.[qo]_proj"},
    {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 3]},
)

# %% [markdown]
# ### Which layers are worth it?
#
# The LoRA paper adapts attention only, and says that query and value together do best for a given budget. Its table 5 does not
# bear that out: all four attention matrices at rank 2 reach the same 73.7 on WikiSQL, and are ahead on MNLI with 91.7 against
# 91.3. [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/) finds all linear layers better than attention alone. The
# sweep below compares three choices on this course's model, each with about the same number of parameters.

# %%
scores = sweeps.over_seeds(data.load_results("targets"), "test", "targets", "rank")
plotting.table(
    [
        "adapted layers",
        "rank",
        "right on test rows of `sailor`, mean (lowest to highest of three seeds)",
    ],
    [
        [targets.replace("_", " "), rank, sweeps.spread(group)]
        for (targets, rank), group in scores.items()
    ],
)

# %% tags=["claim"]
from tools.claims import swept

by_targets = swept("targets", "test", "targets")
assert by_targets["all_linear"][1] > max(
    by_targets["attention"][2], by_targets["feed_forward"][2]
), "best in every seed"

# %% [markdown]
# All linear layers are best in every seed, so `"all-linear"` is a good first choice where you have no reason for another one. A
# reason can be memory, or a server that supports attention only.

# %% [markdown]
# ### Exercise: choose targets for five architectures (core, 15 min)
#
# A colleague wants adapters on **all linear layers of the attention, and on no other layer**. Return `target_modules` for the
# architecture that is given: `"llama"`, `"gpt2"`, `"gpt_neox"`, `"phi3"` or `"bert"`. The table above has the names of the
# first four. In each block of BERT they are, in full:
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
# The change is scaled by α/r. So if you raise the rank alone, you also lower the scaling. `rank_pattern` and `alpha_pattern`
# set other values for single layers, and `use_rslora=True` divides alpha by √r instead of r.
#
# **Predict:** what is the scaling of each row?

# %%
show_adapted(
    {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8},
    {"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8},
    {"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 16}},
)

# %% [markdown]
# The first three are 2, 0.5 and, as √16 is 4, again 2. In the last setting `v_proj` has rank 16 but keeps alpha 8, so its
# scaling falls to 0.5. If you change the rank, revisit alpha. A habit that does this by itself is alpha = 2r, which keeps the
# scaling at 2.
#
# Two more numbers belong here. `lora_dropout` drops a share of the adapter's inputs, in training mode only, against
# overfitting. And a rank above a layer's smaller side is accepted, though *A* and *B* then have more numbers than the layer
# itself; `check_lora_config` says `rank_too_large`.
#
# Why does LoRA divide by the rank at all? The paper says: so that one learning rate serves every rank (section 4.1). You can
# test that. The next cells train adapters of four ranks for eight steps each, and measure how far their
# [logits](../docs/glossary.md#logits) move. The rate of 1e-3 suits the course's model, while models of billions of parameters
# take about 1e-4.

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()).to(
        device
    )


def encode(row):
    """One conversation as token ids, with labels on the answer only."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def collate(rows):
    """Rows of different lengths -> tensors (batch, longest), padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": pad_id, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: torch.tensor(
            [row[key] + [fill] * (longest - len(row[key])) for row in rows], device=device
        )
        for key, fill in filled.items()
    }


def train(model, batches, learning_rate=1e-3):
    """A bare loop over the batches, as in lesson 2. Returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    line, losses = ProgressLine(len(batches)), []
    model.train()
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        line.update(step + 1, f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


examples = [encode(row) for row in data.load_task("sailor", "train").select(range(640))]
batches = [collate(examples[start : start + 16]) for start in range(0, 640, 16)]

# %% [markdown]
# **Predict:** alpha is 4 throughout. From rank 1 to rank 64, does the change of the logits grow, shrink or stay, with α/r and
# with α/√r?

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
        train(model, batches[:8])
        with torch.no_grad():
            moved[label].append((model(**probe).logits - base_logits).abs().mean().item())

# %%
growth = {label: values[-1] / values[0] for label, values in moved.items()}
title = "From rank 1 to 64 the change becomes\n" + " and ".join(
    f"{factor:.1f} times as large with {label}" for label, factor in growth.items()
)
series = {label: (ranks, values) for label, values in moved.items()}
axes = "rank (alpha 4)", "mean change of a logit"
figure = plotting.curves(series, title, *axes)
figure.axes[0].set_xscale("log", base=2)
figure.axes[0].set_xticks(ranks, ranks)
plotting.show(figure, plotting.describe(series, title, *axes))

# %% [markdown]
# With α/r the change stays nearly the same at every rank, so the paper is right for these first steps. The reason is Adam: its
# step has about the same size for every entry of *B*, so *r* of them add up to *r* times the change, and α/r divides that out.
# With α/√r the change grows with the rank. [rsLoRA](https://arxiv.org/abs/2312.03732) argues that long training at high ranks
# needs this; eight steps can't show it.
#
# ### Find the fault in a run that learns slowly
#
# A colleague read that "a scaling of 2 is usual", and sends you this configuration and its losses. There was no error and no
# warning.
#
# **Predict:** what is wrong with the configuration?

# %%
colleagues = LoraConfig(r=32, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
runtime.seed_everything(1)
slow = train(get_peft_model(load_base(), copy.deepcopy(colleagues)), batches[:20])
print("losses:", ", ".join(f"{loss:.2f}" for loss in slow[::3]))
print(validation.check_lora_config(base_model, colleagues))

# %% [markdown]
# Alpha was taken for the scaling itself. It is divided by the rank, so the scaling is 2/32 where 2 was meant, 32 times too
# small. The loss falls all the same, only slowly, and one would look for the fault in the data. The same run with alpha 64:

# %%
runtime.seed_everything(1)
mended = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
fast = train(get_peft_model(load_base(), mended), batches[:20])
series = {
    f"alpha {alpha}, scaling {alpha / 32:g}": (range(1, 21), losses)
    for alpha, losses in ((2, slow), (64, fast))
}
title = f"With alpha 64 the loss falls to {fast[-1]:.2f}, with alpha 2 to {slow[-1]:.2f}"
axes = "step", "training loss (nats)"
figure = plotting.curves(series, title, *axes)
figure.axes[0].set_xticks((1, 5, 10, 15, 20))
plotting.show(figure, plotting.describe(series, title, *axes))

# %% [markdown]
# ## Train more than A and B
#
# Some settings train other numbers as well. The next cell tries five on a tiny OPT, which has biases in its layers (a Llama has
# none): DoRA ([Liu et al. 2024](https://arxiv.org/abs/2402.09353)), which also trains a size for each output; biases; a layer
# that is trained whole (`modules_to_save`); and single rows of the embedding (`trainable_token_indices`), for tokens that you
# added.
#
# **Predict:** after one training step the adapter is switched off with `disable_adapter()`. Which settings don't give
# back the base model?

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
    numbers = {"A and B": 0, "others": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "A and B" if ".lora_A." in name or ".lora_B." in name else "others"
            numbers[group] += parameter.numel()
    train(model, [{"input_ids": ids, "labels": ids}])
    with torch.no_grad(), warnings.catch_warnings(record=True), model.disable_adapter():
        restored = torch.equal(model(ids).logits, before)
    rows.append([f"`{setting}`", *(f"{count:,}" for count in numbers.values()), restored])
plotting.table(["setting", "in A and B", "in others", "switched off, equals the base"], rows)

# %% [markdown]
# Only biases don't come back. PEFT keeps a copy beside a layer that it trains whole, but it trains biases in place, so
# switching the adapter off can't restore them. With `bias="none"`, the default, this can't happen.
#
# ### A new head
#
# A classifier needs an output layer that the base model doesn't have, a **head**. It starts at random numbers, and LoRA freezes
# it like the rest unless you say otherwise. The task is `mood`: is a guest's review happy? Below, LoRA trains around a frozen
# head, and with a trained one. Then each adapter is saved and loaded on five copies of the model, as on other days, each with
# new random numbers in its head.
#
# **Predict:** can LoRA learn around a frozen random head? What is left of its accuracy after loading?


# %%
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
    batch = collate([{"input_ids": tokenizer(text)["input_ids"], "labels": []} for text in texts])
    happy = [int(row["completion"][0]["content"] == "happy") for row in rows]
    return {**batch, "labels": torch.tensor(happy, device=device)}


def accuracy(model, batch):
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
    train(model, train_batches, learning_rate=3e-3)
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
# LoRA learns around a frozen random head. But what it learned fits that one head, and the head is not in the file. On five new
# heads the accuracy is no better than guessing, and with one of them far worse, because that head swaps the labels. No error
# says so. With `modules_to_save` the head is trained and saved with the adapter, and `task_type="SEQ_CLS"` does the same for
# heads that are called `classifier` or `score`. **If a layer is new, it must be trained and saved.**
#
# ## Count parameters from the config
#
# Each adapted layer gets an *A* of shape (r, inputs) and a *B* of shape (outputs, r). So shapes are enough to
# count what LoRA will train.
#
# ### Exercise: count before you train (warm-up, 5 min)
#
# You get the shapes of the layers to adapt, a list of (inputs, outputs), and the rank. Return how many parameters
# LoRA trains. Expected for `[(256, 256), (256, 576)]` and rank 8: 10752.
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
# `counting.count_lora_parameters` does this for a whole model: it builds the model on the meta device, and asks PEFT's rules
# which layers get an adapter. The next cell compares it with what PEFT really trains on our model, and then counts a model of
# 175 billion parameters. GPT-3's weights are not public, but its sizes are: 96 layers of width 12,288.
#
# **Predict:** the LoRA paper says that it trains "10,000 times" fewer parameters, other texts say "up to 99% fewer", and
# "adapters of a few megabytes". Which of these hold for all rows below?

# %%
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(load_base(), config)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
own = counting.count_lora_parameters(base_model.config, config)
print(f"course model, r = 8: PEFT trains {trained:,}, counted are {own.trainable:,}")
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
cases = {
    "GPT-3, q and v, r = 4": (gpt3, 4, ["q_proj", "v_proj"]),
    "Llama 3.1 8B, q and v, r = 8": (llama, 8, ["q_proj", "v_proj"]),
    "Llama 3.1 8B, all linear, r = 64": (llama, 64, "all-linear"),
    "this course's model, all linear, r = 8": (base_model.config, 8, "all-linear"),
}
sizes = {
    case: counting.count_lora_parameters(shape, LoraConfig(r=rank, target_modules=targets))
    for case, (shape, rank, targets) in cases.items()
}
plotting.table(
    ["", "LoRA's parameters", "share of all", "times fewer", "file in 16 bits"],
    [
        [
            case,
            f"{size.adapter:,}",
            f"{size.share:.3%}",
            f"{size.base / size.adapter:,.0f}",
            f"{2 * size.adapter / 1e6:,.1f} MB",
        ]
        for case, size in sizes.items()
    ],
)

# %% tags=["claim"]
fewer = 175e9 / (96 * 2 * 4 * (12288 + 12288))
assert 9000 < fewer < 10_000, "rounded up"

# %% [markdown]
# None holds for all. "10,000 times" is GPT-3 with rank 4, rounded up from {{fewer:,.0f}}; it depends on the width and the rank.
# "Up to 99%" is too little for the first two rows and too much for the last two. "A few megabytes" holds for narrow adapters.
#
# The same count can check a paper. These are figures of the LoRA paper, with our count beside them.

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
# Most agree. For GPT-2, no whole rank on these layers gives the printed figures. Appendix D.4 gives rank 2 for 37.7M, where the
# paper's own table 15 has 4, and 4 agrees. It pays to count for yourself.
#
# ## Plan the memory
#
# Training holds four things: the weights, their gradients, the optimizer's state, and the
# [activations](../docs/glossary.md#activations), the intermediate results that the backward pass needs. Adam keeps two numbers
# for each trained parameter. So in float32 a trained parameter takes 4 + 4 + 8 = 16 bytes, and a frozen one takes 4.
# `memory.estimate_memory` predicts all four parts from the config, the last as an upper bound. The next cell compares it with a
# real training step of the course's model, on a batch of 16 rows.
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
# Most of it. LoRA reduces gradients and optimizer state to almost nothing, but the weights stay in memory, and so do most of
# the activations. These grow with the number of tokens in a batch, and on a small model with 16 rows they are the largest part.
# (The prediction for activations is an upper bound, so the measured ones are smaller.)
#
# On a model of 8 billion parameters the proportions are others. The bars show the predictions for Llama 3.1 8B in bfloat16,
# with one row of 1,024 tokens at a time. QLoRA holds the frozen weights in 4 bits, which is lesson 5's theme. [Gradient
# checkpointing](../docs/glossary.md#gradient-checkpointing) drops most activations and computes them again in the backward
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
parts = {
    name: {
        part: getattr(bar, part) / 1e9
        for part in ("weights", "gradients", "optimizer", "activations")
    }
    for name, bar in bars.items()
}
title = "LoRA removes gradients and optimizer state, QLoRA most of the weights"
figure, alt = plotting.stacked_bars(
    parts, title, "GB, for Llama 3.1 8B and one row of 1,024 tokens"
)
plotting.show(figure, alt)

# %% tags=["claim"]
paper_bytes = 1.2e12 / 175e9  # per parameter: section 4.2 of the paper, GPT-3 with Adam
assert 175e9 * 2 == 350e9, "are the frozen weights in 16 bits"
assert 6.5 < paper_bytes < 7, "under 7 bytes"

# %% [markdown]
# For all weights the optimizer's state is the largest part. LoRA shrinks it and the gradients to almost nothing, so the frozen
# weights are the largest part that is left. In 4 bits they shrink too, and the activations lead, which neither LoRA nor QLoRA
# reduces.
#
# "Memory to a third" is the LoRA paper's case of GPT-3, 350 GB instead of 1.2 TB. The 350 GB are the frozen weights in 16 bits,
# and that agrees. The 1.2 TB are under 7 bytes a parameter, though weights and gradients in 16 bits and two moments in 32 bits
# take 12. Counted so, LoRA saves more than the paper says.
#
# The bars are bytes of tensors. A GPU also needs some for its CUDA context, and loses some between tensors
# (fragmentation). So leave about a tenth free; that is a rule of thumb, which we did not measure.
#
# ### When memory runs out
#
# ![A ladder of six rungs. From the bottom: LoRA instead of all weights; one row at a time with gradient accumulation; gradient checkpointing; the base in 4 bits; shorter rows; a smaller model. Each rung names what it shrinks and what it costs](../images/memory_ladder.png)
#
# Go up one rung at a time, because each one costs something. The second rung keeps the *effective* batch: with
# `per_device_train_batch_size=1` and `gradient_accumulation_steps=16` the optimizer still steps after 16 rows. The last column
# of the table says which size of GPU would do.

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
plotting.table(
    ["Llama 3.1 8B", "GB in all", "with a tenth left free, fits into"],
    [
        [
            name,
            f"{rung.total / 1e9:,.1f}",
            next(
                (f"{gb} GB" for gb in (8, 12, 16, 24, 48, 80) if rung.total <= 0.9 * gb * 1e9),
                "none of 8 to 80 GB",
            ),
        ]
        for name, rung in ladder.items()
    ],
)

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
# Print the model's layers, name targets that exist on it, and let `check_lora_config` confirm that each name matches; without a
# reason for other layers take all linear ones. Choose a rank and let alpha follow it, because the scaling is α/r. Train and
# save whatever is new, such as a head. Whether training fits you can compute from the config: LoRA removes gradients and
# optimizer state of the frozen weights, a 4-bit base removes most of the weights, and smaller batches and checkpointing reduce
# the activations.

# %%
plotting.table(
    ["", "measured or computed"],
    [
        [
            "right on `sailor`: all linear layers, attention alone",
            f"{sweeps.spread(scores['all_linear', 8])}, {sweeps.spread(scores['attention', 18])}",
        ],
        ["loss after 20 steps at rank 32: alpha 2, alpha 64", f"{slow[-1]:.2f}, {fast[-1]:.2f}"],
        ["trained parameters of the course's model, r = 8", f"{own.share:.1%} of all"],
        [
            "memory of LoRA against all weights, course model",
            f"{total['lora'] / total['full']:.0%}",
        ],
        [
            "Llama 3.1 8B, one row: all weights, LoRA, QLoRA",
            ", ".join(f"{bar.total / 1e9:.0f} GB" for bar in list(bars.values())[:3]),
        ],
    ],
)
progress("04")

# %% [markdown]
# ## Take it to work
#
# Put the folder or the hub id of a model of yours between the quotes, and your own configuration below it. Only the config is
# read, no weights.

# %%
my_model = ""
my_lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
my_config = AutoConfig.from_pretrained(my_model or paths.base_model())
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
# The scaling, to an eighth of what it was. In the first steps that makes little difference to the size of the change, because
# Adam's steps grow with the rank, but the two settings are no longer those of your first run. Decide on alpha, too.
# </details>
# <details><summary>2 · LoRA trains one parameter in a hundred. Why doesn't it take a hundredth of the memory?</summary>
# Gradients and optimizer state shrink with the trained parameters. The frozen weights stay in memory, and so do nearly all
# activations. These two are what 4-bit weights, checkpointing and smaller batches reduce.
# </details>
# <details><summary>3 · A recipe for a Llama runs on another model without an error. Is it right there?</summary>
# Not necessarily. PEFT refuses only if no name matches. One that matches nothing is passed over, and names that exist in some
# blocks only adapt only those. Look at the table of adapted layers, or let <code>check_lora_config</code> do so.
# </details>
#
# ## Where to read on
#
# - [Every field of LoraConfig](https://huggingface.co/docs/peft/main/en/package_reference/lora), in PEFT's documentation
# - [LoRA](https://arxiv.org/abs/2106.09685), Hu et al. 2021: section 4.2 on memory, table 15 for its settings
# - [A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA](https://arxiv.org/abs/2312.03732), Kalajdzievski 2023
# - [Recipes](../docs/recipes.md) with values for real models, and [Decide](../docs/decide.md)
#
# Next: [lesson 5](05_qlora.ipynb) trains on a base in four bits. [Lesson 3](03_lora_finetuning.ipynb) is where ranks and rates
# are swept. Why a low rank can be enough is the theme of a [deep dive](deep_low_rank.ipynb).
