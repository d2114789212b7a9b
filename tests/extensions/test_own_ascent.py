"""Rules of the inner maximum from outside the package, beside plain loops in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sharpkit import MSharpness, m_sharpness
from sharpkit.errors import ArgumentError
from sharpkit.groupwise.geometry import Tensors, expand
from sharpkit.sharpness import ASCENT_RULES, AscentRule, Ball, one_step_along

# ---- the rules of one's own -----------------------------------------------------------------


def frank_wolfe(ball: Ball, rho: float) -> Tensor:
    """u ← u + 2 / (t + 2) (ρ d(u) − u), d the steepest direction: no projection, so any p."""
    u = {name: torch.zeros_like(t) for name, t in ball.gradient().items()}
    direction, best = ball.first, torch.zeros_like(ball.base)
    for t in range(ball.steps):
        share = 2 / (t + 2)
        far = direction.times(rho)
        u = {name: (1 - share) * a + share * far[name] for name, a in u.items()}
        direction, increase = ball.slope(u)
        best = torch.maximum(best, increase)
    return best


def by_layer(gradient: Tensors, weights: Tensors) -> Tensors:
    """Every parameter takes its own steepest direction, with 1 / √parameters of the radius."""
    share = len(weights) ** -0.5
    return {
        name: g * expand(share / g.reshape(len(g), -1).norm(dim=1), g)
        for name, g in gradient.items()
    }


# ---- and what they are compared with --------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 300),
        nn.Tanh(), nn.Linear(300, 5),
    ).double()  # fmt: skip
    nn.init.normal_(model[1].bias)  # a layer of zeros has no direction in units of |w|
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(13, 1, 6, 6).double(), torch.randint(5, (13,))


def at(model: nn.Module, u: list[Tensor], adaptive: bool) -> nn.Module:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, t in zip(moved.parameters(), u, strict=True):
            p += t * p.abs() if adaptive else t
    return moved


def slope(model: nn.Module, u: list[Tensor], x: Tensor, y: Tensor, adaptive: bool) -> list[Tensor]:
    moved = at(model, u, adaptive)
    found = torch.autograd.grad(cross_entropy(moved(x), y), list(moved.parameters()))
    weights = list(model.parameters())
    return [g * p.abs() if adaptive else g for g, p in zip(found, weights, strict=True)]


def plain_frank_wolfe(model, x, y, rho, steps, norm, adaptive):
    u = [torch.zeros_like(p) for p in model.parameters()]
    values = [cross_entropy(model(x), y)]
    for t in range(steps):
        g = slope(model, u, x, y, adaptive)
        length = torch.cat([a.flatten() for a in g]).norm()
        d = [a.sign() if norm == math.inf else a / length for a in g]
        u = [a + 2 / (t + 2) * (rho * b - a) for a, b in zip(u, d, strict=True)]
        values.append(cross_entropy(at(model, u, adaptive)(x), y))
    return (max(values) - values[0]).item()


def plain_by_layer(model, x, y, rho, adaptive):
    g = slope(model, [torch.zeros_like(p) for p in model.parameters()], x, y, adaptive)
    u = [rho * a / a.norm() / math.sqrt(len(g)) for a in g]
    return (cross_entropy(at(model, u, adaptive)(x), y) - cross_entropy(model(x), y)).item()


def in_groups(plain, m: int) -> list[float]:
    model, (x, y) = network().eval(), batch()
    return [plain(model, a, b) for a, b in zip(x.split(m), y.split(m), strict=True)]


# groups side by side, several sizes in one sweep, groups that span chunks, groups alone
@pytest.mark.parametrize("how", [{}, {"engine": "loop"}, {"chunk": 4}])
@pytest.mark.parametrize(("norm", "adaptive"), [(2.0, False), (2.0, True), (math.inf, False)])
def test_a_function_is_a_rule(how, norm, adaptive):
    rhos = [0.1, 0.7] if norm == 2.0 else [0.001, 0.01]
    found = m_sharpness(
        network(), batch(), m=[1, 4, 13], rho=rhos, ascent=frank_wolfe, steps=3, norm=norm,
        adaptive=adaptive, seed=None, progress=False, **how,
    )  # fmt: skip
    for (m, rho), values in found.group_values.items():
        plain = in_groups(lambda *a, r=rho: plain_frank_wolfe(*a, r, 3, norm, adaptive), m)
        assert values.tolist() == pytest.approx(plain, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("how", [{}, {"engine": "loop"}, {"chunk": 4}])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_direction_is_a_rule_and_sees_parameters_as_they_are(how, adaptive):
    found = m_sharpness(
        network(), batch(), m=[1, 4], rho=[0.1, 0.7], ascent=one_step_along(by_layer),
        adaptive=adaptive, seed=None, progress=False, **how,
    )  # fmt: skip
    for (m, rho), values in found.group_values.items():
        plain = in_groups(lambda *a, r=rho: plain_by_layer(*a, r, adaptive), m)
        assert values.tolist() == pytest.approx(plain, rel=1e-9, abs=1e-12)


def test_a_rule_in_the_table_goes_by_its_name(monkeypatch):
    monkeypatch.setitem(ASCENT_RULES, "by_layer", one_step_along(by_layer))
    options = {"m": 6, "rho": 0.1, "progress": False}
    named = m_sharpness(network(), batch(), ascent="by_layer", **options)
    assert named.value == m_sharpness(network(), batch(), ascent=by_layer_rule(), **options).value
    assert MSharpness(m=6, rho=0.1, ascent="by_layer").name == "m_sharpness_by_layer"


def by_layer_rule() -> AscentRule:
    return one_step_along(by_layer)


def test_a_measure_takes_a_rule_and_notes_which():
    measure = MSharpness(m=6, rho=0.1, ascent=frank_wolfe, steps=3)
    assert measure.name == "m_sharpness_frank_wolfe_steps3"
    other = MSharpness(m=6, rho=0.1, ascent=one_step_along(by_layer))
    noted = [m.configuration()["ascent"] for m in (measure, other)]
    assert noted[0].startswith("frank_wolfe ")
    assert noted[0] != noted[1]
    found = measure(network(), batch(), seed=0)["m=6,rho=0.1"]
    expected = m_sharpness(network(), batch(), m=6, rho=0.1, ascent=frank_wolfe, steps=3)
    assert found.value == expected.value


def test_what_is_no_rule_is_refused_with_those_there_are():
    with pytest.raises(ArgumentError, match='"one_step", "pgd", "apgd"'):
        m_sharpness(network(), batch(), m=2, rho=0.1, ascent=3)
    with pytest.raises(ArgumentError, match="norm 2 or infinity, got 3"):
        m_sharpness(
            network(), batch(), m=2, rho=0.1, norm=3.0,
            ascent=lambda ball, rho: ball.increase(ball.random_point(rho, 1)),
        )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"gave None: expected a tensor, one per group"):
        m_sharpness(network(), batch(), m=2, rho=0.1, ascent=lambda ball, rho: None)
    with pytest.raises(ArgumentError, match=r"one for each group, \(6,\)"):
        m_sharpness(network(), batch(), m=2, rho=0.1, ascent=lambda ball, rho: ball.base.sum())
