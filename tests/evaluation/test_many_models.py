"""Many models: the same whole numbers as all pairs one by one, in memory that all pairs exceed."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation_zoos import simulated, slow_tau, zoo
from hypothesis import given, settings, strategies as st

from sharpkit.evaluation import (
    STATISTICS,
    null,
    number_of_draws,
    pair_counts,
    permutation_p_value,
    r_squared,
    rate_measures,
    regression,
    resampled_statistics,
    shuffled_information,
    shuffled_statistics,
    spearman,
    threads,
)
from sharpkit.evaluation.grid import Grid, read_configs
from sharpkit.evaluation.intervals import resample_weights
from sharpkit.evaluation.legend import legend
from sharpkit.evaluation.number_of_draws import Sampling, draws_note
from sharpkit.evaluation.pair_counts import count_pairs
from sharpkit.evaluation.resampled_statistics import weighted_statistics
from sharpkit.evaluation.shuffled_by_sorting import shuffled_agreement
from sharpkit.evaluation.shuffled_information import ShuffledInformation
from sharpkit.evaluation.shuffled_statistics import chance_statistics
from sharpkit.evaluation.shuffles import random_orders
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.sorted_pairs import (
    MANY,
    Dominance,
    Smaller,
    concordant_pairs,
    dense_ranks,
    pair_places,
)
from sharpkit.runs.summary import summary


@pytest.fixture
def sorting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after which every zoo counts as one of many models."""

    def switch() -> None:
        for module in (
            pair_counts,
            shuffled_information,
            resampled_statistics,
            shuffled_statistics,
            null,
            regression,
        ):
            monkeypatch.setattr(module, "MANY", 0)

    return switch


