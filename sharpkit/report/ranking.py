"""The table of measures: every statistic with its interval, and what noise has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.evaluation.grid import listed
from sharpkit.evaluation.statistics import TABLE, Statistic
from sharpkit.report.labels import Cell, decimal, finite, given, interval_text, number, records

if TYPE_CHECKING:
    import pandas as pd

_DIRECTIONS = {1: "rises", -1: "falls"}


@dataclass(frozen=True)
class Ranking:
    """The table and what stands below it."""

    # what stands above the cells, and whether a first click puts the least on top
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[tuple[str, Sequence[Cell]]]  # label of a measure and its cells
    notes: Sequence[str]  # where intervals are missing, and why


def ranking_table(table: pd.DataFrame) -> Ranking:
    """The statistics that the page shows, without those that no measure has."""
    rows = records(table)
    columns: list[tuple[str, bool, list[Cell]]] = [
        ("models", False, [_models(row) for row in rows]),
        ("gap", False, [_direction(row) for row in rows]),
    ]
    ranked = [statistic for statistic in TABLE.values() if "page" in statistic.shown]
    for s in ranked:
        columns.append((s.title, s.lower_is_better, [_statistic(row, s) for row in rows]))
        if s.definition:
            columns += [
                (f"noise: {s.title}", False, [_noise(row, s) for row in rows]),
                (f"adjusted: {s.title}", False, [_adjusted(row, s) for row in rows]),
            ]
        if s.p_value:
            columns.append((f"p: {s.label}", True, [_p(row, s.p_value) for row in rows]))
    kept = [c for c in columns if any(cell.order is not None or c[0] == "gap" for cell in c[2])]
    return Ranking(
        [(label, lower) for label, lower, _ in kept],
        [(str(row["label"]), [c[2][k] for c in kept]) for k, row in enumerate(rows)],
        _interval_notes(rows, [s.name for s in ranked if s.title in {c[0] for c in kept}]),
    )


def reasons(note: Any) -> dict[str, str]:
    """Statistic -> why it has no interval, of an evaluation's `interval_note`.

    Example:
        >>> reasons("cmi_pgdl: empty cells; sign_error_90, sign_error_max: few pairs")["cmi_pgdl"]
        'empty cells'
        >>> reasons("all: fewer than 12 models")["r_squared"]
        'fewer than 12 models'
    """
    if not isinstance(note, str) or not note:
        return {}
    found: dict[str, str] = {}
    for part in note.split("; "):
        names, _, reason = part.partition(": ")
        found |= dict.fromkeys(TABLE if names == "all" else names.split(", "), reason)
    return found


def interval(row: Mapping[str, Any], statistic: str) -> str:
    """The interval of a row's statistic, or why there is none; empty without a value."""
    factor = TABLE[statistic].factor
    value, low, high = (row[statistic + end] * factor for end in ("", "_low", "_high"))
    if not math.isfinite(value):
        return ""
    if shown := interval_text(low, high):
        return shown
    return "no interval: " + reasons(row.get("interval_note")).get(statistic, "not defined")


def _models(row: Mapping[str, Any]) -> Cell:
    without = row.get("left_out")
    title = f"without {without}" if isinstance(without, str) and without else ""
    return Cell(str(int(row["models"])), "", float(row["models"]), title)


def _direction(row: Mapping[str, Any]) -> Cell:
    direction = row.get("direction")
    known = given(direction) and direction in _DIRECTIONS
    return Cell(_DIRECTIONS[int(direction)] if known and direction is not None else "either")


def _statistic(row: Mapping[str, Any], s: Statistic) -> Cell:
    value = row[s.name] * s.factor
    worst = row.get(f"{s.name}_set")
    title = f"minimum given {worst}" if worst else ""
    shown = interval(row, s.name)
    small = "" if shown.startswith("no ") else shown
    return Cell(decimal(value), small, finite(value), title)


def _noise(row: Mapping[str, Any], s: Statistic) -> Cell:
    mean, high = (s.factor * row[f"{s.name}_null_{end}"] for end in ("mean", "95"))
    small = f"95 % below {decimal(high)}" if math.isfinite(high) else ""
    return Cell(decimal(mean), small, finite(mean))


def _adjusted(row: Mapping[str, Any], s: Statistic) -> Cell:
    value = s.factor * row[f"{s.name}_adjusted"]
    return Cell(decimal(value), "", finite(value))


def _p(row: Mapping[str, Any], column: str) -> Cell:
    p, corrected = row[column], row[f"{column}_holm"]
    return Cell(number(p, 2), f"Holm {number(corrected, 2)}" if given(p) else "", finite(p))


def _interval_notes(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> list[str]:
    """One line per reason: which statistics of which measures have no interval."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons(row.get("interval_note")).items():
            if name in shown and np.isfinite(row[name]):
                by_reason.setdefault(reason, []).append(TABLE[name].label)
        for reason, names in by_reason.items():
            every = sum(bool(np.isfinite(row[name])) for name in shown)
            which = "all statistics" if len(names) == every else ", ".join(names)
            found.setdefault((which, reason), []).append(str(row["label"]))
    return [
        f"No interval ({reason}): {which}"
        + ("." if len(labels) == len(rows) else f", of {listed(labels, 6, '; ')}.")
        for (which, reason), labels in found.items()
    ]
