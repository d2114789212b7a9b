"""The scatter plot of each measure against the gap, which the page draws itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.evaluation.grid import Grid, read_measures
from sharpkit.evaluation.statistics import TABLE
from sharpkit.report import figures
from sharpkit.report.labels import decimal, finite, number, records
from sharpkit.report.limits import POINTS, drawn, said
from sharpkit.report.models import gap_title, percent_gap
from sharpkit.report.ranking import interval

if TYPE_CHECKING:
    import pandas as pd


def scatter_data(
    values: pd.DataFrame, table: pd.DataFrame | None, grid: Grid, configs: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything of which the page draws the scatter plot itself; only what can be drawn.

    Of many models some are drawn at random, the same for every measure; `sample` says so.
    """
    every = read_measures(values, grid)
    known = np.isfinite(grid.gap)
    rows_drawn = drawn(known & np.isfinite(every).any(1), POINTS)
    sampled = len(rows_drawn) == POINTS < len(grid)
    note = said(len(rows_drawn), len(grid), "models", "drawn at random") if sampled else ""
    shown = finite
    if sampled:
        grid, every, known = grid.take(rows_drawn), every[rows_drawn], known[rows_drawn]
        shown = _short
    columns = every
    labels = [str(label) for label in values]
    if table is not None:  # the best first
        labels = [*table["label"], *(label for label in labels if label not in set(table["label"]))]
    place = {str(label): k for k, label in enumerate(values)}
    of_label = {label: columns[:, place[label]] for label in labels}
    rows = {} if table is None else {str(row["label"]): row for row in records(table)}
    scale = 100.0 if percent_gap(configs) else 1.0
    return {
        "models": list(grid.ids),
        "sample": note,
        "gaps": [shown(scale * g) for g in grid.gap],
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
                "values": [shown(value) for value in column],
            }
            for label, column in of_label.items()
            if (np.isfinite(column) & known).sum() > 1
        ],
        "colours": figures.COLOURS,
    }


def _short(value: float) -> float | None:
    """Six digits, which no eye tells from more."""
    return finite(float(f"{value:.6g}"))


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
