"""Grid files: a TOML file that states data, recipe and grid of a zoo, and the presets.

task = "my_task"                  # the zoo's task
seed = 0
replicates = 2                    # networks of every setting; 1, if left out
recorded_epochs = 80              # of a network, on average, in an earlier run; for its cost

[data]
name = "cifar10"                  # as for sharpkit.load_dataset
train_size = 10000                # all, if left out

[recipe]                          # fields of sharpkit.zoo_training.Recipe
architecture = "vgg"
convs_per_block = 2

[grid]                            # all combinations of values of further fields
width = [64, 128]
batch_size = [32, 512]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

from torch.utils.data import TensorDataset

from sharpkit.data.idx import FASHION_MNIST
from sharpkit.datasets import DataSource
from sharpkit.doors import read_toml, shown
from sharpkit.errors import ArgumentError
from sharpkit.settings import checked_list, from_table, preset_path
from sharpkit.training.settings import check_number, check_whole
from sharpkit.zoo_training.fashion_mnist import fashion_mnist
from sharpkit.zoo_training.recipe import Recipe

_MAX_NETWORKS = 10**6  # of a grid; the competition's largest has 96
EMBEDDED_DATA, EMBEDDED_SIZE = "fashion-mnist-14x14", 2000  # examples, if nothing else is asked


@dataclass(frozen=True)
class ZooPlan:
    """What a grid file asks for; the arguments of `train_zoo`."""

    data: DataSource  # where the examples come from
    task: str  # name of the task
    seed: int = 0  # of the whole grid
    replicates: int = 1  # networks of every setting
    shipped_test: int | None = None  # test examples written to the zoo; None for all
    # epochs that a network took on average in an earlier run, which `training_cost` tells
    recorded_epochs: float | None = None
    recipe: Recipe = field(default_factory=Recipe)  # values of the fields that the grid leaves out
    # field of `Recipe` to its values
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("replicates", self.replicates, 1)
        if self.recorded_epochs is not None:
            check_number("recorded_epochs", self.recorded_epochs, lambda v: v > 0, "a number > 0")

    def load_data(self) -> tuple[TensorDataset, TensorDataset]:
        """Training and test data; also "fashion-mnist-14x14", those of the embedded zoo."""
        source = self.data
        if source.name != EMBEDDED_DATA:
            return source.load()
        size = EMBEDDED_SIZE if source.train_size is None else source.train_size
        return fashion_mnist(source.root or FASHION_MNIST, train_size=size, seed=source.seed)


def read_plan(grid: str | Path) -> ZooPlan:
    """The plan in a grid file.

    Args:
        grid: A TOML file, or the name of a preset: "mini" (the embedded zoo), "medium" (576
            networks on its data), "task1", "task2", "task8" (the competition's), "svhn-nin",
            "cifar-nin" (reduced copies of its tasks 2 and 9).

    Raises:
        ArgumentError: No such file or preset, not TOML, an unknown or missing field, or a value of
            another type or outside its range; names the file and the field.

    Example:
        >>> plan = read_plan("task1")
        >>> plan.data.name, plan.grid["batch_size"], plan.recipe.stop_at_loss
        ('cifar10', (8, 32, 512), 0.01)
    """
    path = preset_path(grid, Path(__file__).parent / "presets")
    table = read_toml(path, ArgumentError)
    axes = table.pop("grid", {})
    plan = from_table(ZooPlan, table, str(path))
    return replace(plan, grid=_checked_grid(axes, plan.recipe, f"{path}, grid"))


def settings_of(
    grid: Mapping[str, Sequence[Any]], replicates: int = 1
) -> dict[str, dict[str, Any]]:
    """Model id to its values of the grid's fields, the last field fastest but for replicates.

    Raises:
        ArgumentError: More networks than anyone trains.

    Example:
        >>> settings_of({"width": [4, 8]}, 2)
        {'0': {'width': 4}, '1': {'width': 4}, '2': {'width': 8}, '3': {'width': 8}}
    """
    count = replicates * math.prod(map(len, grid.values()))
    if count > _MAX_NETWORKS:
        raise ArgumentError(f"the grid has {count:,} networks, expected at most {_MAX_NETWORKS:,}")
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    repeated = (setting for setting in settings for _ in range(replicates))
    return {str(i): dict(setting) for i, setting in enumerate(repeated)}


def _checked_grid(axes: Any, recipe: Recipe, where: str) -> dict[str, tuple[Any, ...]]:
    if not isinstance(axes, Mapping) or not axes:
        raise ArgumentError(f"{where}: expected a table of hyperparameters and lists of values")
    hints: dict[str, Any] = get_type_hints(Recipe)
    grid = {}
    for name, values in axes.items():
        if name not in hints:
            known = ", ".join(f.name for f in fields(Recipe))
            raise ArgumentError(
                f"{where}: unknown hyperparameter {shown(name)}, expected one of {known}"
            )
        grid[name] = checked_list(values, hints[name], f"{where}, {name}")
        try:
            for value in grid[name]:
                replace(recipe, **{name: value})
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from error
        if len(set(grid[name])) != len(grid[name]) or not grid[name]:
            raise ArgumentError(f"{where}, {name}: found {shown(values)}, expected distinct values")
    return grid
