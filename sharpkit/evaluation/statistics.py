"""The statistics that rate a measure: one table of their names and properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sharpkit.evaluation.grid import Floats

Transform: TypeAlias = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Scale:
    """Where a statistic's spread depends least on its value, so that an interval is symmetric.

    Attributes:
        forward: From the statistic to the scale.
        back: From the scale to the statistic.
    """

    forward: Transform
    back: Transform


# just inside ±1 and 1: the scale is infinite there
_EDGE = 1e-6
PLAIN = Scale(lambda x: x, lambda x: x)
FISHER = Scale(lambda x: np.arctanh(np.clip(x, _EDGE - 1, 1 - _EDGE)), np.tanh)
ROOT = Scale(lambda x: np.sqrt(np.maximum(x, 0.0)), lambda z: np.square(np.maximum(z, 0.0)))
UNEXPLAINED = Scale(lambda x: -np.log(np.maximum(1 - x, _EDGE)), lambda z: 1 - np.exp(-z))


@dataclass(frozen=True)
class Statistic:
    """What is to know about a statistic.

    Attributes:
        name: Its column.
        label: On figures and pages.
        low: Smallest value.
        high: Largest value.
        scale: Of its intervals.
        no_relation: Its expectation for a measure unrelated to the gap; None where it depends on
            the zoo and is estimated by shuffling.
        lower_is_better: Whether small values are the good ones.
        directed: Whether it tells a measure from its opposite.
        conditioning_set: Whether it is a minimum over conditioning sets.
        worst_case: Whether it rests on few pairs of models, those of the worst environments.
        percent: Whether it is shown in per cent.
    """

    name: str
    label: str
    low: float = -1.0
    high: float = 1.0
    scale: Scale = FISHER
    no_relation: float | None = 0.0
    lower_is_better: bool = False
    directed: bool = True
    conditioning_set: bool = False
    worst_case: bool = False
    percent: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return self.low, self.high


def _information(name: str, label: str) -> Statistic:
    return Statistic(
        name, label, 0.0, 1.0, ROOT, None, directed=False, conditioning_set=True, percent=True
    )


def _error(name: str, label: str, *, worst_case: bool = True) -> Statistic:
    expected = None if worst_case else 0.5
    return Statistic(
        name, label, 0.0, 1.0, PLAIN, expected, lower_is_better=True, worst_case=worst_case
    )


_ALL = (
    _information("cmi_pgdl", "mutual information, PGDL"),
    _information("cmi_jiang", "mutual information, Jiang"),
    Statistic("kendall_tau", "Kendall’s τ"),
    Statistic("kendall_tau_b", "Kendall’s τ-b"),
    Statistic("granulated_kendall", "granulated Kendall"),
    Statistic("spearman", "Spearman’s ρ"),
    Statistic("pearson", "Pearson’s r"),
    Statistic(
        "r_squared", "R², held out", -math.inf, 1.0, UNEXPLAINED, no_relation=None, directed=False
    ),
    _error("sign_error", "sign-error, mean", worst_case=False),
    _error("sign_error_90", "sign-error, 90 %"),
    _error("sign_error_max", "sign-error, worst"),
)
TABLE = {statistic.name: statistic for statistic in _ALL}
STATISTICS = tuple(TABLE)
SIGN_ERRORS = tuple(name for name in TABLE if name.startswith("sign_error"))
LOWER_IS_BETTER = tuple(s.name for s in _ALL if s.lower_is_better)
RANGES = {s.name: s.range for s in _ALL}
LABELS = {s.name: s.label for s in _ALL}
