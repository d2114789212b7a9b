"""Rows written to a CSV file as they come, so that whoever is killed leaves a readable one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharpkit.errors import RunError
from sharpkit.files import atomic_path, disk_errors
from sharpkit.safe_text import cell

Row = dict[str, Any]


class Table:
    """A CSV file that grows by whole lines, each written at once.

    Args:
        path: Where it is, and is not yet.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Table(Path(folder, "tracking.csv"))
        ...     table.append({"step": 0, "loss": 2.5}, [])
        ...     table.append({"step": 10, "loss": float("nan")}, [{"step": 0, "loss": 2.5}])
        ...     print(table.path.read_text())
        step,loss
        0,2.5
        10,
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] | None = None  # of the file, as this object knows it

    def append(self, row: Row, before: Sequence[Row]) -> None:
        """Write one more row; all of them where it has a column that they had not.

        Raises:
            RunError: If the file has rows of somebody else, or cannot be written.
        """
        if self._columns is None and not before and self.path.exists():
            raise RunError(
                f"{self.path}: has rows already. Load the tracker's state to go on with its "
                "training (load_state_dict), or choose another file"
            )
        if self._columns is None or not set(row) <= set(self._columns):
            self.write([*before, row])
            return
        with disk_errors(self.path), self.path.open("ab", buffering=0) as file:
            file.write(_line(row.get(name) for name in self._columns))

    def write(self, rows: Sequence[Row]) -> None:
        """Replace the file by these rows, in one step."""
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        lines = [_line(self._columns)] if rows else []
        lines += [_line(row.get(name) for name in self._columns) for row in rows]
        with disk_errors(self.path), atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(lines))


def _line(values: Any) -> bytes:
    return (",".join(map(_text, values)) + "\n").encode()


def _text(value: Any) -> str:
    """A number with all its digits, nothing for NaN, text that no spreadsheet takes for more."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        text = cell(value)
        return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text
    return repr(value)


def tidy(row: Mapping[str, Any]) -> Row:
    """A row with Python's own numbers, which files and checkpoints take.

    Example:
        >>> import numpy as np
        >>> tidy({"step": np.int64(3), "loss": np.float32(0.5)})
        {'step': 3, 'loss': 0.5}
    """
    return {k: v.item() if hasattr(v, "item") else v for k, v in row.items()}
