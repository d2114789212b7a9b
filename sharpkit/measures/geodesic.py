"""Sharpness along geodesics of the weights of attention modulo its symmetries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.parameters import floating_parameters
from sharpkit.errors import ArgumentError
from sharpkit.measures.attention_geometry import AttentionPairs, attention_pairs
from sharpkit.measures.passes import Setup, mean_gradient, mean_loss, setup

Tensors = dict[str, Tensor]


def geodesic_sharpness(
    model: nn.Module, data: Data, *, rho: float = 0.1, steps: int = 10, loss: Loss = "cross_entropy"
) -> float:
    """The largest increase of the loss at the ends of geodesics of length ρ.

        max over ‖ξ‖_w ≤ ρ, ξ horizontal, of L(γ_ξ(1)) − L(w)

    A head of attention depends on its query and key weights only through G Hᵀ, with G and H these
    weights, biases appended, as matrices of as many columns as the head has dimensions; so it does
    on its value and output weights. (G A⁻¹, H Aᵀ) is the same function for every invertible A. In
    the metric

        ⟨η, ζ⟩ = tr HᵀH η_Gᵀ ζ_G + tr GᵀG η_Hᵀ ζ_H,

    which no A changes, directions along such orbits, (−G B, H Bᵀ), are orthogonal to ξ if and only
    if Gᵀξ_G HᵀH = GᵀG ξ_HᵀH: those are the horizontal ones. Setting this for (ξ_G + G Λ,
    ξ_H − H Λᵀ) and solving gives the projection, Λ = ½ [ξ_HᵀH (HᵀH)⁻¹ − (GᵀG)⁻¹ Gᵀξ_G]. Geodesics
    make the energy ½ ∫ ⟨γ̇, γ̇⟩ stationary; its Euler-Lagrange equation for G, d/dt (Ġ HᵀH) =
    G ḢᵀḢ, solved for G̈ and inserted into γ_ξ(1) = w + ξ + ½ γ̈(0), gives the second-order end point

        G + ξ_G + ½ [G ξ_Hᵀξ_H − ξ_G (ξ_HᵀH + Hᵀξ_H)] (HᵀH)⁻¹,   and the same for H.

    All other parameters move straight, with ‖ξ / |w|‖₂ as their part of the norm, as in adaptive
    sharpness, which is what remains without attention. The maximum is sought by projected ascent
    along the Riemannian gradient (GL-equivariant at every step), step t of length ρ/√t. Invariant
    under the symmetry above, which rescaling, rotating and permuting the dimensions of a head are
    part of. Cost: `steps` G and 1 F.

    Args:
        model: Any module; `nn.MultiheadAttention` is recognised as attention.
        data: Inputs of shape (n, ...) and labels of shape (n,).
        rho: Length of the geodesics, > 0.
        steps: Steps of the ascent.
        loss: "cross_entropy", "mse" or a callable (outputs, labels) -> mean loss.

    Returns:
        float: The increase, a lower bound of the maximum.

    Raises:
        ArgumentError: For rho or steps out of range.
        DataError: For labels that do not fit the outputs.
        ModelError: For NaN or infinite weights or losses, query, key, value or output weights of
            less than full rank, or attention with `add_bias_kv`.

    Source:
        da Silva, Dangel and Oore, "Hide & Seek: Transformer symmetries obscure sharpness &
        Riemannian geometry finds it", ICML 2025 (2505.05409), equations 4, 5, 10 and 12, their
        mixed metric; there APGD in place of the ascent here.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> data = torch.eye(2), torch.tensor([0, 1])
        >>> geodesic_sharpness(model, data) > 0
        True
    """
    if not rho > 0:
        raise ArgumentError(f"rho must be positive, got {rho}")
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    with frozen(model) as found:
        run = setup(model, data, found, loss)
        weights = floating_parameters(model)
        geometry = _Geometry(model, weights)
        base = mean_loss(run, weights, loss)
        xi = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in weights.items()}
        best = 0.0
        for step in range(1, steps + 1):
            gradient = _gradient(run, geometry, xi, loss)
            slope = geometry.horizontal(geometry.raised(gradient))
            size = geometry.norm(slope)
            if size == 0:
                return best
            length = rho / step**0.5 / size
            xi = geometry.horizontal({k: x + length * slope[k] for k, x in xi.items()})
            shrink = min(1.0, rho / geometry.norm(xi))
            xi = {k: shrink * x for k, x in xi.items()}
            best = max(best, mean_loss(run, geometry.end(xi), loss) - base)
    return best


def _gradient(run: Setup, geometry: _Geometry, xi: Tensors, loss: Loss) -> Tensors:
    """The gradient of L(γ_ξ(1)) with respect to ξ."""
    with torch.enable_grad():
        leaves = {k: x.detach().requires_grad_() for k, x in xi.items()}
        end = geometry.end(leaves)
    at = mean_gradient(run, {k: e.detach() for k, e in end.items()}, loss)
    found = torch.autograd.grad(
        list(end.values()),
        list(leaves.values()),
        [at[k].to(e.dtype) for k, e in end.items()],
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


class _Geometry:
    """The metric at the weights: pairs (G, H) of attention, |w| for everything else."""

    def __init__(self, model: nn.Module, weights: Tensors) -> None:
        self.weights = weights
        self.exact = {k: p.double() for k, p in weights.items()}
        self.pairs = [AttentionPairs(layout, self.exact) for layout in attention_pairs(model)]
        self.scale = {k: p.abs() for k, p in self.exact.items()}
        for pairs in self.pairs:
            for name, mask in pairs.masks().items():  # what the pairs hold is not scaled
                self.scale[name] = self.scale[name].masked_fill(mask, 0.0)

    def raised(self, gradient: Tensors) -> Tensors:
        """The Riemannian gradient of a Euclidean one."""
        return self._assembled(
            {k: g * self.scale[k].square() for k, g in gradient.items()},
            [pairs.raised(*pairs.split(gradient)) for pairs in self.pairs],
        )

    def horizontal(self, xi: Tensors) -> Tensors:
        """The horizontal part of a direction."""
        straight = {k: torch.where(self.scale[k] > 0, x, 0.0) for k, x in xi.items()}
        return self._assembled(
            straight, [pairs.horizontal(*pairs.split(xi)) for pairs in self.pairs]
        )

    def norm(self, xi: Tensors) -> float:
        """‖ξ‖_w."""
        square = float(sum(pairs.squared_norm(*pairs.split(xi)) for pairs in self.pairs))
        for k, x in xi.items():
            scale = self.scale[k]
            square += float(torch.where(scale > 0, x / scale, 0.0).square().sum())
        return math.sqrt(square)

    def end(self, xi: Tensors) -> Tensors:
        """γ_ξ(1), to second order, in the dtype of the weights."""
        bends = [pairs.acceleration(*pairs.split(xi)) for pairs in self.pairs]
        bend = self._assembled({k: torch.zeros_like(x) for k, x in xi.items()}, bends)
        return {
            k: (p + xi[k] + 0.5 * bend[k]).to(self.weights[k].dtype) for k, p in self.exact.items()
        }

    def _assembled(self, rest: Tensors, parts: list[tuple[Tensor, Tensor]]) -> Tensors:
        for pairs, part in zip(self.pairs, parts, strict=True):
            for name, tensor in pairs.merge(*part).items():
                rest[name] = rest[name] + tensor
        return rest
