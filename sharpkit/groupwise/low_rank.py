"""Perturbing large linear layers without forming a weight matrix per group.

The gradient of a layer y = W x + b for a group of few rows is Δᵀ A / m: A are the layer's inputs,
Δ the loss gradients at its outputs. Its norm is that of (ΔΔᵀ ∘ AAᵀ), and perturbing W by c Δᵀ A
adds c (x Aᵀ) Δ to the output. A dense layer of 16 M parameters then costs its two thin factors a
group instead of 67 MB (Goodfellow 2015, arXiv:1510.01799, for the norm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


def squared_norm(inputs: Tensor, deltas: Tensor) -> Tensor:
    """Squared norms of the gradients Δᵀ A of all groups, in float64.

    A is (groups, rows, in), Δ is (groups, rows, out).

    Example:
        >>> import torch
        >>> a, d = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
        >>> dense = (d.mT @ a).flatten(1).square().sum(1)
        >>> torch.allclose(squared_norm(a, d).float(), dense, rtol=1e-4)
        True
    """
    if inputs.shape[1] == 1:
        a = torch.linalg.vector_norm(inputs, dim=(1, 2), dtype=torch.float64)
        d = torch.linalg.vector_norm(deltas, dim=(1, 2), dtype=torch.float64)
        squares: Tensor = (a * d).square()
        return squares
    a, d = inputs.double(), deltas.double()
    return ((a @ a.mT) * (d @ d.mT)).sum((1, 2)).clamp(min=0)


def pays(weight: Tensor, rows: int) -> bool:
    """Whether the factors of a group's gradient are at most half as large as the weight."""
    out, features = len(weight), weight[0].numel()
    return 2 * rows * (out + features) <= out * features
