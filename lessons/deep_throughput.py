# %% [markdown]
# # Find out where the time goes
#
# In lesson 3 a training step of 32 short rows took about half a second. **What does a step spend its time on, and what can you
# save without training on less?** You will take a step apart, time `SFTTrainer` beside a bare loop, and get rid of
# the padding.
#
# | | |
# |---|---|
# | **What you'll do** | time the parts of a step; compare a trainer with a bare loop and one loss with another; pack rows and check that they don't see each other |
# | **What you'll learn** | how to measure speed so that runs can be compared; why LoRA is not always faster; what padding costs |
# | **What you'll need** | [lesson 3](03_lora_finetuning.ipynb); a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
import time

from course_utils import data, paths, plotting, runtime, sweeps
from course_utils.exercises import deep_throughput, progress
from course_utils.sweeps import over_seeds, spread

runtime.quiet_imports()

import torch
import transformers
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from course_utils.progress import Progress

runtime.seed_everything(0)
device = runtime.device()
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · trl {trl.__version__} · on {device}"
)

# %% [markdown]
# ## Measure tokens a second
#
# Seconds a step are hard to compare, because batches differ in size. So count the **tokens a second**, and count only real
# tokens, because [padding](../docs/glossary.md#padding) costs time and teaches nothing. Leave the first step out, because it
# also allocates memory and sets things up that later steps reuse. In the next cell a callback notes when each step ends, and a
# wrapped [collator](../docs/glossary.md#collator) notes what each batch holds.

# %%
tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
rows = data.load_task("sailor", "train").select_columns(["prompt", "completion"])


def load_base():
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=runtime.dtype()).to(
        device
    )


