"""Networks by name: the competition's families and the residual networks of the papers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.doors import shown
from sharpkit.errors import ArgumentError
from sharpkit.importing import import_callable
from sharpkit.training.streams import global_stream, stream_seed

_SPELLINGS = (
    "vgg-WIDTHxBLOCKS[-bn], nin-WIDTHxBLOCKS[-bn], resnetDEPTH, wrn-DEPTH-WIDTH[-nobn] "
    "(such as vgg-32x2, nin-64x2, resnet20, wrn-16-4), or module:callable"
)
_MAX_LAYERS = 2_000  # the deepest of the papers has 1,202


def build_architecture(
    name: str, input_shape: tuple[int, ...], classes: int, *, seed: int
) -> nn.Module:
    """A freshly initialised network of a family, for inputs of a shape.

    - `vgg-WxB`: the competition's VGG family (tasks 1 and 8): B blocks of two 3x3 convolutions
      with ReLU and a 2x2 max pooling, then one dense layer. The width doubles from block to block
      up to W channels.
    - `nin-WxB`: its NiN family (tasks 2, 6, 7 and 9): B blocks of a 3x3 convolution with stride 2
      and two 1x1 convolutions of W channels with ReLU, then a 1x1 convolution to the classes and
      the mean over positions.
    - `resnetD`, D = 6n + 2: n residual blocks at each of 16, 32 and 64 channels with BatchNorm;
      shortcuts without parameters.
    - `wrn-D-k`, D = 6n + 4: n pre-activation blocks at each of 16k, 32k and 64k channels.

    With `-bn` every convolution of the first two is followed by BatchNorm. `wrn-D-k-nobn` has
    biases in place of BatchNorm and multiplies every residual branch by a trained number that
    starts at 0 (SkipInit): each block is then the identity at first, which is what makes deep
    networks trainable without normalisation.

    Convolutions start with He's normal initialisation, biases at 0.

    Args:
        name: As above, or "module:callable", which is called without arguments (and must fit
            `input_shape` and `classes` by itself).
        input_shape: (channels, height, width), such as (3, 32, 32) or (1, 28, 28).
        classes: Number of outputs.
        seed: Of the initial weights; the caller's random state is left alone.

    Returns:
        nn.Module: On the CPU, in training mode.

    Raises:
        ArgumentError: For a name that is none of these, or images too small for the network.

    Source:
        Jiang et al. 2020 (arXiv:2012.07976), vgg and nin; He et al. 2016, resnet; Zagoruyko and
        Komodakis 2016, wrn; De and Smith 2020 (arXiv:2002.10444), SkipInit; He et al. 2015, the
        initialisation.

    Example:
        >>> model = build_architecture("resnet20", (3, 32, 32), 10, seed=0)
        >>> sum(p.numel() for p in model.parameters())
        269722
    """
    if not isinstance(classes, int) or classes < 1:
        raise ArgumentError(f"classes is {classes!r}: expected a whole number >= 1")
    make = _recipe(name, tuple(input_shape), classes)
    with global_stream(stream_seed(seed, "initial weights")):
        model = make()
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"{name} returned {type(model).__name__}: expected an nn.Module")
        if ":" not in name:
            _initialise(model)
    return model


def _recipe(name: str, shape: tuple[int, ...], classes: int) -> Callable[[], Any]:
    if ":" in name:
        return import_callable(name)  # type: ignore[no-any-return]
    if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
        raise ArgumentError(
            f"{name} needs inputs of shape (channels, height, width), got {tuple(shape)}"
        )
    if any(len(digits) > 5 for digits in re.findall(r"[0-9]+", name)):
        raise ArgumentError(f"{shown(name)}: expected numbers of at most five digits")
    if match := re.fullmatch(r"(vgg|nin)-([1-9][0-9]*)x([1-9][0-9]*)(-bn)?", name):
        width, blocks, norm = int(match[2]), int(match[3]), match[4] is not None
        _require_layers(name, 3 * blocks)
        if match[1] == "nin":
            return lambda: _nin(shape, classes, width, blocks, norm)
        if min(shape[1:]) < 2**blocks:
            raise ArgumentError(
                f"{name} halves the image {blocks} times: {shape[1]}x{shape[2]} is too small"
            )
        if width < 2 ** (blocks - 1):
            raise ArgumentError(f"{name}: {blocks} blocks cannot double up to {width} channels")
        return lambda: _vgg(shape, classes, width, blocks, norm)
    if match := re.fullmatch(r"resnet([0-9]+)", name):
        depth = int(match[1])
        _require_layers(name, depth)
        if depth < 8 or depth % 6 != 2:
            raise ArgumentError(f"{name}: expected a depth of 6n+2, such as 8, 14, 20, 32, 56")
        return lambda: ResNet(shape[0], classes, (depth - 2) // 6)
    if match := re.fullmatch(r"wrn-([0-9]+)-([1-9][0-9]*)(-nobn)?", name):
        depth, factor = int(match[1]), int(match[2])
        _require_layers(name, depth)
        if depth < 10 or depth % 6 != 4:
            raise ArgumentError(f"{name}: expected a depth of 6n+4, such as 10, 16, 28, 40")
        return lambda: WideResNet(shape[0], classes, (depth - 4) // 6, factor, match[3] is None)
    raise ArgumentError(f"unknown architecture {shown(name)}; expected {_SPELLINGS}")


def _require_layers(name: str, layers: int) -> None:
    if layers > _MAX_LAYERS:
        raise ArgumentError(f"{name} has {layers:,} layers: expected at most {_MAX_LAYERS:,}")


def _vgg(
    shape: tuple[int, ...], classes: int, width: int, blocks: int, norm: bool
) -> nn.Sequential:
    channels, height, width_in = shape
    layers: list[nn.Module] = []
    for block in reversed(range(blocks)):
        for _ in range(2):
            layers += _convolution(channels, width >> block, 3, 1, norm)
            channels = width >> block
        layers.append(nn.MaxPool2d(2))
    positions = (height >> blocks) * (width_in >> blocks)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * positions, classes))


def _nin(
    shape: tuple[int, ...], classes: int, width: int, blocks: int, norm: bool
) -> nn.Sequential:
    channels = shape[0]
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += _convolution(channels, width, 3, 2, norm)
        layers += _convolution(width, width, 1, 1, norm) + _convolution(width, width, 1, 1, norm)
        channels = width
    head = nn.Conv2d(width, classes, 1)
    return nn.Sequential(*layers, head, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _convolution(inside: int, out: int, size: int, stride: int, norm: bool) -> list[nn.Module]:
    layer = nn.Conv2d(inside, out, size, stride, size // 2, bias=not norm)
    return [layer, *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU()]


class ResNet(nn.Module):
    """He et al.'s residual network for small images: three stages of n blocks, 6n + 2 layers.

    `blocks` are those of each stage.
    """

    def __init__(self, channels: int, classes: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(channels, 16, 3, 1, True))
        self.blocks = _stages(ResidualBlock, [16, 32, 64], blocks)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut without parameters.

    Where the size changes, the shortcut takes every second pixel and pads channels with zeros.
    """

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, out - inside
        self.branch = nn.Sequential(
            *_convolution(inside, out, 3, stride, True), *_convolution(out, out, 3, 1, True)[:2]
        )

    def forward(self, x: Tensor) -> Tensor:
        """relu(shortcut(x) + branch(x))."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        return F.relu(shortcut + self.branch(x))


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis' network: three stages of n pre-activation blocks, 6n + 4 layers.

    `factor` is the width factor k; without `norm` it has biases and SkipInit in place of BatchNorm.
    """

    def __init__(self, channels: int, classes: int, blocks: int, factor: int, norm: bool) -> None:
        super().__init__()
        widths = [16 * factor, 32 * factor, 64 * factor]
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=not norm)
        self.blocks = _stages(partial(WideBlock, norm=norm), widths, blocks)
        self.norm = nn.BatchNorm2d(widths[-1]) if norm else nn.Identity()
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        out: Tensor = self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))
        return out


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, beside the input or a 1x1 convolution of it."""

    def __init__(self, inside: int, out: int, stride: int, norm: bool) -> None:
        super().__init__()
        bias = not norm
        self.first = nn.BatchNorm2d(inside) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=bias)
        self.second = nn.BatchNorm2d(out) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=bias)
        self.shortcut = nn.Conv2d(inside, out, 1, stride, bias=bias) if inside != out else None
        self.scale = None if norm else SkipScale()

    def forward(self, x: Tensor) -> Tensor:
        """shortcut(x) + branch(x)."""
        active = F.relu(self.first(x))
        branch = self.conv2(F.relu(self.second(self.conv1(active))))
        if self.scale is not None:
            branch = self.scale(branch)
        out: Tensor = branch + (x if self.shortcut is None else self.shortcut(active))
        return out


class SkipScale(nn.Module):
    """Multiplication by one trained number that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """weight · x."""
        return self.weight * x


def _stages(block: Callable[..., nn.Module], widths: list[int], blocks: int) -> nn.Sequential:
    """Stages of blocks (channels in, channels out, stride), after a stem of 16 channels."""
    layers: list[nn.Module] = []
    inside = 16
    for stage, width in enumerate(widths):
        for i in range(blocks):
            layers.append(block(inside, width, 2 if stage and not i else 1))
            inside = width
    return nn.Sequential(*layers)


def _initialise(model: nn.Module) -> None:
    """He's normal initialisation; what the constructors set for BatchNorm and SkipInit stays."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            head = isinstance(module, nn.Linear)  # no ReLU follows
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if head else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
