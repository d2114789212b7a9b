"""Counted products that are near 1, whatever the scale of the matrix: for random probes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sharpkit.curvature.lanczos import near_one
from sharpkit.curvature.linear_map import LinearMap, multiply_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tqdm import tqdm

    Array = NDArray[np.float64]

BLOCK = 16  # vectors per call of matmat


class Multiply:
    """Products with rows (k, P), whatever the scale of the matrix, counted on a progress bar."""

    def __init__(self, operator: LinearMap, bar: tqdm[Any]) -> None:
        self.operator, self.bar = operator, bar
        self.longest = 0.0  # the largest norm of a product

    def __call__(self, rows: Tensor) -> tuple[Tensor, Array]:
        """The products near 1, and the factors that bring them back."""
        products, powers = near_one(multiply_rows(self.operator, rows))
        self.bar.update(len(rows))
        self.longest = max(self.longest, *_norms(products, powers))
        return products, powers

    def stacked(self, rows: Tensor) -> tuple[Tensor, Array]:
        """The same for any number of rows, a block at a time."""
        parts = [self(block) for block in torch.split(rows, BLOCK)]
        return torch.cat([p for p, _ in parts]), np.concatenate([powers for _, powers in parts])

    def forms(self, rows: Tensor) -> list[float]:
        """zᵀ A z of every row."""
        products, powers = self(rows)
        forms: list[float] = ((rows * products).double().sum(1).cpu().numpy() * powers).tolist()
        return forms

    def lengths(self, rows: Tensor) -> list[float]:
        """‖A z‖ of every row."""
        return _norms(*self(rows))


def _norms(rows: Tensor, powers: Array) -> list[float]:
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
    lengths: list[float] = (norms * powers).tolist()
    return lengths


def identity_rows(a: LinearMap) -> Iterator[Tensor]:
    """The rows of the identity, a block at a time."""
    size = a.shape[0]
    for start in range(0, size, BLOCK):
        rows = torch.zeros(min(BLOCK, size - start), size, dtype=a.dtype, device=a.device)
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 1.0
        yield rows
