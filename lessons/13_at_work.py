# %% [markdown]
# # Take it to work
#
# On Monday somebody hands you a file of messages and replies, and asks for a model that answers in the same way. In the
# end the model has to answer on a server. **How do you get from a messy file of rows to a served model, and how do you know
# at each station that nothing went wrong?** You will do one such project from end to end, offline on the course's small
# model. If you change one environment variable, the same lesson runs on a real one.
#
# | | |
# |---|---|
# | **What you'll do** | clean a file of messages; train and watch; score replies without a single right wording; test a judge; ship a folder and a GGUF file; break a server in four ways |
# | **What you'll learn** | what to look at before a row is trained on; how to compare two models with an interval; why a model is good in the notebook and bad on the server |
# | **What you'll need** | [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`, [lesson 7](07_merging.ipynb) for merging; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import importlib.util
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

from adapter_checks import memory
from adapter_checks.generation import generate
from adapter_checks.saving import saving
from course_utils import evaluation, paths, plotting, runtime, validation
from course_utils.exercises import lesson13, progress
from course_utils.gguf_file import no_reading_bar, rounded_to_4_bits, write_gguf
from course_utils.judging import biased_judge
from course_utils.model_server import serving

runtime.quiet_imports()

import datasets
import torch
import transformers
import trl
from huggingface_hub import ModelCard, ModelCardData
from openai import OpenAI
from peft import LoraConfig, PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from course_utils.progress import Progress

runtime.seed_everything(0)
device, runs = runtime.device(), paths.runs_dir() / "lesson13"
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · trl {trl.__version__} · on {device}"
)

# %% [markdown]
# ## Look at the file
#
# The lost-property desk of Skerrow has kept its messages and replies. Each line is one JSON object, with the number of
# the case. Three people wrote the replies, each in words of their own.
#
# To take a file of your own through this lesson, put its path into `MY_FILE` and a sentence about your task into `SYSTEM`.
# Each line needs a `text` and a `reply`, or `messages`. Rows that belong together, for example those of one customer,
# should have the same `case`. Some later cells fit only the desk's rows, too. In these, comments that begin with `# Own rows`
# say what to change.

# %%
MY_FILE = None  # Own rows: a path, such as "tickets.jsonl"
SYSTEM = "You answer for the lost-property desk."
desk = paths.data_dir() / "lost_property"
lines = Path(MY_FILE or desk / "messages.jsonl").read_text(encoding="utf-8").splitlines()
print(f"{len(lines)} lines, for example:", *lines[2:6], sep="\n")

# %% [markdown]
# ## Clean it, and count
#
# Some lines hold a whole conversation, and some of these have a system message of their own. A **system message** tells a
# chat model its role, and a model that was trained with one expects it. So we give each row the same system message, and
# later the server gets it, too.
#
# ### Exercise: make chat messages of a row (core, 15 min)
#
# Return the row's messages as a list of `{"role": …, "content": …}`. Put one system message with `system` in front, and
# leave out system messages of the row itself. A row has either `text` (the user's) and `reply` (the assistant's), or
# `messages`. Remove the space at both ends of each content. Expected for `{"text": "Hi ", "reply": "Hello"}` and "Be brief.":
# three messages with the roles system, user and assistant, and the user's content is "Hi".
#
# <details><summary>The check says that the row has changed</summary>
# <code>row["messages"].insert(…)</code> and <code>message["content"] = …</code> change what you were given. Build a new
# list of new dictionaries.
# </details>


# %% exercise="13.messages" points=4
def to_messages(row, system):
    """Return the chat messages of a row, the system message first."""
    ### BEGIN SOLUTION
    turns = row.get("messages")
    if turns is None:
        turns = [
            {"role": "user", "content": row["text"]},
            {"role": "assistant", "content": row["reply"]},
        ]
    return [{"role": "system", "content": system}] + [
        {"role": turn["role"], "content": turn["content"].strip()}
        for turn in turns
        if turn["role"] != "system"
    ]
    ### END SOLUTION


lesson13.messages(to_messages)

# %%
### BEGIN HIDDEN TESTS
assert lesson13.messages.outcome(to_messages).passed
_row = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "\tHi "}]}
_found = to_messages(_row, "Be brief.")
assert [message["content"] for message in _found] == ["Be brief.", "Hi"]
assert len(_row["messages"]) == 2 and _row["messages"][1]["content"] == "\tHi "
### END HIDDEN TESTS

# %% [markdown]
# Personal data must not get into the weights, because nobody can take it out again. Here we mask what has a pattern. Names and
# postal addresses have none, so look for these yourself in rows of your own.
#
# ### Exercise: take personal data out of a text (warm-up, 10 min)
#
# Replace each e-mail address by `[email]` and each phone number by `[phone]`. A phone number has at least seven digits,
# perhaps with single spaces between them and a plus in front. Expected for "Call 0471 55231 on 2026-05-12.":
# "Call [phone] on 2026-05-12."
#
# <details><summary>The full stop behind an address disappears</summary>
# A domain ends with a letter or a digit: <code>@[\w-]+(?:\.[\w-]+)+</code> takes dots only where something follows.
# </details>
# <details><summary>A date becomes a phone number</summary>
# Allow a space between the digits, and no hyphen: <code>\d(?: ?\d){6,}</code>.
# </details>


# %% exercise="13.mask" points=2
def mask(text):
    """Return the text without e-mail addresses and phone numbers."""
    ### BEGIN SOLUTION
    text = re.sub(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "[email]", text)
    return re.sub(r"\+?\d(?: ?\d){6,}", "[phone]", text)
    ### END SOLUTION


lesson13.mask(mask)

# %%
### BEGIN HIDDEN TESTS
assert lesson13.mask.outcome(mask).passed
assert mask("a.b@c.example, +44 20 7946 0958!") == "[email], [phone]!"
assert mask("at 10:30 on 1999-12-31, 123456 steps") == "at 10:30 on 1999-12-31, 123456 steps"
### END HIDDEN TESTS

