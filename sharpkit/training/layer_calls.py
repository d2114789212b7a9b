"""Recognising the calls of linear and convolution layers, and the parameters only they use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

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
    padding = found.get("padding", 0)
    if isinstance(padding, str):
        if padding != "valid":
            return None
        padding = 0
    inputs, weight = found["input"], found["weight"]
    if inputs.ndim != weight.ndim:  # a single image without a batch axis
        return None
    stride, padding, dilation = (
        _per_axis(value, spatial)
        for value in (found.get("stride", 1), padding, found.get("dilation", 1))
    )
    geometry = Geometry(stride, padding, dilation, found.get("groups", 1))
    return LayerCall(inputs, weight, found.get("bias"), geometry)


def _per_axis(value: Any, spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


class CallsDiffer(RuntimeError):
    """A layer was called otherwise than when the step was planned; the text mentions vmap."""

    def __init__(self) -> None:
        super().__init__("vmap over groups needs a model that makes the same calls every time")


class LayerUses(TorchFunctionMode):
    """Finds the parameters that only layers use: a weight as weight, a bias as bias.

    Args:
        parameters: Name to tensor, recognised by identity.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in parameters.items()}
        self._weights: set[str] = set()
        self._biases: dict[str, set[str | None]] = {}  # the weights that each goes with
        self._elsewhere: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function and note what it uses."""
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        used = [self._names[id(a)] for a in leaves if id(a) in self._names]
        call = recognise(func, args, kwargs) if used else None
        if call is not None:
            weight, bias = self._names.get(id(call.weight)), self._names.get(id(call.bias))
            if weight is not None:
                self._weights.add(weight)
                used.remove(weight)
            if bias is not None:
                self._biases.setdefault(bias, set()).add(weight)
                used.remove(bias)
        self._elsewhere.update(used)
        return func(*args, **kwargs)

    def names(self, factored: Collection[str]) -> frozenset[str]:
        """Weights that nothing but layers used, and the biases of only those layers.

        Args:
            factored: Weights to be left out, and their biases with them.
        """
        weights = self._weights - self._elsewhere - self._biases.keys() - set(factored)
        biases = {
            name
            for name, partners in self._biases.items()
            if partners <= weights and name not in self._elsewhere | self._weights
        }
        return frozenset(weights | biases)
