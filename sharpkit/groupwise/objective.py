"""What is measured: a loss as a function of some weights of a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.groupwise.geometry import Tensors


@dataclass
class Objective:
    """What is measured: the loss of a functional model, and the weights that are perturbed."""

    model: FunctionalModel
    loss: MeanLoss
    weights: Tensors  # without a group axis
    chunk: int  # examples evaluated at a time

    @property
    def alone(self) -> int:
        """Group size from which groups are evaluated one by one: they fill the processor alone."""
        return max(1, self.chunk // 2) if self.model.device.type == "cpu" else sys.maxsize

    def at(self, weights: Tensors, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of one batch at the given weights, and the weight of the batch."""

        def terms() -> tuple[Tensor, Tensor]:
            return self.loss.terms(self.model.outputs(inputs), labels)

        return self.model.within(weights, terms)

    def losses(self, weights: Tensors, examples: Examples) -> tuple[Tensor, Tensor]:
        """The same for any number of examples, in chunks, with the weights assigned; float64."""
        parts = []
        with self.model.evaluating(), self.model.assigned(weights):
            for e in examples.chunks(self.chunk):
                mean, weight = self.loss.terms(self.model.outputs(e.inputs), e.labels)
                parts.append(torch.stack([mean.detach().double(), weight.double()]))
        means, shares = torch.stack(parts, 1)
        total = shares.sum()
        return (means * shares).sum() / torch.where(total > 0, total, 1.0), total

    def gradient(self, weights: Tensors, part: Examples) -> PlainGradient:
        """The loss and scaled gradient of a chunk by plain autograd, with the weights assigned."""
        return plain_gradient(self.model, self.loss, weights, part)


@dataclass
class PlainGradient:
    """A mean loss, its weight, and its gradient times 2^exponent, None where nothing is used.

    Scaling the slope of the loss before it enters the network keeps the gradients of nearly
    perfectly fitted examples (1e-30 and below) away from underflow.
    """

    mean: Tensor  # float64 scalar
    weight: Tensor  # float64 scalar
    gradient: Sequence[Tensor | None]  # in the order of the weights
    exponent: Tensor  # float64 scalar; +inf where the loss does not depend on the outputs


def plain_gradient(
    model: FunctionalModel, loss: MeanLoss, weights: Tensors, part: Examples
) -> PlainGradient:
    """As `Objective.gradient`."""
    with model.assigned(weights) as leaves, torch.enable_grad():
        out = model.outputs(part.inputs)
        mean, weight = loss.terms(out, part.labels)
        ends = [t for t in floating_leaves(out) if t.requires_grad]
        slopes: Sequence[Tensor | None] = ()
        if mean.requires_grad and ends:
            slopes = torch.autograd.grad(mean, ends, retain_graph=True, allow_unused=True)
        exponent = scale_exponent(
            (s for s in slopes if s is not None), mean, model.habits.loss_sees_weights
        )
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if mean.requires_grad:
            found = torch.autograd.grad(
                mean, leaves, power(exponent, mean.dtype), allow_unused=True
            )
    gradient = [
        None if g is None else model.real(name, g.to_dense() if g.is_sparse else g)
        for name, g in zip(weights, found, strict=True)
    ]
    return PlainGradient(mean.detach().double(), weight.detach().double(), gradient, exponent)


def floating_leaves(outputs: Any) -> list[Tensor]:
    """The tensors of real or complex numbers in an output of any structure."""
    leaves = pytree.tree_leaves(outputs)
    return [
        t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    ]


def scale_exponent(slopes: Iterable[Tensor], mean: Tensor, always: bool = False) -> Tensor:
    """The power of two that takes the largest entry of the slopes to between 1 and 2; float64.

    It is +inf where all slopes are 0, unless the gradient has other sources (`always`).
    """
    tops = [s.abs().amax().double() for s in slopes if s.numel()]
    top = torch.stack(tops).amax() if tops else torch.zeros_like(mean, dtype=torch.float64)
    most = float(math.frexp(torch.finfo(mean.dtype).max)[1] - 2)
    exponent = (-torch.floor(torch.log2(top))).clamp(-most, most)
    usable = (top > 0) & torch.isfinite(top)
    return torch.where(usable, exponent, 0.0 if always else torch.inf)


def power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent; 1 where there is nothing to scale."""
    return torch.exp2(torch.where(torch.isfinite(exponent), exponent, 0.0)).to(dtype)


def grouped(examples: Examples, groups: int) -> tuple[Inputs, Tensor]:
    """The examples with a group axis in front: leaves (groups, size, ...)."""
    size = len(examples) // groups
    pair: tuple[Inputs, Tensor] = pytree.tree_map(
        lambda t: t.reshape(groups, size, *t.shape[1:]), (examples.inputs, examples.labels)
    )
    return pair
