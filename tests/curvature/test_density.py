"""Spectral densities of known spectra, and of networks."""

import numpy as np
import pytest
import torch
from cores import slow_beyond
from curvature_cases import BUILDERS, dense_hessian, make
from matrices import SPECTRA, marchenko_pastur, wishart, with_spectrum
from scipy.stats import wasserstein_distance

from sharpkit.curvature import GaussNewtonOperator, HessianOperator, spectral_density
from sharpkit.errors import ArgumentError

GRIDS = ["linear", "symlog"]


def distance(density, truth):
    """Wasserstein-1 between the Gauss measure, averaged over probes, and the eigenvalues."""
    return wasserstein_distance(density.nodes.ravel(), truth, density.weights.ravel())


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", slow_beyond(1, [16, 4, 60, 1]))
def test_the_distance_is_within_the_bound_of_the_step_count(name, steps):
    # Measures that agree on polynomials of degree 2m - 1 on [a, b] are within (b - a) π / (4m) in
    # Wasserstein-1 (Favard). With every basis vector as a probe there is no sampling error.
    truth = SPECTRA[name]
    steps = min(steps, len(truth))
    density = spectral_density(
        with_spectrum(truth), steps=steps, probes=torch.eye(len(truth), dtype=torch.float64)
    )
    bound = np.ptp(truth) * np.pi / (4 * steps)
    assert distance(density, truth) <= bound + 1e-9 * np.abs(truth).max()


def test_a_wishart_matrix_follows_marchenko_and_pastur():
    # the matrix and the probes have the same seed, and yet are independent
    a, law = wishart(800, 1600, seed=0), marchenko_pastur(800, 1600)
    density = spectral_density(a, steps=40, probes=4, seed=0)
    sampling = 3 * np.std(law) / np.sqrt(4 * 800)
    assert distance(density, law) <= np.ptp(law) * np.pi / 160 + sampling
    smooth = density.on("linear", bandwidth=0.1)
    inside = (smooth.grid > 0.4) & (smooth.grid < 2.6)
    x, low, high = smooth.grid[inside], (1 - 0.5**0.5) ** 2, (1 + 0.5**0.5) ** 2
    exact = np.sqrt((high - x) * (x - low)) / (2 * np.pi * 0.5 * x)
    assert np.abs(smooth.density[inside] - exact).max() < 0.1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_integrates_to_one(name, grid, dtype):
    a = with_spectrum(SPECTRA[name]).to(dtype)
    density = spectral_density(a, steps=min(30, len(a)), probes=3, grid=grid)
    assert abs(np.trapezoid(density.density, density.grid) - 1) < 1e-6
    assert density.mass == pytest.approx(1, abs=1e-6)
    assert (density.density >= 0).all()
    assert np.isfinite(density.std_error).all()


def test_a_log_grid_shows_positive_spectra_only():
    a = with_spectrum(np.geomspace(1e-6, 10, 60))
    density = spectral_density(a, steps=60, probes=2, grid="log")
    assert abs(np.trapezoid(density.density, density.grid) - 1) < 1e-6
    assert density.spacing == "log"
    assert density.zero_share == 0
    with pytest.raises(ArgumentError, match='use "symlog"'):
        spectral_density(with_spectrum(SPECTRA["uniform"]), steps=10, grid="log")
    with pytest.raises(ArgumentError, match="a spectrum that is 0"):
        spectral_density(torch.zeros(9, 9), steps=3, grid="log")


def test_a_negative_eigenvalue_that_is_not_rounding_is_refused_on_a_log_grid():
    values = np.concatenate([[-1e-10], np.geomspace(1e-3, 1, 30)])
    with pytest.raises(ArgumentError, match='use "symlog"'):
        spectral_density(with_spectrum(values), steps=31, grid="log")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 10, 35])
