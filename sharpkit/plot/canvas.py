"""New figures, which pyplot knows too where the user works with it, and writing them to files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.display import in_notebook
from sharpkit.errors import ArgumentError
from sharpkit.files import atomic_path, write_csv

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
_PYPLOT = "matplotlib.pyplot"


@cache
def _shown_once() -> type[Figure]:
    """A class of figures that a notebook does not show again when the cell ends."""
    from matplotlib.figure import Figure

    class ShownOnce(Figure):
        def _ipython_display_(self) -> None:
            from IPython.display import display

            picture = BytesIO()
            self.savefig(picture, format="png")
            display({"image/png": picture.getvalue()}, raw=True)  # type: ignore[no-untyped-call]
            forget(self)

    return ShownOnce


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    It is `pyplot.gcf()` from now on where the user works with pyplot, or in a notebook. Elsewhere
    no backend is chosen, and it is freed with its last reference.
    """
    options: dict[str, Any] = {"figsize": (width, height), "layout": "constrained"}
    if not (_PYPLOT in sys.modules or in_notebook()):
        return _shown_once()(**options)
    from matplotlib import pyplot

    figure: Figure = pyplot.figure(FigureClass=_shown_once(), **options)
    return figure


def whole_figure(axis: Axes) -> Figure:
    """The figure of an axis; of one in a part of a figure, the whole one."""
    figure: Figure = axis.figure.figure
    return figure


def forget(figure: Figure) -> None:
    """Let pyplot keep a figure no longer: it is freed with its last reference."""
    if _PYPLOT in sys.modules:
        sys.modules[_PYPLOT].close(figure)


def picture_path(out: str | Path) -> Path:
    """The file of a picture, .png where the name has no ending; ArgumentError for an unknown one.

    Example:
        >>> picture_path("figure").name
        'figure.png'
    """
    from matplotlib.figure import Figure

    path = Path(out)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{ending}" for ending in known)
        raise ArgumentError(f"{path}: no picture ends in {path.suffix}; expected one of {endings}")
    return path


def save_picture(figure: Figure, path: Path) -> None:
    """Write the picture alone, in the format of its ending."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=path.suffix[1:].lower())


def save(
    figure: Figure,
    path: Path,
    table: pd.DataFrame,
    write: Callable[[pd.DataFrame, Path], Any] = write_csv,
) -> None:
    """Write the picture and, beside it, its numbers as .csv."""
    save_picture(figure, path)
    write(table, path.with_suffix(".csv"))
