"""SAM's perturbation for lists of parameters that hold their gradients in `.grad`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharpkit.contract.half_precision import HALF, WAY_OUT
from sharpkit.errors import ModelError
from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import DirectionRule, Tensors


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of every tensor in float64, safe from under- and overflow; shape (tensors,).

    Example:
        >>> norms([torch.tensor([3e-40, 4e-40]), torch.zeros(2)])
        tensor([5.0000e-40, 0.0000e+00], dtype=torch.float64)
    """
    device = tensors[0].device
    if any(t.dtype == torch.float64 for t in tensors):  # squares may leave float64 itself
        tops = [t.abs().amax().double() if t.numel() else t.sum().double() for t in tensors]
        safe = [torch.where((top > 0) & torch.isfinite(top), top, 1.0) for top in tops]
        parts = [
            torch.linalg.vector_norm(t / s, dtype=torch.float64) * s
            for t, s in zip(tensors, safe, strict=True)
        ]
    else:
        parts = list(torch._foreach_norm(list(tensors), 2, dtype=torch.float64))
    return torch.stack([part.to(device) for part in parts])


@torch.no_grad()
def perturb(
    parameters: Sequence[Sequence[Tensor]], rhos: Sequence[float], adaptive: Sequence[bool]
) -> bool:
    """Move parameters to w + ε with ε = T² g / ‖T g‖₂, T = ρ or ρ|w| (see `radius`).

    Nothing is moved where the gradient is exactly zero, or is not finite. All parameters have a
    dense `.grad`. Returns whether the gradient is finite.
    """
    moving = [
        ([real(p) for p in group], [real(p.grad) for p in group if p.grad is not None], rho, own)
        for group, rho, own in zip(parameters, rhos, adaptive, strict=True)
        if group and rho > 0
    ]
    if not moving:
        return True
    ascents = [_scaled(gradients, weights, own) for weights, gradients, _, own in moving]
    device = ascents[0][0].device
    lengths = torch.cat(
        [norms(t).to(device) * rho for t, (_, _, rho, _) in zip(ascents, moving, strict=True)]
    )
    length = math.hypot(*lengths.tolist())
    if not math.isfinite(length):
        return False
    if length > 0:
        for (weights, _, rho, own), ascent in zip(moving, ascents, strict=True):
            steps = _times(_scaled(ascent, weights, own), rho, length)
            _move(weights, steps)
    return True


@torch.no_grad()
def perturb_along(
    direction: DirectionRule,
    parameters: Sequence[Sequence[Tensor]],
    rhos: Sequence[float],
    adaptive: Sequence[bool],
) -> bool:
    """The same along a direction of one's own (see `SamVariant`), by positions of parameters."""
    weights: Tensors = {}
    scale: Tensors = {}
    ascent: Tensors = {}
    for group, rho, own in zip(parameters, rhos, adaptive, strict=True):
        for p in group:
            assert p.grad is not None
            name, w = str(len(weights)), real(p)
            weights[name], scale[name] = w, rho * w.abs() if own else torch.full_like(w, rho)
            ascent[name] = (scale[name] * real(p.grad)).unsqueeze(0)
    if not weights:
        return True
    unit = geometry.directed(direction, ascent, weights)
    if not math.isfinite(float(unit.coefficient)):
        return False
    _move(list(weights.values()), [scale[name] * unit.tensors[name][0] for name in weights])
    return True


def real(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, a complex one as pairs; a view."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _move(weights: list[Tensor], steps: list[Tensor]) -> None:
    """Add steps to weights in place.

    Raises:
        ModelError: If weights in half precision take less than nine tenths of their steps.
    """
    half = [(w, w.float(), s.float()) for w, s in zip(weights, steps, strict=True) if _is_half(w)]
    torch._foreach_add_(weights, steps)
    if not half:
        return
    lost = float(norms([w.float() - before - step for w, before, step in half]).norm())
    asked = float(norms([step for *_, step in half]).norm())
    if lost > 0.1 * asked:
        raise ModelError(
            f"rounding to {str(half[0][0].dtype).removeprefix('torch.')} changes the perturbation "
            f"of SAM by {lost / asked:.0%} of its length. {WAY_OUT}"
        )


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in HALF


def _scaled(tensors: list[Tensor], weights: list[Tensor], adaptive: bool) -> list[Tensor]:
    return list(torch._foreach_mul(tensors, torch._foreach_abs(weights))) if adaptive else tensors


def _times(tensors: Sequence[Tensor], rho: float, length: float) -> list[Tensor]:
    """ρ² t / length, though the factor or the quotient alone may not fit the tensors' dtype."""
    wide = [t.float() if _is_half(t) else t for t in tensors]
    power = 2.0 ** -round(math.log2(length) / 2)
    result = list(torch._foreach_mul(wide, power))
    torch._foreach_mul_(result, rho * (rho / (length * power)))
    return result
