"""The gradients of all base groups of a chunk, by vmap or one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.sharpness import low_rank
from sharpkit.sharpness.blocks import Blocks, concatenated, stacked
from sharpkit.sharpness.fallback import Disagreement
from sharpkit.sharpness.geometry import Factors, Tensors
from sharpkit.sharpness.objective import Objective, grouped, power, scale_exponent


class GradientPass:
    """Per-block gradients at the unperturbed weights.

    Args:
        objective: What is measured.
        factored: Names of linear weights whose gradient is kept as factors.
        losses_only: Skip the gradients.
    """

    def __init__(
        self, objective: Objective, factored: frozenset[str], *, losses_only: bool = False
    ) -> None:
        self.objective, self.losses_only = objective, losses_only
        self.dense = {k: w for k, w in objective.weights.items() if k not in factored}
        self.factored = {k: w for k, w in objective.weights.items() if k in factored}
        self._shapes: dict[int, dict[str, list[torch.Size]]] = {}

    def __call__(self, examples: Examples, size: int) -> Blocks:
        """Gradients of consecutive blocks of `size` examples each."""
        count = len(examples) // size
        if not self.factored and (count == 1 or size >= self.objective.alone):
            return stacked(
                [
                    block_at(
                        self.objective,
                        self.objective.weights,
                        examples.slice(i * size, (i + 1) * size),
                        losses_only=self.losses_only,
                    )
                    for i in range(count)
                ]
            )
        found = vmap(lambda x, y: self._block(x, y, size))(*grouped(examples, count))
        return Blocks(
            size, found.mean, found.weight, found.dense, joined_factors(found), found.exponent
        )

    def _block(self, inputs: Inputs, labels: Tensor, size: int) -> GroupGradient:
        f = self.objective
        if self.losses_only:
            with f.model.evaluating():
                loss, weight = f.at(f.weights, inputs, labels)
            loss = loss.double()
            return GroupGradient(loss, weight.double(), {}, {}, {}, torch.zeros_like(loss), {})
        shapes = self._output_shapes(inputs, size)
        return group_gradient(f.model, f.loss, self.dense, self.factored, shapes, inputs, labels)

    def _output_shapes(self, inputs: Inputs, size: int) -> dict[str, list[torch.Size]]:
        """Shapes of the factored layers' outputs for one block, from a forward pass of its own."""
        if not self.factored:
            return {}
        if size not in self._shapes:
            shapes: dict[str, list[torch.Size]] = {name: [] for name in self.factored}

            def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
                shapes[name].append(out.shape)
                return out

            f = self.objective
            with f.model.evaluating(), low_rank.Calls(self.factored, rule) as calls:
                f.model({**f.weights, **calls.stand_ins}, inputs)
            self._shapes[size] = shapes
        return self._shapes[size]


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
) -> GroupGradient:
    """The loss of a group and its gradient by torch.func, to be called under vmap over groups.

    The slope of the loss is scaled to about 1 before it enters the network, so that the gradients
    of nearly perfectly fitted examples do not underflow; their direction is what counts.

    Args:
        model: The model.
        loss: The loss.
        dense: Weights whose gradient is wanted.
        factored: Linear weights whose gradient is wanted as factors.
        shapes: Of the outputs of every call of the factored layers.
        inputs: Of the group.
        labels: Of the group.
        recording: Entered around the forward pass; what it gives is returned as `noted`.
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
            mean, weight, out, noted = model.within({**dense, **calls.stand_ins}, body)
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


def block_at(
    objective: Objective, weights: Tensors, examples: Examples, *, losses_only: bool = False
) -> Blocks:
    """One block of any size at the given weights by plain autograd, in slices of a chunk."""
    if losses_only:
        loss, weight = (t.unsqueeze(0) for t in objective.losses(weights, examples))
        return Blocks(len(examples), loss, weight, {}, {}, torch.zeros_like(loss))
    total: Blocks | None = None
    for part in examples.chunks(objective.chunk):
        found = objective.gradient(weights, part)
        tensors = {
            name: (torch.zeros_like(w) if g is None else g).unsqueeze(0)
            for (name, w), g in zip(weights.items(), found.gradient, strict=True)
        }
        loss, weight, exponent = (
            t.unsqueeze(0) for t in (found.mean, found.weight, found.exponent)
        )
        block = Blocks(len(part), loss, weight, tensors, {}, exponent)
        total = block if total is None else concatenated(total, block)
    assert total is not None
    return total


def loss_slopes(loss: MeanLoss, outputs: Any, labels: Tensor) -> list[Tensor]:
    """The derivatives of the mean loss by every tensor of real numbers in the outputs."""
    leaves, spec = pytree.tree_flatten(outputs)
    where = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]

    def mean(ends: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for i, end in zip(where, ends, strict=True):
            filled[i] = end
        return loss(pytree.tree_unflatten(filled, spec), labels)

    slopes: list[Tensor] = grad(mean)([leaves[i] for i in where])
    return slopes
