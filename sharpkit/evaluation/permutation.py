"""Could it be chance? Permutation p-values, and their correction for many measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from sharpkit.errors import ArgumentError
from sharpkit.evaluation.arguments import LEAST, by_direction, check_direction, check_resampling
from sharpkit.evaluation.grid import Configs, Floats, Measure, read_comparable
from sharpkit.evaluation.shuffled_statistics import chance_statistics
from sharpkit.evaluation.shuffles import random_orders
from sharpkit.evaluation.statistics import TABLE


def permutation_p_value(
    measure: Measure,
    configs: Configs,
    *,
    statistic: str = "kendall_tau",
    permutations: int = 1000,
    within: Sequence[str] = (),
    direction: int | None = 1,
    seed: int = 0,
) -> float:
    """P-value: how often chance does as well as the measure.

    The measure's values are shuffled among all models, so the null hypothesis is that they have
    nothing to do with the models. With `within`, they are shuffled only among models that agree in
    these hyperparameters: the null hypothesis is that the measure tells nothing that they do not.
    p = (1 + number of shuffles that reach the observed value) / (1 + permutations), which is valid
    at any number of shuffles. It is one-sided: only an order in the expected direction counts. With
    direction None, it is twice the smaller of both one-sided values. For a conditional mutual
    information, `cmi_null` keeps what the hyperparameters explain.

    Args:
        measure: Mapping or Series of model id -> value; models without one are left out.
        configs: A `Task`, or the content of a `model_configs.json`.
        statistic: One of `STATISTICS`.
        permutations: How many shuffles.
        within: Names of hyperparameters.
        direction: 1 if a large value should mean a large gap, -1 if a small one should, None if
            neither is expected (then without sign-errors, which need a direction).
        seed: Determines the shuffles.

    Returns:
        float: Between 1 / (1 + permutations) and 1; NaN if the statistic is.

    Raises:
        ScoreError: If fewer than three models can be compared, or the input is unusable.
        ArgumentError: If the statistic or a name in `within` is unknown, or the direction is
            none of 1, -1, None.

    Source:
        Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology 9 (2010).

    Example:
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 1 + k % 2} for k in range(20)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(20)}
        >>> configs = model_configs(settings, metrics)
        >>> permutation_p_value({k: k for k in range(20)}, configs, permutations=99)
        0.01
    """
    check_resampling(permutations, statistic=statistic)
    check_direction(direction, statistic)
    values, grid = read_comparable(measure, configs, least=LEAST)
    unknown = [name for name in within if name not in grid.names]
    if unknown:
        raise ArgumentError(f"within = {list(within)}: the zoo has {', '.join(grid.names)}")
    strata = grid.conditioned.groups([grid.names.index(name) for name in within])
    orders = random_orders(strata, permutations, seed)
    ((_, turned, _),) = by_direction(values[:, None], [direction], [statistic])
    found = chance_statistics(turned, grid, orders, [statistic], among_all=not within)
    observed, chance = found[statistic]
    return float(sided_p_values(statistic, observed, chance, [direction])[0])


def sided_p_values(
    statistic: str, observed: Floats, chance: Floats, directions: Sequence[int | None]
) -> Floats:
    """P-values (measures,) in the expected directions; see `permutation_p_value`.

    Sign-errors are expected to be those of the directed measures already.
    """
    above, below = p_values(observed, chance), p_values(-observed, -chance)
    if not TABLE[statistic].directed:
        return above
    if TABLE[statistic].lower_is_better:
        return below
    both = np.minimum(1.0, 2 * np.minimum(above, below))
    chosen = {1: above, -1: below, None: both}
    return np.array([chosen[d][k] for k, d in enumerate(directions)])


def holm(p_values: ArrayLike) -> Floats:
    """Holm's correction for many tests: p-values that control the family-wise error.

    Args:
        p_values: Raw p-values (tests,); NaN ones stay NaN and are not counted.

    Returns:
        ndarray: Adjusted p-values (tests,), at most 1, in the same order.

    Raises:
        ArgumentError: If a value is outside [0, 1].

    Source:
        Holm, Scandinavian Journal of Statistics 6 (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    raw = np.asarray(p_values, dtype=np.float64)
    if ((raw < 0) | (raw > 1)).any():
        raise ArgumentError("p-values are expected between 0 and 1")
    known = np.flatnonzero(~np.isnan(raw))
    order = known[np.argsort(raw[known], kind="stable")]
    steps = raw[order] * np.arange(len(order), 0, -1)
    adjusted = np.full_like(raw, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def p_values(observed: Floats, chance: Floats) -> Floats:
    """Share of chance values (permutations, measures) that reach the observed ones (measures,)."""
    reached = (chance >= observed - 1e-12 * np.maximum(1.0, np.abs(observed))).sum(0)
    return np.where(np.isnan(observed), np.nan, (1 + reached) / (1 + len(chance)))
