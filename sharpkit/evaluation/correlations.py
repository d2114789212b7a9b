"""Rank and linear correlation between a measure and the generalization gap.

Kendall's tau counts pairs of models that the measure orders as the gap does; the granulated one
asks this only of models that differ in a single hyperparameter, so that no other can explain the
agreement.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.grid import Configs, Floats, Ints, Measure, read_comparable, unique_ids

if TYPE_CHECKING:
    import pandas as pd


def kendall_tau(measure: ArrayLike | Any, gap: ArrayLike | Any, variant: str = "a") -> float:
    """Kendall's rank correlation between a measure and the gap.

    τ_a = (concordant − discordant) / (n (n − 1) / 2); a tie in either counts for nothing. τ_b
    divides by the geometric mean of the pairs untied in each, and is NaN if one is constant.
    Time: n log n.

    Args:
        measure: Values (n,), or a mapping of id -> value.
        gap: Generalization gaps (n,), or a mapping with the same ids.
        variant: "a" (as in the papers on generalization measures) or "b".

    Returns:
        float: Between −1 and 1.

    Raises:
        ScoreError: If the lengths or ids differ, fewer than two models are given, or a value is
            NaN.
        ArgumentError: If the variant is unknown.

    Source:
        Kendall, Biometrika 30 (1938), and 33 (1945) for τ_b; Jiang et al., ICLR 2020, equation 5.

    Example:
        >>> kendall_tau([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3])
        0.666...
        >>> kendall_tau([1, 1, 3, 4], [0.1, 0.2, 0.4, 0.3], variant="b")
        0.547...
    """
    x, y = aligned(measure, gap)
    if variant == "a":
        return tau_a(x, y)
    if variant == "b":
        from scipy.stats import kendalltau

        return float(kendalltau(x, y, variant="b").statistic)
    raise ArgumentError(f"unknown variant {variant!r}: expected 'a' or 'b'")


def spearman(measure: ArrayLike | Any, gap: ArrayLike | Any) -> float:
    """Spearman's correlation of ranks, ties given their mean rank; NaN if one is constant.

    Args:
        measure: Values (n,), or a mapping of id -> value.
        gap: Generalization gaps (n,), or a mapping with the same ids.

    Returns:
        float: Between −1 and 1.

    Raises:
        ScoreError: If the lengths or ids differ, fewer than two models are given, or a value is
            NaN.

    Source:
        Spearman, American Journal of Psychology 15 (1904).

    Example:
        >>> round(spearman([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3]), 12)
        0.8
    """
    from scipy.stats import spearmanr

    x, y = aligned(measure, gap)
    if _constant(x) or _constant(y):
        return float("nan")
    return float(spearmanr(x, y).statistic)


def pearson(measure: ArrayLike | Any, gap: ArrayLike | Any) -> float:
    """Pearson's linear correlation; NaN if a value is infinite or one side is constant.

    Args:
        measure: Values (n,), or a mapping of id -> value.
        gap: Generalization gaps (n,), or a mapping with the same ids.

    Returns:
        float: Between −1 and 1.

    Raises:
        ScoreError: If the lengths or ids differ, fewer than two models are given, or a value is
            NaN.

    Source:
        Pearson, Proceedings of the Royal Society 58 (1895).

    Example:
        >>> round(pearson([1, 2, 3], [2, 4, 6]), 12)
        1.0
    """
    from scipy.stats import pearsonr

    x, y = aligned(measure, gap)
    if _constant(x) or _constant(y) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(pearsonr(x, y).statistic)


@readable(lambda k: f"mean {k.mean:.4g} over {len(k.per_hyperparameter)} hyperparameters")
@dataclass(frozen=True)
class GranulatedKendall:
    """Kendall's tau within models that differ in one hyperparameter only.

    Attributes:
        per_hyperparameter: Mean tau over the settings of all others, for each hyperparameter that
            two comparable models differ in.
        mean: Mean over hyperparameters, the Ψ of the paper.
    """

    per_hyperparameter: Mapping[str, float]
    mean: float

    def frame(self) -> pd.DataFrame:
        """One row per hyperparameter: hyperparameter, granulated_kendall."""
        import pandas as pd

        rows = list(self.per_hyperparameter.items())
        return pd.DataFrame(rows, columns=["hyperparameter", "granulated_kendall"])


def granulated_kendall(measure: Measure, configs: Configs) -> GranulatedKendall:
    """Kendall's tau per hyperparameter, everything else held fixed, and its mean.

    ψ_h is the average, over settings of all hyperparameters but h, of τ_a among the models of that
    setting; Ψ is the mean of ψ_h over h. Models that are equal in h too are not compared, and a
    setting without a pair is left out.

    Args:
        measure: Mapping or Series of model id -> value.
        configs: A `Task`, or the content of a `model_configs.json`.

    Returns:
        GranulatedKendall: ψ of each hyperparameter that varies, and Ψ.

    Raises:
        ScoreError: If no two models differ in one hyperparameter only, or the input is unusable.

    Source:
        Jiang et al., ICLR 2020, arXiv:1912.02178, equations 6 and 7.

    Example:
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 8 * (1 + k % 2), "depth": 1 + k // 2} for k in range(4)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(4)}
        >>> configs = model_configs(settings, metrics)
        >>> result = granulated_kendall({0: 1.0, 1: 3.0, 2: 2.0, 3: 0.0}, configs)
        >>> result.per_hyperparameter
        {'width': 0.0, 'depth': 0.0}
    """
    values, grid = read_comparable(measure, configs)
    found: dict[str, float] = {}
    for h in grid.varying():
        first, second, setting = grid.coupled(h)
        if len(first) == 0:
            continue
        agreement = _sign(values, first, second) * _sign(grid.gap, first, second)
        starts = np.flatnonzero(np.diff(setting, prepend=-1))
        pairs = np.diff(starts, append=len(setting))
        found[grid.names[h]] = float(np.mean(np.add.reduceat(agreement, starts) / pairs))
    if not found:
        raise ScoreError("no two models differ in exactly one hyperparameter")
    return GranulatedKendall(found, float(np.mean(list(found.values()))))


def tau_a(x: Floats, y: Floats) -> float:
    """Kendall's τ_a (concordant − discordant) / pairs in time n log n."""
    from scipy.stats import kendalltau

    pairs = len(x) * (len(x) - 1) // 2
    places = [np.unique(v, return_inverse=True, return_counts=True)[1:] for v in (x, y)]
    untied = [pairs - int((count * (count - 1) // 2).sum()) for _, count in places]
    if min(untied) == 0:
        return 0.0
    tau_b = float(kendalltau(places[0][0], places[1][0], variant="b").statistic)
    # a whole number, so rounding undoes the division by the geometric mean exactly
    return round(tau_b * math.sqrt(untied[0]) * math.sqrt(untied[1])) / pairs


def mean_ranks(values: Floats | Ints) -> Floats:
    """Ranks (models,) from 1, ties given their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _sign(values: Floats, first: Ints, second: Ints) -> Floats:
    a, b = values[first], values[second]
    sign: Floats = (a > b).astype(np.float64) - (a < b)
    return sign


def _constant(values: Floats) -> bool:
    return bool((values == values[0]).all())


def aligned(measure: Any, gap: Any) -> tuple[Floats, Floats]:
    """Values and gaps (n,) of two sequences, or of two mappings with the same ids.

    Raises:
        ScoreError: If the lengths or ids differ, fewer than two models are given, or a value is
            NaN.
    """
    if isinstance(measure, Mapping) or isinstance(gap, Mapping):
        measure, gap = _by_id(measure, gap)
    elif hasattr(measure, "index") and hasattr(gap, "index") and hasattr(measure, "items"):
        measure, gap = _by_id(measure, gap)  # two Series
    x, y = np.asarray(measure, dtype=np.float64), np.asarray(gap, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ScoreError(f"expected two sequences of one length, got shapes {x.shape}, {y.shape}")
    if len(x) < 2:
        raise ScoreError(f"a correlation needs at least 2 models, got {len(x)}")
    if np.isnan(x).any() or np.isnan(y).any():
        raise ScoreError("a value or gap is NaN: leave that model out first")
    return x, y


def _by_id(measure: Any, gap: Any) -> tuple[list[Any], list[Any]]:
    if not (hasattr(measure, "items") and hasattr(gap, "items")):
        raise ScoreError("expected two mappings or two sequences, got one of each")
    one = dict(zip(unique_ids(measure.keys(), "the measure"), dict(measure).values(), strict=True))
    two = dict(zip(unique_ids(gap.keys(), "the gap"), dict(gap).values(), strict=True))
    if one.keys() != two.keys():
        raise ScoreError(
            f"the ids of measure and gap differ: {sorted(one.keys() ^ two.keys())[:8]}"
        )
    return list(one.values()), [two[name] for name in one]
