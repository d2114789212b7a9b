"""How one network of a zoo is built and trained: a recipe and a seed decide every weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sharpkit.contract.losses import cross_entropy
from sharpkit.doors import MAX_LAYERS
from sharpkit.errors import ArgumentError, ModelError
from sharpkit.training.sam import SAM
from sharpkit.zoo.keras import KerasModel, build_model


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how one model is built and trained; a grid varies any of the fields.

    The architectures are blocks of convolutions, ReLU after each, and then

    - "cnn": max pooling that rounds up; dense layers; all convolutions of the same width.
    - "vgg": max pooling; dense layers; the width doubles from block to block up to `width`. The
      competition's VGG family.
    - "nin": the first convolution of a block has stride 2, the others are 1x1; dropout after each
      block; a 1x1 convolution to the classes and global average pooling. Its NiN family.

    Where `sharpkit.fit` calls the same thing otherwise, its name is in brackets.

    Args:
        architecture: "cnn", "vgg" or "nin".
        width: Channels of the last block's convolutions.
        num_conv_blocks: Blocks of 3x3 convolutions.
        convs_per_block: Convolutions in a block.
        num_dense_layers: Hidden dense layers, each followed by dropout; "nin" has none.
        dense_units: Their size.
        init_gain: Factor on Glorot's initial kernels.
        dropout: Dropout rate.
        weight_decay: L2 coefficient of SGD.
        batch_size: Examples in a step.
        learning_rate: Step size in the first epoch (at batch size 16, with
            `scale_learning_rate`) [lr].
        scale_learning_rate: Whether the step size grows with the square root of the batch size.
        momentum: Momentum of SGD.
        decay: Factor on the step size.
        decay_epochs: Epochs after which the factor applies; empty for every one.
        rho: Radius of SAM; 0 for plain SGD [optimizer="sgd"].
        m: Group size of m-SAM; 0 for the whole batch.
        target_loss: Training stops after the first epoch with at most this training loss
            [stop_at_loss].
        max_epochs: An attempt that has not reached the target by then has failed.
        attempts: How often to start, each time from other random numbers, before giving up.

    Raises:
        ArgumentError: A value outside its range.
    """

    architecture: str = "cnn"
    width: int = 16
    num_conv_blocks: int = 2
    convs_per_block: int = 1
    num_dense_layers: int = 1
    dense_units: int = 32
    init_gain: float = 1.0
    dropout: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    learning_rate: float = 0.02
    scale_learning_rate: bool = True
    momentum: float = 0.9
    decay: float = 0.99
    decay_epochs: tuple[int, ...] = ()
    rho: float = 0.0
    m: int = 0
    target_loss: float = 0.05
    max_epochs: int = 600
    attempts: int = 4

    def __post_init__(self) -> None:
        if self.architecture not in ("cnn", "vgg", "nin"):
            raise ArgumentError(
                f"architecture is {self.architecture!r}, expected 'cnn', 'vgg' or 'nin'"
            )
        for name, least in _LEAST.items():
            if not least <= getattr(self, name) < math.inf:
                raise ArgumentError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name, most in (("dropout", 1), ("momentum", 1), ("decay", math.inf)):
            if not getattr(self, name) < most:
                raise ArgumentError(f"{name} is {getattr(self, name)}, expected less than {most}")
        for name in ("init_gain", "learning_rate", "decay", "target_loss"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}, expected more than 0")
        layers = self.num_conv_blocks * (self.convs_per_block + 2) + 2 * self.num_dense_layers
        if layers > MAX_LAYERS:
            raise ArgumentError(
                f"num_conv_blocks, convs_per_block and num_dense_layers make {layers:,} layers, "
                f"expected at most {MAX_LAYERS:,}"
            )

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
    "width": 1,
    "num_conv_blocks": 0,
    "convs_per_block": 1,
    "num_dense_layers": 0,
    "dense_units": 1,
    "dropout": 0,
    "weight_decay": 0,
    "batch_size": 1,
    "momentum": 0,
    "rho": 0,
    "m": 0,
    "max_epochs": 1,
    "attempts": 1,
}


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


@dataclass(frozen=True)
class TrainedModel:
    """A finished model, in types that pass between processes by value.

    Args:
        config: Its config.json.
        initial: Parameter name to value before training.
        final: The same after training.
        metrics: Accuracies, losses, the number of epochs and the attempt, from 0.
    """

    config: dict[str, Any]
    initial: dict[str, NDArray[np.float32]]
    final: dict[str, NDArray[np.float32]]
    metrics: dict[str, float]


