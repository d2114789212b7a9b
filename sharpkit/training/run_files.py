"""A training on disk: written atomically after every epoch, read back only if all of it fits.

checkpoint.pt          weights, optimizer, epoch, history and configuration; tensors only
log.csv                the history, one row per epoch
tracking.csv           what a tracker measured, one row per measurement
config.json            the configuration, for people and for `load_trained`
epoch-K.safetensors    weights after K epochs, for the epochs to be kept
model.safetensors      the final weights
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit.contract.examples import Examples
from sharpkit.digests import described, digest
from sharpkit.doors import reading, shown
from sharpkit.errors import RunError
from sharpkit.files import atomic_path, disk_errors
from sharpkit.run_directory import read_claim, refuse_another
from sharpkit.tensor_files import read_torch
from sharpkit.training.step_tracker import StepTracker

COLUMNS = [
    "epoch", "lr", "loss", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds",
]  # fmt: skip
PERTURBED = "perturbed"  # a further column of SAM, after the loss
_FORMAT = 1
_CHECKPOINT = "checkpoint.pt"
_CONFIG = "config.json"

Row = dict[str, float]


class RunFiles:
    """Where a training keeps its files; without a path, nothing is written.

    The caller locks the directory. `config` is what decides the result: a checkpoint of another one
    is refused. One of several processes `writes`.
    """

    def __init__(
        self, path: Path | None, config: Mapping[str, Any], *, writes: bool = True
    ) -> None:
        self.path = path
        self._config: dict[str, Any] = json.loads(json.dumps(config))
        self._writes = writes and path is not None

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint, if there is one."""
        path = None if self.path is None else self.path / _CHECKPOINT
        return path if path is not None and path.is_file() else None

    def restore(
        self, model: nn.Module, optimizer: Optimizer, track: StepTracker | None = None
    ) -> list[Row]:
        """Bring model, optimizer and tracker to the last checkpoint; the history up to there.

        Raises:
            RunError: If the checkpoint is corrupt, or of another configuration.
        """
        path = self.checkpoint
        if path is None:
            if track is not None:
                track.begin(self.path, None)
            return []
        where = f"{path}: the checkpoint is corrupt; remove it to train from the start"
        content = _read(path, where)
        with reading(where, RunError, "one of sharpkit.fit"):
            if not isinstance(content["config"], dict):
                raise ValueError(f"its config is {shown(content['config'])}")
            refuse_another(content["config"], self._config, path)
            _require_history(content["history"])
            _require_state(content["model"], model.state_dict())
            _require_optimizer(content["optimizer"], optimizer)
            if track is not None:
                if "tracker" not in content:
                    raise RunError(
                        f"{path}: the training was not tracked from its first step. Leave out "
                        "track, or train anew in another directory"
                    )
                track.begin(self.path, content["tracker"])
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
            return [dict(row) for row in content["history"]]

    def begin(self) -> None:
        """Write config.json.

        Raises:
            RunError: If the directory has a config.json of something else.
        """
        if self._writes:
            _check_ours(self._directory / _CONFIG)
            self._write(_CONFIG, json.dumps(self._config, indent=1).encode() + b"\n")

    def require_kept(self, epochs: Iterable[int]) -> None:
        """Raise RunError if the weights of an epoch that is over have not been kept."""
        for epoch in epochs:
            path = self._directory / f"epoch-{epoch}.safetensors"
            if not path.is_file():
                raise RunError(
                    f"{path}: the training is past epoch {epoch}, and its weights were not kept. "
                    "Leave the epoch out, or train anew in another directory"
                )

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        history: list[Row],
        track: StepTracker | None = None,
    ) -> None:
        """Write the checkpoint and the log."""
        if not self._writes:
            return
        content = {
            "format": _FORMAT,
            "config": self._config,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            **({} if track is None else {"tracker": track.state_dict()}),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self._write(_CHECKPOINT, buffer.getvalue())
        self.write_log(history)

    def write_log(self, history: list[Row]) -> None:
        """Write log.csv."""
        if self._writes and history:
            lines = [",".join(history[0])]
            lines += [",".join("" if v != v else repr(v) for v in row.values()) for row in history]
            self._write("log.csv", "\n".join([*lines, ""]).encode())

    def export(self, model: nn.Module, name: str) -> None:
        """Write the weights as `<name>.safetensors`."""
        if self._writes:
            from safetensors.torch import save

            # clones, as the format has no shared tensors
            state = {
                k: t.detach().cpu().contiguous().clone() for k, t in model.state_dict().items()
            }
            self._write(f"{name}.safetensors", save(state))

    @property
    def _directory(self) -> Path:
        assert self.path is not None
        return self.path

    def _write(self, name: str, content: bytes) -> None:
        path = self._directory / name
        with disk_errors(path), atomic_path(path) as temporary:
            temporary.write_bytes(content)


def fingerprint(*tensors: Tensor) -> str:
    """16 hexadecimal digits that identify values, shapes and dtypes."""
    return digest(described(tensors))[:16]


def examples_fingerprint(examples: Examples | None) -> str | None:
    """That of inputs and labels."""
    if examples is None:
        return None
    from torch.utils import _pytree as pytree

    return fingerprint(*pytree.tree_leaves(examples.inputs), examples.labels)


def _read(path: Path, where: str) -> dict[str, Any]:
    """The content of a checkpoint, every byte of it checked."""
    content = read_torch(path, where, RunError)
    wanted = {"format", "config", "model", "optimizer", "history"}
    if not isinstance(content, dict) or not wanted <= set(content):
        raise RunError(f"{path}: not a checkpoint of sharpkit.fit")
    if content["format"] != _FORMAT:
        raise RunError(f"{path}: checkpoint format {shown(content['format'])}, expected {_FORMAT}")
    return content


def _require_history(rows: Any) -> None:
    """One row of numbers per epoch."""
    for number, row in enumerate(rows, start=1):
        if set(row) - {PERTURBED} != set(COLUMNS) or row["epoch"] != number:
            raise ValueError(f"row {number} of its history is {shown(row)}")
        if not all(type(value) in (int, float) for value in row.values()):
            raise ValueError(f"row {number} of its history has something other than numbers")


def _require_state(there: Any, own: Mapping[str, Any]) -> None:
    """The same names, shapes and dtypes as those of the model that is trained."""
    for name in dict.fromkeys([*own, *there]):
        found, expected = there.get(name), own.get(name)
        if isinstance(expected, Tensor) or name not in own:
            kinds = [
                (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None
                for t in (found, expected)
            ]
            if kinds[0] != kinds[1] or kinds[0] is None:
                raise ValueError(f"its {shown(name)} is {kinds[0]}, expected {kinds[1]}")


def _require_optimizer(there: Any, optimizer: Optimizer) -> None:
    """The optimizer's own settings, and for its parameters tensors of their shape."""
    groups = optimizer.state_dict()["param_groups"]
    for found, own in zip(there["param_groups"], groups, strict=True):
        for name in (set(found) & set(own)) - {"lr", "sam_step"}:  # set anew in every step
            if type(found[name]) is not type(own[name]) or found[name] != own[name]:
                raise ValueError(
                    f"its optimizer's {name} is {shown(found[name])}, expected {own[name]}"
                )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in there["state"].items():
        for name, value in state.items():
            shape = parameters[index].shape
            if value is not None and not (isinstance(value, Tensor) and value.shape == shape):
                raise ValueError(f"its optimizer's {shown(name)} of parameter {index} does not fit")


def _check_ours(path: Path) -> None:
    if not path.exists():
        return
    try:
        there = read_claim(path)
    except RunError:
        there = {}
    if "initial weights" not in there:
        raise RunError(f"{path}: is not of sharpkit.fit; choose another directory")
