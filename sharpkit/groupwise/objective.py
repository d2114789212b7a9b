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
from sharpkit.contract.terms import GroupForms
from sharpkit.groupwise.geometry import Tensors


@dataclass
class Objective:
    """What is measured: the loss of a functional model, and the weights that are perturbed."""

    model: FunctionalModel
    loss: MeanLoss
    weights: Tensors  # the perturbed parameters, without a group axis
    chunk: int  # examples at a time of groups side by side
    batch: int  # examples at a time of a group alone
    alone: int = sys.maxsize  # group size from which groups are evaluated one by one
    # of images and of the weights of convolutions, where groups are alone
    layout: torch.memory_format = torch.contiguous_format

    def at(self, weights: Tensors, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of one batch at the given weights, and the weight of the batch."""

        def terms() -> tuple[Tensor, Tensor]:
            return self.loss.terms(self.model.outputs(inputs), labels)

        return self.model.within(weights, terms)

    def losses(self, weights: Tensors, examples: Examples) -> tuple[Tensor, Tensor]:
        """The same for any number of examples, in batches, with the weights assigned; float64."""
        with self.model.assigned(in_layout(weights, self.layout)):
            return self.at_leaves(examples_in_layout(examples, self.layout))

    def at_leaves(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """The same at the weights that the module holds, with images in the layout to be used."""
        parts = []
        with self.model.evaluating():
            for e in examples.chunks(self.batch):
                mean, weight = self.loss.terms(self.model.outputs(e.inputs), e.labels)
                parts.append((mean.detach().double(), weight.double()))
        if len(parts) == 1:
            return parts[0]
        means, shares = (torch.stack(part) for part in zip(*parts, strict=True))
        total = shares.sum()
        return (means * shares).sum() / torch.where(total > 0, total, 1.0), total

    def gradient(self, weights: Tensors, examples: Examples) -> PlainGradient:
        """The loss and scaled gradient of any number of examples, with the weights assigned."""
        return plain_gradient(
            self.model, self.loss, weights, examples, batch=self.batch, layout=self.layout
        )


@dataclass
class PlainGradient:
    """A mean loss, its weight, and its gradient times 2^exponent, None where nothing is used.

    Scaling the slope of the loss before it enters the network keeps the gradients of nearly
    perfectly fitted examples (1e-30 and below) away from underflow.
    """

    mean: Tensor  # float64 scalar
    weight: Tensor  # float64 scalar
    gradient: Sequence[Tensor | None]  # in the order of the weights, dense
    exponent: Tensor  # float64 scalar; +inf where the loss does not depend on the outputs


def plain_gradient(
    model: FunctionalModel,
    loss: MeanLoss,
    weights: Tensors,
    examples: Examples,
    *,
    batch: int | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> PlainGradient:
    """The mean loss of examples and its gradient by ordinary autograd, in batches."""
    with model.assigned(in_layout(weights, layout)) as leaves:
        part = examples_in_layout(examples, layout)
        found = leaf_gradient(model, loss, leaves, part, batch)
    found.gradient = [
        None if g is None else model.real(name, g)
        for name, g in zip(weights, found.gradient, strict=True)
    ]
    return found


def leaf_gradient(
    model: FunctionalModel,
    loss: MeanLoss,
    leaves: Sequence[Tensor],
    examples: Examples,
    batch: int | None = None,
    *,
    scaled: bool = True,
) -> PlainGradient:
    """The same by the parameters that the module holds, with images in the layout to be used.

    With `scaled=False` the exponent is 0, which takes fewer calls.
    """
    count = len(examples)
    means: list[Tensor] = []
    shares: list[Tensor] = []
    total: list[Tensor | None] = []
    exponent: Tensor | None = None
    if not scaled:
        exponent = torch.zeros((), dtype=torch.float64, device=model.device)
    with torch.enable_grad():
        for part in examples.chunks(batch or count):
            out = model.outputs(part.inputs)
            forms = closed_forms(loss, out)
            found: Sequence[Tensor | None]
            # the first batch sets the scale of all: what is smaller by far does not matter
            if forms is not None and out.requires_grad:
                mean, weight, found, exponent = _in_closed_form(
                    forms, out, part.labels, leaves, count, exponent, scaled=scaled
                )
            else:
                mean, weight = loss.terms(out, part.labels)
                share = None if len(part) == count else (weight / count).to(mean.dtype)
                found = [None] * len(leaves)
                if scaled:
                    found, exponent = _pulled_back(
                        model, out, mean, leaves, len(part), share, exponent
                    )
                elif mean.requires_grad:
                    found = torch.autograd.grad(mean, leaves, share, allow_unused=True)
            total = _added(total, found) if means else list(found)
            means.append(mean.detach().double())
            shares.append(weight.detach().double())
    assert exponent is not None
    mean, weight = means[0], shares[0]
    if len(means) > 1:
        weight = torch.stack(shares).sum()
        divisor = torch.where(weight > 0, weight, 1.0)
        mean = (torch.stack(means) * torch.stack(shares)).sum() / divisor
        exponent = torch.where(torch.isfinite(exponent), exponent, 0.0)
        torch._foreach_mul_([g for g in total if g is not None], count / divisor)
    gradient = [g.to_dense() if g is not None and g.is_sparse else g for g in total]
    return PlainGradient(mean, weight, gradient, exponent)


def _in_closed_form(
    forms: GroupForms,
    outputs: Tensor,
    labels: Tensor,
    leaves: Sequence[Tensor],
    count: int,
    exponent: Tensor | None,
    *,
    scaled: bool,
) -> tuple[Tensor, Tensor, Sequence[Tensor | None], Tensor]:
    """Mean and weight of a batch of `count` examples, its gradient as `_pulled_back` gives it."""
    whole = len(labels) == count
    share = 1.0 if whole else labels.numel() / count
    factor: Tensor | float | None = None
    if not scaled:
        factor = share
    elif exponent is not None:
        factor = power(exponent, torch.float64).reshape(1) * share
    means, slope, own = forms.slopes(outputs.detach(), labels, 1, factor)
    if own is not None:
        exponent = own[0]
        slope = slope if whole else slope * share
    assert exponent is not None
    found = torch.autograd.grad(outputs, leaves, slope, allow_unused=True)
    return means[0], group_sizes(labels, 1)[0], found, exponent


def _pulled_back(
    model: FunctionalModel,
    outputs: Any,
    mean: Tensor,
    leaves: Sequence[Tensor],
    count: int,
    share: Tensor | None,
    exponent: Tensor | None,
) -> tuple[Sequence[Tensor | None], Tensor]:
    """The gradient of a mean over `count` examples, times 2^exponent and a share.

    Without an exponent, one is chosen by the slopes of the loss, and returned.
    """
    always = model.habits.loss_sees_weights
    if not mean.requires_grad:
        return [None] * len(leaves), scale_exponent((), mean) if exponent is None else exponent
    ends = [t for t in floating_leaves(outputs) if t.requires_grad]
    slopes: Sequence[Tensor | None] = ()
    if len(ends) == 1 and not always:  # several outputs may depend on each other
        lift = math.ceil(math.log2(count))  # a mean's divisor must not take slopes out of range
        top = torch.full_like(mean, 2.0**lift)
        (slope,) = torch.autograd.grad(mean, ends, top, allow_unused=True)
        if slope is not None:
            own = scale_exponent((slope,), mean) if exponent is None else exponent - lift
            factor = power(own, mean.dtype)
            slope = slope * (factor if share is None else factor * share)
            found = torch.autograd.grad(ends, leaves, slope, allow_unused=True)
            return found, own + lift if exponent is None else exponent
    elif ends and exponent is None:
        slopes = torch.autograd.grad(mean, ends, retain_graph=True, allow_unused=True)
    if exponent is None:
        exponent = scale_exponent((s for s in slopes if s is not None), mean, always)
    factor = power(exponent, mean.dtype)
    factor = factor if share is None else factor * share
    return torch.autograd.grad(mean, leaves, factor, allow_unused=True), exponent


def group_sizes(labels: Tensor, groups: int) -> Tensor:
    """The weights (groups,) of equally large groups of which all labels count."""
    size = labels.numel() // groups
    return torch.full((groups,), size, dtype=torch.float64, device=labels.device)


def closed_forms(loss: MeanLoss, outputs: Any) -> GroupForms | None:
    """Those of a loss, if it has any for such outputs."""
    forms = loss.formula.of_groups
    known = forms is not None and isinstance(outputs, Tensor) and forms.fit(outputs)
    return forms if known else None


def _added(total: list[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sum of two lists of gradients, out of place where a list holds one tensor twice."""
    both = [
        (i, a, b)
        for i, (a, b) in enumerate(zip(total, more, strict=True))
        if a is not None and b is not None
    ]
    result = [b if a is None else a for a, b in zip(total, more, strict=True)]
    for (i, _, _), t in zip(
        both, torch._foreach_add([a for _, a, _ in both], [b for _, _, b in both]), strict=True
    ):
        result[i] = t
    return result


def in_layout(tensors: Any, layout: torch.memory_format) -> Any:
    """Tensors, or a structure of them, with those of four axes in a layout; the same values."""
    if layout == torch.contiguous_format:
        return tensors

    def moved(t: Tensor) -> Tensor:
        if t.ndim != 4 or t.shape[1] > 1:
            return t.contiguous(memory_format=layout) if t.ndim == 4 else t
        # with one channel both layouts are the same memory, and only the strides tell
        return torch.empty_like(t, memory_format=layout).copy_(t)

    if isinstance(tensors, Tensor):
        return moved(tensors)
    if isinstance(tensors, dict):
        return {name: in_layout(t, layout) for name, t in tensors.items()}
    return pytree.tree_map(moved, tensors)


def examples_in_layout(examples: Examples, layout: torch.memory_format) -> Examples:
    """Examples whose images are in a layout; the same values."""
    if layout == torch.contiguous_format:
        return examples
    return examples.changed(lambda t: in_layout(t, layout))


def floating_leaves(outputs: Any) -> list[Tensor]:
    """The tensors of real or complex numbers in an output of any structure."""
    return [t for t in pytree.tree_leaves(outputs) if is_numbers(t)]


def is_numbers(leaf: Any) -> bool:
    """Whether a part of an output can be differentiated by."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def scale_exponent(slopes: Iterable[Tensor], mean: Tensor, always: bool = False) -> Tensor:
    """The power of two that takes the largest entry of the slopes to between 1 and 2; float64.

    It is +inf where all slopes are 0, unless the gradient has other sources (`always`).
    """
    tops = [torch.linalg.vector_norm(s, torch.inf).double() for s in slopes if s.numel()]
    if not tops:
        top = torch.zeros_like(mean, dtype=torch.float64)
    else:
        top = tops[0] if len(tops) == 1 else torch.stack(tops).amax()
    most = float(math.frexp(torch.finfo(mean.dtype).max)[1] - 2)
    exponent = (-torch.floor(torch.log2(top))).clamp(-most, most)
    usable = (top > 0) & (top < torch.inf)
    return torch.where(usable, exponent, 0.0 if always else torch.inf)


def power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent; 1 where there is nothing to scale."""
    return torch.exp2(exponent.nan_to_num(0.0, 0.0, 0.0)).to(dtype)


def grouped(examples: Examples, groups: int) -> tuple[Inputs, Tensor]:
    """The examples with a group axis in front: leaves (groups, size, ...)."""
    size = len(examples) // groups
    pair: tuple[Inputs, Tensor] = pytree.tree_map(
        lambda t: t.reshape(groups, size, *t.shape[1:]), (examples.inputs, examples.labels)
    )
    return pair
