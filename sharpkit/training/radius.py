"""The ball of SAM's inner maximum: one radius, or one per parameter, plain or adaptive.

With T = ρ for a parameter of radius ρ, and T = ρ|w| elementwise where it is adaptive, the ball is
‖ε / T‖₂ ≤ 1 over all parameters together, and the loss rises most, to first order, at

    ε = T² g / ‖T g‖₂.

With one ρ that is SAM's ρ g / ‖g‖₂, and ASAM's ρ w² g / ‖w g‖₂. A parameter with ρ = 0 stays where
it is and does not count in the norm. Nothing is divided by a weight, so a weight of 0 stays 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.errors import ArgumentError


def checked_radius(rho: Any) -> float:
    """The radius as a float.

    Raises:
        ArgumentError: Unless it is a finite number of at least 0.
    """
    try:
        value = float(rho)
    except (TypeError, ValueError):
        raise ArgumentError(f"rho must be a number of at least 0, got {rho!r}") from None
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"rho must be finite and at least 0, got {rho}")
    return value


@dataclass(frozen=True)
class Radii:
    """The radius of every parameter by name, and which of them are adaptive.

    Radii are numbers, or scalar tensors, where equal ones are the same tensor.
    """

    rho: Mapping[str, float | Tensor]
    adaptive: frozenset[str] = frozenset()

    @property
    def common(self) -> float | Tensor:
        """The radius of all parameters, if there is one."""
        return next(iter(self.rho.values()))

    def scale(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """T of some weights by name, in their shapes; None if it is one number for all."""
        if not self.adaptive and len(set(self.rho.values())) == 1:
            return None
        return {
            name: w.detach().abs() * self.rho[name]
            if name in self.adaptive
            else _filled(w, self.rho[name])
            for name, w in weights.items()
        }


def _filled(like: Tensor, rho: float | Tensor) -> Tensor:
    return rho.expand_as(like) if isinstance(rho, Tensor) else torch.full_like(like, rho)


def radii_of_groups(
    groups: Iterable[Mapping[str, Any]], model: nn.Module, *, factor: float = 1.0
) -> Radii:
    """The radii of a model's parameters from an optimizer's groups, which have rho and adaptive.

    Args:
        groups: Of the optimizer.
        model: Whose parameters they are.
        factor: On every radius.

    Raises:
        ArgumentError: If none of the model's parameters is in a group, or a rho is out of range.
    """
    settings = {
        id(p): (checked_radius(group["rho"]) * factor, bool(group["adaptive"]))
        for group in groups
        for p in group["params"]
    }
    mine = {
        name: settings[id(p)]
        for name, p in model.named_parameters()
        if id(p) in settings and p.requires_grad
    }
    if not mine:
        raise ArgumentError("the model has no parameter that this optimizer trains")
    return Radii(
        {name: rho for name, (rho, _) in mine.items()},
        frozenset(name for name, (_, adaptive) in mine.items() if adaptive),
    )
