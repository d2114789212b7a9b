"""Handing rows to whatever logs a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from sharpkit.errors import ArgumentError

Logger: TypeAlias = Any  # see `Tracker`
_PREFIX = "sharpness/"


def check_logger(logger: Logger) -> None:
    """Raise ArgumentError for what cannot take a row.

    Example:
        >>> check_logger("wandb")
        Traceback (most recent call last):
        sharpkit.errors.ArgumentError: a logger is a str: expected something with add_scalar, ...
    """
    if _way(logger) is None:
        raise ArgumentError(
            f"a logger is a {type(logger).__name__}: expected something with add_scalar, "
            "log_metrics or log, or a callable that takes a dictionary of values"
        )


def send(logger: Logger, row: Mapping[str, Any], step: int) -> None:
    """Log the finite numbers of a row under "sharpness/...".

    Example:
        >>> send(print, {"step": 5, "loss": 0.5, "lambda_max": float("nan")}, 5)
        {'sharpness/step': 5, 'sharpness/loss': 0.5}
    """
    values = {
        _PREFIX + name: value
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    way = _way(logger)
    assert way is not None
    way(values, step)


def _way(logger: Logger) -> Callable[[dict[str, Any], int], Any] | None:
    """How a logger takes values."""
    if hasattr(logger, "add_scalar"):
        return lambda values, step: [
            logger.add_scalar(name, value, step) for name, value in values.items()
        ]
    if hasattr(logger, "log_metrics"):
        return lambda values, step: logger.log_metrics(values, step=step)
    if callable(getattr(logger, "log", None)):
        return lambda values, step: logger.log(values)  # its own count of steps goes on
    if callable(logger):
        return lambda values, step: logger(values)
    return None
