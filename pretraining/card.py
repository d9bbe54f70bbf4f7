"""The base model's card, `models/base/README.md`: every number in it is measured or read from a log here."""

import json
import re

from adapter_checks.safetensors_header import read_safetensors_header
from course_utils.files import write_text
from pretraining import corpus
from pretraining.adapters import MEASURED, SHIPPED, STEPS
from pretraining.places import BASE_FOLDER, WORK_FOLDER

N_DOCUMENTS = 200_000


def corpus_facts(world, seed=0):
    """Counts over the first 200,000 documents: (share of duplicates, word types, three samples)."""
    texts, words = set(), set()
    for i in range(N_DOCUMENTS):
        text = " ".join(part for _, part in corpus.document(world, seed, i))
        texts.add(text)
        words.update(re.findall(r"[a-z]+", text.lower()))
    samples = [" ".join(part for _, part in corpus.document(world, seed, i)) for i in (3, 20, 40)]
    return 1 - len(texts) / N_DOCUMENTS, len(words), samples


def loss_curve(rows, path):
    """Draw the pretraining loss over tokens, and beneath it when each relation began to be read."""
    import matplotlib.pyplot as plt

    from course_utils import plotting

    plotting.use_style()
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True)
    upper.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], marker="")
    upper.set(ylabel="training loss\n(nats per token)", ylim=(0.9, 3))
    upper.set_title(f"Pretraining ends at {rows[-1]['loss']:.2f} nats per token", loc="left")
    probes = [row for row in rows if "probe" in row]
    tokens, shares = [row["tokens"] / 1e6 for row in probes], [list(row["probe"].values()) for row in probes]
    lower.fill_between(
        tokens,
        [min(row) for row in shares],
        [max(row) for row in shares],
        alpha=0.25,
        linewidth=0,
        label="lowest to highest relation",
    )
    lower.plot(tokens, [sum(row) / len(row) for row in shares], marker="", label="mean of the relations")
    lower.set(xlabel="tokens (millions)", ylabel="values found\nin the text", ylim=(0, 1.03))
    lower.yaxis.set_major_formatter("{x:.0%}")
    lower.legend(loc="lower right")
    fig.savefig(path, metadata={"Software": None})


def percent(value):
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}%"


def write_card(world):
    """Write the card from the training log, the measurements of the adapters, and counts of the corpus."""
    log = json.loads((WORK_FOLDER / "log.json").read_text())
    measured = json.loads(MEASURED.read_text())
    settings, rows = log["settings"], log["rows"]
    config = json.loads((BASE_FOLDER / "config.json").read_text())
    duplicates, word_types, samples = corpus_facts(world)
    loss_curve(rows, BASE_FOLDER / "loss_curve.png")
    tasks = measured["tasks"]
    abilities = "\n".join(
        f"| {task} | {percent(t['base']['score'])} | {percent(t['lora']['score'])} | {percent(t['lora']['novel'])} | {percent(t['full']['score'])} |"
        f" {STEPS[task]} | {t['lora_seconds']:.0f} s | {t['lora']['n']} |"
        for task, t in ((task, tasks[task]) for task in SHIPPED)
    )
    kinds = "\n".join(f"| {kind} | {percent(score)} |" for kind, score in tasks["reading"]["lora"]["by_kind"].items())
    probes = [row for row in rows if "probe" in row]
    probe_lines = "\n".join(
        f"| {row['tokens'] / 1e6:.1f} M | " + " | ".join(f"{value:.0%}" for value in row["probe"].values()) + " |"
        for row in probes[:: max(1, len(probes) // 8)] + probes[-1:]
    )
    quoted = "\n".join(f"> {sample}\n>" for sample in samples)
    text = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The Skerrow base model

A small language model for learning LoRA with: {parameters():,} parameters, Llama architecture, plain `transformers`.
It was pretrained from nothing on text about an invented coast, all of it made by this project. It chats a little, and
it can find a fact in a text and say it again in its own words. It has never seen a task's question or a task's form of answer: those are what
the course teaches it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/base")
tokenizer = AutoTokenizer.from_pretrained("models/base")
```

| | |
| --- | --- |
| Layers, width, heads | {config["num_hidden_layers"]}, {config["hidden_size"]}, {config["num_attention_heads"]} |
| Feed-forward width | {config["intermediate_size"]} |
| Context | {config["max_position_embeddings"]} tokens |
| Tokenizer | byte-level BPE, {config["vocab_size"]} tokens, chat template with generation markers |
| Weights | safetensors, float32, embeddings tied |

## Data

The corpus is written by a grammar ([`pretraining/corpus.py`](../../pretraining/corpus.py)) about a world drawn from a seed
([`pretraining/world.py`](../../pretraining/world.py)): {len(world.names)} names, {len(world.towns)} towns, {len(world.people)} people with stored facts,
{len(world.places)} places. Measured over its first {N_DOCUMENTS:,} documents: {word_types:,} word types, {len(corpus.sentence_patterns())} sentence patterns, {100 * duplicates:.2f}% duplicate documents.
It begins with rhymes about {corpus.SMALL_CAST} names, things and places, which the others join later: so the model learns to look back early.
After that two thirds of the documents state a few facts and come back to each of them, or repeat a line; that is what reading is learned from;
the rest are stories, towns, people, reviews, letters, talk, counting, notices and spelling. Three of them:

{quoted}

## Training

{rows[-1]["tokens"] / 1e6:.1f} million tokens in {rows[-1]["step"]:,} steps of {settings["batch_tokens"]:,} tokens, {rows[-1]["seconds"] / 60:.0f} minutes on {measured["machine"]["cores"]} cores of an {measured["machine"]["cpu"]} that also did other work.
Muon for the matrices of the layers (learning rate {settings["muon_lr"]}), AdamW for the rest ({settings["adam_lr"]}); warmed up over {settings["warmup"]} steps,
brought down in a straight line over the last {settings["decay"]:.0%}. Rows of {settings["row"]} tokens hold whole documents that do not see each
other; one batch in {round(1 / settings["long_share"])} has rows of {settings["context"]} tokens. `make base-model` repeats all of it.

![Training loss over tokens, which ends at {rows[-1]["loss"]:.2f} nats per token; below it, the share of values found, which jumps between 2 and 5 million tokens](loss_curve.png)

The two bumps are where the others join the cast and where the rhymes end.

How often the model finds the value of a fact, in narrative text with three facts of the kind, while it was trained:

| Tokens | {" | ".join(probes[-1]["probe"])} |
| --- |{" --- |" * len(probes[-1]["probe"])}
{probe_lines}

## Abilities

Held-out rows, half of them with names, things and places that the task's training never used; exact match, greedy.
LoRA of rank 8 on all linear layers against full fine-tuning, same rows and steps, each with its own learning rate
([`pretraining/adapters.py`](../../pretraining/adapters.py)).

| Task | Base | LoRA r 8 | LoRA, novel half | Full fine-tuning | Steps | LoRA training | Rows |
| --- | --- | --- | --- | --- | --- | --- | --- |
{abilities}

`reading` with LoRA, by kind of question:

| Kind | Score |
| --- | --- |
{kinds}

## Limits

- It knows an invented world and its few hundred sentence patterns, and no other English.
- It follows no instructions and knows no facts of the real world. It is of no use outside this course.
- Passages longer than a few sentences, negation and sums beyond twenty do not occur in what it was trained on.
"""
    write_text(BASE_FOLDER / "README.md", text)


def parameters():
    """Number of parameters, from the header of the weights."""
    from math import prod

    return sum(prod(shape) for _, shape in read_safetensors_header(BASE_FOLDER / "model.safetensors").values())
