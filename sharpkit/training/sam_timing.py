"""Which steps of a training are SAM's, and with what part of ρ; all others are plain steps.

SAM takes two passes where a plain step takes one. Most of what it gains comes from the last part of
a training (Zhou et al. 2024); SAM in every k-th step only is the SAM-k of Liu et al. (2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sharpkit.errors import ArgumentError
from sharpkit.training.schedules import SCHEDULES, ScheduleRule, constant


@dataclass(frozen=True)
class SamTiming:
    """The steps of SAM, all counted from 0.

    Attributes:
        interval: From one of them to the next.
        first: The first one.
        last: The step after which there are none; None for no end.
        warmup: Steps from `first` on over which ρ rises from 0 along a line.
        schedule: Factor on ρ from then on to `last`, of the progress between them.
        total: Steps of the training, if it is known.
    """

    interval: int = 1
    first: int = 0
    last: int | None = None
    warmup: int = 0
    schedule: ScheduleRule = constant
    total: int | None = None

    def perturbs(self, step: int) -> bool:
        """Whether a step is one of SAM's.

        Example:
            >>> timing = SamTiming(interval=3, first=2, last=8)
            >>> [step for step in range(10) if timing.perturbs(step)]
            [2, 5]
        """
        inside = step >= self.first and (self.last is None or step < self.last)
        return inside and (step - self.first) % self.interval == 0

    def factor(self, step: int) -> float:
        """What ρ is multiplied by in a step; 0 in those that are not SAM's.

        Raises:
            ArgumentError: If the schedule gives no finite number of at least 0.

        Example:
            >>> timing = SamTiming(last=8, warmup=4, schedule=lambda progress: 1 - progress)
            >>> [timing.factor(step) for step in range(8)]
            [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
        """
        if not self.perturbs(step):
            return 0.0
        done = step - self.first
        if done < self.warmup:
            return done / self.warmup
        if self.last is None:  # then the schedule is constant
            return 1.0
        progress = (done - self.warmup) / (self.last - self.first - self.warmup)
        factor = self.schedule(progress)
        if not isinstance(factor, int | float) or not (math.isfinite(factor) and factor >= 0):
            raise ArgumentError(
                f"rho_schedule gave {factor!r} at the progress {progress:g}: expected a finite "
                "number of at least 0, a factor on rho"
            )
        return float(factor)

    @property
    def everywhere(self) -> bool:
        """Whether every step is perturbed, by the same radius.

        Example:
            >>> SamTiming(last=8, total=8).everywhere, SamTiming(last=7, total=8).everywhere
            (True, False)
        """
        whole = (self.interval, self.first, self.warmup) == (1, 0, 0)
        return whole and self.schedule is constant and self.last in (None, self.total)

    def share(self, start: int, stop: int) -> float:
        """The share of the steps start to stop - 1 that are perturbed, by a named schedule.

        Example:
            >>> SamTiming(interval=5, first=10).share(0, 20)
            0.1
        """
        left = max(start, self.first)
        left += (self.first - left) % self.interval
        right = stop if self.last is None else min(stop, self.last)
        count = max(0, math.ceil((right - left) / self.interval))
        if self.warmup and start <= self.first < stop:  # there ρ is still 0
            count -= 1
        return count / (stop - start)


EVERY_STEP = SamTiming()


def sam_timing(
    *,
    interval: int = 1,
    start: int | float = 0,
    stop: int | float | None = None,
    total_steps: int | None = None,
    rho_schedule: str | ScheduleRule = "constant",
    rho_warmup: int | float = 0,
) -> SamTiming:
    """The steps of SAM, from arguments that `SAM` explains.

    Raises:
        ArgumentError: For a value out of range, a fraction or schedule without a length, or if no
            step is left.

    Example:
        >>> sam_timing(start=0.8, total_steps=50).first
        40
    """
    if not _is_whole(interval) or interval < 1:
        raise ArgumentError(f"interval is {interval!r}: expected a whole number of steps >= 1")
    if total_steps is not None and (not _is_whole(total_steps) or total_steps < 1):
        raise ArgumentError(f"total_steps is {total_steps!r}: expected a whole number >= 1")
    first = _steps("start", start, total_steps, "total_steps= as well")
    last = (
        total_steps if stop is None else _steps("stop", stop, total_steps, "total_steps= as well")
    )
    if last is not None and first >= last:
        length = "" if total_steps is None else f" of {total_steps}"
        raise ArgumentError(
            f"SAM is left no step: start is {_shown(start)}, step {first}{length}, and stop is "
            f"{_shown(stop)}, step {last}: expected start < stop, with a step in between"
        )
    span = None if last is None else last - first
    schedule = _rule(rho_schedule)
    if span is None and schedule is not constant:
        raise ArgumentError(
            f"rho_schedule is {rho_schedule!r}, but how long it takes is not known: give "
            "total_steps= as well, or stop= in steps"
        )
    warmup = _steps("rho_warmup", rho_warmup, span, "total_steps= as well, or stop= in steps")
    timing = SamTiming(interval, first, last, warmup, schedule, total_steps)
    if last is not None and not timing.share(first, last):
        raise ArgumentError(
            f"SAM is left no step: of the {span} from start to stop every {interval}th is its own, "
            f"which is the first, where rho_warmup ({_shown(rho_warmup)}) begins at 0"
        )
    return timing


def _steps(name: str, value: Any, whole: int | None, remedy: str) -> int:
    """A number of steps, or a fraction of all of them."""
    if _is_whole(value):
        if value < 0 or (whole is not None and value > whole):
            most = "" if whole is None else f" to {whole}"
            raise ArgumentError(f"{name} is {value}: expected a step, from 0{most}")
        return int(value)
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise ArgumentError(
            f"{name} is {value!r}: expected a whole number of steps, or a fraction from 0.0 to 1.0"
        )
    if whole is None:
        if value == 0:
            return 0
        raise ArgumentError(
            f"{name} is {value}, a fraction of a training whose length is not known: give "
            f"{remedy}; or give {name} in steps, a whole number"
        )
    return round(value * whole)


def _rule(schedule: str | ScheduleRule) -> ScheduleRule:
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return SCHEDULES[schedule]
    if isinstance(schedule, str) or not callable(schedule):
        known = ", ".join(map(repr, SCHEDULES))
        raise ArgumentError(
            f"rho_schedule is {schedule!r}: expected one of {known}, or a function of the progress "
            "from 0 to 1"
        )
    return schedule


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)
