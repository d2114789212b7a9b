"""Losses as means over examples, and what they demand of outputs and labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sharpkit.errors import ArgumentError, DataError

Loss: TypeAlias = str | Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits, exact also where the network is certain of the right class.

    With d_j = z_j − z_y the loss of one example is softplus(logsumexp_{j≠y} d_j). The usual form,
    −log softmax(z)_y, has the gradient p_y − 1 in the true class, which rounds to 0 as soon as
    p_y > 1 − 6e-8 in float32: the direction of steepest ascent is then wrong. Here every
    probability keeps its relative precision down to the smallest representable number.

    Args:
        outputs: Logits of shape (n, classes), any floating dtype.
        labels: Class indices of shape (n,), int64, each in [0, classes).

    Returns:
        Tensor: The mean loss, a scalar of the dtype of `outputs`.

    Source:
        The identity −log p_y = log(1 + Σ_{j≠y} exp(z_j − z_y)).

    Example:
        >>> import torch
        >>> z = torch.tensor([[30.0, 0.0]])
        >>> cross_entropy(z, torch.tensor([0])).item()  # exp(-30)
        9.357...e-14
        >>> torch.nn.functional.cross_entropy(z, torch.tensor([0])).item()
        0.0
    """
    is_label = torch.arange(outputs.shape[-1], device=outputs.device) == labels.unsqueeze(-1)
    label_logit = torch.where(is_label, outputs, 0.0).sum(-1, keepdim=True)
    others = (outputs - label_logit).masked_fill(is_label, -torch.inf)
    # the default threshold of 20 would round softplus'' to 0 above it
    return softplus(torch.logsumexp(others, -1), threshold=80.0).mean()


def mean_squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of half the squared distance, ½‖f(x) − y‖²; labels shaped as outputs.

    Example:
        >>> import torch
        >>> mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        2.5
    """
    return 0.5 * (outputs - labels).square().flatten(1).sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mean_squared_error,
}


def resolve_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss function named, or the callable itself."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ArgumentError(
            f"unknown loss {loss!r}: expected one of {sorted(LOSSES)} or a callable "
            "(outputs, labels) -> mean loss"
        )
    return LOSSES[loss]


def check_labels(labels: Tensor, outputs: Tensor, loss: Loss) -> None:
    """Raise DataError if class labels do not fit the outputs of a cross-entropy."""
    if loss != "cross_entropy":
        return
    if outputs.ndim != 2:
        raise DataError(
            f"cross-entropy expects outputs of shape (n, classes), got {tuple(outputs.shape)}"
        )
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            "cross-entropy expects integer labels of shape (n,), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs.shape[1]:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {outputs.shape[1]} outputs: "
            f"expected labels in [0, {outputs.shape[1] - 1}]"
        )
