"""Progress bars on a terminal and in a notebook, lines in a log."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import tqdm

from sharpkit.display import in_notebook

_SECONDS = 30.0  # between two lines of a log, and before the first


def progress_bar(*, progress: bool, **options: Any) -> tqdm[Any]:
    """A bar on a terminal, a widget in a notebook, nothing without `progress`.

    In a file or pipe it is a line at most every 30 seconds; what is done before then has none.

    Example:
        >>> with progress_bar(progress=False, total=3) as bar:
        ...     bar.update()
    """
    if not progress:
        return tqdm(disable=True, **options)
    if in_notebook():
        with warnings.catch_warnings():  # without ipywidgets it is a bar of text
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm as widget
        return widget(**options)
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(**options)
    # it looks at the clock at every step, and a bar inside another does not move the cursor
    log = {"delay": _SECONDS, "mininterval": _SECONDS, "miniters": 1, "position": 0}
    return _Log(**{**options, **log, "file": _Lines(), "ncols": 80, "ascii": True})


class _Log(tqdm):  # type: ignore[type-arg]
    """A bar that shows another postfix when its next line is due, not at once."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)


class _Lines:
    """The standard error, where a bar is written anew on a line of its own, not drawn over."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
