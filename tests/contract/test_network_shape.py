"""Which modules differ in the values of their tensors alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sharpkit.contract.network_shape import network_shape


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())


def test_other_values_are_of_one_shape():
    one, other = network(), network()
    other[1].running_mean.fill_(3.0)
    other[1].num_batches_tracked.fill_(5)
    assert network_shape(one) == network_shape(other)
    assert network_shape(nn.DataParallel(one)) == network_shape(other)


def add_attribute(model):
    model[2].scale = 0.5


def add_settings(model):
    model[2].settings = {"scale": [0.5, {"shift": 1}]}


def add_tensor(model):
    model[2].scale = torch.ones(2)


def tie(model):
    model[1].bias = model[1].weight


CHANGES = {
    "a layer": lambda model: model.append(nn.ReLU()),
    "a setting": lambda model: setattr(model[1], "eps", 1e-3),
    "an attribute": add_attribute,
    "settings": add_settings,
    "a plain tensor": add_tensor,
    "a tie": tie,
    "a dtype": lambda model: model.double(),
    "what is trained": lambda model: model[0].requires_grad_(False),
    "the mode": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_difference_is_another_shape(change):
    one, other = network(), network()
    change(other)
    assert network_shape(one) != network_shape(other)


def test_rates_of_dropout_do_not_count():
    one, other = (nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)) for p in (0.1, 0.2))
    assert network_shape(one) == network_shape(other)


def test_own_tensors_in_lists_are_known():
    """As an LSTM has them."""
    assert network_shape(nn.LSTM(2, 3)) == network_shape(nn.LSTM(2, 3))


def test_copies_with_the_same_settings_are_of_one_shape():
    one = network()
    add_settings(one)
    assert network_shape(one) == network_shape(copy.deepcopy(one))
    add_tensor(one)
    assert network_shape(one) != network_shape(copy.deepcopy(one))
