"""Correlations with the gap, against records, scipy and loops."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evaluation_zoos import recorded, slow_tau, zoo
from hypothesis import given, settings, strategies as st

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import granulated_kendall, kendall_tau, pearson, spearman

SUBMISSIONS = ["VPM_1", "VR", "smoothness_gap", "training_accuracy", "vc_dim"]
NUMBERS = st.lists(st.integers(-4, 4), min_size=9, max_size=9)


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_real_submissions_have_their_recorded_correlations(name: str) -> None:
    configs = recorded("pgdl_public/task1_v4/model_configs.json")
    entry = recorded("pgdl_public/task1_v4/submissions.json")[name]
    gap = {
        f"model_{k}": c["metrics"]["train_acc"] - c["metrics"]["test_acc"]
        for k, c in configs.items()
    }
    tau = kendall_tau(entry["prediction"], gap)
    assert tau == pytest.approx(entry["kendall_tau_a"], abs=1e-9)
    granulated = granulated_kendall(entry["prediction"], configs)
    expected = entry["granulated_kendall"]
    assert granulated.per_hyperparameter == pytest.approx(expected, abs=1e-9)
    assert granulated.mean == pytest.approx(entry["granulated_kendall_mean"], abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS)
def test_correlations_agree_with_loops_and_scipy(x: list[int], y: list[int]) -> None:
    assert kendall_tau(x, y) == pytest.approx(slow_tau(x, y), abs=1e-12)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert kendall_tau(x, y, "b") == scipy.stats.kendalltau(x, y).statistic
        assert spearman(x, y) == scipy.stats.spearmanr(x, y).statistic
        assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)


def test_kendall_counts_pairs_of_many_models() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1300))
    assert kendall_tau(x, y) == pytest.approx(kendall_tau(x, y, "b"), abs=1e-12)  # no ties


def test_kendall_of_many_tied_models_is_an_exact_count() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 40, size=(2, 1500)).astype(float)
    x[:5] = math.inf
    signs = [(v[:, None] > v).astype(int) - (v[:, None] < v) for v in (x, y)]
    assert kendall_tau(x, y) == int((signs[0] * signs[1]).sum()) / (1500 * 1499)


def test_kendall_needs_no_table_of_pairs() -> None:
    import tracemalloc

    x, y = np.random.default_rng(3).normal(size=(2, 20_000))
    tracemalloc.start()
    kendall_tau(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 1000  # bytes; one bit for each pair would be 50 million


def test_mappings_are_aligned_by_id() -> None:
    values = {"model_1": 1.0, "model_2": 2.0, "model_3": 3.0}
    gaps = {3: 0.3, 1: 0.1, 2: 0.2}
    assert kendall_tau(values, gaps) == 1
    assert spearman(pd.Series(values), pd.Series(gaps)) == 1


def test_a_constant_side_has_no_correlation() -> None:
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3], "b"))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(pearson([1, 2, 3], [2, 2, 2]))
    assert math.isnan(pearson([1, 2, math.inf], [1, 2, 3]))


def test_granulated_kendall_averages_within_settings_of_the_others() -> None:
    gaps = [0, 1, 2, 3, 5, 4]
    values = [0, 3, 1, 4, 9, 8]
    result = granulated_kendall(dict(enumerate(values)), zoo((3, 2), gaps))
    rows = np.arange(6).reshape(3, 2)
    a = np.mean([slow_tau(np.array(values)[c], np.array(gaps)[c]) for c in rows.T])
    b = np.mean([slow_tau(np.array(values)[r], np.array(gaps)[r]) for r in rows])
    assert result.per_hyperparameter == pytest.approx({"a": a, "b": b})
    assert result.mean == pytest.approx((a + b) / 2)
    assert list(result.frame().columns) == ["hyperparameter", "granulated_kendall"]


def test_granulated_kendall_leaves_out_single_valued_hyperparameters_and_repeated_models() -> None:
    rows = [(0, 0), (0, 0), (1, 0), (1, 0)]
    # models of one setting are ordered wrongly, which is not the hyperparameter's doing
    result = granulated_kendall({0: 2, 1: 1, 2: 4, 3: 3}, zoo((2, 1), [1, 2, 3, 4], rows))
    assert result.per_hyperparameter == {"a": 1.0}


def test_granulated_kendall_needs_models_that_differ_in_one_hyperparameter() -> None:
    with pytest.raises(ScoreError, match="no two models differ"):
        granulated_kendall({0: 1, 1: 2}, zoo((2, 2), [1, 2], [(0, 0), (1, 1)]))


def test_unusable_input_is_refused_with_a_reason() -> None:
    with pytest.raises(ScoreError, match="one length"):
        kendall_tau([1, 2, 3], [1, 2])
    with pytest.raises(ScoreError, match="at least 2"):
        kendall_tau([1], [1])
    with pytest.raises(ScoreError, match="NaN"):
        spearman([1, math.nan], [1, 2])
    with pytest.raises(ScoreError, match="ids of measure and gap differ"):
        pearson({1: 1.0, 2: 2.0}, {1: 1.0, 3: 2.0})
    with pytest.raises(ScoreError, match="one of each"):
        pearson({1: 1.0, 2: 2.0}, [1.0, 2.0])
    with pytest.raises(ArgumentError, match="unknown variant"):
        kendall_tau([1, 2], [1, 2], "c")
