"""What becomes of one work item, in whichever process it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sharpkit.errors import SharpkitError

_LONGEST_MESSAGE = 2000
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why an item has no result."""

    message: str


def attempt(function: Callable[[Item, str], Result], item: Item, device: str) -> Result | Failure:
    """The function's result, or what it raised."""
    try:
        return function(item, device)
    except Exception as error:  # whatever an item does, the others are computed
        return Failure(error_message(error))


def error_message(error: Exception) -> str:
    """One line about an error; its type too, unless it is one of sharpkit's."""
    text = " ".join(str(error).split())[:_LONGEST_MESSAGE]
    text = text.encode("utf-8", "backslashreplace").decode()  # any store and terminal takes it
    return text if isinstance(error, SharpkitError) else f"{type(error).__name__}: {text}"
