"""The folder of one network: params.json, result.json and checkpoint_<epoch>/checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sharpkit.doors import MAX_JSON_BYTES, parse_json, reading, shown
from sharpkit.errors import ZooFormatError
from sharpkit.files import read_regular
from sharpkit.tensor_files import read_torch
from sharpkit.zoo.files import is_file, list_directory, read_json

PARAMS, RESULT, CHECKPOINTS = "params.json", "result.json", "checkpoints"
_CHECKPOINT = re.compile(r"checkpoint_([0-9]{1,9})")
_EPOCH = re.compile(rb'"training_iteration"\s*:\s*([0-9]{1,9})\b')
_NOT_MEASURED = -999  # what the training program wrote before the first epoch
_OF_RAY = re.compile(
    "time.*|pid|done|iterations_since_restore|training_iteration|warmup_time|.*_total|"
    "episodes_.*|agent_timesteps.*|num_.*"
)


class Trial:
    """What is in the folder of one network; files are read when asked for.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @cached_property
    def params(self) -> dict[str, Any]:
        """The settings in params.json, "model::type" and so on."""
        content = read_json(self.path / PARAMS)
        if not isinstance(content, dict):
            raise ZooFormatError(f"{self.path / PARAMS}: expected a JSON object")
        return content

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """Epoch -> the file of weights, in increasing order.

        Raises:
            ZooFormatError: There is none.
        """
        found = {
            int(match[1]): entry / CHECKPOINTS
            for entry in list_directory(self.path)
            if (match := _CHECKPOINT.fullmatch(entry.name)) and is_file(entry / CHECKPOINTS)
        }
        if not found:
            raise ZooFormatError(
                f"{self.path}: no checkpoint; expected checkpoint_<epoch>/{CHECKPOINTS}"
            )
        return dict(sorted(found.items()))

    def metrics(self, epoch: int) -> dict[str, float]:
        """What result.json has of an epoch: finite numbers, without Ray's own book-keeping.

        Of several lines of an epoch, as a training has that was continued, the last one counts.

        Raises:
            ZooFormatError: The file is missing, or has no line of the epoch.
        """
        path = self.path / RESULT
        with reading(path, ZooFormatError, "a JSON object for each epoch"):
            for line in reversed(read_regular(path, MAX_JSON_BYTES).splitlines()):
                if epoch not in map(int, _EPOCH.findall(line)):
                    continue
                content = parse_json(f"{path}, epoch {epoch}", line, ZooFormatError)
                if isinstance(content, dict) and content.get("training_iteration") == epoch:
                    return _numbers(content)
        raise ZooFormatError(f"{path}: has no line with training_iteration {epoch}")

    def state(self, epoch: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint by their names, without the prefix that data-parallel adds.

        Raises:
            ZooFormatError: Missing, damaged, with classes in it, or NaN or infinite weights.
        """
        if epoch not in self.checkpoints:
            raise ZooFormatError(f"{self.path}: no checkpoint of epoch {epoch}")
        path = self.checkpoints[epoch]
        content = read_torch(path, str(path), ZooFormatError)
        if not isinstance(content, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise ZooFormatError(f"{path}: expected tensors by name, a state dict")
        state = {name.removeprefix("module."): value for name, value in content.items()}
        for name, value in state.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ZooFormatError(f"{path}: {shown(name)} has NaN or infinite entries")
        return {n: v.float() if v.is_floating_point() else v for n, v in state.items()}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in line.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or _OF_RAY.fullmatch(name):
            continue
        if math.isfinite(value) and value != _NOT_MEASURED:
            found[name] = float(value)
    return found
