"""The table of a run: how well each measure predicts the generalization gap."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from sharpkit.errors import ScoreError
from sharpkit.runs.score import Scores

if TYPE_CHECKING:
    import pandas as pd

_LEAST = 3  # models that a statistic needs


def evaluate(scores: Scores, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well every measure of a run predicts the generalization gap, with intervals.

    Args:
        scores: Of a run.
        resamples: Bootstrap resamples over models, and permutations.
        seed: Of both.

    Returns:
        pandas.DataFrame: One row per task, measure and setting (m, rho): models used,
        conditional mutual information by both definitions (with the conditioning set that attains
        it), Kendall's tau, granulated Kendall, Pearson, Spearman, with 95 % intervals, and a
        permutation p-value. See `sharpkit.evaluation.evaluate_measures` for the columns.

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

    from sharpkit.evaluation import evaluate_measures

    results = scores.frame()
    if results.empty:
        raise ScoreError("the run has no results yet: nothing to evaluate")
    settings = [c for c in results.columns if c not in ("task", "model", "value", "std_error")]
    tables = []
    for task, configs in scores.model_configs.items():
        rows = results[results["task"] == task]
        if rows.empty:
            warnings.warn(f"task {task} has no results: left out", stacklevel=2)
            continue
        keys = rows[settings].drop_duplicates().reset_index(drop=True)
        columns = rows.merge(keys.assign(column=keys.index), on=settings)
        values = columns.pivot(index="model", columns="column", values="value")
        _warn_of_missing(task, values, keys, list(configs))
        enough = values.columns[values.notna().sum() >= _LEAST]
        if enough.empty:
            continue
        keys, values = keys.loc[enough].reset_index(drop=True), values[enough]
        table = evaluate_measures(values, configs, resamples=resamples, seed=seed)
        table = pd.concat([keys, table.reset_index(drop=True)], axis=1)
        table.insert(0, "task", task)
        tables.append(table)
    if not tables:
        raise ScoreError(f"no measure has values for {_LEAST} models or more: nothing to evaluate")
    return pd.concat(tables, ignore_index=True)


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
            fate = "are left out" if len(models) - len(missing) >= _LEAST else "leave too few"
            warnings.warn(
                f"task {task}: {measure} has no value for {len(missing)} of {len(models)} models, "
                f"which {fate}: {shown}",
                stacklevel=3,
            )
