"""Thresholds of optimizers: torch's own steps on a quadratic stay below them and diverge above."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.tracking.stability import edge, preconditions

SIZE = 6
STILL = 1 - 2**-53  # with this decay a second moment stays as it was set
RATES = (0.3, 0.03)


def quadratic():
    """A symmetric positive definite matrix, in no way aligned with the axes."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(SIZE, dtype=torch.float64)


class Plain:
    """A dense matrix as an operator."""

    def __init__(self, matrix):
        self.dense, self.shape = matrix, tuple(matrix.shape)
        self.dtype, self.device = matrix.dtype, matrix.device

    def matmat(self, vectors):
        return self.dense @ vectors


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(k, generator=generator, dtype=torch.float64))
        for k in (2, SIZE - 2)
    ]


def prepared(build, *, of_groups=False):
    """An optimizer of two tensors, whose second moments are set and stay."""
    both = parameters()
    if of_groups:
        groups = [{"params": [p], "lr": rate} for p, rate in zip(both, RATES, strict=True)]
        groups[0]["weight_decay"] = 0.05
        optimizer = build(groups)
    else:
        optimizer = build(both)
    generator = torch.Generator().manual_seed(2)
    for p in both:
        moment = 0.1 + torch.rand(p.shape, generator=generator, dtype=torch.float64)
        state = optimizer.state[p]
        if "betas" in optimizer.param_groups[0]:
            state["step"] = torch.tensor(1e18, dtype=torch.float64)  # corrections are over
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), moment
            state["max_exp_avg_sq"] = 1.7 * moment
        elif "alpha" in optimizer.param_groups[0]:
            state["step"] = torch.tensor(100.0)
            state["square_avg"], state["momentum_buffer"] = moment, torch.zeros_like(p)
            state["grad_avg"] = 0.2 * torch.ones_like(p)
    return both, optimizer


def grown(build, factor, **how):
    """How much 300 steps change the weights at λmax = factor · threshold; 1000 ends it."""
    both, optimizer = prepared(build, **how)
    named = {str(i): p for i, p in enumerate(both)}
    hessian = quadratic()
    found = edge(optimizer, named, lambda: 1.0)
    one = torch.eye(SIZE, dtype=torch.float64)
    flat, whole = (found.matrix(Plain(scale * hessian)).matmat(one) for scale in (0.0, 1.0))

    def top(scale):
        matrix = flat + scale * (whole - flat)
        return float(torch.linalg.eigvalsh(matrix)[-1]) / found.threshold

    low, high = 1e-2, 1e4  # the scale of the Hessian that puts λmax there
    for _ in range(45):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if top(middle) < factor else (low, middle)
    hessian = low * hessian
    before = torch.cat(both).detach().norm()
    for _ in range(300):
        w = torch.cat([p.detach() for p in both])
        for p, g in zip(both, torch.split(hessian @ w, [len(p) for p in both]), strict=True):
            p.grad = g.clone()
        optimizer.step()
        change = float(torch.cat(both).detach().norm() / before)
        if change > 1000:
            break
    return change


