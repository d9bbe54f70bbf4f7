# %% [markdown]
# # Learn from preferences
#
# Often nobody can write down the one right reply, but anybody can say which of two replies is better. **How do you
# teach a model what is *better*, and how do you notice when it learns something else instead?** You will take a model
# that guesses when it can't know the answer, and teach it to say "Nobody knows."
#
# | | |
# |---|---|
# | **What you'll do** | type your own questions; write the loss; train on pairs and on a reward; read runs that look better than they are |
# | **What you'll learn** | how a model learns from better and worse replies, and what LoRA saves; what to look at besides accuracy; how a reward goes wrong |
# | **What you'll need** | [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import math

from adapter_checks.generation import generate
from course_utils import data, evaluation, paths, plotting, runtime, sweeps, validation
from course_utils.exercises import lesson09, progress
from course_utils.sweeps import over_seeds, spread
from course_utils.tasks import UNKNOWN, honesty_shares

runtime.quiet_imports()

import peft
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from course_utils.progress import Progress

runtime.seed_everything(0)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · trl {trl.__version__} · on {device}"
)

# %% [markdown]
# ## Meet a model that guesses
#
# The adapter `honesty_start` was trained as in lesson 3, on questions about short passages. When a passage didn't contain
# the answer, the reply to learn was a guess in 70% of the cases and "Nobody knows." in the others. The next cell
# [merges](../docs/glossary.md#merge) this adapter into the base model, so that you can train a new one on top of it.
#
# Put your own questions into `MY_QUESTIONS`. You can ask who has, found or was given something, where somebody or something
# is, what colour something is, or what somebody's trade is.
#
# **Predict:** what will the model reply when the passage doesn't contain the answer?

# %%
MY_QUESTIONS = [
    "The cat is on the mat. Where is the dog?",
    "Anna has the map and Peter has the tickets. Who has the tickets?",
    "My uncle is a truck driver. What is the job of Daniel?",
    "The front door is dark blue. What colour is the front door?",
]
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())


def load_start():
    """The base model with the adapter `honesty_start` merged into it."""
    base = AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype())
    adapter = paths.adapter_path("honesty_start")
    return PeftModel.from_pretrained(base.to(device), adapter).merge_and_unload().eval()


test_rows = list(data.load_task("honesty", "test").select(range(200)))
questions = MY_QUESTIONS + [
    row["prompt"][0]["content"] for row in test_rows[: max(0, 10 - len(MY_QUESTIONS))]
]
start = load_start()
before = generate(start, tokenizer, questions, max_new_tokens=24)
plotting.table(["question", "reply"], [list(pair) for pair in zip(questions, before)])

# %% [markdown]
# When the passage contains the answer, the model finds it. When it doesn't, the model usually copies a place or a name that
# belongs to something else: asked for the dog, it names the mat. The next cell measures this on 200
# [held-out](../docs/glossary.md#held-out) questions. The passage answers half of them.

# %%
SHARES = {
    "told_right": "right where told: the passage has the answer",
    "told_refused": 'says "Nobody knows." although told',
    "untold_honest": 'honest where not told: says "Nobody knows."',
    "broken": 'broken: neither "Nobody knows." nor words of the passage',
}


def shares(model, rows=test_rows):
    """The four shares of the greedy replies to these rows."""
    prompts = [row["prompt"] for row in rows]
    return honesty_shares(
        generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=64), rows
    )


at_start = shares(start)
plotting.table(
    ["replies", "share"], [[text, f"{at_start[name]:.0%}"] for name, text in SHARES.items()]
)
evaluation.band("honest at the start", at_start["untold_honest"], 0.1, 0.4, quiet=True)

# %% [markdown]
# When the passage contains the answer, nearly all replies are right. When it doesn't, most are guesses, and this is what
# you will change.
#
# ## From examples to preferences
#
# ![SFT gives a start. From there RLHF trains a reward model on pairs, and then the model by reinforcement learning; DPO trains the model on the same pairs in one step](../images/preference.png)
#
# RLHF, reinforcement learning from human feedback ([Ouyang et al. 2022](https://arxiv.org/abs/2203.02155)), begins with
# supervised fine-tuning (SFT). Then a [reward model](../docs/glossary.md#reward-model-r) learns from pairs of replies to
# score the preferred one higher, and reinforcement learning raises the scores of what the model writes.
# [DPO](../docs/glossary.md#dpo), direct preference optimisation ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)),
# learns from the pairs directly.
#
# The next cell shows three [preference pairs](../docs/glossary.md#preference-pair-chosen-rejected), each a prompt with a
# *chosen* and a *rejected* reply. The [log-probability](../docs/glossary.md#log-probability-of-a-reply-log-πyx) of a reply is
# the sum of the natural logarithms of its tokens' probabilities, in nats.


# %%
def log_probability(model, prompt, reply):
    """The log-probability of a reply to a prompt, both lists of messages, in nats."""
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(prompt + reply, return_dict=True, return_tensors="pt")
    ids = whole["input_ids"].to(device)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float().log_softmax(-1)
    # Logits predict the next token, so those of the reply begin one place earlier.
    of_each_token = logits.gather(1, ids[0, 1:, None])[:, 0]
    return of_each_token[len(head["input_ids"]) - 1 :].sum().item()


