"""Every statistic of resamples of many models, in time n log n and memory n times groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.compared_pairs import Pairs, Plan
from sharpkit.evaluation.grid import Floats, Ints, Weights
from sharpkit.evaluation.resampled_formulas import (
    both_scores,
    correlation,
    divide,
    drawn_together,
    error_summaries,
    mean_of_settings,
    r_squared_draws,
)
from sharpkit.evaluation.resampled_information import Cells
from sharpkit.evaluation.sorted_pairs import (
    Dominance,
    Partitions,
    Smaller,
    dense_ranks,
    in_chunks,
    weighted_tables,
)
from sharpkit.evaluation.statistics import SIGN_ERRORS

_ENTRIES = 4_000_000  # weights of pairs held at a time
_SIGNED = ("kendall_tau", "kendall_tau_b")
_INFORMED = ("cmi_pgdl", "cmi_jiang")


@dataclass(frozen=True)
class Draws:
    """What a batch of weightings (batch, models) of many models makes of the plan."""

    weights: Floats
    total: Floats  # (batch,)
    pairs: Floats  # (batch,): pairs of different models
    gap: Ints  # (models,): ranks
    gap_squares: Floats  # (batch,): pairs with the same gap, itself included
    gap_ranks: Floats  # (batch, models)
    cells: list[Cells]
    coupled: list[Floats]  # weight of each setting (batch, settings)
    changes: Floats | None  # the same by environment

    @classmethod
    def of(cls, weights: Ints, plan: Plan, chunks: Sequence[Partitions]) -> Draws:
        """The batch, for every measure."""
        w = weights.astype(np.float64)
        total, gap = w.sum(1), dense_ranks(plan.gap)
        changes = None if plan.environments is None else pair_sums(w, plan.environments)
        sums, ranks = tied_sums(gap, w)
        return cls(
            w,
            total,
            total**2 - (w * w).sum(1),
            gap,
            (sums * sums).sum(1),
            ranks,
            _cells(w, gap, plan, chunks),
            [pair_sums(w, pairs) for pairs in plan.coupled],
            changes,
        )


def chunks_of(plan: Plan) -> list[Partitions]:
    """The plan's conditioning sets, a few at a time."""
    found = []
    for models in plan.partitions:
        groups = np.full(len(plan.gap), -1, dtype=np.int64)
        for g, members in enumerate(models):
            groups[members] = g
        found.append(groups)
    return in_chunks(found)


def statistics_of_draws(
    column: Floats, draws: Draws, plan: Plan, chunks: Sequence[Partitions], wanted: set[str]
) -> dict[str, Floats]:
    """The wanted statistics (batch,) of one measure (models,), no NaN."""
    found: dict[str, Floats] = {}
    batch, values = len(draws.weights), dense_ranks(column)
    if wanted & {*_SIGNED, *_INFORMED}:
        smaller = Dominance.of(values, draws.gap)
        if wanted & set(_INFORMED):
            larger = weighted_tables(chunks, draws.weights, Smaller.of(values).sums)
            both = weighted_tables(chunks, draws.weights, smaller.sums)
            scores = both_scores(draws.cells, zip(larger, both, strict=True), plan)
            found |= zip(_INFORMED, scores, strict=True)
        if wanted & set(_SIGNED):
            found |= zip(_SIGNED, _kendall(values, smaller, draws), strict=True)
    if "granulated_kendall" in wanted:
        agreements = (
            (pair_sums(draws.weights, pairs, signs(values, draws.gap, pairs)), setting)
            for pairs, setting in zip(plan.coupled, draws.coupled, strict=True)
        )
        found["granulated_kendall"] = mean_of_settings(agreements, batch)
    if "spearman" in wanted:
        ranks = tied_sums(values, draws.weights)[1]
        found["spearman"] = correlation(ranks, draws.gap_ranks, draws)
    if "pearson" in wanted:
        found["pearson"] = correlation(column[None], plan.gap[None], draws)
    if "r_squared" in wanted:
        found["r_squared"] = r_squared_draws(column, plan.gap, draws)
    if wanted & set(SIGN_ERRORS):
        found |= zip(SIGN_ERRORS, _sign_errors(values, draws, plan), strict=True)
    return found


