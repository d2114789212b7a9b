"""The conditional mutual information, against records, a slow reference, and its own theory."""

from __future__ import annotations

import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation_zoos import recorded, scoring_cases, slow_jiang, slow_pgdl, zoo
from hypothesis import given, settings, strategies as st

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import conditional_mutual_information as cmi
from sharpkit.evaluation.competition_program import program_minimum

CASES = [
    "continuous_noise",
    "correlated",
    "perfect",
    "perfect_negated",
    "constant",
    "quantised",
    "single_valued_hparam",
    "tied_gaps",
    "string_bool_hparams",
    "incomplete_grid_2_missing",
    "one_hparam_only",
    "nan_measure",
]
SUBMISSIONS = ["VPM_1", "VR", "smoothness_gap", "training_accuracy", "vc_dim"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pgdl_has_the_recorded_outcome_of_the_scoring_program(name: str) -> None:
    case = scoring_cases()[name]
    score = cmi(case["prediction"], case["model_specs"]).score
    assert score == pytest.approx(float(case["score"]), abs=1e-11)


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_real_submissions_get_their_official_and_their_paper_score(name: str) -> None:
    configs = recorded("pgdl_public/task1_v4/model_configs.json")
    entry = recorded("pgdl_public/task1_v4/submissions.json")[name]
    official = cmi(entry["prediction"], configs)
    assert official.score == pytest.approx(entry["pgdl_score"], abs=1e-11)
    assert official.competition_score == 100 * official.score
    paper = cmi(entry["prediction"], configs, "jiang")
    assert paper.score == pytest.approx(entry["jiang_score"], abs=1e-9)
    assert paper.argmin == tuple(entry["jiang_argmin"].split(","))


GAPS = st.lists(st.integers(0, 6), min_size=12, max_size=12)
VALUES = st.lists(st.integers(-3, 3), min_size=12, max_size=12)


@settings(max_examples=60, deadline=None)
@given(GAPS, VALUES, st.sets(st.integers(0, 11), max_size=2))
def test_both_definitions_equal_the_slow_reference(
    gaps: list[int], values: list[int], without: set[int]
) -> None:
    configs = zoo((3, 2, 2), gaps)
    measure = {str(k): float(v) for k, v in enumerate(values) if k not in without}
    assert quiet(measure, configs) == close(slow_pgdl(measure, configs))
    kept = {k: c for k, c in configs.items() if k in measure}
    assert quiet(measure, kept, "jiang") == close(slow_jiang(measure, kept))


@settings(max_examples=40, deadline=None)
@given(GAPS, VALUES, st.permutations(range(12)))
def test_the_score_ignores_increasing_transformations_and_the_order_of_models(
    gaps: list[int], values: list[int], order: list[int]
) -> None:
    configs = zoo((3, 2, 2), gaps)
    measure = dict(enumerate(values))
    moved = {f"model_{k}": math.exp(values[k]) + 5 for k in order}
    shuffled = {str(k): configs[str(k)] for k in order}
    for definition in ("pgdl", "jiang"):
        expected = quiet(measure, configs, definition)
        assert quiet(moved, configs, definition) == close(expected)
        assert quiet(measure, shuffled, definition) == close(expected)


@settings(max_examples=40, deadline=None)
@given(GAPS, VALUES)
def test_the_score_ignores_the_names_of_hyperparameter_values(
    gaps: list[int], values: list[int]
) -> None:
    configs = zoo((3, 2, 2), gaps)
    names = ["zero", "one", "two"]
    renamed = zoo((3, 2, 2), gaps)
    for entry in renamed.values():
        for h in entry["hparams"].values():
            h["possible_values"] = [names[v] for v in h["possible_values"]][::-1]
            h["current_value"] = names[h["current_value"]]
    for definition in ("pgdl", "jiang"):
        expected = quiet(dict(enumerate(values)), configs, definition)
        assert quiet(dict(enumerate(values)), renamed, definition) == close(expected)


@settings(max_examples=60, deadline=None)
@given(GAPS, VALUES)
def test_the_score_lies_between_0_and_1(gaps: list[int], values: list[int]) -> None:
    configs = zoo((3, 2, 2), gaps)
    for definition in ("pgdl", "jiang"):
        score = quiet(dict(enumerate(values)), configs, definition)
        # the competition's 1e-12 inside the logarithm moves its score by as much
        assert math.isnan(score) or -1e-9 <= score <= 1 + 1e-9


@given(st.permutations(range(12)))
@settings(max_examples=30, deadline=None)
def test_a_perfect_measure_scores_1(gaps: list[int]) -> None:
    configs = zoo((3, 2, 2), gaps)
    measure = dict(enumerate(gaps))
    assert cmi(measure, configs, "jiang").score == pytest.approx(1.0, abs=1e-12)
    assert cmi(measure, configs).score == pytest.approx(1.0, abs=1e-9)
    # a reversed measure is as informative, but pgdl's self pairs look like agreements
    reversed_measure = {k: -v for k, v in measure.items()}
    assert cmi(reversed_measure, configs, "jiang").score == pytest.approx(1.0, abs=1e-12)
    assert cmi(reversed_measure, configs).score < 1


def test_a_constant_measure_scores_0() -> None:
    configs = zoo((3, 2, 2), range(12))
    for definition in ("pgdl", "jiang"):
        assert cmi(dict.fromkeys(range(12), 1.0), configs, definition).score == 0


def test_every_form_of_ids_and_configs_gives_the_same_score() -> None:
    rng = np.random.default_rng(0)
    configs = zoo((3, 2, 2), rng.normal(size=12))
    values = rng.normal(size=12)
    expected = cmi(dict(enumerate(values)), configs)
    forms: list[Any] = [
        {str(k): v for k, v in enumerate(values)},
        {f"model_{k}": v for k, v in enumerate(values)},
        {np.int64(k): np.float64(v) for k, v in enumerate(values)},
        pd.Series(values, index=np.arange(12.0)),
        pd.Series(values, index=[f"model_{k}" for k in range(12)]),
    ]
    prefixed = {f"model_{k}": entry for k, entry in configs.items()}
    for measure, zoo_form in itertools.product(
        forms, [configs, prefixed, SimpleNamespace(model_configs=configs)]
    ):
        assert cmi(measure, zoo_form).score == expected.score


def test_the_result_names_each_conditioning_set_and_the_worst() -> None:
    rng = np.random.default_rng(1)
    configs = zoo((3, 2, 2), rng.normal(size=12))
    measure = dict(enumerate(rng.normal(size=12)))
    official, paper = cmi(measure, configs), cmi(measure, configs, "jiang")
    assert set(official.conditioning_sets) == set(itertools.permutations("abc", 2))
    sets = [s for size in range(3) for s in itertools.combinations("abc", size)]
    assert list(paper.conditioning_sets) == sets
    for result in (official, paper):
        assert result.argmin is not None
        assert result.conditioning_sets[result.argmin] == result.score
        assert result.score == min(result.conditioning_sets.values())
        frame = result.frame()
        assert len(frame) == len(result.conditioning_sets)
        name = frame.loc[frame.is_minimum, "conditioning_set"].item()
        assert name == (",".join(result.argmin) or "(none)")


def test_a_single_valued_hyperparameter_makes_smaller_sets_in_pgdl() -> None:
    rng = np.random.default_rng(2)
    configs = zoo((3, 2, 1), rng.normal(size=6))
    measure = {str(k): v for k, v in enumerate(rng.normal(size=6))}
    result = cmi(measure, configs)
    assert result.score == close(slow_pgdl(measure, configs))
    assert ("a", "c") in result.conditioning_sets


def test_many_models_are_counted_exactly() -> None:
    rng = np.random.default_rng(3)
    rows = [tuple(row) for row in rng.integers(0, 2, size=(700, 3)).tolist()]
    gaps, values = rng.normal(size=700), rng.normal(size=700)
    configs = zoo((2, 2, 2), gaps, rows)
    # one cell of one set, counted at once: more models than are formed at a time
    from sharpkit.evaluation.grid import read_configs
    from sharpkit.evaluation.pair_counts import count_pairs

    grid = read_configs(configs)
    groups = grid.groups([0, 1])
    table = count_pairs(gaps, values, [groups])[0]
    assert table.sum() == 700**2
    inside = np.outer(groups == 1, groups == 2)
    larger = (gaps[:, None] > gaps) & (values[:, None] > values)
    assert table[1, 2, 0, 0] == (larger & inside).sum()
    assert table[1, 2].sum() == inside.sum()


# quirks of the program, and what is said about them


def test_a_model_without_prediction_is_skipped_with_a_warning_that_names_it() -> None:
    configs = zoo((3, 2, 2), np.random.default_rng(4).normal(size=12), None)
    measure = {str(k): float(k % 5) for k in range(12) if k != 7}
    with pytest.warns(UserWarning, match="no value for models 7"):
        score = cmi(measure, configs).score
    assert score == close(slow_pgdl(measure, configs))
    with pytest.warns(UserWarning, match="left out: 7"):
        cmi(measure, configs, "jiang")


def test_nan_counts_as_never_larger_with_a_warning() -> None:
    configs = zoo((3, 2, 2), np.random.default_rng(5).normal(size=12))
    measure = {str(k): float(k % 5) for k in range(12)} | {"3": math.nan}
    with pytest.warns(UserWarning, match="models 3 is NaN"):
        score = cmi(measure, configs).score
    assert score == close(slow_pgdl(measure, configs))


def test_infinite_values_are_ties_with_a_warning() -> None:
    configs = zoo((3, 2, 2), np.random.default_rng(5).normal(size=12))
    measure = {str(k): float(k % 5) for k in range(12)} | {"3": math.inf, "4": math.inf}
    with pytest.warns(UserWarning, match="models 3, 4 is infinite"):
        score = cmi(measure, configs).score
    assert score == close(slow_pgdl(measure, configs))


def test_an_empty_cell_makes_the_set_nan_with_a_warning() -> None:
    rows = [(a, b, 0) for a in range(2) for b in range(2)] * 2
    configs = zoo((2, 2, 2), range(8), rows)  # the value 1 of c never occurs
    with pytest.warns(UserWarning, match="empty cells"):
        result = cmi(dict(enumerate(range(8))), configs)
    assert math.isnan(result.score)
    assert math.isnan(result.conditioning_sets["a", "c"])
    assert not math.isnan(result.conditioning_sets["a", "b"])


def test_a_nan_replaces_the_minimum_and_is_replaced_by_the_next_score() -> None:
    nan = math.nan
    assert program_minimum({("a",): 0.1, ("b",): nan, ("c",): 0.5}) == (0.5, ("c",))
    score, argmin = program_minimum({("a",): 0.1, ("b",): 0.5, ("c",): nan})
    assert math.isnan(score)
    assert argmin == ("c",)
    assert program_minimum({("a",): 0.1, ("b",): 0.1}) == (0.1, ("a",))
    assert program_minimum({}) == (math.inf, None)


@pytest.mark.parametrize("definition", ["pgdl", "jiang"])
def test_values_that_are_the_same_number_are_one_level(definition: str) -> None:
    rng = np.random.default_rng(12)
    gaps, measure = rng.normal(size=12), dict(enumerate(rng.normal(size=12)))
    configs, mixed = zoo((3, 2, 2), gaps), zoo((3, 2, 2), gaps)
    spellings = itertools.cycle([float, str, lambda v: f"{v}.0", int])
    for entry, spelling in zip(mixed.values(), spellings, strict=False):
        for h in entry["hparams"].values():
            h["current_value"] = spelling(h["current_value"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cmi(measure, mixed, definition)
    assert found.score == cmi(measure, configs, definition).score
    for entry in mixed.values():  # words that are no numbers stay what they are
        entry["hparams"]["a"]["possible_values"] = ["1", True, "1_0"]
        entry["hparams"]["a"]["current_value"] = "1_0"
    from sharpkit.evaluation.grid import read_configs

    assert read_configs(mixed).possible[0] == ("1", "True", "1_0")


def test_values_whose_words_run_together_share_a_cell_as_in_the_program() -> None:
    configs = zoo((2, 2), range(8), list(itertools.product(range(2), range(2))) * 2)
    for entry in configs.values():  # "1" + "11" and "11" + "1" are one word
        h = entry["hparams"]["a"]
        h["possible_values"] = [1, 11]
        h["current_value"] = (1, 11)[h["current_value"]]
    with pytest.warns(UserWarning, match="empty cells"):
        assert math.isnan(cmi(dict(enumerate(range(8))), configs).score)


def test_pairs_with_a_value_that_is_not_possible_are_skipped_with_a_warning() -> None:
    rng = np.random.default_rng(6)
    configs = zoo((3, 2, 2), rng.normal(size=12))
    configs |= {"99": zoo((3, 2, 2), [0.3], [(0, 0, 0)])["0"]}
    configs["99"]["hparams"]["a"]["current_value"] = 17
    measure = {name: float(v) for name, v in zip(configs, rng.normal(size=13), strict=True)}
    with pytest.warns(UserWarning, match="skips up to 25 of 169 pairs"):
        score = cmi(measure, configs).score
    assert score == close(slow_pgdl(measure, configs))


def test_a_single_hyperparameter_scores_infinity_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="infinite"):
        result = cmi({0: 1, 1: 2, 2: 3}, zoo((3,), [1, 2, 3]))
    assert result.score == math.inf
    assert result.argmin is None


def test_equal_gaps_leave_jiang_without_a_score_and_say_so() -> None:
    with pytest.warns(UserWarning, match="nothing to predict"):
        result = cmi(dict(enumerate(range(4))), zoo((2, 2), [1, 1, 1, 1]), "jiang")
    assert math.isnan(result.score)
    assert result.argmin is None


# bad input

PAIR = zoo((2, 2), [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("measure", "configs", "message"),
    [
        ({0: 1.0}, {}, "no models"),
        ({0: 1.0, 77: 2.0}, PAIR, "models that the zoo lacks: 77"),
        ({0: 1.0, "model_0": 2.0}, PAIR, "names a model twice: 0"),
        ({0: 1.0, 1: "high"}, PAIR, "model 1: expected a number, got 'high'"),
        ({0: 1.0, 1: [1, 2]}, PAIR, "model 1: expected a number"),
        ({}, PAIR, "no value for any of the 4 models"),
        ([1.0, 2.0], PAIR, "expected a mapping or a Series"),
        ({0: 1.0}, [1, 2], "expected a Task"),
        ({0: 1.0}, {"0": {"metrics": {}}}, "model 0: expected a mapping 'hparams'"),
        ({0: 1.0}, {"0": {"hparams": {}, "metrics": {"train_acc": 1}}}, "train_acc and test_acc"),
        ({0: 1.0}, {**PAIR, "model_0": PAIR["0"]}, "model_configs names a model twice"),
        (
            {0: 1.0},
            {"0": {"hparams": {"a": 3}, "metrics": {"train_acc": 1, "test_acc": 0}}},
            "hyperparameter 'a': expected possible_values",
        ),
    ],
)
def test_unusable_input_is_refused_with_a_reason(measure: Any, configs: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        cmi(measure, configs)


def test_jiang_needs_two_comparable_models() -> None:
    with pytest.raises(ScoreError, match="1 of 4 models"):
        cmi({0: 1.0, 1: math.nan}, PAIR, "jiang")


def test_an_unknown_definition_is_refused() -> None:
    with pytest.raises(ArgumentError, match="unknown definition 'max'"):
        cmi({0: 1.0}, PAIR, "max")


def quiet(measure: Any, configs: Any, definition: str = "pgdl") -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cmi(measure, configs, definition).score


def close(expected: float) -> Any:
    return pytest.approx(expected, abs=1e-11, nan_ok=True)
