"""Groups alone, by weights that move in place, beside a plain loop in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpkit
from sharpkit.errors import ModelError
from sharpkit.sharpness.sweep import Care, Sweep

measured = partial(sharpkit.m_sharpness, engine="loop", seed=None, progress=False)


class Shared(nn.Module):
    """A layer used twice, a sparse embedding, an unused parameter and one of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, sparse=True)
        self.back = nn.Linear(6, 11, bias=False)
        self.mix = nn.Linear(6, 6)
        self.spare, self.gain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.tanh(self.mix(self.mix(self.embed(x).mean(1))))) * self.gain


def images() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False),
        nn.Flatten(), nn.Linear(3 * 16, 300), nn.ReLU(), nn.Linear(300, 250), nn.Linear(250, 5),
    )  # fmt: skip
    return model, torch.randn(150, 1, 8, 8), torch.randint(5, (150,))


def words() -> tuple[nn.Module, Tensor, Tensor]:
    return Shared(), torch.randint(11, (150, 4)), torch.randint(11, (150,))


def loop(
    model: nn.Module, x: Tensor, y: Tensor, m: int, rho: float, *, adaptive: bool
) -> list[float]:
    """Increases of groups; every weight is moved as it stands in the definition."""
    weights = list(model.parameters())
    home = [p.detach().clone() for p in weights]
    found = []
    for xs, ys in zip(x.split(m), y.split(m), strict=True):
        before = cross_entropy(model(xs), ys)
        slopes = torch.autograd.grad(before, weights, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(weights, slopes, strict=True)
        ]
        scale = [p.abs() if adaptive else torch.ones_like(p) for p in home]
        length = math.sqrt(
            sum(float((g * t).square().sum()) for g, t in zip(dense, scale, strict=True))
        )
        with torch.no_grad():
            for p, g, t in zip(weights, dense, scale, strict=True):
                p += rho / length * g * t * t
            found.append(float(cross_entropy(model(xs), ys) - before))
            for p, w in zip(weights, home, strict=True):
                p.copy_(w)
    return found


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("make", [images, words])
@pytest.mark.parametrize("m", [64, 150])
def test_groups_alone_equal_a_plain_loop(
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]], m: int, adaptive: bool
) -> None:
    """In float64 to 1e-10 relative; the last group is smaller, and larger ones take batches."""
    torch.manual_seed(0)
    model, x, y = make()
    model.double().eval()
    x = x.double() if x.is_floating_point() else x
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.warns(UserWarning, match="spare") if make is words else _nothing():
        found = measured(
            model, (x, y), m=m, rho=(0.02, 0.1), adaptive=adaptive,
            chunk=48,
        )  # fmt: skip
    for rho in (0.02, 0.1):
        expected = loop(model, x, y, m, rho, adaptive=adaptive)
        assert found.group_values[m, rho].tolist() == pytest.approx(expected, rel=1e-10)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def _nothing() -> pytest.MonkeyPatch.context:
    return pytest.MonkeyPatch.context()


@pytest.mark.parametrize(("gain", "care"), [(0.0, Care.NONE), (26.0, Care.SCALED)])
def test_small_gradients_are_scaled(
    gain: float, care: Care, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is certain of its answers has slopes of e^-gain; its direction is exact.

    The measure is homogeneous of degree 0 in the gradient, so the increase over e^-gain is that of
    a loop in float64, here to float32's rounding.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    x, y = torch.randn(128, 6), torch.randint(4, (128,))
    sure = Sure(model, gain)
    used: list[Care] = []
    run = Sweep.extend

    def noted(self: Sweep, *args: object) -> None:
        used.append(self.care)
        run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Sweep, "extend", noted)
    data = (torch.cat([x, y.unsqueeze(1).float()], 1), y)
    single = measured(sure, data, m=32, rho=0.05)
    assert used[-1] == care and used == sorted(used)
    exact = measured(sure.double(), data, m=32, rho=0.05)
    assert single.value == pytest.approx(exact.value, rel=1e-4)
    assert exact.value > 0


class Sure(nn.Module):
    """Adds a gain to the logit of the right class, which it is told."""

    def __init__(self, model: nn.Module, gain: float) -> None:
        super().__init__()
        self.model, self.gain = model, gain

    def forward(self, x: Tensor) -> Tensor:
        right = torch.arange(4, device=x.device) == x[:, -1:].long()
        return self.model(x[:, :-1]) + self.gain * right


def test_what_fails_in_a_group_leaves_the_weights_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(96, 3)
    with pytest.raises(ModelError, match="not finite at the perturbed weights"):
        measured(model, (x, torch.randint(2, (96,))), m=32, rho=1e30)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_groups_whose_gradient_is_zero_stay_where_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    x = torch.randn(96, 3)
    found = measured(model, (x, torch.randint(2, (96,))), m=32, rho=0.1)
    assert found.zero_gradient_groups == {32: 3}
    assert found.group_values[32, 0.1].tolist() == [0.0] * 3


def test_slopes_that_overflow_on_the_way_are_scaled() -> None:
    """Unscaled, the gradient has infinite entries on its way, and NaN at the end."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model, x, y = Steep(), torch.randn(96, 4), torch.randn(96, 3)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return 1e30 * (outputs - labels).square().sum(1).mean()

    with torch.no_grad():
        model.last.weight.mul_(1e-12)
        model.first.weight.mul_(3.0)
    found = measured(model, (x, y), m=32, rho=1e-3, loss=loss)
    model.double()
    exact = measured(model, (x.double(), y.double()), m=32, rho=1e-3, loss=loss)
    assert found.value == pytest.approx(exact.value, rel=1e-3)
