"""Max pooling over windows of two by two, many times faster on a CPU than the general kernel.

With the channels first, torch's kernel looks at one number at a time; the maximum of two rows, and
of neighbours within them, is vector work. Of equal numbers the first in the window gets the
gradient, as in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class MaxPool2x2(torch.autograd.Function):
    """(n, channels, height, width) -> (n, channels, height // 2, width // 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The maxima."""
        left, right = _columns(x)
        pairs = torch.maximum(left, right)
        top, bottom = pairs[:, :, 0::2], pairs[:, :, 1::2]
        ctx.save_for_backward(left >= right, top >= bottom)
        ctx.shape = x.shape
        return torch.maximum(top, bottom)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient, at the first of the largest of every window."""
        grad, (n, channels, height, width) = grads[0], ctx.shape
        left, top = (mask.to(grad.dtype) for mask in ctx.saved_tensors)  # faster than bools
        rows = grad.new_empty((n, channels, height // 2 * 2, width // 2))
        torch.mul(grad, top, out=rows[:, :, 0::2])
        torch.sub(grad, rows[:, :, 0::2], out=rows[:, :, 1::2])
        odd = height % 2 or width % 2
        out = grad.new_zeros(ctx.shape) if odd else grad.new_empty(ctx.shape)
        whole = out[:, :, : height // 2 * 2, : width // 2 * 2]
        torch.mul(rows, left, out=whole[..., 0::2])
        torch.sub(rows, whole[..., 0::2], out=whole[..., 1::2])
        return out


def pooled(x: Tensor) -> Tensor:
    """The maxima over windows of two by two, without what a gradient needs.

    Example:
        >>> pooled(torch.arange(16.0).view(1, 1, 4, 4))
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """
    height, width = (size // 2 * 2 for size in x.shape[2:])
    rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
    return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def is_plain(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> bool:
    """Whether a call of max_pool2d is one that is faster here."""
    return (
        isinstance(input, Tensor)
        and input.ndim == 4
        and input.device.type == "cpu"
        and input.is_contiguous()
        and min(input.shape[2:]) >= 2
        and _pair(kernel_size) == (2, 2)
        and _pair(stride or kernel_size) == (2, 2)
        and _pair(padding) == (0, 0)
        and _pair(dilation) == (1, 1)
        and not ceil_mode
        and not return_indices
    )


def _pair(value: Any) -> tuple[Any, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _columns(x: Tensor) -> tuple[Tensor, Tensor]:
    height, width = (size // 2 * 2 for size in x.shape[2:])
    return x[:, :, :height, 0:width:2], x[:, :, :height, 1:width:2]
