"""The statistics that rate a measure: one table of what they are and how they are computed.

Everything that evaluates, draws or writes statistics reads `TABLE`. A statistic of one's own is one
more entry; `one_by_one` makes it of a plain function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from sharpkit.evaluation import (
    resampled_formulas as resampled,
    shuffled_by_pairs as shuffled,
    shuffled_by_sorting as many,
)
from sharpkit.evaluation.grid import Floats, Grid, Ints
from sharpkit.evaluation.resampled_formulas import Draws, OfMeasure
from sharpkit.evaluation.shuffles import Chance, Shuffles

Transform: TypeAlias = Callable[[Floats], Floats]
OfShuffles: TypeAlias = Callable[[Floats, Shuffles], tuple[Chance, ...]]


class Scale(NamedTuple):
    """Where a statistic's spread depends least on its value, so that an interval is symmetric."""

    forward: Transform  # from the statistic to the scale
    back: Transform  # from the scale to the statistic


# just inside ±1 and 1: the scale is infinite there
_EDGE = 1e-6
PLAIN = Scale(lambda x: x, lambda x: x)
FISHER = Scale(lambda x: np.arctanh(np.clip(x, _EDGE - 1, 1 - _EDGE)), np.tanh)
ROOT = Scale(lambda x: np.sqrt(np.maximum(x, 0.0)), lambda z: np.square(np.maximum(z, 0.0)))
UNEXPLAINED = Scale(lambda x: -np.log(np.maximum(1 - x, _EDGE)), lambda z: 1 - np.exp(-z))


class Computation(NamedTuple):
    """How statistics that rest on the same sums are computed, of many draws at once."""

    # from a batch of weightings of the models, the function of a measure that gives each statistic
    # (batch,)
    resampled: Callable[[Draws], OfMeasure]
    # from measures (models, measures) and shuffles, the chance of each statistic
    shuffled: OfShuffles
    # the same where many models are shuffled without strata; None for the same function
    shuffled_among_many: OfShuffles | None = None


def one_by_one(function: Callable[[Floats, Grid, Ints], float]) -> Computation:
    """The computation of a statistic from a function of one measure, called for every draw.

    Args:
        function: Of the values (models,), the models (`gap` and the codes of hyperparameters), and
            how often each model counts (models,), whole numbers of which some are 0.

    Example:
        >>> def same_side(values, grid, weights):  # of the means
        ...     means = (np.average(v, weights=weights) for v in (values, grid.gap))
        ...     x, y = (v > mean for v, mean in zip((values, grid.gap), means))
        ...     return np.average(x == y, weights=weights)
        >>> entry = Statistic("same_side", "same side of the mean", one_by_one(same_side), low=0.0)
        >>> entry.title, entry.low, entry.high
        ('same side of the mean', 0.0, 1.0)
    """

    def of_draws(draws: Draws) -> OfMeasure:
        grid, weights = draws.compared.grid, draws.weights.astype(np.int64)
        return lambda measure: (np.array([function(measure.values, grid, w) for w in weights]),)

    def of_shuffles(values: Floats, shuffles: Shuffles) -> tuple[Chance, ...]:
        grid = shuffles.compared.grid
        once = np.ones(len(grid), dtype=np.int64)

        def of_measure(column: Floats, orders: Ints) -> tuple[Floats, ...]:
            return (np.array([function(column[order], grid, once) for order in orders]),)

        return shuffled.one_by_one(of_measure, values, shuffles)

    return Computation(of_draws, of_shuffles)


