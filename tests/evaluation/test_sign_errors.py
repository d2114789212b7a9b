"""The robust sign-error, by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from evaluation_zoos import gap_of, zoo

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import sign_error


def test_every_pair_that_differs_in_one_hyperparameter_is_an_environment() -> None:
    rng = np.random.default_rng(0)
    configs = zoo((3, 2, 2), rng.normal(size=12))
    values = rng.normal(size=12)
    expected: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for i, j in itertools.combinations(range(12), 2):
        one, two = (configs[str(k)]["hparams"] for k in (i, j))
        changed = [n for n in one if one[n]["current_value"] != two[n]["current_value"]]
        if len(changed) == 1:
            gap = gap_of(configs[str(i)]) - gap_of(configs[str(j)])
            expected[changed[0]].append(float((values[i] > values[j]) != (gap > 0)))
    result = sign_error(dict(enumerate(values)), configs)
    for name, errors in expected.items():
        assert sorted(result.errors[name]) == sorted(errors)
        assert result.per_hyperparameter[name].environments == len(errors)
        assert result.per_hyperparameter[name].mean == pytest.approx(np.mean(errors))
    everything = list(itertools.chain.from_iterable(expected.values()))
    assert result.overall.mean == pytest.approx(np.mean(everything))
    assert result.overall.percentile_90 == np.percentile(everything, 90)
    assert result.overall.maximum == max(everything)
    assert result.pairs == result.pairs_used == len(everything)
    assert result.frame()["hyperparameter"].tolist() == ["(all)", "a", "b", "c"]


def test_a_perfect_measure_has_no_error_a_reversed_one_only_errors_and_a_constant_half() -> None:
    configs = zoo((3, 2), range(6))
    for factor, error in ((1, 0.0), (-1, 1.0), (0, 0.5)):
        result = sign_error({k: factor * k for k in range(6)}, configs)
        assert (result.overall.mean, result.overall.maximum) == (error, error)


def test_gaps_within_the_noise_of_the_test_set_do_not_count() -> None:
    configs = zoo((2, 2), [0.0, 0.001, 0.2, 0.4])
    # wrong only where the gaps are nearly the same
    measure = {0: 1.0, 1: 0.0, 2: 2.0, 3: 3.0}
    assert sign_error(measure, configs).overall.maximum == 1
    result = sign_error(measure, configs, test_size=10_000)
    assert result.overall.maximum == 0
    assert (result.pairs_used, result.pairs) == (3, 4)
    with pytest.raises(ScoreError, match="too close for the test set"):
        sign_error(measure, configs, test_size=1)


def test_repeated_trainings_of_a_setting_are_averaged_with_the_weight_of_their_gaps() -> None:
    rows = [(0,), (0,), (1,)]
    configs = zoo((2,), [0.1, 0.15, 0.2], rows)
    measure = {0: 1.0, 1: 3.0, 2: 2.0}  # the pair (0, 2) is right, (1, 2) is wrong
    assert sign_error(measure, configs).overall.mean == 0.5
    q = [max(0, 1 - 2 * np.exp(-5000 * d**2 / 2)) ** 2 - 0.5 for d in (0.1, 0.05)]
    result = sign_error(measure, configs, test_size=5000)
    assert result.overall.environments == 1
    assert result.overall.mean == pytest.approx(q[1] / sum(q))
    with pytest.raises(ScoreError, match="min_effective_size"):
        sign_error(measure, configs, min_effective_size=2.5)


def test_environments_can_pool_the_settings_of_a_change_of_value() -> None:
    configs = zoo((3, 2), [0, 1, 2, 3, 4, 5])
    measure = {0: 0, 1: 1, 2: 3, 3: 0.5, 4: 4, 5: 5}
    result = sign_error(measure, configs, environments="values")
    assert sorted(result.errors["a"]) == [0, 0, 0.5]  # (1, 3) is wrong, one of two settings
    assert result.errors["b"].tolist() == pytest.approx([1 / 3])


def test_wrong_arguments_are_refused() -> None:
    configs = zoo((2,), [0, 1])
    with pytest.raises(ArgumentError, match="environments"):
        sign_error({0: 1, 1: 2}, configs, environments="all")
    with pytest.raises(ArgumentError, match="test_size"):
        sign_error({0: 1, 1: 2}, configs, test_size=0)
