"""Normalisation layers: how `F.batch_norm` was called, and their gradient for one example.

On a CPU the backward pass of BatchNorm and InstanceNorm reads a gradient of other strides than the
input's (as after `flatten(2).transpose(1, 2)`) in the wrong order if the batch has one example.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sharpkit.contract.modules import hooked


def norms(model: nn.Module) -> list[nn.Module]:
    """The layers that this is about."""
    return [module for module in model.modules() if isinstance(module, _NormBase)]


def is_norm_parameter(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter that a module has itself is one of a normalisation layer.

    Those are torch's layers, and modules of others that are named so, with vectors alone.

    Example:
        >>> layer, linear = nn.LayerNorm((2, 3)), nn.Linear(2, 3)
        >>> is_norm_parameter(layer, layer.weight), is_norm_parameter(linear, linear.bias)
        (True, False)
    """
    known = isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
    return known or (parameter.ndim <= 1 and "Norm" in type(module).__name__)


def norm_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of all normalisation layers of a model."""
    return [
        parameter
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None and is_norm_parameter(module, parameter)
    ]


@contextmanager
def contiguous_gradients(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, the outputs of these layers get their gradients in the order of their entries.

    Example:
        >>> layer = nn.BatchNorm2d(2).eval()
        >>> with contiguous_gradients([layer]):
        ...     layer(torch.ones(1, 2, 1, 1)).flatten().tolist()
        [0.99999..., 0.99999...]
    """
    with hooked(layer.register_forward_hook(_reorder) for layer in layers):
        yield


def _reorder(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    result: Tensor = _Contiguous.apply(output)  # type: ignore[no-untyped-call]
    return result


class _Contiguous(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()  # not a view: in-place operations may follow

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class BatchNormCall(NamedTuple):
    """One call of `F.batch_norm`, made as that is: `BatchNormCall(*args, **kwargs)`.

    Example:
        >>> import torch
        >>> BatchNormCall(torch.ones(1, 2), None, None, training=True).eps
        1e-05
    """

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
