"""How certain a statistic is: the interval of one measure, the paired comparison of two measures.

Models are resampled, because another zoo would have other models. Everything is determined by the
seed, and all measures of a zoo see the same resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.arguments import LEAST, check_direction, check_resampling
from sharpkit.evaluation.grid import (
    Configs,
    Floats,
    Measure,
    read_comparable,
    read_configs,
    read_measure,
)
from sharpkit.evaluation.intervals import (
    no_interval,
    observed_and_resampled,
    resample_weights,
    student_quantile,
)
from sharpkit.evaluation.number_of_draws import Sampling
from sharpkit.evaluation.rating import rate
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.statistics import TABLE

if TYPE_CHECKING:
    import pandas as pd


@readable(
    lambda i: (
        f"{i.statistic} {i.value:.4g}, {_ends(i)}, {i.models} models"
        f"{'' if i.p_value is None else f', p = {i.p_value:.2g}'}"
    ),
    brief=True,
)
@dataclass(frozen=True)
class Interval:
    """A statistic of one measure with its bootstrap interval.

    Attributes:
        statistic: Its name.
        value: On the models as they are.
        low: Lower end; NaN, as the upper one, where `note` says why there is no interval.
        high: Upper end.
        std_error: Standard deviation over resamples.
        confidence: Nominal coverage.
        resamples: How many were drawn.
        models: How many models were compared.
        p_value: Of the permutation test with which the interval agrees; None if there is no test.
        note: Why there is no interval; empty where there is one.
    """

    statistic: str
    value: float
    low: float
    high: float
    std_error: float
    confidence: float
    resamples: int
    models: int
    p_value: float | None = None
    note: str = ""

    def frame(self) -> pd.DataFrame:
        """One row, with the attributes as columns."""
        return one_row(self)


@readable(
    lambda c: (
        f"{c.statistic} {c.first:.4g} and {c.second:.4g}, difference {c.difference:.4g}, "
        f"{_ends(c)}, p = {c.p_value:.2g}, {c.models} models"
    ),
    brief=True,
)
@dataclass(frozen=True)
class Comparison:
    """A statistic of two measures on the same models, and the difference first − second.

    Attributes:
        statistic: Its name.
        first: Of the first measure.
        second: Of the second measure.
        difference: first − second.
        low: Lower end of the interval of the difference; NaN, with the upper end and the p-value,
            where `note` says why there is no comparison.
        high: Upper end of it.
        p_value: Two-sided, for no difference.
        confidence: Nominal coverage.
        resamples: How many were drawn.
        models: Models for which both measures have a value.
        note: Why there is no comparison; empty where there is one.
    """

    statistic: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    confidence: float
    resamples: int
    models: int
    note: str = ""

    def frame(self) -> pd.DataFrame:
        """One row, with the attributes as columns."""
        return one_row(self)


def _ends(found: Interval | Comparison) -> str:
    """The interval in words, or why there is none."""
    interval = f"{100 * found.confidence:g} % interval {found.low:.4g} to {found.high:.4g}"
    return found.note or interval


def bootstrap_interval(
    measure: Measure,
    configs: Configs,
    *,
    statistic: str = "kendall_tau",
    resamples: int = 1000,
    confidence: float = 0.95,
    direction: int | None = 1,
    seed: int = 0,
) -> Interval:
    """Confidence interval of a statistic, by resampling the models with replacement.

    On a scale where its spread depends little on its value (Fisher's z for correlations, the square
    root of a mutual information, log(1 − R²)), value ± t s √(n / (n − 2)): s the standard deviation
    of resamples, t Student's quantile for n − 2 degrees of freedom. Copies of a model are not
    compared with each other, which would count as ties; a cell that a resample leaves empty is not
    averaged.

    What it is an interval for: a correlation's or mean sign-error's value among all models that
    could have been in the zoo; for a mutual information, held-out R² and the worst sign-errors,
    which depend on the number of models, the mean over zoos of this size and design. (A mutual
    information's upper end is raised by the 95th percentile of its null, and R²'s by the mean of
    shuffles, because a value may lie that far below its mean.) The documentation's page on
    uncertainty has the coverage of each in simulations.

    The interval never contradicts the p-value of `permutation_p_value` (for a mutual information,
    of `cmi_null`): it excludes what a measure without relation to the gap has, on either side,
    exactly if the one-sided p-value there is at most half of 1 − confidence.

    Where there is no honest interval the ends are NaN and `note` says why: "fewer than 12 models";
    "few pairs", for the worst sign-errors if an environment has fewer than ten pairs, effectively;
    "empty cells" of a conditioning set; "all resamples agree", where nothing shows the spread.

    Args:
        measure: Mapping or Series of model id -> value; models without one are left out.
        configs: A `Task`, or the content of a `model_configs.json`.
        statistic: One of `STATISTICS`.
        resamples: How many.
        confidence: Nominal coverage, between 0 and 1.
        direction: 1 if a large value should mean a large gap, -1 if a small one should (sign-errors
            count accordingly, and p-values look there), None if neither is expected.
        seed: Determines the resamples.

    Returns:
        Interval: The value, its ends and the standard error.

    Raises:
        ScoreError: If fewer than three models can be compared, or the input is unusable.
        ArgumentError: If an argument is outside its range.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 12.

    Example:
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 1 + k % 2} for k in range(20)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(20)}
        >>> configs = model_configs(settings, metrics)
        >>> values = {k: (k * 7) % 20 + 2 * k for k in range(20)}
        >>> interval = bootstrap_interval(values, configs, seed=0)
        >>> interval.low < interval.value < interval.high
        True
    """
    check_resampling(resamples, confidence, statistic)
    check_direction(direction, statistic)
    values, grid = read_comparable(measure, configs, least=LEAST)
    sampling = Sampling(resamples, 10 * resamples, confidence, seed)
    found = rate(values[:, None], grid, [statistic], sampling, [direction], Environments())
    rating = found[statistic]
    value, low, high, error, p_value = (
        float(part[0])
        for part in (rating.value, rating.low, rating.high, rating.std_error, rating.p_value)
    )
    numbers, note = (value, low, high, error if np.isfinite(value) else np.nan), rating.notes[0]
    return Interval(statistic, *numbers, confidence, resamples, len(grid), p_value, note)


def compare_measures(
    first: Measure,
    second: Measure,
    configs: Configs,
    *,
    statistic: str = "kendall_tau",
    resamples: int = 1000,
    confidence: float = 0.95,
    directions: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Comparison:
    """Is one measure better than another on the same zoo?

    Both see the same resamples of the models for which both have a value, so what the
    zoo does to both cancels. The interval is difference ± t s √(n / (n − 2)), with s the standard
    deviation of the resampled differences and t Student's quantile for n − 2 degrees of freedom,
    and the p-value is of the same distribution: it is below 1 − confidence exactly where the
    interval excludes zero. There is none where `bootstrap_interval` gives none.

    Args:
        first: Mapping or Series of model id -> value.
        second: Another one.
        configs: A `Task`, or the content of a `model_configs.json`.
        statistic: One of `STATISTICS`.
        resamples: How many.
        confidence: Nominal coverage, between 0 and 1.
        directions: 1 for a measure whose large values should mean a large gap, -1 for one whose
            small values should: its sign is changed, except for a mutual information, which does
            not ask for the direction.
        seed: Determines the resamples.

    Returns:
        Comparison: Both values, the difference first − second, its interval and p-value.

    Raises:
        ScoreError: If fewer than three models have both values, or the input is unusable.
        ArgumentError: If an argument is outside its range.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 15 and 16.

    Example:
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 1 + k % 2} for k in range(20)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(20)}
        >>> configs = model_configs(settings, metrics)
        >>> good, bad = {k: k for k in range(20)}, {k: (k * 7) % 20 for k in range(20)}
        >>> compare_measures(good, bad, configs).p_value < 0.05
        True
    """
    check_resampling(resamples, confidence, statistic)
    for direction in directions:
        check_direction(direction)
        if direction is None:
            raise ArgumentError("a comparison needs a direction of either measure, got None")
    grid = read_configs(configs)
    columns = np.stack([read_measure(m, grid)[0] for m in (first, second)], axis=1)
    usable = ~np.isnan(columns).any(1) & ~np.isnan(grid.gap)
    if usable.sum() < LEAST:
        raise ScoreError(f"{int(usable.sum())} models have both values; expected at least {LEAST}")
    columns, grid = columns[usable], grid.take(usable)
    if TABLE[statistic].directed:
        columns = columns * np.array(directions)
    weights = resample_weights(len(grid), resamples, seed)
    value, draws = observed_and_resampled(columns, grid, weights, (statistic,))[statistic]
    numbers = float(value[0]), float(value[1]), float(value[0] - value[1])
    changes, n = draws[:, 0] - draws[:, 1], len(grid)
    note = no_interval(statistic, grid, Environments())
    low, high, p_value, note = difference_interval(numbers[2], changes, confidence, n, note)
    return Comparison(statistic, *numbers, low, high, p_value, confidence, resamples, n, note)


def difference_interval(
    difference: float, changes: Floats, confidence: float, models: int, note: str
) -> tuple[float, float, float, str]:
    """Ends, two-sided p-value and note of a difference with resampled changes (resamples,)."""
    from scipy.special import stdtr

    nan = float("nan")
    known = changes[np.isfinite(changes)]
    if not np.isfinite(difference):
        note = "no value"
    elif not note and len(known) < max(2, 0.9 * len(changes)):
        note = "no value in many resamples"
    if note:
        return nan, nan, nan, note
    error = float(known.std(ddof=1)) * np.sqrt(models / (models - 2))
    if error < 1e-12:
        same = abs(difference) < 1e-12
        return (0.0, 0.0, 1.0, "") if same else (nan, nan, nan, "all resamples agree")
    half = student_quantile(confidence, models) * float(known.std(ddof=1))
    p_value = float(2 * stdtr(models - 2, -abs(difference) / error))
    return difference - half, difference + half, p_value, ""
