"""What a rule of the inner maximum works on: the losses of some groups around the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.errors import ArgumentError
from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import Direction, Tensors


@dataclass(frozen=True)
class Ball:
    """Losses of groups at the weights w + T ∘ u, with u in the ball ‖u‖_p ≤ ρ.

    T = 1, or |w| in the adaptive geometry; the gradient with respect to u is T ∘ g. A point u is a
    dict of tensors `(groups, *shape)`, by the names of the weights.

    Attributes:
        p: Order of the norm.
        steps: As many as were asked for.
        restarts: Starts that were asked for, of which the first is at the weights.
        weights: w, without group axis.
        scale: T, or None for ones.
        base: Losses at w, (groups,) float64.
        gradients: Perturbed weights to (gradient of any positive scale, loss) per group.
        losses: Perturbed weights, and factors of further ones, to losses, (groups,) float64.
        gaussian: The number of a sample to Gaussian directions of unit norm.
        random_point: Radius and number of a restart to points uniform in the ball (p = 2 or ∞).
        raw: g at w, of any positive scale; empty for a rule that needs no gradient.
        first: The steepest direction at w, of unit norm; 0 where g is 0.
        careful: As in `geometry.steepest`.
        note: Called with every direction.
    """

    p: float
    steps: int
    restarts: int
    weights: Tensors
    scale: Tensors | None
    base: Tensor
    gradients: Callable[[Tensors], tuple[Tensors, Tensor]]
    losses: Callable[..., Tensor]
    gaussian: Callable[[int], Direction]
    random_point: Callable[[float, int], Tensors]
    raw: Tensors
    first: Direction
    careful: bool = True
    note: Callable[[Direction], object] = lambda direction: None

    def gradient(self) -> Tensors:
        """T ∘ g at w, the gradient with respect to u at 0, of any positive scale."""
        return scaled(self.raw, self.scale)

    def slope(self, u: Tensors) -> tuple[Direction, Tensor]:
        """The steepest direction at u, of unit norm, and the loss increase there; a pass."""
        gradient, loss = self.gradients(self._at(u))
        direction = geometry.steepest(scaled(gradient, self.scale), self.p, careful=self.careful)
        self.note(direction)
        return direction, loss - self.base

    def increase(self, u: Tensors) -> Tensor:
        """The loss increase at u, (groups,); a forward pass."""
        return self.losses(self._at(u)) - self.base

    def along(self, direction: Direction, rhos: Sequence[float]) -> Tensor:
        """The loss increase at some lengths along a direction, (lengths, groups)."""
        step = scaled(direction.tensors, self.scale)
        found = []
        for rho in rhos:
            amount = rho * direction.coefficient
            thin = {
                k: (a, d * geometry.expand(amount, d)) for k, (a, d) in direction.factors.items()
            }
            at = geometry.moved(self.weights, step, amount)
            found.append(self.losses(at, thin) - self.base)
        return torch.stack(found)

    def zero_where_flat(self, increases: Tensor) -> Tensor:
        """Exactly 0, not the rounding of two passes, where there is no gradient to go along."""
        return increases.masked_fill(self.first.coefficient == 0, 0.0)

    def _at(self, u: Tensors) -> Tensors:
        return {name: self.weights[name] + e for name, e in scaled(u, self.scale).items()}


def scaled(tensors: Tensors, scale: Tensors | None) -> Tensors:
    """T ∘ tensors; the scale has no group axis."""
    if scale is None:
        return tensors
    return {name: t * scale[name] for name, t in tensors.items()}


def gaussian_direction(
    seed: int, p: float, weights: Tensors, m: int, first_group: int, groups: int, sample: int
) -> Direction:
    """Gaussian directions of unit p-norm, one per group, the same wherever a group is computed.

    Each group's numbers come from a CPU generator seeded by (seed, m, group, sample), so they
    depend neither on the chunk size nor on the device.
    """
    numbers = range(first_group, first_group + groups)
    z = _draws([f"{seed}/{m}/{group}/{sample}" for group in numbers], _size(weights))
    tensors = _split(z, weights)
    return Direction(tensors, 1.0 / geometry.norm(tensors, p))


def random_point(
    seed: int,
    p: float,
    weights: Tensors,
    m: int,
    first_group: int,
    groups: int,
    rho: float,
    restart: int,
) -> Tensors:
    """Points u, uniform in the ball of radius rho, p = 2 or infinity, one per group.

    Each group's numbers are seeded by (seed, m, group, restart), as in `gaussian_direction`.

    Raises:
        ArgumentError: For another p.
    """
    if p not in (2.0, torch.inf):
        raise ArgumentError(f"random points are drawn in balls of norm 2 or infinity, got {p}")
    numbers = range(first_group, first_group + groups)
    keys = [f"{seed}/{m}/{group}/restart {restart}" for group in numbers]
    size = _size(weights)
    if p == torch.inf:
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
