"""One table for a zoo: every measure setting with its scores, intervals and p-values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation._grid import (
    Bools,
    Configs,
    Floats,
    Grid,
    Ints,
    listed,
    read_configs,
    read_measure,
)
from sharpkit.evaluation.cmi import DEFINITIONS, jiang_score, pgdl_score, set_name
from sharpkit.evaluation.permutation import holm, p_values, permuted_kendall, shuffles
from sharpkit.evaluation.resampling import (
    RANGES,
    interval_ends,
    observed_and_resampled,
    resample_weights,
)

if TYPE_CHECKING:
    import pandas as pd

_LEAST = 3  # models


def evaluate_measures(
    values: pd.DataFrame,
    configs: Configs,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    definitions: Sequence[str] = DEFINITIONS,
) -> pd.DataFrame:
    """Score every measure of a zoo against the generalization gap, with uncertainty.

    A model without a value of a measure (absent, None or NaN) or without a gap is left out of that
    row, under every statistic, and `models` counts those that remain; the `pgdl` score is then
    NaN if a cell of a conditioning set has become empty. All measures with the same models see
    the same resamples and shuffles. Intervals are the recentred ones of `bootstrap_interval`;
    `p_value` is that of Kendall's tau under shuffled gaps, `p_value_holm` corrects it for the
    number of rows.

    Args:
        values: Index of model ids, one column per measure setting.
        configs: A `Task`, or the content of a `model_configs.json`.
        resamples: Bootstrap resamples, and permutations.
        seed: Determines both.
        confidence: Nominal coverage of the intervals.
        definitions: Which conditional mutual informations: "pgdl", "jiang".

    Returns:
        DataFrame: One row per column of `values`, indexed by it, with the columns models;
            cmi_pgdl, cmi_pgdl_low, cmi_pgdl_high, cmi_pgdl_set and the same for jiang;
            kendall_tau and granulated_kendall, each with _low and _high; spearman; pearson;
            p_value; p_value_holm. A CMI is the raw ratio, not a percentage.

    Raises:
        ScoreError: If a measure has a value for fewer than three models, a model is unknown to
            `configs`, or a value is not a number.
        ArgumentError: If an argument is outside its range.

    Source:
        See `conditional_mutual_information`, `kendall_tau`, `granulated_kendall` and
        `bootstrap_interval`.

    Example:
        >>> import pandas as pd
        >>> configs = {
        ...     f"{k}": {
        ...         "hparams": {
        ...             "width": {"possible_values": [8, 16], "current_value": 8 * (1 + k % 2)},
        ...             "depth": {"possible_values": [1, 2], "current_value": 1 + k // 2 % 2},
        ...         },
        ...         "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k},
        ...     }
        ...     for k in range(16)
        ... }
        >>> values = pd.DataFrame({"good": range(16), "bad": [(k * 7) % 16 for k in range(16)]})
        >>> evaluate_measures(values, configs, resamples=99)[["kendall_tau", "p_value"]]
              kendall_tau  p_value
        good         1.00     0.01
        bad          0.05     0.37
    """
    import pandas as pd

    _check(definitions, resamples, confidence)
    grid = read_configs(configs)
    columns = _columns(values, grid)
    usable = ~np.isnan(columns) & ~np.isnan(grid.gap)[:, None]
    _check_enough(usable, values, grid)
    rows: list[dict[str, Any]] = [{} for _ in range(columns.shape[1])]
    for models in np.unique(usable, axis=1).T:
        members = np.flatnonzero((usable == models[:, None]).all(0))
        chosen = columns[np.ix_(np.flatnonzero(models), members)]
        scored = _rows(chosen, grid.take(models), resamples, seed, confidence, definitions)
        for member, row in zip(members, scored, strict=True):
            rows[member] = row
    table = pd.DataFrame(rows, index=values.columns)
    table["p_value_holm"] = holm(table["p_value"].to_numpy(dtype=np.float64))
    return table


def _columns(values: pd.DataFrame, grid: Grid) -> Floats:
    columns = np.full((len(grid), values.shape[1]), np.nan)
    for k in range(values.shape[1]):
        columns[:, k], _ = read_measure(values.iloc[:, k], grid)
    return columns


def _check(definitions: Sequence[str], resamples: int, confidence: float) -> None:
    if isinstance(definitions, str) or not set(definitions) <= set(DEFINITIONS):
        raise ArgumentError(f"definitions = {definitions!r}: expected some of {DEFINITIONS}")
    if resamples < 1:
        raise ArgumentError(f"resamples = {resamples}: expected at least 1")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence = {confidence}: expected a number between 0 and 1")


def _check_enough(usable: Bools, values: pd.DataFrame, grid: Grid) -> None:
    if usable.shape[1] == 0:
        raise ScoreError("the table of values has no columns, so no measure to evaluate")
    counts = usable.sum(0)
    counted = zip(values.columns, counts.tolist(), strict=True)
    poor = [f"{name} ({count})" for name, count in counted if count < _LEAST]
    if poor:
        raise ScoreError(
            f"too few of {len(grid)} models have a value and a gap: {listed(poor)}; expected at "
            f"least {_LEAST}"
        )


def _rows(
    values: Floats,
    grid: Grid,
    resamples: int,
    seed: int,
    confidence: float,
    definitions: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each measure (models, measures); all have a value for every model."""
    cmi = [f"cmi_{name}" for name in DEFINITIONS if name in definitions]
    with_interval = [*cmi, "kendall_tau", "granulated_kendall"]
    statistics = (*with_interval, "spearman", "pearson")
    weights: Ints = resample_weights(len(grid), resamples, seed)
    found = observed_and_resampled(values, grid, weights, statistics)
    ends = {
        name: interval_ends(*found[name], confidence, "recentred", RANGES[name])
        for name in with_interval
    }
    orders = shuffles(np.zeros(len(grid), dtype=np.int64), resamples, seed)
    p = p_values(*permuted_kendall(values, grid.gap, orders))
    rows = []
    for k, column in enumerate(values.T):
        row: dict[str, Any] = {"models": len(grid)}
        for name in with_interval:
            row[name] = float(found[name][0][k])
            row[f"{name}_low"], row[f"{name}_high"] = (float(end[k]) for end in ends[name])
            if name in cmi:
                exact = (pgdl_score if name == "cmi_pgdl" else jiang_score)(column, grid)
                row[name], row[f"{name}_set"] = exact.score, set_name(exact.argmin or ())
                if not np.isfinite(exact.score):
                    row |= {f"{name}_low": np.nan, f"{name}_high": np.nan, f"{name}_set": ""}
        row |= {name: float(found[name][0][k]) for name in ("spearman", "pearson")}
        rows.append(row | {"p_value": float(p[k])})
    return rows
