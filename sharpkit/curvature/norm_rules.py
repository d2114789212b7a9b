"""BatchNorm with stored statistics, where no convolution comes before it.

    y = γ (x − μ)/σ + β per channel

is bilinear in x and γ: its second derivatives are products of each channel with a number, and one
fused kernel gives all three gradients. Written out in single operations they take several passes
over the activations each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sharpkit.contract.normalisation import BatchNormCall
from sharpkit.curvature.convolution_rules import Statistics, is_batched, laid_out_as

_aten = torch.ops.aten
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def stored_statistics(call: BatchNormCall) -> Statistics | None:
    """What a call normalises by, or None where statistics of the batch are used."""
    mean, variance = call.running_mean, call.running_var
    if call.training or mean is None or variance is None:
        return None
    return Statistics(mean, variance, call.weight, call.bias, call.eps)


def batch_norm(x: Tensor, norm: Statistics) -> Tensor:
    """The BatchNorm of an input, recorded with the rule of this module."""
    inverse = torch.rsqrt(norm.variance + norm.eps)
    args = x, norm.weight, norm.bias, norm.mean, norm.variance, inverse, norm.eps
    result: Tensor = _BatchNorm.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Any, mask: list[bool]
) -> _Gradients:
    """Gradients for input, scale and shift, each computed only where the mask is set."""
    mean, variance, eps = statistics
    if is_batched(grad) or is_batched(x):  # the kernel has no batching rule
        return _written_out(grad, x, weight, statistics, mask)
    result: _Gradients = _aten.native_batch_norm_backward(
        laid_out_as(grad, x), x, weight, mean, variance, None, None, False, eps, mask
    )
    return result[0], result[1] if mask[1] else None, result[2] if mask[2] else None


def _written_out(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Any, mask: list[bool]
) -> _Gradients:
    mean, variance, eps = statistics
    channels, rest = (1, -1, *[1] * (x.ndim - 2)), (0, *range(2, x.ndim))
    inverse = torch.rsqrt(variance + eps)
    scale = inverse if weight is None else inverse * weight
    for_x = grad * scale.view(channels) if mask[0] else None
    for_weight = (grad * (x - mean.view(channels))).sum(rest) * inverse if mask[1] else None
    return for_x, for_weight, grad.sum(rest) if mask[2] else None


class _BatchNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, weight, bias, mean, variance, _, eps = inputs
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mean, variance, inverse, ctx.eps = inputs
        ctx.save_for_backward(x, weight, mean, variance, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, mean, variance, inverse = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        x = laid_out_as(x, x)
        if torch.is_grad_enabled():
            apply: Callable[..., _Gradients] = _BatchNormGradient.apply
            found = apply(grad, x, weight, mean, variance, inverse, ctx.eps, mask)
        else:
            found = _gradients(grad, x, weight, (mean, variance, ctx.eps), mask)
        return (*found, *[None] * 4)


class _BatchNormGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> _Gradients:
        grad, x, weight, mean, variance, _, eps, mask = inputs
        return _gradients(grad, x, weight, (mean, variance, eps), mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, x, weight, mean, variance, inverse, ctx.eps, mask = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad if mask[0] else None, x, weight, mean, variance, inverse)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        """With (x', γ', β') given: grad gets γ x'/σ + γ' (x − μ)/σ + β'; x and γ the products."""
        grad, x, weight, mean, variance, inverse = ctx.saved_tensors
        x_dot, weight_dot, bias_dot = tangents
        channels = (1, -1, *[1] * (x.ndim - 2))
        for_grad = for_x = for_weight = None
        if weight_dot is not None:
            weight_dot = weight_dot * inverse
            bias_dot = -mean * weight_dot if bias_dot is None else bias_dot - mean * weight_dot
        if ctx.needs_input_grad[0]:
            for_grad = None if bias_dot is None else bias_dot.view(channels)
            if weight_dot is not None and for_grad is not None:
                for_grad = torch.addcmul(for_grad, x, weight_dot.view(channels))
            if x_dot is not None:
                full = (inverse if weight is None else inverse * weight).view(channels)
                for_grad = x_dot * full if for_grad is None else for_grad + x_dot * full
            elif weight_dot is None and for_grad is not None:
                for_grad = for_grad.expand(x.shape)
        if ctx.needs_input_grad[1] and weight_dot is not None:
            for_x = grad * weight_dot.view(channels)
        if ctx.needs_input_grad[2] and x_dot is not None:
            centred = (torch.zeros_like(mean), variance, ctx.eps)
            x_dot, mask = laid_out_as(x_dot, x), [False, True, False]
            for_weight = _gradients(grad, x_dot, weight, centred, mask)[1]
        return for_grad, for_x, for_weight, *[None] * 5
