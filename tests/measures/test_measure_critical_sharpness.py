import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network
from torch import nn

from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import critical_sharpness


def test_of_a_quadratic_loss_it_is_the_curvature_along_the_gradient():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2).double(), torch.randn(20, 4).double()
    y = torch.randn(20, 2).double()
    parameters = list(model.parameters())
    loss = 0.5 * (model(x) - y).square().sum(1).mean()
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    product = torch.autograd.grad(flat @ flat.detach(), parameters)
    curvature = torch.cat([h.flatten() for h in product]) @ flat / (flat @ flat)
    found = critical_sharpness(model, (x, y), loss="mse")
    assert found == pytest.approx(curvature.item(), rel=6e-3)  # bracketed to 1 %


@pytest.mark.parametrize("guess", [1e-4, 0.1, 50.0])
def test_the_loss_rises_from_the_critical_rate_on_wherever_the_search_begins(guess):
    model, (x, y) = relu_network(bias=True), relu_data()
    loss = nn.functional.cross_entropy
    rate = 2 / critical_sharpness(model, (x, y), guess=guess)
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))

    def at(step):
        moved = {
            name: p.detach() - step * g
            for (name, p), g in zip(model.named_parameters(), gradient, strict=True)
        }
        return float(loss(torch.func.functional_call(model, moved, (x,)), y))

    assert at(0.985 * rate) < at(0.0) < at(1.015 * rate)


def test_it_ignores_the_order_of_units():
    model, data = relu_network(bias=True), relu_data()
    expected = critical_sharpness(model, data)
    assert critical_sharpness(permuted(model), data) == pytest.approx(expected)


def test_what_has_no_critical_rate_is_refused():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(ArgumentError, match="guess"):
        critical_sharpness(model, (x, y), guess=0.0)
    flat = nn.Linear(2, 2, bias=False)
    with pytest.raises(ModelError, match="gradient is zero"):
        critical_sharpness(flat, (torch.zeros(3, 2), torch.tensor([0, 1, 0])))
    with pytest.raises(ModelError, match="no step raises the loss"):  # separable, one direction
        one = nn.Linear(1, 2, bias=False).double()
        nn.init.zeros_(one.weight)
        critical_sharpness(one, (torch.ones(2, 1).double(), torch.tensor([0, 0])))
