"""What a task of a zoo is, whatever files it is stored in: the one thing that runs ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

from sharpkit.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from torch.utils.data import TensorDataset

    from sharpkit.zoo.remote import Mirror

Split: TypeAlias = Literal["train", "test"]
Weights: TypeAlias = Literal["final", "initial"]


class ModelEntry(Protocol):
    """One trained network of a task.

    If `load` depends on more than its files, an entry has a text `made_from` that tells on what: a
    model whose text has changed is scored again.

    Where a file has several models, a method `digest(weights)`, if there is one, gives the SHA-256
    of what `load(weights)` reads for this model alone: then a change in `files` means that the
    model is scored again only if its digest has changed too.
    """

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was recorded at the end of training: train_acc, test_acc, ...; finite numbers."""

    def load(self, weights: Weights = "final") -> nn.Module:
        """The network in eval mode, with the trained weights or those before training.

        Raises:
            ZooFormatError: Its files are damaged, or there are no such weights.
        """

    def files(self, weights: Weights = "final") -> Sequence[Path]:
        """What `load` reads: a model whose files have changed is scored again.

        Raises:
            ZooFormatError: There are no such weights.
        """


class Task(Protocol):
    """Models by id, with their hyperparameters, metrics, and the data that they were trained on.

    `score_zoo` takes any object like this, alone or in a mapping of names, and `evaluate` rates
    what comes out of it. It is not inherited from. Worker processes get it pickled. `check` and
    `frame` are asked for where a zoo is opened and shown; `score_zoo` does without.

    Attributes:
        name: The task's name.
        location: Where it is, for the record of a run; None if it is in no file.
        mirror: What copies the files of a remote task here; None if they are here.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def location(self) -> str | None: ...  # noqa: D102
    @property
    def mirror(self) -> Mirror | None: ...  # noqa: D102

    @property
    def model_configs(self) -> Mapping[str, Any]:
        """Id -> {"hparams", "metrics"}, as `grid.model_configs` makes it of plain mappings."""

    def __getitem__(self, id_: str, /) -> ModelEntry: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...

    def dataset(self, split: Split = "train") -> TensorDataset:
        """The examples of a split: inputs (n, ...) float32, labels (n,) int64."""

    def files(self, split: Split = "train") -> Sequence[Path]:
        """What `dataset` reads: if it changes, every model is scored again.

        Raises:
            ZooFormatError: There is no such split.
        """

    def check(self) -> Sequence[str]:
        """What does not fit together in the task, one sentence each, which `load_zoo` warns of.

        Raises:
            ZooFormatError: The task cannot be used.
        """

    def frame(self) -> pd.DataFrame:
        """One row per model: task, model, its hyperparameters and its metrics."""


def known_id(id_: object, models: Mapping[str, Any], task: str) -> str:
    """An id as a task has it; KeyError, which says how many there are, for one that it has not."""
    if str(id_) not in models:
        raise KeyError(f"no model {id_!r} in task {task} ({len(models)} models)")
    return str(id_)


def tasks_by_name(zoo: Task | Mapping[str, Task]) -> dict[str, Task]:
    """One task under its own name, or several as they are named (a task may be a mapping too).

    Raises:
        ArgumentError: For something else, such as a path.
    """
    if hasattr(zoo, "dataset"):
        task = cast(Task, zoo)
        return {task.name: task}
    if not isinstance(zoo, Mapping):
        raise ArgumentError(f"expected a zoo or a task, such as load_zoo(path), got {zoo!r}")
    return dict(zoo)
