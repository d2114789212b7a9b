"""What every evaluation asks of its arguments."""

from __future__ import annotations

from sharpkit.errors import ArgumentError
from sharpkit.evaluation.statistics import TABLE

LEAST = 3  # models that a statistic needs
LEAST_CERTAIN = 12  # models that an interval or a null needs


def check_resampling(count: int, confidence: float = 0.95, statistic: str = "kendall_tau") -> None:
    """Raise ArgumentError for an unknown statistic, or a number outside its range."""
    if count < 1:
        raise ArgumentError(f"{count} resamples or permutations: expected at least 1")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence = {confidence}: expected a number between 0 and 1")
    if statistic not in TABLE:
        raise ArgumentError(f"unknown statistic {statistic!r}: expected one of {', '.join(TABLE)}")
