"""The figure of predictive power against m: what it shows is what the table holds."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.statistics import TABLE
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
    np.testing.assert_allclose(line.get_ydata(), 5 * (1 - 0.1 * np.arange(5)))  # per cent
    assert axis.get_xscale() == "log"
    assert [t.get_text() for t in axis.get_xticklabels()] == [str(m) for m in MS]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(5 * 0.6 * 0.8)
    assert band.max() == pytest.approx(5 * 1.2)


def test_uses_two_axes_where_scales_differ_as_in_the_paper():
    figure = predictive_power(table(task1=0.04, task2=0.16))
    left, right = figure.axes
    assert left.lines[0].get_ydata()[0] == 4
    assert right.lines[0].get_ydata()[0] == 16
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
    for name, described in TABLE.items():
        shown = predictive_power(table(one=0.1).assign(**{name: 0.1}), statistic=name)
        unit = " (%)" if described.percent else ""
        assert shown.axes[0].get_ylabel() == described.label + unit
        plt.close(shown)
    own = table(one=0.1).assign(own=0.5)
    assert predictive_power(own, statistic="own").axes[0].get_ylabel() == "own"


def with_null(rows, mean=0.01, top=0.03):
    return rows.assign(cmi_pgdl_null_mean=mean, cmi_pgdl_null_95=top)


def noise_band(axis):
    (band,) = [c for c in axis.collections if "noise" in c.get_label()]
    heights = band.get_paths()[0].vertices[:, 1]
    return heights.min(), heights.max()


def test_a_grey_band_shows_what_noise_scores():
    axis = predictive_power(with_null(table(one=0.05))).axes[0]
    assert noise_band(axis) == pytest.approx((1, 3))
    assert any("noise" in t.get_text() for t in axis.get_legend().get_texts())


def test_the_band_of_several_lines_reaches_over_all_their_nulls():
    several = pd.concat(
        [with_null(table(one=0.05)), with_null(table(two=0.06), mean=0.005, top=0.04)]
    )
    assert noise_band(predictive_power(several).axes[0]) == pytest.approx((0.5, 4))


def test_each_of_two_axes_has_the_band_of_its_own_tasks():
    apart = pd.concat([with_null(table(one=0.04)), with_null(table(two=0.16), mean=0.1, top=0.12)])
    left, right = predictive_power(apart).axes
    assert noise_band(left) == pytest.approx((1, 3))
    assert noise_band(right) == pytest.approx((10, 12))


def test_a_statistic_whose_null_is_known_has_a_line_there():
    figure = predictive_power(table(one=0.1).assign(sign_error=0.3), statistic="sign_error")
    (line,) = [x for x in figure.axes[0].lines if x.get_label() == "no relation"]
    assert line.get_ydata() == [0.5, 0.5]


def test_the_title_names_rho_n_and_seed():
    shown = predictive_power(table(one=0.1).assign(n=600.0, seed=3))
    assert "ρ = 0.1, n = 600, seed 3" in shown.axes[0].get_title()
    every = predictive_power(table(one=0.1).assign(n=np.nan, seed=3))
    assert "ρ = 0.1, all examples, seed 3" in every.axes[0].get_title()


def test_no_legend_lies_over_the_data():
    figure = predictive_power(with_null(table(task1=0.04, task2=0.16)))
    figure.canvas.draw()
    axis = figure.axes[0]
    legend = axis.get_legend().get_window_extent()
    assert legend.y1 < axis.get_window_extent().y0  # below the axis
    assert legend.y0 >= 0  # and in the picture


def test_pyplot_saves_the_figure_that_was_drawn_last(tmp_path):
    figure = predictive_power(table(one=0.1))
    assert plt.gcf() is figure
    plt.gcf().savefig(tmp_path / "again.png")
    assert plt.imread(tmp_path / "again.png").std() > 0.01  # not blank


def test_draws_into_an_axis_that_is_given(tmp_path):
    own, axes = plt.subplots(1, 2)
    assert predictive_power(table(one=0.1), tmp_path / "both.png", ax=axes[1]) is own
    assert axes[1].get_xlabel() == "m"
    assert not axes[0].lines
    assert (tmp_path / "both.png").exists()


def test_an_unknown_ending_names_those_that_are_known(tmp_path):
    with pytest.raises(ArgumentError, match=r"no picture ends in \.xyz; .*\.pdf, .*\.png") as error:
        predictive_power(table(one=0.1), tmp_path / "p.xyz")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    predictive_power(table(one=0.1), tmp_path / "plain")
    assert (tmp_path / "plain.png").exists()


def test_the_numbers_come_with_the_meaning_of_their_columns(tmp_path):
    rows = with_null(table(one=1 / 3)).assign(own=1.0)
    predictive_power(rows, tmp_path / "figure.png")
    text = (tmp_path / "figure.csv").read_text()
    assert "0.333333," in text
    assert "0.3333333" not in text
    meanings = pd.read_csv(tmp_path / "figure_columns.csv").set_index("column")["meaning"]
    assert list(meanings.index) == list(pd.read_csv(tmp_path / "figure.csv").columns)
    assert meanings["m"] == "group size of m-sharpness"
    assert "95th percentile" in meanings["cmi_pgdl_null_95"]


def test_a_refused_statistic_comes_with_the_names_of_the_others():
    with pytest.raises(ScoreError, match="it has cmi_pgdl"):
        predictive_power(table(one=0.1), statistic="tau")
    nan = table(one=0.1).assign(cmi_pgdl=np.nan, kendall_tau=0.5)
    with pytest.raises(ScoreError, match=r"NaN for every m.*defined: kendall_tau"):
        predictive_power(nan)


def test_a_notebook_shows_a_figure_once(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append(data))
    figure = predictive_power(table(one=0.1))
    figure._ipython_display_()  # as the last value of a cell
    assert shown[0]["image/png"].startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)  # so the end of the cell does not show it again
