"""What is wrong with the files of a task in the PGDL layout: configs, weights, shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpkit.doors import reading
from sharpkit.errors import SharpkitError, ZooFormatError
from sharpkit.zoo.pgdl.model import PgdlModel
from sharpkit.zoo.pgdl.task import PgdlTask
from sharpkit.zoo.task import Split, Weights

_SPLITS: tuple[Split, ...] = ("train", "test")
_WEIGHTS: tuple[Weights, ...] = ("final", "initial")
_FORWARD = 16  # examples of the trial run
_MAX_WORK = 2**36  # multiplications of the trial run, some seconds
_MAX_NUMBERS = 2**26  # in the largest input or output of a layer in the trial run


def pgdl_rows(task: PgdlTask, deep: bool) -> Iterator[dict[str, Any]]:
    """The rows of `zoo_info` for a task: its problems, then its models."""
    for problem in _task_problems(task, deep):
        yield {"task": task.name, "problem": problem}
    trial = _trial_inputs(task) if deep else None
    for entry in task.values():
        yield _model_row(entry, trial)


def _told(problems: list[str], check: Callable[..., list[str]], *given: Any) -> None:
    """Add what a check finds or raises."""
    try:
        problems += check(*given)
    except SharpkitError as error:
        problems.append(str(error))


def _task_problems(task: PgdlTask, deep: bool) -> list[str]:
    """What is wrong with the files that the models of a task share."""
    problems: list[str] = []
    _told(problems, _absent_models, task)
    for split in _SPLITS:
        # a zoo may come without test data
        if split == "train" or (task.path / "dataset_1" / split).is_dir():
            _told(problems, _split_problems, task, split, deep)
    return problems


def _absent_models(task: PgdlTask) -> list[str]:
    return [f"model {i} is listed but absent" for i in task.model_configs if i not in task]


def _split_problems(task: PgdlTask, split: Split, deep: bool) -> list[str]:
    """What is wrong with each shard; if nothing is, whether they fit together."""
    problems: list[str] = []
    for shard in task.shards(split):
        _told(problems, _shard_problems, task, shard, deep)
    if deep and not problems:
        task.dataset(split)
    return problems


def _shard_problems(task: PgdlTask, shard: Path, deep: bool) -> list[str]:
    if not deep:
        return [f"{shard}: shard is empty"] if _size(task, shard) == 0 else []
    from sharpkit.zoo.shards.tfrecord import read_shards

    read_shards([task.local(shard)])
    return []


def _size(task: PgdlTask, path: Path) -> int | None:
    """Bytes of a file; None if a server does not tell."""
    if task.mirror is not None:
        return task.mirror.size(path)
    return path.stat().st_size if path.is_file() else 0


def _trial_inputs(task: PgdlTask) -> tuple[Tensor, int]:
    """A few training examples and the highest label; no example if the data cannot be read."""
    try:
        inputs, labels = task.dataset("train").tensors
    except SharpkitError:  # reported with the task
        return torch.empty(0), 0
    return inputs[:_FORWARD], int(labels.max())


def _model_row(entry: PgdlModel, trial: tuple[Tensor, int] | None) -> dict[str, Any]:
    """A model's row; every check runs, whatever the others find."""
    row: dict[str, Any] = {"task": entry.task.name, "model": entry.id}
    problems: list[str] = []
    try:
        metrics = entry.metrics
        row |= {key: metrics.get(key) for key in ("train_acc", "test_acc")}
        row["generalization_gap"] = entry.generalization_gap
        entry.hyperparameters  # noqa: B018  (raises where a value is missing)
    except SharpkitError as error:
        problems.append(str(error))
    try:
        model = entry.build()
        row |= {"layers": len(model.slots), "parameters": model.parameter_count}
        for weights in _WEIGHTS:
            _told(problems, _weight_problems, entry, weights, trial)
    except SharpkitError as error:
        problems.append(str(error))
    return row | {"problem": "; ".join(problems)}


def _weight_problems(
    entry: PgdlModel, weights: Weights, trial: tuple[Tensor, int] | None
) -> list[str]:
    from sharpkit.zoo.keras.weights import check_weights

    if trial is not None:
        return _forward_problems(entry, weights, *trial)
    path = entry.weights_path(weights)
    if entry.task.mirror is None:
        check_weights(entry.build(), path)
    elif _size(entry.task, path) == 0:
        return [f"{path}: weights are empty"]
    return []


def _forward_problems(
    entry: PgdlModel, weights: Weights, inputs: Tensor, highest: int
) -> list[str]:
    """Load the weights and run the trial inputs, or zeros if there are none."""
    model = entry.load(weights)
    where = entry.weights_path(weights)
    examples = min(_FORWARD, _MAX_NUMBERS // model.largest, _MAX_WORK // model.work)
    if examples == 0:
        return [
            f"{where}: not tried, as one example takes {model.work:,} multiplications and "
            f"{model.largest:,} numbers in one layer"
        ]
    inputs = inputs[:examples] if len(inputs) else torch.zeros(1, *model.input_shape)
    if tuple(inputs.shape[1:]) != model.input_shape:
        return [
            f"{where}: takes inputs {model.input_shape}, the data has {tuple(inputs.shape[1:])}"
        ]
    with reading(where, ZooFormatError, "a forward pass"), torch.no_grad():
        outputs = model(inputs)
    problems = []
    if not bool(torch.isfinite(outputs).all()):
        problems.append(f"{where}: outputs are NaN or infinite")
    if outputs.ndim != 2 or highest >= outputs.shape[1]:
        problems.append(f"{where}: outputs {tuple(outputs.shape)} do not fit label {highest}")
    return problems
