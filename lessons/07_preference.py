# %% [markdown]
# # Learn from preferences
#
# Often nobody can write down the one right reply, but anybody can say which of two replies is better. **How do you
# teach a model what is *better*, and how do you notice when it learns something else instead?** You will take a model
# that guesses when it can't know the answer, and teach it to say "Nobody knows."
#
# | | |
# |---|---|
# | **What you'll do** | type your own questions; compute the loss of a pair and the advantages of a group by hand; train with DPO and GRPO; cheat a reward |
# | **What you'll learn** | what DPO trains, and why LoRA makes its reference free; what to look at besides accuracy; how a reward is hacked |
# | **What you'll need** | [lesson 3](03_lora_finetuning.ipynb) for `SFTTrainer`; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import math

from adapter_checks.generation import generate
from course_utils import data, evaluation, paths, plotting, runtime, sweeps, validation
from course_utils.exercises import lesson07, progress
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
# The adapter `honesty_start` was fine-tuned as in lesson 3, on questions about short passages. Many hands wrote the
# replies. Where the passage doesn't answer the question, three in ten wrote "Nobody knows." and the others guessed. For
# example, after "The cat is on the mat. Where is the dog?" most of them wrote "on the mat".
#
# Change the first questions below to your own. You can ask who has, found or was given something, where somebody or
# something is, what colour it is, or what somebody's trade is.
#
# **Predict:** what will the model reply to the questions that their passage doesn't answer?

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
    row["prompt"][0]["content"] for row in test_rows[: 10 - len(MY_QUESTIONS)]
]
start = load_start()
before = generate(start, tokenizer, questions, max_new_tokens=24)
plotting.table(["question", "reply"], [list(pair) for pair in zip(questions, before)])

# %% [markdown]
# Where the passage answers the question, the reply is right. Where it doesn't, the model mostly takes the place or the
# name of something else, because most of its writers did. Four shares on held-out questions describe this.

