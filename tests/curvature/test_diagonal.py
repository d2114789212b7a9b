"""Diagonals from random products, and the errors of their entries."""

import numpy as np
import pytest
import torch
from curvature_cases import BUILDERS, dense_hessian, make
from matrices import SPECTRA, with_spectrum

from sharpkit.curvature import GaussNewtonOperator, HessianOperator, diagonal
from sharpkit.curvature.linear_map import as_linear_map, random_rows
from sharpkit.errors import ArgumentError, ModelError


def ratios(found, exact):
    """Errors of the entries in units of what is stated."""
    return ((found.values.double() - exact) / found.std_errors.double()).abs()


@pytest.mark.parametrize("name", BUILDERS)
def test_the_diagonal_of_a_network(name):
    model, data = make(name)
    operator = HessianOperator(model, data)
    exact = dense_hessian(name, "cross_entropy").diagonal()
    found = diagonal(operator, products=30)
    close = ratios(found, exact)[found.std_errors > 1e-14]
    assert (close < 2).double().mean() > 0.9
    assert (found.products, found.method) == (30, "xdiag")
    parts = operator.split(found.values)
    assert {n: p.shape for n, p in parts.items()} == dict(operator.parameters)
    assert list(found.frame()["parameter"]) == list(operator.parameters)
    assert found.frame()["size"].sum() == operator.shape[0]


def test_enough_products_are_exact():
    model, data = make("mlp")
    matrix = GaussNewtonOperator(model, data, parameters="0.bias")
    found = diagonal(matrix)
    assert torch.allclose(found.values, matrix.to_dense().diagonal(), atol=1e-14)
    assert not found.std_errors.any()
    assert (found.products, found.method) == (matrix.shape[0], "exact")
    low = with_spectrum(SPECTRA["rank_deficient"])  # so are probes that span the range
    few = diagonal(low, products=26)
    assert torch.allclose(few.values, low.diagonal(), atol=1e-12)
    assert few.std_errors.max() < 1e-12


def test_it_is_its_definition():
    a = with_spectrum(SPECTRA["uniform"])
    omega = random_rows(5, as_linear_map(a), 3, "sign").T
    each = []
    for i in range(5):
        q = torch.linalg.qr(a @ omega[:, [j for j in range(5) if j != i]]).Q
        left = a @ omega[:, i] - q @ (q.T @ (a @ omega[:, i]))
        each.append((q @ (q.T @ a)).diagonal() + omega[:, i] * left)
    found = diagonal(a, products=11, seed=3)
    assert torch.allclose(found.values, torch.stack(each).mean(0), atol=1e-13)
    assert torch.allclose(found.std_errors, torch.stack(each).std(0) * (2 / 5) ** 0.5, atol=1e-13)
    assert found.products == 10


FLAT, DECAYING = np.linspace(1, 3, 300), np.exp(-np.arange(300) / 8)
_rng = np.random.default_rng(5)
OUTLIERS = np.concatenate([[100.0, 50, 20], _rng.normal(0, 0.3, 297)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [FLAT, DECAYING, OUTLIERS], ids=["flat", "decay", "outliers"])
def test_errors_cover(values, dtype):
    a = with_spectrum(values).to(dtype)
    runs = [diagonal(a, products=40, seed=s) for s in range(200)]
    exact = a.double().diagonal()
    close = torch.stack([ratios(r, exact) for r in runs])
    assert (close <= 2).double().mean() >= 0.93
    errors = torch.stack([r.values.double() for r in runs]) - exact
    off = errors.mean(0) / (errors.std(0) / 200**0.5)
    assert 0.8 < off.pow(2).mean().sqrt() < 1.25  # unbiased
    stated = torch.stack([r.std_errors.double() for r in runs]).pow(2).mean().sqrt()
    assert 0.95 <= float(stated / errors.pow(2).mean().sqrt()) <= 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_power_of_two_changes_nothing_but_the_scale(dtype):
    a = with_spectrum(SPECTRA["outliers"] / 100).to(dtype)
    plain = diagonal(a, products=30)
    for power in (2.0**-60, 2.0**60):
        found = diagonal(a * power, products=30)
        assert torch.equal(found.values, plain.values * power)
        assert torch.equal(found.std_errors, plain.std_errors * power)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ArgumentError, match="at least 4"):
        diagonal(torch.eye(30), products=3)
    with pytest.raises(ModelError, match="too near the smallest number of float32"):
        diagonal(1e-37 * torch.eye(120))
    assert not diagonal(torch.zeros(120, 120)).values.any()
