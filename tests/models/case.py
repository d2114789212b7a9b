"""One row of the table of networks: how it is built, its six examples, the same made plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from plain_loops import Problem, Total, call, cross_entropy
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

N = 6  # with m = 4 the last group is smaller
CLASSES = 4
STEEP = 0.002


@dataclass(frozen=True)
class Case:
    """A network, six examples and a loss.

    Attributes:
        build: The network, with seeded weights.
        plain: The same network for the plain loops: nothing recomputed, compiled or cached.
        loss: What sharpkit is given.
        total: What the plain loops are given.
        training: Whether the network is in training mode.
        smooth: Whether finite differences can confirm the second derivatives.
        tolerance: Relative, in float64.
        float32: Tolerance in float32, where a plain loop in float32 is also far off.
        rho: Smaller where the gradient is steep, so that the step stays one.
        fresh: Measured before it is called for the first time (in eval mode).
        marks: For pytest.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Generator], Any]
    labels: Callable[[Generator], Tensor]
    plain: Callable[[], nn.Module] | None = None
    loss: Any = "cross_entropy"
    total: Total = cross_entropy
    training: bool = False
    smooth: bool = False
    tolerance: float = 1e-6
    float32: float | None = None
    rho: float = 0.05
    fresh: bool = False
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def make(self, dtype: torch.dtype) -> tuple[nn.Module, Any, Tensor]:
        """The network and its examples; the same numbers in both precisions."""
        torch.manual_seed(0)
        model = self.build()
        generator = Generator().manual_seed(1)
        inputs, labels = self.inputs(generator), self.labels(generator)
        settle(model, inputs, generator)
        examples = pytree.tree_map(lambda t: converted(t, dtype), (inputs, labels))
        return model._apply(lambda t: converted(t, dtype)).train(self.training), *examples

    def problem(self) -> Problem:
        """What the plain loops measure, in float64."""
        model, inputs, labels = self.make(torch.float64)
        if self.plain is not None:
            plain = self.plain()._apply(lambda t: converted(t, torch.float64))
            copy_state(model, plain)
            model = plain.train(self.training)
        return Problem(model, inputs, labels, self.total)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In that precision; complex numbers stay complex, integers as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@torch.no_grad()
def settle(model: nn.Module, inputs: Any, generator: Generator) -> None:
    """No weight constant (zeros hide errors); BatchNorm with the statistics of the inputs.

    A channel that hardly varies would be amplified a hundred times, and rounding with it.
    """
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        call(model.train(), inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=norm.running_var.mean())


@torch.no_grad()
def copy_state(source: nn.Module, target: nn.Module) -> None:
    for of in (nn.Module.parameters, nn.Module.buffers):
        for a, b in zip(of(source), of(target), strict=True):
            b.copy_(a)


def images(size: int) -> Callable[[Generator], Tensor]:
    return lambda g: torch.randn(N, 3, size, size, generator=g)


def classes(g: Generator) -> Tensor:
    return torch.randint(0, CLASSES, (N,), generator=g)
