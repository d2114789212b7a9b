"""Every statistic under many weightings of the same models at once.

A bootstrap resample of n models is a vector of multiplicities w. The bits of the pairs stay the
same, so a whole batch of resamples costs a few matrix products W X. Copies of one model are not
compared with each other: the pair (i, j) has weight w_i w_j, and the self pair that the `pgdl`
definition counts has weight w_i. A cell of a conditioning set that a resample leaves empty is not
averaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sharpkit.evaluation._cells import CellMap
from sharpkit.evaluation._grid import Bools, Floats, Grid, Ints
from sharpkit.evaluation._pairs import INSIDE_LOG, xlogx

STATISTICS = (
    "cmi_pgdl",
    "cmi_jiang",
    "kendall_tau",
    "granulated_kendall",
    "spearman",
    "pearson",
)
_BATCH = 128  # weightings handled together; small enough for the cache
Weights: TypeAlias = NDArray[np.floating]


def weighted_statistics(
    values: Floats, grid: Grid, weights: Ints, statistics: Sequence[str] = STATISTICS
) -> dict[str, Floats]:
    """Statistics of each measure under each weighting.

    Args:
        values: One column per measure (models, measures), no NaN.
        grid: The models.
        weights: Multiplicities (weightings, models), whole numbers.
        statistics: Which of `STATISTICS`.

    Returns:
        dict: Statistic -> array (weightings, measures).
    """
    result = {name: np.full((len(weights), values.shape[1]), np.nan) for name in statistics}
    plan = _Plan.of(grid, statistics)
    starts = range(0, len(weights), _BATCH)
    batches = [_Batch.of(weights[s : s + _BATCH].astype(plan.dtype), plan) for s in starts]
    for k, column in enumerate(values.T):
        bits = _Bits.of(column, plan)
        for start, batch in zip(starts, batches, strict=True):
            for name, found in _batch_statistics(bits, batch, plan, statistics).items():
                result[name][start : start + _BATCH, k] = found
    return result


@dataclass(frozen=True)
class _Plan:
    """What neither the measure nor the weights change."""

    gap: Floats
    gap_bits: Bools  # (models, models)
    dtype: type
    partitions: list[list[Ints]]  # per distinct conditioning set, the models of each group
    pgdl: dict[int, Bools]  # partition -> pairs of groups that count (groups, groups)
    jiang: list[int]
    coupled: list[tuple[Ints, Ints, Ints, Ints]]  # first, second, setting, start of each setting

    @classmethod
    def of(cls, grid: Grid, statistics: Sequence[str]) -> _Plan:
        names = range(len(grid.names))
        pairs = list(itertools.combinations(names, 2))
        found: dict[bytes, int] = {}
        partitions: list[list[Ints]] = []

        def partition(columns: Sequence[int]) -> int:
            groups = grid.groups(columns)
            key = groups.tobytes()
            if key not in found:
                found[key] = len(partitions)
                count = int(groups.max(initial=-1)) + 1
                partitions.append([np.flatnonzero(groups == g) for g in range(count)])
            return found[key]

        pgdl: dict[int, Bools] = {}
        if "cmi_pgdl" in statistics:
            for pair in pairs:
                for cells in CellMap.of(grid, pair, grid.groups(pair)):
                    kept = cells.kept_pairs()
                    if kept is not None:
                        pgdl[partition(pair)] = kept
        jiang: list[int] = []
        if "cmi_jiang" in statistics:
            sets: list[tuple[int, ...]] = [(), *((h,) for h in names), *pairs]
            jiang = sorted({partition(columns) for columns in sets})
        coupled = []
        if "granulated_kendall" in statistics:
            for h in grid.varying():
                first, second, setting = grid.coupled(h)
                if len(first):
                    starts = np.flatnonzero(np.diff(setting, prepend=-1))
                    coupled.append((first, second, setting, starts))
        # whole numbers up to n² are exact in float32 below 2**24
        dtype = np.float32 if len(grid) < 4096 else np.float64
        bits = grid.gap[:, None] > grid.gap
        return cls(grid.gap, bits, dtype, partitions, pgdl, jiang, coupled)


@dataclass(frozen=True)
class _Bits:
    """One measure's pairs."""

    values: Floats
    larger: Weights  # (models, 2 models): value bit, and value and gap bit, side by side
    concordance: Weights  # (models, models): sign of the value difference times that of the gap
    below: Weights  # (models, models): 1 where the second is smaller, 1/2 where equal

    @classmethod
    def of(cls, values: Floats, plan: _Plan) -> _Bits:
        bits = values[:, None] > values
        sign: Weights = bits.astype(plan.dtype) - bits.T
        gap_sign: Weights = plan.gap_bits.astype(plan.dtype) - plan.gap_bits.T
        larger: Weights = np.concatenate([bits, bits & plan.gap_bits], axis=1).astype(plan.dtype)
        return cls(values, larger, sign * gap_sign, (sign + 1) / 2)


