# %% [markdown]
# # Tune prompts instead of weights
#
# LoRA adds numbers inside the layers of a model. A soft prompt adds numbers *in front of the text*, and leaves every
# layer as it is. If that were enough, an adapter would be a few kilobytes, and nobody would have to touch the model at
# all. **How far do you get without touching the weights, and what do you give up?**
#
# | | |
# |---|---|
# | **What you'll do** | put trained vectors before a text, by hand and with PEFT; train twenty of them; compare nine methods on four tasks; find out why a good soft prompt gets worse in a batch |
# | **What you'll learn** | what a soft prompt can teach and what it can't; what its relatives train; what virtual tokens cost at every call; which mistakes PEFT lets pass without an error |
# | **What you'll need** | [lesson 1](01_load_lora_adapter.ipynb) for adapters, [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import textwrap
import warnings

from course_utils import data, evaluation, paths, plotting, runtime, validation
from course_utils.exercises import lesson10, progress
from course_utils.sweeps import over_seeds, spread

runtime.quiet_imports()

import peft
import torch
import transformers
import trl
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from course_utils.progress import Progress

runtime.seed_everything(0)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · trl {trl.__version__} · on {device}"
)

# %% [markdown]
# ## Put vectors before the text
#
# A model turns each token into one row of its embedding table, here 256 numbers. For example, an instruction of five
# tokens becomes five rows. But the layers accept any 256 numbers. A **soft prompt**
# ([Lester et al. 2021](https://arxiv.org/abs/2104.08691)) is a few such rows, called
# [virtual tokens](../docs/glossary.md#soft-prompt-virtual-token), that are put before every input. Training changes them
# alone, and the model stays frozen.
#
# PEFT can start them as the embeddings of a text (`prompt_tuning_init="TEXT"`). Until you train them, they should act
# just like its words.
#
# **Predict:** with 20 virtual tokens, how many numbers are trained? The base can also read those 20 tokens as text: by
# how much do its [logits](../docs/glossary.md#logits) differ from those with the untrained soft prompt?

# %%
base_folder = paths.base_model()
tokenizer = AutoTokenizer.from_pretrained(base_folder)
TOLD = (
    "Read the passage and answer the question with the name, the place, the colour or the thing"
    " only, or say: not said"
)


def load_base():
    """A fresh copy of the base model."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=runtime.dtype())
    return model.to(device).eval()


def soft_prompt(tokens=20):
    """A new config each time, because PEFT writes the model's sizes into it."""
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TOLD,
        tokenizer_name_or_path=base_folder,
    )


def encode(text):
    """The token ids of one question, with the chat template's own tokens."""
    message = [{"role": "user", "content": text}]
    tokens = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return torch.tensor([tokens["input_ids"]], device=device)


# %%
base_model = load_base()
untrained = get_peft_model(load_base(), soft_prompt()).eval()
untrained.print_trainable_parameters()

question = encode("Tilda keeps the lantern at Greyham. Who keeps the lantern?")
words = torch.tensor([tokenizer(TOLD)["input_ids"][:20]], device=device)
with torch.no_grad():
    as_text = base_model(torch.cat([words, question], dim=1)).logits
    as_vectors = untrained(question).logits
print(f"the question has {question.shape[1]} tokens, its logits {as_vectors.shape[1]} positions")
print(f"logits differ by at most {(as_text - as_vectors).abs().max():.1g}")

# %% [markdown]
# PEFT trains 20 × 256 = 5,120 numbers. The logits are exactly those of the words, because a soft prompt that starts from
# a text *is* that text until you train it. There are 40 positions of logits for 20 tokens, because PEFT also returns the
# predictions at the virtual tokens. If you compute a loss yourself, leave those out.
#
# ### Exercise: a soft prompt by hand (core, 15 min)
#
# Do what PEFT does. You get the prompt, of shape (tokens, width), the embedding layer, and a batch
# that is padded on the right. Return a dict with `inputs_embeds`, `attention_mask` and `labels`, with which the base has
# the loss of PEFT's model. Expected shapes for 4 virtual tokens before a batch of 3 × 6 tokens: (3, 10, width), (3, 10),
# (3, 10).
#
# <details><summary>The check says that a part has the shape of the text</summary>
# Mask and labels need a place for each virtual token, too: ones in the mask, since the model should look at them, and
# −100 in the labels, since there is nothing to predict.
# </details>
# <details><summary>My code stops in torch.cat</summary>
# The prompt has two dimensions, and the embeddings of a batch have three. <code>prompt.expand(batch, -1, -1)</code>
# repeats it for each row.
# </details>
# <details><summary>The check says that no gradient reaches the prompt</summary>
# <code>torch.cat</code> and <code>expand</code> pass gradients on. <code>torch.tensor(...)</code>,
# <code>.data</code> and <code>.detach()</code> do not.
# </details>


# %% exercise="10.prepend" points=4
def prepend(prompt, embedding, input_ids, attention_mask, labels):
    """Return inputs_embeds, attention_mask and labels with the prompt before each text."""
    ### BEGIN SOLUTION
    batch, tokens = len(input_ids), len(prompt)
    return {
        "inputs_embeds": torch.cat([prompt.expand(batch, -1, -1), embedding(input_ids)], dim=1),
        "attention_mask": torch.cat([attention_mask.new_ones(batch, tokens), attention_mask], 1),
        "labels": torch.cat([labels.new_full((batch, tokens), -100), labels], dim=1),
    }
    ### END SOLUTION


