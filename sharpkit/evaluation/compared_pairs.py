"""What neither a measure nor the weights of the models change: conditioning sets and pairs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.competition_program import CellMap
from sharpkit.evaluation.grid import Bools, Floats, Grid, Ints
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.statistics import SIGN_ERRORS


@dataclass(frozen=True)
class Plan:
    """The conditioning sets and the pairs of models of the statistics that are wanted."""

    gap: Floats
    dtype: type
    partitions: list[list[Ints]]  # per distinct conditioning set, the models of each group
    pgdl: dict[int, Bools]  # partition -> pairs of groups that count (groups, groups)
    jiang: list[int]
    coupled: list[Pairs]  # per hyperparameter, by setting
    environments: Pairs | None  # of all hyperparameters, by environment
    drawn_together: bool

    @functools.cached_property
    def gap_bits(self) -> Bools:
        """Whether the first gap is larger (models, models)."""
        bits: Bools = self.gap[:, None] > self.gap
        return bits

    @classmethod
    def of(
        cls,
        grid: Grid,
        statistics: Sequence[str],
        columns: Sequence[int],
        environments: Environments,
        drawn_together: bool,
    ) -> Plan:
        """Of the statistics, the models of a pair differing in one of these columns alone."""
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
        return cls(grid.gap, dtype, partitions, pgdl, jiang, coupled, changes, drawn_together)


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
