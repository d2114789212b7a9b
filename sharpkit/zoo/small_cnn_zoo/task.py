"""Tasks of the Small CNN Zoo: a folder with weights.npy, metrics.csv.gz and layout.csv.

Source: Unterthiner et al. 2020, arXiv:2002.11448; data under CC-BY 4.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from sharpkit.data.published import Images, Pair
from sharpkit.safe_text import printable
from sharpkit.zoo.checkpoint_task import CheckpointTask
from sharpkit.zoo.files import is_file, is_folder, list_directory
from sharpkit.zoo.remote import Mirror
from sharpkit.zoo.small_cnn_zoo.files import (
    LAYOUT,
    METRICS,
    RECORDED,
    WEIGHTS,
    Layer,
    open_weights,
    read_layout,
    read_metrics,
)
from sharpkit.zoo.small_cnn_zoo.network import build_network
from sharpkit.zoo.task import Split

if TYPE_CHECKING:
    import pandas as pd

EXPECTED = f"{WEIGHTS} beside {METRICS} and {LAYOUT} (the Small CNN Zoo)"
_STRIDES = {"stride 2": 2, "stride 1": 1}  # 2 is the training program's default
_DATA_SETS = {"svhn_cropped": "svhn"}  # where the zoo has another name
_ARCHIVES = [f"{name}.tar.xz" for name in ("mnist", "fashion_mnist", "cifar10", "svhn_cropped")]
# other processes read these themselves
_READ_ANEW = ("_table", "_rows", "_layers", "_weights", "_settings", "_numbers")


class SmallCnns:
    """The files of one task, a `Source`: a network is the checkpoints of one `modeldir`.

    Networks are numbered in the order of metrics.csv.gz. `step` counts epochs.

    Args:
        name: The task's name.
        path: Its folder.
    """

    ways: Sequence[str] = tuple(_STRIDES)

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _READ_ANEW}

    @cached_property
    def _table(self) -> pd.DataFrame:
        return read_metrics(self.path / METRICS)

    @cached_property
    def _rows(self) -> dict[str, dict[int, int]]:
        """Network -> epoch -> row."""
        import pandas as pd

        codes, _ = pd.factorize(self._table["modeldir"])
        found: dict[int, dict[int, int]] = {}
        steps = self._table["step"].to_numpy(dtype=np.float64)
        for row, (code, step) in enumerate(zip(codes.tolist(), steps.tolist(), strict=True)):
            if code >= 0 and step >= 0 and step == math.floor(step):
                found.setdefault(code, {})[int(step)] = row
        return {str(code): dict(sorted(rows.items())) for code, rows in sorted(found.items())}

    @cached_property
    def _layers(self) -> list[Layer]:
        return read_layout(self.path / LAYOUT)

    @cached_property
    def _weights(self) -> NDArray[Any]:
        columns = max(v.end for layer in self._layers for v in (layer.kernel, layer.bias))
        return open_weights(self.path / WEIGHTS, len(self._table), columns)

    @cached_property
    def _settings(self) -> dict[str, list[Any]]:
        """Hyperparameter -> the value of each row, as Python's numbers and text."""
        names = [str(c) for c in self._table if str(c).startswith("config.")]
        return {name: self._table[name].tolist() for name in names}

    @property
    def data_set(self) -> str:
        """The data set that metrics.csv.gz names."""
        names = self._table.get("config.dataset")
        name = self.name if names is None else str(names.iloc[0])
        return _DATA_SETS.get(name, name)

    def networks(self) -> Sequence[str]:
        """Numbers from "0"."""
        return list(self._rows)

    def epochs(self, network: str) -> Sequence[int]:
        """The steps of its rows."""
        return list(self._rows[network])

    def hyperparameters(self, network: str) -> dict[str, Any]:
        """The config.* columns, without config.dataset."""
        row = next(iter(self._rows[network].values()))
        found = {name: values[row] for name, values in self._settings.items()}
        found.pop("config.dataset", None)
        for name, value in found.items():
            if isinstance(value, float) and math.isnan(value):
                found[name] = None  # an empty cell, which is one value
        return found

    def metrics(self, network: str, epoch: int) -> dict[str, float]:
        """train_acc, test_acc, train_loss, test_loss, as far as they are finite, and epoch."""
        row = self._rows[network][epoch]
        found = {name: self._numbers[column][row] for column, name in RECORDED.items()}
        return {n: v for n, v in found.items() if math.isfinite(v)} | {"epoch": float(epoch)}

    @cached_property
    def _numbers(self) -> dict[str, list[float]]:
        return {column: self._table[column].astype(float).tolist() for column in RECORDED}

    def load(self, network: str, epoch: int, way: str) -> nn.Module:
        """The network with the weights of a row."""
        row = self._rows[network][epoch]
        where = f"{self.path / WEIGHTS}, row {row} (network {network}, epoch {epoch})"
        activation = str(self._settings["config.activation"][row])
        return build_network(where, self._layers, self._weights[row], activation, _STRIDES[way])

    def checkpoint_files(self, network: str, epoch: int) -> list[Path]:
        """The three files, which all networks have in common."""
        return [self.path / name for name in (LAYOUT, METRICS, WEIGHTS)]

    def examples(self, images: Pair, split: Split, way: str) -> TensorDataset:
        """Grey images from −1 to 1: x = 2 pixel / 255 − 1, the mean over colours."""
        return _grey(images[0] if split == "train" else images[1])

    def remarks(self) -> list[str]:
        """Networks that saw a part of the images, or ended early."""
        found = []
        self._weights  # noqa: B018  (raises here what would else fail with every network)
        rows = [*self._rows.values()]
        fractions = self._settings.get("config.train_fraction")
        if fractions is not None:
            part = sum(fractions[next(iter(row.values()))] < 1 for row in rows)
            if part:
                found.append(
                    f"{part:,} of {len(rows):,} networks were trained on a part of the training "
                    "images (config.train_fraction), and which is not recorded: measures take all"
                )
        last = [max(epochs) for epochs in self._rows.values()]
        end = max(last, default=0)
        if short := sum(epoch < end for epoch in last):
            found.append(
                f"{short:,} of {len(last):,} networks end before epoch {end}: each is taken "
                "at its last checkpoint"
            )
        return found


