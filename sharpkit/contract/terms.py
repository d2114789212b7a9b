"""What a loss is made of: its mean over a batch, and the weight of that mean among others.

Many losses divide by what the labels say (class weights, ignored positions). With that divisor
beside the mean, the losses of parts add up to the loss of the whole, Σ weight · mean / Σ weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import DataError, ModelError

Terms: TypeAlias = tuple[Tensor, Tensor]  # mean and weight, scalars


@dataclass(frozen=True)
class GroupForms:
    """Closed forms for equally large groups of consecutive examples, all labels of which count."""

    fit: Callable[[Any], bool]  # whether they know such outputs
    means: Callable[[Any, Tensor, int], Tensor]  # of (outputs, labels, groups), (groups,)
    # of (outputs, labels, groups, factor): see `surprise.group_slopes`
    slopes: Callable[
        [Any, Tensor, int, Tensor | float | None], tuple[Tensor, Tensor, Tensor | None]
    ]


@dataclass(frozen=True)
class Formula:
    """How a loss gives its terms, and what it refuses, both of (outputs, labels)."""

    terms: Callable[[Any, Tensor], Terms]
    check: Callable[[Any, Tensor], None]
    of_groups: GroupForms | None = None
    # the same loss, by fewer calls, where no label is this one, which it ignores
    ignored: int = 0
    whole: Formula | None = None


def count(tensor: Tensor) -> Tensor:
    """The number of examples, as a weight."""
    return torch.full((), tensor.shape[0], dtype=torch.float64, device=tensor.device)


def mean_and_weight(losses: Tensor, weight: Tensor) -> Terms:
    """The sum of all losses over their weight, and a constant 0 where the weight is 0."""
    # halves are summed in float32, as torch does
    total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    empty = weight == 0
    divisor = torch.where(empty, 1.0, weight).to(total.dtype)
    return (torch.where(empty, 0.0, total) / divisor).to(losses.dtype), weight


def check_tensor(outputs: Any) -> None:
    """Raise unless outputs are one real tensor."""
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model returned {type(outputs).__name__}, but this loss takes a tensor: give a "
            "loss that takes all of it, a callable (outputs, labels)"
        )
    if outputs.is_complex():
        raise ModelError(
            f"the model returned complex outputs ({outputs.dtype}): give a loss that takes them, "
            "or let the model return real ones"
        )


def check_same_shape(outputs: Any, labels: Tensor) -> None:
    """Raise unless every output has a label of its own."""
    check_tensor(outputs)
    if outputs.shape != labels.shape:
        raise DataError(
            f"the loss compares outputs of shape {tuple(outputs.shape)} with labels of shape "
            f"{tuple(labels.shape)}, one by one: expected equal shapes (others would broadcast, "
            "and compare every output with every label); reshape the labels"
        )
    if labels.is_complex():
        raise DataError(f"the loss expects real labels, got {labels.dtype}")
