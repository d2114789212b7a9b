"""Extreme eigenvalues against dense decompositions."""

import numpy as np
import pytest
import torch
from curvature_cases import PROBLEMS, dense_hessian, make
from matrices import SPECTRA, with_spectrum

from sharpkit.curvature import HessianOperator, top_eigenvalues
from sharpkit.errors import ArgumentError


@pytest.mark.parametrize(("name", "loss"), PROBLEMS)
def test_the_top_five_of_a_network(name, loss):
    exact = torch.linalg.eigvalsh(dense_hessian(name, loss)).flip(0)[:5].numpy()
    model, data = make(name, loss)
    found = top_eigenvalues(HessianOperator(model, data, loss=loss), 5)
    assert np.allclose(found.values, exact, rtol=1e-6)
    assert found.converged
    assert (found.residual_norms <= 2e-8 * exact[0]).all()
    h = dense_hessian(name, loss)
    residuals = (h @ found.vectors - found.vectors * torch.tensor(found.values)).norm(dim=0)
    assert np.allclose(residuals, found.residual_norms, atol=1e-12 * exact[0])
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 4])
def test_known_spectra_with_their_multiplicities(name, which, k):
    values = SPECTRA[name]
    k = min(k, len(values))
    key = {"LA": -values, "SA": values, "LM": -np.abs(values)}[which]
    expected = values[np.argsort(key)][:k]
    found = top_eigenvalues(with_spectrum(values), k, which=which)
    scale = np.abs(values).max()
    if which == "LM":
        assert np.allclose(np.abs(found.values), np.abs(expected), atol=1e-7 * scale)
    else:
        assert np.allclose(found.values, expected, atol=1e-7 * scale)
    assert found.converged


def test_float32_and_small_losses():
    # products of a loss scaled by 1e-6 must not run into an absolute threshold
    model, (x, y) = make("mlp", dtype=torch.float32)
    exact = torch.linalg.eigvalsh(dense_hessian("mlp", "cross_entropy")).flip(0)[:3].numpy()
    for scale in (1.0, 1e-6):
        loss = lambda f, labels, s=scale: s * torch.nn.functional.cross_entropy(f, labels)  # noqa: E731
        found = top_eigenvalues(HessianOperator(model, (x, y), loss=loss), 3)
        assert np.allclose(found.values / scale, exact, rtol=1e-4)
        assert found.vectors.dtype == torch.float32


def test_running_out_of_products_is_said():
    a = with_spectrum(SPECTRA["uniform"])
    with pytest.warns(UserWarning, match="residual is"):
        found = top_eigenvalues(a, 3, max_products=10)
    assert not found.converged
    assert found.products == 13
    with pytest.warns(UserWarning):
        assert len(top_eigenvalues(a, 3, max_products=2).values) == 2
    assert list(found.frame()) == ["rank", "eigenvalue", "residual_norm", "products"]


def test_restarts_need_little_memory():
    values = SPECTRA["uniform"]
    found = top_eigenvalues(with_spectrum(values), 2, subspace=8)
    assert np.allclose(found.values, np.sort(values)[::-1][:2], atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k = 0: expected 1 to 30"),
        ({"k": 31}, "k = 31: expected 1 to 30"),
        ({"which": "XX"}, 'which must be "LA"'),
        ({"tol": 0.0}, "tol must be positive"),
        ({"subspace": 3, "k": 3}, "subspace must be more than k"),
        ({"max_products": 0}, "max_products"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        top_eigenvalues(torch.eye(30), **arguments)
