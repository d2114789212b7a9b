"""Norm balls in weight space: dual directions, perturbations and projections for many groups.

Every function works on a dict of tensors of shape (groups, *parameter shape): one slice per group.
In the adaptive geometry the ball is ‖ε / |w|‖_p ≤ ρ; with ε = |w| ∘ u it is the plain ball in u, so
nothing is ever divided by a weight and a weight of exactly 0 simply stays 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharpkit.errors import ModelError
from sharpkit.groupwise import low_rank

Tensors = dict[str, Tensor]  # name -> (groups, *shape)
Factors = dict[str, tuple[Tensor, Tensor]]  # name -> A (groups, rows, in), D (groups, rows, out)

# outside this range the reciprocal of a float32 norm, or its product with rho, may leave float32
_SAFE_NORMS = (1e-30, 1e30)


@dataclass(frozen=True)
class Direction:
    """Unit vectors `coefficient * (tensors, factors)`, one per group; 0 where the gradient is 0."""

    tensors: Tensors
    coefficient: Tensor  # (groups,) float64
    factors: Factors = field(default_factory=dict)  # weights whose part is DᵀA, never formed


def norm(tensors: Tensors, p: float = 2.0) -> Tensor:
    """The p-norm over all parameters together, accumulated in float64; shape (groups,)."""
    parts = [_row_norm(t, p) for t in tensors.values()]
    total: Tensor = torch.linalg.vector_norm(torch.stack(parts), ord=p, dim=0)
    return total


def _row_norm(tensor: Tensor, p: float) -> Tensor:
    rows = tensor.reshape(len(tensor), -1)
    result: Tensor = torch.linalg.vector_norm(rows, ord=p, dim=1, dtype=torch.float64)
    return result


def largest(tensors: Tensors) -> Tensor:
    """The largest absolute entry of each group; shape (groups,), float64."""
    return norm(tensors, torch.inf)


def expand(per_group: Tensor, like: Tensor) -> Tensor:
    """A value per group, shaped to broadcast against (groups, *shape), in the other's dtype."""
    return per_group.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent without overflow on the way, for exponents that one factor cannot hold."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return (x.double() * torch.exp2(half) * torch.exp2(exponent - half)).to(x.dtype)


def normalised(tensors: Tensors, factors: Factors | None = None) -> tuple[Tensors, Factors]:
    """Each group scaled by a power of two so that its largest entry is near 1."""
    factors = factors or {}
    tops = [largest({name: t}) for name, t in tensors.items()]
    tops += [largest({"": a}) * largest({"": d}) for a, d in factors.values()]
    top = torch.stack(tops).amax(0)
    exponent = torch.where(top > 0, -torch.floor(torch.log2(top)), 0.0)
    half = torch.floor(exponent / 2)

    def scaled(t: Tensor, e: Tensor) -> Tensor:
        return power_of_two(t, e.view(-1, *[1] * (t.ndim - 1)))

    return (
        {name: scaled(t, exponent) for name, t in tensors.items()},
        {name: (scaled(a, half), scaled(d, exponent - half)) for name, (a, d) in factors.items()},
    )


def steepest(gradient: Tensors, p: float, factors: Factors | None = None) -> Direction:
    """The unit vector of the p-norm that has the largest inner product with the gradient.

    With 1/p + 1/q = 1 it is sign(g) |g|^{q−1} / ‖g‖_q^{q−1} (Foret et al. 2021, equation 2).

    Args:
        gradient: Per group, any scale; shapes (groups, *shape).
        p: Order of the norm, from 1 to infinity.
        factors: For p = 2 only: further parts of the gradient, as factors.

    Returns:
        Direction: Zero where a group's gradient is exactly zero, or not finite (`check_flat`).
    """
    if p == 2.0:
        factors = factors or {}
        length = _length(gradient, factors)
        if _unsafe(length):
            gradient, factors = normalised(gradient, factors)
            length = _length(gradient, factors)
        return Direction(gradient, torch.where(length > 0, 1.0 / length, 0.0), factors)
    if p == torch.inf:
        top = largest(gradient)
        return Direction({k: g.sign() for k, g in gradient.items()}, (top > 0).double())
    gradient, _ = normalised(gradient)
    if p == 1.0:
        return _largest_entry(gradient)
    q = p / (p - 1.0)
    powers = {name: g.sign() * g.abs() ** (q - 1.0) for name, g in gradient.items()}
    length = norm(powers, p)
    return Direction(powers, torch.where(length > 0, 1.0 / length, 0.0))


def _length(gradient: Tensors, factors: Factors) -> Tensor:
    squares = [_row_norm(t, 2.0).square() for t in gradient.values()]
    squares += [low_rank.squared_norm(a, d) for a, d in factors.values()]
    return torch.stack(squares).sum(0).sqrt()


def check_flat(direction: Direction, gradient: Tensors, factors: Factors | None = None) -> None:
    """Raise unless groups without a direction have gradients of exactly 0, and not of NaN.

    Raises:
        ModelError: If a gradient has NaN or infinite entries.
    """
    still = direction.coefficient == 0
    if not bool(still.any()):
        return
    parts = [*gradient.values(), *(t for pair in (factors or {}).values() for t in pair)]
    bad = sum(~torch.isfinite(t[still].reshape(int(still.sum()), -1)).all(1) for t in parts)
    count = int(torch.as_tensor(bad).count_nonzero())
    if count:
        raise ModelError(
            f"the gradient of {count} groups has NaN or infinite entries, although the loss is "
            "finite"
        )


def _unsafe(length: Tensor) -> bool:
    low, high = _SAFE_NORMS
    return bool(((length < low) | (length > high)).any())


def _largest_entry(gradient: Tensors) -> Direction:
    top = largest(gradient)
    free = top > 0  # groups whose one entry is not placed yet
    tensors: Tensors = {}
    for name, g in gradient.items():
        flat = g.reshape(len(g), -1)
        value, index = flat.abs().max(1)
        here = free & (value.double() == top)
        picked = torch.zeros_like(flat)
        picked[here, index[here]] = flat[here, index[here]].sign()
        tensors[name] = picked.view_as(g)
        free = free & ~here
    return Direction(tensors, (top > 0).double())


def project(point: Tensors, rho: float, p: float) -> Tensors:
    """The nearest point of the ball of radius rho; p = 2 or infinity."""
    if p == torch.inf:
        return {name: u.clamp(-rho, rho) for name, u in point.items()}
    length = norm(point)
    shrink = torch.where(length > rho, rho / length, 1.0)
    return {name: u * expand(shrink, u) for name, u in point.items()}


def moved(weights: Tensors, step: Tensors, amount: Tensor) -> Tensors:
    """weights + amount · step: weights (*shape), step (groups, *shape), amount (groups,)."""
    return {name: torch.addcmul(weights[name], s, expand(amount, s)) for name, s in step.items()}
