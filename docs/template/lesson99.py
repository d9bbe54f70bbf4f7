"""Checks of lesson 99: what fraction?"""

from course_utils.exercises import TryAgain, call_learner, exercise, expect_number


@exercise("99.share", title="What fraction?", level="warm-up", minutes=5)
def share(function):
    """Compare with the closed form, over sizes at which each typical mistake gives a number of its own."""
    for inputs, outputs, rank in ((8, 8, 2), (10, 20, 3), (64, 16, 4)):
        found = expect_number(call_learner(function, inputs, outputs, rank), "the share")
        mistakes = {
            rank * (inputs + outputs): "That is the count. Divide it by the numbers of the full matrix.",
            rank * inputs * outputs / (inputs * outputs): "A and B are two matrices: their sizes add up.",
            (inputs + outputs) / (inputs * outputs): "That is the share at rank 1.",
        }
        if found in mistakes:
            raise TryAgain(mistakes[found])
        if abs(found - rank * (inputs + outputs) / (inputs * outputs)) > 1e-9:
            raise TryAgain("The share is not right. Write down the shapes of A and B first.")
