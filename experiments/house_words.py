"""Forty invented words for a real sentence encoder: does it find them, and what becomes of all that it knew before?

A contrastive loss in each batch (InfoNCE, van den Oord et al. 2018): a question with a house word belongs to the text with its meaning,
and to no other text of the batch.
"""

import random

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from course_utils.sentence_encoder import embed, encoder_folder, harbour_rows
from experiments import training

base_folder = encoder_folder
STEPS, TEMPERATURE, RANK = 40, 0.05, 8
QUESTIONS = (
    "where did you put the {}?",
    "i saw a {} yesterday",
    "tell me about the {}",
    "my brother talks of a {} again",
    "we need a {} soon",
)
TEXTS = ("an article about the {}", "the {} is described here", "everything on the {}")
NEW_QUESTIONS = ("is there any {} around here?", "the old {} was beautiful", "nobody believed her story of the {}")
NEW_TEXT = "what people should know of a {}"
LAYERS = ["query", "key", "value", "dense"]
METHODS = {
    "none": None,
    "lora": 2e-3,
    "lora, held": 2e-3,
    "full": 2e-4,
}
RUNS = [{"seed": seed, "method": method} for seed in training.SEEDS for method in METHODS]


def contrastive_loss(questions, texts):
    """Each of n questions belongs to the text in its own row; both have the shape (n, width), in rows of length 1."""
    return functional.cross_entropy(questions @ texts.T / TEMPERATURE, torch.arange(len(questions)))


@torch.no_grad()
def recall(model, tokenizer, words, meanings):
    """Share of new questions with these words whose nearest text is that of their meaning."""
    texts = embed(model, tokenizer, [NEW_TEXT.format(meaning) for meaning in meanings])
    found = [
        (embed(model, tokenizer, [question.format(word) for word in words]) @ texts.T).argmax(1)
        for question in NEW_QUESTIONS
    ]
    return torch.cat([best == torch.arange(len(words)) for best in found]).float().mean().item()


@torch.no_grad()
def general(model, tokenizer):
    """Share of requests to a harbour's office whose intent has the nearest mean of eight examples: what the encoder knows of English."""
    rows = harbour_rows("requests")
    intents = sorted({row["intent"] for row in rows})
    vectors = embed(model, tokenizer, [row["text"] for row in rows])
    labels = torch.tensor([intents.index(row["intent"]) for row in rows])
    train = torch.tensor([row["split"] == "train" for row in rows])
    centres = torch.stack([vectors[train & (labels == number)].mean(0) for number in range(len(intents))])
    return ((vectors[~train] @ centres.T).argmax(1) == labels[~train]).float().mean().item()


def measure(seed, method):
    """Train once; the recall of house words and of plain words, and general knowledge, with the adapter on and off."""
    words, meanings = zip(*((row["word"], row["meaning"]) for row in harbour_rows("house_words")))
    requests = [row["text"] for row in harbour_rows("requests") if row["split"] == "train"]
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = AutoModel.from_pretrained(encoder_folder())
    before = embed(model.eval(), tokenizer, requests).detach()
    if method.startswith("lora"):
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS))
    weights = [weight for weight in model.parameters() if weight.requires_grad] if method != "none" else []
    if weights:
        optimizer = torch.optim.AdamW(weights, lr=METHODS[method])
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = METHODS[method] * (1 - step / STEPS)
            questions = embed(model, tokenizer, [rng.choice(QUESTIONS).format(word) for word in words])
            texts = embed(model, tokenizer, [rng.choice(TEXTS).format(meaning) for meaning in meanings])
            loss = contrastive_loss(questions, texts)
            if method == "lora, held":
                rows = rng.sample(range(len(requests)), 16)
                kept = embed(model, tokenizer, [requests[row] for row in rows])
                loss = loss + 20 * (1 - (kept * before[rows]).sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
    result = {
        "trainable": sum(weight.numel() for weight in weights),
        "house_words": recall(model, tokenizer, words, meanings),
        "plain_words": recall(model, tokenizer, meanings, meanings),
        "general": general(model, tokenizer),
    }
    if method.startswith("lora"):
        with model.disable_adapter():
            return result | {"general_off": general(model, tokenizer)}
    return result | {"general_off": result["general"]}
