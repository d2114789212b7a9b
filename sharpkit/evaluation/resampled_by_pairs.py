"""Sums over all pairs of models under many weightings at once.

A bootstrap resample of n models is a vector of multiplicities w. The bits of the pairs stay the
same, so a whole batch of resamples costs a few matrix products W X. Copies of one model are not
compared with each other: the pair (i, j) has weight w_i w_j, and the self pair that the `pgdl`
definition counts has weight w_i.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.compared_pairs import Compared, Pairs
from sharpkit.evaluation.grid import Bools, Floats, Ints, Weights
from sharpkit.evaluation.resampled_information import Cells, count


@dataclass(frozen=True)
class AllPairs:
    """The pairs of a zoo and the bits of their gaps."""

    compared: Compared
    gap: PairBits

    @classmethod
    def of(cls, compared: Compared) -> AllPairs:
        """The bits of the gaps, once for all measures."""
        gaps = compared.grid.gap
        # whole numbers up to n² are exact in float32 below 2**24
        dtype: type = np.float32 if len(gaps) < 4096 else np.float64
        bits: Bools = gaps[:, None] > gaps
        sign: Weights = bits.astype(dtype) - bits.T
        return cls(compared, PairBits(gaps, bits, sign))

    def of_measure(self, values: Floats) -> PairBits:
        """The bits of a measure (models,), no NaN."""
        return PairBits(values, self.gap.gap_bits, self.gap.gap_sign)

    def weights(self, weights: Ints) -> Weights:
        """Whole numbers (batch, models), in the type of the bits."""
        return weights.astype(self.gap.gap_sign.dtype)

    def cells(self, weights: Weights) -> list[Cells]:
        """Of each conditioning set."""
        bits = self.gap.gap_bits.astype(weights.dtype)
        found = []
        for groups in self.compared.conditioning_sets.partitions:
            member = np.zeros((len(bits), len(groups)), dtype=weights.dtype)
            for g, models in enumerate(groups):
                member[models, g] = 1
            larger = count(weights, groups, member, bits)[:, :, 0]
            found.append(Cells.of(weights, groups, member, larger))
        return found

    def of_pairs(self, pairs: Pairs, weights: Weights) -> WeightedPairs:
        """The pairs under weights of the models (batch, models)."""
        weight = weights[:, pairs.first].astype(np.float64) * weights[:, pairs.second]
        weight = weight * pairs.weight
        return WeightedPairs(pairs, weight, pairs.sums(weight))


@dataclass(frozen=True)
class PairBits:
    """One measure's pairs: their sums under weights of the models (batch, models)."""

    values: Floats
    gap_bits: Bools  # (models, models): whether the first gap is larger
    gap_sign: Weights  # (models, models): sign of the difference of gaps

    @functools.cached_property
    def _bits(self) -> Bools:
        bits: Bools = self.values[:, None] > self.values
        return bits

    @functools.cached_property
    def _sign(self) -> Weights:
        sign: Weights = self._bits.astype(self.gap_sign.dtype) - self._bits.T
        return sign

    @functools.cached_property
    def _concordance(self) -> Weights:
        """Sign of the value difference times that of the gap (models, models)."""
        return self._sign * self.gap_sign

    @functools.cached_property
    def _below(self) -> Weights:
        """1 where the second is smaller, 1/2 where equal (models, models)."""
        return (self._sign + 1) / 2

    @functools.cached_property
    def _larger(self) -> Weights:
        """Value bit, and value and gap bit, side by side (models, 2 models)."""
        both = np.concatenate([self._bits, self._bits & self.gap_bits], axis=1)
        larger: Weights = both.astype(self.gap_sign.dtype)
        return larger

    @functools.cached_property
    def _ties(self) -> bool:
        return len(np.unique(self.values)) < len(self.values)

    def ranks(self, weights: Weights) -> Floats:
        """Mean ranks (batch, models)."""
        return (weights @ self._below.T).astype(np.float64)

    def untied(self, weights: Weights) -> Floats:
        """Weight of the pairs of different values (batch,)."""
        if self._ties:
            return _both(weights, np.abs(self._sign))
        squares = (weights * weights).sum(1, dtype=np.float64)
        untied: Floats = weights.sum(1, dtype=np.float64) ** 2 - squares
        return untied

    def agreement(self, weights: Weights) -> Floats:
        """Weight of concordant less that of discordant pairs (batch,)."""
        return _both(weights, self._concordance)

    def signs(self, pairs: Pairs) -> Weights:
        """Whether each pair (pairs,) is ordered as its gaps: 1, -1, or 0 for a tie."""
        return self._concordance[pairs.first, pairs.second]

    def counts(self, weights: Weights, cells: Sequence[Cells]) -> Iterable[tuple[Floats, Floats]]:
        """Weights of the pairs with the larger value, and with larger value and gap."""
        counts = (count(weights, c.groups, c.member, self._larger) for c in cells)
        return ((of_cells[:, :, 0], of_cells[:, :, 1]) for of_cells in counts)


@dataclass(frozen=True)
class WeightedPairs:
    """Pairs of models with the weights that a batch of weightings gives them."""

    pairs: Pairs
    weight: Floats  # (batch, pairs)
    total: Floats  # (batch, groups)

    def sums(self, factors: Weights) -> Floats:
        """Sums over each group (batch, groups) of weight times factor (pairs,)."""
        return self.pairs.sums(self.weight * factors)


def _both(weights: Weights, bits: Weights) -> Floats:
    """Weight of the pairs (batch,) whose bit (models, models) is set."""
    found: Floats = ((weights @ bits) * weights).sum(1, dtype=np.float64)
    return found
