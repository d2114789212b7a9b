"""How often a measure orders two models wrongly when a single hyperparameter changes.

An average over many comparisons hides the interventions at which a measure always fails. So each
environment, a change of one hyperparameter, has its own error, and the worst environments are
reported beside the mean. A difference of gaps that the finite test set cannot tell from zero says
nothing about the measure: such pairs get a small weight or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.grid import Configs, Floats, Grid, Ints, Measure, read_comparable

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Environments:
    """Which pairs of models a sign-error compares, and how much each counts; see `sign_error`."""

    kind: str = "values"  # "settings" or "values"
    # examples behind each test accuracy; None gives every pair the weight 1
    test_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown kind or a test set without examples."""
        if self.kind not in ("settings", "values"):
            raise ArgumentError(
                f"unknown environments {self.kind!r}: expected 'settings' or 'values'"
            )
        if self.test_size is not None and self.test_size < 1:
            raise ArgumentError(
                f"test_size = {self.test_size}: expected a positive number of examples"
            )

    def pairs(self, grid: Grid, column: int) -> tuple[Ints, Ints, Ints, Floats]:
        """Pairs that differ in one hyperparameter only.

        Returns:
            tuple: First and second model, number of the environment, weight; each (pairs,).
        """
        first, second, setting = grid.coupled(column)
        size = len(grid.levels[column])
        a, b = grid.codes[first, column], grid.codes[second, column]
        change: Ints = np.minimum(a, b) * size + np.maximum(a, b)
        if self.kind == "settings":
            change = setting * size**2 + change
        weight = _pair_weights(grid.gap[first] - grid.gap[second], self.test_size)
        return first, second, change, weight


@readable(
    lambda s: (
        f"mean {s.mean:.4g}, 90th percentile {s.percentile_90:.4g}, maximum {s.maximum:.4g}, "
        f"{s.environments} environments"
    ),
    brief=True,
)
@dataclass(frozen=True)
class SignErrorSummary:
    """Errors of a set of environments, between 0 (always right) and 1 (always wrong).

    Attributes:
        mean: Average over environments.
        percentile_90: Exceeded by a tenth of the environments.
        maximum: The worst environment.
        environments: How many there are.
    """

    mean: float
    percentile_90: float
    maximum: float
    environments: int

    def frame(self) -> pd.DataFrame:
        """One row, with the attributes as columns."""
        return one_row(self)


@readable(lambda e: f"{e.pairs_used} of {e.pairs} pairs of models count")
@dataclass(frozen=True)
class SignError:
    """Distribution of the sign-error over environments.

    Attributes:
        overall: All environments together.
        per_hyperparameter: By the hyperparameter that changes.
        errors: Error of each environment, by hyperparameter (environments,).
        pairs_used: Pairs of models with a positive weight.
        pairs: Pairs of models that differ in one hyperparameter.
    """

    overall: SignErrorSummary
    per_hyperparameter: Mapping[str, SignErrorSummary]
    errors: Mapping[str, Floats]
    pairs_used: int
    pairs: int

    def frame(self) -> pd.DataFrame:
        """One row for all environments and one per hyperparameter, with the summary's fields."""
        import pandas as pd

        everything = {"(all)": self.overall, **self.per_hyperparameter}
        rows = [
            (name, s.mean, s.percentile_90, s.maximum, s.environments)
            for name, s in everything.items()
        ]
        columns = ["hyperparameter", "mean", "percentile_90", "maximum", "environments"]
        return pd.DataFrame(rows, columns=columns)


