"""What is measured: a loss as a function of some weights of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.sharpness.geometry import Tensors

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Objective:
    """What is measured: the loss of a functional model, and the weights that are perturbed."""

    model: FunctionalModel
    loss: LossFn
    weights: Tensors  # without a group axis
    chunk: int  # examples evaluated at a time

    @property
    def alone(self) -> int:
        """Group size from which groups are evaluated one by one: they fill the processor alone."""
        return max(1, self.chunk // 2) if self.model.device.type == "cpu" else sys.maxsize

    def at(self, weights: Tensors, inputs: Inputs, labels: Tensor) -> Tensor:
        """The mean loss of one batch at the given weights."""
        return self.loss(self.model(weights, inputs), labels)


def grouped(examples: Examples, groups: int) -> tuple[Inputs, Tensor]:
    """The examples with a group axis in front: leaves (groups, size, ...)."""
    size = len(examples) // groups
    pair: tuple[Inputs, Tensor] = pytree.tree_map(
        lambda t: t.reshape(groups, size, *t.shape[1:]), (examples.inputs, examples.labels)
    )
    return pair
