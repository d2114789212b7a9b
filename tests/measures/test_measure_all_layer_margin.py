import itertools

import numpy as np
import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network
from scipy.optimize import minimize
from torch import nn

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import all_layer_margin


def true_margin(first, last, x, label, starts=8):
    """The definition for two layers with tanh between, by a constrained solver from many starts."""

    def excess(delta, other):
        d = torch.tensor(delta)
        h = torch.tanh(first(x) + d[: first.out_features] * x.norm())
        z = (last(h) + d[first.out_features :] * h.norm())[0]
        return float((z[label] - z[other]).detach())

    best = np.inf
    size = first.out_features + last.out_features
    for start in range(starts):
        for other in set(range(last.out_features)) - {label}:
            found = minimize(
                lambda d: (d**2).sum(),
                0.3 * np.random.default_rng(start).standard_normal(size),
                constraints=[{"type": "eq", "fun": excess, "args": (other,)}],
                method="SLSQP",
            )
            if abs(excess(found.x, other)) < 1e-6:
                best = min(best, float(np.sqrt(found.fun)))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_minimum_that_a_solver_finds(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(1, 4).double()
    label = int(model(x).argmax())
    expected = true_margin(model[0], model[2], x, label)
    # bisection ends within 2^-10 of the boundary, on its far side
    assert all_layer_margin(model, (x, torch.tensor([label]))).value == pytest.approx(
        expected, rel=1.5e-3
    )


def test_one_layer_is_known_in_closed_form():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4).double(), torch.randn(30, 5).double()
    z = model(x).detach()
    top = z.topk(2, dim=1)
    expected = (top.values[:, 0] - top.values[:, 1]) / (2**0.5 * x.norm(dim=1))
    found = all_layer_margin(model, (x, top.indices[:, 0]))
    assert found.value == pytest.approx(float(expected.mean()), rel=1.5e-3)
    assert found.std_error == pytest.approx(float(expected.std() / 30**0.5), rel=5e-3)


def test_the_perturbation_is_one_that_changes_the_prediction_and_more_steps_do_not_raise_it():
    model, data = relu_network(bias=True), relu_data()
    data = data[0], model(data[0]).argmax(1)
    values = [all_layer_margin(model, data, steps=k).value for k in (1, 3, 5, 9)]
    assert all(a >= b > 0 for a, b in itertools.pairwise(values))


def test_misclassified_examples_have_none():
    model, (x, y) = relu_network(), relu_data()
    y = model(x).argmax(1)
    full = all_layer_margin(model, (x, y)).value
    wrong = y.clone()
    wrong[::2] = (y[::2] + 1) % 3
    alone = all_layer_margin(model, (x[1::2], y[1::2])).value
    assert all_layer_margin(model, (x, wrong)).value == pytest.approx(alone / 2)
    assert full > 0


def test_it_ignores_the_order_of_units_and_the_scale_of_inputs():
    model, (x, _) = relu_network(), relu_data()
    data = x, model(x).argmax(1)
    expected = all_layer_margin(model, data).value
    assert all_layer_margin(permuted(model), data).value == pytest.approx(expected)
    assert all_layer_margin(model, (7 * x, data[1])).value == pytest.approx(expected)


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(ArgumentError, match="steps"):
        all_layer_margin(model, (x, y), steps=0)
    with pytest.raises(DataError, match="at least two outputs"):
        all_layer_margin(nn.Linear(6, 1).double(), (x, torch.zeros_like(y)))

    class Weightless(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6).double())

        def forward(self, x):
            return x * self.scale

    with pytest.raises(ModelError, match="no linear or convolutional layer"):
        all_layer_margin(Weightless(), (x, y))
    assert not any(m._forward_hooks for m in model.modules())
