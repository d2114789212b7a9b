"""A figure that pyplot knows too, and writing it to a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.errors import ArgumentError
from sharpkit.files import atomic_path, write_csv

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DPI = 160


@cache
def _shown_once() -> type[Figure]:
    """A class of figures that a notebook does not show again when the cell ends."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    class ShownOnce(Figure):
        def _ipython_display_(self) -> None:
            from IPython.display import display

            picture = BytesIO()
            self.savefig(picture, format="png")
            display({"image/png": picture.getvalue()}, raw=True)  # type: ignore[no-untyped-call]
            pyplot.close(self)

    return ShownOnce


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which is `pyplot.gcf()` from now on."""
    from matplotlib import pyplot

    figure: Figure = pyplot.figure(
        figsize=(width, height), layout="constrained", FigureClass=_shown_once()
    )
    return figure


def picture_path(out: str | Path) -> Path:
    """The file of a picture, .png where the name has no ending.

    Raises:
        ArgumentError: If pictures cannot be written in that format.

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


def save(
    figure: Figure,
    path: Path,
    table: pd.DataFrame,
    write: Callable[[pd.DataFrame, Path], Any] | None = None,
) -> None:
    """Write the picture and, beside it, its numbers as .csv, with `write` if given."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=path.suffix[1:].lower())
    numbers = path.with_suffix(".csv")
    if write is not None:
        write(table, numbers)
    else:
        write_csv(table, numbers)
