"""How certain a score is: bootstrap intervals, and the paired comparison of two measures.

Models are resampled, because another zoo would have other models. Everything is determined by the
seed, and all measures of a zoo see the same resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation._grid import (
    Configs,
    Floats,
    Grid,
    Ints,
    Measure,
    read_comparable,
    read_configs,
    read_measure,
)
from sharpkit.evaluation._weighted import RANGES, STATISTICS, weighted_statistics
from sharpkit.evaluation.robustness import Environments

METHODS = ("recentred", "percentile", "debiased")
LEAST = 3  # models that a statistic needs


@dataclass(frozen=True)
class Interval:
    """A statistic of one measure with its bootstrap interval.

    Attributes:
        statistic: Its name.
        value: On the models as they are.
        low: Lower end.
        high: Upper end.
        std_error: Standard deviation over resamples.
        confidence: Nominal coverage.
        resamples: How many were drawn.
        models: How many models were compared.
    """

    statistic: str
    value: float
    low: float
    high: float
    std_error: float
    confidence: float
    resamples: int
    models: int


@dataclass(frozen=True)
class Comparison:
    """A statistic of two measures on the same models, and the difference first − second.

    Attributes:
        statistic: Its name.
        first: Of the first measure.
        second: Of the second measure.
        difference: first − second.
        low: Lower end of the interval of the difference.
        high: Upper end of it.
        p_value: Two-sided, for no difference.
        confidence: Nominal coverage.
        resamples: How many were drawn.
        models: Models for which both measures have a value.
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


def bootstrap_interval(
    measure: Measure,
    configs: Configs,
    *,
    statistic: str = "kendall_tau",
    resamples: int = 1000,
    confidence: float = 0.95,
    method: str = "recentred",
    seed: int = 0,
) -> Interval:
    """Confidence interval of a statistic, by resampling the models with replacement.

    Copies of a model are not compared with each other, which would count as ties; a cell that a
    resample leaves empty is not averaged.

    Which method: correlations are hardly biased, and all three agree. A conditional mutual
    information is biased upwards, the more the smaller the zoo, and its minimum over conditioning
    sets is biased once more; a resample repeats the bias, so its scores lie above the zoo's own.
    `recentred` (default) takes the quantiles of the resampled scores, moved so that their mean is
    the observed score: an interval for the score that zoos of this size have on average.
    `debiased` moves them by the same distance again: an interval for the score of an infinitely
    large zoo, which need not contain the observed score. `percentile` does not move them.

    Coverage of 95 % intervals in simulations (300 zoos each of 48 or 96 models, complete or random
    grids, weak to strong measures): correlations 92 to 98 % on random grids, 95 to 99.7 % on
    complete ones, where resampling varies the settings more than a new zoo would; held-out R²
    96 to 98 %. A resample counts what is particular to one pair of models three times, so the
    sign-errors are drawn together by the ratio of both variances: their mean covers 91 to 95 %,
    the 90th percentile 89 to 97 % (strong measures, random grids: up to 100 %), the maximum 95 to
    99 % where environments have dozens of pairs. With about ten pairs per environment the maximum
    covers only 62 to 98 %: an environment whose pairs are all ordered wrongly is so in every
    resample. CMI, recentred: 92 to 98 % at 96 models, 97 to 99.7 % at 48, of the mean score at
    that size, but only 81 to 98 % of the infinite zoo's; debiased: 87 to 96 % of the latter. For a
    useless measure, whose CMI lies at the edge 0, intervals are wide and nearly always cover. (BCa
    covered the infinite zoo's score in 62 to 94 % of cases, so it is not offered.)

    Args:
        measure: Mapping or Series of model id -> value; models without one are left out.
        configs: A `Task`, or the content of a `model_configs.json`.
        statistic: One of `STATISTICS`.
        resamples: How many.
        confidence: Nominal coverage, between 0 and 1.
        method: "recentred", "percentile" or "debiased".
        seed: Determines the resamples.

    Returns:
        Interval: The value, its ends and the standard error.

    Raises:
        ScoreError: If fewer than three models can be compared, or the input is unusable.
        ArgumentError: If an argument is outside its range.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 10, 12 and 13.

    Example:
        >>> configs = {
        ...     f"{k}": {
        ...         "hparams": {"width": {"possible_values": [1, 2], "current_value": 1 + k % 2}},
        ...         "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k},
        ...     }
        ...     for k in range(20)
        ... }
        >>> values = {k: (k * 7) % 20 + 2 * k for k in range(20)}
        >>> interval = bootstrap_interval(values, configs, seed=0)
        >>> interval.low < interval.value < interval.high
        True
    """
    check_resampling(resamples, confidence, statistic, method)
    values, grid = read_comparable(measure, configs, least=LEAST)
    weights = resample_weights(len(grid), resamples, seed)
    value, draws = observed_and_resampled(values[:, None], grid, weights, (statistic,))[statistic]
    low, high = interval_ends(value, draws, confidence, method, RANGES[statistic])
    error = float(np.nanstd(draws[:, 0], ddof=1)) if np.isfinite(value[0]) else float("nan")
    return Interval(
        statistic,
        float(value[0]),
        float(low[0]),
        float(high[0]),
        error,
        confidence,
        resamples,
        len(grid),
    )