class Clock(TrainerCallback):
    """Notes when each step ends, in seconds."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def make_trainer(steps=10, **changes):
    """(trainer, clock) for a few steps of lesson 3's recipe, with one thing changed."""
    settings = dict(
        output_dir=str(paths.runs_dir() / "throughput"),
        seed=0,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        max_length=128,
        logging_steps=steps,
        save_strategy="no",
        **runtime.trainer_settings(),
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=load_base(),
        args=SFTConfig(**settings | changes),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    return Progress().attach(trainer), clock


trainer, clock = make_trainer()
batches, collate = [], trainer.data_collator


def note(some_rows):
    """Collate as before, and keep the batch."""
    batches.append(collate(some_rows))
    return dict(batches[-1])


trainer.data_collator = note
trainer.train()
tokens = [int(batch["attention_mask"].sum()) for batch in batches[: len(clock.ends)]]
places = [batch["attention_mask"].numel() for batch in batches[: len(clock.ends)]]
plotting.table(
    ["step", "seconds", "tokens", "places, pads included"],
    [
        [step, f"{end - begin:.2f}", tokens[step - 1], places[step - 1]]
        for step, (begin, end) in enumerate(zip(clock.ends[:4], clock.ends[1:5]), start=2)
    ],
)

# %% [markdown]
# All steps hold about the same number of real tokens, but they differ much more in places (tokens and pads together), because each batch is
# as wide as its longest row. So their seconds differ, although each of them trains on about as much.
#
# ### Exercise: tokens a second (warm-up, 5 min)
#
# Given when each step ended (in seconds), the tokens of each step and the places of each step, return the tokens a second
# over all steps but the first. The clock may show any number when training begins. Expected for ends `[10.0, 10.5, 11.0]`,
# tokens `[900, 1000, 1200]` and places `[2000, 2000, 2000]`: 2200.0.
#
# <details><summary>When did the first of the counted steps begin?</summary>
# When the step before it ended: at <code>ends[0]</code>.
# </details>


# %% exercise="deep.speed" points=2
def tokens_a_second(ends, tokens, places):
    """Return the real tokens a second over all steps but the first."""
    ### BEGIN SOLUTION
    return sum(tokens[1:]) / (ends[-1] - ends[0])
    ### END SOLUTION


deep_throughput.speed(tokens_a_second)

# %%
### BEGIN HIDDEN TESTS
assert deep_throughput.speed.outcome(tokens_a_second).passed
assert abs(tokens_a_second([100.0, 102.0, 103.0], [7, 30, 60], [50, 90, 90]) - 30) < 1e-9
### END HIDDEN TESTS

# %% [markdown]
# ## Take a step apart
#
# One step has a forward pass up to the loss, a backward pass that computes gradients, and the optimizer, which moves the
# weights. LoRA trains 27 times fewer weights, so its optimizer has less to do, and it doesn't compute the gradients of the frozen
# weights at all. A [sweep](../docs/glossary.md#sweep) timed the parts on two CPU cores; each number below is a mean over three seeds, with the lowest and
# the highest in brackets.
#
# **Predict:** is a step with LoRA faster than one with all weights, and in which part?

# %%
parts = data.load_results("step_parts")
COLUMNS = {
    f"{part}, s": (f"{part}_seconds", ".3f") for part in ("forward", "backward", "optimizer")
}
sweeps.table([row for row in parts if row["loss"] == "model"], ["method"], COLUMNS)

# %% tags=["claim"]
from tools.claims import swept as by_setting

of_part = {
    part: by_setting("step_parts", f"{part}_seconds", "method", "loss")
    for part in ("forward", "backward", "optimizer")
}
ours, all_weights = (
    {part: groups[method, "model"][0] for part, groups in of_part.items()}
    for method in ("lora", "full")
)
slower = sum(ours.values()) / sum(all_weights.values())
passes = (ours["forward"] + ours["backward"]) / sum(ours.values())
assert 0.75 < slower < 1.33, "about as long"
assert ours["forward"] > all_weights["forward"], "forward pass takes longer"
assert ours["backward"] < all_weights["backward"], "saves time in the backward pass"
assert of_part["optimizer"]["lora", "model"][2] < of_part["optimizer"]["full", "model"][1], (
    "differs clearly"
)
for part in ("forward", "backward"):
    lora, full = (of_part[part][method, "model"] for method in ("lora", "full"))
    assert lora[1] < full[2] and full[1] < lora[2], "overlap"

# %% [markdown]
# A step with LoRA takes about as long as one with all weights ({{slower:.2f}} times as long). On average it saves time in the backward pass,
# with {{ours["backward"]:.2f}} seconds instead of {{all_weights["backward"]:.2f}}, because it computes fewer gradients. But its forward pass takes longer, {{ours["forward"]:.2f}} seconds instead
# of {{all_weights["forward"]:.2f}}, because the products with *A* and *B* come on top of those with *W*. The ranges of both passes overlap, so take these
# differences as rough. Only the optimizer differs clearly, with {{1000 * ours["optimizer"]:.0f}} milliseconds instead of {{1000 * all_weights["optimizer"]:.0f}}. But the two passes are {{passes:.0%}}
# of the step, so a faster optimizer gains little.

# %% [markdown]
# ## Is it the trainer?
#
# `SFTTrainer` does much around a step: it collates, logs and calls callbacks. Another sweep timed it beside a bare loop on the
# very same batches, and beside an `SFTTrainer` whose loss is the model's own.
#
# **Predict:** what share of the bare loop's speed does `SFTTrainer` have?

# %%
loops = data.load_results("throughput")
speed, ends = (over_seeds(loops, column, "loop") for column in ("tokens_per_second", "last_loss"))
kinds = {
    "bare": "bare PyTorch loop",
    "trl_model_loss": "SFTTrainer with the model's own loss",
    "trl": "SFTTrainer",
}
plotting.table(
    ["", "tokens a second", "of the bare loop", "loss of the last steps"],
    [
        [
            label,
            spread(speed[loop], ",.0f"),
            f"{speed[loop][0] / speed['bare'][0]:.0%}",
            f"{ends[loop][0]:.4f}",
        ]
        for loop, label in kinds.items()
    ],
)

# %% tags=["claim"]
rates, last = (
    by_setting("throughput", column, "loop") for column in ("tokens_per_second", "last_loss")
)
with_trl, own_loss, bare = (rates[loop][0] for loop in ("trl", "trl_model_loss", "bare"))
assert len({f"{mean:.4f}" for mean, _, _ in last.values()}) == 1, "agree in every digit shown"
assert own_loss / with_trl > 1.2, "times as fast"
assert 1 < bare / own_loss < 1.15, "cost little"

# %% [markdown]
# `SFTTrainer` has {{with_trl / bare:.0%}} of the bare loop's speed. The losses agree in every digit shown, so all three did the same work. The middle
# line shows where the time goes: with the model's own loss `SFTTrainer` is {{own_loss / with_trl:.1f}} times as fast, and the bare loop is then
# only {{bare / own_loss - 1:.0%}} faster, so collation, logging and callbacks cost little. **It is TRL's loss that takes the time, not the trainer.**
#
# ## Why is TRL's loss slower?
#
# The model's own loss computes the logits of a batch at once and keeps them for the backward pass: a number for each token
# of the vocabulary, at each place.
#
# **Predict:** how much memory do the logits of 8 rows of 2,048 tokens take in float32, with a vocabulary of 128,256 as
# Llama 3 has it?

# %%
VOCABULARY = load_base().config.vocab_size
for name, places_in_batch, vocabulary in (
    ("this lesson's batch", places[1], VOCABULARY),
    ("8 rows of 2,048, Llama 3's vocabulary", 8 * 2048, 128_256),
):
    print(f"{name}: {places_in_batch * vocabulary * 4 / 1e9:.3f} GB of logits")
sweeps.table([row for row in parts if row["method"] == "lora"], ["loss"], COLUMNS)

# %% tags=["claim"]
trl_ratio = {
    part: of_part[part]["lora", "trl"][0] / of_part[part]["lora", "model"][0]
    for part in ("forward", "backward")
}
assert trl_ratio["backward"] > 1.1 < trl_ratio["forward"], "once more"

# %% [markdown]
# These logits take more than 8 GB, and their gradient takes as much again. TRL's loss computes the logits piece by piece and throws each
# piece away, so it never holds all of them. For the backward pass it has to compute them once more, and on a CPU that takes
# time: the backward pass is {{trl_ratio["backward"]:.1f}} times as long as with the model's own loss. The forward pass is {{trl_ratio["forward"]:.1f}} times as long; it also computes
# the entropy of the predictions (how undecided they are), for the log. With this lesson's small vocabulary there is hardly any memory to save. **TRL's loss
# trades time for memory, which pays when the vocabulary is large and memory is short.**

# %% [markdown]
# ## Get rid of the padding
#
# ![Six rows of different lengths: in a padded batch each row is filled up to the longest; grouped by length the batches have few pads; packed end to end there are none](../images/packing.png)
#
# Rows differ in length, and a batch is a rectangle, so short rows are filled up with pads. There are two ways to have fewer of
# them. `train_sampling_strategy="group_by_length"` puts rows of similar length into one batch. `packing=True` lays rows end
# to end ([packing](../docs/glossary.md#packing)). A sweep compares both with padded batches in random order, on two CPU cores.
#
# **Predict:** grouping leaves a few pads, and packing leaves none. Which of the two trains more tokens a second on a CPU?

# %%
packs = [
    {**row, "pads": 1 - row["tokens_per_step"] / row["places_per_step"]}
    for row in data.load_results("batching")
]
sweeps.table(
    packs,
    ["way"],
    {
        "tokens a step": ("tokens_per_step", ",.0f"),
        "pads": ("pads", ".0%"),
        "seconds a step": ("seconds_per_step", ".2f"),
        "tokens a second": ("tokens_per_second", ",.0f"),
    },
)

# %% tags=["claim"]
from course_utils import data

per_second, per_step, per_place = (
    by_setting("batching", column, "way")
    for column in ("tokens_per_second", "tokens_per_step", "places_per_step")
)
pads = {way: 1 - per_step[way][0] / per_place[way][0] for way in per_step}
gain = {way: per_second[way][0] / per_second["padded"][0] for way in per_second}
of_run = {
    (row["seed"], row["way"]): row["tokens_per_second"] for row in data.load_results("batching")
}
slower_seeds = sum(of_run[seed, "packed"] < of_run[seed, "padded"] for seed in (0, 1, 2))
assert pads["padded"] > 0.25 > 0.15 > pads["grouped"] and pads["packed"] == 0, "Packing leaves none"
assert gain["grouped"] > gain["packed"] > 1, "Grouping"
assert per_second["grouped"][1] > max(per_second[way][2] for way in ("padded", "packed")), (
    "its slowest run is faster than every run of the others"
)
assert slower_seeds == 1, "with one of the three seeds it was slower"

# %% [markdown]
# Grouping does. It trains {{gain["grouped"]:.2f}} times as many tokens a second as padded batches in random order, and its slowest run is faster than
# every run of the others. The reason is the padding: it is {{pads["padded"]:.0%}} of a batch in random order, and {{pads["grouped"]:.0%}} after grouping. Packing leaves none,
# and still gains little on this CPU. On average it trains {{gain["packed"]:.2f}} times as many tokens a second as padded batches, but with one of
# the three seeds it was slower.
#
# One reason is that a packed batch is one long row for the model. Ordinary attention compares every token of it with
# every other one, across the borders of rows too, and then masks most of that away. FlashAttention, a faster attention for GPUs, skips this
# work, so packing should gain more there, which we didn't measure.
#
# Both ways change which rows share a step, so the loss curve changes, too. What you save is time for the same number of
# tokens.

# %% [markdown]
# ### Exercise: pack rows (core, 15 min)
#
# Given the lengths of rows and a limit, none of them longer than it, return packs: lists of row numbers, counted from 0.
# Every row is in exactly one pack, and no pack has more tokens than the limit. Use no more packs than **first fit
# decreasing** does: take the longest row first, and put each into the first pack that still has room for it.
#
# Expected for `[60, 50, 40, 40, 50, 20]` and 100: three packs, for example `[[0, 2], [1, 4], [3, 5]]`.
#
# <details><summary>The check says that fewer packs are enough</summary>
# Look at all packs, not only at the last one, and begin with the longest rows: they are the hardest to place.
# </details>


# %% exercise="deep.pack" points=4
def pack_rows(lengths, limit):
    """Return packs of at most `limit` tokens, lists of row numbers."""
    ### BEGIN SOLUTION
    packs, room = [], []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        for place, left in enumerate(room):
            if lengths[number] <= left:
                packs[place].append(number)
                room[place] -= lengths[number]
                break
        else:
            packs.append([number])
            room.append(limit - lengths[number])
    return packs
    ### END SOLUTION


deep_throughput.pack(pack_rows)

# %%
### BEGIN HIDDEN TESTS
assert deep_throughput.pack.outcome(pack_rows).passed
_lengths = [31, 17, 64, 5, 40, 22, 90, 8, 55, 12]
_packs = [list(one) for one in pack_rows(list(_lengths), 100)]
assert sorted(number for one in _packs for number in one) == list(range(10))
assert all(sum(_lengths[number] for number in one) <= 100 for one in _packs) and len(_packs) == 4
### END HIDDEN TESTS

# %% [markdown]
# ## Do packed rows see each other?
#
# A row must not read its neighbours. In a packed batch no attention mask prevents that. There are only positions, which begin
# again at 0 with each row. The next cell compares the logits of packed rows with those of each row alone.
#
# **Predict:** in which of three cases do they agree: with the token ids alone, with positions as well, and with positions in
# a model that keeps its cache on, as it does by default?

# %%
packed, _ = make_trainer(packing=True)
model = load_base()
batch = packed.data_collator([packed.train_dataset[0]])
ids, positions = batch["input_ids"].to(device), batch["position_ids"].to(device)
starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
spans = [slice(*both) for both in zip(starts, starts[1:])]
cases = {
    "ids alone": {"use_cache": False},
    "ids and positions": {"position_ids": positions, "use_cache": False},
    "ids and positions, cache on": {"position_ids": positions, "use_cache": True},
}
found = []
with torch.no_grad():
    alone = [model(ids[:, span]).logits[0] for span in spans]
    for case, given in cases.items():
        together = model(ids, **given).logits[0]
        largest = max((a - together[span]).abs().max().item() for a, span in zip(alone, spans))
        found.append([case, f"{largest:.0e}" if largest < 1e-2 else f"{largest:.1f}"])
plotting.table(["given", "largest difference to the row alone"], found)

# %% [markdown]
# The logits agree (to rounding) only with positions and *without* the cache, because transformers then builds the mask from the positions.
# `SFTTrainer` calls the model that way. If you run packed rows through a model yourself and leave the cache on, rows read
# their neighbours and nothing warns you. **Before you train on packed rows in a loop of your own, make this comparison.**
#
# ## What changes on a GPU?

# %% tags=["claim"]
on_gpu, on_cpu = (
    by_setting(name, "seconds_per_step", "method") for name in ("learning_rate", "cost")
)
assert all("NVIDIA" in row["cpu"] for row in data.load_results("learning_rate")), "on a GPU"
assert on_gpu["lora"][1] > on_gpu["full"][2], "LoRA takes longer there"

# %% [markdown]
# The sweeps of lesson 3 ran on a GPU, where a step with LoRA took {{on_gpu["lora"][0]:.3f}} seconds instead of the {{on_cpu["lora"][0]:.2f}} on two CPU cores. LoRA takes longer there
# than all weights, which need {{on_gpu["full"][0]:.3f}} seconds, although it computes fewer gradients. Such a small model can't keep a GPU busy, so what counts is
# the number of operations to launch, and LoRA adds some in every layer. With a large model the arithmetic dominates again. So
# measure on the machine, the model and the batch that you will use.
#
# ## Recap
#
# A step spends nearly all of its time in the forward and the backward pass, and LoRA makes the one longer and the other
# shorter. Around them the trainer adds little. What you can save is the work that teaches nothing: padding, and the second
# computation of the logits, where you have the memory to keep them. Against padding, grouping rows by length helped most on this
# CPU, and packing only a little. Count real tokens a second before and after each change, because on another machine, such as
# a GPU, another way may be the faster one.

# %%
plotting.table(
    ["", "measured, three seeds"],
    [
        ["SFTTrainer's speed, of a bare loop's", f"{speed['trl'][0] / speed['bare'][0]:.0%}"],
        [
            "the same with the model's own loss",
            f"{speed['trl_model_loss'][0] / speed['bare'][0]:.0%}",
        ],
        *(
            [f"tokens a second, {way}", spread(group, ",.0f")]
            for way, group in over_seeds(packs, "tokens_per_second", "way").items()
        ),
    ],
)
progress("deep")

# %% [markdown]
# ## Take it to work
#
# Time your own trainer before a long run: put it in the place of `None`. Ten steps are enough to estimate how long the run will
# take.

# %%
my_trainer, my_clock = None, Clock()
if my_trainer is not None:
    my_trainer.add_callback(my_clock)
    my_trainer.train()
timed = my_clock.ends or clock.ends
steps_left = 1000
pace = (timed[-1] - timed[0]) / (len(timed) - 1)
print(f"{pace:.2f} seconds a step; {steps_left:,} steps take {pace * steps_left / 60:.0f} minutes")

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · One run reports 3 steps a second, another 2. Which one is faster?</summary>
# That can't be said: their batches may differ in rows, lengths and padding. Compare real tokens a second.
# </details>
# <details><summary>2 · You switch from all weights to LoRA, and a step takes as long as before. Is something wrong?</summary>
# Not necessarily. LoRA saves the gradients of the frozen weights, and adds thin products in every layer. It saves memory
# first; whether it saves time depends on the model's size and the machine.
# </details>
# <details><summary>3 · After packing, the loss is higher than before, and the rows are the same. Where do you look?</summary>
# At the borders between the rows. Do positions begin again at 0 with each row, and is the cache off? Does the packing strategy
# keep rows whole? If it doesn't, <code>check_supervision</code> reports <code>wrapped_packing</code> or <code>rows_split</code>.
# </details>

# %% [markdown]
# ## Where to read on
#
# - [TRL: reducing memory usage](https://huggingface.co/docs/trl/main/en/reducing_memory_usage), with packing and padding-free
#   batches
# - [PyTorch's profiler](https://docs.pytorch.org/tutorials/recipes/recipes/profiler_recipe.html), for the operations inside a step
# - [Symptom, cause, check](../docs/symptoms.md), and back to [lesson 3](03_lora_finetuning.ipynb)