def sign_error(
    measure: Measure,
    configs: Configs,
    *,
    test_size: int | None = None,
    environments: str = "settings",
    min_effective_size: float = 1.0,
    direction: int = 1,
) -> SignError:
    """Robust sign-error: wrong orderings per environment, their mean and their worst.

    The loss of a pair is ½ (1 − sgn(Δ measure) sgn(Δ gap)): 0 if ordered alike, 1 if not, ½ for a
    tie. An environment is a change of one hyperparameter from one setting to another, and its error
    the weighted mean over its pairs of models (several where settings were trained repeatedly).
    The weight of a pair is what a test set of `test_size` examples supports: by Hoeffding's
    inequality both gaps are within Δ/2 of their expectations with probability at least
    q = max(0, 1 − 2 exp(−test_size Δ²/2))², Δ the difference of gaps; the weight is (q − ½)₊.

    With one model per setting every environment has one pair and an error of 0, ½ or 1, so the
    maximum says only whether a single pair is ordered wrongly; `environments="values"` pools the
    pairs of all settings for each change of value, which is what to look at in such a zoo.

    Args:
        measure: Mapping or Series of model id -> value.
        configs: A `Task`, or the content of a `model_configs.json`.
        test_size: Examples behind each test accuracy; None gives every pair the weight 1.
        environments: "settings" (two complete settings) or "values" (two values of one
            hyperparameter, over all settings of the others).
        min_effective_size: Environments whose (Σw)² / Σw² is below are left out. The paper, with
            many training runs per setting, takes 12.
        direction: 1 if a large value should mean a large gap, -1 if a small one should.

    Returns:
        SignError: Mean, 90th percentile and maximum, overall and per hyperparameter.

    Raises:
        ScoreError: If no environment remains, or the input is unusable.
        ArgumentError: If `environments` is unknown, `test_size` is not positive or `direction` is
            neither 1 nor -1.

    Source:
        Dziugaite et al., NeurIPS 2020, arXiv:2010.11924, sections 3 and 5 and the appendix on
        Monte Carlo noise.

    Example:
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 8 * (1 + k % 2), "depth": 1 + k // 2} for k in range(4)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(4)}
        >>> configs = model_configs(settings, metrics)
        >>> result = sign_error({0: 1.0, 1: 3.0, 2: 2.0, 3: 2.5}, configs)
        >>> result.overall.mean, result.overall.maximum
        (0.25, 1.0)
    """
    chosen = Environments(environments, test_size)
    if direction not in (1, -1):
        raise ArgumentError(f"direction = {direction}: expected 1 or -1")
    values, grid = read_comparable(measure, configs)
    values = direction * values
    errors: dict[str, Floats] = {}
    used = total = 0
    for h in grid.varying():
        first, second, where, weight = chosen.pairs(grid, h)
        gap_change = grid.gap[first] - grid.gap[second]
        total, used = total + len(first), used + int((weight > 0).sum())
        a, b = values[first], values[second]  # infinities of one sign are a tie, not a NaN
        order = (a > b).astype(np.float64) - (a < b)
        loss = (1 - order * np.sign(gap_change)) / 2
        found = _weighted_means(loss, weight, where, min_effective_size)
        if len(found):
            errors[grid.names[h]] = found
    if not errors:
        raise ScoreError(
            f"none of {total} pairs that differ in one hyperparameter carries weight: the gaps are "
            "too close for the test set, or min_effective_size is too large"
        )
    summaries = {name: _summary(found) for name, found in errors.items()}
    overall = _summary(np.concatenate(list(errors.values())))
    return SignError(overall, summaries, errors, used, total)


def _pair_weights(gap_change: Floats, test_size: int | None) -> Floats:
    if test_size is None:
        return np.ones_like(gap_change)
    failure = 2 * np.exp(-test_size * np.square(gap_change) / 2)
    weights: Floats = np.maximum(np.maximum(0.0, 1 - failure) ** 2 - 0.5, 0.0)
    return weights


def _weighted_means(loss: Floats, weight: Floats, where: Ints, least: float) -> Floats:
    index = np.unique(where, return_inverse=True)[1]
    total = np.bincount(index, weight)
    squares = np.bincount(index, weight**2)
    used = total > 0
    used[used] = total[used] ** 2 / squares[used] >= least * (1 - 1e-9)
    means: Floats = np.bincount(index, weight * loss)[used] / total[used]
    return means


def _summary(errors: Floats) -> SignErrorSummary:
    return SignErrorSummary(
        float(errors.mean()), float(np.percentile(errors, 90)), float(errors.max()), len(errors)
    )
