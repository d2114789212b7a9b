"""What a measure without information scores: the shuffles, their scores, their calibration."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from evaluation_zoos import simulated, slow_jiang, slow_pgdl, zoo

from sharpkit.errors import ArgumentError
from sharpkit.evaluation import cmi_null, conditional_mutual_information
from sharpkit.evaluation.grid import Grid, read_configs
from sharpkit.evaluation.null import _effects, cmi_nulls, explained_shuffles
from sharpkit.evaluation.shuffled_information import ShuffledInformation


def measure_for(values: Any) -> dict[str, float]:
    return {str(k): float(v) for k, v in enumerate(values)}


def draws(shuffles: int, models: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.random((shuffles, models)).argsort(axis=1), rng.random((shuffles, models))


@pytest.mark.parametrize("ties", [False, True])
def test_scores_of_shuffles_equal_the_slow_reference(ties: bool) -> None:
    rng = np.random.default_rng(0)
    gaps, values = rng.normal(size=(2, 12))
    if ties:
        gaps, values = np.round(gaps), np.round(values)
    configs = zoo((3, 2, 2), gaps)
    shuffled = np.stack([values, *(rng.permutation(values) for _ in range(6))])
    pgdl, jiang = ShuffledInformation.of(read_configs(configs))(shuffled)
    for k, column in enumerate(shuffled):
        # sums of xlogx of counts up to 144: rounding of some 1e-14
        assert pgdl[k] == pytest.approx(slow_pgdl(measure_for(column), configs), abs=1e-11)
        assert jiang[k] == pytest.approx(slow_jiang(measure_for(column), configs), abs=1e-11)


def test_many_groups_and_many_models_are_counted_as_exactly() -> None:
    rng = np.random.default_rng(1)
    rows = [tuple(row) for row in rng.integers(0, 6, size=(300, 4)).tolist()]
    gaps, values = rng.normal(size=(2, 300))
    configs = zoo((6, 6, 6, 6), gaps, rows)
    grid = read_configs(configs)
    pgdl, jiang = ShuffledInformation.of(grid)(values[None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = [
            conditional_mutual_information(measure_for(values), configs, name).score
            for name in ("pgdl", "jiang")
        ]
    assert [pgdl[0], jiang[0]] == pytest.approx(exact, abs=1e-11)


def test_a_set_with_an_empty_cell_leaves_the_competitions_score_without_a_null() -> None:
    rng = np.random.default_rng(2)
    configs = zoo((3, 2, 2, 2), rng.normal(size=24))
    measure = measure_for(rng.normal(size=24))
    for k in ("0", "1", "2", "3"):  # a = 0, b = 0
        del configs[k], measure[k]
    null = cmi_null(measure, configs, shuffles=20)
    assert (null.note, math.isnan(null.mean)) == ("empty cells", True)
    paper = cmi_null(measure, configs, "jiang", shuffles=20)
    assert paper.note == ""
    assert 0 < paper.mean < paper.percentile_95 < 1


def test_without_effects_of_hyperparameters_a_shuffle_is_any_order() -> None:
    _, grid = simulated(np.random.default_rng(3), 0.0, shape=(3, 2, 2))
    effects = _effects(grid)
    assert effects.shape == (12, 5)
    assert effects.T @ effects == pytest.approx(np.eye(5), abs=1e-12)
    balanced = np.random.default_rng(0).normal(size=12)
    ranks = balanced.argsort().argsort().astype(float)
    unexplained = ranks - effects @ (effects.T @ ranks)  # nothing is left to explain
    orders, ties = draws(4000, 12)
    dealt = explained_shuffles(unexplained, effects, orders, ties)
    places = np.array([(dealt == value).mean(axis=0) for value in unexplained])
    # each value in each place 1/12 of the time; four standard errors of 4,000
    assert places == pytest.approx(np.full((12, 12), 1 / 12), abs=4 * math.sqrt(1 / 12 / 4000))


def test_a_shuffle_keeps_the_values_and_what_the_hyperparameters_explain() -> None:
    rng = np.random.default_rng(4)
    _, grid = simulated(rng, 0.0, shape=(3, 2, 2, 2))
    effect = 3.0 * grid.codes[:, 0] - 2.0 * grid.codes[:, 2]
    values = np.round(effect + 0.3 * rng.normal(size=24), 1)
    values[1] = values[0]
    dealt = explained_shuffles(values, _effects(grid), *draws(400, 24))
    assert np.sort(dealt, axis=1) == pytest.approx(np.sort(values)[None].repeat(400, axis=0))
    correlation = [np.corrcoef(row, effect)[0, 1] for row in dealt]
    assert min(correlation) > 0.85
    rest = values - effect
    assert abs(np.mean([np.corrcoef(row - effect, rest)[0, 1] for row in dealt])) < 0.35
    exactly = explained_shuffles(effect, _effects(grid), *draws(50, 24))
    assert (exactly == effect).all()  # nothing is left to shuffle


def test_noise_is_inside_its_null_and_a_good_measure_above_it() -> None:
    rng = np.random.default_rng(5)
    values, grid = simulated(rng, 0.8)
    for definition in ("pgdl", "jiang"):
        good = cmi_null(measure_for(values), grid, definition, shuffles=199)
        exact = conditional_mutual_information(measure_for(values), grid, definition).score
        assert good.value == pytest.approx(exact, abs=1e-12)
        assert good.p_value == 0.005
        assert good.adjusted == pytest.approx((good.value - good.mean) / (1 - good.mean))
        noise = cmi_null(measure_for(rng.normal(size=96)), grid, definition, shuffles=199)
        assert noise.p_value > 0.05
        # about 0.42 % and 0.20 % for noise on a grid of this shape, to 199 shuffles' accuracy
        expected = {"pgdl": 0.0042, "jiang": 0.0020}[definition]
        assert noise.mean == pytest.approx(expected, rel=0.25)
        constant = cmi_null(measure_for(np.ones(96)), grid, definition, shuffles=19)
        assert (constant.value, constant.mean, constant.p_value) == (0, 0, 1)


def test_measures_are_shuffled_apart_and_the_seed_decides() -> None:
    values, grid = simulated(np.random.default_rng(6), 0.5, shape=(3, 2, 2, 2))
    noise = np.random.default_rng(7).normal(size=24)
    together = cmi_nulls(np.stack([values, noise], axis=1), grid, 30, 3)
    alone = cmi_null(measure_for(noise), grid, shuffles=30, seed=3)
    assert together["pgdl"][1] == alone
    assert cmi_null(measure_for(noise), grid, shuffles=30, seed=4) != alone


def test_few_models_have_no_null() -> None:
    rng = np.random.default_rng(8)
    small = cmi_null(measure_for(rng.normal(size=6)), zoo((3, 2), rng.normal(size=6)), "jiang")
    assert small.note == "fewer than 12 models"
    rows = [(k % 10, k % 2) for k in range(14)]  # ten values: not yet a continuous hyperparameter
    crowded = zoo((10, 2), rng.normal(size=14), rows)
    null = cmi_null(measure_for(rng.normal(size=14)), crowded, "jiang", shuffles=10)
    assert null.note == "too few models for the values of the hyperparameters"
    with pytest.raises(ArgumentError, match="unknown definition"):
        cmi_null({"0": 1.0}, zoo((2, 2), range(4)), "max")
    with pytest.raises(ArgumentError, match="shuffles = 0"):
        cmi_null({"0": 1.0}, zoo((2, 2), range(4)), shuffles=0)


@pytest.mark.slow
@pytest.mark.parametrize("effects", [0.0, 1.0])
def test_useless_measures_are_seldom_significant(effects: float) -> None:
    shape, rejected = (3, 2, 2, 2), np.zeros(2)
    for seed in range(400):
        rng = np.random.default_rng(30_000 + seed)
        _, grid = simulated(rng, 0.0, shape=shape)
        x = grid.codes - grid.codes.mean(0)
        gap = x @ rng.normal(size=4) + rng.normal(size=24)
        grid = Grid(grid.ids, grid.names, grid.codes, grid.levels, grid.possible, gap)
        values = effects * (x @ rng.normal(size=4)) + rng.normal(size=24)
        found = cmi_nulls(values[:, None], grid, 99, seed)
        rejected += [found[name][0].p_value <= 0.05 for name in ("pgdl", "jiang")]
    # three standard errors of a share of 400 above 5 %
    assert (rejected / 400 <= 0.05 + 0.033).all(), rejected
