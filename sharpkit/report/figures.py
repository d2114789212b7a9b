"""The figures that are drawn before the page is opened, as plotly's JSON.

Tables are of one task, with a column `label` and the columns of `noise_bands`; a setting is the
number of models, n and seed, in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sharpkit.evaluation.statistics import TABLE
from sharpkit.report.labels import finite, interval_text, number, plain
from sharpkit.report.noise import ENDS

if TYPE_CHECKING:
    import pandas as pd

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13}
_GRID = {"gridcolor": "#e3e6ea", "zerolinecolor": "#aab2bb", "linecolor": "#aab2bb"}
_NOISE = {"color": "#8a94a0", "fill": "rgba(120, 130, 142, 0.22)"}
_BEST = 25  # measures in the ranking figure
_ROW = 19  # pixels of a row with a label


def ranking(table: pd.DataFrame, statistic: str, setting: str) -> str:
    """The best measures by a statistic, with their intervals and what noise has."""
    lower = TABLE[statistic].lower_is_better
    rows = table[np.isfinite(table[statistic])].sort_values(statistic, ascending=lower).head(_BEST)
    rows = rows.iloc[::-1]  # the first row of the axis is at the bottom
    value, low, high = _ends(rows, statistic, ("", "_low", "_high"))
    places = list(range(len(rows)))
    labels = [plain(label) for label in rows["label"]]
    has = np.isfinite(low) & np.isfinite(high)
    text = [interval_text(a, b) or "no interval" for a, b in zip(low, high, strict=True)]
    figure = go.Figure(layout=base_layout(height=130 + _ROW * len(rows), kind="rows"))
    _add_noise_rows(figure, rows, statistic)
    figure.add_scatter(
        x=value.tolist(),
        y=places,
        name="measure with 95 % interval" if has.any() else "measure",
        mode="markers",
        marker={"size": 8, "color": COLOURS[0]},
        error_x={
            "type": "data",
            "array": np.nan_to_num(high - value).tolist(),
            "arrayminus": np.nan_to_num(value - low).tolist(),
            "color": "#7aa9c9",
            "thickness": 1.5,
            "width": 3,
        },
        customdata=list(zip(labels, text, strict=True)),
        hovertemplate="<b>%{customdata[0]}</b><br>%{x:.2f} (%{customdata[1]})<extra></extra>",
    )
    figure.update_xaxes(
        title=f"{TABLE[statistic].title}<br><sup>{plain(setting)}</sup>", zeroline=True
    )
    figure.update_yaxes(
        title={"text": "measure", "standoff": 12},
        tickmode="array",
        tickvals=places,
        ticktext=labels,
        range=[-0.6, len(rows) - 0.4],
        automargin=True,
        zeroline=False,
    )
    return as_json(figure)


def against_m(table: pd.DataFrame, statistic: str, setting: str) -> str:
    """A statistic of m-sharpness against m, one line with its band per radius."""
    rows = table[table["m"].notna()].sort_values("m")
    by = ["measure", "rho"] if "rho" in rows else ["measure"]
    figure = go.Figure(layout=base_layout(height=440))
    _add_noise_band(figure, rows, statistic)
    for k, (key, line) in enumerate(rows.groupby(by, dropna=False, sort=False)):
        colour = COLOURS[k % len(COLOURS)]
        value, low, high = _ends(line, statistic, ("", "_low", "_high"))
        name = plain(key[0]) + (f", ρ = {number(key[1])}" if len(by) == 2 else "")
        _add_band(figure, line["m"].to_numpy(), low, high, colour, legendgroup=str(k))
        figure.add_scatter(
            x=line["m"].tolist(),
            y=[finite(v) for v in value],
            name=name,
            legendgroup=str(k),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            hovertemplate="m = %{x}: %{y:.2f}<extra></extra>",
        )
    ticks = sorted(rows["m"].unique().tolist())
    figure.update_xaxes(
        title=f"m, examples per group<br><sup>{plain(setting)}</sup>",
        type="log",
        tickmode="array",
        tickvals=ticks,
        ticktext=[number(m) for m in ticks],
    )
    figure.update_yaxes(title=TABLE[statistic].title, zeroline=True, automargin=True)
    return as_json(figure)


def _ends(rows: pd.DataFrame, statistic: str, ends: Sequence[str]) -> list[np.ndarray]:
    return [
        TABLE[statistic].factor * rows[statistic + end].to_numpy(dtype=np.float64, na_value=np.nan)
        for end in ends
    ]


def _noise_name(statistic: str) -> str:
    """What the grey of a figure is; a mutual information's begins at 0."""
    low = "0" if TABLE[statistic].definition else "5 %"
    return f"noise: mean, {low} to 95 %"


def _add_noise_rows(figure: go.Figure, rows: pd.DataFrame, statistic: str) -> None:
    """A grey bar per row, with a tick at the mean."""
    low, mean, high = _ends(rows, statistic, ENDS)
    known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    if known.size == 0:
        return
    figure.add_bar(
        x=(high - low)[known].tolist(),
        base=low[known].tolist(),
        y=known.tolist(),
        orientation="h",
        width=0.8,
        marker={"color": _NOISE["fill"], "line": {"width": 0}},
        name=_noise_name(statistic),
        legendgroup="noise",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=mean[known].tolist(),
        y=known.tolist(),
        mode="markers",
        marker={
            "symbol": "line-ns-open",
            "size": 12,
            "color": _NOISE["color"],
            "line": {"width": 1.5},
        },
        legendgroup="noise",
        showlegend=False,
        hovertemplate="noise: %{x:.2f} on average<extra></extra>",
    )


