"""Every statistic under many weightings of the same models at once.

A bootstrap resample of n models is a vector of multiplicities w. The bits of the pairs stay the
same, so a whole batch of resamples costs a few matrix products W X. Copies of one model are not
compared with each other: the pair (i, j) has weight w_i w_j, and the self pair that the `pgdl`
definition counts has weight w_i. A cell of a conditioning set that a resample leaves empty is not
averaged. Of many models the pairs are not formed but counted by sorting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from sharpkit.evaluation.compared_pairs import Pairs, Plan
from sharpkit.evaluation.grid import Floats, Grid, Ints, Weights
from sharpkit.evaluation.resampled_by_sorting import Draws, chunks_of, statistics_of_draws
from sharpkit.evaluation.resampled_formulas import (
    both_scores,
    correlation,
    divide,
    drawn_together as together,
    error_summaries,
    mean_of_settings,
    r_squared_draws,
)
from sharpkit.evaluation.resampled_information import Cells, count
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.sorted_pairs import MANY
from sharpkit.evaluation.statistics import SIGN_ERRORS, STATISTICS
from sharpkit.evaluation.threads import in_threads

_MEASURES = 16  # handed to the threads together
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
            `resampled_formulas.drawn_together`.

    Returns:
        dict: Statistic -> array (weightings, measures).
    """
    columns = grid.varying() if hyperparameter is None else [hyperparameter]
    result = {name: np.full((len(weights), values.shape[1]), np.nan) for name in statistics}
    plan = Plan.of(grid, statistics, columns, environments or Environments(), drawn_together)
    starts = range(0, len(weights), _BATCH)
    rows = [slice(start, start + _BATCH) for start in starts]
    bar = tqdm(values.T, "evaluate", unit="measure", delay=2, leave=False, disable=None)
    of_measure = _sorted if len(grid) > MANY else _compared
    for k, batches in enumerate(of_measure(bar, weights, plan, rows, statistics)):
        for part, found in zip(rows, batches, strict=True):
            for name in statistics:
                result[name][part, k] = found[name]
    return result


def _compared(
    measures: Iterable[Floats],
    weights: Ints,
    plan: Plan,
    rows: Sequence[slice],
    statistics: Sequence[str],
) -> Iterator[list[Mapping[str, Floats]]]:
    """Of each measure, the statistics of each batch, from all pairs of models."""
    batches = [_Batch.of(weights[part].astype(plan.dtype), plan) for part in rows]

    def of_measure(column: Floats) -> list[Mapping[str, Floats]]:
        bits = _Bits.of(column, plan)
        return [_batch_statistics(bits, batch, plan, statistics) for batch in batches]

    remaining = iter(measures)
    while some := list(itertools.islice(remaining, _MEASURES)):
        yield from in_threads(of_measure, some)


def _sorted(
    measures: Iterable[Floats],
    weights: Ints,
    plan: Plan,
    rows: Sequence[slice],
    statistics: Sequence[str],
) -> Iterator[list[Mapping[str, Floats]]]:
    """The same by sorting."""
    chunks = chunks_of(plan)
    batches = [Draws.of(weights[part], plan, chunks) for part in rows]
    for column in measures:
        yield [statistics_of_draws(column, b, plan, chunks, set(statistics)) for b in batches]


@dataclass(frozen=True)
class _Bits:
    """One measure's pairs."""

    values: Floats
    larger: Weights  # (models, 2 models): value bit, and value and gap bit, side by side
    concordance: Weights  # (models, models): sign of the value difference times that of the gap
    below: Weights  # (models, models): 1 where the second is smaller, 1/2 where equal
    ties: bool  # whether two models have the same value

    @classmethod
    def of(cls, values: Floats, plan: Plan) -> _Bits:
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
    def of(cls, weights: Weights, plan: Plan) -> _Batch:
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
    bits: _Bits, batch: _Batch, plan: Plan, statistics: Sequence[str]
) -> Mapping[str, Floats]:
    found: dict[str, Floats] = {}
    wanted = set(statistics)
    if wanted & {"cmi_pgdl", "cmi_jiang"}:
        counts = (count(batch.weights, c.groups, c.member, bits.larger) for c in batch.cells)
        counted = ((of_cells[:, :, 0], of_cells[:, :, 1]) for of_cells in counts)
        found["cmi_pgdl"], found["cmi_jiang"] = both_scores(batch.cells, counted, plan)
    if wanted & {"kendall_tau", "kendall_tau_b"}:
        found["kendall_tau"], found["kendall_tau_b"] = _kendall(bits, batch)
    if "granulated_kendall" in wanted:
        agreements = (
            (pairs.sums(pair * bits.concordance[pairs.first, pairs.second]), setting)
            for pairs, (pair, setting) in zip(plan.coupled, batch.coupled, strict=True)
        )
        found["granulated_kendall"] = mean_of_settings(agreements, len(batch.weights))
    if "spearman" in wanted:
        ranks = (batch.weights @ bits.below.T).astype(np.float64)
        found["spearman"] = correlation(ranks, batch.gap_ranks, batch)
    if "pearson" in wanted:
        found["pearson"] = correlation(bits.values[None], plan.gap[None], batch)
    if "r_squared" in wanted:
        found["r_squared"] = r_squared_draws(bits.values, plan.gap, batch)
    if wanted & set(SIGN_ERRORS):
        found |= zip(SIGN_ERRORS, _sign_errors(bits, batch, plan), strict=True)
    return found


def _kendall(bits: _Bits, batch: _Batch) -> tuple[Floats, Floats]:
    agreement = _both(batch.weights, bits.concordance)
    untied = batch.pairs
    if bits.ties:
        untied = _both(batch.weights, (bits.below != 0.5).astype(bits.below.dtype))
    return (
        divide(agreement, batch.pairs),
        divide(agreement, np.sqrt(untied * batch.untied_gaps)),
    )


def _sign_errors(bits: _Bits, batch: _Batch, plan: Plan) -> tuple[Floats, Floats, Floats]:
    """Mean, 90th percentile and maximum over the environments that a weighting has."""
    if plan.environments is None or batch.changes is None:
        nothing = np.full(len(batch.weights), np.nan)
        return nothing, nothing, nothing
    pairs, (pair, total) = plan.environments, batch.changes
    loss = (1 - bits.concordance[pairs.first, pairs.second]) / 2
    errors = divide(pairs.sums(pair * loss), total)
    if plan.drawn_together:
        errors = together(errors, loss, pairs, len(plan.gap))
    return error_summaries(errors, total)
