"""The figure of score against m: what it shows is what the table holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation import STATISTICS
from sharpkit.evaluation.labels import LABELS
from sharpkit.plot import predictive_power

MS = [1, 4, 16, 64, 256]


def table(**tasks):
    rows = []
    for task, score in tasks.items():
        for k, m in enumerate(MS):
            value = score * (1 - 0.1 * k)
            rows.append(
                {
                    "task": task,
                    "measure": "m_sharpness",
                    "m": m,
                    "rho": 0.1,
                    "models": 96,
                    "cmi_pgdl": value,
                    "cmi_pgdl_low": value * 0.8,
                    "cmi_pgdl_high": value * 1.2,
                }
            )
    return pd.DataFrame(rows)


def test_draws_the_scores_against_m_on_a_log2_axis():
    figure = predictive_power(table(one=0.05))
    (axis,) = figure.axes
    (line,) = axis.lines
    np.testing.assert_array_equal(line.get_xdata(), MS)
    np.testing.assert_allclose(line.get_ydata(), 0.05 * (1 - 0.1 * np.arange(5)))
    assert axis.get_xscale() == "log"
    assert [t.get_text() for t in axis.get_xticklabels()] == [str(m) for m in MS]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.05 * 0.6 * 0.8)
    assert band.max() == pytest.approx(0.05 * 1.2)


def test_uses_two_axes_where_scales_differ_as_in_the_paper():
    figure = predictive_power(table(task1=0.04, task2=0.16))
    left, right = figure.axes
    assert left.lines[0].get_ydata()[0] == 0.04
    assert right.lines[0].get_ydata()[0] == 0.16
    labels = [t.get_text() for t in left.get_legend().get_texts()]
    assert labels == ["task1, 96 models", "task2, 96 models"]


def test_uses_one_axis_where_scales_agree():
    assert len(predictive_power(table(task1=0.04, task2=0.06)).axes) == 1


def test_tells_several_rho_apart():
    both = pd.concat([table(one=0.05), table(one=0.06).assign(rho=0.5)])
    figure = predictive_power(both)
    labels = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert labels == ["one, rho = 0.1, 96 models", "one, rho = 0.5, 96 models"]


def test_draws_scores_of_zero_and_less_on_one_axis():
    assert len(predictive_power(table(zero=0.0, one=0.5)).axes) == 1


def test_writes_the_picture_and_its_numbers(tmp_path):
    predictive_power(table(one=0.05), tmp_path / "deep" / "figure.png")
    assert (tmp_path / "deep" / "figure.png").read_bytes().startswith(b"\x89PNG")
    written = pd.read_csv(tmp_path / "deep" / "figure.csv")
    assert written["m"].tolist() == MS


def test_refuses_a_table_without_m_or_statistic():
    with pytest.raises(ScoreError, match="no columns m and cmi_pgdl"):
        predictive_power(table(one=0.1).drop(columns="m"))
    with pytest.raises(ScoreError, match="no columns m and tau"):
        predictive_power(table(one=0.1), statistic="tau")
    with pytest.raises(ScoreError, match="nothing to plot"):
        predictive_power(table(one=0.1).assign(m=None))


def test_refuses_a_statistic_that_is_nan_throughout(tmp_path):
    nan = table(one=0.1).assign(cmi_pgdl=np.nan, cmi_pgdl_low=np.nan, cmi_pgdl_high=np.nan)
    with pytest.raises(ScoreError, match="NaN for every m"):
        predictive_power(nan, tmp_path / "figure.png")
    predictive_power(pd.concat([nan, table(two=0.1)]), tmp_path / "figure.png")


def test_does_not_overwrite_the_tables_of_a_run(tmp_path):
    for name in ("scores", "evaluation", "combined"):
        with pytest.raises(ArgumentError, match=f"overwrite.*{name}.csv"):
            predictive_power(table(one=0.1), tmp_path / f"{name}.png")


def test_every_statistic_has_a_name_for_figures_and_reports():
    assert tuple(LABELS) == STATISTICS
    assert predictive_power(table(one=0.1)).axes[0].get_ylabel() == LABELS["cmi_pgdl"]
    own = table(one=0.1).assign(own=0.5)
    assert predictive_power(own, statistic="own").axes[0].get_ylabel() == "own"