def train_model(
    recipe: Recipe,
    train: TensorDataset,
    test: TensorDataset,
    *,
    seed: tuple[int, ...] = (0,),
    shipped_test: int | None = None,
    device: str | torch.device = "cpu",
) -> TrainedModel:
    """Train one network until its training loss is at most the recipe's target.

    Initialisation, order of the examples and dropout have a random stream each, derived from the
    seed and the attempt; one thread computes, so the weights are the same in every process on one
    machine. The caller's random state stays.

    Args:
        recipe: Architecture and training.
        train: Inputs (n, c, h, w) float32 and labels (n,) int64 to fit.
        test: The same for `test_acc` and `test_loss`.
        seed: Any number of non-negative integers.
        shipped_test: `shipped_test_acc` is the accuracy on that many test examples, from the first.
        device: Where to train.

    Returns:
        TrainedModel: Config, weights before and after training, metrics.

    Raises:
        ModelError: Every attempt diverged or missed the target within `max_epochs`.
        ZooFormatError: The recipe gives no valid network.

    Example:
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
        >>> data = TensorDataset(x, y)
        >>> model = train_model(Recipe(width=4, batch_size=4, target_loss=0.7), data, data)
        >>> model.metrics["train_loss"] <= 0.7
        True
    """
    (x, y), (test_x, test_y) = ([t.to(device) for t in d.tensors] for d in (train, test))
    config = recipe.network((x.shape[2], x.shape[3], x.shape[1]), int(y.max()) + 1)
    with _one_thread(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for attempt in range(recipe.attempts):
            try:
                model, initial, epochs = _attempt(config, recipe, x, y, (*seed, attempt))
                break
            except ModelError:
                if attempt == recipe.attempts - 1:
                    raise
        train_loss, train_acc = _evaluate(model, x, y)
        test_loss, test_acc = _evaluate(model, test_x, test_y)
        _, shipped_acc = _evaluate(model, test_x[:shipped_test], test_y[:shipped_test])
    metrics = {
        "train_acc": train_acc,
        "test_acc": test_acc,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "shipped_test_acc": shipped_acc,
        "epochs": epochs,
        "attempt": attempt,
    }
    return TrainedModel(config, initial, _state(model), metrics)


def _attempt(
    config: dict[str, Any], recipe: Recipe, x: Tensor, y: Tensor, seed: tuple[int, ...]
) -> tuple[KerasModel, dict[str, NDArray[np.float32]], int]:
    """The trained network, its initial weights and the number of epochs."""
    seeds = np.random.SeedSequence(seed).generate_state(3, np.uint64).tolist()
    torch.manual_seed(seeds[0])  # dropout draws from the global generator
    model = build_model(config)
    _initialise(model, recipe.init_gain, torch.Generator().manual_seed(seeds[1]))
    initial = _state(model)
    model.to(x.device)
    return model, initial, _fit(model, recipe, x, y, torch.Generator().manual_seed(seeds[2]))


def _state(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.cpu().numpy().copy() for name, tensor in model.state_dict().items()}


def _initialise(model: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Glorot-uniform kernels, zero biases, on the float16 grid so that the file compresses."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p, gain, generator=generator)
                p.copy_(p.half())
            else:
                p.zero_()


def _fit(model: nn.Module, recipe: Recipe, x: Tensor, y: Tensor, shuffle: torch.Generator) -> int:
    """SGD or SAM until the training loss is at most the target; the number of epochs."""
    optimizer, schedule = _optimizer(model, recipe)
    loss = math.inf
    for epoch in range(1, recipe.max_epochs + 1):
        model.train()
        for batch in torch.split(torch.randperm(len(x), generator=shuffle), recipe.batch_size):
            if isinstance(optimizer, SAM):
                optimizer.step_batch(model, x[batch], y[batch], m=recipe.m or recipe.batch_size)
            else:
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(x[batch]), y[batch]))
                optimizer.step()
        schedule.step()
        loss, _ = _evaluate(model, x, y)
        if not math.isfinite(loss):
            raise ModelError(f"training diverged: the loss is {loss} after epoch {epoch}")
        if loss <= recipe.target_loss:
            return epoch
    raise ModelError(
        f"training loss {loss:.3g} after {recipe.max_epochs} epochs; target {recipe.target_loss}"
    )


def _optimizer(
    model: nn.Module, recipe: Recipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    scale = math.sqrt(recipe.batch_size / 16) if recipe.scale_learning_rate else 1.0
    settings: dict[str, Any] = {
        "lr": recipe.learning_rate * scale,
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
    }
    parameters, sgd = model.parameters(), torch.optim.SGD
    optimizer: torch.optim.Optimizer = (
        SAM(parameters, sgd, rho=recipe.rho, **settings)
        if recipe.rho
        else sgd(parameters, **settings)
    )
    schedules = torch.optim.lr_scheduler
    if recipe.decay_epochs:
        return optimizer, schedules.MultiStepLR(optimizer, recipe.decay_epochs, recipe.decay)
    return optimizer, schedules.ExponentialLR(optimizer, recipe.decay)


@torch.no_grad()
def _evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in eval mode."""
    model.eval()
    logits = torch.cat([model(part) for part in torch.split(x, 1000)])
    accuracy = (logits.argmax(1) == y).double().mean().item()
    return cross_entropy(logits.double(), y).item(), accuracy


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread inside: sums then have the same order in every process."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
