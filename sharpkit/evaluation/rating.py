"""Every statistic of a zoo's measures, with intervals that agree with the p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sharpkit.evaluation.arguments import by_direction
from sharpkit.evaluation.grid import Floats, Grid
from sharpkit.evaluation.intervals import (
    agree,
    interval_ends,
    no_interval,
    observed_and_resampled,
    resample_weights,
    spread_of,
)
from sharpkit.evaluation.null import CMINull, cmi_nulls
from sharpkit.evaluation.number_of_draws import Sampling
from sharpkit.evaluation.permutation import p_values, sided_p_values
from sharpkit.evaluation.shuffled_statistics import chance_statistics
from sharpkit.evaluation.shuffles import random_orders
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.statistics import TABLE


@dataclass(frozen=True)
class Rating:
    """A statistic of several measures: each array has one entry per measure."""

    value: Floats  # on the models as they are
    low: Floats  # lower ends, NaN where there is no interval
    high: Floats  # upper ends
    std_error: Floats  # standard deviations over resamples
    p_value: Floats  # in the expected direction; of a CMI, that of its null
    notes: list[str]  # why there is no interval; empty where there is one
    nulls: list[CMINull] = field(default_factory=list)  # of a CMI


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
    among_all = np.zeros(len(grid), dtype=np.int64)
    orders = random_orders(among_all, sampling.permutations, sampling.seed)
    nulls: Mapping[str, list[CMINull]] = {}
    if any(TABLE[name].definition for name in statistics):
        nulls = cmi_nulls(values, grid, sampling.resamples, sampling.seed)
    found: dict[str, Rating] = {}
    for names, turned, known in by_direction(values, directions, statistics):
        resampled = observed_and_resampled(turned, grid, weights, names, environments=environments)
        shuffled = [name for name in names if not TABLE[name].definition]
        chance = chance_statistics(turned, grid, orders, shuffled, environments, among_all=True)
        for name in names:
            value, draws = resampled[name]
            drawn = np.where(known, value, np.nan), draws
            if definition := TABLE[name].definition:
                found[name] = _of_information(name, drawn, nulls[definition], len(grid), sampling)
            else:
                note = no_interval(name, grid, environments)
                found[name] = _of(name, drawn, chance[name], len(grid), sampling, directions, note)
    return {name: found[name] for name in statistics}


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
    floor = np.abs(mean) if TABLE[name].below_its_mean else 0.0
    ends = interval_ends(name, value, draws, sampling.confidence, models, floor)
    above, below = p_values(observed, chance), p_values(-observed, -chance)
    low, high = agree(ends, no_relation, above, below, sampling.confidence)
    if note:
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    p_value = sided_p_values(name, observed, chance, directions)
    return Rating(value, low, high, spread_of(draws), p_value, _notes(value, low, draws, note))


def _of_information(
    name: str, drawn: tuple[Floats, Floats], nulls: list[CMINull], models: int, sampling: Sampling
) -> Rating:
    """A conditional mutual information, whose null keeps what the hyperparameters explain."""
    value, draws = drawn
    mean = np.array([null.mean for null in nulls])
    p_value = np.array([null.p_value for null in nulls])
    # a value may lie below its mean by as much as chance adds to another
    floor = np.nan_to_num([null.percentile_95 for null in nulls])
    ends = interval_ends(name, value, draws, sampling.confidence, models, floor)
    # only values above the null tell anything, so the upper end never excludes it
    low, high = agree(ends, mean, p_value, np.ones_like(p_value), sampling.confidence)
    low, high = (np.where(np.isfinite(mean), end, np.nan) for end in (low, high))
    notes = [
        null.note or note for null, note in zip(nulls, _notes(value, low, draws, ""), strict=True)
    ]
    return Rating(value, low, high, spread_of(draws), p_value, notes, nulls)


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
