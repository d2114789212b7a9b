"""How measures, statistics and names from files are written on the page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str  # what it shows
    small: str = ""  # below it, in small type
    order: float | None = None  # by which it is sorted; None comes last
    title: str = ""  # shown when it is pointed at


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as mappings."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def measure_label(key: Mapping[str, Any]) -> str:
    """A measure and its setting in one line.

    Example:
        >>> measure_label({"measure": "m_sharpness", "m": 4.0, "rho": 0.05, "form": None})
        'm_sharpness, m = 4, rho = 0.05'
        >>> measure_label({"measure": "path_norm", "m": float("nan"), "form": "plain"})
        'path_norm: plain'
    """
    parts = [str(key["measure"])]
    if given(key.get("form")):
        parts[0] += f": {key['form']}"
    for name, value in key.items():
        if name not in ("measure", "form") and given(value):
            parts.append(f"{name} = {number(value)}")
    return ", ".join(parts)


def given(value: Any) -> bool:
    """Whether a setting has a value."""
    return value is not None and value == value  # NaN is not itself


def finite(value: float) -> float | None:
    """A number for JSON, which knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 4) -> str:
    """A number in a few digits, other values as they are.

    Example:
        >>> number(256.0), number(0.123456), number("plain"), number(float("nan"))
        ('256', '0.1235', 'plain', '–')
    """
    if not given(value):
        return "–"
    if isinstance(value, int | float):
        return f"{value:.{digits}g}".replace("-", "−")
    return str(value)


def decimal(value: float) -> str:
    """A statistic with two decimals.

    Example:
        >>> decimal(-0.1234), decimal(-0.001), decimal(float("nan"))
        ('−0.12', '0.00', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def interval_text(low: float, high: float) -> str:
    """The ends of an interval; empty if there is none."""
    known = math.isfinite(low) and math.isfinite(high)
    return f"{decimal(low)} to {decimal(high)}" if known else ""


def plain(text: Any) -> str:
    """Text for a figure, whose labels know some HTML: no part of it is taken as such.

    Example:
        >>> plain("<b>width</b> & depth")
        '&lt;b&gt;width&lt;/b&gt; &amp; depth'
    """
    return html.escape(str(text), quote=False)
