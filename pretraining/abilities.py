"""What else the card says of the base model: few-shot prompting, LoRA's best rate, forgetting, speed."""

import json
import math
import random
import time

from course_utils import data, evaluation, paths
from course_utils.files import write_text
from course_utils.tasks import get_task
from pretraining import adapters, tasks
from pretraining.corpus import closed_document
from pretraining.mixture import OPEN_FROM
from pretraining.open_text import open_document
from pretraining.tokenizer import render

SHOTS, ROWS, TEXTS = (0, 4), 100, 128
FACTS = (1, 2, 4, 8)  # in a passage, of which one is asked for
RATES = (0.001, 0.003, 0.01)
OPEN_TASKS = ("reading", "sailor", "extract")


def add_abilities(world):
    """Measure all of it, and write it beside the scores of the adapters in `models/measured.json`."""
    measured = json.loads(adapters.MEASURED.read_text())
    measured["abilities"] = {
        "few_shot": few_shot(),
        "rates": rates(),
        "forgetting": forgetting(world),
        "limits": limits(world),
        "words_per_second": speed(),
    }
    write_text(adapters.MEASURED, json.dumps(measured, indent=1) + "\n")


def load_base():
    """(base model, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = paths.base_model()
    return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def few_shot(seed=0):
    """{task: {part: {examples in the prompt: score of the base}}}; the examples are training rows of the question's kind."""
    model, tokenizer = load_base()
    rng, result = random.Random(seed), {}
    for task in OPEN_TASKS:
        train = list(data.load_task(task, "train").select(range(1000)))
        result[task] = {}
        for part in ("test", "own_words"):
            rows = list(data.load_task(task, part).select(range(ROWS)))
            result[task][part] = {}
            for n in SHOTS:
                asked = []
                for row in rows:
                    alike = [other for other in train if other["kind"] == row["kind"]]
                    shots = rng.sample(alike if len(alike) >= n else train, n)
                    turns = [turn for shot in shots for turn in shot["prompt"] + shot["completion"]]
                    asked.append({**row, "prompt": turns + row["prompt"]})
                longest = get_task(task).max_new_tokens
                fits = [
                    row for row in asked if length(tokenizer, row) + longest <= model.config.max_position_embeddings
                ]
                scored = evaluation.evaluate_task(model, tokenizer, task, fits)
                result[task][part][n] = scored["score"]
    return result


def length(tokenizer, row):
    """Tokens of a row's prompt."""
    return len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])


def rates():
    """{task: {learning rate: score on `own_words` after LoRA}}."""
    result = {}
    for task in OPEN_TASKS:
        result[task] = {}
        for rate in RATES:
            model, tokenizer, _ = adapters.train_one(task, rate=rate)
            result[task][rate] = adapters.measure(model, tokenizer, task, "own_words", ROWS)["score"]
    return result


def held_out_documents(world):
    """{"world" or "open": plain documents after the rhymes from a seed that the pretraining doesn't read, framed as it reads them}."""
    kinds = {
        "world": lambda i: closed_document(world, "held out", i),
        "open": lambda i: open_document(world, random.Random(f"held out {i}")),
    }
    documents = {kind: map(write, range(OPEN_FROM, OPEN_FROM + 3 * TEXTS)) for kind, write in kinds.items()}
    return {
        kind: [render(parts) for parts in written if parts[0][0] is None][:TEXTS] for kind, written in documents.items()
    }


def forgetting(world):
    """{"base" or task: {"world" or "open": loss in nats a token}}: what an adapter costs on the two kinds of text."""
    from peft import PeftModel

    model, tokenizer = load_base()
    texts = held_out_documents(world)

    def losses(model):
        return {name: math.log(evaluation.perplexity(model, tokenizer, texts[name])) for name in texts}

    result = {"base": losses(model)}
    for task in OPEN_TASKS:
        adapted = PeftModel.from_pretrained(model, paths.adapter_path(task))
        result[task] = losses(adapted)
        model = adapted.unload()
    return result


def limits(world):
    """{"told" or "denied": {facts in the passage: score of the `reading` adapter}}, on words that no training text has.

    "told": the lamp is in the hall. "denied": the lamp is not in the hall, it is on the roof. The question is where the lamp is.
    """
    from peft import PeftModel

    model, tokenizer = load_base()
    model = PeftModel.from_pretrained(model, paths.adapter_path("reading"))
    familiar, _ = tasks.pools(world)

    def asked(n, denied, number):
        rng = random.Random(f"limits {n} {number}")
        scene = tasks.OpenTaskScene(familiar, rng, "held")
        scene.counts, scene.owner = False, None  # "the lamp is": one thing, and nobody's
        facts = [(scene.object(), scene.place(), scene.place()) for _ in range(n)]
        form = "The {} is not {}, it is {}." if denied else "The {0} is {2}."
        thing, _, place = rng.choice(facts)
        passage = " ".join(form.format(*fact) for fact in facts)
        return {**tasks.row(f"{passage} Where is the {thing}?", place, "thing_place"), "novel": True}

    scores = {}
    for way in ("told", "denied"):
        rows = {n: [asked(n, way == "denied", number) for number in range(ROWS)] for n in FACTS}
        scores[way] = {n: evaluation.evaluate_task(model, tokenizer, "reading", rows[n])["score"] for n in FACTS}
    return scores


def speed(tokens=200):
    """Words a second in generation, one talk at a time."""
    model, tokenizer = load_base()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Good morning."}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
    began = time.perf_counter()
    said = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[0]
    seconds = time.perf_counter() - began
    return len(tokenizer.decode(said[inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()) / seconds
