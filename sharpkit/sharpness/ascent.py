"""How the inner maximum of m-sharpness is found, for many groups at a time.

All ways work in the scaled coordinates u with ε = T ∘ u, where T = 1, or |w| in the adaptive
geometry: the ball is ‖u‖_p ≤ ρ and the gradient with respect to u is T ∘ g. None of them is sure to
find the maximum: what they return is a lower bound of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import Direction, Tensors


@dataclass(frozen=True)
class Ascent:
    """The rule of the inner maximum: `kind` is "one_step", "pgd", "apgd" or "average".

    `restarts` counts the starts of "pgd" and "apgd"; the first is at the weights themselves.
    """

    kind: str = "one_step"
    p: float = 2.0
    adaptive: bool = False
    steps: int = 10
    seed: int = 0
    restarts: int = 1

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient at the unperturbed weights is used."""
        return self.kind != "average"

    @property
    def allows_factors(self) -> bool:
        """Whether large linear gradients may stay factored: no entry is looked at on its own."""
        return self.kind == "one_step" and self.p == 2.0 and not self.adaptive


def scaled(tensors: Tensors, scale: Tensors | None) -> Tensors:
    """T ∘ tensors; the scale has no group axis."""
    if scale is None:
        return tensors
    return {name: t * scale[name] for name, t in tensors.items()}


def projected_ascent(
    ascent: Ascent,
    weights: Tensors,
    scale: Tensors | None,
    first: Direction,
    base: Tensor,
    rho: float,
    gradients: Callable[[Tensors], tuple[Tensors, Tensor]],
    losses: Callable[[Tensors], Tensor],
    random_start: Callable[[int], Tensors] | None = None,
    *,
    careful: bool = True,
    note: Callable[[Direction], object] = lambda direction: None,
) -> Tensor:
    """The largest loss increase met on projected steepest ascent: a lower bound of the maximum.

    The first start is 0, and its first iterate the one-step perturbation. It costs `steps` passes,
    of which the last is a forward pass; every further start one pass more.

    Args:
        ascent: The kind, "pgd" or "apgd", the norm, and the number of steps and starts.
        weights: Unperturbed, without group axis.
        scale: T, or None for ones.
        first: Steepest direction in u at the weights.
        base: Unperturbed losses, (groups,).
        rho: Radius.
        gradients: Perturbed weights to (gradient, loss) per group.
        losses: Perturbed weights to loss per group.
        random_start: Restart 1, 2, ... to a point u of the ball (see `random_point`); needed where
            `ascent.restarts` > 1.
        careful: As in `geometry.steepest`.
        note: Called with every direction.

    Returns:
        Tensor: Increases, (groups,), never negative, and never less with more restarts.

    Source:
        Madry et al., ICLR 2018 ("pgd"); Croce and Hein, ICML 2020, algorithm 1 ("apgd").
    """

    def at(u: Tensors) -> Tensors:
        return {name: weights[name] + e for name, e in scaled(u, scale).items()}

    def slope(u: Tensors) -> tuple[Direction, Tensor]:
        gradient, loss = gradients(at(u))
        direction = geometry.steepest(scaled(gradient, scale), ascent.p, careful=careful)
        note(direction)
        return direction, loss - base

    def increase(u: Tensors) -> Tensor:
        return losses(at(u)) - base

    climb = _with_momentum if ascent.kind == "apgd" else _with_shrinking_steps
    origin = {name: torch.zeros_like(t) for name, t in first.tensors.items()}
    best = climb(ascent, rho, origin, first, torch.zeros_like(base), slope, increase)
    for restart in range(1, ascent.restarts):
        assert random_start is not None
        u = random_start(restart)
        best = torch.maximum(best, climb(ascent, rho, u, *slope(u), slope, increase))
    return best


Slope = Callable[[Tensors], tuple[Direction, Tensor]]  # u -> (steepest direction, increase)
Increase = Callable[[Tensors], Tensor]


def _with_shrinking_steps(
    ascent: Ascent,
    rho: float,
    u: Tensors,
    direction: Direction,
    value: Tensor,
    slope: Slope,
    increase: Increase,
) -> Tensor:
    """The largest increase at u and the iterates; step t = 0, 1, ... has length ρ/√(t+1)."""
    best = value
    for step in range(ascent.steps):
        u = geometry.project(_step(u, direction, rho / (step + 1) ** 0.5), rho, ascent.p)
        if step + 1 < ascent.steps:
            direction, value = slope(u)
        else:
            value = increase(u)
        # NaN must win, so that a diverged loss is reported and not skipped
        best = torch.maximum(best, value)
    return best


