"""One table for a zoo: every measure setting with its scores, intervals and p-values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from sharpkit.evaluation._weighted import RANGES, SIGN_ERRORS, STATISTICS
from sharpkit.evaluation.cmi import DEFINITIONS, jiang_score, pgdl_score, set_name
from sharpkit.evaluation.permutation import holm, p_values, permuted_kendall, shuffles
from sharpkit.evaluation.resampling import (
    LEAST,
    check_resampling,
    interval_ends,
    observed_and_resampled,
    resample_weights,
)
from sharpkit.evaluation.robustness import Environments

if TYPE_CHECKING:
    import pandas as pd


def evaluate_measures(
    values: pd.DataFrame,
    configs: Configs,
    *,
    resamples: int = 1000,
    permutations: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    definitions: Sequence[str] = DEFINITIONS,
    environments: str = "values",
    test_size: int | None = None,
) -> pd.DataFrame:
    """Score every measure of a zoo against the generalization gap, with uncertainty.

    A model without a value of a measure (absent, None or NaN) or without a gap is left out of that
    row, under every statistic, and `models` counts those that remain; the `pgdl` score is then
    NaN if a cell of a conditioning set has become empty. All measures with the same models see
    the same resamples and shuffles. Intervals are the recentred ones of `bootstrap_interval`;
    `p_value` is that of Kendall's tau under shuffled gaps, `p_value_holm` corrects it for the
    number of rows.

    The sign-errors are those of `sign_error`: mean, 90th percentile and maximum over environments.
    An environment is here by default a change of one value, over all settings of the other
    hyperparameters; with `environments="settings"`, a pair of settings as in the paper, zoos with
    one model per setting have a maximum of 1 as soon as one pair is ordered wrongly.

    Args:
        values: Index of model ids, one column per measure setting.
        configs: A `Task`, or the content of a `model_configs.json`.
        resamples: Bootstrap resamples.
        permutations: Shuffles for the p-values, of which the smallest is 1 / (1 + permutations)
            before the correction; None for ten times as many as resamples.
        seed: Determines both.
        confidence: Nominal coverage of the intervals.
        definitions: Which conditional mutual informations: "pgdl", "jiang".
        environments: Of the sign-errors, "values" or "settings".
        test_size: Examples behind each test accuracy, which give pairs of models their weight in
            the sign-errors; None for the same weight for all.

    Returns:
        DataFrame: One row per column of `values`, indexed by it, with the columns models;
            cmi_pgdl, cmi_jiang, kendall_tau, kendall_tau_b, granulated_kendall, spearman, pearson,
            r_squared, sign_error, sign_error_90, sign_error_max, each with _low and _high; for a
            CMI also _set, the conditioning set that attains it; p_value; p_value_holm. A CMI is
            the raw ratio, not a percentage.

    Raises:
        ScoreError: If a measure has a value for fewer than three models, a model is unknown to
            `configs`, or a value is not a number.
        ArgumentError: If an argument is outside its range.

    Source:
        See `conditional_mutual_information`, `kendall_tau`, `granulated_kendall`, `r_squared`,
        `sign_error` and `bootstrap_interval`.

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
        >>> evaluate_measures(values, configs, permutations=99)[["kendall_tau", "p_value"]]
              kendall_tau  p_value
        good         1.00     0.01
        bad          0.05     0.37
    """
    import pandas as pd

    if isinstance(definitions, str) or not set(definitions) <= set(DEFINITIONS):
        raise ArgumentError(f"definitions = {definitions!r}: expected some of {DEFINITIONS}")
    check_resampling(resamples, confidence)
    permutations = 10 * resamples if permutations is None else permutations
    check_resampling(permutations)
    chosen = Environments(environments, test_size)
    skipped = {f"cmi_{name}" for name in DEFINITIONS if name not in definitions}
    statistics = [name for name in STATISTICS if name not in skipped]
    rows: list[dict[str, Any]] = [{} for _ in values.columns]
    for members, columns, grid in _by_models(values, read_configs(configs)):
        weights = resample_weights(len(grid), resamples, seed)
        found = _with_intervals(columns, grid, weights, statistics, confidence, chosen)
        orders = shuffles(np.zeros(len(grid), dtype=np.int64), permutations, seed)
        p = p_values(*permuted_kendall(columns, grid.gap, orders))
        for k, member in enumerate(members):
            row = {"models": len(grid)} | {name: float(v[k]) for name, v in found.items()}
            for definition in definitions:
                row |= _exact_cmi(definition, columns[:, k], grid)
            rows[member] = row | {"p_value": float(p[k])}
    order = ["models", *_columns(statistics), "p_value"]
    table = pd.DataFrame(rows, index=values.columns)[order]
    table["p_value_holm"] = holm(table["p_value"].to_numpy(dtype=np.float64))
    return table


def evaluate_hyperparameters(
    values: pd.DataFrame,
    configs: Configs,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    environments: str = "values",
    test_size: int | None = None,
) -> pd.DataFrame:
    """Which changes each measure gets right: scores among models that differ in one hyperparameter.

    Models without a value or a gap are left out as in `evaluate_measures`, whose granulated
    Kendall is the mean of those here.

    Args:
        values: Index of model ids, one column per measure setting.
        configs: A `Task`, or the content of a `model_configs.json`.
        resamples: Bootstrap resamples.
        seed: Determines them.
        confidence: Nominal coverage of the intervals.
        environments: Of the sign-errors, "values" or "settings".
        test_size: Examples behind each test accuracy; None for the same weight for all pairs.

    Returns:
        DataFrame: One row per column of `values` and hyperparameter that varies, indexed by both,
            with the columns granulated_kendall, sign_error, sign_error_90 and sign_error_max, each
            with _low and _high; NaN where no two models differ in that hyperparameter alone.

    Raises:
        ScoreError: As `evaluate_measures`.
        ArgumentError: If an argument is outside its range.

    Source:
        See `granulated_kendall` and `sign_error`.

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
        ...     for k in range(4)
        ... }
        >>> values = pd.DataFrame({"odd": [0, 1, 0, 1]})
        >>> evaluate_hyperparameters(values, configs, resamples=9)["granulated_kendall"].to_dict()
        {('odd', 'width'): 1.0, ('odd', 'depth'): 0.0}
    """
    import pandas as pd

    check_resampling(resamples, confidence)
    chosen = Environments(environments, test_size)
    statistics = ["granulated_kendall", *SIGN_ERRORS]
    rows: dict[tuple[int, int], dict[str, float]] = {}
    all_models = read_configs(configs)
    for members, columns, grid in _by_models(values, all_models):
        weights = resample_weights(len(grid), resamples, seed)
        for h in grid.varying():
            found = _with_intervals(columns, grid, weights, statistics, confidence, chosen, h)
            for k, member in enumerate(members.tolist()):
                rows[member, h] = {name: float(column[k]) for name, column in found.items()}
    order = sorted(rows)
    keys = [key if isinstance(key, tuple) else (key,) for key in values.columns]
    index = pd.MultiIndex.from_tuples(
        [(*keys[member], all_models.names[h]) for member, h in order],
        names=[*values.columns.names, "hyperparameter"],
    )
    return pd.DataFrame([rows[key] for key in order], index=index)


def _columns(statistics: Sequence[str]) -> list[str]:
    """A statistic, its interval, and the conditioning set of a CMI."""
    ends = [("", "_low", "_high", *(["_set"] if n.startswith("cmi") else [])) for n in statistics]
    return [name + end for name, some in zip(statistics, ends, strict=True) for end in some]


def _by_models(values: pd.DataFrame, grid: Grid) -> Iterator[tuple[Ints, Floats, Grid]]:
    """Columns that have a value for the same models: their numbers, values and these models."""
    columns = np.full((len(grid), values.shape[1]), np.nan)
    for k in range(values.shape[1]):
        columns[:, k], _ = read_measure(values.iloc[:, k], grid)
    usable = ~np.isnan(columns) & ~np.isnan(grid.gap)[:, None]
    _check_enough(usable, values, grid)
    for models in np.unique(usable, axis=1).T:
        members = np.flatnonzero((usable == models[:, None]).all(0))
        yield members, columns[np.ix_(np.flatnonzero(models), members)], grid.take(models)


def _with_intervals(
    columns: Floats,
    grid: Grid,
    weights: Ints,
    statistics: Sequence[str],
    confidence: float,
    environments: Environments,
    hyperparameter: int | None = None,
) -> dict[str, Floats]:
    """Each statistic and the ends of its interval, (measures,) each."""
    scored = observed_and_resampled(
        columns,
        grid,
        weights,
        statistics,
        environments=environments,
        hyperparameter=hyperparameter,
    )
    found: dict[str, Floats] = {}
    for name, (value, draws) in scored.items():
        low, high = interval_ends(value, draws, confidence, "recentred", RANGES[name])
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


def _exact_cmi(definition: str, column: Floats, grid: Grid) -> dict[str, Any]:
    """The score with the program's quirks; without an interval where it is not finite."""
    name = f"cmi_{definition}"
    exact = (pgdl_score if definition == "pgdl" else jiang_score)(column, grid)
    row: dict[str, Any] = {name: exact.score, f"{name}_set": set_name(exact.argmin or ())}
    if not np.isfinite(exact.score):
        row |= {f"{name}_low": np.nan, f"{name}_high": np.nan, f"{name}_set": ""}
    return row


def _check_enough(usable: Bools, values: pd.DataFrame, grid: Grid) -> None:
    if usable.shape[1] == 0:
        raise ScoreError("the table of values has no columns, so no measure to evaluate")
    counts = usable.sum(0)
    counted = zip(values.columns, counts.tolist(), strict=True)
    poor = [f"{name} ({count})" for name, count in counted if count < LEAST]
    if poor:
        raise ScoreError(
            f"too few of {len(grid)} models have a value and a gap: {listed(poor)}; expected at "
            f"least {LEAST}"
        )
