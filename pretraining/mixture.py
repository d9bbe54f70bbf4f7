"""The documents that the pretraining reads, by number: first those of the world alone, then most of them with any words."""

import random

from pretraining.corpus import closed_document
from pretraining.open_text import open_document

# Words of any kind (`open_text`) come in when all seven relations are found in the words of the world: the first part of the
# pretraining ends before this document. From it on, this is the share of documents with them.
OPEN_FROM, OPEN_SHARE = 500_000, 0.7


def document(world, seed, index):
    """The document number `index` of the corpus of `seed`: a list of (role or None, text)."""
    rng = random.Random(f"open {seed} {index}")
    if index >= OPEN_FROM and rng.random() < OPEN_SHARE:
        return open_document(world, rng)
    return closed_document(world, seed, index)
