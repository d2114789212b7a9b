"""Conditional mutual information under many weightings of the same models at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sharpkit.evaluation.grid import Floats, Ints, Weights
from sharpkit.evaluation.pair_counts import xlogx


@dataclass(frozen=True)
class Cells:
    """Weighted pairs of one conditioning set, before a measure is looked at."""

    groups: list[Ints]
    member: Weights  # (models, groups)
    different: Floats  # (batch, groups, groups): pairs of different models
    itself: Floats  # (batch, groups, groups): self pairs
    larger_gap: Floats  # (batch, groups, groups)

    @classmethod
    def of(cls, weights: Weights, groups: list[Ints], member: Weights, larger_gap: Floats) -> Cells:
        """The cells of weightings (batch, models), from the weight of the pairs of larger gap."""
        sums = (weights @ member).astype(np.float64)
        squares = ((weights * weights) @ member).astype(np.float64)
        eye = np.eye(len(groups))
        different = sums[:, :, None] * sums[:, None, :] - squares[:, :, None] * eye
        return cls(groups, member, different, sums[:, :, None] * eye, larger_gap)


def count(weights: Weights, groups: list[Ints], member: Weights, bits: Weights) -> Floats:
    """Weighted pairs with each bit (batch, groups of i, kinds, groups of j).

    `bits` holds one or several n x n matrices side by side.
    """
    batch, n = weights.shape
    counts = np.empty((batch, len(groups), bits.shape[1] // n, len(groups)))
    for g, models in enumerate(groups):
        sums = weights[:, models] @ bits[models]  # (batch, kinds * models)
        spread = sums.reshape(batch, -1, n) * weights[:, None, :]
        counts[:, g] = (spread.reshape(-1, n) @ member).reshape(batch, -1, len(groups))
    return counts


def information(
    total: Floats, gap: Floats, value: Floats, both: Floats, inside_log: float
) -> tuple[Floats, Floats]:
    """Information and gap entropy of each cell in bits, times the pairs in the cell."""
    sides = xlogx(gap) + xlogx(total - gap)
    joint = xlogx(both) + xlogx(gap - both) + xlogx(value - both)
    joint += xlogx(total - gap - value + both)
    whole = xlogx(total)
    shared = joint - sides - xlogx(value) - xlogx(total - value) + whole
    entropy = whole - sides
    if inside_log:  # −p log2(p + c) = −p log2 p − p log2(1 + c / p), and c / p is tiny
        entropy = entropy - ((gap > 0) * 1.0 + (gap < total)) * total * inside_log / np.log(2)
    return np.maximum(shared, 0.0), entropy


def ratio(information: Floats, entropy: Floats) -> Floats:
    """Summed information over summed entropy of weightings (batch, groups, groups)."""
    below = entropy.sum((1, 2))
    found = information.sum((1, 2)) / np.where(below > 0, below, 1.0)
    return np.where(below > 1e-9, found, np.nan)
