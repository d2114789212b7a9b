"""The steps of recurrent layers and back, for all examples side by side.

Everything is time-major. With z = x W_ihᵀ + b_ih of all steps (steps, n, out), and u = h' W_hhᵀ +
b_hh of one step, a step takes the state h' before it to h:

    tanh, relu   h = tanh(z + u) or max(z + u, 0)
    lstm         i, f, g, o = σ, σ, tanh, σ of the parts of z + u;  c = f c' + i g;  h = o tanh(c)
    gru          r, s = σ of two parts of z + u, n = tanh(z_n + r u_n);  h = n + s (h' − n)

The derivatives by z and u are linear in those by h and c of the same step. Their coefficients are
found for all steps at once, so that a step back is a matrix product and a few products of elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from sharpkit.groupwise.recurrent_direction import Optional, RecurrentDirection

Kept: TypeAlias = tuple[Tensor, ...]
Run: TypeAlias = tuple[Tensor, Optional, Kept]
Back: TypeAlias = tuple[Tensor, Tensor, Tensor, Optional]

_sigmoid_back = torch.ops.aten.sigmoid_backward.grad_input  # (dy, y) -> dy y (1 − y)
_tanh_back = torch.ops.aten.tanh_backward.grad_input  # (dy, y) -> dy (1 − y²)


def run(way: RecurrentDirection, z: Tensor, h: Tensor, c: Optional) -> Run:
    """All steps.

    z is (steps, n, out), and overwritten. Returns states, last cell and what `back` needs, as
    `recurrence.forward` does.
    """
    if way.kind == "lstm":
        assert c is not None
        return _lstm(way, z, h, c)
    if way.kind == "gru":
        return _gru(way, z, h)
    return _plain(way, z, h)


def back(way: RecurrentDirection, kept: Kept, by_h: Tensor, by_c: Optional) -> Back:
    """The derivatives by z and u (steps, n, out), and by the first states.

    by_h (steps + 1, n, size) are derivatives by all states, by_c (n, size) by the last of the cell.
    """
    if way.kind == "lstm":
        assert by_c is not None
        return _lstm_back(way, kept, by_h, by_c)
    if way.kind == "gru":
        return _gru_back(way, kept, by_h)
    return _plain_back(way, kept, by_h)


# --- forward ----------------------------------------------------------------------------------


def _lstm(way: RecurrentDirection, z: Tensor, h: Tensor, c: Tensor) -> Run:
    size = h.shape[1]
    states, cells = _states(way, z, h), _states(way, z, c)
    tanhs, beside = torch.empty_like(states[1:]), torch.empty_like(h)
    each = zip(
        z.unbind(), z[..., : 2 * size].unbind(), *(gate.unbind() for gate in z.chunk(4, 2)),
        way.before(states).unbind(), way.after(states).unbind(),
        way.before(cells).unbind(), way.after(cells).unbind(), tanhs.unbind(), strict=True,
    )  # fmt: skip
    for gates, i_f, i, f, g, o, h_before, h_after, c_before, c_after, tanh in _ordered(way, each):
        way.hidden.step(gates, h_before)
        i_f.sigmoid_()
        _tanh(g, beside)
        o.sigmoid_()
        torch.mul(f, c_before, out=c_after)
        c_after.addcmul_(i, g)
        torch.tanh(c_after, out=tanh)
        torch.mul(o, tanh, out=h_after)
    return states, way.ends(cells)[1], (z, states, cells, tanhs)


def _gru(way: RecurrentDirection, z: Tensor, h: Tensor) -> Run:
    size = h.shape[1]
    states, u, beside = _states(way, z, h), _repeated(way.hidden.bias, z), torch.empty_like(h)
    each = zip(
        u.unbind(), u[..., : 2 * size].unbind(), u[..., 2 * size :].unbind(),
        z[..., : 2 * size].unbind(), *(gate.unbind() for gate in z.chunk(3, 2)),
        way.before(states).unbind(), way.after(states).unbind(), strict=True,
    )  # fmt: skip
    for own, own_r_s, own_n, r_s, r, s, n, h_before, h_after in _ordered(way, each):
        way.hidden.step(own, h_before)
        r_s.add_(own_r_s).sigmoid_()
        _tanh(n.addcmul_(r, own_n), beside)
        torch.lerp(n, h_before, s, out=h_after)
    return states, None, (z, states, u)


def _plain(way: RecurrentDirection, z: Tensor, h: Tensor) -> Run:
    states = _states(way, z, h)
    each = zip(z.unbind(), way.before(states).unbind(), way.after(states).unbind(), strict=True)
    for own, h_before, h_after in _ordered(way, each):
        way.hidden.step(own, h_before)
        if way.kind == "tanh":
            torch.tanh(own, out=h_after)
        else:
            torch.clamp_min(own, 0, out=h_after)
    return states, None, (states,)


def _tanh(gate: Tensor, beside: Tensor) -> None:
    """In place; on a CPU by way of one piece of memory, where it is three times as fast."""
    if gate.device.type == "cpu":
        gate.copy_(beside.copy_(gate).tanh_())
    else:
        gate.tanh_()


def _states(way: RecurrentDirection, z: Tensor, first: Tensor) -> Tensor:
    """Room for the states (steps + 1, n, size), with the first in place."""
    states = z.new_empty(len(z) + 1, *first.shape)
    way.ends(states)[0].copy_(first)
    return states


def _repeated(bias: Optional, z: Tensor) -> Tensor:
    """A bias (out,) or (groups, out) for every step and example, as z."""
    if bias is None:
        return torch.zeros_like(z)
    if bias.ndim == 2:
        bias = bias.repeat_interleave(z.shape[1] // len(bias), 0)
    return bias.expand(z.shape).contiguous()


def _ordered(
    way: RecurrentDirection, each: Iterable[tuple[Tensor, ...]], *, back: bool = False
) -> Sequence[tuple[Tensor, ...]]:
    """Tensors of every step, in the order in which the steps are taken, or back."""
    steps = list(each)
    return steps[::-1] if way.backwards != back else steps


# --- back -------------------------------------------------------------------------------------


def _lstm_back(way: RecurrentDirection, kept: Kept, by_h: Tensor, by_c: Tensor) -> Back:
    gates, _, cells, tanhs = kept
    i, f, g, o = gates.chunk(4, 2)
    dz = torch.empty_like(gates)
    of_i, of_f, of_g, of_o = dz.chunk(4, 2)
    _sigmoid_back(g, i, grad_input=of_i)
    _sigmoid_back(way.before(cells), f, grad_input=of_f)
    _tanh_back(i, g, grad_input=of_g)
    _sigmoid_back(tanhs, o, grad_input=of_o)
    of_c = dz.view(*dz.shape[:2], 4, -1)[:, :, :3]
    c_of_h = torch.ops.aten.tanh_backward(o, tanhs)
    each = zip(
        way.after(by_h).unbind(), dz.unbind(), of_c.unbind(), of_o.unbind(), f.unbind(),
        c_of_h.unbind(), strict=True,
    )  # fmt: skip
    dc, later = by_c, None
    for dh, own, own_c, own_o, forget, through in _ordered(way, each, back=True):
        if later is not None:
            dh = way.hidden.step_back(dh, later)
        dc = torch.addcmul(dc, dh, through)
        own_c.mul_(dc.unsqueeze(1))
        own_o.mul_(dh)
        dc.mul_(forget)
        later = own
    assert later is not None
    return dz, dz, way.hidden.step_back(way.ends(by_h)[0], later), dc


def _gru_back(way: RecurrentDirection, kept: Kept, by_h: Tensor) -> Back:
    gates, states, u = kept
    r, s, n = gates.chunk(3, 2)
    dn = torch.ops.aten.tanh_backward(1 - s, n)
    du = torch.empty_like(gates)
    of_r, of_s, of_n = du.chunk(3, 2)
    _sigmoid_back(u.chunk(3, 2)[2], r, grad_input=of_r)
    of_r.mul_(dn)
    _sigmoid_back(way.before(states) - n, s, grad_input=of_s)
    torch.mul(dn, r, out=of_n)
    each = zip(
        way.after(by_h).unbind(), du.unbind(), du.view(*du.shape[:2], 3, -1).unbind(),
        dn.unbind(), s.unbind(), strict=True,
    )  # fmt: skip
    later: tuple[Tensor, Tensor, Tensor] | None = None
    for dh, own, parts, own_n, keep in _ordered(way, each, back=True):
        if later is not None:
            dh = _gru_state_back(way, dh, later)
        parts.mul_(dh.unsqueeze(1))
        own_n.mul_(dh)
        later = dh, keep, own
    assert later is not None
    dz = torch.cat([of_r, of_s, dn], 2)
    return dz, du, _gru_state_back(way, way.ends(by_h)[0], later), None


def _gru_state_back(
    way: RecurrentDirection, by_h: Tensor, later: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """By the state before a step: through the part that is kept, and through u."""
    dh, keep, du = later
    return way.hidden.step_back(torch.addcmul(by_h, dh, keep), du)


def _plain_back(way: RecurrentDirection, kept: Kept, by_h: Tensor) -> Back:
    h = way.after(kept[0])
    dz = (h > 0).to(h.dtype) if way.kind == "relu" else 1 - h.square()
    later: Optional = None
    each = zip(way.after(by_h).unbind(), dz.unbind(), strict=True)
    for dh, own in _ordered(way, each, back=True):
        if later is not None:
            dh = way.hidden.step_back(dh, later)
        later = own.mul_(dh)
    assert later is not None
    return dz, dz, way.hidden.step_back(way.ends(by_h)[0], later), None
