"""Sums over the pairs of many models under many weightings, without forming all pairs.

In time n log n and memory n times groups.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.compared_pairs import Compared, Pairs
from sharpkit.evaluation.grid import Floats, Ints, Weights
from sharpkit.evaluation.resampled_information import Cells
from sharpkit.evaluation.sorted_pairs import (
    Dominance,
    Partitions,
    Smaller,
    dense_ranks,
    in_chunks,
    weighted_tables,
)

_ENTRIES = 4_000_000  # weights of pairs held at a time


@dataclass(frozen=True)
class SortedModels:
    """The models of a zoo in the order of their gaps."""

    compared: Compared
    gap: RankedModels

    @classmethod
    def of(cls, compared: Compared) -> SortedModels:
        """The order of the gaps and the conditioning sets, once for all measures."""
        gap, groups = compared.grid.gap, []
        for models in compared.conditioning_sets.partitions:
            group = np.full(len(gap), -1, dtype=np.int64)
            for g, members in enumerate(models):
                group[members] = g
            groups.append(group)
        ranks = dense_ranks(gap)
        return cls(compared, RankedModels(gap, ranks, ranks, in_chunks(groups)))

    def of_measure(self, values: Floats) -> RankedModels:
        """The order of a measure (models,), no NaN."""
        return RankedModels(values, dense_ranks(values), self.gap.ranked, self.gap.chunks)

    def weights(self, weights: Ints) -> Weights:
        """Whole numbers (batch, models), in the type of the sums."""
        return weights.astype(np.float64)

    def cells(self, weights: Weights) -> list[Cells]:
        """Of each conditioning set."""
        chunks, sets = self.gap.chunks, self.compared.conditioning_sets.partitions
        larger = weighted_tables(chunks, weights, Smaller.of(self.gap.ranked).sums)
        members = [chunk.member[:, columns] for chunk in chunks for columns in chunk.columns]
        return [Cells.of(weights, *own) for own in zip(sets, members, larger, strict=True)]

    def of_pairs(self, pairs: Pairs, weights: Weights) -> StreamedPairs:
        """The pairs under weights of the models (batch, models)."""
        return StreamedPairs(pairs, weights, pair_sums(weights, pairs))


@dataclass(frozen=True)
class RankedModels:
    """One measure's order of the models: sums over pairs under weights (batch, models)."""

    values: Floats
    ranked: Ints  # (models,): ranks of the values
    gaps: Ints  # (models,): ranks of the gaps
    chunks: list[Partitions]  # the conditioning sets, a few at a time

    @functools.cached_property
    def _smaller(self) -> Dominance:
        return Dominance.of(self.ranked, self.gaps)

    def ranks(self, weights: Weights) -> Floats:
        """Mean ranks (batch, models)."""
        return tied_sums(self.ranked, weights)[1]

    def untied(self, weights: Weights) -> Floats:
        """Weight of the pairs of different values (batch,)."""
        same = (tied_sums(self.ranked, weights)[0] ** 2).sum(1)
        untied: Floats = weights.sum(1) ** 2 - same
        return untied

    def agreement(self, weights: Weights) -> Floats:
        """Weight of concordant less that of discordant pairs (batch,)."""
        return weighted_agreement(self.ranked, self.gaps, self._smaller, weights)

    def signs(self, pairs: Pairs) -> Weights:
        """Whether each pair (pairs,) is ordered as its gaps: 1, -1, or 0 for a tie."""
        values, gaps = (r[pairs.first] - r[pairs.second] for r in (self.ranked, self.gaps))
        found: Floats = (np.sign(values) * np.sign(gaps)).astype(np.float64)
        return found

    def counts(self, weights: Weights, cells: Sequence[Cells]) -> Iterable[tuple[Floats, Floats]]:
        """Weights of the pairs with the larger value, and with larger value and gap."""
        larger = weighted_tables(self.chunks, weights, Smaller.of(self.ranked).sums)
        both = weighted_tables(self.chunks, weights, self._smaller.sums)
        return zip(larger, both, strict=True)


@dataclass(frozen=True)
class StreamedPairs:
    """Pairs of models whose weights are computed as they are summed."""

    pairs: Pairs
    weights: Weights  # (batch, models)
    total: Floats  # (batch, groups)

    def sums(self, factors: Weights) -> Floats:
        """Sums over each group (batch, groups) of weight times factor (pairs,)."""
        return pair_sums(self.weights, self.pairs, factors)


def weighted_agreement(values: Ints, gap: Ints, smaller: Dominance, weights: Weights) -> Floats:
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


def tied_sums(ranks: Ints, weights: Weights) -> tuple[Floats, Floats]:
    """Weights of models of the same rank (batch, ranks), and mean ranks (batch, models).

    A weighted mean rank counts the models below once and the equal ones, itself included, half.
    """
    order = np.argsort(ranks, kind="stable")
    starts = np.flatnonzero(np.diff(ranks[order], prepend=-1))
    sums: Floats = np.add.reduceat(weights[:, order], starts, axis=1)
    middles: Floats = (np.cumsum(sums, axis=1) - sums / 2)[:, ranks]
    return sums, middles


def pair_sums(weights: Weights, pairs: Pairs, factors: Weights | float = 1.0) -> Floats:
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
