"""Trace and norm estimates, and their error bars."""

import math

import numpy as np
import pytest
import torch
from curvature_cases import BUILDERS, dense_hessian, make
from matrices import SPECTRA, with_spectrum

from sharpkit.curvature import HessianOperator, frobenius_norm, trace
from sharpkit.errors import ArgumentError, ModelError


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
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
    for method in ("hutch++", "hutchinson"):
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
    with pytest.raises(ArgumentError, match="at least 1"):
        frobenius_norm(torch.eye(30), products=0)
