"""Spectral density of a symmetric operator by stochastic Lanczos quadrature."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sharpkit.contract.precision import measuring_precision
from sharpkit.curvature.density import (
    DEFAULT_POINTS,
    SpectralDensity,
    check_shape,
    rounding_of_zero,
    shown,
)
from sharpkit.curvature.grids import Spacing
from sharpkit.curvature.lanczos import basis_bytes, lanczos, require_basis
from sharpkit.curvature.linear_map import (
    Symmetric,
    as_linear_map,
    on_every_rank,
    random_rows,
    team_of,
)
from sharpkit.errors import ArgumentError
from sharpkit.memory import available_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@measuring_precision()
def spectral_density(
    operator: Symmetric,
    *,
    steps: int = 80,
    probes: int | Tensor = 4,
    seed: int = 0,
    grid: Spacing | Array = "linear",
    bandwidth: float | None = None,
    points: int = DEFAULT_POINTS,
    threshold: float | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    shard_basis: bool = False,
    progress: bool = True,
) -> SpectralDensity:
    """The density of the eigenvalues, by stochastic Lanczos quadrature.

    For k random unit vectors v, `steps` of Lanczos give nodes θ_i and weights ω_i with
    Σ ω_i p(θ_i) = vᵀ p(A) v for polynomials p of degree below 2 · steps; the mean over v is
    tr p(A) / P. The density is the mean over probes of Σ ω_i N(λ; θ_i, bandwidth²). Cost: steps x
    probes products; memory: steps x probes x P numbers. Probes that do not fit the memory
    together run one after another.

    Args:
        operator: A curvature operator, a symmetric tensor of shape (P, P), or anything with
            shape, dtype, device and matmat.
        steps: Lanczos steps, at least 1; more than P are P, with a warning.
        probes: Number of Gaussian probes, or start vectors as columns, shape (P, k).
        seed: Of the probes.
        grid: "linear"; "log", for spectra without negative eigenvalues: those that are 0 but for
            rounding are one peak at its left end (see `SpectralDensity.zero_share`); "symlog"
            (logarithmic on both sides of 0); or increasing points.
        bandwidth: Standard deviation of the smoothing; None for 1/200 of the range of the nodes.
            On "log" and "symlog" grids it is in units of the axis.
        points: Grid points.
        threshold: Where "symlog" turns linear; None for 1e-4 of the largest |node|.
        basis_dtype: Storage of the Lanczos basis; None for that of the operator. In bfloat16
            eigenvalues move by up to 4e-4 of the norm of the matrix on average, outliers by up to
            2e-3 of it (see `lanczos`).
        basis_device: Where the basis is, such as "cpu"; None for the operator's device.
        shard_basis: Of an operator with `DistributedData`, each process stores a part of it.
        progress: Show a progress bar if it takes longer than two seconds.

    Returns:
        SpectralDensity: Nodes, weights, density on the grid, errors, and the trace and norm that
            they imply.

    Raises:
        ArgumentError: For steps, probes, grid or bandwidth out of range, or a basis that does not
            fit the memory.
        ModelError: If a product is NaN or infinite, or too small for its dtype.

    Source:
        Ghorbani, Krishnan and Xiao, ICML 2019, algorithm 1; Ubaru, Chen and Saad, SIAM J. Matrix
        Anal. Appl. 2017.

    Example:
        >>> import torch
        >>> result = spectral_density(torch.diag(torch.tensor([1.0, 1.0, 4.0])), steps=2,
        ...                           probes=torch.eye(3))
        >>> round(result.trace, 4), round(result.mass, 6)
        (6.0, 1.0)
    """
    began = time.perf_counter()
    a = as_linear_map(operator)
    size = a.shape[0]
    if steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}")
    if steps > size:
        warnings.warn(
            f"steps = {steps} is more than the {size} dimensions there are: using {size}",
            stacklevel=2,
        )
        steps = size
    check_shape(grid, bandwidth, points, threshold)
    storage = basis_dtype or a.dtype, torch.device(basis_device or a.device)
    ranks = team_of(a).world if shard_basis else 1
    on_every_rank(a, lambda: require_basis(size, steps, 1, *storage, ranks))
    if not isinstance(probes, Tensor):
        if probes < 1:
            raise ArgumentError(f"probes must be at least 1, got {probes}")
        probes = random_rows(probes, a, seed).T
    count = probes.shape[-1]
    together = min(on_every_rank(a, lambda: probes_at_once(size, steps, count, *storage, ranks)))
    parts = [
        lanczos(
            a,
            steps=steps,
            probes=block,
            seed=seed,
            basis_dtype=basis_dtype,
            basis_device=basis_device,
            shard_basis=shard_basis,
            progress=progress,
        )
        for block in torch.split(probes, together, dim=-1)
    ]
    rules = [part.quadrature() for part in parts]
    nodes = np.concatenate([nodes for nodes, _ in rules])
    weights = np.concatenate([weights for _, weights in rules])
    resolution = rounding_of_zero(nodes, a.dtype, storage[0])
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        **shown(nodes, weights, grid, bandwidth, points, threshold, resolution),
        resolution=resolution,
        size=size,
        breakdowns=np.concatenate([part.breakdowns for part in parts]),
        seconds=time.perf_counter() - began,
    )


def probes_at_once(
    size: int, steps: int, probes: int, dtype: torch.dtype, device: torch.device, ranks: int = 1
) -> int:
    """How many Lanczos runs the memory has room for together, if so many processes share them."""
    free = available_memory(device)
    if free is None:
        return max(probes, 1)
    fit = int(0.8 * free) // basis_bytes(size, steps, 1, dtype, ranks)
    return max(1, min(probes, fit))  # if not even one fits, lanczos says so
