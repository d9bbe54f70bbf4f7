"""World → corpus → tokenizer → pretraining → tasks → adapters → card, in that order, and the pictures by themselves.

    python -m pretraining.run                 everything (about three hours on two CPU cores; with COURSE_DEVICE=cuda minutes)
    python -m pretraining.run tasks adapters card
    python -m pretraining.run pictures        the text-to-image model (about half an hour on two CPU cores)

A stage that was interrupted goes on where it stopped. Work is kept under `runs/pretraining/`.
"""

import argparse
import os
import sys

from pretraining import world as world_module
from pretraining.corpus import RHYMES_UNTIL
from pretraining.mixture import OPEN_FROM, document
from pretraining.places import BASE_FOLDER, PICTURES_FOLDER, WORK_FOLDER
from pretraining.tokenizer import render, train_tokenizer
from pretraining.train import Settings, train

# Pretraining has two parts. In the first the model learns to look back, on a small world whose names are tokens; begun on words of
# all kinds, it never found a name that stands before its thing. In the second it learns to do so with any word.
PARTS = {
    "world": Settings(),
    "open": Settings(
        tokens=32_000_000, first_document=OPEN_FROM, vocab=4096, split_alike=True, row=160, batch_tokens=4160
    ),
}


def make_tokenizer(world, settings):
    """The tokenizer of a part: trained on 40,000 of its documents, those after the rhymes in the first."""
    start = max(settings.first_document, RHYMES_UNTIL)
    texts = (render(document(world, settings.seed, start + i)) for i in range(40_000))
    return train_tokenizer(texts, settings.vocab, settings.context, settings.split_alike)


def pretrain(world):
    """Train both parts, each with its own tokenizer, and save the base model into `models/base`."""
    start = None
    for part, settings in PARTS.items():
        tokenizer = make_tokenizer(world, settings)
        model, _ = train(world, tokenizer, settings, WORK_FOLDER / part, start)
        start = (model, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(BASE_FOLDER)
    tokenizer.save_pretrained(BASE_FOLDER)


def main(arguments=None):
    """Run the stages that were named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["pretrain", "tasks", "adapters", "card", "pictures"]
    parser.add_argument("stages", nargs="*", help=f"some of: {' '.join(stages)} (default: all)")
    wanted = parser.parse_args(arguments).stages or stages
    if unknown := set(wanted) - set(stages):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    world = world_module.make_world()
    if "pretrain" in wanted:
        pretrain(world)
    if "tasks" in wanted:
        from pretraining.honesty import write_honesty
        from pretraining.tasks import write_tasks

        write_tasks(world)
        write_honesty(world)
    if "adapters" in wanted:
        from pretraining.abilities import add_abilities
        from pretraining.adapters import train_adapters, train_start

        train_adapters()
        add_abilities(world)
        train_start()
    if "card" in wanted:
        from pretraining.card import write_card

        write_card(world, PARTS)
    if "pictures" in wanted:
        from pretraining.picture_card import write_picture_card
        from pretraining.pictures import Settings as PictureSettings
        from pretraining.pictures import make_pictures

        make_pictures(PictureSettings(), PICTURES_FOLDER, WORK_FOLDER / "pictures")
        write_picture_card(PICTURES_FOLDER, WORK_FOLDER / "pictures")


if __name__ == "__main__":
    sys.exit(main())