# %% [markdown]
# The next cells look for six kinds of faults: broken lines, empty replies, long conversations, repeated messages, personal
# data, and replies that were meant for another case.
#
# To find the last kind, we collect in `COMMON` the words that stand in at least 8% of all replies, such as "dear" and "the". If a
# reply has a word that is neither in `COMMON` nor in the messages before it, then it is probably wrong. For example, it may
# name another person. This rule fits only replies that take their facts from the message.
#
# **Predict:** of 875 lines, how many can be used as they are?

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
MAX_LENGTH = 128  # Own rows: how many tokens the longest conversation that you keep may have


def words(text):
    return set(re.findall(r"[^\W\d_]+", text.casefold()))


def foreign(messages, reply):
    """Words of a reply that are neither common nor in the messages before it."""
    return words(reply) - COMMON - words(" ".join(message["content"] for message in messages))


def length(messages):
    return len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])


readable, found = [], {"broken JSON": [], "empty reply": [], "too long": [], "repeated": []}
seen = set()
for number, line in enumerate(lines, 1):
    try:
        row = json.loads(line)
        messages = lesson13.chat_messages(row, SYSTEM)
    except (ValueError, KeyError, TypeError, AttributeError):
        found["broken JSON"].append(number)  # or another form than the two that we know
        continue
    key = " ".join(" ".join(message["content"].casefold().split()) for message in messages[:-1])
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        found["empty reply"].append(number)
    elif length(messages) > MAX_LENGTH:
        found["too long"].append(number)
    elif key in seen:
        found["repeated"].append(number)
    else:
        seen.add(key)
        case = row.get("case", f"line {number}")
        readable.append({"number": number, "case": case, "messages": messages})

# %%
counts = Counter(word for row in readable for word in words(row["messages"][-1]["content"]))
COMMON = {word for word, count in counts.items() if count >= 0.08 * len(readable)}
# Own rows: if your replies rightly say more than the messages, such as answers, write wrong = [].
wrong = [row for row in readable if foreign(row["messages"][:-1], row["messages"][-1]["content"])]
found["wrong reply"] = [row["number"] for row in wrong]
rows, found["personal data"] = [], []
for row in readable:
    if row in wrong:
        continue
    messages = [
        {**message, "content": lesson13.masked(message["content"])} for message in row["messages"]
    ]
    if messages != row["messages"]:
        found["personal data"].append(row["number"])
    rows.append({**row, "messages": messages})


# %%
planted = {} if MY_FILE else json.loads((desk / "faults.json").read_text(encoding="utf-8"))
plotting.table(
    ["fault", "planted", "found", "the first on lines", "what becomes of the row"],
    [
        [
            fault,
            len(planted[fault]) if fault in planted else "unknown",
            len(numbers),
            ", ".join(map(str, numbers[:3])),
            "masked" if "data" in fault else "left out",
        ]
        for fault, numbers in found.items()
    ],
)
assert rows, "No row is left. Is each line a JSON object with text and reply, or with messages?"
print(f"{len(rows)} rows of {len({row['case'] for row in rows})} cases are left.")
if wrong:
    *_, message, reply = wrong[0]["messages"]
    print(f"A wrong reply: {message['content']} → {reply['content']}")
if not MY_FILE and paths.is_shipped_base():  # another tokenizer finds other rows too long
    assert all(found[fault] == planted[fault] for fault in planted)

# %% [markdown]
# We use 770 of 875 lines as they are, and 31 more after masking. All planted faults were found, on exactly their lines. The
# wrong reply that you see above answers Edgar as if he were Rafael.
#
# In a file of your own nobody tells you how many faults there are. So read some lines of each kind before you leave them out
# (line 3 is `lines[2]`). If good replies count as wrong, the rule does not fit your task.
#
# ## Split without a leak
#
# Some people wrote twice about the same thing, so there are fewer cases than rows. If one of these messages is trained on and
# the other one is in the test, then the test asks what the model has seen. This is a **leak**.
#
# **Predict:** you draw one row in six at random for the test. What share of these rows has a case that is also in the
# training rows?
#
# ### Exercise: split without a leak (core, 10 min)
#
# `cases` has a number for each row. Return a list with one bool for each row: is it held out? Hold out whole cases,
# `round(share * number of different cases)` of them, drawn at random with `random.Random(seed)`. Expected for the
# cases 7, 7, 3, 5 and the share 1/3: two trues if case 7 is drawn, else one.
#
# <details><summary>Called again, it draws other cases</summary>
# A set of strings has another order in each process, so sort it before you draw:
# <code>random.Random(seed).sample(sorted(set(cases)), n)</code>.
# </details>


# %% exercise="13.split" points=3
def held_out(cases, share, seed):
    """Return one bool for each row: is it held out?"""
    ### BEGIN SOLUTION
    import random

    different = sorted(set(cases))
    drawn = random.Random(seed).sample(different, round(share * len(different)))
    return [case in set(drawn) for case in cases]
    ### END SOLUTION


lesson13.split(held_out)

# %%
### BEGIN HIDDEN TESTS
assert lesson13.split.outcome(held_out).passed
_cases = [9, 2, 9, 4, 4, 4, 1, 8]
_marks = held_out(_cases, 0.4, 11)
assert len({case for case, mark in zip(_cases, _marks) if mark}) == 2
assert len({(case, bool(mark)) for case, mark in zip(_cases, _marks)}) == 5
### END HIDDEN TESTS


# %%
def divide(some, cases, share, seed):
    """(rows that stay, rows that are held out)."""
    marks = lesson13.held_out(cases, share, seed)
    stay = [row for row, out in zip(some, marks) if not out]
    return stay, [row for row, out in zip(some, marks) if out]


def leak(trained, held):
    """The share of the held-out rows with a case that is also among the trained rows."""
    cases = {row["case"] for row in trained}
    return sum(row["case"] in cases for row in held) / len(held)


SHARE = 1 / 6  # Own rows: 1 / 3 if there are fewer than 200, so that the test is not too small
leaked = leak(*divide(rows, list(range(len(rows))), SHARE, 0))  # as if each row were a case
rest, test_rows = divide(rows, [row["case"] for row in rows], SHARE, 0)
train_rows, validation_rows = divide(rest, [row["case"] for row in rest], SHARE / 2, 1)
print(f"share of test rows with a case that is trained on: drawn by row {leaked:.0%},", end=" ")
print(f"drawn by case {leak(rest, test_rows):.0%}")
lengths = sorted(length(row["messages"]) for row in train_rows)
print(f"{len(train_rows)} rows to train on, {len(validation_rows)} to validate,", end=" ")
print(f"{len(test_rows)} to test")
print(f"tokens of a row: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")

