"""What the page shows of a run, as plain values for the template."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.evaluation import CombinedPredictor, combined_predictor
from sharpkit.evaluation._grid import Grid, read_configs, read_measure
from sharpkit.evaluation._weighted import LOWER_IS_BETTER
from sharpkit.evaluation.cmi import DEFINITIONS, jiang_score, pgdl_score
from sharpkit.evaluation.regression import LEAST_COMBINED
from sharpkit.report import figures
from sharpkit.report.labels import (
    STATISTICS,
    decimal,
    finite,
    given,
    measure_label,
    number,
    records,
    scale,
)
from sharpkit.runs.evaluate import complete_measures

if TYPE_CHECKING:
    import pandas as pd

_RANKED = (
    "cmi_pgdl",
    "cmi_jiang",
    "kendall_tau",
    "granulated_kendall",
    "r_squared",
    "sign_error",
    "sign_error_90",
)


@dataclass(frozen=True)
class Choice:
    """A figure in several variants, one of which is shown.

    Attributes:
        name: What the page calls it.
        label: Of the selector.
        options: Value of the selector -> text.
        figures: Value of the selector -> plotly's JSON.
    """

    name: str
    label: str
    options: Mapping[str, str]
    figures: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """One number of the ranking table."""

    text: str
    interval: str
    order: float | None
    title: str = ""


@dataclass(frozen=True)
class TaskContent:
    """Everything about one task."""

    name: str
    models: int
    hyperparameters: Mapping[str, Sequence[str]]
    gaps: str
    columns: Sequence[str]
    lower_is_better: Sequence[bool]
    rows: Sequence[tuple[str, int, Sequence[Cell]]]
    choices: Mapping[str, Choice]
    correlations: str
    scatter: Mapping[str, Any]
    combined: Mapping[str, Any] | None
    not_combined: Sequence[str]


def task_content(
    name: str,
    table: pd.DataFrame,
    keys: pd.DataFrame,
    values: pd.DataFrame,
    configs: Mapping[str, Any],
    *,
    resamples: int,
    seed: int,
) -> TaskContent:
    """What the page shows of one task.

    Args:
        name: Of the task.
        table: Its rows of the evaluation.
        keys: Measure and setting of each column of the values.
        values: One row per model.
        configs: Its model_configs.
        resamples: Of the combined predictor's intervals.
        seed: Of the same.
    """
    grid = read_configs(configs)
    labels = [measure_label(key) for key in records(keys)]
    values = values.set_axis(labels, axis=1)
    settings = [column for column in keys.columns if column in table]
    table = table.assign(label=[measure_label(k) for k in records(table[settings])])
    by = "cmi_pgdl" if np.isfinite(table["cmi_pgdl"]).any() else "kendall_tau"
    table = table.sort_values(by, ascending=False, na_position="last", kind="stable")
    ranked = values[list(table["label"])]
    usable = [s for s in STATISTICS if s in table and table[s].notna().any()]
    choices = {
        "ranking": _choice("ranking", "Statistic", usable, lambda s: figures.ranking(table, s)),
        "sets": _conditioning(ranked, grid),
    }
    if "m" in table and table["m"].nunique() > 1:
        choices["m"] = _choice("m", "Statistic", usable, lambda s: figures.against_m(table, s))
    combined, not_combined = _combined(ranked, configs, resamples, seed)
    return TaskContent(
        name=name,
        models=len(grid),
        hyperparameters=dict(zip(grid.names, grid.levels, strict=True)),
        gaps=_gaps(grid),
        columns=[STATISTICS[s] for s in _RANKED] + ["p, Holm"],
        lower_is_better=[s in LOWER_IS_BETTER for s in _RANKED] + [True],
        rows=[(r["label"], int(r["models"]), _cells(r)) for r in records(table)],
        choices=choices,
        correlations=figures.correlations(ranked),
        scatter=_scatter(ranked, table, grid),
        combined=combined,
        not_combined=not_combined,
    )


def _choice(name: str, label: str, keys: Sequence[str], draw: Callable[[str], str]) -> Choice:
    return Choice(name, label, {k: STATISTICS[k] for k in keys}, {k: draw(k) for k in keys})


def _conditioning(values: pd.DataFrame, grid: Grid) -> Choice:
    titles = {"pgdl": "PGDL", "jiang": "Jiang et al."}
    drawn = {}
    for definition in DEFINITIONS:
        scores: dict[str, Mapping[tuple[str, ...], float]] = {}
        for label in values:
            column, present = read_measure(values[label], grid)
            present &= ~np.isnan(column)
            score = pgdl_score if definition == "pgdl" else jiang_score
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the evaluation has told
                found = score(column[present], grid.take(present)).conditioning_sets
            scores[str(label)] = _unordered(found)
        drawn[definition] = figures.conditioning_sets(scores, "%")
    return Choice("sets", "Definition", titles, drawn)


def _unordered(sets: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Sets of which both orders have the same score, once; otherwise both."""
    kept: dict[tuple[str, ...], float] = {}
    for names, score in sets.items():
        if not _same(kept.get(names[::-1]), score):
            kept[names] = score
    return kept


