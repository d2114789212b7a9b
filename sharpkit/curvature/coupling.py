"""How much of a matrix lies outside of its diagonal blocks, from products with random signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sharpkit.curvature.lanczos import require_resolved
from sharpkit.curvature.linear_map import LinearMap, random_rows, team_of
from sharpkit.curvature.multiply import BLOCK, Multiply
from sharpkit.progress import progress_bar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def block_lengths(
    operator: LinearMap, blocks: Sequence[Tensor], probes: int, seed: int, progress: bool
) -> Array:
    """‖(A z_b)_a‖ for random signs z, z_b its part in block b: shape (probes, blocks a, blocks b).

    The mean of the squares over z is ‖A_ab‖²_F. Costs probes x blocks products.

    Args:
        operator: A symmetric matrix.
        blocks: The coordinates of each block, long tensors on the operator's device.
        probes: Number of random vectors.
        seed: Of the random signs.
        progress: Show a progress bar if it takes longer than two seconds.

    Example:
        >>> from sharpkit.curvature.linear_map import as_linear_map
        >>> a = as_linear_map(torch.tensor([[3.0, 4.0], [4.0, 0.0]]))
        >>> block_lengths(a, [torch.tensor([0]), torch.tensor([1])], 1, 0, False)
        array([[[3., 4.],
                [4., 0.]]])
    """
    count, size = len(blocks), operator.shape[0]
    lengths = np.zeros((probes, count, count))
    with progress_bar(
        desc="coupling", unit="product", leave=False, delay=2,
        progress=progress and team_of(operator).rank == 0,
        total=probes * count,
    ) as bar:  # fmt: skip
        multiply = Multiply(operator, bar)
        for lengths_of_probe, z in zip(
            lengths, random_rows(probes, operator, seed, "sign"), strict=True
        ):
            for start in range(0, count, BLOCK):
                some = blocks[start : start + BLOCK]
                rows = torch.zeros(len(some), size, dtype=z.dtype, device=z.device)
                for row, block in zip(rows, some, strict=True):
                    row[block] = z[block]
                products, powers = multiply(rows)
                for a, block in enumerate(blocks):
                    norms = torch.linalg.vector_norm(products[:, block], dim=1, dtype=torch.float64)
                    lengths_of_probe[a, start : start + BLOCK] = norms.cpu().numpy() * powers
    require_resolved(multiply.longest, operator)
    return lengths


def ratio_of_sums(parts: Array, wholes: Array) -> tuple[float, float]:
    """Σ parts / Σ wholes over probes, and its standard error to first order; NaN for one probe.

    Example:
        >>> ratio_of_sums(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
        (0.5, 0.0)
    """
    count, total = len(wholes), float(wholes.mean())
    if not total:
        return 0.0, 0.0
    ratio = float(parts.mean()) / total
    if count < 2:
        return ratio, float("nan")
    return ratio, float(np.std((parts - ratio * wholes) / total, ddof=1)) / count**0.5
