"""One table for a zoo: every measure setting with its statistics, intervals and p-values."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.arguments import LEAST, by_direction, check_direction, check_resampling
from sharpkit.evaluation.cmi import DEFINITIONS, EXACT, in_bins, set_name
from sharpkit.evaluation.grid import (
    Bools,
    Configs,
    Floats,
    Grid,
    Ints,
    listed,
    read_configs,
    read_measures,
)
from sharpkit.evaluation.intervals import (
    interval_ends,
    no_interval,
    observed_and_resampled,
    resample_weights,
)
from sharpkit.evaluation.null import adjusted_for_noise
from sharpkit.evaluation.number_of_draws import Sampling
from sharpkit.evaluation.permutation import holm
from sharpkit.evaluation.rating import Rating, rate
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.statistics import TABLE

if TYPE_CHECKING:
    import pandas as pd

_OF_A_NULL = ("_set", "_null_mean", "_null_95", "_p_value", "_p_value_holm", "_adjusted")


def rate_measures(
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
    directions: Mapping[Hashable, int | None] | None = None,
) -> pd.DataFrame:
    """How well every measure of a zoo predicts the generalization gap, with uncertainty.

    A model without a value of a measure (absent, None or NaN) or without a gap is left out of that
    row, under every statistic; `models` counts those that remain and `left_out` names the others.
    `cmi_pgdl` is then NaN if a cell of a conditioning set has become empty, and a measure
    with values for fewer than three models has a row of NaN. All measures with the same models see
    the same resamples and shuffles.

    Intervals are those of `bootstrap_interval`; where there is none, `interval_note` says why. The
    null of a conditional mutual information is that of `cmi_null`: `_null_mean` and `_null_95`
    are what a measure has on average, and at its 95th percentile, that knows only what the
    hyperparameters explain. `p_value` is that of Kendall's tau under shuffles of all models,
    one-sided in the measure's direction; each `_holm` corrects for the number of rows.

    The sign-errors are those of `sign_error`: mean, 90th percentile and maximum over environments.
    An environment is here by default a change of one value, over all settings of the other
    hyperparameters; with `environments="settings"`, a pair of settings as in the paper, zoos with
    one model per setting have a maximum of 1 as soon as one pair is ordered wrongly.

    Args:
        values: Index of model ids, one column per measure setting.
        configs: A `Task`, or the content of a `model_configs.json`.
        resamples: Bootstrap resamples, and shuffles for the null of a mutual information; more
            than 512 models get fewer, at most 500,000 / models, though not below 100.
        permutations: Shuffles for the other p-values, of which the smallest is
            1 / (1 + permutations) before the correction; None for ten times as many as resamples.
            More than 512 models get at most 10,000,000 / models, though not below 1,000.
        seed: Determines both.
        confidence: Nominal coverage of the intervals.
        definitions: Which conditional mutual informations: "pgdl", "jiang".
        environments: Of the sign-errors, "values" or "settings".
        test_size: Examples behind each test accuracy, which give pairs of models their weight in
            the sign-errors; None for the same weight for all.
        directions: Column of `values` -> 1 if a large value should mean a large gap, -1 if a small
            one should, None if neither is expected (no sign-errors, two-sided p-value); 1 for
            columns that it lacks.

    Returns:
        DataFrame: One row per column of `values`, indexed by it, with the columns models, left_out
            and direction; cmi_pgdl, cmi_jiang, kendall_tau, kendall_tau_b, granulated_kendall,
            spearman, pearson, r_squared, sign_error, sign_error_90, sign_error_max, each with _low
            and _high; for a CMI also _set, the conditioning set that attains it, and _null_mean,
            _null_95, _p_value, _p_value_holm, _adjusted; p_value; p_value_holm; resamples and
            permutations, how many there were; interval_note; and, if a hyperparameter is
            continuous, `binned`, in how many bins a CMI conditions on it. A CMI is the raw ratio,
            not a percentage.

    Raises:
        ScoreError: If every measure has a value for fewer than three models, a model is unknown to
            `configs`, or a value is not a number.
        ArgumentError: If an argument is outside its range.

    Source:
        See `conditional_mutual_information`, `cmi_null`, `kendall_tau`, `granulated_kendall`,
        `r_squared`, `sign_error` and `bootstrap_interval`.

    Example:
        >>> import pandas as pd
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 8 * (1 + k % 2), "depth": 1 + k // 2 % 2} for k in range(16)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(16)}
        >>> configs = model_configs(settings, metrics)
        >>> values = pd.DataFrame({"good": range(16), "bad": [(k * 7) % 16 for k in range(16)]})
        >>> rate_measures(values, configs, permutations=99)[["kendall_tau", "p_value"]]
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
    signs = _directions(values, directions)
    statistics = [name for name, s in TABLE.items() if s.definition in ("", *definitions)]
    sampling = Sampling(resamples, permutations, confidence, seed)
    rows: list[dict[str, Any]] = [{} for _ in values.columns]
    zoo = read_configs(configs)
    binned = {"binned": in_bins(zoo.binned)} if zoo.binned else {}
    for members, columns, grid in _by_models(values, zoo):
        kept = set(grid.ids)
        left_out = [name for name in zoo.ids if name not in kept]
        head = {"models": len(grid), "left_out": listed(left_out), **binned}
        if len(grid) < LEAST:
            for member in members:
                note = f"all: fewer than {LEAST} models"
                rows[member] = head | {"direction": signs[member], "interval_note": note}
            continue
        drawn = sampling.of(len(grid))
        head |= {"resamples": drawn.resamples, "permutations": drawn.permutations}
        ratings = rate(columns, grid, statistics, drawn, [signs[m] for m in members], chosen)
        for k, member in enumerate(members):
            row = head | {"direction": signs[member]}
            for name, rating in ratings.items():
                row |= _cells(name, rating, k)
                if TABLE[name].definition:
                    row |= _exact(name, columns[:, k], grid, rating, k)
            row["interval_note"] = _interval_note({n: r.notes[k] for n, r in ratings.items()})
            rows[member] = row
    table = pd.DataFrame(rows, index=values.columns).reindex(
        columns=[*_columns(statistics), *binned]
    )
    whole = ["direction", "resamples", "permutations"]
    table[whole] = table[whole].astype("Int64")
    for name in statistics:
        if tested := TABLE[name].p_value:
            table[f"{tested}_holm"] = holm(table[tested].to_numpy(dtype=np.float64))
        if TABLE[name].definition:
            table[f"{name}_set"] = table[f"{name}_set"].fillna("")
    return table