def both_smaller(values: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """The definition: whether the second model is smaller in both (models, models)."""
    return (values[:, None] > values) & (gaps[:, None] > gaps)


@settings(max_examples=60, deadline=None)
@given(
    models=st.integers(2, 200),
    levels=st.sampled_from([1, 2, 7, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sorted_counts_are_those_of_all_pairs(models: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, gaps = (dense_ranks(rng.integers(0, levels, models)) for _ in range(2))
    columns = rng.integers(0, 5, (models, 3)).astype(np.float32)
    smaller = both_smaller(values, gaps)
    places = pair_places(values, gaps)
    assert np.array_equal(both_smaller(*places), smaller)
    assert concordant_pairs(*(p[None] for p in places))[0] == smaller.sum()
    expected = smaller.astype(np.float64) @ columns
    assert np.array_equal(Dominance.of(values, gaps).sums(columns), expected)
    below = (values[:, None] > values).astype(np.float64) @ columns
    assert np.array_equal(Smaller.of(values).sums(columns), below)


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_the_tau_of_shuffles_is_that_of_a_loop_over_pairs(levels: int) -> None:
    rng = np.random.default_rng(levels)
    values, gaps = rng.integers(0, levels, 45), rng.integers(0, 9, 45)
    orders = random_orders(np.zeros(45, dtype=np.int64), 7, seed=1)
    found = shuffled_agreement(dense_ranks(values), dense_ranks(gaps), orders) / (45 * 44 / 2)
    assert found.tolist() == [slow_tau(values[order], gaps) for order in orders]


def of_some_zoo(rng: np.random.Generator) -> tuple[np.ndarray, Grid]:
    """A continuous measure, one with ties and one that falls, on 144 models with tied gaps."""
    values, grid = simulated(rng, 0.4, shape=(4, 3, 3, 2, 2))
    gap = np.round(grid.gap, 1)
    grid = Grid(grid.ids, grid.names, grid.codes, grid.levels, grid.possible, gap)
    return np.stack([values, np.round(values), -values], axis=1), grid


@pytest.mark.parametrize("environments", [Environments(), Environments("settings", 3)])
def test_resampled_statistics_are_those_of_all_pairs(
    sorting: Any, environments: Environments
) -> None:
    """To the bit, but for weights of pairs that are no whole numbers, whose sums are rounded."""
    values, grid = of_some_zoo(np.random.default_rng(0))
    weights = resample_weights(len(grid), 9, seed=0)
    options: dict[str, Any] = {"environments": environments, "drawn_together": True}
    expected = weighted_statistics(values, grid, weights, **options)
    sorting()
    found = weighted_statistics(values, grid, weights, **options)
    for name in STATISTICS:
        if name.startswith("sign_error") and environments.test_size:
            assert found[name] == pytest.approx(expected[name], rel=1e-12, nan_ok=True)
        else:
            assert np.array_equal(found[name], expected[name], equal_nan=True), name


def test_pairs_of_incomplete_zoos_with_nan_are_the_same_whole_numbers(sorting: Any) -> None:
    rng = np.random.default_rng(1)
    values, grid = of_some_zoo(rng)
    value, gap = values[:, 1].copy(), grid.gap.copy()
    value[::7], gap[::11] = np.nan, np.nan
    groups = [grid.groups(columns) for columns in ((), (0,), (0, 1), (2, 4))]
    groups[2] = np.where(np.arange(len(grid)) % 5 == 0, -1, groups[2])
    expected = count_pairs(gap, value, groups)
    sorting()
    for found, table in zip(count_pairs(gap, value, groups), expected, strict=True):
        assert found.dtype == table.dtype
        assert np.array_equal(found, table)


def test_scores_of_shuffles_are_the_same_to_the_bit(sorting: Any) -> None:
    rng = np.random.default_rng(2)
    values, grid = of_some_zoo(rng)
    shuffled = np.stack([rng.permutation(column) for column in values.T for _ in range(3)])
    expected = ShuffledInformation.of(grid)(shuffled)
    sorting()
    for found, score in zip(ShuffledInformation.of(grid)(shuffled), expected, strict=True):
        assert np.isfinite(score).all()
        assert np.array_equal(found, score)


def test_chance_of_ranks_is_that_of_the_measure_in_order(sorting: Any) -> None:
    """Which model has which value is forgotten by a shuffle: sorted values stand for all."""
    values, grid = of_some_zoo(np.random.default_rng(3))
    ranked = [s for s in STATISTICS if s[:3] != "cmi" and s not in ("pearson", "r_squared")]
    orders = random_orders(np.zeros(len(grid), dtype=np.int64), 11, seed=0)
    in_order = np.sort(values, axis=0)
    observed = chance_statistics(values, grid, orders[:1], ranked)
    # where one function shuffles the values and the other the gaps, the order is the inverse
    inverse = np.argsort(orders, axis=1)
    by_gap = chance_statistics(in_order, grid, inverse, ranked)
    by_value = chance_statistics(in_order, grid, orders, ranked)
    sorting()
    found = chance_statistics(values, grid, orders, ranked, among_all=True)
    for name in ranked:
        gaps = name.startswith("kendall") or name == "spearman"
        expected = (by_gap if gaps else by_value)[name][1]
        assert found[name][1] == pytest.approx(expected, abs=1e-12)
        assert found[name][0] == pytest.approx(observed[name][0], abs=1e-12)
        assert np.array_equal(found[name][1][:, 0], found[name][1][:, 2])
        assert not np.array_equal(found[name][1][:, 0], found[name][1][:, 1])


def test_chance_of_fits_is_that_of_the_shuffled_gaps(sorting: Any) -> None:
    values, grid = of_some_zoo(np.random.default_rng(4))
    values[0, 2] = np.inf
    orders = random_orders(np.zeros(len(grid), dtype=np.int64), 5, seed=0)
    sorting()
    found = chance_statistics(values, grid, orders, ["pearson", "r_squared"], among_all=True)
    for k in range(2):
        column = values[:, k]
        r = [np.corrcoef(column, grid.gap[order])[0, 1] for order in orders]
        fits = [r_squared(column, grid.gap[order]) for order in orders]
        assert found["pearson"][1][:, k] == pytest.approx(r, abs=1e-12)
        assert found["r_squared"][1][:, k] == pytest.approx(fits, abs=1e-12)
        assert found["r_squared"][0][k] == pytest.approx(r_squared(column, grid.gap))
    assert np.isnan(found["pearson"][1][:, 2]).all()
    assert np.isnan(found["r_squared"][1][:, 2]).all()


def test_the_predictor_of_many_models_has_the_same_draws(sorting: Any) -> None:
    rng = np.random.default_rng(5)
    predicted, gap = np.round(rng.normal(size=(2, 60)), 1)
    weights = resample_weights(60, 20, seed=0)
    expected = regression._kendall_draws(predicted, gap, weights)
    sorting()
    assert np.array_equal(regression._kendall_draws(predicted, gap, weights), expected)


def test_the_number_of_draws_depends_on_the_number_of_models_alone() -> None:
    asked = Sampling()
    assert [asked.of(n) for n in (24, 96, 400, MANY)] == [asked] * 4
    assert Sampling(resamples=7, permutations=70).of(10**6) == Sampling(7, 70)
    drawn = [asked.of(n) for n in (MANY + 1, 1000, 2000, 5000, 10**6)]
    assert [d.resamples for d in drawn] == [974, 500, 250, 100, 100]
    assert [d.permutations for d in drawn] == [10_000, 10_000, 5000, 2000, 1000]


@pytest.fixture(scope="module")
def large() -> tuple[pd.DataFrame, dict[str, Any]]:
    """540 models, six at each of 90 settings, and two measures."""
    rng = np.random.default_rng(6)
    rows = [(a, b, c) for a in range(5) for b in range(6) for c in range(3)] * 6
    gaps = np.array(rows) @ (0.5, 0.3, -0.7) + rng.normal(size=540)
    values = {"good": gaps + rng.normal(size=540), "tied": rng.integers(0, 5, 540) / 4}
    configs = zoo((5, 6, 3), gaps, rows)
    return pd.DataFrame(values, index=list(configs)), configs


def test_a_table_of_many_models_has_the_plain_values_and_says_on_how_many_draws(
    large: tuple[pd.DataFrame, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, configs = large
    monkeypatch.setattr(number_of_draws, "_LEAST_RESAMPLES", 10)
    monkeypatch.setattr(number_of_draws, "_LEAST_PERMUTATIONS", 99)
    monkeypatch.setattr(number_of_draws, "_RESAMPLED", 0)
    monkeypatch.setattr(number_of_draws, "_SHUFFLED", 0)
    table = rate_measures(values, configs)
    assert table["resamples"].tolist() == [10, 10]
    assert table["permutations"].tolist() == [99, 99]
    gap = read_configs(configs).gap
    for name, row in table.iterrows():
        column = values[name].to_numpy()
        assert row["kendall_tau"] == pytest.approx(slow_tau(column, gap), abs=1e-12)
        assert row["spearman"] == pytest.approx(spearman(column, gap), abs=1e-12)
        assert row["r_squared"] == pytest.approx(r_squared(column, gap), abs=1e-12)
        p_value = permutation_p_value(values[name], configs, permutations=99)
        assert row["p_value"] == p_value
    assert table["p_value"].tolist()[0] == 0.01 < table["p_value"].tolist()[1]
    shown = table.assign(task="t", measure=table.index)
    assert "draws: 10 resamples and null shuffles, 99 permutations (540 models)" in summary(shown)
    described = legend(shown).set_index("column")["meaning"]
    assert described["resamples"].startswith("bootstrap resamples")
    assert described["permutations"].startswith("shuffles")
    assert draws_note(shown.assign(models=MANY)) == ""


def test_memory_stays_below_one_matrix_of_all_pairs() -> None:
    """Of 3,000 models a matrix of float32 has 36 MB; every array here, at its peak, has less."""
    rng = np.random.default_rng(7)
    rows = [tuple(row) for row in rng.integers(0, 4, (3000, 4)).tolist()]
    settings_of = dict.fromkeys(rows)
    gaps = rng.normal(size=len(rows))
    configs = zoo((4, 4, 4, 4), gaps, rows)
    assert len(settings_of) == 256
    values = pd.DataFrame({"a": gaps + rng.normal(size=3000)}, index=list(configs))
    small = {"resamples": 2, "permutations": 20}
    rate_measures(values.iloc[:600], configs, **small)  # imports have been made
    tracemalloc.start()
    table = rate_measures(values, configs, **small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table["models"].tolist() == [3000]
    assert peak < 4 * 3000**2


@pytest.mark.parametrize("models", [60, 540])
def test_the_number_of_threads_changes_nothing(
    large: tuple[pd.DataFrame, dict[str, Any]], models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, configs = large
    some = values.iloc[:models]
    tables = []
    for count in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        monkeypatch.setattr(threads, "_there", lambda: 4)
        tables.append(rate_measures(some, configs, resamples=5, permutations=30))
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_an_error_in_a_thread_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_there", lambda: 4)
    assert threads.in_threads(lambda k: k * k, range(9)) == [k * k for k in range(9)]
    with pytest.raises(ZeroDivisionError):
        threads.in_threads(lambda k: 1 / k, [2, 1, 0])
