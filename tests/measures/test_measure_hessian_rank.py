import dataclasses

import numpy as np
import pytest
import torch
from measure_helpers import relu_data, relu_network
from torch import nn

from sharpkit.errors import ModelError
from sharpkit.measures import HessianRank


def dense_eigenvalues(model, x, y):
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in first])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    return np.linalg.eigvalsh(torch.stack([torch.cat([t.flatten() for t in r]) for r in rows]))


def test_it_is_the_rank_of_the_dense_hessian_within_its_error():
    model, (x, y) = relu_network(bias=True), relu_data()
    share = np.abs(dense_eigenvalues(model, x, y))
    share = share[share > 0] / share.sum()
    exact = np.exp(-(share * np.log(share)).sum())
    value, error = HessianRank(steps=60, probes=24)(model, (x, y), seed=0)
    assert 0 < error < 0.1 * exact
    assert abs(value - exact) < 4 * error


def test_it_does_not_depend_on_the_scale_of_the_loss_and_repeats_with_the_seed():
    model, (x, _) = relu_network(bias=True), relu_data()
    linear = nn.Linear(6, 3).double()
    data = x, torch.zeros(len(x)).long()
    first = HessianRank()(linear, data, seed=1)
    assert first == HessianRank()(linear, data, seed=1)
    assert first != HessianRank()(linear, data, seed=2)
    assert dataclasses.asdict(HessianRank())["name"] == "hessian_rank"
    assert HessianRank(steps=1000)(model, data, seed=0).value > 1  # more steps than dimensions


def test_a_flat_loss_has_no_rank():
    model = nn.Linear(2, 2, bias=False)
    with pytest.raises(ModelError, match="Hessian is zero"):
        HessianRank()(model, (torch.zeros(3, 2), torch.tensor([0, 1, 0])), seed=0)
