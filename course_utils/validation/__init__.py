"""Checks on models and adapters, for the lessons and for a person's own work with transformers and PEFT.

Each check returns a Report that says what is wrong and what to do; none of them raises on bad input, none loads a
pickle, and none leaves the model other than it found it.

    check_adapter_folder   is this folder a whole, safe adapter, and does it fit this base?
    check_adapters         which adapters does this model hold, and are they in effect?
    check_changes_output   does the adapter change the output at all?
    compare_models         do two models, or two routes, give the same output?
"""

from course_utils.validation.compare import Comparison, check_changes_output, compare_models
from course_utils.validation.folders import check_adapter_folder
from course_utils.validation.models import check_adapters
from course_utils.validation.report import Finding, Report

__all__ = [
    "Comparison",
    "Finding",
    "Report",
    "check_adapter_folder",
    "check_adapters",
    "check_changes_output",
    "compare_models",
]
