"""Writing a zoo in the PGDL layout: what is written reads back bit for bit, also in Keras 2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from sharpkit.errors import ArgumentError, DataError, ZooFormatError
from sharpkit.zoo.files import read_json, write_json
from sharpkit.zoo.keras import KerasModel
from sharpkit.zoo.keras.weights import write_weights
from sharpkit.zoo.pgdl import WEIGHT_FILES, PgdlTask
from sharpkit.zoo.shards.tfrecord import write_shard
from sharpkit.zoo.task import Task


class ZooWriter:
    """Writes models and data of one zoo, each file in one step; may be stopped and continued.

    A model counts from the moment when its entry is in model_configs.json, which is written after
    its files. A writer on an existing directory adds to it and replaces models of the same id.

    Args:
        path: The zoo's root; gets `input_data` and `reference_data`.
        shard_size: Examples per shard.

    Raises:
        ArgumentError: `shard_size` is below 1.

    Example:
        >>> import tempfile, torch
        >>> from sharpkit.zoo import build_model, load_zoo
        >>> model = build_model(
        ...     {"input_shape": [3], "model_config": [{"layer_name": "Dense", "units": 2}]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = ZooWriter(folder)
        ...     writer.write_dataset("toy", "train", torch.rand(8, 3), torch.arange(8) % 2)
        ...     writer.write_model(
        ...         "toy", 0, model, initial=model, hyperparameters={"lr": 0.1},
        ...         possible_values={"lr": [0.1]}, metrics={"train_acc": 1.0, "test_acc": 0.75})
        ...     entry = load_zoo(folder)["toy"]["0"]
        ...     entry.hyperparameters, entry.generalization_gap
        ({'lr': 0.1}, 0.25)
    """

    def __init__(self, path: str | Path, *, shard_size: int = 1000) -> None:
        if shard_size < 1:
            raise ArgumentError(f"shard_size is {shard_size}; expected at least 1")
        self.path, self.shard_size = Path(path), shard_size
        self._configs: dict[str, dict[str, Any]] = {}

    def write_dataset(
        self, task: str, split: Literal["train", "test"], inputs: Tensor, labels: Tensor
    ) -> None:
        """Write the examples of a split as shards.

        Args:
            task: Task name.
            split: "train" or "test".
            inputs: (n, c, h, w) or (n, d), float32.
            labels: (n,), non-negative integers.

        Raises:
            ArgumentError: Another split.
            DataError: No example, other dtype, NaN or infinite inputs, labels out of range.
        """
        if split not in ("train", "test"):
            raise ArgumentError(f"split is {split!r}; expected 'train' or 'test'")
        x, y = inputs.detach().cpu().numpy(), labels.detach().cpu().numpy()
        if len(x) == 0 or x.dtype != np.float32:
            raise DataError(f"expected at least one float32 example, got {x.dtype} of {x.shape}")
        if x.ndim == 4:
            x = x.transpose(0, 2, 3, 1)
        folder = self._task_path(task) / "dataset_1" / split
        starts = range(0, max(len(x), len(y)), self.shard_size)
        for k, start in enumerate(starts):
            part = slice(start, start + self.shard_size)
            write_shard(folder / f"shard_{k}.tfrecord", x[part], y[part])
        for stale in folder.glob("shard_*.tfrecord"):  # of a longer split written before
            if stale.name not in {f"shard_{k}.tfrecord" for k in range(len(starts))}:
                stale.unlink()

    def write_model(
        self,
        task: str,
        id: int | str,
        model: KerasModel,
        *,
        initial: KerasModel | Mapping[str, Tensor],
        hyperparameters: Mapping[str, Any],
        possible_values: Mapping[str, list[Any]],
        metrics: Mapping[str, float],
    ) -> None:
        """Write one model: config.json, both weight files, then its entry.

        Args:
            task: Task name.
            id: The model's number.
            model: Built by `build_model`, with the trained weights.
            initial: The model before training, or its state dict.
            hyperparameters: Name to this model's value.
            possible_values: Name to all values in the grid, same names.
            metrics: `train_acc` and `test_acc`, and any further numbers.

        Raises:
            ArgumentError: Names that do not agree, a metric missing or not finite, an id that is
                not a number.
            ModelError: Weights that are not finite float32.
        """
        if set(hyperparameters) != set(possible_values):
            raise ArgumentError(
                f"hyperparameters {sorted(hyperparameters)} and possible_values "
                f"{sorted(possible_values)} must have the same names"
            )
        missing = {"train_acc", "test_acc"} - set(metrics)
        infinite = [name for name, value in metrics.items() if not math.isfinite(value)]
        if missing or infinite:
            raise ArgumentError(f"metrics missing: {sorted(missing)}; not finite: {infinite}")
        hparams = {
            name: {"possible_values": list(possible_values[name]), "current_value": value}
            for name, value in hyperparameters.items()
        }
        state = initial.state_dict() if isinstance(initial, KerasModel) else initial
        self._write(task, str(id), model, state, {"hparams": hparams, "metrics": dict(metrics)})

    def _write(
        self,
        task: str,
        id_: str,
        model: KerasModel,
        initial: Mapping[str, Tensor],
        entry: Mapping[str, Any],
    ) -> None:
        if not (id_.isascii() and id_.isdigit()):
            raise ArgumentError(f"model id is {id_!r}; expected a number")
        folder = self._task_path(task) / f"model_{id_}"
        write_json(folder / "config.json", model.config)
        write_weights(model, folder / WEIGHT_FILES["final"])
        write_weights(model, folder / WEIGHT_FILES["initial"], state=initial)
        path = self.path / "reference_data" / task / "model_configs.json"
        if task not in self._configs:
            self._configs[task] = read_json(path) if path.exists() else {}
        entries = {**self._configs[task], id_: entry}
        self._configs[task] = dict(sorted(entries.items(), key=lambda item: int(item[0])))
        write_json(path, self._configs[task])

    def _task_path(self, task: str) -> Path:
        if not task or Path(task).name != task or task.startswith("."):
            raise ArgumentError(f"task name {task!r} cannot be a directory name")
        return self.path / "input_data" / task


def write_zoo(zoo: Mapping[str, Task], path: str | Path, *, shard_size: int = 1000) -> None:
    """Write tasks in the PGDL layout: a copy of a zoo, of some of its tasks, or of several zoos.

    Args:
        zoo: Task name to task, such as a `Zoo`; all in the PGDL layout, whose networks are lists of
            Keras layers.
        path: The new zoo's root.
        shard_size: Examples per shard.

    Raises:
        ArgumentError: A task is in another format; nothing has been written.
        ZooFormatError: Some models or data cannot be read; everything else has been written.

    Example:
        >>> import tempfile
        >>> from sharpkit.zoo import embedded_zoo, load_zoo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_zoo({"mine": embedded_zoo()["fashion_mnist_14x14"]}, folder)
        ...     load_zoo(folder)["mine"]
        PgdlTask: mine, 96 models, in ...
    """
    writer = ZooWriter(path, shard_size=shard_size)
    tasks = {name: _in_layout(name, task) for name, task in zoo.items()}
    failures = [f for name, task in tasks.items() for f in _copy_task(writer, name, task)]
    if failures:
        raise ZooFormatError(f"{len(failures)} parts were not written: " + "; ".join(failures))


def _in_layout(name: str, task: Task) -> PgdlTask:
    if not isinstance(task, PgdlTask):
        raise ArgumentError(
            f"task {name} is a {type(task).__name__}, expected a PgdlTask: the PGDL layout holds "
            "lists of Keras layers only. Copy the task's own files; score_zoo takes it as it is"
        )
    return task


def _copy_task(writer: ZooWriter, name: str, task: PgdlTask) -> Iterator[str]:
    """Copy what can be read; yields what went wrong."""
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        if split == "train" or (task.path / "dataset_1" / split).is_dir():
            try:
                writer.write_dataset(name, split, *task.dataset(split).tensors)
            except ZooFormatError as error:
                yield str(error)
    for id_, model in task.items():
        try:
            entry = task.model_configs.get(id_, {"hparams": {}, "metrics": {}})
            writer._write(name, id_, model.load(), model.load("initial").state_dict(), entry)
        except ZooFormatError as error:
            yield str(error)
