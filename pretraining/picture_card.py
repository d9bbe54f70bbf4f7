"""The card of the text-to-image model, `models/pictures/README.md`: every number in it is measured or read from the log here."""

import json
from pathlib import Path

from course_utils import pictures, plotting
from course_utils.files import write_text
from course_utils.picture_judge import judged, load_judge
from course_utils.picture_model import UNET, VOCABULARY, caption, generate_pictures, load_picture_model
from pretraining.pictures import STYLES

ASKED = 4  # pictures of each subject by day and by night


def recognised(model, judge):
    """(share of generated pictures in which the judge sees the subject, and the style, that was asked for; how many there were)."""
    wanted = [(subject, style) for style in STYLES for subject in pictures.SUBJECTS for _ in range(ASKED)]
    colours = [pictures.colours_of(subject)[place % ASKED] for place, (subject, _) in enumerate(wanted)]
    captions = [caption(*pair, colour) for pair, colour in zip(wanted, colours)]
    seen = judged(judge, generate_pictures(model, captions, seed=11))
    right = [(a == subject, b == style) for (a, b), (subject, style) in zip(seen, wanted)]
    return tuple(sum(column) / len(right) for column in zip(*right)) + (len(right),)


def sample_sheet(model, path):
    """Draw what the model makes of each subject, by day and by night, in three colours."""
    rows = {}
    for style in STYLES:
        for colour in ("red", "yellow", "green"):
            captions = [caption(subject, style, colour) for subject in pictures.SUBJECTS]
            rows[f"{colour} …\nby {style}"] = pictures.to_arrays(generate_pictures(model, captions, seed=7))
    figure = plotting.picture_rows(rows, "What the model draws", pictures.SUBJECTS)
    figure.savefig(path, metadata={"Software": None})


def write_picture_card(folder, work):
    """Write the card and its sheet of samples into `folder`; `work` holds the log of the training."""
    folder = Path(folder)
    log = json.loads((Path(work) / "log.json").read_text(encoding="utf-8"))
    settings, last, model = log["settings"], log["rows"][-1], load_picture_model(folder)
    subjects, styles, count = recognised(model, load_judge(folder))
    sample_sheet(model, folder / "samples.png")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    parameters = sum(weight.numel() for weight in model.parameters())
    minutes = last["seconds"] / 60
    threads = f" with {log['threads']} thread{'s' * (log['threads'] > 1)}" if log["device"] == "cpu" else ""
    write_text(
        folder / "README.md",
        f"""# The text-to-image model

It draws {len(pictures.SUBJECTS)} subjects of a coast ({", ".join(pictures.SUBJECTS)}) by day and by night, 32 × 32 pixels, from captions such as
`red boat by night`. Lesson 12 adapts it. Everything in it is this project's own, drawings and weights (Apache-2.0).

![Pictures that the model made: each subject in three colours by day and by night](samples.png)

| | |
| --- | --- |
| U-Net | diffusers' `UNet2DConditionModel`, channels {UNET["block_out_channels"][0]} and {UNET["block_out_channels"][1]}, cross-attention in the lower half |
| text encoder | a table of {len(VOCABULARY) - 1} words; {", ".join(VOCABULARY[-4:])} and `in` are in no caption of the training |
| parameters | {parameters:,}, stored in 16 bits: {size / 1e6:.1f} MB with the judge |
| trained by | flow matching, {settings["steps"]:,} steps of {settings["batch"]}, on {settings["drawings"]:,} drawings by day and by night, half of the time mirrored |
| time | {minutes:.0f} minutes{threads}, on an {log["machine"]} that had other work |
| loss at the end | {last["loss"]:.3f} |
| recognised | the judge sees the subject that was asked for in {subjects:.0%} of {count} pictures, and the style in {styles:.0%} |

It has seen no drawing in ink and no windmill: those are for adapters to bring. It knows only its words, and pictures of one thing each.
To repeat the training: `python -m pretraining.run pictures`.

## The judge

`judge.safetensors` is a small classifier of subjects (with the windmill) and styles (with ink), trained on {settings["judge_drawings"]:,} other drawings
with noise. Of {settings["judge_tests"]:,} drawings that it never saw it names {log["judge"]["subjects"]:.1%} of the subjects and {log["judge"]["styles"]:.1%} of the styles
rightly.
On pictures that look like nothing it still names something, so look at the pictures as well.
""",
    )
