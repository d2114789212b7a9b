"""The scatter plot of each measure against the gap, which the page draws itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.evaluation._grid import Floats, Grid, read_measure
from sharpkit.evaluation.statistics import TABLE
from sharpkit.report import figures
from sharpkit.report.labels import decimal, finite, number, records
from sharpkit.report.models import gap_title, percent_gap
from sharpkit.report.ranking import interval

if TYPE_CHECKING:
    import pandas as pd


def scatter_data(
    values: pd.DataFrame, table: pd.DataFrame | None, grid: Grid, configs: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything of which the page draws the scatter plot itself; only what can be drawn."""
    columns = columns_of(values, grid)
    labels = [str(label) for label in values]
    if table is not None:  # the best first
        labels = [*table["label"], *(label for label in labels if label not in set(table["label"]))]
    place = {str(label): k for k, label in enumerate(values)}
    drawn = {label: columns[:, place[label]] for label in labels}
    known = np.isfinite(grid.gap)
    rows = {} if table is None else {str(row["label"]): row for row in records(table)}
    scale = 100.0 if percent_gap(configs) else 1.0
    return {
        "models": list(grid.ids),
        "gaps": [finite(scale * g) for g in grid.gap],
        "title": gap_title(configs),
        "hyperparameters": [
            {
                "name": name,
                "levels": in_order(levels),
                "values": [levels[code] if code >= 0 else None for code in grid.codes[:, h]],
            }
            for h, (name, levels) in enumerate(zip(grid.names, grid.levels, strict=True))
        ],
        "measures": [
            {
                "label": label,
                "note": _scatter_note(rows[label]) if label in rows else "",
                "values": [finite(value) for value in column],
            }
            for label, column in drawn.items()
            if (np.isfinite(column) & known).sum() > 1
        ],
        "colours": figures.COLOURS,
    }


def _scatter_note(row: Mapping[str, Any]) -> str:
    parts = []
    for statistic in ("kendall_tau", "r_squared"):
        if np.isfinite(row[statistic]):
            shown = interval(row, statistic)
            parts.append(f"{TABLE[statistic].label} {decimal(row[statistic])} ({shown})")
    if np.isfinite(row["p_value"]):
        parts.insert(1, f"p = {number(row['p_value'], 2)}")
    return ", ".join(parts)


def in_order(levels: Sequence[str]) -> list[str]:
    """Numbers by size, words by the alphabet."""
    try:
        return sorted(levels, key=float)
    except ValueError:
        return sorted(levels)


def columns_of(values: pd.DataFrame, grid: Grid) -> Floats:
    """Values (models, measures) in the grid's order, NaN where there is none."""
    found = np.full((len(grid), values.shape[1]), np.nan)
    for k in range(values.shape[1]):
        found[:, k] = read_measure(values.iloc[:, k], grid)[0]
    return found
