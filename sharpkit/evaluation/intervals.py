"""Intervals of every statistic: resampled, and in agreement with the p-value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sharpkit.evaluation.arguments import LEAST_CERTAIN
from sharpkit.evaluation.compared_pairs import Pairs, changed_pairs
from sharpkit.evaluation.grid import Floats, Grid, Ints
from sharpkit.evaluation.null import (
    EMPTY_CELLS,
    TOO_FEW_HYPERPARAMETERS,
    ScoreNull,
    nulls_of_scores,
)
from sharpkit.evaluation.number_of_draws import Sampling
from sharpkit.evaluation.permutation import p_values, sided_p_values
from sharpkit.evaluation.resampled_statistics import weighted_statistics
from sharpkit.evaluation.shuffled_information import pgdl_defined
from sharpkit.evaluation.shuffled_statistics import shuffles, unrestricted_chance
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.statistics import SIGN_ERRORS, TABLE

_LEAST_PAIRS = 10.0  # that an environment needs for an interval of the worst one


@dataclass(frozen=True)
class Rating:
    """A statistic of several measures: each array has one entry per measure.

    Attributes:
        value: On the models as they are.
        low: Lower ends, NaN where there is no interval.
        high: Upper ends.
        std_error: Standard deviations over resamples.
        p_value: In the expected direction; of a CMI, that of its null.
        notes: Why there is no interval; empty where there is one.
        nulls: Of a CMI.
    """

    value: Floats
    low: Floats
    high: Floats
    std_error: Floats
    p_value: Floats
    notes: list[str]
    nulls: list[ScoreNull] = field(default_factory=list)


def rate(
    values: Floats,
    grid: Grid,
    statistics: Sequence[str],
    sampling: Sampling,
    directions: Sequence[int | None],
    environments: Environments,
) -> dict[str, Rating]:
    """Statistics of measures (models, measures) with intervals and p-values.

    A statistic's permutation test decides on which side of "no relation" its interval may lie: the
    interval excludes that value on one side exactly if the one-sided p-value there is at most half
    of 1 − confidence. Sign-errors are those of the directed measures, NaN without a direction.
    """
    weights = resample_weights(len(grid), sampling.resamples, sampling.seed)
    orders = shuffles(np.zeros(len(grid), dtype=np.int64), sampling.permutations, sampling.seed)
    signs = np.array([np.nan if d is None else d for d in directions])
    nulls: Mapping[str, list[ScoreNull]] = {}
    if any(TABLE[name].conditioning_set for name in statistics):
        nulls = nulls_of_scores(values, grid, sampling.resamples, sampling.seed)
    found: dict[str, Rating] = {}
    for of_errors in (False, True):
        names = [name for name in statistics if (name in SIGN_ERRORS) is of_errors]
        if not names:
            continue
        known = np.isfinite(signs) if of_errors else np.ones(len(signs), dtype=np.bool_)
        directed = np.where(known, signs, 1.0) * values if of_errors else values
        scored = observed_and_resampled(directed, grid, weights, names, environments=environments)
        shuffled = [name for name in names if not TABLE[name].conditioning_set]
        chance = unrestricted_chance(directed, grid, orders, shuffled, environments)
        for name in names:
            value, draws = scored[name]
            drawn = np.where(known, value, np.nan), draws
            if TABLE[name].conditioning_set:
                of_definition = nulls[name.removeprefix("cmi_")]
                rating = _of_score(name, drawn, of_definition, len(grid), sampling)
            else:
                note = no_interval(name, grid, environments)
                rating = _of(name, drawn, chance[name], len(grid), sampling, directions, note)
            found[name] = rating
    return {name: found[name] for name in statistics}


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
    spread = _spread(described.scale.forward(np.where(usable, draws, 0.0)))
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
    just_above = np.maximum(low, np.nextafter(no_relation, np.inf))
    just_below = np.minimum(high, np.nextafter(no_relation, -np.inf))
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
    if statistic == "cmi_pgdl" and not pgdl_defined(grid):
        return EMPTY_CELLS if len(grid.names) > 1 else TOO_FEW_HYPERPARAMETERS
    if TABLE[statistic].worst_case:
        columns = grid.varying() if hyperparameter is None else [hyperparameter]
        pairs = changed_pairs(grid, columns, environments)
        if fewest_pairs(pairs, len(grid)) < _LEAST_PAIRS:
            return "few pairs"
    return ""


def _spread(draws: Floats) -> Floats:
    """Standard deviation over resamples (measures,), NaN for fewer than two with a value."""
    known = np.isfinite(draws)
    count = known.sum(0)
    kept = np.where(known, draws, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = np.where(known, kept - kept.sum(0) / count, 0.0)
        spread: Floats = np.sqrt((centred**2).sum(0) / (count - 1))
    return np.where(count > 1, spread, np.nan)


def _of(
    name: str,
    drawn: tuple[Floats, Floats],
    shuffled: tuple[Floats, Floats],
    models: int,
    sampling: Sampling,
    directions: Sequence[int | None],
    note: str,
) -> Rating:
    """A statistic whose null is that of shuffles among all models; `note` if it has no interval."""
    (value, draws), (observed, chance) = drawn, shuffled
    observed = np.where(np.isfinite(value), observed, np.nan)
    expected = TABLE[name].no_relation
    mean = chance.mean(0)
    no_relation = mean if expected is None else np.full(len(value), expected)
    # the plug-in's mean lies above its value by up to what it gives without a relation
    floor = np.abs(mean) if name == "r_squared" else 0.0
    ends = interval_ends(name, value, draws, sampling.confidence, models, floor)
    above, below = p_values(observed, chance), p_values(-observed, -chance)
    low, high = agree(ends, no_relation, above, below, sampling.confidence)
    if note:
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    p_value = sided_p_values(name, observed, chance, directions)
    return Rating(value, low, high, _spread(draws), p_value, _notes(value, low, draws, note))


def _of_score(
    name: str,
    drawn: tuple[Floats, Floats],
    nulls: list[ScoreNull],
    models: int,
    sampling: Sampling,
) -> Rating:
    """A conditional mutual information, whose null keeps what the hyperparameters explain."""
    value, draws = drawn
    mean = np.array([null.mean for null in nulls])
    p_value = np.array([null.p_value for null in nulls])
    # a score may lie below its mean by as much as chance adds to another
    floor = np.nan_to_num([null.percentile_95 for null in nulls])
    ends = interval_ends(name, value, draws, sampling.confidence, models, floor)
    # only scores above the null tell anything, so the upper end never excludes it
    low, high = agree(ends, mean, p_value, np.ones_like(p_value), sampling.confidence)
    low, high = (np.where(np.isfinite(mean), end, np.nan) for end in (low, high))
    notes = [
        null.note or note for null, note in zip(nulls, _notes(value, low, draws, ""), strict=True)
    ]
    return Rating(value, low, high, _spread(draws), p_value, notes, nulls)


def _notes(value: Floats, low: Floats, draws: Floats, of_zoo: str) -> list[str]:
    """Why a measure has no interval, empty where it has one."""
    notes = []
    for k in range(len(value)):
        if np.isfinite(low[k]):
            notes.append("")
        elif not np.isfinite(value[k]):
            notes.append("no value")
        elif of_zoo:
            notes.append(of_zoo)
        elif np.isfinite(draws[:, k]).mean() < 0.9:
            notes.append("no value in many resamples")
        else:
            notes.append("all resamples agree")
    return notes