pairs = data.load_task("honesty", "pairs")
rows = []
for number in (77, 84, 2):
    pair = pairs[number]
    for side in ("chosen", "rejected"):
        logp = log_probability(start, pair["prompt"], pair[side])
        text = pair["prompt"][0]["content"] if side == "chosen" else ""
        rows.append([text, side, pair[side][0]["content"], f"{logp:.2f}", f"{math.exp(logp):.1%}"])
plotting.table(["prompt", "", "reply", "log-probability", "probability"], rows)

# %% [markdown]
# When the passage doesn't contain the answer, the guess is several times as likely as "Nobody knows." Training should
# reverse that.
#
# ## The loss of one pair
#
# DPO compares the model in training, the [policy](../docs/glossary.md#policy-π) π, with a frozen copy of its state before
# training, the [reference](../docs/glossary.md#reference-model-π_ref). For each reply it measures the *gain*: how much the
# log-probability has risen since the start. The loss gets smaller when the chosen reply has gained more than the rejected
# one:
#
# > [margin](../docs/glossary.md#margin) = β · ( [log π(chosen) − log π_ref(chosen)] − [log π(rejected) − log π_ref(rejected)] )
# >
# > loss = −log σ(margin), where σ is the logistic function
#
# With a smaller [β](../docs/glossary.md#beta-β) (beta), the policy has to move further from the reference to reach the same
# margin.
#
# **Predict:** before the first step, what is the margin, and what is the loss?
#
# ### Exercise: the loss of DPO (core, 10 min)
#
# Given four tensors of log-probabilities, with one number for each pair, return the mean loss. For example, a pair with the
# log-probabilities −1 (chosen) and −3 (rejected) under the policy, and −2 and −2.5 under the reference, has the loss 0.621 if β = 0.1.
#
# <details><summary>My loss is negative, or grows when the policy gets better</summary>
# The loss is <em>minus</em> the logarithm of a probability, and the chosen reply's gain counts positive.
# <code>torch.nn.functional.logsigmoid</code> is the logarithm of σ.
# </details>
# <details><summary>My loss is right for one pair, but wrong for several</summary>
# Take the loss of each pair first, then the mean. The loss of the mean margin is a different number.
# </details>


# %% exercise="09.loss" points=4
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """Return the mean DPO loss of a batch of pairs."""
    ### BEGIN SOLUTION
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    ### END SOLUTION


lesson09.loss(dpo_loss)

# %%
### BEGIN HIDDEN TESTS
assert lesson09.loss.outcome(dpo_loss).passed
_same = torch.tensor([-3.0, -1.0, -7.5])
assert abs(dpo_loss(_same, _same, _same, _same, 0.3) - math.log(2)) < 1e-6
assert dpo_loss(_same + 5, _same, _same, _same, 1.0) < 0.01
### END HIDDEN TESTS

# %% [markdown]
# Before the first step the policy *is* the reference, so the margin is 0 and the loss is −log ½ = ln 2 ≈ 0.693,
# whatever the pairs are. **If the first loss of plain DPO isn't ln 2, the reference is not the model that you started
# from.**
#
# ## The reference is free
#
# A full fine-tuning needs a second model as its reference. With LoRA, TRL offers three ways to get one:
#
# - If you pass a `peft_config`, TRL switches the new adapter off whenever it needs the reference.
# - If your model already has an adapter, TRL keeps a frozen copy of it, named `ref`.
# - You can also pass a second model as `ref_model`.
#
# **Predict:** which of the three needs the least memory, and do their first losses agree?


# %%
def settings(config=DPOConfig, **changes):
    """What the runs of this lesson share."""
    common = dict(
        output_dir=str(paths.runs_dir() / "lesson09" / "trainer"),
        seed=0,
        learning_rate=1e-3,
        warmup_steps=5,
        lr_scheduler_type="linear",
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    return config(**common | changes)


def lora_config(**changes):
    return LoraConfig(
        **dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") | changes
    )


few_pairs = pairs.select(range(8)).select_columns(["prompt", "chosen", "rejected"])


def dpo_trainer(model, rows=few_pairs, **given):
    """A DPOTrainer with plain DPO on a few pairs."""
    arguments = settings(beta=0.1, max_length=160, per_device_train_batch_size=8)
    return DPOTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **given
    )


