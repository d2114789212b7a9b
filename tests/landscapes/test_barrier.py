"""Barriers against plain loops and closed forms; the interval against a known truth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.errors import ArgumentError, DataError
from sharpkit.landscapes.band import excess_band

QUIET = {"progress": False}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def examples(n: int = 40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def between(a, b, t):
    at = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(at.parameters(), b.parameters(), strict=True):
            p.lerp_(q, t)
    return at


def permuted(model):
    """The same function with its hidden units in another order."""
    other, order = copy.deepcopy(model), torch.tensor([3, 0, 4, 1, 5, 2])
    other[0].weight.data = model[0].weight.data[order]
    other[0].bias.data = model[0].bias.data[order]
    other[2].weight.data = model[2].weight.data[:, order]
    return other


def test_the_barrier_is_that_of_a_plain_loop():
    a, (x, y) = mlp(), examples()
    optimizer = torch.optim.Adam(a.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(a(x), y).backward()
        optimizer.step()
    b = permuted(a)
    found = sk.barrier(a, b, (x, y), points=11, **QUIET)
    t = np.linspace(0, 1, 11)
    outputs = [between(a, b, float(s))(x).detach() for s in t]
    losses = np.array([F.cross_entropy(o, y).item() for o in outputs])
    errors = np.array([(o.argmax(1) != y).double().mean().item() for o in outputs])
    np.testing.assert_allclose(found.loss, losses, rtol=1e-12)
    np.testing.assert_allclose(found.accuracy, 1 - errors, rtol=1e-12)
    for curve, value in ((losses, found.value), (errors, found.error)):
        excess = curve - (1 - t) * curve[0] - t * curve[-1]
        assert value == pytest.approx(max(excess.max(), 0.0), abs=1e-12)
    assert found.at == t[(losses - (1 - t) * losses[0] - t * losses[-1]).argmax()]
    assert 0 < found.low < found.value < found.high
    assert found.error_low <= found.error <= found.error_high
    line = sk.landscape(a, (x, y), to=b, points=11, extent=(0, 1), **QUIET)
    np.testing.assert_allclose(found.std_error, line.std_error, rtol=1e-10)
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (a, b)]
    assert found.distance == pytest.approx(float((flat[0] - flat[1]).norm()))
    reverse = sk.barrier(b, a, (x, y), points=11, **QUIET)
    assert (reverse.value, reverse.at) == pytest.approx((found.value, 1 - found.at))


def test_a_convex_loss_has_no_barrier():
    """Of a linear model: the curve is below the straight line, and only its ends are on it."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    found = sk.barrier(a, b, examples(), **QUIET)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.at in (0.0, 1.0)
    assert (found.excess[1:-1] < 0).all() and (found.excess_high[1:-1] < 0).all()


def test_the_barrier_of_two_minima_in_closed_form():
    """(w² − s²)² between −s and s has its maximum s⁴ at 0, whatever the example's s."""

    class Root(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[w]], dtype=torch.float64))

        def forward(self, x):
            return x @ self.w

    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    found = sk.barrier(
        Root(-1.0), Root(1.0), (x, x[:, 0]), points=21,
        loss=lambda f, y: ((f[:, 0] ** 2 - y**2) ** 2).mean(), **QUIET,
    )  # fmt: skip
    assert (found.value, found.at) == (pytest.approx((1 + 16) / 2), 0.5)
    t = found.t
    np.testing.assert_allclose(found.excess, 8.5 * ((2 * t - 1) ** 2 - 1) ** 2, atol=1e-12)
    assert found.error is None and found.accuracy is None


def test_pairing_over_examples_makes_the_interval_short():
    """What all points have in common does not widen it."""
    generator = np.random.default_rng(0)
    t = np.linspace(0, 1, 9)
    hump = 4 * t * (1 - t)
    common = 100 * generator.standard_normal(400)
    sums = common + hump[:, None] * (1 + 0.1 * generator.standard_normal(400))
    options = {"confidence": 0.95, "resamples": 500, "seed": 0}
    band = excess_band(sums, np.ones_like(sums), t, **options)
    alone = excess_band(sums - common, np.ones_like(sums), t, **options)
    assert band.value == pytest.approx(alone.value) and band.at == 4
    np.testing.assert_allclose(band.interval, alone.interval, rtol=1e-9)
    assert 0.01 < band.interval[1] - band.interval[0] < 0.05
    np.testing.assert_array_equal(band.low[[0, -1]], [0, 0])
    assert band.bias >= 0


