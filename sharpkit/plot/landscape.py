"""Loss landscapes: lines with error bands, contours, surfaces; and the barrier on a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from sharpkit.landscapes.barrier import Barrier
    from sharpkit.landscapes.result import Landscape

Kind: TypeAlias = Literal["line", "contour", "surface"]

_LEVELS = 15  # of a contour plot
_LOG_FROM = 10.0  # ratio of the largest to the least loss from which levels are logarithmic
_LONGEST = 4  # ratio of the sides up to which a plane is drawn at its true proportions
_COLOURS = "viridis"


def landscape(
    result: Landscape,
    out: str | Path | None = None,
    *,
    kind: Kind | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The loss as a line, as contours, or as a surface.

    A line has a band of one standard error over examples, and the accuracy on the right axis.
    Contours are spaced evenly in the logarithm of the loss where that spans more than a factor of
    ten. Crosses mark models, a red line the trajectory of checkpoints. Points whose loss is not
    finite stay white, and the title counts them.

    Args:
        result: From `sharpkit.landscape`.
        out: Where to save the picture (and, beside it, its numbers as .csv); None to not save.
        kind: "line" for one axis; "contour" or "surface" for two; None for "line" or "contour".
        ax: Where to draw; for a surface one with projection="3d"; None for a figure of its own.

    Returns:
        matplotlib.figure.Figure: The figure of the axis; a new one that is not saved is
        `pyplot.gcf()` too if pyplot is in use.

    Raises:
        ArgumentError: If kind or ax does not fit the landscape, or the picture's ending is unknown.

    Source:
        Li et al., NeurIPS 2018, figures 1, 5 and 9.

    Example:
        >>> import torch, sharpkit as sk
        >>> model, data = torch.nn.Linear(4, 3), (torch.randn(8, 4), torch.arange(8) % 3)
        >>> found = sk.landscape(model, data, points=5)
        >>> landscape(found).axes[0].get_xlabel()
        'random direction 1'
    """
    from sharpkit.plot.canvas import forget, new_figure, picture_path, save, whole_figure

    path = None if out is None else picture_path(out)
    kinds: tuple[Kind, ...] = ("line",) if result.loss.ndim == 1 else ("contour", "surface")
    kind = kind or kinds[0]
    if kind not in kinds:
        raise ArgumentError(
            f"kind must be {' or '.join(map(repr, kinds))} for a landscape of {result.loss.ndim} "
            f"axes, got {kind!r}"
        )
    if ax is not None and (ax.name == "3d") != (kind == "surface"):
        needed = "with" if kind == "surface" else "without"
        raise ArgumentError(f'ax: a {kind} needs an axis {needed} projection="3d"')
    axis = ax
    if axis is None:
        options = {"projection": "3d"} if kind == "surface" else {}
        axis = new_figure(6.0, 4.6).add_subplot(**options)
    {"line": _draw_line, "contour": _draw_contours, "surface": _draw_surface}[kind](axis, result)
    axis.set_title(_title(result), fontsize=9)
    figure = whole_figure(axis)
    if path is not None:
        save(figure, path, result.frame())
        if ax is None:
            forget(figure)
    return figure


def barrier(result: Barrier, out: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
    """The loss on the line between two models, and the straight line that it is measured from.

    The band holds the whole curve at once; the arrow is the barrier.

    Args:
        result: From `sharpkit.barrier`.
        out: Where to save the picture (and, beside it, its numbers as .csv); None to not save.
        ax: Where to draw; None for a figure of its own.

    Returns:
        matplotlib.figure.Figure: As `landscape`.

    Source:
        Frankle et al., ICML 2020, figure 2.

    Example:
        >>> import torch, sharpkit as sk
        >>> data = torch.randn(8, 4), torch.arange(8) % 3
        >>> found = sk.barrier(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), data, points=5)
        >>> barrier(found).axes[0].get_xlabel()
        't (0 = a, 1 = b)'
    """
    from sharpkit.plot.canvas import forget, new_figure, picture_path, save, whole_figure

    path = None if out is None else picture_path(out)
    axis = new_figure(6.0, 4.2).add_subplot() if ax is None else ax
    chord = result.loss - result.excess
    low, high = chord + result.excess_low, chord + result.excess_high
    axis.fill_between(result.t, low, high, color="C0", alpha=0.25, linewidth=0)
    axis.plot(result.t, result.loss, color="C0", linewidth=1.6, label="loss")
    axis.plot(result.t, chord, color="0.4", linestyle="--", linewidth=1.2, label="between the ends")
    if np.isfinite(result.value) and result.value > 0:
        at = int(np.argmin(np.abs(result.t - result.at)))
        arrow = {"arrowstyle": "<->", "color": "C3", "shrinkA": 0, "shrinkB": 0}
        ends = (result.at, result.loss[at]), (result.at, chord[at])
        axis.annotate("", xy=ends[0], xytext=ends[1], arrowprops=arrow)
    handles, _ = axis.get_legend_handles_labels()
    if result.accuracy is not None:
        handles.append(_draw_accuracy(axis, result.t, result.accuracy))
    axis.set_xlabel("t (0 = a, 1 = b)")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.25)
    _add_legend(axis, handles)
    axis.set_title(
        f"barrier {result.value:.3g} ({result.low:.3g} to {result.high:.3g})\n"
        f"{100 * result.confidence:g} % band of the whole curve, n = {result.n}",
        fontsize=9,
    )
    figure = whole_figure(axis)
    if path is not None:
        save(figure, path, result.frame())
        if ax is None:
            forget(figure)
    return figure


