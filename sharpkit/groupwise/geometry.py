"""Norm balls in weight space: dual directions, perturbations and projections for many groups.

Every function works on a dict of tensors of shape (groups, *parameter shape): one slice per group.
In the adaptive geometry the ball is ‖ε / |w|‖_p ≤ ρ; with ε = |w| ∘ u it is the plain ball in u, so
nothing is ever divided by a weight and a weight of exactly 0 simply stays 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharpkit.errors import ArgumentError
from sharpkit.groupwise import low_rank

Tensors = dict[str, Tensor]  # name -> (groups, *shape)
# name -> A (groups, rows, in) and D (groups, rows, out); for a table that is looked up, A are the
# numbers of its rows, (groups, rows)
Factors = dict[str, tuple[Tensor, Tensor]]

# outside this range squares of float32 entries that matter to the norm may leave float32, or the
# product of its reciprocal with rho
SAFE_NORMS = (1e-12, 1e15)
# below, slopes of the loss that were not scaled may be too small for the way through a network
LEAST_UNSCALED = 1e-8
_LARGE = 2**16  # entries whose squares one sum in float32 cannot hold well
_BLOCK = 1024  # entries whose squares are added up in float32: an error of some 1e-7


@dataclass(frozen=True)
class Direction:
    """Unit vectors `coefficient * (tensors, factors)`, one per group; 0 where the gradient is 0."""

    tensors: Tensors
    coefficient: Tensor  # (groups,) float64; NaN where the gradient is not finite
    factors: Factors = field(default_factory=dict)  # weights whose part is DᵀA, never formed
    doubtful: Tensor | None = None  # (groups,) bool: the norm may have left float32 on the way

    def times(self, length: float | Tensor) -> Tensors:
        """The vectors of this length, or these of the groups (groups,), where none are factored."""
        amount = length * self.coefficient
        return {name: t * expand(amount, t) for name, t in self.tensors.items()}


# gradient (groups, *shape) and weights (*shape), by name, to unit vectors (see `directed`)
DirectionRule = Callable[[Tensors, Tensors], Tensors]


def norm(tensors: Tensors, p: float = 2.0) -> Tensor:
    """The p-norm over all parameters together, accumulated in float64; shape (groups,)."""
    if p == 2.0:
        rows = torch.cat([part for t in tensors.values() for part in _lengths(t)], 1)
        whole: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return whole
    parts = [
        torch.linalg.vector_norm(t.reshape(len(t), -1), ord=p, dim=1, dtype=torch.float64)
        for t in tensors.values()
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(parts), ord=p, dim=0)
    return total


def _lengths(tensor: Tensor) -> list[Tensor]:
    """2-norms of parts of every group, (groups, parts): few enough to add up in float64.

    Blocks are added up in float32, which is far faster.
    """
    rows = tensor.reshape(len(tensor), -1)
    if rows.dtype != torch.float32:
        return [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).unsqueeze(1)]
    whole = rows.shape[1] // _BLOCK * _BLOCK
    if not whole:
        return [rows]
    blocks = torch.linalg.vector_norm(rows[:, :whole].reshape(len(rows), -1, _BLOCK), dim=2)
    return [blocks, rows[:, whole:]] if whole < rows.shape[1] else [blocks]


def length_of_one(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all tensors of a single group, in as few calls as they allow; float64."""
    small = [t for t in tensors if t.numel() <= _LARGE and t.dtype == torch.float32]
    parts = [torch.stack(torch._foreach_norm(small, 2)).double()] if small else []
    for t in tensors:
        if t.dtype != torch.float32 or t.numel() > _LARGE:
            parts += [part[0].double() for part in _lengths(_in_memory_order(t).unsqueeze(0))]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    total: Tensor = torch.linalg.vector_norm(parts[0] if len(parts) == 1 else torch.cat(parts))
    return total


def step_of_one(gradient: list[Tensor], amount: Tensor, scale: list[Tensor] | None) -> list[Tensor]:
    """T ∘ (amount · gradient) of a single group, in as few calls as they allow."""
    step = list(torch._foreach_mul(gradient, amount.to(gradient[0].dtype)))
    if scale is not None:
        torch._foreach_mul_(step, scale)
    return step


def _in_memory_order(t: Tensor) -> Tensor:
    if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1)
    return t


def largest(tensors: Tensors) -> Tensor:
    """The largest absolute entry of each group; shape (groups,), float64."""
    return norm(tensors, torch.inf)


def expand(per_group: Tensor, like: Tensor) -> Tensor:
    """A value per group, to multiply a tensor that has a slice per group; in its dtype."""
    return per_group.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent without overflow on the way, for exponents that one factor cannot hold."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return (x.double() * torch.exp2(half) * torch.exp2(exponent - half)).to(x.dtype)


