"""The two passes of m-SAM over groups of examples: where each group goes, and the gradient there.

Pass one takes the gradient of every group at the shared weights w; pass two the gradient, with
respect to w, of the mean loss of the groups at w + ε_i with ε_i constant. Both run all groups
under one vmap; a single group needs none and runs as ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import MeanLoss
from sharpkit.contract.recompute import without_checkpointing, without_reentry
from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import Direction, Factors, Tensors
from sharpkit.groupwise.group_gradient import GroupGradient, group_gradient, joined_factors
from sharpkit.groupwise.objective import grouped, plain_gradient
from sharpkit.training.perturbed_layers import PerturbedLayers
from sharpkit.training.radius import Radii
from sharpkit.training.statistics import Recorder, Statistics

Shapes = dict[str, list[torch.Size]]


@dataclass
class Objective:
    """The training loss, its parameters, and how their perturbations are handled.

    Attributes:
        model: The model as a function.
        loss: The loss of a batch.
        shared: The values of the parameters to be trained, by name, detached.
        factored: Linear weights whose gradient stays in factors.
        shapes: Outputs of every call of the factored layers for one group, by group size.
        recorder: Of BatchNorm statistics.
    """

    model: FunctionalModel
    loss: MeanLoss
    shared: Tensors
    factored: frozenset[str]
    shapes: dict[int, Shapes]
    recorder: Recorder


@dataclass
class Gradients:
    """What pass one found: losses and weights (groups,), gradients (groups, *shape) or factors."""

    loss: Tensor
    weight: Tensor
    tensors: Tensors
    factors: Factors
    statistics: Statistics


def gradients(objective: Objective, examples: Examples, count: int) -> Gradients:
    """Pass one: the gradient of `count` groups of consecutive examples, up to a factor each."""
    if count == 1:
        return _one_gradient(objective, examples)
    f, size = objective, len(examples) // count
    dense = {name: p for name, p in f.shared.items() if name not in f.factored}
    factored = {name: f.shared[name] for name in f.factored}

    def one(inputs: Inputs, labels: Tensor) -> GroupGradient:
        return group_gradient(
            f.model, f.loss, dense, factored, f.shapes.get(size, {}), inputs, labels,
            f.recorder.over_groups,
        )  # fmt: skip

    with without_checkpointing():
        found = vmap(one, randomness="different")(*grouped(examples, count))
    return Gradients(found.mean, found.weight, found.dense, joined_factors(found), found.noted)


def _one_gradient(objective: Objective, examples: Examples) -> Gradients:
    """One group of any size, by ordinary autograd."""
    f = objective
    with without_reentry(), f.recorder.of_one_group() as statistics:
        found = plain_gradient(f.model, f.loss, f.shared, examples)
    tensors = {
        name: (torch.zeros_like(p) if g is None else g).unsqueeze(0)
        for (name, p), g in zip(f.shared.items(), found.gradient, strict=True)
    }
    batched: Statistics = {
        name: [(mean.unsqueeze(0), variance.unsqueeze(0)) for mean, variance in calls]
        for name, calls in statistics.items()
    }
    return Gradients(found.mean.unsqueeze(0), found.weight.unsqueeze(0), tensors, {}, batched)


@dataclass
class Perturbation:
    """ε of every group: tensors (groups, *shape), and for linear weights factors with ε = DᵀA."""

    tensors: Tensors
    factors: Factors


@torch.no_grad()
def perturbation(objective: Objective, found: Gradients, radii: Radii) -> Perturbation:
    """ε_i = T² g_i / ‖T g_i‖ for every group, with T = ρ, or ρ|w| where adaptive (see `Radii`)."""
    scale = radii.scale(objective.shared)

    def scaled(tensors: Tensors) -> Tensors:
        return tensors if scale is None else {k: t * scale[k] for k, t in tensors.items()}

    def scaled_factors(factors: Factors) -> Factors:
        return factors if scale is None else {k: (a, d * scale[k]) for k, (a, d) in factors.items()}

    unit: Direction = geometry.steepest(scaled(found.tensors), 2.0, scaled_factors(found.factors))
    amount = unit.coefficient * (radii.common if scale is None else 1.0)
    tensors = {name: t * geometry.expand(amount, t) for name, t in scaled(unit.tensors).items()}
    # half of the amount to each factor: it may leave float32 although the product does not
    root = amount.sqrt().view(-1, 1, 1)
    factors = {
        name: ((a.double() * root).to(a.dtype), (d.double() * root).to(d.dtype))
        for name, (a, d) in scaled_factors(unit.factors).items()
    }
    return Perturbation(tensors, factors)


def perturbed_gradient(
    objective: Objective,
    examples: Examples,
    count: int,
    epsilon: Perturbation,
    shares: Tensor,
    scale: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Pass two: the gradient of the weighted sum of the groups' losses at w + ε_i, ε_i constant.

    Args:
        objective: The loss.
        examples: Of the groups, consecutive.
        count: How many groups.
        epsilon: Where each goes.
        shares: What the loss of each counts, (groups,).
        scale: Of a loss scaler.

    Returns:
        tuple: The sum, and its gradient in the order of the parameters, None where unused.
    """
    f = objective
    if count == 1:
        moved = {name: p + epsilon.tensors[name][0] for name, p in f.shared.items()}
        with without_reentry(), f.model.assigned(moved) as leaves, torch.enable_grad():
            mean = f.loss(f.model.outputs(examples.inputs), examples.labels)
            total = mean * shares[0].to(mean.dtype)
            found = torch.autograd.grad(scale(total), leaves, allow_unused=True)
        dense = [None if g is None else g.to_dense() if g.is_sparse else g for g in found]
        return total.detach(), [
            None if g is None else f.model.real(name, g)
            for name, g in zip(f.shared, dense, strict=True)
        ]
    with torch.enable_grad(), without_checkpointing():
        leaves_of = {name: p.detach().requires_grad_() for name, p in f.shared.items()}
        losses: Tensor = vmap(_at_own_weights(f, leaves_of), randomness="different")(
            epsilon.tensors, epsilon.factors, *grouped(examples, count)
        )
        total = (losses * shares.to(losses.dtype)).sum()
        found = torch.autograd.grad(scale(total), list(leaves_of.values()), allow_unused=True)
    return total.detach(), found


def _at_own_weights(
    objective: Objective, leaves: Tensors
) -> Callable[[Tensors, Factors, Inputs, Tensor], Tensor]:
    f = objective

    def one(steps: Tensors, thin: Factors, inputs: Inputs, labels: Tensor) -> Tensor:
        moved = {name: leaves[name] + e for name, e in steps.items()}
        with PerturbedLayers(leaves, moved, thin) as layers:
            loss: Tensor = f.model.within(
                {**moved, **layers.stand_ins},
                lambda: f.loss(f.model.outputs(inputs), labels),
            )
        return loss

    return one
