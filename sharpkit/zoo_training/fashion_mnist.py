"""Fashion-MNIST from its IDX files, shrunk to 14x14 pixels: the data of the embedded zoo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d
from torch.utils.data import TensorDataset

from sharpkit.data.idx import read_idx_split
from sharpkit.errors import ArgumentError


def fashion_mnist(
    folder: str | Path, *, train_size: int = 2000, seed: int = 0
) -> tuple[TensorDataset, TensorDataset]:
    """Fashion-MNIST at 14x14 pixels: a balanced part of the training images, all test images.

    A pixel is the mean of 2x2 original ones, scaled by 255/256 to [0, 1) and then to
    [-0.5, 1.5), which float32 holds exactly.

    Args:
        folder: Has the four IDX files under their usual names, with or without `.gz`.
        train_size: Training images, the same number of each of the 10 classes.
        seed: Of the choice.

    Returns:
        tuple: Training and test data: inputs (n, 1, 14, 14) float32, labels (n,) int64.

    Raises:
        ArgumentError: `train_size` is not a multiple of 10 within the data.
        DataError: A file is missing or damaged.
    """
    images, labels = read_idx_split(Path(folder), "train")
    each, rest = divmod(train_size, 10)
    if rest or not 0 < each <= np.bincount(labels).min():
        raise ArgumentError(f"train_size is {train_size}; expected a multiple of 10 in the data")
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(10)]
    part = np.sort(np.concatenate(chosen))
    return _shrink(images[part], labels[part]), _shrink(*read_idx_split(Path(folder), "t10k"))


def _shrink(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> TensorDataset:
    x = avg_pool2d(torch.from_numpy(images).float().unsqueeze(1), 2)
    return TensorDataset(x / 128 - 0.5, torch.from_numpy(labels.astype(np.int64)))