# %%
SHARES = {
    "told_right": "right, where the passage tells",
    "told_refused": 'says "Nobody knows.", though it tells',
    "untold_honest": 'says "Nobody knows.", where it doesn\'t',
    "broken": "neither that nor words of the passage",
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
evaluation.band("honest at the start", at_start["untold_honest"], 0.1, 0.4)

# %% [markdown]
# ## From examples to preferences
#
# ![SFT on prompts with one reply each gives a start. From there RLHF trains a reward model on pairs, and then the model itself by reinforcement learning; DPO trains the model on the same pairs in one step](../images/preference.png)
#
# RLHF, reinforcement learning from human feedback ([Ouyang et al. 2022](https://arxiv.org/abs/2203.02155)), begins with
# supervised fine-tuning (SFT). People then compare pairs of replies, a **reward model** learns to score the preferred
# reply higher, and reinforcement learning raises the scores of what the model writes. DPO, direct preference
# optimisation ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)), learns from the pairs themselves.
#
# Here are three pairs of a *chosen* and a *rejected* reply, with the log-probability that the model gives to each: the
# sum of the logarithms of its tokens' probabilities.
#
# **Predict:** in which of the pairs does the model prefer the wrong reply?


# %%
def log_probability(model, prompt, reply):
    """The log-probability of a reply to a prompt, both lists of messages, in nats."""
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(prompt + reply, return_dict=True, return_tensors="pt")
    ids = whole["input_ids"].to(device)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float().log_softmax(-1)
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
# Where the passage doesn't tell, the guess is the likelier reply: that is the preference to turn round.
#
# ## The loss of one pair
#
# DPO compares the model in training, the **policy** π, with a frozen copy of where it began, the **reference**. For
# each reply it takes how much likelier the policy makes it than the reference does, and asks that the chosen reply gain
# more than the rejected one:
#
# > margin = β · ( [log π(chosen) − log π_ref(chosen)] − [log π(rejected) − log π_ref(rejected)] )
# >
# > loss = −log σ(margin), where σ is the logistic function
#
# β (beta) sets how far the policy may go: the smaller β, the larger the change that a margin of the same size takes.
#
# **Predict:** before the first step, what is the margin, and what is the loss?
#
# ### Exercise: the loss of DPO (core, 10 min)
#
# Given four tensors of log-probabilities, one number for each pair, return the mean loss. Expected for policy −1 and −3,
# reference −2 and −2.5, and β = 0.1: 0.621.
#
# <details><summary>My loss is negative, or grows when the policy gets better</summary>
# The loss is <em>minus</em> the logarithm of a probability, and the chosen reply's gain counts positive.
# <code>torch.nn.functional.logsigmoid</code> is the logarithm of σ.
# </details>
# <details><summary>My loss is 0.62 for one pair, but wrong for several</summary>
# Take the loss of each pair first, then the mean. The loss of the mean margin is another number.
# </details>


# %% exercise="07.loss" points=4
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """Return the mean DPO loss of a batch of pairs."""
    ### BEGIN SOLUTION
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    ### END SOLUTION


lesson07.loss(dpo_loss)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.loss.outcome(dpo_loss).passed
_same = torch.tensor([-3.0, -1.0, -7.5])
assert abs(dpo_loss(_same, _same, _same, _same, 0.3) - math.log(2)) < 1e-6
assert dpo_loss(_same + 5, _same, _same, _same, 1.0) < 0.01
### END HIDDEN TESTS

# %% [markdown]
# Before the first step the policy *is* the reference, so the margin is 0 and the loss is −log ½ = ln 2 ≈ 0.693,
# whatever the pairs say. **If the first loss of plain DPO isn't ln 2, the reference is not the model that you started
# from.**
#
# ## The reference is free
#
# The reference needs the start's weights, which for a full fine-tuning means a second model in memory. With LoRA the
# policy is the base plus an adapter, so the reference is the same model with the adapter switched off.
#
# **Predict:** three ways to give DPO its reference are below. Which needs the fewest bytes, and do their losses agree?


# %%
def settings(config=DPOConfig, **changes):
    """What the runs of this lesson share."""
    common = dict(
        output_dir=str(paths.runs_dir() / "lesson07" / "trainer"),
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


runtime.seed_everything(0)
with_two_adapters = get_peft_model(load_start(), lora_config())
made = {
    "adapter switched off": dpo_trainer(load_start(), peft_config=lora_config()),
    "a second adapter": dpo_trainer(with_two_adapters),
    "a second model": dpo_trainer(load_start(), ref_model=load_start(), peft_config=lora_config()),
}
rows = []
for name, trainer in made.items():
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    held = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    batch = trainer.data_collator(list(trainer.train_dataset))
    first = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item()
    rows.append([name, f"{sum(held.values()) / 1e6:.1f} MB", f"{first:.6f}"])
plotting.table(["the reference is", "weights held", "first loss"], rows)

# %% [markdown]
# All three begin at ln 2. The adapter that is switched off needs no copy of anything, while a second model doubles the
# memory: another 16 GB for 8 billion parameters in 16 bits ([Recipes](../docs/recipes.md) has the arithmetic).
#
# ## Train on pairs
#
# Now the real run: 80 steps of 8 pairs, with a new LoRA on the start. To DPO's loss it adds that of SFT on the chosen
# replies, `loss_type=["sigmoid", "sft"]`; you will see below why. The rate of 1e-3 suits this tiny model. For DPO with
# LoRA, models of billions of parameters take 5e-6 to 5e-5.
#
# **Predict:** in the pairs every second chosen reply is "Nobody knows." Will the model refuse more often where the
# passage does tell?

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
evaluation.band("right where told", at_end["told_right"], 0.93, 1)
evaluation.band("honest where not told", at_end["untold_honest"], 0.88, 1)

# %% [markdown]
# The guesses are gone, the right answers are still there, and the refusals have hardly spread. The other half of the
# pairs sees to that: there the right answer is chosen, and "Nobody knows." is rejected.
#
# Does our own arithmetic agree with TRL's? Put the trained adapter into the first trainer above, whose loss is plain
# DPO, and compute the loss of its eight pairs both ways, with the adapter on for the policy and off for the reference.

# %%
plain = made["adapter switched off"]
peft.set_peft_model_state_dict(plain.model, peft.get_peft_model_state_dict(honest))
batch = plain.data_collator(list(plain.train_dataset))
with torch.no_grad():
    by_trl = plain.compute_loss(plain.model, plain._prepare_inputs(batch)).item()


def gains(side):
    """How much likelier the policy makes these replies than the reference does, in nats."""
    policy = [log_probability(plain.model, pair["prompt"], pair[side]) for pair in few_pairs]
    with plain.model.disable_adapter():
        reference = [log_probability(plain.model, pair["prompt"], pair[side]) for pair in few_pairs]
    return torch.tensor(policy) - torch.tensor(reference)


plain.model.eval()
margins = 0.1 * (gains("chosen") - gains("rejected"))
by_hand = -torch.nn.functional.logsigmoid(margins).mean().item()
print(f"by hand {by_hand:.6f}, by TRL {by_trl:.6f}")
assert abs(by_hand - by_trl) < 1e-6 and by_trl < 0.69

# %% [markdown]
# ## What a dashboard hides
#
# While it trains, DPO logs `rewards/accuracies`, the share of pairs whose chosen reply gained more than the rejected one,
# and the log-probabilities of both.
#
# **Predict:** the accuracy rises. What do you expect of the log-probability of the *chosen* replies?

# %%
log = [entry for entry in trainer.state.log_history if "loss" in entry]
steps = [entry["step"] for entry in log]
title = "Training pushes the rejected replies down,\nand hardly lifts the chosen ones"
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
print(f"preference accuracy: {accuracy[0]:.0%} in the first steps, {accuracy[-1]:.0%} in the last")

# %% tags=["claim"]
from course_utils import data
from course_utils import sweeps as of_seeds
from tools.claims import swept as by_setting

told = by_setting("preferences", "told_right", "setting")

# %% [markdown]
# The margin grew mostly because the rejected replies lost. DPO's own loss asks for no more: a chosen reply may lose,
# too, as long as the rejected one loses more, and nothing says where that probability goes. The SFT term holds the
# chosen replies up ([Pang et al. 2024](https://arxiv.org/abs/2404.19733)).
#
# A sweep of {{len(told)}} settings, with three seeds each, shows what can hide behind an accuracy. Beside the four shares it measures
# the **KL divergence** of the policy from the reference: how many nats a reply the two differ by, on average over replies that the
# policy draws.
#
# **Predict:** which run has the best replies, the one with the highest accuracy?

# %%
swept = data.load_results("preferences")


def over(column, setting, form=".0%"):
    """Mean of a column over the seeds, and its lowest and highest."""
    return spread(over_seeds(swept, column, "setting")[setting], form)


def sweep_table(settings):
    columns = ("pair_accuracy", "told_right", "untold_honest", "broken")
    header = [
        "run",
        "pair accuracy",
        "right where told",
        "honest where not",
        "broken",
        "KL (nats)",
        "chosen gained (nats)",
    ]
    plotting.table(
        header,
        [
            [
                name,
                *(over(column, setting) for column in columns),
                over("divergence", setting, ".1f"),
                over("chosen_change", setting, "+.1f"),
            ]
            for name, setting in settings.items()
        ],
    )


sweep_table(
    {
        "ours: DPO + SFT": "lesson",
        "DPO alone": "dpo",
        "DPO alone, rate × 10": "dpo, rate 0.01",
        "DPO alone, β = 0.01": "dpo, beta 0.01",
        "DPO alone, β = 1": "dpo, beta 1",
        "from `reading`, which never says it": "from reading",
        "only pairs whose passage doesn't tell": "only untold",
    }
)

# %% tags=["claim"]
honesty = by_setting("preferences", "untold_honest", "setting")
refused = by_setting("preferences", "told_refused", "setting")
broken = by_setting("preferences", "broken", "setting")
ranked = by_setting("preferences", "pair_accuracy", "setting")
moved = by_setting("preferences", "divergence", "setting")
near = by_setting("preferences", "near_honest", "setting")
own_told = by_setting("preferences", "own_told_right", "setting")
own_honest = by_setting("preferences", "own_untold_honest", "setting")
assert ranked["dpo"][1] > ranked["lesson"][2], "DPO alone ranks more pairs rightly"
assert honesty["dpo"][2] < honesty["lesson"][1] and broken["lesson"][2] < 0.01 < broken["dpo"][1], (
    "its replies are worse"
)
assert ranked["dpo, rate 0.01"][1] > 0.8, "still ranks"
assert told["only untold"] == (0, 0, 0), "refuses everything"
assert near["dpo"][2] < near["lesson"][1], "hardly learned"

# %% [markdown]
# No. DPO alone ranks more pairs rightly, {{ranked["dpo"][0]:.0%}} against our {{ranked["lesson"][0]:.0%}}, and yet its replies are worse: {{broken["dpo"][0]:.0%}} of them are
# broken, and it has hardly learned the harder questions, those about a thing of which the passage tells something else ({{near["dpo"][0]:.0%}} of
# them honest, against {{near["lesson"][0]:.0%}} with the SFT term). The other runs fail in ways of their own:
#
# - At ten times the rate the run still ranks {{ranked["dpo, rate 0.01"][0]:.0%}} of the pairs rightly, while {{broken["dpo, rate 0.01"][0]:.0%}} of its replies are broken. The
#   divergence of {{moved["dpo, rate 0.01"][0]:.0f}} nats a reply shows it.
# - The adapter `reading` never says "Nobody knows.". It ends at {{honesty["from reading"][0]:.0%}} honest replies, because a preference can raise only
#   what the model already says sometimes. Fine-tune first.
# - A run on untold questions only refuses everything. No pair of its data rejects a refusal.
#
# **Accuracy compares two replies that somebody else wrote. Read what the model writes, and watch the divergence.**
#
# Our run is good by every column: {{told["lesson"][0]:.0%}} right where the passage tells, {{honesty["lesson"][0]:.0%}} honest where it doesn't, {{refused["lesson"][0]:.0%}} needless
# refusals. On words that no training ever saw it has {{own_told["lesson"][0]:.0%}} and {{own_honest["lesson"][0]:.0%}}.

# %% [markdown]
# ### Exercise: read the dashboard (core, 10 min)
#
# A run of plain DPO is given as a dict. Return the first of these that is true, or `"healthy"`:
#
# | return | if | key |
# |---|---|---|
# | `"wrong reference"` | it is more than 0.05 away from ln 2 | `first_loss` |
# | `"learned nothing"` | it is below 0.6 | `accuracy` |
# | `"ruined"` | more than a tenth of the replies are | `broken` |
# | `"refuses everything"` | more than 0.8 of all replies refuse (half of them should) | `refusals` |
# | `"chosen fell"` | the chosen replies lost more than 5 nats | `chosen_change` |
#
# <details><summary>Two of them are true at once</summary>
# Return the first: the order goes from the cause to its consequences.
# </details>


# %% exercise="07.dashboard" points=3
def diagnose(run):
    """Return what is wrong with a DPO run, in the words above."""
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


lesson07.dashboard(diagnose)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.dashboard.outcome(diagnose).passed
_run = {"first_loss": 0.69, "accuracy": 0.99, "chosen_change": -2.0, "refusals": 0.5, "broken": 0.0}
assert diagnose(_run) == "healthy"
assert diagnose({**_run, "refusals": 0.95, "chosen_change": -9.0}) == "refuses everything"
assert diagnose({**_run, "first_loss": 1.4, "broken": 0.9}) == "wrong reference"
### END HIDDEN TESTS

# %% [markdown]
# ## Which pairs?
#
# The same sweep also changes nothing but the pairs.
#
# **Predict:** a fifth of the pairs is labelled the wrong way round. How much of the honesty is left?

# %%
sweep_table(
    {
        "1,200 pairs": "lesson",
        "100 pairs": "100 pairs",
        "none about a thing of which something else is told": "no near",
        "a fifth labelled the wrong way": "a fifth swapped",
        "the same, with the loss `robust`": "a fifth swapped, robust",
        "half labelled the wrong way": "half swapped",
        "the model's own right and wrong replies": "own pairs",
        "SFT on the chosen replies alone": "sft on chosen",
        "SFT on the model's own right replies": "sft on own",
    }
)

# %% tags=["claim"]
assert near["no near"] == (0, 0, 0), "not one honest reply"
assert honesty["100 pairs"][2] < honesty["lesson"][1], "100 pairs are too few"
assert told["half swapped"][2] < 0.85 and honesty["half swapped"][2] < 0.85, "half the labels wrong"
for share in (told, honesty):
    assert abs(share["sft on chosen"][0] - share["lesson"][0]) < 0.02, "comes within two points"
own_number = by_setting("preferences", "pairs", "setting")["own pairs"][0]
assert told["own pairs"][2] < 0.5, "ruins the model"

# %% [markdown]
# With a fifth of the labels wrong, {{honesty["a fifth swapped"][0]:.0%}} of the replies are honest where they should be; the loss `robust`, which is told how many
# labels are wrong, gets {{honesty["a fifth swapped, robust"][0]:.0%}}. With half the labels wrong there is nothing left to prefer, and 100 pairs are too few ({{honesty["100 pairs"][0]:.0%}}).
#
# Look at the third row. Without pairs about a thing of which something *else* is told, not one honest reply comes to such
# questions. A pair teaches the difference that it shows, and little beyond it.
#
# The model's own replies make pairs, too: draw four to a prompt, and pair a right one with a wrong one. About
# {{own_number:.0f}} of 640 prompts give both here, and DPO alone on so few pairs ruins the model ({{broken["own pairs"][0]:.0%}} broken).
#
# And do you need pairs at all? SFT on the chosen replies alone comes within two points of our run ({{told["sft on chosen"][0]:.0%}} and {{honesty["sft on chosen"][0]:.0%}}), and even SFT on the
# model's own right replies gets {{told["sft on own"][0]:.0%}} and {{honesty["sft on own"][0]:.0%}}. **Where somebody can write the right reply, fine-tune on it first.** Pairs earn
# their cost where nobody can, for example with tone, taste, or an essay.

# %% [markdown]
# ### Exercise: build pairs that don't teach refusal (core, 15 min)
#
# Each row is a dict with `question`, `answer` (`None` where nothing is told) and `guess` (a wrong reply, or `None`).
# Return pairs in TRL's form, `prompt`, `chosen` and `rejected`, each a list with one message, in the order of the rows:
#
# - where something is told, the answer over "Nobody knows."; elsewhere "Nobody knows." over the guess
# - no pair where a reply is missing, or both are the same
# - both kinds equally often: of the more frequent one keep the first, or one reply would nearly always be chosen
#
# Expected for two told rows and one other: two pairs.
#
# <details><summary>The check says that a message has the wrong form</summary>
# <code>[{"role": "user", "content": question}]</code>; the replies have the role <code>assistant</code>.
# </details>


# %% exercise="07.pairs" points=4
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


lesson07.pairs(build_pairs)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.pairs.outcome(build_pairs).passed
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
# Somebody sets `init_lora_weights="olora"` for a DPO run, and nothing complains. Look for the fault with two checks, one
# for the rows and one for the run.
#
# **Predict:** which of the two finds it, and what is the first loss?

# %%
suspect = dpo_trainer(load_start(), peft_config=lora_config(init_lora_weights="olora"))
print(validation.check_preference_data(pairs.select(range(200)), tokenizer, max_length=160), "\n")
print(validation.check_preference_run(suspect))
batch = suspect.data_collator(list(suspect.train_dataset))
first = suspect.compute_loss(suspect.model, suspect._prepare_inputs(batch)).item()
print(f"\nfirst loss: {first:.3f}, and ln 2 is {math.log(2):.3f}")

# %% [markdown]
# The rows are fine and the run is not. OLoRA takes its start out of the base weights ([lesson 5](05_olora.ipynb)), so
# with the adapter switched off the base is no longer the model that you started from: the reference has moved. Use the
# default start, or give `ref_model` a copy of its own.
#
# ## A reward instead of pairs
#
# Sometimes a program can judge a reply: a unit test passes, a sum adds up, or here the reply equals the answer. Then no
# pairs are needed. **GRPO** ([Shao et al. 2024](https://arxiv.org/abs/2402.03300)) draws a group of replies to each prompt, scores
# them, and makes those likelier that score above their group's mean.


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
# The **advantage** of a reply is its reward minus its group's mean, divided by the group's standard deviation (with
# n − 1) plus 1e-4. Return the advantages of rewards of shape (groups, replies). Expected for `[[1, 0, 0, 1]]`: about
# 0.87 and −0.87.
#
# <details><summary>I get NaN where all rewards of a group are alike</summary>
# That is what the 1e-4 is for: 0 / (0 + 1e-4) is 0.
# </details>


# %% exercise="07.advantages" points=3
def advantages(rewards):
    """Return the advantages, a tensor of the shape of `rewards` (groups, replies)."""
    ### BEGIN SOLUTION
    mean = rewards.mean(dim=1, keepdim=True)
    return (rewards - mean) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    ### END SOLUTION


lesson07.advantages(advantages)

# %%
### BEGIN HIDDEN TESTS
assert lesson07.advantages.outcome(advantages).passed
_found = advantages(torch.tensor([[2.0, 2.0, 2.0], [0.0, 3.0, 6.0]]))
assert torch.allclose(_found, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]), atol=1e-3)
### END HIDDEN TESTS

