"""What the weights of one output unit are - a filter, a row - and how long each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from sharpkit.contract.modules import full_name, unwrapped
from sharpkit.contract.normalisation import is_norm_parameter


@dataclass(frozen=True)
class Role:
    """What a parameter is to its layer.

    Attributes:
        kind: "filters", with the weights of each output unit along the first axis; "bias", any
            other parameter of at most one axis; or "norm", of a normalisation layer.
        groups: Of a transposed convolution, whose output units lie on the second axis of each of
            its groups; 0 for all else.
    """

    kind: Literal["filters", "bias", "norm"]
    groups: int = 0


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by each of its names.

    Rows of linear layers, kernels of convolutions, vectors of embeddings are filters.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> [role.kind for role in roles(model).values()]
        ['filters', 'bias', 'norm', 'norm']
    """
    return {
        full_name(prefix, key): _role(module, parameter)
        for prefix, module in unwrapped(model).named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def _role(module: nn.Module, parameter: Tensor) -> Role:
    if is_norm_parameter(module, parameter):
        return Role("norm")
    if parameter.ndim <= 1:
        return Role("bias")
    return Role("filters", module.groups if isinstance(module, _ConvTransposeNd) else 0)


def unit_norms(tensor: Tensor, role: Role) -> Tensor:
    """The 2-norm of the weights of each output unit, float64, in a shape that broadcasts.

    A bias, and a vector of a normalisation layer, is one unit.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), Role("filters")).flatten()
        tensor([5., 2.], dtype=torch.float64)
        >>> kernel = torch.ones(4, 3, 5)  # of nn.ConvTranspose1d(4, 6, 5, groups=2)
        >>> unit_norms(kernel, Role("filters", groups=2)).shape
        torch.Size([4, 3, 1])
    """
    t = tensor.double()
    if role.kind != "filters":
        return _norms(t.reshape(-1), (0,)).view(())
    if not role.groups:
        return _norms(t, tuple(range(1, t.ndim)))
    t = t.reshape(role.groups, -1, *t.shape[1:])  # (groups, in / groups, out / groups, ...)
    norms = _norms(t, (1, *range(3, t.ndim)))
    return norms.expand(-1, t.shape[1], *norms.shape[2:]).flatten(0, 1)


def _norms(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
    return norms
