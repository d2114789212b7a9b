"""Networks measured together give what each gives alone, whatever one of them is like."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cases import CASES, Case
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import sharpkit as sk
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.sharpness import SharpnessResult, m_sharpness, stacked as module
from sharpkit.sharpness.stacked import m_sharpness_stacked

GRID = {"m": [1, 3, 4, 8, 24], "rho": [0.05, 0.3]}


class Recurrent(nn.Module):
    """An LSTM over (n, steps, 4), whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


MORE = [
    Case("lstm", Recurrent, lambda g: torch.randn(24, 3, 4, generator=g, dtype=torch.float64)),
    Case(
        "layer norm and dropout",
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 3)
        ),
        lambda g: torch.randn(24, 6, generator=g, dtype=torch.float64),
    ),
]


def networks_of(model: nn.Module, count: int, seed: int = 0) -> list[nn.Module]:
    """Copies of a network with weights and running statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    found = [copy.deepcopy(model) for _ in range(count)]
    for network in found:
        for name, t in (*network.named_parameters(), *network.named_buffers()):
            if t.is_floating_point():
                noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
                t.data += (0.2 * noise.abs() if "var" in name else 0.2 * noise).to(t.dtype)
            else:
                t.data += 1 + int(torch.randint(0, 9, (), generator=generator))
    return found


def assert_same(
    found: Sequence[SharpnessResult | Exception], expected: Sequence[SharpnessResult], rtol: float
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, SharpnessResult), one
        scale = max(float(np.abs(v).max()) for v in other.group_values.values())
        for name in ("value", "std_error"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), rtol=rtol, atol=rtol * scale
            )
        for key, values in other.group_values.items():
            np.testing.assert_allclose(one.group_values[key], values, rtol=rtol, atol=rtol * scale)
        for m in other.m:
            np.testing.assert_array_equal(one.group_sizes[m], other.group_sizes[m])
            np.testing.assert_allclose(one.group_weights[m], other.group_weights[m], rtol=1e-12)
        for name in ("m", "rho", "n", "zero_gradient_groups", "parameters", "left_out"):
            assert getattr(one, name) == getattr(other, name)


def alone(networks: Sequence[nn.Module], data: object, **options: object) -> list[SharpnessResult]:
    return [m_sharpness(network, data, **options) for network in networks]


def none_alone(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks that are not measured in the stack, from now on."""
    seen: list[nn.Module] = []

    def measure(model: nn.Module, *arguments: object, **options: object) -> SharpnessResult:
        seen.append(model)
        return m_sharpness(model, *arguments, **options)

    monkeypatch.setattr(module, "m_sharpness", measure)
    return seen


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str
)
def test_each_network_has_the_numbers_that_it_has_alone(case: Case, dtype, rtol) -> None:
    model, x, y = case.make(dtype)
    networks = networks_of(model, 3)
    states = [copy.deepcopy(network.state_dict()) for network in networks]
    expected = alone(networks, (x, y), **GRID)
    assert_same(m_sharpness_stacked(networks, (x, y), **GRID), expected, rtol)
    for network, state in zip(networks, states, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in network.state_dict().items())


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
def test_nothing_of_a_known_kind_is_measured_alone(case: Case, monkeypatch) -> None:
    networks = networks_of(case.make()[0], 2)
    _, x, y = case.make()
    left = none_alone(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m_sharpness_stacked(networks, (x, y), **GRID)
    assert left == []


@pytest.mark.parametrize("chunk", [1, 2, 5, 64, "auto"])
@pytest.mark.parametrize(("count", "n"), [(1, 24), (3, 23), (8, 24)])
def test_neither_the_chunk_nor_the_number_of_networks_changes_anything(chunk, count, n) -> None:
    model, x, y = CASES[1].make()
    networks = networks_of(model, count)
    options = {"m": [2, 6, 16], "rho": 0.1, "n": n, "adaptive": True}
    assert_same(
        m_sharpness_stacked(networks, (x, y), chunk=chunk, **options),
        alone(networks, (x, y), **options),
        1e-10,
    )


def layers(draw: st.DrawFn) -> list[nn.Module]:
    """A random network for images (2, 6, 6) and three classes."""
    found: list[nn.Module] = []
    channels = 2
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 4))
        found.append(nn.Conv2d(channels, width, 3, padding=1, bias=draw(st.booleans())))
        found.append(draw(st.sampled_from([nn.Identity, nn.BatchNorm2d, _group_norm]))(width))
        found.append(draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.ELU]))())
        channels = width
    found.append(nn.Flatten())
    width = 36 * channels
    if draw(st.booleans()):
        found += [nn.Linear(width, 5), nn.LayerNorm(5), nn.ReLU()]
        width = 5
    return [*found, nn.Linear(width, 3, bias=draw(st.booleans()))]


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(1, width)


@settings(max_examples=25)
@given(st.data())
def test_random_architectures(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = nn.Sequential(*data.draw(st.composite(layers)())).double()
    n = data.draw(st.integers(2, 13))
    x, y = torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (n,))
    ms = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=3, unique=True))
    options = {
        "m": ms, "rho": 0.2, "adaptive": data.draw(st.booleans()),
        "parameters": data.draw(st.sampled_from([None, "*weight"])),
    }  # fmt: skip
    networks = networks_of(model, data.draw(st.integers(2, 4)))
    chunk = data.draw(st.integers(1, 2 * n))
    found = m_sharpness_stacked(networks, (x, y), chunk=chunk, **options)
    assert_same(found, alone(networks, (x, y), **options), 1e-10)


