"""The paper's Figure 3: spectra, test error against ρ, and predictive power, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sharpkit.errors import ArgumentError
from sharpkit.evaluation.statistics import HEADLINES
from sharpkit.plot.predictive_power import draw_predictive_power
from sharpkit.plot.spectrum import draw_density, limit_densities

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from sharpkit.curvature.density import SpectralDensity

_NAMES = {"sgd": "SGD", "sam": "SAM"}
_OFF_SCALE = 1.25  # test errors beyond this multiple of the lowest are not shown
_WIDTHS = {"left": 6.4, "middle": 5.0, "right": 5.0}


def figure3(
    *,
    densities: Mapping[tuple[str, int], SpectralDensity] | None = None,
    spectra: pd.DataFrame | None = None,
    test_error: pd.DataFrame | None = None,
    predictive_power: pd.DataFrame | None = None,
    statistic: str = HEADLINES[0],
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draw the panels whose tables are given; the tables are those of `sharpkit.figure3`.

    Args:
        densities: Left: (optimizer, epoch) to the density, one row per epoch.
        spectra: Left: columns optimizer, epoch, lambda_max, lambda_max_over_lambda_5; the titles
            give the mean over rows and its standard error.
        test_error: Middle: columns optimizer, m, rho, lr, test_error, std_error.
        predictive_power: Right: from `sharpkit.evaluate`.
        statistic: What the right panel shows.
        figure: Where to draw, an empty figure or a part of one; None for a new one.

    Returns:
        matplotlib.figure.Figure: The figure; a new one is `pyplot.gcf()` too if pyplot is in use.

    Raises:
        ArgumentError: No panel is given.

    Source:
        Foret et al., ICLR 2021, Figure 3.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"task": "t", "m": [1, 4], "rho": 0.1, "cmi_pgdl": [0.2, 0.1]})
        >>> figure3(predictive_power=table).subfigs[0].axes[0].get_xlabel()
        'm'
    """
    from sharpkit.plot.canvas import new_figure

    given = {"left": densities, "middle": test_error, "right": predictive_power}
    names = [name for name, content in given.items() if content is not None]
    if not names:
        raise ArgumentError("there is no panel to draw")
    rows = 1 if densities is None else len({epoch for _, epoch in densities})
    height = max(5.0, 1.9 * rows)
    widths = [_WIDTHS[name] for name in names]
    drawn = new_figure(sum(widths), height) if figure is None else figure
    parts = drawn.subfigures(1, len(names), width_ratios=widths, squeeze=False)[0]
    for name, part in zip(names, parts, strict=True):
        if name == "left":
            _draw_spectra(part, densities or {}, spectra)
        elif name == "middle":
            draw_test_error(part.subplots(), test_error)  # type: ignore[arg-type]
        else:
            axis = part.subplots()
            draw_predictive_power(axis, predictive_power, statistic)  # type: ignore[arg-type]
    whole: Figure = drawn.figure
    return whole


def draw_test_error(axis: Axes, table: pd.DataFrame) -> None:
    """Test error against ρ, a line with standard errors for each m; SGD as a band across.

    Errors beyond 1.25 times the lowest are cut off.
    """
    import pandas as pd
    from matplotlib import colormaps

    sam = table[table["optimizer"] == "sam"]
    sizes = sorted(sam["m"].unique())
    shades = colormaps["viridis_r"]
    for number, m in enumerate(sizes):
        line = sam[sam["m"] == m].sort_values("rho")
        axis.errorbar(
            line["rho"],
            100 * line["test_error"],
            100 * line["std_error"].fillna(0),
            fmt="o-",
            markersize=4,
            capsize=2,
            linewidth=1.4,
            color=shades(0.15 + 0.85 * number / max(1, len(sizes) - 1)),
            label=f"SAM, m = {m:g}",
        )
    sgd = table[table["optimizer"] == "sgd"]
    sgd = sgd[sgd["lr"].isin(sam["lr"]) | sam.empty]
    for row in sgd.itertuples():
        mean, error = 100 * float(str(row.test_error)), 100 * float(str(row.std_error))
        axis.axhline(mean, color="black", linestyle="--", linewidth=1.2, label="SGD")
        if error == error:
            axis.axhspan(mean - error, mean + error, color="black", alpha=0.1, linewidth=0)
    drawn = pd.concat([sam, sgd])
    lowest = float(drawn["test_error"].min())
    if drawn["test_error"].max() > _OFF_SCALE * lowest:  # radii too large to learn anything
        bottom = float((drawn["test_error"] - drawn["std_error"].fillna(0)).min())
        top = max(_OFF_SCALE * lowest, 1.05 * float(sgd["test_error"].max()) if len(sgd) else 0.0)
        axis.set_ylim(98 * bottom, 100 * top)
    radii = sorted(sam["rho"].unique())
    if radii and radii[0] > 0:
        axis.set_xscale("log")
        axis.set_xticks(radii, [f"{rho:g}" for rho in radii])
        axis.minorticks_off()
    axis.set_xlabel("ρ")
    axis.set_ylabel("test error (%)")
    seeds = sorted(table["seeds"].unique()) if "seeds" in table else []
    over = f" over {int(seeds[-1])} seeds" if seeds else ""
    axis.set_title(f"Test error of m-SAM\nmean and standard error{over}", fontsize=10)
    axis.grid(alpha=0.25)
    # below the axis, where no data are
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _draw_spectra(
    part: Any, densities: Mapping[tuple[str, int], SpectralDensity], spectra: pd.DataFrame | None
) -> None:
    """One row per epoch, SGD beside SAM on the same axes."""
    optimizers = [o for o in ("sgd", "sam") if any(o == optimizer for optimizer, _ in densities)]
    epochs = sorted({epoch for _, epoch in densities})
    axes = part.subplots(len(epochs), len(optimizers), squeeze=False, sharex="row", sharey="row")
    part.suptitle("Hessian spectra in the course of training", fontsize=10)
    for row, epoch in zip(axes, epochs, strict=True):
        drawn = []
        for axis, optimizer in zip(row, optimizers, strict=True):
            density = densities.get((optimizer, epoch))
            if density is None:
                axis.set_title(f"{_NAMES[optimizer]}, epoch {epoch}\nno result", fontsize=9)
                axis.set_axis_off()
                continue
            draw_density(axis, _title(optimizer, epoch, spectra), density)
            drawn.append((axis, density))
        limit_densities([a for a, _ in drawn], [d for _, d in drawn], True)


def _title(optimizer: str, epoch: int, spectra: pd.DataFrame | None) -> str:
    """Optimizer and epoch, λmax and λmax/λ5 with their standard errors over trainings."""
    title = f"{_NAMES[optimizer]}, epoch {epoch}"
    if spectra is None:
        return title
    rows = spectra[(spectra["optimizer"] == optimizer) & (spectra["epoch"] == epoch)]
    parts = []
    for column, symbol in (("lambda_max", "λmax"), ("lambda_max_over_lambda_5", "λmax/λ5")):
        values = rows[column].dropna().to_numpy(float)
        if len(values):
            parts.append(f"{symbol} {values.mean():.3g}")
            if len(values) > 1:
                parts[-1] += f" ± {values.std(ddof=1) / math.sqrt(len(values)):.2g}"
    return f"{title}\n{', '.join(parts)}"