lesson10.prepend(prepend)

# %%
### BEGIN HIDDEN TESTS
assert lesson10.prepend.outcome(prepend).passed
_embedding, _prompt = torch.nn.Embedding(9, 4), torch.randn(2, 4, requires_grad=True)
_ids, _mask = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]])
_found = prepend(_prompt, _embedding, _ids, _mask, torch.tensor([[-100, 2, -100]]))
assert _found["labels"].tolist() == [[-100, -100, -100, 2, -100]]
assert _found["attention_mask"].tolist() == [[1, 1, 1, 1, 0]]
assert torch.equal(_found["inputs_embeds"][0, 2:], _embedding(_ids)[0])
### END HIDDEN TESTS

# %% [markdown]
# ## Train twenty vectors
#
# The task is `reading`: a passage, a question, and an answer in as few words as possible. `SFTTrainer` trains the soft
# prompt as it trained LoRA in lesson 3, but at another learning rate. The optimizer, Adam, moves each number by about the
# rate in each step, so the rate times the steps limits how far a number can get. Let the check say whether 2e-4, a usual
# rate for LoRA on large models, is enough here.

# %%
train_rows = data.load_task("reading", "train")
test_rows = data.load_task("reading", "test").select(range(100))
searched = data.load_results("prompts_rate")


def best_rate(task, method):
    """The rate of the search with the most right on validation rows; the lower loss if two tie."""
    found = [row for row in searched if (row["task"], row["method"]) == (task, method)]
    return max(found, key=lambda row: (row["validation"], -row["loss_60"]))["learning_rate"]


