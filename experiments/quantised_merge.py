"""What becomes of an adapter that was trained on NF4, by the way it is merged? Three ways, each beside the trained model.

`original` adds the change to the unquantised base, `dequantised` to the base read back from its 4 bits, and `four_bit` to the
4-bit weights themselves, which are quantised anew: what `merge_and_unload` does to a 4-bit model unasked. The trained model
stands in the table, too. KL and top-1 agreement with it are told apart: where a token of the answer is predicted, which is what
was trained, and where one of the question is. `loss` is that of the answers, nats a token.
"""

import math
import tempfile
import warnings

import torch
import transformers
from peft import PeftModel

from adapter_checks.generation import evaluating
from course_utils import validation
from experiments import quantised, training

COMPARED = 64
RUNS = [{"seed": seed} for seed in training.SEEDS]


def merged(way, adapter):
    """The base, quantised as the way says, with the adapter in this folder merged in."""
    base, _ = quantised.load_base("fp32" if way == "original" else "nf4")
    if way == "dequantised":
        base = base.dequantize()
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


def loss(model, batch, answers):
    """Mean of -log p over the tokens of the answers."""
    with evaluating(model), torch.no_grad():
        logits = model(**batch).logits[:, :-1][answers[:, :-1]]
    return torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][answers[:, :-1]]).item()


def measure(seed):
    """A row for the trained model and for each way."""
    transformers.utils.logging.set_verbosity_error()  # else dequantize() tells its dtype
    trainer, _ = quantised.make_trainer(seed, "nf4")
    trainer.train()
    model, tokenizer = trainer.model, trainer.processing_class
    rows = training.scored_rows(training.TASK, "test")
    batch, answers = witnesses(tokenizer, rows.select(range(COMPARED)))
    batch, answers = {key: value.to(model.device) for key, value in batch.items()}, answers.to(model.device)
    questions = batch["attention_mask"].bool() & ~answers
    results = []
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        for way in ("trained", "original", "dequantised", "four_bit"):
            candidate = model if way == "trained" else merged(way, adapter)
            row = {
                "way": way,
                "test": training.score(candidate, tokenizer, training.TASK, rows)["score"],
                "loss": loss(candidate, batch, answers),
            }
            for name, positions in (("", answers), ("_question", questions)):
                compared = validation.compare_models(
                    lambda **inputs: model(**inputs).logits, candidate, batch, positions=positions, atol=math.inf
                )
                row |= {f"kl{name}": compared.kl, f"top1{name}": compared.top1_agreement}
            results.append(row)
    return results
