"""Every statistic of shuffled measures of many models.

A shuffle among all models forgets which model had which value, so that measures with the same ties,
such as all those without any, have the same statistics of ranks to expect: they share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.compared_pairs import Pairs, changed_pairs, coupled_pairs
from sharpkit.evaluation.grid import Floats, Grid, Ints
from sharpkit.evaluation.resampled_formulas import error_summaries
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.sorted_pairs import concordant_pairs, dense_ranks, pair_places
from sharpkit.evaluation.statistics import SIGN_ERRORS

_ENTRIES = 2_000_000  # of shuffled models, and of pairs, held at a time
_SIGNED = ("kendall_tau", "kendall_tau_b")


def chance_of_many(
    values: Floats,
    grid: Grid,
    orders: Ints,
    statistics: Sequence[str],
    environments: Environments,
) -> dict[str, tuple[Floats, Floats]]:
    """Statistics of measures as they are and shuffled among all models.

    Args:
        values: One column per measure (models, measures), no NaN.
        grid: The models.
        orders: Of the models, uniformly random (orders, models).
        statistics: Which, except for mutual informations.
        environments: What the sign-errors count.

    Returns:
        dict: Statistic -> observed (measures,) and shuffled (orders, measures).
    """
    itself = np.arange(len(grid))[None]
    found = {
        name: (np.full(values.shape[1], np.nan), np.full((len(orders), values.shape[1]), np.nan))
        for name in statistics
    }
    ranked = _Ranked.of(grid, statistics, environments)
    shared: dict[bytes, dict[str, Floats]] = {}
    for k, column in enumerate(values.T):
        ranks = dense_ranks(column)
        counts = np.bincount(ranks)
        key = counts.tobytes()
        if key not in shared:
            shared[key] = ranked(np.repeat(np.arange(len(counts)), counts), orders)
        for name, score in ranked(ranks, itself).items():
            found[name][0][k] = score[0]
            found[name][1][:, k] = shared[key][name]
    for name, fit in (("pearson", _correlations), ("r_squared", _held_out)):
        if name in found:
            found[name] = fit(values, grid.gap, itself)[0], fit(values, grid.gap, orders)
    return found


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


@dataclass(frozen=True)
class _Ranked:
    """The statistics that depend on ranks alone."""

    names: frozenset[str]
    gap: Ints  # (models,): ranks
    coupled: list[Pairs]
    changes: Pairs | None

    @classmethod
    def of(cls, grid: Grid, statistics: Sequence[str], environments: Environments) -> _Ranked:
        names = frozenset(statistics) - {"pearson", "r_squared"}
        coupled, changes = [], None
        if "granulated_kendall" in names:
            coupled = coupled_pairs(grid, grid.varying())
        if names & set(SIGN_ERRORS):
            changes = changed_pairs(grid, grid.varying(), environments)
        return cls(names, dense_ranks(grid.gap), coupled, changes)

    def __call__(self, ranks: Ints, orders: Ints) -> dict[str, Floats]:
        """Each statistic (orders,) of values with these ranks (models,) in each of the orders."""
        found: dict[str, Floats] = {}
        n = len(ranks)
        if self.names & set(_SIGNED):
            agreement = shuffled_agreement(ranks, self.gap, orders)
            found["kendall_tau"] = agreement / (n * (n - 1) // 2)
            untied = [_untied(r) for r in (ranks, self.gap)]
            with np.errstate(invalid="ignore", divide="ignore"):
                found["kendall_tau_b"] = agreement / (np.sqrt(untied[0]) * np.sqrt(untied[1]))
        if "spearman" in self.names:
            columns = _middles(ranks)[:, None]
            found["spearman"] = _correlations(columns, _middles(self.gap), orders)[:, 0]
        if "granulated_kendall" in self.names:
            found["granulated_kendall"] = _granulated(ranks, self.gap, orders, self.coupled)
        if self.names & set(SIGN_ERRORS):
            found |= _sign_errors(ranks, self.gap, orders, self.changes)
        return {name: found[name] for name in self.names}


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


def _granulated(ranks: Ints, gap: Ints, orders: Ints, coupled: Sequence[Pairs]) -> Floats:
    if not coupled:
        return np.full(len(orders), np.nan)
    taus = np.zeros(len(orders))
    for pairs in coupled:
        members = pairs.members
        share = np.repeat(1 / (members * len(members)), members)
        for part, rows, agreement in _agreements(ranks, gap, orders, pairs):
            taus[rows] += share[part] @ agreement
    return taus / len(coupled)


def _sign_errors(ranks: Ints, gap: Ints, orders: Ints, pairs: Pairs | None) -> dict[str, Floats]:
    from scipy.sparse import csr_array

    if pairs is None:
        return dict.fromkeys(SIGN_ERRORS, np.full(len(orders), np.nan))
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
    summaries = error_summaries(errors, np.broadcast_to(total, errors.shape))
    return dict(zip(SIGN_ERRORS, summaries, strict=True))


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


def _middles(ranks: Ints) -> Floats:
    """Mean ranks (models,) from dense ones."""
    counts = np.bincount(ranks)
    middles: Floats = (np.cumsum(counts) - (counts - 1) / 2)[ranks]
    return middles


def _blocks(orders: int, models: int) -> Iterator[slice]:
    step = max(1, _ENTRIES // models)
    for start in range(0, orders, step):
        yield slice(start, start + step)
