"""Convolutions, alone or followed by a BatchNorm in eval mode, and their second derivatives.

PyTorch differentiates a convolution's backward pass through convolutions with swapped axes, which
a CPU runs on a slow generic kernel; the same products exist as ordinary convolutions and
convolution gradients.

With stored statistics a BatchNorm is a scale and a shift of each channel, so that of a convolution
is a convolution with other weights,

    γ (W * x + b − μ)/σ + β = (aW) * x + (ab + β − aμ),    a = γ/σ,

and its second derivatives are those of that convolution: nothing of the size of the activations is
computed for the normalisation, or kept. The values are those of the BatchNorm itself.

On a CPU images are computed on with their channels last, the layout of oneDNN's fastest kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sharpkit.channels_last import overruns

_aten = torch.ops.aten
# (stride, padding, dilation, groups, has bias)
_Geometry = tuple[list[int], list[int], list[int], int, bool]


class Convolved(NamedTuple):
    """What a convolution was computed from."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: _Geometry


class Statistics(NamedTuple):
    """A BatchNorm in eval mode."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def plain_call(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Convolved | None:
    """The arguments of a convolution, or None for padding by name and inputs without a batch."""
    if isinstance(padding, str) or input.ndim != rank + 2:
        return None
    stride, padding, dilation = (spread(v, rank) for v in (stride, padding, dilation))
    return Convolved(input, weight, bias, (stride, padding, dilation, groups, bias is not None))


def spread(value: Any, rank: int) -> list[int]:
    """One number per axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def with_channels_last(x: Tensor) -> Tensor:
    """Images in the layout that is fastest on their device; the same numbers."""
    if x.ndim != 4 or x.device.type != "cpu" or is_batched(x):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def has_channels_last(x: Any) -> bool:
    """Whether a tensor holds images with their channels last in memory."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.ndim != 4 or is_batched(x):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in the layout of another one: the entries in the order that kernels read."""
    if has_channels_last(other) and not is_batched(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def is_batched(x: Tensor) -> bool:
    """Inside `vmap`, where tensors know one layout only."""
    return bool(torch._C._functorch.is_batchedtensor(x))


def convolve(call: Convolved) -> Tensor:
    """The convolution, recorded with the rule of this module."""
    result: Tensor = _Convolution.apply(*call)  # type: ignore[no-untyped-call]
    return result


def normalise(call: Convolved, output: Tensor, norm: Statistics) -> Tensor:
    """The BatchNorm of a convolution's output, recorded as one convolution."""
    weight, bias = _folded(call, norm)
    values = [None if t is None else t.detach() for t in norm[:4]]
    args = call.x, weight, bias, (*call.geometry[:4], True), output.detach(), *values, norm.eps
    result: Tensor = _NormalisedConvolution.apply(*args)  # type: ignore[no-untyped-call]
    return result


def worth_folding(call: Convolved, norm: Statistics) -> bool:
    """Whether the convolution's weight has a gradient anyway, or the norm has none."""
    has_gradient = [t is not None and t.requires_grad for t in norm[:4]]
    return not any(has_gradient[:2]) and (call.weight.requires_grad or not any(has_gradient))


def _folded(call: Convolved, norm: Statistics) -> tuple[Tensor, Tensor]:
    """(aW, ab + β − aμ) with a = γ/σ."""
    scale = torch.rsqrt(norm.variance + norm.eps)
    scale = scale if norm.weight is None else norm.weight * scale
    constant = -norm.mean if call.bias is None else call.bias.detach() - norm.mean
    weight, shift = _Scaled.apply(call.weight, scale, constant)  # type: ignore[no-untyped-call]
    if call.bias is not None and call.bias.requires_grad:
        shift = shift + scale * (call.bias - call.bias.detach())  # 0, with the derivative
    return weight, shift if norm.bias is None else shift + norm.bias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    stride, padding, dilation, groups, _ = geometry
    zero = [0] * len(stride)
    result: Tensor = _aten.convolution(
        x, weight, bias, stride, padding, dilation, False, zero, groups
    )
    return result


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: list[bool]
) -> _Gradients:
    """Gradients for input, weight and bias, each computed only where the mask is set."""
    stride, padding, dilation, groups, _ = geometry
    if mask[1] and overruns(weight, stride):  # strides of a 1 x 1 kernel may be either layout's
        x, weight = (t.clone(memory_format=torch.contiguous_format) for t in (x, weight))
    sizes = [weight.shape[0]] if mask[2] else None
    zero = [0] * len(stride)
    result: _Gradients = _aten.convolution_backward(
        grad, x, weight, sizes, stride, padding, dilation, False, zero, groups, mask
    )
    return result


