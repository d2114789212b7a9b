"""The spectra of all blocks under each other, what couples them, and how much they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from sharpkit.curvature.block_result import LayerSpectra

    Array = NDArray[np.float64]

_DECADES = 5  # of the share of eigenvalues, shown in one row
_WRITTEN = 12  # blocks up to which numbers stand in the cells


def layer_spectra(
    result: LayerSpectra, out: str | Path | None = None, *, ax: Sequence[Axes] | None = None
) -> Figure:
    """Every block's spectrum in a row of its own, the coupling of blocks, and their distances.

    On the left the height is the logarithm of the share of eigenvalues around λ, five decades per
    row; the axis is logarithmic on both sides of 0. In the middle ‖A_ab‖²_F / ‖A‖²_F, with the
    cross-block share in its title; on the right the Jensen-Shannon distances of the normalised
    spectra.

    Args:
        result: From `sharpkit.layer_spectra`.
        out: Where to save the picture (and, beside it, the table of blocks as .csv); None to not.
        ax: Three axes to draw on, two where the cross-block share was not estimated; None for a
            figure of their own.

    Returns:
        matplotlib.figure.Figure: The figure of the axes; a new one that is not saved is
        `pyplot.gcf()` too if pyplot is in use.

    Raises:
        ArgumentError: If there are more or fewer axes, or the picture's ending is unknown.

    Source:
        Zhang et al., "Why Transformers Need Adam", NeurIPS 2024, figures 3 and 4.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        >>> found = sk.layer_spectra(model, (torch.randn(8, 2), torch.arange(8) % 2), steps=5)
        >>> layer_spectra(found).axes[0].get_ylabel()
        'block'
    """
    from sharpkit.plot.canvas import forget, new_figure, picture_path, save, whole_figure

    path = None if out is None else picture_path(out)
    panels = 2 if result.lengths is None else 3
    if ax is None:
        rows = max(3.2, 1.2 + 0.42 * len(result))
        figure = new_figure(5.0 + (panels - 1) * (rows + 0.4), rows + 0.8)
        axes = list(figure.subplots(1, panels, sharey=True))
    else:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(axes) != panels:
            raise ArgumentError(f"ax: got {len(axes)} axes, expected {panels}")
    _draw_rows(axes[0], result)
    if result.lengths is not None:
        share = result.cross_block_share
        title = f"share of ‖A‖², across blocks {share.value:.3g}"
        if np.isfinite(share.std_error):
            title += f" ± {share.std_error:.1g}"
        _draw_matrix(axes[1], list(result), result.coupling, title)
    distances = result.distances().to_numpy()
    mean = f", mean {result.mean_distance():.3g}" if len(result) > 1 else ""
    _draw_matrix(axes[-1], list(result), distances, f"Jensen-Shannon distance{mean}")
    whole = whole_figure(axes[0])
    if path is not None:
        save(whole, path, result.frame())
        if ax is None:
            forget(whole)
    return whole


def _draw_rows(axis: Axes, result: LayerSpectra) -> None:
    from sharpkit.curvature.distances import THRESHOLD, on_one_axis

    grid, masses = on_one_axis(list(result.values()), normalised=False)
    height = np.log10(np.maximum(masses / masses.max(), 10.0**-_DECADES)) / _DECADES + 1
    for i, row in enumerate(height):
        axis.fill_between(grid, i + 0.5, i + 0.5 - 0.9 * row, color="C0", alpha=0.6, lw=0)
        axis.axhline(i + 0.5, color="0.8", linewidth=0.6)
    top = max(float(np.abs(d.nodes).max()) for d in result.values()) or 1.0
    axis.set_xscale("symlog", linthresh=THRESHOLD * top)
    decade = np.floor(np.log10(top))
    ticks = [sign * 10.0 ** (decade - k) for k in (0, 2) for sign in (-1, 1)]
    axis.set_xticks(sorted([0.0, *(t for t in ticks if grid[0] <= t <= grid[-1])]))
    axis.set_xlim(float(grid[0]), float(grid[-1]))
    axis.set_ylim(len(result) - 0.5, -0.5)
    axis.set_yticks(range(len(result)), list(result))
    axis.set_ylabel("block")
    axis.set_xlabel("eigenvalue λ")
    axis.set_title("spectra of blocks", fontsize=9)


def _draw_matrix(axis: Axes, names: list[str], values: Array, title: str) -> None:
    axis.imshow(
        values, cmap="Blues", aspect="auto", vmin=0.0, vmax=max(float(values.max()), 1e-300)
    )
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(title, fontsize=9)
    if len(names) <= _WRITTEN:
        dark = 0.6 * float(values.max())
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if value > dark else "black"
            axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
