"""What a device is given to do by m-sharpness, and how often it is waited for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from dispatch import VIEWS, Calls, counted
from networks import NETWORKS

from sharpkit.contract.losses import resolve_loss
from sharpkit.sharpness import sweep
from sharpkit.sharpness.m_sharpness import m_sharpness

LOSS = resolve_loss("cross_entropy")


def without_views(calls: Calls) -> int:
    """Calls that have work to do: a view touches no number."""
    return sum(count for name, count in calls.by_name.items() if name not in VIEWS)


def measure(model: nn.Module, x, y, **options) -> None:
    m_sharpness(model, (x, y), rho=0.05, seed=None, progress=False, chunk=32, **options)


@pytest.mark.parametrize(("name", "most"), [("CNN 0.47 M", 2.5), ("ResNet-20", 3.5)])
def test_a_chunk_takes_few_calls_more_than_a_gradient_and_a_forward_pass(name, most, monkeypatch):
    model, x, y = NETWORKS[name].case(64, "cpu")
    parameters = list(model.parameters())

    def plain() -> None:
        torch.autograd.grad(LOSS(model(x[:32]), y[:32]), parameters)
        with torch.no_grad():
            LOSS(model(x[:32]), y[:32])

    found = []
    chunk = sweep.Sweep._chunk

    def watched(self, start, stop):
        found.append(counted(lambda: chunk(self, start, stop)))

    monkeypatch.setattr(sweep.Sweep, "_chunk", watched)
    measure(model, x, y, m=1)
    ratio = without_views(found[-1]) / without_views(counted(plain))
    assert ratio <= most


@pytest.mark.parametrize("m", [1, 16, [1, 4]])
@pytest.mark.parametrize("name", ["CNN 0.47 M", "LSTM"])
def test_the_host_waits_as_often_for_few_examples_as_for_many(name, m):
    model, x, y = NETWORKS[name].case(256, "cpu")
    waits = [
        counted(lambda n=n: measure(model, x[:n], y[:n], m=m)).synchronising.total()
        for n in (64, 256)
    ]
    assert waits[0] == waits[1]


@pytest.mark.parametrize("m", [1, 64])
def test_the_host_waits_as_often_for_many_parameters_as_for_few(m):
    def deep(layers: int) -> nn.Module:
        blocks = [
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(layers)
        ]
        return nn.Sequential(*blocks, nn.Linear(8, 3))

    x, y = torch.randn(128, 8), torch.arange(128) % 3
    waits = [
        counted(lambda n=n: measure(deep(n), x, y, m=m)).synchronising.total() for n in (2, 12)
    ]
    assert waits[0] == waits[1] <= 20