@dataclass(frozen=True)
class _Batch:
    """What one batch of weightings (batch, models) makes of the plan, for every measure."""

    weights: Weights
    total: Floats  # (batch,)
    cells: list[_Cells]
    coupled: list[tuple[Floats, Floats]]  # weight of each pair (batch, pairs), of each setting
    gap_ranks: Floats  # (batch, models)

    @classmethod
    def of(cls, weights: Weights, plan: _Plan) -> _Batch:
        cells = [_Cells.of(weights, groups, plan.gap_bits) for groups in plan.partitions]
        coupled = []
        for first, second, _, starts in plan.coupled:
            pair = weights[:, first].astype(np.float64) * weights[:, second]
            coupled.append((pair, np.add.reduceat(pair, starts, axis=1)))
        below = (plan.gap_bits.astype(plan.dtype) - plan.gap_bits.T + 1) / 2
        ranks = (weights @ below.T).astype(np.float64)
        return cls(weights, weights.sum(1, dtype=np.float64), cells, coupled, ranks)


@dataclass(frozen=True)
class _Cells:
    """Weighted pairs of one conditioning set, before a measure is looked at."""

    groups: list[Ints]
    member: Weights  # (models, groups)
    different: Floats  # (batch, groups, groups): pairs of different models
    itself: Floats  # (batch, groups, groups): self pairs
    larger_gap: Floats  # (batch, groups, groups)

    @classmethod
    def of(cls, weights: Weights, groups: list[Ints], gap_bits: Bools) -> _Cells:
        member = np.zeros((weights.shape[1], len(groups)), dtype=weights.dtype)
        for g, models in enumerate(groups):
            member[models, g] = 1
        sums = (weights @ member).astype(np.float64)
        squares = ((weights * weights) @ member).astype(np.float64)
        eye = np.eye(len(groups))
        different = sums[:, :, None] * sums[:, None, :] - squares[:, :, None] * eye
        larger = _count(weights, groups, member, gap_bits.astype(weights.dtype))[:, :, 0]
        return cls(groups, member, different, sums[:, :, None] * eye, larger)


