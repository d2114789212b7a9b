"""The table of a run: how well each measure predicts the generalization gap."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import combined_predictor, rate_measures
from sharpkit.evaluation.arguments import LEAST
from sharpkit.evaluation.regression import LEAST_COMBINED
from sharpkit.evaluation.statistics import HEADLINES, SHIPPED, TABLE
from sharpkit.runs.kept_evaluations import kept_table
from sharpkit.runs.measure_values import complete_measures, directions_of, measure_values
from sharpkit.runs.scores import Scores
from sharpkit.runs.store import TEST_METRICS
from sharpkit.runs.targets import Target, larger_is_worse, target_values, with_target
from sharpkit.workers import error_message

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    scores: Scores,
    *,
    target: Target | None = None,
    larger_is_better: bool | None = None,
    resamples: int = 1000,
    seed: int = 0,
    test_size: int | None = None,
) -> pd.DataFrame:
    """How well every measure of a run predicts the generalization gap, with intervals.

    What is computed of a run directory is kept in its folder `evaluations`, and taken from there as
    long as results, options, code and libraries are the same; with statistics of one's own, whose
    code may be anywhere, all is computed.

    Args:
        scores: Of a run.
        target: What is to be predicted instead of the gap: a column of `scores.metrics()`, such as
            "test_loss"; or values by model (by task and model, of a run of several tasks), such as
            accuracies under corruption. The table then has a column `target`.
        larger_is_better: Whether models with a large target are the good ones, so that a measure
            that should be large where the gap is should be small there; statistics keep their sign
            otherwise. None for accuracies by their names only.
        resamples: Bootstrap resamples over models; the permutations are ten times as many. More
            than 512 models get fewer, as the columns `resamples` and `permutations` say; see
            `sharpkit.evaluation.rate_measures`.
        seed: Of both.
        test_size: Examples behind each test accuracy, which decide how much a pair of models
            counts in the sign-errors; None if all count the same.

    Returns:
        pandas.DataFrame: One row per task, measure and setting (m, rho): models used and left out,
        conditional mutual information by both definitions (with the conditioning set that attains
        it, and the mean, 95th percentile and p-value of what noise has), Kendall's tau in both
        variants, granulated Kendall, Pearson, Spearman, held-out R² and sign-errors, with 95 %
        intervals, and permutation p-values in the measure's direction. See
        `sharpkit.evaluation.rate_measures` for the columns; `n` and `seed` are those of the
        run. A measure without values for three models, or one that failed on all, has a row of NaN
        whose `interval_note` says why; so has `cmi_pgdl` where fewer than two hyperparameters are
        known, which it needs.

    Raises:
        ScoreError: If the run has no result yet, everything failed, or no measure has values for
            three models.

    Example:
        >>> import sharpkit as sk
        >>> scores = sk.score_zoo(sk.embedded_zoo(), sk.MSharpness(m=[1, 16], rho=0.1), n=16)
        >>> table = sk.evaluate(scores, resamples=10)
        >>> list(table["m"])
        [1, 16]
    """
    import pandas as pd

    tables = []
    targets = None if target is None else target_values(scores, target)
    flip = target is not None and (
        not larger_is_worse(target) if larger_is_better is None else larger_is_better
    )
    keep = tuple(TABLE.values()) == SHIPPED
    settings: list[str] = []
    broken: list[Exception] = []
    for task, (keys, values) in measure_values(scores).items():
        settings = list(keys.columns)
        rows = pd.DataFrame({"models": values.notna().sum()})
        try:
            configs = scores.model_configs[task]
            if targets is not None:
                configs = with_target(configs, targets[task])
            _warn_of_missing(task, values, keys, list(configs))
            if values.notna().sum().max() >= LEAST:
                directions = directions_of(keys, scores, flip=flip)
                options = directions, resamples, seed, test_size
                folder = scores.folder if keep else None
                rows = kept_table(folder, _evaluated, task, values, configs, *options)
            else:
                rows["interval_note"] = f"all: fewer than {LEAST} models"
        except (MemoryError, ArgumentError):
            raise
        except Exception as error:  # whatever is wrong with a task, the others are evaluated
            broken.append(error)
            rows["interval_note"] = f"all: {error_message(error)}"
            warnings.warn(f"task {task}: {error_message(error)}", stacklevel=2)
        tables.append(pd.concat([keys, rows.reset_index(drop=True)], axis=1).assign(task=task))
    table = pd.concat([*tables, _failed_throughout(scores, tables)], ignore_index=True)
    if "p_value" not in table:
        if broken:
            raise broken[0]
        raise ScoreError(f"no measure has values for {LEAST} models or more: nothing to evaluate")
    settings = [c for c in settings if c in table]
    config = scores.config
    seen = {"n": np.nan if config.get("n") is None else config["n"], "seed": config.get("seed")}
    if target is not None:
        table.insert(0, "target", target if isinstance(target, str) else "given")
    table = table.assign(**{name: v for name, v in seen.items() if name not in settings})
    first = list(dict.fromkeys(["task", *settings, "n", "seed"]))
    return table[[*first, *(c for c in table if c not in first)]]


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
        for s in found.statistics:
            row |= {
                s.statistic: s.value,
                f"{s.statistic}_low": s.low,
                f"{s.statistic}_high": s.high,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _evaluated(
    task: str,
    values: pd.DataFrame,
    configs: dict[str, Any],
    directions: dict[Hashable, int | None],
    resamples: int,
    seed: int,
    test_size: int | None,
) -> pd.DataFrame:
    """The statistics of a task; a mutual information is NaN where it would be infinite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* make no pair to condition on")
        table = rate_measures(
            values,
            configs,
            resamples=resamples,
            seed=seed,
            test_size=test_size,
            directions=directions,
        )
    for name in (name for name, s in TABLE.items() if s.definition):
        infinite = np.isinf(table[name])
        if infinite.any():
            warnings.warn(
                f"task {task}: {name} is not defined with fewer than two hyperparameters; look at "
                f"{HEADLINES[-1]}",
                stacklevel=3,
            )
            table[name] = table[name].mask(infinite)
    return table


def _failed_throughout(scores: Scores, tables: list[pd.DataFrame]) -> pd.DataFrame:
    """A row for each task and measure without a single value, with its first error."""
    import pandas as pd

    there = {
        (task, name) for t in tables for task, name in zip(t["task"], t["measure"], strict=True)
    }
    rows = []
    for (task, measure), failed in scores.failures.groupby(["task", "measure"], sort=False):
        if (task, measure) not in there and measure != TEST_METRICS:
            note = f"all: failed on all {len(failed)} models: {failed['error'].iloc[0]}"
            rows.append({"task": task, "measure": measure, "models": 0, "interval_note": note})
    return pd.DataFrame(rows)


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
