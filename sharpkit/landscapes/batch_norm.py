"""BatchNorm at weights that nobody has trained: running statistics computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.errors import ModelError

STATISTICS_BATCH = 256  # examples, at most; a number of its own, since statistics depend on it


def layers_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def statistics_batches(examples: Examples) -> Iterator[Examples]:
    """The examples in batches of nearly equal size; of each shape by itself, if there are more."""
    for start, stop in examples.bounds(len(examples)):
        n = stop - start
        count = -(-n // STATISTICS_BATCH)
        for a, b in pairwise(start + n * k // count for k in range(count + 1)):
            yield examples.slice(a, b)


@torch.no_grad()
def recompute_statistics(
    function: FunctionalModel, layers: Iterable[_BatchNorm], batches: Iterable[Examples]
) -> None:
    """Set running statistics to the means over batches, at the weights that the module holds.

    The layers are in training mode meanwhile, all others stay in eval mode; the module must be
    inside `assigned`, so that its own buffers stay.
    """
    layers = list(layers)
    before = [(layer, layer.momentum, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum, layer.training = None, True  # a plain mean over batches
        for batch in batches:
            function.outputs(batch.to(function.device, function.dtype).inputs)
    except ValueError as error:  # of a layer that gets a single value per channel
        raise ModelError(
            f"BatchNorm statistics cannot be recomputed from {len(batch)} examples: {error}"
        ) from error
    finally:
        for layer, momentum, training in before:
            layer.momentum, layer.training = momentum, training
