"""What training a zoo would cost, told before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sharpkit.device import check_device
from sharpkit.display import one_row, readable
from sharpkit.errors import ArgumentError
from sharpkit.training.settings import check_number
from sharpkit.zoo.keras import build_model
from sharpkit.zoo_training.cost_counts import (
    DataSizes,
    disk_of_model,
    flops_of_an_example,
    sizes_of_data,
)
from sharpkit.zoo_training.cost_trial import epoch_seconds
from sharpkit.zoo_training.grid_file import ZooPlan, read_plan, settings_of
from sharpkit.zoo_training.recipe import Recipe
from sharpkit.zoo_training.stacked_plan import (
    Shape,
    Stack,
    check_stack,
    needs_of,
    shape_of,
    sizes_of,
    stacks_of,
)

if TYPE_CHECKING:
    import pandas as pd

_HOUR, _MIB = 3600.0, 2**20
# what decides the shape of a network and of its steps, but for rho, where 0 differs from the rest
_OF_SHAPE = (
    *("architecture", "width", "num_conv_blocks", "convs_per_block", "num_dense_layers"),
    *("dense_units", "batch_size", "m", "rho"),
)


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
        flops: Of an epoch of one network, with the evaluation that ends it.
        seconds: The same.
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
    flops: int
    seconds: float
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
            f"{math.ceil(self.memory / _MIB):,} MiB of memory for each process",
            f"{math.ceil(self.disk / _MIB):,} MiB of disk",
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
        network), timed (examples of the epoch that was timed), steps_at_most, flops_at_most,
        hours_at_most, hours (at the recorded number of epochs, if there is one), memory_mib,
        disk_mib (without the data).
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
                "steps_at_most": s.steps * s.epochs,
                "flops_at_most": s.flops * s.epochs_of(None),
                "hours_at_most": s.seconds * s.epochs_of(None) / _HOUR,
                "hours": s.seconds * s.epochs_of(self.recorded_epochs) / _HOUR,
                "memory_mib": s.memory / _MIB,
                "disk_mib": s.disk / _MIB,
            }
            for s in self.shapes
        ]
        table = pd.DataFrame(rows)
        return table.drop(columns="hours") if self.recorded_epochs is None else table

    def _hours(self, recorded: float | None) -> float:
        return sum(s.seconds * s.epochs_of(recorded) for s in self.shapes) / _HOUR


def training_cost(
    plan: str | Path | ZooPlan,
    *,
    data: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    stack: Stack = None,
    seconds: float = 0.5,
) -> TrainingCost:
    """What `train_zoo` would cost: an epoch of each shape of network is timed, nothing is written.

    Epochs are timed on random images of the right shape, on one thread as in a training, with all
    networks of a stack at a time, and with step sizes of almost 0. Where an epoch takes longer than
    `seconds`, it is one of fewer examples, and its time is taken in proportion; that is too much
    where they are fewer than a batch. What data sets by name have is known and not read.

    Args:
        plan: A grid file, the name of a preset, or a `ZooPlan`.
        data: Other data, as for `sharpkit zoo train --data`.
        limit: Only the first models of the grid.
        device: Where to train.
        stack: Networks at a time, as for `train_zoo`.
        seconds: What an epoch that is timed should take, about.

    Returns:
        TrainingCost: Networks, steps, operations, hours, memory and disk, by shape and in total.

    Raises:
        ArgumentError: An argument is out of range, or a network of the grid cannot be built.
        DataError: Data that must be read are missing or damaged.

    Example:
        >>> cost = training_cost("mini", limit=3, seconds=0.01)
        >>> cost.networks, cost.steps_at_most, [shape.parameters for shape in cost.shapes]
        (3, 132000, [16142, 16142, 16142])
    """
    check_device(device)
    check_stack(stack)
    check_number("seconds", seconds, lambda v: 0 < v < math.inf, "seconds > 0")
    plan = plan if isinstance(plan, ZooPlan) else read_plan(plan)
    if data is not None:
        plan = replace(plan, data=plan.data.at(data))
    sizes = sizes_of_data(plan)
    settings = dict(list(settings_of(plan.grid, plan.replicates).items())[:limit])
    if not settings:
        raise ArgumentError(f"limit is {limit}: expected at least one network")
    recipes = {i: replace(plan.recipe, **setting) for i, setting in settings.items()}
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        shapes = tuple(
            _cost(
                [recipes[i] for i in ids],
                sizes,
                most,
                shape=_shared([settings[i] for i in ids]),
                grid=plan.grid,
                device=where,
                seconds=seconds,
            )
            for ids, most in _together(recipes, sizes, stack, where)
        )
    return TrainingCost(
        task=plan.task,
        device=device,
        shapes=shapes,
        most_epochs=max(recipe.epochs for recipe in recipes.values()),
        attempts=max(recipe.attempts for recipe in recipes.values()),
        recorded_epochs=plan.recorded_epochs,
        data_disk=sizes.disk,
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _together(
    recipes: Mapping[str, Recipe], data: DataSizes, stack: Stack, device: torch.device
) -> list[tuple[list[str], int]]:
    """Ids of networks of one shape, and how many train at a time, in the order of the grid."""
    shapes: dict[Shape, list[str]] = {}
    for id_, recipe in recipes.items():
        shapes.setdefault(shape_of(recipe, data.input_shape, data.classes), []).append(id_)
    stacks = stacks_of(recipes, data.input_shape, data.classes, stack=stack, device=device)
    most = {ids[0]: count for ids, count in stacks}
    return [(ids, min(len(ids), most.get(ids[0], 1))) for ids in shapes.values()]


def _shared(settings: Sequence[Mapping[str, Any]]) -> str:
    """The values of the grid that make the shape of these networks."""
    first = settings[0]
    same = [n for n in first if n in _OF_SHAPE and all(s[n] == first[n] for s in settings)]
    return " ".join(f"{name}={first[name]}" for name in same) or "all"


def _cost(
    recipes: Sequence[Recipe],
    data: DataSizes,
    most: int,
    *,
    shape: str,
    grid: Mapping[str, Sequence[Any]],
    device: torch.device,
    seconds: float,
) -> ShapeCost:
    """Of networks of one shape; an epoch of one with the most dropout is timed."""
    recipe = max(recipes, key=lambda recipe: recipe.dropout)
    common = shape_of(recipe, data.input_shape, data.classes)
    x = torch.zeros(1, *data.shape, device=device).expand(data.train, *data.shape)
    y = torch.zeros(data.train, dtype=torch.int64, device=device)
    sizes = sizes_of(common, x, y, most)
    step, forward = flops_of_an_example(recipe, data.input_shape, data.classes)
    took, timed = epoch_seconds(
        recipe, data, sizes.networks, flops=step + forward, device=device, seconds=seconds
    )
    last = (data.train + data.test + data.shipped) * forward
    flops = data.train * (step + forward)
    return ShapeCost(
        shape=shape,
        networks=len(recipes),
        stack=sizes.networks,
        parameters=build_model(common.config, device="meta").parameter_count,
        steps=math.ceil(data.train / recipe.batch_size),
        flops=flops,
        seconds=took,
        timed=timed,
        epochs=sum(r.epochs for r in recipes),
        last=last / flops,
        memory=data.memory + needs_of(common, x, y).of(sizes),
        disk=len(recipes) * disk_of_model(recipe, data, grid),
    )
