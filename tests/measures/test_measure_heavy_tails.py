import math

import numpy as np
import pytest
import torch
from measure_helpers import permuted, relu_network, scaled
from torch import nn

from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import fit_power_law, heavy_tail_exponent
from sharpkit.measures.heavy_tails import spectrum

# powerlaw 2.0.0, Fit(eigenvalues, parameter_ranges={"alpha": [1, 100]}): seed -> alpha, xmin, D
POWERLAW = {
    0: (4.626311152474985, 524.0501529565519, 0.07790208609320581),
    1: (2.6181598166197597, 241.93840053458342, 0.12516990981241105),
    2: (4.104927248363225, 474.10220371455506, 0.1114745113398471),
}


@pytest.mark.parametrize("seed", POWERLAW)
def test_the_fit_is_that_of_the_powerlaw_package(seed):
    w = np.random.default_rng(seed).standard_t(3, size=(64, 96))
    fit = fit_power_law(np.linalg.eigvalsh(w @ w.T))
    assert (fit.alpha, fit.xmin, fit.distance) == pytest.approx(POWERLAW[seed], rel=1e-9)


def test_the_distance_is_scipys_up_to_one_step():
    from scipy.stats import kstest

    values = np.random.default_rng(0).pareto(1.7, 300) + 1
    fit = fit_power_law(values)
    tail = values[values >= fit.xmin]
    result = kstest(tail, lambda x: 1 - (x / fit.xmin) ** (1 - fit.alpha))
    assert fit.n_tail == len(tail)
    assert result.statistic - 1 / len(tail) - 1e-12 <= fit.distance <= result.statistic + 1e-12


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_recovered(alpha):
    values = np.random.default_rng(1).pareto(alpha - 1, 3000) + 1
    fit = fit_power_law(values)
    assert fit.alpha == pytest.approx(alpha, abs=4 * (alpha - 1) / math.sqrt(fit.n_tail))


def test_the_body_below_the_tail_is_left_out():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.uniform(0.01, 1, 1500), rng.pareto(1.5, 1500) + 1])
    fit = fit_power_law(values)
    assert 0.8 < fit.xmin < 2.5 and fit.alpha == pytest.approx(2.5, abs=0.25)


def test_units_and_repeated_values_do_not_matter():
    values = np.random.default_rng(3).pareto(1.5, 200) + 1
    values[:20] = values[20]
    a, b = fit_power_law(values), fit_power_law(values * 1e6)
    assert (a.alpha, a.distance, a.xmin * 1e6) == pytest.approx((b.alpha, b.distance, b.xmin))


def test_the_spectrum_of_a_kernel_pools_its_cells():
    kernel = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    expected = np.sort(
        [
            v
            for i in range(3)
            for j in range(2)
            for v in np.linalg.svd(kernel[:, :, i, j].numpy(), compute_uv=False) ** 2
        ]
    )
    np.testing.assert_allclose(spectrum(kernel), expected)


def test_the_network_average_is_over_its_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Conv2d(6, 8, 3), nn.Linear(30, 5)).double()
    parts = [spectrum(m.weight.data) for m in model[:2]]  # the last has 5 eigenvalues
    alphas = [fit_power_law(p).alpha for p in parts]
    values = heavy_tail_exponent(model)
    assert values["alpha"] == pytest.approx(np.mean(alphas))
    weighted = [a * math.log10(p[-1]) for a, p in zip(alphas, parts, strict=True)]
    assert values["alpha_weighted"] == pytest.approx(np.mean(weighted))


def test_the_exponent_ignores_scale_and_the_order_of_units():
    model = relu_network()
    before = heavy_tail_exponent(model, min_eigenvalues=3)
    after = heavy_tail_exponent(scaled(model, 10.0), min_eigenvalues=3)
    assert after["alpha"] == pytest.approx(before["alpha"])
    assert after["alpha_weighted"] == pytest.approx(before["alpha_weighted"] + 2 * before["alpha"])
    assert heavy_tail_exponent(permuted(model), min_eigenvalues=3) == pytest.approx(before)


def test_too_little_to_fit_is_refused():
    with pytest.raises(ModelError, match="no weight has 20"):
        heavy_tail_exponent(relu_network())
    with pytest.raises(ArgumentError, match="two different"):
        fit_power_law([1.0, 1.0, -3.0])
    with pytest.raises(ArgumentError, match="NaN"):
        fit_power_law([1.0, math.nan])
    with pytest.raises(ArgumentError, match="at least 2"):
        heavy_tail_exponent(relu_network(), min_eigenvalues=1)
