"""SAM's perturbation for groups, ε_i = T² g_i / ‖T g_i‖₂ (see `radius`), on the device alone.

Squares of float32 gradients are added up in float32 where that is faster. Whether one may have left
its range is noted and looked at once a step, which is then repeated with care.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import DirectionRule, Factors, Tensors
from sharpkit.training.radius import Radii


class Steps(NamedTuple):
    """Where groups go."""

    at: Tensors  # w + ε, (groups, ...) as the gradients were given
    thin: Factors  # further perturbations DᵀA
    doubtful: Tensor  # a bool: whether a norm may be wrong


@torch.no_grad()
def steps_of_groups(
    weights: Tensors,
    gradients: Tensors,
    factors: Factors,
    exponent: Tensor,
    radii: Radii,
    scale: Tensors | None,
    direction: DirectionRule | None = None,
    *,
    careful: bool,
) -> Steps:
    """ε of every group, added to the weights.

    Args:
        weights: w, parameters or packs of them, (...).
        gradients: Of every group, of any scale, (groups, ...).
        factors: Of further parameters, which are not adaptive.
        exponent: +inf where a gradient is 0 for certain, (groups,).
        radii: Of the parameters.
        scale: T of the weights, (...); None if it is the same number for all parameters.
        direction: Of a variant of SAM (see `SamVariant`); then there are no packs and factors.
        careful: Scale the gradients before their squares are added up.
    """
    amounts = {name: radii.rho[name] for name in factors}
    if scale is not None:
        gradients = {name: g * scale[name] for name, g in gradients.items()}
        factors = {name: (a, d * amounts[name]) for name, (a, d) in factors.items()}
    if direction is None:
        unit = geometry.steepest(gradients, 2.0, factors, careful=careful)
    else:
        unit = geometry.directed(direction, gradients, weights)
    amount = unit.coefficient * (radii.common if scale is None else 1.0)
    at, thin = {}, {}
    for name, g in unit.tensors.items():
        each = geometry.expand(amount, g)
        each = each if scale is None else each * scale[name]
        at[name] = torch.addcmul(weights[name], g, each)
    for name, (a, d) in unit.factors.items():
        each = geometry.expand(amount, d)
        thin[name] = (a, d * (each if scale is None else each * amounts[name]))
    doubtful = unit.doubtful
    if doubtful is None:
        doubtful = torch.zeros_like(exponent, dtype=torch.bool)
    return Steps(at, thin, (doubtful & (exponent < torch.inf)).any())


@torch.no_grad()
def step_of_one(
    weights: Tensors,
    gradients: Sequence[Tensor | None],
    exponent: Tensor,
    radii: Radii,
    scale: Tensors | None,
    direction: DirectionRule | None = None,
    *,
    careful: bool,
    scaled: bool = True,
) -> tuple[Tensors, Tensor]:
    """The same for a single group, in as few calls as parameters allow.

    Gradients are in the order of the weights, None where there is none, and `scaled` if they are
    times a power of two; the exponent is a scalar. Returns w + ε, and whether the norm may be
    wrong.
    """
    used = {n: g for n, g in zip(weights, gradients, strict=True) if g is not None}
    if careful or not used or direction is not None:
        steps = steps_of_groups(
            {name: weights[name] for name in used},
            {name: g.unsqueeze(0) for name, g in used.items()}, {},
            exponent.unsqueeze(0), radii, scale, direction, careful=True,
        ) if used else None  # fmt: skip
        moved = {} if steps is None else {name: t[0] for name, t in steps.at.items()}
        return {**weights, **moved}, torch.zeros_like(exponent, dtype=torch.bool)
    ascent = list(used.values())
    factors = None if scale is None else [scale[name] for name in used]
    if factors is not None:
        ascent = list(torch._foreach_mul(ascent, factors))
    length = geometry.length_of_one(ascent)
    low, high = geometry.SAFE_NORMS
    if scaled:
        doubtful = ((length < low) | (length > high)) & (exponent < torch.inf)
    else:  # NaN may come of slopes that are too large
        doubtful = length.clamp(geometry.LEAST_UNSCALED, high) != length
    radius = radii.common if scale is None else 1.0
    amount = torch.where(length > 0, radius / length, length)  # NaN stays NaN
    at = geometry.step_of_one(ascent, amount, factors)
    torch._foreach_add_(at, [weights[name] for name in used])
    return {**weights, **dict(zip(used, at, strict=True))}, doubtful
