"""What the spectra of blocks leave out, and how different they are."""

import math

import numpy as np
import pytest
import torch
from curvature_cases import dense_hessian, make
from matrices import with_spectrum
from torch import nn

from sharpkit.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    LayerSpectra,
    layer_spectra,
    spectral_density,
)
from sharpkit.curvature.coupling import block_lengths
from sharpkit.curvature.distances import BANDWIDTH, THRESHOLD, spectral_distances
from sharpkit.curvature.linear_map import as_linear_map
from sharpkit.errors import ArgumentError


def dense_coupling(dense, sizes):
    """Squared Frobenius norms of the blocks, as shares."""
    rows = [torch.cat(torch.split(dense, sizes)[i : i + 1]) for i in range(len(sizes))]
    squares = [[float((b**2).sum()) for b in torch.split(row, sizes, dim=1)] for row in rows]
    return np.array(squares) / np.sum(squares)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_the_share_between_layers_is_that_of_the_dense_hessian(name):
    model, data = make(name)
    found = layer_spectra(model, data, steps=3, probes=1, share_probes=40, progress=False)
    exact = dense_coupling(dense_hessian(name, "cross_entropy"), [d.size for d in found.values()])
    share = found.cross_block_share
    assert abs(share.value - (1 - np.trace(exact))) < 4 * share.std_error
    assert 0 < share.std_error < 0.05
    assert share.products == 40 * len(found)
    assert np.abs(found.coupling - exact).max() < 0.05
    assert found.coupling.sum() == pytest.approx(1)
    assert np.array_equal(found.coupling, found.coupling.T)
    frame = found.frame()
    assert list(frame["block"]) == list(found) and list(frame["size"]) == [
        d.size for d in found.values()
    ]
    assert frame["own_share"].sum() == pytest.approx(1 - share.value)
    assert frame["own_share"].sum() + frame["cross_share"].sum() == pytest.approx(1)


def test_groups_that_are_scattered_over_the_model():
    model, data = make("cnn")
    groups = {"biases": "*bias", "kernels": ["0.weight", "3.weight"]}
    found = layer_spectra(
        model, data, by=groups, steps=3, probes=1, share_probes=60,
        operator=GaussNewtonOperator, progress=False,
    )  # fmt: skip
    names = ["0.bias", "3.bias", "6.bias", "0.weight", "3.weight"]
    with GaussNewtonOperator(model, data, parameters=names) as whole:
        order = torch.cat(
            [whole.split(torch.arange(whole.shape[0]))[name].flatten() for name in names]
        )
        dense = whole.to_dense()[order][:, order]
    exact = dense_coupling(dense, [d.size for d in found.values()])
    share = found.cross_block_share
    assert abs(share.value - (1 - np.trace(exact))) < 4 * share.std_error
    assert np.abs(found.coupling - exact).max() < 0.06


def test_modules_are_blocks_as_well():
    model, data = make("cnn")
    modules = {"first": model[0], "rest": [model[3], "6.*"]}
    found = layer_spectra(model, data, by=modules, steps=3, probes=1, share_probes=2)
    sizes = [sum(p.numel() for p in model[i].parameters()) for i in (0, 3, 6)]
    assert [d.size for d in found.values()] == [sizes[0], sizes[1] + sizes[2]]


@pytest.mark.slow
@pytest.mark.parametrize("off", [0.0, 0.02, 1.0])
def test_the_error_of_the_share_covers(off):
    values = np.concatenate([[50.0, 20.0], np.linspace(-1, 2, 58)])
    a = with_spectrum(values)
    blocks = list(torch.split(torch.arange(60), [10, 20, 30]))
    inside = torch.block_diag(*(torch.ones(len(b), len(b)) for b in blocks)).double()
    a = a * (inside + off * (1 - inside))
    exact = 1 - float((a * inside).norm() ** 2 / a.norm() ** 2)
    found = [
        LayerSpectra({}, block_lengths(as_linear_map(a), blocks, 16, s, False), ())
        for s in range(200)
    ]
    shares = [f.cross_block_share for f in found]
    close = [abs(s.value - exact) <= 2.2 * s.std_error for s in shares]
    assert np.mean(close) >= 0.9
    assert abs(np.mean([s.value for s in shares]) - exact) < 0.01


def test_what_cannot_be_said_of_blocks_that_overlap_is_refused():
    model, data = make("shared_weights")
    found = layer_spectra(model, data, steps=3, probes=1, progress=False)
    assert found.shared
    with pytest.raises(ArgumentError, match=f"{found.shared[0]} is in several blocks"):
        _ = found.cross_block_share
    assert found.frame()["own_share"].isna().all()
    assert "cross-block" not in repr(found)


def test_the_share_can_be_left_out_and_one_probe_has_no_error():
    model, data = make("mlp")
    found = layer_spectra(model, data, steps=3, probes=1, share_probes=0, progress=False)
    with pytest.raises(ArgumentError, match="share_probes is 0"):
        _ = found.coupling
    one = layer_spectra(
        model, data, steps=3, probes=1, share_probes=1, operator=FisherOperator, progress=False
    )
    assert math.isnan(one.cross_block_share.std_error)
    with pytest.raises(ArgumentError, match="share_probes must be 0 or more"):
        layer_spectra(model, data, share_probes=-1)
    alone = layer_spectra(
        nn.Sequential(nn.Linear(2, 2)),
        (torch.zeros(3, 2), torch.tensor([0, 1, 0])),
        steps=3,
        operator=HessianOperator,
    )
    assert alone.cross_block_share.value == 0
    assert math.isnan(alone.mean_distance())


def exactly(values):
    """The density of all eigenvalues: start vectors that span the space."""
    a = torch.diag(torch.tensor(values, dtype=torch.float64))
    probes = torch.eye(len(values), dtype=torch.float64)
    return spectral_density(a, steps=len(values), probes=probes, progress=False)


def plain_distance(p, q):
    """By sums over Gaussians on the axis asinh(λ / threshold)."""
    from scipy.spatial.distance import jensenshannon

    u = np.linspace(-15, 15, 4001)

    def density(values):
        centres = np.arcsinh(np.asarray(values) / THRESHOLD)
        return np.exp(-(((u[:, None] - centres) / BANDWIDTH) ** 2) / 2).sum(1)

    return jensenshannon(density(p), density(q), 2)


def test_distances_are_those_of_the_eigenvalues():
    spectra = [np.linspace(-1, 1, 9), np.geomspace(1e-4, 1, 9), np.r_[np.zeros(8), 1.0]]
    found = spectral_distances([exactly(values) for values in spectra])
    for i, p in enumerate(spectra):
        for j, q in enumerate(spectra):
            assert found[i, j] == pytest.approx(plain_distance(p, q), abs=2e-3)
    blocks = LayerSpectra({n: exactly(v) for n, v in zip("abc", spectra, strict=True)}, None, ())
    assert np.array_equal(blocks.distances().to_numpy(), found)
    assert blocks.mean_distance() == pytest.approx(found[np.triu_indices(3, 1)].mean())


def test_normalised_spectra_do_not_know_their_scale():
    small, large = exactly(np.linspace(1e-3, 1, 9)), exactly(1e6 * np.linspace(1e-3, 1, 9))
    assert spectral_distances([small, large])[0, 1] < 1e-6
    assert spectral_distances([small, large], normalised=False)[0, 1] > 0.95


def test_two_estimates_of_one_spectrum_are_close():
    a = with_spectrum(np.geomspace(1e-5, 1, 400))
    pair = [spectral_density(a, steps=40, seed=s, progress=False) for s in (0, 1)]
    assert spectral_distances(pair)[0, 1] < 0.1
