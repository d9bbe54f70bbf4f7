"""The base model's card, `models/base/README.md`: every number in it is measured or read from a log here."""

import json
import re

from adapter_checks.safetensors_header import read_safetensors_header
from course_utils.files import write_text
from pretraining import corpus, mixture, words
from pretraining.abilities import OPEN_TASKS
from pretraining.adapters import MEASURED, SHIPPED, START, STEPS
from pretraining.places import BASE_FOLDER, WORK_FOLDER

N_DOCUMENTS = 200_000  # of each part
PROBED = {"open": "words never trained on", "quoted": "such words in quotation marks"}


def corpus_facts(world, first):
    """Counts over 200,000 documents from number `first` on: (share of duplicates, word types, three samples)."""
    texts, found = set(), set()
    for i in range(first, first + N_DOCUMENTS):
        text = " ".join(part for _, part in mixture.document(world, 0, i))
        texts.add(text)
        found.update(re.findall(r"[^\W\d_]+", text.lower()))
    samples = [" ".join(part for _, part in mixture.document(world, 0, first + i)) for i in (3, 20, 40)]
    return 1 - len(texts) / N_DOCUMENTS, len(found), samples


def loss_curve(rows, path):
    """Draw the loss of a part of the pretraining over its tokens, and beneath it how often values are found in the text."""
    import matplotlib.pyplot as plt

    from course_utils import plotting

    plotting.use_style()
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True)
    upper.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], marker="")
    upper.set(ylabel="training loss\n(nats per token)", ylim=(0.9, 3))
    upper.set_title(f"Pretraining ends at {rows[-1]['loss']:.2f} nats per token", loc="left")
    probes = [row for row in rows if "probe" in row]
    tokens = [row["tokens"] / 1e6 for row in probes]
    shares = [[row["probe"][relation] for relation in corpus.RELATIONS] for row in probes]
    band = [min(row) for row in shares], [max(row) for row in shares]
    lower.fill_between(tokens, *band, alpha=0.25, linewidth=0, label="lowest to highest relation")
    lower.plot(tokens, [sum(row) / len(row) for row in shares], marker="", label="mean of the relations")
    for name in [name for name in probes[-1]["probe"] if name not in corpus.RELATIONS]:
        lower.plot(tokens, [row["probe"][name] for row in probes], marker="", label=PROBED[name])
    lower.set(xlabel="tokens (millions)", ylabel="values found\nin the text", ylim=(0, 1.03))
    lower.yaxis.set_major_formatter("{x:.0%}")
    lower.legend(loc="lower right")
    fig.savefig(path, metadata={"Software": None})


def budget(log):
    """Tokens, steps and time of a part, in words."""
    last = log["rows"][-1]
    minutes, seconds = divmod(last["seconds"], 60)
    took = f"{minutes} minutes" if minutes > 9 else f"{minutes} min {seconds} s"
    return (
        f"{last['tokens'] / 1e6:.1f} million tokens in {last['step']:,} steps of {log['settings']['batch_tokens']:,} tokens, "
        f"{took} on an {log['machine']}"
    )


def last_loss(log):
    """The loss at the end of a part, as text."""
    return f"{log['rows'][-1]['loss']:.2f}"


