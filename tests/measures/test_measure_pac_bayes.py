import math

import numpy as np
import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled, scaled
from torch import nn

from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import noise_scale, pac_bayes, pac_bayes_magnitude


def accuracy_under_noise(sigma, draws, seed, magnitude=False):
    """A plain loop on copies of the network, with the same draws."""
    x, y = relu_data()
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        other = relu_network()
        for p in other.parameters():
            noise = torch.randn(p.shape, generator=generator).double()
            scale = (sigma**2 * p.data**2 + 1e-6).sqrt() if magnitude else sigma
            p.data += scale * noise
        total += float((other(x).argmax(1) == y).double().mean())
    return total / draws


@pytest.mark.parametrize("magnitude", [False, True])
def test_the_accuracy_falls_by_the_target_at_the_scale_found(magnitude):
    sigma = noise_scale(relu_network(), relu_data(), magnitude=magnitude, draws=8, seed=3)
    # the accuracy is a step function of sigma: the target lies between its two sides
    below = accuracy_under_noise(sigma * 0.97, 8, 3, magnitude)
    above = accuracy_under_noise(sigma * 1.03, 8, 3, magnitude)
    assert above - 0.01 <= 0.9 <= below + 0.01


def test_the_scale_agrees_with_a_closed_form():
    """For one weight w and f = (wx, 0), an example x > 0 is wrong if w + σu < 0."""
    model = nn.Linear(1, 2, bias=False).double()
    model.weight.data = torch.tensor([[1.0], [-1.0]]).double()
    data = torch.ones(1, 1).double(), torch.tensor([0])
    # w1 − w2 = 2 + σ √2 u < 0 with probability 0.1 at σ √2 = 2 / 1.2816
    sigma = noise_scale(model, data, draws=4000)
    assert sigma == pytest.approx(math.sqrt(2) / 1.2816, rel=0.05)


def test_the_scale_is_equivariant_and_needs_no_particular_units():
    model, data = relu_network(), relu_data()
    sigma = noise_scale(model, data)
    for factor in (1e-3, 1e3):
        assert noise_scale(scaled(model, factor), data) == pytest.approx(factor * sigma, rel=0.01)


def test_magnitude_aware_noise_ignores_the_scale_of_layers_and_isotropic_noise_does_not():
    model, data = relu_network(), relu_data()
    options = {"magnitude": True, "epsilon": 0.0}
    expected = noise_scale(model, data, **options)
    assert noise_scale(rescaled(model, 16.0), data, **options) == pytest.approx(expected, rel=0.01)
    plain = noise_scale(model, data)
    assert noise_scale(rescaled(model, 16.0), data) < 0.7 * plain


def test_permuting_units_changes_the_scale_by_the_noise_of_the_draws_only():
    model, data = relu_network(), relu_data()
    a, b = (noise_scale(m, data, draws=100) for m in (model, permuted(model)))
    assert a == pytest.approx(b, rel=0.15)


def test_the_bounds_are_the_formulas():
    model, initial, data = relu_network(), relu_network(seed=4), relu_data()
    n = len(data[1])
    w = torch.cat([p.data.flatten() for p in model.parameters()]).numpy()
    w0 = torch.cat([p.data.flatten() for p in initial.parameters()]).numpy()
    sigma = noise_scale(model, data, seed=1)
    values = pac_bayes(model, data, initial=initial, seed=1)
    rest = np.log(n / sigma) + 10
    assert values["origin"] == pytest.approx((w**2).sum() / (4 * sigma**2) + rest)
    assert values["initial"] == pytest.approx(((w - w0) ** 2).sum() / (4 * sigma**2) + rest)
    assert values["flatness"] == pytest.approx(1 / sigma**2)

    sigma = noise_scale(model, data, magnitude=True, seed=1)
    values = pac_bayes_magnitude(model, data, initial=initial, seed=1)
    rest = np.log(n / sigma) + 10
    below = 1e-6 + sigma**2 * (w - w0) ** 2
    for name, reference in (("origin", w), ("initial", w - w0)):
        above = 1e-6 + (sigma**2 + 1) * (reference**2).sum() / len(w)
        assert values[name] == pytest.approx(np.log(above / below).sum() / 4 + rest)
    assert values["flatness"] == pytest.approx(1 / sigma**2)


def test_the_seed_decides_everything():
    model, data = relu_network(), relu_data()
    torch.manual_seed(1)
    a = noise_scale(model, data, seed=5)
    torch.manual_seed(2)
    assert noise_scale(model, data, seed=5) == a
    assert noise_scale(model, data, seed=6) != a


def test_impossible_requests_say_why():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(ModelError, match="no perturbation of the weights"):
        noise_scale(model, (x, (y + 1) % 3))  # accuracy 0
    with pytest.raises(ModelError, match="smaller epsilon"):
        noise_scale(model, (x, y), magnitude=True, epsilon=100.0)
    for bad in ({"drop": 0.0}, {"drop": 1.0}, {"draws": 0}, {"epsilon": -1.0}):
        with pytest.raises(ArgumentError):
            noise_scale(model, (x, y), **bad)
