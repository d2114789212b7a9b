"""The two passes of m-SAM over groups of examples: where each group goes, and the gradient there.

Pass one takes the gradient of every group at the shared weights w; pass two the gradient, with
respect to w, of the mean loss of the groups at w + ε_i with ε_i constant. Both run all groups
under one vmap; a single group needs none and runs as ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from sharpkit.contract.examples import Examples, Inputs
from sharpkit.contract.functional import FunctionalModel
from sharpkit.sharpness import geometry, low_rank
from sharpkit.sharpness.geometry import Direction, Factors, Tensors
from sharpkit.sharpness.objective import grouped
from sharpkit.training.layer_calls import CallsDiffer
from sharpkit.training.perturbed_layers import PerturbedLayers
from sharpkit.training.radius import Radii
from sharpkit.training.statistics import Recorder, Statistics

LossFn = Callable[[Tensor, Tensor], Tensor]
Shapes = dict[str, list[torch.Size]]


@dataclass
class Objective:
    """The training loss, its parameters, and how their perturbations are handled.

    Attributes:
        model: The model as a function.
        loss: Mean loss of a batch.
        shared: The parameters to be trained, by name; leaves that require gradients.
        factored: Linear weights whose gradient stays in factors.
        layers: Other weights, and biases, that only layers use (see `perturbed_layers`).
        shapes: Outputs of every call of the factored layers for one group, by group size.
        recorder: Of BatchNorm statistics.
    """

    model: FunctionalModel
    loss: LossFn
    shared: Mapping[str, Tensor]
    factored: frozenset[str]
    layers: frozenset[str]
    shapes: dict[int, Shapes]
    recorder: Recorder

    def at(self, weights: Mapping[str, Tensor], inputs: Inputs, labels: Tensor) -> Tensor:
        """The mean loss of one batch at the given weights."""
        return self.loss(self.model(weights, inputs), labels)


@dataclass
class Gradients:
    """What pass one found: mean losses (groups,) and gradients (groups, *shape), or factors."""

    loss: Tensor
    tensors: Tensors
    factors: Factors
    statistics: Statistics


def gradients(objective: Objective, examples: Examples, count: int) -> Gradients:
    """Pass one: the gradient of `count` groups of consecutive examples, up to a factor per group.

    The loss gradient of a group is scaled to about 1 before it enters the network, so that the
    gradients of nearly perfectly fitted examples do not underflow; their direction is what counts.
    """
    if count == 1:
        return _one_gradient(objective, examples)
    size = len(examples) // count
    raw = vmap(lambda x, y: _block(objective, x, y, size), randomness="different")(
        *grouped(examples, count)
    )
    loss, tensors, layer_inputs, deltas, statistics = raw
    factors: Factors = {}
    for name in objective.factored:
        a = torch.cat([t.reshape(count, -1, t.shape[-1]) for t in layer_inputs[name]], 1)
        d = torch.cat([t.reshape(count, -1, t.shape[-1]) for t in deltas[name]], 1)
        factors[name] = (a, d)
    return Gradients(loss, tensors, factors, statistics)


def _block(
    objective: Objective, inputs: Inputs, labels: Tensor, size: int
) -> tuple[Tensor, Tensors, dict[str, list[Tensor]], dict[str, list[Tensor]], Statistics]:
    f = objective
    values = {name: p.detach() for name, p in f.shared.items()}
    dense = {name: p for name, p in values.items() if name not in f.factored}
    factored = {name: values[name] for name in f.factored}
    probes = {
        name: [torch.zeros(s, device=f.model.device, dtype=f.model.dtype) for s in shapes]
        for name, shapes in f.shapes.get(size, {}).items()
    }

    def outputs(dense: Tensors, probes: dict[str, list[Tensor]]) -> tuple[Tensor, Any]:
        layer_inputs: dict[str, list[Tensor]] = {name: [] for name in factored}

        def rule(name: str, call: int, layer_input: Tensor, out: Tensor) -> Tensor:
            if call >= len(probes[name]) or out.shape != probes[name][call].shape:
                raise CallsDiffer
            layer_inputs[name].append(layer_input)
            return out + probes[name][call]

        with f.recorder.over_groups() as statistics, low_rank.Calls(factored, rule):
            out = f.model({**dense, **factored}, inputs)
        if any(len(layer_inputs[name]) != len(probes[name]) for name in factored):
            raise CallsDiffer
        return out, (layer_inputs, statistics)

    out, pull, (layer_inputs, statistics) = vjp(  # type: ignore[misc]
        outputs, dense, probes, has_aux=True
    )
    delta, loss = grad_and_value(f.loss)(out, labels)
    tensors, deltas = pull(_near_one(delta))
    return loss.double(), tensors, layer_inputs, deltas, statistics


def _near_one(delta: Tensor) -> Tensor:
    """A loss gradient times the power of two that takes its largest entry to between 1 and 2."""
    top = delta.abs().amax().double()
    usable = (top > 0) & torch.isfinite(top)
    exponent = torch.where(usable, -torch.floor(torch.log2(torch.where(usable, top, 1.0))), 0.0)
    return geometry.power_of_two(delta, exponent)


def _one_gradient(objective: Objective, examples: Examples) -> Gradients:
    """One group of any size, by ordinary autograd."""
    f = objective
    with torch.enable_grad():
        with f.recorder.of_one_group() as statistics:
            out = f.model(f.shared, examples.inputs)
        leaf = out.detach().requires_grad_()
        loss = f.loss(leaf, examples.labels)
    (delta,) = torch.autograd.grad(loss, leaf)
    found = torch.autograd.grad(
        out, list(f.shared.values()), _near_one(delta), allow_unused=True, materialize_grads=True
    )
    tensors = {name: g.unsqueeze(0) for name, g in zip(f.shared, found, strict=True)}
    batched: Statistics = {
        name: [(mean.unsqueeze(0), variance.unsqueeze(0)) for mean, variance in calls]
        for name, calls in statistics.items()
    }
    return Gradients(loss.detach().double().unsqueeze(0), tensors, {}, batched)


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


def perturbed_loss(
    objective: Objective, examples: Examples, count: int, epsilon: Perturbation
) -> Tensor:
    """Pass two: the mean over groups of the loss at w + ε_i, differentiable in the shared w."""
    f = objective
    if count == 1:
        moved = {name: p + epsilon.tensors[name][0] for name, p in f.shared.items()}
        return f.at(moved, examples.inputs, examples.labels)
    with torch.no_grad():
        own = {name: f.shared[name] + epsilon.tensors[name] for name in f.layers}
    steps = {name: e for name, e in epsilon.tensors.items() if name not in own}

    def one(own: Tensors, steps: Tensors, thin: Factors, inputs: Inputs, labels: Tensor) -> Tensor:
        moved = {name: f.shared[name] + e for name, e in steps.items()}
        weights = {**f.shared, **moved}
        with PerturbedLayers(f.shared, own, thin):
            return f.at(weights, inputs, labels)

    losses: Tensor = vmap(one, randomness="different")(
        own, steps, epsilon.factors, *grouped(examples, count)
    )
    return losses.mean()
