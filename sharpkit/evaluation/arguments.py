"""What every evaluation asks of its arguments, and what is expected of a measure: its direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sharpkit.errors import ArgumentError
from sharpkit.evaluation.grid import Bools, Floats
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


def check_direction(direction: int | None, statistic: str = "kendall_tau") -> None:
    """Raise ArgumentError for a direction that is none, or None where one is needed."""
    if direction not in (1, -1, None):
        raise ArgumentError(f"direction = {direction!r}: expected 1, -1 or None")
    if direction is None and TABLE[statistic].lower_is_better:
        raise ArgumentError(f"{statistic} needs a direction: expected 1 or -1, got None")


def expected_direction(measure: Any) -> int | None:
    """The attribute `direction` of a measure: 1 if it has none.

    1 says that large values should mean a large gap, -1 that they should mean a small one, None
    that nothing is expected.

    Args:
        measure: Any object.

    Returns:
        1, -1 or None.

    Raises:
        ArgumentError: If the attribute is something else.

    Example:
        >>> class Margin:
        ...     direction = -1
        >>> expected_direction(Margin()), expected_direction(len)
        (-1, 1)
    """
    direction: int | None = getattr(measure, "direction", 1)
    check_direction(direction)
    return direction


def by_direction(
    values: Floats, directions: Sequence[int | None], statistics: Sequence[str]
) -> Iterator[tuple[list[str], Floats, Bools]]:
    """The statistics in two parts: of the measures as they are, and errors of them as expected.

    Args:
        values: Of the measures (models, measures).
        directions: Of each.
        statistics: Which.

    Yields:
        tuple: Statistics; values, of errors times the direction; and which measures have these
            statistics (measures,).
    """
    signs = np.array([np.nan if d is None else d for d in directions], dtype=np.float64)
    for errors in (False, True):
        names = [name for name in statistics if TABLE[name].lower_is_better is errors]
        known = np.isfinite(signs) if errors else np.ones(len(signs), dtype=np.bool_)
        if names:
            yield names, np.where(known, signs, 1.0) * values if errors else values, known
