"""What model_configs.json has of a model, checked when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sharpkit.doors import shown
from sharpkit.errors import ZooFormatError


class Configs(Protocol):
    """A task in the competition's terms, and where errors say that its entries are."""

    @property
    def model_configs(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def model_configs_path(self) -> Path: ...  # noqa: D102


def hyperparameters_of(task: Configs, id_: str) -> dict[str, Any]:
    """Hyperparameter name to this model's value; ZooFormatError where there is none."""
    hparams = _section(task, id_, "hparams")
    for name, h in hparams.items():
        if not isinstance(h, dict) or "current_value" not in h:
            raise _error(task, id_, f"hyperparameter {shown(name)} has no current_value")
    return {name: h["current_value"] for name, h in hparams.items()}


def metrics_of(task: Configs, id_: str) -> dict[str, float]:
    """What was recorded at the end of training; ZooFormatError if that is no finite number."""
    metrics = _section(task, id_, "metrics")
    for name, value in metrics.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # an int may be beyond every float, which isfinite takes ill
        if not is_number or not abs(value) <= sys.float_info.max:
            raise _error(
                task, id_, f"metric {shown(name)} is {shown(value)}; expected a finite number"
            )
    return {name: float(value) for name, value in metrics.items()}


def gap_of(task: Configs, id_: str) -> float:
    """Training accuracy minus test accuracy; ZooFormatError if one is missing."""
    metrics = metrics_of(task, id_)
    for name in ("train_acc", "test_acc"):
        if name not in metrics:
            raise _error(task, id_, f"metric {name!r} is missing")
    return metrics["train_acc"] - metrics["test_acc"]


def _section(task: Configs, id_: str, key: str) -> dict[str, Any]:
    entry = task.model_configs.get(id_)
    if entry is None:
        raise _error(task, id_, "no such entry")
    section = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(section, dict):
        raise _error(task, id_, f"{key!r} is missing or not an object")
    return section


def _error(task: Configs, id_: str, message: str) -> ZooFormatError:
    return ZooFormatError(f"{task.model_configs_path}: model {id_}: {message}")