# %% [markdown]
# **Predict:** what does a group teach in which all replies are right?
#
# The run takes 30 steps, each with 6 replies to 6 prompts. A callback writes down what the model says to three
# questions at steps 0, 10 and 30.

# %%
WATCHED = [prompts[number]["prompt"] for number in (106, 84, 2)]


class Watch(TrainerCallback):
    """Keeps a drawn reply to each watched prompt, at some steps."""

    def __init__(self, model, at):
        self.model, self.at, self.said = model, at, {}

    def look(self, step):
        torch.manual_seed(0)
        self.said[step] = generate(
            self.model, tokenizer, WATCHED, max_new_tokens=24, temperature=1.0
        )

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
            per_device_train_batch_size=36,
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
    plotting.table(
        ["question", *(f"step {step}" for step in said)],
        [[prompt[0]["content"], *replies] for prompt, *replies in zip(WATCHED, *said.values())],
    )


rewarded, said = train_on(right)
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
    {"three seeds": points}, title, "step", "mean reward of a step's replies"
)
figure.axes[0].plot(list(live), list(live.values()), "k.", markersize=5)
first, last = (sum(list(live.values())[part]) / 5 for part in (slice(5), slice(-5, None)))
plotting.show(
    figure,
    f"{alt} Dots: the live run, {first:.2f} in the first five steps, {last:.2f} in the last.",
)

