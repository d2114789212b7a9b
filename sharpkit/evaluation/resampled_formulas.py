"""What each statistic is, once the sums over models and pairs of each resample are known.

A statistic is a function of the draws, which does once what no measure changes, and gives the
function of a measure. The sums come from all pairs of models or, of many models, from sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sharpkit.evaluation.compared_pairs import Compared, ConditioningSets, Pairs
from sharpkit.evaluation.grid import Floats, Ints, Weights
from sharpkit.evaluation.pair_counts import INSIDE_LOG
from sharpkit.evaluation.resampled_by_pairs import AllPairs, PairBits
from sharpkit.evaluation.resampled_by_sorting import RankedModels, SortedModels
from sharpkit.evaluation.resampled_information import Cells, information, ratio

# sums over all pairs of models, or of many models those that sorting gives: the same methods
Counting: TypeAlias = AllPairs | SortedModels
Sums: TypeAlias = PairBits | RankedModels


@dataclass(frozen=True)
class Draws:
    """A batch of weightings of the models."""

    compared: Compared
    counting: Counting
    weights: Weights  # (batch, models)
    total: Floats  # (batch,)
    pairs: Floats  # (batch,): pairs of different models

    @classmethod
    def of(cls, compared: Compared, counting: Counting, weights: Ints) -> Draws:
        """From whole numbers (batch, models)."""
        w = counting.weights(weights)
        total = w.sum(1, dtype=np.float64)
        return cls(compared, counting, w, total, total**2 - (w * w).sum(1, dtype=np.float64))

    @property
    def nothing(self) -> Floats:
        """NaN for each weighting (batch,)."""
        return np.full(len(self.weights), np.nan)


OfMeasure: TypeAlias = Callable[[Sums], tuple[Floats, ...]]


def mutual_information(draws: Draws) -> OfMeasure:
    """Conditional mutual information by the definitions `pgdl` and `jiang`; see `cmi`."""
    cells = draws.counting.cells(draws.weights)
    sets = draws.compared.conditioning_sets

    def of_measure(measure: Sums) -> tuple[Floats, ...]:
        counted = measure.counts(draws.weights, cells)
        return _both_definitions(cells, counted, sets, len(draws.weights))

    return of_measure


def kendall(draws: Draws) -> OfMeasure:
    """Kendall's tau-a and tau-b."""
    untied_gaps = draws.counting.gap.untied(draws.weights)

    def of_measure(measure: Sums) -> tuple[Floats, ...]:
        agreement, untied = measure.agreement(draws.weights), measure.untied(draws.weights)
        return divide(agreement, draws.pairs), divide(agreement, np.sqrt(untied * untied_gaps))

    return of_measure


def granulated_kendall(draws: Draws) -> OfMeasure:
    """Mean over hyperparameters of the mean tau over settings of the others."""
    found = [(p, draws.counting.of_pairs(p, draws.weights)) for p in draws.compared.coupled]

    def of_measure(measure: Sums) -> tuple[Floats, ...]:
        agreements = ((settings.sums(measure.signs(p)), settings.total) for p, settings in found)
        return (_mean_of_settings(agreements, len(draws.weights)),)

    return of_measure


def spearman(draws: Draws) -> OfMeasure:
    """Correlation of ranks."""
    gaps = draws.counting.gap.ranks(draws.weights)
    return lambda measure: (correlation(measure.ranks(draws.weights), gaps, draws),)


def pearson(draws: Draws) -> OfMeasure:
    """Linear correlation."""
    gaps = draws.compared.grid.gap[None]
    return lambda measure: (correlation(measure.values[None], gaps, draws),)


def r_squared(draws: Draws) -> OfMeasure:
    """Of an affine fit, each model predicted from the others: its copies left out with it."""
    return lambda measure: (_held_out(measure.values, draws.compared.grid.gap, draws),)


def sign_errors(draws: Draws) -> OfMeasure:
    """Mean, 90th percentile and maximum over the environments that a weighting has."""
    changes = draws.compared.changes
    if changes is None:
        return lambda measure: (draws.nothing,) * 3
    environments = draws.counting.of_pairs(changes, draws.weights)

    def of_measure(measure: Sums) -> tuple[Floats, ...]:
        loss = (1 - measure.signs(changes)) / 2
        errors = divide(environments.sums(loss), environments.total)
        if draws.compared.drawn_together:
            errors = drawn_together(errors, loss, changes, len(draws.compared.grid))
        return error_summaries(errors, environments.total)

    return of_measure


def _both_definitions(
    cells: Sequence[Cells],
    counted: Iterable[tuple[Floats, Floats]],
    sets: ConditioningSets,
    batch: int,
) -> tuple[Floats, Floats]:
    """Minimum over the sets of each definition (batch,), from the `counts` of a measure."""
    pgdl, jiang = ([np.full(batch, np.inf)] for _ in range(2))
    for k, (own, (larger, both)) in enumerate(zip(cells, counted, strict=True)):
        if k in sets.pgdl:
            total = own.different + own.itself
            shared, entropy = information(total, own.larger_gap, larger, both, INSIDE_LOG)
            filled = (total > 0) & sets.pgdl[k]
            scale = filled / np.maximum(total, 1)  # the mean over filled cells, up to a constant
            pgdl.append(ratio(shared * scale, entropy * scale))
        if k in sets.jiang:
            jiang.append(ratio(*information(own.different, own.larger_gap, larger, both, 0.0)))
    least = (np.fmin.reduce(ratios) for ratios in (pgdl, jiang))
    first, second = (np.where(np.isinf(value), np.nan, value) for value in least)
    return first, second


