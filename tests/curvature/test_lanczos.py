"""Lanczos on matrices of known spectrum."""

import numpy as np
import pytest
import torch
from matrices import SPECTRA, with_spectrum
from scipy.stats import wasserstein_distance

from sharpkit.contract.ranks import Team
from sharpkit.curvature import lanczos
from sharpkit.curvature.lanczos import Stored
from sharpkit.errors import ArgumentError, ModelError


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_basis_is_orthonormal_and_tridiagonalises(name, dtype):
    a = with_spectrum(SPECTRA[name]).to(dtype)
    eps = torch.finfo(dtype).eps
    steps = min(60, len(a))
    run = lanczos(a, steps=steps, probes=3, seed=1, keep_basis=True)
    assert run.diagonal.shape == (3, steps)
    for i in range(3):
        q = run.basis[i].double()
        assert (q @ q.T - torch.eye(steps)).abs().max() < 100 * eps
        t = torch.tensor(
            np.diag(run.diagonal[i])
            + np.diag(run.off_diagonal[i], 1)
            + np.diag(run.off_diagonal[i], -1)
        )
        scale = max(float(a.abs().max()) * 10, 1e-300)
        assert (q @ a.double() @ q.T - t).abs().max() < 200 * eps * scale


@pytest.mark.parametrize("name", SPECTRA)
def test_all_steps_give_every_eigenvalue_as_often_as_it_occurs(name):
    values = SPECTRA[name]
    nodes, weights = lanczos(with_spectrum(values), steps=len(values), probes=2).quadrature()
    scale = np.abs(values).max()
    assert np.abs(nodes - np.sort(values)).max() <= 1e-12 * scale
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_there_are_no_ghost_eigenvalues(dtype):
    a = with_spectrum(SPECTRA["outliers"]).to(dtype)
    nodes, _ = lanczos(a, steps=100, probes=4).quadrature()
    assert ((nodes > 90).sum(axis=1) == 1).all()
    assert np.allclose(nodes[:, -5:], [[5, 8, 9, 20, 100]], rtol=2e-5)


def test_an_ended_krylov_space_goes_on_elsewhere():
    run = lanczos(torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0])), steps=4)
    assert run.breakdowns.tolist() == [2]
    assert (run.off_diagonal == 0).sum() == 2
    nodes, weights = run.quadrature()
    assert np.allclose(nodes, [[1, 1, 1, 2]], atol=1e-6)
    assert weights[0][(weights[0] > 1e-12)].size == 2


def test_gauss_quadrature_is_exact_for_its_degree():
    a = with_spectrum(SPECTRA["uniform"])
    start = torch.randn(120, 1, dtype=torch.float64)
    nodes, weights = lanczos(a, steps=5, probes=start).quadrature()
    v = start[:, 0] / start.norm()
    for degree in range(10):
        exact = float(v @ torch.linalg.matrix_power(a, degree) @ v)
        assert abs((weights * nodes**degree).sum() - exact) < 1e-12


def test_a_smaller_basis_dtype_is_enough_for_outliers():
    a = with_spectrum(SPECTRA["outliers"])
    run = lanczos(a, steps=40, basis_dtype=torch.float32, basis_device="cpu", keep_basis=True)
    assert run.basis.dtype == torch.float32
    assert np.allclose(run.quadrature()[0][0, -5:], [5, 8, 9, 20, 100], rtol=1e-5)


@pytest.mark.parametrize("operator", [torch.float64, torch.float32])
@pytest.mark.parametrize(("storage", "node", "distance"), [
    (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 2e-3, 4e-4),
])  # fmt: skip
@pytest.mark.parametrize("name", SPECTRA)
def test_a_coarse_basis_errs_by_what_is_stated(name, storage, node, distance, operator):
    """Also past the end of Krylov spaces, where vectors are rounding but for the basis."""
    values = SPECTRA[name]
    a = with_spectrum(values).to(operator)
    steps, norm = min(60, len(a)), np.abs(values).max() or 1.0
    nodes, weights = lanczos(a, steps=steps, probes=2, basis_dtype=storage).quadrature()
    exact, masses = lanczos(with_spectrum(values), steps=steps, probes=2).quadrature()
    lowest, highest = values.min() - node * norm, values.max() + node * norm
    assert nodes.min() >= lowest and nodes.max() <= highest
    for i in range(2):
        ends = exact[i][masses[i] > 1e-3][[0, -1]]  # what the start vector sees
        assert all(np.abs(nodes[i] - end).min() <= node * norm for end in ends)
        moved = wasserstein_distance(nodes[i], exact[i], weights[i], masses[i])
        assert moved <= distance * norm


