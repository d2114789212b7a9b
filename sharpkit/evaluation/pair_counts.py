"""Counts of ordered model pairs in the cells of a conditioning set, and their information.

Every pair (i, j) has two bits, gap_i > gap_j and value_i > value_j; a cell is what the
hyperparameters of a conditioning set say about i and about j. With M the one-hot matrix of the
models' groups and X a matrix of bits, all cells of a set are counted by Mᵀ X M. Counts are exact
integers; logarithms come afterwards. Of many models X is not formed: the same integers come from
sorting.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sharpkit.evaluation.grid import Floats, Ints
from sharpkit.evaluation.sorted_pairs import (
    MANY,
    Dominance,
    Smaller,
    by_width,
    dense_ranks,
    in_chunks,
    weighted_tables,
)

PLUS, MINUS = 0, 1
INSIDE_LOG = 1e-12  # the competition adds it inside the logarithm of the gap entropy
_ROWS = 256  # models whose pairs are formed at a time
_COLUMNS = 512  # groups, over all sets, that are counted at a time


def count_pairs(gap: Floats, value: Floats, groups: Sequence[Ints]) -> list[Ints]:
    """Tables of ordered pairs, self pairs included, for each conditioning set.

    Args:
        gap: Generalization gaps (models,).
        value: Values of the measure (models,).
        groups: For each set, the group of each model (models,); models with -1 are left out.

    Returns:
        list: For each set a table (groups of i, groups of j, 2 gap bits, 2 value bits), in which
            index 0 is a strictly larger first model and index 1 everything else, ties and NaN too.
    """
    if len(gap) > MANY:
        return _count_sorted(gap, value, groups)
    sizes = [int(g.max(initial=-1)) + 1 for g in groups]
    tables: list[Ints] = []
    for part in by_width(list(zip(groups, sizes, strict=True)), sizes, _COLUMNS):
        tables += _count_batch(gap, value, part)
    return tables


def without_self_pairs(table: Ints, groups: Ints) -> Ints:
    """The table (groups, groups, 2, 2) less the pairs of a model with itself."""
    size = table.shape[0]
    table = table.copy()
    diagonal = np.arange(size)
    table[diagonal, diagonal, MINUS, MINUS] -= np.bincount(groups[groups >= 0], minlength=size)
    return table


def mutual_information(tables: NDArray[np.generic]) -> Floats:
    """Mutual information in bits of the two bits of each table (..., 2, 2); NaN if it is empty."""
    counts = tables.astype(np.float64)
    total = counts.sum((-2, -1))
    inner = (
        xlogx(counts).sum((-2, -1))
        - xlogx(counts.sum(-1)).sum(-1)
        - xlogx(counts.sum(-2)).sum(-1)
        + xlogx(total)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        # rounding of the four terms can leave -1e-16; a table with one empty side has none at all
        information: Floats = np.maximum(inner / total, 0.0)
    degenerate = (counts.sum(-1) == 0).any(-1) | (counts.sum(-2) == 0).any(-1)
    return np.where(degenerate, np.where(total > 0, 0.0, np.nan), information)


def gap_entropy(tables: NDArray[np.generic], inside_log: float = 0.0) -> Floats:
    """Entropy in bits of the gap bit of each table (..., 2, 2); NaN if it is empty.

    `inside_log` is added to the probabilities inside the logarithm only.
    """
    sides = tables.astype(np.float64).sum(-1)  # (..., 2)
    total = sides.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = sides / total[..., None]
        logs = np.log2(np.where(p + inside_log == 0, 1.0, p + inside_log))
    entropy: Floats = -(p * logs).sum(-1)
    return entropy


def xlogx(counts: Floats) -> Floats:
    """x log2 x of whole numbers, with 0 log 0 = 0."""
    result: Floats = counts * np.log2(np.maximum(counts, 1.0))
    return result


def _count_batch(gap: Floats, value: Floats, sets: Sequence[tuple[Ints, int]]) -> list[Ints]:
    n, (groups, sizes) = len(gap), zip(*sets, strict=True)
    ends = np.cumsum(sizes)
    member = np.zeros((n, int(ends[-1])), dtype=np.float32)  # (models, groups of all sets)
    for g, end, size in zip(groups, ends, sizes, strict=True):
        known = np.flatnonzero(g >= 0)
        member[known, g[known] + end - size] = 1.0
    sums = [np.zeros((3, size, size)) for size in sizes]
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        larger_gap = gap[rows, None] > gap
        larger_value = value[rows, None] > value
        bits = np.stack([larger_gap, larger_value, larger_gap & larger_value])
        # (3, rows, groups): each sum is at most n < 2**24, exact in float32
        partial = (bits.reshape(-1, n).astype(np.float32) @ member).reshape(3, -1, member.shape[1])
        for total, end, size in zip(sums, ends, sizes, strict=True):
            block = slice(int(end) - size, int(end))
            total += member[rows, block].T.astype(np.float64) @ partial[:, :, block]
    tables = []
    for total, end, size in zip(sums, ends, sizes, strict=True):
        members = member[:, int(end) - size : int(end)].sum(0, dtype=np.float64)
        tables.append(_assemble(np.outer(members, members), *total))
    return tables


def _count_sorted(gap: Floats, value: Floats, groups: Sequence[Ints]) -> list[Ints]:
    """The same tables; a model with NaN is never the larger or the smaller one."""
    gaps, values = dense_ranks(gap), dense_ranks(value)
    known = ~np.isnan([gap, value])
    chunks = in_chunks(groups)
    larger_gap, larger_value, both = (
        weighted_tables(chunks, kept[None].astype(np.float64), sums)
        for kept, sums in (
            (known[0], Smaller.of(gaps).sums),
            (known[1], Smaller.of(values).sums),
            (known[0] & known[1], Dominance.of(values, gaps).sums),
        )
    )
    members = [np.bincount(g[g >= 0], minlength=int(g.max(initial=-1)) + 1) for g in groups]
    return [
        _assemble(np.outer(m, m), *(t[0] for t in of_set))
        for m, *of_set in zip(members, larger_gap, larger_value, both, strict=True)
    ]


def _assemble(pairs: Floats | Ints, larger_gap: Floats, larger_value: Floats, both: Floats) -> Ints:
    table = np.empty((*pairs.shape, 2, 2), dtype=np.int64)
    table[..., PLUS, PLUS] = both
    table[..., PLUS, MINUS] = larger_gap - both
    table[..., MINUS, PLUS] = larger_value - both
    table[..., MINUS, MINUS] = pairs - larger_gap - larger_value + both
    return table
