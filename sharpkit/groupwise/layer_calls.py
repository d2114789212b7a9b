"""Recognising the calls of linear and convolution layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS: dict[Callable[..., Any], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class Geometry(NamedTuple):
    """How a convolution slides; `groups` are the channel groups of the layer itself."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class LayerCall:
    """One call of a linear or convolution layer; `geometry` is None for a linear one."""

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry | None


def recognise(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LayerCall | None:
    """The layer that a function call stands for, or None for any other call."""
    if func is F.linear:
        found = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        return LayerCall(found["input"], found["weight"], found.get("bias"), None)
    spatial = _CONVOLUTIONS.get(func)
    if spatial is None:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    found = dict(zip(names, args, strict=False)) | kwargs
    inputs, weight = found["input"], found["weight"]
    if inputs.ndim != weight.ndim:  # a single image without a batch axis
        return None
    stride, dilation = (_per_axis(found.get(name, 1), spatial) for name in ("stride", "dilation"))
    padding = found.get("padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        both = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(p % 2 for p in both):  # more on one side than on the other
            return None
        padding = [p // 2 for p in both]
    padding = _per_axis(padding, spatial)
    geometry = Geometry(stride, padding, dilation, found.get("groups", 1))
    return LayerCall(inputs, weight, found.get("bias"), geometry)


def _per_axis(value: Any, spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values
