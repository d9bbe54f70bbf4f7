"""Helpers that the lessons import: they draw, measure and check, and never hide the library call being taught.

The submodules load on first use, so that `import course_utils` itself takes no time worth mentioning.
"""

import importlib
import os

__version__ = "0.1.0"

# Lessons work without a network and ask nothing of it. Unless told not to, TRL reports each trainer that is made,
# and datasets each use of its JSON loader, to servers of their own. Read when those libraries are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

# Torch's threads wait for each other after every operation, and by default each wait burns a core. Where another program
# wants that core, all come to a standstill: a training step took 1.0 s so and 0.5 s with threads that sleep while they
# wait, on two cores with other work. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_SUBMODULES = (
    "data",
    "evaluation",
    "exercises",
    "plotting",
    "progress",
    "runtime",
    "sweeps",
    "timing",
    "validation",
)


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_SUBMODULES])
