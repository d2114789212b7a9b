"""Which points are looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sharpkit.errors import ArgumentError

Points: TypeAlias = int | tuple[int, int]
Extent: TypeAlias = float | tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]

_MARGIN = 0.25  # of the larger side, around models and trajectories


def read_points(points: Points | None, dimensions: int, default: int) -> tuple[int, ...]:
    """The number of points along each axis."""
    given = default if points is None else points
    counts = tuple(given) if isinstance(given, Sequence) else (given,) * dimensions
    valid = all(isinstance(c, int) and not isinstance(c, bool) and c >= 2 for c in counts)
    if len(counts) != dimensions or not valid:
        raise ArgumentError(
            f"points = {points!r}: expected a whole number of at least 2"
            + (", or one for each axis" if dimensions == 2 else "")
        )
    return counts


def read_extent(extent: Extent | None, dimensions: int) -> list[tuple[float, float]] | None:
    """Where each axis begins and ends; None for None."""
    if extent is None:
        return None
    given: Any = extent
    if isinstance(given, Real):
        ends = [(-float(given), float(given))] * dimensions
    elif len(given) == 2 and all(isinstance(e, Real) for e in given):
        ends = [(float(given[0]), float(given[1]))] * dimensions
    else:
        try:
            ends = [(float(a), float(b)) for a, b in given]
        except (TypeError, ValueError):
            ends = []
    if len(ends) != dimensions or not all(a < b and math.isfinite(b - a) for a, b in ends):
        raise ArgumentError(
            f"extent = {extent!r}: expected a positive number, a pair (low, high) with low < high"
            + (", or such a pair for each axis" if dimensions == 2 else "")
        )
    return ends


def around(places: Sequence[tuple[float, ...]]) -> list[tuple[float, float]]:
    """A box with a margin around points; no side is less than half of the larger one.

    Example:
        >>> around([(0.0, 0.0), (4.0, 2.0)])
        [(-1.0, 5.0), (-1.0, 3.0)]
    """
    columns = list(zip(*places, strict=True))
    widest = max(max(c) - min(c) for c in columns) or 1.0
    ends = []
    for c in columns:
        low, high = min(c), max(c)
        pad = max(_MARGIN * widest, (widest / 2 - (high - low)) / 2)
        ends.append((low - pad, high + pad))
    return ends


def axis(
    low: float, high: float, points: int, marks: Mapping[str, tuple[float, ...]], which: int
) -> NDArray[np.float64]:
    """Evenly spaced values; those that miss 0 or a model by rounding only are moved to it."""
    values = np.linspace(low, high, points)
    for place in (0.0, *(mark[which] for mark in marks.values())):
        values[np.abs(values - place) < 1e-9 * (high - low)] = place
    return values
