"""Progress bars on a terminal and in a notebook, lines in a log."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import tqdm

_SECONDS = 30.0  # between two lines of a log, and before the first


def progress_bar(*, progress: bool, **options: Any) -> tqdm[Any]:
    """A bar on a terminal, a widget in a notebook, nothing without `progress`.

    In a file or pipe it is a line at most every 30 seconds; what is done before then has none.

    Args:
        progress: Whether to show anything.
        options: Of tqdm.

    Example:
        >>> with progress_bar(progress=False, total=3) as bar:
        ...     bar.update()
    """
    if not _in_notebook():
        if progress and not _on_terminal():
            log: dict[str, Any] = {"file": _Lines(), "delay": _SECONDS, "mininterval": _SECONDS}
            return tqdm(ncols=80, ascii=True, **log, **options)
        return tqdm(disable=not progress, **options)
    with warnings.catch_warnings():  # without ipywidgets it is a bar of text
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm as widget
    return widget(disable=not progress, **options)


class _Lines:
    """The standard error, where a bar is written anew on a line of its own, not drawn over."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _in_notebook() -> bool:
    """Whether a kernel runs this, whose output is no terminal but is shown as it comes."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
