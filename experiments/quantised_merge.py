"""What becomes of an adapter that was trained on NF4, by the way it is merged? Three ways, each beside the trained model.

`original` adds the change to the unquantised base, `dequantised` to the base read back from its 4 bits, and `four_bit` to the
4-bit weights themselves, which are quantised anew: what `merge_and_unload` does to a 4-bit model unasked. The trained model
stands in the table, too. KL and top-1 agreement are those on the answers of test rows, with their questions.
"""

import tempfile
import warnings

import transformers
from peft import PeftModel

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


def measure(seed):
    """A row for the trained model and for each way."""
    transformers.utils.logging.set_verbosity_error()  # else dequantize() tells its dtype
    trainer, _ = quantised.make_trainer(seed, "nf4")
    trainer.train()
    model, tokenizer = trainer.model, trainer.processing_class
    rows = training.scored_rows(training.TASK, "test")
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows.select(range(COMPARED))]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False).to(model.device)
    results = []
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        for way in ("trained", "original", "dequantised", "four_bit"):
            candidate = model if way == "trained" else merged(way, adapter)
            compared = validation.compare_models(
                lambda **inputs: model(**inputs).logits, candidate, batch["input_ids"], batch["attention_mask"], atol=1e9
            )
            score = training.score(candidate, tokenizer, training.TASK, rows)
            results.append({
                "way": way, "kl": compared.kl, "top1": compared.top1_agreement, "largest": compared.max_abs, "test": score["score"],
            })
    return results
