"""Schedules: the learning rate, or the radius of SAM, in the course of a training.

A schedule is a function of the progress, from 0 at the first step to 1 after the last, and gives a
factor on what it begins with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

ScheduleRule: TypeAlias = Callable[[float], float]
Schedule: TypeAlias = Literal["cosine", "linear", "step", "constant"]


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, without restarts).

    Args:
        progress: Steps made, as a fraction of all.

    Example:
        >>> [round(cosine(t), 3) for t in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """From 1 to 0 along a line.

    Example:
        >>> [linear(t) for t in (0.0, 0.25, 1.0)]
        [1.0, 0.75, 0.0]
    """
    return 1.0 - progress


def step(progress: float) -> float:
    """A tenth after half of the training and a hundredth after three quarters (He et al. 2016).

    Example:
        >>> [step(t) for t in (0.49, 0.5, 0.75)]
        [1.0, 0.1, 0.01]
    """
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


SCHEDULES: dict[str, ScheduleRule] = {
    "cosine": cosine,
    "linear": linear,
    "step": step,
    "constant": constant,
}
