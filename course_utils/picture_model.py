"""The course's text-to-image model: a table of words as its text encoder, diffusers' U-Net, and flow matching.

It is built as large ones are, some hundred times smaller. Tensors of pictures have the shape (n, 3, 32, 32) and go from -1 to 1.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from adapter_checks.errors import InputError
from course_utils import paths
from course_utils.files import write_text
from course_utils.pictures import COLOURS, SIZE, SUBJECTS

INSTALL = "Install it with `make setup`, or with `pip install --no-deps -r requirements-beyond-text.txt`."
# The last words are in no caption of the pretraining: names for what an adapter will bring.
VOCABULARY = ("", *SUBJECTS, *COLOURS, "by", "day", "night", "in", "ink", "windmill", "skerrow", "style")
WORDS_IN_A_CAPTION = 5
WIDTH = 64  # numbers that stand for a word

# Half the resolution and four times the channels: each place of the U-Net's input is a square of 2 × 2 pixels.
UNET = {
    "sample_size": SIZE // 2,
    "in_channels": 12,
    "out_channels": 12,
    "layers_per_block": 1,
    "block_out_channels": (48, 96),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 32,
}


def _diffusers():
    try:
        import diffusers
    except ImportError:
        raise InputError(f"The package diffusers is missing. {INSTALL}") from None
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_has_something_to_keep)
    return diffusers


def _has_something_to_keep(record) -> bool:
    """False for a warning that diffusers 0.42 gives whenever it is asked for a dtype, as `save_lora_adapter` asks, about an empty list."""
    return "should be kept in float32: []" not in record.getMessage()


def caption(subject: str, style: str = "day", colour: str | None = None) -> str:
    """The caption of a drawing, for example "red boat by day" or "fish in ink"."""
    return " ".join(filter(None, (colour, subject, "in" if style == "ink" else "by", style)))


def encode(captions) -> torch.Tensor:
    """Captions as numbers of words, a tensor of shape (captions, WORDS_IN_A_CAPTION); missing words are 0.

    Raises InputError for a word that the model doesn't know, and for a caption of too many words.
    """
    rows = []
    for text in [captions] if isinstance(captions, str) else captions:
        words = re.findall(r"[^\W\d_]+", text.lower())
        if unknown := [word for word in words if word not in VOCABULARY]:
            raise InputError(
                f"The picture model doesn't know {', '.join(map(repr, unknown))} in {text!r}. "
                f"Use only words that it knows: {', '.join(VOCABULARY[1:])}."
            )
        if len(words) > WORDS_IN_A_CAPTION:
            raise InputError(
                f"{text!r} has {len(words)} words, and a caption has at most {WORDS_IN_A_CAPTION}. Leave some out."
            )
        rows.append([VOCABULARY.index(word) for word in words] + [0] * (WORDS_IN_A_CAPTION - len(words)))
    return torch.tensor(rows)


class PictureModel(nn.Module):
    """`words` turns a caption's words into vectors; `unet`, which looks at them by cross-attention, finds the noise's direction."""

    def __init__(self, unet=None, words=None):
        super().__init__()
        self.unet = unet or _diffusers().UNet2DConditionModel(**UNET)
        self.words = words or nn.Embedding(len(VOCABULARY), WIDTH)

    def forward(self, noisy, time, word_ids):
        """The velocity, from picture to noise, of shape (n, 3, 32, 32).

        noisy: pictures mixed with noise, of that shape; time: the share of noise, (n,); word_ids: from `encode`, (n, words).
        """
        found = self.unet(
            functional.pixel_unshuffle(noisy, 2), 1000 * time, encoder_hidden_states=self.words(word_ids)
        ).sample
        return functional.pixel_shuffle(found, 2)

    def save(self, folder):
        """Write `unet/` as diffusers does, in 16 bits, and the words, all as safetensors."""
        from safetensors.torch import save_file

        folder = Path(folder)
        self.unet.save_config(folder / "unet")
        for weights, file in (
            (self.unet.state_dict(), "unet/diffusion_pytorch_model.safetensors"),
            ({"weight": self.words.weight}, "words.safetensors"),
        ):
            half = {name: weight.detach().half().contiguous() for name, weight in weights.items()}
            save_file(half, folder / file, metadata={"format": "pt"})
        write_text(folder / "vocabulary.json", json.dumps(VOCABULARY) + "\n")


def load_picture_model(folder=None) -> PictureModel:
    """The shipped text-to-image model, frozen, in float32; or one that `save` wrote into another folder.

    Raises InputError if diffusers is not installed, or if a file is missing or damaged.
    """
    from safetensors.torch import load_file

    from adapter_checks.safetensors_header import read_safetensors_header

    diffusers = _diffusers()
    folder = paths.pictures_dir() if folder is None else Path(folder)
    for file in ("words.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        read_safetensors_header(folder / file)
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        folder / "unet", dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    words = nn.Embedding(len(VOCABULARY), WIDTH)
    words.load_state_dict(load_file(folder / "words.safetensors"))
    # Convolutions are faster with the channels last, and so is everything here.
    model = PictureModel(unet, words).to(memory_format=torch.channels_last)
    return model.requires_grad_(False).eval()


def flow_loss(model, pictures, word_ids, no_caption=0.1, generator=None):
    """The loss of flow matching (Lipman et al. 2022): mix each picture with noise, and ask for the direction from picture to noise.

    Of the captions a share of `no_caption` is left out, so that the model also learns pictures without one, which guidance
    needs. Shares of noise in the middle come up most often (Esser et al. 2024).
    """
    count, device = len(pictures), pictures.device  # drawn on the CPU, so that a seed means the same everywhere
    time = torch.sigmoid(torch.randn(count, generator=generator)).to(device)
    noise = torch.randn(pictures.shape, generator=generator).to(device)
    dropped = (torch.rand(count, 1, generator=generator) < no_caption).to(device)
    mixed = torch.lerp(pictures, noise, time.view(-1, 1, 1, 1))
    return functional.mse_loss(model(mixed, time, word_ids.masked_fill(dropped, 0)), noise - pictures)


@torch.no_grad()
def generate_pictures(model, captions, seed=0, steps=20, guidance=2.0) -> torch.Tensor:
    """Pictures for captions, (n, 3, 32, 32) from -1 to 1: begin with noise and walk against the velocity.

    guidance: how far to go beyond what the model would do without a caption (Ho and Salimans 2022); 1 is without guidance.
    The same seed begins with the same noise, whatever adapter is on.
    """
    word_ids = encode(captions)
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(len(word_ids), 3, SIZE, SIZE, generator=generator)
    both = torch.cat([word_ids, torch.zeros_like(word_ids)])
    for step in range(steps):
        time = torch.full((len(both),), 1 - step / steps)
        told, untold = model(torch.cat([pictures, pictures]), time, both).chunk(2)
        pictures = pictures - (untold + guidance * (told - untold)) / steps
    return pictures.clamp(-1, 1)
