"""One direction of a recurrent layer: its matrices, and the order of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit.groupwise.group_layers import linear, rows_of_groups

Optional: TypeAlias = Tensor | None


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of one direction, and its bias."""

    value: Tensor  # shape (out, in), or (groups, out, in)
    bias: Optional = None  # shape (out,), or (groups, out); None for 0
    # A (groups, rows, in) and D (groups, rows, out) of a perturbation DᵀA, or None
    thin: tuple[Tensor, Tensor] | None = None

    def part(self, start: int, stop: int) -> Matrix:
        """The same for some of the groups."""
        value = self.value if self.value.ndim == 2 else self.value[start:stop]
        bias = self.bias
        bias = bias if bias is None or bias.ndim == 1 else bias[start:stop]
        thin = self.thin
        thin = None if thin is None else (thin[0][start:stop], thin[1][start:stop])
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
        """The derivative by x of all steps; grad (n, steps, out) to (n, steps, in)."""
        if self.value.ndim == 2 and self.thin is None:
            return grad @ self.value
        groups = len(self.value) if self.thin is None else len(self.thin[0])
        rows = rows_of_groups(grad, groups)
        out = rows @ self.value
        if self.thin is not None:
            a, d = self.thin
            out = torch.baddbmm(out, torch.bmm(rows, d.mT), a)
        return out.view(*grad.shape[:2], -1)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(n, features) -> (groups, n / groups, features)."""
    return t.view(groups, -1, t.shape[-1])


@dataclass(frozen=True)
class RecurrentDirection:
    """One direction of one layer."""

    kind: str  # "tanh", "relu", "lstm" or "gru"
    groups: int  # of examples
    inputs: Matrix  # W_ih; its bias is b_ih + b_hh, but b_ih alone for a "gru"
    hidden: Matrix  # W_hh; its bias is b_hh of a "gru", otherwise None
    backwards: bool = False  # from the last step to the first

    def part(self, start: int, stop: int) -> RecurrentDirection:
        """The same for some of the groups."""
        inputs, hidden = (m.part(start, stop) for m in (self.inputs, self.hidden))
        return RecurrentDirection(self.kind, stop - start, inputs, hidden, self.backwards)

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
