"""The data that a settings file asks for: a data set by name, or a part of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from sharpkit.data.datasets import load_dataset
from sharpkit.errors import ArgumentError


@dataclass(frozen=True)
class DataSource:
    """Where the examples come from.

    Args:
        name: As for `load_dataset`.
        root: The folder that has the files; None for the data set's own place.
        train_size: Training examples, a seeded choice; None for all.
        seed: Of the choice.

    Example:
        >>> train, test = DataSource("embedded", train_size=100).load()
        >>> len(train), len(test)
        (100, 2000)
    """

    name: str
    root: str | None = None
    train_size: int | None = None
    seed: int = 0

    def at(self, place: str) -> DataSource:
        """The same data from another folder, or another data set.

        Args:
            place: A folder with the data set's files, or what `load_dataset` takes.
        """
        if Path(place).is_dir() and not (Path(place) / "train").is_dir():
            return replace(self, root=place)
        return replace(self, name=place, root=None)

    def load(self) -> tuple[TensorDataset, TensorDataset]:
        """Training and test data: inputs (n, c, h, w) float32, labels (n,) int64.

        Raises:
            ArgumentError: No such data set, or `train_size` is out of range.
            DataError: The files are missing or damaged.
        """
        train, test = load_dataset(self.name, root=self.root)
        if self.train_size is None:
            return train, test
        if not 0 < self.train_size <= len(train):
            raise ArgumentError(f"train_size is {self.train_size}, of {len(train)} examples")
        shuffle = torch.Generator().manual_seed(self.seed)
        part = torch.randperm(len(train), generator=shuffle)[: self.train_size].sort().values
        return TensorDataset(*(t[part] for t in train.tensors)), test