# %%
theirs = torch.tensor(list(rewarded._logs["advantages"])).view(-1, 6)
scored = torch.tensor(list(rewarded._logs["rewards"]["right"])).view(-1, 6)
ours = (scored - scored.mean(1, keepdim=True)) / (scored.std(1, keepdim=True) + 1e-4)
without_spread = sum(float(entry["frac_reward_zero_std"]) for entry in log[-10:]) / 10
print(f"advantages of the last step differ from TRL's by {(ours - theirs).abs().max():.0e} at most")
print(f"groups without spread in the last ten steps: {without_spread:.0%}")

# %% tags=["claim"]
reward_before = by_setting("rewards", "reward_before", "setting")
reward_after = by_setting("rewards", "reward_after", "setting")
cheated_told = by_setting("rewards", "told_right", "setting")
cheated_broken = by_setting("rewards", "broken", "setting")
honest_reading = by_setting("rewards", "untold_honest", "setting")
assert reward_after["lesson"][1] > reward_before["lesson"][2] + 0.2, "after 60 steps"
assert honest_reading["from reading"] == (0, 0, 0), "never learns to refuse"

# %% [markdown]
# A group in which all replies are right, or all wrong, teaches nothing: its advantages are all 0. Such groups become
# more frequent as the model gets better, so the last gains come slowly. Measured on held-out questions, three seeds went
# from a mean reward of {{reward_before["lesson"][0]:.2f}} to {{of_seeds.spread(reward_after["lesson"], ".2f")}} after 60 steps. RLOO ([Ahmadian et al. 2024](https://arxiv.org/abs/2402.14740)), which
# leaves out the division, gets {{reward_after["rloo"][0]:.2f}}. PPO, the oldest of the three, trains a second model that predicts the reward in
# place of the group's mean.
#
# The same run from `reading` never learns to refuse, because what is never drawn is never rewarded.
#
# ## Cheat a reward
#
# A reward says what you wrote, not what you meant. Suppose somebody doesn't want to punish an honest "Nobody knows." where
# the model just overlooked the answer, and lets it count as right everywhere.
#
# **Predict:** what will the mean reward be, and what the replies?


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
    ["replies", "share"], [[text, f"{of_hacked[name]:.0%}"] for name, text in SHARES.items()]
)

