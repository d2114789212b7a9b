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

import numpy as np
from tqdm import tqdm

from sharpkit.evaluation._cells import CellMap
from sharpkit.evaluation._grid import Bools, Floats, Grid, Ints
from sharpkit.evaluation._pairs import INSIDE_LOG
from sharpkit.evaluation._weighted_cells import Cells, Weights, count, information, ratio
from sharpkit.evaluation.robustness import Environments
from sharpkit.evaluation.statistics import LOWER_IS_BETTER, RANGES, SIGN_ERRORS, STATISTICS

__all__ = ["LOWER_IS_BETTER", "RANGES", "SIGN_ERRORS", "STATISTICS", "weighted_statistics"]

_BATCH = 128  # weightings handled together; small enough for the cache


def weighted_statistics(
    values: Floats,
    grid: Grid,
    weights: Ints,
    statistics: Sequence[str] = STATISTICS,
    *,
    environments: Environments | None = None,
    hyperparameter: int | None = None,
    drawn_together: bool = False,
) -> dict[str, Floats]:
    """Statistics of each measure under each weighting.

    Args:
        values: One column per measure (models, measures), no NaN.
        grid: The models.
        weights: Multiplicities (weightings, models), whole numbers.
        statistics: Which of `STATISTICS`.
        environments: What the sign-errors count; None for the default.
        hyperparameter: Column of the only one that may differ between the models that granulated
            Kendall and the sign-errors compare; None for all in turn.
        drawn_together: Draw sign-errors together, towards those of the models as they are; see
            `_drawn_together`.

    Returns:
        dict: Statistic -> array (weightings, measures).
    """
    columns = grid.varying() if hyperparameter is None else [hyperparameter]
    result = {name: np.full((len(weights), values.shape[1]), np.nan) for name in statistics}
    plan = _Plan.of(grid, statistics, columns, environments or Environments(), drawn_together)
    starts = range(0, len(weights), _BATCH)
    batches = [_Batch.of(weights[s : s + _BATCH].astype(plan.dtype), plan) for s in starts]
    bar = tqdm(values.T, "evaluate", unit="measure", delay=2, leave=False, disable=None)
    for k, column in enumerate(bar):
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
    coupled: list[Pairs]  # per hyperparameter, by setting
    environments: Pairs | None  # of all hyperparameters, by environment
    drawn_together: bool

    @classmethod
    def of(
        cls,
        grid: Grid,
        statistics: Sequence[str],
        columns: Sequence[int],
        environments: Environments,
        drawn_together: bool,
    ) -> _Plan:
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
            coupled = coupled_pairs(grid, columns)
        changes = None
        if not set(SIGN_ERRORS).isdisjoint(statistics):
            changes = changed_pairs(grid, columns, environments)
        # whole numbers up to n² are exact in float32 below 2**24
        dtype = np.float32 if len(grid) < 4096 else np.float64
        bits = grid.gap[:, None] > grid.gap
        return cls(grid.gap, bits, dtype, partitions, pgdl, jiang, coupled, changes, drawn_together)


@dataclass(frozen=True)
class Pairs:
    """Pairs of models in groups that follow one another."""

    first: Ints
    second: Ints
    starts: Ints  # where each group begins
    weight: Floats | float = 1.0  # (pairs,)

    @classmethod
    def of(cls, first: Ints, second: Ints, group: Ints, weight: Floats | None = None) -> Pairs:
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.diff(group[order], prepend=-1))
        return cls(first[order], second[order], starts, 1.0 if weight is None else weight[order])

    def sums(self, values: Floats) -> Floats:
        """Sums over each group (batch, groups) of values (batch, pairs)."""
        found: Floats = np.add.reduceat(values, self.starts, axis=1)
        return found


def coupled_pairs(grid: Grid, columns: Sequence[int]) -> list[Pairs]:
    """Per hyperparameter, the pairs that differ in it alone, by setting of the others."""
    found = [grid.coupled(h) for h in columns]
    return [Pairs.of(*pairs) for pairs in found if len(pairs[0])]


def changed_pairs(grid: Grid, columns: Sequence[int], environments: Environments) -> Pairs | None:
    """Pairs of the sign-errors by environment; None if none carries weight."""
    parts = [environments.pairs(grid, h) for h in columns]
    parts = [p for p in parts if (p[3] > 0).any()]
    if not parts:
        return None
    first, second, group, weight = zip(*parts, strict=True)
    offsets = np.cumsum([0] + [int(g.max()) + 1 for g in group[:-1]])
    numbered = [g + offset for g, offset in zip(group, offsets, strict=True)]
    return Pairs.of(*(np.concatenate(p) for p in (first, second, numbered, weight)))