def probe_table(log, lines=8):
    """About so many of the probes of a part, and the last, as a Markdown table."""
    probes = [row for row in log["rows"] if "probe" in row]
    shown = probes[:: max(1, len(probes) // lines)]
    return table(
        ["Tokens", *probes[-1]["probe"]],
        [
            [f"{row['tokens'] / 1e6:.1f} M", *(f"{share:.0%}" for share in row["probe"].values())]
            for row in [*shown, *([] if shown[-1] is probes[-1] else probes[-1:])]
        ],
    )


def quoted(samples):
    """Documents as Markdown quotations."""
    return "\n".join(f"> {sample}\n>" for sample in samples)


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def percent(value):
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}%"


def write_card(world, parts):
    """Write the card from the training logs, the measurements of the adapters, and counts of the corpus.

    parts: {"world" and "open": Settings}, the two parts of the pretraining.
    """
    measured = json.loads(MEASURED.read_text())
    config = json.loads((BASE_FOLDER / "config.json").read_text())
    logs = {part: json.loads((WORK_FOLDER / part / "log.json").read_text()) for part in parts}
    facts = {part: corpus_facts(world, settings.first_document) for part, settings in parts.items()}
    for part, log in logs.items():
        loss_curve(log["rows"], BASE_FOLDER / f"loss_{part}.png")
    tasks = measured["tasks"]
    abilities = table(
        ["Task", "Base", "LoRA r 8", "LoRA, novel half", "Own words", "Typed by hand", "Full fine-tuning", "Steps", "LoRA training", "Rows"],
        [
            [
                task,
                *(percent(t[how]["score"]) for how in ("base", "lora")),
                percent(t["lora"]["novel"]),
                *(percent(t[part]["score"]) if part in t else "" for part in ("own_words", "typed")),
                percent(t["full"]["score"]),
                STEPS[task],
                f"{t['lora_seconds']:.0f} s",
                t["lora"]["n"],
            ]
            for task, t in ((task, tasks[task]) for task in SHIPPED)
        ],
    )  # fmt: skip
    more = measured["abilities"]
    few_shot = table(
        ["Task", *(f"{part.replace('_', ' ')}, {n} examples" for part in ("test", "own_words") for n in more["few_shot"]["reading"][part])],
        [[task, *(percent(score) for part in ("test", "own_words") for score in more["few_shot"][task][part].values())] for task in OPEN_TASKS],
    )  # fmt: skip
    rates = table(
        ["Task", *more["rates"]["reading"]],
        [[task, *map(percent, more["rates"][task].values())] for task in OPEN_TASKS],
    )
    forgetting = table(
        ["Model", "Text of the coast", "Open text"],
        [[name, f"{loss['world']:.2f}", f"{loss['open']:.2f}"] for name, loss in more["forgetting"].items()],
    )
    limits = table(
        ["Where is the lamp?", *(f"{n} facts" if n != "1" else "1 fact" for n in more["limits"]["told"])],
        [
            [said, *map(percent, more["limits"][way].values())]
            for way, said in (
                ("told", "The lamp is in the hall."),
                ("denied", "The lamp is not in the hall, it is on the roof."),
            )
        ],
    )
    start = table(
        [
            "Rows",
            "Right where told",
            "Refused where told",
            "Honest where not told",
            "Neither, nor words of the passage",
        ],
        [[rows, *map(percent, shares.values())] for rows, shares in measured[START]["shares"].items()],
    )
    kinds = "\n".join(f"| {kind} | {percent(score)} |" for kind, score in tasks["reading"]["lora"]["by_kind"].items())
    text = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The Skerrow base model

A small language model for learning LoRA with: {parameters():,} parameters, Llama architecture, plain `transformers`.
It was pretrained from nothing on text about an invented coast and about everyday things, all of it made by this project. It can find
a fact in a text and say it again, also about names and things that it has never seen. It has never seen a task's question or a
task's form of answer: those are what the course teaches it.

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
| Tokenizer | byte-level BPE, {config["vocab_size"]} tokens, a word split alike with and without its space, chat template with generation markers |
| Weights | safetensors, float32, embeddings tied |

## Data

The corpus is written by a grammar, and read in two parts. All of it is this project's own writing.

1. **The coast** ([`pretraining/corpus.py`](../../pretraining/corpus.py)): a world drawn from a seed ([`pretraining/world.py`](../../pretraining/world.py)) with
   {len(world.names)} names, {len(world.towns)} towns, {len(world.people)} people with stored facts and {len(world.places)} places. It begins with rhymes about {corpus.SMALL_CAST} names,
   things and places, which the others join later: so the model learns to look back early. After them two thirds of the documents state
   a few facts and come back to each of them, or repeat a line; the rest are stories, towns, people, reviews, letters, talk, counting,
   notices and spelling. Measured over its first {N_DOCUMENTS:,} documents: {facts["world"][1]:,} word types, {len(corpus.sentence_patterns())} sentence patterns,
   {100 * facts["world"][0]:.2f}% duplicate documents.
2. **Any words** ([`pretraining/open_text.py`](../../pretraining/open_text.py)): {mixture.OPEN_SHARE:.0%} of the documents speak of common things, names, places and trades from
   lists that this project wrote ([`pretraining/words`](../../pretraining/words)), of made-up words, and seldom of the coast; the others go on as before.
   One word of the lists in {words.HELD_OUT_ONE_IN} is held out of everything that is trained on. Measured over {N_DOCUMENTS:,} documents: {facts["open"][1]:,} word
   types, {100 * facts["open"][0]:.2f}% duplicate documents.

Three documents of the first part and three of the second:

{quoted(facts["world"][2] + facts["open"][2])}

## Training

Muon for the matrices of the layers (learning rate {parts["world"].muon_lr}), AdamW for the rest ({parts["world"].adam_lr}); in each part warmed up over {parts["world"].warmup} steps and
brought down in a straight line over the last {parts["world"].decay:.0%}. Rows of {parts["world"].row} tokens, in the second part {parts["open"].row}, hold whole documents that do not see each
other; one batch in {round(1 / parts["world"].long_share)} has rows of {parts["world"].context} tokens. For the shipped
weights the batches were made ahead by other processes, and the steps replayed as a CUDA graph. `make base-model` does the same
arithmetic step by step. Two cores of an Intel Xeon read 7,300 tokens a second in the first part's first steps and 6,700 in the
second's, so on them it takes about two hours.

**First part.** {budget(logs["world"])}, with a vocabulary of {parts["world"].vocab:,} tokens.

![Training loss over tokens, with two bumps, which ends at {last_loss(logs["world"])} nats per token; below it, the share of values found, which jumps between 2 and 4 million tokens](loss_world.png)

The two bumps are where the others join the cast and where the rhymes end. How often the model finds the value of a fact, in narrative
text with three facts of the kind, while it was trained:

{probe_table(logs["world"])}

**Second part.** {budget(logs["open"])}, with {parts["open"].vocab:,} tokens, in which a word is split alike with and without its leading space. A new
token begins like the same piece with or without its space, or else as the mean of those that the first vocabulary split it into. `open` are the same facts about words that are never
trained on, `quoted` such words to be repeated in quotation marks.

![Training loss over tokens, which ends at {last_loss(logs["open"])} nats per token; below it, the share of values found, for words never trained on, too](loss_open.png)

{probe_table(logs["open"])}

## Abilities

Held-out rows, half of them with names, things and places that the task's training never used; exact match, greedy. "Own words" are rows
about words that no training text has, "typed by hand" sentences as people type them ([`pretraining/typed.txt`](../../pretraining/typed.txt)).
LoRA of rank 8 on all linear layers against full fine-tuning, same rows and steps, each with its own learning rate
([`pretraining/adapters.py`](../../pretraining/adapters.py)).

{abilities}

`reading` with LoRA, by kind of question:

| Kind | Score |
| --- | --- |
{kinds}

Examples in the prompt of the base, without any adapter ([`pretraining/abilities.py`](../../pretraining/abilities.py)):

{few_shot}

Score on own words by LoRA's learning rate:

{rates}

Loss on held-out text in nats a token, of the base and with an adapter:

{forgetting}

`{START}` is what preference training starts from. Its rows were written by many hands: where the passage does not answer the question,
three in ten say "Nobody knows.", and the others guess ([`pretraining/honesty.py`](../../pretraining/honesty.py)). It trained for
{measured[START]["seconds"]:.0f} seconds.

{start}

It writes {more["words_per_second"]:.0f} words a second, one answer at a time.

## Limits

Right answers of `reading` on words that no training text has, by the number of facts of this kind in the passage:

{limits}

- Negation does not occur in what it was trained on, nor do sums beyond twenty.
- A long word of rare pieces comes out wrong now and then: its beginning is copied, and another end put on.
- A word behind a quotation mark is another token than within a sentence, and some words were never read so: of `treehouse` the
  `extract` adapter makes ` treehouse`.
- It knows an invented world and a few hundred sentence patterns, and not much other English: it copies words that it does not know.
- It follows no instructions and knows no facts of the real world. It is of no use outside this course.
"""
    write_text(BASE_FOLDER / "README.md", text)


def parameters():
    """Number of parameters, from the header of the weights."""
    from math import prod

    return sum(prod(shape) for _, shape in read_safetensors_header(BASE_FOLDER / "model.safetensors").values())
