"""One builder per Keras layer: keywords and input shape -> torch modules, weights, output shape.

Shapes are those of one example in Keras' axis order: (h, w, c) for a feature map, which torch holds
as (c, h, w), and (d,) for a vector. Defaults are those of Keras 2.15.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

from torch import nn

from sharpkit.doors import shown
from sharpkit.zoo.keras.keywords import Keywords
from sharpkit.zoo.keras.layer import (
    Layer,
    Shape,
    activation,
    feature_map,
    is_even,
    last_axis_only,
    window,
)
from sharpkit.zoo.keras.modules import (
    AxisLast,
    AxisSecond,
    ClippedReLU,
    EntrywisePReLU,
    GlobalPool2d,
    Rearrange,
    UnevenAvgPool2d,
)

_TO_KERAS = (0, 2, 3, 1)  # (n, c, h, w) -> (n, h, w, c)
_TO_TORCH = (0, 3, 1, 2)

Builder = Callable[[Keywords, Layer], None]


def build_layer(kw: Keywords, name: str, shape: Shape, input_shape: Shape) -> Layer:
    """Build one layer for inputs of the given shape; errors name model, layer and keyword."""
    if kw.layer not in BUILDERS:
        raise kw.error(f"unknown layer; supported are {', '.join(sorted(BUILDERS))}")
    builder, inert = BUILDERS[kw.layer]
    layer = Layer(name, shape)
    builder(kw, layer)
    kw.finish(input_shape, *inert)
    return layer


# --- layers with a kernel --------------------------------------------------------------------


def _dense(kw: Keywords, layer: Layer) -> None:
    units, bias = kw.integer("units"), kw.flag("use_bias", True)
    width = layer.shape[-1]
    if len(layer.shape) == 3:  # a Dense layer on a feature map acts on its channels
        layer.add(nn.Conv2d(width, units, 1, bias=bias))
        torch_shape: Shape = (units, width, 1, 1)
    else:
        layer.add(nn.Linear(width, units, bias=bias))
        torch_shape = (units, width)
    layer.slot("kernel:0", (width, units), ".weight", (1, 0), torch_shape)
    if bias:
        layer.vector_slot("bias:0", units, ".bias")
    layer.shape = (*layer.shape[:-1], units)
    activation(kw, layer)


def _convolution(
    kw: Keywords, layer: Layer, channels: int, groups: int, bias: bool, suffix: str = ""
) -> tuple[int, int]:
    """Append padding and convolution as the keywords say; returns the kernel size."""
    height, width, depth = feature_map(kw, layer)
    kernel, stride = kw.pair("kernel_size"), kw.pair("strides", 1)
    dilation = kw.pair("dilation_rate", 1)
    if max(stride) > 1 and max(dilation) > 1:
        raise kw.error("keywords 'strides' and 'dilation_rate' cannot both exceed 1")
    if depth % groups or channels % groups:
        raise kw.error(
            f"{groups} groups do not divide {depth} input and {channels} output channels"
        )
    out, pads = window(kw, (height, width), kernel, stride, dilation)
    even = is_even(pads)
    if not even:
        layer.add(nn.ZeroPad2d(pads), "_pad")
    padding = (pads[2], pads[0]) if even else (0, 0)
    conv = nn.Conv2d(depth, channels, kernel, stride, padding, dilation, groups, bias)
    layer.add(conv, suffix)
    layer.shape = (*out, channels)
    return kernel


def _conv2d(kw: Keywords, layer: Layer) -> None:
    depth = layer.shape[-1]
    filters, bias = kw.integer("filters"), kw.flag("use_bias", True)
    groups = kw.integer("groups", 1)
    kernel = _convolution(kw, layer, filters, groups, bias)
    shape = (*kernel, depth // groups, filters)
    layer.slot("kernel:0", shape, ".weight", (3, 2, 0, 1), (filters, depth // groups, *kernel))
    if bias:
        layer.vector_slot("bias:0", filters, ".bias")
    activation(kw, layer)


def _depthwise_conv2d(kw: Keywords, layer: Layer) -> None:
    depth = layer.shape[-1]
    bias, multiplier = kw.flag("use_bias", True), kw.integer("depth_multiplier", 1)
    kernel = _convolution(kw, layer, depth * multiplier, depth, bias)
    _depthwise_slot(layer, kernel, depth, multiplier, ".weight")
    if bias:
        layer.vector_slot("bias:0", depth * multiplier, ".bias")
    activation(kw, layer)


def _separable_conv2d(kw: Keywords, layer: Layer) -> None:
    depth, filters = layer.shape[-1], kw.integer("filters")
    bias, multiplier = kw.flag("use_bias", True), kw.integer("depth_multiplier", 1)
    inner = depth * multiplier
    kernel = _convolution(kw, layer, inner, depth, False, suffix="_depthwise")
    layer.add(nn.Conv2d(inner, filters, 1, bias=bias))
    _depthwise_slot(layer, kernel, depth, multiplier, "_depthwise.weight")
    shape = (1, 1, inner, filters)
    layer.slot("pointwise_kernel:0", shape, ".weight", (3, 2, 0, 1), (filters, inner, 1, 1))
    if bias:
        layer.vector_slot("bias:0", filters, ".bias")
    layer.shape = (*layer.shape[:-1], filters)
    activation(kw, layer)


def _depthwise_slot(
    layer: Layer, kernel: tuple[int, int], depth: int, multiplier: int, target: str
) -> None:
    torch_shape = (depth * multiplier, 1, *kernel)
    keras_shape = (*kernel, depth, multiplier)
    layer.slot("depthwise_kernel:0", keras_shape, target, (2, 3, 0, 1), torch_shape)


# --- normalisation ---------------------------------------------------------------------------


def _batch_normalization(kw: Keywords, layer: Layer) -> None:
    last_axis_only(kw, layer)
    size, rank = layer.shape[-1], len(layer.shape)
    kind = nn.BatchNorm2d if rank == 3 else nn.BatchNorm1d
    momentum = 1.0 - kw.number("momentum", 0.99, high=1.0)
    norm = kind(size, eps=kw.number("epsilon", 1e-3), momentum=momentum)
    kw.choice("renorm", False, (False,))
    target = ""
    if rank == 2:
        layer.add(AxisSecond(norm))
        target = ".inner"
    else:
        layer.add(norm)
    _scale_and_center(kw, layer, norm, size, target)
    layer.vector_slot("moving_mean:0", size, f"{target}.running_mean")
    layer.vector_slot("moving_variance:0", size, f"{target}.running_var")


def _layer_normalization(kw: Keywords, layer: Layer) -> None:
    last_axis_only(kw, layer)
    size = layer.shape[-1]
    norm = nn.LayerNorm(size, eps=kw.number("epsilon", 1e-3))
    on_map = len(layer.shape) == 3
    layer.add(AxisLast(norm) if on_map else norm)
    _scale_and_center(kw, layer, norm, size, ".inner" if on_map else "")


def _scale_and_center(kw: Keywords, layer: Layer, norm: nn.Module, size: int, target: str) -> None:
    """Keep or drop the factors and offsets of a normalisation."""
    for key, keras_name, name in (("scale", "gamma", "weight"), ("center", "beta", "bias")):
        if kw.flag(key, True):
            layer.vector_slot(f"{keras_name}:0", size, f"{target}.{name}")
        else:
            norm.register_parameter(name, None)


# --- activations -----------------------------------------------------------------------------


def _relu(kw: Keywords, layer: Layer) -> None:
    largest = kw.take("max_value", None)
    max_value = None if largest is None else kw.number("max_value", largest)
    slope, threshold = kw.number("negative_slope", 0.0), kw.number("threshold", 0.0)
    if max_value is None and slope == threshold == 0:
        layer.add(nn.ReLU())
    elif max_value is None and threshold == 0:
        layer.add(nn.LeakyReLU(slope))
    else:
        layer.add(ClippedReLU(max_value, slope, threshold))


def _with_alpha(kw: Keywords, layer: Layer) -> None:
    kind, default = {"ELU": (nn.ELU, 1.0), "LeakyReLU": (nn.LeakyReLU, 0.3)}[kw.layer]
    layer.add(kind(kw.number("alpha", default)))


def _prelu(kw: Keywords, layer: Layer) -> None:
    rank = len(layer.shape)
    shared = kw.take("shared_axes", None)
    axes = kw.integers("shared_axes", [] if shared is None else shared)
    if any(axis > rank for axis in axes):
        raise kw.error(f"keyword 'shared_axes' is {list(axes)}; the input has {rank} axes")
    shape = tuple(1 if i + 1 in axes else size for i, size in enumerate(layer.shape))
    order = (2, 0, 1) if rank == 3 else tuple(range(rank))
    torch_shape = tuple(shape[i] for i in order)
    if prod(torch_shape[1:]) == 1:  # one slope a channel, or a single one
        torch_shape = torch_shape[:1]
        layer.add(nn.PReLU(torch_shape[0]))
    else:
        layer.add(EntrywisePReLU(torch_shape))
    layer.slot("alpha:0", shape, ".weight", order, torch_shape)


def _softmax(kw: Keywords, layer: Layer) -> None:
    last_axis_only(kw, layer)
    layer.add(nn.Softmax(dim=1 if len(layer.shape) == 3 else -1))


# --- pooling, shapes, identities -------------------------------------------------------------


def _pooling(kw: Keywords, layer: Layer) -> None:
    height, width, depth = feature_map(kw, layer)
    kernel = kw.pair("pool_size", 2)
    given = kw.take("strides", None)
    stride = kw.pair("strides", kernel if given is None else given)
    out, pads = window(kw, (height, width), kernel, stride)
    layer.taps = prod(kernel)
    even, padding = is_even(pads), (pads[2], pads[0])
    if kw.layer == "MaxPooling2D":
        if not even:
            layer.add(nn.ConstantPad2d(pads, -float("inf")), "_pad")
        layer.add(nn.MaxPool2d(kernel, stride, padding if even else 0))
    elif even:
        layer.add(nn.AvgPool2d(kernel, stride, padding, count_include_pad=False))
    else:
        layer.add(UnevenAvgPool2d(kernel, stride, pads))
    layer.shape = (*out, depth)


def _global_pooling(kw: Keywords, layer: Layer) -> None:
    depth = feature_map(kw, layer)[2]
    keepdims = kw.flag("keepdims", False)
    kind = "mean" if kw.layer == "GlobalAveragePooling2D" else "max"
    layer.add(GlobalPool2d(kind, keepdims))
    layer.shape = (1, 1, depth) if keepdims else (depth,)


def _zero_padding2d(kw: Keywords, layer: Layer) -> None:
    height, width, depth = feature_map(kw, layer)
    value = kw.take("padding", 1)
    if isinstance(value, list | tuple) and any(isinstance(v, list | tuple) for v in value):
        if len(value) != 2:
            raise kw.error(
                f"keyword 'padding' is {shown(value)}; expected [[top, bottom], [left, right]]"
            )
        top, bottom = kw.pair("padding", value[0], minimum=0)
        left, right = kw.pair("padding", value[1], minimum=0)
    else:
        top, left = kw.pair("padding", value, minimum=0)
        bottom, right = top, left
    layer.add(nn.ZeroPad2d((left, right, top, bottom)))
    layer.shape = (height + top + bottom, width + left + right, depth)


def _rearrange(layer: Layer, dims: Shape | None, shape: Shape) -> None:
    """Permute the Keras axes by `dims` (or not), then give each example the shape `shape`."""
    before = _TO_KERAS if len(layer.shape) == 3 else tuple(range(len(layer.shape) + 1))
    if dims is not None:
        before = (before[0], *(before[d] for d in dims))
    after = _TO_TORCH if len(shape) == 3 else tuple(range(len(shape) + 1))
    reshaped = None if dims is not None else shape
    steps = [None if axes == tuple(range(len(axes))) else axes for axes in (before, after)]
    layer.add(Rearrange(steps[0], reshaped, steps[1]))
    layer.shape = shape


def _flatten(kw: Keywords, layer: Layer) -> None:
    kw.choice("data_format", "channels_last", ("channels_last", None))
    size = prod(layer.shape)
    if len(layer.shape) < 3 or layer.shape[2] == 1 or layer.shape[0] * layer.shape[1] == 1:
        layer.add(nn.Flatten())  # the order of the axes does not matter
        layer.shape = (size,)
    else:
        _rearrange(layer, None, (size,))


def _reshape(kw: Keywords, layer: Layer) -> None:
    target = list(kw.integers("target_shape", minimum=-1))
    size = prod(layer.shape)
    known = prod(t for t in target if t != -1)
    if target.count(-1) == 1 and known > 0 and size % known == 0:
        target[target.index(-1)] = size // known
    if min(target, default=0) < 1 or prod(target) != size:
        raise kw.error(f"keyword 'target_shape' is {target}; the input has shape {layer.shape}")
    _rearrange(layer, None, tuple(target))


def _permute(kw: Keywords, layer: Layer) -> None:
    dims = kw.integers("dims")
    if sorted(dims) != list(range(1, len(layer.shape) + 1)):
        raise kw.error(f"keyword 'dims' is {list(dims)}; expected an order of the input's axes")
    _rearrange(layer, dims, tuple(layer.shape[d - 1] for d in dims))


def _dropout(kw: Keywords, layer: Layer) -> None:
    rate = kw.number("rate", high=1.0)
    if kw.layer == "SpatialDropout2D":
        feature_map(kw, layer)
    layer.add(_DROPOUTS[kw.layer](rate))


def _input_layer(kw: Keywords, layer: Layer) -> None:
    if kw.index != 0:
        raise kw.error("an InputLayer can only be the first layer")
    layer.add(nn.Identity())


def _identity(kw: Keywords, layer: Layer) -> None:
    layer.add(nn.Identity())


_DROPOUTS = {
    "AlphaDropout": nn.AlphaDropout,
    "Dropout": nn.Dropout,
    "SpatialDropout2D": nn.Dropout2d,
}
_DEPTHWISE = ("depthwise_initializer", "depthwise_regularizer", "depthwise_constraint")
_POINTWISE = ("pointwise_initializer", "pointwise_regularizer", "pointwise_constraint")
_NORM = tuple(
    f"{w}_{k}" for w in ("gamma", "beta") for k in ("initializer", "regularizer", "constraint")
)
_MOVING = ("moving_mean_initializer", "moving_variance_initializer", "fused", "synchronized")
_ALPHA = ("alpha_initializer", "alpha_regularizer", "alpha_constraint")

# layer -> its builder, and keywords of its own that do not change inference
BUILDERS: dict[str, tuple[Builder, tuple[str, ...]]] = {
    "Activation": (partial(activation, own_layer=True), ()),
    "ActivityRegularization": (_identity, ("l1", "l2")),
    "AlphaDropout": (_dropout, ("noise_shape",)),
    "AveragePooling2D": (_pooling, ()),
    "BatchNormalization": (_batch_normalization, _NORM + _MOVING),
    "Conv2D": (_conv2d, ()),
    "Dense": (_dense, ()),
    "DepthwiseConv2D": (_depthwise_conv2d, _DEPTHWISE),
    "Dropout": (_dropout, ("noise_shape",)),
    "ELU": (_with_alpha, ()),
    "Flatten": (_flatten, ()),
    "GaussianDropout": (_identity, ("rate",)),
    "GaussianNoise": (_identity, ("stddev",)),
    "GlobalAveragePooling2D": (_global_pooling, ()),
    "GlobalMaxPooling2D": (_global_pooling, ()),
    "InputLayer": (_input_layer, ("batch_size",)),
    "LayerNormalization": (_layer_normalization, _NORM),
    "LeakyReLU": (_with_alpha, ()),
    "MaxPooling2D": (_pooling, ()),
    "PReLU": (_prelu, _ALPHA),
    "Permute": (_permute, ()),
    "ReLU": (_relu, ()),
    "Reshape": (_reshape, ()),
    "SeparableConv2D": (_separable_conv2d, _DEPTHWISE + _POINTWISE),
    "Softmax": (_softmax, ()),
    "SpatialDropout2D": (_dropout, ()),
    "ZeroPadding2D": (_zero_padding2d, ()),
}
