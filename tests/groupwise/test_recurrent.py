"""Recurrent layers and cells of many groups as one batch, beside plain loops over the groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import resolve_loss
from sharpkit.groupwise import recurrence
from sharpkit.groupwise.batch_passes import BatchPasses, batch_passes
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.low_rank import stand_ins
from sharpkit.groupwise.one_batch import OneBatch, Point
from sharpkit.groupwise.survey import Survey, survey

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


def examples_of(model: nn.Module) -> Examples:
    """As many as all groups have."""
    torch.manual_seed(1)
    width = HIDDEN if isinstance(model, Tied) else IN
    x = torch.randn(GROUPS * SIZE, STEPS, width, dtype=torch.float64)
    return Examples(x, torch.arange(GROUPS * SIZE) % CLASSES)


def passes_of(model: nn.Module, factored: Collection[str] = ()) -> BatchPasses:
    """Passes over groups as one batch; the gradients of some weights may stay in factors."""
    f, loss = FunctionalModel(model), resolve_loss("cross_entropy")
    weights = {name: f.value(name) for name in f.names}
    if factored:
        return BatchPasses(f, loss, weights, dict.fromkeys(factored, 1))
    return batch_passes(f, loss, weights, survey_of(model))


def survey_of(model: nn.Module) -> Survey:
    """How the model uses its weights."""
    f = FunctionalModel(model)
    return survey(f, {name: f.value(name) for name in f.names}, examples_of(model))


@contextmanager
def run_at(f: FunctionalModel, weights: Tensors, point: Point) -> Iterator[OneBatch]:
    """Inside, the model runs as one batch at a point."""
    with (
        f.assigned(stand_ins(weights)) as held,
        OneBatch(dict(zip(weights, held, strict=True)), point) as batch,
    ):
        yield batch


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
    matrices = frozenset(n for n, p in model.named_parameters() if p.ndim == 2)
    passes = passes_of(model, matrices)
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


@pytest.mark.parametrize("name", ["LSTM, given states", "GRU", "RNN"])
def test_groups_in_blocks_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "_CPU_CACHE", 1)  # one group at a time
    test_losses_and_gradients_at_weights_of_each_groups_own(name)
    test_losses_at_thin_perturbations(name)


@pytest.mark.parametrize("name", [*CASES, "tied"])
def test_losses_at_thin_perturbations(name: str) -> None:
    model = made(name)
    torch.manual_seed(3)
    thin = {
        n: (torch.randn(GROUPS, 3, p.shape[1]).double(), torch.randn(GROUPS, 3, len(p)).double())
        for n, p in model.named_parameters()
        if p.ndim == 2
    }
    passes = passes_of(model, thin)
    at = moved(passes.weights)
    at |= {n: passes.weights[n] + d.mT @ a for n, (a, d) in thin.items()}
    packs = passes.packing.joined({n: w for n, w in at.items() if n not in thin})
    found, _ = passes.losses(examples_of(model), GROUPS, packs, thin)
    torch.testing.assert_close(found, plain(model, at)[0], **TIGHT)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["LSTM, given states", "GRU, both ways, two layers", "GRUCell"])
def test_one_gradient_for_the_sum_of_all_groups(name: str, own: bool) -> None:
    model = made(name)
    f, examples = FunctionalModel(model), examples_of(model)
    weights = {n: f.value(n) for n in f.names}
    at = moved(weights) if own else None
    targets = {n: w.clone().requires_grad_() for n, w in weights.items()}
    point = Point(GROUPS, SIZE, weights if at is None else at, targets=targets)
    with run_at(f, weights, point) as batch:
        outputs = f.outputs(examples.inputs)
    loss = cross_entropy(outputs, examples.labels)
    probes = {(n, i): p for n, calls in batch.probes.items() for i, p in enumerate(calls)}
    ends = {**{n: t for n, t in targets.items() if n not in batch.probes}, **probes}
    found = dict(zip(ends, torch.autograd.grad(loss, list(ends.values())), strict=True))
    for n, g in plain(model, at)[1].items():
        if n in batch.probes:
            products = [
                found[n, i].flatten(0, 1).mT @ a.flatten(0, 1)
                for i, a in enumerate(batch.inputs[n])
            ]
            total = torch.stack(products).sum(0)
        else:
            total = found[n]
        torch.testing.assert_close(total, g.mean(0), **TIGHT)


def test_float32_is_as_near_as_float32_can_be() -> None:
    model = made("LSTM, given states")
    _, expected = plain(model)
    single = copy.deepcopy(model).float()
    f, examples = FunctionalModel(single), examples_of(model)
    passes = BatchPasses(f, resolve_loss("cross_entropy"), {n: f.value(n) for n in f.names}, {})
    found = passes.gradients(Examples(examples.inputs.float(), examples.labels), GROUPS)
    tensors = passes.packing.parts(found.packs)
    for name, g in expected.items():
        scale = torch.exp2(-found.terms.exponent).view(-1, *[1] * (g.ndim - 1))
        # sums of some ten products, relative to the largest: a few times 1e-7 each
        error = (tensors[name].double() * scale - g).abs().amax()
        assert error <= 5e-6 * g.abs().amax()


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("LSTM")])
def test_losses_in_float32_at_weights_of_each_groups_own(name: str) -> None:
    model = made(name)
    at = moved(dict(model.named_parameters()))
    single = copy.deepcopy(model).float()
    f, examples = FunctionalModel(single), examples_of(model)
    passes = BatchPasses(f, resolve_loss("cross_entropy"), {n: f.value(n) for n in f.names}, {})
    packs = passes.packing.joined({n: t.detach().float() for n, t in at.items()})
    found, _ = passes.losses(Examples(examples.inputs.float(), examples.labels), GROUPS, packs)
    # losses near 1 of some ten roundings of 6e-8 each
    torch.testing.assert_close(found, plain(model, at)[0], rtol=2e-6, atol=0)


def test_weights_that_are_not_perturbed_stay_as_they_are() -> None:
    model = made("LSTM, given states")
    f, loss = FunctionalModel(model), resolve_loss("cross_entropy")
    names = [n for n in f.names if "bias" in n or n.endswith("weight_ih_l0")]
    passes = BatchPasses(f, loss, {n: f.value(n) for n in names}, {})
    found = passes.gradients(examples_of(model), GROUPS)
    expected = plain(model)[1]
    check_gradients(passes, found, {n: expected[n] for n in names})


class Packed(nn.Module):
    """A layer over sequences of unlike lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(IN, HIDDEN, batch_first=True), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % 2 + 2
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.layer(packed)[1][0])


