"""The settings of a training, checked once: one vocabulary wherever networks are trained.

Schedules give the learning rate over the course of a training, as a fraction of the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from sharpkit.errors import ArgumentError
from sharpkit.training.augmentation import AUGMENTATIONS
from sharpkit.training.radius import checked_radius


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, without restarts).

    Args:
        progress: Steps made, as a fraction of all.

    Example:
        >>> [round(cosine(t), 3) for t in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    return 0.5 * (1.0 + math.cos(math.pi * progress))


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


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "step": step,
    "constant": constant,
}


OptimizerName: TypeAlias = Literal["sgd", "sam"]
Schedule: TypeAlias = Literal["cosine", "step", "constant"]
Augmentation: TypeAlias = Literal["flip", "crop", "flip-crop"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training has: the same names in `fit`, a zoo's `Recipe`, TOML files and the shell.

    Args:
        epochs: Epochs at most.
        m: SAM's group size; None for the batch.
        rho: SAM's radius.
        batch_size: Examples of a step.
        lr: Learning rate of the first step.
        momentum: Of SGD, which also takes SAM's steps.
        weight_decay: Of SGD: the L2 coefficient.
        stop_at_loss: Stop after the first evaluated epoch whose training loss is at most this.

    Raises:
        ArgumentError: For a value out of range.
    """

    epochs: int
    m: int | None = None
    rho: float = 0.05
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    stop_at_loss: float | None = None

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        check_whole("batch_size", self.batch_size, 1)
        check_number("lr", self.lr, lambda v: 0 < v < math.inf, "lr > 0")
        check_number("momentum", self.momentum, lambda v: 0 <= v < 1, "0 <= momentum < 1")
        check_number(
            "weight_decay", self.weight_decay, lambda v: 0 <= v < math.inf, "a number >= 0"
        )
        checked_radius(self.rho)
        if self.stop_at_loss is not None:
            check_number("stop_at_loss", self.stop_at_loss, lambda v: v > 0, "a loss > 0")


@dataclass(frozen=True, kw_only=True)
class FitSettings(TrainingSettings):
    """The settings of `fit`, which explains them; together with model and data they fix the result.

    Raises:
        ArgumentError: For a value out of range, or one that the optimizer does not have.

    Example:
        >>> FitSettings(epochs=3, momentum=1.5)
        Traceback (most recent call last):
        sharpkit.errors.ArgumentError: momentum is 1.5: expected 0 <= momentum < 1
    """

    optimizer: OptimizerName = "sgd"
    adaptive: bool = False
    schedule: Schedule = "cosine"
    augmentation: Augmentation | None = None
    label_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("optimizer", self.optimizer, ("sgd", "sam"))
        check_choice("schedule", self.schedule, tuple(SCHEDULES))
        check_choice("augmentation", self.augmentation, (None, *AUGMENTATIONS))
        check_whole("seed", self.seed, 0)
        check_number("label_noise", self.label_noise, lambda v: 0 <= v <= 1, "0 to 1")
        if self.m is not None:
            check_whole("m", self.m, 1)
        if self.optimizer == "sgd" and (self.m is not None or self.adaptive):
            raise ArgumentError('m and adaptive belong to SAM: choose the optimizer "sam"')

    def asdict(self) -> dict[str, Any]:
        """Name to value, ready for JSON."""
        return asdict(self)


def check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """ArgumentError unless a setting has one of some values."""
    if value not in known:
        raise ArgumentError(f"{name} is {value!r}: expected one of {', '.join(map(repr, known))}")


def check_whole(name: str, value: Any, least: int) -> None:
    """ArgumentError unless a setting is a whole number, and at least this."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} is {value!r}: expected a whole number >= {least}")


def check_number(name: str, value: Any, fine: Callable[[float], bool], expected: str) -> None:
    """ArgumentError unless a setting is a number in its range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not fine(value):
        raise ArgumentError(f"{name} is {value!r}: expected {expected}")
