"""The losses of groups from the outputs of their examples, and the slopes by the outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from sharpkit.contract.losses import MeanLoss
from sharpkit.groupwise.objective import is_numbers, power, scale_exponent


class GroupTerms(NamedTuple):
    """Per group, float64: mean losses, their weights, and the power of two in the slopes."""

    mean: Tensor
    weight: Tensor
    exponent: Tensor  # +inf where the loss does not depend on the outputs
    slopes: list[Tensor]  # 2^exponent times the derivative by every tensor of numbers, (n, ...)


def group_losses(
    loss: MeanLoss, outputs: Any, labels: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Mean losses and weights, (groups,) float64, of outputs with examples on the first axis."""
    grouped = pytree.tree_map(lambda t: _grouped(t, groups), outputs)
    mean, weight = vmap(loss.terms)(grouped, _grouped(labels, groups))
    return mean.double(), weight.double()


def group_slopes(loss: MeanLoss, outputs: Any, labels: Tensor, groups: int) -> GroupTerms:
    """The same with the derivatives by the outputs, scaled so that they do not underflow."""
    leaves, spec = pytree.tree_flatten(outputs)
    where = [i for i, leaf in enumerate(leaves) if is_numbers(leaf)]
    grouped = [
        _grouped(leaf.detach(), groups) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]

    dtypes = [grouped[i].dtype.to_real() for i in where] or [torch.float32]
    most = min(math.frexp(torch.finfo(dtype).max)[1] for dtype in dtypes)
    # softplus multiplies by e^80 < 2^116 on its way back (see `class_losses.surprise`)
    lift = max(0, min(most // 2, most - 116))

    def one(ends: list[Tensor], labels: Tensor, rest: list[Any]) -> tuple[Any, ...]:
        def mean_loss(ends: list[Tensor]) -> tuple[Tensor, Tensor]:
            filled = list(rest)
            for i, end in zip(where, ends, strict=True):
                filled[i] = end
            return loss.terms(pytree.tree_unflatten(filled, spec), labels)

        mean, pull, weight = vjp(mean_loss, ends, has_aux=True)  # type: ignore[misc]
        # far from underflow as they are made, and near 1 as they enter the network
        (large,) = pull(torch.full_like(mean, 2.0**lift))
        further = scale_exponent(large, mean)
        factor = power(further, mean.dtype)
        slopes = [s * factor for s in large]
        return mean.double(), weight.double(), further + lift, slopes

    rest = [None if i in where else leaf for i, leaf in enumerate(grouped)]
    axes = ([0] * len(where), 0, [0 if isinstance(leaf, Tensor) else None for leaf in rest])
    with torch.no_grad():
        found = vmap(one, axes)([grouped[i] for i in where], _grouped(labels, groups), rest)
    mean, weight, exponent, slopes = found
    return GroupTerms(mean, weight, exponent, [s.flatten(0, 1) for s in slopes])


def _grouped(tensor: Any, groups: int) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.reshape(groups, -1, *tensor.shape[1:])
