"""Writing a zoo in the PGDL layout: what is written reads back bit for bit, also in Keras 2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch import Tensor

from sharpkit.errors import ArgumentError, DataError, ZooFormatError
from sharpkit.zoo.files import read_json, write_json
from sharpkit.zoo.keras import KerasModel
from sharpkit.zoo.keras.weights import weights_to_write, write_weights
from sharpkit.zoo.pgdl import WEIGHT_FILES, PgdlTask
from sharpkit.zoo.shards.tfrecord import write_shard
from sharpkit.zoo.stacked import StackedTask
from sharpkit.zoo.stacked.file import Network
from sharpkit.zoo.stacked.task import FOLDER
from sharpkit.zoo.stacked.writer import StackWriter
from sharpkit.zoo.task import Task, Weights

Layout: TypeAlias = Literal["pgdl", "stacked"]


class ZooWriter:
    """Writes models and data of one zoo, each file in one step; may be stopped and continued.

    In the PGDL layout, a model counts from the moment when its entry is in model_configs.json,
    which is written after its files. In stacks, each model is whole in the file that has it. A
    writer on an existing directory adds to it and replaces models of the same id.

    Args:
        path: The zoo's root; gets `input_data` and, in the PGDL layout, `reference_data`.
        shard_size: Examples per shard.
        layout: "pgdl" for a directory per model, as the competition has it; "stacked" for files of
            many models of one shape, which thousands of models need. `finish` is called at the end.

    Raises:
        ArgumentError: `shard_size` is below 1, or another layout.

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

    def __init__(
        self, path: str | Path, *, shard_size: int = 1000, layout: Layout = "pgdl"
    ) -> None:
        if shard_size < 1:
            raise ArgumentError(f"shard_size is {shard_size}; expected at least 1")
        check_layout(layout)
        self.path, self.shard_size, self.layout = Path(path), shard_size, layout
        self._at_once = True  # whether a model is on the disk when `write_model` returns
        self._configs: dict[str, dict[str, Any]] = {}
        self._stacks: dict[str, StackWriter] = {}

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

    def entries(self, task: str) -> dict[str, Any]:
        """Id -> {"hparams", "metrics"} of the models of a task that are written."""
        if self.layout == "stacked":
            return self._stack_writer(task).entries()
        if task not in self._configs:
            path = self._configs_path(task)
            self._configs[task] = read_json(path) if path.exists() else {}
        return self._configs[task]

    def finish(self) -> None:
        """Bring models in stacks together that are still in files of their own.

        A zoo that is not finished is as whole; it has more files.
        """
        for writer in self._stacks.values():
            writer.finish()
        if not self._at_once:
            for task in self._configs:
                self._write_configs(task)

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
        if self.layout == "stacked":
            states: dict[Weights, Mapping[str, Tensor]] = {
                "final": model.state_dict(),
                "initial": initial,
            }
            weights = {kind: weights_to_write(model, state) for kind, state in states.items()}
            self._stack_writer(task).add(Network(id_, model.config, entry, weights))
            return
        write_json(folder / "config.json", model.config)
        write_weights(model, folder / WEIGHT_FILES["final"])
        write_weights(model, folder / WEIGHT_FILES["initial"], state=initial)
        self.entries(task)[id_] = entry
        if self._at_once:
            self._write_configs(task)

    def _write_configs(self, task: str) -> None:
        ordered = sorted(self.entries(task).items(), key=lambda item: int(item[0]))
        write_json(self._configs_path(task), dict(ordered))

    def _configs_path(self, task: str) -> Path:
        return self.path / "reference_data" / task / "model_configs.json"

    def _stack_writer(self, task: str) -> StackWriter:
        if task not in self._stacks:
            folder = self._task_path(task) / FOLDER
            self._stacks[task] = StackWriter(folder, at_once=self._at_once)
        return self._stacks[task]

    def _task_path(self, task: str) -> Path:
        if not task or Path(task).name != task or task.startswith("."):
            raise ArgumentError(f"task name {task!r} cannot be a directory name")
        return self.path / "input_data" / task


def check_layout(layout: Any) -> None:
    """ArgumentError unless zoos are written so."""
    if layout not in get_args(Layout):
        raise ArgumentError(f"layout is {layout!r}; expected 'pgdl' or 'stacked'")


def write_zoo(
    zoo: Mapping[str, Task],
    path: str | Path,
    *,
    shard_size: int = 1000,
    layout: Layout = "pgdl",
) -> None:
    """Write tasks in the PGDL layout or in stacks: a copy of a zoo, or of some of its tasks.

    Either layout is turned into the other without a change of a bit.

    Args:
        zoo: Task name to task, such as a `Zoo`; each a `PgdlTask` or `StackedTask`, whose networks
            are lists of Keras layers.
        path: The new zoo's root.
        shard_size: Examples per shard.
        layout: As for `ZooWriter`.

    Raises:
        ArgumentError: A task is in another format, or would be written where it is, or there is no
            such layout; nothing has been written.
        ZooFormatError: Some models or data cannot be read; everything else has been written.

    Example:
        >>> import tempfile
        >>> from sharpkit.zoo import embedded_zoo, load_zoo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_zoo({"mine": embedded_zoo()["fashion_mnist_14x14"]}, folder, layout="stacked")
        ...     load_zoo(folder)["mine"]
        StackedTask: mine, 96 models, in ...
    """
    writer = ZooWriter(path, shard_size=shard_size, layout=layout)
    writer._at_once = False
    tasks = {name: _in_layout(name, task, writer) for name, task in zoo.items()}
    try:
        failures = [f for name, task in tasks.items() for f in _copy_task(writer, name, task)]
    finally:
        writer.finish()
    if failures:
        raise ZooFormatError(f"{len(failures)} parts were not written: " + "; ".join(failures))


def _in_layout(name: str, task: Task, writer: ZooWriter) -> PgdlTask | StackedTask:
    if not isinstance(task, PgdlTask | StackedTask):
        raise ArgumentError(
            f"task {name} is a {type(task).__name__}, expected a PgdlTask or StackedTask: these "
            "hold lists of Keras layers. Copy the task's own files; score_zoo takes it as it is"
        )
    if task.mirror is None and task.path.resolve() == writer._task_path(name).resolve():
        raise ArgumentError(f"{task.path}: a task cannot be written where it is; take another root")
    return task


def _copy_task(writer: ZooWriter, name: str, task: PgdlTask | StackedTask) -> Iterator[str]:
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
