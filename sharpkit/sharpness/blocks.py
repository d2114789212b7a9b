"""Gradients of many base groups, and how they add up to those of larger groups."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpkit.groupwise import geometry, low_rank
from sharpkit.groupwise.geometry import Factors, Tensors


@dataclass
class Blocks:
    """Gradients of consecutive base groups, each scaled by its own power of two.

    Those of several networks lie one after the other: all blocks of the first, then of the second.
    Scaling the loss gradient before it enters the network keeps the gradients of nearly perfectly
    fitted examples (1e-30 and below) away from underflow; the direction does not change.
    """

    size: int  # examples per block
    shapes: dict[str, torch.Size]  # of the weights that have factors
    loss: Tensor  # (blocks,) float64, means
    weight: Tensor  # (blocks,) float64, by which means of several blocks are averaged
    tensors: Tensors  # (blocks, *shape), scaled by 2^exponent
    factors: Factors  # of large linear weights and tables, D scaled by 2^exponent
    exponent: Tensor  # (blocks,) float64; +inf where the gradient is exactly 0
    networks: int = 1

    def __len__(self) -> int:
        """The number of blocks of a network."""
        return len(self.loss) // self.networks

    def slice(self, start: int, stop: int) -> Blocks:
        """Blocks start to stop of every network, as views."""

        def part(t: Tensor) -> Tensor:
            if self.networks == 1:
                return t[start:stop]
            return t.view(self.networks, -1, *t.shape[1:])[:, start:stop].flatten(0, 1)

        return Blocks(
            self.size,
            self.shapes,
            part(self.loss),
            part(self.weight),
            {name: part(t) for name, t in self.tensors.items()},
            {name: (part(a), part(d)) for name, (a, d) in self.factors.items()},
            part(self.exponent),
            self.networks,
        )

    def merged(self, groups: int, factored: frozenset[str] = frozenset()) -> Blocks:
        """The mean gradient of every len/groups consecutive blocks of a network.

        `groups` divides the number of blocks; only factors of the names in `factored` are kept.
        """
        q = len(self) // groups
        groups *= self.networks
        whole = self if q == 1 else self._added_up(groups, q)
        tensors, factors = dict(whole.tensors), {}
        for name, (a, d) in whole.factors.items():
            if name in factored:
                factors[name] = (a, d)
            else:
                tensors[name] = low_rank.multiplied_out(a, d, self.shapes[name])
        return replace(whole, tensors=tensors, factors=factors)

    def _added_up(self, groups: int, q: int) -> Blocks:
        """The mean of every q consecutive blocks."""
        own = self.exponent.view(groups, q)
        exponent = own.amin(1)  # the largest gradient sets the scale
        shift = torch.where(torch.isfinite(own), exponent.unsqueeze(1) - own, 0.0)
        share, total = _shares(self.weight.view(groups, q))
        weight = torch.exp2(shift) * share  # (groups, q), at most 1
        tensors = {
            name: (weight.to(t.dtype).unsqueeze(1) @ t.reshape(groups, q, -1)).view(
                groups, *t.shape[1:]
            )
            for name, t in self.tensors.items()
        }
        factors = {}
        for name, (a, d) in self.factors.items():
            d = d * geometry.expand(weight.flatten(), d)
            factors[name] = (
                a.reshape(groups, -1, *a.shape[2:]),
                d.reshape(groups, -1, d.shape[-1]),
            )
        loss = (self.loss.view(groups, q) * share).sum(1)
        return Blocks(
            self.size * q, self.shapes, loss, total, tensors, factors, exponent, self.networks
        )


def concatenated(first: Blocks, second: Blocks) -> Blocks:
    """Two parts of one group as its weighted mean gradient.

    Both hold one block of every network, without factors.
    """
    share, weight = _shares(torch.stack([first.weight, second.weight], 1))
    exponent = torch.minimum(first.exponent, second.exponent)
    tensors = dict.fromkeys(first.tensors, torch.empty(0))
    for name in tensors:
        parts = []
        for part, own in zip((first, second), share.unbind(1), strict=True):
            shift = torch.where(torch.isfinite(part.exponent), exponent - part.exponent, 0.0)
            t = part.tensors[name]
            parts.append(t * geometry.expand(torch.exp2(shift) * own, t))
        tensors[name] = parts[0] + parts[1]
    loss = (torch.stack([first.loss, second.loss], 1) * share).sum(1)
    size = first.size + second.size
    return Blocks(size, {}, loss, weight, tensors, {}, exponent, first.networks)


def _shares(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's parts of its sum, and the sums; 0 where nothing counts."""
    total = weights.sum(1)
    return weights / torch.where(total > 0, total, 1.0).unsqueeze(1), total


def stacked(blocks: list[Blocks]) -> Blocks:
    """Blocks of one size, one after the other; without factors."""
    if len(blocks) == 1:
        return blocks[0]
    return Blocks(
        blocks[0].size,
        {},
        torch.cat([b.loss for b in blocks]),
        torch.cat([b.weight for b in blocks]),
        {name: torch.cat([b.tensors[name] for b in blocks]) for name in blocks[0].tensors},
        {},
        torch.cat([b.exponent for b in blocks]),
    )