def weighted_agreement(values: Ints, gap: Ints, smaller: Dominance, weights: Floats) -> Floats:
    """Weight of concordant less that of discordant ordered pairs (batch,), by ranks (models,)."""
    sums = smaller.sums(np.ascontiguousarray(weights.T.astype(np.float32)))
    concordant = (sums.astype(np.float64) * weights.T).sum(0)
    joint = dense_ranks(values * len(values) + gap)
    same_value, same_gap, same = (
        (tied_sums(ranks, weights)[0] ** 2).sum(1) for ranks in (values, gap, joint)
    )
    untied = weights.sum(1) ** 2 - same_value - same_gap + same
    found: Floats = 4 * concordant - untied
    return found


def tied_sums(ranks: Ints, weights: Floats) -> tuple[Floats, Floats]:
    """Weights of models of the same rank (batch, ranks), and mean ranks (batch, models).

    A weighted mean rank counts the models below once and the equal ones, itself included, half.
    """
    order = np.argsort(ranks, kind="stable")
    starts = np.flatnonzero(np.diff(ranks[order], prepend=-1))
    sums: Floats = np.add.reduceat(weights[:, order], starts, axis=1)
    middles: Floats = (np.cumsum(sums, axis=1) - sums / 2)[:, ranks]
    return sums, middles


def signs(values: Ints, gap: Ints, pairs: Pairs) -> Floats:
    """Whether each pair (pairs,) is ordered as its gaps: 1, -1, or 0 for a tie."""
    difference = np.sign(values[pairs.first] - values[pairs.second])
    found: Floats = (difference * np.sign(gap[pairs.first] - gap[pairs.second])).astype(np.float64)
    return found


def pair_sums(weights: Floats, pairs: Pairs, factors: Floats | float = 1.0) -> Floats:
    """Sums over each group (batch, groups) of weight times factor (pairs,), in blocks of pairs."""
    from scipy.sparse import csr_array

    of_models = np.ascontiguousarray(weights.T)
    count, groups = len(pairs.first), len(pairs.starts)
    group = np.repeat(np.arange(groups), pairs.members)
    factor = np.broadcast_to(pairs.weight * np.asarray(factors), (count,))
    found = np.zeros((groups, len(weights)))
    step = max(1, _ENTRIES // len(weights))
    for start in range(0, count, step):
        part = slice(start, start + step)
        product = of_models[pairs.first[part]] * of_models[pairs.second[part]]
        places = group[part], np.arange(len(product))
        found += csr_array((factor[part], places), shape=(groups, len(product))) @ product
    return np.ascontiguousarray(found.T)


def _cells(weights: Floats, gap: Ints, plan: Plan, chunks: Sequence[Partitions]) -> list[Cells]:
    larger = weighted_tables(chunks, weights, Smaller.of(gap).sums)
    found = []
    for groups, (rows, member), table in zip(
        plan.partitions, _members(chunks), larger, strict=True
    ):
        sums, squares = (rows @ weights.T).T, (rows @ (weights * weights).T).T
        eye = np.eye(len(groups))
        different = sums[:, :, None] * sums[:, None, :] - squares[:, :, None] * eye
        found.append(Cells(groups, member, different, sums[:, :, None] * eye, table))
    return found


def _members(chunks: Sequence[Partitions]) -> Iterator[tuple[Weights, Weights]]:
    for chunk in chunks:
        for rows, columns in zip(chunk.rows, chunk.columns, strict=True):
            yield rows, chunk.member[:, columns]


def _kendall(values: Ints, smaller: Dominance, draws: Draws) -> tuple[Floats, Floats]:
    """Both variants (batch,)."""
    agreement = weighted_agreement(values, draws.gap, smaller, draws.weights)
    same_value = (tied_sums(values, draws.weights)[0] ** 2).sum(1)
    untied, untied_gaps = draws.total**2 - same_value, draws.total**2 - draws.gap_squares
    return (
        divide(agreement, draws.pairs),
        divide(agreement, np.sqrt(untied * untied_gaps)),
    )


def _sign_errors(values: Ints, draws: Draws, plan: Plan) -> tuple[Floats, Floats, Floats]:
    pairs, total = plan.environments, draws.changes
    if pairs is None or total is None:
        nothing = np.full(len(draws.weights), np.nan)
        return nothing, nothing, nothing
    loss = (1 - signs(values, draws.gap, pairs)) / 2
    errors = divide(pair_sums(draws.weights, pairs, loss), total)
    if plan.drawn_together:
        errors = drawn_together(errors, loss, pairs, len(plan.gap))
    return error_summaries(errors, total)
