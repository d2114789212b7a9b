"""The height of a maximum over many points, with an interval that knows it is a maximum."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_AT_A_TIME = 2**23  # counts that are held at once


class Band(NamedTuple):
    """A curve with a band that holds all of it at once, and its largest value.

    Attributes:
        excess: The curve h at each t.
        low: Lower end of the band.
        high: Upper end.
        value: max over t of h.
        at: Index of the maximum.
        interval: Of the maximum of the expected curve.
        bias: How far the maximum of resampled curves lies above them at `at`, on average.
    """

    excess: Array
    low: Array
    high: Array
    value: float
    at: int
    interval: tuple[float, float]
    bias: float


def excess_band(
    sums: Array, weights: Array, t: Array, *, confidence: float, resamples: int, seed: int
) -> Band:
    """The excess of a loss on a line over the straight line between its ends.

    With R(t) = Σ_i s_i(t) / Σ_i w_i(t), the curve is h(t) = R(t) − (1 − t) R(0) − t R(1). Examples
    are drawn with replacement, whole, so that what they have in common at all t stays; c is the
    quantile of max_t |h*(t) − h(t)| / SE(t), and h ± c SE holds the expected curve at all t at
    once. The maximum of that curve is therefore between max_t (h − c SE) and max_t (h + c SE),
    whichever t it is at: no more is assumed, and the coverage is at least that of the band.

    Args:
        sums: s_i(t), shape (points, n).
        weights: w_i(t), the same shape.
        t: Shape (points,), from 0 to 1.
        confidence: Nominal coverage of the band.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        Band: NaN at all ends for one example, or a value that is not finite.

    Source:
        Chernozhukov, Chetverikov and Kato, Annals of Statistics 2013 (maxima by the bootstrap).

    Example:
        >>> t = np.array([0.0, 0.5, 1.0])
        >>> losses = np.array([[0.0, 0.0], [1.0, 2.0], [0.0, 1.0]])
        >>> weights, how = np.ones_like(losses), {"confidence": 0.9, "resamples": 99, "seed": 0}
        >>> band = excess_band(losses, weights, t, **how)
        >>> band.excess, band.value, band.at
        (array([0.  , 1.25, 0.  ]), 1.25, 1)
    """
    means = weights.mean(1)
    ratios = sums.mean(1) / means
    shares = np.stack([1.0 - t, t], 1)  # of both ends
    excess = ratios - shares @ ratios[[0, -1]]
    excess[[0, -1]] = np.where(np.isfinite(ratios[[0, -1]]), 0.0, np.nan)  # not by rounding
    at = int(np.argmax(np.where(np.isnan(excess), -np.inf, excess)))
    value = float(excess.max())  # NaN if any point is
    n = sums.shape[1]
    if n < 2 or not np.isfinite(excess).all():
        unknown = np.full_like(excess, np.nan)
        return Band(excess, unknown, unknown, value, at, (math.nan, math.nan), math.nan)
    # the part of each example, whose means are the differences of a resample to first order
    parts = (sums - ratios[:, None] * weights) / means[:, None]
    parts -= shares @ parts[[0, -1]]
    parts[[0, -1]] = 0.0
    errors = parts.std(1, ddof=1) / math.sqrt(n)
    drawn = _resampled(parts, resamples, seed)
    moving = errors > 0
    widths = np.abs(drawn[:, moving]) / errors[moving]
    width = float(np.quantile(widths.max(1), confidence)) if moving.any() else 0.0
    low, high = excess - width * errors, excess + width * errors
    curves = excess + drawn
    bias = float((curves.max(1) - curves[:, at]).mean())
    return Band(excess, low, high, value, at, (float(low.max()), float(high.max())), bias)


def _resampled(parts: Array, resamples: int, seed: int) -> Array:
    """Means of (points, n) over resampled examples, shape (resamples, points)."""
    points, n = parts.shape
    generator = np.random.default_rng(seed)
    found = np.empty((resamples, points))
    step = max(1, _AT_A_TIME // n)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        found[start : start + count] = counts @ parts.T / n
    return found