def compare_measures(
    first: Measure,
    second: Measure,
    configs: Configs,
    *,
    statistic: str = "kendall_tau",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Is one measure better than another on the same zoo?

    Both are scored on the same resamples of the models for which both have a value, so what the
    zoo does to both cancels. The interval is the recentred one of `bootstrap_interval`, and the
    p-value is twice the smaller tail beyond zero of the same distribution: p < 1 − confidence
    where the interval excludes zero.

    Args:
        first: Mapping or Series of model id -> value.
        second: Another one.
        configs: A `Task`, or the content of a `model_configs.json`.
        statistic: One of `STATISTICS`.
        resamples: How many.
        confidence: Nominal coverage, between 0 and 1.
        seed: Determines the resamples.

    Returns:
        Comparison: Both scores, the difference first − second, its interval and p-value.

    Raises:
        ScoreError: If fewer than three models have both values, or the input is unusable.
        ArgumentError: If an argument is outside its range.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 15 and 16.

    Example:
        >>> configs = {
        ...     f"{k}": {
        ...         "hparams": {"width": {"possible_values": [1, 2], "current_value": 1 + k % 2}},
        ...         "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k},
        ...     }
        ...     for k in range(20)
        ... }
        >>> good, bad = {k: k for k in range(20)}, {k: (k * 7) % 20 for k in range(20)}
        >>> compare_measures(good, bad, configs).p_value < 0.05
        True
    """
    check_resampling(resamples, confidence, statistic)
    grid = read_configs(configs)
    columns = np.stack([read_measure(m, grid)[0] for m in (first, second)], axis=1)
    usable = ~np.isnan(columns).any(1) & ~np.isnan(grid.gap)
    if usable.sum() < LEAST:
        raise ScoreError(f"{int(usable.sum())} models have both values; expected at least {LEAST}")
    columns, grid = columns[usable], grid.take(usable)
    weights = resample_weights(len(grid), resamples, seed)
    value, draws = observed_and_resampled(columns, grid, weights, (statistic,))[statistic]
    difference = value[:1] - value[1:]
    changes = draws[:, :1] - draws[:, 1:]
    low, high = interval_ends(difference, changes, confidence, "recentred", (-np.inf, np.inf))
    return Comparison(
        statistic,
        float(value[0]),
        float(value[1]),
        float(difference[0]),
        float(low[0]),
        float(high[0]),
        _two_sided(float(difference[0]), changes[:, 0]),
        confidence,
        resamples,
        len(grid),
    )


def resample_weights(models: int, resamples: int, seed: int) -> Ints:
    """How often each model is drawn in each resample (resamples, models)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(models, np.full(models, 1 / models), size=resamples)


def observed_and_resampled(
    values: Floats,
    grid: Grid,
    weights: Ints,
    statistics: Sequence[str],
    *,
    environments: Environments | None = None,
    hyperparameter: int | None = None,
) -> dict[str, tuple[Floats, Floats]]:
    """Statistics of measures (models, measures) as they are (measures,) and resampled."""
    everything = np.concatenate([np.ones((1, len(grid)), dtype=np.int64), weights])
    found = weighted_statistics(
        values,
        grid,
        everything,
        statistics,
        environments=environments,
        hyperparameter=hyperparameter,
        as_new_zoos=True,
    )
    return {name: (rows[0], rows[1:]) for name, rows in found.items()}


def interval_ends(
    value: Floats,
    draws: Floats,
    confidence: float,
    method: str,
    bounds: tuple[float, float],
) -> tuple[Floats, Floats]:
    """Ends (measures,) of the intervals of values (measures,) from draws (resamples, measures).

    Draws without a value are ignored; the ends are NaN if more than a tenth have none.
    """
    tail = (1 - confidence) / 2
    usable = np.isfinite(value) & (np.isfinite(draws).mean(0) >= 0.9)
    kept = np.where(usable, draws, 0.0)
    bias = np.nanmean(kept, axis=0) - value
    moved = {"percentile": 0.0, "recentred": 1.0, "debiased": 2.0}[method] * bias
    ends = np.nanquantile(kept, [tail, 1 - tail], axis=0) - moved
    low, high = np.where(usable, np.clip(ends, *bounds), np.nan)
    return low, high


def _two_sided(difference: float, draws: Floats) -> float:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(difference) or len(draws) == 0:
        return float("nan")
    centred = draws - draws.mean() + difference
    smaller = min((centred <= 0).sum(), (centred >= 0).sum())
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(draws))))


def check_resampling(
    count: int,
    confidence: float = 0.95,
    statistic: str = "kendall_tau",
    method: str = "recentred",
) -> None:
    """Raise ArgumentError for an unknown statistic or method, or a number outside its range."""
    if count < 1:
        raise ArgumentError(f"{count} resamples or permutations: expected at least 1")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence = {confidence}: expected a number between 0 and 1")
    if statistic not in STATISTICS:
        raise ArgumentError(
            f"unknown statistic {statistic!r}: expected one of {', '.join(STATISTICS)}"
        )
    if method not in METHODS:
        raise ArgumentError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
