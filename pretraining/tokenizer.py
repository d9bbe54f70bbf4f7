"""The tokenizer: byte-level BPE, trained on the corpus, with a chat template.

Every segment of text starts with a space, after a special token too, so " barn" is the same token
in the middle of a story and as the first word of an answer.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
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


def train_tokenizer(texts, vocab_size, max_length):
    """Train byte-level BPE of `vocab_size` tokens on rendered documents.

    Returns a `PreTrainedTokenizerFast` whose end-of-sequence token is the end of a turn, too.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
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
