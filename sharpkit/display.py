"""How results print: a line of what they are, and a short table."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pandas as pd

ROWS = 12  # of a table that are printed
C = TypeVar("C", bound=type)


def readable(head: Callable[[Any], str], *, table: bool = True) -> Callable[[C], C]:
    """Let the objects of a class print as a heading and the table of their `.frame()`.

    Args:
        head: Of an object; the name of its class is put before it.
        table: Whether the table is shown, of a class that has one.

    Example:
        >>> @readable(lambda point: f"x = {point.x}")
        ... class Point:
        ...     def __init__(self, x):
        ...         self.x = x
        >>> Point(3)
        Point: x = 3
    """

    def decorated(cls: C) -> C:
        shown = table and hasattr(cls, "frame")

        def title(self: Any) -> str:
            return f"{cls.__name__}: {head(self)}"

        def text(self: Any) -> str:
            return lines_of(title(self), self.frame()) if shown else title(self)

        def html(self: Any) -> str:
            return html_of(title(self), self.frame())

        cls.__repr__ = text  # type: ignore[assignment]
        if shown:
            cls._repr_html_ = html  # type: ignore[attr-defined]
        return cls

    return decorated


def lines_of(head: str, frame: pd.DataFrame) -> str:
    """A heading and the first rows of a table as text.

    Example:
        >>> import pandas as pd
        >>> print(lines_of("Result: n = 8", pd.DataFrame({"m": [1, 4], "value": [0.12345, 2e-5]})))
        Result: n = 8
         m  value
         1 0.1235
         4  2e-05
    """
    if frame.empty:
        return head
    table = frame.head(ROWS).to_string(index=False, float_format=_number, max_colwidth=40)
    return "\n".join([head, table, *_rest(frame)])


def html_of(head: str, frame: pd.DataFrame) -> str:
    """The same as HTML, which notebooks show in its place.

    Example:
        >>> import pandas as pd
        >>> html_of("a < b", pd.DataFrame({"m": [1]})).splitlines()[0]
        '<p>a &lt; b</p>'
    """
    if frame.empty:
        return f"<p>{escape(head)}</p>"
    table = frame.head(ROWS).to_html(index=False, float_format=_number, border=0)
    return "\n".join([f"<p>{escape(head)}</p>", table, *(f"<p>{r}</p>" for r in _rest(frame))])


def _rest(frame: pd.DataFrame) -> list[str]:
    more = len(frame) - ROWS
    return [f"... {more} more rows: .frame() has all"] if more > 0 else []


def _number(value: Any) -> str:
    return f"{value:.4g}"
