"""The weight matrices of a network as linear maps: what norms, distances and spectra are of.

One example is sent through the network to learn what each layer's input looks like. A BatchNorm
that directly follows a layer is, in eval mode, an affine map of its channels: it is folded into
the layer's weight, so that two networks that compute the same function by a different split
between weight and BatchNorm have the same norms. A zero padding that directly precedes a layer
belongs to its linear map.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.modules import hooked
from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import ModelError

Convolution = nn.modules.conv._ConvNd
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True)
class WeightLayer:
    """A weight of a network, in float64, with what is needed to apply it as a linear map."""

    name: str  # dotted name of the parameter
    weight: Tensor  # the weight with a following BatchNorm folded in; (out, in) or a kernel's shape
    module: Convolution | None = None  # the convolution, or None for a plain matrix
    pad: nn.Module | None = None  # the zero padding applied just before, None if there is none
    # shape of one input of the convolution, before `pad`; None for a matrix
    input_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Wiring:
    """What one forward pass tells: per module its first input's shape, and direct neighbours."""

    input_shapes: dict[nn.Module, tuple[int, ...]]
    pads: dict[nn.Module, nn.Module]  # layer -> padding whose output is the layer's input
    norms: dict[nn.Module, BatchNorm]  # layer -> BatchNorm whose input is the layer's output
    activations: dict[nn.Module, nn.Module]  # layer -> activation whose input is its output


