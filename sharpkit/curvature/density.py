"""The distribution of a matrix's eigenvalues: nodes, weights, and a smooth curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sharpkit.curvature.grids import (
    GridScale,
    Spacing,
    check_grid,
    default_bandwidth,
    make_grid,
    make_scale,
    smooth,
)
from sharpkit.display import readable
from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

DEFAULT_POINTS = 2048


@readable(
    lambda d: (
        f"{d.size} eigenvalues from {d.nodes.min():.4g} to {d.nodes.max():.4g}, "
        f"{d.nodes.shape[0]} probes of {d.nodes.shape[1]} steps, trace {d.trace:.4g} ± "
        f"{d.trace_std_error:.2g}, mass {d.mass:.4g} on a {d.spacing!r} grid, {len(d.grid)} points"
    ),
    table=lambda d: d.largest_frame(),
    brief=True,
)
@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of a matrix's P eigenvalues, estimated from k probes.

    `np.trapezoid(density, grid)` is the mass on the grid, exactly: 1 on the default grids.

    Attributes:
        nodes: Ritz values of every probe, ascending, shape (k, steps).
        weights: Their Gauss weights, each row summing to 1, shape (k, steps).
        grid: Where the density is given, shape (g,).
        density: Mean over probes of the smoothed density, per unit of λ, shape (g,).
        std_error: Its standard error over probes (NaN for one probe), shape (g,).
        bandwidth: Standard deviation of the smoothing Gaussians, in the coordinate of the grid.
        spacing: "linear", "log" (bandwidth in ln λ) or "symlog" (in asinh(λ / threshold)).
        threshold: Where a "symlog" axis turns linear; 1 on other grids, where it has no meaning.
        resolution: Nodes of at most this magnitude are 0 but for rounding. A "log" axis begins
            here, and shows them as one peak at its left end.
        size: P.
        breakdowns: How often a probe's Krylov space ended before `steps`, shape (k,).
        seconds: Wall time.
    """

    nodes: Array
    weights: Array
    grid: Array
    density: Array
    std_error: Array
    bandwidth: float
    spacing: Spacing
    threshold: float
    resolution: float
    size: int
    breakdowns: NDArray[np.int64]
    seconds: float

    @property
    def mass(self) -> float:
        """Share of the spectrum on the grid; 1 unless a grid was given that cuts it off."""
        return float(np.trapezoid(self.density, self.grid))

    @property
    def zero_share(self) -> float:
        """Share of the eigenvalues that are 0 but for rounding (see `resolution`), estimated."""
        zero = np.abs(self.nodes) <= self.resolution
        return float((self.weights * zero).sum(axis=1).mean())

    def moment(self, order: int) -> tuple[float, float]:
        """tr(Aᵒʳᵈᵉʳ) / P, the mean power of the eigenvalues, and its standard error over probes."""
        per_probe = (self.weights * self.nodes**order).sum(axis=1)
        return float(per_probe.mean()), _standard_error(per_probe)

    @property
    def trace(self) -> float:
        """The trace that the density implies: P times its mean."""
        return self.size * self.moment(1)[0]

    @property
    def trace_std_error(self) -> float:
        """Standard error of `trace` over probes."""
        return self.size * self.moment(1)[1]

    @property
    def frobenius_norm(self) -> float:
        """The Frobenius norm that the density implies: √(P · second moment)."""
        top, squares = self._squares()
        return top * float(np.sqrt(self.size * squares.mean()))

    @property
    def frobenius_norm_std_error(self) -> float:
        """Standard error of `frobenius_norm` over probes, to first order."""
        top, squares = self._squares()
        error = _standard_error(squares)
        mean = float(squares.mean())
        return top * float(np.sqrt(self.size / mean)) * error / 2 if mean else error

    def _squares(self) -> tuple[float, Array]:
        """The largest |node|, and the second moment per probe in units of its square."""
        top = float(np.abs(self.nodes).max())
        return top, (self.weights * (self.nodes / (top or 1.0)) ** 2).sum(axis=1)

    def largest(self, k: int = 5) -> Array:
        """The k largest eigenvalues as the probes see them, descending, shape (min(k, steps),).

        A Ritz value never exceeds the eigenvalue of its rank, so the largest over probes is taken.
        Outliers are exact to many digits; use `top_eigenvalues` for residuals and eigenvectors.
        """
        if k < 1:
            raise ArgumentError(f"k must be at least 1, got {k}")
        return np.asarray(self.nodes[:, ::-1][:, :k].max(axis=0))

    def on(
        self,
        grid: Spacing | Array,
        *,
        bandwidth: float | None = None,
        points: int = DEFAULT_POINTS,
        threshold: float | None = None,
    ) -> SpectralDensity:
        """The same spectrum on another grid or with another bandwidth; nothing is recomputed."""
        return replace(
            self,
            **shown(self.nodes, self.weights, grid, bandwidth, points, threshold, self.resolution),
        )

    def frame(self) -> pd.DataFrame:
        """One row per grid point: eigenvalue, density, std_error."""
        import pandas as pd

        return pd.DataFrame(
            {"eigenvalue": self.grid, "density": self.density, "std_error": self.std_error}
        )

    def largest_frame(self, k: int = 5) -> pd.DataFrame:
        """One row for each of the k largest eigenvalues: rank (from 1), eigenvalue."""
        import pandas as pd

        values = self.largest(k)
        return pd.DataFrame({"rank": np.arange(1, len(values) + 1), "eigenvalue": values})

    def nodes_frame(self) -> pd.DataFrame:
        """One row per Gauss node: probe, node, weight."""
        import pandas as pd

        probes, steps = self.nodes.shape
        return pd.DataFrame(
            {
                "probe": np.repeat(np.arange(probes), steps),
                "node": self.nodes.ravel(),
                "weight": self.weights.ravel(),
            }
        )


