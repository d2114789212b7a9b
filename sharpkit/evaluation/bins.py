"""Bins of continuous hyperparameters, such as the learning rates of a random search.

Given such a hyperparameter, no two models would be alike, and nothing could be compared. So a
mutual information conditions on quantile bins of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_VALUES = 10  # of a hyperparameter that is taken as it is, however few models there are
_LEAST_MODELS = 4  # that share a value on average, or it is binned
_MOST_BINS = 4  # as many values as a hyperparameter of the competition has
_PER_SETTING = 6  # models in each combination of the bins of two hyperparameters


class Bins(NamedTuple):
    """The bins of a hyperparameter."""

    codes: Ints  # (models,): index into names; -1 where the model has no value
    names: tuple[str, ...]  # in increasing order: smallest and largest value
    ranks: Floats  # (models,): of the values among all, 0 where there is none

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Bins:
        """The same bins with some of the models."""
        return Bins(self.codes[rows], self.names, self.ranks[rows])


def quantile_bins(codes: Ints, levels: Sequence[str]) -> Bins | None:
    """The bins of a hyperparameter if it is continuous; None if it is taken as it is.

    Continuous is a hyperparameter of numbers with more than 10 values, which on average are shared
    by fewer than 4 models: given one of them, hardly a pair is left to compare. Its k bins end at
    the 1/k, ..., (k−1)/k quantiles over models; equal values are in one bin. Of n models k is
    √(n/6), rounded down, but at least 2 and at most 4, so that every combination of the bins of two
    hyperparameters has some six models. The bins are the same for the logarithm of the values.

    Args:
        codes: Index into the levels (models,); -1 where the model has no value.
        levels: The values as text; "None" is a missing one.

    Example:
        >>> bins = quantile_bins(np.arange(24), [f"{0.1 * k:.1f}" for k in range(24)])
        >>> bins.names, bins.codes[10:14].tolist()
        (('0.0 to 1.1', '1.2 to 2.3'), [0, 0, 1, 1])
    """
    numbers = np.array([_number(level) for level in levels])
    known = np.isfinite(numbers)
    models = int(np.isin(codes, np.flatnonzero(known)).sum())
    odd = [level for level, is_known in zip(levels, known, strict=True) if not is_known]
    few = known.sum() <= _MOST_VALUES or known.sum() * _LEAST_MODELS <= models
    if few or any(level != "None" for level in odd):
        return None
    values = np.where(codes >= 0, numbers[codes], np.nan)
    there = np.isfinite(values)
    count = min(_MOST_BINS, max(2, math.isqrt(models // _PER_SETTING)))
    shares = np.arange(1, count) / count
    edges = np.quantile(values[there], shares, method="inverted_cdf")
    in_bin = np.full(len(codes), -1, dtype=np.int64)
    # ties may leave a bin empty
    in_bin[there] = np.unique(np.searchsorted(edges, values[there]), return_inverse=True)[1]
    place = np.argsort(np.argsort(numbers))  # of levels in their order
    names = []
    for k in range(int(in_bin.max()) + 1):
        inside = codes[in_bin == k]
        low, high = (levels[inside[find(place[inside])]] for find in (np.argmin, np.argmax))
        names.append(low if low == high else f"{low} to {high}")
    ranks = np.zeros(len(codes))
    ranks[there] = np.searchsorted(np.sort(values[there]), values[there]).astype(np.float64)
    return Bins(in_bin, tuple(names), ranks)


def _number(level: str) -> float:
    try:
        return float(level.replace("_", "?"))  # 1_0 is a word
    except ValueError:
        return math.nan
