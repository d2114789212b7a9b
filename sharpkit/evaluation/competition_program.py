"""Two habits of the competition's scoring program that decide a score now and then.

It names the cells of a conditioning set by words, and takes the minimum over sets in a way that
lets NaN in and out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.grid import Bools, Floats, Grid, Ints


def program_minimum(
    scores: Mapping[tuple[str, ...], float],
) -> tuple[float, tuple[str, ...] | None]:
    """The running minimum as the program takes it, infinity if there is nothing to compare.

    A NaN replaces whatever was the minimum and is replaced by the next score.
    """
    score, argmin = math.inf, None
    for names, value in scores.items():
        if not score < value and not (value == score and argmin):
            score, argmin = value, names
    return score, argmin


@dataclass(frozen=True)
class CellMap:
    """Where the program counts a pair of groups: it joins the values of both models to one word.

    Two combinations whose words are the same share a cell, and the other cell stays empty; a word
    that no combination of possible values makes is not counted.
    """

    cells: int  # how many the program has
    index: Ints | None  # (groups, groups): cell of each pair of groups, -1 for none; None: too few

    @classmethod
    def of(cls, grid: Grid, pair: tuple[int, int], groups: Ints) -> tuple[CellMap, CellMap]:
        """Maps for the two orders of a pair of hyperparameters, whose groups these are (models,).

        One object if the two agree."""
        key = "cells", pair
        if key not in grid.derived:
            _, rows = np.unique(groups[groups >= 0], return_index=True)
            settings = grid.codes[groups >= 0][rows]
            forward = cls._ordered(grid, settings, pair)
            backward = cls._ordered(grid, settings, pair[::-1])
            agree = forward.one_to_one and backward.one_to_one
            grid.derived[key] = forward, (forward if agree else backward)
        found: tuple[CellMap, CellMap] = grid.derived[key]
        return found

    @classmethod
    def _ordered(cls, grid: Grid, settings: Ints, pair: tuple[int, int]) -> CellMap:
        first, second = pair
        cells = len(grid.possible[first]) ** 2 * len(grid.possible[second]) ** 2
        if cells > len(settings) ** 2:
            return cls(cells, None)
        words = itertools.product(_words(grid.possible[first]), _words(grid.possible[second]))
        number = {a + b: k for k, (a, b) in enumerate(words)}
        one = [grid.levels[first][code] for code in settings[:, first]]
        two = [grid.levels[second][code] for code in settings[:, second]]
        both = list(zip(one, two, strict=True))
        found = [number.get(a + c + b + d, -1) for a, b in both for c, d in both]
        return cls(cells, np.array(found, dtype=np.int64).reshape(len(both), len(both)))

    @functools.cached_property
    def one_to_one(self) -> bool:
        """Whether every pair of groups has a cell of its own, and no cell is left over."""
        return self.index is not None and np.array_equal(
            np.sort(self.index, axis=None), np.arange(self.cells)
        )

    def fill(self, table: Ints) -> Floats:
        """The counts of a table (groups, groups, 2, 2) in the program's cells (cells, 2, 2)."""
        if self.index is None:  # more cells than pairs of groups: one at least stays empty
            return np.zeros((1, 2, 2))
        if self.one_to_one:
            return table.reshape(-1, 2, 2).astype(np.float64)
        filled = np.zeros((self.cells, 2, 2))
        kept = self.index >= 0
        np.add.at(filled, self.index[kept], table[kept])
        return filled

    def kept_pairs(self) -> Bools | None:
        """Pairs of groups that are counted (groups, groups); None if a cell stays empty."""
        if self.index is None:
            return None
        kept = self.index >= 0
        filled = np.array_equal(np.sort(self.index[kept]), np.arange(self.cells))
        return kept if filled else None

    def pairs_kept(self, table: Ints) -> int:
        """How many pairs of models the program counts."""
        return int(table.sum() if self.index is None else table[self.index >= 0].sum())


def _words(values: Iterable[str]) -> list[str]:
    values = list(values)
    return [a + b for a in values for b in values]
