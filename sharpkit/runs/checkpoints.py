"""Models and data from a user's own files, as the command line names them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from sharpkit.data.npz import has_arrays, read_npz
from sharpkit.datasets import ARRAYS, load_dataset
from sharpkit.doors import reading
from sharpkit.errors import DataError
from sharpkit.zoo.checkpoint import load_checkpoint

__all__ = ["load_arrays", "load_checkpoint", "load_data"]


def load_data(name: str) -> tuple[TensorDataset, TensorDataset | None]:
    """Training and test examples of an .npz file or a data set's name; None without test examples.

    Raises:
        DataError: See `load_arrays`, `load_dataset`.
        ArgumentError: There is no such data set.
    """
    path = Path(name)
    if path.suffix != ".npz":
        return load_dataset(name)
    there = has_arrays(path, ("x_test", "y_test"), DataError)
    return load_arrays(path), load_arrays(path, "test") if there else None


def load_arrays(path: str | Path, split: str = "train") -> TensorDataset:
    """The examples of an .npz file with x_train, y_train (and x_test, y_test).

    Images of bytes (uint8) are read, and normalised over the training set, as by `load_dataset`,
    so the model sees what `sharpkit train` has trained on.

    Args:
        path: The file; x of shape (n, ...) in the model's own layout, y of shape (n,). With uint8
            images, it needs both splits.
        split: "train" or "test".

    Raises:
        DataError: If the file is missing, damaged, or lacks the arrays.
    """
    path, names = Path(path), (f"x_{split}", f"y_{split}")
    arrays = read_npz(path, names, DataError)
    if missing := [name for name in names if name not in arrays]:
        raise DataError(
            f"{path}: expected the arrays x_{split} and y_{split} ({missing[0]} is missing)"
        )
    with reading(path, DataError, "arrays of numbers that torch has"):
        x, y = (torch.from_numpy(arrays[name]) for name in names)
    if x.is_complex() or y.is_complex():
        raise DataError(
            f"{path}: x_{split} is {x.dtype}, y_{split} {y.dtype}; expected real numbers"
        )
    if not x.ndim or not y.ndim:
        raise DataError(
            f"{path}: expected x_{split} of shape (n, ...) and y_{split} of (n,), "
            f"found {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype == torch.uint8:
        if not has_arrays(path, ARRAYS, DataError):
            raise DataError(
                f"{path}: x_{split} is uint8. Images of bytes are normalised over the training "
                f"set: give {', '.join(ARRAYS)}; or give x in floats, as the model takes it"
            )
        return load_dataset(path)[split == "test"]
    if len(x) != len(y):
        raise DataError(f"{path}: x_{split} has {len(x)} examples, y_{split} has {len(y)}")
    labels = y if y.is_floating_point() else y.long()
    return TensorDataset(x.float() if x.is_floating_point() else x, labels)
