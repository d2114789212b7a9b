"""Convolutions of groups as products of matrices with the windows of their inputs.

With the windows U (in · window, positions) of a group's examples, a convolution at weights W, as a
matrix (out, in · window), is W U; its gradients are Wᵀ D, added up where windows overlap, and D Uᵀ.
On a GPU many grouped convolutions run group by group, where these products are one call.

As rows, the windows of a convolution are what the tokens of a linear layer are: the gradient of the
weight for a group is DᵀA with the rows A of the inputs and D of the gradients at the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit.contract.precision import may_use_tf32
from sharpkit.groupwise.layer_calls import Geometry, LayerCall

# an H100's grouped convolutions beside windows, 1 to 512 channels, 8 to 32 pixels: in float32
# windows took 0.1 to 1 of their time; with TF32 only for groups of one, and backwards from this
# many operations of a group
_MOST_IN_TF32 = 1e8
_FEW_CHANNELS = 16  # for which grouped convolutions have no good kernel


def pays(
    x: Tensor, weight: Sequence[int], geometry: Geometry, groups: int, *, backward: bool
) -> bool:
    """Whether windows are faster than a grouped convolution.

    x is (n, in, height, width), weight the shape (out, in, ...) of a group's weight.
    """
    if not x.is_cuda or x.ndim != 4 or geometry.groups != 1:
        return False
    if x.dtype != torch.float32 or not may_use_tf32(x.device):
        return True
    if len(x) > groups:
        return not backward and weight[0] <= _FEW_CHANNELS
    count = math.prod(positions(x.shape, weight, geometry))
    return not backward or 2.0 * math.prod(weight) * count >= _MOST_IN_TF32


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The outputs (n, out, ...) at own weights (groups, out, in, ...) and biases."""
    groups, out = weight.shape[:2]
    space = positions(x.shape, weight.shape[1:], geometry)
    columns = weight.flatten(2) @ columns_of(x, weight.shape[3:], geometry, groups)
    result = columns.view(groups, out, len(x) // groups, -1).transpose(1, 2)
    if bias is not None:
        result = result + bias.view(-1, 1, out, 1)
    flat: Tensor = torch.ops.aten._unsafe_view(result.contiguous(), [len(x), out, *space])
    return flat


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient at the inputs, of weights (groups, out, in, ...)."""
    d = grad.reshape(len(weight), -1, grad.shape[1], grad[0, 0].numel())
    columns = (weight.flatten(2).mT.unsqueeze(1) @ d).flatten(0, 1)
    stride, padding, dilation, _ = geometry
    if math.prod(weight.shape[3:]) == 1 and set(padding) == {0} and set(stride) == {1}:
        return columns.view(x.shape)
    return F.fold(columns, x.shape[2:], weight.shape[3:], dilation, padding, stride)


def weight_gradient(
    grad: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry, groups: int
) -> Tensor:
    """The gradient of each group by its weight of a shape (out, in, ...)."""
    d = grad.reshape(groups, -1, grad.shape[1], grad[0, 0].numel()).transpose(1, 2).flatten(2)
    return (d @ columns_of(x, shape[2:], geometry, groups).mT).view(groups, *shape)


def columns_of(x: Tensor, window: Sequence[int], geometry: Geometry, groups: int) -> Tensor:
    """The windows of images (n, in, height, width), (groups, in · window, positions of all)."""
    seen = _seen(x, window, geometry)
    apart = seen.view(groups, -1, *seen.shape[1:]).movedim(1, 4)
    return apart.flatten(4).flatten(1, 3)


def rows_of_windows(x: Tensor, window: Sequence[int], geometry: Geometry, groups: int) -> Tensor:
    """The same as rows, (groups, positions of all, in · window)."""
    if not x.is_cuda:
        stride, padding, dilation, _ = geometry
        if math.prod(window) == 1 and set(padding) == {0}:
            columns = x[:, :, :: stride[0], :: stride[1]].flatten(2)
        else:
            columns = F.unfold(x, tuple(window), dilation, padding, stride)
        return columns.mT.reshape(groups, -1, columns.shape[1])
    # unfold would be a call for each image there
    return (
        _seen(x, window, geometry)
        .movedim((4, 5), (1, 2))
        .flatten(3)
        .reshape(groups, -1, x.shape[1] * math.prod(window))
    )


def _seen(x: Tensor, window: Sequence[int], geometry: Geometry) -> Tensor:
    """A view (n, in, *window, *positions) of images, padded with zeros."""
    stride, padding, dilation, _ = geometry
    space = positions(x.shape, (0, 0, *window), geometry)
    if any(padding):
        x = F.pad(x, [p for around in reversed(padding) for p in (around, around)])
    steps = x.stride()[2:]
    strides = [step * apart for step, apart in zip(steps, dilation, strict=True)]
    strides += [step * apart for step, apart in zip(steps, stride, strict=True)]
    return x.as_strided([*x.shape[:2], *window, *space], [*x.stride()[:2], *strides])


def positions(x: Sequence[int], weight: Sequence[int], geometry: Geometry) -> list[int]:
    """The sizes of the output along the axes of space."""
    stride, padding, dilation, _ = geometry
    return [
        (size + 2 * around - apart * (window - 1) - 1) // step + 1
        for size, window, step, around, apart in zip(
            x[2:], weight[2:], stride, padding, dilation, strict=True
        )
    ]


def rows_per_example(call: LayerCall) -> int:
    """Rows that a call has for every example; 0 for convolutions that have no such form here."""
    if call.geometry is None:
        return math.prod(call.inputs.shape[1:-1])
    if call.inputs.ndim != 4 or call.geometry.groups != 1:
        return 0
    return math.prod(output_shape(call)[2:])


def output_shape(call: LayerCall) -> list[int]:
    """The shape of a call's output."""
    if call.geometry is None:
        return [*call.inputs.shape[:-1], call.weight.shape[0]]
    sizes = positions(call.inputs.shape, call.weight.shape, call.geometry)
    return [len(call.inputs), call.weight.shape[0], *sizes]


def rows_of(call: LayerCall, groups: int) -> Tensor:
    """The rows A of a call's inputs, (groups, rows, in)."""
    x = call.inputs
    if call.geometry is None:
        return x.reshape(groups, -1, x.shape[-1])
    return rows_of_windows(x, call.weight.shape[2:], call.geometry, groups)


def delta_rows(grad: Tensor, groups: int, *, convolution: bool) -> Tensor:
    """The rows D of the gradient at an output, (groups, rows, out)."""
    if convolution:
        grad = grad.flatten(2).mT
    return grad.reshape(groups, -1, grad.shape[-1])


def as_output(rows: Tensor, call: LayerCall, out: Tensor) -> Tensor:
    """Rows (groups, rows, out) in the shape of a call's output."""
    if call.geometry is None:
        return rows.reshape(out.shape)
    return rows.reshape(len(out), -1, out.shape[1]).mT.reshape(out.shape)


def probe(call: LayerCall, weight: Tensor) -> Tensor:
    """A tensor shaped as the output, of zeros that take no memory, whose gradient is wanted."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return zero.expand(output_shape(call)).requires_grad_()
