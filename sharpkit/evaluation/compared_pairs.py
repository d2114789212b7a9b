"""Which models are compared: conditioning sets, and pairs that differ in one hyperparameter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.competition_program import CellMap
from sharpkit.evaluation.grid import Bools, Floats, Grid, Ints
from sharpkit.evaluation.sign_errors import Environments


@dataclass(frozen=True)
class Pairs:
    """Pairs of models in groups that follow one another."""

    first: Ints
    second: Ints
    starts: Ints  # where each group begins
    weight: Floats | float = 1.0  # (pairs,)

    @classmethod
    def of(cls, first: Ints, second: Ints, group: Ints, weight: Floats | None = None) -> Pairs:
        """The pairs sorted by the number of their group (pairs,)."""
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.diff(group[order], prepend=-1))
        return cls(first[order], second[order], starts, 1.0 if weight is None else weight[order])

    @property
    def members(self) -> Ints:
        """How many pairs each group has (groups,)."""
        members: Ints = np.diff(np.append(self.starts, len(self.first)))
        return members

    def sums(self, values: Floats) -> Floats:
        """Sums over each group (batch, groups) of values (batch, pairs)."""
        found: Floats = np.add.reduceat(values, self.starts, axis=1)
        return found


@dataclass(frozen=True)
class ConditioningSets:
    """The conditioning sets of a mutual information; those that part the models alike are one."""

    partitions: list[list[Ints]]  # per distinct set, the models of each group
    pgdl: dict[int, Bools]  # partition -> pairs of groups that count (groups, groups)
    jiang: list[int]

    @classmethod
    def of(cls, grid: Grid, definitions: Collection[str]) -> ConditioningSets:
        """Those of "pgdl", "jiang" or both."""
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
        if "pgdl" in definitions:
            for pair in pairs:
                for cells in CellMap.of(grid, pair, grid.groups(pair)):
                    kept = cells.kept_pairs()
                    if kept is not None:
                        pgdl[partition(pair)] = kept
        jiang: list[int] = []
        if "jiang" in definitions:
            sets: list[tuple[int, ...]] = [(), *((h,) for h in names), *pairs]
            jiang = sorted({partition(columns) for columns in sets})
        return cls(partitions, pgdl, jiang)


@dataclass(frozen=True)
class Compared:
    """Which models are compared: what neither a measure nor the weights of the models change."""

    grid: Grid  # the models
    columns: Sequence[int]  # hyperparameters of which a pair of models may differ in one
    environments: Environments  # what the sign-errors count
    definitions: Collection[str] = ()  # of a mutual information, those that are asked for
    # draw sign-errors together, see `resampled_formulas.drawn_together`
    drawn_together: bool = False

    @functools.cached_property
    def conditioning_sets(self) -> ConditioningSets:
        """Of the definitions."""
        return ConditioningSets.of(self.grid.conditioned, self.definitions)

    @functools.cached_property
    def coupled(self) -> list[Pairs]:
        """Per hyperparameter, the pairs that differ in it alone, by setting of the others."""
        found = [self.grid.coupled(h) for h in self.columns]
        return [Pairs.of(*pairs) for pairs in found if len(pairs[0])]

    @functools.cached_property
    def changes(self) -> Pairs | None:
        """Pairs of the sign-errors by environment; None if none carries weight."""
        parts = [self.environments.pairs(self.grid, h) for h in self.columns]
        parts = [p for p in parts if (p[3] > 0).any()]
        if not parts:
            return None
        first, second, group, weight = zip(*parts, strict=True)
        offsets = np.cumsum([0] + [int(g.max()) + 1 for g in group[:-1]])
        numbered = [g + offset for g, offset in zip(group, offsets, strict=True)]
        return Pairs.of(*(np.concatenate(p) for p in (first, second, numbered, weight)))
