"""Conditional mutual information of many shuffles of one measure at once.

With M the one-hot matrix of the models' groups in every conditioning set, X the bits "larger
value" of a shuffle and Y those of the gap, all cells of all sets are counted by Mᵀ X M and
Mᵀ (X ∘ Y) M. One product with M gives both: the entries of X are weighted B + Y, B a power of two
above the number of models, so that the quotient by B counts X and the remainder X ∘ Y. Counts are
exact integers. Of many models the pairs are not formed but counted by sorting.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharpkit.evaluation.competition_program import CellMap
from sharpkit.evaluation.grid import Bools, Floats, Grid, Ints, Weights
from sharpkit.evaluation.pair_counts import INSIDE_LOG, xlogx
from sharpkit.evaluation.sorted_pairs import (
    COLUMNS,
    MANY,
    Dominance,
    Smaller,
    by_width,
    dense_ranks,
)
from sharpkit.evaluation.threads import in_threads

_COLUMNS = 256  # groups, over all sets, that are counted at a time
_ENTRIES = 500_000  # of X held at a time
_TABLED = 2_000_000  # x log x is looked up for counts up to this


@dataclass(frozen=True)
class _Block:
    """Conditioning sets that are counted together; cells are flat, set after set."""

    member: Weights  # (models, groups of all these sets)
    flat: Ints  # (cells,): where each cell lies in a matrix (groups, groups)
    starts: Ints  # (sets,): first cell of each set
    total: Floats  # (cells,): pairs of models, self pairs included
    itself: Floats  # (cells,): self pairs
    gap: Floats  # (cells,): pairs with the larger gap first
    pgdl: Bools  # (cells,): whether the pgdl definition counts it
    pgdl_set: Bools  # (sets,)
    pgdl_entropy: Floats  # (sets,): mean over cells
    jiang_entropy: Floats  # (sets,): times the number of pairs

    @functools.cached_property
    def rows(self) -> Any:
        """The members of each group, a sparse matrix (groups of all these sets, models)."""
        from scipy.sparse import csr_array

        return csr_array(self.member.T.astype(np.float64))

    def cells(self, sums: Weights) -> Floats:
        """Sums (models, groups of all these sets) summed over the first group of each cell."""
        found: Floats = (self.rows @ sums.astype(np.float64)).reshape(-1)[self.flat]
        return found


@dataclass(frozen=True)
class ShuffledInformation:
    """Of shuffles, by both definitions; what depends on the zoo alone is computed once."""

    models: int
    gap: Ints  # (models,): ranks
    weights: Weights | None  # (models, models): B + Y; None of many models
    base: float
    blocks: list[_Block]
    table: Floats  # x log2 x of 0, 1, ...; empty if there are too many
    pgdl_defined: bool  # whether every set of that definition has a value

    @classmethod
    def of(cls, grid: Grid) -> ShuffledInformation:
        """Cells of the zoo's conditioning sets, each distinct partition of the models once."""
        n = len(grid)
        pairs = list(itertools.combinations(range(len(grid.names)), 2))
        kept: dict[tuple[int, ...], Bools | None] = {pair: _kept(grid, pair) for pair in pairs}
        found: dict[bytes, tuple[Ints, Bools | None]] = {}
        for columns in (*kept, *((h,) for h in range(len(grid.names))), ()):
            groups = grid.groups(columns)
            found.setdefault(groups.tobytes(), (groups, kept.get(columns)))
        base = float(2 ** int(np.ceil(np.log2(n + 1))))
        # a sum over a row is below (n + 1) B, exact in float32 below 2**24
        dtype = np.float32 if n > MANY or (n + 1) * base < 2**24 else np.float64
        gap = dense_ranks(grid.gap)
        weights: Weights | None = None
        larger: Callable[[Weights], Weights] = Smaller.of(gap).sums
        if n <= MANY:
            gap_bits: Weights = (grid.gap[:, None] > grid.gap).astype(dtype)
            weights, larger = base + gap_bits, gap_bits.__matmul__
        sets = [(groups, cells) for groups, cells in found.values() if groups.max(initial=-1) >= 0]
        sizes = [int(groups.max()) + 1 for groups, _ in sets]
        parts = by_width(sets, sizes, _COLUMNS if n <= MANY else COLUMNS)
        blocks = [_block(part, larger, dtype) for part in parts]
        most = int(max(block.total.max(initial=0) for block in blocks))
        table = xlogx(np.arange(most + 1, dtype=np.float64)) if most <= _TABLED else np.empty(0)
        return cls(n, gap, weights, base, blocks, table, _all_kept(kept))

    def __call__(self, values: Floats) -> tuple[Floats, Floats]:
        """By `pgdl` and `jiang`, (measures,), of measures (measures, models) without NaN."""
        step = max(1, _ENTRIES // (self.models**2 if self.models <= MANY else self.models))
        found = [self._batch(values[s : s + step]) for s in range(0, len(values), step)]
        pgdl, jiang = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return pgdl, jiang

    def _batch(self, values: Floats) -> tuple[Floats, Floats]:
        pgdl, jiang = ([np.full((len(values), 1), np.inf)] for _ in range(2))
        for block, (larger, both) in zip(self.blocks, self._counts(values), strict=True):
            pgdl.append(self._unweighted(block, larger, both))
            jiang.append(self._weighted(block, larger, both))
        least = [np.fmin.reduce(np.concatenate(parts, axis=1), axis=1) for parts in (pgdl, jiang)]
        first, second = (np.where(np.isinf(value), np.nan, value) for value in least)
        return (first if self.pgdl_defined else np.full_like(first, np.nan)), second

    def _counts(self, values: Floats) -> Iterator[tuple[Floats, Floats]]:
        """Of each block, pairs with the larger value, and value and gap (batch, cells)."""
        if self.weights is None:
            for of_block in zip(*in_threads(self._sorted_counts, list(values)), strict=True):
                larger, both = (np.array(cells) for cells in zip(*of_block, strict=True))
                yield larger, both
            return
        weighted = (values[:, :, None] > values[:, None]) * self.weights
        for block in self.blocks:
            yield self._count(weighted, block)

    def _sorted_counts(self, values: Floats) -> list[tuple[Floats, Floats]]:
        """The same (cells,) of one measure (models,), by sorting."""
        ranks = dense_ranks(values)
        larger, both = Smaller.of(ranks), Dominance.of(ranks, self.gap)
        return [
            (block.cells(larger.sums(block.member)), block.cells(both.sums(block.member)))
            for block in self.blocks
        ]

    def _count(self, weighted: Weights, block: _Block) -> tuple[Floats, Floats]:
        batch, n, _ = weighted.shape
        sums = (weighted.reshape(-1, n) @ block.member).reshape(batch, n, -1)
        larger = np.floor(sums * (1 / self.base))
        both = sums - self.base * larger
        first, second = (
            (block.member.T @ part).reshape(batch, -1)[:, block.flat].astype(np.float64)
            for part in (larger, both)
        )
        return first, second

    def _unweighted(self, block: _Block, larger: Floats, both: Floats) -> Floats:
        """Mean information over mean entropy (batch, sets of the pgdl definition)."""
        information = self._information(block.total, block.gap, larger, both)
        share = block.pgdl / np.maximum(block.total, 1)
        return _ratio(information * share, block.starts, block.pgdl_entropy, block.pgdl_set)

    def _weighted(self, block: _Block, larger: Floats, both: Floats) -> Floats:
        """Information over entropy (batch, sets), cells weighted by their pairs."""
        pairs = block.total - block.itself
        information = self._information(pairs, block.gap, larger, both)
        every = np.ones(len(block.starts), dtype=np.bool_)
        return _ratio(information, block.starts, block.jiang_entropy, every)

    def _information(self, total: Floats, gap: Floats, larger: Floats, both: Floats) -> Floats:
        """Mutual information of each cell (batch, cells) in bits, times its pairs."""
        joint = self._x(both) + self._x(gap - both) + self._x(larger - both)
        joint += self._x(total - gap - larger + both)
        sides = self._x(gap) + self._x(total - gap)
        shared = joint - sides - self._x(larger) - self._x(total - larger) + self._x(total)
        # a cell with one empty side has none at all, which rounding would not give
        degenerate = (gap == 0) | (gap == total) | (larger == 0) | (larger == total)
        return np.where(degenerate, 0.0, np.maximum(shared, 0.0))

    def _x(self, counts: Floats) -> Floats:
        if len(self.table) == 0:
            return xlogx(counts.astype(np.float64))
        found: Floats = self.table[counts.astype(np.int64)]
        return found


def _ratio(information: Floats, starts: Ints, entropy: Floats, wanted: Bools) -> Floats:
    wanted = wanted & (entropy > 1e-9)
    sums = np.add.reduceat(information, starts, axis=1)[:, wanted]
    ratios: Floats = sums / entropy[wanted]
    return ratios


def pgdl_defined(grid: Grid) -> bool:
    """Whether every conditioning set has a value by `pgdl`: a pair at least, and no empty cell."""
    pairs = itertools.combinations(range(len(grid.names)), 2)
    return _all_kept({pair: _kept(grid, pair) for pair in pairs})


def _all_kept(kept: Mapping[tuple[int, ...], Bools | None]) -> bool:
    return bool(kept) and all(cells is not None for cells in kept.values())


def _kept(grid: Grid, pair: tuple[int, int]) -> Bools | None:
    """Pairs of groups that the program counts in either order; None if a cell stays empty."""
    kept = [cells.kept_pairs() for cells in CellMap.of(grid, pair, grid.groups(pair))]
    if kept[0] is None or kept[1] is None:
        return None
    return kept[0] & kept[1]


def _block(
    sets: list[tuple[Ints, Bools | None]], larger_gap: Callable[[Weights], Weights], dtype: Any
) -> _Block:
    sizes = [int(groups.max()) + 1 for groups, _ in sets]
    ends = np.cumsum(sizes)
    member = np.zeros((len(sets[0][0]), int(ends[-1])), dtype=dtype)
    rows, columns, pgdl = [], [], []
    for (groups, kept), end, size in zip(sets, ends, sizes, strict=True):
        known = np.flatnonzero(groups >= 0)
        member[known, groups[known] + end - size] = 1
        row, column = np.divmod(np.arange(size * size), size)
        rows.append(row + end - size)
        columns.append(column + end - size)
        pgdl.append(np.zeros(size * size, dtype=np.bool_) if kept is None else kept.reshape(-1))
    row, column, counted = (np.concatenate(parts) for parts in (rows, columns, pgdl))
    starts = np.cumsum([0, *(size * size for size in sizes[:-1])])
    members = member.sum(0, dtype=np.float64)
    total = members[row] * members[column]
    itself = np.where(row == column, members[row], 0.0)
    before = larger_gap(member).astype(np.float64)
    gap = (member.T.astype(np.float64) @ before)[row, column]

    def entropy(pairs: Floats) -> Floats:
        return xlogx(pairs) - xlogx(gap) - xlogx(pairs - gap)

    # −p log2(p + c) = −p log2 p − p log2(1 + c / p), and c / p is tiny
    inside = ((gap > 0) * 1.0 + (gap < total)) * INSIDE_LOG / np.log(2)
    unweighted = counted * (entropy(total) / np.maximum(total, 1) - inside)
    flat, in_pgdl = row * member.shape[1] + column, np.array([kept is not None for _, kept in sets])
    mean, weighted = (np.add.reduceat(e, starts) for e in (unweighted, entropy(total - itself)))
    return _Block(member, flat, starts, total, itself, gap, counted, in_pgdl, mean, weighted)