def make_trainer(rate):
    """Twenty virtual tokens on `reading`, 60 steps of 32 rows, as in the sweep below."""
    settings = SFTConfig(
        output_dir=str(paths.runs_dir() / "lesson10" / "trainer"),
        seed=0,
        max_steps=60,
        per_device_train_batch_size=32,
        learning_rate=rate,
        warmup_steps=10,
        max_length=256,
        train_sampling_strategy="group_by_length",  # fewer pads to compute
        logging_steps=10,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    trainer = SFTTrainer(
        model=load_base(),
        args=settings,
        peft_config=soft_prompt(),
        train_dataset=train_rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    return Progress().attach(trainer)


print(validation.check_training(make_trainer(2e-4)))

# %% tags=["claim"]
from course_utils import data
from tools.claims import swept

score = swept("prompts", "test", "task", "method")
counted = {key: found[0] for key, found in swept("prompts", "trainable", "method").items()}
rate_of = {
    key: found[0] for key, found in swept("prompts", "learning_rate", "task", "method").items()
}
soft_rate = rate_of["reading", "prompt"]
assert soft_rate > 100 * 2e-4, "times as high"

# %% [markdown]
# At 2e-4 the vectors would stay close to the words that they start from: sixty steps can move a number by 0.012 at most.
# The rate of the next cell, {{soft_rate:g}}, was the best of four in a search, and is {{soft_rate / 2e-4:.0f}} times as high.
#
# **Predict:** of 100 test questions, how many does the base answer with the short answer alone? How many if the prompt
# asks for that in words (`TOLD`)? And how many with 20 trained vectors?

# %%
trainer = make_trainer(best_rate("reading", "prompt"))
trainer.train()
model = trainer.model.eval()  # the trained soft prompt, to the end of this lesson

told_rows = [
    {**row, "prompt": [{"role": "user", "content": f"{TOLD}. {row['prompt'][0]['content']}"}]}
    for row in test_rows
]


def right(one, rows=test_rows):
    """The share of right answers on `reading`."""
    return evaluation.evaluate_task(one, tokenizer, "reading", rows)["score"]


ways = {
    "the base": right(base_model),
    "the base, told in words": right(base_model, told_rows),
    "20 trained virtual tokens": right(model),
}
plotting.table(["", "right"], [[way, f"{share:.0%}"] for way, share in ways.items()])

# %% [markdown]
# The base gets none right: it answers in whole sentences. Telling it in words does not help, because the base was hardly
# trained to follow instructions. Twenty vectors that started from the same words get nearly all right after training.
# Compare the answers on a passage of your own.

# %%
my_question = "Fenna carried the copper kettle to the mill. Where did Fenna carry the kettle?"
for who, one in (("the base", base_model), ("20 vectors", model)):
    print(f"{who}: {evaluation.generate(one, tokenizer, [my_question], max_new_tokens=24)[0]}")

# %% [markdown]
# ## Choose a rate, a number and a start
#
# You choose three settings: the learning rate, the number of virtual tokens, and where they start. The rates were tried
# with one seed on validation rows, the others with three seeds on test rows. The two kinds of score can't be compared,
# because the validation rows use many more words ([lesson 3](03_lora_finetuning.ipynb)).
#
# **Predict:** which matters most: the rate, the number of virtual tokens, or where they start?

# %%
tasks_swept, starts_swept = data.load_results("prompts"), data.load_results("prompts_start")
STARTS = {
    "TEXT": "words of a description",
    "SAMPLE_VOCAB": "words drawn at random",
    "RANDOM": "random numbers",
}
lines = [
    [20, STARTS["TEXT"], f"{row['learning_rate']:g}", "validation", f"{row['validation']:.0%}"]
    for row in searched
    if (row["task"], row["method"]) == ("reading", "prompt")
]
of_20 = [
    {**row, "tokens": 20, "start": "TEXT"}
    for row in tasks_swept
    if (row["task"], row["method"]) == ("reading", "prompt")
]
by_start = over_seeds([*of_20, *starts_swept], "test", "start", "tokens", "learning_rate")
lines += [
    [tokens, STARTS[start], f"{rate:g}", "test", spread(by_start[start, tokens, rate])]
    for start, tokens, rate in sorted(by_start, key=lambda key: (list(STARTS).index(key[0]), key))
]
plotting.table(["virtual tokens", "start", "rate", "rows", "right on `reading`"], lines)

# %% tags=["claim"]
by_rate = {
    row["learning_rate"]: row["validation"]
    for row in data.load_results("prompts_rate")
    if (row["task"], row["method"]) == ("reading", "prompt")
}
points = round(100 * (max(by_rate.values()) - min(by_rate.values())))
started = swept("prompts_start", "test", "tokens", "start", "rate")
length = {
    start: found[0]
    for (_, start, rate), found in swept(
        "prompts_start", "norm_before", "tokens", "start", "rate"
    ).items()
    if rate == "best"
}
by_tokens = {tokens: started[tokens, "TEXT", "best"][0] for tokens in (1, 5, 50)}
by_tokens[20] = score["reading", "prompt"][0]
by_start = {start: started[20, start, "best"][0] for start in ("SAMPLE_VOCAB", "RANDOM")}
farthest = started[20, "RANDOM", "highest"][0]
assert points <= 10 and max(by_rate) > 30 * min(by_rate), "The rate matters little"
assert min(by_rate) > 100 * 2e-4, "far above 2e-4"
assert by_tokens[1] < by_tokens[5] < by_tokens[20], "More virtual tokens do better, up to 20"
assert by_tokens[50] <= by_tokens[20] + 0.01, "fifty do no better than twenty"
assert abs(by_start["SAMPLE_VOCAB"] - by_tokens[20]) < 0.03, "do as well as the words"
assert by_start["RANDOM"] < by_tokens[20] - 0.05, "Random numbers stay behind"
assert max(by_tokens.values()) - by_tokens[1] > by_tokens[20] - min(by_start.values()), (
    "The number of virtual tokens matters most"
)
assert length["RANDOM"] > 2 * length["SAMPLE_VOCAB"], "draws them larger"

# %% [markdown]
# The number of virtual tokens matters most: one gives {{by_tokens[1]:.0%}}, five give {{by_tokens[5]:.0%}} and twenty {{by_tokens[20]:.0%}}. More virtual tokens do better, up to 20;
# fifty do no better than twenty. The rate matters little from {{min(by_rate):g}} to {{max(by_rate):g}}, where the score moves by {{points}} points. But all of
# these rates are far above 2e-4.
#
# The start matters less than you may expect: twenty words drawn at random do as well as the words of a description, with
# {{by_start["SAMPLE_VOCAB"]:.0%}} and {{by_tokens[20]:.0%}}. Random numbers stay behind, with {{by_start["RANDOM"]:.0%}}, because PEFT draws them larger than the numbers of a word, so
# a step of the same size changes such a row less. At rate {{max(by_rate):g}} they reach {{farthest:.0%}}.

# %% [markdown]
# ## See where it fails
#
# `reading` asks for words from the passage, `mood` for one of two words, `sailor` for the whole sentence in another
# style, and `extract` for JSON. A [sweep](../docs/glossary.md#sweep) trained nine methods on each task, with three seeds, each at the best rate of a
# search of its own (three or four rates, a factor of three apart). The next section says what the others train. For now,
# compare prompt tuning with two sizes of LoRA: rank 8 on all linear layers, and rank 1 on queries and values, which is
# only {{counted["lora_1"]:,.0f}} numbers.
#
# **Predict:** on which of the four tasks do 20 virtual tokens come close to LoRA of rank 8?

# %%
NAMES = {
    "prompt": "prompt tuning",
    "p_tuning": "P-tuning",
    "prefix": "prefix tuning",
    "prefix_projected": "prefix, projected",
    "ia3": "IA3",
    "norms": "layer norms",
    "vera": "VeRA",
    "lora_1": "LoRA r 1, q and v",
    "lora_8": "LoRA r 8, all linear",
}
TASKS = ("reading", "mood", "extract", "sailor")
by_task = over_seeds(tasks_swept, "test", "task", "method")
plotting.show_matrix(
    {name: {task: by_task[task, method][0] for task in TASKS} for method, name in NAMES.items()},
    "A soft prompt learns short answers, but hardly a new form",
    "task (right on test rows, mean of three seeds)",
    "method",
)

# %% tags=["claim"]
soft = {task: score[task, "prompt"][0] for task in ("reading", "mood", "extract", "sailor")}
thin, ia3, norms, thick = (
    {task: score[task, method][0] for task in soft}
    for method in ("lora_1", "ia3", "norms", "lora_8")
)
assert all(soft[task] > thick[task] - 0.1 for task in ("mood", "reading")), "close to"
assert all(soft[task] < thick[task] - 0.4 for task in ("extract", "sailor")), "far behind"
json_scores = sorted(
    row["test"]
    for row in data.load_results("prompts")
    if (row["task"], row["method"]) == ("extract", "lora_8")
)
assert json_scores[0] < 0.05 and json_scores[1] > 0.95, "in one of three runs training broke"
assert counted["norms"] < counted["prompt"] / 2, "fewer than half as many"
assert norms["extract"] > soft["extract"] + 0.4, "No: the layer norms"
assert max(counted["lora_1"], counted["ia3"]) < counted["prompt"], (
    "with fewer numbers than the soft prompt, too"
)
assert min(thin["sailor"], ia3["sailor"]) > soft["sailor"] + 0.05, "ahead of it on `sailor`"
assert ia3["extract"] < soft["extract"], "is not enough by itself"

# %% [markdown]
# On `mood` and `reading` twenty virtual tokens come close to LoRA of rank 8: {{soft["mood"]:.0%}} beside {{thick["mood"]:.0%}}, and {{soft["reading"]:.0%}} beside {{thick["reading"]:.0%}}. On `extract`
# and `sailor` they are far behind, with {{soft["extract"]:.0%}} and {{soft["sailor"]:.0%}} where LoRA has {{thick["extract"]:.0%}} and {{thick["sailor"]:.0%}}. LoRA's {{thick["extract"]:.0%}} is a mean of unlike runs: in one
# of three runs training broke and ended with {{json_scores[0]:.1%}}, while the others have {{json_scores[1]:.0%}} and {{json_scores[2]:.0%}}.
#
# Are twenty vectors too few numbers? No: the layer norms are only {{counted["norms"]:,.0f}} numbers, fewer than half as many, and get {{norms["extract"]:.0%}} of
# `extract` right. IA3 and LoRA of rank 1, with fewer numbers than the soft prompt, too, are ahead of it on `sailor`, with
# {{ia3["sailor"]:.0%}} and {{thin["sailor"]:.0%}}. These three change what every layer computes. That is not enough by itself (IA3 gets {{ia3["extract"]:.0%}} of `extract`), but
# a soft prompt can't do it at all. It only tells the model *what to do*, in vectors instead of words. For example, the
# base names things of a passage all the time, but JSON with three fields and a sailor's grammar are new to it. **A soft
# prompt selects among what a model can already do; it hardly teaches a new form.**
#
# The runs are short, and the model is tiny. Lester et al. find that soft prompts catch up with training all weights at
# about ten billion parameters, where a model can do so much already that there is more to select from. Ours has 3.9
# million.

# %% [markdown]
# ## Meet the relatives
#
# The other methods differ in *where* their numbers are:
#
# - [P-tuning](https://arxiv.org/abs/2103.10385) trains a small network that makes the virtual tokens.
# - [Prefix tuning](https://arxiv.org/abs/2101.00190) trains a key and a value for each virtual token in *every* layer,
#   where they stand in the cache before those of the text. "Projected" means that a small network makes them.
# - [IA3](https://arxiv.org/abs/2205.05638) trains factors for the keys, the values and the inputs of `down_proj`.
# - [Layer-norm tuning](https://arxiv.org/abs/2312.11420) trains the factors of the model's norms.
# - [VeRA](https://arxiv.org/abs/2310.11454) is LoRA with random, frozen matrices that all layers share. For each weight
#   that it adapts, it trains two vectors that scale them: one as long as the rank, one as long as the output.
#
# ### Exercise: count what each method trains (core, 15 min)
#
# Return how many parameters a method trains on a Llama with `layers` layers of `width`, with as many heads for keys and
# values as for queries. The methods are "prompt tuning" and "prefix tuning" with `tokens` virtual tokens, "IA3" on
# `k_proj`, `v_proj` and `down_proj`, "layer norms", and "LoRA" and "VeRA" of `rank` on `q_proj` and `v_proj`. Expected for
# 4 layers, width 256, `feed_forward` 576, 20 tokens and rank 1, in this order: 5,120; 40,960; 4,352; 2,304; 4,096; 2,056.
#
# <details><summary>My count for the layer norms is 256 short</summary>
# Each layer has two norms, and there is one more after the last layer.
# </details>
# <details><summary>What does down_proj read?</summary>
# The numbers of the feed-forward part: <code>feed_forward</code> of them in each layer.
# </details>


# %% exercise="10.count" points=4
def count(method, layers, width, feed_forward, tokens, rank):
    """Return how many parameters the method trains."""
    ### BEGIN SOLUTION
    return {
        "prompt tuning": tokens * width,
        "prefix tuning": tokens * layers * 2 * width,
        "IA3": layers * (width + width + feed_forward),
        "layer norms": (2 * layers + 1) * width,
        "LoRA": layers * 2 * (rank * width + width * rank),
        "VeRA": layers * 2 * (rank + width),
    }[method]
    ### END SOLUTION


lesson10.count(count)

# %%
### BEGIN HIDDEN TESTS
assert lesson10.count.outcome(count).passed
_sizes = (6, 40, 100, 9, 5)
assert count("prompt tuning", *_sizes) == 360 and count("prefix tuning", *_sizes) == 4320
assert count("IA3", *_sizes) == 1080 and count("layer norms", *_sizes) == 520
assert count("LoRA", *_sizes) == 4800 and count("VeRA", *_sizes) == 540
### END HIDDEN TESTS

# %% [markdown]
# The sweep measured the rest, for VeRA at rank 64. The last three columns say whether the change can be merged into the
# weights, how many of the 512 places of the context it takes, and whether PEFT can mix several such adapters in one batch
# (`adapter_names`, lesson 1).
#
# **Predict:** a number takes four bytes in a file. Which methods save fewer numbers than they train, and which saves more?

# %%
FACTS = {  # mergeable, places of the context, several in a batch
    "prompt": ("no", "20", "no"),
    "p_tuning": ("no", "20", "no"),
    "prefix": ("no", "20", "no"),
    "prefix_projected": ("no", "20", "no"),
    "ia3": ("yes", "0", "no"),
    "norms": ("yes", "0", "no"),
    "vera": ("yes", "0", "no"),
    "lora_1": ("yes", "0", "yes"),
    "lora_8": ("yes", "0", "yes"),
}
first = {row["method"]: row for row in tasks_swept if row["task"] == "reading" and row["seed"] == 0}
plotting.table(
    [
        "",
        "trained",
        "saved",
        "best rate",
        "right on `reading`",
        "merge",
        "context",
        "mixed batch",
    ],
    [
        [
            name,
            f"{first[method]['trainable']:,}",
            f"{first[method]['saved_bytes'] / 1000:,.0f} kB",
            f"{best_rate('reading', method):g}",
            spread(by_task["reading", method]),
            *FACTS[method],
        ]
        for method, name in NAMES.items()
    ],
)

# %% tags=["claim"]
saved = {key: found[0] for key, found in swept("prompts", "saved_bytes", "method").items()}
best = [
    row["learning_rate"]
    for row in data.load_results("prompts")
    if row["task"] == "reading" and row["seed"] == 0
]
(padded_to,) = {
    row["prompt_tokens"] for row in data.load_results("prompts_cost")
}  # for the next section
thrown_away = ("p_tuning", "prefix_projected")
assert all(saved[method] < 2 * counted[method] for method in thrown_away), (
    "P-tuning and the projected prefix save fewer numbers than they train"
)
assert saved["vera"] > 4 * 4 * counted["vera"], "VeRA saves more"
assert max(best) > 5 * min(best), "its own best rate"

# %% [markdown]
# P-tuning and the projected prefix save fewer numbers than they train. For example, P-tuning's {{counted["p_tuning"]:,.0f}} numbers would take
# {{4 * counted["p_tuning"] / 1000:.0f}} kB, and its file has {{saved["p_tuning"] / 1000:.0f}} kB: PEFT saves the vectors that the network made, and not the network. VeRA saves more,
# because by default (`save_projection=True`) its random matrices are in the file.
#
# Each method has its own best rate, and these differ by a factor of {{max(best) / min(best):.0f}}. **If you compare methods at one rate, you compare
# how well that rate suits each of them.**

# %% [markdown]
# ## Pay for it at every call
#
# A merged LoRA adapter costs nothing at a call. Virtual tokens can't be merged, so the model reads them at every call. The
# sweep timed calls that answer 32 questions, padded to {{padded_to}} tokens, with 16 tokens each.
#
# **Predict:** by how much do 20 virtual tokens slow a call down, and by how much do 200?

# %%
costs = data.load_results("prompts_cost")
seconds = over_seeds(costs, "seconds_per_call", "method", "tokens")
plain = seconds["base or merged", 0][0]
context = base_model.config.max_position_embeddings
CALLED = {"lora_8": "LoRA r 8, not merged", "prompt": "prompt tuning", "prefix": "prefix tuning"}
plotting.table(
    ["", "virtual tokens", "time of a call, base = 1", "share of the context"],
    [
        [
            CALLED.get(method, method),
            tokens,
            spread([value / plain for value in found], ".2f"),
            f"{tokens / context:.0%}",
        ]
        for (method, tokens), found in seconds.items()
    ],
)

# %% tags=["claim"]
seconds = swept("prompts_cost", "seconds_per_call", "method", "tokens")
call = {key: found[0] / seconds["base or merged", 0][0] for key, found in seconds.items()}
_, lowest, highest = seconds["base or merged", 0]
scatter = [found / seconds["base or merged", 0][0] for found in (lowest, highest)]
assert call["prompt", 20] - 1 < scatter[1] - 1, "less than the scatter"
assert call["prompt", 20] < call["prompt", 50] < call["prompt", 100] < call["prompt", 200], (
    "grows with their number"
)
assert call["prefix", 100] < call["prompt", 100], "A prefix costs less"

# %% [markdown]
# With 200 virtual tokens a call takes {{call["prompt", 200]:.1f}} times as long, because the model computes each of them anew, and the time grows
# with their number. With 20 it takes {{call["prompt", 20]:.2f}} times as long, but the difference is less than the scatter of the base's own
# runs, from {{scatter[0]:.2f}} to {{scatter[1]:.2f}}. A prefix costs less, because its keys and values are there already: {{call["prefix", 100]:.1f}} instead of
# {{call["prompt", 100]:.1f}} for 100 virtual tokens. These are short questions on one processor, so on your machine expect the same order, but other
# factors.

# %% [markdown]
# ### Try what works with a soft prompt
#
# **Predict:** which of these work: merging a soft prompt, adding a second one, switching to the second, adding a LoRA adapter,
# and using both soft prompts in one batch?


# %%
def tried(call):
    """Make a call, and return "works" or its error."""
    with warnings.catch_warnings(action="ignore"):
        try:
            call()
            return "works"
        except Exception as error:
            return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")


twice = get_peft_model(load_base(), soft_prompt())
calls = {
    "merge it: merge_and_unload()": lambda: twice.merge_and_unload(),
    "a second soft prompt beside it": lambda: twice.add_adapter("second", soft_prompt()),
    "switch: set_adapter('second')": lambda: twice.set_adapter("second"),
    "a LoRA adapter beside it": lambda: twice.add_adapter(
        "lora", LoraConfig(task_type="CAUSAL_LM")
    ),
    "both in one batch: adapter_names": lambda: twice.generate(
        input_ids=question.repeat(2, 1), adapter_names=["default", "second"], max_new_tokens=2
    ),
}
plotting.table(
    ["", f"PEFT {peft.__version__}"], [[name, tried(call)] for name, call in calls.items()]
)

# %% [markdown]
# Two of them work: adding a second soft prompt, and switching to it. No weight can take up virtual tokens, so PEFT offers no
# merging for them, and it does not put LoRA beside them in one `PeftModel`. It can't give each row of a batch its own soft
# prompt, either. By hand you can, because you put the embeddings together yourself.

# %% [markdown]
# ## Break it
#
# ### 1 · A good soft prompt whose batch scores fall
#
# Evaluate your soft prompt once more, in the way that is usual for LoRA: pad a batch on the left, and call PEFT's own
# `generate`.

# %%
tokenizer.padding_side = "left"


def answers_of(one, rows, batch_size, further_pads=0):
    """What `generate` answers in batches, with pads on the left, and `further_pads` more."""
    answers = []
    for start in range(0, len(rows), batch_size):
        prompts = [row["prompt"] for row in rows][start : start + batch_size]
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        ids, mask = (
            torch.nn.functional.pad(batch[name], (further_pads, 0), value=value)
            for name, value in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0))
        )
        with warnings.catch_warnings(action="ignore"):
            new = one.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False
            )[:, ids.shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def share_right(answers, rows=test_rows):
    return evaluation.score("reading", answers, rows)["score"]


in_batches = {size: answers_of(model, test_rows, size) for size in (1, 10, 100)}
for size, answers in in_batches.items():
    print(f"batches of {size}: {share_right(answers):.0%} right")

# %% [markdown]
# One question at a time the score is good, but in batches it falls. There are four suspects:
#
# 1. Dropout is on, because the model is in training mode.
# 2. `generate` samples, and draws other random numbers in a batch.
# 3. Long questions are cut off in a batch.
# 4. Pads: a batch has them, and a single question has none.
#
# **Predict:** which is it, and which single experiment separates it from the others?

# %%
few = test_rows.select(range(24))
with_pads = {
    pads: share_right(answers_of(model, few, 1, further_pads=pads), few) for pads in (0, 20, 40, 80)
}
adapter = PeftModel.from_pretrained(load_base(), paths.adapter_path("reading")).eval()
plotting.table(
    ["pads before a single question", "soft prompt", "LoRA"],
    [
        [pads, f"{share:.0%}", f"{share_right(answers_of(adapter, few, 1, pads), few):.0%}"]
        for pads, share in with_pads.items()
    ],
)

# %% [markdown]
# It is the pads: they alone lower the score of single questions, with dropout off, nothing sampled and nothing cut off.
# LoRA's score stays the same. The reason is the order of the parts:
#
# | | |
# |---|---|
# | **what PEFT 0.21 makes** | virtual tokens · pads · question |
# | **what was trained** | virtual tokens · question · pads |
#
# The mask hides the pads, but they take up positions, so the question is farther from the virtual tokens than it ever was
# in training. With LoRA nothing stands before the pads, so no distance changes. `position_ids` would help, but PEFT drops them, with a warning that
# our cell hides: "Position ids are not supported for parameter efficient tuning".
#
# **The cure: put the pads before the virtual tokens**, as `generate` of `course_utils.evaluation` does. Without it, put
# only questions of the same number of tokens into a batch. In training, pad on the right, as `SFTTrainer` does;
# `check_supervision(trainer)` warns of `pads_before_text`.
#
# **Predict:** with the cure, what is the score of one batch of 100? How many answers differ from those to single questions?

# %%
cured = evaluation.generate(
    model, tokenizer, [row["prompt"] for row in test_rows], max_new_tokens=24, batch_size=100
)
differ = sum(one != other for one, other in zip(in_batches[1], cured))
print(f"one batch of 100, cured: {share_right(cured):.0%} right; {differ} answers differ")
of_5 = [
    {**row, "method": "prompt", "task": "reading"} for row in starts_swept if row["tokens"] == 5
]
both = [*({**row, "tokens": 20} for row in tasks_swept), *of_5]
by_peft = over_seeds(both, "test_padded", "method", "tokens", "task")
by_cure = over_seeds(both, "test", "method", "tokens", "task")
plotting.table(
    ["three seeds, batches of 64", "task", "PEFT's `generate`", "cured"],
    [
        [
            f"{NAMES[method]}, {tokens} virtual tokens",
            task,
            spread(by_peft[method, tokens, task]),
            spread(by_cure[method, tokens, task]),
        ]
        for method, tokens, task in sorted(by_peft, reverse=True)
        if method in ("prompt", "p_tuning") and task in ("reading", "mood")
    ],
)

# %% tags=["claim"]
padded = swept("prompts", "test_padded", "task", "method")
lost = {
    task: round(100 * (score[task, "prompt"][0] - padded[task, "prompt"][0]))
    for task in ("reading", "mood")
}
five = {
    column: found[5, "TEXT", "best"][0]
    for column, found in (
        (column, swept("prompts_start", column, "tokens", "start", "rate"))
        for column in ("test", "test_padded")
    )
}
p_tuned = score["reading", "p_tuning"]
assert min(lost.values()) > 0, "padded batches lose"
assert five["test"] - five["test_padded"] > 0.1, "they lose more"
assert p_tuned[2] - p_tuned[1] > 0.2, "differ so much"

# %% [markdown]
# With the cure, a batch is answered like single questions. PEFT's padded batches lose {{lost["reading"]}} points on `reading` and {{lost["mood"]}}
# on `mood`, and no error says so. With five virtual tokens they lose more: the score of `reading` falls from {{five["test"]:.0%}} to {{five["test_padded"]:.0%}}.
# For P-tuning the scores of `reading` say nothing, because its three runs differ so much: from {{p_tuned[1]:.0%}} to {{p_tuned[2]:.0%}}.

# %% [markdown]
# ### 2 · Four errors, and one helpful message
#
# Four mistakes stop at once: prefix tuning on a model with activation checkpointing, no `task_type`, `TEXT` without a
# tokenizer, and loading a soft prompt with `is_trainable=True`. Read the four messages before you read on.

# %%
folder = paths.runs_dir() / "lesson10" / "soft"
model.save_pretrained(folder)
checkpointed = load_base()
checkpointed.activation_checkpointing_enable()
slips = {
    "prefix tuning on a model with activation checkpointing": lambda: get_peft_model(
        checkpointed, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    ),
    "no task_type": lambda: get_peft_model(load_base(), PromptTuningConfig(num_virtual_tokens=20))(
        question
    ),
    "TEXT without a tokenizer": lambda: PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=20,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TOLD,
    ),
    "loaded with is_trainable=True": lambda: PeftModel.from_pretrained(
        load_base(), folder, is_trainable=True
    ),
}
plotting.table(
    ["", f"PEFT {peft.__version__} says"], [[name, tried(call)] for name, call in slips.items()]
)
loaded = PeftModel.from_pretrained(load_base(), folder)
print("loaded without is_trainable:", validation.check_adapters(loaded, expect_trainable=True))

