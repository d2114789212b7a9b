"""Trace and norm estimates, and their error bars."""

import math

import numpy as np
import pytest
import torch
from curvature_cases import BUILDERS, dense_hessian, make
from matrices import SPECTRA, with_spectrum

from sharpkit.curvature import HessianOperator, diagonal, frobenius_norm, trace
from sharpkit.curvature.linear_map import as_linear_map, random_rows
from sharpkit.errors import ArgumentError, ModelError

_rng = np.random.default_rng(5)
MANY = {
    "flat": np.linspace(1, 3, 300),
    "fast decay": np.exp(-np.arange(300) / 8),
    "slow decay": 1 / np.arange(1.0, 301) ** 2,
    "outliers": np.concatenate([[100.0, 50, 20], _rng.normal(0, 0.3, 297)]),
    "both signs": _rng.normal(size=300),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("method", ["hutch++", "xtrace", "hutchinson"])
def test_the_trace_of_a_network(name, method):
    operator = HessianOperator(*make(name))
    found = trace(operator, method=method, products=60)
    exact = float(dense_hessian(name, "cross_entropy").trace())
    assert abs(found.value - exact) < 4 * found.std_error
    assert (found.method, found.products) == (method, 60)
    norm = frobenius_norm(operator, products=40)
    assert abs(norm.value - float(dense_hessian(name, "cross_entropy").norm())) < 4 * norm.std_error


@pytest.mark.parametrize("name", SPECTRA)
def test_error_bars_cover_the_truth(name):
    a, exact = with_spectrum(SPECTRA[name]), SPECTRA[name].sum()
    scale = np.abs(SPECTRA[name]).sum()
    for method in ("hutch++", "xtrace", "hutchinson"):
        runs = [trace(a, method=method, products=30, seed=s) for s in range(20)]
        inside = [abs(r.value - exact) <= 3 * r.std_error + 1e-9 * scale for r in runs]
        assert np.mean(inside) >= 0.9
        mean = np.mean([r.value for r in runs])
        errors = np.std([r.value for r in runs]) / math.sqrt(20)
        assert abs(mean - exact) <= 4 * errors + 1e-9 * scale


def test_hutch_plus_plus_is_sharper_where_there_are_outliers():
    a = with_spectrum(SPECTRA["outliers"])
    plain, deflated = (trace(a, method=m, products=60) for m in ("hutchinson", "hutch++"))
    assert deflated.std_error < plain.std_error / 20


def by_hand(a, omega):
    """XTrace with each basis found anew, from the definition, in NumPy."""
    size, found = len(a), []
    for i in range(omega.shape[1]):
        q = np.linalg.qr(a @ np.delete(omega, i, axis=1))[0]
        left = omega[:, i] - q @ (q.T @ omega[:, i])
        left *= math.sqrt(size - q.shape[1]) / np.linalg.norm(left)
        found.append(float((q.T @ a @ q).trace() + left @ a @ left))
    return np.mean(found)


@pytest.mark.parametrize("name", ["outliers", "clustered", "uniform"])
def test_xtrace_is_its_definition_and_its_error_the_jackknife(name):
    a = with_spectrum(SPECTRA[name])
    probe = random_rows(6, as_linear_map(a), 3)
    omega = (probe * 120**0.5 / probe.norm(dim=1, keepdim=True)).T.numpy()
    found = trace(a, method="xtrace", products=13, seed=3)
    scale = np.abs(SPECTRA[name]).sum()
    assert found.value == pytest.approx(by_hand(a.numpy(), omega), abs=1e-10 * scale)
    without = [by_hand(a.numpy(), np.delete(omega, i, axis=1)) for i in range(6)]
    assert found.std_error == pytest.approx(math.sqrt(5 * np.var(without)), rel=1e-6)
    assert (found.products, found.method) == (12, "xtrace")


def test_xtrace_is_sharper_where_eigenvalues_decay_and_exact_for_a_small_rank():
    a = with_spectrum(1 / np.arange(1.0, 301) ** 2)
    errors = {
        method: np.mean([abs(trace(a, method=method, products=60, seed=s).value - a.trace())
                         for s in range(20)])
        for method in ("xtrace", "hutch++")
    }  # fmt: skip
    assert errors["xtrace"] < 0.8 * errors["hutch++"]
    low = with_spectrum(SPECTRA["rank_deficient"])
    assert trace(low, method="xtrace", products=40).value == pytest.approx(float(low.trace()))
    assert trace(torch.zeros(120, 120), method="xtrace").std_error == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MANY)
