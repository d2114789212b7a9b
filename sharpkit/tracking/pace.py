"""When to measure: every so many steps, within a share of the time that training takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from sharpkit.errors import ArgumentError


class Pace:
    """Decides whether a measurement is made, and keeps the time that both take.

    With a budget b, a measurement is made while

        spent + (what the last one took) ≤ b · (time of training so far),

    and the first one always is, as its price is not known before.

    Args:
        budget: Seconds of measuring for each second of training; None for no limit.
        clock: Tells the time in seconds.

    Raises:
        ArgumentError: For a budget that is not positive.

    Example:
        >>> ticks = iter([0.0, 1.0, 11.0, 12.0, 32.0, 33.0])
        >>> pace = Pace(0.1, lambda: next(ticks))
        >>> pace.begin(), pace.end()  # the first takes 1 s
        (True, 1.0)
        >>> pace.begin()  # 10 s of training: 1 s is spent already
        False
        >>> pace.begin(), pace.begin()  # 11 s, 31 s
        (False, True)
        >>> pace.end()
        1.0
    """

    def __init__(
        self, budget: float | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if budget is not None and not 0 < budget < math.inf:
            raise ArgumentError(
                f"budget is {budget}: expected a share of the training time, such as 0.05, or None"
            )
        self.budget, self._clock = budget, clock
        self.trained = self.spent = 0.0
        self._price: float | None = None  # of the last measurement
        self._mark: float | None = None  # when training was last seen to go on

    def begin(self) -> bool:
        """Whether a measurement may begin now."""
        now = self._clock()
        self.trained += 0.0 if self._mark is None else now - self._mark
        self._mark = now
        if self.budget is None or self._price is None:
            return True
        return self.spent + self._price <= self.budget * self.trained

    def end(self) -> float:
        """The measurement that `begin` allowed is over: the seconds it took."""
        now = self._clock()
        self._price = now - (now if self._mark is None else self._mark)
        self.spent += self._price
        self._mark = now
        return self._price

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training has to know of the time."""
        return {"trained": self.trained, "spent": self.spent, "price": self._price}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the time until the next call counts for nothing."""
        self.trained, self.spent = float(state["trained"]), float(state["spent"])
        self._price, self._mark = state["price"], None
