"""Could it be chance? Permutation p-values, and their correction for many measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from sharpkit.errors import ArgumentError
from sharpkit.evaluation._grid import Configs, Floats, Ints, Measure, read_comparable
from sharpkit.evaluation._weighted import LOWER_IS_BETTER, weighted_statistics
from sharpkit.evaluation._weighted_cells import Weights
from sharpkit.evaluation.resampling import LEAST, check_resampling

_BATCH_SIGNS = 2_000_000  # signs of permuted gaps held at a time


def permutation_p_value(
    measure: Measure,
    configs: Configs,
    *,
    statistic: str = "kendall_tau",
    permutations: int = 1000,
    within: Sequence[str] = (),
    seed: int = 0,
) -> float:
    """One-sided p-value: how often chance does as well as the measure.

    The measure's values are shuffled among all models, so the null hypothesis is that they have
    nothing to do with the models. With `within`, they are shuffled only among models that agree in
    these hyperparameters: the null hypothesis is that the measure tells nothing that they do not.
    p = (1 + number of shuffles that reach the observed value) / (1 + permutations), which is valid
    at any number of shuffles.

    Args:
        measure: Mapping or Series of model id -> value; models without one are left out.
        configs: A `Task`, or the content of a `model_configs.json`.
        statistic: One of `STATISTICS`.
        permutations: How many shuffles.
        within: Names of hyperparameters.
        seed: Determines the shuffles.

    Returns:
        float: Between 1 / (1 + permutations) and 1; NaN if the statistic is.

    Raises:
        ScoreError: If fewer than three models can be compared, or the input is unusable.
        ArgumentError: If the statistic or a name in `within` is unknown.

    Source:
        Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology 9 (2010).

    Example:
        >>> configs = {
        ...     f"{k}": {
        ...         "hparams": {"width": {"possible_values": [1, 2], "current_value": 1 + k % 2}},
        ...         "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k},
        ...     }
        ...     for k in range(20)
        ... }
        >>> permutation_p_value({k: k for k in range(20)}, configs, permutations=99)
        0.01
    """
    check_resampling(permutations, statistic=statistic)
    values, grid = read_comparable(measure, configs, least=LEAST)
    unknown = [name for name in within if name not in grid.names]
    if unknown:
        raise ArgumentError(f"within = {list(within)}: the zoo has {', '.join(grid.names)}")
    strata = grid.groups([grid.names.index(name) for name in within])
    orders = shuffles(strata, permutations, seed)
    if statistic == "kendall_tau":
        observed, chance = permuted_kendall(values[:, None], grid.gap, orders)
    else:
        columns = np.concatenate([values[:, None], values[orders].T], axis=1)
        ones = np.ones((1, len(grid)), dtype=np.int64)
        scores = weighted_statistics(columns, grid, ones, (statistic,))[statistic][0]
        scores = -scores if statistic in LOWER_IS_BETTER else scores
        observed, chance = scores[:1], scores[1:, None]
    return float(p_values(observed, chance)[0])


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


def shuffles(strata: Ints, permutations: int, seed: int) -> Ints:
    """Orders of the models (permutations, models) that keep each model in its stratum."""
    keys = np.random.default_rng(seed).random((permutations, len(strata)))
    orders = np.empty(keys.shape, dtype=np.int64)
    orders[:, np.argsort(strata, kind="stable")] = np.argsort(strata + keys, axis=1)
    return orders


def permuted_kendall(values: Floats, gap: Floats, orders: Ints) -> tuple[Floats, Floats]:
    """Kendall's tau-a of measures (models, measures), and with the gaps in each of the orders.

    Returns:
        tuple: Observed (measures,) and shuffled (permutations, measures).
    """
    n = len(gap)
    dtype = np.float32 if n < 4096 else np.float64  # sums of up to n² signs are exact
    sign = _signs(gap[None], dtype)[0]
    signs = _signs(values.T, dtype).reshape(values.shape[1], n * n).T
    shuffled = np.empty((len(orders), values.shape[1]))
    step = max(1, _BATCH_SIGNS // n**2)
    for start in range(0, len(orders), step):
        order = orders[start : start + step]
        permuted = sign[order[:, :, None], order[:, None, :]]  # (batch, models, models)
        shuffled[start : start + step] = permuted.reshape(len(order), -1) @ signs
    pairs = n * (n - 1)
    observed = (sign.reshape(-1) @ signs).astype(np.float64) / pairs
    return observed, shuffled / pairs


def _signs(values: Floats, dtype: type) -> Weights:
    """Sign of each pair's difference (measures, models, models) of values (measures, models)."""
    larger = values[:, :, None] > values[:, None]
    signs: Weights = larger.astype(dtype) - larger.swapaxes(1, 2)
    return signs


def p_values(observed: Floats, chance: Floats) -> Floats:
    """Share of chance values (permutations, measures) that reach the observed ones (measures,)."""
    reached = (chance >= observed - 1e-12 * np.maximum(1.0, np.abs(observed))).sum(0)
    return np.where(np.isnan(observed), np.nan, (1 + reached) / (1 + len(chance)))
