"""A landscape as one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sharpkit.files import atomic_path
from sharpkit.report.labels import number
from sharpkit.report.page import rendered, require_extra
from sharpkit.report.reproduce import versions

if TYPE_CHECKING:
    from sharpkit.landscapes.result import Landscape


def write_landscape(
    landscape: Landscape, out: str | Path, *, title: str = "Loss landscape", command: str = ""
) -> Path:
    """Write a landscape as one self-contained, interactive HTML page.

    Contours, a surface that can be turned, standard error and accuracy, with the numbers of every
    point where it is pointed at; how it was drawn, and the trajectory with its distances from the
    plane.

    Args:
        landscape: From `sharpkit.landscape`.
        out: The file.
        title: Its heading.
        command: What makes it again, if that is a command line.

    Returns:
        Path: The file written.

    Raises:
        ArgumentError: If plotly or jinja2 is not installed.

    Example:
        >>> import torch, sharpkit as sk, tempfile
        >>> model, data = torch.nn.Linear(4, 3), (torch.randn(8, 4), torch.arange(8) % 3)
        >>> out = Path(tempfile.mkdtemp()) / "landscape.html"
        >>> write_landscape(sk.landscape(model, data, points=5), out).name
        'landscape.html'
    """
    require_extra("the page of a landscape")
    from sharpkit.report.landscape_figures import landscape_figures

    path = Path(out)
    trajectory = landscape.trajectory
    text = rendered(
        "landscape.html",
        title=title,
        how=[f"{part[0].upper()}{part[1:]}." for part in landscape.description.split("; ")],
        views=landscape_figures(landscape),
        not_finite=landscape.not_finite,
        facts=_facts(landscape),
        left_out=landscape.left_out,
        steps=[] if trajectory is None else trajectory.to_dict("records"),
        number=number,
        command=command,
        versions=versions(),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def _facts(landscape: Landscape) -> dict[str, str]:
    finite = landscape.loss[abs(landscape.loss) < float("inf")]
    return {
        "Points": " × ".join(map(str, landscape.loss.shape)),
        "Loss": f"{number(float(finite.min()))} to {number(float(finite.max()))}",
        "Examples": f"{landscape.n:,}",
        "Parameters that move": f"{landscape.parameters:,}",
        "Precision": landscape.precision,
        "Seconds": number(landscape.seconds, 3),
    }
