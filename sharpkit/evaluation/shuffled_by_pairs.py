"""What each statistic is of a measure whose values are dealt out in other orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sharpkit.evaluation.compared_pairs import Pairs
from sharpkit.evaluation.correlations import mean_ranks
from sharpkit.evaluation.grid import Floats, Ints, Weights
from sharpkit.evaluation.resampled_formulas import error_summaries
from sharpkit.evaluation.shuffled_by_sorting import shuffled_agreement
from sharpkit.evaluation.shuffled_information import ShuffledInformation
from sharpkit.evaluation.shuffles import Chance, Shuffles
from sharpkit.evaluation.sorted_pairs import MANY, dense_ranks
from sharpkit.evaluation.threads import in_threads

_SIGNS = 2_000_000  # of pairs held at a time


def mutual_information(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Conditional mutual information by the definitions `pgdl` and `jiang`; see `cmi`."""
    scored = ShuffledInformation.of(shuffles.compared.grid.conditioned)
    return one_by_one(lambda column, orders: scored(column[orders]), values, shuffles)


def kendall(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Kendall's tau-a and tau-b."""
    observed, shuffled = permuted_kendall(values, shuffles.gap, shuffles.orders)
    untied = np.sqrt(_untied(shuffles.gap[:, None]) * _untied(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (observed, shuffled), (observed / untied, shuffled / untied)


def spearman(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Correlation of ranks."""
    gaps = mean_ranks(shuffles.gap)
    return one_by_one(
        lambda column, orders: (_correlations(mean_ranks(column)[orders], gaps),), values, shuffles
    )


def pearson(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Linear correlation."""
    return one_by_one(
        lambda column, orders: (_correlations(column[orders], shuffles.gap),), values, shuffles
    )


def r_squared(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Of an affine fit, each model predicted from the others; see `r_squared`."""
    return one_by_one(
        lambda column, orders: (_held_out(column, shuffles.gap, orders),), values, shuffles
    )


def granulated_kendall(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Mean over hyperparameters of the mean tau over settings of the others."""
    coupled, gap = shuffles.compared.coupled, shuffles.gap

    def of_measure(column: Floats, orders: Ints) -> tuple[Floats, ...]:
        if not coupled:
            return (np.full(len(orders), np.nan),)
        taus = np.zeros(len(orders))
        for pairs in coupled:
            share = np.repeat(1 / (pairs.members * len(pairs.members)), pairs.members)
            for rows, agreement in _agreements(column, gap, pairs, orders):
                taus[rows] += agreement @ share
        return (taus / len(coupled),)

    return one_by_one(of_measure, values, shuffles)


def sign_errors(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Mean, 90th percentile and maximum over environments."""
    pairs, gap = shuffles.compared.changes, shuffles.gap

    def of_measure(column: Floats, orders: Ints) -> tuple[Floats, ...]:
        if pairs is None:
            return (np.full(len(orders), np.nan),) * 3
        weight = np.broadcast_to(pairs.weight, pairs.first.shape)
        total = pairs.sums(weight[None])
        parts = []
        for _, agreement in _agreements(column, gap, pairs, orders):
            with np.errstate(invalid="ignore", divide="ignore"):  # an environment without weight
                errors = pairs.sums(weight * (1 - agreement) / 2) / total
            parts.append(error_summaries(errors, np.broadcast_to(total, errors.shape)))
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    return one_by_one(of_measure, values, shuffles)


def one_by_one(
    of_measure: Callable[[Floats, Ints], tuple[Floats, ...]], values: Floats, shuffles: Shuffles
) -> tuple[Chance, ...]:
    """Of each measure, from a function of its values (models,) and of orders (orders, models)."""
    orders = np.concatenate([shuffles.itself, shuffles.orders])
    found = in_threads(lambda column: of_measure(column, orders), list(values.T))
    stacked = (np.stack(columns, axis=1) for columns in zip(*found, strict=True))
    return tuple((rows[0], rows[1:]) for rows in stacked)


def permuted_kendall(values: Floats, gap: Floats, orders: Ints) -> tuple[Floats, Floats]:
    """Kendall's tau-a of measures (models, measures), and with the gaps in each of the orders.

    Returns:
        tuple: Observed (measures,) and shuffled (permutations, measures).
    """
    n = len(gap)
    pairs = n * (n - 1) // 2
    if n > MANY:
        ranks, itself = dense_ranks(gap), np.arange(n)[None]
        columns = [dense_ranks(column) for column in values.T]
        observed = [shuffled_agreement(ranks, column, itself)[0] for column in columns]
        agreement = [shuffled_agreement(ranks, column, orders) for column in columns]
        return np.array(observed) / pairs, np.stack(agreement, axis=1) / pairs
    dtype = np.float32 if n < 4096 else np.float64  # sums of up to n² signs are exact
    sign = _signs(gap[None], dtype)[0]
    signs = _signs(values.T, dtype).reshape(values.shape[1], n * n).T
    shuffled = np.empty((len(orders), values.shape[1]))
    step = max(1, _SIGNS // n**2)
    for start in range(0, len(orders), step):
        order = orders[start : start + step]
        permuted = sign[order[:, :, None], order[:, None, :]]  # (batch, models, models)
        shuffled[start : start + step] = permuted.reshape(len(order), -1) @ signs
    observed = (sign.reshape(-1) @ signs).astype(np.float64) / (2 * pairs)
    return observed, shuffled / (2 * pairs)


def _signs(values: Floats, dtype: type) -> Weights:
    """Sign of each pair's difference (measures, models, models) of values (measures, models)."""
    larger = values[:, :, None] > values[:, None]
    signs: Weights = larger.astype(dtype) - larger.swapaxes(1, 2)
    return signs


def _untied(values: Floats) -> Floats:
    """Share of the pairs that differ (columns,) of values (models, columns)."""
    n = len(values)
    ties = [
        (count * (count - 1)).sum()
        for count in (np.unique(v, return_counts=True)[1] for v in values.T)
    ]
    return 1 - np.array(ties) / (n * (n - 1))


def _correlations(values: Floats, gap: Floats) -> Floats:
    """Linear correlation (orders,) of values (orders, models) with the gaps (models,)."""
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite or constant: NaN
        x = values - values.mean(1, keepdims=True)
        y = gap - gap.mean()
        found: Floats = (x @ y) / np.sqrt((x[0] @ x[0]) * (y @ y))
    return np.where(np.isfinite(found), found, np.nan)


def _held_out(values: Floats, gap: Floats, orders: Ints) -> Floats:
    """R² (orders,), each model predicted from the others; see `r_squared`."""
    n = len(gap)
    nothing = np.full(len(orders), np.nan)
    if not np.isfinite(values).all() or (values == values[0]).all() or (gap == gap[0]).all():
        return nothing
    x = values - values.mean()
    x, y = x / np.abs(x).max(), gap - gap.mean()
    left = 1 - 1 / n - x**2 / (x @ x)  # what a model leaves of the fit without it
    if not (left > 1e-9).all():
        return nothing
    shuffled = x[orders]
    slope = (shuffled @ y) / (x @ x)
    held_out = (y - shuffled * slope[:, None]) / left[orders]
    unexplained: Floats = (held_out**2).sum(1) / ((y @ y) / (1 - 1 / n) ** 2)
    return 1 - unexplained


def _agreements(
    values: Floats, gap: Floats, pairs: Pairs, orders: Ints
) -> Iterator[tuple[slice, Weights]]:
    """Whether each pair is ordered as its gaps (some orders, pairs): 1, -1, or 0 for a tie."""
    ranks, gaps = (np.unique(v, return_inverse=True)[1].astype(np.float32) for v in (values, gap))
    gap_sign = np.sign(gaps[pairs.first] - gaps[pairs.second])
    step = max(1, _SIGNS // max(len(pairs.first), 1))
    for start in range(0, len(orders), step):
        rows = slice(start, start + step)
        shuffled = ranks[orders[rows]]
        difference = shuffled[:, pairs.first] - shuffled[:, pairs.second]
        yield rows, np.sign(difference) * gap_sign
