"""What sharpkit must give, by plain float64 loops: autograd, and weights assigned in place.

Vectors hold the parameters that require gradients, one after the other; a complex number is its
real part followed by its imaginary part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

# (outputs, labels) -> (sum of the losses, their weight); the mean loss is the quotient
Total = Callable[[Any, Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class Problem:
    """A float64 model, n examples and a loss."""

    model: nn.Module
    inputs: Any
    labels: Tensor
    total: Total

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def part(self, start: int, stop: int) -> Problem:
        inputs = pytree.tree_map(lambda t: t[start:stop], self.inputs)
        return Problem(self.model, inputs, self.labels[start:stop], self.total)

    def groups(self, m: int) -> Iterator[Problem]:
        """Consecutive groups of m examples, without those that have no label at all."""
        for start in range(0, len(self.labels), m):
            group = self.part(start, start + m)
            if group.weight > 0:
                yield group

    @property
    def weight(self) -> int:
        return int((self.labels != -100).sum()) if self.total is cross_entropy else len(self.labels)

    def outputs(self) -> Any:
        return call(self.model, self.inputs)

    def loss(self) -> Tensor:
        total, weight = self.total(self.outputs(), self.labels)
        return total / weight


def call(model: nn.Module, inputs: Any) -> Any:
    """The outputs for a tensor, a tuple of arguments, or a dict of keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def cross_entropy(outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
    """Of logits (..., classes) and labels (...); the label -100 is ignored."""
    logits = getattr(outputs, "logits", outputs)
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    return total, int((labels != -100).sum())


def half_squared_error(outputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    return 0.5 * (outputs - labels).square().sum(), len(labels)


def m_sharpness(problem: Problem, m: int, rho: float) -> float:
    """Σ_S W_S [L_S(w + ρ g_S/‖g_S‖) − L_S(w)] / Σ_S W_S."""
    increase = 0.0
    for group in problem.groups(m):
        loss = group.loss()
        with moved(problem, ascent(group, loss, rho)), torch.no_grad():
            increase += group.weight * float(group.loss() - loss)
    return increase / problem.weight


def m_sam_gradient(problem: Problem, m: int, rho: float) -> Tensor:
    """Σ_S (W_S / W) ∇L_S(w + ρ g_S/‖g_S‖)."""
    total = torch.zeros(())
    for group in problem.groups(m):
        with moved(problem, ascent(group, group.loss(), rho)):
            total = total + group.weight / problem.weight * gradient(group, group.loss())
    return total


def hessian_product(problem: Problem, vector: Tensor) -> Tensor:
    """By double backward."""
    slope = gradient(problem, problem.loss(), create_graph=True)
    return gradient(problem, slope @ vector)


def hessian_product_by_differences(problem: Problem, vector: Tensor, step: float) -> Tensor:
    """By central differences of the gradient at two step sizes, extrapolated: error O(step⁴)."""

    def difference(h: float) -> Tensor:
        ends = []
        for sign in (1.0, -1.0):
            with moved(problem, sign * h * vector):
                ends.append(gradient(problem, problem.loss()))
        return (ends[0] - ends[1]) / (2 * h)

    return (4 * difference(step / 2) - difference(step)) / 3


def gauss_newton_product(problem: Problem, vector: Tensor) -> Tensor:
    """Jᵀ (∇²ℓ) J v, with J v as the derivative of u ↦ vᵀ Jᵀ u."""
    outputs = logits(problem)
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = flat(differentiate(outputs, problem.parameters, u, create_graph=True))
    (pushed,) = torch.autograd.grad(pulled @ vector, u, retain_graph=True)
    return flat(differentiate(outputs, problem.parameters, _curved(problem, outputs, pushed)))


def gauss_newton_product_by_differences(problem: Problem, vector: Tensor, step: float) -> Tensor:
    """Jᵀ (∇²ℓ) J v, with J v by central differences of the outputs at two step sizes."""

    def difference(h: float) -> Tensor:
        ends = []
        for sign in (1.0, -1.0):
            with moved(problem, sign * h * vector), torch.no_grad():
                ends.append(logits(problem))
        return (ends[0] - ends[1]) / (2 * h)

    pushed = (4 * difference(step / 2) - difference(step)) / 3
    outputs = logits(problem)
    return flat(differentiate(outputs, problem.parameters, _curved(problem, outputs, pushed)))


def empirical_fisher_product(problem: Problem, vector: Tensor) -> Tensor:
    """1/N Σ_n g_n g_nᵀ v with g_n = N/W ∇(sum of the losses of example n)."""
    n = len(problem.labels)
    product = torch.zeros_like(vector)
    for example in problem.groups(1):
        total, _ = problem.total(example.outputs(), example.labels)
        slope = n / problem.weight * gradient(example, total)
        product += slope * (slope @ vector) / n
    return product


def logits(problem: Problem) -> Tensor:
    outputs = problem.outputs()
    return getattr(outputs, "logits", outputs)


def ascent(problem: Problem, loss: Tensor, rho: float) -> Tensor:
    slope = gradient(problem, loss)
    return rho * slope / slope.norm()


def gradient(problem: Problem, value: Tensor, create_graph: bool = False) -> Tensor:
    return flat(differentiate(value, problem.parameters, None, create_graph))


def differentiate(
    value: Tensor,
    parameters: Sequence[Tensor],
    direction: Tensor | None = None,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    return torch.autograd.grad(
        value, parameters, direction, retain_graph=True, create_graph=create_graph,
        materialize_grads=True,
    )  # fmt: skip


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of real numbers."""
    return torch.cat([_real(tensor).reshape(-1) for tensor in tensors])


@contextmanager
def moved(problem: Problem, step: Tensor) -> Iterator[None]:
    """The parameters moved by a vector inside, assigned in place; put back afterwards."""
    start = [p.detach().clone() for p in problem.parameters]
    places = [_real(p.detach()) for p in problem.parameters]
    for place, part in zip(places, step.split([p.numel() for p in places]), strict=True):
        place += part.view_as(place)
    try:
        yield
    finally:
        for p, value in zip(problem.parameters, start, strict=True):
            p.detach().copy_(value)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _curved(problem: Problem, outputs: Tensor, direction: Tensor) -> Tensor:
    """The second derivative of the mean loss in the outputs, times a direction."""
    leaf = outputs.detach().requires_grad_()
    total, weight = problem.total(leaf, problem.labels)
    (slope,) = torch.autograd.grad(total / weight, leaf, create_graph=True)
    return torch.autograd.grad(slope, leaf, direction)[0]
