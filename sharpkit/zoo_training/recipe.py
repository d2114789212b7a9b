"""The recipe of a network of a zoo: with a seed, it decides every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sharpkit.doors import MAX_LAYERS
from sharpkit.errors import ArgumentError
from sharpkit.training.sam_timing import sam_timing
from sharpkit.training.settings import TrainingSettings, check_choice, check_number, check_whole


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingSettings):
    """Everything that decides how one model is built and trained; a grid varies any of the fields.

    The architectures are blocks of convolutions, ReLU after each, and then

    - "cnn": max pooling that rounds up; dense layers; all convolutions of the same width.
    - "vgg": max pooling; dense layers; the width doubles from block to block up to `width`. The
      competition's VGG family.
    - "nin": the first convolution of a block has stride 2, the others are 1x1; dropout after each
      block; a 1x1 convolution to the classes and global average pooling. Its NiN family.

    `batch_size`, `momentum`, `weight_decay` and `stop_at_loss` are as in `sharpkit.fit`. So are
    `sam_interval`, `sam_start`, `sam_stop`, `sam_parameters`, `rho_schedule` and `rho_warmup`,
    wherever `rho` is above 0. Parts of a training are parts of all `epochs`, of which a network
    that reaches `stop_at_loss` takes fewer.

    Args:
        architecture: "cnn", "vgg" or "nin".
        width: Channels of the last block's convolutions.
        num_conv_blocks: Blocks of 3x3 convolutions.
        convs_per_block: Convolutions in a block.
        num_dense_layers: Hidden dense layers, each followed by dropout; "nin" has none.
        dense_units: Their size.
        init_gain: Factor on Glorot's initial kernels.
        dropout: Dropout rate.
        epochs: An attempt that has not reached `stop_at_loss` by then has failed.
        m: Group size of m-SAM; 0 for the whole batch.
        rho: Radius of SAM; 0 for plain SGD.
        lr: Step size in the first epoch (at batch size 16, with `scale_lr`).
        scale_lr: Whether the step size grows with the square root of the batch size.
        decay: Factor on the step size.
        decay_epochs: Epochs after which the factor applies; empty for every one.
        attempts: How often to start, each time from other random numbers, before giving up.

    Raises:
        ArgumentError: A value outside its range.
    """

    epochs: int = 600
    m: int = 0
    rho: float = 0.0
    batch_size: int = 32
    lr: float = 0.02
    weight_decay: float = 0.0
    stop_at_loss: float = 0.05

    architecture: str = "cnn"
    width: int = 16
    num_conv_blocks: int = 2
    convs_per_block: int = 1
    num_dense_layers: int = 1
    dense_units: int = 32
    init_gain: float = 1.0
    dropout: float = 0.0
    scale_lr: bool = True
    decay: float = 0.99
    decay_epochs: tuple[int, ...] = ()
    attempts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("architecture", self.architecture, ("cnn", "vgg", "nin"))
        for name, least in _LEAST.items():
            check_whole(name, getattr(self, name), least)
        check_number("stop_at_loss", self.stop_at_loss, lambda v: v > 0, "a loss > 0")  # not None
        for name in ("init_gain", "decay"):
            check_number(name, getattr(self, name), lambda v: 0 < v < math.inf, f"{name} > 0")
        check_number("dropout", self.dropout, lambda v: 0 <= v < 1, "0 <= dropout < 1")
        layers = self.num_conv_blocks * (self.convs_per_block + 2) + 2 * self.num_dense_layers
        if layers > MAX_LAYERS:
            raise ArgumentError(
                f"num_conv_blocks, convs_per_block and num_dense_layers make {layers:,} layers, "
                f"expected at most {MAX_LAYERS:,}"
            )

    def total_steps(self, examples: int) -> int:
        """Steps of a training on so many examples that takes all its epochs."""
        return self.epochs * self.steps_of_an_epoch(examples)

    def steps_of_an_epoch(self, examples: int) -> int:
        """On so many examples; the last batch may be smaller."""
        return math.ceil(examples / self.batch_size)

    def perturbed(self, examples: int, epochs: float) -> float:
        """The share of perturbed steps in the first epochs on so many examples.

        Example:
            >>> Recipe(rho=0.1, sam_start=0.5, epochs=40).perturbed(examples=320, epochs=25)
            0.2
        """
        if not self.rho:
            return 0.0
        timing = sam_timing(**self.sam_steps(self.total_steps(examples)))
        made = round(min(epochs, self.epochs) * self.steps_of_an_epoch(examples))
        return timing.share(0, max(1, made))

    def network(self, input_shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
        """The config.json of the network for inputs (h, w, c)."""
        build = {"cnn": self._cnn, "vgg": self._vgg, "nin": self._nin}[self.architecture]
        return {"model_config": build(classes), "input_shape": list(input_shape)}

    def _cnn(self, classes: int) -> list[_Layer]:
        pool = {"layer_name": "MaxPooling2D", "pool_size": 2, "padding": "same"}
        block = [_conv(self.width)] * self.convs_per_block + [pool]
        return [*block * self.num_conv_blocks, *self._dense([_dropout(self.dropout)], classes)]

    def _vgg(self, classes: int) -> list[_Layer]:
        pool = {"layer_name": "MaxPooling2D", "pool_size": 2}
        widths = [self.width >> b for b in reversed(range(self.num_conv_blocks))]
        if widths and not widths[0]:
            raise ArgumentError(f"{len(widths)} blocks cannot double up to a width of {self.width}")
        blocks = [[_conv(width)] * self.convs_per_block + [pool] for width in widths]
        return [*chain(*blocks), *self._dense(self._dropout_if_any(), classes)]

    def _nin(self, classes: int) -> list[_Layer]:
        block = [
            _conv(self.width, strides=2),
            *[_conv(self.width, size=1)] * (self.convs_per_block - 1),
            *self._dropout_if_any(),
        ]
        logits = {"layer_name": "Conv2D", "filters": classes, "kernel_size": [1, 1]}
        return [*block * self.num_conv_blocks, logits, {"layer_name": "GlobalAveragePooling2D"}]

    def _dense(self, dropout: list[_Layer], classes: int) -> list[_Layer]:
        hidden = {"layer_name": "Dense", "units": self.dense_units, "activation": "relu"}
        return [
            {"layer_name": "Flatten"},
            *[hidden, *dropout] * self.num_dense_layers,
            {"layer_name": "Dense", "units": classes},
        ]

    def _dropout_if_any(self) -> list[_Layer]:
        return [_dropout(self.dropout)] if self.dropout else []


_Layer = dict[str, Any]
_LEAST = {
    "width": 1, "num_conv_blocks": 0, "convs_per_block": 1, "num_dense_layers": 0,
    "dense_units": 1, "m": 0, "attempts": 1,
}  # fmt: skip


def _conv(filters: int, *, size: int = 3, **keywords: Any) -> _Layer:
    return {
        "layer_name": "Conv2D",
        "filters": filters,
        "kernel_size": [size, size],
        **keywords,
        "padding": "same",
        "activation": "relu",
    }


def _dropout(rate: float) -> _Layer:
    return {"layer_name": "Dropout", "rate": rate}
