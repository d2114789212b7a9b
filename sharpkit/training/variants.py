"""What a variant of SAM does otherwise in its first or second step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.errors import ArgumentError
from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import DirectionRule, Tensors

# (gradients at w, gradients at w + ε) to the gradients to step along, all (groups, *shape) by name
CombineRule = Callable[[Tensors, Tensors], Tensors]


@dataclass(frozen=True)
class SamVariant:
    """A variant of SAM: another first step, another second step, or both.

    Both functions see dicts of tensors `(groups, *shape)`, a slice per group of m examples; plain
    SAM has one group. The names are those of the parameters; where an optimizer knows no names,
    their positions as text. Make one object and use it for all steps: what is found out about a
    model is kept by it.

    Attributes:
        name: What it is called.
        direction: Given T ∘ g, each group's times a power of two that takes its largest entry to
            between 1 and 2, and the weights `(*shape)`; returns u with ‖u‖ ≤ 1, and ε = T ∘ u, with
            T = ρ, or ρ|w| where adaptive. A group whose gradient is 0 stays where it is. None for
            SAM's T ∘ g / ‖T ∘ g‖₂. `sharpkit.sharpness.one_step_along` takes the same function.
        combine: Given the gradients at w and at w + ε, returns the gradient to step along. It must
            be homogeneous, for a `GradScaler` multiplies both by the same factor. With
            DistributedDataParallel both passes of plain SAM must then be synchronised. None for
            SAM's, the one at w + ε.

    Example:
        Half of the plain gradient and half of the perturbed one, at w = 1 of w²/2:

        >>> from sharpkit.training import SAM
        >>> def half(plain, perturbed):
        ...     return {name: (plain[name] + g) / 2 for name, g in perturbed.items()}
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> variant = SamVariant("half", combine=half)
        >>> opt = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, variant=variant)
        >>> (w ** 2 / 2).sum().backward()
        >>> with opt.perturbed():
        ...     (w ** 2 / 2).sum().backward()
        >>> w.grad
        tensor([1.2500])
    """

    name: str = "sam"
    direction: DirectionRule | None = None
    combine: CombineRule | None = None

    @property
    def by_name(self) -> bool:
        """Whether gradients are looked at by name and shape."""
        return self.direction is not None or self.combine is not None


PLAIN_SAM = SamVariant()


def check_variant(variant: SamVariant) -> None:
    """Raise ArgumentError for something else, such as one of the functions that make a variant."""
    if not isinstance(variant, SamVariant):
        raise ArgumentError(
            f"variant is {variant!r}: expected a SamVariant, such as SamVariant(combine=function)"
        )


def combined(
    rule: CombineRule,
    plain: tuple[Tensors, Tensor],
    perturbed: tuple[Tensors, Tensor],
    shares: Tensor,
) -> Tensors:
    """Σ_i share_i combine(g_i(w), g_i(w + ε_i)).

    Gradients (groups, *shape) come times 2^exponent, with the exponents (groups,).
    """
    found = both(rule, _unscaled(*plain), _unscaled(*perturbed))
    return {name: (g * geometry.expand(shares, g)).sum(0) for name, g in found.items()}


def both(rule: CombineRule, plain: Tensors, perturbed: Tensors) -> Tensors:
    """What a rule makes of both gradients; ArgumentError if that has other names or shapes."""
    return geometry.in_form_of(
        perturbed, rule(plain, perturbed), "the gradient that a variant combined"
    )


def _unscaled(tensors: Tensors, exponent: Tensor) -> Tensors:
    back = -torch.where(torch.isfinite(exponent), exponent, 0.0)
    return {
        name: geometry.power_of_two(t, back.view(-1, *[1] * (t.ndim - 1)))
        for name, t in tensors.items()
    }
