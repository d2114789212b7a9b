"""A layer's inputs and outputs as rows: what multiplies its weight matrix, also in a convolution.

A convolution multiplies its weight, as a matrix (out, in · window), with the windows of its input,
one row per position; a linear layer with its input, one row per token. The gradient of the weight
for a group is then DᵀA with the rows A of the inputs and D of the gradients at the outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sharpkit.groupwise.layer_calls import LayerCall
from sharpkit.groupwise.windows import positions, rows_of_windows


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