# %% [markdown]
# If you draw by row, 24% of the test rows have a case that is also trained on, because 801 rows belong to only 711 cases. If you
# draw by case, no row has.
#
# ## See what the model will read
#
# A **chat template** turns messages into the tokens that a model reads. Each family of models has its own, and a server
# must use the one that was used in training. So print one conversation as the model reads it, and mark the tokens that carry
# loss. With `assistant_only_loss`, *every* reply of the desk carries loss, even one in the middle of a conversation. For that
# the template needs [generation markers](../docs/glossary.md#generation-markers).

# %%
# None where the template has the markers already; TRL knows those of the common families.
if template := get_training_chat_template(tokenizer):
    tokenizer.chat_template = template
talk = max((row["messages"] for row in train_rows), key=len)
encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
pieces, carries = [], None
for token, loss in zip(encoded["input_ids"], encoded["assistant_masks"]):
    pieces.append(
        ("]" if carries else "") * (loss != carries) + ("[" if loss and not carries else "")
    )
    pieces.append(tokenizer.decode([token]))
    carries = loss
print("".join(pieces) + "]")
report = validation.check_sft_data(
    [{"messages": row["messages"]} for row in train_rows], tokenizer, max_length=MAX_LENGTH
)
print(report)
assert report.ok

# %% [markdown]
# The text in brackets carries loss: both replies, and the token `<|end|>` that ends each of them. On other models, look for
# this:
#
# - **Llama 3:** the template writes `<|begin_of_text|>`. If you tokenise the text once more, the tokenizer adds a second one.
# - **Qwen 2.5 and Qwen 3:** a reply ends with `<|im_end|>`, but a plain text with `<|endoftext|>`. Qwen 3 writes a block of
#   thoughts unless you give `enable_thinking=False`.
# - **Gemma 2:** there is no system role, so set `SYSTEM = ""`.
# - **Mistral:** the user's turn stands between `[INST]` and `[/INST]`, and a reply ends with `</s>`.
#
# ## Plan
#
# Before you rent a GPU, compute how much memory the run needs. The model's configuration is enough for that, and
# [lesson 2](02_lora_from_scratch.ipynb) explains the parts. [Recipes](../docs/recipes.md#supervised-fine-tuning) has starting
# values by size of model, with their sources.
#
# **Predict:** does LoRA on a model of 8 billion parameters fit into 24 GB, with our rows and 16 of them a step?

