"""The task that a folder of checkpoints and a table make; a model is read when it is asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, DataError, ZooFormatError
from sharpkit.evaluation.grid import normal_id
from sharpkit.importing import import_callable
from sharpkit.zoo.folder.columns import Columns, path_columns, read_columns
from sharpkit.zoo.folder.matching import find_files, matched, model_ids
from sharpkit.zoo.folder.rows import Row, read_rows
from sharpkit.zoo.folder.table import Value, read_table
from sharpkit.zoo.grid import model_configs, models_frame
from sharpkit.zoo.task import Split, Weights, known_id

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from torch.utils.data import TensorDataset

    from sharpkit.contract.loading import Data

Build: TypeAlias = "str | Callable[..., nn.Module]"
FOLDER_AND_TABLE = " with the table "  # between both, in the location of a task
SPLITS: tuple[Split, ...] = ("train", "test")


@readable(lambda e: f"{e.id} of task {e.task}", brief=True)
@dataclass(frozen=True)
class FolderModel:
    """A checkpoint with its row of the table.

    Attributes:
        task: Name of the task that it belongs to.
        id: Its id.
        path: The file of its weights.
        initial: The file of the weights before training; None where the table has none.
        build: What builds the network, or "module:callable".
        settings: What the row says, for the parameters of `build`.
        hyperparameters: Name to this model's value.
        metrics: train_acc, test_acc, ...; those of its row that are finite numbers.
    """

    task: str
    id: str
    path: Path
    initial: Path | None
    build: Build
    settings: Mapping[str, Value]
    hyperparameters: Mapping[str, Value]
    metrics: Mapping[str, float]

    @property
    def made_from(self) -> str:
        """What the network depends on beside its file."""
        name = self.build if isinstance(self.build, str) else _name_of(self.build)
        return f"{name} {sorted(build_arguments(self.build, self.settings).items())}"

    def files(self, weights: Weights = "final") -> list[Path]:
        """The file of the trained weights, or of those before training."""
        if weights not in ("final", "initial"):
            raise ArgumentError(f"weights is {weights!r}; expected 'final' or 'initial'")
        if weights == "initial" and self.initial is None:
            raise ZooFormatError(
                f"model {self.id}: the table names no file of the weights before training; give it "
                "a column called initial, or name one: columns={'initial': ...}"
            )
        return [self.path if weights == "final" or self.initial is None else self.initial]

    def load(self, weights: Weights = "final") -> nn.Module:
        """The network in eval mode.

        Raises:
            ModelError: The file is missing, damaged, would have to be unpickled, or does not fit.
            ArgumentError: `build` gives no module.
            ZooFormatError: There are no weights before training.
        """
        from sharpkit.zoo.checkpoint import load_checkpoint

        (path,) = self.files(weights)
        build = import_callable(self.build) if isinstance(self.build, str) else self.build
        return load_checkpoint(path, partial(build, **build_arguments(build, self.settings)))

    def frame(self) -> pd.DataFrame:
        """One row: task, model, the hyperparameters and the metrics."""
        one = model_configs({self.id: self.hyperparameters}, {self.id: self.metrics})
        return models_frame(self.task, one)


@readable(lambda t: f"{t.name}, {len(t)} models, {t.location}", brief=True)
class FolderTask(Mapping[str, FolderModel]):
    """Checkpoints by id, with the rows of their table; see `load_zoo`.

    Args:
        name: The task's name.
        location: The pattern and the table, for the record of a run.
        models: The models that have a file and a row.
        metrics: Of each what its row records; NaN where a cell is empty.
        messages: What `check` tells.
        data: Training and test examples; None where there are none.
    """

    mirror = None

    def __init__(
        self,
        name: str,
        location: str,
        models: Sequence[FolderModel],
        metrics: Mapping[str, Mapping[str, float]],
        messages: Sequence[str] = (),
        data: Mapping[Split, Data | None] | None = None,
    ) -> None:
        self.name, self.location = name, location
        self._models = {model.id: model for model in models}
        self._messages = tuple(messages)
        self._data = {split: given for split, given in (data or {}).items() if given is not None}
        self._splits = frozenset(self._data)
        self._datasets: dict[str, TensorDataset] = {}
        self.model_configs = model_configs({m.id: m.hyperparameters for m in models}, metrics)

    def __getitem__(self, id_: str) -> FolderModel:
        return self._models[known_id(id_, self._models, self.name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": {}, "_datasets": {}}  # other processes are given them

    def __copy__(self) -> FolderTask:
        """The same task, which reads its data again."""
        copied = object.__new__(type(self))
        copied.__dict__ = {**self.__dict__, "_datasets": {}}
        return copied

    def check(self) -> list[str]:
        """What the columns were taken for, and which rows, files and values are not used."""
        return list(self._messages)

    def frame(self) -> pd.DataFrame:
        """One row per model: task, model, its hyperparameters and its metrics."""
        return models_frame(self.name, self.model_configs)

    def files(self, split: Split = "train") -> list[Path]:
        """None: the examples are in memory.

        Raises:
            ZooFormatError: There is no such split.
        """
        if split not in SPLITS:
            raise ArgumentError(f"split is {split!r}; expected 'train' or 'test'")
        if split not in self._splits:
            raise ZooFormatError(
                f"task {self.name} has no {split} data; open it with load_zoo(..., data=(train, "
                "test)), on the command line with --data"
            )
        return []

    def dataset(self, split: Split = "train") -> TensorDataset:
        """The examples of a split, read once and kept in memory.

        Raises:
            ZooFormatError: There is no such split.
            DataError: The examples cannot be read, or are no tensor of inputs.
        """
        from torch import Tensor
        from torch.utils.data import TensorDataset

        from sharpkit.contract.loading import load_in_order

        self.files(split)
        if split not in self._datasets:
            if split not in self._data:
                raise DataError(f"task {self.name}: the examples are in the process that opened it")
            examples = load_in_order(self._data[split])
            if not examples.uniform or not isinstance(examples.inputs, Tensor):
                raise DataError(
                    f"task {self.name}, {split} data: expected inputs of one shape in one tensor; "
                    "score_models takes others"
                )
            self._datasets[split] = TensorDataset(examples.inputs, examples.labels)
        return self._datasets[split]


def folder_task(
    pattern: str | Path,
    build: Build | None,
    table: str | Path | pd.DataFrame | None,
    data: tuple[Data, Data | None] | None,
    columns: Mapping[str, str] | None,
    hyperparameters: Sequence[str] | None,
) -> tuple[Path, FolderTask]:
    """The folder that a pattern is about and its task; the arguments are those of `load_zoo`."""
    if table is None or build is None:
        missing = "table" if table is None else "build"
        raise ArgumentError(
            f"{pattern}: a folder of checkpoints needs {missing}= (--{missing}) as well: it "
            "takes a table with a row for each, and the function that builds the network"
        )
    root, files = find_files(pattern)
    read = read_table(table)
    path, matches = matched(read, path_columns(read, columns), root, files)
    found = read_columns(read, path, columns, hyperparameters)
    rows, messages = read_rows(read, found, matches, root, files)
    ids = model_ids([row.path for row in rows], root)
    if len({normal_id(id_) for id_ in ids}) < len(ids):
        raise ZooFormatError(
            f"{pattern}: two files differ only by spaces or a leading model_: rename one"
        )
    _check_build(build, found, read.name)
    name = root.resolve().name or "models"
    models = [_model(name, id_, row, build) for id_, row in zip(ids, rows, strict=True)]
    metrics = {id_: row.metrics for id_, row in zip(ids, rows, strict=True)}
    location = f"{Path(pattern).absolute()}{FOLDER_AND_TABLE}{read.name}"
    task = FolderTask(name, location, models, metrics, messages, _splits(data))
    return root, task


def build_arguments(build: Build, settings: Mapping[str, Value]) -> dict[str, Value]:
    """What of a row a function is given: what its parameters are called.

    A function that takes nothing but **settings gets them all. Parameters of which the row has no
    value keep their defaults.

    Example:
        >>> row = {"width": 8, "lr": 0.1, "depth": None}
        >>> build_arguments(lambda width, depth=2: None, row)
        {'width': 8}
        >>> build_arguments(lambda **settings: None, row), build_arguments(lambda: None, row)
        ({'width': 8, 'lr': 0.1}, {})
    """
    takes = _parameters(build)
    kinds = {p.kind for p in takes.values()}
    known: dict[str, Value] = {n: value for n, value in settings.items() if value is not None}
    if kinds == {inspect.Parameter.VAR_KEYWORD}:
        return known
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return {n: known[n] for n, p in takes.items() if p.kind in named and n in known}


def _parameters(build: Build) -> Mapping[str, inspect.Parameter]:
    function = import_callable(build) if isinstance(build, str) else build
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some functions in C, which cannot tell
        return {}


def _check_build(build: Build, columns: Columns, table: str) -> None:
    if not isinstance(build, str) and not callable(build):
        raise ArgumentError(f"build is {build!r}: expected a function, or 'module:callable'")
    single = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name, parameter in _parameters(build).items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in single
        if needed and name not in columns.settings:
            raise ArgumentError(
                f"{build if isinstance(build, str) else _name_of(build)} needs {name!r}, which no "
                f"column of {table} gives; it has {', '.join(columns.settings)}"
            )


def _name_of(build: Callable[..., Any]) -> str:
    return getattr(build, "__qualname__", type(build).__name__)


def _model(task: str, id_: str, row: Row, build: Build) -> FolderModel:
    finite = {name: value for name, value in row.metrics.items() if math.isfinite(value)}
    return FolderModel(
        task, id_, row.path, row.initial, build, row.settings, row.hyperparameters, finite
    )


def _splits(data: tuple[Data, Data | None] | None) -> dict[Split, Data | None]:
    if data is None:
        return {}
    if not isinstance(data, tuple | list) or len(data) != 2 or hasattr(data[0], "shape"):
        raise ArgumentError(
            "data: expected (train, test), each a pair of tensors, a Dataset or a DataLoader, such "
            "as sk.load_dataset('cifar10')"
        )
    return dict(zip(SPLITS, data, strict=True))
