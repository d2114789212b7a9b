"""A table of trained models, a row each: a CSV file, also one that wandb or MLflow wrote."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sharpkit.doors import MAX_DIGITS, MAX_TABLE_BYTES, reading, shown
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.files import read_regular

if TYPE_CHECKING:
    import pandas as pd

Value: TypeAlias = "int | float | bool | str | None"

_DELIMITERS = (",", ";", "\t")
_INTEGER = re.compile(rf"[-+]?[0-9]{{1,{MAX_DIGITS}}}")
_MISSING = {"", "nan", "null"}


@dataclass(frozen=True)
class Table:
    """Cells as text, as they stand in the file."""

    name: str  # for messages
    folder: Path  # what relative paths in it start from
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]

    def values(self, column: str) -> list[Value]:
        """The cells of a column as numbers, bools and text."""
        return [plain_value(row[column]) for row in self.rows]


def read_table(table: str | Path | pd.DataFrame) -> Table:
    """A table from a file of commas, semicolons or tabs, or from a DataFrame.

    A first column without a name is an index that pandas has written, and left out.

    Raises:
        ZooFormatError: It is missing, damaged, has no rows, a row of another length than the
            heading, or a column twice.
        ArgumentError: It is neither a path nor a DataFrame.

    Example:
        >>> import pandas as pd
        >>> table = read_table(pd.DataFrame({"path": ["a b.pt"], "lr": [0.1]}))
        >>> table.rows, table.values("lr")
        (({'path': 'a b.pt', 'lr': '0.1'},), [0.1])
    """
    if isinstance(table, str | Path):
        path = Path(table).expanduser()
        with reading(path, ZooFormatError, "a table as CSV, in UTF-8"):
            text = read_regular(path, MAX_TABLE_BYTES).decode("utf-8-sig")
        return _parsed(str(path), path.resolve().parent, text)
    if not hasattr(table, "to_csv"):
        raise ArgumentError(f"table is {type(table).__name__}: expected a path or a DataFrame")
    text = table.to_csv(index=table.index.name is not None)  # as one of ids
    return _parsed("the table", Path.cwd(), text)


def plain_value(text: str) -> Value:
    """A cell as a number, bool or text; None for an empty one, also if it says nan or null.

    Example:
        >>> [plain_value(text) for text in ("16", "1e-3", "True", "adam", "", "inf", "none")]
        [16, 0.001, True, 'adam', None, 'inf', 'none']
    """
    text = text.strip()
    if text.lower() in _MISSING:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        number = float(text.replace("_", "?"))  # 1_0 is a word
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _parsed(name: str, folder: Path, text: str) -> Table:
    heading = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=heading.count)
    with reading(name, ZooFormatError, "a table as CSV"):
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise ZooFormatError(f"{name}: expected a line of names, and a row for each model")
    columns = [cell.strip() for cell in rows[0][1]]
    for line, row in rows[1:]:
        if len(row) != len(columns):
            raise ZooFormatError(
                f"{name}, line {line}: has {len(row)} cells, expected {len(columns)} as in the "
                "heading; text with a comma stands in quotes"
            )
    start = int(columns[0] == "")
    _check_names(name, columns[start:])
    cells: list[dict[str, Any]] = [
        dict(zip(columns[start:], row[start:], strict=True)) for _, row in rows[1:]
    ]
    return Table(name, folder, tuple(columns[start:]), tuple(cells))


def _check_names(name: str, columns: list[str]) -> None:
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise ZooFormatError(f"{name}: two columns are called {shown(twice[0])}; rename one")
