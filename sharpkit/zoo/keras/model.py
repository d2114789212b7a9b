"""Keras layer lists as torch modules.

`build_model` turns the content of a zoo's config.json into an `nn.Sequential` of ordinary torch
modules.
"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from typing import Any

import torch
from torch import nn

from sharpkit.doors import MAX_LAYERS, reading, shown
from sharpkit.errors import ZooFormatError
from sharpkit.zoo.keras.keywords import Keywords
from sharpkit.zoo.keras.layer import Layer, Shape, Slot
from sharpkit.zoo.keras.layers import build_layer

_MAX_PARAMETERS = 2**32  # 16 GiB in float32; hundreds of times the largest public model
_MAX_AXES = 8


class KerasModel(nn.Sequential):
    """A Keras `Sequential` as torch modules; takes (n, c, h, w), or (n, d), float32.

    Modules are named after their Keras layers (`conv2d_1`, `dense`), helpers with a suffix
    (`conv2d_1_pad`, `conv2d_1_activation`), so `"conv2d*.weight"` selects kernels. Built by
    `build_model`, not by hand.

    Args:
        config: The parsed config.json.
        input_shape: Shape of one input in torch order.
        layers: The built layers in order.

    Attributes:
        largest: Numbers in the largest input or output of a layer, for one example.
        work: About how many multiplications one example takes.
    """

    def __init__(self, config: dict[str, Any], input_shape: Shape, layers: list[Layer]) -> None:
        super().__init__()
        for layer in layers:
            for name, module in layer.modules:
                self.add_module(name, module)
        self.config = config
        self.input_shape = input_shape
        self.output_shape = _torch_order(layers[-1].shape)
        self.largest = max(prod(shape) for shape in (input_shape, *(la.shape for la in layers)))
        self.work = sum(layer.work for layer in layers)
        self.slots: list[tuple[str, tuple[Slot, ...]]] = [
            (layer.name, tuple(layer.slots)) for layer in layers
        ]

    @property
    def eval_settings(self) -> str:
        """What it computes in eval mode beside its tensors (see `network_shape`)."""
        return layers_text(self.config)

    @property
    def parameter_count(self) -> int:
        """The number of trainable numbers."""
        return sum(p.numel() for p in self.parameters())


def build_model(
    config: dict[str, Any], *, model_name: str = "model", device: torch.device | str = "cpu"
) -> KerasModel:
    """A torch module with the architecture of a zoo's config.json, freshly initialised.

    Every layer and keyword must be known; one that is not is an error, never ignored. Weights get
    torch's default initialisation. `device="meta"` allocates nothing, for weights to be loaded.

    Args:
        config: `{"model_config": [layer, ...], "input_shape": [h, w, c] or [d]}`; a layer is a
            flat dict of `layer_name` (Keras class) and constructor keywords. Whole floats are ints.
        model_name: What errors call the model.
        device: Where the parameters are created.

    Returns:
        KerasModel: Takes float32 inputs (n, c, h, w), or (n, d) for `input_shape` [d].

    Raises:
        ZooFormatError: An unknown layer, keyword or value, or shapes that do not fit; names the
            model, the layer's index and the keyword.

    Source:
        Layer semantics and defaults of Keras 2.15.

    Example:
        >>> model = build_model({
        ...     "input_shape": [8, 8, 3],
        ...     "model_config": [
        ...         {"layer_name": "Conv2D", "filters": 4.0, "kernel_size": 3, "padding": "same",
        ...          "activation": "relu"},
        ...         {"layer_name": "Flatten"},
        ...         {"layer_name": "Dense", "units": 10},
        ...     ],
        ... })
        >>> model(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
        >>> list(model.state_dict())
        ['conv2d.weight', 'conv2d.bias', 'dense.weight', 'dense.bias']
    """
    layers, shape = _layer_list(config, model_name)
    model = _assemble(config, layers, shape, model_name, "meta")
    if model.parameter_count > _MAX_PARAMETERS:
        raise ZooFormatError(
            f"{model_name}: declares {model.parameter_count:,} parameters; "
            f"at most {_MAX_PARAMETERS:,} are accepted"
        )
    if torch.device(device).type == "meta":
        return model
    return _assemble(config, layers, shape, model_name, device)


def layers_text(config: dict[str, Any]) -> str:
    """The layers of a config.json as text, the same for networks that differ in dropout alone.

    Example:
        >>> layers = [{"layer_name": "Dropout", "rate": 0.5}, {"layer_name": "Dense", "units": 2}]
        >>> layers_text({"input_shape": [3], "model_config": layers})
        '[[3], ["Dropout", {"layer_name": "Dense", "units": 2}]]'
    """
    layers = [
        layer["layer_name"] if "Dropout" in layer["layer_name"] else layer
        for layer in config["model_config"]
    ]
    return json.dumps([config["input_shape"], layers])


def _layer_list(config: Any, model_name: str) -> tuple[list[Any], Shape]:
    """The layers and the input shape (Keras order) that a config declares."""
    if not isinstance(config, dict):
        raise ZooFormatError(f"{model_name}: expected a dict, got {type(config).__name__}")
    layers, shape = config.get("model_config"), config.get("input_shape")
    if not isinstance(layers, list) or not layers:
        raise ZooFormatError(f"{model_name}: 'model_config' must be a list of at least one layer")
    if len(layers) > MAX_LAYERS:
        raise ZooFormatError(
            f"{model_name}: has {len(layers):,} layers; at most {MAX_LAYERS:,} are accepted"
        )
    sizes = shape if isinstance(shape, list | tuple) and len(shape) <= _MAX_AXES else []
    if not sizes or not all(map(_is_size, sizes)):
        raise ZooFormatError(
            f"{model_name}: 'input_shape' is {shown(shape)}; expected [height, width, channels] "
            f"or [d], each from 1 to {_MAX_PARAMETERS:,}"
        )
    return layers, tuple(map(int, sizes))


def _is_size(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 1 <= value <= _MAX_PARAMETERS and float(value).is_integer()


def _assemble(
    config: dict[str, Any],
    layer_configs: list[Any],
    input_shape: Shape,
    model_name: str,
    device: torch.device | str,
) -> KerasModel:
    """Build every layer on a device."""
    counts: Counter[str] = Counter()
    layers, shape = [], input_shape
    for index, layer_config in enumerate(layer_configs):
        kw = Keywords(layer_config, model=model_name, index=index)
        stem = _snake_case(kw.layer)
        name = f"{stem}_{counts[stem]}" if counts[stem] else stem
        counts[stem] += 1
        expected = "sizes of which torch can build a layer"  # such as those of 64 bits
        with reading(kw.where, ZooFormatError, expected), torch.device(device):
            layer = build_layer(kw, name, shape, input_shape)
        shape = layer.shape
        if prod(shape) > _MAX_PARAMETERS:
            raise kw.error(f"its output shape {shape} is too large")
        layers.append(layer)
    return KerasModel(config, _torch_order(input_shape), layers)


def _torch_order(shape: Shape) -> Shape:
    """(h, w, c) as (c, h, w); other shapes as they are."""
    return (shape[2], shape[0], shape[1]) if len(shape) == 3 else shape


_NAMES = {"ReLU": "relu", "LeakyReLU": "leaky_relu", "PReLU": "prelu", "ELU": "elu"}


def _snake_case(layer: str) -> str:
    """Conv2D -> conv2d, MaxPooling2D -> max_pooling2d."""
    if layer in _NAMES:
        return _NAMES[layer]
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in layer)
    return words.strip("_").replace("2_d", "2d")
