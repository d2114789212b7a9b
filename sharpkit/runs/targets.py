"""What measures are to predict instead of the gap, and what a choice of a model by them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from sharpkit.errors import ArgumentError
from sharpkit.evaluation.grid import normal_id
from sharpkit.runs.measure_values import directions_of, measure_values
from sharpkit.runs.scores import Scores, check_scores

if TYPE_CHECKING:
    import pandas as pd

# a column of `Scores.metrics()`, or model -> value, or task -> model -> value
Target: TypeAlias = "str | Mapping[str, float] | Mapping[str, Mapping[str, float]]"


def target_values(scores: Scores, target: Target) -> dict[str, dict[str, float]]:
    """Task -> model -> what is to be predicted, NaN where it is not known; see `Target`.

    Raises:
        ArgumentError: If there is no such column, or a value is for a model that the run lacks.

    Example:
        >>> import sharpkit as sk
        >>> scores = sk.score_zoo(sk.embedded_zoo(), sk.MSharpness(m=1, rho=0.1), n=8, limit=2)
        >>> {t: v["0"] for t, v in target_values(scores, {"0": 0.5}).items()}
        {'fashion_mnist_14x14': 0.5}
    """
    check_scores(scores)
    models = {task: list(configs) for task, configs in scores.model_configs.items()}
    if isinstance(target, str):
        metrics = scores.metrics()
        known = [str(c) for c in metrics if c not in ("task", "model")]
        if target not in known:
            raise ArgumentError(
                f"target = {target!r}: expected one of {', '.join(known)}, or values by model"
            )
        rows = zip(metrics["task"], metrics["model"], metrics[target].astype(float), strict=True)
        found: dict[str, dict[str, float]] = {task: {} for task in models}
        for task, model, value in rows:
            found[task][model] = value
        return found
    nested = any(isinstance(v, Mapping) for v in target.values())
    if not nested and len(models) > 1:
        raise ArgumentError(
            f"the run has the tasks {', '.join(models)}: give the target by task and model"
        )
    of_task = cast("Mapping[str, Any]", target) if nested else {next(iter(models)): target}
    unknown = [task for task in of_task if task not in models]
    if unknown:
        raise ArgumentError(f"target: no task {unknown[0]!r}, expected {', '.join(models)}")
    return {task: _by_model(of_task.get(task, {}), models[task], task) for task in models}


def larger_is_worse(target: Target) -> bool:
    """Whether a large target goes with a large gap: not an accuracy, by its name.

    Example:
        >>> larger_is_worse("test_acc"), larger_is_worse("test_loss")
        (False, True)
    """
    return not (isinstance(target, str) and {"acc", "accuracy"} & set(target.split("_")))


def with_target(configs: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Configurations of models whose gap, as the evaluation computes it, is the target.

    Example:
        >>> with_target({"0": {"hparams": {}, "metrics": {}}}, {"0": 2.5})["0"]["metrics"]
        {'train_acc': 2.5, 'test_acc': 0.0}
    """
    return {
        model: {**config, "metrics": {"train_acc": values.get(model, math.nan), "test_acc": 0.0}}
        for model, config in configs.items()
    }


def selection_regret(
    scores: Scores, *, target: Target = "test_acc", larger_is_better: bool | None = None
) -> pd.DataFrame:
    """What is lost by picking the model that a measure thinks best, instead of the best one.

    The model picked is that of the smallest value of a measure whose large values should mean a
    large gap, of the largest value if its direction is −1; of models of the same value, one at
    random. With test accuracies a_i and the pick p,

        regret = max_i a_i − a_p.

    It is that of this collection. How it would vary with other models has no honest interval, since
    it hangs on a maximum; what chance does is said beside it, exactly.

    Args:
        scores: Of a run.
        target: What is to be large or small: "test_acc", or another column of `scores.metrics()`,
            or values by model (by task and model, of a run of several tasks).
        larger_is_better: Whether the target should be large; None for accuracies by their names
            only.

    Returns:
        DataFrame: One row per task, measure and setting: models, picked (the model, or how many are
            tied), regret, random_regret (the mean over all models: a random pick's), p_value (the
            chance of a random pick that does as well or better). NaN for a measure without a
            direction.

    Raises:
        ArgumentError: As `target_values`.
        ScoreError: If the run has no result yet.

    Example:
        >>> import sharpkit as sk
        >>> scores = sk.score_zoo(sk.embedded_zoo(), sk.MSharpness(m=1, rho=0.1), n=8, limit=8)
        >>> table = selection_regret(scores)
        >>> list(table.columns)[-4:]
        ['picked', 'regret', 'random_regret', 'p_value']
    """
    import pandas as pd

    larger_is_better = not larger_is_worse(target) if larger_is_better is None else larger_is_better
    targets = target_values(scores, target)
    rows = []
    for task, (keys, values) in measure_values(scores).items():
        goal = pd.Series(targets[task], dtype=float).reindex(values.index)
        directions = directions_of(keys, scores)
        for k, key in enumerate(keys.to_dict("records")):
            usable = values[k].notna() & goal.notna()
            sign = 1.0 if larger_is_better else -1.0
            found = _regret(values[k][usable], sign * goal[usable], directions[k])
            row: dict[Any, Any] = {"task": task} | key
            rows.append(row | {"models": int(usable.sum())} | found)
    return pd.DataFrame(rows)


def _regret(values: pd.Series, gain: pd.Series, direction: int | None) -> dict[str, Any]:
    """The regret of one measure; large gains are good."""
    if values.empty or direction is None:
        unknown: tuple[str, ...] = ("picked", "regret", "random_regret", "p_value")
        return dict.fromkeys(unknown, math.nan)
    directed = direction * values.to_numpy(dtype=np.float64)
    tied = directed == directed.min()
    losses = gain.max() - gain.to_numpy(dtype=np.float64)
    regret = float(losses[tied].mean())
    names = [str(name) for name, here in zip(values.index, tied, strict=True) if here]
    return {
        "picked": names[0] if len(names) == 1 else f"{len(names)} tied",
        "regret": regret,
        "random_regret": float(losses.mean()),
        "p_value": float((losses <= regret + 1e-12).mean()),
    }


def _by_model(given: Mapping[Any, Any], models: list[str], task: str) -> dict[str, float]:
    names = {normal_id(model): model for model in models}
    found = dict.fromkeys(models, math.nan)
    for key, value in given.items():
        if normal_id(key) not in names:
            raise ArgumentError(f"target: {task} has no model {key!r}")
        found[names[normal_id(key)]] = float(value)
    return found