def check_shape(
    grid: Spacing | Array, bandwidth: float | None, points: int, threshold: float | None
) -> None:
    """Raise for a bad grid before the long computation, not after."""
    if bandwidth is not None and not (np.isfinite(bandwidth) and bandwidth > 0):
        raise ArgumentError(f"bandwidth must be positive and finite, got {bandwidth}")
    one = np.ones((1, 1))
    if isinstance(grid, str):
        make_grid(make_scale(grid, one, one, threshold, 0.0), one, 1.0, points)
    else:
        check_grid(grid)


def rounding_of_zero(nodes: Array, *dtypes: torch.dtype) -> float:
    """How far from 0 a node of an eigenvalue 0 may lie: 16 roundings of the largest |node|.

    Example:
        >>> rounding_of_zero(np.array([0.0, -1.0, 4.0]), torch.float64) / 2.0**-52
        64.0
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return 16 * eps * float(np.abs(nodes).max())


def shown(
    nodes: Array,
    weights: Array,
    grid: Spacing | Array,
    bandwidth: float | None,
    points: int,
    threshold: float | None,
    resolution: float,
) -> Mapping[str, Any]:
    """The fields of a `SpectralDensity` that depend on the grid."""
    check_shape(grid, bandwidth, points, threshold)
    if isinstance(grid, str):
        scale = make_scale(grid, nodes, weights, threshold, resolution)
    else:
        scale = GridScale("linear")
    visible = weights > 0
    if scale.spacing == "log":
        visible &= nodes >= -resolution
        nodes = np.maximum(nodes, resolution)
    bandwidth = default_bandwidth(scale, nodes[visible]) if bandwidth is None else bandwidth
    if isinstance(grid, str):
        chosen = make_grid(scale, nodes[visible], bandwidth, points)
    else:
        chosen = check_grid(grid)
    per_probe = np.array(
        [
            smooth(theta[seen], omega[seen], chosen, scale, bandwidth)
            for theta, omega, seen in zip(nodes, weights, visible, strict=True)
        ]
    )
    return {
        "grid": chosen,
        "density": per_probe.mean(axis=0),
        "std_error": np.apply_along_axis(_standard_error, 0, per_probe),
        "bandwidth": float(bandwidth),
        "spacing": scale.spacing,
        "threshold": scale.threshold,
    }


def _standard_error(values: Array) -> float:
    """Of the mean of independent values; NaN for one."""
    if len(values) < 2:
        return float("nan")
    top = float(np.abs(values).max()) or 1.0  # squares of the values themselves may underflow
    return top * float((values / top).std(ddof=1) / np.sqrt(len(values)))
