"""What a run notes of the direction of its measures, and reads back when it is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharpkit.evaluation import expected_direction
from sharpkit.measures import direction
from sharpkit.measures.measure import Measure


def stated_directions(measures: Mapping[str, Measure]) -> dict[str, Any]:
    """Measure -> 1, -1, None, or these by form; 1 for one of the user's that says nothing.

    Raises:
        ArgumentError: If an attribute `direction` is something else.

    Example:
        >>> from sharpkit.measures import MSharpness, make_measure
        >>> stated_directions({"s": MSharpness(m=1, rho=0.1), "m": make_measure("output_margin")})
        {'s': 1, 'm': -1}
    """
    return {name: _stated(measure) for name, measure in measures.items()}


def column_direction(noted: Mapping[str, Any], measure: str, form: Any = None) -> int | None:
    """That of one column of values; by the measure's name if the run has noted nothing.

    Example:
        >>> column_direction({"spectra": {"rank": -1}}, "spectra", "rank")
        -1
        >>> column_direction({}, "output_margin")
        -1
    """
    if measure not in noted:
        return direction(measure, f"form={form}" if isinstance(form, str) else "")
    found = noted[measure]
    if isinstance(found, Mapping):
        found = found.get(str(form))
    known: int | None = found
    return known


def _stated(measure: Measure) -> Any:
    stated = getattr(measure, "direction", None)
    if isinstance(stated, Mapping):
        return dict(stated)
    shipped = type(measure).__module__.startswith("sharpkit.")
    return direction(measure) if shipped else expected_direction(measure)