@dataclass(frozen=True)
class Statistic:
    """What is to know about a statistic."""

    name: str  # its column
    label: str  # on figures and pages
    computation: Computation  # how it is computed
    result: int = 0  # which of the results of the computation it is
    low: float = -1.0  # smallest value
    high: float = 1.0  # largest value
    scale: Scale = PLAIN  # of its intervals
    # its expectation for a measure unrelated to the gap; None where it depends on the zoo and is
    # estimated by shuffling
    no_relation: float | None = None
    directed: bool = True  # whether it tells a measure from its opposite
    # whether it counts errors: of a measure in its expected direction, so that there are none of a
    # measure without one
    lower_is_better: bool = False
    # of a conditional mutual information, "pgdl" or "jiang". It is a minimum over conditioning
    # sets, and its null keeps what the hyperparameters explain
    definition: str = ""
    one_change: bool = False  # whether it compares only models that differ in one hyperparameter
    # whether it rests on few pairs of models, those of the worst environments
    worst_case: bool = False
    # whether it may lie below its mean over zoos, by up to what it is without a relation; the upper
    # ends of intervals are raised by as much
    below_its_mean: bool = False
    p_value: str = ""  # column of its p-value in the tables; empty if they have none
    percent: bool = False  # whether it is shown in per cent
    # whether the report's table of measures has it, "page", and the text that `sharpkit evaluate`
    # prints, "summary"; figures and files have all
    shown: Collection[str] = ("page", "summary")

    @property
    def factor(self) -> float:
        """What it is multiplied with where it is shown."""
        return 100.0 if self.percent else 1.0

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} (%)" if self.percent else self.label


_INFORMATION = Computation(resampled.mutual_information, shuffled.mutual_information)
_KENDALL = Computation(resampled.kendall, shuffled.kendall, many.kendall)
_GRANULATED = Computation(
    resampled.granulated_kendall, shuffled.granulated_kendall, many.granulated_kendall
)
_SPEARMAN = Computation(resampled.spearman, shuffled.spearman, many.spearman)
_PEARSON = Computation(resampled.pearson, shuffled.pearson, many.pearson)
_HELD_OUT = Computation(resampled.r_squared, shuffled.r_squared, many.r_squared)
_ERRORS = Computation(resampled.sign_errors, shuffled.sign_errors, many.sign_errors)

_information = functools.partial(
    Statistic, computation=_INFORMATION, low=0.0, scale=ROOT, directed=False, percent=True
)
_correlation = functools.partial(Statistic, scale=FISHER, no_relation=0.0)
_error = functools.partial(
    Statistic, computation=_ERRORS, low=0.0, lower_is_better=True, one_change=True
)
SHIPPED = (
    _information(
        "cmi_pgdl", "mutual information, PGDL", definition="pgdl", p_value="cmi_pgdl_p_value"
    ),
    _information(
        "cmi_jiang",
        "mutual information, Jiang",
        result=1,
        definition="jiang",
        p_value="cmi_jiang_p_value",
    ),
    _correlation("kendall_tau", "Kendall’s τ", _KENDALL, p_value="p_value"),
    _correlation("kendall_tau_b", "Kendall’s τ-b", _KENDALL, result=1, shown=()),
    _correlation("granulated_kendall", "granulated Kendall", _GRANULATED, one_change=True),
    _correlation("spearman", "Spearman’s ρ", _SPEARMAN, shown=()),
    _correlation("pearson", "Pearson’s r", _PEARSON, shown=()),
    Statistic(
        "r_squared",
        "R², held out",
        _HELD_OUT,
        low=-math.inf,
        scale=UNEXPLAINED,
        directed=False,
        below_its_mean=True,
    ),
    _error("sign_error", "sign-error, mean", no_relation=0.5),
    _error("sign_error_90", "sign-error, 90 %", result=1, worst_case=True, shown=("page",)),
    _error("sign_error_max", "sign-error, worst", result=2, worst_case=True, shown=()),
)
TABLE = {statistic.name: statistic for statistic in SHIPPED}
STATISTICS = tuple(TABLE)
# figures show the first that is defined, and tables are in its order
HEADLINES = ("cmi_pgdl", "kendall_tau")


def computations(statistics: Sequence[str]) -> list[Computation]:
    """Those of the statistics, each once."""
    return list(dict.fromkeys(TABLE[name].computation for name in statistics))
