"""The result: a loss at each point of a grid, and how the picture was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.display import readable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from sharpkit.plot.landscape import Kind

AXES = ("x", "y")


@readable(
    lambda r: (
        f"{' x '.join(map(str, r.loss.shape))} points, loss {np.nanmin(r.loss):.4g} to "
        f"{np.nanmax(r.loss):.4g}, n = {r.n}"
        + (f", {r.not_finite} points NOT finite" if r.not_finite else "")
        + f"; {r.description}"
    )
)
@dataclass(frozen=True)
class Landscape:
    """The loss on a grid of weights: of one axis, or of two.

    Attributes:
        coordinates: The values of each axis, in units of its direction.
        loss: Mean loss at each point, shape (points,) or (points of x, points of y); infinite or
            NaN where it is.
        std_error: Of the loss over examples, same shape; NaN for one example.
        accuracy: Share of examples classified rightly, same shape; None where that has no meaning.
        labels: What each axis is.
        norms: Length in weight space of one unit of each axis; NaN for a path, whose segments
            differ.
        eigenvalues: Of the Hessian along each axis, where the axes are eigenvectors.
        variance_shares: Of the trajectory's variance along each axis, where the axes are its
            components.
        marks: Named models by their coordinates.
        trajectory: One row per checkpoint: step, x, y and its distance from the plane (or line);
            None without one.
        description: How this was drawn, in words.
        n: Examples.
        parameters: Numbers that move together (a complex one is two).
        left_out: Names of the parameters that do not.
        engine: "loop", one point after the other, or "vectorized", side by side.
        precision: "full", or "tf32" inside `precision("tf32")`.
        seconds: Wall time.
    """

    coordinates: tuple[NDArray[np.float64], ...]
    loss: NDArray[np.float64]
    std_error: NDArray[np.float64]
    accuracy: NDArray[np.float64] | None
    labels: tuple[str, ...]
    norms: tuple[float, ...]
    eigenvalues: tuple[float, ...]
    variance_shares: tuple[float, ...]
    marks: Mapping[str, tuple[float, ...]]
    trajectory: pd.DataFrame | None
    description: str
    n: int
    parameters: int
    left_out: tuple[str, ...]
    engine: str
    precision: str
    seconds: float

    @property
    def not_finite(self) -> int:
        """How many points have a loss that is infinite or NaN."""
        return int((~np.isfinite(self.loss)).sum())

    def frame(self) -> pd.DataFrame:
        """One row per point: x, y (of two axes), loss, std_error, accuracy (where it is known)."""
        import pandas as pd

        points = grid_points(self.coordinates)
        table: dict[str, Any] = dict(zip(AXES, points.T, strict=False))
        table |= {"loss": self.loss.ravel(), "std_error": self.std_error.ravel()}
        if self.accuracy is not None:
            table["accuracy"] = self.accuracy.ravel()
        return pd.DataFrame(table)

    def plot(
        self, out: str | Path | None = None, *, kind: Kind | None = None, ax: Axes | None = None
    ) -> Figure:
        """Draw it; see `sharpkit.plot.landscape`."""
        from sharpkit.plot.landscape import landscape

        return landscape(self, out, kind=kind, ax=ax)


def grid_points(coordinates: tuple[NDArray[np.float64], ...]) -> NDArray[np.float64]:
    """All points, shape (points, axes), the last axis running fastest.

    Example:
        >>> grid_points((np.array([0.0, 1.0]), np.array([5.0, 6.0]))).tolist()
        [[0.0, 5.0], [0.0, 6.0], [1.0, 5.0], [1.0, 6.0]]
    """
    return np.stack([axis.ravel() for axis in np.meshgrid(*coordinates, indexing="ij")], 1)
