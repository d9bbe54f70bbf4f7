"""Helpers that the lessons import: they draw, measure and check, and never hide the library call being taught.

The submodules load on first use, so that `import course_utils` itself takes no time worth mentioning.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = ("data", "evaluation", "exercises", "plotting", "progress", "runtime", "validation")


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_SUBMODULES])
