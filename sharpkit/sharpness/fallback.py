"""Telling what vmap cannot vectorise, so that a plain loop takes over."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class NotVectorizable(Exception):
    """An operation of the model has no batching rule, or a slow one; `operation` names it."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation


@contextmanager
def refuse_slow_vmap() -> Iterator[None]:
    """Turn vmap's slow fallback and its errors into one exception that names the operation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule for.*")
        try:
            yield
        except (RuntimeError, UserWarning) as error:
            text = str(error)
            if not re.search(r"vmap|batching rule|functorch|setup_context", text, re.IGNORECASE):
                raise
            found = re.search(r"aten::\w+|\.item\(\)|autograd\.Function", text)
            raise NotVectorizable(found.group() if found else text.split(". ")[0]) from error
