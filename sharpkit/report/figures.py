"""The figures that are drawn before the page is opened, as plotly's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sharpkit.evaluation._weighted import LOWER_IS_BETTER
from sharpkit.report.labels import STATISTICS, decimal, finite, number, plain, scale

if TYPE_CHECKING:
    import pandas as pd

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13}
_GRID = {"gridcolor": "#e3e6ea", "zerolinecolor": "#aab2bb", "linecolor": "#aab2bb"}
_BEST = 25  # measures in the ranking figure
_ROW = 19  # pixels of a row with a label


def ranking(table: pd.DataFrame, statistic: str) -> str:
    """The best measures by a statistic, with their intervals.

    Args:
        table: Of one task, with a column label.
        statistic: Its column.
    """
    lower = statistic in LOWER_IS_BETTER
    rows = table.dropna(subset=[statistic]).sort_values(statistic, ascending=lower).head(_BEST)
    rows = rows.iloc[::-1]  # the first row of the axis is at the bottom
    value, low, high = (
        scale(statistic) * rows[statistic + end].to_numpy() for end in ("", "_low", "_high")
    )
    labels = [plain(label) for label in rows["label"]]
    text = [f"{decimal(a)} to {decimal(b)}" for a, b in zip(low, high, strict=True)]
    trace = go.Scatter(
        x=value.tolist(),
        y=list(range(len(rows))),
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
    figure = go.Figure(trace, _layout(height=90 + _ROW * len(rows)))
    figure.update_xaxes(title=STATISTICS[statistic], zeroline=True)
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(rows))),
        ticktext=labels,
        automargin=True,
        zeroline=False,
    )
    return _json(figure)


def against_m(table: pd.DataFrame, statistic: str) -> str:
    """A statistic of m-sharpness against m, one line with its band per radius.

    Args:
        table: Of one task; its rows that have an m.
        statistic: Its column.
    """
    rows = table[table["m"].notna()].sort_values("m")
    by = ["measure", "rho"] if "rho" in rows else ["measure"]
    figure = go.Figure(layout=_layout(height=420))
    for k, (key, line) in enumerate(rows.groupby(by, dropna=False, sort=False)):
        colour = COLOURS[k % len(COLOURS)]
        m = line["m"].tolist()
        value, low, high = (
            scale(statistic) * line[statistic + end].to_numpy() for end in ("", "_low", "_high")
        )
        name = plain(key[0]) + (f", ρ = {number(key[1])}" if len(by) == 2 else "")
        figure.add_scatter(
            x=m + m[::-1],
            y=[*high.tolist(), *low[::-1].tolist()],
            mode="lines",
            fill="toself",
            fillcolor=colour,
            opacity=0.12,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=str(k),
        )
        figure.add_scatter(
            x=m,
            y=value.tolist(),
            name=name,
            legendgroup=str(k),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            hovertemplate="m = %{x}: %{y:.2f}<extra></extra>",
        )
    ticks = sorted(rows["m"].unique().tolist())
    figure.update_xaxes(
        title="m, examples per group",
        type="log",
        tickmode="array",
        tickvals=ticks,
        ticktext=[number(m) for m in ticks],
    )
    figure.update_yaxes(title=STATISTICS[statistic], zeroline=True)
    return _json(figure)


def conditioning_sets(scores: Mapping[str, Mapping[tuple[str, ...], float]], title: str) -> str:
    """Heat map of measures and conditioning sets, in per cent.

    Args:
        scores: Label of a measure -> set -> conditional mutual information.
        title: Of the colour bar.
    """
    sets = list(dict.fromkeys(names for row in scores.values() for names in row))
    z = [[finite(100 * row.get(names, np.nan)) for names in sets] for row in scores.values()]
    columns = [plain(" + ".join(names) or "none") for names in sets]
    return _heat_map(
        z,
        columns,
        [plain(label) for label in scores],
        colorscale="YlGnBu",
        zmin=0,
        colorbar=title,
        hover="<b>%{y}</b><br>given %{x}: %{z:.3g} %<extra></extra>",
    )


def correlations(values: pd.DataFrame) -> str:
    """Spearman's correlation between measures, those that agree side by side.

    Args:
        values: One row per model, one column per measure, called by its label.
    """
    matrix = values.corr(method="spearman", min_periods=3)
    order = _by_similarity(matrix.to_numpy())
    matrix = matrix.iloc[order, order]
    labels = [plain(label) for label in matrix.columns]
    return _heat_map(
        [[finite(v) for v in row] for row in matrix.to_numpy()],
        labels,
        labels,
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
    figure = go.Figure(trace, _layout(height=80 + 6 * min(longest, 40) + _ROW * len(rows)))
    figure.update_xaxes(
        side="top",
        tickangle=-60,
        automargin=True,
        type="category",
        showgrid=False,
        dtick=1,  # no label is left out
        tickfont={"size": 11 if len(columns) <= 40 else 8},
    )
    figure.update_yaxes(
        autorange="reversed",
        automargin=True,
        type="category",
        showgrid=False,
        tickfont={"size": 11},
    )
    return _json(figure)


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


def _layout(height: int) -> go.Layout:
    return go.Layout(
        template="none",
        height=height,
        autosize=True,
        font=_FONT,
        paper_bgcolor="#fff",
        plot_bgcolor="#fff",
        margin={"l": 60, "r": 16, "t": 32, "b": 48},
        xaxis=_GRID,
        yaxis=_GRID,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hoverlabel={"align": "left"},
    )


def _json(figure: go.Figure) -> str:
    text: str = figure.to_json()
    return text
