"""Grid files: a TOML file that states data, recipe and grid of a zoo, and the presets.

task = "my_task"                  # the zoo's task
seed = 0

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

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from torch.utils.data import TensorDataset

from sharpkit.data.idx import FASHION_MNIST
from sharpkit.datasets import DataSource
from sharpkit.doors import read_toml, shown
from sharpkit.errors import ArgumentError
from sharpkit.settings import checked_list, from_table, preset_path
from sharpkit.zoo_training.fashion_mnist import fashion_mnist
from sharpkit.zoo_training.recipe import Recipe

_EMBEDDED_DATA = "fashion-mnist-14x14"


@dataclass(frozen=True)
class ZooPlan:
    """What a grid file asks for; the arguments of `train_zoo`."""

    data: DataSource  # where the examples come from
    task: str  # name of the task
    seed: int = 0  # of the whole grid
    shipped_test: int | None = None  # test examples written to the zoo; None for all
    recipe: Recipe = field(default_factory=Recipe)  # values of the fields that the grid leaves out
    # field of `Recipe` to its values
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def load_data(self) -> tuple[TensorDataset, TensorDataset]:
        """Training and test data; also "fashion-mnist-14x14", those of the embedded zoo."""
        source = self.data
        if source.name != _EMBEDDED_DATA:
            return source.load()
        size = 2000 if source.train_size is None else source.train_size
        return fashion_mnist(source.root or FASHION_MNIST, train_size=size, seed=source.seed)


def read_plan(grid: str | Path) -> ZooPlan:
    """The plan in a grid file.

    Args:
        grid: A TOML file, or the name of a preset: "mini" (the embedded zoo), "task1", "task2",
            "task8" (the competition's).

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
