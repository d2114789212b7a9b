"""How long an epoch of networks takes: some are trained for a moment, on random images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sharpkit.workers.threads import limited_threads
from sharpkit.zoo_training.cost_counts import DataSizes
from sharpkit.zoo_training.model import begin, optimizer_of, train_epoch
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.stacked_state import Job, Stack

_FIRST_FLOPS = 1e10  # of the first, smallest epoch: a second at most, on one thread
_STILL = 1e-9  # a step size at which weights stay what they are

Epoch = Callable[[], object]


def epoch_seconds(
    recipe: Recipe,
    data: DataSizes,
    stack: int,
    *,
    flops: float,
    device: torch.device,
    seconds: float,
) -> tuple[float, int]:
    """Seconds of an epoch of one network, with the evaluation that ends it; all steps alike.

    Time on a CPU is that of its one thread, whatever else runs; on a GPU, wall time.

    Args:
        recipe: What the networks share.
        data: How much there is to fit.
        stack: Networks at a time; 1 for a network alone.
        flops: Operations of an example in an epoch.
        device: Where to train.
        seconds: What an epoch that is timed should take, about.

    Returns:
        tuple: Seconds, and the examples of the epoch that was timed; with fewer than the data have,
        its time is taken in proportion.
    """
    still = replace(recipe, lr=_STILL)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def prepared(size: int) -> Epoch:
        x, y = _images(size, data, device)
        return _alone(still, data, x, y) if stack == 1 else _stacked(still, x, y, stack)

    least = min(recipe.batch_size, data.train, math.ceil(_FIRST_FLOPS / (stack * flops)))
    with limited_threads(1):
        took, size = timed(prepared, data.train, least, seconds, clock)
    return took * data.train / size / stack, size


def timed(
    prepared: Callable[[int], Epoch],
    n: int,
    least: int,
    seconds: float,
    clock: Callable[[], float],
) -> tuple[float, int]:
    """Seconds of an epoch over more and more examples, until one takes long enough or has all.

    Args:
        prepared: Gives the epoch over so many examples; a first one of each size is not timed.
        n: All examples.
        least: Examples of the first.
        seconds: Half of it is long enough.
        clock: Tells the time.

    Returns:
        tuple: Seconds of the last, and its examples.
    """
    size = least
    while True:
        epoch = prepared(size)
        epoch()
        began = clock()
        epoch()
        took = clock() - began
        if size == n or took >= seconds / 2:
            return took, size
        size = min(n, max(2 * size, int(size * seconds / max(took, 1e-6))))


def _images(size: int, data: DataSizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ones, with the last class among their labels."""
    x = torch.rand(size, *data.shape, generator=torch.Generator().manual_seed(0))
    y = (data.classes - 1 - torch.arange(size)) % data.classes
    return x.to(device), y.to(device)


def _alone(recipe: Recipe, data: DataSizes, x: Tensor, y: Tensor) -> Epoch:
    start = begin(recipe.network(data.input_shape, data.classes), recipe, (0,))
    model = start.model.to(x.device)
    optimizer, _ = optimizer_of(model, recipe, len(x))
    return lambda: train_epoch(model, optimizer, recipe, x, y, start.order)


def _stacked(recipe: Recipe, x: Tensor, y: Tensor, count: int) -> Epoch:
    stack = Stack(recipe, x, y, count)
    stack.add([(Job(str(i), recipe, (0, i)), 0) for i in range(count)])
    return stack.epoch
