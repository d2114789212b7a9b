"""Conditional mutual information between a measure and the generalization gap.

For two models i and j, does the sign of value_i − value_j tell the sign of gap_i − gap_j, beyond
what their hyperparameters tell? The question is asked within every cell of a conditioning set of
hyperparameters, and the worst set counts. `pgdl` is the arithmetic of the PGDL competition's
program, quirks included; `jiang` is the definition of the paper behind it.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.competition_program import CellMap, program_minimum
from sharpkit.evaluation.grid import (
    Bools,
    Configs,
    Floats,
    Grid,
    Ints,
    Measure,
    listed,
    read_comparable,
    read_configs,
    read_measure,
)
from sharpkit.evaluation.pair_counts import (
    INSIDE_LOG,
    count_pairs,
    gap_entropy,
    mutual_information,
    without_self_pairs,
)

if TYPE_CHECKING:
    import pandas as pd


@readable(
    lambda r: (
        f"{r.score:.4g} by {r.definition!r}, {r.models} models, at "
        f"{'no set' if r.argmin is None else set_name(r.argmin)}"
        f"{(r.binned and ', with ' + in_bins(r.binned)) or ''}"
    )
)
@dataclass(frozen=True)
class CMIResult:
    """Score of a measure, and the score given each conditioning set.

    Attributes:
        score: The ratio at the worst conditioning set; between 0 and 1 for `jiang`.
        argmin: The set that attains it; None if there is no set with a score.
        conditioning_sets: Names of the hyperparameters -> ratio. For `pgdl` every ordered pair of
            two hyperparameters, in the program's order.
        definition: `pgdl` or `jiang`.
        models: How many models were compared.
        binned: Continuous hyperparameters -> number of quantile bins that stand for their values.
    """

    score: float
    argmin: tuple[str, ...] | None
    conditioning_sets: Mapping[tuple[str, ...], float]
    definition: str
    models: int
    binned: Mapping[str, int] = field(default_factory=dict)

    @property
    def competition_score(self) -> float:
        """The score on the competition's scale, 100 times the ratio."""
        return 100.0 * self.score

    def frame(self) -> pd.DataFrame:
        """One row per conditioning set: definition, conditioning_set, score, is_minimum."""
        import pandas as pd

        rows = [
            (self.definition, set_name(names), score, names == self.argmin)
            for names, score in self.conditioning_sets.items()
        ]
        return pd.DataFrame(rows, columns=["definition", "conditioning_set", "score", "is_minimum"])


