"""Which layers must LoRA change, so that a text-to-image model draws in ink? Twelve pictures of three subjects; the others are unseen."""

from course_utils.picture_model import caption
from course_utils.pictures import SUBJECTS
from experiments import picturing, training
from experiments.picturing import base_folder  # noqa: F401  (read by experiments.run)

STEPS, A_SUBJECT = 120, 6
SEEN, UNSEEN = SUBJECTS[:3], SUBJECTS[3:]
# When the rates were chosen, LoRA in all layers drew fewer of the subjects that it was not taught at 6e-3 than at 4e-3.
RATES = {"attention": picturing.RATE, "all": picturing.RATE, "full": 1e-3}
RUNS = [{"seed": seed, "targets": targets} for seed in training.SEEDS for targets in RATES]


def measure(seed, targets):
    """Train once; what the judge sees of subjects that were among the twelve pictures, and of the other three."""
    subjects = [subject for subject in SEEN for _ in range(4)]
    drawn = picturing.draw(subjects, "ink", 5000 + 100 * seed)
    model, weights = picturing.adapted(targets, seed)
    loss = picturing.train(
        model, weights, drawn, [caption(subject, "ink") for subject in subjects], STEPS, seed, RATES[targets]
    )
    result = {"trainable": sum(weight.numel() for weight in weights), "loss": loss}
    for name, group in (("seen", SEEN), ("unseen", UNSEEN)):
        asked = [subject for subject in group for _ in range(A_SUBJECT)]
        found = picturing.shares(model, [caption(subject, "ink") for subject in asked], asked, "ink", 40 + seed)
        result |= {f"{name}_{column}": share for column, share in found.items()}
    return result
