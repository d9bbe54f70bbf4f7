"""What the sweeps on preferences share: the model that they start from, its replies drawn at random, and what is measured of a run."""

import torch
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback

from adapter_checks.generation import evaluating, generate, padded
from course_utils import data, paths, runtime
from course_utils.tasks import get_task, honesty_shares, same_text
from experiments.training import load_base

START = "honesty_start"
TASK = get_task("honesty")
KL_ROWS = 150  # of the test split, to measure how far the model has moved
BATCH = 64
MAX_LENGTH = 160  # tokens of a prompt with its reply; the longest row has fewer


def start_model(adapter=START):
    """(the base model with the adapter merged in, or as it is if that is None, its tokenizer)."""
    model, tokenizer = load_base()
    if adapter:
        model = PeftModel.from_pretrained(model, paths.adapter_path(adapter)).merge_and_unload()
    return model, tokenizer


def lora_config(task_type="CAUSAL_LM"):
    """A new config each time: PEFT writes the layers' names into it."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task_type)


def trainer_settings(seed, learning_rate, steps, **changes):
    """What every trainer of these sweeps is given."""
    return dict(
        output_dir=str(paths.runs_dir() / "experiments" / "trainer"),
        max_steps=steps,
        learning_rate=learning_rate,
        warmup_steps=5,
        lr_scheduler_type="linear",
        save_strategy="no",
        seed=seed,
        **runtime.trainer_settings(),
        **changes,
    )


def train(trainer):
    """Train without printing; returns the trainer."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def replies(model, tokenizer, rows, temperature=0.0):
    """A reply to each row: the likeliest, or one drawn at this temperature."""
    prompts = [row["prompt"] for row in rows]
    return generate(model, tokenizer, prompts, TASK.max_new_tokens, BATCH, temperature=temperature)


def is_right(reply, row):
    """Is this the reply that the row's passage calls for? A pair's chosen reply is."""
    return same_text(reply, row["completion" if "completion" in row else "chosen"][0]["content"])


def shares(model, tokenizer):
    """Columns: what the replies to held-out questions are. `near` are questions about a thing of which something else is told.

    Greedy replies, and for columns that begin with `drawn_` replies drawn at temperature 1.
    """
    test, own = (list(data.load_task("honesty", part)) for part in ("test", "own_words"))
    greedy = replies(model, tokenizer, test)
    near = [is_right(reply, row) for reply, row in zip(greedy, test) if row["kind"] == "near"]
    torch.manual_seed(0)
    drawn = honesty_shares(replies(model, tokenizer, test, temperature=1.0), test)
    words = honesty_shares(replies(model, tokenizer, own), own)
    return {
        **honesty_shares(greedy, test),
        "near_honest": sum(near) / len(near),
        **{f"drawn_{name}": share for name, share in drawn.items()},
        **{f"own_{name}": share for name, share in words.items()},
    }


def log_probabilities(model, tokenizer, prompts, answers):
    """For each pair of a prompt and an answer (both lists of messages): (log-probabilities (tokens, vocabulary), the answer's token ids (tokens,)).

    The answer's tokens end with the token that ends the turn. Nats.
    """
    found = []
    for start in range(0, len(prompts), BATCH):
        batch = list(zip(prompts[start : start + BATCH], answers[start : start + BATCH]))
        heads = [
            tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"]
            for p, _ in batch
        ]
        whole = [tokenizer.apply_chat_template([*p, *a], return_dict=True)["input_ids"] for p, a in batch]
        input_ids, attention_mask = padded(model, tokenizer, whole, side="right")
        with evaluating(model), torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        for row, (head, ids) in enumerate(zip(heads, whole)):
            place = slice(len(head) - 1, len(ids) - 1)
            found.append((logits[row, place].log_softmax(-1), torch.tensor(ids[len(head) :], device=logits.device)))
    return found


def reply_log_probability(model, tokenizer, rows, column):
    """The log-probability in nats of the reply in this column of each row, given its prompt, as a tensor (rows,)."""
    found = log_probabilities(model, tokenizer, [row["prompt"] for row in rows], [row[column] for row in rows])
    return torch.stack([logits.gather(1, ids[:, None]).sum() for logits, ids in found])


def divergence(model, reference, tokenizer):
    """The KL divergence from the reference in nats a reply, mean over replies that the model draws."""
    rows = list(data.load_task("honesty", "test").select(range(KL_ROWS)))
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in rows]
    drawn = [[{"role": "assistant", "content": text}] for text in replies(model, tokenizer, rows, temperature=1.0)]
    ours, theirs = (log_probabilities(each, tokenizer, prompts, drawn) for each in (model, reference))
    return sum((p.exp() * (p - q)).sum().item() for (p, _), (q, _) in zip(ours, theirs)) / len(rows)


def on_pairs(model, reference, tokenizer):
    """Columns: how the model ranks held-out pairs, and what has become of the log-probabilities of their replies, in nats."""
    rows = list(data.load_task("honesty", "test_pairs"))
    ours, theirs = (
        [reply_log_probability(each, tokenizer, rows, column) for column in ("chosen", "rejected")]
        for each in (model, reference)
    )
    chosen, rejected = (after - before for after, before in zip(ours, theirs))
    return {
        "pair_accuracy": (chosen > rejected).float().mean().item(),
        "chosen_change": chosen.mean().item(),
        "rejected_change": rejected.mean().item(),
    }