def test_zeros_are_one_peak_at_the_left_end_of_a_log_grid(rank, dtype):
    # with every basis vector as a probe there is no sampling error
    values = np.concatenate([np.zeros(40 - rank), np.geomspace(0.1, 2, rank)])
    density = spectral_density(
        with_spectrum(values).to(dtype),
        steps=40,
        probes=torch.eye(40, dtype=dtype),
        grid="log",
        bandwidth=0.1,
    )
    assert density.resolution == pytest.approx(16 * torch.finfo(dtype).eps * values[-1], rel=1e-3)
    assert density.zero_share == pytest.approx(1 - rank / 40, abs=1e-5)
    assert density.mass == pytest.approx(1, abs=1e-6)
    left = density.grid < 1e-2
    at_zero = np.trapezoid(density.density[left], density.grid[left])
    assert at_zero == pytest.approx(density.zero_share, rel=1e-6)
    peak = density.grid[left][np.argmax((density.density * density.grid)[left])]
    assert peak == pytest.approx(density.resolution, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_gauss_newton_matrix_has_a_log_spectrum(name, dtype):
    model, data = make(name, dtype=dtype)
    ggn = GaussNewtonOperator(model, data)
    density = spectral_density(ggn, steps=60, probes=4, grid="log")
    assert density.mass == pytest.approx(1, abs=1e-6)
    # the squared share of a random vector in a subspace has variance below 1 / (2P)
    size = ggn.shape[0]
    rank = int((torch.linalg.eigvalsh(ggn.to_dense()) > density.resolution).sum())
    assert density.zero_share == pytest.approx(1 - rank / size, abs=4 * (0.5 / size / 4) ** 0.5)


@pytest.mark.parametrize("grid", ["linear", "symlog", "log"])
@pytest.mark.parametrize("name", ["outliers", "degenerate", "rank_deficient", "identity"])
def test_a_power_of_two_changes_nothing_but_the_scale(name, grid):
    values = np.abs(SPECTRA[name]) if grid == "log" else SPECTRA[name]
    a = with_spectrum(values / np.abs(values).max()).float()
    plain = spectral_density(a, steps=20, probes=2, grid=grid)
    for power in (2.0**-100, 2.0**-50, 2.0**100):
        density = spectral_density(a * power, steps=20, probes=2, grid=grid)
        for attribute in ("nodes", "resolution", "trace", "trace_std_error", "frobenius_norm"):
            scaled = np.asarray(getattr(plain, attribute)) * power
            assert np.array_equal(getattr(density, attribute), scaled), attribute
        assert density.frobenius_norm_std_error == pytest.approx(
            plain.frobenius_norm_std_error * power, rel=1e-12
        )
        assert np.allclose(density.grid / power, plain.grid, rtol=1e-9)
        seen = plain.density > 1e-6 * plain.density.max()
        assert np.allclose(density.density[seen] * power, plain.density[seen], rtol=1e-6)
        assert density.zero_share == plain.zero_share


def test_moments_of_float64_at_the_end_of_its_range():
    a = with_spectrum(SPECTRA["outliers"])
    plain, tiny = (spectral_density(m, steps=20) for m in (a, a * 2.0**-600))
    assert tiny.frobenius_norm == pytest.approx(plain.frobenius_norm * 2.0**-600, rel=1e-12)
    assert (tiny.std_error > 0).any()
    assert tiny.frobenius_norm_std_error == pytest.approx(
        plain.frobenius_norm_std_error * 2.0**-600, rel=1e-12
    )


def test_grids_of_your_own_and_regridding():
    density = spectral_density(with_spectrum(SPECTRA["uniform"]), steps=30, seed=3)
    half = density.on(np.linspace(0, 2, 401), bandwidth=1e-3)
    assert half.mass == pytest.approx(0.5, abs=0.1)
    assert np.array_equal(half.nodes, density.nodes)
    narrow = density.on("linear", bandwidth=1e-6, points=100)
    assert narrow.mass == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", BUILDERS)
def test_moments_of_a_network_are_within_three_standard_errors(name):
    h = dense_hessian(name, "cross_entropy")
    operator = HessianOperator(*make(name))
    density = spectral_density(operator, steps=30, probes=12, seed=5)
    size = len(h)
    mean, error = density.moment(1)
    assert abs(mean - float(h.trace()) / size) < 3 * error
    second, error = density.moment(2)
    assert abs(second - float(h.square().sum()) / size) < 3 * error
    assert abs(density.trace - float(h.trace())) < 3 * density.trace_std_error
    assert abs(density.frobenius_norm - float(h.norm())) < 3 * density.frobenius_norm_std_error


@pytest.mark.parametrize(("name", "selection"), [("mlp", "4.*"), ("cnn", ["0.bias", "6.*"])])
def test_moments_are_exact_with_all_steps_and_all_basis_probes(name, selection):
    operator = HessianOperator(*make(name), parameters=selection)
    h = operator.to_dense()
    density = spectral_density(
        operator, steps=len(h), probes=torch.eye(len(h), dtype=torch.float64)
    )
    assert density.trace == pytest.approx(float(h.trace()), rel=1e-10)
    assert density.frobenius_norm == pytest.approx(float(h.norm()), rel=1e-10)
    eigenvalues = torch.linalg.eigvalsh(h)
    assert distance(density, eigenvalues.numpy()) < 1e-10 * float(eigenvalues[-1])
    assert np.allclose(density.largest(5), eigenvalues.flip(0)[:5], rtol=1e-10)


def test_it_is_reproducible_and_unbiased_over_seeds():
    a = with_spectrum(SPECTRA["outliers"])
    first, again = (spectral_density(a, steps=10, probes=2, seed=4) for _ in range(2))
    assert np.array_equal(first.density, again.density)
    traces = [spectral_density(a, steps=5, probes=1, seed=s).trace for s in range(200)]
    assert abs(np.mean(traces) - float(a.trace())) < 4 * np.std(traces) / np.sqrt(200)


def test_probes_in_several_groups_give_the_same(monkeypatch):
    a = with_spectrum(SPECTRA["uniform"])
    together = spectral_density(a, steps=20, probes=5)
    monkeypatch.setattr("sharpkit.curvature.quadrature.available_memory", lambda device: 60_000)
    apart = spectral_density(a, steps=20, probes=5)
    assert np.allclose(together.nodes, apart.nodes, atol=1e-12)


def test_frames_have_the_columns_promised():
    density = spectral_density(torch.eye(3), steps=2, probes=1)
    assert list(density.frame()) == ["eigenvalue", "density", "std_error"]
    assert list(density.nodes_frame()) == ["probe", "node", "weight"]
    assert density.frame()["std_error"].isna().all()


def test_more_steps_than_dimensions_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="steps = 9 is more than the 3 dimensions"):
        assert spectral_density(torch.eye(3), steps=9).nodes.shape == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"bandwidth": 0.0}, "bandwidth must be positive"),
        ({"bandwidth": float("nan")}, "bandwidth must be positive"),
        ({"grid": "cubic"}, "grid must be"),
        ({"grid": np.array([1.0, 0.0])}, "increasing"),
        ({"grid": "symlog", "threshold": -1.0}, "threshold must be positive"),
        ({"points": 1}, "points must be at least 2"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_product(arguments, message):
    class Untouched:
        shape, dtype, device = (90, 90), torch.float32, torch.device("cpu")

        def matmat(self, vectors):
            raise AssertionError("must not be reached")

    with pytest.raises(ArgumentError, match=message):
        spectral_density(Untouched(), **arguments)
