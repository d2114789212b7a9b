"""Critical sharpness: the curvature along the gradient, from losses alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.contract.losses import Loss
from sharpkit.contract.parameters import floating_parameters
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.measures.passes import mean_gradient, mean_loss, setup_together

_DOUBLINGS = 60


def critical_sharpness(
    model: nn.Module,
    data: Data | DistributedData,
    *,
    loss: Loss = "cross_entropy",
    guess: float = 0.1,
) -> float:
    """Twice the inverse of the learning rate from which a step of gradient descent raises the loss.

        λ_c = 2 / η_c,   η_c = min {η > 0 : L(w − η ∇L(w)) > L(w)}

    For a quadratic loss it is gᵀ H g / gᵀ g with g the gradient, between the extreme eigenvalues of
    the Hessian. η_c is bracketed by factors of 2 from `guess` and then bisected to 1 %. A second
    interval of η beyond the bracket is not looked for. Invariant under permuting units. Cost: 1 G
    and some 10 to 20 F.

    Args:
        model: Any module.
        data: Inputs of shape (n, ...) and labels of shape (n,); also `DistributedData`.
        loss: "cross_entropy", "mse" or a callable (outputs, labels) -> mean loss.
        guess: Learning rate at which the search begins.

    Returns:
        float: λ_c.

    Raises:
        ArgumentError: For a guess that is not positive.
        DataError: For labels that do not fit the outputs.
        ModelError: If the gradient is zero or not finite, or no step raises the loss, or the
            smallest does.

    Source:
        Kalra et al., "A scalable measure of loss landscape curvature" (2601.16979), for the update
        direction of gradient descent.

    Example:
        With L = ½ (2 w)² the step w − 4 η w raises the loss from η = ½:

        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = torch.tensor([[2.0]]), torch.zeros(1, 1)
        >>> round(critical_sharpness(model, data, loss="mse"), 1)
        4.0
    """
    if not guess > 0:
        raise ArgumentError(f"guess must be positive, got {guess}")
    with frozen(model) as found:
        run = setup_together(model, data, found, loss)
        weights = floating_parameters(model)
        gradient = mean_gradient(run, weights, loss)
        if not any(bool(g.any()) for g in gradient.values()):
            raise ModelError("the gradient is zero: there is no direction to measure along")

        def raised(rate: float) -> bool:
            at = {k: p - rate * gradient[k].to(p.dtype) for k, p in weights.items()}
            return not mean_loss(run, at, loss) <= start

        start = mean_loss(run, weights, loss)
        low, high = _bracket(raised, guess)
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if raised(middle) else (middle, high)
    return 2 / math.sqrt(low * high)


def _bracket(raised: Callable[[float], bool], guess: float) -> tuple[float, float]:
    """Two rates a factor of 2 apart, of which the larger raises the loss."""
    rate, up = guess, not raised(guess)
    for _ in range(_DOUBLINGS):
        following = rate * 2 if up else rate / 2
        if raised(following) == up:
            return min(rate, following), max(rate, following)
        rate = following
    what = "no step raises the loss" if up else "even the smallest step raises the loss"
    raise ModelError(f"{what}: the critical learning rate is not defined (last tried: {rate:.3g})")