@dataclass(frozen=True)
class _Bits:
    """One measure's pairs."""

    values: Floats
    larger: Weights  # (models, 2 models): value bit, and value and gap bit, side by side
    concordance: Weights  # (models, models): sign of the value difference times that of the gap
    below: Weights  # (models, models): 1 where the second is smaller, 1/2 where equal
    ties: bool  # whether two models have the same value

    @classmethod
    def of(cls, values: Floats, plan: _Plan) -> _Bits:
        bits = values[:, None] > values
        sign: Weights = bits.astype(plan.dtype) - bits.T
        gap_sign: Weights = plan.gap_bits.astype(plan.dtype) - plan.gap_bits.T
        larger: Weights = np.concatenate([bits, bits & plan.gap_bits], axis=1).astype(plan.dtype)
        ties = len(np.unique(values)) < len(values)
        return cls(values, larger, sign * gap_sign, (sign + 1) / 2, ties)


@dataclass(frozen=True)
class _Batch:
    """What one batch of weightings (batch, models) makes of the plan, for every measure."""

    weights: Weights
    total: Floats  # (batch,)
    pairs: Floats  # (batch,): pairs of different models
    untied_gaps: Floats  # (batch,)
    cells: list[Cells]
    coupled: list[tuple[Floats, Floats]]  # weight of each pair (batch, pairs), of each setting
    changes: tuple[Floats, Floats] | None  # the same by environment
    gap_ranks: Floats  # (batch, models)

    @classmethod
    def of(cls, weights: Weights, plan: _Plan) -> _Batch:
        gap_bits: Weights = plan.gap_bits.astype(plan.dtype)
        total = weights.sum(1, dtype=np.float64)
        ranks = (weights @ ((gap_bits - gap_bits.T + 1) / 2).T).astype(np.float64)
        changes = None if plan.environments is None else _pair_weights(weights, plan.environments)
        return cls(
            weights,
            total,
            total**2 - (weights * weights).sum(1, dtype=np.float64),
            _both(weights, gap_bits + gap_bits.T),
            [Cells.of(weights, groups, gap_bits) for groups in plan.partitions],
            [_pair_weights(weights, pairs) for pairs in plan.coupled],
            changes,
            ranks,
        )


def _pair_weights(weights: Weights, pairs: Pairs) -> tuple[Floats, Floats]:
    pair = weights[:, pairs.first].astype(np.float64) * weights[:, pairs.second] * pairs.weight
    return pair, pairs.sums(pair)


def _both(weights: Weights, bits: Weights) -> Floats:
    """Weight of the pairs (batch,) whose bit (models, models) is set."""
    found: Floats = ((weights @ bits) * weights).sum(1, dtype=np.float64)
    return found


def _batch_statistics(
    bits: _Bits, batch: _Batch, plan: _Plan, statistics: Sequence[str]
) -> Mapping[str, Floats]:
    found: dict[str, Floats] = {}
    wanted = set(statistics)
    if wanted & {"cmi_pgdl", "cmi_jiang"}:
        found["cmi_pgdl"], found["cmi_jiang"] = _both_scores(bits, batch, plan)
    if wanted & {"kendall_tau", "kendall_tau_b"}:
        found["kendall_tau"], found["kendall_tau_b"] = _kendall(bits, batch)
    if "granulated_kendall" in wanted:
        found["granulated_kendall"] = _granulated(bits, batch, plan)
    if "spearman" in wanted:
        ranks = (batch.weights @ bits.below.T).astype(np.float64)
        found["spearman"] = _correlation(ranks, batch.gap_ranks, batch)
    if "pearson" in wanted:
        found["pearson"] = _correlation(bits.values[None], plan.gap[None], batch)
    if "r_squared" in wanted:
        found["r_squared"] = _r_squared(bits.values, plan.gap, batch)
    if wanted & set(SIGN_ERRORS):
        found |= zip(SIGN_ERRORS, _sign_errors(bits, batch, plan), strict=True)
    return {name: found[name] for name in statistics}


