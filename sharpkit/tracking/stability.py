"""The curvature above which an optimizer's steps diverge, and the matrix whose λmax it bounds.

On a quadratic with Hessian H, gradient descent with momentum moves along an eigenvector by a
two-term recurrence; it leaves the stable range where a root passes −1. With a step size, a
preconditioner or a weight decay that differ between parameters, that root is −1 where

    C^½ (H + Λ) C^½,   C = diag(1 / τ_i),

has the eigenvalue 1: τ_i is the threshold that parameter i would have alone, and Λ the L2 decay,
which the gradient sees as curvature. Everything is scaled here by the smallest τ of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from sharpkit.contract.half_precision import HALF
from sharpkit.curvature.linear_map import LinearMap
from sharpkit.errors import ArgumentError
from sharpkit.training.sam import SAM
from sharpkit.training.variants import PLAIN_SAM

_WAY_OUT = 'measure "lambda_max", which needs no threshold, in place of "stability"'


@dataclass(frozen=True)
class Edge:
    """What λmax is compared with.

    Attributes:
        threshold: A quadratic with a larger λmax of `matrix` diverges; infinite at learning rate 0.
        scale: S, shape (P,), or None for 1.
        decay: Λ, shape (P,), or None for 0.
    """

    threshold: float
    scale: Tensor | None = None
    decay: Tensor | None = None

    def matrix(self, hessian: LinearMap) -> LinearMap:
        """S^½ (H + Λ) S^½."""
        if self.scale is None and self.decay is None:
            return hessian
        return _Scaled(hessian, self.scale, self.decay)

    def gradient(self, plain: Tensor) -> Tensor:
        """S^½ g: that of the loss in the coordinates of the matrix."""
        return plain if self.scale is None else self.scale.sqrt() * plain


class _Scaled:
    """S^½ (H + Λ) S^½ by the products with H."""

    def __init__(self, hessian: LinearMap, scale: Tensor | None, decay: Tensor | None) -> None:
        self._hessian, self._decay = hessian, decay
        self._root = None if scale is None else scale.sqrt().unsqueeze(1)
        self.shape, self.dtype, self.device = hessian.shape, hessian.dtype, hessian.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """(P, k) -> (P, k)."""
        inner = vectors if self._root is None else self._root * vectors
        product = self._hessian.matmat(inner)
        if self._decay is not None:
            product = product + self._decay.unsqueeze(1) * inner
        return product if self._root is None else self._root * product


def preconditions(optimizer: Optimizer) -> bool:
    """Whether λmax is that of a matrix other than the Hessian: adaptive, or in several groups.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> preconditions(SGD([w], lr=0.1)), preconditions(Adam([w]))
        (False, True)
    """
    base = plain_optimizer(optimizer)
    base = base.base_optimizer if isinstance(base, SAM) else base
    return not (isinstance(base, SGD) and len(base.param_groups) == 1)


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside wrappers that keep it as `optimizer`, as training libraries do."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def edge(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    gradient_norm: Callable[[], float],
) -> Edge | None:
    """The threshold of an optimizer as it stands, for weights that it moves.

    With learning rate η, momentum β, dampening δ, L2 decay d and decoupled decay d':

        SGD             (2 + 2β) / ((1 − δ) η)
        with Nesterov   (2 + 2β) / ((1 + 2β) η)
        Adam            (2 + 2β₁) / ((1 − β₁) η)
        AdamW           (2 − η d') (1 + β₁) / ((1 − β₁) η)
        RMSprop         (2 + 2β) / η
        SAM             ‖g‖ / (2ρ) · (√(1 + 4ρ τ / ‖g‖) − 1),  with τ that of SGD and the ρ of
                        the step; τ where it is not perturbed

    Those of Adam, AdamW and RMSprop are of P^-½ H P^-½ with P = (1 − β₁^t)(√(v / (1 − β₂^t)) + ε)
    for the first two and √v + ε for the last.

    L2 decay adds d to every eigenvalue of H: τ − d for one group, Λ in the matrix for several.

    Args:
        optimizer: One of these, as it is after its last step.
        parameters: What it moves, by name, in the order of the P coordinates.
        gradient_norm: Computes ‖g‖ of the mean loss; asked for with SAM only.

    Returns:
        Edge: threshold and matrix. None before the first step of an adaptive optimizer, which has
        no preconditioner yet.

    Raises:
        ArgumentError: For an optimizer, or options of one, whose threshold is not known.

    Source:
        Cohen et al., ICLR 2021 (2103.00065), momentum and Nesterov; Cohen et al. 2022 (2207.14484),
        Adam and RMSprop; Long and Bartlett, JMLR 2024 (2309.12488), SAM. Dampening, decay and
        groups from the same recurrence.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> round(edge(SGD([w], lr=0.1, momentum=0.9), {"w": w}, lambda: 1.0).threshold, 9)
        38.0
    """
    optimizer = plain_optimizer(optimizer)
    sam = optimizer if isinstance(optimizer, SAM) else None
    base = optimizer if sam is None else sam.base_optimizer
    groups = base.param_groups
    if type(base) not in _KNOWN:
        known = ", ".join(kind.__name__ for kind in _KNOWN)
        raise ArgumentError(
            f"the threshold of {type(base).__name__} is not known, only those of {known}, and of "
            f"SAM around SGD: {_WAY_OUT}"
        )
    if any(group.get("maximize") for group in groups):
        raise ArgumentError(f"maximize=True goes up, not down: {_WAY_OUT}")
    alone = [_KNOWN[type(base)](group) for group in groups]
    if len({group_beta for _, group_beta in alone}) > 1:
        raise ArgumentError(f"the groups have different momentum: {_WAY_OUT}")
    thresholds = [tau for tau, _ in alone]
    if sam is not None:
        return Edge(_sam_threshold(sam, base, thresholds, gradient_norm))
    decays = [_l2(base, group) for group in groups]
    if not preconditions(base):
        return Edge(thresholds[0] - decays[0])
    where = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    lowest = min(thresholds)
    if math.isinf(lowest):  # nothing moves
        lowest, shares = math.inf, [1.0] * len(groups)
    else:
        shares = [lowest / tau for tau in thresholds]
    scales, shifts = [], []
    for parameter in parameters.values():
        number = where[id(parameter)]
        moment = _preconditioner(base, groups[number], parameter)
        if moment is None:
            return None
        scales.append(shares[number] / moment)
        shifts.append(torch.full_like(moment, decays[number]))
    return Edge(lowest, torch.cat(scales), torch.cat(shifts) if any(decays) else None)


def _sgd(group: Mapping[str, Any]) -> tuple[float, float]:
    """Threshold without weight decay, and momentum."""
    beta = float(group["momentum"])
    if group["nesterov"]:
        return _over((2 + 2 * beta) / (1 + 2 * beta), group), beta
    damped = 1 - float(group["dampening"]) if beta else 1.0
    if not damped > 0:
        raise ArgumentError(f"dampening is {group['dampening']}: expected less than 1; {_WAY_OUT}")
    return _over((2 + 2 * beta) / damped, group), beta


def _adam(group: Mapping[str, Any]) -> tuple[float, float]:
    if group.get("decoupled_weight_decay"):
        return _adamw(group)
    beta = float(group["betas"][0])
    return _over((2 + 2 * beta) / (1 - beta), group), beta


def _adamw(group: Mapping[str, Any]) -> tuple[float, float]:
    beta = float(group["betas"][0])
    kept = 2 - float(group["lr"]) * float(group["weight_decay"])
    return _over(kept * (1 + beta) / (1 - beta), group), beta


def _rmsprop(group: Mapping[str, Any]) -> tuple[float, float]:
    beta = float(group["momentum"])
    return _over(2 + 2 * beta, group), beta


_KNOWN: dict[type[Optimizer], Callable[[Mapping[str, Any]], tuple[float, float]]] = {
    SGD: _sgd, Adam: _adam, AdamW: _adamw, RMSprop: _rmsprop
}  # fmt: skip


def _over(factor: float, group: Mapping[str, Any]) -> float:
    rate = float(group["lr"])
    return factor / rate if rate > 0 else math.inf


def _l2(base: Optimizer, group: Mapping[str, Any]) -> float:
    """The decay that enters the gradient."""
    decoupled = type(base) is AdamW or group.get("decoupled_weight_decay")
    return 0.0 if decoupled else float(group["weight_decay"])


def _preconditioner(base: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Tensor | None:
    """What a step is divided by, flat, beside the learning rate; None before the first step."""
    if isinstance(base, SGD):
        return torch.ones_like(_flat(parameter))
    state = base.state.get(parameter, {})
    if not state:
        return None
    step = float(state["step"])
    if isinstance(base, RMSprop):
        moment = _flat(state["square_avg"])
        if group["centered"]:
            moment = moment - _flat(state["grad_avg"]).square()
        root: Tensor = moment.sqrt() + group["eps"]
        return root
    first, second = (1 - float(beta) ** step for beta in group["betas"])
    moment = _flat(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    divisor: Tensor = first * ((moment / second).sqrt() + group["eps"])
    return divisor


def _flat(tensor: Tensor) -> Tensor:
    """The entries in one row, complex ones as pairs; half precision as float32, as the Hessian."""
    plain = tensor.detach()
    plain = plain.float() if plain.dtype in HALF else plain
    return (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)


def _sam_threshold(
    sam: SAM, base: Optimizer, thresholds: list[float], gradient_norm: Callable[[], float]
) -> float:
    """λ with λ (1 + ρ λ / ‖g‖) = τ, from the step ρ g / ‖g‖ along the top eigenvector."""
    groups = sam.param_groups
    plain = isinstance(base, SGD) and sam.variant == PLAIN_SAM and not groups[0]["adaptive"]
    if not plain or len(groups) > 1 or sam.splits_batches:
        raise ArgumentError(
            "the threshold of SAM is known around SGD, with one group of parameters, all of them "
            "perturbed, by one perturbation for the batch (no m), adaptive=False and no variant: "
            f"{_WAY_OUT}"
        )
    if sam.timing.interval > 1:
        raise ArgumentError(
            f"SAM has interval={sam.timing.interval}: the threshold is known where all steps are "
            f"perturbed or none is, not where they alternate: {_WAY_OUT}"
        )
    tau = thresholds[0] - _l2(base, groups[0])
    # of the last step, as the learning rate is; before the first one, of that
    rho = float(groups[0]["rho"]) * sam.timing.factor(max(0, sam.steps - 1))
    if rho == 0 or math.isinf(tau) or tau <= 0:
        return tau
    norm = gradient_norm()
    if norm == 0:
        return 0.0
    # the stable form of the root: no difference of nearly equal numbers for large ‖g‖
    return 2 * tau / (math.sqrt(1 + 4 * rho * tau / norm) + 1)
