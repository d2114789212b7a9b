"""Intervals from resamples: their ends, and where there are none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sharpkit.evaluation.arguments import LEAST_CERTAIN
from sharpkit.evaluation.compared_pairs import Compared, Pairs
from sharpkit.evaluation.grid import Floats, Grid, Ints
from sharpkit.evaluation.null import no_value
from sharpkit.evaluation.resampled_statistics import weighted_statistics
from sharpkit.evaluation.shuffled_information import pgdl_defined
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.statistics import TABLE

_APART = 1e-9  # between an end and the value that it excludes: below every digit that is shown
_LEAST_PAIRS = 10.0  # that an environment needs for an interval of the worst one


def interval_ends(
    statistic: str,
    value: Floats,
    draws: Floats,
    confidence: float,
    models: int,
    floor: Floats | float = 0.0,
) -> tuple[Floats, Floats]:
    """Ends (measures,) of the intervals of values (measures,) from draws (resamples, measures).

    On the statistic's `Scale`, value ± t s √(n / (n − 2)), with s the standard deviation of the
    draws and t Student's quantile at n − 2 degrees of freedom; `floor` is added to the upper end.
    NaN for fewer than twelve models, if more than a tenth of the draws have no value, or all
    draws agree.
    """
    described = TABLE[statistic]
    usable = np.isfinite(value) & (np.isfinite(draws).mean(0) >= 0.9)
    if models < LEAST_CERTAIN or len(draws) < 2:
        usable = np.zeros_like(usable)
    spread = spread_of(described.scale.forward(np.where(usable, draws, 0.0)))
    usable = usable & (spread > 1e-12)
    half = student_quantile(confidence, models) * spread
    middle = described.scale.forward(np.where(usable, value, 0.0))
    low, high = described.scale.back(middle - half), described.scale.back(middle + half) + floor
    ends = np.clip([low, high], described.low, described.high)
    first, second = np.where(usable, ends, np.nan)
    return first, second


def student_quantile(confidence: float, models: int) -> float:
    """Standard errors on each side of a value: Student's quantile and the correction of s."""
    from scipy.special import stdtrit

    freedom = max(models - 2, 1)
    return float(stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(models / freedom))


def agree(
    ends: tuple[Floats, Floats],
    no_relation: Floats,
    above: Floats,
    below: Floats,
    confidence: float,
) -> tuple[Floats, Floats]:
    """Ends that exclude `no_relation` (measures,) exactly on the side that a test shows.

    Args:
        ends: Lower and upper (measures,).
        no_relation: What a measure without relation to the gap has.
        above: One-sided p-values for a larger value.
        below: One-sided p-values for a smaller value.
        confidence: Of the intervals.
    """
    low, high = ends
    tail = (1 - confidence) / 2 * (1 + 1e-12)
    just_above = np.where(low <= no_relation, no_relation + _APART, low)
    just_below = np.where(high >= no_relation, no_relation - _APART, high)
    low = np.where(above <= tail, just_above, np.minimum(low, no_relation))
    high = np.where(below <= tail, just_below, np.maximum(high, no_relation))
    return low, high


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
        drawn_together=True,
    )
    return {name: (rows[0], rows[1:]) for name, rows in found.items()}


def fewest_pairs(pairs: Pairs | None, models: int) -> float:
    """Effective number of pairs of the smallest environment.

    With d_i the pairs of model i, (Σ d)² / (2 Σ d²): the number of pairs if no model is in two,
    less where few models are in most of them.
    """
    if pairs is None:
        return 0.0
    ends = [*pairs.starts[1:].tolist(), len(pairs.first)]
    effective = []
    for start, end in zip(pairs.starts.tolist(), ends, strict=True):
        both = np.concatenate([pairs.first[start:end], pairs.second[start:end]])
        degree = np.bincount(both, minlength=models).astype(np.float64)
        effective.append(degree.sum() ** 2 / (2 * (degree**2).sum()))
    return float(min(effective))


def no_interval(
    statistic: str, grid: Grid, environments: Environments, hyperparameter: int | None = None
) -> str:
    """Why a statistic has no interval in this zoo, whatever the measure; empty if it may have."""
    if len(grid) < LEAST_CERTAIN:
        return f"fewer than {LEAST_CERTAIN} models"
    if TABLE[statistic].definition == "pgdl" and not pgdl_defined(grid.conditioned):
        return no_value("pgdl", grid)
    if TABLE[statistic].worst_case:
        columns = grid.varying() if hyperparameter is None else [hyperparameter]
        pairs = Compared(grid, columns, environments).changes
        if fewest_pairs(pairs, len(grid)) < _LEAST_PAIRS:
            return "few pairs"
    return ""


def spread_of(draws: Floats) -> Floats:
    """Standard deviation over resamples (measures,), NaN for fewer than two with a value."""
    known = np.isfinite(draws)
    count = known.sum(0)
    kept = np.where(known, draws, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = np.where(known, kept - kept.sum(0) / count, 0.0)
        spread: Floats = np.sqrt((centred**2).sum(0) / (count - 1))
    return np.where(count > 1, spread, np.nan)
