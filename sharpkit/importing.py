"""Objects that a user names as text."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from sharpkit.errors import ArgumentError


def import_callable(name: str) -> Any:
    """The object that "module:attribute" names.

    The module is looked for in the working directory as well.

    Raises:
        ArgumentError: If it cannot be imported or is not callable.

    Example:
        >>> import_callable("math:hypot")(3, 4)
        5.0
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ArgumentError(f'expected "module:callable", got {name!r}')
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's: it raises whatever it does
        raise ArgumentError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ArgumentError(f"{name} is not callable")
    return found
