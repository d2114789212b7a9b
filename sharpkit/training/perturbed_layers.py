"""Layers evaluated at weights of their own per group, differentiated by the shared weights.

In the second pass of m-SAM group i sees W + ε_i with ε_i held constant, so the gradient wanted is
that of the *shared* W. Left to autograd, every W + ε_i would get a gradient of its own, to be
summed afterwards. Linear and convolution layers avoid that: their outputs and the gradients of
their inputs come from the weights of the group, while the gradient of W is that of one ordinary
layer over the examples of all groups together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sharpkit.groupwise.layer_calls import Geometry, LayerCall, recognise
from sharpkit.groupwise.low_rank import stand_ins


class PerturbedLayers(TorchFunctionMode):
    """Inside a vmap over groups: layers run at their group's weights, as described above.

    Only calls of linear and convolution layers are replaced. Any other use of a moved weight is
    differentiated as it stands, and one of a stand-in gives NaN: neither is wrong in silence.

    Args:
        shared: Name to shared parameter, a leaf without a group axis.
        moved: Name to the same parameter at the group's own point, shared + ε.
        factors: Linear weights whose perturbation is DᵀA instead: name to (A, D) of the group.

    Attributes:
        stand_ins: What the model holds in place of those linear weights.
    """

    def __init__(
        self,
        shared: Mapping[str, Tensor],
        moved: Mapping[str, Tensor],
        factors: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self._moved = {id(t): (shared[name], t) for name, t in moved.items()}
        self.stand_ins = stand_ins({name: shared[name] for name in factors})
        self._factors = {
            id(t): (shared[name], *factors[name]) for name, t in self.stand_ins.items()
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function; replace the layers that are known."""
        kwargs = kwargs or {}
        call = recognise(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        if id(call.weight) in self._factors:
            weight, a, d = self._factors[id(call.weight)]
            return func(call.inputs, weight, call.bias) + (call.inputs @ a.mT) @ d
        if id(call.weight) not in self._moved:
            return func(*args, **kwargs)
        weight, own_weight = self._moved[id(call.weight)]
        bias, own_bias = self._moved.get(id(call.bias), (None, None))
        operands = (call.inputs, weight, own_weight.detach(), bias)
        own = None if own_bias is None else own_bias.detach()
        out = _call(_Layer, *_autocast((*operands, own)), call.geometry)
        if call.bias is None or own is not None:
            return out
        return out + _along(call.bias, out, call)


def _call(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _along(bias: Tensor, out: Tensor, call: LayerCall) -> Tensor:
    """A bias of shape (channels,) shaped to be added to the output of the layer."""
    return bias if call.geometry is None else bias.view(-1, *[1] * (out.ndim - 2))


def _autocast(operands: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """In autocast's dtype where it is on: autograd functions are not cast by themselves."""
    kind = next(t for t in operands if t is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in operands)


class _Layer(torch.autograd.Function):
    """What vmap sees: it strips the group axes and calls the function of all groups."""

    @staticmethod
    def forward(
        inputs: Tensor,
        weight: Tensor,
        own_weight: Tensor,
        bias: Tensor | None,
        own_bias: Tensor | None,
        geometry: Geometry | None,
    ) -> Tensor:
        raise AssertionError("only used under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise AssertionError("only used under vmap")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Group axes to the front; the shared weight and bias have none."""
        inputs, weight, own_weight, bias, own_bias, geometry = args
        inputs, own_weight, own_bias = (
            _front(t, dim, info.batch_size)
            for t, dim in ((inputs, in_dims[0]), (own_weight, in_dims[2]), (own_bias, in_dims[4]))
        )
        assert inputs is not None
        # the functions return no views: in-place operations may follow a layer
        if geometry is None:
            out = _call(_GroupLinear, inputs, weight, own_weight, bias, own_bias)
            return out.view(*inputs.shape[:-1], -1), 0
        operands = (inputs, weight, own_weight, bias, own_bias, geometry)
        return _groups(_call(_GroupConvolution, *operands), len(inputs)), 0


def _front(tensor: Tensor | None, dim: int | None, groups: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.expand(groups, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _GroupLinear(torch.autograd.Function):
    """Inputs (groups, ..., in), weights of the groups (groups, out, in), shared (out, in)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        own_weight: Tensor,
        bias: Tensor | None,
        own_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, own_weight)
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        if own_bias is None:  # (groups, rows, out)
            out = rows @ own_weight.mT
        else:
            out = torch.baddbmm(own_bias.unsqueeze(1), rows, own_weight.mT)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, own_weight = ctx.saved_tensors
        need_inputs, need_weight, _, need_bias, _ = ctx.needs_input_grad
        rows = grads[0]
        flat = rows.flatten(0, 1)
        grad_inputs = (rows @ own_weight).view(inputs.shape) if need_inputs else None
        grad_weight = flat.mT @ inputs.reshape(-1, inputs.shape[-1]) if need_weight else None
        return grad_inputs, grad_weight, None, flat.sum(0) if need_bias else None, None


class _GroupConvolution(torch.autograd.Function):
    """Inputs (groups, n, channels, ...), weights of the groups (groups, out, in, ...)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        own_weight: Tensor,
        bias: Tensor | None,
        own_bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, own_weight)
        ctx.geometry = geometry
        merged_bias = None if own_bias is None else own_bias.flatten()
        out: Tensor = torch.convolution(
            _channels(inputs),
            own_weight.flatten(0, 1),
            merged_bias,
            *geometry[:3],
            False,
            [0] * len(geometry.stride),
            geometry.groups * len(inputs),
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, own_weight = ctx.saved_tensors
        need_inputs, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        grad, count = grads[0], len(inputs)

        def backward(
            grad: Tensor, x: Tensor, w: Tensor, groups: int, mask: list[bool]
        ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            result: tuple[Tensor | None, Tensor | None, Tensor | None] = (
                torch.ops.aten.convolution_backward(
                    grad, x, w, [weight.shape[0]], *ctx.geometry[:3], False,
                    [0] * len(ctx.geometry.stride), groups, mask,
                )
            )  # fmt: skip
            return result

        grad_inputs = grad_weight = grad_bias = None
        if need_inputs:
            merged, _, _ = backward(
                grad,
                _channels(inputs),
                own_weight.flatten(0, 1),
                ctx.geometry.groups * count,
                [True, False, False],
            )
            assert merged is not None
            grad_inputs = _groups(merged, count)
        if need_weight or need_bias:
            _, grad_weight, grad_bias = backward(
                _groups(grad, count).flatten(0, 1),
                inputs.flatten(0, 1),
                weight,
                ctx.geometry.groups,
                [False, need_weight, need_bias],
            )
        return grad_inputs, grad_weight, None, grad_bias, None, None


def _channels(tensor: Tensor) -> Tensor:
    """(groups, n, channels, ...) -> (n, groups * channels, ...)."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _groups(tensor: Tensor, groups: int) -> Tensor:
    """(n, groups * channels, ...) -> (groups, n, channels, ...)."""
    return tensor.view(len(tensor), groups, -1, *tensor.shape[2:]).transpose(0, 1)
