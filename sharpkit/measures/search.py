"""The size of a perturbation that costs a network a given share of its training accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from sharpkit.errors import ArgumentError, ModelError

_WIDENINGS = 30  # factors of 4 tried on either side of the first guess
_TOLERANCE = 5e-3  # of the logarithm


def size_of_drop(
    accuracy: Callable[[float], float], clean: float, drop: float, guess: float, hint: str = ""
) -> float:
    """Where the accuracy has fallen by `drop`: bracketed by factors of 4, then Brent's method.

    `accuracy` is one fixed function of the size, > 0, which is found to 0.5 %; the search begins at
    `guess`. A hint is what to try if every size is too large.

    Raises:
        ModelError: If the accuracy never falls by `drop`, or falls further however small the size.

    Example:
        >>> round(size_of_drop(lambda size: 1 - size, clean=1.0, drop=0.1, guess=1.0), 3)
        0.1
    """
    from scipy.optimize import brentq

    @cache  # Brent's method asks again for the two ends of the bracket
    def excess(log_size: float) -> float:
        return clean - accuracy(math.exp(log_size)) - drop

    low, high = _bracket(excess, math.log(guess), clean, drop, hint)
    return math.exp(low if low == high else brentq(excess, low, high, xtol=_TOLERANCE))


def check_drop(drop: float) -> None:
    """Raise ArgumentError unless 0 < drop < 1."""
    if not 0 < drop < 1:
        raise ArgumentError(f"drop must be between 0 and 1, got {drop}")


def _bracket(
    excess: Callable[[float], float], guess: float, clean: float, drop: float, hint: str
) -> tuple[float, float]:
    """Logarithms of two sizes between which the excess changes its sign."""
    value = excess(guess)
    if value == 0:
        return guess, guess
    step = math.log(4.0) * (1 if value < 0 else -1)
    for _ in range(_WIDENINGS):
        following = excess(guess + step)
        if following == 0:
            return guess + step, guess + step
        if (following > 0) != (value > 0):
            return min(guess, guess + step), max(guess, guess + step)
        guess += step
    fall = f"lowers the training accuracy of {clean:.3f} by"
    if value < 0:
        raise ModelError(f"no perturbation of the weights {fall} {drop}")
    raise ModelError(f"even the smallest perturbation of the weights {fall} more than {drop}{hint}")
