"""The table of a run: how well each measure predicts the generalization gap."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from sharpkit.errors import ScoreError
from sharpkit.evaluation import combined_predictor, evaluate_measures
from sharpkit.evaluation.regression import LEAST_COMBINED
from sharpkit.evaluation.resampling import LEAST
from sharpkit.runs.score import Scores

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    scores: Scores, *, resamples: int = 1000, seed: int = 0, test_size: int | None = None
) -> pd.DataFrame:
    """How well every measure of a run predicts the generalization gap, with intervals.

    Args:
        scores: Of a run.
        resamples: Bootstrap resamples over models; the permutations are ten times as many.
        seed: Of both.
        test_size: Examples behind each test accuracy, which decide how much a pair of models
            counts in the sign-errors; None if all count the same.

    Returns:
        pandas.DataFrame: One row per task, measure and setting (m, rho): models used,
        conditional mutual information by both definitions (with the conditioning set that attains
        it), Kendall's tau in both variants, granulated Kendall, Pearson, Spearman, held-out R² and
        sign-errors, with 95 % intervals, and permutation p-values. See
        `sharpkit.evaluation.evaluate_measures` for the columns.

    Raises:
        ScoreError: If the run has no result yet.

    Example:
        >>> import sharpkit as sk
        >>> scores = sk.score_zoo(sk.embedded_zoo(), sk.MSharpness(m=[1, 16], rho=0.1), n=16)
        >>> table = sk.evaluate(scores, resamples=10)
        >>> list(table["m"])
        [1, 16]
    """
    import pandas as pd

    tables = []
    for task, (keys, values) in measure_values(scores).items():
        configs = scores.model_configs[task]
        _warn_of_missing(task, values, keys, list(configs))
        enough = values.columns[values.notna().sum() >= LEAST]
        if enough.empty:
            continue
        keys, values = keys.loc[enough].reset_index(drop=True), values[enough]
        table = evaluate_measures(
            values, configs, resamples=resamples, seed=seed, test_size=test_size
        )
        table = pd.concat([keys, table.reset_index(drop=True)], axis=1)
        table.insert(0, "task", task)
        tables.append(table)
    if not tables:
        raise ScoreError(f"no measure has values for {LEAST} models or more: nothing to evaluate")
    return pd.concat(tables, ignore_index=True)


def combine(scores: Scores, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well the measures of a run predict the gap of held-out models together.

    Args:
        scores: Of a run.
        resamples: Bootstrap resamples over models.
        seed: Of the resamples and of the folds.

    Returns:
        pandas.DataFrame: One row per task: task, measures combined (those with a value for every
        scored model), models, r_squared and kendall_tau with 95 % intervals. A task with fewer than
        two measures or ten models has no row. See `sharpkit.evaluation.combined_predictor`.

    Raises:
        ScoreError: If the run has no result yet.

    Example:
        >>> import sharpkit as sk
        >>> from sharpkit.runs import combine
        >>> scores = sk.score_zoo(sk.embedded_zoo(), sk.MSharpness(m=[1, 16], rho=0.1), n=16)
        >>> combine(scores, resamples=10)[["measures", "models"]].to_dict("records")
        [{'measures': 2, 'models': 96}]
    """
    import pandas as pd

    rows = []
    for task, (_, values) in measure_values(scores).items():
        values = complete_measures(values)
        if values.shape[1] < 2 or len(values) < LEAST_COMBINED:
            continue
        found = combined_predictor(
            values, scores.model_configs[task], resamples=resamples, seed=seed
        )
        row = {"task": task, "measures": values.shape[1], "models": len(values)}
        for s in (found.r_squared, found.kendall_tau):
            row |= {
                s.statistic: s.value,
                f"{s.statistic}_low": s.low,
                f"{s.statistic}_high": s.high,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def complete_measures(values: pd.DataFrame) -> pd.DataFrame:
    """The columns that have a finite number for every scored model."""
    import numpy as np

    finite = np.flatnonzero(np.isfinite(values.to_numpy(dtype=np.float64)).all(axis=0))
    return values.iloc[:, finite.tolist()]


def measure_values(scores: Scores) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """The results of each task as a table with one row per model and one column per measure.

    Args:
        scores: Of a run.

    Returns:
        dict: Task -> keys and values. Row k of the keys says what column k of the values is:
        measure and its setting (m, rho, ...); the values' index are the model ids.

    Raises:
        ScoreError: If the run has no result yet.
    """
    results = scores.frame()
    if results.empty:
        raise ScoreError("the run has no results yet: nothing to evaluate")
    settings = [c for c in results.columns if c not in ("task", "model", "value", "std_error")]
    tables = {}
    for task in scores.model_configs:
        rows = results[results["task"] == task]
        if rows.empty:
            warnings.warn(f"task {task} has no results: left out", stacklevel=3)
            continue
        keys = rows[settings].drop_duplicates().reset_index(drop=True)
        columns = rows.merge(keys.assign(column=keys.index), on=settings)
        tables[task] = keys, columns.pivot(index="model", columns="column", values="value")
    return tables


def _warn_of_missing(
    task: str, values: pd.DataFrame, keys: pd.DataFrame, models: list[str]
) -> None:
    """Name, measure by measure, the models without a value."""
    values = values.reindex(models)
    for measure, columns in keys.groupby("measure").groups.items():
        lacking = values[list(columns)].isna().any(axis=1)
        missing = sorted(values.index[lacking], key=lambda i: (len(i), i))
        if missing:
            shown = f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}"
            fate = "are left out" if len(models) - len(missing) >= LEAST else "leave too few"
            warnings.warn(
                f"task {task}: {measure} has no value for {len(missing)} of {len(models)} models, "
                f"which {fate}: {shown}",
                stacklevel=3,
            )