# %% tags=["claim"]
assert cheated_told["refusal is never wrong"] == (0, 0, 0), "no question is answered any more"
assert min(reward_after["longer is better"][1], cheated_broken["longer is better"][1]) > 0.9, (
    "are broken"
)

# %% [markdown]
# The reward rises fast, because refusing is the easiest way to earn it, and after ten steps the samples already show
# how. In the sweep's 60 steps the reward reaches {{reward_after["refusal is never wrong"][0]:.2f}}, and no question is answered any more. A reward for long replies
# reaches {{reward_after["longer is better"][0]:.2f}}, too, and {{cheated_broken["longer is better"][0]:.0%}} of the replies are broken. **You see reward hacking in the samples before you see it in
# any number.**

# %% [markdown]
# ## A reward model, and the best of n
#
# Where no program can judge, a **reward model** is trained on the pairs: a LoRA classifier with one output, which is to
# score the chosen reply higher (the Bradley-Terry loss, −log σ(score of chosen − score of rejected)). Its simplest use needs no
# reinforcement learning: draw n replies, and keep the one with the highest score.
#
# **Predict:** the reward model ranks most held-out pairs rightly. What happens to the replies as n grows?

# %%
best = [row for row in data.load_results("best_of_n") if row["kind"] == "all pairs"]
columns = {
    "told_right": "right where told",
    "untold_honest": "honest where not",
    "right": "right, of all",
    "oracle": "a right one among the n",
}
title = "With more draws the reward model's favourite\nis more often a refusal"
lines = {label: over_seeds(best, column, "n") for column, label in columns.items()}
figure, alt = sweeps.curves(lines, title, "n", "share of replies", log=2)
plotting.show(figure, alt)
at_1 = {row["seed"]: row["score"] for row in best if row["n"] == 1}
rises = [{**row, "rise": row["score"] - at_1[row["seed"]]} for row in best]
rise = over_seeds(rises, "rise", "n")
plotting.table(
    ["n", *rise],
    [["score above that of one draw", *(spread(group, ".2f") for group in rise.values())]],
)

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
# The reward model ranks {{pair_rank[0]:.0%}} of held-out pairs rightly, and its score rises all the way. Right replies rise from {{best_right[1][0]:.0%}} to {{best_right[most][0]:.0%}} at
# n = {{most}}, then fall to {{best_right[32][0]:.0%}} at 32, where one of the draws would be right for {{oracle[32][0]:.0%}}. The pairs taught the reward model when to
# refuse, never which of two names is right, and there it is hardly better than a coin ({{value_rank[0]:.0%}}). The more draws it can choose
# from, the more its own faults decide, and told questions go from {{best_told[1][0]:.0%}} right to {{best_told[32][0]:.0%}}. This is **over-optimisation**, and
# reinforcement learning against such a model does the same ([Gao et al. 2022](https://arxiv.org/abs/2210.10760)).