def _grey(split: Images) -> TensorDataset:
    images, labels = split
    if images.dtype == np.uint8:
        inputs = images.mean(axis=1, keepdims=True, dtype=np.float32)
        inputs *= np.float32(2 / 255)
        inputs -= np.float32(1)
    else:  # prepared by the user
        inputs = images.astype(np.float32)
    return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64)))


def small_cnn_tasks(
    path: Path, mirror: Mirror | None
) -> tuple[list[CheckpointTask], dict[str, str]]:
    """The tasks at a folder or in the folders below it, without opening a file; see `Finder`."""
    if _names(path, mirror) >= {WEIGHTS, METRICS}:
        folders = [path]
    else:
        children = list_directory(path)
        folders = [f for f in children if is_folder(f) and _names(f, mirror) >= {WEIGHTS, METRICS}]
    refused = {}
    if not folders:
        for name in sorted(_names(path, mirror).intersection(_ARCHIVES)):
            refused[name] = f"{path / name}: unpack it (tar xJf {name}), then open the folder"
    elif mirror is not None:
        return [], {
            printable(
                f.name
            ): f"{mirror.location(f)}: the Small CNN Zoo must be on this machine, as "
            f"{WEIGHTS} is read in place: copy it here"
            for f in folders
        }
    return [CheckpointTask(SmallCnns(f.resolve().name, f)) for f in folders], refused


def _names(folder: Path, mirror: Mirror | None) -> set[str]:
    """The names of the files in a folder that tell this format."""
    if mirror is not None:
        return {child.name for child in mirror.children(folder)}
    return {name for name in (WEIGHTS, METRICS, *_ARCHIVES) if is_file(folder / name)}
