"""The rules by which the inner maximum of m-sharpness is found, and the one table of them.

A rule works on a `Ball`: the losses of some groups at the weights w + T ∘ u, in whose coordinates u
the ball is ‖u‖_p ≤ ρ. None of them is sure to find the maximum: what they return is a lower bound
of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import ArgumentError
from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import Direction, DirectionRule, Tensors
from sharpkit.sharpness.ball import Ball


@dataclass(frozen=True)
class AscentRule:
    """How the inner maximum is found: an entry of `ASCENT_RULES`, or one of your own.

    Attributes:
        name: What it is called.
        increases: (ball, radii) to the loss increases found, (radii, groups).
        needs_gradient: Whether the gradient at the unperturbed weights is used.
        linearised: Whether it is the step of length ρ along `ball.first` and nothing else, which
            has faster ways.
        projected: Whether it projects on the ball, so that p is 2 or infinity, and has restarts.
        packed: Whether small parameters may lie side by side in one tensor, because neither names
            nor shapes matter.
    """

    name: str
    increases: Callable[[Ball, Sequence[float]], Tensor]
    needs_gradient: bool = True
    linearised: bool = False
    projected: bool = False
    packed: bool = False


# a function (ball, radius) -> increases (groups,) is a rule as well
AscentLike: TypeAlias = str | AscentRule | Callable[[Ball, float], Tensor]


def ascent_rule(ascent: AscentLike) -> AscentRule:
    """A rule by its name in `ASCENT_RULES`, or of a function (ball, radius) -> increases.

    Raises:
        ArgumentError: For a name that is not in the table, or something else.
    """
    if isinstance(ascent, AscentRule):
        return ascent
    if isinstance(ascent, str) and ascent in ASCENT_RULES:
        return ASCENT_RULES[ascent]
    if not callable(ascent):
        names = ", ".join(f'"{name}"' for name in ASCENT_RULES)
        raise ArgumentError(
            f"ascent must be one of {names}, an AscentRule or a function (ball, rho) -> increases, "
            f"got {ascent!r}"
        )
    function, name = ascent, getattr(ascent, "__name__", type(ascent).__name__)

    def increases(ball: Ball, rhos: Sequence[float]) -> Tensor:
        found = [function(ball, rho) for rho in rhos]
        for increase in found:
            if not isinstance(increase, Tensor):
                raise ArgumentError(f"{name} gave {increase!r}: expected a tensor, one per group")
        return torch.stack(found)

    return AscentRule(name, increases)


def one_step_along(direction: DirectionRule) -> AscentRule:
    """The rule that goes ρ along a direction of your own, which `SamVariant` takes as well."""

    def increases(ball: Ball, rhos: Sequence[float]) -> Tensor:
        return ball.along(geometry.directed(direction, ball.gradient(), ball.weights), rhos)

    return AscentRule(getattr(direction, "__name__", type(direction).__name__), increases)


def _one_step(ball: Ball, rhos: Sequence[float]) -> Tensor:
    """At the maximum of the linearised loss (Foret et al. 2021, equation 2)."""
    return ball.zero_where_flat(ball.along(ball.first, rhos))


def _average(ball: Ball, rhos: Sequence[float]) -> Tensor:
    """The mean over `steps` Gaussian directions, instead of a maximum."""
    total = torch.zeros(len(rhos), len(ball.base), dtype=torch.float64, device=ball.base.device)
    for sample in range(ball.steps):
        total += ball.along(ball.gaussian(sample), rhos)
    return total / ball.steps


def _projected(climb: Climb) -> Callable[[Ball, Sequence[float]], Tensor]:
    """The largest increase met on projected steepest ascent: a lower bound of the maximum.

    The first start is 0, and its first iterate the one-step perturbation. It costs `steps` passes,
    of which the last is a forward pass; every further start, at a random point, one pass more.
    Increases are never negative, and never less with more restarts.
    """

    def largest(ball: Ball, rho: float) -> Tensor:
        origin = {name: torch.zeros_like(t) for name, t in ball.first.tensors.items()}
        best = climb(ball, rho, origin, ball.first, torch.zeros_like(ball.base))
        for restart in range(1, ball.restarts):
            u = ball.random_point(rho, restart)
            best = torch.maximum(best, climb(ball, rho, u, *ball.slope(u)))
        return best

    def increases(ball: Ball, rhos: Sequence[float]) -> Tensor:
        found = torch.stack([largest(ball, rho) for rho in rhos])
        return found if ball.restarts > 1 else ball.zero_where_flat(found)

    return increases


# ball, radius, start u, the steepest direction and the increase there -> the largest increase
Climb = Callable[[Ball, float, Tensors, Direction, Tensor], Tensor]


def _with_shrinking_steps(
    ball: Ball, rho: float, u: Tensors, direction: Direction, value: Tensor
) -> Tensor:
    """The largest increase at u and the iterates; step t = 0, 1, ... has length ρ/√(t+1).

    Source:
        Madry et al., ICLR 2018.
    """
    best = value
    for step in range(ball.steps):
        u = geometry.project(_step(u, direction, rho / (step + 1) ** 0.5), rho, ball.p)
        if step + 1 < ball.steps:
            direction, value = ball.slope(u)
        else:
            value = ball.increase(u)
        # NaN must win, so that a diverged loss is reported and not skipped
        best = torch.maximum(best, value)
    return best


def _with_momentum(
    ball: Ball, rho: float, u: Tensors, direction: Direction, value: Tensor
) -> Tensor:
    """The largest increase at u and the iterates of APGD, whose steps begin at 2ρ.

    At its checkpoints a group's step is halved, and it goes back to its best point, if fewer than
    three quarters of the steps since the last checkpoint went up, or if neither its step nor its
    best value has changed since.

    Source:
        Croce and Hein, ICML 2020, algorithm 1.
    """
    previous, best, best_u, best_direction = u, value, u, direction
    length = torch.full_like(value, 2.0 * rho)
    rises, last, best_then, length_then = torch.zeros_like(value), 0, best, length
    checkpoints = _checkpoints(ball.steps)
    for step in range(1, ball.steps + 1):
        z = geometry.project(_step(u, direction, length), rho, ball.p)
        if step > 1:
            mixed = {n: t + 0.75 * (z[n] - t) + 0.25 * (t - previous[n]) for n, t in u.items()}
            z = geometry.project(mixed, rho, ball.p)
        previous, u, before = u, z, value
        if step == ball.steps:
            return torch.maximum(best, ball.increase(u))
        direction, value = ball.slope(u)
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
    step = direction.times(length)
    return {name: t + step[name] for name, t in u.items()}


def _either(mask: Tensor, yes: Tensors, no: Tensors) -> Tensors:
    """Group by group, from one or the other."""
    return {
        name: torch.where(mask.view(-1, *[1] * (t.ndim - 1)), yes[name], t)
        for name, t in no.items()
    }


def _either_direction(mask: Tensor, yes: Direction, no: Direction) -> Direction:
    coefficient = torch.where(mask, yes.coefficient, no.coefficient)
    return Direction(_either(mask, yes.tensors, no.tensors), coefficient)


ASCENT_RULES: dict[str, AscentRule] = {
    rule.name: rule
    for rule in (
        AscentRule("one_step", _one_step, linearised=True, packed=True),
        AscentRule("pgd", _projected(_with_shrinking_steps), projected=True, packed=True),
        AscentRule("apgd", _projected(_with_momentum), projected=True, packed=True),
        AscentRule("average", _average, needs_gradient=False, packed=True),
    )
}


@dataclass(frozen=True)
class Ascent:
    """A rule with its settings: the geometry of the ball, and how much is tried.

    `restarts` counts the starts of projected rules; the first is at the weights themselves.
    """

    kind: AscentLike = "one_step"
    p: float = 2.0
    adaptive: bool = False
    steps: int = 10
    seed: int = 0
    restarts: int = 1

    @property
    def rule(self) -> AscentRule:
        """The rule itself."""
        return ascent_rule(self.kind)

    @property
    def allows_factors(self) -> bool:
        """Whether large linear gradients may stay factored: no entry is looked at on its own."""
        return self.rule.linearised and self.p == 2.0 and not self.adaptive

    def apart(self, names: Iterable[str], factored: Iterable[str] = ()) -> frozenset[str]:
        """The parameters that must not lie side by side with others: those in factors, or all."""
        return frozenset(factored if self.rule.packed else names)
