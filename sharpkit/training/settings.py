"""The settings of a training, checked once: one vocabulary wherever networks are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from sharpkit.errors import ArgumentError
from sharpkit.training.augmentation import AUGMENTATIONS
from sharpkit.training.radius import checked_radius
from sharpkit.training.sam_groups import ALL, selection_of
from sharpkit.training.sam_timing import sam_timing
from sharpkit.training.schedules import SCHEDULES, Schedule, ScheduleRule

OptimizerName: TypeAlias = Literal["sgd", "sam"]
Augmentation: TypeAlias = Literal["flip", "crop", "flip-crop"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training has: the same names in `fit`, a zoo's `Recipe`, TOML files and the shell.

    Args:
        epochs: Epochs at most.
        m: SAM's group size; None for the batch.
        rho: SAM's radius.
        sam_interval: Of `SAM`, `interval`: every interval-th step is perturbed.
        sam_start: The part of the training, from 0 to 1, after which steps are perturbed.
        sam_stop: The part after which they are perturbed no more.
        sam_parameters: The parameters that are perturbed: "*" for all, "norm" for those of
            normalisation layers, or names and patterns, separated by commas.
        rho_schedule: Of the radius from `sam_start` to `sam_stop`: "constant"; or from 1 to 0,
            "cosine", "linear", "step".
        rho_warmup: The part of the steps between them, 0 to 1, over which it first rises from 0.
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
    sam_interval: int = 1
    sam_start: float = 0.0
    sam_stop: float = 1.0
    sam_parameters: str = ALL
    rho_schedule: Schedule = "constant"
    rho_warmup: float = 0.0
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
        check_whole("sam_interval", self.sam_interval, 1)
        for name in ("sam_start", "sam_stop", "rho_warmup"):
            check_number(name, getattr(self, name), lambda v: 0 <= v <= 1, "a fraction, 0 to 1")
        if not self.sam_start < self.sam_stop:
            raise ArgumentError(
                f"sam_start is {self.sam_start} and sam_stop is {self.sam_stop}, which leaves SAM "
                "no step: expected sam_start < sam_stop"
            )
        check_choice("rho_schedule", self.rho_schedule, tuple(SCHEDULES))
        if not isinstance(self.sam_parameters, str) or not selection_of(self.sam_parameters):
            raise ArgumentError(
                f'sam_parameters is {self.sam_parameters!r}: expected "*", "norm", or names and '
                "patterns, separated by commas"
            )
        if self.stop_at_loss is not None:
            check_number("stop_at_loss", self.stop_at_loss, lambda v: v > 0, "a loss > 0")

    def where_sam_acts(self) -> dict[str, Any]:
        """The settings of where SAM acts that are not at their defaults.

        Example:
            >>> TrainingSettings(epochs=3, sam_interval=5).where_sam_acts()
            {'sam_interval': 5}
        """
        given = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {n: given[n][0] for n in _WHERE_SAM_ACTS if given[n][0] != given[n][1]}

    def sam_steps(self, total: int, rule: ScheduleRule | None = None) -> dict[str, Any]:
        """The arguments of `SAM`, or of `sam_timing`, for a training of so many steps.

        Args:
            total: All steps.
            rule: In place of the schedule of the radius.

        Raises:
            ArgumentError: If no step of so few is perturbed.
        """
        if round(self.sam_start * total) >= round(self.sam_stop * total):
            raise ArgumentError(
                f"sam_start is {self.sam_start} and sam_stop is {self.sam_stop}: none of {total} "
                "steps is in between; train for longer, or set them further apart"
            )
        arguments: dict[str, Any] = {
            "interval": self.sam_interval,
            "start": float(self.sam_start),
            "stop": float(self.sam_stop),
            "total_steps": total,
            "rho_schedule": self.rho_schedule if rule is None else rule,
            "rho_warmup": float(self.rho_warmup),
        }
        sam_timing(**arguments)
        return arguments

    def asdict(self) -> dict[str, Any]:
        """Name to value, ready for JSON.

        Where SAM acts is left out at its defaults, as in what runs of earlier versions noted.
        """
        acts = self.where_sam_acts()
        return {n: v for n, v in asdict(self).items() if n not in _WHERE_SAM_ACTS or n in acts}


_WHERE_SAM_ACTS = (
    *("sam_interval", "sam_start", "sam_stop", "sam_parameters", "rho_schedule", "rho_warmup"),
)


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
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("optimizer", self.optimizer, ("sgd", "sam"))
        check_choice("schedule", self.schedule, tuple(SCHEDULES))
        check_choice("augmentation", self.augmentation, (None, *AUGMENTATIONS))
        check_whole("seed", self.seed, 0)
        check_number("label_noise", self.label_noise, lambda v: 0 <= v <= 1, "0 to 1")
        if self.m is not None:
            check_whole("m", self.m, 1)
        if self.optimizer == "sgd":
            if self.m is not None or self.adaptive:
                raise ArgumentError('m and adaptive belong to SAM: choose the optimizer "sam"')
            if self.compile:
                raise ArgumentError('compile belongs to SAM: choose the optimizer "sam"')
            for name, value in self.where_sam_acts().items():
                raise ArgumentError(
                    f'{name} = {value!r} belongs to SAM: choose the optimizer "sam"'
                )

    def asdict(self) -> dict[str, Any]:
        """As of `TrainingSettings`; `compile` is left out where it is False.

        Example:
            >>> "compile" in FitSettings(epochs=3).asdict()
            False
        """
        found = super().asdict()
        return found if self.compile else {n: v for n, v in found.items() if n != "compile"}


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
