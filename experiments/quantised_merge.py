"""What becomes of an adapter when the weights below it are not the ones that it was trained on?

An adapter trained on NF4 is merged in three ways, each beside the trained model. `original` adds the change to the unquantised
base, `dequantised` to the base read back from its 4 bits, and `four_bit` to the 4-bit weights themselves, which are quantised
anew: what `merge_and_unload` does to a 4-bit model unasked. `noise` is the control for `original`: the dequantised base with the
rounding errors added to it once more, each with a random sign, so the weights move just as far, in a direction that nobody chose.

The other way round, an adapter trained on the unquantised base in float32 (`trained_on`) is put on the base in NF4, `rounded`,
and on the unquantised one with the same noise.

KL and top-1 agreement with the trained model are told apart: where a token of the answer is predicted, which is what was trained,
and where one of the question is. `loss` is that of the answers, nats a token.
"""

import copy
import itertools
import math
import tempfile
import warnings

import torch
import transformers
from peft import PeftModel

from adapter_checks import memory
from adapter_checks.generation import evaluating
from course_utils import validation
from experiments import quantised, training

COMPARED = 64  # rows for KL and top-1 agreement; loss and score are those of all scored rows
DRAWS = 3  # of the noise, for each run
RUNS = [{"seed": seed, "trained_on": base} for seed in training.SEEDS for base in ("nf4", "fp32")]


def dequantised():
    """The base in NF4, read back as float32."""
    return quantised.load_base("nf4")[0].dequantize()


def with_noise(base, draw):
    """A copy of an unquantised or dequantised base with NF4's rounding errors added to it, each with a random sign."""
    original, noisy = quantised.load_base("fp32")[0], copy.deepcopy(base)
    rounded, generator = dequantised(), torch.Generator().manual_seed(draw)
    for name, layer in memory.quantised_layers(original).items():
        error = rounded.get_submodule(name).weight - layer.weight
        signs = torch.randint(0, 2, error.shape, generator=generator) * 2 - 1
        noisy.get_submodule(name).weight.data += signs.to(error.device) * error.detach()
    return noisy


def bases_for(trained_on):
    """Yield (way, draw, a base) for each base that an adapter trained on this one is merged into."""
    if trained_on == "nf4":
        yield "original", 0, quantised.load_base("fp32")[0]
        yield "dequantised", 0, dequantised()
        yield "four_bit", 0, quantised.load_base("nf4")[0]
    else:
        yield "rounded", 0, dequantised()
    own = dequantised() if trained_on == "nf4" else quantised.load_base("fp32")[0]
    for draw in range(DRAWS):
        yield "noise", draw, with_noise(own, draw)


def merged(base, adapter):
    """The base with the adapter in this folder merged in."""
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of rounding: it is what is measured
        return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def witnesses(tokenizer, rows):
    """(batch, the positions where a token of the answer is predicted): questions and answers, padded on the right."""
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    asked = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows
    ]
    starts = torch.tensor([len(ids) for ids in asked])[:, None]
    steps = torch.arange(batch["input_ids"].shape[1])
    return batch, (steps >= starts - 1) & (steps < batch["attention_mask"].sum(1, keepdim=True) - 1)


def loss(model, tokenizer, rows):
    """Mean of -log p over the tokens of the answers."""
    batch, answers = witnesses(tokenizer, rows)
    batch, answers = {key: value.to(model.device) for key, value in batch.items()}, answers.to(model.device)
    with evaluating(model), torch.no_grad():
        logits = model(**batch).logits[:, :-1][answers[:, :-1]]
    return torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][answers[:, :-1]]).item()


def measure(seed, trained_on):
    """A row for the trained model and for each way; the noise has one for each draw."""
    transformers.utils.logging.set_verbosity_error()  # else dequantize() tells its dtype
    trainer, _ = quantised.make_trainer(seed, trained_on)
    trainer.train()
    model, tokenizer = trainer.model, trainer.processing_class
    rows = training.scored_rows(training.TASK, "test")
    batch, answers = witnesses(tokenizer, rows.select(range(COMPARED)))
    batch, answers = {key: value.to(model.device) for key, value in batch.items()}, answers.to(model.device)
    questions = batch["attention_mask"].bool() & ~answers
    results = []
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        candidates = ((way, draw, merged(base, adapter)) for way, draw, base in bases_for(trained_on))
        for way, draw, candidate in itertools.chain([("trained", 0, model)], candidates):
            row = {
                "way": way,
                "draw": draw,
                "test": training.score(candidate, tokenizer, training.TASK, rows)["score"],
                "loss": loss(candidate, tokenizer, rows),
            }
            for name, positions in (("", answers), ("_question", questions)):
                compared = validation.compare_models(
                    lambda **inputs: model(**inputs).logits, candidate, batch, positions=positions, atol=math.inf
                )
                row |= {f"kl{name}": compared.kl, f"top1{name}": compared.top1_agreement}
            results.append(row)
    return results
