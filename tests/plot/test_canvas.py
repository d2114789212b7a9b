"""Whose figures they are: pyplot's where the user works with it, nobody's else."""

from __future__ import annotations

import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from sharpkit.curvature import spectral_density
from sharpkit.landscapes import barrier as measure_barrier, landscape as measure_landscape
from sharpkit.plot import barrier, figure3, landscape, predictive_power, spectrum

POWER = pd.DataFrame({"task": "t", "m": [1, 4], "rho": 0.1, "cmi_pgdl": [0.2, 0.1]})
DENSITY = spectral_density(torch.diag(torch.arange(1.0, 11.0)), steps=10)
DATA = torch.eye(3), torch.arange(3)
LANDSCAPE = measure_landscape(torch.nn.Linear(3, 3), DATA, points=3, progress=False)
BARRIER = measure_barrier(
    torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), DATA, points=3, progress=False
)
PLOTS = {
    "barrier": lambda: barrier(BARRIER),
    "landscape": lambda: landscape(LANDSCAPE),
    "figure3": lambda: figure3(predictive_power=POWER),
    "predictive_power": lambda: predictive_power(POWER),
    "spectrum": lambda: spectrum({"a": DENSITY, "b": DENSITY}),
}
SAVED = {
    "barrier": lambda path: barrier(BARRIER, path),
    "landscape": lambda path: landscape(LANDSCAPE, path),
    "predictive_power": lambda path: predictive_power(POWER, path),
    "spectrum": lambda path: spectrum(DENSITY, path),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_a_new_figure_is_the_current_one_of_pyplot(plot):
    plt.close("all")  # of tests before
    figure = PLOTS[plot]()
    assert plt.gcf() is figure
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("plot", SAVED)
def test_pyplot_does_not_keep_figures_that_are_saved_in_a_loop(plot, tmp_path):
    for k in range(3):
        figure = SAVED[plot](tmp_path / f"{k}.png")
    assert plt.get_fignums() == []
    assert figure.axes  # and yet it can be used
    assert (tmp_path / "2.png").exists()


@pytest.mark.parametrize("plot", SAVED)
def test_a_figure_of_the_user_stays_open_when_it_is_saved(plot, tmp_path):
    own, axis = plt.subplots()
    given, draw = {
        "barrier": (BARRIER, barrier),
        "landscape": (LANDSCAPE, landscape),
        "predictive_power": (POWER, predictive_power),
        "spectrum": (DENSITY, spectrum),
    }[plot]
    assert draw(given, tmp_path / "own.png", ax=axis) is own
    assert plt.fignum_exists(own.number)


def test_without_pyplot_none_is_loaded_and_the_picture_is_written_all_the_same(tmp_path):
    code = """
import sys, pandas as pd
from sharpkit.plot import figure3, predictive_power
table = pd.DataFrame({"task": "t", "m": [1, 4], "rho": 0.1, "cmi_pgdl": [0.2, 0.1]})
figure3(predictive_power=table).savefig(sys.argv[1] + "/figure3.png")
predictive_power(table, sys.argv[1] + "/power.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert plt.imread(tmp_path / "figure3.png").std() > 0.01
    assert plt.imread(tmp_path / "power.png").std() > 0.01


def test_a_notebook_without_pyplot_has_the_figure_of_every_cell(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot")
    monkeypatch.setattr("sharpkit.plot.canvas.in_notebook", lambda: True)
    figure = predictive_power(POWER)
    assert plt.gcf() is figure