class FirstState(nn.Module):
    """A layer whose state before the first step is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(IN, HIDDEN, batch_first=True), nn.Linear(HIDDEN, CLASSES)
        self.first = nn.Parameter(torch.zeros(1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x, self.first.expand(1, len(x), HIDDEN).contiguous())[1][0])


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "packed": Packed,
    "a state that is a parameter": FirstState,
    "projected": lambda: Sequence(nn.LSTM(IN, HIDDEN, proj_size=2)),
    "random": lambda: Sequence(nn.LSTM(IN, HIDDEN, num_layers=2, dropout=0.5)).train(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    model = REFUSED[name]().double()
    if name == "projected":  # the head fits layers without projections
        model.head = nn.Linear(10, CLASSES).double()
        model.forward = lambda x: model.head(model.layer(x)[0].flatten(1))
    with pytest.raises(Disagreement, match="as one batch"):
        passes_of(model)


class Autocast(nn.Module):
    """A network that runs in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_autocast_is_refused(name: str) -> None:
    f = FunctionalModel(Autocast(made(name).float()))
    examples = Examples(torch.randn(4, STEPS, IN), torch.zeros(4, dtype=torch.long))
    found = survey(f, {n: f.value(n) for n in f.names}, examples)
    assert "is used by more than layers" in found.refused


@pytest.mark.parametrize("name", ["LSTM, both ways, two layers", "GRU", "RNN", "LSTMCell"])
def test_every_step_is_a_row_of_an_example(name: str) -> None:
    model = made(name)
    found = survey_of(model).rows
    for n, p in model.named_parameters():
        if p.ndim == 2 and not n.startswith("head"):
            assert found[n] == STEPS


class Text(nn.Module):
    """A classifier of texts: embedding, a GRU that reads both ways, its last states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, IN)
        self.layer = nn.GRU(IN, HIDDEN, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        _, last = self.layer(self.embedding(words))
        return self.head(torch.cat([last[0], last[1]], 1))


def increases(model: nn.Module, x: Tensor, y: Tensor, m: int, rho: float) -> Tensor:
    """Of every group's loss after a step of length rho along its gradient, in the open."""
    found = []
    own = list(model.parameters())
    for xs, ys in zip(x.split(m), y.split(m), strict=True):
        loss = cross_entropy(model(xs), ys)
        grads = torch.autograd.grad(loss, own)
        length = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        with torch.no_grad():
            for p, g in zip(own, grads, strict=True):
                p.add_(g, alpha=float(rho / length))
            found.append(cross_entropy(model(xs), ys) - loss)
            for p, g in zip(own, grads, strict=True):
                p.sub_(g, alpha=float(rho / length))
    return torch.stack(found).detach()


@pytest.mark.parametrize("kind", ["text", "cell"])
def test_m_sharpness_is_that_of_a_plain_loop(kind: str) -> None:
    torch.manual_seed(4)
    model = (Text() if kind == "text" else Steps(nn.LSTMCell(IN, HIDDEN))).double().eval()
    n, m, rho = 24, 3, 0.3
    x = torch.randint(20, (n, 7)) if kind == "text" else torch.randn(n, 7, IN).double()
    y = torch.randint(CLASSES, (n,))
    found = sharpkit.m_sharpness(
        model, (x, y), m=[1, m], rho=rho, seed=None, engine="vectorized", progress=False
    )
    for size in (1, m):
        values = torch.from_numpy(found.group_values[size, rho])
        torch.testing.assert_close(values, increases(model, x, y, size, rho), **TIGHT)


def test_projected_ascent_is_that_of_the_loop() -> None:
    torch.manual_seed(5)
    model = Text().double().eval()
    data = torch.randint(20, (16, 7)), torch.randint(CLASSES, (16,))
    side, loop = (
        sharpkit.m_sharpness(
            model, data, m=2, rho=0.3, ascent="pgd", steps=3, seed=None, engine=engine,
            progress=False,
        ).value
        for engine in ("vectorized", "loop")
    )  # fmt: skip
    assert side == pytest.approx(loop, rel=1e-9)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    model = made("GRU")
    f, x = FunctionalModel(model), examples_of(model).inputs.requires_grad_()
    weights = {n: f.value(n) for n in f.names}
    point = Point(GROUPS, SIZE, weights)
    with run_at(f, weights, point):
        out = f.outputs(x)
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
