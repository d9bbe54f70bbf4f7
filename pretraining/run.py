"""World → corpus → tokenizer → pretraining → tasks → adapters → card, in that order.

    python -m pretraining.run                 everything (about an hour on two CPU cores)
    python -m pretraining.run tasks adapters card

A stage that was interrupted goes on where it stopped. Work is kept under `runs/pretraining/`.
"""

import argparse
import os
import sys

from pretraining import world as world_module
from pretraining.corpus import RHYMES_UNTIL, document
from pretraining.places import BASE_FOLDER, WORK_FOLDER
from pretraining.tokenizer import render, train_tokenizer
from pretraining.train import Settings, train


def make_tokenizer(world, settings):
    """The tokenizer of the corpus, trained on 40,000 documents after the rhymes that it begins with."""
    texts = (render(document(world, settings.seed, RHYMES_UNTIL + i)) for i in range(40_000))
    return train_tokenizer(texts, settings.vocab, settings.context)


def pretrain(world):
    """Train the tokenizer and the base model, and save both into `models/base`."""
    settings = Settings()
    tokenizer = make_tokenizer(world, settings)
    model, _ = train(world, tokenizer, settings, WORK_FOLDER)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(BASE_FOLDER)
    tokenizer.save_pretrained(BASE_FOLDER)


def main(arguments=None):
    """Run the stages that were named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["pretrain", "tasks", "adapters", "card"]
    parser.add_argument("stages", nargs="*", help=f"some of: {' '.join(stages)} (default: all)")
    wanted = parser.parse_args(arguments).stages or stages
    if unknown := set(wanted) - set(stages):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    world = world_module.make_world()
    if "pretrain" in wanted:
        pretrain(world)
    if "tasks" in wanted:
        from pretraining.tasks import write_tasks

        write_tasks(world)
    if "adapters" in wanted:
        from pretraining.adapters import train_adapters

        train_adapters()
    if "card" in wanted:
        from pretraining.card import write_card

        write_card(world)


if __name__ == "__main__":
    sys.exit(main())