def test_networks_of_the_embedded_zoo(monkeypatch) -> None:
    task = next(iter(sk.embedded_zoo().values()))
    networks = [task[id_].load().double() for id_ in list(task)[:6]]
    options = {"m": [1, 16], "rho": 0.1, "n": 48}
    expected = alone(networks, task.dataset("train"), **options)
    left = none_alone(monkeypatch)
    assert_same(m_sharpness_stacked(networks, task.dataset("train"), **options), expected, 1e-10)
    shapes = {tuple(p.shape for p in network.parameters()) for network in networks}
    assert len(left) < len(networks) or len(shapes) == len(networks)


def test_parameters_that_are_left_out_are_each_networks_own() -> None:
    model, x, y = CASES[0].make()
    networks = networks_of(model, 3)
    options = {"m": [1, 8], "rho": 0.1, "parameters": ["0.weight", "4.bias"]}
    found = m_sharpness_stacked(networks, (x, y), **options)
    assert_same(found, alone(networks, (x, y), **options), 1e-10)


def test_ignored_labels_and_weights_of_classes() -> None:
    model, x, y = CASES[0].make()
    y[::5] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    networks = networks_of(model, 3)
    options = {"m": [1, 5], "rho": 0.1, "loss": loss}
    found = m_sharpness_stacked(networks, (x, y), **options)
    assert_same(found, alone(networks, (x, y), **options), 1e-10)


def small(count: int) -> tuple[list[nn.Module], Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return networks_of(model, count), torch.randn(12, 4), torch.randint(0, 2, (12,))


@pytest.mark.parametrize("place", [0, 2])
def test_a_network_with_nan_fails_by_itself(place: int) -> None:
    networks, x, y = small(4)
    with torch.no_grad():
        networks[place][2].weight[0, 0] = math.nan
    found = m_sharpness_stacked(networks, (x, y), m=[1, 4], rho=0.1)
    assert isinstance(found[place], ModelError)
    assert "'2.weight' has 1 NaN" in str(found[place])
    del found[place], networks[place]
    assert_same(found, alone(networks, (x, y), m=[1, 4], rho=0.1), 1e-3)


@pytest.mark.parametrize("scale", [1e4, 3e38])
def test_a_network_whose_loss_is_saturated_or_overflows(scale: float) -> None:
    """Gradients of exactly 0, of 1e-30, and losses that are infinite where weights move."""
    networks, x, y = small(3)
    with torch.no_grad():
        networks[1][2].weight.mul_(scale)
    options = {"m": [1, 4], "rho": 0.1}
    found = m_sharpness_stacked(networks, (x, y), **options)
    try:
        expected = m_sharpness(networks[1], (x, y), **options)
    except ModelError as error:
        assert str(found[1]) == str(error)
    else:
        assert_same([found[1]], [expected], 1e-3)
    assert_same(found[::2], alone(networks[::2], (x, y), **options), 1e-3)


def test_groups_with_a_gradient_of_zero_are_counted() -> None:
    networks, x, y = small(3)
    with torch.no_grad():
        networks[1][0].bias.fill_(-1e6)  # no unit is active
        networks[1][2].bias.copy_(torch.tensor([1e3, -1e3]))
    options = {"m": [1, 4], "rho": 0.1}
    expected = alone(networks, (x, y), **options)
    assert_same(m_sharpness_stacked(networks, (x, y), **options), expected, 1e-3)


def test_a_network_of_another_shape_is_measured_too() -> None:
    networks, x, y = small(3)
    networks.insert(1, nn.Linear(4, 2))
    options = {"m": 4, "rho": 0.1}
    found = m_sharpness_stacked(networks, (x, y), **options)
    assert_same(found, alone(networks, (x, y), **options), 1e-3)


class Tempered(nn.Module):
    """A linear layer whose outputs are divided by what is no tensor, and not printed."""

    def __init__(self, temperature: Callable[[], float]) -> None:
        super().__init__()
        self.linear, self.temperature = nn.Linear(4, 2), temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / self.temperature()


def test_what_the_tensors_do_not_tell_is_found_out(monkeypatch) -> None:
    _, x, y = small(1)
    networks = networks_of(Tempered(lambda: 1.0), 3)
    networks[1].temperature = lambda: 1.01
    left = none_alone(monkeypatch)
    found = m_sharpness_stacked(networks, (x, y), m=[1, 4], rho=0.1)
    assert left == [networks[1]]
    assert_same(found, alone(networks, (x, y), m=[1, 4], rho=0.1), 1e-3)


class Decides(nn.Module):
    """Looks at values in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if bool((x.sum(1) > 0).any()) else 1.0)


@pytest.mark.filterwarnings("ignore:groups are evaluated one after the other")
def test_what_cannot_run_side_by_side_is_measured_alone_and_told() -> None:
    _, x, y = small(1)
    x = x.abs()  # each example decides alike
    networks = networks_of(Decides(), 2)
    with pytest.warns(UserWarning, match="2 networks of one shape are measured one by one, which"):
        found = m_sharpness_stacked(networks, (x, y), m=[1, 4], rho=0.1)
    assert_same(found, alone(networks, (x, y), m=[1, 4], rho=0.1), 1e-3)


def test_wrong_arguments_are_refused() -> None:
    networks, x, y = small(2)
    with pytest.raises(ArgumentError, match="m = 13 is larger than n = 12"):
        m_sharpness_stacked(networks, (x, y), m=13, rho=0.1)
    with pytest.raises(ArgumentError, match="rho must be positive"):
        m_sharpness_stacked(networks, (x, y), m=1, rho=0.0)
    assert m_sharpness_stacked([], (x, y), m=1, rho=0.1) == []