def test_no_outlier_is_found_twice_with_a_coarse_basis():
    a = with_spectrum(SPECTRA["outliers"])
    for steps in (40, 100):
        nodes = lanczos(a, steps=steps, basis_dtype=torch.bfloat16).quadrature()[0][0]
        assert np.allclose(nodes[nodes > 2], [5, 8, 9, 20, 100], atol=0.1)


def test_processes_store_every_column_of_a_sharded_basis_once():
    stored = [Stored(Team(rank, 3), 10) for rank in range(3)]
    assert [i for part in stored for i in range(10)[part.columns]] == list(range(10))
    assert [part.count for part in stored] == [3, 3, 4]
    with pytest.raises(ArgumentError, match="a sharded basis is not returned"):
        lanczos(torch.eye(3), steps=2, shard_basis=True, keep_basis=True)


def test_probes_do_not_depend_on_each_other():
    a = with_spectrum(SPECTRA["uniform"])
    starts = torch.randn(120, 3, dtype=torch.float64)
    together = lanczos(a, steps=20, probes=starts)
    alone = lanczos(a, steps=20, probes=starts[:, 1:2])
    assert np.allclose(together.diagonal[1], alone.diagonal[0], atol=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
def test_a_power_of_two_changes_nothing_but_the_scale(name):
    # bit for bit, in float32, where squares of 2^-100 are 0 and squares of 2^100 are infinite
    a = with_spectrum(SPECTRA[name] / (np.abs(SPECTRA[name]).max() or 1.0)).float()
    steps = min(20, len(a))
    plain = lanczos(a, steps=steps, probes=2, keep_basis=True)
    for power in (2.0**-100, 2.0**-50, 2.0**100):
        run = lanczos(a * power, steps=steps, probes=2, keep_basis=True)
        assert np.array_equal(run.diagonal, plain.diagonal * power)
        assert np.array_equal(run.off_diagonal, plain.off_diagonal * power)
        assert torch.equal(run.basis, plain.basis)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_a_start_vector_does_not_matter(scale):
    a, start = with_spectrum(SPECTRA["uniform"]).float(), torch.randn(120, 1)
    nodes, _ = lanczos(a, steps=5, probes=start * scale).quadrature()
    assert np.allclose(nodes, lanczos(a, steps=5, probes=start).quadrature()[0], atol=1e-6)


def test_probes_of_very_different_curvature_share_a_run():
    a = torch.diag(torch.tensor([1e-20, 2e-20, 3e10, 4e10]))
    starts = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).T
    nodes, _ = lanczos(a, steps=2, probes=starts).quadrature()
    assert np.allclose(nodes, [[1e-20, 2e-20], [3e10, 4e10]], rtol=1e-6)


def test_a_matrix_too_small_for_its_dtype_is_refused():
    with pytest.raises(ModelError, match="too near the smallest number of float32"):
        lanczos(1e-37 * torch.eye(30), steps=2)
    assert (lanczos(torch.zeros(30, 30), steps=2).diagonal == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps = 0: expected 1 to 4"),
        ({"steps": 5}, "steps = 5: expected 1 to 4"),
        ({"steps": 2, "probes": 0}, "probes must be at least 1"),
        ({"steps": 2, "probes": torch.ones(3, 1)}, r"shape \(4, k\), got \(3, 1\)"),
        ({"steps": 2, "probes": torch.zeros(4, 1)}, "zero, NaN or infinite"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        lanczos(torch.eye(4), **arguments)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"square matrix, got shape \(2, 3\)"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (torch.full((2, 2), torch.nan), "NaN or infinite"),
        (torch.eye(2, dtype=torch.float16), "float32 or float64"),
        ([[1.0]], "got list"),
    ],
)
def test_what_is_not_a_symmetric_matrix_is_refused(matrix, message):
    with pytest.raises(ArgumentError, match=message):
        lanczos(matrix, steps=1)


def test_a_basis_that_does_not_fit_is_refused_with_its_size():
    class Large:
        shape, dtype, device = (10**6, 10**6), torch.float32, torch.device("cpu")

        def matmat(self, vectors):
            raise AssertionError("must not be reached")

    with pytest.raises(ArgumentError, match=r"10000 steps x 100 probes.*4,002.4 GB.*is free"):
        lanczos(Large(), steps=10_000, probes=torch.ones(1, 1).expand(10**6, 100))


def test_a_nan_product_is_an_error():
    class Broken:
        shape, dtype, device = (3, 3), torch.float64, torch.device("cpu")

        def matmat(self, vectors):
            return vectors * torch.nan

    with pytest.raises(ModelError, match="NaN or infinite"):
        lanczos(Broken(), steps=2)
