"""The rows of `zoo_info` for a task in whichever format, which is asked what any task tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sharpkit.errors import SharpkitError
from sharpkit.workers import error_message
from sharpkit.zoo.task import ModelEntry, Split, Task, Weights

# a few training inputs, and the highest label; -1 where labels are no classes
Trial: TypeAlias = tuple[Tensor, int]

_SPLITS: tuple[Split, ...] = ("train", "test")
_FORWARD = 16  # examples of the trial run


def task_rows(task: Task, deep: bool) -> Iterator[dict[str, Any]]:
    """What is wrong with the task, a row each; then a row per model."""
    there: dict[str, None] = {}
    problems: list[str] = []
    with _told(problems):
        there = dict.fromkeys(task)
        absent = [i for i in task.model_configs if i not in there]
        problems += [f"model {i} is listed but absent" for i in absent]
    trial = _trial(task, problems) if deep else None
    yield from ({"task": task.name, "problem": problem} for problem in problems)
    for id_ in there:
        yield {"task": task.name, "model": id_, **_model_row(task, id_, trial)}


def _trial(task: Task, problems: list[str]) -> Trial:
    """Examples for a forward pass, if they can be read; adds what is wrong with the data."""
    trial = torch.empty(0), -1
    for split in _SPLITS:
        if split == "train" or _has(task.files, split):  # a zoo may come without test data
            with _told(problems):
                inputs, labels = task.dataset(split).tensors
                if split == "train":
                    classes = labels.ndim == 1 and not labels.is_floating_point()
                    trial = inputs[:_FORWARD], int(labels.max()) if classes else -1
    return trial


def _model_row(task: Task, id_: str, trial: Trial | None) -> dict[str, Any]:
    """The other columns of a model's row; every check runs, whatever the others find."""
    row: dict[str, Any] = {}
    problems: list[str] = []
    with _told(problems):
        metrics = task[id_].metrics
        row |= {key: metrics.get(key) for key in ("train_acc", "test_acc")}
        if {"train_acc", "test_acc"} <= set(metrics):
            row["generalization_gap"] = metrics["train_acc"] - metrics["test_acc"]
    with _told(problems):
        entry = task[id_]
        if trial is None and task.mirror is not None:  # not copied, only seen to be there
            problems += [f"{f}: is empty" for f in entry.files() if task.mirror.size(f) == 0]
        else:
            row |= _loaded(entry, "final", trial, problems)
    if trial is not None and _has(task[id_].files, "initial"):
        with _told(problems):
            _loaded(task[id_], "initial", trial, problems)
    return row | {"problem": "; ".join(dict.fromkeys(problems))}


def _loaded(
    entry: ModelEntry, weights: Weights, trial: Trial | None, problems: list[str]
) -> dict[str, int]:
    """Layers and parameters of a model; adds what is wrong with its outputs."""
    model = entry.load(weights)
    if trial is not None and len(trial[0]):
        problems += (f"{weights} weights: {found}" for found in _forward_problems(model, *trial))
    return {
        "layers": sum(bool(list(m.parameters(recurse=False))) for m in model.modules()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _forward_problems(model: nn.Module, inputs: Tensor, highest: int) -> Iterator[str]:
    with torch.no_grad():
        outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        return  # of a kind that measures may know
    if not bool(torch.isfinite(outputs).all()):
        yield "outputs are NaN or infinite"
    if outputs.ndim == 2 and highest >= outputs.shape[1]:
        yield f"outputs {tuple(outputs.shape)} do not fit label {highest}"


def _has(files: Any, part: Split | Weights) -> bool:
    """Whether there are files of a split, or of weights."""
    try:
        return bool(files(part))
    except SharpkitError:
        return False


@contextmanager
def _told(problems: list[str]) -> Iterator[None]:
    """Add what is raised: whatever a model does, the others are looked at."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        problems.append(error_message(error))