def normalised(tensors: Tensors, factors: Factors | None = None) -> tuple[Tensors, Factors]:
    """Each group scaled by a power of two so that its largest entry is near 1."""
    factors = factors or {}
    tops = [largest({name: t}) for name, t in tensors.items()]
    tops += [
        largest({"": d}) * (largest({"": a}) if a.ndim > 2 else 1.0) for a, d in factors.values()
    ]
    top = torch.stack(tops).amax(0)
    exponent = torch.where(top > 0, -torch.floor(torch.log2(top)), 0.0)
    half = torch.floor(exponent / 2)

    def scaled(t: Tensor, e: Tensor) -> Tensor:
        return power_of_two(t, e.view(-1, *[1] * (t.ndim - 1)))

    def both(a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        if a.ndim == 2:  # numbers of rows
            return a, scaled(d, exponent)
        return scaled(a, half), scaled(d, exponent - half)

    return (
        {name: scaled(t, exponent) for name, t in tensors.items()},
        {name: both(a, d) for name, (a, d) in factors.items()},
    )


def steepest(
    gradient: Tensors, p: float, factors: Factors | None = None, *, careful: bool = True
) -> Direction:
    """The unit vector of the p-norm that has the largest inner product with the gradient.

    With 1/p + 1/q = 1 it is sign(g) |g|^{q−1} / ‖g‖_q^{q−1} (Foret et al. 2021, equation 2).

    Args:
        gradient: Per group, any scale; shapes (groups, *shape).
        p: Order of the norm, from 1 to infinity.
        factors: For p = 2 only: further parts of the gradient, as factors.
        careful: Scale the gradient first, which is needed for entries whose squares leave its
            dtype. Without it, `doubtful` tells for which groups that may be so.

    Returns:
        Direction: Zero where a group's gradient is exactly zero, NaN where it is not finite.
    """
    if p == 2.0:
        factors = factors or {}
        if careful:
            gradient, factors = normalised(gradient, factors)
        found = of_length(_length(gradient, factors))
        doubtful = None if careful else found.doubtful
        return Direction(gradient, found.coefficient, factors, doubtful)
    if p == torch.inf:
        return Direction({k: g.sign() for k, g in gradient.items()}, _moving(largest(gradient)))
    gradient, _ = normalised(gradient)
    if p == 1.0:
        return _largest_entry(gradient)
    q = p / (p - 1.0)
    powers = {name: g.sign() * g.abs() ** (q - 1.0) for name, g in gradient.items()}
    return Direction(powers, _reciprocal(norm(powers, p)))


def directed(rule: DirectionRule, gradient: Tensors, weights: Tensors) -> Direction:
    """The direction of every group by a rule of one's own; 0 where its gradient is exactly 0.

    The rule is given the gradient with respect to u, each group's times a power of two that takes
    its largest entry to between 1 and 2, and the weights without group axis; it returns points u of
    the unit ball, (groups, *shape).

    Raises:
        ArgumentError: If the rule gives other names or shapes than it was given.
    """
    gradient, _ = normalised(gradient)
    unit = _moving(largest(gradient))
    found = in_form_of(gradient, rule(gradient, weights), "the direction of a rule")
    stays = unit == 0
    found = {k: t.masked_fill(stays.view(-1, *[1] * (t.ndim - 1)), 0.0) for k, t in found.items()}
    return Direction(found, unit)


def in_form_of(like: Tensors, found: Tensors, what: str) -> Tensors:
    """What a rule of one's own gave, if it has the names and shapes that it was given.

    Raises:
        ArgumentError: If it has not.
    """
    if not isinstance(found, Mapping):
        raise ArgumentError(f"{what} is {found!r}: expected a dict of tensors by name")
    for name, t in like.items():
        if name not in found or found[name].shape != t.shape:
            got = f"shape {tuple(found[name].shape)}" if name in found else "nothing"
            raise ArgumentError(
                f"{what} has {got} for {name!r}: expected shape {tuple(t.shape)}, a slice per group"
            )
    return found


def _moving(top: Tensor) -> Tensor:
    """1 where a largest entry is not 0, NaN where it is not finite."""
    return torch.where(torch.isfinite(top), (top > 0).double(), torch.nan)


def of_length(length: Tensor) -> Direction:
    """The coefficient of gradients of given 2-norms, taken without care, (groups,)."""
    low, high = SAFE_NORMS
    return Direction({}, _reciprocal(length), {}, (length < low) | (length > high))


def _reciprocal(length: Tensor) -> Tensor:
    inverse = length.reciprocal().add(length * 0.0)  # NaN where the length is infinite
    return inverse.masked_fill(length == 0, 0.0)


def _length(gradient: Tensors, factors: Factors) -> Tensor:
    if not factors:
        return norm(gradient)
    square = low_rank.squared_norm(factors.values())
    return (square + norm(gradient).square() if gradient else square).sqrt()


def _largest_entry(gradient: Tensors) -> Direction:
    top = largest(gradient)
    free = top > 0  # groups whose one entry is not placed yet
    tensors: Tensors = {}
    for name, g in gradient.items():
        flat = g.reshape(len(g), -1)
        value, index = flat.abs().max(1)
        here = free & (value.double() == top)
        place = index.unsqueeze(1)
        entry = flat.gather(1, place).sign() * here.unsqueeze(1)
        tensors[name] = torch.zeros_like(flat).scatter_(1, place, entry).view_as(g)
        free = free & ~here
    return Direction(tensors, _moving(top))


def inner(a: Tensors, b: Tensors) -> Tensor:
    """The inner product over all parameters together, accumulated in float64; shape (groups,)."""
    return torch.stack([(t.double() * b[k]).reshape(len(t), -1).sum(1) for k, t in a.items()]).sum(
        0
    )


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
