"""Intervals, p-values and comparisons: exactness, determinism, coverage, error rates."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.stats
from evaluation_zoos import simulated, slow_tau, zoo

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import (
    STATISTICS,
    bootstrap_interval,
    compare_measures,
    conditional_mutual_information,
    granulated_kendall,
    holm,
    kendall_tau,
    pearson,
    permutation_p_value,
    r_squared,
    sign_error,
    spearman,
)
from sharpkit.evaluation.grid import read_configs
from sharpkit.evaluation.intervals import (
    agree,
    fewest_pairs,
    interval_ends,
    observed_and_resampled,
    resample_weights,
    student_quantile,
)
from sharpkit.evaluation.number_of_draws import Sampling
from sharpkit.evaluation.pair_counts import gap_entropy, mutual_information
from sharpkit.evaluation.permutation import p_values
from sharpkit.evaluation.rating import rate
from sharpkit.evaluation.resampled_statistics import weighted_statistics
from sharpkit.evaluation.shuffled_by_pairs import permuted_kendall
from sharpkit.evaluation.shuffled_statistics import chance_statistics
from sharpkit.evaluation.shuffles import random_orders
from sharpkit.evaluation.sign_errors import Environments
from sharpkit.evaluation.statistics import TABLE


def measure_for(values: Any) -> dict[str, float]:
    return {str(k): float(v) for k, v in enumerate(values)}


def test_with_every_model_once_the_weighted_statistics_are_the_plain_ones() -> None:
    values, grid = simulated(np.random.default_rng(0), 0.5)
    found = weighted_statistics(values[:, None], grid, np.ones((1, 96), dtype=np.int64))
    measure = measure_for(values)
    expected = {
        "cmi_pgdl": conditional_mutual_information(measure, grid).score,
        "cmi_jiang": conditional_mutual_information(measure, grid, "jiang").score,
        "kendall_tau": kendall_tau(values, grid.gap),
        "granulated_kendall": granulated_kendall(measure, grid).mean,
        "spearman": spearman(values, grid.gap),
        "pearson": pearson(values, grid.gap),
        "kendall_tau_b": kendall_tau(values, grid.gap, variant="b"),
        "r_squared": r_squared(values, grid.gap),
    }
    errors = sign_error(measure, grid, environments="values").overall
    expected |= zip(
        ("sign_error", "sign_error_90", "sign_error_max"),
        (errors.mean, errors.percentile_90, errors.maximum),
        strict=True,
    )
    assert {name: found[name][0, 0] for name in STATISTICS} == pytest.approx(expected, abs=1e-10)


def test_weighted_statistics_equal_those_of_the_models_repeated() -> None:
    rng = np.random.default_rng(1)
    values, grid = simulated(rng, 0.5, shape=(3, 2, 2))
    weights = rng.integers(0, 4, size=(5, 12))
    found = weighted_statistics(values[:, None], grid, weights)
    for k, w in enumerate(weights):
        copies = np.repeat(np.arange(12), w)
        x, y = values[copies], grid.gap[copies]
        different = [(i, j) for i, j in itertools.permutations(range(len(copies)), 2)
                     if copies[i] != copies[j]]  # fmt: skip
        signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in different]
        assert found["kendall_tau"][k, 0] == pytest.approx(np.mean(signs))
        assert found["spearman"][k, 0] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
        assert found["pearson"][k, 0] == pytest.approx(np.corrcoef(x, y)[0, 1])
        for name, pairs in (
            ("cmi_jiang", different),
            ("cmi_pgdl", different + [(i, i) for i in range(len(copies))]),
        ):
            expected = weighted_loop(name, pairs, x, y, grid.codes[copies])
            assert found[name][k, 0] == pytest.approx(expected, abs=1e-10)


def test_tau_b_of_tied_measures_is_scipys() -> None:
    rng = np.random.default_rng(5)
    _, grid = simulated(rng, 0.5, shape=(3, 2, 2))
    values = rng.integers(0, 4, size=12).astype(float)
    ones = np.ones((1, 12), dtype=np.int64)
    found = weighted_statistics(values[:, None], grid, ones, ["kendall_tau_b"])
    expected = scipy.stats.kendalltau(values, grid.gap).statistic
    assert found["kendall_tau_b"][0, 0] == pytest.approx(expected)
    weights = rng.integers(0, 3, size=(4, 12))
    found = weighted_statistics(values[:, None], grid, weights, ["kendall_tau_b"])
    for k, w in enumerate(weights):
        copies = np.repeat(np.arange(12), w)
        pairs = [(i, j) for i, j in itertools.combinations(copies, 2) if i != j]
        x, y = (np.sign([v[i] - v[j] for i, j in pairs]) for v in (values, grid.gap))
        expected = (x * y).sum() / np.sqrt((x != 0).sum() * (y != 0).sum())
        assert found["kendall_tau_b"][k, 0] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["values", "settings"])
@pytest.mark.parametrize("test_size", [None, 20])
def test_sign_errors_of_a_resample_weigh_its_pairs(kind: str, test_size: int | None) -> None:
    rng = np.random.default_rng(6)
    values, grid = simulated(rng, 0.3, shape=(3, 2, 2))
    environments = Environments(kind, test_size)
    weights = rng.integers(0, 3, size=(5, 12))
    names = ("sign_error", "sign_error_90", "sign_error_max")
    found = weighted_statistics(values[:, None], grid, weights, names, environments=environments)
    for k, w in enumerate(weights):
        sums: dict[Any, list[float]] = {}
        for i, j in itertools.combinations(range(12), 2):
            changed = np.flatnonzero(grid.codes[i] != grid.codes[j])
            if len(changed) != 1:
                continue
            (h,) = changed
            where: tuple[Any, ...] = (h, frozenset((grid.codes[i, h], grid.codes[j, h])))
            if kind == "settings":
                where += tuple(np.delete(grid.codes[i], h))
            weight = float(w[i] * w[j])
            if test_size is not None:
                change = grid.gap[i] - grid.gap[j]
                weight *= max(
                    0.0, max(0.0, 1 - 2 * math.exp(-test_size * change**2 / 2)) ** 2 - 0.5
                )
            wrong = np.sign(values[i] - values[j]) != np.sign(grid.gap[i] - grid.gap[j])
            total = sums.setdefault(where, [0.0, 0.0])
            total[0] += weight * wrong
            total[1] += weight
        errors = [a / b for a, b in sums.values() if b > 0]
        expected = [np.mean(errors), np.percentile(errors, 90), max(errors)]
        assert [found[name][k, 0] for name in names] == pytest.approx(expected)


def test_without_an_environment_there_is_no_sign_error() -> None:
    values, grid = simulated(np.random.default_rng(7), 0.3, shape=(2, 2))
    alone = grid.take(np.array([0, 3]))  # differ in both hyperparameters
    ones = np.ones((1, 2), dtype=np.int64)
    found = weighted_statistics(values[[0, 3], None], alone, ones, ["sign_error_max"])
    assert np.isnan(found["sign_error_max"]).all()


def weighted_loop(name: str, pairs: list[Any], x: Any, y: Any, codes: Any) -> float:
    sizes = (2,) if name == "cmi_pgdl" else (0, 1, 2)
    ratios = []
    for size in sizes:
        for chosen in itertools.combinations(range(codes.shape[1]), size):
            tables: dict[Any, Any] = {}
            for i, j in pairs:
                cell = (*codes[i, list(chosen)], *codes[j, list(chosen)])
                table = tables.setdefault(cell, np.zeros((2, 2)))
                table[int(not y[i] > y[j]), int(not x[i] > x[j])] += 1
            stacked = np.array(list(tables.values()))
            share = 1.0 if name == "cmi_pgdl" else stacked.sum((1, 2))
            entropy = (share * gap_entropy(stacked)).sum()
            ratios.append((share * mutual_information(stacked)).sum() / entropy)
    return min(ratios)


def test_granulated_kendall_of_a_resample_uses_the_pairs_that_it_has() -> None:
    values, grid = simulated(np.random.default_rng(2), 0.5, shape=(2, 2))
    # models 00, 01, 10, 11; without 11, a is seen at b = 0 only and b at a = 0 only
    weights = np.array([[2, 1, 3, 0]])
    found = weighted_statistics(values[:, None], grid, weights, ["granulated_kendall"])
    pairs = [slow_tau(values[[0, k]], grid.gap[[0, k]]) for k in (1, 2)]
    assert found["granulated_kendall"][0, 0] == pytest.approx(np.mean(pairs))


def test_the_seed_determines_everything() -> None:
    values, grid = simulated(np.random.default_rng(3), 0.5)
    other = values + np.random.default_rng(4).normal(size=96)
    first, second = measure_for(values), measure_for(other)
    for call in (
        lambda seed: bootstrap_interval(first, grid, resamples=50, seed=seed),
        lambda seed: permutation_p_value(second, grid, permutations=50, seed=seed),
        lambda seed: compare_measures(first, second, grid, resamples=50, seed=seed),
    ):
        assert call(7) == call(7)
    a, b = (bootstrap_interval(first, grid, resamples=50, seed=s) for s in (7, 8))
    assert (a.low, a.high) != (b.low, b.high)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_interval_contains_its_value_and_narrows_with_confidence(statistic: str) -> None:
    values, grid = simulated(np.random.default_rng(5), 0.6)
    wide, narrow = (
        bootstrap_interval(
            measure_for(values), grid, statistic=statistic, resamples=200, confidence=c
        )
        for c in (0.95, 0.5)
    )
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert wide.std_error > 0
    assert wide.models == 96


def test_ends_are_students_quantile_of_the_spread_on_the_scale_of_the_statistic() -> None:
    rng = np.random.default_rng(20)
    draws = 0.5 + 0.1 * rng.normal(size=(400, 1))
    models, value = 27, np.array([0.5])
    width = scipy.stats.t.ppf(0.95, 25) * math.sqrt(27 / 25)
    assert student_quantile(0.9, models) == pytest.approx(width)
    scales = {
        "sign_error": (lambda x: x, lambda z: z),
        "kendall_tau": (np.arctanh, np.tanh),
        "cmi_jiang": (np.sqrt, np.square),
        "r_squared": (lambda x: -np.log(1 - x), lambda z: 1 - np.exp(-z)),
    }
    for name, (forward, back) in scales.items():
        low, high = interval_ends(name, value, draws, 0.9, models)
        half = width * forward(draws).std(ddof=1)
        assert low[0] == pytest.approx(back(forward(0.5) - half))
        assert high[0] == pytest.approx(back(forward(0.5) + half))
    assert interval_ends("sign_error", value, draws, 0.9, 27, 0.07)[1] == pytest.approx(
        interval_ends("sign_error", value, draws, 0.9, 27)[1] + 0.07
    )


def test_ends_stay_within_what_the_statistic_can_be() -> None:
    draws = np.linspace(0.0, 1.0, 101)[:, None]
    low, high = interval_ends("sign_error", np.array([0.1]), draws, 0.95, 50)
    assert low[0] == 0
    assert 0.1 < high[0] < 1
    for name in STATISTICS:
        scale = TABLE[name].scale
        inside = np.array([0.02, 0.4, 0.9])
        assert scale.back(scale.forward(inside)) == pytest.approx(inside)


def test_there_is_no_interval_without_ground_for_one() -> None:
    draws = np.linspace(0.2, 0.6, 101)[:, None]
    value = np.array([0.4])
    assert math.isnan(interval_ends("kendall_tau", value, draws, 0.95, 11)[0][0])
    assert math.isfinite(interval_ends("kendall_tau", value, draws, 0.95, 12)[0][0])
    assert math.isnan(interval_ends("kendall_tau", value, 0 * draws + 0.4, 0.95, 50)[0][0])
    draws[:11] = math.nan
    assert math.isnan(interval_ends("kendall_tau", value, draws, 0.95, 50)[0][0])


def test_a_word_says_why_there_is_no_interval() -> None:
    rng = np.random.default_rng(21)
    few = bootstrap_interval({k: k for k in range(5)}, zoo((5,), range(5)), resamples=50)
    assert (few.value, few.note) == (1.0, "fewer than 12 models")
    assert math.isnan(few.low)
    assert few.p_value == pytest.approx(1 / 120, abs=0.008)  # one order of 5! is perfect
    values, grid = simulated(rng, 0.5, shape=(3, 2, 2, 2))
    worst = bootstrap_interval(measure_for(values), grid, statistic="sign_error_max", resamples=50)
    assert worst.note == "few pairs"
    perfect = bootstrap_interval(measure_for(grid.gap), grid, resamples=50)
    assert perfect.note == "all resamples agree"
    lacking = grid.take(np.flatnonzero((grid.codes[:, :2] != [2, 1]).any(1)))
    kept = {name: float(v) for name, v in zip(lacking.ids, rng.normal(size=20), strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = bootstrap_interval(kept, lacking, statistic="cmi_pgdl", resamples=50)
    assert empty.note == "empty cells"
    other = {name: float(v) for name, v in zip(lacking.ids, rng.normal(size=20), strict=True)}
    compared = compare_measures(kept, other, lacking, statistic="cmi_pgdl", resamples=50)
    assert (compared.note, math.isnan(compared.p_value)) == ("empty cells", True)
    one = zoo((2,), rng.normal(size=14), [(k % 2,) for k in range(14)])
    alone = bootstrap_interval(dict(enumerate(range(14))), one, statistic="cmi_pgdl", resamples=9)
    assert alone.note == "fewer than two hyperparameters"
    few_pairs = compare_measures(
        measure_for(values), measure_for(grid.gap), grid, statistic="sign_error_90", resamples=50
    )
    assert (few_pairs.note, math.isnan(few_pairs.low)) == ("few pairs", True)


def test_the_smallest_environment_counts_pairs_that_share_models_less() -> None:
    from sharpkit.evaluation.compared_pairs import Compared

    whole = read_configs(zoo((2, 6), range(12)))
    pairs = Compared(whole, [0], Environments()).changes
    assert fewest_pairs(pairs, 12) == 6
    # one model of a = 0 beside six of a = 1: six pairs, all with the same model
    shared = read_configs(zoo((2, 1), range(7), [(0, 0)] + 6 * [(1, 0)]))
    degrees = np.array([6, 1, 1, 1, 1, 1, 1])
    expected = degrees.sum() ** 2 / (2 * (degrees**2).sum())
    assert fewest_pairs(Compared(shared, [0], Environments()).changes, 7) == pytest.approx(expected)
    assert fewest_pairs(None, 7) == 0


@pytest.mark.parametrize("direction", [1, -1])
def test_an_interval_and_its_p_value_never_contradict_each_other(direction: int) -> None:
    excluded = dict.fromkeys(STATISTICS, 0)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        values, grid = simulated(rng, 0.45 * (seed % 3), shape=(3, 2, 2, 2))
        measure = measure_for(direction * values)
        for name in ("kendall_tau", "pearson", "granulated_kendall", "sign_error", "cmi_jiang"):
            interval = bootstrap_interval(
                measure, grid, statistic=name, resamples=60, direction=direction, seed=seed
            )
            described = TABLE[name]
            no_relation = described.no_relation
            if name == "cmi_jiang":
                from sharpkit.evaluation import cmi_null

                no_relation = cmi_null(measure, grid, "jiang", shuffles=60, seed=seed).mean
            else:
                assert interval.p_value == permutation_p_value(
                    measure, grid, statistic=name, permutations=600, direction=direction, seed=seed
                )
            falls = described.directed and direction == -1  # errors are of the directed measure
            if falls or described.lower_is_better:
                better = interval.high < no_relation
            else:
                better = interval.low > no_relation
            assert better == (interval.p_value <= 0.025), (name, seed)
            assert interval.low <= interval.value <= interval.high
            excluded[name] += better
    assert all(0 < excluded[name] < 40 for name in ("kendall_tau", "sign_error", "cmi_jiang"))


def test_agreement_moves_only_the_ends_that_disagree() -> None:
    ends = np.array([-0.2, 0.1, 0.1]), np.array([0.6, 0.6, 0.6])
    low, high = agree(ends, np.zeros(3), np.array([0.01, 0.01, 0.2]), np.ones(3), 0.95)
    assert low[0] == 1e-9  # shown by the test, missed by the interval
    assert low[1] == 0.1
    assert low[2] == 0  # not shown by the test
    assert high.tolist() == [0.6, 0.6, 0.6]


def test_chance_statistics_are_those_of_the_shuffled_measure() -> None:
    rng = np.random.default_rng(22)
    values, grid = simulated(rng, 0.4, shape=(3, 2, 2))
    values = np.round(values, 1)
    values[1] = values[0]  # a tie
    orders = random_orders(np.zeros(12, dtype=np.int64), 5, 0)
    environments = Environments("values", 30)
    found = chance_statistics(values[:, None], grid, orders, STATISTICS, environments)
    once = np.ones((1, 12), dtype=np.int64)
    shuffled = np.concatenate([values[None], values[orders]]).T
    expected = weighted_statistics(shuffled, grid, once, environments=environments)
    for name in STATISTICS:
        if name.startswith("kendall"):  # there the gaps are shuffled instead
            taus = [
                kendall_tau(values, gap, "b" if name.endswith("b") else "a")
                for gap in (grid.gap, *grid.gap[orders])
            ]
            expected[name] = np.array([taus])
        assert found[name][0] == pytest.approx(expected[name][0, :1], abs=1e-10)
        assert found[name][1][:, 0] == pytest.approx(expected[name][0, 1:], abs=1e-10)


def test_a_measure_may_be_expected_to_fall_with_the_gap() -> None:
    _, grid = simulated(np.random.default_rng(23), 0.0, shape=(3, 2, 2, 2))
    margin = measure_for(-grid.gap)
    assert permutation_p_value(margin, grid, permutations=99) == 1
    for statistic in STATISTICS:
        p = permutation_p_value(margin, grid, statistic=statistic, permutations=99, direction=-1)
        assert p == 0.01
    assert permutation_p_value(margin, grid, permutations=99, direction=None) == 0.02
    assert sign_error(margin, grid, direction=-1).overall.maximum == 0
    assert sign_error(margin, grid).overall.mean == 1
    for call in (permutation_p_value, bootstrap_interval):
        with pytest.raises(ArgumentError, match="needs a direction"):
            call(margin, grid, statistic="sign_error", direction=None)
        with pytest.raises(ArgumentError, match="expected 1, -1 or None"):
            call(margin, grid, direction=2)
    with pytest.raises(ArgumentError, match="expected 1 or -1"):
        sign_error(margin, grid, direction=0)
    best = compare_measures(margin, measure_for(grid.gap), grid, directions=(-1, 1), resamples=30)
    assert (best.first, best.second, best.p_value) == (1, 1, 1)


def test_perfect_and_useless_measures_have_the_p_values_they_should() -> None:
    _, grid = simulated(np.random.default_rng(6), 0.0)
    perfect, reverse = measure_for(grid.gap), measure_for(-grid.gap)
    for statistic in STATISTICS:
        p = permutation_p_value(perfect, grid, statistic=statistic, permutations=99)
        assert p == 0.01
    assert permutation_p_value(reverse, grid, permutations=99) == 1
    constant = permutation_p_value(measure_for(np.ones(96)), grid, permutations=99)
    assert constant == 1


def test_shuffling_within_hyperparameters_removes_what_they_explain() -> None:
    rng = np.random.default_rng(7)
    rows = [(k % 2,) for k in range(60)]
    gaps = np.array([row[0] for row in rows]) + 0.1 * rng.normal(size=60)
    configs = zoo((2,), gaps, rows)
    measure = measure_for([row[0] + 0.1 * rng.normal() for row in rows])  # knows the setting only
    assert permutation_p_value(measure, configs, permutations=199) == 0.005
    assert permutation_p_value(measure, configs, permutations=199, within=["a"]) > 0.05
    strata = np.array([0, 1, 0, 2, 1])
    for order in random_orders(strata, 20, 0):
        assert sorted(order) == list(range(5))
        assert (strata[order] == strata).all()


def test_shuffled_kendall_is_that_of_the_shuffled_gaps() -> None:
    rng = np.random.default_rng(8)
    values, gap = rng.normal(size=(10, 2)), rng.integers(0, 4, size=10).astype(float)
    orders = random_orders(np.zeros(10, dtype=np.int64), 6, 0)
    observed, shuffled = permuted_kendall(values, gap, orders)
    for k in range(2):
        assert observed[k] == pytest.approx(slow_tau(values[:, k], gap))
        for b, order in enumerate(orders):
            assert shuffled[b, k] == pytest.approx(slow_tau(values[:, k], gap[order]))


def test_null_measures_have_uniform_p_values() -> None:
    rng = np.random.default_rng(9)
    _, grid = simulated(rng, 0.0)
    null = rng.normal(size=(96, 400))
    orders = random_orders(np.zeros(96, dtype=np.int64), 499, 0)
    p = p_values(*permuted_kendall(null, grid.gap, orders))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_holm_steps_down_and_ignores_missing_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, math.nan, 0.6]) == pytest.approx([0.02, math.nan, 0.6], nan_ok=True)
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        holm([0.1, 1.2])


def test_a_comparison_tells_a_better_measure_and_not_a_measure_from_itself() -> None:
    rng = np.random.default_rng(10)
    values, grid = simulated(rng, 0.9)
    good, bad = measure_for(values), measure_for(rng.normal(size=96))
    for statistic in STATISTICS:
        result = compare_measures(good, bad, grid, statistic=statistic, resamples=300)
        better = -1 if TABLE[statistic].lower_is_better else 1
        ends = sorted((better * result.low, better * result.high))
        assert ends[1] > 0
        if statistic != "sign_error_max":  # a single environment decides it
            assert ends[0] > 0
            assert result.p_value < 0.05
        assert result.difference == pytest.approx(result.first - result.second)
        opposite = compare_measures(bad, good, grid, statistic=statistic, resamples=300)
        assert opposite.difference == pytest.approx(-result.difference)
        assert (opposite.low, opposite.high) == pytest.approx((-result.high, -result.low))
    same = compare_measures(good, good, grid, resamples=100)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_a_comparison_uses_the_models_that_both_measures_have() -> None:
    values, grid = simulated(np.random.default_rng(11), 0.9)
    first = measure_for(values) | {"3": math.nan}
    second = {k: v for k, v in measure_for(values).items() if k != "5"}
    assert compare_measures(first, second, grid, resamples=20).models == 94


def test_wrong_arguments_are_refused() -> None:
    values, grid = simulated(np.random.default_rng(0), 0.5, shape=(2, 2))
    measure = measure_for(values)
    with pytest.raises(ArgumentError, match="unknown statistic 'tau'"):
        bootstrap_interval(measure, grid, statistic="tau")
    with pytest.raises(ArgumentError, match="0 resamples"):
        bootstrap_interval(measure, grid, resamples=0)
    with pytest.raises(ArgumentError, match="confidence"):
        compare_measures(measure, measure, grid, confidence=1.0)
    with pytest.raises(ArgumentError, match="the zoo has a, b"):
        permutation_p_value(measure, grid, within=["width"])
    with pytest.raises(ScoreError, match="expected at least 3"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bootstrap_interval({"0": 1.0, "1": 2.0}, grid)
    with pytest.raises(ScoreError, match="2 models have both values"):
        compare_measures({"0": 1.0, "1": 2.0}, measure, grid)


def test_resampled_sign_errors_of_separate_pairs_spread_like_a_mean_of_pairs() -> None:
    rng = np.random.default_rng(12)
    values, gaps = rng.normal(size=(2, 200))
    grid = read_configs(zoo((2, 100), gaps))
    weights = resample_weights(200, 4000, seed=0)
    found = observed_and_resampled(values[:, None], grid, weights, ["sign_error"], hyperparameter=0)
    share, draws = (rows[..., 0] for rows in found["sign_error"])
    # 100 pairs with no model in common, each right or wrong: a binomial share, whose variance the
    # jackknife doubles since each pair is in two models; 5 % for ratios
    assert draws.std() == pytest.approx(math.sqrt(2 * share * (1 - share) / 100), rel=0.05)


@pytest.mark.slow
def test_resampled_sign_errors_spread_like_those_of_new_zoos() -> None:
    zoos = [simulated(np.random.default_rng(20_000 + k), 0.6) for k in range(400)]
    once = np.ones((1, 96), dtype=np.int64)
    scores = [weighted_statistics(v[:, None], g, once, ["sign_error"]) for v, g in zoos]
    spread = np.std([score["sign_error"] for score in scores])
    resampled = []
    for k, (values, grid) in enumerate(zoos[:40]):
        weights = resample_weights(96, 200, seed=k)
        found = observed_and_resampled(values[:, None], grid, weights, ["sign_error"])
        resampled.append(found["sign_error"][1].std())
    # three standard errors: 3.5 % for 400 zoos, 2.5 % for 40 estimates; a plain bootstrap: 1.45
    assert 0.87 < np.mean(resampled) / spread < 1.35


@pytest.mark.slow
def test_95_percent_intervals_cover_the_score_of_a_zoo_of_this_size() -> None:
    alpha, zoos = 0.6, 120
    drawn = [simulated(np.random.default_rng(10_000 + k), alpha) for k in range(600)]
    once = np.ones((1, 96), dtype=np.int64)
    scores = [weighted_statistics(v[:, None], g, once) for v, g in drawn]
    truth = {name: np.mean([s[name] for s in scores]) for name in STATISTICS}
    covered = dict.fromkeys(STATISTICS, 0)
    for k in range(zoos):
        values, grid = simulated(np.random.default_rng(k), alpha)
        sampling = Sampling(200, 200, 0.95, k)
        found = rate(values[:, None], grid, STATISTICS, sampling, [1], Environments())
        for name, rating in found.items():
            covered[name] += int(rating.low[0] <= truth[name] <= rating.high[0])
    rates = {name: count / zoos for name, count in covered.items()}
    # three standard errors of a share of 120 below 93 %
    assert all(rate >= 0.93 - 0.07 for rate in rates.values()), rates