def test_the_error_of_xtrace_covers(name, dtype):
    a = with_spectrum(MANY[name]).to(dtype)
    runs = [trace(a, method="xtrace", products=40, seed=s) for s in range(150)]
    errors = np.array([r.value - MANY[name].sum() for r in runs])
    stated = np.array([r.std_error for r in runs])
    assert abs(errors.mean()) <= 4 * errors.std() / math.sqrt(150)  # unbiased
    assert np.mean(np.abs(errors) <= 2 * stated) >= 0.92
    # the jackknife errs on the safe side, and by how much is known
    assert 0.95 <= math.sqrt(np.mean(stated**2) / np.mean(errors**2)) <= 4


def test_the_bar_counts_the_products(monkeypatch):
    seen = []
    monkeypatch.setattr("sharpkit.curvature.multiply.Multiply.__init__", counted(seen))
    trace(torch.eye(200), products=40)
    trace(torch.eye(200), products=40, method="xtrace")
    trace(torch.eye(30), products=40)
    frobenius_norm(torch.eye(200), products=17)
    diagonal(torch.eye(200), products=41)
    assert [(bar.n, bar.total) for bar in seen] == [(40, 40)] * 2 + [(30, 30), (17, 17), (40, 40)]


def counted(seen):
    """The constructor of `Multiply`, with bars that count although nothing is shown."""

    class Bar:
        def __init__(self, total):
            self.n, self.total = 0, total

        def update(self, count):
            self.n += count

    def init(self, operator, bar):
        self.operator, self.bar, self.longest = operator, Bar(bar.total), 0.0
        seen.append(self.bar)

    return init


def test_enough_products_are_exact_and_one_has_no_error_bar():
    a = with_spectrum(SPECTRA["uniform"])
    exact = trace(a, products=120)
    assert exact.value == pytest.approx(float(a.trace()), abs=1e-12)
    assert (exact.std_error, exact.method) == (0.0, "exact")
    assert frobenius_norm(a, products=500).value == pytest.approx(float(a.norm()), rel=1e-12)
    assert math.isnan(trace(a, method="hutchinson", products=1).std_error)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_power_of_two_changes_nothing_but_the_scale(name, dtype):
    a = with_spectrum(SPECTRA[name] / (np.abs(SPECTRA[name]).max() or 1.0)).to(dtype)
    powers = (2.0**-100, 2.0**100) if dtype == torch.float32 else (2.0**-600, 2.0**600)
    for estimate in (
        lambda m: trace(m, products=30),
        lambda m: trace(m, products=30, method="hutchinson"),
        lambda m: trace(m, products=500),
        frobenius_norm,
        lambda m: frobenius_norm(m, products=500),
    ):
        plain = estimate(a)
        for power in powers:
            found = estimate(a * power)
            assert found.value == plain.value * power
            assert found.std_error == pytest.approx(plain.std_error * power, rel=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
def test_nor_of_xtrace_which_multiplies_its_own_rounding(name):
    a = with_spectrum(SPECTRA[name] / (np.abs(SPECTRA[name]).max() or 1.0)).float()
    plain = trace(a, products=30, method="xtrace")
    for power in (2.0**-60, 2.0**60):  # farther down, that rounding would be cut to 0
        found = trace(a * power, products=30, method="xtrace")
        assert (found.value, found.std_error) == (plain.value * power, plain.std_error * power)


@pytest.mark.parametrize("estimate", [trace, frobenius_norm])
def test_a_matrix_too_small_for_its_dtype_is_refused(estimate):
    with pytest.raises(ModelError, match="too near the smallest number of float32"):
        estimate(1e-37 * torch.eye(120))
    assert estimate(torch.zeros(120, 120)).value == 0


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="method must be"):
        trace(torch.eye(30), method="magic")
    with pytest.raises(ArgumentError, match="at least 6"):
        trace(torch.eye(30), products=5)
    with pytest.raises(ArgumentError, match="at least 4 for xtrace"):
        trace(torch.eye(30), products=3, method="xtrace")
    with pytest.raises(ArgumentError, match="at least 1"):
        frobenius_norm(torch.eye(30), products=0)
