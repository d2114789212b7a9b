"""The picture of Figure 3."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from sharpkit.curvature import spectral_density
from sharpkit.errors import ArgumentError
from sharpkit.plot import figure3

POWER = pd.DataFrame({"task": "t", "m": [1, 4], "rho": 0.1, "cmi_pgdl": [0.2, 0.1], "models": 8})
ERRORS = pd.DataFrame(
    [
        ("sgd", np.nan, np.nan, 0.1, 3, 0.20, 0.01),
        ("sgd", np.nan, np.nan, 0.5, 3, 0.30, 0.01),
        ("sam", 1, 0.01, 0.1, 3, 0.18, 0.02),
        ("sam", 1, 0.1, 0.1, 3, 0.90, 0.00),
        ("sam", 16, 0.1, 0.1, 2, 0.19, 0.02),
        ("sam", 16, 0.01, 0.1, 2, 0.21, 0.02),
    ],
    columns=["optimizer", "m", "rho", "lr", "seeds", "test_error", "std_error"],
)


def density(scale):
    values = scale * torch.tensor([-0.1, 0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
    return spectral_density(torch.diag(values), steps=8, probes=1)


@pytest.fixture
def figure():
    densities = {
        (optimizer, epoch): density(scale)
        for optimizer, scale in (("sgd", 3.0), ("sam", 1.0))
        for epoch in (1, 9)
    }
    del densities["sam", 9]
    rows = [("sgd", 1, 24.0, 48.0), ("sgd", 1, 26.0, 52.0), ("sgd", 9, 24.0, 48.0)]
    rows.append(("sam", 1, 8.0, np.nan))
    columns = ["optimizer", "epoch", "lambda_max", "lambda_max_over_lambda_5"]
    spectra = pd.DataFrame(rows, columns=columns)
    return figure3(densities=densities, spectra=spectra, test_error=ERRORS, predictive_power=POWER)


def test_spectra_stand_side_by_side_on_the_same_axes(figure):
    axes = figure.subfigs[0].axes
    assert [axis.get_title() for axis in axes] == [
        "SGD, epoch 1\nλmax 25 ± 1, λmax/λ5 50 ± 2",
        "SAM, epoch 1\nλmax 8",
        "SGD, epoch 9\nλmax 24, λmax/λ5 48",
        "SAM, epoch 9\nno result",
    ]
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert axes[0].get_xlim()[1] > 24


def test_test_error_has_a_line_per_m_and_sgd_at_sams_learning_rate(figure):
    (axis,) = figure.subfigs[1].axes
    lines = {c.get_label(): c.lines[0] for c in axis.containers}
    assert list(lines) == ["SAM, m = 1", "SAM, m = 16"]
    np.testing.assert_allclose(lines["SAM, m = 16"].get_xydata(), [[0.01, 21], [0.1, 19]])
    sgd = [line for line in axis.lines if line.get_label() == "SGD"]
    assert len(sgd) == 1
    assert sgd[0].get_ydata() == pytest.approx([20, 20])
    assert axis.get_ylim()[1] == pytest.approx(22.5)  # 90 % has learned nothing
    assert "over 3 seeds" in axis.get_title()


def test_it_is_drawn_into_a_figure_or_a_part_of_one():
    own = plt.figure()
    assert figure3(predictive_power=POWER, figure=own) is own
    _, right = plt.figure().subfigures(1, 2)
    assert figure3(predictive_power=POWER, test_error=ERRORS, figure=right) is right.figure
    assert len(right.subfigs) == 2


def test_any_panels_can_be_left_out():
    assert len(figure3(predictive_power=POWER).subfigs) == 1
    sgd_only = ERRORS[ERRORS["optimizer"] == "sgd"]
    assert len(figure3(test_error=sgd_only, predictive_power=POWER).subfigs) == 2
    with pytest.raises(ArgumentError, match="no panel"):
        figure3()
