"""One direction of a recurrent layer over all steps, each group of examples at its own weights.

Everything is time-major: inputs (steps, n, in), with the examples of all groups side by side. With
z = x W_ihᵀ + b_ih of all steps at once and u = h' W_hhᵀ + b_hh of one step, a step takes the state
h' before it to h:

    tanh, relu   h = tanh(z + u) or max(z + u, 0)
    lstm         i, f, g, o = σ, σ, tanh, σ of the parts of z + u;  c = f c' + i g;  h = o tanh(c)
    gru          r, s = σ of two parts of z + u, n = tanh(z_n + r u_n);  h = n + s (h' − n)

The derivatives by z and u are linear in those by h and c of the same step. Their coefficients are
found for all steps at once, so a step back is a matrix product and a few products by elements. The
gradient of a weight is DᵀA over all steps: the derivatives D are given back, never summed by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sharpkit.groupwise.group_layers import linear, rows_of_groups

Optional: TypeAlias = Tensor | None
GATES = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 3}  # parts of z and u

_sigmoid_back = torch.ops.aten.sigmoid_backward.grad_input  # (dy, y) -> dy y (1 − y)
_tanh_back = torch.ops.aten.tanh_backward.grad_input  # (dy, y) -> dy (1 − y²)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of one direction, and its bias.

    Attributes:
        value: Shape (out, in), or (groups, out, in).
        bias: Shape (out,), or (groups, out); None for 0.
        thin: A (groups, rows, in) and D (groups, rows, out) of a perturbation DᵀA, or None.
    """

    value: Tensor
    bias: Optional = None
    thin: tuple[Tensor, Tensor] | None = None

    def part(self, start: int, stop: int) -> Matrix:
        """The same for some of the groups."""
        value = self.value if self.value.ndim == 2 else self.value[start:stop]
        bias = self.bias
        bias = bias if bias is None or bias.ndim == 1 else bias[start:stop]
        thin = None if self.thin is None else tuple(t[start:stop] for t in self.thin)
        return Matrix(value, bias, thin)

    def all_steps(self, x: Tensor) -> Tensor:
        """x Wᵀ + b, (steps, n, out) and contiguous."""
        if self.value.ndim == 2 and self.thin is None and (self.bias is None or self.bias.ndim < 2):
            return F.linear(x, self.value, self.bias)
        x = x.transpose(0, 1)
        out = linear(x, self.value, self.bias)
        if self.thin is not None:
            a, d = self.thin
            rows = rows_of_groups(x, len(a)) @ a.mT
            out = torch.baddbmm(rows_of_groups(out, len(a)), rows, d).view(out.shape)
        return out.transpose(0, 1).contiguous()

    def step(self, out: Tensor, h: Tensor) -> None:
        """Add h Wᵀ of one step to out (n, out), in place."""
        if self.value.ndim == 2:
            out.addmm_(h, self.value.mT)
        elif len(self.value) == len(h):  # the weights from the left: far faster for one column
            out.unsqueeze(-1).baddbmm_(self.value, h.unsqueeze(-1))
        else:
            _by_group(out, len(self.value)).baddbmm_(_by_group(h, len(self.value)), self.value.mT)
        if self.thin is not None:
            a, d = self.thin
            _by_group(out, len(a)).baddbmm_(torch.bmm(_by_group(h, len(a)), a.mT), d)

    def step_back(self, base: Tensor, grad: Tensor) -> Tensor:
        """base + the derivative by h of one step; base (n, in), grad (n, out)."""
        if self.value.ndim == 2:
            out = torch.addmm(base, grad, self.value)
        else:
            each = _by_group(grad, len(self.value))
            out = torch.baddbmm(_by_group(base, len(self.value)), each, self.value).view(base.shape)
        if self.thin is not None:
            a, d = self.thin
            _by_group(out, len(a)).baddbmm_(torch.bmm(_by_group(grad, len(a)), d.mT), a)
        return out

    def all_steps_back(self, grad: Tensor) -> Tensor:
        """The derivative by x of all steps; grad (steps, n, out)."""
        if self.value.ndim == 2 and self.thin is None:
            return grad @ self.value
        grad = grad.transpose(0, 1)
        groups = len(self.value) if self.thin is None else len(self.thin[0])
        rows = rows_of_groups(grad, groups)
        out = rows @ self.value
        if self.thin is not None:
            a, d = self.thin
            out = torch.baddbmm(out, rows @ d.mT, a)
        return out.view(*grad.shape[:2], -1).transpose(0, 1)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(n, features) -> (groups, n / groups, features)."""
    return t.view(groups, -1, t.shape[-1])


@dataclass(frozen=True)
class Direction:
    """One direction of one layer.

    Attributes:
        kind: "tanh", "relu", "lstm" or "gru".
        groups: Of examples.
        inputs: W_ih; its bias is b_ih + b_hh, but b_ih alone for a "gru".
        hidden: W_hh; its bias is b_hh of a "gru", otherwise None.
        backwards: From the last step to the first.
    """

    kind: str
    groups: int
    inputs: Matrix
    hidden: Matrix
    backwards: bool = False

    def part(self, start: int, stop: int) -> Direction:
        """The same for some of the groups."""
        matrices = (m.part(start, stop) for m in (self.inputs, self.hidden))
        return Direction(self.kind, min(stop, self.groups) - start, *matrices, self.backwards)

    def order(self, steps: int) -> range:
        """The steps in the order in which they are taken."""
        return range(steps - 1, -1, -1) if self.backwards else range(steps)

    def before(self, states: Tensor) -> Tensor:
        """The states before every step, of (steps + 1, n, size)."""
        return states[1:] if self.backwards else states[:-1]

    def after(self, states: Tensor) -> Tensor:
        """The states after every step."""
        return states[:-1] if self.backwards else states[1:]

    def ends(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The states before the first step and after the last."""
        first, last = states[0], states[-1]
        return (last, first) if self.backwards else (first, last)


