"""Training of one network of a zoo: a recipe and a seed decide every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sharpkit.contract.losses import cross_entropy
from sharpkit.errors import ModelError
from sharpkit.training.sam import SAM
from sharpkit.training.sam_groups import sam_groups, selection_of
from sharpkit.workers.threads import limited_threads
from sharpkit.zoo.keras import KerasModel, build_model
from sharpkit.zoo_training.recipe import Recipe


@dataclass(frozen=True)
class TrainedModel:
    """A finished model, in types that pass between processes by value."""

    config: dict[str, Any]  # its config.json
    initial: dict[str, NDArray[np.float32]]  # parameter name to value before training
    final: dict[str, NDArray[np.float32]]  # the same after training
    # accuracies, losses, the number of epochs, the attempt, from 0; of SAM, the perturbed steps
    metrics: dict[str, float]


# names of the metrics
METRICS = (
    *("train_acc", "test_acc", "train_loss", "test_loss", "shipped_test_acc"),
    *("epochs", "attempt"),
)


def train_model(
    recipe: Recipe,
    train: TensorDataset,
    test: TensorDataset,
    *,
    seed: tuple[int, ...] = (0,),
    shipped_test: int | None = None,
    device: str | torch.device = "cpu",
) -> TrainedModel:
    """Train one network until its training loss is at most the recipe's `stop_at_loss`.

    Initialisation, order of the examples and dropout have a random stream each, derived from the
    seed and the attempt; one thread computes, so the weights are the same in every process on one
    machine. The caller's random state stays.

    Args:
        seed: Any number of non-negative integers.
        shipped_test: `shipped_test_acc` is the accuracy on that many test examples, from the first.

    Returns:
        TrainedModel: Config, weights before and after training, metrics.

    Raises:
        ModelError: Every attempt diverged or missed the target within `epochs`.
        ZooFormatError: The recipe gives no valid network.

    Example:
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
        >>> data = TensorDataset(x, y)
        >>> model = train_model(Recipe(width=4, batch_size=4, stop_at_loss=0.7), data, data)
        >>> model.metrics["train_loss"] <= 0.7
        True
    """
    (x, y), (test_x, test_y) = ([t.to(device) for t in d.tensors] for d in (train, test))
    config = recipe.network((x.shape[2], x.shape[3], x.shape[1]), int(y.max()) + 1)
    with limited_threads(1), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for attempt in range(recipe.attempts):
            try:
                start = begin(config, recipe, (*seed, attempt))
                epochs = _fit(start.model.to(x.device), recipe, x, y, start.order)
                break
            except ModelError:
                if attempt == recipe.attempts - 1:
                    raise
        metrics = final_metrics(start.model, (x, y), (test_x, test_y), shipped_test)
    metrics |= {"epochs": epochs, "attempt": attempt} | sam_metrics(recipe, len(x), epochs)
    return TrainedModel(config, start.initial, state_of(start.model), metrics)


@dataclass(frozen=True)
class Start:
    """A network before its first step; torch's global state draws its dropout masks.

    Args:
        model: On the CPU.
        initial: Its weights.
        order: Draws the order of the examples in every epoch.
    """

    model: KerasModel
    initial: dict[str, NDArray[np.float32]]
    order: torch.Generator


def begin(config: dict[str, Any], recipe: Recipe, seed: tuple[int, ...]) -> Start:
    """The network of an attempt, and torch's global state set to what it draws from."""
    seeds = np.random.SeedSequence(seed).generate_state(3, np.uint64).tolist()
    torch.manual_seed(seeds[0])  # dropout draws from the global generator
    model = build_model(config)
    _initialise(model, recipe.init_gain, torch.Generator().manual_seed(seeds[1]))
    return Start(model, state_of(model), torch.Generator().manual_seed(seeds[2]))


def final_metrics(
    model: KerasModel,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    shipped_test: int | None,
) -> dict[str, float]:
    """Accuracies and losses of a finished network, on inputs and labels of its device."""
    train_loss, train_acc = _evaluate(model, *train)
    test_loss, test_acc = _evaluate(model, *test)
    _, shipped_acc = _evaluate(model, *(t[:shipped_test] for t in test))
    return {
        "train_acc": train_acc,
        "test_acc": test_acc,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "shipped_test_acc": shipped_acc,
    }


def sam_metrics(recipe: Recipe, examples: int, epochs: int) -> dict[str, float]:
    """What is recorded of SAM: the share of the steps made that were perturbed."""
    return {"perturbed": recipe.perturbed(examples, epochs)} if recipe.rho else {}


def state_of(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Parameters and buffers by name, copied."""
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
    optimizer, schedule = optimizer_of(model, recipe, len(x))
    for epoch in range(1, recipe.epochs + 1):
        loss = train_epoch(model, optimizer, recipe, x, y, shuffle)
        schedule.step()
        if reached(recipe, loss, epoch):
            return epoch
    raise AssertionError("the last epoch decides")


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    shuffle: torch.Generator,
) -> float:
    """Steps over all examples in a new order; the training loss after them."""
    model.train()
    for batch in torch.split(torch.randperm(len(x), generator=shuffle), recipe.batch_size):
        if isinstance(optimizer, SAM):
            optimizer.step_batch(model, x[batch], y[batch], m=recipe.m or recipe.batch_size)
        else:
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()
    loss, _ = _evaluate(model, x, y)
    return loss


def reached(recipe: Recipe, loss: float, epoch: int) -> bool:
    """Whether a training loss after an epoch is at most the target.

    Raises:
        ModelError: The loss is not finite, or this was the last epoch.
    """
    if not math.isfinite(loss):
        raise ModelError(f"training diverged: the loss is {loss} after epoch {epoch}")
    if loss > recipe.stop_at_loss and epoch == recipe.epochs:
        raise ModelError(
            f"training loss {loss:.3g} after {recipe.epochs} epochs; target {recipe.stop_at_loss}"
        )
    return loss <= recipe.stop_at_loss


def optimizer_of(
    model: nn.Module, recipe: Recipe, examples: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What makes the steps of a recipe on so many examples, and changes their size every epoch."""
    scale = math.sqrt(recipe.batch_size / 16) if recipe.scale_lr else 1.0
    settings: dict[str, Any] = {
        "lr": recipe.lr * scale,
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
    }
    sgd = torch.optim.SGD
    optimizer: torch.optim.Optimizer
    if recipe.rho:
        groups = sam_groups(model, selection_of(recipe.sam_parameters))
        timing = recipe.sam_steps(recipe.total_steps(examples))
        optimizer = SAM(groups, sgd, rho=recipe.rho, **timing, **settings)
    else:
        optimizer = sgd(model.parameters(), **settings)
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