def conditional_mutual_information(
    measure: Measure, configs: Configs, definition: str = "pgdl"
) -> CMIResult:
    """How much a measure tells of the generalization gap, given the hyperparameters.

    With V_μ and V_g the bits "the first model's value (gap) is strictly larger" and U_S the values
    of the hyperparameters S of both models, the score is the minimum over S of
    I(V_μ; V_g | U_S) / H(V_g | U_S).

    `pgdl`: all n² ordered pairs, a model with itself included, so that ties and NaN count as "not
    larger"; S runs over the ordered pairs of two hyperparameters; information and entropy are each
    averaged over the cells without weights, a cell being one combination of `possible_values`.
    100 times the score, averaged over tasks, is what the competition printed. A conditioning set
    with an empty cell is NaN there, and a NaN is kept only if it is the last set's.

    `jiang`: ordered pairs of different models; |S| ≤ 2, the empty set included; cells weighted by
    their share of the pairs. Models without a value or a gap are left out.

    A continuous hyperparameter - numbers with more than 10 values, which on average are shared by
    fewer than 4 models - is replaced by its quantile bins, of n models √(n/6), at least 2 and at
    most 4: given a value that one model has, there is nothing to compare. `binned` says which. The
    grids of the competition have none.

    Time and memory: n² comparisons up to 512 models; beyond, the same whole numbers are counted by
    sorting, in about n log n per conditioning set.

    Args:
        measure: Mapping or Series of model id -> value; ids as 20, "20" or "model_20".
        configs: A `Task`, or the content of a `model_configs.json`.
        definition: "pgdl" or "jiang".

    Returns:
        CMIResult: The score, the set that attains it, the score of each set.

    Raises:
        ScoreError: If there are no models, a value belongs to no model or is not a number, no
            model has a value, or an entry of `configs` is incomplete.
        ArgumentError: If the definition is unknown.

    Source:
        `pgdl`: Jiang et al., NeurIPS 2020 competition PGDL, arXiv:2012.07976, section 4, and its
        scoring program. `jiang`: Jiang et al., ICLR 2020, arXiv:1912.02178, section 2.2.2.

    Example:
        >>> configs = {
        ...     f"{k}": {
        ...         "hparams": {
        ...             "width": {"possible_values": [8, 16], "current_value": 8 * (1 + k % 2)},
        ...             "depth": {"possible_values": [1, 2], "current_value": 1 + k // 2 % 2},
        ...         },
        ...         "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k},
        ...     }
        ...     for k in range(8)
        ... }
        >>> gaps = {k: 0.1 + 0.01 * k for k in range(8)}
        >>> result = conditional_mutual_information(gaps, configs, definition="jiang")
        >>> result.score
        1.0
        >>> noise = {k: (k * 5) % 8 for k in range(8)}
        >>> result = conditional_mutual_information(noise, configs)
        >>> round(result.score, 3), result.argmin
        (0.363, ('width', 'depth'))
    """
    if definition not in DEFINITIONS:
        raise ArgumentError(f"unknown definition {definition!r}: expected 'pgdl' or 'jiang'")
    grid = read_configs(configs)
    if definition == "jiang":
        values, comparable = read_comparable(measure, grid)
        return cmi_jiang(values, comparable)
    values, present = read_measure(measure, grid)
    if not present.any():
        raise ScoreError(f"the measure has no value for any of the {len(grid)} models")
    _warn_of_quirks(values, present, grid)
    return cmi_pgdl(values[present], grid.take(present))


def set_name(names: Sequence[str]) -> str:
    """A conditioning set as one word: names joined by commas, "(none)" for the empty set."""
    return ",".join(names) or "(none)"


def in_bins(binned: Mapping[str, int]) -> str:
    """Which hyperparameters are binned, as a phrase: "lr in 4 bins"."""
    return ", ".join(f"{name} in {count} bins" for name, count in binned.items())


def cmi_pgdl(values: Floats, grid: Grid) -> CMIResult:
    """The competition's score of one value per model (models,); no id is looked up."""
    binned, grid = grid.binned, grid.conditioned
    pairs = list(itertools.combinations(range(len(grid.names)), 2))
    groups = [grid.groups(pair) for pair in pairs]
    tables = count_pairs(grid.gap, values, groups)
    maps = [CellMap.of(grid, pair, g) for pair, g in zip(pairs, groups, strict=True)]
    forward = unweighted_ratios([f.fill(t) for (f, _), t in zip(maps, tables, strict=True)])
    scored = dict(zip(pairs, forward, strict=True))
    scored |= {pair[::-1]: ratio for pair, ratio in scored.items()}
    for pair, (first, second), table in zip(pairs, maps, tables, strict=True):
        if second is not first:  # the program names the cells differently in the other order
            scored[pair[::-1]] = unweighted_ratios([second.fill(table)])[0]
    sets = {
        tuple(grid.names[h] for h in pair): scored[pair]
        for pair in itertools.permutations(range(len(grid.names)), 2)
    }
    score, argmin = program_minimum(sets)
    empty = [
        f"({set_name((grid.names[a], grid.names[b]))})"
        for a, b in pairs
        if math.isnan(scored[a, b]) or math.isnan(scored[b, a])
    ]
    kept = [f.pairs_kept(t) for (f, _), t in zip(maps, tables, strict=True)]
    _warn_of_outcome(score, empty, len(grid) ** 2 - min(kept, default=len(grid) ** 2), grid)
    return CMIResult(score, argmin, sets, "pgdl", len(grid), binned)


