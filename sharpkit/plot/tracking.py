"""Sharpness along a training: λmax and the optimizer's threshold above, the loss below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVATURES = {
    "lambda_max": "λmax",
    "preconditioned_lambda_max": "preconditioned λmax",
    "critical_sharpness": "critical sharpness",
}

_FAR = 5.0  # times the largest curvature: a threshold above that is told, not drawn


def tracking(
    frame: pd.DataFrame,
    out: str | Path | None = None,
    *,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """λmax, and the threshold above which a step overshoots, against the step; the loss below.

    A threshold that is always past 5 times the largest curvature is above the picture, and told.

    Args:
        frame: What `Tracker.frame()` gives, or its CSV file read with pandas. Drawn are the columns
            `lambda_max` and `preconditioned_lambda_max` (the band is their residual),
            `critical_sharpness`, `threshold` and `loss`, as far as they are there.
        out: Where to save the picture (and, beside it, its numbers as .csv); None to not save.
        ax: Where to draw: one axis for the curvature, or two, for the loss as well; None for a
            figure of their own.

    Returns:
        matplotlib.figure.Figure: The figure of the axes; a new one that is not saved is
        `pyplot.gcf()` too if pyplot is in use.

    Raises:
        ArgumentError: If no curvature is in the table, for more than two axes or a second one
            without a loss, or if the picture's ending is unknown.

    Source:
        Cohen et al., ICLR 2021 (2103.00065), figure 1.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"step": [0, 10], "lambda_max": [1.0, 3.0], "threshold": [4.0] * 2})
        >>> [line.get_label() for line in tracking(rows).axes[0].lines]
        ['λmax', 'threshold']
    """
    from sharpkit.plot.canvas import forget, new_figure, picture_path, save, whole_figure

    path = None if out is None else picture_path(out)
    present = [name for name in _CURVATURES if name in frame and frame[name].notna().any()]
    if not present:
        raise ArgumentError(
            f"the table has none of {', '.join(_CURVATURES)}: there is no curvature to plot"
        )
    has_loss = "loss" in frame
    if ax is None:
        own = new_figure(6.4, 5.0 if has_loss else 3.4)
        heights = [2, 1] if has_loss else [1]
        grid = own.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)
        axes = list(grid.flat)
    else:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
        if not 1 <= len(axes) <= 1 + has_loss:
            raise ArgumentError(f"ax: got {len(axes)} axes, expected 1{' or 2' * has_loss}")
    _draw_curvatures(axes[0], frame, present)
    if len(axes) == 2:
        axes[1].plot(frame["step"], frame["loss"], color="C7", linewidth=1.2)
        axes[1].set_ylabel("loss")
        axes[1].grid(alpha=0.25)
    axes[-1].set_xlabel("step")
    figure = whole_figure(axes[0])
    if path is not None:
        save(figure, path, frame)
        if ax is None:
            forget(figure)
    return figure


def _draw_curvatures(axis: Axes, frame: pd.DataFrame, present: list[str]) -> None:
    for number, name in enumerate(present):
        x, y = (frame[column].to_numpy(dtype=float) for column in ("step", name))
        axis.plot(x, y, color=f"C{number}", linewidth=1.2, label=_CURVATURES[name])
        if f"{name}_residual" in frame:
            off = frame[f"{name}_residual"].to_numpy(dtype=float)
            axis.fill_between(x, y - off, y + off, color=f"C{number}", alpha=0.25, lw=0)
    top = max(float(frame[name].max()) for name in present)
    if "threshold" in frame:
        threshold = frame["threshold"].to_numpy(dtype=float)
        bounded = np.where(np.isfinite(threshold), threshold, np.nan)
        lowest = np.nanmin(bounded, initial=np.inf)
        far = top > 0 and _FAR * top < lowest < np.inf  # it would press the curves flat
        label = f"threshold, above: {lowest:.3g} or more" if far else "threshold"
        axis.plot(frame["step"], bounded, "k--", linewidth=1.0, label=label)
        if far:
            axis.set_ylim(top=1.2 * top)
    axis.set_ylim(bottom=min(0.0, *(float(frame[name].min()) for name in present)))
    axis.set_ylabel("curvature")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
