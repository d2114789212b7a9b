"""Tasks in the PGDL competition's files: directories of models, shards, model_configs.json.

Opening a task reads the listing of its directory, nothing else; configs, weights and data are read
when asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.display import readable
from sharpkit.doors import reading, shown
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.safe_text import printable
from sharpkit.zoo.files import is_file, is_folder, list_directory, read_json
from sharpkit.zoo.grid import check_grid, possible_values
from sharpkit.zoo.pgdl.model import PgdlModel, models_table
from sharpkit.zoo.remote import Mirror
from sharpkit.zoo.task import Split, known_id

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import TensorDataset

_MODEL = re.compile("model_([0-9]+)")
_SHARD = re.compile(r"shard_([0-9]+)\.tfrecord")
_SHOWN = 20  # ids in a message
EXPECTED = "input_data/<task>/model_<id>/, or a task with model_<id> directories"


@readable(lambda t: f"{t.name}, {len(t)} models, in {t.path}", brief=True)
class PgdlTask(Mapping[str, PgdlModel]):
    """Models by id, in numeric order, with the data they were trained on.

    Args:
        name: The task's name.
        path: Its directory, the one with `model_<id>` and `dataset_1`.
        mirror: Of a remote task, what brings its files; they are at their paths after `local`.
    """

    def __init__(self, name: str, path: Path, mirror: Mirror | None = None) -> None:
        self.name, self.path, self.mirror = name, path, mirror
        directories = model_directories(path)
        ids = sorted(directories, key=lambda id_: (int(id_), id_))
        self._models = {id_: PgdlModel(self, id_, directories[id_]) for id_ in ids}
        self._datasets: dict[str, TensorDataset] = {}

    def __getitem__(self, id_: str) -> PgdlModel:
        return self._models[known_id(id_, self._models, self.name)]

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
            if is_file(place) if self.mirror is None else self.mirror.has(place):
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

    def shards(self, split: Split) -> list[Path]:
        """The files of a split in numeric order, not all here if the task is remote; see `local`.

        Raises:
            ArgumentError: Not "train" or "test".
            ZooFormatError: The split is missing or has no shard.
        """
        if split not in ("train", "test"):
            raise ArgumentError(f"split is {split!r}; expected 'train' or 'test'")
        folder = self.path / "dataset_1" / split
        if not is_folder(folder):
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

    def files(self, split: Split = "train") -> list[Path]:
        """The shards of a split."""
        return self.shards(split)

    def dataset(self, split: Split = "train") -> TensorDataset:
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

            from sharpkit.zoo.shards.tfrecord import read_shards

            stored, labels = read_shards(list(map(self.local, self.shards(split))))
            inputs = torch.from_numpy(stored)
            if inputs.ndim == 4:
                inputs = inputs.permute(0, 3, 1, 2).contiguous()
            self._datasets[split] = TensorDataset(inputs, torch.from_numpy(labels))
        return self._datasets[split]

    def _children(self, folder: Path) -> list[Path]:
        return list_directory(folder) if self.mirror is None else self.mirror.children(folder)


def model_directories(path: Path) -> dict[str, Path]:
    """Model id to directory, for each `model_<id>` directly below a path."""
    return {
        match[1]: entry
        for entry in list_directory(path)
        if (match := _MODEL.fullmatch(entry.name)) and is_folder(entry)
    }


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


def pgdl_tasks(path: Path, mirror: Mirror | None) -> tuple[list[PgdlTask], dict[str, str]]:
    """The tasks below a directory, and why some folders (by printable name) cannot be used as one.

    No file is opened. None of either: this is no zoo of this format.
    """
    refused: dict[str, str] = {}
    for root in candidates(path):
        if model_directories(root):
            return [_task(root.resolve().name, root, mirror)], {}
        tasks = []
        for folder in list_directory(root):
            if not is_folder(folder) or folder.name == "reference_data":
                continue
            try:
                if model_directories(folder):
                    tasks.append(_task(folder.name, folder, mirror))
                # beside input_data, any folder may lie among the tasks
                elif root.name == "input_data" or is_folder(folder / "dataset_1"):
                    raise ZooFormatError(f"{folder}: task has no model_<id> directory")
            except ZooFormatError as error:
                refused[printable(folder.name)] = printable(str(error))
        if tasks:
            return tasks, refused
    return [], refused


def _task(name: str, path: Path, mirror: Mirror | None) -> PgdlTask:
    """A task, unless its path is no text."""
    require_text(path)
    return PgdlTask(name, path, mirror)


def require_text(path: Path) -> None:
    """ZooFormatError for a path that no table and no database can keep."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise ZooFormatError(
            f"{path}: the name of this folder, or of one above it, is not UTF-8; rename it"
        ) from None


def candidates(path: Path) -> Iterator[Path]:
    """Directories that may hold tasks: input_data below the path, the path, one folder deeper."""
    children = list_directory(path)  # raises if there is nothing to read
    if is_folder(path / "input_data"):
        yield path / "input_data"
        return
    yield path
    for child in children:
        if is_folder(child / "input_data"):
            yield child / "input_data"
