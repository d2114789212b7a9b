"""Linear and convolution layers over the examples of all groups, each group at its own weights.

The examples of all groups lie one after the other on the first axis, as in an ordinary batch. A
layer has a *value*, the weights it runs at, shared by all groups or one per group, and a *target*,
the tensor that gets the gradient: with an axis of groups each group's own, without it their sum.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sharpkit.groupwise import windows
from sharpkit.groupwise.layer_calls import Geometry

Optional: TypeAlias = Tensor | None


class GroupLinear(torch.autograd.Function):
    """x (n, ..., in), value (out, in) or (groups, out, in); a target of either shape."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Optional,
        value: Tensor,
        bias_target: Optional,
        bias: Optional,
        groups: int,
    ) -> Tensor:
        """The output."""
        ctx.save_for_backward(x, value)
        ctx.groups = groups
        ctx.axes = [None if t is None else t.ndim for t in (target, bias_target)]
        return linear(x, value, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional, ...]:
        """The gradients, by operand."""
        x, value = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        grad = grads[0]
        rows = rows_of_groups(grad, ctx.groups)
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = (grad @ value) if value.ndim == 2 else (rows @ value).view(x.shape)
        if need_weight and ctx.axes[0] == 3:
            grad_weight = rows.mT @ rows_of_groups(x, ctx.groups)
        elif need_weight:
            grad_weight = rows.flatten(0, 1).mT @ x.reshape(-1, x.shape[-1])
        if need_bias:
            grad_bias = rows.sum(1) if ctx.axes[1] == 2 else rows.sum((0, 1))
        return grad_x, grad_weight, None, grad_bias, None, None


class GroupConvolution(torch.autograd.Function):
    """x (n, channels, ...), value (out, in, ...) or (groups, out, in, ...); a target of either."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Optional,
        value: Tensor,
        bias_target: Optional,
        bias: Optional,
        groups: int,
        geometry: Geometry,
    ) -> Tensor:
        """The output."""
        ctx.save_for_backward(x, value)
        ctx.groups, ctx.geometry = groups, geometry
        ctx.axes = [None if t is None else t.ndim for t in (target, bias_target)]
        return convolution(x, value, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional, ...]:
        """The gradients, by operand."""
        x, value = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        grad, groups, geometry = grads[0], ctx.groups, ctx.geometry
        own, apart = value.ndim == x.ndim + 1, ctx.axes[0] == x.ndim + 1
        if need_x and need_weight and not own and not apart:
            return _both(grad, x, value, geometry, need_bias, ctx.axes[1] == 2, groups)
        grad_x = grad_weight = grad_bias = None
        if need_x and own and windows.pays(x, value.shape[1:], geometry, groups, backward=True):
            grad_x = windows.input_gradient(grad, x, value, geometry)
        elif need_x and own:
            wide = channels_of_groups(grad, groups)
            found = _backward(
                wide, channels_of_groups(x, groups), value.flatten(0, 1),
                geometry, groups, (True, False),
            )[0]  # fmt: skip
            grad_x = examples_of_groups(found, groups)
        elif need_x:
            grad_x = _backward(grad, x, value, geometry, 1, (True, False))[0]
        shape = value.shape[1:] if own else value.shape
        if need_weight and apart and windows.pays(x, shape, geometry, groups, backward=True):
            grad_weight = windows.weight_gradient(grad, x, shape, geometry, groups)
        elif need_weight and apart:
            blank = value.new_empty((groups * shape[0], *shape[1:]))  # only its shape is used
            found = _backward(
                channels_of_groups(grad, groups), channels_of_groups(x, groups), blank,
                geometry, groups, (False, True), need_bias and ctx.axes[1] == 2,
            )  # fmt: skip
            grad_weight = found[1].view(groups, *shape)
            if found[2] is not None:
                grad_bias = found[2].view(groups, -1)
        elif need_weight:
            blank = value.new_empty(value.shape[1:]) if own else value
            grad_weight = _backward(grad, x, blank, geometry, 1, (False, True))[1]
        if need_bias and grad_bias is None:
            grad_bias = _bias_gradient(grad, groups, ctx.axes[1] == 2)
        return grad_x, grad_weight, None, grad_bias, None, None, None


class GroupProbe(torch.autograd.Function):
    """A layer at shared weights whose output's gradient is kept: the probe's gradient is that."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probe: Tensor,
        value: Tensor,
        bias_target: Optional,
        bias: Optional,
        groups: int,
        geometry: Geometry | None,
    ) -> Tensor:
        """The output."""
        ctx.save_for_backward(x, value)
        ctx.groups, ctx.geometry = groups, geometry
        ctx.bias_axes = None if bias_target is None else bias_target.ndim
        if geometry is None:
            return linear(x, value, bias)
        return convolution(x, value, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional, ...]:
        """The gradients, by operand."""
        x, value = ctx.saved_tensors
        need_x, _, _, need_bias = ctx.needs_input_grad[:4]
        grad, geometry = grads[0], ctx.geometry
        grad_x = grad_bias = None
        if need_x and geometry is None:
            grad_x = grad @ value
        elif need_x:
            grad_x = _backward(grad, x, value, geometry, 1, (True, False))[0]
        if need_bias and geometry is None:
            rows = rows_of_groups(grad, ctx.groups)
            grad_bias = rows.sum(1) if ctx.bias_axes == 2 else rows.sum((0, 1))
        elif need_bias:
            grad_bias = _bias_gradient(grad, ctx.groups, ctx.bias_axes == 2)
        return grad_x, grad, None, grad_bias, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Optional) -> Tensor:
    """x Wᵀ + b at shared or own weights and biases.

    x (n, ..., in), weight (out, in) or (groups, out, in), bias (out,) or (groups, out).
    """
    if weight.ndim == 2 and (bias is None or bias.ndim == 1):
        return F.linear(x, weight, bias)
    if weight.ndim == 2:
        assert bias is not None
        return F.linear(x, weight) + _rows_shaped(bias, x)
    rows = rows_of_groups(x, len(weight))
    if bias is None:
        out = rows @ weight.mT
    else:
        out = torch.baddbmm(bias if bias.ndim == 1 else bias.unsqueeze(1), rows, weight.mT)
    flat: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[1]])
    return flat


