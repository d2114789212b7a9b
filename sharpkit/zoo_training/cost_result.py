"""What training a zoo would cost, shape by shape and in total."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sharpkit.display import one_row, readable

if TYPE_CHECKING:
    import pandas as pd

_HOUR, _MIB = 3600.0, 2**20


@readable(lambda cost: f"{cost.networks} networks of {cost.shape}", brief=True)
@dataclass(frozen=True)
class ShapeCost:
    """What the networks of one shape cost.

    Args:
        shape: The values of the grid that they share.
        networks: How many.
        stack: That train at a time; 1 for one by one.
        parameters: Of a network.
        steps: Of an epoch.
        perturbed: The share of the steps that are, of SAM, if networks take all their epochs.
        flops: Of an epoch of one network then, on average, with the evaluation that ends it.
        seconds: The same.
        recorded_seconds: The same if they take the recorded number of epochs.
        timed: Examples of the epoch that was timed.
        epochs: Of all networks together, at most, in one attempt each.
        last: The evaluation of a finished network, in epochs.
        memory: Bytes of what trains at a time, with the data.
        disk: Bytes of all networks.
    """

    shape: str
    networks: int
    stack: int
    parameters: int
    steps: int
    perturbed: float
    flops: float
    seconds: float
    recorded_seconds: float
    timed: int
    epochs: int
    last: float
    memory: int
    disk: int

    def frame(self) -> pd.DataFrame:
        """One row: the attributes."""
        return one_row(self)

    def epochs_of(self, recorded: float | None) -> float:
        """Of all networks, with what their last evaluations take: at most, or as recorded."""
        epochs = self.epochs if recorded is None else self.networks * recorded
        return epochs + self.networks * self.last

    def hours_of(self, recorded: float | None) -> float:
        """The same in hours."""
        each = self.seconds if recorded is None else self.recorded_seconds
        return each * self.epochs_of(recorded) / _HOUR


@readable(lambda cost: f"{cost.task}: {cost.total}")
@dataclass(frozen=True)
class TrainingCost:
    """What training a zoo would cost.

    How many epochs a network takes to its target is not known before: figures "at most" are those
    of a first attempt that takes all its epochs.

    Args:
        task: Name of the task.
        device: Where an epoch was timed.
        shapes: The cost of the networks, shape by shape.
        most_epochs: Of a network, at most.
        attempts: How often a network may start.
        recorded_epochs: Of a network, on average, in an earlier run; None if none is recorded.
        data_disk: Bytes of the zoo's data.
    """

    task: str
    device: str
    shapes: tuple[ShapeCost, ...]
    most_epochs: int
    attempts: int
    recorded_epochs: float | None
    data_disk: int

    @property
    def networks(self) -> int:
        """How many."""
        return sum(shape.networks for shape in self.shapes)

    @property
    def steps_at_most(self) -> int:
        """Of all networks, if each takes all epochs of its first attempt."""
        return sum(shape.steps * shape.epochs for shape in self.shapes)

    @property
    def flops_at_most(self) -> float:
        """The same in floating-point operations, of convolutions and matrix products."""
        return sum(shape.flops * shape.epochs_of(None) for shape in self.shapes)

    @property
    def hours_at_most(self) -> float:
        """The same in hours of one core or GPU."""
        return self._hours(None)

    @property
    def hours(self) -> float:
        """Hours of one core or GPU at the recorded number of epochs; NaN if none is recorded."""
        return math.nan if self.recorded_epochs is None else self._hours(self.recorded_epochs)

    @property
    def memory(self) -> int:
        """Bytes that a process takes for the largest of what trains at a time, and the data."""
        return max(shape.memory for shape in self.shapes)

    @property
    def disk(self) -> int:
        """Bytes of the finished zoo."""
        return self.data_disk + sum(shape.disk for shape in self.shapes)

    @property
    def total(self) -> str:
        """All of it in a sentence."""
        unit = "GPU-hours" if torch.device(self.device).type == "cuda" else "core-hours"
        several = f" in the first of {self.attempts} attempts" if self.attempts > 1 else ""
        parts = [
            f"{self.networks} networks",
            f"at most {self.most_epochs} epochs of each{several}: {self.steps_at_most:.2g} steps, "
            f"{self.flops_at_most:.2g} FLOP, {_short(self.hours_at_most)} {unit}",
            f"{_short(self.memory / _MIB)} MiB of memory for each process",
            f"{_short(self.disk / _MIB)} MiB of disk",
        ]
        if self.recorded_epochs is not None:
            recorded = (
                f"at the {self.recorded_epochs:g} epochs of a recorded run: {_short(self.hours)}"
            )
            parts.insert(2, f"{recorded} {unit}")
        return "; ".join(parts)

    def frame(self) -> pd.DataFrame:
        """One row per shape of network.

        Columns: shape, networks, stack (networks at a time), parameters, epoch_seconds (of one
        network), timed (examples of the epoch that was timed), perturbed (the share of the steps
        that are, of SAM), steps_at_most, flops_at_most, hours_at_most, hours (at the recorded
        number of epochs, if there is one), memory_mib, disk_mib (without the data).
        """
        import pandas as pd

        rows = [
            {
                "shape": s.shape,
                "networks": s.networks,
                "stack": s.stack,
                "parameters": s.parameters,
                "epoch_seconds": s.seconds,
                "timed": s.timed,
                "perturbed": s.perturbed,
                "steps_at_most": s.steps * s.epochs,
                "flops_at_most": s.flops * s.epochs_of(None),
                "hours_at_most": s.hours_of(None),
                "hours": s.hours_of(self.recorded_epochs),
                "memory_mib": s.memory / _MIB,
                "disk_mib": s.disk / _MIB,
            }
            for s in self.shapes
        ]
        table = pd.DataFrame(rows)
        return table.drop(columns="hours") if self.recorded_epochs is None else table

    def _hours(self, recorded: float | None) -> float:
        return sum(s.hours_of(recorded) for s in self.shapes)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