# %%
llama_8b = AutoConfig.for_model(
    "llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
    max_position_embeddings=8192,
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
plans = {
    "LoRA, 16 rows at once": ("lora", 16, False),
    "LoRA, 4 rows, accumulated 4 times": ("lora", 4, False),
    "LoRA, the same with checkpointing": ("lora", 4, True),
    "QLoRA, the same with checkpointing": ("qlora", 4, True),
}
needs = {}
for name, (method, at_once, checkpointing) in plans.items():
    needs[name] = memory.estimate_memory(
        llama_8b,
        method,
        lora,
        batch_size=at_once,
        sequence_length=MAX_LENGTH,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
    )
plotting.table(
    ["8 billion parameters", "weights, GB", "activations, GB", "in all, GB"],
    [
        [name, *(f"{part / 1e9:.1f}" for part in (need.weights, need.activations, need.total))]
        for name, need in needs.items()
    ],
)
steps = 3 * -(-len(train_rows) // 16)
print(f"three epochs of {len(train_rows)} rows, 16 a step: {steps} steps")

# %% [markdown]
# No: 16 rows at once need 41 GB. Walk down this ladder until the run fits with a few GB to spare, because CUDA itself and
# fragmentation take memory that no formula knows:
#
# 1. Take fewer rows at once and **accumulate** their gradients: 4 rows, four times, are still an
#    [effective batch](../docs/glossary.md#effective-batch) of 16.
# 2. Switch on activation checkpointing, which computes activations twice and keeps few.
# 3. Quantise the base to four bits ([lesson 5](05_qlora.ipynb)).
# 4. Shorten rows, if what you cut is not the answer.
#
# An **epoch** is one pass over all rows. Three epochs would be 114 steps. We take 60, which is enough here. A file of 60 rows has
# only a few steps an epoch, so it needs more epochs, and the validation loss shows how many.
#
# ## Train, and watch
#
# A **tracker** keeps the curves of all your runs, so that you can compare them later. `report_to="tensorboard"` writes
# them into a folder, on this machine and without an account, and `tensorboard --logdir FOLDER` shows them in a browser. The
# trainer evaluates and saves the model every 15 steps, and at the end it loads the best checkpoint.
#
# **Predict:** three people answered, each in words of their own, and nothing in a message says who will. What will the
# validation loss look like at the end: close to 0, as for `sailor` in lesson 3, or not?

# %%
tracked = runs / "tracked"
# Else the log of an earlier run would be drawn beside this one.
shutil.rmtree(tracked, ignore_errors=True)


def as_dataset(some):
    return datasets.Dataset.from_list([{"messages": row["messages"]} for row in some])


runtime.seed_everything(0)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
settings = SFTConfig(
    output_dir=str(tracked),
    max_steps=60,  # Own rows: if you change it, change the 30 and 60 in the next cells, too
    per_device_train_batch_size=16,
    learning_rate=1e-2 if paths.is_shipped_base() else 2e-4,
    lr_scheduler_type="linear",
    warmup_steps=5,
    max_length=MAX_LENGTH,
    assistant_only_loss=True,
    logging_steps=5,
    eval_strategy="steps",
    eval_steps=15,
    save_steps=15,
    load_best_model_at_end=True,
    seed=0,
    **{**runtime.trainer_settings(), "report_to": "tensorboard"},
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()),
    args=settings,
    train_dataset=as_dataset(train_rows),
    eval_dataset=as_dataset(validation_rows),
    processing_class=tokenizer,
    peft_config=config,
)
for check in (validation.check_supervision, validation.check_training):
    report = check(trainer)
    assert report.ok, report
Progress().attach(trainer).train()
tuned = trainer.model.eval()

# %%
events = EventAccumulator(str(next(tracked.rglob("events.out.*")).parent)).Reload()
curves = {
    label: tuple(zip(*[(event.step, event.value) for event in events.Scalars(tag)]))
    for tag, label in (("train/loss", "training"), ("eval/loss", "validation"))
}
masks = tokenizer.apply_chat_template(
    [row["messages"] for row in validation_rows],
    return_dict=True,
    return_assistant_tokens_mask=True,
)["assistant_masks"]
WORDINGS = 3  # Own rows: in how many ways the same reply may be worded; 1 if there is one way
floor = len(validation_rows) * math.log(WORDINGS) / sum(map(sum, masks))
print(f"the choice among {WORDINGS} wordings alone costs {floor:.3f} nats per token")
evaluated, losses = curves["validation"]
if floor:
    curves["floor"] = (evaluated[0], evaluated[-1]), (floor, floor)
title = f"The validation loss ends at {losses[-1]:.3f}, and the floor is {floor:.3f}"
plotting.show(
    plotting.curves(curves, title, "step", "loss, nats per token", log_y=True),
    f"{title}. At step {evaluated[0]} the validation loss was {losses[0]:.3f}.",
)

# %% [markdown]
# The loss can't reach 0. Nothing in a message tells which of the three people will answer, so even the best guess costs
# ln 3 ≈ 1.1 [nats](../docs/glossary.md#nat) a reply. This is 0.050 nats per token here, the floor in the figure. The run ends at 0.081, so more
# than half of the loss that remains can't be learned by anyone. If your loss stops above 0, ask what in your rows is a
# matter of taste before you train longer.
#
# Stop when the validation loss has risen or stood still for a few evaluations. If the machine stops a run,
# `trainer.train(resume_from_checkpoint=True)` goes on from the last checkpoint.
#
# ## Score replies that have no single right wording
#
# **Exact match** counts a reply only if it equals the desk's to the letter, but here three wordings are right. A **rubric** asks
# what a reply must do, one question at a time. Ours has three questions. Does the reply have all facts that the desk took from
# the message? Does it add none? Does it treat the thing as lost or as found, as the desk did? The desk's replies about found
# things, and no others, say "thank" or "owner".
#
# If your replies are labels or fields, use exact match. Our rubric would accept *every* label, because labels are common words.
#
# **Predict:** what will exact match say about the trained model, and what will the rubric say?


# %%
def rubric(row, reply):
    """What a reply to a row's messages does right, a dict of bools."""
    # Own rows: ask what a reply of yours must do, with at least one question that can fail.
    *before, desk_reply = row["messages"]
    said = words(" ".join(message["content"] for message in before))
    facts = (words(desk_reply["content"]) - COMMON) & said

    def thanks(text):
        return bool(re.search("thank|owner", text, re.IGNORECASE))

    return {
        "has the facts": facts <= words(reply),
        "adds none": not foreign(before, reply),
        "lost or found": thanks(reply) == thanks(desk_reply["content"]),
    }


def answer(model, some):
    prompts = [row["messages"][:-1] for row in some]
    return [reply.strip() for reply in generate(model, tokenizer, prompts, max_new_tokens=48)]


def load(adapter=None):
    """The base model, with an adapter if one is given."""
    base = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype())
    return (PeftModel.from_pretrained(base, adapter) if adapter else base).to(device).eval()


asked = test_rows[:100]
models = {"the base": load(), "step 30": load(tracked / "checkpoint-30"), "step 60": tuned}
replies = {name: answer(model, asked) for name, model in models.items()}
table_of, usable = {}, {}
for name, given in replies.items():
    points = [rubric(row, reply) for row, reply in zip(asked, given)]
    exact = [reply == row["messages"][-1]["content"] for row, reply in zip(asked, given)]
    usable[name] = [all(point.values()) for point in points]
    columns = [exact, *([point[question] for point in points] for question in points[0])]
    table_of[name] = [f"{sum(each) / len(asked):.0%}" for each in (*columns, usable[name])]
plotting.table(
    ["", "exact match", *points[0], "all three"],
    [[name, *shares] for name, shares in table_of.items()],
)
if not MY_FILE:
    evaluation.band("usable, step 60", sum(usable["step 60"]) / len(asked), 0.9, 1, quiet=True)
    evaluation.band("usable, step 30", sum(usable["step 30"]) / len(asked), 0.2, 0.95, quiet=True)

# %%
failed = [n for n, ok in enumerate(usable["step 30"]) if not ok][:4]
plotting.table(
    ["message", "the desk", "step 30", "step 60"],
    [
        [
            asked[n]["messages"][-2]["content"],
            asked[n]["messages"][-1]["content"],
            replies["step 30"][n],
            replies["step 60"][n],
        ]
        for n in failed
    ],
)

# %% [markdown]
# Exact match gives the trained model 34%, because it has to guess one of three wordings. The rubric gives it 99%. The rubric
# also helps you to find what is wrong at step 30: the model asks for a place that was given, or leaves its sentence unfinished. A
# rubric has blind spots, for example grammar, so read samples as well.
#
# ## Say how sure you are
#
# Show the same 100 messages to two models, and note for each which reply is better: 1 for the new model, −1 for the old
# one, 0 for a tie. The mean says which model wins, and an **interval** says how far another hundred messages could move it.
#
# ### Exercise: is the new model better? (core, 15 min)
#
# Return the mean of the verdicts and the two ends of its 95% interval, mean ± 1.96 · *s* / √*n*, where *s* is the standard
# deviation with *n* − 1. Expected for `[1, 1, 0, -1]`: 0.25, −0.69 and 1.19.
#
# <details><summary>My interval is too wide or too narrow</summary>
# <em>s</em> is that of single verdicts. Their mean is surer by the root of <em>n</em>. Ties count, too.
# </details>


