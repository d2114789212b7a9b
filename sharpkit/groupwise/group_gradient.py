"""Losses and gradients of groups by torch.func: of each under vmap, or from all their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.groupwise import low_rank
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.geometry import Factors, Tensors
from sharpkit.groupwise.objective import (
    closed_forms,
    group_sizes,
    is_numbers,
    power,
    scale_exponent,
)


class GroupGradient(NamedTuple):
    """What `group_gradient` finds for a group; with a leading axis of groups outside vmap."""

    mean: Tensor  # float64
    weight: Tensor  # float64
    dense: Tensors  # gradients times 2^exponent
    layer_inputs: dict[str, list[Tensor]]  # of every call of a factored layer
    deltas: dict[str, list[Tensor]]  # the gradients at their outputs, times 2^exponent
    exponent: Tensor  # float64; +inf where the loss does not depend on the outputs
    noted: Any  # what `recording` gave


def group_gradient(
    model: FunctionalModel,
    loss: MeanLoss,
    dense: Tensors,
    factored: Tensors,
    shapes: Mapping[str, Sequence[torch.Size]],
    inputs: Inputs,
    labels: Tensor,
    recording: Callable[[], AbstractContextManager[Any]] = lambda: nullcontext({}),
    fixed: Tensors | None = None,
) -> GroupGradient:
    """The loss of a group and its gradient by torch.func, to be called under vmap over groups.

    The slope of the loss is scaled to about 1 before it enters the network, so that the gradients
    of nearly perfectly fitted examples do not underflow; their direction is what counts. `shapes`
    are those of the outputs of every call of the factored layers; `recording` is entered around the
    forward pass, and what it gives is returned as `noted`; `fixed` are values of other parameters
    and buffers.
    """
    probes = {
        name: [torch.zeros(s, device=model.device, dtype=model.dtype) for s in shapes[name]]
        for name in factored
    }

    def mean_loss(dense: Tensors, probes: dict[str, list[Tensor]]) -> tuple[Tensor, Any]:
        layer_inputs: dict[str, list[Tensor]] = {name: [] for name in factored}

        def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
            if call >= len(probes[name]) or out.shape != probes[name][call].shape:
                raise Disagreement("a layer is called otherwise than it was at first")
            layer_inputs[name].append(layer_input)
            return out + probes[name][call]

        def body() -> tuple[Tensor, Tensor, Any, Any]:
            with recording() as noted:
                out = model.outputs(inputs)
            return (*loss.terms(out, labels), out, noted)

        with low_rank.Calls(factored, rule) as calls:
            values = {**(fixed or {}), **dense, **calls.stand_ins}
            mean, weight, out, noted = model.within(values, body)
        if any(len(layer_inputs[name]) != len(probes[name]) for name in factored):
            raise Disagreement("a layer is called otherwise than it was at first")
        return mean, (weight, out, layer_inputs, noted)

    mean, pull, (weight, out, layer_inputs, noted) = vjp(  # type: ignore[misc]
        mean_loss, dense, probes, has_aux=True
    )
    exponent = scale_exponent(loss_slopes(loss, out, labels), mean, model.habits.loss_sees_weights)
    with torch.no_grad():  # else torch.func records the backward pass for a second derivative
        found, deltas = pull(power(exponent, mean.dtype), retain_graph=False)
    return GroupGradient(
        mean.double(), weight.double(), found, layer_inputs, deltas, exponent, noted
    )


def joined_factors(found: GroupGradient) -> Factors:
    """A and D of every factored layer: the rows of all its calls, (groups, rows, features)."""
    groups = len(found.mean)

    def rows(calls: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(groups, -1, t.shape[-1]) for t in calls], 1)

    return {
        name: (rows(found.layer_inputs[name]), rows(found.deltas[name]))
        for name in found.layer_inputs
    }


def loss_slopes(loss: MeanLoss, outputs: Any, labels: Tensor) -> list[Tensor]:
    """The derivatives of the mean loss by every tensor of real numbers in the outputs."""
    leaves, spec = pytree.tree_flatten(outputs)
    where = [i for i, leaf in enumerate(leaves) if is_numbers(leaf)]

    def mean(ends: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for i, end in zip(where, ends, strict=True):
            filled[i] = end
        return loss(pytree.tree_unflatten(filled, spec), labels)

    slopes: list[Tensor] = grad(mean)([leaves[i] for i in where])
    return slopes


class GroupTerms(NamedTuple):
    """Per group, float64: mean losses, their weights, and the power of two in the slopes."""

    mean: Tensor
    weight: Tensor
    exponent: Tensor  # +inf where the loss does not depend on the outputs
    slopes: list[Tensor]  # 2^exponent times the derivative by every tensor of numbers, (n, ...)


def group_losses(
    loss: MeanLoss, outputs: Any, labels: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Mean losses and weights, (groups,) float64, of outputs with examples on the first axis."""
    forms = closed_forms(loss, outputs)
    if forms is not None:
        return forms.means(outputs, labels, groups).double(), group_sizes(labels, groups)
    if groups == 1:
        mean, weight = (t.unsqueeze(0) for t in loss.terms(outputs, labels))
        return mean.double(), weight.double()
    grouped = pytree.tree_map(lambda t: _grouped(t, groups), outputs)
    mean, weight = vmap(loss.terms)(grouped, _grouped(labels, groups))
    return mean.double(), weight.double()


