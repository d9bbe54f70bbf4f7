"""Pretraining: settings at the top, then data, model, loop, checkpoint. Resumable.

The learning rate is warmed up, held, and brought down in a straight line over the last part of the budget.
"""

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from course_utils import runtime
from pretraining import corpus, mixture
from pretraining.model import Muon, build_model
from pretraining.open_text import DEEDS, OpenScene
from pretraining.tokenizer import BOS, SPACE, render


@dataclass
class Settings:
    """What decides the result; written beside it."""

    seed: int = 0
    tokens: int = 16_000_000
    first_document: int = 0
    vocab: int = 2048
    split_alike: bool = False  # whether a word is cut into the same pieces with and without its leading space
    hidden: int = 256
    layers: int = 4
    intermediate: int = 576
    heads: int = 4
    context: int = 512
    row: int = 128  # tokens in an ordinary row, packed with whole documents that do not see each other
    batch_tokens: int = 4096
    long_share: float = 0.06  # share of batches of full context, documents strung together
    muon_lr: float = 0.01  # at 0.02 the queries and keys grew until every head looked at one token only, and nothing more was learned
    adam_lr: float = 0.003
    warmup: int = 60
    decay: float = 0.5  # share of the steps in which the rate comes down
    compile: bool = True
    probe_every: int = 125
    save_every: int = 125

    @property
    def steps(self):
        return self.tokens // self.batch_tokens


