"""The parts of the page: what noise has, orders that reverse, notes and tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from sharpkit.evaluation import rate_measures
from sharpkit.evaluation.grid import read_configs
from sharpkit.evaluation.statistics import TABLE
from sharpkit.report.models import models_table, reversals
from sharpkit.report.noise import noise_bands
from sharpkit.report.notes import of_failures, of_few, of_order
from sharpkit.report.ranking import ranking_table


def configs(count: int) -> dict[str, Any]:
    """Models in cells of width x depth with random gaps."""
    rng = np.random.default_rng(0)
    return {
        str(k): {
            "hparams": {
                "width": {"possible_values": [8, 16], "current_value": 8 * (1 + k % 2)},
                "depth": {"possible_values": [1, 2], "current_value": 1 + k // 2 % 2},
            },
            "metrics": {"train_acc": 1.0, "test_acc": 0.9 - 0.1 * float(rng.random())},
        }
        for k in range(count)
    }


def evaluated(count: int, directions: dict[str, int | None]) -> tuple[Any, Any, pd.DataFrame]:
    zoo = configs(count)
    rng = np.random.default_rng(1)
    values = pd.DataFrame({name: rng.random(count) for name in directions}, index=list(zoo))
    table = rate_measures(values, zoo, resamples=50, directions=directions)
    return read_configs(zoo), values, table


def test_the_band_of_tau_is_that_of_a_plain_loop_over_shuffles() -> None:
    """5th and 95th percentile, to four standard errors of 400 shuffles (0.016 each)."""
    grid, values, table = evaluated(24, {"a": 1, "b": -1})
    bands = noise_bands(values.to_numpy(), grid, table, ["kendall_tau"], seed=0)
    rng = np.random.default_rng(2)
    taus = [kendalltau(rng.permutation(24), grid.gap)[0] for _ in range(4000)]
    low, high = np.quantile(taus, (0.05, 0.95))
    assert bands["kendall_tau_noise_low"].to_numpy() == pytest.approx(low, abs=0.065)
    assert bands["kendall_tau_noise_high"].to_numpy() == pytest.approx(high, abs=0.065)
    assert (bands["kendall_tau_noise_mean"] == 0).all()


def test_the_band_of_a_mutual_information_is_its_null() -> None:
    grid, values, table = evaluated(32, {"a": 1})
    bands = noise_bands(values.to_numpy(), grid, table, ["cmi_pgdl", "cmi_jiang"], seed=0)
    for name in ("cmi_pgdl", "cmi_jiang"):
        assert bands[f"{name}_noise_mean"].equals(table[f"{name}_null_mean"])
        assert bands[f"{name}_noise_high"].equals(table[f"{name}_null_95"])
        assert (bands[f"{name}_noise_low"] == 0).all()


def test_a_measure_without_a_direction_has_no_band_of_sign_errors() -> None:
    grid, values, table = evaluated(16, {"a": None, "b": -1})
    bands = noise_bands(values.to_numpy(), grid, table, ["sign_error", "spearman"], seed=0)
    assert bands.loc["a", "sign_error_noise_mean":"sign_error_noise_high"].isna().all()
    assert bands.loc["b", "sign_error_noise_mean"] == 0.5
    assert bands.loc["b", "sign_error_noise_low"] < 0.5 < bands.loc["b", "sign_error_noise_high"]
    # the deviation of shuffled rank correlations is 1 / sqrt(n - 1) exactly; the percentile of a
    # normal distribution is within 0.1 of theirs at 16 models, noise of 400 shuffles included
    assert bands["spearman_noise_high"].to_numpy() == pytest.approx(1.645 / 15**0.5, abs=0.1)


def test_values_that_are_missing_leave_the_other_bands() -> None:
    grid, values, table = evaluated(16, {"a": 1, "b": 1})
    some = values.to_numpy().copy()
    some[3:, 1] = np.nan
    some[:2, 0] = np.nan
    bands = noise_bands(some, grid, table, ["kendall_tau"], seed=0)
    assert np.isfinite(bands["kendall_tau_noise_low"]).all()
    some[2:, 1] = np.nan  # two models are too few
    bands = noise_bands(some, grid, table, ["kendall_tau"], seed=0)
    assert np.isnan(bands.loc["b", "kendall_tau_noise_low"])


def test_pairs_that_change_places_are_those_beyond_two_standard_errors() -> None:
    values = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 1.5]])
    found, pairs = reversals(values, np.full((3, 2), np.nan))
    assert pairs == 3
    assert found == [(0, 1, 0, 1), (0, 2, 0, 1)]
    # |1.5 - 1| is less than two standard errors, |3 - 1| and |2 - 1| are more
    found, _ = reversals(values, np.array([[0.1, 0.2]] * 3))
    assert found == [(0, 1, 0, 1)]
    one_setting, _ = reversals(values[:, :1], np.zeros((3, 1)))
    assert one_setting == []


def test_the_reversal_is_told_with_models_and_settings() -> None:
    settings = pd.DataFrame({"measure": ["s", "s", "loss"], "m": [1.0, 300.0, None]})
    values = pd.DataFrame(
        [[3.0, 1.0, 1.0], [2.0, 2.0, 2.0]],
        index=["vit", "cnn"],
        columns=["s, m = 1", "s, m = 300", "loss"],
    )
    (note,) = of_order(values, values * 0, settings, in_grid=False)
    assert "1 of 1 pairs" in note
    assert "vit is sharper than cnn by s, m = 1, and flatter by s, m = 300" in note
    same = values.assign(**{"s, m = 300": [3.0, 2.0]})
    (note,) = of_order(same, values * 0, settings, in_grid=False)
    assert "may reverse" in note
    assert "change places" not in note
    assert of_order(same, values * 0, settings, in_grid=True) == []
    assert of_order(values[["loss"]], values[["loss"]], settings[["measure"]][2:], False) == []


@pytest.mark.parametrize(
    ("models", "hyperparameters", "words"),
    [
        (0, 0, ["No models have a value and a gap"]),
        (2, 2, ["2 models have a value and a gap"]),
        (5, 2, ["Only 5 models, 10 pairs"]),
        (11, 1, ["Only 11 models, 55 pairs", "One hyperparameter varies"]),
        (12, 2, []),
    ],
)
def test_notes_say_what_there_is_too_little_of(
    models: int, hyperparameters: int, words: list[str]
) -> None:
    notes = of_few(models, hyperparameters)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_failures_of_some_measures_are_told_apart_from_lost_models() -> None:
    grid = read_configs(configs(3))
    failures = pd.DataFrame(
        {"model": ["0", "0", "1"], "measure": ["a", "b", "b"], "error": ["lost", "lost", "odd"]}
    )
    lost, partly = of_failures(failures, ["1", "2"], grid)
    assert lost.startswith("1 of 3 models could not be scored: 0 (lost)")
    assert partly.startswith("Some measures failed for 1 of 3 models")
    assert of_failures(failures[:0], ["0", "1", "2"], grid) == []


def test_the_table_of_models_shows_values_errors_and_failures() -> None:
    zoo = configs(3)
    values = pd.DataFrame({"a": [3.0, 1.0, 2.0], "b": [1.0, np.nan, 0.5]}, index=list(zoo))
    errors = pd.DataFrame({"a": [0.25, np.nan, 0.1], "b": [np.nan] * 3}, index=list(zoo))
    failures = pd.DataFrame(
        {"model": ["1", "0"], "measure": ["b", "c"], "error": ["singular", "no layers"]}
    )
    found = models_table(values, errors, ["a", "b"], failures, read_configs(zoo), zoo)
    assert list(found.columns) == [
        "generalization gap (%)",
        *("a", "b", "c"),
        *("training accuracy (%)", "test accuracy (%)"),
    ]
    assert [name for name, _ in found.rows] == ["1", "2", "0"]
    shown = {name: list(cells) for name, cells in found.rows}
    assert (shown["0"][1].text, shown["0"][1].small) == ("3", "± 0.25")
    assert (shown["1"][2].text, shown["1"][2].title) == ("failed", "singular")
    assert (shown["0"][3].text, shown["0"][3].title) == ("failed", "no layers")
    assert shown["2"][3].text == "–"
    gap = 100 * (1.0 - zoo["2"]["metrics"]["test_acc"])
    assert shown["2"][0].order == pytest.approx(gap / 100)
    assert shown["2"][0].text == f"{gap:.2f}"


def test_the_ranking_has_null_p_value_adjusted_score_and_direction() -> None:
    _, _, table = evaluated(32, {"a": 1, "b": -1, "c": None})
    found = ranking_table(table.assign(label=list("abc")))
    columns = [label for label, _ in found.columns]
    place = {label: columns.index(label) for label in columns}
    score = TABLE["cmi_pgdl"].title
    for k, (label, cells) in enumerate(found.rows):
        row = table.iloc[k]
        assert label == "abc"[k]
        assert cells[place["gap"]].text == ("rises", "falls", "either")[k]
        noise, adjusted = (cells[place[f"{head}: {score}"]] for head in ("noise", "adjusted"))
        assert noise.order == pytest.approx(100 * row["cmi_pgdl_null_mean"])
        assert noise.small.startswith("95 % below ")
        assert adjusted.order == pytest.approx(100 * row["cmi_pgdl_adjusted"])
        p = cells[place[f"p: {TABLE['cmi_pgdl'].label}"]]
        assert p.order == row["cmi_pgdl_p_value"]
        assert p.small.startswith("Holm ")
    lower = dict(found.columns)
    assert lower[TABLE["sign_error"].title]
    assert not lower[score]


def test_statistics_that_no_measure_has_are_no_columns() -> None:
    _, _, table = evaluated(6, {"a": 1})
    table = table.assign(label=["a"])
    table["cmi_pgdl"] = np.inf
    found = ranking_table(table)
    columns = [label for label, _ in found.columns]
    assert TABLE["cmi_pgdl"].title not in columns
    assert TABLE["kendall_tau"].title in columns
    assert not [label for label in columns if label.startswith("noise")]
    assert list(found.notes) == ["No interval (fewer than 12 models): all statistics."]


def test_what_is_in_per_cent_is_what_the_table_of_statistics_says() -> None:
    for statistic in TABLE.values():
        assert statistic.factor == (100 if statistic.percent else 1)
        assert statistic.title.endswith("(%)") == statistic.percent


def test_a_gap_of_losses_is_not_in_per_cent() -> None:
    zoo = configs(3)
    for k, entry in enumerate(zoo.values()):
        entry["metrics"] = {"train_loss": 0.5, "test_loss": 0.75 + k}
    values = pd.DataFrame({"a": [1.0, 2.0, 3.0]}, index=list(zoo))
    failures = pd.DataFrame({"model": [], "measure": [], "error": []})
    found = models_table(values, values * np.nan, ["a"], failures, read_configs(zoo), zoo)
    assert list(found.columns) == ["generalization gap (loss)", "a", "training loss", "test loss"]
    assert [cells[0].text for _, cells in found.rows] == ["0.25", "1.25", "2.25"]
