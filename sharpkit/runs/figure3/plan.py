"""What a Figure 3 is made from: the content of a preset or of a user's own TOML file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sharpkit.datasets import DataSource
from sharpkit.doors import read_toml, shown
from sharpkit.errors import ArgumentError
from sharpkit.settings import from_table, preset_path
from sharpkit.training.schedules import Schedule
from sharpkit.training.settings import Augmentation, FitSettings


@dataclass(frozen=True)
class TrainingPlan:
    """The trainings of the left and the middle panel.

    The fields are settings of `sharpkit.fit`, by the same names and with its defaults except for
    the batch size; where `fit` has one m, rho, lr and seed, there are several here.
    """

    architecture: str  # as for `build_architecture`
    epochs: int  # of every training
    # of initial weights, order, augmentation and label noise; one training each
    seeds: tuple[int, ...]
    m: tuple[int, ...]  # group sizes of SAM
    rho: tuple[float, ...]  # radii of SAM
    # learning rates tried with SGD; SAM takes the one with SGD's lowest mean test error
    lr: tuple[float, ...]
    batch_size: int = 256  # examples of a step
    momentum: float = FitSettings.momentum  # of SGD
    weight_decay: float = FitSettings.weight_decay  # of SGD
    schedule: Schedule = FitSettings.schedule  # "cosine", "linear", "step" or "constant"
    augmentation: Augmentation | None = None  # "flip", "crop", "flip-crop", or left out
    label_noise: float = FitSettings.label_noise  # fraction of wrong training labels

    def __post_init__(self) -> None:
        for name in ("seeds", "m", "rho", "lr"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < 0:
                raise ArgumentError(
                    f"{name} is {shown(list(values))}, expected distinct values, none < 0"
                )
        axes = {"seed": self.seeds, "m": self.m, "rho": self.rho, "lr": self.lr}
        first = {name: values[0] for name, values in axes.items()}
        for name, values in axes.items():
            for value in values:
                self.settings(optimizer="sam", **first | {name: value})

    def settings(self, **varied: Any) -> FitSettings:
        """Those of one training: its optimizer, m, rho, lr and seed, and what all have."""
        known = {field.name for field in fields(FitSettings)}
        same = {name: value for name, value in vars(self).items() if name in known}
        return FitSettings(**same | varied)


@dataclass(frozen=True)
class SpectraSettings:
    """The left panel: Hessian spectra in the course of training with SGD and with SAM."""

    epochs: tuple[int, ...]  # after which the Hessian is taken
    m: int  # group size of SAM
    rho: float  # its radius
    n: int | None = None  # training examples that the Hessian is of; left out for all
    steps: int = 80  # Lanczos steps
    probes: int = 1  # random start vectors
    # how many of the training's seeds; left out for all. The first is drawn
    seeds: int | None = None


@dataclass(frozen=True)
class Power:
    """The right panel: predictive power of m-sharpness over a zoo."""

    zoo: str  # a path to a zoo, or "embedded"
    rho: float  # radius of m-sharpness
    m: tuple[int, ...]  # group sizes
    tasks: tuple[str, ...] = ()  # of the zoo; empty for all
    n: int | None = None  # training examples that are used; left out for all


@dataclass(frozen=True)
class Plan:
    """All of a Figure 3.

    Args:
        data: For the trainings.
        training: Of left and middle.
        spectra: The left panel.
        power: The right panel.
    """

    data: DataSource
    training: TrainingPlan
    spectra: SpectraSettings
    power: Power

    def __post_init__(self) -> None:
        last = self.training.epochs
        if not self.spectra.epochs or not all(0 <= e <= last for e in self.spectra.epochs):
            raise ArgumentError(
                f"spectra: epochs is {shown(list(self.spectra.epochs))}, expected some of 0 to "
                f"{last}"
            )


def read_plan(preset: str | Path, build: str | None = None) -> Plan:
    """The plan of a preset ("mini", "fashion", "cifar10", "paper") or of a TOML file.

    Args:
        preset: Its name, or the path of a file.
        build: The file's architecture once more, where that is a "module:callable": code that a
            file names is not run unless the user repeats it.

    Raises:
        ArgumentError: No such file or preset, not TOML, an unknown or missing field, or a value of
            another type or outside its range, or an architecture that is code other than `build`;
            names the file and the field.

    Example:
        >>> read_plan("mini").training.m
        (1, 4, 16, 64, 256)
    """
    path = preset_path(preset, Path(__file__).parent / "presets")
    plan = from_table(Plan, read_toml(path, ArgumentError), str(path))
    named = plan.training.architecture
    if ":" in named and build != named:
        raise ArgumentError(
            f"{path}, training: architecture is the code {shown(named)}, and code that a file "
            "names is not run. If you trust it, repeat it: --build module:callable, or build=..."
        )
    return plan