# --------------------------------------------------------------------------------------------
# Data: the corpus is written as it is read, so nothing but the seed has to be kept
# --------------------------------------------------------------------------------------------
class Batches:
    """Batches of packed documents. `state()` is the number of the next document and the rows left over."""

    def __init__(self, world, tokenizer, settings, next_document=0):
        self.world, self.tokenizer, self.settings, self.next_document = world, tokenizer, settings, next_document

    def documents(self, n):
        """The next `n` documents as lists of token ids."""
        numbers = range(self.next_document, self.next_document + n)
        self.next_document += n
        texts = [render(mixture.document(self.world, self.settings.seed, i)) for i in numbers]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [x for x in ids if len(x) <= self.settings.row]

    def packed(self):
        """Rows of whole documents, first fit by length: (input_ids, labels, position_ids, mask)."""
        s, pad = self.settings, self.tokenizer.pad_token_id
        n_rows, rows = s.batch_tokens // s.row, []
        pool = sorted(self.documents(round(n_rows * s.row / 50)), key=len, reverse=True)
        for ids in pool:
            room = [row for row in rows if sum(map(len, row)) + len(ids) <= s.row]
            if room:
                room[0].append(ids)
            elif len(rows) < n_rows:
                rows.append([ids])
        x = torch.full((n_rows, s.row), pad)
        segment = torch.full((n_rows, s.row), -1)
        position = torch.zeros((n_rows, s.row), dtype=torch.long)
        for i, row in enumerate(rows):
            start = 0
            for k, ids in enumerate(row):
                end = start + len(ids)
                x[i, start:end], segment[i, start:end], position[i, start:end] = (
                    torch.tensor(ids),
                    k,
                    torch.arange(len(ids)),
                )
                start = end
        same = segment[:, :, None] == segment[:, None, :]
        mask = (same & torch.ones(s.row, s.row, dtype=torch.bool).tril())[:, None]
        labels = x.masked_fill(segment < 0, -100)
        labels[position == 0] = -100  # the first token of a document can't be known
        return x, labels, position, mask

    def long(self):
        """Rows of full context, so that far positions are trained, too."""
        s = self.settings
        n_rows, stream = max(1, s.batch_tokens // s.context), []
        while len(stream) < n_rows * s.context:
            stream += sum(self.documents(n_rows * s.context // 50), [])
        x = torch.tensor(stream[: n_rows * s.context]).view(n_rows, s.context)
        position = torch.arange(s.context).expand(n_rows, -1)
        mask = torch.ones(s.context, s.context, dtype=torch.bool).tril().expand(n_rows, 1, -1, -1)
        return x, x.clone(), position, mask

    def batch(self, step):
        """The batch of a step: a long one at regular steps, else a packed one."""
        every = round(1 / self.settings.long_share)
        return self.long() if step % every == every - 1 else self.packed()


# --------------------------------------------------------------------------------------------
# Probes: one number a relation, read off documents that the model has not seen
# --------------------------------------------------------------------------------------------
def held_out_scene(world, rng):
    """A scene of words that no training text has."""
    return OpenScene(world, rng, split="held")


def probe_texts(world, relation, n, make_scene=corpus.Scene):
    """(text before the value, value) for `n` dense documents whose last sentence returns to one of three facts."""
    rng, out = random.Random(f"probe {relation}"), []
    endings = [t for t in corpus.RELATIONS[relation][1] if t.endswith("{v}.")]
    for _ in range(n):
        scene = make_scene(world, rng)
        facts = [scene.fact(relation) for _ in range(3)]
        told = " ".join(scene.write(rng.choice(corpus.RELATIONS[relation][0]), **fact) for fact in facts)
        fact = rng.choice(facts)
        out.append(
            (told + " " + scene.write(rng.choice(endings), **{**fact, "v": "@"}).split(" @")[0], " " + fact["v"])
        )
    return out


def quoted_texts(world, n):
    """(text before a word in quotation marks, the word and its closing marks) for `n` short documents of held-out words."""
    rng, out = random.Random("probe quoted"), []
    for _ in range(n):
        scene = held_out_scene(world, rng)
        fact = {"v": scene.given_name(), "o": scene.object(), "l": scene.place()}
        fact["verb"], fact["p"] = scene.verb(), fact["v"]
        told = scene.write(rng.choice(DEEDS), **fact)
        told += ' The harbour book says "'
        if rng.random() < 0.5:
            out.append((told, f'{fact["v"]}",'))
        else:
            out.append((f'{told}{fact["v"]}", "', f'{fact["o"]}",'))
    return out


@torch.no_grad()
def share_found(model, tokenizer, pairs):
    """Share of the (text before, value) pairs in which every token of the value is the model's first choice."""
    model.eval()
    befores = [tokenizer(f"{BOS} {before}", add_special_tokens=False)["input_ids"] for before, _ in pairs]
    values = [
        tokenizer(f"{BOS} {before}{value}", add_special_tokens=False)["input_ids"][len(ids) :]
        for (before, value), ids in zip(pairs, befores)
    ]
    length = max(len(b) + len(v) for b, v in zip(befores, values))
    x = torch.full((len(pairs), length), tokenizer.pad_token_id)
    for i, (b, v) in enumerate(zip(befores, values)):
        x[i, : len(b) + len(v)] = torch.tensor(b + v)
    x = x.to(model.device)
    # Right padding: nothing looks at it from the left.
    best = model(input_ids=x, attention_mask=torch.ones_like(x)).logits.argmax(-1)
    hits = [best[i, len(b) - 1 : len(b) + len(v) - 1].tolist() == v for i, (b, v) in enumerate(zip(befores, values))]
    model.train()
    return sum(hits) / len(hits)


def probe(model, tokenizer, world, held_out=False, n=40):
    """{relation: share of values found}; of held-out words also "open", over all relations, and "quoted", in quotation marks."""
    result = {relation: share_found(model, tokenizer, probe_texts(world, relation, n)) for relation in corpus.RELATIONS}
    if not held_out:
        return result
    held = [pair for relation in corpus.RELATIONS for pair in probe_texts(world, relation, n // 2, held_out_scene)]
    result["open"] = round(share_found(model, tokenizer, held), 3)
    result["quoted"] = share_found(model, tokenizer, quoted_texts(world, 2 * n))
    return result


# --------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------
def rate(step, settings):
    """Share of the full learning rate at a step."""
    down = settings.steps * settings.decay
    return min(1, (step + 1) / settings.warmup, (settings.steps - step) / down)


@torch.no_grad()
def carry_over(model, tokenizer, new_tokenizer, settings):
    """A model for `new_tokenizer` with the weights of `model`, which has the vocabulary of `tokenizer`.

    A token that is new begins like the same piece with or without its leading space, so that one can be copied as the other,
    and if that is new, too, as the mean of the tokens that `tokenizer` splits it into.
    """
    carried = build_model(
        new_tokenizer, settings.hidden, settings.layers, settings.intermediate, settings.heads, settings.context
    )
    known, old, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight, []
    pairs = [(i, known[token[1:]]) for token, i in known.items() if token.startswith(SPACE) and token[1:] in known]
    space = torch.stack([old[spaced] - old[bare] for spaced, bare in pairs]).mean(0)
    for i, token in enumerate(new_tokenizer.convert_ids_to_tokens(range(len(new_tokenizer)))):
        if token in known:
            rows.append(old[known[token]])
        elif token.removeprefix(SPACE) in known:
            rows.append(old[known[token.removeprefix(SPACE)]] + space)
        elif SPACE + token in known:
            rows.append(old[known[SPACE + token]] - space)
        else:
            ids = tokenizer(new_tokenizer.decode([i]), add_special_tokens=False)["input_ids"]
            rows.append(old[ids].mean(0))
    embeddings = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.stack(rows))
    carried.load_state_dict({**model.state_dict(), **embeddings})
    return carried


def train(world, tokenizer, settings, folder, start=None, log=print):
    """Pretrain into `folder` (checkpoint.pt is our own, read with weights_only) and return (model, log rows).

    start: (model, its tokenizer) whose weights it goes on from; without it they are drawn at random.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    if start:
        model = carry_over(*start, tokenizer, settings)
    else:
        model = build_model(
            tokenizer, settings.hidden, settings.layers, settings.intermediate, settings.heads, settings.context
        )
    model.to(runtime.device())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in name)]
    optimizers = [
        Muon(matrices, lr=settings.muon_lr),
        torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [settings.muon_lr, settings.adam_lr]
    first, rows, batches, seconds = 0, [], Batches(world, tokenizer, settings, settings.first_document), 0.0

    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=model.device)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first, batches.next_document, rows, seconds = (
            saved["step"],
            saved["next_document"],
            json.loads(saved["rows"]),
            saved["seconds"],
        )
        log(f"resumed at step {first}")

    forward = torch.compile(model, dynamic=False) if settings.compile else model
    began, losses = time.time() - seconds, []
    for step in range(first, settings.steps):
        x, labels, position, mask = (part.to(model.device) for part in batches.batch(step))
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * rate(step, settings)
        loss = forward(input_ids=x, labels=labels, position_ids=position, attention_mask=mask, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}: lower the learning rate")
        done = step + 1
        if done % 25 == 0 or done == settings.steps:
            row = {
                "step": done,
                "tokens": done * settings.batch_tokens,
                "loss": round(float(np.mean(losses)), 4),
                "seconds": round(time.time() - began),
            }
            losses = []
            if done % settings.probe_every == 0 or done == settings.steps:
                row["probe"] = probe(model, tokenizer, world, settings.first_document >= mixture.OPEN_FROM)
            rows.append(row)
            log(json.dumps(row))
        if done % settings.save_every == 0 or done == settings.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": done,
                "next_document": batches.next_document,
                "rows": json.dumps(rows),
                "seconds": time.time() - began,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    (folder / "log.json").write_text(
        json.dumps({"settings": asdict(settings), "machine": runtime.processor(), "rows": rows})
    )
    return model, rows