# %% [markdown]
# Only the message about `TEXT` names the setting that is missing. For the others:
#
# - Prefix tuning hands over its keys and values as a cache, which activation checkpointing (or gradient checkpointing, its
#   older name) switches off. TRL has it on, so give `SFTConfig` `activation_checkpointing=False`. `check_training(trainer)`
#   reports `checkpointed_prefix`.
# - `KeyError: None` means that the `task_type` is missing. LoRA works without one, and virtual tokens don't.
# - You don't need `is_trainable=True`: a soft prompt that is loaded without it can be trained, as the last check expects.

# %% [markdown]
# ### 3 · Mistakes without an error
#
# **Predict:** the context is 512. What happens to a text of 500 tokens behind 50 virtual tokens? And what happens if two
# IA3 adapters should answer one row each of the same batch?

# %%
long = torch.full((1, context - 12), 5, device=device)
fifty = get_peft_model(load_base(), soft_prompt(50)).eval()
with torch.no_grad():
    positions = fifty(long).logits.shape[1]
print(f"{long.shape[1]} tokens and 50 virtual ones: {positions} positions of {context}, no error")

ia3 = {"target_modules": ["v_proj"], "feedforward_modules": [], "init_ia3_weights": False}
two = get_peft_model(load_base(), IA3Config(task_type="CAUSAL_LM", **ia3)).eval()
two.add_adapter("second", IA3Config(task_type="CAUSAL_LM", **ia3))  # both at random
names = ["default", "second"]
with torch.no_grad():
    rows = two(question.repeat(2, 1), adapter_names=names).logits
