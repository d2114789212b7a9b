import math

import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled, scaled
from torch import nn

from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import accuracy_sharpness, sharpness_radius


def line(slopes):
    """f = (w x, −w x) on x = 1/slope: example i is lost as soon as w moves by ... together."""
    model = nn.Linear(len(slopes), 2, bias=False).double()
    model.weight.data = torch.stack([torch.ones(len(slopes)), -torch.ones(len(slopes))]).double()
    return model, (torch.diag(torch.tensor(slopes)).double(), torch.zeros(len(slopes)).long())


def test_the_radius_is_that_of_a_linear_classifier_where_it_can_be_written_down():
    """Example i has margin 2 s_i, and the box lowers it by 2 α s_i: all are lost at α = 1."""
    model, data = line([1.0, 2.0, 3.0])
    assert sharpness_radius(model, data) == pytest.approx(1.0, rel=0.01)
    model.weight.data *= 3
    assert sharpness_radius(model, data) == pytest.approx(3.0, rel=0.01)
    assert sharpness_radius(model, data, magnitude=True) == pytest.approx(1.0, rel=0.01)


def worst_accuracy(alpha, steps):
    """Sign ascent on a copy of the network, the plain way."""
    x, y = relu_data()
    model = relu_network()
    start = [p.data.clone() for p in model.parameters()]
    least = 1.0
    for step in range(1, steps + 1):
        nn.functional.cross_entropy(model(x), y).backward()
        for p, w in zip(model.parameters(), start, strict=True):
            u = (p.data - w + alpha * p.grad.sign() / step**0.5).clamp(-alpha, alpha)
            p.data, p.grad = w + u, None
        least = min(least, float((model(x).argmax(1) == y).double().mean()))
    return least


@pytest.mark.parametrize("steps", [1, 4])
def test_the_accuracy_falls_by_the_target_at_the_radius_found(steps):
    alpha = sharpness_radius(relu_network(), relu_data(), steps=steps)
    # the accuracy is a step function: the target lies between its two sides
    below, above = worst_accuracy(0.97 * alpha, steps), worst_accuracy(1.03 * alpha, steps)
    assert above - 0.01 <= 0.9 <= below + 0.01


def test_more_steps_find_a_smaller_radius_and_a_larger_drop_a_larger_one():
    model, data = relu_network(), relu_data()
    one, many = (sharpness_radius(model, data, steps=steps) for steps in (1, 10))
    assert many <= 1.01 * one
    assert sharpness_radius(model, data, drop=0.3) > sharpness_radius(model, data, drop=0.1)


def test_the_radius_scales_with_the_weights_and_the_magnitude_aware_one_with_nothing():
    model, data = relu_network(), relu_data()
    alpha = sharpness_radius(model, data)
    for factor in (1e-3, 5.0):
        assert sharpness_radius(scaled(model, factor), data) == pytest.approx(
            factor * alpha, rel=0.1
        )
    assert sharpness_radius(permuted(model), data) == pytest.approx(alpha, rel=0.01)
    relative = sharpness_radius(model, data, magnitude=True)
    for other in (rescaled(model, 16.0), scaled(model, 0.2)):
        assert sharpness_radius(other, data, magnitude=True) == pytest.approx(relative, rel=0.01)
    assert sharpness_radius(rescaled(model, 16.0), data) < 0.7 * alpha


def test_the_bounds_are_their_formulas():
    model, initial, data = relu_network(seed=0), relu_network(seed=5), relu_data()
    found = accuracy_sharpness(model, data, initial=initial)
    alpha = sharpness_radius(model, data)
    w, w0 = (torch.cat([p.data.flatten() for p in m.parameters()]) for m in (model, initial))
    factor = math.log(2 * len(w)) / (4 * alpha**2)
    rest = math.log(40 / alpha) + 10
    assert found["origin"] == pytest.approx(float(w @ w) * factor + rest)
    assert found["initial"] == pytest.approx(float((w - w0) @ (w - w0)) * factor + rest)
    assert found["flatness"] == pytest.approx(alpha**-2)
    assert found["magnitude_flatness"] == pytest.approx(
        sharpness_radius(model, data, magnitude=True) ** -2
    )


def test_impossible_requests_say_why():
    model, (x, y) = relu_network(), relu_data()
    for option in ({"drop": 1.0}, {"steps": 0}):
        with pytest.raises(ArgumentError, match=next(iter(option))):
            sharpness_radius(model, (x, y), **option)
    with pytest.raises(ModelError, match="no perturbation of the weights"):
        sharpness_radius(model, (x, (y + 1) % 3))  # right nowhere: nothing to lose
