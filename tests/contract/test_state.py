"""What a module consists of besides its code, compared with what it was."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import sharpkit
from sharpkit.contract.state import Found, differing, parts_of
from sharpkit.errors import ModelError

KINDS = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]


def tensor(rng: random.Random) -> Tensor:
    kind, shape = rng.choice(KINDS), rng.choice([(), (0,), (3,), (2, 4), (2**20 + 5,)])
    made = (torch.randn(shape) * 3).to(kind)
    if made.is_floating_point() and made.numel() and rng.random() < 0.3:
        made.view(-1)[0] = float(rng.choice(["nan", "inf", "-inf"]))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_differing_finds_what_a_look_at_every_pair_finds(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pairs = []
    for _ in range(12):
        a = tensor(rng)
        b = a.clone()
        if a.numel() and rng.random() < 0.3:
            b.view(-1)[-1] = ~b.view(-1)[-1] if a.dtype == torch.bool else b.view(-1)[-1] + 1
        pairs.append((a, tensor(rng) if rng.random() < 0.1 else b))
    alone = [
        i
        for i, (a, b) in enumerate(pairs)
        if a.shape != b.shape
        or a.dtype != b.dtype
        or not torch.all((a == b) | ((a != a) & (b != b)))
    ]
    assert differing(pairs) == alone


def test_a_model_is_put_back_as_it_was_found() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[1].running_mean[0] = torch.nan
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = Found(model)
    assert found.changed_parameters() == []
    with torch.no_grad():
        model[0].weight[1, 1] += 1
        model[1].running_var[2] = 5.0
        model[1].running_mean[0] = 0.0
    assert found.changed_parameters() == ["0.weight"]
    found.restore()
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_a_sparse_buffer_is_measured_as_a_dense_one(layout: str) -> None:
    """A graph's adjacency, as the buffer of a network, beside the same numbers in full."""
    torch.manual_seed(0)
    matrix = torch.eye(5) + torch.diag(torch.full((4,), 0.5), 1)
    sparse = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr, "csc": Tensor.to_sparse_csc}

    class Graph(nn.Module):
        def __init__(self, adjacency: Tensor) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)
            self.register_buffer("adjacency", adjacency)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.adjacency @ x.T).T)

    graph, plain = Graph(sparse[layout](matrix)), Graph(matrix)
    plain.head.load_state_dict(graph.head.state_dict())
    data = torch.randn(48, 5), torch.arange(48) % 3
    for m in (1, 16):
        a, b = (sharpkit.m_sharpness(g, data, m=m, rho=0.1, progress=False) for g in (graph, plain))
        assert a.value == pytest.approx(b.value, rel=1e-4)
    with torch.no_grad():
        parts_of(graph.adjacency)[-1][0] = torch.inf
    with pytest.raises(ModelError, match="adjacency"):
        sharpkit.m_sharpness(graph, data, m=16, rho=0.1, progress=False)
