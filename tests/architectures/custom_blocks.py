"""Building blocks as people write them: shared weights, in-place sums, complex, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from layer_blocks import (
    IMAGE,
    SEQUENCE,
    VECTOR,
    Shape,
    affine,
    block,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Apply(nn.Module):
    """A function of some modules or parameters and the features."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) / columns**0.5)


def _added_in_place(s: Any, x: Tensor) -> Tensor:
    y = s.layer(x)
    y += x
    y *= 0.7
    return y


@block()
def add_inplace(shape: Shape, rng: Random) -> nn.Module:
    return Apply(_added_in_place, layer=affine(shape))


@block()
def temperature(shape: Shape, rng: Random) -> nn.Module:
    scale = nn.Parameter(torch.tensor(0.3))
    return Apply(
        lambda s, x: torch.tanh(s.layer(x)) * s.scale.exp(), layer=affine(shape), scale=scale
    )


@block()
def registered_twice(shape: Shape, rng: Random) -> nn.Module:
    layer = affine(shape)
    return nn.Sequential(layer, nn.Tanh(), layer)


@block()
def tied_layers(shape: Shape, rng: Random) -> nn.Module:
    first, second = affine(shape), affine(shape)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


@block(VECTOR, SEQUENCE)
def transposed_use(shape: Shape, rng: Random) -> nn.Module:
    return Apply(lambda s, x: torch.tanh(s.layer(x)) @ s.layer.weight.T, layer=affine(shape))


@block(VECTOR, SEQUENCE)
def sum_of_two(shape: Shape, rng: Random) -> nn.Module:
    d = shape[-1]
    return Apply(lambda s, x: F.linear(x, s.a + s.b), a=matrix(d, d), b=matrix(d, d))


def _concatenated(s: Any, x: Tensor) -> Tensor:
    weight = torch.cat([s.a.weight, s.b.weight])
    return torch.tanh(F.linear(x, weight=weight, bias=torch.cat((s.a.bias, s.b.bias))))


@block(VECTOR, SEQUENCE)
def weights_in_list(shape: Shape, rng: Random) -> nn.Module:
    d = shape[-1]
    return Apply(_concatenated, a=nn.Linear(d, d // 2), b=nn.Linear(d, d - d // 2))


def _of_both(s: Any, x: Tensor) -> Tensor:
    return torch.einsum("...i,koi->...o", x, torch.stack([s.kept[0], s.layer.weight])).tanh()


@block(VECTOR, SEQUENCE)
def parameters_in_list(shape: Shape, rng: Random) -> nn.Module:
    """The module also keeps one of its parameters in a plain list, and uses it from there."""
    made = Apply(_of_both, layer=affine(shape), other=affine(shape))
    made.kept = [made.other.weight]
    return made


def _fourier(s: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, dim=-1) @ s.weight + s.bias
    return torch.fft.irfft(spectrum, n=x.shape[-1], dim=-1)


@block(VECTOR, SEQUENCE)
def fourier(shape: Shape, rng: Random) -> nn.Module:
    k = shape[-1] // 2 + 1
    weight = torch.randn(k, k, dtype=torch.cdouble) / k**0.5
    bias = nn.Parameter(torch.randn(k, dtype=torch.cdouble))
    return Apply(_fourier, weight=nn.Parameter(weight), bias=bias)


@block(VECTOR, SEQUENCE)
def complex_layer(shape: Shape, rng: Random) -> nn.Module:
    layer = nn.Linear(shape[-1], shape[-1], dtype=torch.cdouble)
    return Apply(lambda s, x: torch.tanh(s.layer(x.to(torch.cdouble)).abs()) - x, layer=layer)


class Cube(torch.autograd.Function):
    """x + x³/10 in the style that has no vmap rule; its backward can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + 0.1 * x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 + 0.3 * x**2)


class CubeOnce(Cube):
    """The same, whose backward cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 + 0.3 * x**2)


@block()
def custom_function(shape: Shape, rng: Random) -> nn.Module:
    return Apply(lambda s, x: Cube.apply(torch.tanh(s.layer(x))), layer=affine(shape))


@block()
def once_differentiable_function(shape: Shape, rng: Random) -> nn.Module:
    return Apply(lambda s, x: CubeOnce.apply(torch.tanh(s.layer(x))), layer=affine(shape))


@block()
def frozen_layer(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(affine(shape).requires_grad_(False), nn.Tanh(), affine(shape))


@block(IMAGE)
def channels_last(shape: Shape, rng: Random) -> nn.Module:
    return Apply(
        lambda s, x: torch.tanh(s.layer(x.to(memory_format=torch.channels_last))),
        layer=affine(shape),
    )


@block(VECTOR)
def jacobian_inside(shape: Shape, rng: Random) -> nn.Module:
    """The features, and the divergence of a small network by torch.func."""

    def forward(s: Any, x: Tensor) -> Tensor:
        slope = torch.func.jacrev(lambda row: torch.tanh(s.layer(row)))
        return x + torch.vmap(slope)(x).diagonal(dim1=1, dim2=2)

    return Apply(forward, layer=affine(shape))


@block(VECTOR, SEQUENCE)
def vmap_inside(shape: Shape, rng: Random) -> nn.Module:
    return Apply(
        lambda s, x: torch.vmap(lambda row: torch.sin(s.layer(row)))(x), layer=affine(shape)
    )


@block(VECTOR, SEQUENCE)
def input_derivative(shape: Shape, rng: Random) -> nn.Module:
    """The features, and the slope of a small network at them by torch.autograd.grad."""

    def forward(s: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            value = torch.tanh(s.layer(point)).square().sum()
            (slope,) = torch.autograd.grad(value, point, create_graph=True)
        return x + slope

    return Apply(forward, layer=affine(shape))


@block(SEQUENCE)
def functional_in_list(shape: Shape, rng: Random) -> nn.Module:
    """Experts whose weights are stacked, and mixed by a learned gate."""

    def forward(s: Any, x: Tensor) -> Tensor:
        stacked = torch.stack([e.weight for e in s.experts])
        outputs = torch.einsum("ntd,eod->neto", x, stacked)
        return torch.tanh((s.gate(x).softmax(-1).mT.unsqueeze(-1) * outputs).sum(1))

    d = shape[-1]
    return Apply(
        forward, experts=nn.ModuleList([affine(shape) for _ in range(2)]), gate=nn.Linear(d, 2)
    )
