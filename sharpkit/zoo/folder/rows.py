"""Rows of a table as models: which file each has, and which of them cannot be used."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharpkit.doors import shown
from sharpkit.errors import ZooFormatError
from sharpkit.zoo.folder.columns import MAIN_METRICS, Columns, is_number
from sharpkit.zoo.folder.table import Table, Value, plain_value

_SHOWN = 5  # rows or files in a message
_ROUNDING = 1e-6  # by which a share may be above 1
_PER_CENT = 1.5  # an accuracy above this is no share, whatever was rounded


@dataclass(frozen=True)
class Row:
    """A model as a table has it."""

    path: Path
    initial: Path | None
    hyperparameters: dict[str, Value]
    settings: dict[str, Value]
    metrics: dict[str, float]  # NaN where a cell is no number


def read_rows(
    table: Table,
    columns: Columns,
    matches: Sequence[Sequence[int]],
    root: Path,
    files: Sequence[Path],
) -> tuple[list[Row], list[str]]:
    """The models that have a file and a row, in the order of the files, and what is to tell.

    Args:
        table: Of models.
        columns: What its columns are.
        matches: For each row the files that it may mean.
        root: The folder of the files.
        files: Those of models.

    Raises:
        ZooFormatError: No row has a file, or accuracies are neither shares nor per cent.
    """
    scale = {c: _scale(table, c) for m, c in columns.metrics.items() if m in MAIN_METRICS[:2]}
    lost = _Lost(table, columns.path, root)
    rows_of: dict[int, list[int]] = defaultdict(list)  # file -> its rows
    for k, found in enumerate(matches):
        state = table.rows[k][columns.state].strip().lower() if columns.state else ""
        if state not in ("", "finished"):
            lost.row(f"rows left out, of runs that are {state}", k)
        elif len(found) == 1:
            rows_of[found[0]].append(k)
        else:
            lost.row(
                "rows that fit several files: narrow the pattern"
                if found
                else "rows without a file",
                k,
            )
    kept: list[Row] = []
    for file, rows in sorted(rows_of.items()):
        read = [_row(table, k, columns, files[file], scale) for k in rows]
        if any(repr(other) != repr(read[0]) for other in read):
            lost.file("files left out, whose rows differ", files[file])
            continue
        if len(read) > 1:
            lost.file("files with the same row twice, which counts once", files[file])
        if any(not math.isfinite(v) for m, v in read[0].metrics.items() if m in MAIN_METRICS[:2]):
            lost.file(
                "models without a number as an accuracy, scored but not evaluated", files[file]
            )
        kept.append(read[0])
    named = {file for found in matches for file in found}
    initial = {os.path.realpath(row.initial) for row in kept if row.initial is not None}
    for number, path in enumerate(files):
        if number not in named and os.path.realpath(path) not in initial:
            lost.file("files without a row", path)
    messages = [columns.told(table.name)] if columns.guessed else []
    if in_per_cent := [name for name, factor in scale.items() if factor != 1.0]:
        messages.append(f"{table.name}: {' and '.join(in_per_cent)} taken as per cent")
    messages += lost.told()
    if not kept:
        raise ZooFormatError(
            f"{table.name}: no row has a file of its own. {'; '.join(messages)}. Say which column "
            "names the files, as columns={'path': NAME} or --column path=NAME"
        )
    return kept, messages


class _Lost:
    """Rows and files that are not used, or not in every way, by reason."""

    def __init__(self, table: Table, column: str, root: Path) -> None:
        self._table, self._column, self._root = table, column, root
        self._found: dict[str, list[str]] = defaultdict(list)

    def row(self, why: str, number: int) -> None:
        name = self._table.rows[number][self._column].strip()
        self._found[why].append(name or f"row {number + 1}")

    def file(self, why: str, path: Path) -> None:
        below = path.relative_to(self._root) if path.is_relative_to(self._root) else path
        self._found[why].append(str(below))

    def told(self) -> list[str]:
        """A sentence for each reason, with the first of its rows or files."""
        return [
            f"{self._table.name}: {why} ({len(names)}): {', '.join(names[:_SHOWN])}"
            + (", ..." if len(names) > _SHOWN else "")
            for why, names in self._found.items()
        ]


def _row(
    table: Table, number: int, columns: Columns, path: Path, scale: Mapping[str, float]
) -> Row:
    cells = {name: plain_value(text) for name, text in table.rows[number].items()}

    def number_in(column: str) -> float:
        value = cells[column]
        return float(value) * scale.get(column, 1.0) if is_number(value) else math.nan  # type: ignore[arg-type]

    initial = cells[columns.initial] if columns.initial else None
    return Row(
        path,
        None if initial is None else _there(table, str(initial)),
        {name: cells[column] for name, column in columns.hyperparameters.items()},
        {name: cells[column] for name, column in columns.settings.items()},
        {name: number_in(column) for name, column in columns.metrics.items()},
    )


def _there(table: Table, cell: str) -> Path:
    """The path in a cell: from the table's folder, or from the working directory if it is there."""
    path = Path(cell).expanduser()
    beside = table.folder / path
    return path if path.is_file() and not beside.is_file() else beside


def _scale(table: Table, column: str) -> float:
    """What makes shares of the accuracies in a column: 1, or 0.01 if they are in per cent."""
    numbers = [float(v) for v in table.values(column) if is_number(v)]  # type: ignore[arg-type]
    high, low = max(numbers, default=0.0), min(numbers, default=0.0)
    if high <= 1 + _ROUNDING and low >= 0:
        return 1.0
    if _PER_CENT < high <= 100 * (1 + _ROUNDING) and all(v > 1 or v == 0 for v in numbers):
        return 0.01
    raise ZooFormatError(
        f"{table.name}, {shown(column)}: values from {low:g} to {high:g}; expected accuracies as "
        "shares between 0 and 1, or all in per cent. Put one of both into the table"
    )
