"""How many virtual tokens, and where should they start? Prompt tuning on `reading`, at the rate that is best for 20 from a text.

Each number of tokens from a text (TEXT), 20 being in `prompts`, and each start with 20 tokens: the words of a task description, words drawn from the
vocabulary (SAMPLE_VOCAB), and numbers drawn from a normal distribution (RANDOM), whose size is not that of a word's embedding. Each
start but TEXT, and each number of tokens, keeps the rate; RANDOM is run at the highest rate of the search as well, since it has farther to go.
"""

from experiments import training
from experiments.prompts import scores
from experiments.prompts_rate import RATES, best_rate, make_trainer

TASK = "reading"
HIGHEST = RATES["prompt"][-1]
RUNS = [
    {"seed": seed, "tokens": tokens, "start": start, "rate": rate}
    for seed in training.SEEDS
    for tokens, start, rate in (
        *((tokens, "TEXT", "best") for tokens in (1, 5, 50)),
        (20, "SAMPLE_VOCAB", "best"),
        (20, "RANDOM", "best"),
        (20, "RANDOM", "highest"),
    )
]


def measure(seed, tokens, start, rate):
    """Train once; scores, how long the virtual tokens are at first and at last, and losses."""
    learning_rate = best_rate(TASK, "prompt") if rate == "best" else HIGHEST
    trainer, _ = make_trainer(TASK, "prompt", learning_rate, seed, tokens=tokens, start=start)
    virtual = trainer.model.prompt_encoder["default"].embedding.weight
    norm_before = virtual.norm(dim=1).mean().item()
    trainer.train()
    return {
        "learning_rate": learning_rate,
        **scores(trainer.model, trainer.processing_class, TASK, "prompt"),
        "norm_before": norm_before,
        "norm_after": virtual.norm(dim=1).mean().item(),
        **training.loss_curve(trainer),
    }