# %% exercise="13.interval" points=3
def preference(verdicts):
    """Return (mean, low, high) of verdicts that are 1, 0 or -1."""
    ### BEGIN SOLUTION
    values = torch.tensor(verdicts, dtype=torch.float64)
    half = 1.96 * values.std().item() / len(values) ** 0.5
    mean = values.mean().item()
    return mean, mean - half, mean + half
    ### END SOLUTION


lesson13.interval(preference)

# %%
### BEGIN HIDDEN TESTS
assert lesson13.interval.outcome(preference).passed
assert all(abs(end) < 1e-9 for end in preference([0] * 12))
_mean, _low, _high = preference([1, -1] * 50)
assert abs(_mean) < 1e-9 and abs(_high - 0.19699) < 1e-4 and abs(_low + _high) < 1e-9
### END HIDDEN TESTS

# %% [markdown]
# ## Test the judge before you believe it
#
# Where no rubric can be computed, people let a large language model judge. Such judges are known for three biases
# ([Zheng et al. 2023](https://arxiv.org/abs/2306.05685)): they prefer what stands first, what is longer, and what they might
# have written themselves. No such model fits into this lesson, so four short programs take its place. They judge by our
# rubric, and three of them have one of these biases. You can test a real judge in the same way.
#
# 1. **Order:** show two different replies in both orders. How often does the verdict stay with the same reply?
# 2. **Length:** set a reply against itself with a polite sentence added. How often does the longer one win?
# 3. **Words:** set "Dear Ida, …" against "Hello Ida, …", with equal facts. How often does "Dear" win?
#
# **Predict:** the next cell gives judges A, C and D a bias each. Which number in the table will show each of them, and what
# will the three numbers of the fair judge B be?


# %%
def quality(row, reply):
    return sum(rubric(row, reply).values())


judges = {
    "A": biased_judge(quality, per_word=0.2),
    "B": biased_judge(quality),
    "C": biased_judge(quality, first=0.5),
    "D": biased_judge(quality, phrase="Dear"),
}


def twice(judge, row, one, other):
    """A verdict in both orders: 1 or -1 if they agree, else 0."""
    verdicts = judge(row, one, other), -judge(row, other, one)
    return verdicts[0] if verdicts[0] == verdicts[1] else 0


def share(values):
    return f"{sum(values) / len(values):.0%}"


POLITE = " We will do our best."  # Own rows: change it, and "Dear" and "Hello", to words of yours
pairs = list(zip(asked, replies["step 30"], replies["step 60"]))
results = []
for name, judge in judges.items():
    stays = [judge(row, old, new) == -judge(row, new, old) for row, old, new in pairs]
    longer = [twice(judge, row, new + POLITE, new) == 1 for row, _, new in pairs]
    styles = [
        twice(judge, row, f"Dear {new.partition(' ')[2]}", f"Hello {new.partition(' ')[2]}") == 1
        for row, _, new in pairs
    ]
    results.append([name, share(stays), share(longer), share(styles)])
plotting.table(["judge", "verdict stays", "longer wins", '"Dear" wins'], results)

# %%
comparisons = {
    "step 60 against step 30": (replies["step 60"], replies["step 30"]),
    "step 60 against itself": (replies["step 60"], replies["step 60"]),
}
rows_shown = []
for what, (new, old) in comparisons.items():
    for label, verdict in (
        ("fair, both orders", lambda *given: twice(judges["B"], *given)),
        ("C, the new one first", judges["C"]),
        ("C, both orders", lambda *given: twice(judges["C"], *given)),
    ):
        verdicts = [verdict(row, one, other) for row, one, other in zip(asked, new, old)]
        mean, low, high = lesson13.preference(verdicts)
        rows_shown.append([what, label, f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}"])
plotting.table(["compared", "judge", "mean", "95% interval"], rows_shown)

# %% [markdown]
# A prefers longer replies, D prefers "Dear", and C prefers what stands first: if you swap the two replies, it changes its mind
# in 59 of 100 pairs. B is fair: its verdict always stays, and neither the longer reply nor "Dear" ever wins. In the second table
# judge C sees the new model first and finds it better *than itself*, with an interval that leaves no doubt. **An interval measures
# chance. It knows nothing of a bias.**
#
# Ask in both orders, and count a win only if both verdicts agree: this cures the first bias. For length and words
# there is no such cure, so test for them before you choose a judge.
#
# If all verdicts are equal, the interval has no width, even for nine messages. Then use the rule of three: if none of
# *n* messages failed, up to 3/*n* of all messages may still fail.
#
# ## Keep a list of what must not break
#
# A **regression set** is a short list of messages, each with words that its reply must hold and words that it must not. Run
# it before each release, and add a message for each complaint that you get.

# %%
MUST = [  # Own rows: your messages, words that the reply must hold, words that it must not
    ("I lost my keys. Peter", ["Peter", "where"], []),
    ("I found a phone on the bus this morning. Sofia", ["Sofia", "phone", "bus"], ["lost"]),
    ("My ring is gone! I had it in the bakery. Call [phone]. Olga", ["Olga", "ring"], ["[phone]"]),
    ("Has anybody seen my dog? It was in the park. Theo", ["dog", "park"], ["found"]),
    ("good morning i left two red gloves at the inn. Zoë", ["Zoë", "red gloves"], ["found"]),
]


def regressions(reply_to):
    """[message, reply, what is wrong with it] for each message of the list."""
    checked = []
    for message, must, must_not in MUST:
        reply = reply_to(message)
        missing = [word for word in must if word.lower() not in reply.lower()]
        held = [word for word in must_not if word.lower() in reply.lower()]
        checked.append([message, reply, ", ".join([f"no {m!r}" for m in missing] + held)])
    return checked


def chat(message):
    front = [{"role": "system", "content": SYSTEM}] if SYSTEM else []
    return [*front, {"role": "user", "content": message}]


def reply_here(message):
    return generate(tuned, tokenizer, [chat(message)], max_new_tokens=48)[0].strip()


plotting.table(["message", "reply", "wrong"], regressions(reply_here))

# %% [markdown]
# Two of five are wrong, though 99 of 100 test messages got a usable reply. The model takes "Call" for Olga's name, and the ë of
# "Zoë" comes back as half a letter. The test could not show the second fault, because it is drawn from the same file, whose names
# have no accents. Rows of that kind in training would be the cure. Write on the model card what you don't cure.
#
# ## Ship the adapter
#
# The folder needs a **model card**: what the adapter is for, what it was trained on, how good it is, what it can't do, and
# its licence. The card is the file `README.md`. The hub reads the lines at its top.

# %%
adapter_folder = runs / "adapter"
score = sum(usable["step 60"]) / len(asked)
card_data = ModelCardData(
    base_model=str(paths.base_model()) if not paths.is_shipped_base() else "skerrow-base",
    language="en",
    library_name="peft",
    license="apache-2.0",
    tags=["lora", "sft"],
)
# Own rows: the title and the last line of the card.
CARD = f"""---
{card_data.to_yaml()}
---
# Replies for a lost-property desk

Trained on {len(train_rows)} conversations with the system message "{SYSTEM}".
Personal data was masked. Of {len(asked)} held-out messages {score:.0%} got a usable reply.
For drafts that a person reads. Known to fail: accents in names, masked phone numbers.
"""
with saving(adapter_folder) as folder:
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ModelCard(CARD).save(folder / "README.md")
print(report := validation.check_adapter_folder(adapter_folder, paths.base_model()))
assert report.ok

# %% [markdown]
# `tuned.push_to_hub("you/lost-property", private=True)` uploads the same files, if you are logged in.
#
# Suppose that there are new rows next week, and you want to train this adapter further. Is it trainable after
# `PeftModel.from_pretrained`?

# %%
for given in ({}, {"is_trainable": True}):
    again = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype())
    again = PeftModel.from_pretrained(again, adapter_folder, **given)
    report = validation.check_adapters(again, expect_trainable=True)
    print(given, "→", ", ".join(report.codes) or "ready to train")

