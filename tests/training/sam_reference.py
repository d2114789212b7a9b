"""Algorithm 1 of Foret et al. (2021) and its m-SAM form, written out in float64, group by group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(
            model.parameters(),
            torch.autograd.grad(loss(model), list(model.parameters()), allow_unused=True),
            strict=True,
        )
    ]


def perturbed_gradient(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    rho: float | Sequence[float],
    adaptive: bool = False,
) -> list[Tensor]:
    """∇L(w + ε) with ε = T² ∇L(w) / ‖T ∇L(w)‖, on a copy of the model."""
    other = copy.deepcopy(model)
    weights = list(other.parameters())
    rhos = list(rho) if isinstance(rho, Sequence) else [rho] * len(weights)
    scale = [
        r * p.detach().abs() if adaptive else torch.full_like(p, r)
        for r, p in zip(rhos, weights, strict=True)
    ]
    g = gradient(other, loss)
    norm = torch.cat([(t * a).flatten() for t, a in zip(scale, g, strict=True)]).norm()
    with torch.no_grad():
        for p, t, a in zip(weights, scale, g, strict=True):
            p += t**2 * a / norm
    return gradient(other, loss)


def m_sam_loop(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    m: int,
    rho: float,
    adaptive: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> list[Tensor]:
    """The m-SAM gradient: groups of m, one after the other, weighted by their size."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(0, len(x), m):
        xs, ys = x[i : i + m], y[i : i + m]
        found = perturbed_gradient(
            model, lambda net, xs=xs, ys=ys: loss(net(xs), ys), rho, adaptive
        )
        total = [t + g * (len(xs) / len(x)) for t, g in zip(total, found, strict=True)]
    return total


def sgd_momentum(
    weights: list[Tensor],
    g: list[Tensor],
    velocity: list[Tensor] | None,
    *,
    lr: float,
    momentum: float,
    decay: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """v ← μ v + g + λ w;  w ← w − η v."""
    g = [a + decay * w for a, w in zip(g, weights, strict=True)]
    if velocity is not None:
        g = [momentum * v + a for v, a in zip(velocity, g, strict=True)]
    return [w - lr * v for w, v in zip(weights, g, strict=True)], g


def close(found: Sequence[Tensor | None], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Every tensor within a tolerance relative to the largest entry of all of them."""
    top = max(float(t.abs().max()) for t in expected)
    return all(
        float((e - (torch.zeros_like(e) if f is None else f)).abs().max()) <= tolerance * top
        for f, e in zip(found, expected, strict=True)
    )
