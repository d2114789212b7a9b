"""The paper's Figure 3, left: the spectral density of the Hessian, one panel per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sharpkit.curvature.density import SpectralDensity

_COLUMNS = 4
_DECADES = 8  # shown below the highest density


def spectrum(
    densities: Mapping[str, SpectralDensity] | SpectralDensity,
    out: str | Path | None = None,
    *,
    share_axes: bool | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Spectral densities on a log axis, side by side, with λmax and λmax/λ5 in the titles.

    The band is one standard error over probes. Ticks at the bottom mark the five largest
    eigenvalues.

    Args:
        densities: Title of each panel to its density, or one density.
        out: Where to save the picture (and, beside it, its numbers as .csv); None to not save.
        share_axes: The same axes in every panel, so that they can be compared; None for yes if
            the spectra are of similar width (within a factor of 10).
        ax: Where to draw: one axis for each density; None for a figure of their own.

    Returns:
        matplotlib.figure.Figure: The figure of the axes; a new one that is not saved is
        `pyplot.gcf()` too if pyplot is in use.

    Raises:
        ArgumentError: If there is nothing to plot, the densities differ in spacing, there are
            more or fewer axes than densities, or the picture's ending is unknown.

    Source:
        Foret et al., ICLR 2021, Figure 3, left; Ghorbani et al., ICML 2019.

    Example:
        >>> import torch
        >>> from sharpkit.curvature import spectral_density
        >>> density = spectral_density(torch.diag(torch.arange(1.0, 11.0)), steps=10)
        >>> print(spectrum({"a model": density}).axes[0].get_title())
        a model
        λmax = 10, λmax/λ5 = 1.67
    """
    from sharpkit.plot.canvas import forget, new_figure, picture_path, save, whole_figure

    path = None if out is None else picture_path(out)
    panels = dict(densities) if isinstance(densities, Mapping) else {"": densities}
    if not panels:
        raise ArgumentError("there are no densities to plot")
    if share_axes is None:
        share_axes = _similar(list(panels.values()))
    if share_axes and len({d.spacing for d in panels.values()}) > 1:
        raise ArgumentError("the densities are on different kinds of grid: use share_axes=False")
    if ax is not None:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(axes) != len(panels):
            raise ArgumentError(
                f"ax: got {len(axes)} axes for {len(panels)} densities, expected one each"
            )
    else:
        columns = min(len(panels), _COLUMNS)
        rows = -(-len(panels) // columns)
        own = new_figure(0.8 + 3.6 * columns, 3.4 * rows)
        grid = own.subplots(rows, columns, squeeze=False, sharex=share_axes, sharey=share_axes)
        axes = list(grid.flat)
    for axis, (title, density) in zip(axes, panels.items(), strict=False):
        draw_density(axis, f"{title}\n{headline(density)}" if title else headline(density), density)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    limit_densities(axes[: len(panels)], list(panels.values()), share_axes)
    figure = whole_figure(axes[0])
    if path is not None:
        save(figure, path, _numbers(panels))
        if ax is None:
            forget(figure)
    return figure


def headline(density: SpectralDensity) -> str:
    """λmax and λmax/λ5 as text; only λmax if the fifth eigenvalue is missing or not positive.

    Example:
        >>> import torch
        >>> from sharpkit.curvature import spectral_density
        >>> headline(spectral_density(torch.eye(2), steps=2))
        'λmax = 1'
    """
    top = density.largest(5)
    text = f"λmax = {top[0]:.3g}"
    if len(top) == 5 and top[4] > 0:
        text += f", λmax/λ5 = {top[0] / top[4]:.3g}"
    return text


def _similar(densities: list[SpectralDensity]) -> bool:
    """Whether one pair of axes shows all of them well."""
    widths = [float(np.ptp(d.nodes)) for d in densities]
    return len({d.spacing for d in densities}) == 1 and max(widths) <= 10 * min(widths)


def draw_density(axis: Axes, title: str, density: SpectralDensity) -> None:
    """One panel: density, its standard error, and ticks at the five largest eigenvalues."""
    x, y = density.grid, density.density
    axis.plot(x, np.where(y > 0, y, np.nan), color="C0", linewidth=1.2)
    if np.isfinite(density.std_error).all():
        low, high = y - density.std_error, y + density.std_error
        floor = float(y.max()) * 10.0**-_DECADES
        axis.fill_between(x, np.maximum(low, floor / 10), high, color="C0", alpha=0.25, lw=0)
    marks = density.largest(5)
    axis.plot(
        marks, np.full(len(marks), 0.02), "|", color="C3", transform=axis.get_xaxis_transform()
    )
    axis.set_yscale("log")
    if density.spacing == "log":
        axis.set_xscale("log")
    elif density.spacing == "symlog":
        axis.set_xscale("symlog", linthresh=density.threshold)
    axis.set_xlabel("eigenvalue λ")
    axis.set_ylabel("density")
    axis.tick_params(labelbottom=True, labelleft=True)  # on shared axes too
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.25)


def limit_densities(axes: list[Axes], densities: list[SpectralDensity], shared: bool) -> None:
    """Show eight decades below the highest density; the Gaussian tails say nothing."""
    tops = [float(d.density.max()) for d in densities]
    for axis, top in zip(axes, tops, strict=True):
        highest = max(tops) if shared else top
        if highest > 0:
            axis.set_ylim(highest * 10.0**-_DECADES, highest * 3)


def _numbers(panels: Mapping[str, SpectralDensity]) -> pd.DataFrame:
    import pandas as pd

    frames = [density.frame().assign(model=title) for title, density in panels.items()]
    return pd.concat(frames)[["model", "eigenvalue", "density", "std_error"]]