def _count(weights: Weights, groups: list[Ints], member: Weights, bits: Weights) -> Floats:
    """Weighted pairs with each bit (batch, groups of i, kinds, groups of j).

    `bits` holds one or several n x n matrices side by side.
    """
    batch, n = weights.shape
    counts = np.empty((batch, len(groups), bits.shape[1] // n, len(groups)))
    for g, models in enumerate(groups):
        sums = weights[:, models] @ bits[models]  # (batch, kinds * models)
        spread = sums.reshape(batch, -1, n) * weights[:, None, :]
        counts[:, g] = (spread.reshape(-1, n) @ member).reshape(batch, -1, len(groups))
    return counts


def _batch_statistics(
    bits: _Bits, batch: _Batch, plan: _Plan, statistics: Sequence[str]
) -> Mapping[str, Floats]:
    found: dict[str, Floats] = {}
    if "cmi_pgdl" in statistics or "cmi_jiang" in statistics:
        pgdl, jiang = _both_scores(bits, batch, plan)
        found |= {"cmi_pgdl": pgdl, "cmi_jiang": jiang}
    if "kendall_tau" in statistics:
        found["kendall_tau"] = _kendall(bits, batch)
    if "granulated_kendall" in statistics:
        found["granulated_kendall"] = _granulated(bits, batch, plan)
    if "spearman" in statistics:
        ranks = (batch.weights @ bits.below.T).astype(np.float64)
        found["spearman"] = _correlation(ranks, batch.gap_ranks, batch)
    if "pearson" in statistics:
        found["pearson"] = _correlation(bits.values[None], plan.gap[None], batch)
    return {name: found[name] for name in statistics}


def _both_scores(bits: _Bits, batch: _Batch, plan: _Plan) -> tuple[Floats, Floats]:
    pgdl, jiang = ([np.full(len(batch.weights), np.inf)] for _ in range(2))
    for k, cells in enumerate(batch.cells):
        counts = _count(batch.weights, cells.groups, cells.member, bits.larger)
        larger, both = counts[:, :, 0], counts[:, :, 1]
        if k in plan.pgdl:
            total = cells.different + cells.itself
            information, entropy = _information(total, cells.larger_gap, larger, both, INSIDE_LOG)
            filled = (total > 0) & plan.pgdl[k]
            scale = filled / np.maximum(total, 1)  # the mean over filled cells, up to a constant
            pgdl.append(_ratio(information * scale, entropy * scale))
        if k in plan.jiang:
            jiang.append(
                _ratio(*_information(cells.different, cells.larger_gap, larger, both, 0.0))
            )
    scores = (np.fmin.reduce(scores) for scores in (pgdl, jiang))
    first, second = (np.where(np.isinf(score), np.nan, score) for score in scores)
    return first, second


def _information(
    total: Floats, gap: Floats, value: Floats, both: Floats, inside_log: float
) -> tuple[Floats, Floats]:
    """Information and gap entropy of each cell in bits, times the pairs in the cell."""
    sides = xlogx(gap) + xlogx(total - gap)
    joint = xlogx(both) + xlogx(gap - both) + xlogx(value - both)
    joint += xlogx(total - gap - value + both)
    whole = xlogx(total)
    information = joint - sides - xlogx(value) - xlogx(total - value) + whole
    entropy = whole - sides
    if inside_log:  # −p log2(p + c) = −p log2 p − p log2(1 + c / p), and c / p is tiny
        entropy = entropy - ((gap > 0) * 1.0 + (gap < total)) * total * inside_log / np.log(2)
    return np.maximum(information, 0.0), entropy


def _ratio(information: Floats, entropy: Floats) -> Floats:
    below = entropy.sum((1, 2))
    ratio = information.sum((1, 2)) / np.where(below > 0, below, 1.0)
    return np.where(below > 1e-9, ratio, np.nan)


def _kendall(bits: _Bits, batch: _Batch) -> Floats:
    w = batch.weights
    agreement = ((w @ bits.concordance) * w).sum(1, dtype=np.float64)
    pairs = batch.total**2 - (w * w).sum(1, dtype=np.float64)
    return _divide(agreement, pairs)


def _granulated(bits: _Bits, batch: _Batch, plan: _Plan) -> Floats:
    taus = []
    for (first, second, _, starts), (pair, setting) in zip(
        plan.coupled, batch.coupled, strict=True
    ):
        agreement = np.add.reduceat(pair * bits.concordance[first, second], starts, axis=1)
        tau = np.divide(agreement, setting, out=np.zeros_like(setting), where=setting > 0)
        taus.append(_divide(tau.sum(1), (setting > 0).sum(1)))
    if not taus:
        return np.full(len(batch.weights), np.nan)
    found = ~np.isnan(taus)
    return _divide(np.where(found, taus, 0.0).sum(0), found.sum(0))


def _correlation(x: Floats, y: Floats, batch: _Batch) -> Floats:
    share = batch.weights / batch.total[:, None]
    x = x - (share * x).sum(1, keepdims=True)
    y = y - (share * y).sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        scale = np.sqrt((share * x * x).sum(1) * (share * y * y).sum(1))
        return _divide((share * x * y).sum(1), scale)


def _divide(above: Floats, below: Floats | Ints) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)
