"""The log of GRPO or RLOO, which train on the model's own replies: is there a reward to learn from, and what rises with it?"""

from __future__ import annotations

import math
import statistics
from typing import Any

from adapter_checks.generation import context_length
from adapter_checks.reference_model import why_reference_differs
from adapter_checks.report import Report, first_few
from adapter_checks.run_log import RunLog

# Shares of groups and of replies; nats a token.
NO_SPREAD, CUT, LOW_ENTROPY, HIGH_KL = 0.9, 0.75, 0.05, 1.0


def check_room(report: Report, trainer: Any) -> None:
    """Do replies of max_completion_length fit into the model's context, behind a prompt?"""
    context, longest = context_length(trainer.model.config), trainer.args.max_completion_length
    if context and longest and longest >= context:
        report.warn(
            "beyond_context",
            f"max_completion_length is {longest:,} (TRL's default is 512), and the model's context {context:,} tokens, prompt included: a long "
            "reply runs beyond it, into positions that the model was not trained on, or into an error.",
            f"Set max_completion_length to less than {context:,} minus the longest prompt.",
        )


def check_online_log(report: Report, log: RunLog, trainer: Any) -> None:
    """Findings on a log with at least one step. trainer: a GRPOTrainer or RLOOTrainer, or None; check_preference_run explains."""
    missing = log.broken("reward")
    if missing:
        report.add(
            "fail" if len(missing) == len(log.training) else "warn",
            "reward_missing",
            f"There is no reward in {len(missing)} of {len(log.training)} logs, from step {missing[0]} on: the reward function "
            "returned None or NaN for every reply, so their advantages are 0, and nothing is learned from them.",
            "Return a number for each reply, 0 where there is nothing to score.",
        )
    if not log.values("reward"):
        return
    mute = [
        name
        for name in log.training[-1]
        if name.startswith("rewards/") and name.endswith("/mean") and not log.values(name)
    ]
    if mute:
        report.warn(
            "reward_missing",
            f"{first_few(name.removeprefix('rewards/').removesuffix('/mean') for name in mute)} never gave a number, at no logged step: "
            "the reward is that of the other functions alone.",
            "Call it on a few replies; remove it if it has nothing to say.",
        )
    _check_first_kl(report, log, trainer)
    _check_spread(report, log)
    _check_length(report, log, trainer)
    entropy = log.start("entropy"), log.end("entropy")
    if entropy[0] is not None and entropy[1] is not None and entropy[1] < min(LOW_ENTROPY, entropy[0] / 20):
        report.warn(
            "entropy_collapsed",
            f"Entropy fell from {entropy[0]:.2g} to {entropy[1]:.2g} nats a token: each prompt gets one reply, groups have nothing to "
            "compare, and nothing more is learned. Often that reply is the same for all prompts, and exploits the reward.",
            "Read replies to different prompts. Stop earlier, lower the learning rate, or give beta a value above 0.",
        )
    kl = log.end("kl")
    if kl is not None and abs(kl) > HIGH_KL and "reference_differs" not in report.codes:
        report.warn(
            "kl_high",
            f"The KL divergence from the reference is {kl:.2g} nats a token: the policy writes what the reference hardly ever would.",
            "Read replies. Lower the learning rate or the number of steps, or raise beta.",
        )
    if "no_spread" not in report.codes:
        _check_rise(report, log)
    said = [f"{log.steps} steps"]
    for name, what in (
        ("reward", "reward"),
        ("completions/mean_length", "tokens in a reply"),
        ("entropy", "entropy"),
        ("kl", "KL"),
    ):
        if (first := log.start(name)) is not None:
            said.append(f"{what} {first:.3g} to {log.end(name):.3g}")
    report.note("run", "; ".join(said) + ".")


def _check_first_kl(report, log, trainer) -> None:
    first, values = log.training[0], log.values("kl")
    if values and int(first.get("step") or 0) == 1 and abs(values[0]) > 0.01:
        why, remedy = why_reference_differs(trainer)
        report.fail(
            "reference_differs",
            f"At the first step the KL divergence is {values[0]:.2g} nats a token and not 0: the reference is not the model that "
            f"training begins from. {why}",
            remedy,
        )


def _check_spread(report, log) -> None:
    groups, spread = log.values("frac_reward_zero_std"), log.values("reward_std")
    alike = bool(spread) and not any(spread)  # RLOO counts its KL penalty as spread within a group
    share = statistics.fmean(groups) if groups and not alike else float(alike)
    first = groups[: -(-len(groups) // 2)]
    if len(log.training) < 3 or not (alike or (first and statistics.fmean(first) >= NO_SPREAD)):
        return
    why = (
        f"It is {log.values('reward')[-1]:.3g} for every reply."
        if alike
        else "Prompts differ in it, but replies to one prompt do not: they are all the same, or all right, or all wrong."
    )
    report.add(
        "fail" if share == 1 else "warn",
        "no_spread",
        f"In {share:.0%} of the groups all replies got the same reward, so their advantages are 0 and nothing is "
        f"learned from them. {why}",
        "Call the reward function on a right and on a wrong reply and compare; take prompts that the model answers right now and "
        "then, more generations, or a higher temperature. A reward with steps between 0 and 1 helps, too.",
    )


def _check_length(report, log, trainer) -> None:
    first, last = log.start("completions/clipped_ratio"), log.end("completions/clipped_ratio")
    if first is None or last is None or last < CUT:
        return
    masked = getattr(getattr(trainer, "args", None), "mask_truncated_completions", False)
    if first < CUT / 2:
        lengths, rewards = ((log.start(name), log.end(name)) for name in ("completions/mean_length", "reward"))
        what = (
            f"Replies grew from {lengths[0] or 0:.3g} to {lengths[1] or 0:.3g} tokens, and {last:.0%} end at max_completion_length, while "
            f"the reward went from {rewards[0]:.3g} to {rewards[1]:.3g}: the model may be paid for length."
        )
        remedy = "Read replies. Take the length out of the reward, give replies without an end no reward, or set beta above 0."
    else:
        what = f"{last:.0%} of the replies end at max_completion_length and not with the end of turn, as they did from the start."
        remedy = (
            "Raise max_completion_length. If the model never stops, see that tokenizer.eos_token is what its template ends a turn with, "
            "and that it was fine-tuned to answer."
        )
    if masked:
        what += " mask_truncated_completions leaves these out of the loss."
    report.warn("replies_cut", what, remedy)


def _check_rise(report, log) -> None:
    rewards = log.values("reward")
    if len(rewards) < 10 or not log.past_warm_up():
        return
    third = len(rewards) // 3
    first, last = rewards[:third], rewards[-third:]
    rise = statistics.fmean(last) - statistics.fmean(first)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    spread = statistics.fmean(log.values("reward_std") or [0])
    if rise + 2 * error < 0.1 * spread:
        falls = rise + 2 * error < -0.1 * spread
        report.warn(
            "reward_not_rising",
            f"The mean reward {'falls' if falls else 'does not rise'}: {statistics.fmean(first):.3g} in the first third of {log.steps} steps "
            f"and {statistics.fmean(last):.3g} in the last, with a standard error of {error:.2g}.",
            "Raise the learning rate if the KL divergence is small, and lower it if replies are broken; see that the reward is higher for "
            "better replies and not for worse ones.",
        )
