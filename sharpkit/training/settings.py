"""Everything that decides how `fit` trains, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from sharpkit.errors import ArgumentError
from sharpkit.training.augmentation import AUGMENTATIONS
from sharpkit.training.radius import checked_radius
from sharpkit.training.schedules import SCHEDULES

OptimizerName: TypeAlias = Literal["sgd", "sam"]
Schedule: TypeAlias = Literal["cosine", "step", "constant"]
Augmentation: TypeAlias = Literal["flip", "crop", "flip-crop"]


@dataclass(frozen=True)
class FitSettings:
    """The settings of `fit`, which explains them; together with model and data they fix the result.

    Raises:
        ArgumentError: For a value out of range, or one that the optimizer does not have.

    Example:
        >>> FitSettings(epochs=3, momentum=1.5)
        Traceback (most recent call last):
        sharpkit.errors.ArgumentError: momentum is 1.5: expected 0 <= momentum < 1
    """

    epochs: int
    optimizer: OptimizerName = "sgd"
    m: int | None = None
    rho: float = 0.05
    adaptive: bool = False
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    augmentation: Augmentation | None = None
    label_noise: float = 0.0
    stop_at_loss: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("optimizer", self.optimizer, ("sgd", "sam"))
        _one_of("schedule", self.schedule, tuple(SCHEDULES))
        _one_of("augmentation", self.augmentation, (None, *AUGMENTATIONS))
        _whole("epochs", self.epochs, 1)
        _whole("batch_size", self.batch_size, 1)
        _whole("seed", self.seed, 0)
        _number("lr", self.lr, lambda v: 0 < v < math.inf, "lr > 0")
        _number("momentum", self.momentum, lambda v: 0 <= v < 1, "0 <= momentum < 1")
        _number("weight_decay", self.weight_decay, lambda v: 0 <= v < math.inf, "a number >= 0")
        _number("label_noise", self.label_noise, lambda v: 0 <= v <= 1, "0 to 1")
        checked_radius(self.rho)
        if self.m is not None:
            _whole("m", self.m, 1)
        if self.stop_at_loss is not None:
            _number("stop_at_loss", self.stop_at_loss, lambda v: v > 0, "a loss > 0")
        if self.optimizer == "sgd" and (self.m is not None or self.adaptive):
            raise ArgumentError('m and adaptive belong to SAM: give optimizer="sam" with them')

    def asdict(self) -> dict[str, Any]:
        """Name to value, ready for JSON."""
        return asdict(self)


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name} is {value!r}: expected one of {', '.join(map(repr, known))}")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} is {value!r}: expected a whole number >= {least}")


def _number(name: str, value: Any, fine: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not fine(value):
        raise ArgumentError(f"{name} is {value!r}: expected {expected}")