def test_one_example_has_no_interval_and_infinite_losses_are_told():
    a, b = mlp(), mlp(1)
    one = sk.barrier(a, b, tuple(part[:1] for part in examples()), **QUIET)
    assert np.isfinite(one.value) and np.isnan([one.low, one.high, one.bias]).all()
    t = np.linspace(0, 1, 3)
    sums = np.array([[0.0, 0.0], [np.inf, 1.0], [0.0, 0.0]])
    band = excess_band(sums, np.ones_like(sums), t, confidence=0.9, resamples=9, seed=0)
    assert band.value == np.inf and np.isnan(band.interval).all()
    sums[1, 0] = np.nan
    band = excess_band(sums, np.ones_like(sums), t, confidence=0.9, resamples=9, seed=0)
    assert np.isnan(band.value)


def test_the_same_seed_gives_the_same_interval_and_the_models_stay():
    a, b, data = mlp(), mlp(1), examples()
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    first, again = (sk.barrier(a, b, data, points=5, **QUIET) for _ in range(2))
    assert (first.low, first.high) == (again.low, again.high)
    other = sk.barrier(a, b, data, points=5, chunk=7, engine="vectorized", **QUIET)
    np.testing.assert_allclose(first.loss, other.loss, rtol=1e-12)
    for m, state in zip((a, b), before, strict=True):
        assert all(torch.equal(t, state[k]) for k, t in m.state_dict().items())


def test_what_cannot_be_measured_is_refused():
    a, b, data = mlp(), mlp(1), examples()
    for options, match in (
        ({"points": 2}, "at least 3"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"resamples": 0}, "at least 1"),
        ({"engine": "fast"}, "engine must be"),
    ):
        with pytest.raises(ArgumentError, match=match):
            sk.barrier(a, b, data, **options, **QUIET)
    with pytest.raises(ArgumentError, match="same weights"):
        sk.barrier(a, copy.deepcopy(a), data, **QUIET)
    with pytest.raises(ArgumentError, match="expected a module"):
        sk.barrier(a, b.state_dict(), data, **QUIET)
    nothing = torch.full((40,), -100)
    with pytest.raises(DataError, match="no label counts"):
        sk.barrier(a, b, (data[0], nothing), **QUIET)


def population(generator, n: int, t):
    """Losses with a broad, flat maximum, unequal tails, and a known expected curve."""
    curve = 0.5 * np.minimum(1.0, 3 * np.minimum(t, 1 - t))
    scale = generator.lognormal(0.0, 0.8, n) / np.exp(0.32)  # of mean 1
    phase = generator.uniform(0, 2 * np.pi, n)
    waves = 1.5 * np.sin(6 * np.pi * t[:, None] + phase)  # of mean 0 at every t
    return curve[:, None] * scale + waves * scale + 3 * scale, curve


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 400])
def test_the_interval_covers_the_maximum_of_the_expected_curve(n):
    """At least as often as asked for, less three standard errors; the plain maximum is too high."""
    t = np.linspace(0, 1, 25)
    trials, hits, values, biases = 600, 0, [], []
    for seed in range(trials):
        sums, curve = population(np.random.default_rng(seed), n, t)
        band = excess_band(sums, np.ones_like(sums), t, confidence=0.9, resamples=300, seed=seed)
        hits += band.interval[0] <= curve.max() <= band.interval[1]
        values.append(band.value)
        biases.append(band.bias)
    error = (0.9 * 0.1 / trials) ** 0.5
    assert 0.9 - 3 * error <= hits / trials
    above = np.mean(values) - curve.max()
    assert above > 5 * np.std(values) / trials**0.5  # what the interval has to know
    assert 0.3 * above < np.mean(biases) < 3 * above
