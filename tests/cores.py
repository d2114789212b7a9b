"""Which parameters of a test stay in the core, where all of them take too long for it."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_beyond(core: int, values: Iterable[Any]) -> list[Any]:
    """The values, of which those after the first `core` are marked slow."""
    return [
        value if k < core else pytest.param(value, marks=pytest.mark.slow)
        for k, value in enumerate(values)
    ]
