"""One step of many networks of one shape: gradients of SGD, SAM and m-SAM, and the descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from sharpkit.contract.class_losses import IGNORED
from sharpkit.contract.losses import resolve_loss
from sharpkit.groupwise import geometry
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.group_gradient import group_losses, group_slopes
from sharpkit.zoo_training.stacked_network import StackedNetwork


@dataclass(frozen=True)
class Batches:
    """A batch of its own for every network.

    Args:
        inputs: (networks, n, ...).
        labels: (networks, n).
        masks: Of dropout layers, (networks, n, ...).
    """

    inputs: Tensor
    labels: Tensor
    masks: Tensors

    def groups(self, start: int, count: int, m: int) -> Batches:
        """So many groups of m examples as batches of their own, (networks · count, m, ...)."""

        def part(t: Tensor) -> Tensor:
            return t[:, start : start + count * m].reshape(-1, m, *t.shape[2:])

        masks = {name: part(mask) for name, mask in self.masks.items()}
        return Batches(part(self.inputs), part(self.labels), masks)


@dataclass(frozen=True)
class Slopes:
    """What a step finds at the weights of every network.

    Args:
        loss: (networks,) float64; not finite where a pass of the step went astray.
        gradients: (networks, *shape).
        statistics: Of BatchNorm layers, (networks, channels).
    """

    loss: Tensor
    gradients: Tensors
    statistics: Tensors

    def rows(self, rows: Tensor) -> Slopes:
        """Those of some networks, in another order."""
        return Slopes(self.loss[rows], taken(self.gradients, rows), taken(self.statistics, rows))


def taken(tensors: Tensors, rows: Tensor) -> Tensors:
    """Some networks of all, by name."""
    return {name: t[rows] for name, t in tensors.items()}


def joined(parts: list[Slopes]) -> Slopes:
    """Those of several lots of networks, one lot after the other."""
    first = parts[0]
    return Slopes(
        torch.cat([part.loss for part in parts]),
        {name: torch.cat([part.gradients[name] for part in parts]) for name in first.gradients},
        {name: torch.cat([part.statistics[name] for part in parts]) for name in first.statistics},
    )


def sgd_slopes(network: StackedNetwork, weights: Tensors, batches: Batches) -> Slopes:
    """The gradient of every network's mean cross-entropy."""
    leaves, statistics = _leaves(weights), _zeros(network, len(batches.labels))
    out = _trained(network, leaves, batches, statistics)
    loss = vmap(F.cross_entropy)(out, batches.labels)
    return Slopes(loss.detach().double(), _gradients(loss.sum(), leaves), statistics)


