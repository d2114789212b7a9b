"""How results show: a line of what they are and a short table, as text and as HTML."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from sharpkit.errors import SharpkitError
from sharpkit.safe_text import printable

if TYPE_CHECKING:
    import pandas as pd

LINES = 12  # of a result as text, at most
_ROWS = LINES - 3  # of a longer table: heading, column names and the last line take one each
_WIDTH: dict[str, Any] = {"max_cols": 12, "float_format": lambda value: f"{value:.4g}"}
C = TypeVar("C", bound=type)


def readable(
    head: Callable[[Any], str],
    *,
    table: Callable[[Any], pd.DataFrame] = lambda result: result.frame(),
    brief: bool = False,
) -> Callable[[C], C]:
    """Let the objects of a class show as a heading and a table; text has at most 12 lines.

    Args:
        head: Of an object; the name of its class is put before it.
        table: Of an object, what is shown of it; by default its `.frame()`.
        brief: Text is the heading alone, and the table is for notebooks.

    Example:
        >>> import pandas as pd
        >>> @readable(lambda points: f"{len(points.x)} in all")
        ... class Points:
        ...     def __init__(self, *x):
        ...         self.x = x
        ...     def frame(self):
        ...         return pd.DataFrame({"x": self.x})
        >>> Points(3, 0.12345)
        Points: 2 in all
             x
             3
        0.1235
    """

    def title(self: Any) -> str:
        return printable(f"{type(self).__name__}: {head(self)}")

    def text(self: Any) -> str:
        return title(self) if brief else as_text(title(self), table(self))

    def html(self: Any) -> str:
        try:
            return as_html(title(self), table(self))
        except SharpkitError as error:  # of files that cannot be read: a notebook says which
            return "\n".join(f"<p>{escape(printable(s))}</p>" for s in (title(self), str(error)))

    def decorated(cls: C) -> C:
        cls.__repr__ = text  # type: ignore[assignment]
        cls._repr_html_ = html  # type: ignore[attr-defined]
        return cls

    return decorated


def one_row(result: Any, **columns: Any) -> pd.DataFrame:
    """The attributes of a dataclass or named tuple as columns of a single row, others behind them.

    Example:
        >>> from typing import NamedTuple
        >>> class Point(NamedTuple):
        ...     x: float
        >>> one_row(Point(0.5), y=2).to_dict("records")
        [{'x': 0.5, 'y': 2}]
    """
    import pandas as pd

    named = hasattr(result, "_asdict")
    attributes = result._asdict() if named else dataclasses.asdict(result)
    return pd.DataFrame([{**attributes, **columns}])


def as_text(head: str, frame: pd.DataFrame) -> str:
    """A heading and the first rows of a table.

    Example:
        >>> import pandas as pd
        >>> print(as_text("Result: n = 8", pd.DataFrame({"m": [1, 4], "value": [0.12345, 2e-5]})))
        Result: n = 8
         m  value
         1 0.1235
         4  2e-05
    """
    if frame.empty:
        return head
    top, rest = _shortened(frame)
    return "\n".join([head, top.to_string(index=False, max_colwidth=40, **_WIDTH), *rest])


def as_html(head: str, frame: pd.DataFrame) -> str:
    """The same for notebooks; what files or users named is escaped.

    Example:
        >>> import pandas as pd
        >>> as_html("a < b", pd.DataFrame({"m": [1]})).splitlines()[0]
        '<p>a &lt; b</p>'
    """
    if frame.empty:
        return f"<p>{escape(head)}</p>"
    top, rest = _shortened(frame)
    table = top.to_html(index=False, border=0, **_WIDTH)
    return "\n".join([f"<p>{escape(head)}</p>", table, *(f"<p>{line}</p>" for line in rest)])


def _shortened(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows that are shown, without control characters, and a line about the others."""
    more = len(frame) - _ROWS
    top = (frame if more <= 1 else frame.head(_ROWS)).map(_plain).rename(columns=_plain)
    return top, [f"... {more} more rows: .frame() has all"] if more > 1 else []


def _plain(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def in_notebook() -> bool:
    """Whether a kernel runs this, whose output is no terminal but is shown as it comes."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
