"""The tokenizer: byte-level BPE, trained on the corpus, with a chat template.

Every segment of text starts with a space, after a special token too, so " barn" is the same token
in the middle of a story and as the first word of an answer.
"""

import json
from collections import Counter

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPACE = "Ġ"  # how byte-level BPE writes a space
SPACED_SHARE = 0.45  # of the learned tokens: those that are another one with a leading space
SPECIAL_TOKENS = [PAD, BOS, END, *ROLES.values()]

# `{% generation %}` marks what the assistant says, so that TRL's `assistant_only_loss` can find it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %} {{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}"
    "<|{{ message['role'] }}|> {{ message['content'] }}<|end|>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render(document):
    """A document of the corpus as the text that the model reads, special tokens included."""
    if document[0][0] is None:
        return f"{BOS} {document[0][1]}{END}"
    return BOS + "".join(f"{ROLES[role]} {text}{END}" for role, text in document)


def train_tokenizer(texts, vocab_size, max_length, split_alike=False):
    """Train byte-level BPE of `vocab_size` tokens on rendered documents.

    split_alike: learn the merges of a space and the first piece of a word last (`merges_of_bare_words`).
    It is plain byte-level BPE with GPT-2's pre-tokeniser in any case, which other engines know.

    Returns a `PreTrainedTokenizerFast` whose end-of-sequence token is the end of a turn, too.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_alike:
        bpe = Tokenizer(merges_of_bare_words(list(texts), vocab_size))
        bpe.pre_tokenizer = byte_level
    else:
        bpe = learn(texts, vocab_size, byte_level)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def learn(texts, vocab_size, pre_tokenizer):
    """BPE as the library learns it: the most frequent pair first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def merges_of_bare_words(texts, vocab_size):
    """A BPE model whose merges are learned from words without their leading space; those of the space come last.

    So "Alice" and " Alice" are split alike but for the first piece, and a word that was told can be copied behind a quotation mark.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    room = vocab_size - len(SPECIAL_TOKENS) - len(byte_level.alphabet())
    words_only = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), byte_level])
    bare = learn(texts, vocab_size - round(SPACED_SHARE * room), words_only)
    learned = json.loads(bare.to_str())["model"]
    vocab, merges = learned["vocab"], [tuple(merge) for merge in learned["merges"]]
    firsts = Counter()
    for word, n in Counter(word for text in texts for word in text.split(" ")[1:]).items():
        firsts.update(dict.fromkeys(bare.encode(word, add_special_tokens=False).tokens[:1], n))
    for special in SPECIAL_TOKENS:
        del firsts[special]
    # Most frequent first; equal ones in one order on every machine.
    ranked = sorted(firsts, key=lambda piece: (-firsts[piece], piece))
    for piece in ranked[: vocab_size - len(vocab)]:
        vocab[SPACE + piece] = len(vocab)
        merges.append((SPACE, piece))
    return models.BPE(vocab=vocab, merges=merges)
