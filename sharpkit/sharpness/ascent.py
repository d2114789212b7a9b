"""How the inner maximum of m-sharpness is found, for many groups at a time.

All three ways work in the scaled coordinates u with ε = T ∘ u, where T = 1, or |w| in the adaptive
geometry: the ball is ‖u‖_p ≤ ρ and the gradient with respect to u is T ∘ g.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.sharpness import geometry
from sharpkit.sharpness.geometry import Direction, Tensors


@dataclass(frozen=True)
class Ascent:
    """The rule of the inner maximum: `kind` is "one_step", "pgd" or "average"."""

    kind: str = "one_step"
    p: float = 2.0
    adaptive: bool = False
    steps: int = 10
    seed: int = 0

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
) -> Tensor:
    """The largest loss increase among 0 and the iterates of projected steepest ascent.

    Step t = 0, 1, ... has length ρ/√(t+1), so the first iterate is the one-step perturbation.

    Args:
        ascent: The norm and the number of steps.
        weights: Unperturbed, without group axis.
        scale: T, or None for ones.
        first: Steepest direction in u at the weights.
        base: Unperturbed losses, (groups,).
        rho: Radius.
        gradients: Perturbed weights to (gradient, loss) per group.
        losses: Perturbed weights to loss per group.

    Returns:
        Tensor: Increases, (groups,), never negative.
    """
    best = torch.zeros_like(base)
    direction = first
    u: Tensors | None = None
    for step in range(ascent.steps):
        length = (rho / (step + 1) ** 0.5) * direction.coefficient
        if u is None:
            u = {k: t * geometry.expand(length, t) for k, t in direction.tensors.items()}
        else:
            u = {k: t + direction.tensors[k] * geometry.expand(length, t) for k, t in u.items()}
        u = geometry.project(u, rho, ascent.p)
        epsilon = scaled(u, scale)
        at = {name: weights[name] + e for name, e in epsilon.items()}
        if step + 1 < ascent.steps:
            gradient, loss = gradients(at)
            direction = geometry.steepest(scaled(gradient, scale), ascent.p)
            geometry.check_flat(direction, gradient)
        else:
            loss = losses(at)
        # NaN must win, so that a diverged loss is reported and not skipped
        best = torch.maximum(best, loss - base)
    return best


def gaussian_direction(
    ascent: Ascent, weights: Tensors, m: int, first_group: int, groups: int, sample: int
) -> Direction:
    """Gaussian directions of unit p-norm, one per group, the same wherever a group is computed.

    Each group's numbers come from a CPU generator seeded by (seed, m, group, sample), so they
    depend neither on the chunk size nor on the device.
    """
    sizes = {name: w.numel() for name, w in weights.items()}
    reference = next(iter(weights.values()))
    draws = []
    for group in range(first_group, first_group + groups):
        key = f"{ascent.seed}/{m}/{group}/{sample}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.randn(sum(sizes.values()), generator=generator, dtype=torch.float32))
    z = torch.stack(draws).to(reference.device, reference.dtype)
    parts = torch.split(z, list(sizes.values()), 1)
    tensors = {
        name: part.reshape(groups, *weights[name].shape)
        for name, part in zip(sizes, parts, strict=True)
    }
    return Direction(tensors, 1.0 / geometry.norm(tensors, ascent.p))
