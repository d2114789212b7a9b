"""The table of statistics: its entries are what the statistics are."""

from __future__ import annotations

import math

import numpy as np
from evaluation_zoos import simulated

from sharpkit.evaluation import STATISTICS
from sharpkit.evaluation.resampled_statistics import weighted_statistics
from sharpkit.evaluation.statistics import HEADLINES, TABLE


def test_every_statistic_is_described_once() -> None:
    assert tuple(TABLE) == STATISTICS
    assert set(HEADLINES) < set(TABLE)
    assert len({described.label for described in TABLE.values()}) == len(TABLE)
    results = [(described.computation, described.result) for described in TABLE.values()]
    assert len(set(results)) == len(TABLE)
    for name, described in TABLE.items():
        assert described.name == name


def test_the_gap_itself_has_the_best_value_and_its_opposite_the_worst_of_the_directed() -> None:
    _, grid = simulated(np.random.default_rng(0), 0.0, shape=(3, 2, 2, 2))
    once = np.ones((1, 24), dtype=np.int64)
    noise = np.random.default_rng(1).normal(size=24)
    columns = np.stack([grid.gap, -grid.gap, noise], axis=1)
    found = weighted_statistics(columns, grid, once)
    for name, described in TABLE.items():
        best, worst = described.low, described.high
        if not described.lower_is_better:
            best, worst = worst, best
        perfect, opposite, noisy = found[name][0]
        assert math.isclose(perfect, best, abs_tol=1e-9)
        assert math.isclose(opposite, worst, abs_tol=1e-9) == described.directed
        assert described.low <= noisy <= described.high


def test_shuffled_measures_have_on_average_what_the_table_says() -> None:
    _, grid = simulated(np.random.default_rng(2), 0.0, shape=(3, 2, 2, 2))
    rng = np.random.default_rng(3)
    columns = rng.normal(size=(24, 600))
    found = weighted_statistics(columns, grid, np.ones((1, 24), dtype=np.int64))
    for name, described in TABLE.items():
        if described.no_relation is not None:
            scores = found[name][0]
            error = scores.std() / math.sqrt(600)
            assert abs(scores.mean() - described.no_relation) < 4 * error
