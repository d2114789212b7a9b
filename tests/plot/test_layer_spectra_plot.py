"""The figure of the spectra of blocks."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.errors import ArgumentError


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(12, 4), torch.arange(12) % 3
    return sk.layer_spectra(model, data, steps=10, progress=False)


def test_blocks_stand_in_rows_and_numbers_in_cells(found, tmp_path):
    figure = sk.plot.layer_spectra(found, tmp_path / "blocks.png")
    rows, coupling, distances = figure.axes
    assert [t.get_text() for t in rows.get_yticklabels()] == ["0", "2"]
    assert f"{found.cross_block_share.value:.3g}" in coupling.get_title()
    assert f"{found.mean_distance():.3g}" in distances.get_title()
    assert coupling.images[0].get_array().tolist() == found.coupling.tolist()
    assert len(distances.texts) == 4
    table = pd.read_csv(tmp_path / "blocks.csv", comment="#")
    assert list(table["size"]) == [25, 18]


def test_it_draws_on_axes_that_are_given(found):
    figure, axes = plt.subplots(1, 3)
    assert sk.plot.layer_spectra(found, ax=axes) is figure
    without = sk.curvature.LayerSpectra(found.spectra, None, ())
    with pytest.raises(ArgumentError, match="got 3 axes, expected 2"):
        sk.plot.layer_spectra(without, ax=axes)
    assert len(sk.plot.layer_spectra(without).axes) == 2
    plt.close(figure)
