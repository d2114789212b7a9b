import numpy as np
import pytest
import torch
from measure_helpers import (
    convolutional,
    convolutional_data,
    permuted,
    relu_data,
    relu_network,
    rescaled,
    scaled,
)
from torch import nn

from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures import hidden_layer_margin


def by_hand(model, cuts, x, y, percentile=10.0):
    """Layer by layer, example by example, by autograd of the rest of the network."""
    found = []
    for cut in cuts:
        rows = model[:cut](x).detach()
        distances = []
        for row, label in zip(rows, y.tolist(), strict=True):
            row = row[None].clone().requires_grad_()
            z = model[cut:](row)[0]
            others = torch.cat([z[:label], z[label + 1 :]])
            gamma = z[label] - others.max()
            (gradient,) = torch.autograd.grad(gamma, row)
            distances.append(float(gamma.detach() / gradient.norm()))
        flat = rows.flatten(1).numpy()
        total = float(((flat - flat.mean(0)) ** 2).sum(1).mean())
        found.append(np.percentile(distances, percentile) / total**0.5)
    return float(np.mean(found))


@pytest.mark.parametrize("percentile", [10.0, 50.0])
def test_the_margin_is_that_of_a_loop_over_layers_and_examples(percentile):
    model, (x, y) = relu_network(bias=True), relu_data()
    expected = by_hand(model, [0, 2, 4], x, y, percentile)
    assert hidden_layer_margin(model, (x, y), percentile=percentile) == pytest.approx(expected)


def test_convolutions_batches_and_misclassified_examples_count():
    model, (x, y) = convolutional(), convolutional_data()
    x, y = torch.cat([x, 1.1 * x, 0.9 * x]), y.repeat(3)  # more than one batch
    expected = by_hand(model, [0, 4, 7], x, y)
    assert expected < 0  # the labels are random
    assert hidden_layer_margin(model, (x, y)) == pytest.approx(expected)


def test_a_linear_classifier_has_its_distances_to_the_boundary():
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).double()
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 4.0]]).double()
    y = torch.tensor([0, 1, 0, 1])
    # the boundary is the diagonal: distances √2 and 2√2; variance 10 − |mean|² = 10 − 4.5
    value = hidden_layer_margin(model, (x, y), percentile=0)
    assert value == pytest.approx(2**0.5 / 5.5**0.5)


def test_it_ignores_units_of_layers_order_of_units_and_scale_of_inputs():
    model, (x, y) = relu_network(), relu_data()
    expected = hidden_layer_margin(model, (x, y))
    assert expected > 0
    assert hidden_layer_margin(rescaled(model), (x, y)) == pytest.approx(expected)
    assert hidden_layer_margin(permuted(model), (x, y)) == pytest.approx(expected)
    assert hidden_layer_margin(scaled(model, 3.0), (x, y)) == pytest.approx(expected)
    assert hidden_layer_margin(model, (7 * x, y)) == pytest.approx(expected)


def test_what_has_no_margin_is_refused():
    model, (x, y) = relu_network(bias=True), relu_data()
    with pytest.raises(ArgumentError, match="between 0 and 100"):
        hidden_layer_margin(model, (x, y), percentile=-1)
    with pytest.raises(DataError, match="at least two outputs"):
        hidden_layer_margin(nn.Linear(6, 1).double(), (x, torch.zeros_like(y)))
    with pytest.raises(ModelError, match="the same for all examples"):
        hidden_layer_margin(model, (x[:1].repeat(5, 1), y[:1].repeat(5)))
    dead = relu_network(bias=True)
    dead[2].bias.data -= 100.0  # nothing passes the second layer
    with pytest.raises(ModelError, match="does not depend on it"):
        hidden_layer_margin(dead, (x, y))

    class Weightless(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6).double())

        def forward(self, x):
            return x * self.scale

    with pytest.raises(ModelError, match="no linear or convolutional layer"):
        hidden_layer_margin(Weightless(), (x, y))