def wiring(model: nn.Module, data: Data) -> Wiring:
    """Run the first example through a model in eval mode and note who follows whom."""
    found = Wiring({}, {}, {}, {})
    # tensor id -> producer, the tensor (kept, so that ids stay unique) and its version, which
    # an operation in place changes
    producers: dict[int, tuple[nn.Module, Tensor, int]] = {}
    calls: dict[nn.Module, int] = {}

    versions: dict[nn.Module, int] = {}  # of a module's input, before the module runs

    def before_call(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            versions[module] = inputs[0]._version

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if inputs and isinstance(inputs[0], Tensor):
            found.input_shapes.setdefault(module, tuple(inputs[0].shape[1:]))
            before, tensor, version = producers.get(id(inputs[0]), (module, None, -1))
            if tensor is inputs[0] and version == versions.get(module):
                if isinstance(before, nn.ZeroPad2d):
                    found.pads[module] = before
                if isinstance(module, BatchNorm) and module.running_mean is not None:
                    found.norms[before] = module
                if type(module).__module__ == nn.ReLU.__module__:
                    found.activations[before] = module
        if isinstance(output, Tensor):
            producers[id(output)] = (module, output, output._version)

    leaves = [module for module in model.modules() if not list(module.children())]
    with frozen(model), torch.no_grad():
        handles = [leaf.register_forward_pre_hook(before_call) for leaf in leaves]
        handles += [leaf.register_forward_hook(watch) for leaf in leaves]
        with hooked(handles):
            function = FunctionalModel(model)
            one = load_in_order(data, n=1).to(function.device, function.dtype)
            function({}, one.inputs)
    # a layer or BatchNorm that is called twice has two roles, and cannot take part in a fold
    for layer, norm in list(found.norms.items()):
        is_layer = isinstance(layer, nn.Linear | Convolution)
        if not is_layer or calls[layer] > 1 or calls[norm] > 1 or _out_axis(layer) is None:
            del found.norms[layer]
    return found


def weight_layers(model: nn.Module, data: Data) -> list[WeightLayer]:
    """The weights of a model that act as linear maps, in the model's order; shared ones once.

    These are the matrices (of linear, recurrent, attention and embedding modules) and the kernels
    of convolutions; biases and the scales of normalisation are none. BatchNorm is folded in.

    Raises:
        ModelError: If there is no such weight, or a weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> data = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 0, 1, 0])
        >>> [(layer.name, tuple(layer.weight.shape)) for layer in weight_layers(model, data)]
        [('0.weight', (4, 1, 3, 3)), ('2.weight', (2, 16))]
    """
    select_parameters(model)  # refuses NaN
    found = wiring(model, data)
    layers = []
    for name, module, parameter in linear_maps(model):
        weight = parameter.double()
        if module in found.norms:
            weight = weight * fold(module, found.norms[module])[0]
        if isinstance(module, Convolution):
            pad, shape = found.pads.get(module), found.input_shapes.get(module)
            if pad is not None:
                shape = found.input_shapes[pad]
            layers.append(WeightLayer(name, weight, module, pad, shape))
        else:
            layers.append(WeightLayer(name, weight))
    if not layers:
        raise ModelError(f"{type(model).__name__} has no weight matrix or convolution kernel")
    return layers


def called_layers(model: nn.Module, data: Data) -> tuple[list[nn.Module], Wiring]:
    """The linear and convolutional layers in the order of their first call, and the wiring.

    Raises:
        ModelError: If none is called.
    """
    found = wiring(model, data)
    layers: list[nn.Module] = [
        m for m in found.input_shapes if isinstance(m, nn.Linear | Convolution)
    ]
    if not layers:
        raise ModelError("no linear or convolutional layer is called in the forward pass")
    return layers, found


def first_layer(model: nn.Module, data: Data) -> nn.Module:
    """The module whose output is the first convolution's, with the activation directly behind it.

    The first linear layer's in a network without convolutions.
    """
    layers, found = called_layers(model, data)
    convolutions = [layer for layer in layers if isinstance(layer, Convolution)]
    first = (convolutions or layers)[0]
    return found.activations.get(first, first)


def linear_maps(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and value, as it is, of every weight that `weight_layers` lists."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and _is_linear_map(module, parameter):
                seen.add(id(parameter))
                yield f"{module_name}.{name}".lstrip("."), module, parameter.detach()


def initial_layers(
    layers: list[WeightLayer], initial: nn.Module, data: Data
) -> Iterator[tuple[WeightLayer, WeightLayer]]:
    """Pairs of trained and initial weights.

    Raises:
        ModelError: If the two networks differ in layers or shapes.
    """
    others = {layer.name: layer for layer in weight_layers(initial, data)}
    for layer in layers:
        other = others.get(layer.name)
        if other is None or other.weight.shape != layer.weight.shape:
            got = "no such weight" if other is None else f"shape {tuple(other.weight.shape)}"
            raise ModelError(
                f"initial model: {got} for {layer.name!r}, "
                f"expected shape {tuple(layer.weight.shape)}"
            )
        yield layer, other
    if len(others) != len(layers):
        extra = sorted(set(others) - {layer.name for layer in layers})
        raise ModelError(f"initial model: has weights that the model lacks: {', '.join(extra)}")


def fold(layer: nn.Module, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The scale and shift of a BatchNorm in eval mode, float64.

    Returns the scale shaped to multiply the layer's weight; scale and shift per channel.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape = [1] * weight.ndim
    shape[_out_axis(layer) or 0] = -1
    return scale.view(shape), scale, shift


def _out_axis(layer: nn.Module) -> int | None:
    """The axis of a weight that counts output channels; None where groups mix it up."""
    if not isinstance(layer, Convolution) or not layer.transposed:
        return 0
    return 1 if layer.groups == 1 else None


def _is_linear_map(module: nn.Module, parameter: Tensor) -> bool:
    if isinstance(module, Convolution):
        return parameter.ndim > 2
    return parameter.ndim == 2 and not isinstance(module, nn.LayerNorm)


def product_layers(model: nn.Module) -> list[nn.Module]:
    """The linear and convolutional layers, in the order of the model."""
    return [m for m in model.modules() if isinstance(m, nn.Linear | Convolution)]


@contextmanager
def calls_of(
    modules: Iterable[nn.Module], *, output: bool = False, last: bool = False
) -> Iterator[Callable[[], list[Any]]]:
    """Inside, a call gives what modules have received, or given as output, since the last one.

    In the order of their calls, one that is called twice counting twice; or the last one alone.
    """
    kept: deque[Any] = deque(maxlen=1 if last else None)

    def keep(_: nn.Module, inputs: tuple[Any, ...], *result: Any) -> None:
        kept.append(result[0] if output else next(iter(inputs), None))

    def take() -> list[Any]:
        found = list(kept)
        kept.clear()
        return found

    with hooked(
        m.register_forward_hook(keep) if output else m.register_forward_pre_hook(keep)
        for m in modules
    ):
        yield take