def _both_scores(bits: _Bits, batch: _Batch, plan: _Plan) -> tuple[Floats, Floats]:
    pgdl, jiang = ([np.full(len(batch.weights), np.inf)] for _ in range(2))
    for k, cells in enumerate(batch.cells):
        counts = count(batch.weights, cells.groups, cells.member, bits.larger)
        larger, both = counts[:, :, 0], counts[:, :, 1]
        if k in plan.pgdl:
            total = cells.different + cells.itself
            shared, entropy = information(total, cells.larger_gap, larger, both, INSIDE_LOG)
            filled = (total > 0) & plan.pgdl[k]
            scale = filled / np.maximum(total, 1)  # the mean over filled cells, up to a constant
            pgdl.append(ratio(shared * scale, entropy * scale))
        if k in plan.jiang:
            jiang.append(ratio(*information(cells.different, cells.larger_gap, larger, both, 0.0)))
    scores = (np.fmin.reduce(scores) for scores in (pgdl, jiang))
    first, second = (np.where(np.isinf(score), np.nan, score) for score in scores)
    return first, second


def _kendall(bits: _Bits, batch: _Batch) -> tuple[Floats, Floats]:
    agreement = _both(batch.weights, bits.concordance)
    untied = batch.pairs
    if bits.ties:
        untied = _both(batch.weights, (bits.below != 0.5).astype(bits.below.dtype))
    return (
        _divide(agreement, batch.pairs),
        _divide(agreement, np.sqrt(untied * batch.untied_gaps)),
    )


def _granulated(bits: _Bits, batch: _Batch, plan: _Plan) -> Floats:
    taus = []
    for pairs, (pair, setting) in zip(plan.coupled, batch.coupled, strict=True):
        agreement = pairs.sums(pair * bits.concordance[pairs.first, pairs.second])
        tau = np.divide(agreement, setting, out=np.zeros_like(setting), where=setting > 0)
        taus.append(_divide(tau.sum(1), (setting > 0).sum(1)))
    if not taus:
        return np.full(len(batch.weights), np.nan)
    found = ~np.isnan(taus)
    return _divide(np.where(found, taus, 0.0).sum(0), found.sum(0))


def _sign_errors(bits: _Bits, batch: _Batch, plan: _Plan) -> tuple[Floats, Floats, Floats]:
    """Mean, 90th percentile and maximum over the environments that a weighting has."""
    if plan.environments is None or batch.changes is None:
        nothing = np.full(len(batch.weights), np.nan)
        return nothing, nothing, nothing
    pairs, (pair, total) = plan.environments, batch.changes
    loss = (1 - bits.concordance[pairs.first, pairs.second]) / 2
    errors = _divide(pairs.sums(pair * loss), total)
    if plan.drawn_together:
        errors = _drawn_together(errors, loss, pairs, len(plan.gap))
    return error_summaries(errors, total)


def error_summaries(errors: Floats, total: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, 90th percentile and maximum (batch,) of errors (batch, environments).

    `total` is the weight of each environment (batch, environments); those without any are NaN.
    """
    errors = np.sort(errors, axis=1)  # NaN last
    counts = (total > 0).sum(1)
    mean = _divide(np.nansum(errors, axis=1), counts)
    place = 0.9 * np.maximum(counts - 1, 0)
    below = np.floor(place).astype(np.int64)
    last = np.maximum(counts - 1, 0)
    rows = np.arange(len(errors))
    low, high = errors[rows, below], errors[rows, np.minimum(below + 1, last)]
    return mean, low + (place - below) * (high - low), errors[rows, last]


def _drawn_together(errors: Floats, loss: Floats, pairs: Pairs, models: int) -> Floats:
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
    members = np.diff(np.append(pairs.starts, len(loss)))
    total = np.repeat(pairs.sums(weight[None])[0], members)
    share = np.divide(weight, total, out=np.zeros(len(loss)), where=total > 0)
    observed = pairs.sums((share * loss)[None])[0]
    terms = share * (loss - np.repeat(observed, members))
    of_models = np.bincount(pairs.first, terms, models) + np.bincount(pairs.second, terms, models)
    own, shared = (terms**2).sum(), (of_models**2).sum()
    if own == 0:
        return errors
    narrower = np.sqrt(shared / (shared + own))
    drawn: Floats = observed + narrower * (errors - observed)
    return drawn


def _correlation(x: Floats, y: Floats, batch: _Batch) -> Floats:
    share = batch.weights / batch.total[:, None]
    with np.errstate(invalid="ignore"):  # infinite values have no correlation: NaN
        x = x - (share * x).sum(1, keepdims=True)
        y = y - (share * y).sum(1, keepdims=True)
        scale = np.sqrt((share * x * x).sum(1) * (share * y * y).sum(1))
        return _divide((share * x * y).sum(1), scale)


def _r_squared(x: Floats, y: Floats, batch: _Batch) -> Floats:
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


def _divide(above: Floats, below: Floats | Ints) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)
