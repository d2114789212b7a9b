"""Progress bars on a terminal and in a notebook."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import tqdm


def progress_bar(*, progress: bool, **options: Any) -> tqdm[Any]:
    """A bar on a terminal, a widget in a notebook, and nothing in a file or without `progress`.

    Args:
        progress: Whether to show anything.
        options: Of tqdm.

    Example:
        >>> with progress_bar(progress=False, total=3) as bar:
        ...     bar.update()
    """
    if not _in_notebook():
        return tqdm(disable=None if progress else True, **options)
    with warnings.catch_warnings():  # without ipywidgets it is a bar of text
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm as widget
    return widget(disable=not progress, **options)


def _in_notebook() -> bool:
    """Whether a kernel runs this, whose output is no terminal but is shown as it comes."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