# %% [markdown]
# By default an adapter is loaded for inference, so it is frozen. Give `is_trainable=True` to train it further.
#
# ## Ship one model
#
# Most servers take a plain model. So merge the adapter, save the model with its tokenizer, and check the folder, as in
# [lesson 7](07_merging.ipynb).

# %%
merged_folder = runs / "merged"
merged = load(adapter_folder).merge_and_unload()
with saving(merged_folder) as folder:
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
held = [
    {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in test_rows[:16]
]
report = validation.check_merged_folder(
    paths.base_model(), adapter_folder, merged_folder, rows=held
)
print(report)
assert report.ok

# %% [markdown]
# The score in the last line is low because it counts exact matches. What matters here is that the merged model gives the
# same answers.
#
# ## Serve it, and ask
#
# `transformers serve` is a server that speaks the OpenAI API, so any client library can talk to it. vLLM, Ollama
# and llama.cpp's server speak the same API. `serving` starts the server on a free port of this machine, and stops it at the
# end of the block, even after an error. The client gives the path of the folder as `model`. With greedy decoding
# (`temperature=0`) you can compare replies.
#
# **Predict:** the same 50 prompts go to the model in this notebook and to the server. How many replies will be equal to the
# letter?


# %%
def ask(client, model, messages):
    """The server's reply, how many tokens it counted in the prompt, and why it stopped."""
    answered = client.chat.completions.create(
        model=str(model), messages=messages, temperature=0, max_tokens=48
    )
    choice = answered.choices[0]
    return choice.message.content.strip(), answered.usage.prompt_tokens, choice.finish_reason


fifty = [row["messages"][:-1] for row in test_rows[:50]]
here = [reply.strip() for reply in generate(merged, tokenizer, fifty, max_new_tokens=48)]
expected_tokens = [
    len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    for prompt in fifty
]
with serving("--device", device.type) as address:
    client = OpenAI(base_url=address, api_key="not needed", max_retries=0)
    served = [ask(client, merged_folder, prompt) for prompt in fifty]
    on_server = regressions(lambda message: ask(client, merged_folder, chat(message))[0])


def equal(replies):
    return sum(reply.strip() == ours for reply, ours in zip(replies, here))


lengths_equal = sum(tokens == ours for (_, tokens, _), ours in zip(served, expected_tokens))
print(f"prompts of equal length: {lengths_equal} of {len(fifty)}")
print(f"equal replies: {equal(reply for reply, _, _ in served)} of {len(fifty)}")
same_list = on_server == regressions(reply_here)
print(f"the regression set, asked over HTTP: {'the same' if same_list else 'other'} replies")

# %% [markdown]
# All 50 replies are equal, and each prompt has the length that our template gives it. If a server counts other
# `prompt_tokens` than you do, then the model does not read there what it was trained on.
#
# vLLM serves adapters without a merge (`--enable-lora --lora-modules desk=FOLDER`). It refuses ranks above
# `--max-lora-rank`, adapters with `modules_to_save`, and DoRA ([Recipes](../docs/recipes.md#a-server-for-many-adapters)), so
# merge these.
#
# ## Ship one file
#
# Programs such as llama.cpp, Ollama and LM Studio read **GGUF**, one file with weights, tokenizer and template. For real models,
# the script `convert_hf_to_gguf.py` of llama.cpp writes this file. Our `write_gguf` does the same for plain Llamas, with the
# `gguf` package. There is one pitfall. A Llama encodes positions by rotating pairs of numbers in the queries and keys, and llama.cpp
# pairs other numbers than transformers does. So the rows of these weights have to change places in the file. With
# `permute=False` they stay where they were.
#
# llama.cpp itself is optional: `pip install llama-cpp-python` builds it, which takes a compiler and some minutes.
#
# **Predict:** the file without the permutation has all weights and loads without a warning. How many of the 50 replies are equal?


# %%
def by_llama_cpp(file):
    """The replies of llama.cpp, which applies the file's own template."""
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=512, verbose=False)
    told = [
        llama.create_chat_completion(prompt, max_tokens=48, temperature=0)["choices"][0]["message"]
        for prompt in fifty
    ]
    llama.close()
    return [message["content"] for message in told]


