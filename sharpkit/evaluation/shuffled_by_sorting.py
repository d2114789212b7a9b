"""What each statistic is of many measures shuffled among all of many models.

Such a shuffle forgets which model had which value, so that measures with the same ties, such as all
those without any, have the same statistics of ranks to expect: they share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sharpkit.evaluation.compared_pairs import Pairs
from sharpkit.evaluation.correlations import mean_ranks
from sharpkit.evaluation.grid import Floats, Ints
from sharpkit.evaluation.resampled_formulas import error_summaries
from sharpkit.evaluation.shuffles import Chance, Shuffles
from sharpkit.evaluation.sorted_pairs import concordant_pairs, dense_ranks, pair_places

_ENTRIES = 2_000_000  # of shuffled models, and of pairs, held at a time


def kendall(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Kendall's tau-a and tau-b."""
    gap = dense_ranks(shuffles.gap)
    n = len(gap)

    def of_ranks(ranks: Ints, orders: Ints) -> tuple[Floats, ...]:
        agreement = shuffled_agreement(ranks, gap, orders)
        untied = [_untied(r) for r in (ranks, gap)]
        with np.errstate(invalid="ignore", divide="ignore"):
            tau_b = agreement / (np.sqrt(untied[0]) * np.sqrt(untied[1]))
        return agreement / (n * (n - 1) // 2), tau_b

    return _by_ties(of_ranks, values, shuffles)


def spearman(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Correlation of ranks."""
    gaps = mean_ranks(shuffles.gap)

    def of_ranks(ranks: Ints, orders: Ints) -> tuple[Floats, ...]:
        return (_correlations(mean_ranks(ranks)[:, None], gaps, orders)[:, 0],)

    return _by_ties(of_ranks, values, shuffles)


def granulated_kendall(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Mean over hyperparameters of the mean tau over settings of the others."""
    gap, coupled = dense_ranks(shuffles.gap), shuffles.compared.coupled

    def of_ranks(ranks: Ints, orders: Ints) -> tuple[Floats, ...]:
        if not coupled:
            return (np.full(len(orders), np.nan),)
        taus = np.zeros(len(orders))
        for pairs in coupled:
            members = pairs.members
            share = np.repeat(1 / (members * len(members)), members)
            for part, rows, agreement in _agreements(ranks, gap, orders, pairs):
                taus[rows] += share[part] @ agreement
        return (taus / len(coupled),)

    return _by_ties(of_ranks, values, shuffles)


def sign_errors(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Mean, 90th percentile and maximum over environments."""
    from scipy.sparse import csr_array

    gap, pairs = dense_ranks(shuffles.gap), shuffles.compared.changes

    def of_ranks(ranks: Ints, orders: Ints) -> tuple[Floats, ...]:
        if pairs is None:
            return (np.full(len(orders), np.nan),) * 3
        groups = len(pairs.starts)
        group = np.repeat(np.arange(groups), pairs.members)
        weight = np.broadcast_to(pairs.weight, group.shape)
        total = np.bincount(group, weight, groups)
        wrong = np.zeros((groups, len(orders)))
        for part, rows, agreement in _agreements(ranks, gap, orders, pairs):
            places = group[part], np.arange(len(agreement))
            summed = csr_array((weight[part], places), shape=(groups, len(agreement)))
            wrong[:, rows] += summed @ ((1 - agreement) / 2)
        with np.errstate(invalid="ignore", divide="ignore"):  # an environment without weight
            errors = (wrong / total[:, None]).T
        return error_summaries(errors, np.broadcast_to(total, errors.shape))

    return _by_ties(of_ranks, values, shuffles)


def pearson(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Linear correlation."""
    itself = shuffles.itself
    gap, orders = shuffles.gap, shuffles.orders
    return ((_correlations(values, gap, itself)[0], _correlations(values, gap, orders)),)


def r_squared(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
    """Of an affine fit, each model predicted from the others; see `r_squared`."""
    itself = shuffles.itself
    gap, orders = shuffles.gap, shuffles.orders
    return ((_held_out(values, gap, itself)[0], _held_out(values, gap, orders)),)


def shuffled_agreement(values: Ints, gap: Ints, orders: Ints) -> Ints:
    """Concordant less discordant pairs (orders,) of shuffled values and gaps (models,), ranks."""
    n = len(gap)
    tied = sum(int((c * (c - 1) // 2).sum()) for c in (np.bincount(values), np.bincount(gap)))
    parts = []
    for rows in _blocks(len(orders), n):
        shuffled = values[orders[rows]]
        first, second = pair_places(shuffled, np.broadcast_to(gap, shuffled.shape))
        untied = n * (n - 1) // 2 - tied + _joint_ties(shuffled, gap)
        parts.append(2 * concordant_pairs(first, second) - untied)
    return np.concatenate(parts)


def _by_ties(
    of_ranks: Callable[[Ints, Ints], tuple[Floats, ...]], values: Floats, shuffles: Shuffles
) -> tuple[Chance, ...]:
    """Of each measure, from a function of ranks (models,) and of orders (orders, models)."""
    itself = shuffles.itself
    shared: dict[bytes, tuple[Floats, ...]] = {}
    observed, shuffled = [], []
    for column in values.T:
        ranks = dense_ranks(column)
        counts = np.bincount(ranks)
        key = counts.tobytes()
        if key not in shared:
            shared[key] = of_ranks(np.repeat(np.arange(len(counts)), counts), shuffles.orders)
        observed.append([found[0] for found in of_ranks(ranks, itself)])
        shuffled.append(shared[key])
    return tuple(
        (np.array(own), np.stack(chance, axis=1))
        for own, chance in zip(
            zip(*observed, strict=True), zip(*shuffled, strict=True), strict=True
        )
    )


def _correlations(values: Floats, gap: Floats, orders: Ints) -> Floats:
    """Linear correlation (orders, measures) with the gaps in each of the orders."""
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite or constant: NaN
        x, y = values - values.mean(0), gap - gap.mean()
        scale = np.sqrt((x * x).sum(0) * (y @ y))
        parts = [y[orders[rows]] @ x / scale for rows in _blocks(len(orders), len(gap))]
        found = np.concatenate(parts)
    return np.where(np.isfinite(found), found, np.nan)


def _held_out(values: Floats, gap: Floats, orders: Ints) -> Floats:
    """R² (orders, measures), each model predicted from the others; see `r_squared`."""
    n = len(gap)
    found = np.full((len(orders), values.shape[1]), np.nan)
    usable = np.isfinite(values).all(0) & (values != values[0]).any(0)
    if not usable.any() or (gap == gap[0]).all():
        return found
    x, y = values[:, usable] - values[:, usable].mean(0), gap - gap.mean()
    x /= np.abs(x).max(0)
    squares = (x * x).sum(0)
    left = 1 - 1 / n - x**2 / squares  # what a model leaves of the fit without it
    determined = (left > 1e-9).all(0)
    columns, x, squares = np.flatnonzero(usable)[determined], x[:, determined], squares[determined]
    weight = left[:, determined] ** -2.0
    for rows in _blocks(len(orders), n):
        shuffled = y[orders[rows]]
        slope = shuffled @ x / squares
        held_out = (
            shuffled**2 @ weight
            - 2 * slope * (shuffled @ (x * weight))
            + slope**2 * (x * x * weight).sum(0)
        )
        found[rows, columns] = 1 - held_out / ((y @ y) / (1 - 1 / n) ** 2)
    return found


def _agreements(
    ranks: Ints, gap: Ints, orders: Ints, pairs: Pairs
) -> Iterator[tuple[slice, slice, Floats]]:
    """Some pairs and some orders, and whether each pair is ordered as its gaps: 1, −1, 0."""
    small = ranks.astype(np.int16 if len(ranks) < 2**15 else np.int32)
    gap_sign = np.sign(gap[pairs.first] - gap[pairs.second]).astype(np.float64)
    width = 64  # orders whose ranks lie side by side, so that a pair is two short rows
    step = _ENTRIES // width
    for start in range(0, len(orders), width):
        rows = slice(start, start + width)
        shuffled = np.ascontiguousarray(small[orders[rows]].T)  # (models, some orders)
        for begin in range(0, len(gap_sign), step):
            part = slice(begin, begin + step)
            a, b = shuffled[pairs.first[part]], shuffled[pairs.second[part]]
            sign = (a > b).astype(np.int8) - (a < b)
            yield part, rows, sign * gap_sign[part, None]


def _joint_ties(shuffled: Ints, gap: Ints) -> Ints:
    """Pairs of models (orders,) with the same value and the same gap."""
    keys = np.sort(shuffled * len(gap) + gap, axis=1)
    place = np.arange(keys.shape[1])
    new = np.diff(keys, axis=1, prepend=-1) != 0
    ties: Ints = (place - np.maximum.accumulate(np.where(new, place, 0), axis=1)).sum(1)
    return ties


def _untied(ranks: Ints) -> float:
    """How many pairs differ."""
    n, counts = len(ranks), np.bincount(ranks)
    return float(n * (n - 1) // 2 - int((counts * (counts - 1) // 2).sum()))


def _blocks(orders: int, models: int) -> Iterator[slice]:
    step = max(1, _ENTRIES // models)
    for start in range(0, orders, step):
        yield slice(start, start + step)
