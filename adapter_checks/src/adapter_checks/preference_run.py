"""Check of a run on preferences, by DPO or of a reward model: does it learn to prefer, from where it should, and without harm?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from adapter_checks.online_run import check_online_log, check_room
from adapter_checks.reference_model import check_reference, starting_metrics, why_reference_differs
from adapter_checks.report import Report, first_few, never_raises
from adapter_checks.run_log import RunLog
from adapter_checks.training import (
    LOWEST_PREFERENCE_RATE,
    bad_argument,
    check_moved,
    check_rate,
    highest_rate,
    is_trainer,
    report_frozen,
)

if TYPE_CHECKING:
    from transformers import Trainer

# In nats of log-probability of a reply: what a reference may differ by through rounding (or 1% of the reply's own), and how
# far a policy must have moved for its accuracy to say something.
ROUNDING, MOVED = 0.5, 1.0
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # as in TRL 1.16 (DPOTrainer._compute_loss)
_KINDS = {"DPOTrainer": "DPO", "RewardTrainer": "reward model", "GRPOTrainer": "GRPO", "RLOOTrainer": "GRPO"}


@never_raises("Preference run")
def check_preference_run(run: Trainer | Sequence[Mapping[str, Any]], beta: float | None = None) -> Report:
    """Does training on preferences do what it should? Call it before `train()`, after some steps, or on a log alone.

    run   a DPOTrainer, RewardTrainer, GRPOTrainer or RLOOTrainer of TRL; or its log, `trainer.state.log_history`, which
          trainer_state.json in a checkpoint holds, too
    beta  of DPO, with a log alone; by default 0.1, as in DPOConfig. A trainer knows its own

    Returns a Report. Of a DPOTrainer before its first step, one batch is put through policy and reference: there they are the
    same model, for each loss, so all rewards are 0 and the loss named sigmoid is ln 2. Log-probabilities of replies are in
    nats, with the reference as zero: TRL's rewards divided by beta. Thresholds, and why:

    reference_differs  rewards of the first step beyond 0.5 nats and 1% of the reply's log-probability: more than rounding.
                       For GRPO and RLOO a first KL above 0.01 nats a token
    chosen_falls       the chosen replies have lost more than 5 nats and more than their own log-probability by the reference:
                       so much that a token has the square of its probability. Some loss is usual in DPO
    rejected_runs_away the rejected replies have lost more than 50 nats and ten times their own log-probability by the reference
    learns_backwards   from 20 steps after warm-up on, accuracy in the second half is below 40% beyond its standard error
    coin_toss          from 20 steps after warm-up on, accuracy in the second half is below 60% beyond its standard error,
                       while log-probabilities have moved by 1 nat. With a fifth of the labels swapped it is about 70%
    hardly_moved       from 20 steps after warm-up on, all log-probabilities moved by less than 0.05 nats
    rate_too_low       of Adam for LoRA below 5e-6, by which Zephyr was trained with QLoRA; TRL's default is 1e-6
    no_spread          in nine groups of ten, from the start, all replies got the same reward
    replies_cut        three replies in four end at max_completion_length, not with an end of turn
    entropy_collapsed  below 0.05 nats a token and a twentieth of where it began
    kl_high            above 1 nat a token: at each token the reference is surprised by a factor of e
    reward_not_rising  from 20 steps and 10 logs on, the last third is not above the first by a tenth of the reward's standard
                       deviation, beyond the standard error
    """
    report, trainer = Report("Preference run"), cast(Any, run) if is_trainer(run) else None
    history = run if trainer is None else trainer.state.log_history
    if not _is_log(history) or not (beta is None or (isinstance(beta, (int, float)) and beta > 0)):
        wanted = "a trainer of TRL or its trainer.state.log_history, and a beta above 0 or none"
        return bad_argument(report, (run, beta), wanted)
    log = RunLog(cast("Sequence[Mapping[str, Any]]", history))
    kind = log.kind()
    if trainer is not None:
        kind = next((_KINDS[one.__name__] for one in type(trainer).__mro__ if one.__name__ in _KINDS), "")
    if not kind:
        logged = f"a log with {first_few(log.training[-1], 6) if log.training else 'no steps'}"
        report.fail(
            "no_preference_run",
            f"This is {type(run).__name__ if trainer else logged}, and not of DPOTrainer, RewardTrainer, GRPOTrainer or RLOOTrainer.",
            "For supervised fine-tuning use check_training and check_supervision; for a log pass all of state.log_history.",
        )
        return report
    beta = 0.1 if beta is None else beta
    if trainer is not None:
        if not _check_parts(report, trainer):
            return report
        if kind == "DPO":
            _check_settings(report, trainer)
        if kind == "GRPO":
            check_room(report, trainer)
        if kind == "DPO" or (kind == "GRPO" and trainer.beta):
            beta = trainer.beta
            check_reference(report, trainer)
    if not log.training:
        if kind == "DPO" and not {"reference_moved_base", "reference_is_policy"} & set(report.codes):
            _try_start(report, beta, trainer)
        report.note(
            "steps", "No step is logged yet; call this check again after some, with logging_steps=1 to begin with."
        )
    elif _check_finite(report, log, kind):
        if kind == "GRPO":
            check_online_log(report, log, trainer)
        else:
            _check_pairs_log(report, log, kind, beta, trainer)
    if trainer is not None and log.steps >= 3:
        _check_movement(report, trainer)
    return report


def _is_log(history) -> bool:
    return isinstance(history, Sequence) and all(isinstance(entry, Mapping) for entry in history)


# ------------------------------------------------------------------------------------------------ the trainer's weights


def _check_parts(report, trainer) -> bool:
    """Is there something to train, on something, at a rate that does? Returns whether there is."""
    if hasattr(trainer.train_dataset, "__len__") and not len(trainer.train_dataset):
        report.fail(
            "empty",
            "The training set has no rows: DPOTrainer drops those whose prompt fills max_length, RewardTrainer those of which a reply "
            "is longer.",
            "Raise max_length, and run check_preference_data on the rows that you gave it.",
        )
        return False
    weights = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    if not weights:
        report_frozen(report, trainer.model)
        return False
    rate, adam = highest_rate(trainer)
    if adam and any("lora_" in name for name in weights):
        check_rate(report, rate, trainer.model, LOWEST_PREFERENCE_RATE)
    return True


def _check_settings(report, trainer) -> None:
    """Settings of DPOTrainer that turn the loss around, or that this loss does not read."""
    losses, smoothing = _losses(trainer), trainer.args.label_smoothing
    if trainer.beta <= 0:
        report.fail(
            "bad_beta",
            f"beta is {trainer.beta:g}: with 0 there is no gradient, and below it the rejected replies are made more likely, while the "
            "logged rewards change their sign as well and look right.",
            "Take a number above 0; the default is 0.1.",
        )
    if smoothing and not set(losses) & set(_SMOOTHED):
        report.warn(
            "without_effect",
            f"label_smoothing={smoothing:g} has no effect: the loss {first_few(losses)} does not read it.",
            f"For labels of which some are wrong take loss_type='robust'; beside it {', '.join(_SMOOTHED[1:])} read it.",
        )


def _losses(trainer) -> list[str]:
    given = trainer.args.loss_type
    return [given] if isinstance(given, str) else list(given)


def _check_movement(report, trainer) -> None:
    """Did the weights move away from the reference, which has those of the start?"""
    if {"no_gradient", "no_spread", "reward_missing", "not_finite"} & set(report.codes):  # these say why not
        return
    if any(getattr(trainer, name, False) for name in ("is_deepspeed_enabled", "is_fsdp_enabled")):
        return  # they keep the weights in parts
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    configs, reference = getattr(trainer.model, "peft_config", {}), getattr(trainer, "ref_model", None)
    before = None
    if "ref" in configs:
        names = {name: name.replace(".default.", ".ref.") for name in weights if ".default." in name}
        every = dict(trainer.model.named_parameters())
        before = {name: every[other].detach() for name, other in names.items() if other in every}
    elif not configs and reference is not None:
        other = dict(reference.named_parameters())
        before = {
            name: other[name].detach() for name in weights if name in other and other[name].shape == weights[name].shape
        }
    own = Report(report.title)
    check_moved(own, trainer.model, weights, before)
    report.findings += [finding for finding in own.findings if finding.code != "cannot_tell"]


# ------------------------------------------------------------------------------------------------ the log


def _check_finite(report, log, kind) -> bool:
    watched = ["loss", "grad_norm", "entropy", "kl"] if kind == "GRPO" else ["loss", "grad_norm", "margin", "rewards/margins",
               "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"]  # fmt: skip
    broken = {name: steps for name in watched if (steps := log.broken(name))}
    if broken:
        name, steps = next(iter(broken.items()))
        report.fail(
            "not_finite",
            f"{name} is not a finite number from step {steps[0]} on. Trainer leaves NaN out of the loss that it logs "
            "(logging_nan_inf_filter), so the loss alone may look healthy.",
            "Load the model afresh and lower the learning rate; look for empty replies and rewards of NaN.",
        )
    return not broken


def _check_pairs_log(report, log, kind, beta, trainer) -> None:
    dpo = kind == "DPO"
    accuracy, margin = ("rewards/accuracies", "rewards/margins") if dpo else ("accuracy", "margin")
    gradients = log.values("grad_norm")
    if dpo:
        _check_start(report, log, beta, trainer)
    if (gradients and not any(gradients)) or (log.steps >= 3 and _sides_agree(log, margin)):
        report.fail(
            "no_gradient",
            "Chosen and rejected move alike at each step, so their gradients cancel and no preference is learned: they are identical, or "
            "equal up to max_length, or beta is 0.",
            "Run check_preference_data on the rows, with the same max_length.",
        )
    elif dpo and log.steps >= 3 and "reference_is_policy" not in report.codes and not any(_rewards(log)[-3:]):
        report.fail(
            "margins_zero",
            f"Policy and reference agree to the last digit after {log.steps} steps, although there is a gradient: the policy is not moved, "
            "or the reference is the policy itself.",
            "See that the learning rate is above 0 and that the optimizer was made after get_peft_model; leave ref_model out "
            "with an adapter.",
        )
    elif log.past_warm_up() and not {"reference_is_policy", "reference_differs"} & set(report.codes):
        _check_learning(report, log, accuracy, beta if dpo else None)
    if dpo and "reference_differs" not in report.codes:
        _check_chosen(report, log, beta)
    _check_held_out(report, log, accuracy, trainer)
    said = [f"{log.steps} steps"]
    for name, factor, what in ((accuracy, 1, "accuracy {:.2f} to {:.2f}"), (margin, 1, "margin {:.3g} to {:.3g}")):
        if (first := log.start(name)) is not None:
            said.append(what.format(first * factor, cast(float, log.end(name)) * factor))
    if dpo and beta and log.values("rewards/chosen"):
        nats = [
            cast(float, log.end(f"rewards/{side}")) / beta
            for side in ("chosen", "rejected")
            if log.values(f"rewards/{side}")
        ]
        said.append(
            "log-probability against the reference "
            + " and ".join(f"{change:+.3g}" for change in nats)
            + " nats (chosen, rejected)"
        )
    report.note("run", "; ".join(said) + ".")


def _rewards(log) -> list[float]:
    """The larger of both rewards of each log, without sign; of the margin where no single ones were logged."""
    sides = [log.values(f"rewards/{side}") for side in ("chosen", "rejected")]
    return (
        [max(map(abs, pair)) for pair in zip(*sides)]
        if all(sides)
        else [abs(value) for value in log.values("rewards/margins")]
    )


def _sides_agree(log, margin) -> bool:
    """Whether chosen and rejected always had the same reward, which was not always 0; rounding may part them a little."""
    largest = max([*_rewards(log), *map(abs, log.values("min_reward")), *map(abs, log.values("max_reward"))], default=0)
    return largest > 0 and max(map(abs, log.values(margin)), default=largest) < 1e-3 * largest


def _try_start(report, beta, trainer) -> None:
    """Put one batch through policy and reference."""
    # bitsandbytes may repack 4-bit weights on a CPU in such a pass, and they pass no gradient on afterwards.
    if any(hasattr(weight, "quant_state") and weight.device.type == "cpu" for weight in trainer.model.parameters()):
        return
    try:
        metrics = starting_metrics(trainer)
    except Exception as error:  # whatever a forward pass may raise: memory, a model that TRL can't train
        report.warn(
            "start_not_compared",
            f"One batch could not be put through policy and reference: {type(error).__name__}: {error}",
            "Training will stumble over the same, as it begins with such a batch; try a smaller one.",
        )
    else:
        if metrics:
            _check_start(report, RunLog([{"step": 1, **metrics}]), beta, trainer)


def _check_start(report, log, beta, trainer) -> None:
    """Policy and reference are the same model at the first step, whatever the loss."""
    if not _rewards(log) or not beta:
        return
    first = log.training[0]
    if int(first.get("step") or 0) != 1:
        report.note(
            "start_not_logged",
            f"The first log is of step {first.get('step')} and a mean over all steps before: with logging_first_step=True, or on "
            "the trainer before train(), this check sees whether the reference is the model that training begins from.",
        )
        return
    nats = _rewards(log)[0] / abs(beta)
    sizes = [abs(log.values(f"logps/{side}")[0]) for side in ("chosen", "rejected") if log.values(f"logps/{side}")]
    if nats <= max(ROUNDING, 0.01 * max(sizes, default=0)):
        return
    plain = trainer is None or (_losses(trainer) == ["sigmoid"] and not trainer.args.use_weighting)
    loss = (
        f" (first loss {first['loss']:.3f}, where the sigmoid loss has ln 2 = 0.693)"
        if plain and "loss" in first
        else ""
    )
    why, remedy = why_reference_differs(trainer)
    report.fail(
        "reference_differs",
        f"Before anything is learned, replies differ by {nats:.3g} nats between policy and reference{loss}: the reference is not "
        f"the model that training begins from. {why}",
        remedy,
    )


def _check_learning(report, log, accuracy, beta) -> None:
    """beta: of DPO; None for a reward model, whose margin says how far it moved."""
    found = log.values(accuracy)
    half = found[len(found) // 2 :]
    furthest = max(_rewards(log)) / beta if beta else math.inf
    if furthest < 0.05:
        report.warn(
            "hardly_moved",
            f"After {log.steps} steps no log-probability has moved by more than {furthest:.2g} nats from the reference.",
            "The learning rate is too low: TRL's default of 1e-6 is for all weights; for LoRA try 5e-5 and upwards.",
        )
        return
    if len(half) < 5:
        return
    mean, error = statistics.fmean(half), statistics.stdev(half) / math.sqrt(len(half))
    if mean + 2 * error < 0.4:
        report.fail(
            "learns_backwards",
            f"In the second half of {log.steps} steps chosen beats rejected in {mean:.0%} of the pairs only: training makes the rejected "
            "replies more likely.",
            "Look at the loss and its settings: label_smoothing above 0.5, or 'discopop', which slopes the other way "
            "where policy and reference agree. The default 'sigmoid' does not.",
        )
    elif mean + 2 * error < 0.6 and furthest >= MOVED:
        report.warn(
            "coin_toss",
            f"In the second half of {log.steps} steps chosen beats rejected in {mean:.0%} of the pairs, no better than chance, although "
            "the model has moved. The labels contradict each other, or what decides them is not in the text.",
            "Read twenty pairs without looking at the labels; run check_preference_data; for noisy labels take label_smoothing "
            "with loss_type='robust'.",
        )


def _check_chosen(report, log, beta) -> None:
    """Do replies lose more probability than preferring asks for, the chosen ones among them?"""
    margin = log.end("rewards/margins")
    if margin is None or margin <= 0:
        return
    falls = {}  # side: log-probability before and now
    for side, least, times in (("chosen", 5.0, 1), ("rejected", 50.0, 10)):
        reward, now = log.end(f"rewards/{side}"), log.end(f"logps/{side}")
        if reward is not None and now is not None:
            before = now - reward / beta
            if reward / beta < -max(least, times * abs(before)):
                falls[side] = f"from {before:.3g} to {now:.3g} nats"
    if "chosen" in falls:
        report.warn(
            "chosen_falls",
            f"The chosen replies themselves have become unlikely: their log-probability went {falls['chosen']} "
            "while the margin grew. Both sides fall, rejected faster, and what rises is neither: often broken text.",
            "Look at generated replies. Lower the learning rate or the number of steps, raise beta, or add the loss on chosen: "
            "loss_type=['sigmoid', 'sft'].",
        )
    elif falls:
        report.warn(
            "rejected_runs_away",
            f"The log-probability of rejected replies went {falls['rejected']}: far beyond what ranks them below the chosen ones.",
            "Look at generated replies. Raise beta, lower the learning rate or the number of steps, or take a loss with a target: 'ipo'.",
        )


def _check_held_out(report, log, accuracy, trainer) -> None:
    held_out = [entry[f"eval_{accuracy}"] for entry in log.evaluations if f"eval_{accuracy}" in entry]
    dataset: Any = getattr(trainer, "eval_dataset", None)
    known = log.end(accuracy)
    if not held_out or known is None or (hasattr(dataset, "__len__") and len(dataset) < 30):
        return
    if known >= 0.75 and held_out[-1] <= 0.5:
        report.warn(
            "held_out_fails",
            f"Chosen beats rejected in {known:.0%} of the pairs in training and in {held_out[-1]:.0%} of those held out: "
            + (
                "the labels of one part are swapped."
                if held_out[-1] < 0.35
                else "what was learned does not carry over."
            ),
            "Compare how both parts were made and labelled; train on more pairs, for fewer steps.",
        )
