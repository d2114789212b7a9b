"""The plain engine: one group after the other, whole weight vectors, nothing shared.

It is the reference that the vectorised engine is tested against, and what is used for models whose
operations cannot be vectorised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sharpkit.contract.examples import Examples
from sharpkit.errors import ModelError
from sharpkit.groupwise.geometry import Direction
from sharpkit.groupwise.objective import Objective
from sharpkit.sharpness.ascent import (
    Ascent,
    gaussian_direction,
    projected_ascent,
    random_point,
)
from sharpkit.sharpness.engine import Groupwise
from sharpkit.sharpness.groups import Groups


class Loop:
    """All m and rho by a Python loop; the same interface as the vectorised `Sweep`.

    Args:
        objective: What is measured.
        examples: In the order of the groups.
        ms: Group sizes.
        rhos: Radii.
        ascent: How the inner maximum is found.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        ms: Sequence[int],
        rhos: Sequence[float],
        ascent: Ascent,
    ) -> None:
        self.objective, self.examples, self.rhos, self.ascent = objective, examples, rhos, ascent
        self.levels = [Groupwise(m) for m in ms]

    def extend(self, start: int, stop: int, advance: Callable[[int], object]) -> None:
        """Measure the groups of examples start to stop, which are whole except at the end."""
        for level in self.levels:
            for a in range(start, stop, level.m):
                group = self.examples.slice(a, min(a + level.m, stop))
                group = group.to(self.objective.model.device, self.objective.model.dtype)
                values, weight, moved = _one_group(
                    self.objective, group, level.m, self.rhos, self.ascent, len(level.sizes)
                )
                level.increases.append(torch.tensor(values, dtype=torch.float64).unsqueeze(1))
                level.sizes.append(len(group))
                level.weights.append(weight)
                level.zero_gradients += not moved
        advance(stop - start)


def _one_group(
    objective: Objective,
    group: Examples,
    m: int,
    rhos: Sequence[float],
    ascent: Ascent,
    number: int,
) -> tuple[list[float], float, bool]:
    w = torch.cat([t.flatten() for t in objective.weights.values()])
    scale = w.abs() if ascent.adaptive else torch.ones_like(w)
    base, counted = objective.losses(objective.weights, group)
    weight = float(counted)
    if not torch.isfinite(base):
        raise ModelError(f"the loss is not finite at the unperturbed weights (group {number})")
    if ascent.kind == "average":
        noise = _gaussians(objective, ascent, m, number)
        increases = [_average(objective, group, w, scale, noise, base, rho) for rho in rhos]
        return _finite(increases, m, rhos), weight, True
    first = _dual(scale * _gradient(objective, group, w), ascent.p)
    if not bool(first.any()) and ascent.restarts == 1:
        return [0.0 for _ in rhos], weight, False
    if ascent.kind == "one_step":
        increases = [_loss(objective, group, w + rho * scale * first) - base for rho in rhos]
    else:
        increases = [_ascend(objective, group, first, base, rho, ascent, m, number) for rho in rhos]
    return _finite(increases, m, rhos), weight, bool(first.any())


def _finite(increases: Sequence[Tensor], m: int, rhos: Sequence[float]) -> list[float]:
    for increase, rho in zip(increases, rhos, strict=True):
        if not bool(torch.isfinite(increase)):
            raise ModelError(
                f"the loss is not finite at the perturbed weights (m = {m}, rho = {rho})"
            )
    return [float(increase) for increase in increases]


def _average(
    objective: Objective,
    group: Examples,
    w: Tensor,
    scale: Tensor,
    noise: Sequence[Tensor],
    base: Tensor,
    rho: float,
) -> Tensor:
    losses = [_loss(objective, group, w + rho * scale * z) for z in noise]
    return torch.stack(losses).mean() - base


def _ascend(
    objective: Objective,
    group: Examples,
    direction: Tensor,
    base: Tensor,
    rho: float,
    ascent: Ascent,
    m: int,
    number: int,
) -> Tensor:
    """Projected ascent of this one group."""
    weights, one = objective.weights, Groups(objective, group, 1)
    scale = {name: v.abs() for name, v in weights.items()} if ascent.adaptive else None
    tensors = {name: t.unsqueeze(0) for name, t in _unflatten(objective, direction).items()}
    first = Direction(tensors, torch.ones(1, dtype=torch.float64, device=direction.device))
    start = partial(random_point, ascent, weights, m, number, 1, rho)
    return projected_ascent(
        ascent, weights, scale, first, base.unsqueeze(0), rho, one.gradients, one.losses, start
    )[0]


def _unflatten(objective: Objective, flat: Tensor) -> dict[str, Tensor]:
    sizes = [t.numel() for t in objective.weights.values()]
    return {
        name: part.view_as(t)
        for (name, t), part in zip(objective.weights.items(), torch.split(flat, sizes), strict=True)
    }


def _loss(objective: Objective, group: Examples, w: Tensor) -> Tensor:
    """The mean loss of a group, in slices that fit in memory, as float64."""
    return objective.losses(_unflatten(objective, w), group)[0]


def _gradient(objective: Objective, group: Examples, w: Tensor) -> Tensor:
    """The gradient of a group's loss; up to a positive factor that keeps it from underflow."""
    parts = [
        objective.gradient(_unflatten(objective, w), part) for part in group.chunks(objective.chunk)
    ]
    scale = min(float(part.exponent) for part in parts)
    counted = sum(float(part.weight) for part in parts)
    total = torch.zeros_like(w)
    for part in parts:
        if float(part.weight) == 0 or float(part.exponent) == torch.inf:
            continue
        factor = 2.0 ** (scale - float(part.exponent)) * float(part.weight) / counted
        flat = [
            (torch.zeros_like(v) if g is None else g).reshape(-1)
            for v, g in zip(objective.weights.values(), part.gradient, strict=True)
        ]
        total += factor * torch.cat(flat)
    return total


def _dual(g: Tensor, p: float) -> Tensor:
    """The unit vector of the p-norm with the largest inner product with g; 0 for g = 0."""
    top = g.abs().max()
    if not bool(torch.isfinite(top)):
        raise ModelError("the gradient of a group has NaN or infinite entries")
    if not bool(top > 0):
        return torch.zeros_like(g)
    g = (g.double() / top.double()).to(g.dtype)
    if p == torch.inf:
        return g.sign()
    if p == 1.0:
        out = torch.zeros_like(g)
        index = int(g.abs().argmax())
        out[index] = g[index].sign()
        return out
    d = g.sign() * g.abs() ** (1.0 / (p - 1.0))  # q − 1 = 1 / (p − 1)
    unit: Tensor = d / torch.linalg.vector_norm(d, ord=p, dtype=torch.float64).to(d.dtype)
    return unit


def _gaussians(objective: Objective, ascent: Ascent, m: int, number: int) -> list[Tensor]:
    flat = []
    for sample in range(ascent.steps):
        z = gaussian_direction(ascent, objective.weights, m, number, 1, sample)
        vector = torch.cat([t.flatten() for t in z.tensors.values()])
        flat.append(vector * z.coefficient.to(vector.dtype))
    return flat