def cmi_jiang(values: Floats, grid: Grid) -> CMIResult:
    """The paper's score of one value per model (models,), no NaN among them."""
    binned, grid = grid.binned, grid.conditioned
    sets = [s for size in (0, 1, 2) for s in itertools.combinations(range(len(grid.names)), size)]
    groups = [grid.groups(s) for s in sets]
    tables = count_pairs(grid.gap, values, groups)
    tables = [without_self_pairs(t, g) for t, g in zip(tables, groups, strict=True)]
    names = [tuple(grid.names[h] for h in s) for s in sets]
    scores = dict(zip(names, weighted_ratios(tables), strict=True))
    defined = {s: score for s, score in scores.items() if not math.isnan(score)}
    undefined = [set_name(s) for s in scores if s not in defined]
    if undefined:
        warnings.warn(
            f"given {listed(undefined)} the gaps leave nothing to predict (zero entropy): such "
            "sets have no score and are passed over",
            stacklevel=3,
        )
    if not defined:
        return CMIResult(math.nan, None, scores, "jiang", len(grid), binned)
    argmin = min(defined, key=defined.__getitem__)  # the first, so the smallest, of equal ones
    return CMIResult(defined[argmin], argmin, scores, "jiang", len(grid), binned)


def unweighted_ratios(sets: Sequence[Floats]) -> list[float]:
    """Mean information over mean gap entropy of the cells (cells, 2, 2) of each set, as in `pgdl`.

    NaN for a set with an empty cell.
    """
    return _ratios(sets, INSIDE_LOG, weighted=False)


def weighted_ratios(sets: Sequence[Ints]) -> list[float]:
    """Conditional information over conditional gap entropy of the cells (..., 2, 2) of each set.

    NaN for a set without gap entropy.
    """
    return _ratios([table.reshape(-1, 2, 2) for table in sets], 0.0, weighted=True)


def _ratios(sets: Sequence[Floats | Ints], inside_log: float, *, weighted: bool) -> list[float]:
    if not sets:
        return []
    tables = np.concatenate(sets)  # the cells of all sets together: one pass over small arrays
    information, entropy = mutual_information(tables), gap_entropy(tables, inside_log)
    if weighted:
        pairs = tables.sum((-2, -1))
        information, entropy = (np.where(pairs > 0, pairs * x, 0.0) for x in (information, entropy))
    ends = np.cumsum([len(cells) for cells in sets])[:-1]
    parts = zip(np.split(information, ends), np.split(entropy, ends), strict=True)
    totals = [(float(i.sum()), float(e.sum())) for i, e in parts]
    return [i / e if e != 0 else math.nan for i, e in totals]


def _warn_of_quirks(values: Floats, present: Bools, grid: Grid) -> None:
    def warn(chosen: Bools, text: str) -> None:
        names = [name for name, hit in zip(grid.ids, chosen, strict=True) if hit]
        if names:
            warnings.warn(text.format(listed(names)), UserWarning, stacklevel=4)

    warn(~present, "no value for models {}: the pgdl definition skips their pairs")
    warn(
        present & np.isnan(values),
        "the value of models {} is NaN: the pgdl definition counts it as never larger",
    )
    warn(np.isinf(values), "the value of models {} is infinite: equal infinities count as ties")
    warn(np.isnan(grid.gap), "the gap of models {} is NaN: it counts as never larger")


def _warn_of_outcome(score: float, empty: Sequence[str], skipped: int, grid: Grid) -> None:
    if skipped:
        warnings.warn(
            f"the pgdl definition skips up to {skipped} of {len(grid) ** 2} pairs, whose "
            "hyperparameter values are missing or not among possible_values",
            stacklevel=4,
        )
    if empty:
        outcome = "NaN" if math.isnan(score) else "taken over the sets that come after the last NaN"
        warnings.warn(
            f"conditioning sets {listed(empty)} have empty cells, so the pgdl definition scores "
            f"them NaN; the minimum is {outcome}",
            stacklevel=4,
        )
    if math.isinf(score):
        warnings.warn(
            f"{len(grid.names)} hyperparameter(s) make no pair to condition on: the pgdl score is "
            "infinite",
            stacklevel=4,
        )


# of one value per model, quirks included; the statistics of resamples do without them
EXACT = {"pgdl": cmi_pgdl, "jiang": cmi_jiang}
DEFINITIONS = tuple(EXACT)
