"""The paper's Figure 3, right: the predictive power of m-sharpness against m."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.errors import ArgumentError, ScoreError
from sharpkit.evaluation.labels import LABELS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# lines whose scores differ by more than this factor get a y axis of their own
_OWN_AXIS = 2.5


def predictive_power(
    table: pd.DataFrame, out: str | Path | None = None, *, statistic: str = "cmi_pgdl"
) -> Figure:
    """Score against m on a log-2 axis, one line per task, with 95 % bootstrap bands over models.

    Tasks whose scores are of different size are drawn on two y axes, as in the paper.

    Args:
        table: From `sharpkit.evaluate`; the rows that have an m.
        out: Where to save the picture (and, beside it, its numbers as .csv); None to not save.
        statistic: The column to plot; its band is in `<statistic>_low` and `_high`.

    Returns:
        matplotlib.figure.Figure: The figure.

    Raises:
        ScoreError: If the table has no m, no such statistic, or only NaN in it.
        ArgumentError: If the picture is called like a table of the run.

    Source:
        Foret et al., ICLR 2021, Figure 3, right.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"task": "t", "m": [1, 4], "rho": 0.1, "cmi_pgdl": [0.2, 0.1]})
        >>> predictive_power(table).axes[0].get_xlabel()
        'm'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    rows = draw_predictive_power(figure.add_subplot(), table, statistic)
    if out is not None:
        path = Path(out)
        if path.stem in ("scores", "evaluation", "combined"):
            raise ArgumentError(f"{path}: its numbers would overwrite a run's {path.stem}.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        rows.to_csv(path.with_suffix(".csv"), index=False)
    return figure


def draw_predictive_power(left: Axes, table: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Draw `predictive_power` into an axis, with a second one on its right where needed.

    Returns:
        pandas.DataFrame: The rows that are drawn.
    """
    if "m" not in table or statistic not in table:
        raise ScoreError(f"the table has no columns m and {statistic}: nothing to plot against m")
    rows = table[table["m"].notna()].sort_values("m")
    by = ["task"] + [c for c in ("measure", "rho") if c in rows and rows[c].nunique() > 1]
    lines = dict(list(rows.groupby(by, sort=False)))
    if not lines:
        raise ScoreError("the table has no row with an m: nothing to plot")
    if not rows[statistic].notna().any():
        raise ScoreError(
            f"{statistic} is NaN for every m: nothing to plot; another statistic may be defined"
        )
    axes = _axes(left, {key: float(line[statistic].max()) for key, line in lines.items()})
    handles = []
    for number, (key, line) in enumerate(lines.items()):
        handles.append(_draw(axes[key], line, statistic, f"C{number}", _label(by, key, line)))
    left.set_xscale("log", base=2)
    ticks = sorted(rows["m"].unique())
    left.set_xticks(ticks, [f"{m:g}" for m in ticks])
    left.set_xlabel("m")
    for axis, colour in _sole_colours(axes, list(lines)).items():
        axis.set_ylabel(LABELS.get(statistic, statistic), color=colour)
        axis.tick_params(axis="y", colors=colour)
    left.set_title("Predictive power of m-sharpness (95 % bootstrap over models)", fontsize=10)
    left.legend(handles=handles, fontsize=9, loc="upper right")
    left.grid(alpha=0.25)
    return rows


def _axes(left: Axes, heights: dict[Any, float]) -> dict[Any, Axes]:
    """The axis of each line: the smaller scores left, the larger right if they differ much."""
    low, high = min(heights.values()), max(heights.values())
    if not low > 0 or high / low <= _OWN_AXIS:
        return dict.fromkeys(heights, left)
    right = left.twinx()
    middle = (low * high) ** 0.5
    return {key: right if height > middle else left for key, height in heights.items()}


def _draw(axis: Axes, line: pd.DataFrame, statistic: str, colour: str, label: str) -> Any:
    (handle,) = axis.plot(line["m"], line[statistic], "o-", color=colour, label=label)
    low, high = f"{statistic}_low", f"{statistic}_high"
    if low in line and high in line and line[low].notna().any():
        axis.fill_between(line["m"], line[low], line[high], color=colour, alpha=0.15, linewidth=0)
    return handle


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
