import math

import numpy as np
import pytest
import torch
from measure_helpers import permuted, relu_network, scaled
from torch import nn

from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import heavy_tail_exponent, weight_spectrum
from sharpkit.measures.heavy_tails import spectrum
from sharpkit.measures.weight_spectra import jensen_shannon, marchenko_pastur_edge


def network():
    """Weights from numpy's generator, whose numbers do not change between versions."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(200, 120)).double()
    model[0].weight.data = torch.tensor(0.1 * rng.standard_t(3, model[0].weight.shape))
    dense = 0.1 * rng.standard_t(3, (120, 200))
    dense += 0.05 * rng.standard_normal((120, 1)) @ rng.standard_normal((1, 200))
    model[2].weight.data = torch.tensor(dense)
    return model


# weightwatcher 0.7.7, analyze(mp_fit=True, conv2d_norm=...), mean over the two layers
WEIGHTWATCHER = {
    True: {
        "log_norm": 2.3493398946137924,
        "log_spectral_norm": 1.2908136125977272,
        "mp_softrank": 0.22369864096832287,
    },
    False: {
        "log_norm": 2.499854892445783,
        "log_spectral_norm": 1.4413286104297178,
        "mp_softrank": 0.22369864096832293,
    },
}
ALPHA_WEIGHTED = {True: 5.132628520072837, False: 5.851730803785838}


@pytest.mark.parametrize("halved", [True, False])
def test_norms_and_soft_rank_are_those_of_weightwatcher(halved):
    found = weight_spectrum(network(), halve_convolutions=halved)
    expected = WEIGHTWATCHER[halved]
    assert {form: found[form] for form in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("halved", [True, False])
def test_the_weighted_exponent_is_weightwatchers_with_and_without_its_halving(halved):
    found = heavy_tail_exponent(network(), halve_convolutions=halved)
    # its singular values are in float32
    assert found["alpha"] == pytest.approx(4.256249524266199, rel=1e-6)
    assert found["alpha_weighted"] == pytest.approx(ALPHA_WEIGHTED[halved], rel=1e-6)


def test_norms_are_the_definition():
    model = network()
    values = [spectrum(model[i].weight.data) for i in (0, 2)]
    found = weight_spectrum(model)
    assert found["log_norm"] == pytest.approx(np.mean([math.log10(v.sum()) for v in values]))
    assert found["log_norm"] == pytest.approx(
        np.mean([math.log10(float(model[i].weight.data.square().sum())) for i in (0, 2)])
    )
    top = np.mean([math.log10(v.max()) for v in values])
    assert found["log_spectral_norm"] == pytest.approx(top)


@pytest.mark.parametrize("shape", [(300, 100), (240, 200), (200, 200)])
def test_the_edge_of_a_random_matrix_is_found(shape):
    w = np.random.default_rng(1).standard_normal(shape)
    values = np.linalg.eigvalsh(w.T @ w)
    edge = marchenko_pastur_edge(values, shape[0] / shape[1])
    assert edge == pytest.approx((math.sqrt(shape[0]) + math.sqrt(shape[1])) ** 2, rel=0.05)


def test_a_spike_beside_random_weights_lowers_the_soft_rank_and_raises_the_distance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 100)).double()
    nn.init.normal_(model[0].weight)
    random = weight_spectrum(model)
    model[0].weight.data += torch.randn(1, 300).double().expand(100, -1)
    spiked = weight_spectrum(model)
    assert random["mp_softrank"] > 0.9 > 0.3 > spiked["mp_softrank"]
    assert spiked["rand_distance"] > 5 * random["rand_distance"]


def test_the_distance_is_scipys_for_vectors_of_one_sum():
    from scipy.spatial.distance import jensenshannon

    p, q = np.random.default_rng(2).dirichlet(np.ones(30), 2)
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q))


def test_scale_and_the_order_of_units_matter_only_where_they_should():
    model = relu_network()
    before = weight_spectrum(model, min_eigenvalues=3)
    after = weight_spectrum(scaled(model, 10.0), min_eigenvalues=3)
    for form in ("log_norm", "log_spectral_norm"):
        assert after[form] == pytest.approx(before[form] + 2)
    for form in ("mp_softrank", "rand_distance"):
        assert after[form] == pytest.approx(before[form], rel=1e-6)
    same = weight_spectrum(permuted(model), min_eigenvalues=3)
    assert same["mp_softrank"] == pytest.approx(before["mp_softrank"])


def test_too_little_is_refused():
    with pytest.raises(ModelError, match="no weight has 10"):
        weight_spectrum(relu_network())
    with pytest.raises(ArgumentError, match="at least 2"):
        weight_spectrum(relu_network(), min_eigenvalues=1)
    model = nn.Linear(20, 20)
    nn.init.zeros_(model.weight)
    with pytest.raises(ModelError, match="is zero"):
        weight_spectrum(model)
