"""A training on disk: written atomically after every epoch, read back only if all of it fits.

checkpoint.pt          weights, optimizer, epoch, history and configuration; tensors only
log.csv                the history, one row per epoch
config.json            the configuration, for people and for `load_trained`
epoch-K.safetensors    weights after K epochs, for the epochs to be kept
model.safetensors      the final weights
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit.contract.examples import Examples, add_to_digest
from sharpkit.errors import RunError
from sharpkit.files import atomic_path, disk_errors
from sharpkit.settings import changes

_FORMAT = 1
_CHECKPOINT = "checkpoint.pt"
_CONFIG = "config.json"

Row = dict[str, float]


class RunDirectory:
    """Where a training keeps its files; without a path, nothing is written.

    Args:
        path: The directory, locked by the caller; None for no files.
        config: What decides the result. A checkpoint of another one is refused.
        writes: Whether this process writes (one of several does).
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

    def restore(self, model: nn.Module, optimizer: Optimizer) -> list[Row]:
        """Bring model and optimizer to the last checkpoint; the history up to there.

        Raises:
            RunError: If the checkpoint is corrupt, or of another configuration.
        """
        path = self.checkpoint
        if path is None:
            return []
        content = _read(path)
        _compare(path, content["config"], self._config)
        try:
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
            return [dict(row) for row in content["history"]]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _corrupt(path, error) from error

    def begin(self) -> None:
        """Remove what a killed process left half written, and write config.json.

        Raises:
            RunError: If the directory has a config.json of something else.
        """
        if self._writes:
            _check_ours(self._directory / _CONFIG)
            for litter in self._directory.glob(".*.tmp"):
                litter.unlink(missing_ok=True)
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

    def save(self, model: nn.Module, optimizer: Optimizer, history: list[Row]) -> None:
        """Write the checkpoint and the log."""
        if not self._writes:
            return
        content = {
            "format": _FORMAT,
            "config": self._config,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
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
    digest = hashlib.sha256()
    for tensor in tensors:
        add_to_digest(digest, tensor)
    return digest.hexdigest()[:16]


def examples_fingerprint(examples: Examples | None) -> str | None:
    """That of inputs and labels."""
    if examples is None:
        return None
    from torch.utils import _pytree as pytree

    return fingerprint(*pytree.tree_leaves(examples.inputs), examples.labels)


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, every byte of it checked."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch and its zip and pickle layers
        raise _corrupt(path, error) from error
    wanted = {"format", "config", "model", "optimizer", "history"}
    if not isinstance(content, dict) or not wanted <= set(content):
        raise RunError(f"{path}: not a checkpoint of sharpkit.fit")
    if content["format"] != _FORMAT:
        raise RunError(f"{path}: checkpoint format {content['format']}, expected {_FORMAT}")
    return content


def _corrupt(path: Path, error: Exception) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(
        f"{path}: the checkpoint is corrupt ({reason}). Remove it to train from the start"
    )


def _compare(path: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := changes(there, now):
        raise RunError(
            f"{path}: belongs to a training with another configuration ({changed}). "
            "Give it the same one, or another directory"
        )


def _check_ours(path: Path) -> None:
    try:
        there = json.loads(path.read_bytes()) if path.exists() else {"initial weights": ""}
    except (OSError, ValueError):
        there = None
    if not isinstance(there, dict) or "initial weights" not in there:
        raise RunError(f"{path}: is not of sharpkit.fit; choose another directory")
