"""Layers whose second derivative does no needless work.

`fast_rules` puts leaner rules in place while a graph is recorded: those of `convolution_rules` and
`norm_rules`, and two of this module. For ReLU and max pooling PyTorch fills tensors with the zeros
that their second derivative is, and sends them back through the network. A max pooling of a ReLU is
the ReLU of the max pooling, which is smaller. Values and derivatives are the same.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from sharpkit.contract.normalisation import BatchNormCall
from sharpkit.curvature.convolution_rules import (
    Convolved,
    Statistics,
    convolve,
    has_channels_last,
    normalise,
    plain_call,
    spread,
    with_channels_last,
    worth_folding,
)
from sharpkit.curvature.norm_rules import batch_norm, stored_statistics

_RANKS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
# what images are given to with their channels first: the model's own code, which knows no other
# layout, and GroupNorm (see `channels_last`)
_CHANNELS_FIRST = frozenset({Tensor.view, F.group_norm, torch.group_norm})
_aten = torch.ops.aten


class fast_rules(TorchFunctionMode):
    """Record convolutions, ReLU and max pooling with the rules of this module.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 1, 3, requires_grad=True)
        >>> with fast_rules():
        ...     y = torch.conv1d(x, x)
        >>> (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # of x·x
        >>> torch.autograd.grad(g.sum(), x)[0]
        tensor([[[2., 2., 2.]]])
    """

    def __init__(self) -> None:
        super().__init__()
        # results with what they came from, and the versions of both
        self._before_relu: MutableMapping[Tensor, tuple[Tensor, tuple[int, int]]] = (
            WeakTensorKeyDictionary()
        )
        self._convolved: MutableMapping[Tensor, tuple[Convolved, tuple[int, ...]]] = (
            WeakTensorKeyDictionary()
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the functions that have a rule; everything else is called as it is."""
        kwargs = kwargs or {}
        if func in _RANKS:
            call = plain_call(_RANKS[func], *args, **kwargs)
            if call is not None:
                return self._convolution(call)
        elif func is F.batch_norm:
            given = BatchNormCall(*args, **kwargs)
            norm = stored_statistics(given)
            if norm is not None:
                return self._batch_norm(given.input, norm)
        elif func is torch.relu or (func is F.relu and not _in_place(*args, **kwargs)):
            return self._relu(args[0] if args else kwargs["input"])
        elif func is torch.max_pool2d or func is F.max_pool2d:
            pool = _plain_pool(*args, **kwargs)
            if pool is not None:
                return self._max_pool(*pool)
        elif func in _CHANNELS_FIRST and args and has_channels_last(args[0]):
            args = args[0].contiguous(), *args[1:]
        return func(*args, **kwargs)

    def _convolution(self, call: Convolved) -> Tensor:
        call = call._replace(x=with_channels_last(call.x))
        result = convolve(call)
        self._convolved[result] = call, _versions(result, call)
        return result

    def _batch_norm(self, x: Tensor, norm: Statistics) -> Tensor:
        call, versions = self._convolved.get(x, (None, ()))
        if call is not None and versions == _versions(x, call) and worth_folding(call, norm):
            return normalise(call, x, norm)
        return batch_norm(x, norm)

    def _relu(self, x: Tensor) -> Tensor:
        result: Tensor = _Relu.apply(x)  # type: ignore[no-untyped-call]
        self._before_relu[result] = x, (result._version, x._version)
        return result

    def _max_pool(self, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        before, versions = self._before_relu.get(x, (x, None))
        of_relu = versions == (x._version, before._version)  # neither changed in place since
        result: Tensor = _MaxPool.apply(before if of_relu else x, geometry)[0]  # type: ignore[no-untyped-call]
        return self._relu(result) if of_relu else result


def _versions(result: Tensor, call: Convolved) -> tuple[int, ...]:
    """Change with everything that is done in place to the tensors of a convolution."""
    tensors = (result, call.x, call.weight, call.bias)
    return tuple(-1 if t is None else t._version for t in tensors)


def _in_place(input: Tensor, inplace: bool = False) -> bool:
    return inplace


def _plain_pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Any, ...] | None:
    """The arguments of `_MaxPool`, or None where its indices are asked for."""
    if return_indices:
        return None
    size = spread(kernel_size, 2)
    stride = size if stride is None or stride == [] else spread(stride, 2)
    return input, (size, stride, spread(padding, 2), spread(dilation, 2), ceil_mode)


class _Relu(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp_min(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        # detached: the second derivative is 0 almost everywhere, and need not be written out
        result: Tensor = _aten.threshold_backward(grad, output.detach(), 0)
        return result


class _MaxPool(Function):
    @staticmethod
    def forward(x: Tensor, geometry: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _aten.max_pool2d_with_indices(x, *geometry)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.geometry = inputs
        ctx.layout = x.size(), x.stride()
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        (indices,) = ctx.saved_tensors
        args = grad, indices, ctx.layout, ctx.geometry
        if not torch.is_grad_enabled():
            return _MaxPoolGradient.forward(*args), None
        return _MaxPoolGradient.apply(*args), None  # type: ignore[no-untyped-call]


class _MaxPoolGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, indices: Tensor, layout: tuple[Any, ...], geometry: tuple[Any, ...]
    ) -> Tensor:
        like = grad.new_empty_strided(*layout)  # the kernel reads its sizes only
        result: Tensor = _aten.max_pool2d_with_indices_backward(grad, like, *geometry, indices)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
        (indices,) = ctx.saved_tensors
        return _picked(tangent, indices), None, None, None


def _picked(images: Tensor, indices: Tensor) -> Tensor:
    """The pixels with these numbers, of each channel: (..., h, w) at (..., i, j) -> (..., i, j)."""
    if not (has_channels_last(images) and has_channels_last(indices)):
        return images.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)
    n, channels, h, w = images.shape
    first = torch.arange(n, device=images.device).mul_(h * w * channels)
    offset = first.view(-1, 1, 1, 1) + torch.arange(channels, device=images.device)
    where = indices.movedim(1, -1) * channels + offset  # in memory, as both are laid out
    picked = images.movedim(1, -1).reshape(-1).index_select(0, where.view(-1))
    return picked.view(where.shape).movedim(-1, 1)