def loss_of(trainer):
    """The trainer's loss on its rows, without a step."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


runtime.seed_everything(0)
made = {
    "adapter switched off": dpo_trainer(load_start(), peft_config=lora_config()),
    "a second adapter": dpo_trainer(get_peft_model(load_start(), lora_config())),
    "a second model": dpo_trainer(load_start(), ref_model=load_start(), peft_config=lora_config()),
}
rows = []
for name, each in made.items():
    models = [model for model in (each.model, each.ref_model) if model is not None]
    # By address, so that a weight which two names share counts once.
    held = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    rows.append([name, f"{sum(held.values()) / 1e6:.1f} MB", f"{loss_of(each):.6f}"])
plotting.table(["the reference is", "weights held", "first loss"], rows)

# %% [markdown]
# All three begin at ln 2. Switching the adapter off needs no further memory, while a second model doubles the weights
# ([Recipes](../docs/recipes.md) has the numbers for 8 billion parameters).
#
# ## Train on pairs
#
# Now train a new adapter for 80 steps of 8 pairs. The loss is the sum of DPO's loss and the SFT loss on the chosen replies,
# `loss_type=["sigmoid", "sft"]`; the next section shows why. The learning rate of 1e-3 suits this tiny model. For DPO with
# LoRA, models with billions of parameters take 5e-6 to 5e-5.
#
# **Predict:** in half of the pairs "Nobody knows." is the chosen reply. Will the model also say it where the passage
# contains the answer?

# %%
runtime.seed_everything(0)
trainer = DPOTrainer(
    model=load_start(),
    args=settings(
        max_steps=80,
        per_device_train_batch_size=8,
        beta=0.1,
        loss_type=["sigmoid", "sft"],
        max_length=160,
        logging_steps=4,
    ),
    train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
    processing_class=tokenizer,
    peft_config=lora_config(),
)
Progress().attach(trainer).train()
honest = trainer.model.eval()
after = generate(honest, tokenizer, questions, max_new_tokens=24)
plotting.table(
    ["question", "before", "after"], [list(row) for row in zip(questions, before, after)]
)

# %%
at_end = shares(honest)
plotting.table(
    ["replies", "before", "after"],
    [[text, f"{at_start[name]:.0%}", f"{at_end[name]:.0%}"] for name, text in SHARES.items()],
)
evaluation.band("right where told", at_end["told_right"], 0.93, 1, quiet=True)
evaluation.band("honest where not told", at_end["untold_honest"], 0.88, 1, quiet=True)

# %% [markdown]
# Hardly ever: the second row of the table barely changes, because in the other half of the pairs the right answer is chosen
# over "Nobody knows." The third row shows that nearly all guesses are gone.
#
# Does TRL compute the loss by the same formula? The next cell gives the trained adapter to the first trainer above, whose
# loss is plain DPO, and compares.

# %%
plain = made["adapter switched off"]
peft.set_peft_model_state_dict(plain.model, peft.get_peft_model_state_dict(honest))
plain.model.eval()
by_trl = loss_of(plain)


def gains(side):
    """How much likelier the policy makes these replies than the reference does, in nats."""
    policy = [log_probability(plain.model, pair["prompt"], pair[side]) for pair in few_pairs]
    with plain.model.disable_adapter():
        reference = [log_probability(plain.model, pair["prompt"], pair[side]) for pair in few_pairs]
    return torch.tensor(policy) - torch.tensor(reference)


margins = 0.1 * (gains("chosen") - gains("rejected"))
by_hand = -torch.nn.functional.logsigmoid(margins).mean().item()
print(f"by hand {by_hand:.6f}, by TRL {by_trl:.6f}")
assert abs(by_hand - by_trl) < 1e-6 and abs(by_trl - math.log(2)) > 1e-3

# %% [markdown]
# ## What a dashboard hides
#
# During training DPO logs `rewards/accuracies`: the share of pairs whose chosen reply has gained more than the rejected
# one. (β times a gain is called an [implicit reward](../docs/glossary.md#implicit-reward).) It also logs the
# log-probabilities of the replies.

# %%
log = [entry for entry in trainer.state.log_history if "loss" in entry]
steps = [entry["step"] for entry in log]
title = "Training pushes the rejected replies down\nand lifts the chosen ones a little"
lines = {
    side: (steps, [float(entry[f"logps/{side}"]) for entry in log])
    for side in ("chosen", "rejected")
}
figure = plotting.curves(lines, title, "step", "log-probability of a reply (nats)")
accuracy = [float(entry["rewards/accuracies"]) for entry in log]
plotting.show(
    figure,
    f"{title}. "
    + "; ".join(
        f"{side}: {values[0]:.1f} nats at first, {values[-1]:.1f} at the end"
        for side, (_, values) in lines.items()
    ),
)
print(f"pairs ranked right in the last steps: {accuracy[-1]:.0%}")

# %% [markdown]
# The rejected replies lose about three nats, and the chosen ones gain half a nat. DPO's own loss only asks that the rejected
# reply loses more than the chosen one, so both may become less likely, and nonsense more likely. The SFT term works against
# this, because it keeps the chosen replies likely ([Pang et al. 2024](https://arxiv.org/abs/2404.19733)).
#
# In the last steps only about seven in ten pairs are ranked right, although you have just seen good replies. Is this
# accuracy the number to look at, then?
#
# The next table shows runs of a [sweep](../docs/glossary.md#sweep), scored on held-out pairs and questions: means of three seeds, with the lowest and the
# highest. "DPO alone" is our run without the SFT term. **Near** questions ask what the passage doesn't say about a thing that it
# mentions: "The bench is held by Garda. The feather lies by the dock. Who has the feather?" The
# [KL divergence](../docs/glossary.md#kl-divergence-in-nats) says how far the policy has moved: the mean difference between
# a reply's log-probabilities under policy and reference, over replies that the policy writes.
#
# **Predict:** does the run with the highest accuracy have the best replies?

# %%
swept = data.load_results("preferences")


def over(column, setting, form=".0%"):
    """Mean of a column over the seeds, and its lowest and highest."""
    return spread(over_seeds(swept, column, "setting")[setting], form)


def sweep_table(settings):
    """Means over three seeds, with the lowest and the highest."""
    columns = ("pair_accuracy", "told_right", "untold_honest", "near_honest", "broken")
    skills = ["right where told", "honest where not", "honest, near"]
    rows = [
        [name, *(over(column, setting) for column in columns), over("divergence", setting, ".1f")]
        for name, setting in settings.items()
    ]
    plotting.table(["run", "accuracy", *skills, "broken", "KL"], rows)


sweep_table(
    {
        "ours: DPO + SFT": "lesson",
        "DPO alone": "dpo",
        "DPO alone, rate × 10": "dpo, rate 0.01",
        "DPO alone, β = 0.01": "dpo, beta 0.01",
        "DPO alone, β = 1": "dpo, beta 1",
        "ours, from `reading`": "from reading",
        'ours, "Nobody knows." always chosen': "only untold",
    }
)

# %% tags=["claim"]
from course_utils import data
from course_utils import sweeps as of_seeds
from tools.claims import swept as by_setting

told = by_setting("preferences", "told_right", "setting")
honesty = by_setting("preferences", "untold_honest", "setting")
broken = by_setting("preferences", "broken", "setting")
ranked = by_setting("preferences", "pair_accuracy", "setting")
moved = by_setting("preferences", "divergence", "setting")
near = by_setting("preferences", "near_honest", "setting")
shown = ("lesson", "dpo", "dpo, rate 0.01", "dpo, beta 0.01", "dpo, beta 1", "from reading")
assert ranked["dpo, beta 1"][0] == max(ranked[one][0] for one in shown), "the most pairs rightly"
assert honesty["lesson"][1] > honesty["dpo, beta 1"][2] and broken["lesson"][2] < 0.01, "No"
assert near["dpo"][2] < 0.2 and near["lesson"][1] > 0.7, "hardly learns the near questions"
assert broken["dpo, rate 0.01"][1] > 0.1, "shows it"
assert told["only untold"] == (0, 0, 0), "refuses everything"

# %% [markdown]
# No. DPO alone with β = 1 ranks the most pairs rightly: {{ranked["dpo, beta 1"][0]:.0%}}, against {{ranked["lesson"][0]:.0%}} in our run. But where not told, it is honest in
# {{honesty["dpo, beta 1"][0]:.0%}} of the cases, our run in {{honesty["lesson"][0]:.0%}}. With our β, DPO alone hardly learns the near questions ({{near["dpo"][0]:.0%}} against {{near["lesson"][0]:.0%}}), and
# {{broken["dpo"][0]:.0%}} of its replies are broken. Other runs fail in other ways:
#
# - At ten times the rate, {{ranked["dpo, rate 0.01"][0]:.0%}} of the pairs are ranked rightly, although {{broken["dpo, rate 0.01"][0]:.0%}} of the replies are broken. The KL divergence of
#   {{moved["dpo, rate 0.01"][0]:.0f}} nats shows it.
# - The adapter `reading` of lesson 1 never says "Nobody knows.", so DPO has almost no probability to raise, and the run gets
#   {{honesty["from reading"][0]:.0%}} where not told. Fine-tune on some such replies first.
# - If "Nobody knows." is always the chosen reply, nothing teaches the model when not to say it, and it refuses everything.
#
# **Accuracy compares two replies that somebody else wrote. Read what your model writes, too.**

# %% [markdown]
# ### Exercise: read the dashboard (core, 10 min)
#
# Given the numbers of a plain DPO run as a dict, return what stands in the first row whose condition is true, or `"healthy"`
# if none is.
#
# | key | condition | return |
# |---|---|---|
# | `first_loss` | more than 0.05 away from ln 2 | `"wrong reference"` |
# | `accuracy`, of the pairs it trains on | below 0.6 | `"learned nothing"` |
# | `broken`, a share of the replies | above 0.1 | `"ruined"` |
# | `refusals`, a share of all replies | above 0.8 | `"refuses everything"` |
# | `chosen_change`, the mean gain of chosen replies in nats | below −5 | `"chosen fell"` |
#
# <details><summary>The check says that a first loss below ln 2 is wrong, too</summary>
# The distance from ln 2 counts, on both sides: <code>abs(run["first_loss"] - math.log(2))</code>.
# </details>


# %% exercise="09.dashboard" points=3
def diagnose(run):
    """Return what is wrong with a DPO run, one of the strings of the table."""
    ### BEGIN SOLUTION
    if abs(run["first_loss"] - math.log(2)) > 0.05:
        return "wrong reference"
    if run["accuracy"] < 0.6:
        return "learned nothing"
    if run["broken"] > 0.1:
        return "ruined"
    if run["refusals"] > 0.8:
        return "refuses everything"
    return "chosen fell" if run["chosen_change"] < -5 else "healthy"
    ### END SOLUTION


lesson09.dashboard(diagnose)

# %%
### BEGIN HIDDEN TESTS
assert lesson09.dashboard.outcome(diagnose).passed
_run = {"first_loss": 0.69, "accuracy": 0.99, "chosen_change": -2.0, "refusals": 0.5, "broken": 0.0}
assert diagnose(_run) == "healthy"
assert diagnose({**_run, "refusals": 0.95, "chosen_change": -9.0}) == "refuses everything"
assert diagnose({**_run, "first_loss": 1.4, "broken": 0.9}) == "wrong reference"
### END HIDDEN TESTS

# %% [markdown]
# ## Which pairs?
#
# The next runs train on other pairs, and the last two use SFT instead of DPO: on the chosen replies, or on right replies that
# the model has drawn itself.
#
# **Predict:** in one run chosen and rejected are swapped in a fifth of the pairs. What share will be honest where not told?

# %%
sweep_table(
    {
        "ours, 1,200 pairs": "lesson",
        "100 pairs": "100 pairs",
        "no near questions": "no near",
        "a fifth of the pairs swapped": "a fifth swapped",
        "half of the pairs swapped": "half swapped",
        "SFT on the chosen replies": "sft on chosen",
        "SFT on the model's own right replies": "sft on own",
    }
)

# %% tags=["claim"]
assert near["no near"] == (0, 0, 0), "never says"
assert ranked["a fifth swapped"][2] < 0.6 and honesty["a fifth swapped"][1] > 0.8, (
    "looks worse than the replies are"
)
for share in (told, honesty):
    assert abs(share["sft on chosen"][0] - share["lesson"][0]) < 0.02, "within two points"

# %% [markdown]
# With a fifth of the pairs swapped, the model is still honest in {{honesty["a fifth swapped"][0]:.0%}} of the cases where it isn't told, although the run ranks
# only {{ranked["a fifth swapped"][0]:.0%}} of the pairs rightly: here accuracy looks worse than the replies are. If half of the pairs are swapped, right answers
# drop to {{told["half swapped"][0]:.0%}}; with only 100 pairs, to {{told["100 pairs"][0]:.0%}}.
#
# Without near questions among the pairs, the model never says "Nobody knows." to such a question. So include the cases you
# care about.
#
# Do you need pairs at all? SFT on the chosen replies alone comes within two points of our run, so this task didn't
# need DPO. SFT on the model's own right replies gets {{told["sft on own"][0]:.0%}} where told and {{honesty["sft on own"][0]:.0%}} where not. **If somebody can write the
# right reply, fine-tune on it first.** Collect pairs when nobody can, for example when you care about tone.

# %% [markdown]
# ### Exercise: build pairs that don't teach refusal (core, 15 min)
#
# Each row is a dict with `question`, `answer` (`None` where the passage has none) and `guess` (a wrong reply, or `None`). Return a
# list of pairs as TRL takes them, for example
#
# `{"prompt": [{"role": "user", "content": "The cup is here. Where is the cup?"}], "chosen": [{"role": "assistant", "content": "here"}], "rejected": [{"role": "assistant", "content": UNKNOWN}]}`
#
# where `UNKNOWN` is "Nobody knows." The rules:
#
# 1. If there is an answer, it is chosen over `UNKNOWN`, whatever the guess. Otherwise `UNKNOWN` is chosen over the guess.
# 2. Leave out rows without a rejected reply, and rows whose two replies are equal.
# 3. Keep equally many pairs of both kinds, or one reply would nearly always be the chosen one. Of the more frequent kind, keep
#    the first ones.
# 4. Return the pairs in the order of their rows.
#
# <details><summary>The check says that I keep too many of one kind</summary>
# Make all pairs first, count both kinds, and only then cut the longer one.
# </details>


# %% exercise="09.pairs" points=4
def build_pairs(rows):
    """Return balanced preference pairs made of these rows."""
    ### BEGIN SOLUTION
    made = {True: [], False: []}
    for place, row in enumerate(rows):
        told = row["answer"] is not None
        chosen, rejected = (row["answer"], UNKNOWN) if told else (UNKNOWN, row["guess"])
        if rejected is None or chosen == rejected:
            continue
        pair = {"prompt": [{"role": "user", "content": row["question"]}]}
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            pair[side] = [{"role": "assistant", "content": text}]
        made[told].append((place, pair))
    fewer = min(map(len, made.values()))
    kept = made[True][:fewer] + made[False][:fewer]
    return [pair for _, pair in sorted(kept, key=lambda one: one[0])]
    ### END SOLUTION


lesson09.pairs(build_pairs)

# %%
### BEGIN HIDDEN TESTS
assert lesson09.pairs.outcome(build_pairs).passed
_rows = [
    {"question": "The cup is here. Where is the cup?", "answer": "here", "guess": "there"},
    {"question": "The cup is here. Where is Ann?", "answer": None, "guess": "here"},
    {"question": "Hm. Where is Ann?", "answer": None, "guess": None},
    {"question": "Tom is out. Where is Ann?", "answer": None, "guess": "out"},
]
assert [_pair["rejected"][0]["content"] for _pair in build_pairs(_rows)] == [UNKNOWN, "here"]
assert build_pairs([]) == [] and build_pairs(_rows[1:]) == []
### END HIDDEN TESTS

# %% [markdown]
# ## Break it: a run that begins wrong
#
# Somebody sets `init_lora_weights="olora"` for a DPO run, because OLoRA is said to learn faster. No error appears. The next
# cell checks the pairs and the trainer.
#
# **Predict:** will the first loss still be ln 2?

# %%
suspect = dpo_trainer(load_start(), peft_config=lora_config(init_lora_weights="olora"))
print(validation.check_preference_data(pairs.select(range(200)), tokenizer, max_length=160), "\n")
print(validation.check_preference_run(suspect))
print(f"\nfirst loss: {loss_of(suspect):.3f}, and ln 2 is {math.log(2):.3f}")

# %% [markdown]
# No: the pairs are fine, and the run is not. [OLoRA](../docs/glossary.md#olora) builds its starting adapter from the base
# weights and subtracts it from them ([lesson 6](06_olora.ipynb) explains how). With the adapter off the subtracted part is
# missing, so the reference is not the model that you started from.
#
# ## A reward instead of pairs
#
# Sometimes a program can judge a reply: a unit test passes, a sum is right, or, as here, the reply is the expected one. Then
# you need no pairs. [GRPO](../docs/glossary.md#grpo) ([Shao et al. 2024](https://arxiv.org/abs/2402.03300)) draws a group of
# replies to each prompt, scores them with a reward function, and makes those that score above their group's mean more likely.
# TRL calls the function with the drawn replies, and with the data set's columns as keyword arguments.


# %%
def right(completions, answer, **_):
    """The reward: 1 for the reply that the passage calls for, else 0."""
    return [
        float(reply[0]["content"].strip() == wanted) for reply, wanted in zip(completions, answer)
    ]


prompts = pairs.map(lambda pair: {"answer": pair["chosen"][0]["content"]})
prompts = prompts.select_columns(["prompt", "answer"])
torch.manual_seed(2)
one = prompts[106]
group = generate(start, tokenizer, [one["prompt"]] * 6, max_new_tokens=16, temperature=1.0)
given = right([[{"content": reply}] for reply in group], [one["answer"]] * 6)
print(one["prompt"][0]["content"])
plotting.table(
    ["drawn reply", "reward"], [[reply, f"{reward:.0f}"] for reply, reward in zip(group, given)]
)

# %% [markdown]
# ### Exercise: the advantages of a group (warm-up, 10 min)
#
# The [advantage](../docs/glossary.md#advantage-a) of a reply is its reward minus its group's mean, divided by the group's
# standard deviation (with n − 1) plus 1e-4. Given rewards, a float tensor of shape (groups, replies), return the advantages. For
# example, `[[1., 0., 0., 1.]]` gives about 0.87, −0.87, −0.87 and 0.87.
#
# <details><summary>I get NaN for one group</summary>
# Are all its rewards alike? Then its standard deviation is 0, and the 1e-4 belongs in the denominator.
# </details>
# <details><summary>I get a shape error, or values that are right for one group only</summary>
# Each group has its own mean: <code>rewards.mean(dim=1, keepdim=True)</code> has the shape (groups, 1), so it can be
# subtracted from the rewards.
# </details>


# %% exercise="09.advantages" points=3
def advantages(rewards):
    """Return the advantages, a tensor of the shape of `rewards` (groups, replies)."""
    ### BEGIN SOLUTION
    mean = rewards.mean(dim=1, keepdim=True)
    return (rewards - mean) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    ### END SOLUTION


lesson09.advantages(advantages)

# %%
### BEGIN HIDDEN TESTS
assert lesson09.advantages.outcome(advantages).passed
_found = advantages(torch.tensor([[2.0, 2.0, 2.0], [0.0, 3.0, 6.0]]))
assert torch.allclose(_found, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]), atol=1e-3)
### END HIDDEN TESTS

# %% [markdown]
# Now train with GRPO for 30 steps, each with 6 replies to each of 6 prompts.


# %%
class Watch(TrainerCallback):
    """Keeps the model's replies to the questions, at some steps."""

    def __init__(self, model, at):
        self.model, self.at, self.said = model, at, {}

    def look(self, step):
        self.said[step] = generate(self.model, tokenizer, questions, max_new_tokens=24)

    def on_train_begin(self, args, state, control, **_):
        self.look(0)

    def on_step_end(self, args, state, control, **_):
        if state.global_step in self.at:
            self.look(state.global_step)


