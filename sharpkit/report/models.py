"""The table of models and measures, and what their order depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.evaluation.grid import Floats, Grid, normal_id, read_measures
from sharpkit.report.labels import Cell, finite, number
from sharpkit.report.limits import CELLS, ROWS, drawn, said

if TYPE_CHECKING:
    import pandas as pd

_METRICS = {
    "train_acc": "training accuracy (%)",
    "test_acc": "test accuracy (%)",
    "train_loss": "training loss",
    "test_loss": "test loss",
}


@dataclass(frozen=True)
class ModelsTable:
    """Models x measures."""

    columns: Sequence[str]  # what stands above the cells
    rows: Sequence[tuple[str, Sequence[Cell]]]  # name of a model and its cells
    sorted_by: int | None  # column by whose values the rows are in ascending order; None for none
    sample: str = ""  # that not all models have a row; empty if they have

    @property
    def page(self) -> Sequence[tuple[str, Sequence[Cell]]]:
        """The rows that are shown at first."""
        return self.rows[:ROWS]

    @property
    def pages(self) -> list[list[Any]]:
        """Of a table of several pages, all rows in brief: the model, then text or cell."""
        if len(self.rows) <= ROWS:
            return []
        return [[name, *(_brief(cell) for cell in cells)] for name, cells in self.rows]


def models_table(
    values: pd.DataFrame,
    errors: pd.DataFrame,
    measures: Sequence[str],
    failures: pd.DataFrame,
    grid: Grid,
    configs: Mapping[str, Any],
) -> ModelsTable:
    """Every model with its gap, its value of every measure and its metrics.

    The rows are sorted by the first measure.

    Args:
        values: One row per model that has some, one column per measure, called by its label.
        errors: Their standard errors, alike.
        measures: The measure of each column, without its setting.
    """
    by_id = {normal_id(name): entry.get("metrics", {}) for name, entry in configs.items()}
    metrics = [name for name in _METRICS if any(_known(by_id[i].get(name)) for i in grid.ids)]
    broken: dict[str, dict[str, str]] = {}
    for model, measure, error in failures[["model", "measure", "error"]].itertuples(index=False):
        broken.setdefault(normal_id(model), {})[measure] = error
    found, uncertain = (read_measures(frame, grid) for frame in (values, errors))
    only_failed = [name for name in dict.fromkeys(failures["measure"]) if name not in measures]
    in_percent = percent_gap(configs)
    width = 1 + len(measures) + len(only_failed) + len(metrics)
    most = max(ROWS, CELLS // width)
    chosen = drawn(np.ones(len(grid), dtype=np.bool_), most)
    sample = said(len(chosen), len(grid), "models", "drawn at random")
    rows: list[tuple[str, list[Cell]]] = []
    for i in chosen.tolist():
        name = grid.ids[i]
        wrong = broken.get(name, {})
        cells = [_metric(grid.gap[i], percent=in_percent)]
        for k, measure in enumerate(measures):
            cells.append(_value(found[i, k], uncertain[i, k], wrong.get(measure)))
        cells += [_value(np.nan, np.nan, wrong.get(measure)) for measure in only_failed]
        cells += [_metric(by_id[name].get(m), percent=m.endswith("acc")) for m in metrics]
        rows.append((name, cells))
    heads = [gap_title(configs), *map(str, values.columns), *only_failed]
    heads += [_METRICS[m] for m in metrics]
    if not measures:
        return ModelsTable(heads, rows, None, sample)
    rows.sort(key=lambda row: (row[1][1].order is None, row[1][1].order or 0.0))
    return ModelsTable(heads, rows, 1, sample)


def percent_gap(configs: Mapping[str, Any]) -> bool:
    """Whether the gap is a difference of accuracies, shown in per cent; otherwise of losses."""
    return any("train_acc" in entry.get("metrics", {}) for entry in configs.values())


def gap_title(configs: Mapping[str, Any]) -> str:
    """The gap with its unit."""
    return "generalization gap (%)" if percent_gap(configs) else "generalization gap (loss)"


def reversals(values: Floats, errors: Floats) -> tuple[list[tuple[int, int, int, int]], int]:
    """Pairs of models that two settings order differently, beyond two standard errors each.

    Args:
        values: Of the models by setting (models, settings), NaN where there is none.
        errors: Their standard errors; NaN counts as 0.

    Returns:
        tuple: One (model, model, setting, setting) per such pair, of which the first model is the
            larger one at the first setting; and the number of pairs.
    """
    errors = np.nan_to_num(errors)
    found: list[tuple[int, int, int, int]] = []
    for i in range(len(values)):
        difference = values[i] - values[i + 1 :]  # (later models, settings)
        clear = np.abs(difference) > 2 * np.hypot(errors[i], errors[i + 1 :])
        up, down = clear & (difference > 0), clear & (difference < 0)
        for j in np.flatnonzero(up.any(1) & down.any(1)):
            settings = np.flatnonzero(up[j])[0], np.flatnonzero(down[j])[-1]
            found.append((i, i + 1 + int(j), int(settings[0]), int(settings[1])))
    return found, len(values) * (len(values) - 1) // 2


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _brief(cell: Cell) -> str | list[str]:
    """Text; or text, standard error and title. The page puts ± and the sign of minus back."""
    text, small = (part.replace("−", "-") for part in (cell.text, cell.small.removeprefix("± ")))
    if cell.title:
        return [text, small, cell.title]
    return [text, small] if small else text


def _metric(value: Any, *, percent: bool) -> Cell:
    if not _known(value):
        return Cell("–", "", None)
    shown = 100 * value if percent else value
    return Cell(f"{shown:.2f}".replace("-", "−") if percent else number(shown), "", finite(value))


def _value(value: float, error: float, failure: str | None) -> Cell:
    if np.isnan(value):
        return Cell("failed", "", None, failure) if failure else Cell("–", "", None)
    return Cell(number(value), f"± {number(error, 2)}" if _known(error) else "", finite(value))