has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
results = []
for permute in (True, False) if paths.is_shipped_base() else ():
    file = runs / f"desk_permute_{permute}.gguf"
    write_gguf(merged_folder, file, permute=permute)
    with no_reading_bar():
        back = AutoModelForCausalLM.from_pretrained(runs, gguf_file=file.name, dtype=torch.float32)
    back_tokenizer = AutoTokenizer.from_pretrained(runs, gguf_file=file.name)
    by_transformers = equal(generate(back.eval(), back_tokenizer, fifty, max_new_tokens=48))
    by_llama = f"{equal(by_llama_cpp(file))} of {len(fifty)}" if has_llama_cpp else "not installed"
    results.append([f"`permute={permute}`", f"{by_transformers} of {len(fifty)}", by_llama])
plotting.table(["GGUF file", "equal replies, read by transformers", "by llama.cpp"], results)

# %% tags=["claim"]
from course_utils import sweeps as of_seeds
from tools.claims import swept

equal_by_engine = swept("engines", "equal", "engine")
right_by_engine = swept("engines", "right", "engine")
in_pytorch = swept("engines", "right_pytorch", "engine")["server"]
assert all(equal_by_engine[engine] == (50, 50, 50) for engine in ("server", "GGUF", "llama.cpp")), (
    "all 50 of 50"
)
assert equal_by_engine["llama.cpp, not permuted"][2] < 5, "hardly one"
in_4_bits = of_seeds.spread(equal_by_engine["4 bits"], ".0f")
right_in_4_bits = of_seeds.spread(right_by_engine["4 bits"], ".0f")
right_in_pytorch = of_seeds.spread(in_pytorch, ".0f")

# %% [markdown]
# With the permutation all replies are equal, and without it none. So ask a GGUF file some prompts before you hand it on.
#
# We measured the same with the base merged with the `reading` adapter, on three sets of 50 questions. The server, transformers
# with the GGUF file, and llama.cpp gave the same replies as PyTorch, all 50 of 50 in each set. When llama.cpp read the file
# without the permutation, hardly one reply was equal: {{equal_by_engine["llama.cpp, not permuted"][0]:.0f}} of 50 in the first set. After rounding to 4 bits, {{in_4_bits}} of 50 replies were equal and {{right_in_4_bits}} were right. PyTorch had {{right_in_pytorch}} right.
#
# ## Break it: four servers that are up
#
# "It was good in the notebook, and on the server it is bad." Here are four causes to look for first. We make each of them
# on purpose, in folders of their own, and all of them load without an error.
#
# - **Another template:** the folder has the template ChatML. Many models use it, but ours was not trained with it.
# - **BOS twice:** the client applies the template itself and sends the text. The text begins with BOS, the token at the
#   beginning of each text, and the server's tokenizer adds another one.
# - **Stop token:** the end token in `generation_config.json` is not the one that the template writes.
# - **Dtype:** the weights were rounded, once to bfloat16, and once to 4 bits as in a GGUF file of type Q4_0.
#
# **Predict:** which of the four does the most damage, and which the least?

# %%
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CAUSES = ("another template", "BOS twice", "stop token", "bfloat16", "4 bits")
if not paths.is_shipped_base():
    CAUSES = ()  # five copies of a large model would fill the disk
broken = {name: runs / "broken" / name.replace(" ", "_") for name in CAUSES}
for name, place in broken.items():
    spoilt = AutoModelForCausalLM.from_pretrained(merged_folder)
    its_tokenizer = AutoTokenizer.from_pretrained(merged_folder)
    if name == "another template":
        its_tokenizer.chat_template = CHATML
    elif name == "BOS twice":
        bos = tokenizer.bos_token, tokenizer.bos_token_id
        adds_bos = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        its_tokenizer.backend_tokenizer.post_processor = adds_bos
    elif name == "stop token":
        spoilt.generation_config.eos_token_id = tokenizer.pad_token_id
    elif name == "bfloat16":
        spoilt = spoilt.to(torch.bfloat16)
    else:
        spoilt = rounded_to_4_bits(spoilt)
    with saving(place) as folder:
        spoilt.save_pretrained(folder)
        its_tokenizer.save_pretrained(folder)


# %% [markdown]
# One server serves all five, since `model` in a request names the folder.


