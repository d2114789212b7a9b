"""The output layer of a language model and its cross-entropy as one, in slices of positions.

For hidden states h, an output layer z = h Wᵀ + b with many more outputs than inputs, and the mean
cross-entropy L of z, the slopes of L by h, W and b and their products with second derivatives are
computed a slice of positions at a time, from h and W. So the graph of a second derivative keeps
nothing of the size of the logits: they, and the probabilities, are computed again for each product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sharpkit.contract import surprise
from sharpkit.contract.losses import MeanLoss
from sharpkit.curvature.softmax import softmax_loss

_SLICES = 2  # of positions, in what is not cut
_WIDER = 4  # times as many outputs as inputs, from which on it pays


class OutputLayer(TorchFunctionMode):
    """Watches for the linear layer that gives the outputs of a model.

    Example:
        >>> h, w = torch.ones(2, 3), torch.ones(5, 3)
        >>> with OutputLayer() as layer:
        ...     z = F.linear(h, w)
        >>> [tuple(t.shape) for t in layer.of(z)]
        [(2, 3), (5, 3)]
        >>> layer.of(z.exp()) is None
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Tensor, int, tuple[Tensor, ...]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Remember the arguments of the last linear map; every function is called as it is."""
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight, *bias = _linear_arguments(*args, **(kwargs or {}))
            self._last = result, result._version, (x, weight, *bias)
        return result

    def of(self, outputs: Any) -> tuple[Tensor, ...] | None:
        """Input, weight and, if there is one, bias of the layer whose result these outputs are."""
        if self._last is None or self._last[0] is not outputs:
            return None
        result, version, arguments = self._last
        return arguments if result._version == version else None


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    return [input, weight, *([] if bias is None else [bias])]


def in_slices(loss: MeanLoss, outputs: Tensor, labels: Tensor, layer: tuple[Tensor, ...]) -> bool:
    """Whether the slopes of this loss are to be computed from the layer, and can be."""
    kind, weight = softmax_loss(loss), layer[1]
    return (
        kind is not None
        and kind.plain
        and not labels.is_floating_point()
        and labels.shape == outputs.shape[:-1]
        and outputs.dtype == weight.dtype
        and outputs.numel() * outputs.element_size() > surprise.large_bytes(outputs.device) // 4
        and weight.shape[0] >= _WIDER * weight.shape[1]
    )


def slopes(
    loss: MeanLoss, labels: Tensor, total: Tensor, layer: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The derivatives of the mean loss by input, weight and bias of the output layer.

    Args:
        loss: A cross-entropy for which `in_slices` holds.
        labels: Integers of the shape of the positions.
        total: How many labels count, a scalar.
        layer: Hidden states (..., d), weight (V, d) and perhaps bias (V,); derivatives of the
            result by these are those of the loss, of second order.
    """
    kind = softmax_loss(loss)
    assert kind is not None
    labels = labels.reshape(-1).long()
    counted = labels != kind.ignored
    share = counted.to(layer[0].dtype) / total.clamp(min=1.0).to(layer[0].dtype)
    bias = layer[2] if len(layer) > 2 else None
    hidden = layer[0].reshape(-1, layer[0].shape[-1])
    found = _Slopes.apply(hidden, layer[1], bias, labels.where(counted, 0), share)  # type: ignore[no-untyped-call]
    return (found[0].view_as(layer[0]), *found[1 : len(layer)])


def _cut(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Positions whose logits make up one slice: fewer would read the weight too often."""
    bytes_of_one = weight.shape[0] * weight.element_size()
    step = max(1, surprise.large_bytes(weight.device) // _SLICES // bytes_of_one)
    return (slice(i, i + step) for i in range(0, len(hidden), step))


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part


class _Slopes(Function):
    """(n, d), (V, d), (V,) or None, labels and their shares (n,) -> slopes of the first three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        for_hidden = []
        for_weight = for_bias = None
        for s in _cut(hidden, weight):
            g = surprise.slope(F.linear(hidden[s], weight, bias), labels[s], share[s])
            for_hidden.append(g @ weight)
            for_weight = _add(for_weight, g.mT @ hidden[s])
            for_bias = _add(for_bias, g.sum(0))
        assert for_weight is not None and for_bias is not None
        return torch.cat(for_hidden), for_weight, for_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The matrix of second derivatives, which is symmetric, times the vectors."""
        hidden, weight, bias, labels, share = ctx.saved_tensors
        u, v, w = vectors  # of hidden, weight and bias
        for_hidden = []
        for_weight = for_bias = None
        for s in _cut(hidden, weight):
            h, z = hidden[s], F.linear(hidden[s], weight, bias)
            moved = w
            if u is not None:
                moved = F.linear(u[s], weight, moved)
            if v is not None:
                moved = h @ v.mT if moved is None else moved + h @ v.mT
            if moved is None:
                continue
            moved = moved.expand_as(z)
            g, curved = surprise.slope_and_curved(z, labels[s], share[s], moved)
            found = curved @ weight
            part = curved.mT @ h
            if v is not None:
                found = found + g @ v
            if u is not None:
                part = part + g.mT @ u[s]
            for_hidden.append(found)
            for_weight = _add(for_weight, part)
            for_bias = _add(for_bias, curved.sum(0))
        if not for_hidden:
            return (None,) * 5
        return torch.cat(for_hidden), for_weight, None if bias is None else for_bias, None, None
