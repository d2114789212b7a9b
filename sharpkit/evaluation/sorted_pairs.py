"""Pairs of many models, counted by sorting instead of one by one.

Which models have both a smaller value and a smaller gap? Models sorted by value are cut into slabs,
and so are models sorted by gap. Pairs in different slabs of both are counted by cumulative sums
over a square of slabs; those that share a slab, few, are compared one by one. Ties need no care
once both orders break them against each other. All sums are of whole numbers, exact in float32
while they stay below 2**24.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sharpkit.evaluation.grid import Floats, Ints, Weights
from sharpkit.evaluation.threads import in_threads

_Item = TypeVar("_Item")

MANY = 512  # models up to which all pairs are formed
_SLAB = 64  # models of a slab
COLUMNS = 64  # groups, over several partitions, whose sums stay in the cache together
_LEAF = 32  # neighbours that are compared one by one in counting orders


def dense_ranks(values: Floats | Ints) -> Ints:
    """Ranks (models,) from 0 without holes, the same for equal values."""
    ranks: Ints = np.unique(values, return_inverse=True)[1].astype(np.int64)
    return ranks


def pair_places(values: Ints, gaps: Ints) -> tuple[Ints, Ints]:
    """Places (..., models) of the models in two orders without ties.

    Model i comes after j in both orders exactly if values_i > values_j and gaps_i > gaps_j: equal
    values are ordered by falling gaps, equal gaps by falling values, and models that agree in both
    one way here, the other way there.

    Args:
        values: Ranks of the values (..., models), from 0.
        gaps: Ranks of the gaps, alike.
    """
    n = values.shape[-1]
    itself = np.arange(n)
    first, second = n - 1 - gaps, n - 1 - values
    by_value = np.argsort((values * n + first) * n + itself, axis=-1)
    by_gap = np.argsort((gaps * n + second) * n + (n - 1 - itself), axis=-1)
    return _places(by_value), _places(by_gap)


def concordant_pairs(first: Ints, second: Ints) -> Ints:
    """Pairs of models (orders,) that two orders without ties place alike.

    Args:
        first: Places (orders, models).
        second: Places in the other orders, alike.
    """
    rows, n = first.shape
    following = np.empty((rows, n), dtype=np.int32)
    np.put_along_axis(following, first, second.astype(np.int32), axis=1)
    width = _LEAF
    blocks = -(-n // width)
    blocks = 1 << (blocks - 1).bit_length()
    # what fills up the last blocks comes after everything else, in falling order
    filled = np.arange(n + blocks * width, n, -1, dtype=np.int32) + np.int32(n)
    padded = np.broadcast_to(filled, (rows, blocks * width)).copy()
    padded[:, :n] = following
    leaves = padded.reshape(rows, blocks, width)
    found = np.zeros(rows, dtype=np.int64)
    for step in range(1, width):
        found += np.count_nonzero(leaves[:, :, :-step] < leaves[:, :, step:], axis=(1, 2))
    # merging two sorted halves tells how many of the first come before each of the second
    while blocks > 1:
        halves = padded.reshape(rows, blocks, width) * 2
        halves[:, 1::2] += 1
        merged = np.sort(halves.reshape(rows, blocks // 2, 2 * width), axis=2)
        places = ((merged & 1) * np.arange(2 * width, dtype=np.int32)).sum((1, 2), dtype=np.int64)
        found += places - blocks // 2 * (width * (width - 1) // 2)
        padded = merged >> 1
        blocks, width = blocks // 2, 2 * width
    # pairs of a model and what fills up its row are all placed alike
    counted: Ints = found - n * (padded.size // rows - n)
    return counted


@dataclass(frozen=True)
class Smaller:
    """Which models are smaller in one rank."""

    order: Ints  # (models,): by rank
    below: Ints  # (models,): how many models are smaller

    @classmethod
    def of(cls, ranks: Ints) -> Smaller:
        """From ranks (models,)."""
        order = np.argsort(ranks, kind="stable")
        return cls(order, np.searchsorted(ranks[order], ranks))

    def sums(self, columns: Weights) -> Weights:
        """For each model, sums (models, columns) over the models that are smaller."""
        n, width = columns.shape
        slabs = -(-n // _SLAB)
        rows = np.zeros((slabs, _SLAB, width), dtype=columns.dtype)
        flat = rows.reshape(-1, width)
        flat[:n] = columns[self.order]
        for k in range(1, _SLAB):  # additions of rows: a cumulative sum is many times slower
            rows[:, k] += rows[:, k - 1]
        for k in range(1, slabs):
            rows[k] += rows[k - 1, -1]
        found: Weights = flat[self.below - 1]
        found[self.below == 0] = 0
        return found


@dataclass(frozen=True)
class Dominance:
    """Which models are smaller in both the value and the gap, without a matrix of all pairs."""

    by_value: Ints  # (models,): place in the order of values
    by_gap: Ints  # (models,)
    same_value_slab: Weights  # (slabs, slab, slab): 1 where the second comes before in both
    same_gap_slab: Weights  # the same, without pairs that share the slab of values
    cell: Ints  # (models,): slab of values times slabs + slab of gaps

    @classmethod
    def of(cls, values: Ints, gaps: Ints) -> Dominance:
        """From ranks (models,) of values and gaps."""
        by_value, by_gap = pair_places(values, gaps)
        slabs = -(-len(values) // _SLAB)
        value_slab, gap_slab = by_value // _SLAB, by_gap // _SLAB
        return cls(
            by_value,
            by_gap,
            _earlier(_sorted_by(by_value, by_gap)),
            _earlier(_sorted_by(by_gap, value_slab)),
            value_slab * slabs + gap_slab,
        )

    def sums(self, columns: Weights) -> Weights:
        """For each model, sums (models, columns) over the models that are smaller in both."""
        from scipy.sparse import csr_array

        n, width = columns.shape
        slabs = len(self.same_value_slab)
        places = self.cell, np.arange(n)
        one = csr_array((np.ones(n, columns.dtype), places), shape=(slabs**2, n))
        square = (one @ columns).reshape(slabs, slabs, width)
        for k in range(1, slabs):  # additions of rows: a cumulative sum is many times slower
            square[k] += square[k - 1]
        for k in range(1, slabs):
            square[:, k] += square[:, k - 1]
        inner = (self.cell // slabs > 0) & (self.cell % slabs > 0)
        found: Weights = square.reshape(-1, width)[np.maximum(self.cell - slabs - 1, 0)]
        found[~inner] = 0
        for place, bits in (
            (self.by_value, self.same_value_slab),
            (self.by_gap, self.same_gap_slab),
        ):
            rows = np.zeros((slabs, _SLAB, width), dtype=columns.dtype)
            rows.reshape(-1, width)[place] = columns
            found += np.matmul(bits, rows).reshape(-1, width)[place]
        return found


@dataclass(frozen=True)
class Partitions:
    """Several partitions of the same models into groups, side by side."""

    member: Weights  # (models, groups of all partitions): 1 for the groups of a model
    columns: list[slice]  # of each partition
    rows: list[Any]  # of each partition, a sparse matrix (groups, models)

    @classmethod
    def of(cls, groups: Sequence[Ints]) -> Partitions:
        """From the group of each model (models,) in each partition; -1 for none."""
        from scipy.sparse import csr_array

        sizes = [int(g.max(initial=-1)) + 1 for g in groups]
        ends = np.cumsum([0, *sizes])
        member = np.zeros((len(groups[0]), int(ends[-1])), dtype=np.float32)
        columns, rows = [], []
        for g, start, size in zip(groups, ends.tolist(), sizes, strict=False):
            known = np.flatnonzero(g >= 0)
            member[known, g[known] + start] = 1
            columns.append(slice(start, start + size))
            rows.append(csr_array((np.ones(len(known)), (g[known], known)), (size, len(g))))
        return cls(member, columns, rows)

    def tables(self, sums: Weights) -> list[Floats]:
        """Sums (models, groups of all partitions) summed over each partition's own groups."""
        return [
            rows @ sums[:, columns].astype(np.float64)
            for rows, columns in zip(self.rows, self.columns, strict=True)
        ]


