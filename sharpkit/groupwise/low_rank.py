"""Perturbing large linear layers and tables without forming a weight matrix per group.

The gradient of a layer y = W x + b for a group of few rows is Δᵀ A / m: A are the layer's inputs,
Δ the loss gradients at its outputs. Its norm is that of (ΔΔᵀ ∘ AAᵀ), and perturbing W by c Δᵀ A
adds c (x Aᵀ) Δ to the output. A dense layer of 16 M parameters then costs its two thin factors a
group instead of 67 MB (Goodfellow 2015, arXiv:1510.01799, for the norm).

A table that is looked up (an embedding) is such a layer, whose inputs are rows of zeros with a one:
of A only the numbers of the rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Calls(TorchFunctionMode):
    """Hands every `F.linear` that uses one of the given weights to a rule of that weight.

    A model holds `stand_ins` in their place, of NaN: a use that is not seen here, or that comes
    later than the plan was made, shows as NaN and never as a wrong number. Weights are
    recognised by identity; the rule maps (name, call number, input, output) to the output. With
    `watch`, which looks at every argument of every function and so is for planning only, what
    anything but `F.linear` uses is collected in `elsewhere`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        rule: Callable[[str, int, Tensor, Tensor], Tensor],
        *,
        watch: bool = False,
    ) -> None:
        super().__init__()
        self.stand_ins = stand_ins(weights)
        self._weights = dict(weights)
        self._names = {id(w): name for ws in (weights, self.stand_ins) for name, w in ws.items()}
        self._rule, self._watch = rule, watch
        self.count = dict.fromkeys(weights, 0)
        self.elsewhere: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; let the rule change the output of the linear layers it knows."""
        kwargs = kwargs or {}
        name = None
        if func is F.linear:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            name = self._names.get(id(weight))
        if name is None:
            out = func(*args, **kwargs)
        else:
            out = _linear(self._weights[name], *args, **kwargs)
        if self._watch:
            used = {self._names.get(id(a)) for a in pytree.tree_leaves((args, kwargs))}
            self.elsewhere |= {other for other in used if other is not None and other != name}
        if name is None:
            return out
        call = self.count[name]
        self.count[name] += 1
        return self._rule(name, call, args[0] if args else kwargs["input"], out)


def stand_ins(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of NaN, of the same shapes, that take no memory."""
    kinds = {(w.dtype, w.device) for w in weights.values()}
    nans = {
        (dtype, device): torch.full((), torch.nan, dtype=dtype, device=device)
        for dtype, device in kinds
    }
    return {name: nans[w.dtype, w.device].expand(w.shape) for name, w in weights.items()}


def _linear(real: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, real, bias)


def rows(tensor: Tensor) -> Tensor:
    """All leading axes as one: (..., features) -> (rows, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def squared_norm(factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the squared norms of gradients Δᵀ A, of all groups, (groups,) float64.

    A is (groups, rows, in), Δ is (groups, rows, out); or A (groups, rows) are numbers of rows of a
    table, to which Δ is added. Matrices that share one tensor Δ cost its products once.

    Example:
        >>> import torch
        >>> a, d = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
        >>> dense = (d.mT @ a).flatten(1).square().sum(1)
        >>> torch.allclose(squared_norm([(a, d)]).float(), dense, rtol=1e-4)
        True
    """
    by_delta: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for a, d in factors:
        by_delta.setdefault(id(d), (d, []))[1].append(_inner(a))
    parts = [(reduce(torch.add, inner) * _inner(d)).sum((1, 2)) for d, inner in by_delta.values()]
    return reduce(torch.add, parts).clamp(min=0)


def _inner(rows: Tensor) -> Tensor:
    """Inner products of the rows of every group with each other, in float64."""
    if rows.ndim == 2:
        return same_row(rows, rows).double()
    if rows.shape[1] == 1:
        one: Tensor = torch.linalg.vector_norm(rows, dim=(1, 2), keepdim=True, dtype=torch.float64)
        return one.square()
    rows = rows.double()
    return rows @ rows.mT


def same_row(a: Tensor, b: Tensor) -> Tensor:
    """Where the numbers of rows (groups, p) and (groups, q) are the same, bool (groups, p, q)."""
    return a.unsqueeze(2) == b.unsqueeze(1)


def multiplied_out(inputs: Tensor, deltas: Tensor, shape: Sequence[int]) -> Tensor:
    """Δᵀ A of all groups, for a weight of a shape; or Δ added to the rows of a table.

    Example:
        >>> table = multiplied_out(torch.tensor([[2, 0, 2]]), torch.ones(1, 3, 4), (3, 4))
        >>> table[0, :, 0].tolist()
        [1.0, 0.0, 2.0]
    """
    if inputs.ndim == 3:
        return (deltas.mT @ inputs).view(len(inputs), *shape)
    tables = deltas.new_zeros(len(inputs), *shape)
    first = shape[0] * torch.arange(len(inputs), device=inputs.device).unsqueeze(1)
    # which torch's deterministic algorithms know on a GPU
    tables.flatten(0, 1).index_add_(0, (inputs + first).flatten(), deltas.flatten(0, 1))
    return tables


class Rows(NamedTuple):
    """What every example adds to the factors of a weight's gradient."""

    number: int
    looked_up: bool = False  # rows of a table, and not products with a matrix

    def nbytes(self, weight: Tensor, m: int = 1) -> int:
        """Of the factors for m examples, and of three products of rows in float64 for the norm."""
        rows, entries = m * self.number, weight[0].numel()
        beside = 8 if self.looked_up else len(weight) * weight.itemsize
        return rows * (entries * weight.itemsize + beside + 24 * rows)

    def pay(self, weight: Tensor, m: int = 1) -> bool:
        """Whether the gradient of m examples is better kept in factors than whole.

        With r rows, a matrix (out, in) takes 3 r · out · in multiplications, its factors r² (out +
        in) for each of two passes, and for a norm in float64, which counts as three. A table is
        whole where twice the derivatives of its rows and the norm's products take as much memory.
        """
        rows, features = m * self.number, weight[0].numel()
        if self.looked_up:
            return 2 * rows * (features + 3 * rows) <= weight.numel()
        return 5 * rows * (features + len(weight)) <= 3 * weight.numel()
