"""What a statistic is once its sums over the models of each resample are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from sharpkit.evaluation.compared_pairs import Pairs, Plan
from sharpkit.evaluation.grid import Floats, Ints, Weights
from sharpkit.evaluation.pair_counts import INSIDE_LOG
from sharpkit.evaluation.resampled_information import Cells, information, ratio


class Weighted(Protocol):
    """Weights of the models (batch, models) and their sums (batch,)."""

    @property
    def weights(self) -> Weights:
        """Of the models (batch, models)."""

    @property
    def total(self) -> Floats:
        """Sums of the weights (batch,)."""


def both_scores(
    cells: Sequence[Cells], counted: Iterable[tuple[Floats, Floats]], plan: Plan
) -> tuple[Floats, Floats]:
    """Mutual information by both definitions (batch,).

    Args:
        cells: Of each conditioning set.
        counted: Of each, weights of the pairs with the larger value, and with the larger value and
            gap (batch, groups, groups).
        plan: Which sets each definition has.
    """
    batch = len(cells[0].different)
    pgdl, jiang = ([np.full(batch, np.inf)] for _ in range(2))
    for k, (own, (larger, both)) in enumerate(zip(cells, counted, strict=True)):
        if k in plan.pgdl:
            total = own.different + own.itself
            shared, entropy = information(total, own.larger_gap, larger, both, INSIDE_LOG)
            filled = (total > 0) & plan.pgdl[k]
            scale = filled / np.maximum(total, 1)  # the mean over filled cells, up to a constant
            pgdl.append(ratio(shared * scale, entropy * scale))
        if k in plan.jiang:
            jiang.append(ratio(*information(own.different, own.larger_gap, larger, both, 0.0)))
    scores = (np.fmin.reduce(scores) for scores in (pgdl, jiang))
    first, second = (np.where(np.isinf(score), np.nan, score) for score in scores)
    return first, second


def mean_of_settings(agreements: Iterable[tuple[Floats, Floats]], batch: int) -> Floats:
    """Granulated Kendall (batch,): mean over hyperparameters of the mean tau over settings.

    Args:
        agreements: Of each hyperparameter, concordant less discordant weight and weight of the
            pairs of each setting (batch, settings).
        batch: How many weightings.
    """
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


def drawn_together(errors: Floats, loss: Floats, pairs: Pairs, models: int) -> Floats:
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


def correlation(x: Floats, y: Floats, batch: Weighted) -> Floats:
    """Weighted linear correlation (batch,) of values (batch or 1, models)."""
    share = batch.weights / batch.total[:, None]
    with np.errstate(invalid="ignore"):  # infinite values have no correlation: NaN
        x = x - (share * x).sum(1, keepdims=True)
        y = y - (share * y).sum(1, keepdims=True)
        scale = np.sqrt((share * x * x).sum(1) * (share * y * y).sum(1))
        return divide((share * x * y).sum(1), scale)


def r_squared_draws(x: Floats, y: Floats, batch: Weighted) -> Floats:
    """Of an affine fit, each model predicted from the others: its copies left out with it."""
    if not np.isfinite(x).all() or (x == x[0]).all():
        return np.full(len(batch.weights), np.nan)
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
