"""Predicting the gap itself: one measure by an affine fit, several by ridge regression.

Every prediction is for a model that the fit has not seen. R² compares its squared error with that
of the mean gap of the models the fit has seen: 0 is as good as knowing nothing, negative is worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.arguments import LEAST, check_resampling
from sharpkit.evaluation.bootstrap import Interval
from sharpkit.evaluation.correlations import aligned, kendall_tau
from sharpkit.evaluation.grid import Configs, Floats, Ints, listed, read_configs, read_measure
from sharpkit.evaluation.intervals import interval_ends, resample_weights
from sharpkit.evaluation.resampled_by_sorting import weighted_agreement
from sharpkit.evaluation.sorted_pairs import MANY, Dominance, dense_ranks

if TYPE_CHECKING:
    import pandas as pd

_PENALTIES = 10.0 ** np.arange(-3.0, 6.0)  # tried for the ridge, with standardised features
LEAST_COMBINED = 10  # models


def r_squared(measure: ArrayLike | Any, gap: ArrayLike | Any) -> float:
    """R² of an affine fit of the gap to a measure, on held-out models.

        1 − Σ (g_i − ĝ_i)² / Σ (g_i − ḡ_i)²

    ĝ_i is the prediction for model i of the least-squares line through all the others, and ḡ_i
    their mean gap: leave-one-out cross-validation, in closed form.

    Args:
        measure: Values (n,), or a mapping of id -> value.
        gap: Generalization gaps (n,), or a mapping with the same ids.

    Returns:
        float: At most 1; NaN if a value is infinite, one side is constant, or the line is not
            determined without one of the models.

    Raises:
        ScoreError: If the lengths or ids differ, fewer than three models are given, or a value is
            NaN.

    Source:
        Allen, Technometrics 16 (1974), the PRESS statistic; as R² in Jiang et al., ICLR 2019
        (1810.00113), section 4, there on the fitted models.

    Example:
        >>> r_squared([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
        1.0
        >>> round(r_squared([1, 2, 3, 4], [0.3, 0.1, 0.1, 0.3]), 3)
        -2.699
    """
    x, y = aligned(measure, gap)
    n = len(x)
    if n < LEAST:
        raise ScoreError(f"a held-out fit needs at least {LEAST} models, got {n}")
    if not np.isfinite(x).all() or (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    dx, dy = x - x.mean(), y - y.mean()
    dx /= np.abs(dx).max()
    left = 1 - 1 / n - dx**2 / (dx @ dx)  # what a model leaves of the fit without it
    if not (left > 1e-9).all():
        return float("nan")
    held_out = (dy - dx * (dx @ dy) / (dx @ dx)) / left
    return float(1 - (held_out @ held_out) / ((dy @ dy) / (1 - 1 / n) ** 2))


@readable(lambda c: f"{len(c.coefficients)} measures, penalty {c.penalty:.4g}")
@dataclass(frozen=True)
class CombinedPredictor:
    """How well several measures together predict the gap of held-out models.

    Attributes:
        r_squared: With its interval.
        kendall_tau: Between predictions and gaps, with its interval.
        predictions: Model id -> predicted gap, by a fit that has not seen the model.
        coefficients: Measure -> weight of its standardised rank in the fit to all models, in units
            of the gap; how a set of correlated measures shares a weight is arbitrary.
        penalty: Of the fit to all models.
    """

    r_squared: Interval
    kendall_tau: Interval
    predictions: Mapping[str, float]
    coefficients: Mapping[str, float]
    penalty: float

    @property
    def statistics(self) -> tuple[Interval, Interval]:
        """R² and Kendall's tau."""
        return self.r_squared, self.kendall_tau

    def frame(self) -> pd.DataFrame:
        """One row per statistic: statistic, value, low, high, models."""
        import pandas as pd

        rows = [(s.statistic, s.value, s.low, s.high, s.models) for s in self.statistics]
        return pd.DataFrame(rows, columns=["statistic", "value", "low", "high", "models"])


def combined_predictor(
    values: pd.DataFrame,
    configs: Configs,
    *,
    folds: int = 10,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> CombinedPredictor:
    """Predict the gap from all measures at once, by cross-validated ridge regression.

    Each measure is replaced by its ranks, standardised, so that neither its units nor its outliers
    matter, and the gap is regressed on all of them. The penalty is chosen inside each
    training set (leave-one-out), so that the held-out models have no part in it: the folds are
    nested. The interval is that of the predictions as they are, resampling models: the fits are
    not repeated, so it does not cover the chance of another training set.

    Args:
        values: Index of model ids, one column per measure; a column that is constant is of no use
            and allowed.
        configs: A `Task`, or the content of a `model_configs.json`.
        folds: Of the outer cross-validation, in a seeded random order.
        resamples: Bootstrap resamples.
        confidence: Nominal coverage of the intervals.
        seed: Determines folds and resamples.

    Returns:
        CombinedPredictor: R² and Kendall's tau on held-out models, predictions, weights.

    Raises:
        ScoreError: If a model has no value of some measure or no gap, a value is infinite, there
            are fewer than ten models or no measures, or an id is unknown.
        ArgumentError: If an argument is outside its range.

    Source:
        Hoerl and Kennard, Technometrics 12 (1970); for several measures of generalization
        together, Jiang et al., ICLR 2019 (1810.00113), section 4.

    Example:
        >>> import pandas as pd
        >>> from sharpkit.zoo.grid import model_configs
        >>> settings = {k: {"width": 1 + k % 2} for k in range(30)}
        >>> metrics = {k: {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * k} for k in range(30)}
        >>> configs = model_configs(settings, metrics)
        >>> halves = pd.DataFrame({"a": np.arange(30) // 6, "b": np.arange(30) % 6})
        >>> alone = r_squared(halves["a"].tolist(), list(range(30)))
        >>> combined_predictor(halves, configs, resamples=99).r_squared.value > alone
        True
    """
    from sklearn.model_selection import KFold, cross_val_predict

    features, gap, ids = _complete(values, configs)
    if not 2 <= folds <= len(gap):
        raise ArgumentError(f"folds = {folds}: expected 2 to {len(gap)}, the number of models")
    check_resampling(resamples, confidence)
    parts = list(KFold(folds, shuffle=True, random_state=seed).split(features))
    fewest = min(len(training) for training, _ in parts)
    predicted: Floats = cross_val_predict(_ridge(fewest), features, gap, cv=parts)
    baseline = np.empty_like(gap)
    for training, held_out in parts:
        baseline[held_out] = gap[training].mean()
    weights = resample_weights(len(gap), resamples, seed)

    def interval(name: str, value: float, draws: Floats) -> Interval:
        n = len(gap)
        low, high = interval_ends(name, np.array([value]), draws[:, None], confidence, n)
        error = float(np.nanstd(draws, ddof=1)) if resamples > 1 else float("nan")
        ends, note = (float(low[0]), float(high[0])), "" if np.isfinite(low[0]) else "few models"
        return Interval(name, value, *ends, error, confidence, resamples, n, None, note)

    errors, spread = (gap - predicted) ** 2, (gap - baseline) ** 2
    whole = _ridge(len(gap)).fit(features, gap)
    return CombinedPredictor(
        interval(
            "r_squared",
            float(1 - errors.sum() / spread.sum()),
            1 - (weights @ errors) / (weights @ spread),
        ),
        interval(
            "kendall_tau", kendall_tau(predicted, gap), _kendall_draws(predicted, gap, weights)
        ),
        dict(zip(ids, predicted.tolist(), strict=True)),
        dict(zip(map(str, values.columns), whole[-1].coef_.tolist(), strict=True)),
        float(whole[-1].alpha_),
    )


def _complete(values: pd.DataFrame, configs: Configs) -> tuple[Floats, Floats, tuple[str, ...]]:
    """Features (models, measures), gaps (models,) and ids of the models in the table."""
    grid = read_configs(configs)
    if values.shape[1] == 0:
        raise ScoreError("the table of values has no columns: nothing to combine")
    read = [read_measure(values.iloc[:, k], grid) for k in range(values.shape[1])]
    rows = np.flatnonzero(np.any([present for _, present in read], axis=0))
    features = np.stack([column for column, _ in read], axis=1)[rows]
    gap = grid.gap[rows]
    holes = np.flatnonzero(~np.isfinite(features).all(axis=0))
    poor = [str(values.columns[k]) for k in holes.tolist()]
    if poor:
        raise ScoreError(
            f"measures without a finite value for every model: {listed(poor)}; leave them out"
        )
    if np.isnan(gap).any():
        raise ScoreError("a gap is NaN: leave that model out first")
    if len(gap) < LEAST_COMBINED:
        raise ScoreError(
            f"{len(gap)} models: expected at least {LEAST_COMBINED} to fit and to hold out"
        )
    return features, gap, tuple(np.asarray(grid.ids, dtype=object)[rows])


def _ridge(models: int) -> Any:
    """Ridge regression on standardised ranks, its penalty chosen by leave-one-out."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import QuantileTransformer, StandardScaler

    ranks = QuantileTransformer(n_quantiles=models)
    return make_pipeline(ranks, StandardScaler(), RidgeCV(alphas=_PENALTIES))


def _kendall_draws(predicted: Floats, gap: Floats, weights: Ints) -> Floats:
    """Kendall's tau of each resample (resamples,), copies of a model not compared."""
    w = weights.astype(np.float64)
    pairs = w.sum(1) ** 2 - (w * w).sum(1)
    if len(gap) > MANY:
        values, gaps = dense_ranks(predicted), dense_ranks(gap)
        found: Floats = weighted_agreement(values, gaps, Dominance.of(values, gaps), w) / pairs
        return found
    agreement = np.sign(predicted[:, None] - predicted) * np.sign(gap[:, None] - gap)
    draws: Floats = ((w @ agreement) * w).sum(1) / pairs
    return draws
