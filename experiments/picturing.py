"""What the sweeps on pictures share: the base, its fingerprint, training with LoRA or with all weights, and what the judge sees."""

import torch
from peft import LoraConfig

from course_utils import paths, pictures
from course_utils.picture_judge import judged, load_judge
from course_utils.picture_model import encode, flow_loss, generate_pictures, load_picture_model

RATE, BATCH, RANK, ALPHA = 4e-3, 12, 8, 16
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# What is left beside all these names embeds the time.
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"]
BLOCKS = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TARGETS = {"attention": ATTENTION, "all": [*BLOCKS, *CONVOLUTIONS]}


def base_folder():
    """The folder of the U-Net's weights, which a result is a result about."""
    return paths.pictures_dir() / "unet"


def adapted(targets, seed):
    """(model, its trainable parameters): the text-to-image model with a fresh adapter, or with all of the U-Net's weights to train."""
    model = load_picture_model()
    torch.manual_seed(seed)  # before the adapter, which draws A
    if targets == "full":
        model.unet.requires_grad_(True)
    else:
        model.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[targets]))
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def train(model, weights, drawn, captions, steps, seed, rate=RATE, prior=None):
    """Train on pictures (n, 3, 32, 32) and their captions; prior: further (pictures, captions), which are half of each batch."""
    torch.manual_seed(seed)
    sets = [(drawn, encode(captions))] + ([(prior[0], encode(prior[1]))] if prior else [])
    optimizer = torch.optim.AdamW(weights, lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10, (steps - step) / steps * 1.25)
        rows = [torch.randint(len(images), (BATCH // len(sets),)) for images, _ in sets]
        images, word_ids = (torch.cat([part[chosen] for part, chosen in zip(parts, rows)]) for parts in zip(*sets))
        loss = flow_loss(model, images, word_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def shares(model, captions, subjects, style, seed):
    """{"subject", "style", "both"}: shares of the generated pictures in which the judge sees what was asked for."""
    seen = judged(load_judge(), generate_pictures(model, captions, seed))
    right = [(subject == wanted, found == style) for (subject, found), wanted in zip(seen, subjects)]
    return {
        "subject": sum(a for a, _ in right) / len(right),
        "style": sum(b for _, b in right) / len(right),
        "both": sum(a and b for a, b in right) / len(right),
    }


def draw(subjects, style, seed, colour=None):
    """Drawings of these subjects, a tensor; each its own scene."""
    return pictures.to_tensor(
        [pictures.draw(subject, style, colour, seed + place) for place, subject in enumerate(subjects)]
    )