def group_slopes(loss: MeanLoss, outputs: Any, labels: Tensor, groups: int) -> GroupTerms:
    """The same with the derivatives by the outputs, scaled so that they do not underflow."""
    forms = closed_forms(loss, outputs)
    if forms is not None:
        mean, slope, exponent = forms.slopes(outputs.detach(), labels, groups, None)
        assert exponent is not None
        return GroupTerms(mean.double(), group_sizes(labels, groups), exponent, [slope])
    leaves, spec = pytree.tree_flatten(outputs)
    where = [i for i, leaf in enumerate(leaves) if is_numbers(leaf)]
    grouped = [
        _grouped(leaf.detach(), groups) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]

    dtypes = [grouped[i].dtype.to_real() for i in where] or [torch.float32]
    most = min(math.frexp(torch.finfo(dtype).max)[1] for dtype in dtypes)
    # softplus multiplies by e^80 < 2^116 on its way back (see `contract.surprise`)
    lift = max(0, min(most // 2, most - 116))

    def one(ends: list[Tensor], labels: Tensor, rest: list[Any]) -> tuple[Any, ...]:
        def mean_loss(ends: list[Tensor]) -> tuple[Tensor, Tensor]:
            filled = list(rest)
            for i, end in zip(where, ends, strict=True):
                filled[i] = end
            return loss.terms(pytree.tree_unflatten(filled, spec), labels)

        mean, pull, weight = vjp(mean_loss, ends, has_aux=True)  # type: ignore[misc]
        # far from underflow as they are made, and near 1 as they enter the network
        (large,) = pull(torch.full_like(mean, 2.0**lift))
        further = scale_exponent(large, mean)
        factor = power(further, mean.dtype)
        slopes = [s * factor for s in large]
        return mean.double(), weight.double(), further + lift, slopes

    rest = [None if i in where else leaf for i, leaf in enumerate(grouped)]
    axes = ([0] * len(where), 0, [0 if isinstance(leaf, Tensor) else None for leaf in rest])
    with torch.no_grad():
        found = vmap(one, axes)([grouped[i] for i in where], _grouped(labels, groups), rest)
    mean, weight, exponent, slopes = found
    return GroupTerms(mean, weight, exponent, [s.flatten(0, 1) for s in slopes])


def pulled_back(
    loss: MeanLoss,
    outputs: Any,
    labels: Tensor,
    shares: Tensor,
    scale: Callable[[Tensor], Tensor],
    ends: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The sum of groups' losses times their shares (groups,), and its scaled gradient by `ends`."""
    forms, groups = closed_forms(loss, outputs), len(shares)
    if forms is None or not outputs.requires_grad:
        means, _ = group_losses(loss, outputs, labels, groups)
        total = (means * shares).sum()
        return total.detach(), torch.autograd.grad(scale(total), ends, allow_unused=True)
    means, slopes, _ = forms.slopes(outputs.detach(), labels, groups, scale(shares))
    total = (means.double() * shares).sum()
    return total, torch.autograd.grad(outputs, ends, slopes, allow_unused=True)


def _grouped(tensor: Any, groups: int) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.reshape(groups, -1, *tensor.shape[1:])
