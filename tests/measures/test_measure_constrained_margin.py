import numpy as np
import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled, scaled
from scipy.optimize import minimize
from torch import nn

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import constrained_margin
from sharpkit.measures.constrained_margins import principal_components


def test_the_components_are_those_of_the_covariance():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    x = x * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.1]).double()
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T))
    share = np.cumsum(values[::-1]) / values.sum()
    for variance in (0.5, 0.9, 0.99, 1.0):
        basis = principal_components(x, variance).numpy()
        count = int((share < variance - 1e-9).sum()) + 1
        assert len(basis) == count
        expected = vectors[:, ::-1][:, :count]
        np.testing.assert_allclose(basis.T @ basis, expected @ expected.T, atol=1e-8)


def test_of_a_linear_classifier_it_is_the_distance_within_the_subspace():
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x = (torch.randn(40, 5) * torch.tensor([4.0, 2.0, 1.0, 0.1, 0.1])).double()
    z = model(x).detach()
    basis = principal_components(x, 0.9)
    slope = basis @ (model.weight[0] - model.weight[1]).detach()
    expected = (z[:, 0] - z[:, 1]).abs() / slope.norm()
    found = constrained_margin(model, (x, z.argmax(1)))
    # the median of an even number of examples, and the bisection's error
    assert found == pytest.approx(float(np.median(expected)), rel=1e-3)


def test_it_is_the_minimum_that_a_solver_finds():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = (torch.randn(30, 4) * torch.tensor([2.0, 2.0, 0.1, 0.1])).double()
    y = model(x).argmax(1)
    basis = principal_components(x, 0.9)
    found = []
    for row, label in zip(x, y.tolist(), strict=True):

        def excess(c, row=row, label=label):
            z = model(row + torch.tensor(c) @ basis).detach()
            return float(z[label] - z[1 - label])

        lengths = []
        for start in range(12):
            first = np.random.default_rng(start).standard_normal(len(basis)) * 2
            result = minimize(
                lambda c: (c**2).sum(),
                first,
                constraints=[{"type": "eq", "fun": excess}],
                method="SLSQP",
            )
            if abs(excess(result.x)) < 1e-6:
                lengths.append(np.sqrt(result.fun))
        found.append(min(lengths))
    value = constrained_margin(model, (x, y), steps=30)
    # an upper bound of the minimum, but close to it
    assert np.median(found) * (1 - 1e-6) <= value <= 1.1 * np.median(found)


def test_only_the_decision_matters_and_wrong_examples_are_left_out():
    model, (x, _) = relu_network(), relu_data()
    y = model(x).argmax(1)
    expected = constrained_margin(model, (x, y))
    for other in (rescaled(model), permuted(model), scaled(model, 3.0)):
        assert constrained_margin(other, (x, y)) == pytest.approx(expected)
    wrong = y.clone()
    wrong[::2] = (y[::2] + 1) % 3
    alone = constrained_margin(model, (x, wrong))  # the components are those of all inputs
    assert 0 < alone != expected
    with pytest.raises(ModelError, match="no training example is classified correctly"):
        constrained_margin(model, (x, (y + 1) % 3))


def test_an_unreachable_boundary_is_told_where_it_decides_the_median():
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.tensor([[0.0, 1.0], [0.0, -1.0]]).double()
    x = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [1.0, 1.0]]).double()  # vary along the first axis
    with pytest.raises(ModelError, match="not found for half"):
        constrained_margin(model, (x, torch.zeros(3).long()))


def test_bad_requests_say_what_was_expected():
    model, (x, y) = relu_network(), relu_data()
    for bad in (0.0, 1.1):
        with pytest.raises(ArgumentError, match="variance"):
            constrained_margin(model, (x, y), variance=bad)
    with pytest.raises(ArgumentError, match="steps"):
        constrained_margin(model, (x, y), steps=0)
    with pytest.raises(DataError, match="all inputs are the same"):
        constrained_margin(model, (x[:1].repeat(4, 1), y[:1].repeat(4)))
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(DataError, match="real numbers"):
        constrained_margin(tokens, (torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])))
