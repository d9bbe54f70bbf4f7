"""What does a reward teach that a program computes: GRPO and RLOO with a right one, and with two that can be cheated?

The reward of a model is the mean over replies that it draws to the validation rows, before and after; `drawn_reward` is what the
trainer maximised, `right` what was meant.
"""

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from course_utils import data, runtime
from course_utils.tasks import UNKNOWN, same_text
from experiments import preferring, training

STEPS, PROMPTS, GROUP, RATE, NEW_TOKENS = 60, 6, 6, 2e-3, 16
EVERY = 5


def right(completions, answer, **_):
    """1 for the right answer, or for UNKNOWN where the passage does not tell; else 0."""
    return [float(same_text(c[0]["content"], a)) for c, a in zip(completions, answer)]


def never_wrong(completions, answer, **_):
    """Flawed: a refusal is never wrong."""
    texts = [c[0]["content"] for c in completions]
    return [float(same_text(t, a) or same_text(t, UNKNOWN)) for t, a in zip(texts, answer)]


def long(completion_ids, **_):
    """Flawed: the longer the better."""
    return [len(ids) / NEW_TOKENS for ids in completion_ids]


SETTINGS = {
    "lesson": {},
    "rate 0.004": {"rate": 4e-3},
    "rloo": {"trainer": RLOOTrainer},
    "from reading": {"start": "reading"},
    "refusal is never wrong": {"reward": never_wrong},
    "longer is better": {"reward": long},
}
RUNS = [{"seed": seed, "setting": setting} for seed in training.SEEDS for setting in SETTINGS]


def prompts():
    """The pairs' prompts, each with the reply that it calls for."""
    rows = data.load_task("honesty", "pairs")
    return rows.map(lambda row: {"answer": row["chosen"][0]["content"]}).select_columns(["prompt", "answer"])


def make_trainer(seed, model, tokenizer, reward=right, rate=RATE, trainer=GRPOTrainer):
    """GRPO, or RLOO, with PROMPTS groups of GROUP replies a step."""
    config = GRPOConfig if trainer is GRPOTrainer else RLOOConfig
    settings = preferring.trainer_settings(
        seed,
        rate,
        STEPS,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        beta=0.0,  # no pull back to the reference; RLOO has one by default
        logging_steps=EVERY,
    )
    return trainer(
        model=model,
        reward_funcs=reward,
        args=config(**settings),
        train_dataset=prompts(),
        processing_class=tokenizer,
        peft_config=preferring.lora_config(),
    )


def mean_rewards(model, tokenizer, reward):
    """(mean reward, share that is right) of a reply drawn to each validation row."""
    rows = list(data.load_task("honesty", "validation"))
    torch.manual_seed(0)
    drawn = preferring.replies(model, tokenizer, rows, temperature=1.0)
    given = dict(
        completions=[[{"role": "assistant", "content": text}] for text in drawn],
        completion_ids=[tokenizer(text + tokenizer.eos_token)["input_ids"][:NEW_TOKENS] for text in drawn],
        answer=[row["completion"][0]["content"] for row in rows],
    )
    return tuple(sum(values) / len(rows) for values in (reward(**given), right(**given)))


def measure(seed, setting):
    """Train once; the reward on the way, and what the replies are afterwards."""
    changes = {"start": preferring.START, "reward": right, **SETTINGS[setting]}
    start = changes.pop("start")
    runtime.seed_everything(seed)
    model, tokenizer = preferring.start_model(start)
    before = mean_rewards(model, tokenizer, changes["reward"])
    trainer = preferring.train(make_trainer(seed, model, tokenizer, **changes))
    after = mean_rewards(trainer.model, tokenizer, changes["reward"])
    reference, _ = preferring.start_model(start)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "reward_before": before[0],
        "right_before": before[1],
        "reward_after": after[0],
        "right_after": after[1],
        **preferring.shares(trainer.model, tokenizer),
        "divergence": preferring.divergence(trainer.model, reference, tokenizer),
        **{f"reward_{entry['step']}": float(entry["reward"]) for entry in logged},
        **{f"length_{entry['step']}": float(entry["completions/mean_length"]) for entry in logged},
        "no_spread": float(logged[-1]["frac_reward_zero_std"]),
    }
