"""What check_merged_folder hands back."""

from __future__ import annotations

from dataclasses import dataclass

from adapter_checks.comparison import Comparison


@dataclass(repr=False)
class MergedReport(Comparison):
    """A Comparison of the merged model (candidate) with base + adapter (reference), and what else was measured; None
    where nothing could be.

    tolerance  what max_abs was allowed to be, in units of logits
    times      how many times the adapter's change is in the merged weights: 1 is right, 2 is merged twice. With several
               adapters {folder's name: times}.
    rounding   distance of the merged weights from the exact ones, as a multiple of one rounding to their dtype; None in
               float32, where the exact ones are rounded themselves
    dtype      of the merged weights, such as "bfloat16"
    scores     {"adapter": score, "merged": score} of the task, from 0 to 1
    """

    tolerance: float | None = None
    times: float | dict | None = None
    rounding: float | None = None
    dtype: str | None = None
    scores: dict | None = None
