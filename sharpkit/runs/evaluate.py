"""The table of a run: how well each measure predicts the generalization gap."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from sharpkit.errors import ScoreError
from sharpkit.runs.score import Scores

if TYPE_CHECKING:
    import pandas as pd


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
        missing = sorted(set(configs) - set(values.index), key=lambda i: (len(i), i))
        if missing:
            warnings.warn(
                f"task {task}: {len(missing)} of {len(configs)} models have no value and are left "
                f"out: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}",
                stacklevel=2,
            )
        table = evaluate_measures(values, configs, resamples=resamples, seed=seed)
        table = pd.concat([keys, table.reset_index(drop=True)], axis=1)
        table.insert(0, "task", task)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
