"""No convolution is computed in a layout in which PyTorch overruns memory."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sharpkit as sk
from sharpkit.channels_last import NeedsChannelsFirst, channels_first, keeping_layout, overruns
from sharpkit.training.m_sam import m_sam_gradient

SHARP = {"rho": 0.05, "progress": False}


class Gradients(TorchDispatchMode):
    """Counts calls that overrun memory, others of such layers, and others with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong = self.narrow = self.channels_last = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[10][1]:
            last = any(_channels_last(t) for t in (args[1], args[2]))
            narrow = overruns(args[2], args[4])
            self.wrong += narrow and last
            self.narrow, self.channels_last = self.narrow + narrow, self.channels_last + last
        return func(*args, **(kwargs or {}))


def _channels_last(t: Tensor) -> bool:
    """By strides alone, as they decide in PyTorch."""
    return t.ndim == 4 and t.stride(1) == 1 and t.stride(3) == t.shape[1] > 1


class Residual(nn.Module):
    """A block whose shortcut has stride 2, as every ResNet has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.block = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.out = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.out((self.block(x) + self.shortcut(x)).relu().mean((2, 3)))


def problem(width: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Residual(width).eval(), (torch.randn(16, 3, 8, 8), torch.arange(16) % 4)


def by_hessian(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    for kept in (None, 0):
        matrix = sk.HessianOperator(model, data, memory_budget=kept)
        matrix @ torch.ones(matrix.shape[0])


def by_gauss_newton(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    matrix = sk.GaussNewtonOperator(model, data)
    matrix @ torch.ones(matrix.shape[0])


def by_sharpness(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    sk.m_sharpness(model, data, m=[1, 16], **SHARP)


def by_m_sam(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    for m in (1, 16):
        m_sam_gradient(model, *data, m=m, rho=0.05)


MEASURES = [by_hessian, by_gauss_newton, by_sharpness, by_m_sam]


@pytest.mark.parametrize("given", ["as torch makes them", "model", "images", "both"])
@pytest.mark.parametrize("measure", MEASURES)
def test_narrow_strided_shortcuts_have_their_channels_first(measure, given):
    model, (x, y) = problem(4)
    if given in ("model", "both"):
        model = model.to(memory_format=torch.channels_last)
    if given in ("images", "both"):
        x = x.to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    with Gradients() as seen:
        measure(model, (x, y))
    assert seen.narrow
    assert not seen.wrong
    assert [p.stride() for p in model.parameters()] == strides


@pytest.mark.parametrize("m", [1, 16])
def test_gradients_are_in_the_layout_of_the_parameters(m):
    model, data = problem(16)
    model = model.to(memory_format=torch.channels_last)
    m_sam_gradient(model, *data, m=m, rho=0.05)
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(2, 1, 4, 4).to(memory_format=torch.channels_last), (16, 16, 4, 1)),
        (torch.ones(4, 3, 1, 1).to(memory_format=torch.channels_last), (3, 1, 1, 1)),
        (torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)[:, :, 2:], (144, 48, 8, 1)),
        (torch.ones(2, 3, 4, 4)[:, :, ::2], (48, 16, 8, 1)),
        (torch.ones(1, 3, 4, 4).expand(5, -1, -1, -1), (0, 16, 4, 1)),
        (torch.ones(2, 3, 4), (12, 4, 1)),
    ],
)
def test_channels_first(tensor, expected):
    found = channels_first(tensor)
    assert found.stride() == expected
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("measure", [by_sharpness, by_m_sam, by_hessian])
def test_wide_ones_are_still_computed_in_the_faster_layout(measure):
    with Gradients() as seen:
        measure(*problem(16))
    assert seen.channels_last
    assert not seen.narrow


def normed() -> nn.Module:
    """Float64; nothing before the normalisation need be differentiated."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4)).double()


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("parameters", [["1.*"], ["1.bias", "2.*"], ["1.weight"]])
@pytest.mark.parametrize("m", [8, 1])
def test_group_norm_whose_input_has_no_gradient(parameters, given, m):
    """PyTorch ends the process there, with channels last."""
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, plain = torch.arange(8) % 4, normed()
    own = {k: p for k, p in plain.named_parameters() if any(fnmatch(k, q) for q in parameters)}
    increases = []
    for xs, ys in zip(x.split(m), y.split(m), strict=True):
        before = nn.functional.cross_entropy(plain(xs), ys)
        gradient = torch.autograd.grad(before, list(own.values()))
        length = torch.cat([g.flatten() for g in gradient]).norm()
        steps = [0.05 * g / length for g in gradient]
        with torch.no_grad():
            torch._foreach_add_(list(own.values()), steps)
            increases.append(float(nn.functional.cross_entropy(plain(xs), ys) - before))
            torch._foreach_sub_(list(own.values()), steps)
    model = normed().to(memory_format=given)
    data = x.to(memory_format=given), y
    found = sk.m_sharpness(model, data, m=m, parameters=parameters, seed=None, **SHARP)
    assert found.value == pytest.approx(sum(increases) / len(increases), rel=1e-9)
    for p in model.parameters():
        p.requires_grad_(False)
    dict(model.named_parameters())["1.bias"].requires_grad_(True)
    m_sam_gradient(model, *data, m=m, rho=0.05)
    matrix = sk.HessianOperator(model, data, parameters=parameters)
    assert bool((matrix @ torch.ones(matrix.shape[0], dtype=torch.float64)).isfinite().all())


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(15, 8, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Conv2d(32, 8, 1, stride=(1, 2), groups=4), True),
        (nn.Conv1d(4, 8, 1, stride=2), False),
    ],
)
def test_which_convolutions_overrun(layer, expected):
    shape = (2, layer.in_channels, *[6] * (layer.weight.ndim - 2))
    with NeedsChannelsFirst() as seen:
        layer(torch.ones(shape))
    assert seen.found is expected


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.GroupNorm(2, 4), (2, 4, 6, 6), True),
        (nn.GroupNorm(2, 4), (2, 4, 6), False),
        (nn.BatchNorm2d(4), (2, 4, 6, 6), False),
    ],
)
def test_which_normalisations_need_channels_first(layer, shape, expected):
    with NeedsChannelsFirst() as seen:
        layer(torch.ones(shape))
    assert seen.found is expected


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(4, 1, False), (16, 1, True), (16, 2, False)]
)
def test_a_compiler_keeps_the_layout_too(channels, groups, expected):
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = nn.Conv2d(channels, 8, 1, stride=2, groups=groups)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).sum(), [layer.weight])

    graph = make_fx(gradient)(torch.ones(2, channels, 6, 6))
    with keeping_layout(graph):
        assert config.layout_optimization is expected
    assert config.layout_optimization
