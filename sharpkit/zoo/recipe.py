"""How one network of a zoo is built and trained: a recipe and a seed decide every weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sharpkit.errors import ModelError
from sharpkit.functional import cross_entropy
from sharpkit.zoo.keras import KerasModel, build_model


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how one model is built and trained; a grid varies any of the fields.

    Args:
        width: Channels of every convolution.
        num_conv_blocks: Blocks of 3x3 convolutions, each followed by 2x2 max pooling that rounds
            up.
        convs_per_block: Convolutions in a block.
        num_dense_layers: Hidden dense layers, each followed by dropout.
        dense_units: Their size.
        init_gain: Factor on Glorot's initial kernels.
        dropout: Dropout rate.
        weight_decay: L2 coefficient of SGD.
        batch_size: Examples in a step.
        learning_rate: Step size in the first epoch at batch size 16; it grows with the square root
            of the batch size.
        momentum: Momentum of SGD.
        decay: Factor on the step size from one epoch to the next.
        target_loss: Training stops after the first epoch with at most this training loss.
        max_epochs: An attempt that has not reached the target by then has failed.
        attempts: How often to start, each time from other random numbers, before giving up.
    """

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
    momentum: float = 0.9
    decay: float = 0.99
    target_loss: float = 0.05
    max_epochs: int = 600
    attempts: int = 4

    def network(self, input_shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
        """The config.json of the network for inputs (h, w, c)."""
        conv = {
            "layer_name": "Conv2D",
            "filters": self.width,
            "kernel_size": [3, 3],
            "padding": "same",
            "activation": "relu",
        }
        dense = {"layer_name": "Dense", "units": self.dense_units, "activation": "relu"}
        block = [conv] * self.convs_per_block + [
            {"layer_name": "MaxPooling2D", "pool_size": 2, "padding": "same"}
        ]
        hidden = [dense, {"layer_name": "Dropout", "rate": self.dropout}]
        layers = [
            *block * self.num_conv_blocks,
            {"layer_name": "Flatten"},
            *hidden * self.num_dense_layers,
            {"layer_name": "Dense", "units": classes},
        ]
        return {"model_config": layers, "input_shape": list(input_shape)}


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
    (x, y), (test_x, test_y) = train.tensors, test.tensors
    config = recipe.network((x.shape[2], x.shape[3], x.shape[1]), int(y.max()) + 1)
    with _one_thread(), torch.random.fork_rng(devices=[]):
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
    return model, initial, _fit(model, recipe, x, y, torch.Generator().manual_seed(seeds[2]))


def _state(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


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
    """SGD until the training loss is at most the target; the number of epochs."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate * math.sqrt(recipe.batch_size / 16),
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, recipe.decay)
    loss = math.inf
    for epoch in range(1, recipe.max_epochs + 1):
        model.train()
        for batch in torch.split(torch.randperm(len(x), generator=shuffle), recipe.batch_size):
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