def rate_by_hyperparameter(
    values: pd.DataFrame,
    configs: Configs,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    environments: str = "values",
    test_size: int | None = None,
    directions: Mapping[Hashable, int | None] | None = None,
) -> pd.DataFrame:
    """Which changes each measure gets right, among models that differ in one hyperparameter.

    Models without a value or a gap are left out as in `rate_measures`, whose granulated
    Kendall is the mean of those here.

    Args:
        values: Index of model ids, one column per measure setting.
        configs: A `Task`, or the content of a `model_configs.json`.
        resamples: Bootstrap resamples; of more than 512 models as in `rate_measures`.
        seed: Determines them.
        confidence: Nominal coverage of the intervals.
        environments: Of the sign-errors, "values" or "settings".
        test_size: Examples behind each test accuracy; None for the same weight for all pairs.
        directions: Of the columns, as in `rate_measures`.

    Returns:
        DataFrame: One row per column of `values` and hyperparameter that varies, indexed by both,
            with the columns granulated_kendall, sign_error, sign_error_90 and sign_error_max, each
            with _low and _high; NaN where no two models differ in that hyperparameter alone.

    Raises:
        ScoreError: As `rate_measures`.
        ArgumentError: If an argument is outside its range.

    Source:
        See `granulated_kendall` and `sign_error`.

    Example:
        >>> import pandas as pd
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 8 * (1 + k % 2), "depth": 1 + k // 2 % 2} for k in range(4)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(4)}
        >>> configs = model_configs(settings, metrics)
        >>> values = pd.DataFrame({"odd": [0, 1, 0, 1]})
        >>> rate_by_hyperparameter(values, configs, resamples=9)["granulated_kendall"].to_dict()
        {('odd', 'width'): 1.0, ('odd', 'depth'): 0.0}
    """
    import pandas as pd

    check_resampling(resamples, confidence)
    chosen = Environments(environments, test_size)
    signs = _directions(values, directions)
    one_change = [name for name, s in TABLE.items() if s.one_change]
    rows: dict[tuple[int, int], dict[str, float]] = {}
    all_models = read_configs(configs)
    for members, columns, grid in _by_models(values, all_models):
        if len(grid) < LEAST:
            continue
        sampling = Sampling(resamples, confidence=confidence, seed=seed).of(len(grid))
        weights = resample_weights(len(grid), sampling.resamples, seed)
        of_members = [signs[m] for m in members]
        for h in grid.varying():
            found: dict[str, Floats] = {}
            for names, turned, known in by_direction(columns, of_members, one_change):
                part = _with_intervals(turned, grid, weights, names, confidence, chosen, h)
                found |= {name: np.where(known, column, np.nan) for name, column in part.items()}
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
    """The table's columns; a statistic with its interval, a CMI with its set and its null."""
    found = ["models", "left_out", "direction"]
    tested: list[str] = []
    for name in statistics:
        of_null = _OF_A_NULL if TABLE[name].definition else ()
        found += [name + end for end in ("", "_low", "_high", *of_null)]
        if TABLE[name].p_value and not of_null:
            tested += [TABLE[name].p_value, f"{TABLE[name].p_value}_holm"]
    return [*found, *tested, "resamples", "permutations", "interval_note"]


