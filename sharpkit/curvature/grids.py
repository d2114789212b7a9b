"""Grids on which a spectral density is shown, and Gaussian smoothing that loses no mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Spacing = Literal["linear", "log", "symlog"]
_MARGIN = 8.0  # bandwidths on each side: all but 1e-15 of a Gaussian


@dataclass(frozen=True)
class GridScale:
    """The coordinate u(λ) in which grid points are equally spaced and smoothing is uniform."""

    spacing: Spacing  # "linear": u = λ; "log": u = ln λ; "symlog": u = asinh(λ / threshold)
    threshold: float = 1.0  # where a "symlog" axis turns from linear to logarithmic

    def forward(self, values: Array) -> Array:
        """λ -> u."""
        if self.spacing == "log":
            return np.log(values)
        if self.spacing == "symlog":
            return np.arcsinh(values / self.threshold)
        return np.asarray(values, dtype=np.float64)

    def inverse(self, u: Array) -> Array:
        """u -> λ."""
        if self.spacing == "log":
            return np.exp(u)
        if self.spacing == "symlog":
            return self.threshold * np.sinh(u)
        return np.asarray(u, dtype=np.float64)


def make_scale(
    spacing: str, nodes: Array, weights: Array, threshold: float | None, resolution: float
) -> GridScale:
    """The scale for a spectrum with these Gauss nodes and weights.

    Raises:
        ArgumentError: For an unknown spacing, or "log" with eigenvalues below 0, or none above.
    """
    if threshold is not None and not threshold > 0:
        raise ArgumentError(f"threshold must be positive, got {threshold}")
    if spacing == "linear":
        return GridScale("linear")
    if spacing == "log":
        lost = float(weights[nodes < -resolution].sum() / weights.sum())
        if lost > 1e-9:  # below that it is rounding of an ended Krylov space
            raise ArgumentError(
                f'a "log" grid cannot show the {lost:.2g} of the spectrum below 0: use "symlog"'
            )
        if not (weights[nodes > resolution] > 0).any():
            raise ArgumentError('a "log" grid cannot show a spectrum that is 0: use "linear"')
        return GridScale("log")
    if spacing == "symlog":
        largest = float(np.abs(nodes).max())
        return GridScale("symlog", threshold or 1e-4 * largest or 1.0)
    raise ArgumentError(f'grid must be "linear", "log", "symlog" or an array, got {spacing!r}')


def default_bandwidth(scale: GridScale, nodes: Array) -> float:
    """1/200 of the range of the nodes, in the scale's coordinate."""
    u = scale.forward(nodes)
    width = float(u.max() - u.min())
    size = 1.0 if scale.spacing == "log" else float(np.abs(u).max()) or 1.0
    return (width if width > 1e-9 * size else size) / 200


def make_grid(scale: GridScale, nodes: Array, bandwidth: float, points: int) -> Array:
    """Equally spaced points in the scale's coordinate, 8 bandwidths beyond the nodes.

    Example:
        >>> make_grid(GridScale("linear"), np.array([0.0, 1.0]), 0.125, 5)
        array([-1. , -0.25,  0.5 ,  1.25,  2.  ])
    """
    if points < 2:
        raise ArgumentError(f"points must be at least 2, got {points}")
    u = scale.forward(nodes)
    margin = _MARGIN * bandwidth
    return scale.inverse(np.linspace(u.min() - margin, u.max() + margin, points))


def check_grid(grid: Array) -> Array:
    """The user's grid as float64; it must increase and be finite."""
    grid = np.asarray(grid, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 2 or not np.isfinite(grid).all() or (np.diff(grid) <= 0).any():
        raise ArgumentError("the grid must be at least two finite numbers in increasing order")
    return grid


def smooth(nodes: Array, weights: Array, grid: Array, scale: GridScale, bandwidth: float) -> Array:
    """The density of Gaussians at the nodes, averaged over the cell around each grid point.

    Cells end half-way between grid points, so that a cell's width is the point's weight in the
    trapezoidal rule: `np.trapezoid(density, grid)` is the mass between the ends of the grid,
    exactly, at any resolution.

    Args:
        nodes: Shape (m,).
        weights: Shape (m,).
        grid: Shape (g,), increasing.
        scale: The coordinate in which the Gaussians have the given bandwidth.
        bandwidth: Standard deviation.

    Returns:
        NDArray: Density per unit of λ, shape (g,).

    Example:
        >>> grid = np.linspace(-1.0, 1.0, 21)
        >>> density = smooth(np.array([0.0]), np.array([1.0]), grid, GridScale("linear"), 0.1)
        >>> round(float(np.trapezoid(density, grid)), 9)
        1.0
    """
    from scipy.special import ndtr

    edges = np.concatenate([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])
    mass = np.zeros(len(grid))
    centres, bounds = scale.forward(nodes), scale.forward(edges)
    for start in range(0, len(nodes), 256):  # bounds the (edges, nodes) table
        part = slice(start, start + 256)
        z = (bounds[:, None] - centres[None, part]) / bandwidth
        low, high = z[:-1], z[1:]
        flip = np.where(low > 0, -1.0, 1.0)  # the tail that does not cancel
        mass += (flip * (ndtr(flip * high) - ndtr(flip * low))) @ weights[part]
    return np.asarray(mass / np.diff(edges))
