"""What a model and a loss take from Python is told apart where it has changed, and only there."""

from __future__ import annotations

import gc
import time
from functools import partial
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.training.python_state import contents, hooked_modules, python_state

FACTOR = 2.0


class Weighted:
    def __init__(self) -> None:
        self.weights = {"first": [1.0, 2.0]}

    def __call__(self, outputs, labels):
        return outputs.mean() * self.weights["first"][0]

    def other(self, outputs, labels):
        return self(outputs, labels)


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.BatchNorm1d(4))
    model.mask = torch.ones(3)
    model.settings = {"depth": [1, {"width": 2}]}
    model.parent = [model]
    model[0].forward = MethodType(lambda self, x: F.linear(x, self.weight, self.bias), model[0])
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[1], "negative_slope", 0.2),
        lambda model: setattr(model, "mask", torch.ones(3)),
        lambda model: model.settings["depth"][1].update(width=3),
        lambda model: setattr(model, "new", True),
        lambda model: setattr(model[2], "eps", 1e-3),
        lambda model: model.add_module("more", nn.ReLU()),
        lambda model: model[2].register_buffer("running_mean", torch.zeros(4).double()),
        lambda model: model[0].requires_grad_(False),
    ],
)
def test_a_model(change):
    model = network()
    before = python_state(model, "mse")
    assert python_state(model, "mse") == before and isinstance(hash(before), int)
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[2].running_mean = model[2].running_mean + 1.0
    assert python_state(model, "mse") == before  # values are looked at in every call of code
    change(model)
    assert python_state(model, "mse") != before


def test_a_loss(monkeypatch):
    model, weighted, smooth = network(), Weighted(), nn.CrossEntropyLoss(torch.ones(3))
    scale = [1.0]

    def enclosing(outputs, labels, *, power=1.0):
        return scale[0] * FACTOR * outputs.mean() ** power

    losses = [
        enclosing, partial(enclosing, power=2.0), weighted, weighted.other, smooth,
        partial(lambda module, f, y: module(f, y), smooth),
    ]  # fmt: skip

    def states():
        return [python_state(model, loss) for loss in losses]

    def changed():
        nonlocal before
        now = states()
        found = [a != b for a, b in zip(now, before, strict=True)]
        before = now
        return found

    before = states()
    assert changed() == [False] * 6
    scale[0] = 2.0
    assert changed() == [True, True, False, False, False, False]
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert changed() == [True, True, False, False, False, False]
    weighted.weights["first"][0] = 5.0
    assert changed() == [False, False, True, True, False, False]
    smooth.label_smoothing = 0.1
    assert changed() == [False, False, False, False, True, True]
    smooth.weight = torch.ones(3)
    assert changed() == [False, False, False, False, True, True]


def test_a_variable_without_a_value():
    def outer():
        def loss(outputs, labels):
            return later

        state = python_state(nn.Identity(), loss)
        later = 1.0
        return state, loss

    state, loss = outer()
    assert python_state(nn.Identity(), loss) != state


def test_hooks_are_found():
    model = network()
    assert hooked_modules(model) == []
    with torch.no_grad():
        handle = model[1].register_forward_pre_hook(lambda *_: None)
        assert hooked_modules(model) == ["1"]
        assert hooked_modules(model, [model[1]]) == []
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert hooked_modules(model) == ["every module"]
        handle.remove()
    assert hooked_modules(model) == []


def test_what_has_no_bytes_is_left_out():
    model = nn.Identity()
    model.function, model.number = lambda x: x, 1
    assert set(contents(model)) == {("", "number")}


def test_it_takes_little_beside_a_step():
    model = sk.build_architecture("resnet20", (3, 32, 32), 10, seed=0)
    began = time.process_time()
    for _ in range(20):
        python_state(model, F.cross_entropy)
    assert time.process_time() - began < 20 * 0.01  # a step takes over 0.2 s


def test_an_optimizer_that_is_dropped_in_the_middle_of_a_step_leaves_no_hook():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer = sk.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.first_step()
    assert hooked_modules(model) == ["every module"]
    del optimizer
    gc.collect()
    assert hooked_modules(model) == []
