"""The networks of the model zoos, built from the shapes in a checkpoint.

Of a plain CNN, params.json tells type, activation and dropout; of a ResNet, the names and shapes
tell everything. What does not fit is refused with what was found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu

from sharpkit.doors import reading, shown
from sharpkit.errors import ZooFormatError

NONLINEARITIES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
# after which convolutions there is pooling, and whether there is a dropout layer without dropout
_PLAIN = {"CNN": ((0, 1), False), "CNN2": ((0, 1), False), "CNN3": ((0, 1, 2), True)}
_RESNET = re.compile(r"resnet[0-9]+(_width)?", re.IGNORECASE)
_SHOWN = 6  # names in a message

State = Mapping[str, Tensor]


def build_network(where: str, params: Mapping[str, Any], state: State) -> nn.Module:
    """The network of a checkpoint, in eval mode.

    - CNN, CNN2: conv, pool, activation, [dropout], conv, pool, activation, [dropout], conv,
      activation, flatten, dense, activation, [dropout], dense; dropout layers only where it is
      above 0. CNN3 has pooling after the third convolution, and dropout layers always.
    - Resnet18, Resnet18_width, ...: the residual network of He et al. 2016 with BatchNorm, of any
      width and number of blocks, basic or with bottleneck; a 3 x 3 convolution as its first layer,
      or 7 x 7 with stride 2 and pooling, is told by its kernel.

    Args:
        where: The file of the checkpoint, for errors.
        params: "model::type", "model::nlin", "model::dropout".
        state: The checkpoint's tensors by name.

    Returns:
        nn.Module: Takes (n, channels, height, width), returns logits (n, classes).

    Raises:
        ZooFormatError: Another type, or names and shapes that do not fit it.

    Source:
        Schuerholt et al. 2022, arXiv:2209.14764, appendix; He et al. 2016, arXiv:1512.03385.
    """
    kind = params.get("model::type")
    with reading(where, ZooFormatError, "the weights of a network of a known type"):
        if isinstance(kind, str) and kind in _PLAIN:
            network: nn.Module = _plain(where, kind, params, state)
        elif isinstance(kind, str) and _RESNET.fullmatch(kind):
            network = _resnet(where, state)
        else:
            raise ZooFormatError(
                f"{where}: model::type is {shown(kind)}; networks of the types "
                f"{', '.join(_PLAIN)}, Resnet18 and Resnet<depth>_width are known"
            )
        _fill(where, network, state)
    return network.eval()


def _fill(where: str, network: nn.Module, state: State) -> None:
    """Put the tensors into the network, if names and shapes are the same."""
    expected = network.state_dict()
    lacking = [name for name in expected if name not in state]
    beyond = [name for name in state if name not in expected]
    if lacking or beyond:
        raise ZooFormatError(
            f"{where}: names do not fit the network; lacking: {_some(lacking)}; beyond it: "
            f"{_some(beyond)}"
        )
    for name, value in expected.items():
        if value.shape != state[name].shape:
            raise ZooFormatError(
                f"{where}: {shown(name)} has shape {tuple(state[name].shape)}; expected "
                f"{tuple(value.shape)}"
            )
    network.load_state_dict(dict(state), assign=True)
    network.requires_grad_(True)


def _some(names: list[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return (", ".join(map(shown, names[:_SHOWN])) + more) or "none"


def _plain(where: str, kind: str, params: Mapping[str, Any], state: State) -> nn.Sequential:
    """Layers in the order of their numbers; channels by the shapes of the weights."""
    kernels = [value for name, value in state.items() if name.endswith(".weight")]
    shapes = [tuple(kernel.shape) for kernel in kernels]
    if [len(shape) for shape in shapes] != [4, 4, 4, 2, 2]:
        raise ZooFormatError(
            f"{where}: weights of shapes {shown(shapes)}; expected three convolutions and two "
            f"dense layers for the type {kind}"
        )
    nonlinearity, dropout = params.get("model::nlin"), params.get("model::dropout", 0)
    if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
        raise ZooFormatError(
            f"{where}: model::nlin is {shown(nonlinearity)}; expected one of "
            f"{', '.join(NONLINEARITIES)}"
        )
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ZooFormatError(
            f"{where}: model::dropout is {shown(dropout)}; expected a share below 1"
        )
    pooled, always = _PLAIN[kind]
    drop = [dropout] if always or dropout > 0 else []
    layers: list[nn.Module] = []
    for k, (out, inside, height, width) in enumerate(shapes[:3]):
        layers.append(nn.Conv2d(inside, out, (height, width), device="meta"))
        if k in pooled:
            layers.append(nn.MaxPool2d(2))
        layers.append(NONLINEARITIES[nonlinearity]())
        if k in pooled:
            layers += map(nn.Dropout, drop)
    layers += [nn.Flatten(), nn.Linear(shapes[3][1], shapes[3][0], device="meta")]
    layers += [NONLINEARITIES[nonlinearity](), *map(nn.Dropout, drop)]
    layers.append(nn.Linear(shapes[4][1], shapes[4][0], device="meta"))
    network = nn.Sequential()
    network.add_module("module_list", nn.Sequential(*layers))
    return network


def _resnet(where: str, state: State) -> ResNet:
    blocks: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(r"layer([1-9])\.([0-9]{1,3})\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = [len(blocks.get(stage, ())) for stage in range(1, len(blocks) + 1)]
    first, last = state.get("conv1.weight"), state.get("fc.weight")
    ends = first is not None and last is not None and (first.ndim, last.ndim) == (4, 2)
    if not ends or not counts or 0 in counts:
        raise ZooFormatError(
            f"{where}: has {_some(list(state))}; expected conv1, bn1, layer1.0.conv1, ..., fc, as "
            "a residual network has"
        )
    assert first is not None and last is not None
    kernel = first.shape[-1]
    if kernel not in (3, 7) or first.shape[-2] != kernel:
        raise ZooFormatError(
            f"{where}: conv1 has a kernel of {tuple(first.shape[-2:])}; expected 3 x 3, or 7 x 7"
        )
    return ResNet(
        channels=first.shape[1],
        width=first.shape[0],
        blocks=counts,
        classes=last.shape[0],
        bottleneck="layer1.0.conv3.weight" in state,
        kernel=kernel,
    )


class ResNet(nn.Module):
    """A residual network with torchvision's names; stage k has 2^(k − 1) width channels.

    Args:
        channels: Of the images.
        width: Channels of the first stage.
        blocks: How many each stage has.
        classes: Outputs.
        bottleneck: Blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions with four times the channels
            outside, the stride in the 3 x 3; else of two 3 x 3, the stride in the first.
        kernel: Of the first layer: 3, or 7 with stride 2 and max-pooling.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        blocks: list[int],
        classes: int,
        bottleneck: bool,
        kernel: int,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, width, kernel, 1 if kernel == 3 else 2)
        self.bn1 = _norm(width)
        self.maxpool = nn.Identity() if kernel == 3 else nn.MaxPool2d(3, 2, padding=1)
        self.stages = [f"layer{k}" for k in range(1, len(blocks) + 1)]
        inside = width
        for k, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stage = nn.Sequential()
            for number in range(count):
                stride = 2 if k and not number else 1
                block = _Block(inside, width * 2**k, stride, bottleneck)
                stage.append(block)
                inside = block.out
            self.add_module(name, stage)
        self.fc = nn.Linear(inside, classes, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        x = self.maxpool(relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """relu(branch(x) + shortcut(x)); the shortcut is a 1 x 1 convolution where shapes differ."""

    def __init__(self, inside: int, channels: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.out = channels * (4 if bottleneck else 1)
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        self.convolutions = len(sizes)
        before = inside
        for k, (kernel, step) in enumerate(sizes, 1):
            after = self.out if k == len(sizes) else channels
            self.add_module(f"conv{k}", _convolution(before, after, kernel, step))
            self.add_module(f"bn{k}", _norm(after))
            before = after
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != self.out:
            self.downsample = nn.Sequential(
                _convolution(inside, self.out, 1, stride), _norm(self.out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = x
        for k in range(1, self.convolutions + 1):
            y = self.get_submodule(f"bn{k}")(self.get_submodule(f"conv{k}")(y))
            if k < self.convolutions:
                y = relu(y)
        return relu(y + self.downsample(x))


def _convolution(inside: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False, device="meta")


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, device="meta")