print(
    f"the same question by two IA3 adapters: logits differ by {(rows[0] - rows[1]).abs().max():g}"
)
guarded = {
    "a long text": lambda: evaluation.generate(fifty, tokenizer, ["and " * (context - 60)], 12),
    "two IA3 adapters": lambda: evaluation.generate(
        two, tokenizer, ["Who?"] * 2, adapter_names=names
    ),
}
plotting.table(
    ["", "the course's `generate`"], [[name, tried(call)] for name, call in guarded.items()]
)

# %% [markdown]
# Neither mistake raises an error. The first model runs beyond the 512 positions that it was made for. The second answers
# both rows with the active adapter, because PEFT ignores `adapter_names` for IA3. The course's `generate` refuses both and
# says why, and `check_supervision(trainer)` warns of rows `beyond_context`.

# %% [markdown]
# ### Exercise: choose a method (core, 10 min)
#
# Name a method for each situation, one of: `a written prompt`, `prompt tuning`, `prefix tuning`, `IA3`, `layer norms`,
# `VeRA`, `LoRA`. Judge each by its scores and sizes in this lesson's tables. LoRA may have either rank.
#
# - **a**: The model has to answer in a style that it has never used, as in `sailor`. You ship a single merged model, to
#   machines without PEFT.
# - **b**: A shared server takes embeddings as input, and nobody may change its layers. Each customer has a kind of
#   question that the model can answer, and rows to train on. Rows of many customers share a batch.
# - **c**: 10,000 users get an adapter each, for answers like those of `reading`. Each has 10,000 bytes for its
#   numbers, in float32.
# - **d**: The texts fill the context to the last token.
# - **e**: You ask in plain words, and the model gives the right answer, in the right form, every time.
#
# <details><summary>How do I get bytes from a method?</summary>
# The table under <em>Meet the relatives</em> has the numbers that are trained; float32 takes four bytes for each.
# </details>


