"""The table of measures: one row each, the same numbers as the functions, stated rules."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from evaluation_zoos import recorded, zoo

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import (
    STATISTICS,
    bootstrap_interval,
    cmi_null,
    conditional_mutual_information,
    expected_direction,
    granulated_kendall,
    holm,
    kendall_tau,
    pearson,
    permutation_p_value,
    r_squared,
    rate_by_hyperparameter,
    rate_measures,
    sign_error,
    spearman,
)

COLUMNS = [
    "models",
    "left_out",
    "direction",
    *(name + end for name in STATISTICS for end in ("", "_low", "_high")),
    *(
        f"cmi_{definition}_{end}"
        for definition in ("pgdl", "jiang")
        for end in ("set", "null_mean", "null_95", "p_value", "p_value_holm", "adjusted")
    ),
    "p_value",
    "p_value_holm",
    "resamples",
    "permutations",
    "interval_note",
]


@pytest.fixture
def configs() -> dict[str, object]:
    rng = np.random.default_rng(0)
    return zoo((3, 2, 2, 2), np.arange(24) % 7 + rng.normal(size=24))


@pytest.fixture
def values(configs: dict[str, object]) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    gaps = np.array([entry["metrics"]["train_acc"] for entry in configs.values()])
    return pd.DataFrame(
        {"good": gaps + rng.normal(size=24), "bad": rng.normal(size=24)},
        index=[f"model_{k}" for k in range(24)],
    )


def test_each_row_has_what_the_functions_give(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    table = rate_measures(values, configs, resamples=100, seed=3)
    assert list(table.index) == ["good", "bad"]
    assert set(table.columns) == set(COLUMNS)
    gaps = [entry["metrics"]["train_acc"] for entry in configs.values()]
    for name in values:
        row, column = table.loc[name], values[name]
        for definition in ("pgdl", "jiang"):
            result = conditional_mutual_information(column, configs, definition)
            assert row[f"cmi_{definition}"] == result.score
            assert row[f"cmi_{definition}_set"] == (",".join(result.argmin) or "(none)")
        assert row["kendall_tau"] == pytest.approx(kendall_tau(column.tolist(), gaps))
        assert row["granulated_kendall"] == pytest.approx(granulated_kendall(column, configs).mean)
        assert row["spearman"] == pytest.approx(spearman(column.tolist(), gaps))
        assert row["pearson"] == pytest.approx(pearson(column.tolist(), gaps))
        assert row["kendall_tau_b"] == pytest.approx(kendall_tau(column.tolist(), gaps, "b"))
        assert row["r_squared"] == pytest.approx(r_squared(column.tolist(), gaps))
        errors = sign_error(column, configs, environments="values").overall
        assert row["sign_error"] == pytest.approx(errors.mean)
        assert row["sign_error_90"] == pytest.approx(errors.percentile_90)
        assert row["sign_error_max"] == pytest.approx(errors.maximum)
        assert row["p_value"] == permutation_p_value(column, configs, permutations=1000, seed=3)
        for statistic in STATISTICS:
            interval = bootstrap_interval(
                column, configs, statistic=statistic, resamples=100, seed=3
            )
            ends = (row[f"{statistic}_low"], row[f"{statistic}_high"])
            assert ends == pytest.approx((interval.low, interval.high), nan_ok=True)
            reason = interval.note and rf"\b{statistic}\b[^;]*: {interval.note}"
            named = re.search(reason or rf"\b{statistic}\b", row["interval_note"])
            assert bool(named) == bool(interval.note)
        for definition in ("pgdl", "jiang"):
            null = cmi_null(column, configs, definition, shuffles=100, seed=3)
            named = {
                "null_mean": null.mean,
                "null_95": null.percentile_95,
                "p_value": null.p_value,
                "adjusted": null.adjusted,
            }
            assert {k: row[f"cmi_{definition}_{k}"] for k in named} == pytest.approx(named)
    assert table["p_value_holm"].tolist() == holm(table["p_value"]).tolist()
    assert table["resamples"].tolist() == [100, 100]
    assert table["permutations"].tolist() == [1000, 1000]


def test_environments_and_the_size_of_the_test_set_can_be_chosen(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    options = {"environments": "settings", "test_size": 3}
    table = rate_measures(values, configs, resamples=30, **options)
    for name in values:
        expected = sign_error(values[name], configs, **options).overall
        assert table.loc[name, "sign_error"] == pytest.approx(expected.mean)
        assert table.loc[name, "sign_error_max"] == expected.maximum
    with pytest.raises(ArgumentError, match="environments"):
        rate_measures(values, configs, environments="all")
    with pytest.raises(ArgumentError, match="test_size"):
        rate_by_hyperparameter(values, configs, test_size=0)


def test_each_hyperparameter_has_what_the_functions_give(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    values.loc["model_3", "bad"] = math.nan
    table = rate_by_hyperparameter(values, configs, resamples=60)
    assert table.index.tolist() == [(m, h) for m in values for h in "abcd"]
    for name in values:
        column = values[name].dropna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            taus = granulated_kendall(column, configs).per_hyperparameter
            errors = sign_error(column, configs, environments="values").per_hyperparameter
        for h in "abcd":
            row = table.loc[(name, h)]
            assert row["granulated_kendall"] == pytest.approx(taus[h])
            assert row["sign_error"] == pytest.approx(errors[h].mean)
            assert row["sign_error_90"] == pytest.approx(errors[h].percentile_90)
            assert row["sign_error_max"] == pytest.approx(errors[h].maximum)
            if abs(taus[h]) < 1:  # else no resample differs, and there is no interval
                assert row["granulated_kendall_low"] < row["granulated_kendall_high"]
    whole = rate_measures(values, configs, resamples=5)["granulated_kendall"]
    means = table["granulated_kendall"].groupby(level=0, sort=False).mean()
    assert means.tolist() == pytest.approx(whole.tolist())
    values.columns = pd.MultiIndex.from_tuples([("m", 1), ("m", 256)], names=["measure", "m"])
    several = rate_by_hyperparameter(values, configs, resamples=5)
    assert several.index.names == ["measure", "m", "hyperparameter"]


def test_models_without_a_value_are_left_out_of_that_row_only(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    values.loc["model_3", "bad"] = math.nan
    values.loc["model_9", "bad"] = math.nan
    table = rate_measures(values.drop("model_5"), configs, resamples=30)
    assert table["models"].to_dict() == {"good": 23, "bad": 21}
    kept = values["bad"].drop(["model_3", "model_5", "model_9"])
    gaps = [configs[name.removeprefix("model_")]["metrics"]["train_acc"] for name in kept.index]
    assert table.loc["bad", "kendall_tau"] == pytest.approx(kendall_tau(kept.tolist(), gaps))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_score_that_is_not_finite_has_no_interval_and_no_set() -> None:
    configs = zoo((2, 2), range(4))
    values = pd.DataFrame({"x": [1.0, 2.0, 4.0, math.nan]})
    row = rate_measures(values, configs, resamples=30).loc["x"]
    assert math.isnan(row["cmi_pgdl"])
    assert math.isnan(row["cmi_pgdl_low"])
    assert row["cmi_pgdl_set"] == ""
    assert row["kendall_tau"] == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_single_hyperparameter_gives_the_competitions_score_no_null_and_says_why() -> None:
    rng = np.random.default_rng(3)
    configs = zoo((14,), rng.normal(size=28), [(k % 14,) for k in range(28)])
    row = rate_measures(pd.DataFrame({"x": rng.normal(size=28)}), configs, resamples=20).loc["x"]
    assert math.isnan(row["cmi_pgdl_p_value"])
    assert math.isnan(row["cmi_pgdl_low"])
    assert "cmi_pgdl: fewer than two hyperparameters" in row["interval_note"]
    assert math.isfinite(row["cmi_jiang"])


def test_the_definitions_can_be_chosen(configs: dict[str, object], values: pd.DataFrame) -> None:
    table = rate_measures(values, configs, resamples=20, definitions=["jiang"])
    assert not [name for name in table.columns if "pgdl" in name]
    assert "cmi_jiang" in table.columns


def test_columns_of_several_levels_are_kept_as_the_index(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    values.columns = pd.MultiIndex.from_tuples([("m", 1), ("m", 256)], names=["measure", "m"])
    table = rate_measures(values, configs, resamples=20)
    assert table.index.names == ["measure", "m"]
    assert "kendall_tau" in table.reset_index()


def test_the_seed_determines_the_table(configs: dict[str, object], values: pd.DataFrame) -> None:
    one, two = (rate_measures(values, configs, resamples=20, seed=5) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)


def test_the_real_submissions_keep_their_official_scores_in_the_table() -> None:
    configs = recorded("pgdl_public/task1_v4/model_configs.json")
    entries = recorded("pgdl_public/task1_v4/submissions.json")
    values = pd.DataFrame({name: entry["prediction"] for name, entry in entries.items()})
    table = rate_measures(values, configs, resamples=50)
    for name, entry in entries.items():
        assert table.loc[name, "cmi_pgdl"] == pytest.approx(entry["pgdl_score"], abs=1e-11)
        assert table.loc[name, "cmi_jiang"] == pytest.approx(entry["jiang_score"], abs=1e-9)
        assert table.loc[name, "kendall_tau"] == pytest.approx(entry["kendall_tau_a"], abs=1e-9)
        expected = entry["granulated_kendall_mean"]
        assert table.loc[name, "granulated_kendall"] == pytest.approx(expected, abs=1e-9)


def test_unusable_tables_are_refused_with_a_reason(configs: dict[str, object]) -> None:
    few = pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, math.nan]})
    with pytest.raises(ScoreError, match=r"a \(2\), b \(1\); expected at least 3"):
        rate_measures(few, configs)
    with pytest.raises(ScoreError, match="no columns"):
        rate_measures(pd.DataFrame(index=[0, 1]), configs)
    with pytest.raises(ScoreError, match="lacks: 99"):
        rate_measures(pd.DataFrame({"a": [1.0]}, index=[99]), configs)
    good = pd.DataFrame({"a": np.arange(24.0)})
    with pytest.raises(ArgumentError, match="definitions"):
        rate_measures(good, configs, definitions="pgdl")
    with pytest.raises(ArgumentError, match="resamples"):
        rate_measures(good, configs, resamples=0)
    with pytest.raises(ArgumentError, match="permutations"):
        rate_measures(good, configs, permutations=0)
    with pytest.raises(ArgumentError, match="confidence"):
        rate_measures(good, configs, confidence=0.0)


def test_the_expected_direction_decides_p_values_and_sign_errors(
    configs: dict[str, object],
) -> None:
    gaps = np.array([entry["metrics"]["train_acc"] for entry in configs.values()])
    values = pd.DataFrame({"up": gaps, "down": -gaps, "either": -gaps, "wrong": -gaps})
    table = rate_measures(
        values, configs, resamples=50, permutations=999, directions={"down": -1, "either": None}
    )
    assert table["direction"].astype(object).where(table["direction"].notna(), None).to_dict() == {
        "up": 1,
        "down": -1,
        "either": None,
        "wrong": 1,
    }
    assert table["p_value"].tolist() == [0.001, 0.001, 0.002, 1.0]
    assert table["kendall_tau"].tolist() == pytest.approx([1, -1, -1, -1])
    errors = table["sign_error"].tolist()
    assert errors == pytest.approx([0, 0, math.nan, 1], nan_ok=True)
    by_change = rate_by_hyperparameter(
        values, configs, resamples=5, directions={"down": -1, "either": None}
    )
    assert by_change.loc["down", "sign_error"].tolist() == [0, 0, 0, 0]
    assert by_change.loc["either", "sign_error"].isna().all()
    with pytest.raises(ArgumentError, match="not there: sideways"):
        rate_measures(values, configs, directions={"sideways": 1})
    with pytest.raises(ArgumentError, match="expected 1, -1 or None"):
        rate_measures(values, configs, directions={"up": 0})


def test_a_measure_says_its_direction_by_an_attribute() -> None:
    class Margin:
        direction = -1

    class Odd:
        direction = "down"

    assert expected_direction(Margin()) == -1
    assert expected_direction(object()) == 1
    with pytest.raises(ArgumentError, match="direction = 'down'"):
        expected_direction(Odd())


def test_a_measure_without_values_has_a_row_of_nan(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    alone = rate_measures(values, configs, resamples=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = rate_measures(values.assign(none=math.nan), configs, resamples=20)
    row = table.loc["none"]
    assert (row["models"], row["interval_note"]) == (0, "all: fewer than 3 models")
    assert math.isnan(row["kendall_tau"])
    assert row["left_out"].endswith("and 16 more")
    pd.testing.assert_frame_equal(table.drop("none"), alone, check_dtype=False)
    by_change = rate_by_hyperparameter(values.assign(none=math.nan), configs, resamples=5)
    assert by_change.index.get_level_values(0).unique().tolist() == ["good", "bad"]


def test_infinite_values_are_ranked_without_a_warning(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    values.iloc[:2, 0] = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = rate_measures(values, configs, resamples=20).loc["good"]
    gaps = [entry["metrics"]["train_acc"] for entry in configs.values()]
    finite = values["good"].replace(math.inf, 1e9).tolist()
    assert row["kendall_tau"] == pytest.approx(kendall_tau(finite, gaps))
    assert math.isnan(row["pearson"])
    assert "pearson, r_squared: no value" in row["interval_note"]


def test_models_that_are_left_out_are_named(
    configs: dict[str, object], values: pd.DataFrame
) -> None:
    values.loc["model_3", "bad"] = math.nan
    table = rate_measures(values.drop("model_5"), configs, resamples=20)
    assert table["left_out"].to_dict() == {"good": "5", "bad": "3, 5"}


def test_many_measures_can_still_be_significant_together(configs: dict[str, object]) -> None:
    """The correction multiplies by the number of measures, so there must be enough shuffles."""
    gaps = np.array([entry["metrics"]["train_acc"] for entry in configs.values()])
    noise = np.random.default_rng(0).normal(size=(24, 39))
    values = pd.DataFrame(
        {"good": gaps} | {f"noise{k}": column for k, column in enumerate(noise.T)}
    )
    table = rate_measures(values, configs, resamples=200)
    assert table.loc["good", "p_value_holm"] == pytest.approx(40 / 2001)
    assert table["p_value_holm"].drop("good").min() > 0.05


def test_importing_evaluation_imports_no_heavy_statistics() -> None:
    code = (
        "import sys, sharpkit.evaluation\n"
        "print([m for m in ('pandas', 'scipy.stats', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