def _mean_of_settings(agreements: Iterable[tuple[Floats, Floats]], batch: int) -> Floats:
    """From the concordant less discordant weight of each setting, and its weight."""
    taus = []
    for agreement, setting in agreements:
        tau = np.divide(agreement, setting, out=np.zeros_like(setting), where=setting > 0)
        taus.append(divide(tau.sum(1), (setting > 0).sum(1)))
    if not taus:
        return np.full(batch, np.nan)
    found = ~np.isnan(taus)
    return divide(np.where(found, taus, 0.0).sum(0), found.sum(0))


def error_summaries(errors: Floats, total: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, 90th percentile and maximum (batch,) of errors (batch, environments).

    `total` is the weight of each environment (batch, environments); those without any are NaN.
    """
    errors = np.sort(errors, axis=1)  # NaN last
    counts = (total > 0).sum(1)
    mean = divide(np.nansum(errors, axis=1), counts)
    place = 0.9 * np.maximum(counts - 1, 0)
    below = np.floor(place).astype(np.int64)
    last = np.maximum(counts - 1, 0)
    rows = np.arange(len(errors))
    low, high = errors[rows, below], errors[rows, np.minimum(below + 1, last)]
    return mean, low + (place - below) * (high - low), errors[rows, last]


def drawn_together(errors: Floats, loss: Weights, pairs: Pairs, models: int) -> Floats:
    """Errors of environments (batch, groups), drawn together to the spread of a jackknife.

    A resample weighs a pair by w_i w_j, of variance 3: one from each model, one from both. So what
    is particular to a single pair counts three times, and in a new zoo once. With e_ij the terms of
    the mean error, each about its environment, a resample has the variance Σ_i (Σ_j e_ij)² + Σ e²,
    and new zoos Σ_i (Σ_j e_ij)² − Σ e² (Aronow, Samii and Assenova, Political Analysis 23(4),
    2015). The estimate of the latter is too small where environments have ten pairs (intervals
    cover 88 %), so the variance here is Σ_i (Σ_j e_ij)² alone, which errs on the large side as the
    jackknife's does.
    """
    weight = np.broadcast_to(pairs.weight, loss.shape)
    total = np.repeat(pairs.sums(weight[None])[0], pairs.members)
    share = np.divide(weight, total, out=np.zeros(len(loss)), where=total > 0)
    observed = pairs.sums((share * loss)[None])[0]
    terms = share * (loss - np.repeat(observed, pairs.members))
    of_models = np.bincount(pairs.first, terms, models) + np.bincount(pairs.second, terms, models)
    own, shared = (terms**2).sum(), (of_models**2).sum()
    if own == 0:
        return errors
    narrower = np.sqrt(shared / (shared + own))
    drawn: Floats = observed + narrower * (errors - observed)
    return drawn


def correlation(x: Floats, y: Floats, batch: Draws) -> Floats:
    """Weighted linear correlation (batch,) of values (batch or 1, models)."""
    share = batch.weights / batch.total[:, None]
    with np.errstate(invalid="ignore"):  # infinite values have no correlation: NaN
        x = x - (share * x).sum(1, keepdims=True)
        y = y - (share * y).sum(1, keepdims=True)
        scale = np.sqrt((share * x * x).sum(1) * (share * y * y).sum(1))
        return divide((share * x * y).sum(1), scale)


def _held_out(x: Floats, y: Floats, batch: Draws) -> Floats:
    if not np.isfinite(x).all() or (x == x[0]).all():
        return batch.nothing
    x = (x - x.mean()) / np.abs(x - x.mean()).max()  # the fit is the same in any units
    w = batch.weights.astype(np.float64)
    share = w / batch.total[:, None]
    dx = x - (share * x).sum(1, keepdims=True)
    dy = y - (share * y).sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = (w * dx * dx).sum(1, keepdims=True)
        slope = (w * dx * dy).sum(1, keepdims=True) / squares
        left = 1 - share - w * dx * dx / squares  # what a model leaves of the fit without it
        fitted = np.where(w > 0, (dy - slope * dx) / left, 0.0)
        constant = np.where(share < 1, dy / (1 - share), np.nan)
        lost = ((w > 0) & ~(left > 1e-9)).any(1)
        unexplained = (w * fitted**2).sum(1) / (w * constant**2).sum(1)
    return np.where(lost | ~np.isfinite(unexplained), np.nan, 1 - unexplained)


def divide(above: Floats, below: Floats | Ints) -> Floats:
    """The quotient, NaN where `below` is not positive."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)
