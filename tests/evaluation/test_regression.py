"""Held-out predictions of the gap, against fits written out one model at a time."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from evaluation_zoos import simulated, zoo

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import combined_predictor, r_squared
from sharpkit.evaluation.resampled_statistics import weighted_statistics


def left_out(x: np.ndarray, y: np.ndarray, w: np.ndarray | None = None) -> float:
    """Leave one model (with its copies) out, fit the others, predict it."""
    w = np.ones(len(x), dtype=int) if w is None else w
    errors = total = 0.0
    for i in np.flatnonzero(w):
        others = np.repeat(np.arange(len(x)), np.where(np.arange(len(x)) == i, 0, w))
        slope, intercept = np.polyfit(x[others], y[others], 1)
        errors += w[i] * (y[i] - intercept - slope * x[i]) ** 2
        total += w[i] * (y[i] - y[others].mean()) ** 2
    return 1 - errors / total


def test_r_squared_is_that_of_a_loop_over_held_out_models() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 30))
    for strength in (0.0, 0.5, 5.0):
        y = strength * x + noise
        assert r_squared(x, y) == pytest.approx(left_out(x, y))
    assert r_squared(1e9 + 1e3 * x, noise + x) == pytest.approx(r_squared(x, noise + x), rel=1e-6)
    assert r_squared({"1": 1.0, "2": 2.0, "3": 3.0}, {"3": 6.0, "2": 4.0, "1": 2.0}) == 1.0


def test_resamples_leave_all_copies_of_a_model_out() -> None:
    rng = np.random.default_rng(1)
    values, grid = simulated(rng, 0.5, shape=(3, 2, 2))
    weights = rng.integers(0, 4, size=(6, 12))
    found = weighted_statistics(values[:, None], grid, weights, ["r_squared"])["r_squared"][:, 0]
    expected = [left_out(values, grid.gap, w) for w in weights]
    assert found == pytest.approx(expected)


def test_what_no_line_can_predict_has_no_r_squared() -> None:
    gaps = [0.1, 0.2, 0.3, 0.4]
    assert math.isnan(r_squared([1.0, 1.0, 1.0, 1.0], gaps))
    assert math.isnan(r_squared(gaps, [1.0, 1.0, 1.0, 1.0]))
    assert math.isnan(r_squared([1.0, math.inf, 2.0, 3.0], gaps))
    assert math.isnan(r_squared([1.0, 1.0, 1.0, 2.0], gaps))  # no line without the last
    _, grid = simulated(np.random.default_rng(0), 0.5, shape=(2, 2))
    columns = np.array([[1.0] * 4, [1.0, 1.0, 1.0, 2.0], [math.inf, 1.0, 2.0, 3.0]]).T
    ones = np.ones((1, 4), dtype=np.int64)
    found = weighted_statistics(columns, grid, ones, ["r_squared"])["r_squared"]
    assert np.isnan(found).all()
    with pytest.raises(ScoreError, match="at least 3 models, got 2"):
        r_squared([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ScoreError, match="NaN"):
        r_squared([1.0, 2.0, math.nan], [1.0, 2.0, 3.0])


def measures(rng: np.random.Generator, n: int = 80) -> tuple[pd.DataFrame, dict[str, object]]:
    """Two causes of the gap, each seen by its own measure in odd units, and useless measures."""
    a, b, noise = rng.normal(size=(3, n))
    configs = zoo((n,), a + b + 0.3 * noise, [(k,) for k in range(n)])
    values = pd.DataFrame({"a": np.exp(3 * a), "b": -(b**3), "constant": np.ones(n)})
    for k in range(10):
        values[f"noise{k}"] = rng.normal(size=n)
    return values, configs


def test_measures_predict_more_together_than_the_best_alone() -> None:
    values, configs = measures(np.random.default_rng(2))
    gaps = [entry["metrics"]["train_acc"] for entry in configs.values()]
    result = combined_predictor(values, configs, resamples=200)
    alone = max(r_squared(values[c].rank().tolist(), gaps) for c in ("a", "b"))
    assert result.r_squared.value > alone + 0.2
    assert 0.6 < result.r_squared.low < result.r_squared.value < result.r_squared.high < 1
    assert result.kendall_tau.low > 0.5
    assert result.r_squared.models == 80
    heaviest = sorted(result.coefficients, key=lambda name: -abs(result.coefficients[name]))
    assert set(heaviest[:2]) == {"a", "b"}
    assert result.coefficients["a"] > 0 > result.coefficients["b"]
    assert abs(result.coefficients["constant"]) < 1e-12
    held_out = np.array([result.predictions[str(k)] for k in range(80)])
    assert np.corrcoef(held_out, gaps)[0, 1] > 0.8
    assert result.frame()["statistic"].tolist() == ["r_squared", "kendall_tau"]


def test_useless_measures_predict_nothing_on_held_out_models() -> None:
    rng = np.random.default_rng(3)
    values, configs = measures(rng)
    noise = values[[f"noise{k}" for k in range(10)]]
    result = combined_predictor(noise, configs, resamples=200)
    assert result.r_squared.value < 0.1
    assert result.kendall_tau.low < 0.1


def test_held_out_models_have_no_part_in_their_predictions() -> None:
    values, configs = measures(np.random.default_rng(4))
    before = combined_predictor(values, configs, resamples=1, folds=80).predictions
    configs["7"]["metrics"]["train_acc"] += 5.0
    after = combined_predictor(values, configs, resamples=1, folds=80).predictions
    assert after["7"] == before["7"]
    assert after["8"] != before["8"]


def test_units_order_and_seed_decide_nothing_they_should_not() -> None:
    values, configs = measures(np.random.default_rng(5))
    first = combined_predictor(values, configs, resamples=50)
    again = combined_predictor(values, configs, resamples=50)
    assert first == again
    changed = values.assign(a=values["a"] ** 0.1 - 7).iloc[::-1]
    assert combined_predictor(changed, configs, resamples=50).r_squared.value == pytest.approx(
        first.r_squared.value, rel=1e-3
    )
    assert (
        combined_predictor(values, configs, resamples=50, seed=1).predictions != first.predictions
    )


def test_incomplete_tables_are_refused() -> None:
    values, configs = measures(np.random.default_rng(6), n=20)
    holes = values.assign(a=values["a"].where(values.index != 3), b=np.inf)
    with pytest.raises(ScoreError, match="value for every model: a, b; leave them out"):
        combined_predictor(holes, configs)
    with pytest.raises(ScoreError, match="9 models: expected at least 10"):
        combined_predictor(values.iloc[:9], configs)
    with pytest.raises(ScoreError, match="no columns"):
        combined_predictor(values[[]], configs)
    with pytest.raises(ScoreError, match="lacks: 99"):
        combined_predictor(values.rename(index={3: 99}), configs)
    with pytest.raises(ArgumentError, match="folds = 21: expected 2 to 20"):
        combined_predictor(values, configs, folds=21)
    with pytest.raises(ArgumentError, match="resamples"):
        combined_predictor(values, configs, resamples=0)
    with pytest.raises(ArgumentError, match="confidence"):
        combined_predictor(values, configs, confidence=1.5)
    configs["4"]["metrics"]["train_acc"] = math.nan
    with pytest.raises(ScoreError, match="a gap is NaN"):
        combined_predictor(values, configs)
