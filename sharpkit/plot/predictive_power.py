"""The paper's Figure 3, right: the predictive power of m-sharpness against m."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.legend import write_with_legend
from sharpkit.evaluation.statistics import HEADLINES, TABLE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# lines whose values differ by more than this factor get a y axis of their own
_OWN_AXIS = 2.5
_NOISE = "noise: mean to 95th percentile"


def predictive_power(
    table: pd.DataFrame,
    out: str | Path | None = None,
    *,
    statistic: str = HEADLINES[0],
    ax: Axes | None = None,
) -> Figure:
    """Predictive power against m on a log-2 axis, one line per task, with 95 % bands over models.

    The grey band is noise, from the mean of the null to its 95th percentile (over all
    lines of an axis, the lowest mean and the highest percentile); a value within it is no evidence.
    Tasks whose values are of different size are drawn on two y axes, as in the paper.

    Args:
        table: From `sharpkit.evaluate`; the rows that have an m.
        out: Where to save the picture (and, beside it, its numbers as .csv, with their meaning in
            `<name>_columns.csv`); None to not save.
        statistic: The column to plot; its band is in `<statistic>_low` and `_high`.
        ax: Where to draw; None for a figure of its own.

    Returns:
        matplotlib.figure.Figure: The figure of the axis; a new one that is not saved is
        `pyplot.gcf()` too if pyplot is in use.

    Raises:
        ScoreError: If the table has no m, no such statistic, or only NaN in it.
        ArgumentError: If the picture is called like a table of the run, or its ending is unknown.

    Source:
        Foret et al., ICLR 2021, Figure 3, right.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"task": "t", "m": [1, 4], "rho": 0.1, "cmi_pgdl": [0.2, 0.1]})
        >>> predictive_power(table).axes[0].get_xlabel()
        'm'
    """
    from sharpkit.plot.canvas import forget, new_figure, picture_path, save, whole_figure

    path = None if out is None else picture_path(out)
    if path is not None and path.stem in ("scores", "evaluation", "combined"):
        raise ArgumentError(f"{path}: its numbers would overwrite a run's {path.stem}.csv")
    rows = _plotted(table, statistic)
    axis = new_figure(6.4, 4.8).add_subplot() if ax is None else ax
    draw_predictive_power(axis, rows, statistic)
    figure = whole_figure(axis)
    if path is not None:
        save(figure, path, rows, write_with_legend)
        if ax is None:
            forget(figure)
    return figure


def draw_predictive_power(left: Axes, table: pd.DataFrame, statistic: str) -> None:
    """Draw `predictive_power` into an axis, with a second one on its right where needed."""
    rows = _plotted(table, statistic)
    by = ["task"] + [c for c in ("measure", "rho") if c in rows and rows[c].nunique() > 1]
    lines = dict(list(rows.groupby(by, sort=False)))
    axes = _axes(left, {key: float(line[statistic].max()) for key, line in lines.items()})
    handles = []
    for number, (key, line) in enumerate(lines.items()):
        handles.append(_draw(axes[key], line, statistic, f"C{number}", _label(by, key, line)))
    for axis, keys in _by_axis(axes).items():
        handles += _draw_noise(axis, rows[rows["task"].isin([k[0] for k in keys])], statistic)
    left.set_xscale("log", base=2)
    ticks = sorted(rows["m"].unique())
    left.set_xticks(ticks, [f"{m:g}" for m in ticks])
    left.set_xlabel("m")
    for axis, colour in _sole_colours(axes, list(lines)).items():
        axis.set_ylabel(_title(statistic), color=colour)
        axis.tick_params(axis="y", colors=colour)
    left.set_title(f"Predictive power of m-sharpness, 95 % intervals\n{_setting(rows)}", fontsize=9)
    # below the axis, where no data are
    left.legend(
        handles=list({h.get_label(): h for h in handles}.values()),
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        frameon=False,
    )
    left.grid(alpha=0.25)


def _plotted(table: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """The rows with an m, in its order."""
    if not hasattr(table, "columns"):
        raise ArgumentError(f"expected the table of sharpkit.evaluate, got {type(table).__name__}")
    if "m" not in table or statistic not in table:
        known = [name for name in TABLE if name in table]
        there = f"; it has {', '.join(known)}" if "m" in table and known else ""
        raise ScoreError(
            f"the table has no columns m and {statistic}: nothing to plot against m{there}"
        )
    rows = table[table["m"].notna()].sort_values("m", kind="stable")
    if rows.empty:
        raise ScoreError("the table has no row with an m: nothing to plot")
    if not rows[statistic].notna().any():
        known = [name for name in TABLE if name in rows and rows[name].notna().any()]
        defined = ", ".join(known) or "no other statistic either"
        raise ScoreError(f"{statistic} is NaN for every m: nothing to plot; defined: {defined}")
    return rows


def _factor(statistic: str) -> float:
    return TABLE[statistic].factor if statistic in TABLE else 1.0


def _title(statistic: str) -> str:
    return TABLE[statistic].title if statistic in TABLE else statistic


def _setting(rows: pd.DataFrame) -> str:
    """What the measures were computed with."""
    parts = []
    if "rho" in rows and rows["rho"].nunique() == 1:
        parts.append(f"ρ = {rows['rho'].iloc[0]:g}")
    if "n" in rows:
        sizes = rows["n"].dropna().unique()
        parts.append(f"n = {', '.join(f'{n:g}' for n in sizes)}" if len(sizes) else "all examples")
    if "seed" in rows:
        parts.append(f"seed {', '.join(f'{s:g}' for s in rows['seed'].dropna().unique())}")
    return ", ".join(parts)


def _axes(left: Axes, heights: dict[Any, float]) -> dict[Any, Axes]:
    """The axis of each line: the smaller values left, the larger right if they differ much."""
    low, high = min(heights.values()), max(heights.values())
    if not low > 0 or high / low <= _OWN_AXIS:
        return dict.fromkeys(heights, left)
    right = left.twinx()
    middle = (low * high) ** 0.5
    return {key: right if height > middle else left for key, height in heights.items()}


def _by_axis(axes: dict[Any, Axes]) -> dict[Axes, list[Any]]:
    found: dict[Axes, list[Any]] = {}
    for key, axis in axes.items():
        found.setdefault(axis, []).append(key)
    return found


def _draw(axis: Axes, line: pd.DataFrame, statistic: str, colour: str, label: str) -> Any:
    unit = _factor(statistic)
    (handle,) = axis.plot(line["m"], unit * line[statistic], "o-", color=colour, label=label)
    low, high = f"{statistic}_low", f"{statistic}_high"
    if low in line and high in line and line[low].notna().any():
        ends = unit * line[low], unit * line[high]
        axis.fill_between(line["m"], *ends, color=colour, alpha=0.15, linewidth=0)
    return handle


def _draw_noise(axis: Axes, rows: pd.DataFrame, statistic: str) -> list[Any]:
    """A grey band where noise is; a line where its mean is the same in every zoo."""
    mean, top = f"{statistic}_null_mean", f"{statistic}_null_95"
    if mean in rows and rows[mean].notna().any():
        by_m = rows.groupby("m")
        low, high = (_factor(statistic) * x for x in (by_m[mean].min(), by_m[top].max()))
        return [
            axis.fill_between(
                low.index, low, high, color="0.5", alpha=0.35, linewidth=0, zorder=0, label=_NOISE
            )
        ]
    level = TABLE[statistic].no_relation if statistic in TABLE else None
    if level is not None:
        return [axis.axhline(level, color="0.5", linestyle="--", zorder=0, label="no relation")]
    return []


def _sole_colours(axes: dict[Any, Axes], keys: list[Any]) -> dict[Axes, str]:
    """Each axis in its line's colour where it has just one and there are two axes."""
    colours: dict[Axes, list[str]] = {}
    for number, key in enumerate(keys):
        colours.setdefault(axes[key], []).append(f"C{number}")
    alone = len(colours) == 1
    return {axis: "black" if alone or len(c) > 1 else c[0] for axis, c in colours.items()}


def _label(by: list[str], key: Any, line: pd.DataFrame) -> str:
    parts = [str(key[0])]
    parts += [f"{name} = {value}" for name, value in zip(by[1:], key[1:], strict=True)]
    if "models" in line:
        parts.append(f"{int(line['models'].min())} models")
    return ", ".join(parts)
