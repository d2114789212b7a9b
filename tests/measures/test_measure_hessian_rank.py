import dataclasses
import itertools

import numpy as np
import pytest
import torch
from measure_helpers import relu_data, relu_network
from torch import nn

from sharpkit.curvature import GaussNewtonOperator
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures import HessianRank, SoftRank


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


def test_its_standard_error_is_that_of_repetitions_with_other_probes():
    """Where most eigenvalues lie near 0, the steps of Lanczos matter as well as the probes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    x = torch.randn(100, 20).double()
    y = (x @ torch.randn(20, 4).double()).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    share = np.abs(dense_eigenvalues(model, x, y))
    share = share[share > 0] / share.sum()
    exact = np.exp(-(share * np.log(share)).sum())
    found = np.array([HessianRank()(model, (x, y), seed=k) for k in range(24)])
    errors, stated = np.abs(found[:, 0] - exact), found[:, 1]
    # of 3 probes, 2 standard errors cover 82 %; 24 repetitions know that to 8 %, twice that is 16 %
    assert np.mean(errors < 2 * stated) > 0.66
    assert np.sqrt(np.mean(stated**2)) > 0.7 * np.sqrt(np.mean(errors**2))


def test_the_soft_rank_is_that_of_the_dense_gauss_newton_matrix_within_its_error():
    model, (x, y) = relu_network(bias=True), relu_data()
    matrix = GaussNewtonOperator(model, (x, y), progress=False).to_dense()
    values = torch.linalg.eigvalsh(matrix)
    for damping in (1e-1, 1e-3):
        exact = float((values / (values + damping)).sum())
        value, error = SoftRank(damping=damping, probes=24)(model, (x, y), seed=0)
        assert 0 < error < 0.2 * exact
        assert abs(value - exact) < 4 * error


def test_the_soft_rank_falls_with_the_damping_and_is_at_most_the_rank():
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 3).double(), torch.randn(40, 6).double()
    data = x, torch.arange(40) % 3
    values = [SoftRank(damping=d)(linear, data, seed=0).value for d in (1e-8, 1e-3, 1e-1, 10.0)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[0] == pytest.approx(14, rel=0.3)  # 7 features times 2 free classes
    with pytest.raises(ArgumentError, match="damping"):
        SoftRank(damping=0.0)(linear, data, seed=0)
