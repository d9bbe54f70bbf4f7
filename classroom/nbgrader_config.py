"""nbgrader's configuration for this course. nbgrader's own apps and formgrader read it when they start in this folder."""

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))  # so that nbgrader finds classroom.preprocessors

c = get_config()  # noqa: F821, given by nbgrader

c.CourseDirectory.root = str(here / "staging")

# Hand-out: the stub is the one that the course's own notebooks have.
c.GenerateAssignment.preprocessors = [
    "nbgrader.preprocessors.LockCells",
    "classroom.preprocessors.Stub",
    "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.CheckCellMetadata",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.SaveCells",
    "nbgrader.preprocessors.ClearHiddenTests",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.CheckCellMetadata",
]

# Grading: a submission is first made whole, and what was amiss is noted.
c.Autograde.sanitize_preprocessors = [
    "nbgrader.preprocessors.ClearOutput",
    "classroom.preprocessors.MakeWhole",
    "nbgrader.preprocessors.OverwriteKernelspec",
    "nbgrader.preprocessors.OverwriteCells",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.Autograde.autograde_preprocessors = [
    "classroom.preprocessors.ExecuteTraced",
    "classroom.preprocessors.ForgiveStderr",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]

# A cell may take a minute on a quiet machine, and graders run side by side. `make grade` sets it anew.
c.Execute.timeout = 240
c.Execute.startup_timeout = 180
c.Execute.iopub_timeout = 30
