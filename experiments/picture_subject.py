"""A new subject from eight pictures, in the manner of Dreambooth (Ruiz et al. 2022): what do prior pictures keep?

The windmill's caption names the class that it is a kind of, "skerrow house by day". Prior pictures are the model's own, made before.
"""

from course_utils.picture_model import caption, generate_pictures, load_picture_model
from course_utils.pictures import NEW_SUBJECT, SUBJECTS, colours_of
from experiments import picturing, training
from experiments.picturing import base_folder  # noqa: F401  (read by experiments.run)

STEPS, PICTURES, PRIOR, ASKED, A_SUBJECT = 80, 8, 24, 12, 4
NAME = "skerrow house by day"
RUNS = [{"seed": seed, "prior": prior} for seed in training.SEEDS for prior in ("none", "prior")]


def prior_captions():
    """The captions of the prior pictures: every subject, in its colours."""
    subjects = [SUBJECTS[place % 6] for place in range(PRIOR)]
    colours = [colours_of(subject)[place // 6 % len(colours_of(subject))] for place, subject in enumerate(subjects)]
    return [caption(subject, "day", colour) for subject, colour in zip(subjects, colours)]


def measure(seed, prior):
    """Train once; shares of windmills where one is asked for, and where a house or another subject is."""
    drawn = picturing.draw([NEW_SUBJECT] * PICTURES, "day", 7000 + 100 * seed, "red")
    extra = None
    if prior == "prior":
        captions = prior_captions()
        extra = generate_pictures(load_picture_model(), captions, 50 + seed), captions
    model, weights = picturing.adapted("all", seed)
    loss = picturing.train(model, weights, drawn, [NAME] * PICTURES, STEPS, seed, prior=extra)
    asked = picturing.shares(model, [NAME] * ASKED, [NEW_SUBJECT] * ASKED, "day", 60 + seed)
    houses = picturing.shares(
        model,
        [caption("house", "day", colour) for colour in ("red", "blue", "white")] * A_SUBJECT,
        ["house"] * 12,
        "day",
        70 + seed,
    )
    others = [subject for subject in SUBJECTS if subject != "house" for _ in range(A_SUBJECT)]
    kept = picturing.shares(model, [caption(subject, "day", "red") for subject in others], others, "day", 80 + seed)
    return {
        "loss": loss,
        "windmills": asked["subject"],
        "houses_kept": houses["subject"],
        "others_kept": kept["subject"],
    }
