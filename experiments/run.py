"""All sweeps, or those that are named, the most important first.

    python -m experiments.run                  everything that has no result yet
    python -m experiments.run rank recall

A run whose row stands in `experiments/results/` is not repeated, so a sweep that was interrupted goes on where it
stopped; to make results anew, delete their file. With COURSE_BASE_MODEL set, results go to `runs/experiments/`.

The sweeps of one lesson take at most 90 minutes on two cores: a test sums the seconds of the committed results.
"""

import argparse
import importlib
import os
import sys

from adapter_checks.errors import InputError
from course_utils import runtime
from experiments import harness

# By lesson or deep dive. Rank, recall, targets, alpha and overfitting train at the learning rate that the first sweep of lesson 3 finds best.
LESSONS = {
    "01": ("overhead",),
    "03": ("learning_rate", "cost", "rank", "recall", "few_shot", "targets", "alpha", "overfitting", "prompt_loss"),
    "05": ("quantised", "quantised_merge", "quantised_cost"),
    "06": ("starts", "starts_rank"),
    "07": ("merge_memory",),
    "08": ("combine", "dial", "dial_control", "both_tasks"),
    "09": ("preferences", "rewards", "best_of_n"),
    "10": ("prompts_rate", "prompts", "prompts_start", "prompts_cost"),
    "deep_throughput": ("throughput", "step_parts", "batching"),
    "deep": ("cut_to_rank",),
    "11": ("serving",),
    "12": ("picture_classifier", "picture_style", "picture_subject", "house_words"),
    "13": ("engines",),
}
ORDER = tuple(name for names in LESSONS.values() for name in names)

TIMED = (
    "overhead",
    "cost",
    "throughput",
    "step_parts",
    "batching",
    "quantised_cost",
    "prompts_cost",
    "serving",
)  # their times are the result, so each of their runs has the machine to itself
# They look for a learning rate at one seed; what trains at that rate has three.
SEARCHES = ("prompts_rate",)
MOST_PROCESSES = 4  # each takes about 1.2 GB


def processes():
    """How many runs go side by side: one a core; a GPU is not shared."""
    return 1 if runtime.device().type != "cpu" else min(os.cpu_count() or 1, MOST_PROCESSES)


def fingerprint(script):
    """That of the model which the script's runs begin with: the course's language model, unless it has a `base_folder`."""
    return (
        harness.base_fingerprint(script.base_folder()) if hasattr(script, "base_folder") else harness.base_fingerprint()
    )


def main(arguments=None):
    """Run the sweeps that were named, or all of them, in the order of ORDER."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of: {' '.join(ORDER)} (default: all)")
    wanted = parser.parse_args(arguments).names or ORDER
    if unknown := set(wanted) - set(ORDER):
        parser.error(f"no such sweep: {', '.join(sorted(unknown))}; there are {', '.join(ORDER)}")
    harness.prepare()
    for name in ORDER:
        if name in wanted:
            script = importlib.import_module(f"experiments.{name}")
            harness.sweep(
                name, script.RUNS, script.measure, at_once=1 if name in TIMED else processes(), base=fingerprint(script)
            )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{error}")