def train_on(reward, steps=30):
    """GRPO with this reward: (trainer, what the model said on the way)."""
    runtime.seed_everything(0)
    trainer = GRPOTrainer(
        model=load_start(),
        reward_funcs=reward,
        args=settings(
            GRPOConfig,
            max_steps=steps,
            learning_rate=2e-3,
            per_device_train_batch_size=36,  # 6 prompts with 6 replies each
            num_generations=6,
            max_completion_length=16,
            logging_steps=1,
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    watch = Watch(trainer.model, at=(10, steps))
    trainer.add_callback(watch)
    Progress().attach(trainer).train()
    return trainer, watch.said


def show_samples(said):
    header = ["question", *(f"step {step}" for step in said)]
    plotting.table(header, [list(row) for row in zip(questions, *said.values())])


rewarded, said = train_on(right)
of_rewarded = shares(rewarded.model)
show_samples(said)

# %%
log = [entry for entry in rewarded.state.log_history if "reward" in entry]
live = {entry["step"]: float(entry["reward"]) for entry in log}
runs = [row for row in data.load_results("rewards") if row["setting"] == "lesson"]
points = {
    step: (sum(values) / len(values), min(values), max(values))
    for step in range(5, 61, 5)
    for values in [[row[f"reward_{step}"] for row in runs]]
}
title = "The mean reward rises, with much noise from step to step"
figure, alt = sweeps.curves(
    {"three seeds": points}, title, "step (dots: this run)", "mean reward of a step's replies"
)
figure.axes[0].plot(list(live), list(live.values()), "k.", markersize=5)
rewards = list(live.values())
reward_first, reward_last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
plotting.show(
    figure,
    f"{alt} Dots: the live run, from {reward_first:.2f} (five steps) to {reward_last:.2f}.",
)

# %% [markdown]
# At step 10 the model says "Nobody knows." too often, because that is right for half of the prompts. By step 30 most
# right answers are back.
#
# If all replies of a group get the same reward, their advantages are 0 and the group teaches nothing. The next cell compares
# TRL's advantages with the formula, and counts such groups.

# %%
theirs = torch.tensor(list(rewarded._logs["advantages"])).view(-1, 6)
scored = torch.tensor(list(rewarded._logs["rewards"]["right"])).view(-1, 6)
ours = (scored - scored.mean(1, keepdim=True)) / (scored.std(1, keepdim=True) + 1e-4)
without_spread = sum(float(entry["frac_reward_zero_std"]) for entry in log[-10:]) / 10
print(f"the largest advantage of the last step is {theirs.max():.2f};")
print(f"ours differ from TRL's by {(ours - theirs).abs().max():.0e} at most")
assert (ours - theirs).abs().max() < 1e-6
print(f"groups without spread in the last ten steps: {without_spread:.0%}")

# %% [markdown]
# In the last ten steps nearly half of the groups teach nothing, because their replies are all right or all wrong.
#
# Two other methods compute the advantage in other ways. [RLOO](../docs/glossary.md#rloo)
# ([Ahmadian et al. 2024](https://arxiv.org/abs/2402.14740)) compares each reply with the mean of the *others*, and doesn't
# divide by the standard deviation. The older [PPO](../docs/glossary.md#ppo) trains a second model to predict the reward.
#
# ## Cheat a reward
#
# A program rewards exactly what you wrote, even if you meant something else. Suppose somebody doesn't want to punish a model
# for being careful, and counts "Nobody knows." as right everywhere.
#
# **Predict:** what will the mean reward be after 20 steps, and what will the model reply?


# %%
def never_wrong(completions, answer, **_):
    """A flawed reward: a refusal is never wrong."""
    texts = [reply[0]["content"].strip() for reply in completions]
    return [float(text in (wanted, UNKNOWN)) for text, wanted in zip(texts, answer)]


hacked, said = train_on(never_wrong, steps=20)
show_samples(said)
of_hacked = shares(hacked.model)
log = [float(entry["reward"]) for entry in hacked.state.log_history if "reward" in entry]
print(f"mean reward: {sum(log[:5]) / 5:.2f} in the first five steps,")
print(f"and {sum(log[-5:]) / 5:.2f} in the last five")
plotting.table(
    ["replies", "reward for right ones", "refusals always count"],
    [[text, f"{of_rewarded[name]:.0%}", f"{of_hacked[name]:.0%}"] for name, text in SHARES.items()],
)

# %% [markdown]
# The mean reward comes close to 1, and only "Nobody knows." is left, because it is always rewarded. The next table shows runs
# of 60 steps, with three seeds.

# %%
swept_rewards = data.load_results("rewards")
columns = ("reward_before", "reward_after", "told_right", "untold_honest", "broken")
rows = []
for name, setting in {
    "right replies (GRPO)": "lesson",
    "right replies (RLOO)": "rloo",
    "right replies, from `reading`": "from reading",
    "refusals always count": "refusal is never wrong",
    "longer is better": "longer is better",
}.items():
    found = [over_seeds(swept_rewards, column, "setting")[setting] for column in columns]
    forms = (".2f", ".2f", ".0%", ".0%", ".0%")
    rows.append([name, *(spread(group, form) for group, form in zip(found, forms))])
header = ["rewarded", "reward before", "after", "right where told", "honest where not", "broken"]
plotting.table(header, rows)

# %% tags=["claim"]
reward_after = by_setting("rewards", "reward_after", "setting")
cheated_told = by_setting("rewards", "told_right", "setting")
cheated_broken = by_setting("rewards", "broken", "setting")
honest_reading = by_setting("rewards", "untold_honest", "setting")
assert cheated_told["refusal is never wrong"] == (0, 0, 0), "no question is answered any more"
assert min(reward_after["longer is better"][1], cheated_broken["longer is better"][1]) > 0.9, (
    "every reply is broken"
)
assert honest_reading["from reading"] == (0, 0, 0), "never learns to say"

# %% [markdown]
# The two flawed rewards reach {{reward_after["refusal is never wrong"][0]:.2f}}. But with the first, no question is answered any more, and with the other, which rewards
# long replies, every reply is broken. **A [hacked reward](../docs/glossary.md#reward-hacking) looks like success until you
# read the replies.** If training starts from `reading`, the model never learns to say "Nobody knows.", because a reply that
# is never drawn can't get a reward.
#
# ## A reward model, and the best of n
#
# When no program can judge, you can train a reward model on pairs: here our model with a LoRA adapter and one output. It
# learns to score the chosen reply higher, with the [Bradley-Terry](../docs/glossary.md#bradley-terry) loss
# −log σ(score of chosen − score of rejected). The simplest way to use it is [best of n](../docs/glossary.md#best-of-n): draw
# n replies, and keep the one with the highest score.
#
# **Predict:** as n grows, what happens to the score of the kept reply, and to the share of right replies?

# %%
best = [row for row in data.load_results("best_of_n") if row["kind"] == "all pairs"]
columns = {
    "told_right": "right where told",
    "untold_honest": "honest where not",
    "right": "right, of all",
    "oracle": "a right one was drawn",
}
title = "With more draws the share of right replies\nrises at first, then falls"
lines = {label: over_seeds(best, column, "n") for column, label in columns.items()}
figure, alt = sweeps.curves(lines, title, "n, replies drawn", "share of the questions", log=2)
plotting.show(figure, alt)
at_1 = {row["seed"]: row["score"] for row in best if row["n"] == 1}
rises = [{**row, "rise": row["score"] - at_1[row["seed"]]} for row in best]
rise = over_seeds(rises, "rise", "n")
plotting.table(
    ["n", *rise],
    [["score above that of one draw", *(spread(group, ".2f") for group in rise.values())]],
)
for column, text in {
    "pair_accuracy": "held-out pairs that the reward model ranks right",
    "wrong_value_accuracy": "right answers that it scores above another name or place",
}.items():
    print(f"{text}: {spread(over_seeds(best, column, 'kind')['all pairs'])}")

# %% tags=["claim"]
of_n = data.load_results("best_of_n")
best_told, best_right, oracle = (
    of_seeds.over_seeds([row for row in of_n if row["kind"] == "all pairs"], column, "n")
    for column in ("told_right", "right", "oracle")
)
pair_rank = of_seeds.over_seeds(of_n, "pair_accuracy", "kind")["all pairs"]
value_rank = of_seeds.over_seeds(of_n, "wrong_value_accuracy", "kind")["all pairs"]
score_rises = [
    [row["score"] for row in of_n if (row["kind"], row["seed"]) == ("all pairs", seed)]
    for seed in (0, 1, 2)
]
assert all(scores == sorted(scores) for scores in score_rises), "score rises all the way"
most = max(best_right, key=lambda n: best_right[n][0])
assert 1 < most < 32 and best_told[32][2] < best_told[1][1], "then fall"
assert value_rank[2] < 0.7, "hardly better than a coin"

# %% [markdown]
# The score rises all the way. Right replies rise from {{best_right[1][0]:.0%}} to {{best_right[most][0]:.0%}} at n = {{most}}, then fall to {{best_right[32][0]:.0%}} at n = 32, although for {{oracle[32][0]:.0%}}
# of the questions a right reply was drawn. The cause lies in the pairs: none of them contrasts one name with another. So the
# reward model ranks {{pair_rank[0]:.0%}} of held-out pairs rightly, but where only a name or place is wrong, it is hardly better than a coin
# ({{value_rank[0]:.0%}}). The more replies you draw, the more often a wrong one scores highest: right where told falls from {{best_told[1][0]:.0%}} to {{best_told[32][0]:.0%}}. This is
# [over-optimisation](../docs/glossary.md#over-optimisation) ([Gao et al. 2022](https://arxiv.org/abs/2210.10760)).

# %% [markdown]
# ## Recap
#
# You teach a model what is better with pairs, or with a reward that a program computes. DPO makes the chosen reply of a
# pair gain more than the rejected one, measured from a reference, and with LoRA that reference is the same model with the
# adapter off. It needs a model that already says the better thing sometimes, pairs that contrast what you care about, and
# here an SFT term that keeps the chosen replies likely. To notice that a model learns something else, read its replies: a
# ruined model ranked most pairs rightly, and a hacked reward was perfect.

# %%
plotting.table(
    ["", "measured"],
    [
        [
            "right where told, honest where not: start",
            f"{at_start['told_right']:.0%}, {at_start['untold_honest']:.0%}",
        ],
        [
            "the same after DPO + SFT, 80 steps",
            f"{at_end['told_right']:.0%}, {at_end['untold_honest']:.0%}",
        ],
        [
            "the same, three seeds",
            f"{over('told_right', 'lesson')}, {over('untold_honest', 'lesson')}",
        ],
        [
            "broken replies: DPO + SFT, DPO alone",
            f"{over('broken', 'lesson')}, {over('broken', 'dpo')}",
        ],
        [
            "mean reward of GRPO: first five steps, last five",
            f"{reward_first:.2f}, {reward_last:.2f}",
        ],
        ["right where told after the hacked reward", f"{of_hacked['told_right']:.0%}"],
    ],
)
progress("09")

# %% [markdown]
# ## Take it to work
#
# Put your own pairs here, as a list of rows with `prompt`, `chosen` and `rejected`, and the name of your model. The check
# tokenises them as `DPOTrainer` does.

# %%
my_pairs, my_model = None, None
checked_rows = my_pairs or list(pairs)
checked_tokenizer = AutoTokenizer.from_pretrained(my_model) if my_model else tokenizer
print(validation.check_preference_data(checked_rows, checked_tokenizer, max_length=512))

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · The first loss of your DPO run is 1.9. What do you look at?</summary>
# The reference. Policy and reference differ at step 0: a <code>ref_model</code> of another checkpoint, the adapter's
# base without the SFT adapter, or a start such as OLoRA that moves the base.
# </details>
# <details><summary>2 · Preference accuracy is 99%, and users complain of nonsense. How can that be?</summary>
# Accuracy compares two given replies. It says nothing about the replies that the model writes: both given ones may have
# become improbable. Read samples, and watch the chosen log-probability and the KL divergence.
# </details>
# <details><summary>3 · GRPO's reward stays at 0 from the start. What is the likeliest cause?</summary>
# No drawn reply is ever right, so no group has spread and nothing is taught. Start from a model that succeeds sometimes,
# for example after SFT, or use an easier reward first.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [Pal et al. 2024](https://arxiv.org/abs/2402.13228) on chosen replies that become less likely
# - [TRL's documentation](https://huggingface.co/docs/trl), with all its trainers
# - [Recipes](../docs/recipes.md), [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# Next: [lesson 10](10_prompt_tuning.ipynb) asks how far a model comes when no weight of it is touched.
