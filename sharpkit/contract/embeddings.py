"""Embeddings whose options live outside the arithmetic: padding rows, norms, sparse gradients.

torch renormalises the rows of `max_norm` by writing to the weight, zeroes the gradient of the
`padding_idx` row in a rule that function transforms lose, and returns sparse gradients that cannot
be flattened. Here the same values and gradients come from plain arithmetic on dense tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class EmbeddingCall(NamedTuple):
    """One call of `F.embedding`, made as that is."""

    input: Tensor
    weight: Tensor
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False


class PlainEmbeddings(TorchFunctionMode):
    """Inside, embedding look-ups write to no weight and have dense gradients.

    Example:
        >>> table = torch.ones(2, 3, requires_grad=True)
        >>> with PlainEmbeddings():
        ...     rows = F.embedding(torch.tensor([0, 1]), table, padding_idx=0, sparse=True)
        >>> torch.autograd.grad(rows.sum(), table)[0]
        tensor([[0., 0., 0.],
                [1., 1., 1.]])
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced = False  # whether a look-up had options

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the look-ups; everything else is called as it is."""
        kwargs = kwargs or {}
        if func is F.embedding:
            call = EmbeddingCall(*args, **kwargs)
            options = call.padding_idx, call.max_norm, call.sparse
            self.replaced |= any(o is not None and o is not False for o in options)
            return _embedding(call)
        if func is F.embedding_bag:
            self.replaced = True
            return _embedding_bag(*args, **kwargs)
        return func(*args, **kwargs)


def renormalised(model: nn.Module) -> dict[int, Tensor]:
    """id of each parameter that a look-up with `max_norm` would renormalise -> its rows so scaled.

    Rows that no example uses are scaled as well; nothing depends on them.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            weight = module.weight.detach()
            found[id(module.weight)] = weight * _scale(weight, module.max_norm, module.norm_type)
    return found


def padding_rows(model: nn.Module) -> dict[int, int]:
    """id of each table that is looked up with `padding_idx` -> the number of that row.

    The gradient of that row is 0 by definition, though the loss may depend on it.
    """
    return {
        id(module.weight): module.padding_idx % module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    }


def _scale(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    length = torch.linalg.vector_norm(rows.detach(), ord=norm_type, dim=-1, keepdim=True)
    return torch.where(length > max_norm, max_norm / (length + 1e-7), 1.0)


def _limited(rows: Tensor, max_norm: float | None, norm_type: float) -> Tensor:
    """The rows at their largest norm; the gradient is that of the rows, as torch has it."""
    if max_norm is None:
        return rows
    return rows + (rows * (_scale(rows, max_norm, norm_type) - 1.0)).detach()


def _embedding(call: EmbeddingCall) -> Tensor:
    rows = F.embedding(call.input, call.weight, scale_grad_by_freq=call.scale_grad_by_freq)
    if call.padding_idx is not None:
        padding = call.input == call.padding_idx % call.weight.shape[-2]
        rows = torch.where(padding.unsqueeze(-1), rows.detach(), rows)
    return _limited(rows, call.max_norm, call.norm_type)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    return F.embedding_bag(
        input,
        _limited(weight, max_norm, norm_type),
        offsets,
        scale_grad_by_freq=scale_grad_by_freq,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )
