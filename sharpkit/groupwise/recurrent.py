"""Recurrent layers and cells over the examples of all groups (see `recurrence`).

The gradient of a weight is always found as the rows A of what it multiplies and D of derivatives by
what comes out, of all steps of all calls, and multiplied out at most once: otherwise each step of a
cell would add a matrix per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpkit.groupwise.recurrence import Recurrence, forward
from sharpkit.groupwise.recurrent_direction import Matrix, Optional, RecurrentDirection

if TYPE_CHECKING:
    from sharpkit.groupwise.one_batch import OneBatch

Call = tuple[Any, ...]
LAYERS: dict[Callable[..., Any], str] = {
    torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu",
}  # fmt: skip
CELLS: dict[Callable[..., Any], str] = {
    torch.lstm_cell: "lstm", torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "tanh", torch.rnn_relu_cell: "relu",
}  # fmt: skip


def recurrent_layer(
    batch: OneBatch, func: Callable[..., Any], args: Call, kwargs: dict[str, Any]
) -> tuple[Tensor, ...] | None:
    """All layers, directions and steps; None for what is not known here.

    That is packed sequences, projections, dropout, and autocast.
    """
    if kwargs or len(args) != 9 or not isinstance(args[2], list | tuple):  # or it is packed
        return None
    x, first, weights, has_bias, layers, dropout, training, bidirectional, batch_first = args
    kind, ways = LAYERS[func], 2 if bidirectional else 1
    if batch_first:
        x = x.transpose(0, 1)
    firsts = list(first) if kind == "lstm" else [first]
    per = 4 if has_bias else 2
    if (
        x.ndim != 3 or x.shape[1] != batch.examples or not len(x)
        or (training and dropout > 0)
        or torch.is_autocast_enabled(x.device.type)
        or len(weights) != per * layers * ways
        or any(batch.name_of(t) is not None or t.shape[1] != x.shape[1] for t in firsts)
    ):  # fmt: skip
        return None
    if kind == "lstm" and _is_fused(batch, x, weights):
        return _one_by_one(batch, func, args)
    lasts = []
    for layer in range(layers):
        outs = []
        for way in range(ways):
            k = layer * ways + way
            own = weights[per * k : per * (k + 1)]
            states, cell = _direction(batch, kind, x, [t[k] for t in firsts], own, way == 1)
            outs.append(states[:-1] if way else states[1:])
            lasts.append([states[0 if way else -1], *([] if cell is None else [cell])])
        x = outs[0] if ways == 1 else torch.cat(outs, 2)
    ends = [torch.stack(parts) for parts in zip(*lasts, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *ends)


def _is_fused(batch: OneBatch, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether oneDNN runs an LSTM at weights of each group's own faster, one after the other.

    It does for more than one example: matrices stay in the cache over all steps, and the gates are
    one kernel. It knows neither weights in factors nor other numbers than float32.
    """
    point, names = batch.point, [batch.name_of(w) for w in weights]
    values = [(w, point.values[name]) for w, name in zip(weights, names, strict=True) if name]
    return (
        point.size > 1
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and any(value.ndim > w.ndim == 2 for w, value in values)
        and not any(name in point.thin for name in names)
    )


def _one_by_one(batch: OneBatch, func: Callable[..., Any], args: Call) -> tuple[Tensor, ...]:
    """The function itself, at the weights of one group after the other."""
    x, first, weights, *options = args
    axis, size = 0 if options[-1] else 1, batch.point.size
    values = []
    for w in weights:
        name = batch.name_of(w)
        value = w if name is None else batch.point.values[name]
        own = value.ndim > w.ndim
        values.append(value.unbind() if own else [value] * batch.point.groups)
    firsts = zip(*(t.split(size, 1) for t in first), strict=True)
    outs = [
        func(part, states, list(own), *options)
        for part, states, own in zip(
            x.split(size, axis), firsts, zip(*values, strict=True), strict=True
        )
    ]
    out, h, c = zip(*outs, strict=True)
    return torch.cat(out, axis), torch.cat(h, 1), torch.cat(c, 1)


def recurrent_cell(
    batch: OneBatch, func: Callable[..., Any], args: Call, kwargs: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor] | None:
    """One step."""
    if kwargs or len(args) < 4 or torch.is_autocast_enabled(args[0].device.type):
        return None
    x, first, *weights = args
    kind = CELLS[func]
    firsts = list(first) if kind == "lstm" else [first]
    if any(batch.name_of(t) is not None or not batch.holds_examples(t) for t in (x, *firsts)):
        return None
    own = [w for w in weights if w is not None]
    if len(own) == 3:  # one bias of two
        return None
    states, cell = _direction(batch, kind, x.unsqueeze(0), firsts, own, False)
    return states[1] if cell is None else (states[1], cell)


def _direction(
    batch: OneBatch,
    kind: str,
    x: Tensor,
    firsts: Sequence[Tensor],
    weights: Sequence[Tensor],
    backwards: bool,
) -> tuple[Tensor, Optional]:
    """All states, (steps + 1, n, size), and the last of the cell.

    x is (steps, n, in); weights are W_ih, W_hh and, if there are any, b_ih and b_hh.
    """
    names = [batch.name_of(w) for w in weights]
    for name in names[:2]:
        if name is not None:
            batch.rows[name] = batch.rows.get(name, 0) + len(x)
    batch.calls += len(x)  # a step is one at least
    batch.recurs = True
    way = _way(batch, kind, weights, backwards)
    h, c = firsts[0], firsts[1] if kind == "lstm" else None
    if not torch.is_grad_enabled():
        return forward(way, x, h, c)[:2]
    shape = (x.shape[1], len(x), len(weights[0]))
    probes = [_probe(batch, name, x, shape) for name in names[:2]]
    biases = [None if name is None else batch.point.targets.get(name) for name in names[2:]]
    states, cell = Recurrence.apply(  # type: ignore[no-untyped-call]
        way, x, h, c, *probes, *(biases or (None, None))
    )
    for name, probe, rows in zip(names, probes, (x, way.before(states)), strict=False):
        if name is not None and probe is not None:
            a = rows.detach().transpose(0, 1).reshape(batch.point.groups, -1, rows.shape[2])
            batch.inputs.setdefault(name, []).append(a)
            batch.probes.setdefault(name, []).append(probe)
    return states, cell


def _probe(batch: OneBatch, name: str | None, like: Tensor, shape: tuple[int, ...]) -> Optional:
    """Zeros that take no memory, whose gradient is wanted; None where it is not."""
    if name not in batch.point.probed and name not in batch.point.targets:
        return None
    return like.new_zeros(()).expand(shape).requires_grad_()


def _way(
    batch: OneBatch, kind: str, weights: Sequence[Tensor], backwards: bool
) -> RecurrentDirection:
    """A direction at the groups' own weights."""
    point = batch.point
    names = [batch.name_of(w) for w in weights]
    values = [
        w.detach() if name is None else point.values[name].detach()
        for w, name in zip(weights, names, strict=True)
    ]
    biases: tuple[Optional, Optional] = (None, None)
    if len(values) == 4:
        biases = (values[2], values[3]) if kind == "gru" else (values[2] + values[3], None)
    inputs, hidden = (
        Matrix(value, bias, None if name is None else point.thin.get(name))
        for value, bias, name in zip(values[:2], biases, names[:2], strict=True)
    )
    return RecurrentDirection(kind, point.groups, inputs, hidden, backwards)
