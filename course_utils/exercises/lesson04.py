"""Checks of lesson 4: choose targets for printed models, count parameters, write a configuration within a budget."""

import functools
import re

from course_utils.exercises import TryAgain, call_learner, describe, exercise, expect_number, expect_type, using

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_ARCHITECTURES = {
    "llama": _SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": _SIZES,
    "phi3": _SIZES,
    "bert": _SIZES,
}


def architecture(kind):
    """A model of two blocks of this architecture, on the meta device."""
    from transformers import AutoConfig

    from adapter_checks.counting import meta_model

    return meta_model(AutoConfig.for_model(kind, **_ARCHITECTURES[kind]))


@exercise("04.targets", title="Choose targets for five architectures", level="core", minutes=15)
def targets(function):
    """PEFT's own rules say which layers the answer adapts; they must be those of the attention, in each architecture."""
    from peft import LoraConfig

    from adapter_checks.counting import adapted_layers
    from adapter_checks.errors import InputError

    for kind in _ARCHITECTURES:
        model = architecture(kind)
        given = call_learner(function, kind)
        if isinstance(given, LoraConfig):
            raise TryAgain("Return the value of target_modules alone, a list of names or a pattern, not a LoraConfig.")
        given = expect_type(given, (str, list, tuple, set), f"the answer for {kind}")
        names = given if isinstance(given, str) else list(given)
        wrong = [name for name in names if not isinstance(name, str)]
        if wrong or not names:
            raise TryAgain(
                f"For {kind}, give names of layers as text; this has {describe(wrong[0]) if wrong else 'none'}."
            )
        try:
            found = {layer.name for layer in adapted_layers(model, LoraConfig(r=1, target_modules=names))}
        except InputError as error:
            raise TryAgain(f"{kind}: {error}") from None
        wanted = {name for name, layer in model.named_modules() if _is_attention(name) and hasattr(layer, "weight")}
        wanted = {name for name in wanted if model.get_submodule(name).weight.dim() == 2}
        missing, extra = (_in_a_block(names) for names in (wanted - found, found - wanted))
        if extra:
            raise TryAgain(
                f"{kind}: {extra[0]} is adapted as well, and it is no layer of the attention. Where two names end in the same "
                "word, give more of the name, such as attn.c_proj."
            )
        if missing:
            raise TryAgain(
                f"{kind}: {missing[0]} is a layer of the attention, and is not adapted. Did you think of its output layer?"
            )
        if found != wanted:
            raise TryAgain(
                f"{kind}: adapted are {len(found)} layers of {len(wanted)}. The same layers of every block are wanted."
            )


def _is_attention(name):
    return ".attn." in name or ".self_attn." in name or ".attention." in name


def _in_a_block(names):
    """The names from behind the block's number on, which is where blocks are alike; those outside the blocks come last."""
    split = [re.split(r"^.*?\.\d+\.", name) for name in names]  # ["", rest] in a block, else [name]
    return sorted({parts[1] for parts in split if len(parts) > 1}) + sorted(
        parts[0] for parts in split if len(parts) == 1
    )


@exercise("04.count", title="Count before you train", level="warm-up", minutes=5)
def count(function):
    """Compare with rank times (inputs + outputs), over random layers."""
    import random

    rng = random.Random(3)
    for _ in range(6):
        rank = rng.choice([2, 3, 5])
        shapes = [(rng.randint(20, 99), rng.randint(20, 99)) for _ in range(rng.randint(2, 4))]
        shapes.insert(rng.randrange(len(shapes)), shapes[-1])  # real models are all repeats
        found = expect_number(call_learner(function, list(shapes), rank), "the count")
        if found == sum(rank * (inputs + outputs) for inputs, outputs in shapes):
            continue
        mistakes = {
            sum(
                i * o for i, o in shapes
            ): "That is the count of the full weights. A and B are thin: one side of each is the rank.",
            sum(
                rank * i * o for i, o in shapes
            ): "That multiplies the two sides. A and B are two matrices: add them up.",
            sum(rank * i for i, o in shapes): "That is A only. B has the shape (outputs, rank).",
            sum(rank * o for i, o in shapes): "That is B only. A has the shape (rank, inputs).",
            sum(
                2 * rank * i for i, o in shapes
            ): "That takes every layer for a square one. A has rank × inputs numbers, B outputs × rank.",
            sum(i + o for i, o in shapes): "That is the count for rank 1. Multiply by the rank.",
            rank * sum(shapes[0]): "That is the first layer only. Add up all of them.",
            rank
            * sum(
                i + o for i, o in set(shapes)
            ): "Layers of one shape are counted once. Each has its own A and B: count every layer.",
        }
        raise TryAgain(
            mistakes.get(found, "The count is not right. Write down the shapes of A and B for one layer first.")
        )


