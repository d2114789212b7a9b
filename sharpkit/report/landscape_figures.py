"""The figures of a landscape's page, as plotly's JSON: one for each way to look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sharpkit.plot.landscape import contour_levels
from sharpkit.report.figures import COLOURS, as_json, base_layout
from sharpkit.report.labels import finite, number, plain

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sharpkit.landscapes.result import Landscape

_HEIGHT = 620
_RED = "#d62728"


def landscape_figures(result: Landscape) -> dict[str, tuple[str, str]]:
    """The name of each view, as it is chosen by, to its title and JSON."""
    if result.loss.ndim == 1:
        return {"line": ("loss and accuracy", _line(result))}
    views = {
        "contour": ("loss, contours", _contours(result, result.loss, "loss")),
        "surface": ("loss, surface", _surface(result)),
        "error": (
            "standard error of the loss",
            _contours(result, result.std_error, "standard error"),
        ),
    }
    if result.accuracy is not None:
        views["accuracy"] = ("accuracy", _contours(result, result.accuracy, "accuracy"))
    return {k: v for k, v in views.items() if k != "error" or np.isfinite(result.std_error).any()}


def _line(result: Landscape) -> str:
    (x,), loss = result.coordinates, result.loss
    figure = go.Figure(layout=base_layout(height=480))
    known = np.isfinite(loss) & np.isfinite(result.std_error)
    at, low, high = x[known], (loss - result.std_error)[known], (loss + result.std_error)[known]
    figure.add_scatter(
        x=[*at.tolist(), *at[::-1].tolist()],
        y=[*high.tolist(), *low[::-1].tolist()],
        fill="toself",
        mode="lines",
        line={"width": 0},
        fillcolor="rgba(0, 114, 178, 0.2)",
        hoverinfo="skip",
        name="± standard error",
    )
    figure.add_scatter(
        x=x.tolist(),
        y=[finite(v) for v in loss],
        customdata=_texts(result),
        hovertemplate="%{customdata}<extra></extra>",
        line={"color": COLOURS[0], "width": 2},
        name="loss",
    )
    if result.accuracy is not None:
        figure.add_scatter(
            x=x.tolist(),
            y=[finite(v) for v in result.accuracy],
            yaxis="y2",
            hovertemplate="accuracy %{y:.4g}<extra></extra>",
            line={"color": COLOURS[1], "width": 1.5},
            name="accuracy",
        )
        figure.update_layout(
            yaxis2={"overlaying": "y", "side": "right", "range": [0, 1.02], "title": "accuracy"},
            margin_r=60,
        )
    for name, place in result.marks.items():
        figure.add_vline(x=place[0], line={"color": "#8a94a0", "dash": "dot", "width": 1})
        figure.add_annotation(
            x=place[0], y=1, yref="paper", yanchor="top", showarrow=False, textangle=-90,
            xanchor="left", text=plain(name), font={"size": 11},
        )  # fmt: skip
    figure.update_xaxes(title=plain(result.labels[0]))
    figure.update_yaxes(automargin=True)
    figure.update_layout(yaxis_title="loss")
    return as_json(figure)


def _contours(result: Landscape, values: NDArray[np.float64], what: str) -> str:
    """Filled contours; colours follow the logarithm where the values span much."""
    x, y = result.coordinates
    levels, norm = contour_levels(values)
    shown, ticks = (np.log10(values), np.log10(levels)) if norm else (values, levels)
    step = float(ticks[1] - ticks[0])
    figure = go.Figure(layout=base_layout(height=_HEIGHT))
    figure.add_contour(
        x=x.tolist(),
        y=y.tolist(),
        z=_rows(shown.T),
        colorscale="Viridis",
        contours={"start": float(ticks[0]), "end": float(ticks[-1]), "size": step},
        line={"width": 0.5, "color": "rgba(255, 255, 255, 0.6)"},
        colorbar={
            "title": {"text": what, "side": "right"},
            "tickvals": ticks[::2].tolist(),
            "ticktext": [number(v, 3) for v in levels[::2].tolist()],
            "thickness": 14,
        },
        customdata=np.array(_texts(result), dtype=object).reshape(values.shape).T.tolist(),
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )
    if result.trajectory is not None:
        steps = result.trajectory
        figure.add_scatter(
            x=steps["x"].tolist(),
            y=steps["y"].tolist(),
            customdata=steps[["step", "distance"]].to_numpy().tolist(),
            hovertemplate="checkpoint %{customdata[0]}<br>%{customdata[1]:.4g} from the plane"
            "<extra></extra>",
            mode="lines+markers",
            line={"color": _RED, "width": 1.5},
            marker={"size": 5},
            name="trajectory",
        )
    places = [list(place) for place in result.marks.values()]
    figure.add_scatter(
        x=[p[0] for p in places],
        y=[p[1] for p in places],
        text=[plain(name) for name in result.marks],
        mode="markers+text" if len(places) > 1 else "markers",
        textposition="top center",
        textfont={"color": "#fff"},
        hovertemplate="%{text}<extra></extra>",
        marker={"symbol": "x-thin", "size": 10, "line": {"color": "#fff", "width": 2.5}},
        showlegend=False,
    )
    figure.update_xaxes(title=plain(result.labels[0]), range=[x[0], x[-1]])
    figure.update_yaxes(title=plain(result.labels[1]), range=[y[0], y[-1]], automargin=True)
    return as_json(figure)


def _surface(result: Landscape) -> str:
    x, y = result.coordinates
    logarithmic = contour_levels(result.loss)[1] is not None
    shown = np.log10(result.loss) if logarithmic else result.loss
    figure = go.Figure(layout=base_layout(height=_HEIGHT))
    figure.add_surface(
        x=x.tolist(),
        y=y.tolist(),
        z=_rows(shown.T),
        colorscale="Viridis",
        showscale=False,
        customdata=np.array(_texts(result), dtype=object).reshape(result.loss.shape).T.tolist(),
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_layout(
        scene={
            "xaxis": {"title": {"text": plain(result.labels[0])}},
            "yaxis": {"title": {"text": plain(result.labels[1])}},
            "zaxis": {"title": {"text": "log₁₀ loss" if logarithmic else "loss"}},
        },
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
    )
    return as_json(figure)


def _texts(result: Landscape) -> list[str]:
    """What each point says when it is pointed at."""
    texts = []
    for row in result.frame().to_dict("records"):
        place = ", ".join(f"{k} = {number(row[k])}" for k in ("x", "y") if k in row)
        text = f"{place}<br>loss {number(row['loss'])} ± {number(row['std_error'], 2)}"
        if "accuracy" in row:
            text += f"<br>accuracy {number(row['accuracy'])}"
        texts.append(text)
    return texts


def _rows(values: NDArray[Any]) -> list[list[float | None]]:
    """What is not finite is left out; JSON does not know it."""
    return [[finite(v) for v in row] for row in values]