sgd, adam, rms = torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop
OPTIMIZERS = {
    "sgd": lambda p: sgd(p, lr=0.1),
    "momentum": lambda p: sgd(p, lr=0.1, momentum=0.9),
    "small momentum": lambda p: sgd(p, lr=0.1, momentum=0.3),
    "nesterov": lambda p: sgd(p, lr=0.1, momentum=0.9, nesterov=True),
    "dampening": lambda p: sgd(p, lr=0.1, momentum=0.8, dampening=0.5),
    "dampening alone": lambda p: sgd(p, lr=0.1, dampening=0.5),
    "decay": lambda p: sgd(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "decay, nesterov": lambda p: sgd(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=3.0),
    "adam": lambda p: adam(p, lr=0.01, betas=(0.9, STILL)),
    "adam, eps": lambda p: adam(p, lr=0.01, betas=(0.7, STILL), eps=0.5),
    "adam, decay": lambda p: adam(p, lr=0.01, betas=(0.9, STILL), weight_decay=20.0),
    "amsgrad": lambda p: adam(p, lr=0.01, betas=(0.9, STILL), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, STILL), weight_decay=20.0),
    "rmsprop": lambda p: rms(p, lr=0.01, alpha=STILL),
    "rmsprop, momentum": lambda p: rms(p, lr=0.01, alpha=STILL, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("of_groups", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_stay_below_the_threshold_and_diverge_above(kind, of_groups):
    """Within 2 %: along the top eigenvector, 300 steps then shrink or grow it by e³ or more."""
    assert grown(OPTIMIZERS[kind], 0.98, of_groups=of_groups) < 0.5
    assert grown(OPTIMIZERS[kind], 1.02, of_groups=of_groups) > 1000


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_sam_hovers_where_its_threshold_is_the_curvature(decay):
    """On ½ λ w², SAM ends in jumps between ±w, where |g| is such that the formula gives λ."""
    curvature = 12.0
    w = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = sk.SAM([w], sgd, rho=0.05, lr=0.1, momentum=0.3, weight_decay=decay)
    norms = []
    for _ in range(700):

        def closure():
            loss = (0.5 * curvature * w.square()).sum()
            loss.backward()
            return loss

        norms.append(curvature * float(w.detach().abs()))
        optimizer.step(closure)
    assert norms[-1] == pytest.approx(norms[-2], rel=1e-9)
    assert float(w.detach()) != 0
    found = edge(optimizer, {"w": w}, lambda: norms[-1])
    assert found.threshold == pytest.approx(curvature, rel=1e-9)


def test_the_thresholds_of_the_papers():
    w = [nn.Parameter(torch.ones(1))]

    def threshold(optimizer):
        for p in w:
            optimizer.state[p] |= {"step": torch.tensor(3.0), "exp_avg_sq": torch.ones(1)}
        return edge(optimizer, {"w": w[0]}, lambda: 1.0).threshold

    assert threshold(sgd(w, lr=0.5)) == 4
    assert threshold(sgd(w, lr=0.5, momentum=0.9)) == pytest.approx(7.6)
    assert threshold(adam(w, lr=0.001)) == pytest.approx(38_000)
    assert threshold(sgd(w, lr=torch.tensor(0.5))) == 4


def test_before_its_first_step_adam_has_no_threshold():
    w = nn.Parameter(torch.ones(1))
    assert edge(adam([w]), {"w": w}, lambda: 1.0) is None


def test_a_learning_rate_of_zero_bounds_nothing():
    both, optimizer = prepared(OPTIMIZERS["momentum"], of_groups=True)
    named = {str(i): p for i, p in enumerate(both)}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert math.isinf(edge(optimizer, named, lambda: 1.0).threshold)
    optimizer.param_groups[1]["lr"] = 0.1
    found = edge(optimizer, named, lambda: 1.0)
    assert found.threshold == pytest.approx(38.0)
    assert found.scale.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]  # the first tensor stands still


def groups_of_momentum(p):
    return sgd([{"params": [p], "momentum": 0.5}, {"params": [nn.Parameter(torch.ones(1))]}], lr=1)


REFUSED = {
    "threshold of Adagrad is not known": lambda p: torch.optim.Adagrad([p]),
    "maximize=True": lambda p: sgd([p], lr=0.1, maximize=True),
    "different momentum": groups_of_momentum,
    "threshold of SAM is known": lambda p: sk.SAM([p], adam, lr=0.1),
    "adaptive=False": lambda p: sk.SAM([p], sgd, lr=0.1, adaptive=True),
    "dampening is 1.0": lambda p: sgd([p], lr=0.1, momentum=0.9, dampening=1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_known_threshold_is_refused_with_a_way_out(message):
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ArgumentError, match=rf'{message}.*measure "lambda_max"'):
        edge(REFUSED[message](w), {"w": w}, lambda: 1.0)


def test_a_subclass_may_step_otherwise():
    class Mine(sgd):
        pass

    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ArgumentError, match="threshold of Mine is not known"):
        edge(Mine([w], lr=0.1), {"w": w}, lambda: 1.0)


def test_m_sam_has_no_known_threshold():
    model = nn.Linear(3, 2)
    optimizer = sk.SAM(model.parameters(), sgd, lr=0.1)
    batch = torch.randn(8, 3), torch.arange(8) % 2
    named = dict(model.named_parameters())
    optimizer.step_batch(model, *batch, m=8)
    assert edge(optimizer, named, lambda: 1.0).threshold < 20
    optimizer.step_batch(model, *batch, m=4)
    with pytest.raises(ArgumentError, match=r"no m"):
        edge(optimizer, named, lambda: 1.0)


def test_which_optimizers_precondition():
    both = parameters()
    groups = [{"params": [p]} for p in both]
    assert not preconditions(sgd(both, lr=0.1))
    assert not preconditions(sk.SAM(both, sgd, lr=0.1))
    assert preconditions(sgd(groups, lr=0.1)) and preconditions(adam(both))
