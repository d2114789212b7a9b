"""Operations that PyTorch cannot differentiate twice, or not rightly, written as plain arithmetic.

PyTorch has no second derivative of hard sigmoids, distances between all pairs of rows and embedding
bags, nor of fused attention and cuDNN's recurrent layers; its second derivative of `weight_norm` is
wrong, and so may be its gradient of a batch normalisation of one example. The same values come from
operations whose derivatives are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sharpkit.contract.normalisation import BatchNormCall
from sharpkit.curvature.norm_rules import stored_statistics


class plain_rules(TorchFunctionMode):
    """Record the operations of this module as plain arithmetic.

    Example:
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> with plain_rules():
        ...     y = torch.nn.functional.hardsigmoid(x.square())
        >>> (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # of x²/6 + 1/2
        >>> torch.autograd.grad(g.sum(), x)[0]
        tensor([0.3333])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the functions that have a formula; everything else is called as it is."""
        kwargs = kwargs or {}
        if func in _FORMULAS:
            return _FORMULAS[func](*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if func in _RECURRENT and args[0].is_cuda:
            return _without_cudnn(func, *args, **kwargs)
        return func(*args, **kwargs)


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def _without_cudnn(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    enabled = torch._C._get_cudnn_enabled()
    try:
        torch._C._set_cudnn_enabled(False)
        return func(*args, **kwargs)
    finally:
        torch._C._set_cudnn_enabled(enabled)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """With stored statistics, channel by channel."""
    call = BatchNormCall(*args, **kwargs)
    norm = stored_statistics(call)
    if norm is None:
        return F.batch_norm(*call)
    channels = (1, -1, *[1] * (call.input.ndim - 2))
    scale = torch.rsqrt(norm.variance + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    result = (call.input - norm.mean.view(channels)) * scale.view(channels)
    return result if norm.bias is None else result + norm.bias.view(channels)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.hardtanh(input + 3.0, 0.0, 6.0) / 6.0
    return input.copy_(result) if inplace else result


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """Shapes (..., n, d) and (..., m, d) -> (..., n, m)."""
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[i] - input[j], p)


def _length(d: Tensor, p: float) -> Tensor:
    """The p-norm of every row; derivatives of a distance of 0 are 0, as torch has them."""
    if p in (0.0, float("inf")):
        result: Tensor = torch.linalg.vector_norm(d, p, dim=-1)
        return result
    here = d != 0
    sums = torch.where(here, torch.where(here, d, 1.0).abs().pow(p), 0.0).sum(-1)
    apart = sums != 0
    return torch.where(apart, torch.where(apart, sums, 1.0).pow(1 / p), 0.0)


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
    """Sums, means or maxima of the rows of every bag."""
    if max_norm is not None or scale_grad_by_freq:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
            per_sample_weights, include_last_offset, padding_idx,
        )  # fmt: skip
    if offsets is None:
        starts = torch.arange(len(input), device=input.device) * input.shape[1]
    else:
        starts = offsets[:-1] if include_last_offset else offsets
    input, bags = input.reshape(-1), len(starts)
    kept = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        kept = input != padding_idx % len(weight)
    bag = torch.searchsorted(starts, torch.arange(len(input)).to(starts), right=True) - 1
    bag = bag[kept]
    counts = torch.bincount(bag, minlength=bags).unsqueeze(1)
    if mode == "max":
        largest = torch.embedding_bag(
            weight.detach(), input, starts, False, 2, False, None, False, padding_idx
        )[3]
        return torch.where(counts > 0, weight.gather(0, largest.clamp(min=0)), 0.0)
    rows = weight[input]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    rows = rows[kept]
    sums = rows.new_zeros(bags, weight.shape[1]).index_add(0, bag, rows)
    return sums / counts.clamp(min=1) if mode == "mean" else sums


_FORMULAS: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.embedding_bag: _embedding_bag,
    F.batch_norm: _batch_norm,
}