def _draw_line(axis: Axes, result: Landscape) -> None:
    (x,), loss = result.coordinates, _finite(result.loss)
    band = result.std_error
    axis.fill_between(x, loss - band, loss + band, color="C0", alpha=0.25, linewidth=0)
    axis.plot(x, loss, color="C0", linewidth=1.6, label="loss ± standard error")
    positive = loss[np.isfinite(loss)]
    if positive.min() > 0 and positive.max() > _LOG_FROM**2 * positive.min():
        axis.set_yscale("log")
    for place in result.marks.values():
        axis.axvline(place[0], color="0.5", linestyle=":", linewidth=1.0)
    handles, _ = axis.get_legend_handles_labels()
    if result.trajectory is not None:
        steps = result.trajectory["x"].to_numpy()
        handles += axis.plot(
            steps, np.full(len(steps), 0.02), "|", color="C3",
            transform=axis.get_xaxis_transform(), label="checkpoints",
        )  # fmt: skip
    if result.accuracy is not None:
        handles.append(_draw_accuracy(axis, x, result.accuracy))
    axis.set_xlabel(result.labels[0])
    axis.set_ylabel("loss")
    axis.grid(alpha=0.25)
    _add_legend(axis, handles)


def _add_legend(axis: Axes, handles: Sequence[Any]) -> None:
    """Below the axis, where no data are."""
    axis.legend(
        handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3,
        frameon=False,
    )  # fmt: skip


def _draw_accuracy(axis: Axes, x: NDArray[np.float64], accuracy: NDArray[np.float64]) -> Any:
    right = axis.twinx()
    (line,) = right.plot(x, accuracy, color="C1", linewidth=1.2, label="accuracy")
    right.set_ylabel("accuracy", color="C1")
    right.tick_params(axis="y", colors="C1")
    right.set_ylim(-0.02, 1.02)
    return line


def _draw_contours(axis: Axes, result: Landscape) -> None:
    from matplotlib import patheffects

    (x, y), loss = result.coordinates, np.ma.masked_invalid(result.loss.T)
    levels, norm = contour_levels(result.loss)
    filled = axis.contourf(x, y, loss, levels=levels, cmap=_COLOURS, norm=norm)
    lines = axis.contour(x, y, loss, levels=levels, colors="white", linewidths=0.5, alpha=0.6)
    axis.clabel(lines, levels[::3], fmt=lambda v: f"{v:.3g}", fontsize=7)
    # as high as the plane, whatever its proportions
    bar = axis.figure.colorbar(filled, cax=axis.inset_axes((1.03, 0.0, 0.045, 1.0)))
    bar.set_label("loss")
    bar.set_ticks(levels[::2].tolist())
    bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
    bar.ax.minorticks_off()
    if result.trajectory is not None:
        steps = result.trajectory
        axis.plot(steps["x"], steps["y"], "o-", color="C3", markersize=3, linewidth=1.2)
    for name, (left, up) in result.marks.items():
        axis.plot(left, up, "x", color="white", markersize=8, markeredgewidth=2)
        if len(result.marks) > 1:
            axis.annotate(
                name, (left, up), xytext=(5, 5), textcoords="offset points", color="white",
                fontsize=8,
                path_effects=[patheffects.withStroke(linewidth=1.5, foreground="black")],
            )  # fmt: skip
    axis.set_xlim(x[0], x[-1])
    axis.set_ylim(y[0], y[-1])
    widths = np.array([np.ptp(x), np.ptp(y)])
    if (
        np.isclose(result.norms[0], result.norms[1], rtol=1e-4)
        and widths.max() < _LONGEST * widths.min()
    ):
        axis.set_aspect("equal")
    axis.set_xlabel(result.labels[0])
    axis.set_ylabel(result.labels[1])


def _draw_surface(axis: Any, result: Landscape) -> None:
    x, y = result.coordinates
    logarithmic = contour_levels(result.loss)[1] is not None
    loss = _finite(result.loss)
    shown = np.log10(loss) if logarithmic else loss
    xs, ys = np.meshgrid(x, y, indexing="ij")
    axis.plot_surface(xs, ys, shown, cmap=_COLOURS, linewidth=0.1, rcount=101, ccount=101)
    axis.set_xlabel(result.labels[0], fontsize=8)
    axis.set_ylabel(result.labels[1], fontsize=8)
    axis.set_zlabel("log₁₀ loss" if logarithmic else "loss", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_box_aspect(None, zoom=0.85)


def contour_levels(loss: NDArray[np.float64]) -> tuple[NDArray[np.float64], Any]:
    """Where contours run, and the norm of their colours: logarithmic, or None.

    Example:
        >>> levels, norm = contour_levels(np.array([1.0, 1000.0, np.inf]))
        >>> levels[[0, -1]], norm is not None
        (array([   1., 1000.]), True)
    """
    from matplotlib.colors import LogNorm

    finite = loss[np.isfinite(loss)]
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > _LOG_FROM * low:
        levels = np.geomspace(low, high, _LEVELS)
        levels[[0, -1]] = low, high  # not by rounding within
        return levels, LogNorm(low, high)
    if high <= low:  # a plane is drawn as one
        low, high = low - 1e-9 - abs(low) * 1e-6, high + 1e-9 + abs(high) * 1e-6
    return np.linspace(low, high, _LEVELS), None


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan)


def _title(result: Landscape) -> str:
    first, *_ = result.description.split("; ")
    title = f"{first}\nn = {result.n}"
    if result.not_finite:
        title += f", {result.not_finite} points are not finite"
    return "\n".join(fill(line, 70) for line in title.splitlines())
