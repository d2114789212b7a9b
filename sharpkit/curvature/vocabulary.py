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


def _one_by_one(function: type[Function], size: int, axes: Any, arguments: Any) -> Any:
    """A function of several vectors: together they would need as many times the memory."""
    rows = [
        function.apply(  # type: ignore[no-untyped-call]
            *(
                a if axis is None else a.select(axis, i)
                for a, axis in zip(arguments, axes, strict=True)
            )
        )
        for i in range(size)
    ]
    return tuple(torch.stack(found) for found in zip(*rows, strict=True)), (0,) * len(rows[0])


class _Slopes(Function):
    """(n, d), (V, d), (V,) or None, labels and their shares (n,) -> slopes of the first three.

    And of every position what its probabilities are computed from again: the largest logit, which
    one it is, the share over the sum of e = exp(logit - largest), and that sum without the label.
    """

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, share: Tensor
    ) -> tuple[Tensor, ...]:
        for_hidden = torch.empty_like(hidden)
        for_weight, for_bias = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
        most, rate, others = (torch.empty_like(share) for _ in range(3))
        which = torch.empty_like(labels)
        for s in _cut(hidden, weight):
            z, label = F.linear(hidden[s], weight, bias), labels[s].unsqueeze(-1)
            most[s], which[s] = z.max(-1)
            e = z.sub_(most[s].unsqueeze(-1)).exp_()
            own = e.gather(-1, label).squeeze(-1)
            # a sum without the label, for 1 - p of it rounds where p is nearly 1
            others[s] = e.scatter_(-1, label, 0.0).sum(-1)
            rate[s] = share[s] / (others[s] + own)
            g, scale = e.scatter_(-1, label, -others[s].unsqueeze(-1)), rate[s].unsqueeze(-1)
            for_hidden[s] = (g @ weight).mul_(scale)
            for_weight.addmm_(g.mT, hidden[s] * scale)
            for_bias.addmv_(g.mT, rate[s])
        return for_hidden, for_weight, for_bias, most, which, rate, others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*inputs[:4], *output[3:])

    @staticmethod
    def vmap(info: Any, axes: Any, *arguments: Any) -> Any:
        return _one_by_one(_Slopes, info.batch_size, axes, arguments)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
        u, v, w = vectors[:3]
        if u is None and v is None and w is None:
            return (None,) * 5
        found = _Products.apply(u, v, w, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return (*found[:2], found[2] if ctx.needs_input_grad[2] else None, None, None)


class _Products(Function):
    """The matrix of second derivatives, which is symmetric, times vectors of the same shapes.

    With p = e / Σe and a change u of the logits, that of the slope is p ∘ u − p (p·u). The entry of
    u at the most probable class is subtracted first, as in `surprise.curved`.
    """

    @staticmethod
    def forward(
        u: Tensor | None, v: Tensor | None, w: Tensor | None,
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        most: Tensor, which: Tensor, rate: Tensor, others: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        for_hidden = torch.empty_like(hidden)
        for_weight, for_bias = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
        for s in _cut(hidden, weight):
            h, label, scale = hidden[s], labels[s].unsqueeze(-1), rate[s].unsqueeze(-1)
            e = F.linear(h, weight, bias).sub_(most[s].unsqueeze(-1)).exp_()
            change = torch.zeros_like(e) if w is None else w.expand_as(e).clone()
            if u is not None:
                change.addmm_(u[s], weight.mT)
            if v is not None:
                change.addmm_(h, v.mT)
            change.sub_(change.gather(-1, which[s].unsqueeze(-1)))
            mean = torch.linalg.vecdot(e, change).unsqueeze(-1).div_(e.sum(-1, keepdim=True))
            curved = change.sub_(mean).mul_(e)
            found = curved @ weight
            for_weight.addmm_(curved.mT, h * scale)
            for_bias.addmv_(curved.mT, rate[s])
            g = e.scatter_(-1, label, -others[s].unsqueeze(-1))
            if v is not None:
                found.addmm_(g, v)
            if u is not None:
                for_weight.addmm_(g.mT, u[s] * scale)
            for_hidden[s] = found.mul_(scale)
        return for_hidden, for_weight, for_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: a third derivative is refused by autograd."""

    @staticmethod
    def vmap(info: Any, axes: Any, *arguments: Any) -> Any:
        return _one_by_one(_Products, info.batch_size, axes, arguments)
