"""The loss of all examples at the weights as they are."""

from __future__ import annotations

import math

from torch import nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.holding import frozen
from sharpkit.contract.losses import MeanLoss
from sharpkit.errors import DataError, ModelError

_BATCH = 64


def loss_of(model: nn.Module, examples: Examples, loss: MeanLoss) -> float:
    """The mean loss of a model in eval mode, each batch counted by its weight.

    Raises:
        DataError: If labels do not fit the outputs, or none counts.
        ModelError: If the loss is NaN or infinite.

    Example:
        >>> import torch
        >>> from sharpkit.contract.losses import resolve_loss
        >>> model = nn.Linear(1, 1, bias=False)
        >>> model.weight.data = torch.ones(1, 1)
        >>> examples = Examples(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        >>> loss_of(model, examples, resolve_loss("mse"))  # (1 + 9) / 2 / 2
        2.5
    """
    total = counted = 0.0
    with frozen(model):
        function = FunctionalModel(model, whole=not loss.exact)
        with function.evaluating():
            for chunk in examples.chunks(_BATCH):
                batch = chunk.to(function.device, function.dtype)
                outputs = function({}, batch.inputs)
                loss.check(outputs, batch.labels)
                mean, weight = loss.terms(outputs, batch.labels)
                total += float(mean.detach().double() * weight)
                counted += float(weight)
    if not counted > 0:
        raise DataError("no label counts in the loss: all are ignored, or weigh 0")
    if not math.isfinite(total):
        raise ModelError(f"the loss is {total / counted}: expected a finite number")
    return total / counted
