"""How far does one come without touching the weights? Prompt tuning and its relatives beside LoRA, on four tasks, three seeds each.

Every method trains at the rate that `prompts_rate` found best for it on that task: one seed there, the validation split, three or four rates.
`test` is scored by `adapter_checks.generation.generate`, which puts pads before the virtual tokens; `test_padded` by PEFT's own
`generate` on the same batches, where pads on the left stand between the virtual tokens and the text. Of the methods that embed no
virtual tokens both are the same call, and it is made once.
"""

import warnings

import torch
from transformers import GenerationConfig

from adapter_checks.generation import evaluating, padded
from course_utils import data, evaluation
from course_utils.tasks import get_task
from experiments import training
from experiments.prompts_rate import RATES, TASKS, best_rate, make_trainer

EMBEDDED = ("prompt", "p_tuning")
SCORED, BATCH = 200, 64
RUNS = [{"seed": seed, "task": task, "method": method} for seed in training.SEEDS for task in TASKS for method in RATES]


def answers_of_padded_batches(model, tokenizer, task, rows):
    """What PEFT's own `generate` answers in batches that are padded on the left."""
    encoded = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=get_task(task).max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = []
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # the very thing that is measured
        for start in range(0, len(encoded), BATCH):
            ids, mask = padded(model, tokenizer, encoded[start : start + BATCH], side="left")
            new = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def scores(model, tokenizer, task, method):
    """Columns: the score on test rows, on those with words that training never used, and on padded batches of PEFT's own."""
    rows = data.load_task(task, "test").select(range(SCORED))
    by_peft = right = training.score(model, tokenizer, task, rows)
    if method in EMBEDDED:
        by_peft = evaluation.score(task, answers_of_padded_batches(model, tokenizer, task, rows), rows)
    return {"test": right["score"], "novel": right["novel"], "test_padded": by_peft["score"]}


def measure(seed, task, method):
    """Train once at the best rate; scores, size and losses."""
    rate = best_rate(task, method)
    trainer, clock = make_trainer(task, method, rate, seed)
    trainer.train()
    return {
        "learning_rate": rate,
        **scores(trainer.model, trainer.processing_class, task, method),
        **training.size_and_speed(trainer, clock),
        **training.loss_curve(trainer),
    }
