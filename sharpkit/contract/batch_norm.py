"""The arguments of `F.batch_norm`, by name, however they were given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BatchNormCall(NamedTuple):
    """One call of `F.batch_norm`, made as that is: `BatchNormCall(*args, **kwargs)`.

    Example:
        >>> import torch
        >>> BatchNormCall(torch.ones(1, 2), None, None, training=True).eps
        1e-05
    """

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