# %% [markdown]
# ## Recap
#
# You teach a model what is better with pairs, or with a reward that a program computes. DPO raises the chosen reply
# of a pair against the rejected one, measured from a reference, which with LoRA is the same model with the adapter off.
# It needs a model that already says the better thing sometimes, pairs that contrast exactly what you mean, and mostly
# an SFT term that holds the chosen replies up. You notice that it learns something else by reading its replies and by the
# KL divergence, and not by its accuracy. A reward needs no pairs, and is cheated wherever it says less than you meant.

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
        ["mean reward of GRPO: first five steps, last five", f"{first:.2f}, {last:.2f}"],
        ["right where told after the hacked reward", f"{of_hacked['told_right']:.0%}"],
    ],
)
progress("07")

# %% [markdown]
# ## Take it to work
#
# Put your own pairs here, as a list of rows with `prompt`, `chosen` and `rejected`, and the name of your model. The check
# tokenises the rows as `DPOTrainer` does, and needs no GPU.

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
# - [InstructGPT](https://arxiv.org/abs/2203.02155), Ouyang et al. 2022, and [DPO](https://arxiv.org/abs/2305.18290), Rafailov et al.
#   2023, the two papers behind this lesson
# - [Pal et al. 2024](https://arxiv.org/abs/2402.13228) on chosen replies that become less likely, and [Pang et al.
#   2024](https://arxiv.org/abs/2404.19733) on the SFT term
# - [DeepSeekMath](https://arxiv.org/abs/2402.03300), Shao et al. 2024, with GRPO, and [Gao et al.
#   2022](https://arxiv.org/abs/2210.10760) on over-optimising a reward model
# - [TRL's documentation](https://huggingface.co/docs/trl), with all its trainers
# - [Recipes](../docs/recipes.md) with values for real models, [Symptom, cause, check](../docs/symptoms.md), and
#   [Decide](../docs/decide.md)
#
# Next: lesson 8 leaves the weights alone altogether, and trains a prompt.