def sam_slopes(
    network: StackedNetwork,
    weights: Tensors,
    batches: Batches,
    *,
    m: int,
    rho: Tensor,
    at_once: int,
    still: Tensors | None = None,
) -> Slopes:
    """The gradient of m-SAM of every network (see `m_sam_gradient`).

    Args:
        network: The networks as a function.
        weights: Of every parameter, (networks, *shape).
        batches: What the step is over.
        m: Examples per group; the last group may be smaller.
        rho: Radius, (networks,) float64.
        at_once: Groups of a network that are evaluated together.
        still: Of parameters, in which networks they are not perturbed, (networks,) bool.
    """
    size, whole = batches.labels.shape[1], batches.labels.shape[1] // m * m
    parts = [
        (start, min(at_once, (whole - start) // m), m) for start in range(0, whole, at_once * m)
    ]
    if whole < size:
        parts.append((whole, 1, size - whole))
    still = still or {}
    found = [_of_groups(network, weights, batches, part, rho, still) for part in parts]
    if len(found) == 1:
        return found[0]
    return Slopes(
        torch.stack([f.loss for f in found]).sum(0),
        {name: _sum([f.gradients[name] for f in found]) for name in weights},
        {name: _sum([f.statistics[name] for f in found]) for name in found[0].statistics},
    )


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def _of_groups(
    network: StackedNetwork,
    weights: Tensors,
    batches: Batches,
    part: tuple[int, int, int],
    rho: Tensor,
    still: Tensors,
) -> Slopes:
    """What `count` groups of m examples, from a first example on, add to loss and gradient."""
    (networks, size), (start, count, m) = batches.labels.shape, part
    groups = batches.groups(start, count, m)
    counted = (batches.labels != IGNORED).sum(1).clamp(min=1).repeat_interleave(count)
    share = (groups.labels != IGNORED).sum(1) / counted.double()
    own = {
        name: w.unsqueeze(1).expand(-1, count, *w.shape[1:]).flatten(0, 1)
        for name, w in weights.items()
    }
    statistics = _zeros(network, networks * count)
    mean, ascent = _ascent(network, own, groups, statistics)
    for name, rows in still.items():
        of_groups = rows.repeat_interleave(count).view(-1, *[1] * (ascent[name].ndim - 1))
        ascent[name] = ascent[name].masked_fill(of_groups, 0.0)
    unit = geometry.steepest(ascent, 2.0)
    at = geometry.moved(own, unit.tensors, unit.coefficient * rho.repeat_interleave(count))
    leaves = _leaves(at)
    out = _trained(network, leaves, groups, _zeros(network, networks * count))
    after, _ = group_losses(_LOSS, out.flatten(0, 1), groups.labels.flatten(), networks * count)
    gradients = _gradients((after * share).sum(), leaves)
    mean = mean + 0.0 * after.detach()  # NaN where the second pass went astray

    def per_network(t: Tensor) -> Tensor:
        return t.reshape(networks, count, *t.shape[1:]).sum(1)

    return Slopes(
        per_network(mean * share),
        {name: per_network(g) for name, g in gradients.items()},
        {name: per_network(s) * (m / size) for name, s in statistics.items()},
    )


def _ascent(
    network: StackedNetwork, weights: Tensors, groups: Batches, statistics: Tensors
) -> tuple[Tensor, Tensors]:
    """The loss of every group, and its gradient times a power of two that keeps it in range."""
    leaves = _leaves(weights)
    out = _trained(network, leaves, groups, statistics)
    terms = group_slopes(_LOSS, out.flatten(0, 1), groups.labels.flatten(), len(groups.labels))
    return terms.mean, _gradients(out, leaves, terms.slopes[0].view_as(out))


def descend(
    weights: Tensors,
    velocity: Tensors,
    gradients: Tensors,
    rates: Mapping[str, Tensor],
) -> None:
    """A step of SGD in place, as `torch.optim.SGD` makes it: v ← μ v + g + λ w, w ← w − η v.

    Args:
        weights: w of every network, (networks, *shape).
        velocity: v, the same; 0 before the first step.
        gradients: g, the same.
        rates: η as "lr", μ as "momentum" and λ as "weight_decay", (networks,) each.
    """
    for name, w in weights.items():
        lr, momentum, decay = (
            geometry.expand(rates[kind], w) for kind in ("lr", "momentum", "weight_decay")
        )
        velocity[name].mul_(momentum).add_(torch.addcmul(gradients[name], decay, w))
        w.addcmul_(lr, velocity[name], value=-1.0)


_LOSS = resolve_loss("cross_entropy")


def _leaves(weights: Tensors) -> Tensors:
    return {name: w.detach().requires_grad_() for name, w in weights.items()}


def _zeros(network: StackedNetwork, batches: int) -> Tensors:
    return {name: t.new_zeros(batches, *t.shape) for name, t in network.statistics.items()}


def _trained(
    network: StackedNetwork, leaves: Tensors, batches: Batches, statistics: Tensors
) -> Tensor:
    with torch.enable_grad():
        return network.outputs(leaves, batches.inputs, statistics, batches.masks, training=True)


def _gradients(out: Tensor, leaves: Tensors, slopes: Tensor | None = None) -> Tensors:
    found = torch.autograd.grad(out, list(leaves.values()), slopes)
    return dict(zip(leaves, found, strict=True))
