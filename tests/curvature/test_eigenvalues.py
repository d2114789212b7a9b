"""Extreme eigenvalues against dense decompositions."""

import numpy as np
import pytest
import torch
from curvature_cases import PROBLEMS, dense_hessian, make
from matrices import SPECTRA, with_spectrum

from sharpkit.curvature import GaussNewtonOperator, HessianOperator, top_eigenvalues
from sharpkit.errors import ArgumentError, ModelError


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


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-25, 1e-30, 1e25, 1e30])
def test_float32_at_every_scale_of_the_loss(scale):
    # neither thresholds nor squares may depend on the scale: 1e-25 squared is 0 in float32
    model, (x, y) = make("mlp", dtype=torch.float32)
    exact = torch.linalg.eigvalsh(dense_hessian("mlp", "cross_entropy")).flip(0)[:3].numpy()

    def loss(outputs, labels):
        return scale * torch.nn.functional.cross_entropy(outputs, labels)

    found = top_eigenvalues(HessianOperator(model, (x, y), loss=loss), 3)
    assert np.allclose(found.values / scale, exact, rtol=1e-4)
    assert found.vectors.dtype == torch.float32
    assert found.converged
    assert 0 < found.residual_norms.max() <= 4e-5 * found.values[0]


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_a_power_of_two_changes_nothing_but_the_scale(name, which):
    # bit for bit: multiplying by a power of two does not round
    a = with_spectrum(SPECTRA[name] / (np.abs(SPECTRA[name]).max() or 1.0)).float()
    plain = top_eigenvalues(a, 1, which=which)
    for power in (2.0**-100, 2.0**-50, 2.0**100):
        found = top_eigenvalues(a * power, 1, which=which)
        assert np.array_equal(found.values, plain.values * power)
        assert np.array_equal(found.residual_norms, plain.residual_norms * power)
        assert torch.equal(found.vectors, plain.vectors)
        assert (found.products, found.converged) == (plain.products, plain.converged)


def test_a_matrix_too_small_for_its_dtype_is_refused():
    a = with_spectrum(SPECTRA["outliers"]).float() * 1e-38
    with pytest.raises(ModelError, match="too near the smallest number of float32"):
        top_eigenvalues(a, 2)
    assert top_eigenvalues(a.double(), 2).values == pytest.approx([100e-38, 20e-38], rel=1e-5)


def flat_end(size, zeros):
    """Most of the spectrum within 1e-6 of its lower end, after so many zeros."""
    return np.concatenate([np.zeros(zeros), np.geomspace(1e-6, 100, size - zeros)])


@pytest.mark.parametrize("zeros", [0, 3, 100, 190])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 5, 60, 199, 200])
def test_a_small_matrix_takes_no_more_products_than_its_tridiagonalisation(zeros, which, k):
    values = flat_end(200, zeros)
    found = top_eigenvalues(with_spectrum(values), k, which=which)
    assert found.converged
    assert found.products <= 200 + k
    exact = np.sort(values)[:k] if which == "SA" else np.sort(values)[::-1][:k]
    assert np.abs(found.values - exact).max() < 1e-6  # 1e-8 of the largest
    gram = found.vectors.T @ found.vectors
    assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), atol=1e-12)


def test_the_lower_end_of_a_rank_deficient_gauss_newton_matrix():
    model, data = make("mlp", dtype=torch.float64)
    ggn = GaussNewtonOperator(model, data)
    found = top_eigenvalues(ggn, 5, which="SA")
    top = float(torch.linalg.matrix_norm(ggn.to_dense(), 2))
    assert found.converged
    assert np.abs(found.values).max() < 1e-12 * top
    assert found.products <= ggn.shape[0] + 5


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
    assert found.converged


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


class Diagonal:
    """A diagonal matrix: without rounding, one start vector meets one copy of each eigenvalue."""

    def __init__(self, values, dtype=torch.float64):
        self.values = torch.tensor(np.asarray(values), dtype=dtype)
        self.shape, self.dtype = (len(values), len(values)), dtype
        self.device = torch.device("cpu")
        self.vectors = 0

    def matmat(self, vectors):
        self.vectors += vectors.shape[1]
        return self.values[:, None] * vectors


CLUSTERS = {
    "three copies above a dense bulk": ([10.0] * 3, 9.8),
    "five copies, and a close one": ([10.0] * 5 + [9.9], 9.8),
    "two of each": ([10.0, 10.0, 9.0, 9.0, 8.0, 8.0], 5.0),
    "copies far from the bulk": ([10.0] * 4 + [5.0, 3.0], 1.0),
    "nearly equal": ([10.0, 10.0 - 1e-6, 10.0 - 2e-6, 9.9], 9.7),
}


@pytest.mark.parametrize("size", [300, 2100])  # the whole space as a basis, and restarts
@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_repeated_and_close_eigenvalues_are_found_as_often_as_they_occur(name, which, size):
    top, edge = CLUSTERS[name]
    values = np.concatenate([top, np.linspace(-1, edge, size)]) * (-1 if which == "SA" else 1)
    for k in (2, 5) if size == 300 else (5,):
        a = Diagonal(values)
        found = top_eigenvalues(a, k, which=which)
        exact = values[np.argsort(-np.abs(values) if which == "LM" else -np.abs(values + 1))][:k]
        assert np.abs(found.values - exact).max() < 2e-7  # of 10: the tolerance
        assert found.converged and found.products == a.vectors
        assert (found.residual_norms <= 2e-7).all()
        gram = found.vectors.T @ found.vectors
        assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clusters_of_a_dense_matrix(dtype):
    values = np.concatenate([[7.0] * 3, [6.5] * 2, np.linspace(-3, 6, 400)])
    a = with_spectrum(values).to(dtype)
    exact = np.linalg.eigvalsh(a.double().numpy())[::-1]
    for subspace in (None, 24):
        found = top_eigenvalues(a, 6, subspace=subspace)
        assert np.abs(found.values - exact[:6]).max() < (1e-7 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(("k", "products"), [(1, 16), (3, 30), (5, 32), (7, 34)])
def test_eigenvalues_that_are_apart_take_a_dozen_products_to_check(k, products):
    bulk = np.random.default_rng(0).normal(0, 0.1, 3000)
    a = Diagonal(np.concatenate([[100.0, 50, 30, 20, 15, 10, 8], bulk]))
    assert top_eigenvalues(a, k).products <= products


def test_the_smallest_eigenvalue_takes_no_more_products_than_arpack():
    from scipy.sparse.linalg import LinearOperator, eigsh

    model, data = make("mlp")
    operator = HessianOperator(model, data)
    counted = []

    def multiply(vector):
        counted.append(1)
        return operator.matvec(torch.from_numpy(vector)).numpy()

    a = LinearOperator(operator.shape, matvec=multiply, dtype=np.float64)
    exact = eigsh(a, 1, which="SA", tol=1e-8)[0]
    found = top_eigenvalues(operator, 1, which="SA")
    assert found.values == pytest.approx(exact, rel=1e-6)
    assert found.products <= len(counted)


def test_copies_that_could_not_be_ruled_out_are_warned_of():
    a = Diagonal(np.concatenate([[10.0] * 3, np.linspace(0, 9.9, 2100)]))
    products = top_eigenvalues(a, 5).products - 5
    with pytest.warns(UserWarning, match="rule out"):
        found = top_eigenvalues(a, 5, max_products=products - 15)
    assert found.converged
