import itertools

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

from sharpkit.errors import DataError, ModelError
from sharpkit.measures import k_variance_margin
from sharpkit.measures.transport_margins import transport_distance


def by_loops(model, cut, x, y, seed=0):
    rows = model[:cut](x).detach()
    ratios = []
    for row, label in zip(rows, y.tolist(), strict=True):
        row = row[None].clone().requires_grad_()
        z = model[cut:](row)[0]
        gamma = z[label] - torch.cat([z[:label], z[label + 1 :]]).max()
        (slope,) = torch.autograd.grad(gamma, row)
        ratios.append(float(gamma.detach() / (slope.norm() + 1e-6)))
    generator, total, counted = torch.Generator().manual_seed(seed), 0.0, 0
    for label in sorted(set(y.tolist())):
        members = [i for i, c in enumerate(y.tolist()) if c == label]
        order = [members[k] for k in torch.randperm(len(members), generator=generator)]
        half = len(order) // 2
        if half == 0:
            continue  # a class with a single example has no halves
        counted += len(order)
        a, b = rows[order[:half]].flatten(1), rows[order[half : 2 * half]].flatten(1)
        total += len(order) * transport_distance(a, b)
    return np.median(ratios) / (total / counted)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_distance_is_the_best_of_all_matchings(k):
    generator = torch.Generator().manual_seed(k)
    a, b = torch.randn(2, k, 3, generator=generator).double()
    best = min(
        float(np.mean([float((a[i] - b[j]).norm()) for i, j in enumerate(order)]))
        for order in itertools.permutations(range(k))
    )
    assert transport_distance(a, b) == pytest.approx(best)


def test_it_is_the_definition_at_the_second_layer_and_at_the_last_convolution():
    model, (x, y) = convolutional(), convolutional_data()
    found = k_variance_margin(model, (x, y))
    assert found["shallow"] == pytest.approx(by_loops(model, 4, x, y))
    assert found["deep"] == pytest.approx(by_loops(model, 4, x, y))  # the second is the last


def test_without_convolutions_the_deep_layer_is_the_last():
    model, (x, y) = relu_network(bias=True), relu_data()
    found = k_variance_margin(model, (x, y), seed=3)
    assert found["shallow"] == pytest.approx(by_loops(model, 2, x, y, 3))
    assert found["deep"] == pytest.approx(by_loops(model, 4, x, y, 3))


def test_it_ignores_units_of_layers_and_scale():
    model, (x, y) = relu_network(), relu_data()
    expected = pytest.approx(k_variance_margin(model, (x, y)), rel=1e-4)  # the floor of the slope
    for other in (rescaled(model), permuted(model), scaled(model, 3.0)):
        assert k_variance_margin(other, (x, y)) == expected
    assert k_variance_margin(model, (7 * x, y)) == expected


def test_what_has_no_halves_is_refused():
    model, (x, y) = relu_network(), relu_data()
    with pytest.raises(DataError, match="no class has two"):
        k_variance_margin(model, (x[:3], torch.tensor([0, 1, 2])))
    with pytest.raises(ModelError, match="the same for all"):
        k_variance_margin(model, (x[:1].repeat(4, 1), y[:1].repeat(4)))
    with pytest.raises(DataError, match="at least two outputs"):
        k_variance_margin(nn.Linear(6, 1).double(), (x, torch.zeros_like(y)))
