"""Pictures of landscapes and barriers show the numbers they are of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.plot.landscape import contour_levels


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


@pytest.fixture(scope="module")
def plane():
    states = [network(k).state_dict() for k in range(4)]
    return sk.landscape(network(), DATA, trajectory=states, points=5, progress=False)


@pytest.fixture(scope="module")
def line():
    return sk.landscape(network(), DATA, to=network(1), points=7, progress=False)


def test_a_line_has_the_loss_its_band_and_the_accuracy(line):
    left, right = line.plot().axes
    assert right.get_ylabel() == "accuracy"
    curve = next(x for x in left.lines if x.get_label() == "loss ± standard error")
    np.testing.assert_array_equal(curve.get_ydata(), line.loss)
    edges = left.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.max() == pytest.approx((line.loss + line.std_error).max())
    assert [x.get_xdata()[0] for x in left.lines if x.get_linestyle() == ":"] == [0.0, 1.0]


def test_contours_run_over_all_values_and_the_trajectory_is_drawn(plane):
    (axis,) = plane.plot().axes
    (bar,) = axis.child_axes
    contours = axis.collections[0]
    assert contours.levels[[0, -1]] == pytest.approx([plane.loss.min(), plane.loss.max()])
    path = next(x for x in axis.lines if len(x.get_xdata()) == 4)
    np.testing.assert_array_equal(path.get_xydata(), plane.trajectory[["x", "y"]].to_numpy())
    assert bar.get_ylabel() == "loss"
    assert "% of variance" in axis.get_xlabel()
    assert axis.get_aspect() == 1.0  # both components have norm 1


def test_contours_of_an_asymmetric_loss_are_not_transposed(plane):
    """At the largest value of the grid the colour is that of the largest level."""
    loss = np.zeros((5, 5))
    loss[4, 0] = 1.0  # x at its end, y at its beginning
    axis = dataclasses.replace(plane, loss=loss, trajectory=None).plot().axes[0]
    top = axis.collections[0].get_paths()[-1].vertices
    x, y = plane.coordinates
    assert top[:, 0].mean() > x[3] and top[:, 1].mean() < y[1]


def test_a_surface_is_the_loss_at_each_point(plane):
    (axis,) = plane.plot(kind="surface").axes
    assert axis.get_zlabel() in ("loss", "log₁₀ loss")
    with pytest.raises(ArgumentError, match="needs an axis with"):
        plane.plot(kind="surface", ax=Figure().add_subplot())
    with pytest.raises(ArgumentError, match="needs an axis without"):
        plane.plot(ax=Figure().add_subplot(projection="3d"))


def test_kinds_are_those_of_the_dimensions(plane, line):
    with pytest.raises(ArgumentError, match="'line' for a landscape of 1 axes"):
        line.plot(kind="contour")
    with pytest.raises(ArgumentError, match="'contour' or 'surface'"):
        plane.plot(kind="line")


def test_levels_are_logarithmic_where_the_loss_spans_much():
    levels, norm = contour_levels(np.array([[0.1, 5.0], [np.nan, 0.3]]))
    assert norm is not None and np.ptp(np.diff(np.log(levels))) < 1e-12
    levels, norm = contour_levels(np.array([-1.0, 5.0]))
    assert norm is None and np.ptp(np.diff(levels)) < 1e-12
    levels, _ = contour_levels(np.full((2, 2), 3.0))
    assert levels[0] < 3 < levels[-1]


def test_the_picture_and_its_numbers_are_written(plane, tmp_path):
    plane.plot(tmp_path / "plane.pdf", kind="surface")
    table = pd.read_csv(tmp_path / "plane.csv")
    np.testing.assert_allclose(table["loss"], plane.loss.ravel())
    assert list(table.columns) == ["x", "y", "loss", "std_error", "accuracy"]
    assert (tmp_path / "plane.pdf").stat().st_size > 1000


def test_points_that_are_not_finite_are_left_white(plane):
    loss = plane.loss.copy()
    loss[2, 2], loss[0, 0] = np.inf, np.nan
    broken = dataclasses.replace(plane, loss=loss)
    for kind in ("contour", "surface"):
        assert "2 points are not finite" in broken.plot(kind=kind).axes[0].get_title()


def test_a_barrier_is_drawn_above_the_straight_line(tmp_path):
    class Root(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[w]]))

        def forward(self, x):
            return x @ self.w

    data = torch.ones(4, 1), torch.zeros(4, 1)
    found = sk.barrier(
        Root(-1.0), Root(1.0), data, points=5, progress=False,
        loss=lambda f, y: ((f**2 - 1) ** 2).mean(),
    )  # fmt: skip
    (axis,) = found.plot(tmp_path / "barrier.png").axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), found.loss)
    np.testing.assert_allclose(axis.lines[1].get_ydata(), found.loss - found.excess)
    assert axis.texts[0].xy == (0.5, 1.0)  # the arrow begins at the barrier
    assert (tmp_path / "barrier.csv").exists() and "barrier 1 (" in axis.get_title()
