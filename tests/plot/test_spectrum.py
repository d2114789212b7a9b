"""The figure of spectral densities."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from sharpkit.curvature import spectral_density
from sharpkit.errors import ArgumentError
from sharpkit.plot.spectrum import headline, spectrum

MATRIX = torch.diag(torch.tensor([-0.1, 0.0, 0.0, 0.1, 0.2, 1.0, 2.0, 3.0, 4.0, 8.0]))


def test_panels_share_axes_and_say_the_top_eigenvalues(tmp_path):
    densities = {
        "epoch 1": spectral_density(MATRIX, steps=10),
        "epoch 9": spectral_density(2 * MATRIX, steps=10),
    }
    figure = spectrum(densities, tmp_path / "new" / "s.png")
    left, right = figure.axes
    assert left.get_title() == "epoch 1\nλmax = 8, λmax/λ5 = 8"
    assert left.get_yscale() == "log"
    assert left.get_xlim() == right.get_xlim()
    assert (tmp_path / "new" / "s.png").stat().st_size > 5000
    table = pd.read_csv(tmp_path / "new" / "s.csv")
    assert list(table) == ["model", "eigenvalue", "density", "std_error"]
    free = spectrum(densities, share_axes=False)
    assert free.axes[0].get_xlim() != free.axes[1].get_xlim()


@pytest.mark.parametrize(("grid", "scale"), [("symlog", "symlog"), ("linear", "linear")])
def test_the_axis_is_that_of_the_grid(grid, scale):
    density = spectral_density(MATRIX, steps=10, grid=grid)
    assert spectrum({"x": density}).axes[0].get_xscale() == scale


def test_a_log_grid_and_one_probe():
    density = spectral_density(MATRIX.abs() + torch.eye(10), steps=10, probes=1, grid="log")
    assert spectrum(density).axes[0].get_xscale() == "log"


def test_many_panels_wrap():
    density = spectral_density(MATRIX, steps=3)
    figure = spectrum({str(i): density for i in range(6)})
    assert sum(axis.get_visible() for axis in figure.axes) == 6


def test_the_headline_leaves_out_what_is_not_defined():
    assert headline(spectral_density(-torch.eye(6), steps=6)) == "λmax = -1"


def test_nothing_or_mixed_grids_are_refused():
    with pytest.raises(ArgumentError, match="no densities"):
        spectrum({})
    a, b = (spectral_density(MATRIX, steps=3, grid=g) for g in ("linear", "symlog"))
    with pytest.raises(ArgumentError, match="different kinds of grid"):
        spectrum({"a": a, "b": b}, share_axes=True)
    assert spectrum({"a": a, "b": b}).axes[1].get_xscale() == "symlog"


def test_spectra_of_very_different_width_get_axes_of_their_own():
    wide, narrow = (spectral_density(c * MATRIX, steps=10) for c in (1.0, 0.01))
    left, right = spectrum({"a": wide, "b": narrow}).axes
    assert left.get_xlim() != right.get_xlim()


def test_every_panel_has_labels_and_ticks():
    density = spectral_density(MATRIX, steps=3)
    figure = spectrum({str(i): density for i in range(5)})
    figure.canvas.draw()
    for axis in figure.axes[:5]:
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("eigenvalue λ", "density")
        assert any(label.get_visible() for label in axis.get_xticklabels())
        assert any(label.get_visible() for label in axis.get_yticklabels())


def test_one_density_is_drawn_into_a_given_axis():
    own, axis = plt.subplots()
    density = spectral_density(MATRIX, steps=10)
    assert spectrum(density, ax=axis) is own
    assert axis.get_title() == "λmax = 8, λmax/λ5 = 8"
    with pytest.raises(ArgumentError, match="got 1 axes for 2 densities"):
        spectrum({"a": density, "b": density}, ax=axis)


def test_several_densities_are_drawn_into_as_many_axes():
    own, axes = plt.subplots(2, 1)
    densities = {name: spectral_density(c * MATRIX, steps=10) for name, c in (("a", 1), ("b", 2))}
    for given in (axes, list(axes)):
        assert spectrum(densities, ax=given) is own
    assert [axis.get_title().split("\n")[0] for axis in axes] == ["a", "b"]
    part = plt.figure().subfigures(1, 2)[1]
    assert spectrum(densities["a"], ax=part.add_subplot()) is part.figure


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"no picture ends in \.xyz"):
        spectrum(spectral_density(MATRIX, steps=3), tmp_path / "s.xyz")