def _same(one: float | None, other: float) -> bool:
    return one is not None and (one == other or (np.isnan(one) and np.isnan(other)))


def _combined(
    values: pd.DataFrame, configs: Mapping[str, Any], resamples: int, seed: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """The predictor from all measures that every scored model has, and the others' names."""
    complete = complete_measures(values)
    others = [str(name) for name in values if name not in complete]
    if complete.shape[1] < 2 or len(complete) < LEAST_COMBINED:
        return None, others
    return _shown(combined_predictor(complete, configs, resamples=resamples, seed=seed)), others


def _shown(found: CombinedPredictor) -> dict[str, Any]:
    heaviest = sorted(found.coefficients.items(), key=lambda item: -abs(item[1]))[:5]
    return {
        "measures": len(found.coefficients),
        "models": found.r_squared.models,
        "statistics": [
            (STATISTICS[s.statistic], decimal(s.value), decimal(s.low), decimal(s.high))
            for s in (found.r_squared, found.kendall_tau)
        ],
        "heaviest": [name for name, _ in heaviest],
    }


def _cells(row: Mapping[str, Any]) -> list[Cell]:
    cells = []
    for statistic in _RANKED:
        value, low, high = (
            row[statistic + end] * scale(statistic) for end in ("", "_low", "_high")
        )
        interval = f"{decimal(low)} to {decimal(high)}" if given(low) else ""
        worst = row.get(f"{statistic}_set")
        title = f"minimum given {worst}" if worst else ""
        order = float(value) if np.isfinite(value) else None
        cells.append(Cell(decimal(value), interval, order, title))
    p = row["p_value_holm"]
    return [*cells, Cell(number(p, 2), "", float(p) if np.isfinite(p) else None)]


def _scatter(values: pd.DataFrame, table: pd.DataFrame, grid: Grid) -> dict[str, Any]:
    """Everything of which the page draws the scatter plot itself."""
    found = [read_measure(values[label], grid)[0] for label in values]
    notes = {
        row["label"]: "Kendall’s τ {}, R² on held-out models {}".format(
            *(_with_interval(row, s) for s in ("kendall_tau", "r_squared"))
        )
        for row in records(table)
    }
    return {
        "models": list(grid.ids),
        "gaps": [finite(g) for g in grid.gap],
        "hyperparameters": [
            {
                "name": name,
                "levels": _in_order(levels),
                "values": [levels[code] if code >= 0 else None for code in grid.codes[:, h]],
            }
            for h, (name, levels) in enumerate(zip(grid.names, grid.levels, strict=True))
        ],
        "measures": [
            {
                "label": str(label),
                "note": notes.get(label, ""),
                "values": [finite(value) for value in column],
            }
            for label, column in zip(values, found, strict=True)
        ],
        "colours": figures.COLOURS,
    }


def _with_interval(row: Mapping[str, Any], statistic: str) -> str:
    value, low, high = (decimal(row[statistic + end]) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def _in_order(levels: Sequence[str]) -> list[str]:
    """Numbers by size, words by the alphabet."""
    try:
        return sorted(levels, key=float)
    except ValueError:
        return sorted(levels)


def _gaps(grid: Grid) -> str:
    gaps = 100 * grid.gap[np.isfinite(grid.gap)]
    if len(gaps) == 0:
        return "unknown"
    spread = number(float(gaps.std(ddof=1)), 3) if len(gaps) > 1 else "–"
    return (
        f"{number(float(gaps.min()), 3)} to {number(float(gaps.max()), 3)} %, "
        f"standard deviation {spread} %"
    )
