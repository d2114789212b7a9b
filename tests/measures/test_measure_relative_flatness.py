import pytest
import torch
from measure_helpers import permuted, relu_data, relu_network, rescaled
from torch import nn

from sharpkit.errors import DataError, ModelError
from sharpkit.measures import relative_flatness


def by_dense_hessian(model, x, y):
    """Σ_st ⟨w_s, w_t⟩ tr H_st from the whole Hessian of the last layer."""
    last = model[-1]
    weight, bias = last.weight.detach(), last.bias
    features = model[:-1](x).detach()

    def loss(w):
        return nn.functional.cross_entropy(nn.functional.linear(features, w, bias), y)

    hessian = torch.autograd.functional.hessian(loss, weight)  # (s, i, t, j)
    traces = torch.einsum("sitj,ij->st", hessian, torch.eye(weight.shape[1]).double())
    return float(((weight @ weight.T) * traces).sum())


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_formula_with_the_dense_hessian(bias):
    model, (x, y) = relu_network(bias=bias), relu_data()
    found = relative_flatness(model, (x, y))
    assert found.value == pytest.approx(by_dense_hessian(model, x, y), rel=1e-10)
    assert found.std_error > 0


def test_it_survives_rescaling_of_layers_and_permutation():
    model, data = relu_network(bias=True), relu_data()
    expected = relative_flatness(model, data).value
    other = relu_network(bias=True)  # the last hidden layer against the last
    for p in other[2].parameters():
        p.data *= 4.0
    other[4].weight.data /= 4.0
    for same in (rescaled(model), permuted(model), other):
        assert relative_flatness(same, data).value == pytest.approx(expected)


def test_it_stays_exact_where_the_network_is_certain():
    model = nn.Linear(1, 2, bias=False).double()
    model.weight.data = torch.tensor([[0.0], [60.0]]).double()
    # p = 1/(1 + e^60) of the other class: 3600 p (1 − p)
    found = relative_flatness(model, (torch.ones(1, 1).double(), torch.tensor([1])))
    assert found.value == pytest.approx(3600 * torch.sigmoid(torch.tensor(-60.0).double()).item())


def test_it_needs_a_linear_layer_at_the_end():
    x, y = torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ModelError, match=r"expected nn\.Linear"):
        relative_flatness(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten()), (x, y))
    with pytest.raises(ModelError, match="not those of the last"):
        relative_flatness(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), (torch.randn(4, 2), y))
    with pytest.raises(DataError):
        relative_flatness(nn.Linear(2, 2), (torch.randn(4, 2), y + 7))