def by_width(items: Sequence[_Item], widths: Sequence[int], most: int) -> list[list[_Item]]:
    """The items in order, as many together as have a width of at most so much; one at least.

    Example:
        >>> by_width("abcd", [2, 1, 1, 9], 3)
        [['a', 'b'], ['c'], ['d']]
    """
    parts: list[list[_Item]] = []
    width = 0
    for item, own in zip(items, widths, strict=True):
        if not parts or width + own > most:
            parts.append([])
            width = 0
        parts[-1].append(item)
        width += own
    return parts


def in_chunks(groups: Sequence[Ints]) -> list[Partitions]:
    """Partitions, given by the group of each model (models,), a few at a time."""
    sizes = [int(own.max(initial=-1)) + 1 for own in groups]
    return [Partitions.of(part) for part in by_width(groups, sizes, COLUMNS)]


def weighted_tables(
    chunks: Sequence[Partitions], weights: Weights, sums: Callable[[Weights], Weights]
) -> list[Floats]:
    """Weights of pairs by groups (batch, groups, groups), of each partition.

    Args:
        chunks: The partitions.
        weights: Of the models (batch, models), whole numbers.
        sums: Of columns (models, columns), for each model over those that count beside it, as
            `Smaller.sums` and `Dominance.sums`.
    """

    def of_weights(w: Weights) -> list[Floats]:
        tables = []
        for chunk in chunks:
            counted = sums(chunk.member * w[:, None])
            counted *= w[:, None]
            tables += chunk.tables(counted)
        return tables

    found = in_threads(of_weights, list(weights.astype(np.float32)))
    return [np.stack(tables) for tables in zip(*found, strict=True)]


def _places(order: Ints) -> Ints:
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), -1)
    return places


def _sorted_by(place: Ints, values: Ints) -> NDArray[np.int32]:
    """Values (slabs, slab) in the order of the places, the last slab filled with the largest."""
    slabs = -(-len(place) // _SLAB)
    rows = np.full(slabs * _SLAB, np.iinfo(np.int32).max, dtype=np.int32)
    rows[place] = values
    return rows.reshape(slabs, _SLAB)


def _earlier(rows: NDArray[np.int32]) -> Weights:
    """1 where the second of two in a slab comes before the first and is smaller."""
    smaller = rows[:, None, :] < rows[:, :, None]
    return (smaller & np.tri(_SLAB, k=-1, dtype=np.bool_)).astype(np.float32)