def _add_noise_band(figure: go.Figure, rows: pd.DataFrame, statistic: str) -> None:
    """At each m the widest of the lines' bands, and the mean of their means."""
    low, mean, high = (
        rows.assign(end=end).groupby("m")["end"] for end in _ends(rows, statistic, ENDS)
    )
    lowest, highest, middle = low.min(), high.max(), mean.mean()
    known = lowest.notna() & highest.notna()
    if not known.any():
        return
    m = lowest.index[known].to_numpy()
    _add_band(
        figure,
        m,
        lowest[known].to_numpy(),
        highest[known].to_numpy(),
        _NOISE["fill"],
        opacity=1.0,
        legendgroup="noise",
        name=_noise_name(statistic),
    )
    figure.add_scatter(
        x=m.tolist(),
        y=middle[known].tolist(),
        mode="lines",
        line={"color": _NOISE["color"], "width": 1.5, "dash": "dot"},
        legendgroup="noise",
        showlegend=False,
        hovertemplate="noise at m = %{x}: %{y:.2f} on average<extra></extra>",
    )


def _add_band(
    figure: go.Figure,
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    colour: str,
    *,
    legendgroup: str,
    name: str = "",
    opacity: float = 0.14,
) -> None:
    """The area between two lines, where both are known."""
    known = np.isfinite(low) & np.isfinite(high)
    if not known.any():
        return
    x, low, high = x[known], low[known], high[known]
    figure.add_scatter(
        x=[*x.tolist(), *x[::-1].tolist()],
        y=[*high.tolist(), *low[::-1].tolist()],
        mode="lines",
        fill="toself",
        fillcolor=colour,
        opacity=opacity,
        line={"width": 0},
        hoverinfo="skip",
        name=name,
        showlegend=bool(name),
        legendgroup=legendgroup,
    )


def conditioning_sets(rows: Mapping[str, Mapping[tuple[str, ...], float]], title: str) -> str:
    """Heat map of measures and conditioning sets, in per cent."""
    sets = list(dict.fromkeys(names for row in rows.values() for names in row))
    z = [[finite(100 * row.get(names, np.nan)) for names in sets] for row in rows.values()]
    columns = [plain(" + ".join(names) or "none") for names in sets]
    return _heat_map(
        z,
        columns,
        [plain(label) for label in rows],
        titles=("conditioning set", "measure"),
        colorscale="YlGnBu",
        zmin=0,
        colorbar=title,
        hover="<b>%{y}</b><br>given %{x}: %{z:.3g} %<extra></extra>",
    )


def correlations(values: pd.DataFrame) -> str:
    """Spearman's correlation between measures, those that agree side by side."""
    matrix = values.corr(method="spearman", min_periods=3)
    order = _by_similarity(matrix.to_numpy())
    matrix = matrix.iloc[order, order]
    labels = [plain(label) for label in matrix.columns]
    return _heat_map(
        [[finite(v) for v in row] for row in matrix.to_numpy()],
        labels,
        labels,
        titles=("measure", "measure"),
        colorscale="RdBu_r",
        zmin=-1,
        zmax=1,
        colorbar="ρ",
        hover="%{y}<br>%{x}<br><b>ρ = %{z:.2f}</b><extra></extra>",
    )


def _heat_map(
    z: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    titles: tuple[str, str],
    colorbar: str,
    hover: str,
    **options: Any,
) -> str:
    bar = {"title": {"text": colorbar, "side": "right"}, "thickness": 12, "outlinewidth": 0}
    trace = go.Heatmap(
        z=z,
        x=list(columns),
        y=list(rows),
        colorbar=bar,
        hovertemplate=hover,
        hoverongaps=False,
        xgap=1,
        ygap=1,
        **options,
    )
    longest = max(map(len, columns), default=0)
    figure = go.Figure(
        trace, base_layout(height=120 + 6 * min(longest, 40) + _ROW * len(rows), kind="map")
    )
    figure.update_layout(margin_b=16)
    figure.update_xaxes(
        title={"text": titles[0], "standoff": 12},
        side="top",
        tickangle=-60,
        automargin=True,
        type="category",
        showgrid=False,
        dtick=1,  # no label is left out
        tickfont={"size": 11 if len(columns) <= 40 else 8},
    )
    figure.update_yaxes(
        title={"text": titles[1], "standoff": 12},
        autorange="reversed",
        automargin=True,
        type="category",
        showgrid=False,
        tickfont={"size": 11},
    )
    return as_json(figure)


def _by_similarity(matrix: np.ndarray) -> list[int]:
    """An order of the rows in which similar ones are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(matrix) < 3:
        return list(range(len(matrix)))
    distance = 1 - np.abs(np.nan_to_num(matrix))
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    return [int(k) for k in leaves_list(linkage(squareform(distance, checks=False), "average"))]


def base_layout(height: int, kind: str = "") -> go.Layout:
    """The common look; of its kind depends what the page changes on a narrow screen."""
    return go.Layout(
        template="none",
        meta={"kind": kind},
        height=height,
        autosize=True,
        font=_FONT,
        paper_bgcolor="#fff",
        plot_bgcolor="#fff",
        margin={"l": 60, "r": 16, "t": 40, "b": 62},
        xaxis=_GRID,
        yaxis=_GRID,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hoverlabel={"align": "left"},
    )


def as_json(figure: go.Figure) -> str:
    """A figure as plotly reads it."""
    text: str = figure.to_json()
    return text