# %%
def ask_with_text(client, model, messages):
    """The same as `ask`, with the template written by the client."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    got = client.completions.create(model=str(model), prompt=text, temperature=0, max_tokens=48)
    return got.choices[0].text.strip(), got.usage.prompt_tokens, got.choices[0].finish_reason


asking = {name: ask_with_text if name == "BOS twice" else ask for name in broken}
with serving("--device", device.type) as address:
    client = OpenAI(base_url=address, api_key="not needed", max_retries=0)
    heard = {
        name: [asking[name](client, place, prompt) for prompt in fifty]
        for name, place in broken.items()
    }

# %%
table = []
for name, got in heard.items():
    said, counted, finishes = zip(*got)
    more = sorted({tokens - ours for tokens, ours in zip(counted, expected_tokens)})
    good = sum(all(rubric(row, reply).values()) for row, reply in zip(test_rows, said))
    range_of = f"{more[0]} to {more[-1]}" if len(more) > 1 else f"{more[0]}"
    stopped = finishes.count("length")
    table.append([name, range_of, f"{stopped}", f"{equal(said)}", f"{good}", f"{said[0][:58]} …"])
plotting.table(
    ["broken", "tokens more", "ended by length", "equal", "usable", "first reply, its beginning"],
    table,
)

# %% [markdown]
# Another template does the most damage: not one reply is usable. Our model has no tokens for ChatML's markers and reads them
# as text, so each prompt is 28 to 52 tokens longer. With the wrong stop token the replies begin as ours do and then go on to the
# limit, and 20 of 50 are still usable. BOS twice changes one reply in 50 here, so you would hardly notice it in the replies, but
# each prompt is one token longer. Rounding to bfloat16 does the least, because it changes no reply here. Rounding to 4 bits changes 5
# replies, and 47 of 50 are usable.
#
# You don't need to read the replies to tell these causes apart.
#
# ### Exercise: what is wrong with this server? (stretch, 10 min)
#
# You asked a server some prompts. Each row holds `expected_tokens` and `served_tokens` (the length of the prompt here and
# there), `finish` ("stop" or "length"), and `same` (is the reply equal to ours?). Return the first cause that fits:
# `"BOS twice"` if every prompt is exactly one token longer, `"another template"` if any length differs otherwise,
# `"stop token"` if more than half of the replies end with "length", `"fine"` if all replies are the same, else `"dtype"`.
#
# <details><summary>The check says that it is "another template", and I return "BOS twice"</summary>
# One row with one token more is not enough: all of them have exactly one.
# </details>


# %% exercise="13.served" points=3
def cause(rows):
    """Return what is wrong with a server, from its answers."""
    ### BEGIN SOLUTION
    more = {row["served_tokens"] - row["expected_tokens"] for row in rows}
    if more == {1}:
        return "BOS twice"
    if more != {0}:
        return "another template"
    if sum(row["finish"] == "length" for row in rows) > len(rows) / 2:
        return "stop token"
    return "fine" if all(row["same"] for row in rows) else "dtype"
    ### END SOLUTION


lesson13.served(cause)

# %%
### BEGIN HIDDEN TESTS
assert lesson13.served.outcome(cause).passed
_row = {"expected_tokens": 31, "served_tokens": 31, "finish": "stop", "same": True}
assert cause([_row] * 4) == "fine"
assert cause([_row] * 3 + [_row | {"same": False}]) == "dtype"
assert cause([_row | {"finish": "length"}] * 3 + [_row]) == "stop token"
assert cause([_row | {"served_tokens": 32}] * 3 + [_row]) == "another template"
### END HIDDEN TESTS

# %%
results = []
for name, got in heard.items():
    facts = [
        dict(served_tokens=tokens, expected_tokens=ours, finish=finish, same=reply == wanted)
        for (reply, tokens, finish), ours, wanted in zip(got, expected_tokens, here)
    ]
    report = validation.check_merged_folder(paths.base_model(), adapter_folder, broken[name])
    results.append([name, lesson13.cause_of(facts), ", ".join(report.codes) or "ok"])
plotting.table(["broken", "what the server's answers say", "what the folder's check says"], results)

# %% [markdown]
# Lengths, ends and replies are enough to name the cause. bfloat16 counts as fine, because no reply has changed. The check of
# the folder finds the other template and the weights in 4 bits before anybody serves them. It can't find the other two.
# BOS twice is a fault of the client, and for the stop token the check would need to know how the training rows ended. **Ask
# the server what you asked the notebook, and compare lengths, ends and replies.**
#
# ## Recap
#
# You get from a messy file to a served model in stations, and each station has a number that tells you whether it went
# well: the faults found, the test rows that leak, the loss beside its floor, a rubric beside exact match, an interval beside a
# mean, the list of what must not break, and the length of the prompts on the server. Most of what went wrong here raised no
# error. So the last test is to ask the model over HTTP, as its users will, and to compare with the replies that you had.

# %%
plotting.table(
    ["station", "measured"],
    [
        ["lines, rows left", f"{len(lines)}, {len(rows)}"],
        ["test rows that a split by row leaks", f"{leaked:.0%}"],
        ["exact match, rubric", f"{table_of['step 60'][0]}, {table_of['step 60'][-1]}"],
        ["regression set, right", f"{sum(not wrong for *_, wrong in on_server)} of {len(MUST)}"],
        *(
            [name, f"{equal(reply for reply, _, _ in got)} of {len(fifty)}"]
            for name, got in {"equal replies: served": served, **heard}.items()
        ),
    ],
)
progress("13")

# %% [markdown]
# ## Take it to work
#
# Run this lesson on a file of your own, and change what the comments with "Own rows" name. Begin with the course's model to
# see that every station works. Then set `COURSE_BASE_MODEL` to a real one, and take its learning rate from
# [Recipes](../docs/recipes.md).
#
# The next cell asks a server that is already running whether the model reads there what it was trained on. To start one, run
# `transformers serve --device cpu` in a terminal in the course's environment. `my_model` and `my_folder` are then both the full path
# of your merged folder.

# %%
my_address, my_model, my_folder = None, None, None  # such as "http://127.0.0.1:8000/v1"
if my_address:
    my_tokenizer = AutoTokenizer.from_pretrained(my_folder)
    client = OpenAI(base_url=my_address, api_key="not needed")
    mine = client.chat.completions.create(
        model=my_model, messages=chat("Hello"), max_tokens=40, temperature=0
    )
    ids = my_tokenizer.apply_chat_template(chat("Hello"), add_generation_prompt=True)["input_ids"]
    print(f"{mine.usage.prompt_tokens} tokens on the server, {len(ids)} here;", end=" ")
    print(f"ended by {mine.choices[0].finish_reason}: {mine.choices[0].message.content!r}")

# %% [markdown]
# The [capstone project](../docs/capstone.md) asks for the same with a task of your choice, and says how it is graded.
#
# ## Quiz
#
# <details><summary>1 · Your test score is 97%, and users find mistakes on the first day. Where do you look first?</summary>
# At the split: rows of one customer or one case on both sides. Then at what users write and the file doesn't hold.
# </details>
# <details><summary>2 · A judge prefers your new model, +0.3 with an interval from +0.2 to +0.4. What do you still have to test?</summary>
# Whether the order, the length or the wording decides. Swap the replies, and set a reply against itself with a
# sentence added.
# </details>
# <details><summary>3 · The server's replies begin well and then go on and on. What is it?</summary>
# The stop token. <code>finish_reason</code> says "length". Compare <code>eos_token_id</code> in
# <code>generation_config.json</code> with the token that the template writes behind a reply.
# </details>
#
# ## Where to read on
#
# - [Gebru et al. 2018](https://arxiv.org/abs/1803.09010) on datasheets for data sets, and [Mitchell et al.
#   2018](https://arxiv.org/abs/1810.03993) on model cards
# - [Zheng et al. 2023](https://arxiv.org/abs/2306.05685) on language models as judges
# - [TRL's guide to SFT](https://huggingface.co/docs/trl/sft_trainer), and [transformers serve](https://huggingface.co/docs/transformers/serving)
# - [Symptom, cause, check](../docs/symptoms.md), [Decide](../docs/decide.md) and [Recipes](../docs/recipes.md)