# %% exercise="10.choose" points=2
def choose(situation):
    """Return the name of a method for situation "a", "b", "c", "d" or "e"."""
    ### BEGIN SOLUTION
    chosen = {
        "a": "LoRA",
        "b": "prompt tuning",
        "c": "layer norms",
        "d": "LoRA",
        "e": "a written prompt",
    }
    return chosen[situation]
    ### END SOLUTION


lesson10.choose(choose)

# %%
### BEGIN HIDDEN TESTS
assert lesson10.choose.outcome(choose).passed
assert "prompt" not in choose("a").lower() and "lora" not in choose("b").lower()
assert choose("e").strip().lower() == "a written prompt"
### END HIDDEN TESTS

# %% tags=["claim"]
before = [round(100 * score[task, "prompt"][0]) for task in soft]
assert before[2] < 100 * norms["extract"] - 40, "They fail where the form is new"
assert before[3] < 100 * thick["sailor"] - 40, "LoRA of rank 8"

# %% [markdown]
# ## Recap
#
# You get far where the model can do the task already: on `reading` and `mood` twenty trained vectors before the text get
# {{before[0]}}% and {{before[1]}}% right, and every layer stays as it was. They fail where the form is new: on `extract` and `sailor` they
# get {{before[2]}}% and {{before[3]}}%, where layer norms get {{norms["extract"]:.0%}} of the first and LoRA of rank 8 gets {{thick["sailor"]:.0%}} of the second. You give up merging and combining, and you pay with
# places of the context and time at every call. In return the adapter is {{counted["prompt"]:,.0f}} numbers, which also work where nobody may
# change the model.

