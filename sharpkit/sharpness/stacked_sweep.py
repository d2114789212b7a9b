"""All m and rho of several networks of one shape, whose groups are evaluated side by side.

The groups of the first network come first, then those of the second, as one ordinary batch (see
`groupwise.one_batch`), or under one vmap: each pass is one call of the model for all of them. What
is wrong with a network is noted on the device and looked at in the end; it changes no number of
another one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples
from sharpkit.groupwise import geometry
from sharpkit.groupwise.batch_passes import BatchPasses
from sharpkit.groupwise.geometry import Tensors
from sharpkit.groupwise.vmap_passes import VmapPasses
from sharpkit.sharpness.ball import scaled
from sharpkit.sharpness.blocks import Blocks
from sharpkit.sharpness.measurement import Groups
from sharpkit.sharpness.unseen import Level


@dataclass
class StackedSweep:
    """One-step perturbations in the 2-norm of the groups of several networks.

    Args:
        passes: Of the module that they are copies of.
        weights: What is perturbed, as packs (networks, ...).
        fixed: What else differs between them, (networks, *shape).
        examples: What is measured, for all networks.
        adaptive: Whether perturbations are in units of |w|.
        chunk: Examples of each network at a time.
    """

    passes: BatchPasses | VmapPasses
    weights: Tensors
    fixed: Tensors
    examples: Examples
    adaptive: bool
    chunk: int

    def __post_init__(self) -> None:
        self.networks = len(next(iter(self.weights.values())))
        self._scale: Tensors | None = None
        if self.adaptive:  # T, beside the groups of each network
            self._scale = {k: w.abs().unsqueeze(1) for k, w in self.weights.items()}
        self._kept: tuple[tuple[int, int], Examples] | None = None

    def of(self, rows: Tensor) -> StackedSweep:
        """The same of some of the networks."""
        if len(rows) == self.networks:
            return self
        return replace(
            self,
            weights={name: t[rows] for name, t in self.weights.items()},
            fixed={name: t[rows] for name, t in self.fixed.items()},
        )

    def gradients(self, examples: Examples, groups: int) -> Blocks:
        """Losses and gradients of every network's groups at its weights.

        `examples` are those of each network, one network after the other.
        """
        found = self.passes.gradients(
            examples, self.networks * groups, at=self._of_groups(self.weights, groups),
            fixed=self._of_groups(self.fixed, groups),
        )  # fmt: skip
        mean, weight, exponent = found.terms[:3]
        size = len(examples) // len(mean)
        return Blocks(size, {}, mean, weight, found.packs, {}, exponent, self.networks)

    def losses(self, examples: Examples, groups: int) -> Tensor:
        """The losses alone, (networks · groups,) float64."""
        at, fixed = (self._of_groups(t, groups) for t in (self.weights, self.fixed))
        return self.passes.losses(examples, self.networks * groups, at, fixed=fixed)[0]

    def measured(
        self, ms: Sequence[int], rhos: Sequence[float]
    ) -> tuple[list[list[Groups]], list[bool]]:
        """For every network what its groups of each m gave; and whether all is well with it.

        It is not where a loss or gradient is not finite, or a norm may have left its dtype.
        """
        common, n = math.gcd(*ms), len(self.examples)
        block = next(k for k in range(min(self.chunk, common), 0, -1) if common % k == 0)
        # where that fits, the groups of every m end with a chunk
        unit = next(k for k in (math.lcm(*ms), block) if k <= self.chunk)
        step, levels = self.chunk // unit * unit, [Level(m) for m in ms]
        well: list[Tensor] = []
        for start in range(0, n, step):
            stop = min(start + step, n)
            whole = start + (stop - start) // block * block
            for a, b, size in ((start, whole, block), (whole, stop, stop - whole)):
                if b > a:
                    blocks = self.gradients(self._examples(a, b), (b - a) // size)
                    for level in levels:
                        complete = level.completed(blocks)
                        well += [self._measure(level, groups, rhos) for groups in complete]
        for level in levels:
            well += [self._measure(level, last, rhos) for last in level.rest()]
        of_levels = [_of_networks(level) for level in levels]
        by_network = [list(own) for own in zip(*of_levels, strict=True)]
        return by_network, torch.stack(well).all(0).tolist()

    def _losses(self, start: int, stop: int, groups: int, at: Tensors) -> Tensor:
        """Mean losses of examples start to stop at packs of all groups, (networks · groups,)."""
        fixed = self._of_groups(self.fixed, groups)
        step = stop - start if groups > 1 else self.chunk  # one group may be larger than a chunk
        cuts = itertools.pairwise([*range(start, stop, step), stop])
        parts = [
            self.passes.losses(self._examples(a, b), self.networks * groups, at, fixed=fixed)
            for a, b in cuts
        ]
        if len(parts) == 1:
            return parts[0][0]
        means, shares = (torch.stack(part) for part in zip(*parts, strict=True))
        total = shares.sum(0)
        return (means * shares).sum(0) / torch.where(total > 0, total, 1.0)

    def _measure(self, level: Level, blocks: Blocks, rhos: Sequence[float]) -> Tensor:
        """Measure groups of one m; whether all is well with each network."""
        groups, start = len(blocks), level.start
        stop = start + groups * blocks.size
        gradient = self._scaled(blocks.tensors)
        first = geometry.steepest(gradient, 2.0, careful=False)
        assert first.doubtful is not None
        step, stays = self._scaled(first.tensors), first.coefficient == 0
        after = [
            self._losses(start, stop, groups, self._moved(step, rho * first.coefficient))
            for rho in rhos
        ]
        # exactly 0, not the rounding of two passes, where there is no gradient to go along
        increases = (torch.stack(after) - blocks.loss).masked_fill(stays, 0.0)
        doubtful = first.doubtful & (blocks.exponent < torch.inf)
        well = torch.isfinite(torch.cat([increases, blocks.loss.unsqueeze(0)])).all(0)
        well &= torch.isfinite(first.coefficient) & ~doubtful
        level.increases.append(increases.view(len(rhos), self.networks, groups))
        level.sizes += [blocks.size] * groups
        level.weights.append(blocks.weight.view(self.networks, groups))
        level.zero_gradients.append(stays.view(self.networks, groups).sum(1))
        return well.view(self.networks, groups).all(1)

    def _of_groups(self, tensors: Tensors, groups: int) -> Tensors:
        """(networks, *shape) -> (networks · groups, *shape), those of a network being the same."""
        if groups == 1:
            return tensors
        return {
            k: t.unsqueeze(1).expand(-1, groups, *t.shape[1:]).flatten(0, 1)
            for k, t in tensors.items()
        }

    def _by_network(self, tensors: Tensors) -> Tensors:
        """(networks · groups, *shape) -> (networks, groups, *shape)."""
        return {k: t.view(self.networks, -1, *t.shape[1:]) for k, t in tensors.items()}

    def _scaled(self, tensors: Tensors) -> Tensors:
        """T ∘ tensors."""
        if self._scale is None:
            return tensors
        found = scaled(self._by_network(tensors), self._scale)
        return {name: t.flatten(0, 1) for name, t in found.items()}

    def _moved(self, step: Tensors, amount: Tensor) -> Tensors:
        """Every network's weights + amount · step, for all of its groups."""
        moved = {}
        for name, s in self._by_network(step).items():
            length = amount.to(s.dtype).view(*s.shape[:2], *[1] * (s.ndim - 2))
            moved[name] = torch.addcmul(self.weights[name].unsqueeze(1), s, length).flatten(0, 1)
        return moved

    def _examples(self, start: int, stop: int) -> Examples:
        """Examples start to stop of every network, on the device; the last ones are kept."""
        if self._kept is None or self._kept[0] != (start, stop):
            model = self.passes.model
            few = self.examples.slice(start, stop).to(model.device, model.dtype)
            self._kept = (start, stop), self.repeated(few)
        return self._kept[1]

    def repeated(self, examples: Examples) -> Examples:
        """The examples once for every network."""
        inputs, labels = pytree.tree_map(
            lambda t: t.repeat(self.networks, *[1] * (t.ndim - 1)),
            (examples.inputs, examples.labels),
        )
        return Examples(inputs, labels)


def _of_networks(level: Level) -> list[Groups]:
    """What the groups of each network gave, on the CPU."""
    increases, weights = torch.cat(level.increases, 2).cpu(), torch.cat(level.weights, 1).cpu()
    zeros = torch.stack(level.zero_gradients).sum(0).tolist()
    return [
        Groups(increases[:, k].contiguous(), weights[k], level.sizes, zero)
        for k, zero in enumerate(zeros)
    ]
