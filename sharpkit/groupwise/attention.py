"""Multi-head attention of all groups: only its projections, linear layers, have weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit.groupwise.layer_calls import LayerCall

if TYPE_CHECKING:
    from sharpkit.groupwise.one_batch import OneBatch


class AttentionCall(NamedTuple):
    """One call of `F.multi_head_attention_forward`, made as that is."""

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool = True
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Tensor | None = None
    k_proj_weight: Tensor | None = None
    v_proj_weight: Tensor | None = None
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


def attention(
    batch: OneBatch, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None] | None:
    """Attention of examples to themselves; None for what is not known here.

    That is other keys or values than queries, dropout, and what is appended to keys.
    """
    call = AttentionCall(*args, **kwargs)
    x, weight = call.query, call.in_proj_weight
    if (
        call.key is not x or call.value is not x
        or x.ndim != 3 or x.shape[1] != batch.examples
        or weight is None or call.use_separate_proj_weight
        or any(t is not None for t in (call.bias_k, call.bias_v, call.static_k, call.static_v))
        or call.add_zero_attn or (call.training and call.dropout_p > 0)
    ):  # fmt: skip
        return None
    mixed = batch.layer(LayerCall(x.transpose(0, 1), weight, call.in_proj_bias, None))
    q, k, v = mixed.view(*mixed.shape[:2], 3, call.num_heads, -1).permute(2, 0, 3, 1, 4)
    # as torch does, the mask of a causal one is not looked at where nothing else asks for it
    causal = call.is_causal and call.key_padding_mask is None and not call.need_weights
    mask = None if causal else _mask(call, q)
    weights = None
    if call.need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[3])) @ k.mT
        weights = torch.softmax(scores if mask is None else scores + mask, 3)
        seen = weights @ v
        weights = weights.mean(1) if call.average_attn_weights else weights
    else:
        seen = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    joined = seen.transpose(1, 2).flatten(2)
    out = batch.layer(LayerCall(joined, call.out_proj_weight, call.out_proj_bias, None))
    return out.transpose(0, 1), weights


def _mask(call: AttentionCall, q: Tensor) -> Tensor | None:
    """What is added to the scores (n, heads, steps, steps) of queries q, or None."""
    masks = []
    if call.attn_mask is not None:
        own = _added(call.attn_mask, q)
        masks.append(own.view(len(q), -1, *own.shape[1:]) if own.ndim == 3 else own)
    if call.key_padding_mask is not None:
        masks.append(_added(call.key_padding_mask, q)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask as numbers to be added: -inf where a boolean one is true."""
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