def forward(
    way: Direction, x: Tensor, h: Optional, c: Optional
) -> tuple[Tensor, Optional, tuple[Tensor, ...]]:
    """All states of a direction.

    Args:
        way: The direction.
        x: Inputs, (steps, n, in).
        h: The first state, (n, size); None for 0.
        c: That of the cell, for an "lstm".

    Returns:
        tuple: The states (steps + 1, n, size), with the first; the cell's likewise, or None; and
        what `backward` needs.
    """
    z = way.inputs.all_steps(x)
    states = _states(way, z, h)
    if way.kind == "lstm":
        cells, tanhs = _states(way, z, c), z.new_empty(*z.shape[:2], states.shape[2])
        _lstm(way, z, states, cells, tanhs)
        return states, cells, (z, states, cells, tanhs)
    if way.kind == "gru":
        u = _repeated(way.hidden.bias, z)
        _gru(way, z, u, states)
        return states, None, (z, states, u)
    _plain(way, z, states)
    return states, None, (states,)


def _states(way: Direction, z: Tensor, first: Optional) -> Tensor:
    states = z.new_empty(len(z) + 1, z.shape[1], z.shape[2] // GATES[way.kind])
    start, _ = way.ends(states)
    if first is None:
        start.zero_()
    else:
        start.copy_(first)
    return states


def _repeated(bias: Optional, z: Tensor) -> Tensor:
    """A bias (out,) or (groups, out) for every step and example, as z."""
    if bias is None:
        return torch.zeros_like(z)
    if bias.ndim == 2:
        bias = bias.repeat_interleave(z.shape[1] // len(bias), 0)
    return bias.expand(z.shape).contiguous()


def _lstm(way: Direction, z: Tensor, states: Tensor, cells: Tensor, tanhs: Tensor) -> None:
    """The gates are left in z, and tanh(c) in `tanhs`."""
    size = states.shape[2]
    each = zip(
        z.unbind(), *(part.unbind() for part in z.split(size, 2)), z[..., : 2 * size].unbind(),
        way.before(states).unbind(), way.after(states).unbind(),
        way.before(cells).unbind(), way.after(cells).unbind(), tanhs.unbind(), strict=True,
    )  # fmt: skip
    for gates, i, f, g, o, both, h_before, h, c_before, c, tanh in _ordered(way, each):
        way.hidden.step(gates, h_before)
        both.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c_before, out=c)
        c.addcmul_(i, g)
        torch.tanh(c, out=tanh)
        torch.mul(o, tanh, out=h)


def _gru(way: Direction, z: Tensor, u: Tensor, states: Tensor) -> None:
    """The gates r, s and n are left in z."""
    size = states.shape[2]
    each = zip(
        u.unbind(), u[..., : 2 * size].unbind(), u[..., 2 * size :].unbind(),
        z[..., : 2 * size].unbind(), *(part.unbind() for part in z.split(size, 2)),
        way.before(states).unbind(), way.after(states).unbind(), strict=True,
    )  # fmt: skip
    for own, own_both, own_n, both, r, s, n, h_before, h in _ordered(way, each):
        way.hidden.step(own, h_before)
        both.add_(own_both).sigmoid_()
        n.addcmul_(r, own_n).tanh_()
        torch.lerp(n, h_before, s, out=h)


def _plain(way: Direction, z: Tensor, states: Tensor) -> None:
    each = zip(
        z.unbind(), way.before(states).unbind(), way.after(states).unbind(), strict=True
    )  # fmt: skip
    for own, h_before, h in _ordered(way, each):
        way.hidden.step(own, h_before)
        if way.kind == "tanh":
            torch.tanh(own, out=h)
        else:
            torch.clamp_min(own, 0, out=h)


def _ordered(way: Direction, each: Any) -> Sequence[tuple[Tensor, ...]]:
    steps = list(each)
    return steps[::-1] if way.backwards else steps


@dataclass(frozen=True)
class Slopes:
    """Derivatives of what follows a direction, by its inputs z and u (steps, n, out) and states."""

    z: Tensor
    u: Tensor
    h: Tensor  # (n, size), by the first state
    c: Optional


def backward(way: Direction, kept: tuple[Tensor, ...], by_h: Tensor, by_c: Optional) -> Slopes:
    """The derivatives by z, u and the first states.

    Args:
        way: The direction.
        kept: What `forward` kept.
        by_h: Derivatives by all states, (steps + 1, n, size).
        by_c: Derivative by the last cell state, (n, size), for an "lstm".
    """
    if way.kind == "lstm":
        assert by_c is not None
        return _lstm_back(way, kept, by_h, by_c)
    if way.kind == "gru":
        return _gru_back(way, kept, by_h)
    h = way.after(kept[0])
    factor = (h > 0).to(h.dtype) if way.kind == "relu" else 1 - h.square()
    slopes = _states_back(way, factor.unbind(), way.after(by_h).unbind())
    return Slopes(factor, factor, way.hidden.step_back(way.ends(by_h)[0], slopes), None)


def _states_back(way: Direction, factors: Sequence[Tensor], by_h: Sequence[Tensor]) -> Tensor:
    """Turn the factors of every step into derivatives, in place; returns those of the first."""
    later: Optional = None
    for t in reversed(way.order(len(factors))):
        dh = by_h[t] if later is None else way.hidden.step_back(by_h[t], later)
        later = factors[t].mul_(dh)
    assert later is not None
    return later


def _lstm_back(way: Direction, kept: tuple[Tensor, ...], by_h: Tensor, by_c: Tensor) -> Slopes:
    gates, states, cells, tanhs = kept
    size = states.shape[2]
    i, f, g, o = gates.split(size, 2)
    dz = torch.empty_like(gates)
    for back, y, slope, out in zip(
        (_sigmoid_back, _sigmoid_back, _tanh_back, _sigmoid_back),
        (i, f, g, o),
        (g, way.before(cells), i, tanhs),
        dz.split(size, 2),
        strict=True,
    ):
        back(slope, y, grad_input=out)
    each = list(
        zip(
            way.after(by_h).unbind(),
            dz.unbind(),
            dz.unflatten(2, (4, size))[:, :, :3].unbind(),
            dz[..., 3 * size :].unbind(),
            f.unbind(),
            torch.ops.aten.tanh_backward(o, tanhs).unbind(),
            strict=True,
        )  # fmt: skip
    )
    dc, later = by_c, None
    for t in reversed(way.order(len(each))):
        dh, slopes, of_cell, of_output, forget, through = each[t]
        if later is not None:
            dh = way.hidden.step_back(dh, later)
        dc = torch.addcmul(dc, dh, through)
        of_cell.mul_(dc.unsqueeze(1))
        of_output.mul_(dh)
        dc.mul_(forget)
        later = slopes
    assert later is not None
    return Slopes(dz, dz, way.hidden.step_back(way.ends(by_h)[0], later), dc)


def _gru_back(way: Direction, kept: tuple[Tensor, ...], by_h: Tensor) -> Slopes:
    gates, states, u = kept
    size = states.shape[2]
    r, s, n = gates.split(size, 2)
    by_n = torch.ops.aten.tanh_backward(1 - s, n)
    du = torch.empty_like(gates)
    of_r, of_s, of_n = du.split(size, 2)
    _sigmoid_back(u[..., 2 * size :], r, grad_input=of_r)
    of_r.mul_(by_n)
    _sigmoid_back(way.before(states) - n, s, grad_input=of_s)
    torch.mul(by_n, r, out=of_n)
    each = list(
        zip(
            way.after(by_h).unbind(),
            du.unbind(),
            du.unflatten(2, (3, size)).unbind(),
            s.unbind(),
            by_n.unbind(),
            strict=True,
        )  # fmt: skip
    )
    last: tuple[Tensor, Tensor, Tensor] | None = None
    for t in reversed(way.order(len(each))):
        dh, slopes, parts, keep, of_z = each[t]
        if last is not None:
            dh = way.hidden.step_back(torch.addcmul(dh, *last[:2]), last[2])
        parts.mul_(dh.unsqueeze(1))
        of_z.mul_(dh)
        last = dh, keep, slopes
    assert last is not None
    first = torch.addcmul(way.ends(by_h)[0], *last[:2])
    dz = torch.cat([du[..., : 2 * size], by_n], 2)
    return Slopes(dz, du, way.hidden.step_back(first, last[2]), None)


class Recurrence(torch.autograd.Function):
    """`forward` with derivatives by inputs, first states, biases, and by probes at z and u."""

    @staticmethod
    def forward(
        ctx: Any,
        way: Direction,
        x: Tensor,
        h: Optional,
        c: Optional,
        probe_z: Optional,
        probe_u: Optional,
        bias_z: Optional,
        bias_u: Optional,
    ) -> tuple[Tensor, Optional]:
        """All states, and the last of the cell; probes are (n, steps, out), biases as targets."""
        states, cells, kept = forward(way, x, h, c)
        ctx.way = way
        ctx.axes = [None if b is None else b.ndim for b in (bias_z, bias_u)]
        ctx.save_for_backward(*kept)
        return states, None if cells is None else way.ends(cells)[1].clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, by_h: Tensor, by_c: Optional) -> tuple[Optional, ...]:
        """The derivatives, by operand."""
        _, need_x, need_h, need_c, need_z, need_u, *need_biases = ctx.needs_input_grad
        way = ctx.way
        slopes = backward(way, ctx.saved_tensors, by_h, by_c)
        biases = [
            _summed(t, way.groups, axes == 2) if needed else None
            for t, axes, needed in zip((slopes.z, slopes.u), ctx.axes, need_biases, strict=True)
        ]
        return (
            None,
            way.inputs.all_steps_back(slopes.z) if need_x else None,
            slopes.h if need_h else None,
            slopes.c if need_c else None,
            slopes.z.transpose(0, 1) if need_z else None,
            slopes.u.transpose(0, 1) if need_u else None,
            *biases,
        )


def _summed(slopes: Tensor, groups: int, apart: bool) -> Tensor:
    """(steps, n, out) -> (groups, out) or (out,)."""
    total = slopes.sum(0)
    return total.view(groups, -1, total.shape[1]).sum(1) if apart else total.sum(0)