# %%
plotting.table(
    ["", *TASKS],
    [
        [NAMES[method], *(spread(by_task[task, method]) for task in TASKS)]
        for method in ("prompt", "prefix", "ia3", "norms", "lora_1", "lora_8")
    ],
)
progress("10")

# %% [markdown]
# ## Take it to work
#
# Put in the folder of an adapter of your own, of any kind, and the folder or hub id of its base. The first check reads
# the files. The second asks whether the adapter changes the output at all, by
# [top-1 agreement](../docs/glossary.md#top-1-agreement) and [KL divergence](../docs/glossary.md#kl-divergence-in-nats).

# %%
my_adapter, my_base = "", ""
checked, on_base = my_adapter or folder, my_base or base_folder
print(validation.check_adapter_folder(checked, on_base), "\n")
mine = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(on_base), checked)
inputs = AutoTokenizer.from_pretrained(on_base)(["The kettle is in the mill."], return_tensors="pt")
print(validation.check_changes_output(mine, inputs))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · Your soft prompt trains at 2e-4, LoRA's rate, and nothing happens. Why?</summary>
# Adam moves a number by about the rate in each step, so in a few hundred steps no virtual token gets far from its start.
# </details>
# <details><summary>2 · In a batch the scores fall, and alone each answer is right. What do you look at first?</summary>
# Look where the pads are. PEFT puts the virtual tokens before the pads, so the text is too far from them. Put the pads
# first.
# </details>
# <details><summary>3 · When would you take LoRA although a soft prompt scores the same?</summary>
# When the change has to be merged or combined, when the context is short, or when there are many calls.
# </details>
#
# ## Where to read on
#
# - [The Power of Scale for Parameter-Efficient Prompt Tuning](https://arxiv.org/abs/2104.08691), Lester et al. 2021
# - [PEFT on soft prompts](https://huggingface.co/docs/peft/main/en/conceptual_guides/prompting), and
#   [Hugging Face on PEFT](https://huggingface.co/blog/peft)
# - [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# Next: [lesson 11](11_scaling.ipynb) asks what changes when one machine, or one model for one customer, is no longer enough.