RANKS = (64, 32, 16, 8, 4)


@exercise("04.budget", title="Write a configuration within a budget", level="core", minutes=15)
def budget(function):
    """Budgets at which a higher rank no longer fits, fits only without the tenth that stays free, or at which none fits."""
    for hidden, cases in ((64, ((64, 1.001, 64), (32, 0.999, 16))), (96, ((4, 1.001, 4), (4, 0.999, None)))):
        needed = _needed(hidden)
        for rank, factor, wanted in cases:
            # A budget of which nine tenths are just enough for this rank, or just too little.
            bytes_free = factor * needed[rank] / 0.9
            _judge(call_learner(function, _llama(hidden), bytes_free), wanted, bytes_free, needed)


def _llama(hidden):
    """The config of a Llama with two blocks of this width."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=40, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2
    )


@functools.cache
def _needed(hidden):
    """{rank: bytes in all, as the exercise asks for them} for that Llama."""
    from peft import LoraConfig

    from adapter_checks.memory import estimate_memory

    size = {"batch_size": 1, "sequence_length": 1024, "dtype": "bfloat16", "gradient_checkpointing": True}
    return {
        rank: estimate_memory(
            _llama(hidden), "lora", LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"), **size
        ).total
        for rank in RANKS
    }


_SETTINGS = (
    "If your estimate is another, compare its settings with those of the task, such as gradient_checkpointing=True."
)


def _judge(found, wanted, bytes_free, needed):
    """Is `found` the LoraConfig with the rank `wanted`, or None where that is wanted?"""
    from peft import LoraConfig

    budget_text = f"With a budget of {bytes_free / 1e6:.2f} MB"
    if wanted is None:
        if found is None:
            return
        raise TryAgain(
            f"{budget_text} even rank 4 needs more than nine tenths, {needed[4] / 1e6:.2f} MB. Return None where nothing fits."
        )
    if found is None:
        raise TryAgain(
            f"{budget_text} rank {wanted} fits with {needed[wanted] / 1e6:.2f} MB, and you returned None. Is a return missing? "
            f"{_SETTINGS}"
        )
    found = expect_type(found, LoraConfig, "the answer")
    with using("your LoraConfig"):
        rank, alpha, targets = found.r, found.lora_alpha, found.target_modules
        task = getattr(found.task_type, "value", found.task_type)
        if rank not in RANKS:
            raise TryAgain(f"The rank is {describe(rank)}. Choose from {', '.join(map(str, RANKS))}.")
        if rank > wanted:
            free = 1 - needed[rank] / bytes_free
            why = "a tenth of it is to stay free" if free >= 0 else "that is more than there is"
            raise TryAgain(
                f"{budget_text} rank {rank} needs {needed[rank] / 1e6:.2f} MB, and {why}. Compare .total, with all its parts, "
                "with 0.9 * budget."
            )
        if rank < wanted:
            raise TryAgain(
                f"{budget_text} rank {wanted} fits, too, with {needed[wanted] / 1e6:.2f} MB. Return the highest rank that fits. "
                f"{_SETTINGS}"
            )
        if alpha != 2 * rank:
            raise TryAgain(f"At rank {rank} alpha is {alpha!r}; twice the rank was asked for.")
        if targets != "all-linear" and set(targets or ()) != _ALL_LINEAR:
            raise TryAgain(f'target_modules is {targets!r}. For all linear layers give "all-linear".')
        if task != "CAUSAL_LM":
            raise TryAgain(f'task_type is {task!r}. For a causal language model it is "CAUSAL_LM".')


_ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