def _with_momentum(
    ascent: Ascent,
    rho: float,
    u: Tensors,
    direction: Direction,
    value: Tensor,
    slope: Slope,
    increase: Increase,
) -> Tensor:
    """The largest increase at u and the iterates of APGD, whose steps begin at 2ρ.

    At its checkpoints a group's step is halved, and it goes back to its best point, if fewer than
    three quarters of the steps since the last checkpoint went up, or if neither its step nor its
    best value has changed since.
    """
    previous, best, best_u, best_direction = u, value, u, direction
    length = torch.full_like(value, 2.0 * rho)
    rises, last, best_then, length_then = torch.zeros_like(value), 0, best, length
    checkpoints = _checkpoints(ascent.steps)
    for step in range(1, ascent.steps + 1):
        z = geometry.project(_step(u, direction, length), rho, ascent.p)
        if step > 1:
            mixed = {n: t + 0.75 * (z[n] - t) + 0.25 * (t - previous[n]) for n, t in u.items()}
            z = geometry.project(mixed, rho, ascent.p)
        previous, u, before = u, z, value
        if step == ascent.steps:
            return torch.maximum(best, increase(u))
        direction, value = slope(u)
        rises = rises + (value > before)
        better = value > best
        best = torch.maximum(best, value)
        best_u = _either(better, u, best_u)
        best_direction = _either_direction(better, direction, best_direction)
        if step in checkpoints:
            still = (length == length_then) & (best == best_then)
            stuck = (rises < 0.75 * (step - last)) | still
            rises, last, best_then, length_then = torch.zeros_like(rises), step, best, length
            length = torch.where(stuck, length / 2, length)
            u = _either(stuck, best_u, u)
            value = torch.where(stuck, best, value)
            direction = _either_direction(stuck, best_direction, direction)
    return best


def _checkpoints(steps: int) -> set[int]:
    """At 0.22 of the steps, then at distances that shrink by 0.03 to 0.06 of them.

    Example:
        >>> sorted(_checkpoints(20))
        [5, 9, 12, 14, 16, 18, 19]
    """
    found, place, gap = set(), 0.22, 0.22
    while (step := math.ceil(place * steps - 1e-9)) < steps:
        found.add(step)
        gap = max(gap - 0.03, 0.06)
        place += gap
    return found


def _step(u: Tensors, direction: Direction, length: float | Tensor) -> Tensors:
    amount = length * direction.coefficient
    return {k: t + direction.tensors[k] * geometry.expand(amount, t) for k, t in u.items()}


def _either(mask: Tensor, yes: Tensors, no: Tensors) -> Tensors:
    """Group by group, from one or the other."""
    return {
        name: torch.where(mask.view(-1, *[1] * (t.ndim - 1)), yes[name], t)
        for name, t in no.items()
    }


def _either_direction(mask: Tensor, yes: Direction, no: Direction) -> Direction:
    coefficient = torch.where(mask, yes.coefficient, no.coefficient)
    return Direction(_either(mask, yes.tensors, no.tensors), coefficient)


def gaussian_direction(
    ascent: Ascent, weights: Tensors, m: int, first_group: int, groups: int, sample: int
) -> Direction:
    """Gaussian directions of unit p-norm, one per group, the same wherever a group is computed.

    Each group's numbers come from a CPU generator seeded by (seed, m, group, sample), so they
    depend neither on the chunk size nor on the device.
    """
    numbers = range(first_group, first_group + groups)
    z = _draws([f"{ascent.seed}/{m}/{group}/{sample}" for group in numbers], _size(weights))
    tensors = _split(z, weights)
    return Direction(tensors, 1.0 / geometry.norm(tensors, ascent.p))


def random_point(
    ascent: Ascent,
    weights: Tensors,
    m: int,
    first_group: int,
    groups: int,
    rho: float,
    restart: int,
) -> Tensors:
    """Points u, uniform in the ball of radius rho, p = 2 or infinity, one per group.

    Each group's numbers are seeded by (seed, m, group, restart), as in `gaussian_direction`.
    """
    numbers = range(first_group, first_group + groups)
    keys = [f"{ascent.seed}/{m}/{group}/restart {restart}" for group in numbers]
    size = _size(weights)
    if ascent.p == torch.inf:
        return _split(rho * torch.erf(_draws(keys, size).double() / 2**0.5), weights)
    # P coordinates of a point on the sphere of P + 2 dimensions are uniform in the ball
    z = _draws(keys, size + 2).double()
    return _split(rho * z[:, :size] / z.norm(dim=1, keepdim=True), weights)


def _draws(keys: list[str], count: int) -> Tensor:
    """Standard normal float32 numbers on the CPU, one row per key."""
    rows = []
    for key in keys:
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randn(count, generator=generator, dtype=torch.float32))
    return torch.stack(rows)


def _size(weights: Tensors) -> int:
    return sum(w.numel() for w in weights.values())


def _split(rows: Tensor, weights: Tensors) -> Tensors:
    """Rows (groups, P) as tensors of the weights' shapes, dtype and device."""
    parts = torch.split(rows, [w.numel() for w in weights.values()], 1)
    return {
        name: part.reshape(len(rows), *w.shape).to(w.device, w.dtype)
        for (name, w), part in zip(weights.items(), parts, strict=True)
    }
