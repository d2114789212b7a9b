"""The PGDL competition's directory tree as mappings: Zoo -> Task -> ModelEntry.

Opening a zoo reads directory listings and each task's model_configs.json, nothing else; configs,
weights and data are read when asked for.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sharpkit.display import readable
from sharpkit.doors import reading, shown
from sharpkit.errors import ArgumentError, SharpkitError, ZooFormatError
from sharpkit.safe_text import printable
from sharpkit.zoo.files import list_directory, read_json
from sharpkit.zoo.grid import check_grid, possible_values
from sharpkit.zoo.remote import Mirror, is_remote, local_path
from sharpkit.zoo.tables import models_table, tasks_table

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import TensorDataset

    from sharpkit.zoo.keras import KerasModel

WEIGHT_FILES = {"final": "weights.hdf5", "initial": "weights_init.hdf5"}
_MODEL = re.compile("model_([0-9]+)")
_SHARD = re.compile(r"shard_([0-9]+)\.tfrecord")
_SHOWN = 20  # ids in a message


def load_zoo(path: str | Path) -> Zoo:
    """Open a zoo of trained networks in the PGDL competition's layout.

    Accepts the root (`input_data` beside `reference_data`), `input_data` itself, a folder of
    tasks, or one task; model_configs.json may also lie beside the models. Models that the file
    does not list, entries without a model, and incomplete or doubled grids are warned about.

    Of a zoo elsewhere, opening reads the listing and model_configs.json; any other file is copied
    into the cache (`SHARPKIT_CACHE`, or the platform's) when it is used, and again if it changes.

    Args:
        path: The directory, or a URL that fsspec knows, such as "s3://bucket/zoo", "gs://...",
            "hf://datasets/...", "https://..." (each needs a package: `sharpkit[remote]`).

    Returns:
        Zoo: Task name to `Task`.

    Raises:
        ZooFormatError: Nothing there, no model, or (for a single task) no usable
            model_configs.json. Of several tasks the good ones load and the others are warned about.
        ArgumentError: A URL of an unknown protocol, or of one whose package is missing.
        DownloadError: The server cannot be reached, or refuses.

    Source:
        Jiang et al., NeurIPS 2020 Competition: Predicting Generalization in Deep Learning.

    Example:
        >>> import torch
        >>> from sharpkit.zoo import embedded_zoo
        >>> zoo = load_zoo(embedded_zoo().path)  # your own directory, such as "public_data"
        >>> model = zoo["fashion_mnist_14x14"]["20"].load()
        >>> model(torch.zeros(1, 1, 14, 14)).shape
        torch.Size([1, 10])
    """
    zoo = find_tasks(path)
    for task in zoo.values():
        try:
            messages = task.check()
        except SharpkitError as error:
            if len(zoo) == 1:
                raise
            messages = [str(error)]
        for message in messages:
            warnings.warn(f"task {task.name}: {message}", UserWarning, stacklevel=2)
    return zoo


def find_tasks(path: str | Path) -> Zoo:
    """The tasks below a path or URL, without opening any file; see `load_zoo`."""
    mirror = Mirror(str(path)) if is_remote(path) else None
    path = local_path(path) if mirror is None else mirror.path
    refused: dict[str, str] = {}
    for root in _candidates(path):
        if _model_directories(root):
            return Zoo(path, [_task(root.resolve().name, root, mirror)])
        tasks = []
        for folder in list_directory(root):
            if not _is_folder(folder) or folder.name == "reference_data":
                continue
            try:
                if _model_directories(folder):
                    tasks.append(_task(folder.name, folder, mirror))
                # beside input_data, any folder may lie among the tasks
                elif root.name == "input_data" or _is_folder(folder / "dataset_1"):
                    raise ZooFormatError(f"{folder}: task has no model_<id> directory")
            except ZooFormatError as error:
                refused[printable(folder.name)] = printable(str(error))
        if tasks:
            for message in refused.values():
                warnings.warn(message, UserWarning, stacklevel=3)
            return Zoo(path, tasks, refused)
    raise ZooFormatError(
        next(iter(refused.values()), "")
        or f"{path if mirror is None else mirror.url}: no model found; expected "
        "input_data/<task>/model_<id>/, or a task with model_<id> directories"
    )


@readable(lambda z: f"{len(z)} tasks, {sum(map(len, z.values()))} models, in {z.path}")
class Zoo(Mapping[str, "Task"]):
    """Tasks by name, in alphabetical order.

    Args:
        path: The directory that was opened.
        tasks: Its tasks.
        refused: Name, made printable, of each folder that cannot be used as a task, and why.
    """

    def __init__(
        self, path: Path, tasks: list[Task], refused: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.refused = path, dict(refused or {})
        self._tasks = {task.name: task for task in tasks}

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise KeyError(f"no task {name!r} in {self.path}; it has {', '.join(self._tasks)}")
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def frame(self) -> pd.DataFrame:
        """One row per task: task, models, path."""
        return tasks_table(self)


@readable(lambda t: f"{t.name}, {len(t)} models, in {t.path}", brief=True)
class Task(Mapping[str, "ModelEntry"]):
    """Models by id, in numeric order, with the data they were trained on.

    Args:
        name: The task's name.
        path: Its directory, the one with `model_<id>` and `dataset_1`.
        mirror: Of a remote task, what brings its files; they are at their paths after `local`.
    """

    def __init__(self, name: str, path: Path, mirror: Mirror | None = None) -> None:
        self.name, self.path, self.mirror = name, path, mirror
        directories = _model_directories(path)
        ids = sorted(directories, key=lambda id_: (int(id_), id_))
        self._models = {id_: ModelEntry(self, id_, directories[id_]) for id_ in ids}
        self._datasets: dict[str, TensorDataset] = {}

    def __getitem__(self, id_: str) -> ModelEntry:
        if str(id_) not in self._models:
            raise KeyError(f"no model {id_!r} in task {self.name} ({len(self)} models)")
        return self._models[str(id_)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def frame(self) -> pd.DataFrame:
        """One row per model: task, model, its hyperparameters and its metrics.

        Raises:
            ZooFormatError: The file model_configs.json, or a model's entry in it, cannot be read.
        """
        return models_table(list(self.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_datasets": {}}  # other processes read the data themselves

    @property
    def location(self) -> str:
        """The task's URL if it is remote, else its absolute path."""
        return str(self.path.resolve()) if self.mirror is None else self.mirror.location(self.path)

    def local(self, path: Path) -> Path:
        """One of the task's files, copied here before if the task is remote.

        Raises:
            ZooFormatError: The server does not have it.
            DownloadError: It cannot be copied.
        """
        return path if self.mirror is None else self.mirror.fetch(path)

    @cached_property
    def model_configs(self) -> dict[str, Any]:
        """The parsed model_configs.json: id -> {"hparams", "metrics"}; "model_1" is "1"."""
        content = read_json(self.local(self.model_configs_path))
        if not isinstance(content, dict) or not content:
            raise ZooFormatError(f"{self.model_configs_path}: expected a non-empty JSON object")
        return _normal_ids(self.model_configs_path, content)

    @property
    def model_configs_path(self) -> Path:
        """Where model_configs.json is; ZooFormatError that lists the places if it is nowhere."""
        here, name = self.path.resolve(), self.path.resolve().name
        places = [
            here / "model_configs.json",
            here.parent.parent / "reference_data" / name / "model_configs.json",
            here.parent / "reference_data" / name / "model_configs.json",
        ]
        for place in places:
            if _is_file(place) if self.mirror is None else self.mirror.has(place):
                return place
        raise ZooFormatError(
            f"{self.path}: model_configs.json is missing; looked for {', '.join(map(str, places))}"
        )

    @property
    def possible_values(self) -> dict[str, list[Any]]:
        """Hyperparameter name to the values that it takes in this task."""
        return possible_values(self.model_configs)

    def check(self) -> list[str]:
        """What does not fit together in model_configs.json, one sentence each.

        Raises:
            ZooFormatError: The file is missing or unreadable.
        """
        configs = self.model_configs
        messages = []
        unlisted = [id_ for id_ in self if id_ not in configs]
        absent = [id_ for id_ in configs if id_ not in self]
        if unlisted:
            messages.append(f"models not in model_configs.json: {_some(unlisted)}")
        if absent:
            messages.append(f"model_configs.json lists models that are absent: {_some(absent)}")
        with reading(self.model_configs_path, ZooFormatError, "hyperparameters of a grid"):
            return messages + check_grid(configs)

    def shards(self, split: Literal["train", "test"]) -> list[Path]:
        """The files of a split in numeric order, not all here if the task is remote; see `local`.

        Raises:
            ArgumentError: Not "train" or "test".
            ZooFormatError: The split is missing or has no shard.
        """
        if split not in ("train", "test"):
            raise ArgumentError(f"split is {split!r}; expected 'train' or 'test'")
        folder = self.path / "dataset_1" / split
        if not _is_folder(folder):
            raise ZooFormatError(f"{folder}: this task has no {split} data")
        numbered = [
            (int(match[1]), entry)
            for entry in self._children(folder)
            if (match := _SHARD.fullmatch(entry.name))
        ]
        if not numbered:
            raise ZooFormatError(f"{folder}: no shard_<k>.tfrecord found")
        numbers = sorted({number for number, _ in numbered})
        for number, following in pairwise(numbers):
            if following > number + 1:
                raise ZooFormatError(f"{folder}: shard_{number + 1}.tfrecord is missing")
        return [entry for _, entry in sorted(numbered)]

    def dataset(self, split: Literal["train", "test"] = "train") -> TensorDataset:
        """The examples of a split, decoded once and kept in memory.

        Args:
            split: "train" or "test".

        Returns:
            TensorDataset: Inputs (n, c, h, w), or (n, d), float32; labels (n,) int64. Shards come
            in numeric order.

        Raises:
            ZooFormatError: The split is missing, a shard is corrupt or truncated, or a label is
                not a non-negative integer; names the file.
        """
        if split not in self._datasets:
            import torch
            from torch.utils.data import TensorDataset

            from sharpkit.zoo.tfrecord import read_shards

            stored, labels = read_shards(list(map(self.local, self.shards(split))))
            inputs = torch.from_numpy(stored)
            if inputs.ndim == 4:
                inputs = inputs.permute(0, 3, 1, 2).contiguous()
            self._datasets[split] = TensorDataset(inputs, torch.from_numpy(labels))
        return self._datasets[split]

    def _children(self, folder: Path) -> list[Path]:
        return list_directory(folder) if self.mirror is None else self.mirror.children(folder)


@readable(lambda e: f"{e.id} of task {e.task.name}", brief=True)
class ModelEntry:
    """One trained network: its architecture, weights, hyperparameters and accuracies.

    Args:
        task: The task that it belongs to.
        id: Its id, the digits of `model_<id>`.
        path: Its directory.
    """

    def __init__(self, task: Task, id: str, path: Path) -> None:
        self.task, self.id, self.path = task, id, path

    def frame(self) -> pd.DataFrame:
        """One row: task, model, the hyperparameters and the metrics; see `Task.frame`."""
        return models_table([self])

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        config = read_json(self.task.local(self.path / "config.json"))
        if not isinstance(config, dict):
            raise ZooFormatError(f"{self.path / 'config.json'}: expected a JSON object")
        return config

    def build(self, device: str = "meta") -> KerasModel:
        """The architecture without this model's weights; on "meta" nothing is allocated."""
        from sharpkit.zoo.keras import build_model

        return build_model(self.config, model_name=str(self.path / "config.json"), device=device)

    def weights_path(self, weights: Literal["final", "initial"] = "final") -> Path:
        """The weight file of the trained or the freshly initialised network; see `Task.local`."""
        if weights not in WEIGHT_FILES:
            raise ArgumentError(f"weights is {weights!r}; expected 'final' or 'initial'")
        return self.path / WEIGHT_FILES[weights]

    def load(self, weights: Literal["final", "initial"] = "final") -> KerasModel:
        """The network as a torch module in eval mode.

        Args:
            weights: "final" for the trained weights, "initial" for those before training.

        Returns:
            KerasModel: Takes float32 (n, c, h, w), or (n, d); returns what the network's last
            layer returns, logits in a PGDL zoo.

        Raises:
            ZooFormatError: Unknown layer or keyword, damaged weights, shapes that do not agree,
                NaN or infinite weights; names the file and the layer.
        """
        from sharpkit.zoo.weights import load_weights

        path = self.weights_path(weights)
        model = self.build()
        load_weights(model, self.task.local(path))
        return model.eval()

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Hyperparameter name to this model's value."""
        hparams = self._section("hparams")
        for name, h in hparams.items():
            if not isinstance(h, dict) or "current_value" not in h:
                raise self._config_error(f"hyperparameter {shown(name)} has no current_value")
        return {name: h["current_value"] for name, h in hparams.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """train_acc, test_acc and whatever else was recorded at the end of training."""
        metrics = self._section("metrics")
        for name, value in metrics.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # an int may be beyond every float, which isfinite takes ill
            if not is_number or not abs(value) <= sys.float_info.max:
                raise self._config_error(
                    f"metric {shown(name)} is {shown(value)}; expected a finite number"
                )
        return {name: float(value) for name, value in metrics.items()}

    @property
    def generalization_gap(self) -> float:
        """Training accuracy minus test accuracy."""
        metrics = self.metrics
        for name in ("train_acc", "test_acc"):
            if name not in metrics:
                raise self._config_error(f"metric {name!r} is missing")
        return metrics["train_acc"] - metrics["test_acc"]

    def _section(self, key: str) -> dict[str, Any]:
        entry = self.task.model_configs.get(self.id)
        if entry is None:
            raise self._config_error("no such entry")
        section = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(section, dict):
            raise self._config_error(f"{key!r} is missing or not an object")
        return section

    def _config_error(self, message: str) -> ZooFormatError:
        return ZooFormatError(f"{self.task.model_configs_path}: model {self.id}: {message}")


def _task(name: str, path: Path, mirror: Mirror | None) -> Task:
    """A task, unless its path is one that no table and no database can keep."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise ZooFormatError(
            f"{path}: the name of this folder, or of one above it, is not UTF-8; rename it"
        ) from None
    return Task(name, path, mirror)


def _candidates(path: Path) -> Iterator[Path]:
    """Directories that may hold tasks: input_data below the path, the path, one folder deeper."""
    children = list_directory(path)  # raises if there is nothing to read
    if _is_folder(path / "input_data"):
        yield path / "input_data"
        return
    yield path
    for child in children:
        if _is_folder(child / "input_data"):
            yield child / "input_data"


def _model_directories(path: Path) -> dict[str, Path]:
    """Model id to directory, for each `model_<id>` directly below a path."""
    return {
        match[1]: entry
        for entry in list_directory(path)
        if (match := _MODEL.fullmatch(entry.name)) and _is_folder(entry)
    }


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # such as one inside a folder that may not be entered
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _normal_ids(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by the digits of their model's id: "model_1" is "1"."""
    names: dict[str, str] = {}
    for name in entries:
        id_ = name.strip().removeprefix("model_")
        if id_ in names:
            raise ZooFormatError(
                f"{path}: {shown(names[id_])} and {shown(name)} are both model {printable(id_)}; "
                "remove one of the two entries"
            )
        names[id_] = name
    return {id_: entries[name] for id_, name in names.items()}


def _some(ids: list[str]) -> str:
    more = f", and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else ""
    return printable(", ".join(ids[:_SHOWN])) + more
