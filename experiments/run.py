"""All sweeps, or those that are named, the most important first.

    python -m experiments.run                  everything that has no result yet
    python -m experiments.run rank recall

A run whose row stands in `experiments/results/` is not repeated, so a sweep that was interrupted goes on where it
stopped; to make results anew, delete their file. With COURSE_BASE_MODEL set, results go to `runs/experiments/`.

The plan for lesson 3 on two cores, with a step of batch 32 on rows of `sailor` at 0.25 s, as seen, and 8 s to load and score
(10 s with the loss on held-out text twice), in minutes; the plan has not been run to its end yet:

    learning_rate  30 × (120 × 0.25 + 10)                                20
    cost           6 × (30 × 0.25 + 14 to import)                         2
    rank           21 × (120 × 0.25 + 8)                                 13
    recall         12 × (160 and 520 steps at batch 64 × 0.16 + 12)      14
    throughput     3 × 3 × (60 × 0.25 + 3)                                3
    few_shot       36 prompted × 4.5 + 24 trained × 20                   11
    targets        12 × (120 × 0.25 + 8)                                  8
    alpha          12 × (120 × 0.25 + 8)                                  8
    overfitting    6 × (200 steps at batch 16 × 0.12 + 10 × 1 + 3)        4
                                                                   about 83 of the 90 allowed
"""

import argparse
import importlib
import os
import sys

from course_utils import runtime
from experiments import harness

# By lesson. Rank, recall, targets, alpha and overfitting train at the learning rate that the first sweep of lesson 3 finds best.
LESSONS = {
    "02": ("cut_to_rank",),
    "03": ("learning_rate", "cost", "rank", "recall", "throughput", "few_shot", "targets", "alpha", "overfitting"),
    "04": ("quantised", "quantised_merge", "quantised_cost"),
    "05": ("starts", "starts_rank"),
    "06": ("combine", "dial"),
}
ORDER = tuple(name for names in LESSONS.values() for name in names)

TIMED = ("cost", "throughput", "quantised_cost")  # their times are the result, so each of their runs has the machine to itself
MOST_PROCESSES = 4  # each takes about 1.2 GB


def processes():
    """How many runs go side by side: one a core; a GPU is not shared."""
    return 1 if runtime.device().type != "cpu" else min(os.cpu_count() or 1, MOST_PROCESSES)


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
            harness.sweep(name, script.RUNS, script.measure, at_once=1 if name in TIMED else processes())


if __name__ == "__main__":
    try:
        main()
    except runtime.CourseError as error:
        sys.exit(f"{error}")