def _recorded_gradients(ctx: Any, grad: Tensor) -> _Gradients:
    """The same, of a convolution that saved its input and weight."""
    x, weight = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    if not torch.is_grad_enabled():
        return _gradients(grad, x, weight, ctx.geometry, mask)
    apply: Callable[..., _Gradients] = _ConvolutionGradient.apply
    return apply(grad, x, weight, ctx.geometry, mask)


class _Convolution(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        return _convolve(x, weight, bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.geometry, *further = inputs
        ctx.further = len(further)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*_recorded_gradients(ctx, grad), *[None] * (1 + ctx.further))


class _NormalisedConvolution(_Convolution):
    """A convolution whose output is known as the BatchNorm of another one's (see `normalise`)."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        before, mean, variance, scale, shift, eps = inputs[4:]
        return F.batch_norm(before, mean, variance, scale, shift, False, 0.0, eps)


class _Scaled(Function):
    """(W, a) -> (aW, ac) per output channel, for a constant c, in as few operations as can be.

    They are of the size of the weights, and on a GPU cost their launches.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        return weight * _wide(scale, weight), scale * constant

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, for_weight: Tensor, for_shift: Tensor) -> tuple[Any, ...]:
        args = for_weight, for_shift, *ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (*_ScaledGradient.forward(*args), None)
        return (*_ScaledGradient.apply(*args), None)  # type: ignore[no-untyped-call]


class _ScaledGradient(Function):
    """(G, h, W, a) -> (aG, ⟨G, W⟩ + hc)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, shift: Tensor, weight: Tensor, scale: Tensor, constant: Tensor
    ) -> tuple[Tensor, Tensor]:
        return grad * _wide(scale, grad), torch.addcmul(_dots(grad, weight), shift, constant)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        grad, _, weight, scale, constant = inputs
        ctx.save_for_backward(grad, weight, scale, constant)

    @staticmethod
    def backward(ctx: Any, weight_dot: Tensor, scale_dot: Tensor) -> tuple[Any, ...]:
        grad, weight, scale, constant = ctx.saved_tensors
        moved = _wide(scale_dot, weight)
        for_grad = torch.addcmul(weight_dot * _wide(scale, weight), weight, moved)
        return for_grad, scale_dot * constant, grad * moved, _dots(grad, weight_dot), None


def _wide(channels: Tensor, weight: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (weight.ndim - 1))


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the channels of two weights, shape (channels,), by one operation."""
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).view(-1)


class _ConvolutionGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: list[bool]
    ) -> _Gradients:
        return _gradients(grad, x, weight, geometry, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, x, weight, ctx.geometry, mask = inputs
        ctx.size = grad.size()
        ctx.set_materialize_grads(False)
        # an input without gradient, as the first layer's, has no mixed products
        ctx.save_for_backward(grad if mask[0] else None, x, weight)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        """With (x', W', b') given: grad gets x'*W + x*W' + b'; x and W get the mixed products."""
        grad, x, weight = ctx.saved_tensors
        x_dot, weight_dot, bias_dot = tangents
        x_dot = None if x_dot is None else laid_out_as(x_dot, x)
        for_grad = for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            terms = []
            if x_dot is not None:
                terms.append(_convolve(x_dot, weight, None, ctx.geometry))
            if weight_dot is not None:
                terms.append(_convolve(x, weight_dot, bias_dot, ctx.geometry))
            elif bias_dot is not None:
                per_channel = bias_dot.view(1, -1, *[1] * (len(ctx.size) - 2))
                terms.append(per_channel.expand(ctx.size))
            if terms:
                for_grad = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
        if ctx.needs_input_grad[1] and weight_dot is not None:
            for_x = _gradients(grad, x, weight_dot, ctx.geometry, [True, False, False])[0]
        if ctx.needs_input_grad[2] and x_dot is not None:
            for_weight = _gradients(grad, x_dot, weight, ctx.geometry, [False, True, False])[1]
        return for_grad, for_x, for_weight, None, None
