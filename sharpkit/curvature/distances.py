"""How different spectra are: Jensen-Shannon distances of spectral densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.curvature.grids import GridScale, make_grid, smooth

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sharpkit.curvature.density import SpectralDensity

    Array = NDArray[np.float64]

THRESHOLD = 1e-4  # of the largest |λ|: below it the axis is linear
BANDWIDTH = 0.5  # of asinh(λ / threshold): a factor of 1.6 in λ where the axis is logarithmic
_POINTS = 1024


def spectral_distances(densities: Sequence[SpectralDensity], normalised: bool = True) -> Array:
    """Jensen-Shannon distances between spectra, 0 for equal ones to 1, shape (k, k).

    √(H((p + q) / 2) − (H(p) + H(q)) / 2), H the entropy in bits, of densities over asinh(λ / 1e-4
    max|λ|), smoothed by 0.5 there: the bulk near 0 holds nearly all eigenvalues, and on a linear
    axis all spectra would be one peak.

    Args:
        densities: From `spectral_density`.
        normalised: Divide each spectrum by its largest |λ|: only shapes are compared.

    Source:
        Lin 1991; Endres and Schindelin 2003, for its root being a metric.

    Example:
        >>> import torch
        >>> from sharpkit.curvature import spectral_density
        >>> a, b = (spectral_density(torch.diag(torch.tensor(values)), steps=3, probes=torch.eye(3))
        ...         for values in ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]))
        >>> spectral_distances([a, b]).round(3)
        array([[0., 0.],
               [0., 0.]])
        >>> spectral_distances([a, b], normalised=False).round(3)
        array([[0.   , 0.921],
               [0.921, 0.   ]])
    """
    _, masses = on_one_axis(densities, normalised)
    entropies = _entropy(masses)
    middle = _entropy((masses[:, None] + masses[None]) / 2)
    divergence = middle - (entropies[:, None] + entropies[None]) / 2
    return np.asarray(np.sqrt(np.clip(divergence, 0.0, 1.0)))


def on_one_axis(densities: Sequence[SpectralDensity], normalised: bool) -> tuple[Array, Array]:
    """A grid (g,) and the share of each spectrum around its points, shape (k, g)."""
    tops = [float(np.abs(d.nodes).max()) or 1.0 for d in densities]
    scales = tops if normalised else [1.0] * len(tops)
    nodes = [d.nodes.ravel() / scale for d, scale in zip(densities, scales, strict=True)]
    weights = [d.weights.ravel() / len(d.weights) for d in densities]
    scale = GridScale("symlog", THRESHOLD * (1.0 if normalised else max(tops)))
    grid = make_grid(scale, np.concatenate(nodes), BANDWIDTH, _POINTS)
    widths = np.diff(np.concatenate([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]]))
    pairs = zip(nodes, weights, strict=True)
    return grid, np.array([smooth(n, w, grid, scale, BANDWIDTH) * widths for n, w in pairs])


def _entropy(masses: Array) -> Array:
    """In bits, of distributions along the last axis."""
    from scipy.special import entr

    return np.asarray(entr(masses).sum(axis=-1) / np.log(2))
