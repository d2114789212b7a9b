"""A direction of a recurrent layer as one operation with derivatives of its own.

The gradient of a weight is DᵀA over all steps. The derivatives D by what a matrix gives are handed
out, as gradients of probes, and never multiplied out step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpkit.groupwise import recurrent_steps as steps
from sharpkit.groupwise.group_layers import rows_of_groups
from sharpkit.groupwise.recurrent_direction import Optional, RecurrentDirection
from sharpkit.groupwise.recurrent_steps import Kept

# own matrices of the groups that go through all steps together: what a CPU's cache holds
_CPU_CACHE = 8 * 2**20


class Recurrence(torch.autograd.Function):
    """`forward` with derivatives by inputs, first states, biases, and by probes at z and u."""

    @staticmethod
    def forward(
        ctx: Any,
        way: RecurrentDirection,
        x: Tensor,
        h: Tensor,
        c: Optional,
        probe_z: Optional,
        probe_u: Optional,
        bias_z: Optional,
        bias_u: Optional,
    ) -> tuple[Tensor, Optional]:
        """All states, and the last of the cell; probes are (n, steps, out), biases as targets."""
        states, cell, kept = forward(way, x, h, c)
        ctx.way, ctx.blocks = way, len(kept)
        ctx.axes = [None if b is None else b.ndim for b in (bias_z, bias_u)]
        ctx.save_for_backward(*(t for block in kept for t in block))
        return states, None if cell is None else cell.clone()

    @staticmethod
    def backward(ctx: Any, by_h: Tensor, by_c: Optional) -> tuple[Optional, ...]:
        """The derivatives, by operand.

        Raises:
            NotImplementedError: If they are to be differentiated in turn.
        """
        if torch.is_grad_enabled():  # no graph would lead back to the weights
            raise NotImplementedError("recurrent layers as one batch have no second derivatives")
        _, need_x, need_h, need_c, need_z, need_u, *need_biases = ctx.needs_input_grad
        way, kept = ctx.way, ctx.saved_tensors
        per = len(kept) // ctx.blocks
        blocks = [kept[i * per : (i + 1) * per] for i in range(ctx.blocks)]
        slopes = backward(way, blocks, by_h, by_c)
        total_z = rows_of_groups(slopes.z, way.groups).sum(1)
        same = slopes.u is slopes.z
        total_u = total_z if same else rows_of_groups(slopes.u, way.groups).sum(1)
        biases = [
            (total if axes == 2 else total.sum(0)) if needed else None
            for total, axes, needed in zip((total_z, total_u), ctx.axes, need_biases, strict=True)
        ]
        return (
            None,
            way.inputs.all_steps_back(slopes.z).transpose(0, 1) if need_x else None,
            slopes.h if need_h else None,
            slopes.c if need_c else None,
            slopes.z if need_z else None,
            slopes.u if need_u else None,
            *biases,
        )


def forward(
    way: RecurrentDirection, x: Tensor, h: Tensor, c: Optional
) -> tuple[Tensor, Optional, list[Kept]]:
    """All states of a direction.

    x is (steps, n, in), the first states h and c are (n, size), c for an "lstm". Returns the states
    (steps + 1, n, size), with the first; the last of the cell (n, size), or None; and what
    `backward` needs, by block of groups.
    """
    runs = []
    for part, mine in _blocks(way, x):
        z = part.inputs.all_steps(x[:, mine])
        runs.append(steps.run(part, z, h[mine], None if c is None else c[mine]))
    states, cells, kept = zip(*runs, strict=True)
    return _joined(states, 1), _joined(cells, 0), list(kept)


@dataclass(frozen=True)
class Slopes:
    """Derivatives of what follows, by z and u (n, steps, out) and by the first states (n, size)."""

    z: Tensor
    u: Tensor
    h: Tensor
    c: Optional


def backward(way: RecurrentDirection, kept: Sequence[Kept], by_h: Tensor, by_c: Optional) -> Slopes:
    """The derivatives by z, u and the first states.

    by_h are derivatives by all states, (steps + 1, n, size), by_c by the last cell state.
    """
    found = [
        steps.back(part, own, by_h[:, mine], None if by_c is None else by_c[mine])
        for (part, mine), own in zip(_blocks(way, by_h), kept, strict=True)
    ]
    z, u, h, c = zip(*found, strict=True)
    by_z = _by_example(z)
    by_u = by_z if u[0] is z[0] else _by_example(u)
    return Slopes(by_z, by_u, _joined(h, 0), _joined(c, 0))


def _blocks(way: RecurrentDirection, x: Tensor) -> Iterator[tuple[RecurrentDirection, slice]]:
    """On a CPU, as many groups at a time as leave their own weights in its cache."""
    nbytes = sum(m.value[0].nbytes for m in (way.inputs, way.hidden) if m.value.ndim == 3)
    step = max(1, _CPU_CACHE // nbytes) if nbytes and x.device.type == "cpu" else way.groups
    size = x.shape[1] // way.groups
    for a in range(0, way.groups, step):
        b = min(a + step, way.groups)
        yield way.part(a, b) if step < way.groups else way, slice(a * size, b * size)


def _joined(parts: Sequence[Any], axis: int) -> Any:
    """Blocks as one tensor; None where they are None."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts), axis)


def _by_example(parts: Sequence[Tensor]) -> Tensor:
    """Blocks (steps, n, out) as one of (n, steps, out), contiguous."""
    return torch.cat([part.transpose(0, 1) for part in parts])