def _directions(
    values: pd.DataFrame, directions: Mapping[Hashable, int | None] | None
) -> list[int | None]:
    given = directions or {}
    unknown = [str(name) for name in given if name not in values.columns]
    if unknown:
        raise ArgumentError(f"directions of columns that are not there: {listed(unknown)}")
    found = [given.get(name, 1) for name in values.columns]
    for direction in found:
        check_direction(direction)
    return found


def _cells(name: str, rating: Rating, k: int) -> dict[str, float]:
    """What one measure's rating adds to its row."""
    ends = {name: rating.value[k], f"{name}_low": rating.low[k], f"{name}_high": rating.high[k]}
    row = {column: float(number) for column, number in ends.items()}
    if tested := TABLE[name].p_value:
        row[tested] = float(rating.p_value[k])
    if rating.nulls:
        row[f"{name}_null_mean"] = rating.nulls[k].mean
        row[f"{name}_null_95"] = rating.nulls[k].percentile_95
    return row


def _interval_note(notes: Mapping[str, str]) -> str:
    """Which statistics have no interval, and why."""
    reasons: dict[str, list[str]] = {}
    for name, note in notes.items():
        if note:
            reasons.setdefault(note, []).append(name)
    parts = [
        f"{'all' if len(names) == len(notes) else ', '.join(names)}: {reason}"
        for reason, names in reasons.items()
    ]
    return "; ".join(parts)


def _by_models(values: pd.DataFrame, grid: Grid) -> Iterator[tuple[Ints, Floats, Grid]]:
    """Columns that have a value for the same models: their numbers, values and these models."""
    columns = read_measures(values, grid)
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
    hyperparameter: int,
) -> dict[str, Floats]:
    """Each statistic and the ends of its interval, (measures,) each."""
    scored = observed_and_resampled(
        columns, grid, weights, statistics, environments=environments, hyperparameter=hyperparameter
    )
    found: dict[str, Floats] = {}
    for name, (value, draws) in scored.items():
        low, high = interval_ends(name, value, draws, confidence, len(grid))
        if no_interval(name, grid, environments, hyperparameter):
            low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


def _exact(name: str, column: Floats, grid: Grid, rating: Rating, k: int) -> dict[str, Any]:
    """A mutual information with the program's quirks; no interval where it is not finite."""
    exact = EXACT[TABLE[name].definition](column, grid)
    row: dict[str, Any] = {name: exact.score, f"{name}_set": set_name(exact.argmin or ())}
    row[f"{name}_adjusted"] = adjusted_for_noise(exact.score, rating.nulls[k].mean)
    if not np.isfinite(exact.score):
        row |= {f"{name}_low": np.nan, f"{name}_high": np.nan, f"{name}_set": ""}
    return row


def _check_enough(usable: Bools, values: pd.DataFrame, grid: Grid) -> None:
    if usable.shape[1] == 0:
        raise ScoreError("the table of values has no columns, so no measure to evaluate")
    counts = usable.sum(0)
    counted = zip(values.columns, counts.tolist(), strict=True)
    poor = [f"{name} ({count})" for name, count in counted if count < LEAST]
    if len(poor) == usable.shape[1]:
        raise ScoreError(
            f"too few of {len(grid)} models have a value and a gap: {listed(poor)}; expected at "
            f"least {LEAST}"
        )