def convolution(x: Tensor, weight: Tensor, bias: Optional, geometry: Geometry) -> Tensor:
    """A convolution at shared or own weights and biases.

    x (n, channels, ...), weight (out, in, ...) or (groups, out, in, ...), bias (out,) or (groups,
    out).
    """
    own = weight.ndim == x.ndim + 1
    if not own and (bias is None or bias.ndim == 1):
        return _convolve(x, weight, bias, geometry, 1)
    if not own:
        assert bias is not None
        out = _convolve(x, weight, None, geometry, 1)
        each = bias.repeat_interleave(len(x) // len(bias), 0)
        return out.add_(each.view(*each.shape, *[1] * (x.ndim - 2)))
    groups = len(weight)
    if windows.pays(x, weight.shape[1:], geometry, groups, backward=False):
        return windows.convolved(x, weight, bias, geometry)
    if bias is not None:
        bias = bias.repeat(groups) if bias.ndim == 1 else bias.flatten()
    wide = _convolve(channels_of_groups(x, groups), weight.flatten(0, 1), bias, geometry, groups)
    return examples_of_groups(wide, groups)


def _convolve(x: Tensor, weight: Tensor, bias: Optional, geometry: Geometry, groups: int) -> Tensor:
    return torch.convolution(
        x, weight, bias, *geometry[:3], False, [0] * len(geometry.stride), geometry.groups * groups
    )


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int,
    wanted: tuple[bool, bool], bias: bool = False,
) -> tuple[Any, Any, Any]:  # fmt: skip
    found: tuple[Any, Any, Any] = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]] if bias else None, *geometry[:3], False,
        [0] * len(geometry.stride), geometry.groups * groups, [*wanted, bias],
    )  # fmt: skip
    return found


def _both(
    grad: Tensor, x: Tensor, value: Tensor, geometry: Geometry, need_bias: bool, apart: bool,
    groups: int,
) -> tuple[Optional, ...]:  # fmt: skip
    """All gradients of a convolution at shared weights by one call."""
    grad_x, grad_weight, grad_bias = _backward(
        grad, x, value, geometry, 1, (True, True), need_bias and not apart
    )
    if need_bias and apart:
        grad_bias = _bias_gradient(grad, groups, True)
    return grad_x, grad_weight, None, grad_bias, None, None, None


def _bias_gradient(grad: Tensor, groups: int, apart: bool) -> Tensor:
    if not apart:
        return grad.sum([0, *range(2, grad.ndim)])
    return grad.reshape(groups, -1, grad.shape[1], grad[0, 0].numel()).sum((1, 3))


def rows_of_groups(tensor: Tensor, groups: int) -> Tensor:
    """(n, ..., features) -> (groups, rows, features)."""
    return tensor.reshape(groups, -1, tensor.shape[-1])


def channels_of_groups(tensor: Tensor, groups: int) -> Tensor:
    """(n, channels, ...) -> (n / groups, groups * channels, ...); no copy where n = groups."""
    if len(tensor) == groups:
        return tensor.reshape(1, -1, *tensor.shape[2:])
    return tensor.reshape(groups, -1, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)


def examples_of_groups(tensor: Tensor, groups: int) -> Tensor:
    """(n / groups, groups * channels, ...) -> (n, channels, ...); never a view for autograd."""
    size, channels, rest = len(tensor), tensor.shape[1] // groups, tensor.shape[2:]
    if size > 1:
        tensor = tensor.view(size, groups, channels, *rest).transpose(0, 1)
    shape = [groups * size, channels, *rest]
    flat: Tensor = torch.ops.aten._unsafe_view(tensor.contiguous(), shape)
    return flat


def _rows_shaped(bias: Tensor, x: Tensor) -> Tensor:
    """(groups, out) -> (n, 1, ..., out), to be added to an output for x."""
    each = bias.repeat_interleave(len(x) // len(bias), 0)
    return each.view(len(x), *[1] * (x.ndim - 2), each.shape[-1])
