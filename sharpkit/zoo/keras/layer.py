"""What one Keras layer becomes in torch, and the helpers that its builders share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from torch import Tensor, nn

from sharpkit.doors import shown
from sharpkit.zoo.keras.keywords import Keywords
from sharpkit.zoo.keras.modules import Pointwise

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One array of a layer: where it is in the HDF5 file and where it goes in the torch model."""

    keras_name: str
    keras_shape: Shape
    target: str  # dotted name of the parameter or buffer
    axes: Shape  # permutation of the Keras axes
    torch_shape: Shape  # reshape after the permutation

    def to_torch(self, array: Tensor) -> Tensor:
        """The array in torch's layout, contiguous."""
        return array.permute(self.axes).reshape(self.torch_shape).contiguous()

    def to_keras(self, tensor: Tensor) -> Tensor:
        """The tensor in Keras' layout; undoes `to_torch` exactly."""
        permuted = tensor.reshape([self.keras_shape[axis] for axis in self.axes])
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return permuted.permute(inverse)


@dataclass
class Layer:
    """What one Keras layer becomes; filled by its builder."""

    name: str
    shape: Shape  # of the input, then of the output
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    taps: int = 1  # entries of the input that one of the output takes, kernels apart

    @property
    def work(self) -> int:
        """About how many multiplications one example takes."""
        kernels = sum(prod(s.keras_shape) for s in self.slots if "kernel" in s.keras_name)
        return kernels * prod(self.shape[:-1]) + self.taps * prod(self.shape)

    def add(self, module: nn.Module, suffix: str = "") -> None:
        """Append a module called after the layer."""
        self.modules.append((self.name + suffix, module))

    def slot(
        self, keras_name: str, keras_shape: Shape, target: str, axes: Shape, torch_shape: Shape
    ) -> None:
        """Append a weight array; `target` is relative to the layer, such as ".weight"."""
        self.slots.append(Slot(keras_name, keras_shape, self.name + target, axes, torch_shape))

    def vector_slot(self, keras_name: str, size: int, target: str) -> None:
        """Append a weight array with one axis, the same in both worlds."""
        self.slot(keras_name, (size,), target, (0,), (size,))


def feature_map(kw: Keywords, layer: Layer) -> tuple[int, int, int]:
    """The input shape of a layer that needs a feature map."""
    kw.choice("data_format", "channels_last", ("channels_last", None))
    if len(layer.shape) != 3:
        raise kw.error(f"needs a feature map (h, w, c), but its input has shape {layer.shape}")
    return layer.shape[0], layer.shape[1], layer.shape[2]


def window(
    kw: Keywords,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Output size of a sliding window and its padding (left, right, top, bottom).

    TensorFlow's "same" pads just enough for ceil(size / stride) outputs; an odd cell goes to the
    bottom and right.
    """
    same = kw.choice("padding", "valid", ("valid", "same")) == "same"
    outs, pads = [], []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        reach = (k - 1) * d + 1
        out = -(-n // s) if same else (n - reach) // s + 1
        if out < 1:
            raise kw.error(
                f"its window of {reach} does not fit into an input of {size[0]}x{size[1]}"
            )
        total = max((out - 1) * s + reach - n, 0) if same else 0
        outs.append(out)
        pads.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = pads
    return (outs[0], outs[1]), (left, right, top, bottom)


def is_even(pads: tuple[int, int, int, int]) -> bool:
    """Whether torch's own symmetric padding will do."""
    return pads[0] == pads[1] and pads[2] == pads[3]


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "exponential": lambda: Pointwise("exponential"),
    "hard_sigmoid": lambda: Pointwise("hard_sigmoid"),
}


def activation(kw: Keywords, layer: Layer, *, own_layer: bool = False) -> None:
    """Append the activation named by the keyword; `own_layer` if the layer is nothing else."""
    names = (None, "linear", "softmax", *_ACTIVATIONS)
    chosen = kw.take("activation") if own_layer else kw.take("activation", None)
    if chosen not in names or not isinstance(chosen, str | None):
        listed = ", ".join(str(n) for n in names[1:])
        raise kw.error(f"keyword 'activation' is {shown(chosen)}; expected one of {listed}")
    suffix = "" if own_layer else "_activation"
    if chosen == "softmax":
        layer.add(nn.Softmax(dim=1 if len(layer.shape) == 3 else -1), suffix)
    elif chosen in _ACTIVATIONS:
        layer.add(_ACTIVATIONS[chosen](), suffix)
    elif own_layer:
        layer.add(nn.Identity())


def last_axis_only(kw: Keywords, layer: Layer) -> None:
    """Refuse an `axis` other than the last."""
    rank = len(layer.shape)
    axis = kw.take("axis", -1)
    if axis not in (-1, rank, [-1], [rank]):
        raise kw.error(f"keyword 'axis' is {shown(axis)}; only the last axis is supported")
