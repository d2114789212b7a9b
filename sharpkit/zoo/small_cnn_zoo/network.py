"""The network of the Small CNN Zoo, with the weights of a row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sharpkit.doors import shown
from sharpkit.errors import ZooFormatError
from sharpkit.zoo.small_cnn_zoo.files import Layer, Variable

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "selu": nn.SELU}


def build_network(
    where: str, layers: Sequence[Layer], row: NDArray[Any], activation: str, stride: int
) -> nn.Sequential:
    """Convolutions without padding, each with the activation, the mean over pixels, a dense layer.

    Keras has kernels as (height, width, in, out) and (in, out), torch as (out, in, height, width)
    and (out, in).

    Args:
        where: For errors.
        layers: Of layout.csv, the last one dense.
        row: The weights (columns,), float.
        activation: One of `ACTIVATIONS`.
        stride: Of the convolutions.

    Returns:
        nn.Sequential: In eval mode; takes (n, 1, height, width), returns logits (n, classes).

    Raises:
        ZooFormatError: Another activation; NaN or infinite weights.
    """
    if activation not in ACTIVATIONS:
        raise ZooFormatError(
            f"{where}: config.activation is {shown(activation)}; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    with np.errstate(over="ignore"):
        row = np.asarray(row, np.float32)
    if not np.isfinite(row).all():
        raise ZooFormatError(f"{where}: has NaN or infinite weights")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for k, layer in enumerate(layers[:-1], 1):
        height, width, inside, out = layer.kernel.shape
        convolution = nn.Conv2d(inside, out, (height, width), stride, device="meta")
        parts[f"conv{k}"] = _filled(convolution, layer, row, (3, 2, 0, 1))
        parts[f"activation{k}"] = ACTIVATIONS[activation]()
    parts["mean"], parts["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    inside, out = layers[-1].kernel.shape
    dense = nn.Linear(inside, out, device="meta")
    parts["dense"] = _filled(dense, layers[-1], row, (1, 0))
    return nn.Sequential(parts).eval()


def _filled(module: nn.Module, layer: Layer, row: NDArray[Any], axes: tuple[int, ...]) -> nn.Module:
    """The module with the layer's weights, the axes of the kernel in torch's order."""
    weights = {"weight": _of(layer.kernel, row).permute(axes), "bias": _of(layer.bias, row)}
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    module.load_state_dict(state, assign=True)
    return module


def _of(variable: Variable, row: NDArray[Any]) -> Tensor:
    return torch.from_numpy(row[variable.start : variable.end].reshape(variable.shape).copy())
