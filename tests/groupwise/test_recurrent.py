"""Recurrent layers and cells of many groups as one batch, beside plain loops over the groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import resolve_loss
from sharpkit.groupwise.batch_passes import BatchPasses, batch_passes
from sharpkit.groupwise.survey import survey
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Tensors

GROUPS, SIZE, STEPS, IN, HIDDEN, CLASSES = 3, 2, 5, 4, 6, 3
# float64: sums of at most a few hundred products of numbers near 1, in another order
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


class Sequence(nn.Module):
    """A recurrent layer and a linear one that sees all outputs and the last states.

    Args:
        layer: Of torch.
        inside: Its inputs.
        starts: States before the first step are given, from the inputs.
    """

    def __init__(self, layer: nn.RNNBase, inside: int = IN, starts: bool = False) -> None:
        super().__init__()
        self.layer = layer
        ways = 2 if layer.bidirectional else 1
        self.states = ways * layer.num_layers
        self.head = nn.Linear(2 * ways * layer.hidden_size, CLASSES)
        self.start = nn.Linear(inside, layer.hidden_size) if starts else None

    def forward(self, x: Tensor) -> Tensor:
        steps = x if self.layer.batch_first else x.transpose(0, 1)
        first: Any = None
        if self.start is not None:
            own = torch.stack([(k + 1) * self.start(x[:, 0]) for k in range(self.states)])
            first = (own, own.sin()) if isinstance(self.layer, nn.LSTM) else own
        out, last = self.layer(steps, first)
        mean = out.square().mean(1 if self.layer.batch_first else 0)
        ends = last[0] + last[1] if isinstance(last, tuple) else last
        ways = out.shape[2] // self.layer.hidden_size
        seen = torch.cat(list(ends[-ways:]), 1)
        return self.head(torch.cat([mean, seen], 1))


class Steps(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        total = x.new_zeros(())
        for step in x.unbind(1):
            state = self.cell(step, state)
            total = total + (state[0] if isinstance(state, tuple) else state)
        return self.head(total)


class Tied(nn.Module):
    """A layer that is called twice, whose matrices a linear layer uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.head.weight = self.layer.weight_hh_l0
        self.end = nn.Linear(3 * HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        seen, state = self.layer(x)
        again, _ = self.layer(seen, state)
        return self.end(self.head(again).mean(1))


def _sequence(make: Callable[..., nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    starts = options.pop("starts", False)
    return lambda: Sequence(make(IN, HIDDEN, **options), starts=starts)


CASES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": _sequence(nn.LSTM, batch_first=True),
    "LSTM, steps first": _sequence(nn.LSTM),
    "LSTM, both ways, two layers": _sequence(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM, given states": _sequence(
        nn.LSTM, num_layers=2, bidirectional=True, batch_first=True, starts=True
    ),
    "LSTM without bias": _sequence(nn.LSTM, bias=False, batch_first=True),
    "GRU": _sequence(nn.GRU, batch_first=True),
    "GRU, both ways, two layers": _sequence(
        nn.GRU, num_layers=2, bidirectional=True, batch_first=True
    ),
    "GRU, given states": _sequence(nn.GRU, bidirectional=True, starts=True),
    "GRU without bias": _sequence(nn.GRU, bias=False, batch_first=True),
    "RNN": _sequence(nn.RNN, batch_first=True),
    "RNN, both ways, two layers, given states": _sequence(
        nn.RNN, num_layers=2, bidirectional=True, starts=True
    ),
    "RNN with relu": _sequence(nn.RNN, nonlinearity="relu", bidirectional=True, batch_first=True),
    "RNN without bias": _sequence(nn.RNN, bias=False, batch_first=True),
    "LSTMCell": lambda: Steps(nn.LSTMCell(IN, HIDDEN)),
    "GRUCell": lambda: Steps(nn.GRUCell(IN, HIDDEN)),
    "GRUCell without bias": lambda: Steps(nn.GRUCell(IN, HIDDEN, bias=False)),
    "RNNCell": lambda: Steps(nn.RNNCell(IN, HIDDEN)),
    "RNNCell with relu": lambda: Steps(nn.RNNCell(IN, HIDDEN, nonlinearity="relu")),
    "LSTM, one step": lambda: OneStep(nn.LSTM(IN, HIDDEN, batch_first=True)),
}


class OneStep(nn.Module):
    """A layer that gets one step at a time."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, x
        for step in x.split(1, 1):
            out, state = self.layer(step, state)
        return self.head(out[:, 0])


def examples_of(model: nn.Module) -> Examples:
    """As many as all groups have."""
    torch.manual_seed(1)
    width = HIDDEN if isinstance(model, Tied) else IN
    x = torch.randn(GROUPS * SIZE, STEPS, width, dtype=torch.float64)
    return Examples(x, torch.arange(GROUPS * SIZE) % CLASSES)


def passes_of(model: nn.Module) -> BatchPasses:
    """Passes over groups as one batch."""
    f = FunctionalModel(model)
    weights = {name: f.value(name) for name in f.names}
    return batch_passes(
        f, resolve_loss("cross_entropy"), weights, survey(f, weights, examples_of(model))
    )


def made(name: str) -> nn.Module:
    """A network with weights of both signs, in float64 and eval mode."""
    torch.manual_seed(0)
    return (Tied() if name == "tied" else CASES[name]()).double().eval()


def moved(weights: Tensors) -> Tensors:
    """Weights of every group's own, (groups, *shape)."""
    torch.manual_seed(2)
    return {
        name: w + 0.1 * torch.randn(GROUPS, *w.shape, dtype=w.dtype) for name, w in weights.items()
    }


def plain(model: nn.Module, weights: Tensors | None = None) -> tuple[Tensor, Tensors]:
    """Losses and gradients by autograd, one group after the other, with the values in place."""
    examples = examples_of(model)
    own = dict(model.named_parameters())
    losses, found = [], []
    before = {name: p.detach().clone() for name, p in own.items()}
    for k in range(GROUPS):
        part = examples.slice(k * SIZE, (k + 1) * SIZE)
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(before[name] if weights is None else weights[name][k])
        loss = cross_entropy(model(part.inputs), part.labels)
        losses.append(loss.detach())
        found.append(torch.autograd.grad(loss, list(own.values())))
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(before[name])
    grads = {name: torch.stack([g[i] for g in found]) for i, name in enumerate(own)}
    return torch.stack(losses), grads


def check_gradients(passes: BatchPasses, found: Any, expected: Tensors) -> None:
    """Per group, up to the power of two in which they are found, factors multiplied out."""
    tensors = passes.packing.parts(found.packs)
    tensors |= {name: d.mT @ a for name, (a, d) in found.factors.items()}
    assert tensors.keys() == expected.keys()
    for name, g in expected.items():
        scale = torch.exp2(-found.terms.exponent).view(-1, *[1] * (g.ndim - 1))
        torch.testing.assert_close(tensors[name] * scale, g, **TIGHT)


@pytest.mark.parametrize("name", [*CASES, "tied"])
def test_gradients_of_groups_are_those_of_plain_loops(name: str) -> None:
    model = made(name)
    passes = passes_of(model)
    losses, expected = plain(model)
    found = passes.gradients(examples_of(model), GROUPS)
    torch.testing.assert_close(found.terms.mean, losses, **TIGHT)
    check_gradients(passes, found, expected)


@pytest.mark.parametrize("name", [*CASES, "tied"])
def test_factors_are_the_same_gradients(name: str) -> None:
    model = made(name)
    passes = passes_of(model)
    matrices = frozenset(
        n for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("start")
    )
    passes.__init__(passes.model, passes.loss, passes.weights, dict.fromkeys(matrices, 1))
    found = passes.gradients(examples_of(model), GROUPS, matrices)
    assert found.factors.keys() == matrices
    check_gradients(passes, found, plain(model)[1])


@pytest.mark.parametrize("name", [*CASES, "tied"])
def test_losses_and_gradients_at_weights_of_each_groups_own(name: str) -> None:
    model = made(name)
    passes = passes_of(model)
    at = moved(passes.weights)
    losses, expected = plain(model, at)
    packs = passes.packing.joined(at)
    found, _ = passes.losses(examples_of(model), GROUPS, packs)
    torch.testing.assert_close(found, losses, **TIGHT)
    found_there = passes.gradients(examples_of(model), GROUPS, at=packs)
    torch.testing.assert_close(found_there.terms.mean, losses, **TIGHT)
    check_gradients(passes, found_there, expected)


@pytest.mark.parametrize("name", CASES)
def test_losses_at_thin_perturbations(name: str) -> None:
    model = made(name)
    passes = passes_of(model)
    at = moved(passes.weights)
    thin = {
        n: (torch.randn(GROUPS, 3, w.shape[1]).double(), 0.1 * torch.randn(GROUPS, 3, len(w)).double())
        for n, w in passes.weights.items()
        if w.ndim == 2 and not n.startswith("start")
    }
    passes.__init__(passes.model, passes.loss, passes.weights, dict.fromkeys(thin, 1))
    at |= {n: passes.weights[n] + d.mT @ a for n, (a, d) in thin.items()}
    packs = passes.packing.joined({n: w for n, w in at.items() if n not in thin})
    found, _ = passes.losses(examples_of(model), GROUPS, packs, thin)
    torch.testing.assert_close(found, plain(model, at)[0], **TIGHT)


def test_one_gradient_for_the_sum_of_all_groups() -> None:
    model = made("GRU, both ways, two layers")
    passes = passes_of(model)
"""TODO"""
