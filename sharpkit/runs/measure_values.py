"""The results of a run as tables of models and measures, with the direction of each measure."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.errors import ScoreError
from sharpkit.evaluation import expected_direction
from sharpkit.measures import direction
from sharpkit.measures.measure import Measure
from sharpkit.runs.scores import Scores, check_scores

if TYPE_CHECKING:
    import pandas as pd

_NOT_SETTINGS = ("task", "model", "value", "std_error")


def measure_values(scores: Scores) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """The results of each task as a table with one row per model and one column per measure.

    Returns:
        dict: Task -> keys and values. Row k of the keys says what column k of the values is:
        measure and its setting (m, rho, ...); the values' index are the model ids.

    Raises:
        ScoreError: If the run has no result yet.
    """
    check_scores(scores)
    results = scores.frame()
    if results.empty:
        raise ScoreError(
            _all_failed(scores.failures) or "the run has no results yet: nothing to evaluate"
        )
    settings = [c for c in results.columns if c not in _NOT_SETTINGS]
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


def complete_measures(values: pd.DataFrame) -> pd.DataFrame:
    """The columns that have a finite number for every scored model."""
    finite = np.flatnonzero(np.isfinite(values.to_numpy(dtype=np.float64)).all(axis=0))
    return values.iloc[:, finite.tolist()]


def directions_of(
    keys: pd.DataFrame, scores: Scores, *, flip: bool = False
) -> dict[Hashable, int | None]:
    """Column of the values -> direction of its measure; the opposite one if `flip`."""
    noted = scores.directions
    forms = keys["form"] if "form" in keys else [None] * len(keys)
    pairs = zip(keys["measure"], forms, strict=True)
    found = (column_direction(noted, measure, form) for measure, form in pairs)
    return {k: -d if flip and d is not None else d for k, d in enumerate(found)}


def stated_directions(measures: Mapping[str, Measure]) -> dict[str, Any]:
    """Measure -> 1, -1, None, or these by form; 1 for one of the user's that says nothing.

    Raises:
        ArgumentError: If an attribute `direction` is something else.

    Example:
        >>> from sharpkit.measures import MSharpness, make_measure
        >>> stated_directions({"s": MSharpness(m=1, rho=0.1), "m": make_measure("output_margin")})
        {'s': 1, 'm': -1}
    """
    return {name: _stated(measure) for name, measure in measures.items()}


def column_direction(noted: Mapping[str, Any], measure: str, form: Any = None) -> int | None:
    """That of one column of values; by the measure's name if the run has noted nothing.

    Example:
        >>> column_direction({"spectra": {"rank": -1}}, "spectra", "rank")
        -1
        >>> column_direction({}, "output_margin")
        -1
    """
    if measure not in noted:
        return direction(measure, f"form={form}" if isinstance(form, str) else "")
    found = noted[measure]
    if isinstance(found, Mapping):
        found = found.get(str(form))
    known: int | None = found
    return known


def _stated(measure: Measure) -> Any:
    stated = getattr(measure, "direction", None)
    if isinstance(stated, Mapping):
        return dict(stated)
    shipped = type(measure).__module__.startswith("sharpkit.")
    return direction(measure) if shipped else expected_direction(measure)


def _all_failed(failures: pd.DataFrame) -> str:
    """How a run without a single result failed; empty if nothing has failed."""
    if failures.empty:
        return ""
    first = failures.iloc[0]
    return (
        f"all {len(failures)} measurements failed, so there is nothing to evaluate; the first, "
        f"{first['measure']} of model {first['model']}: {first['error']}"
    )
