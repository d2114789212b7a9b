"""Data sets by name: training and test examples, or a part of them, as tensors in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from sharpkit.data.downloads import cifar10, cifar100, svhn
from sharpkit.data.idx import FASHION_MNIST, read_idx_split
from sharpkit.data.images import Split, channels_first, normalised, read_image_tree
from sharpkit.data.npz import read_npz
from sharpkit.doors import reading, shown
from sharpkit.errors import ArgumentError, DataError
from sharpkit.zoo import embedded_zoo, load_zoo

_NAMES = (
    "embedded, fashion-mnist, cifar10, cifar100, svhn, an .npz file, a folder or .zip of images, "
    "or ZOO:TASK"
)

_MAX_CLASSES = 2**20  # a network has an output for every one

ARRAYS = ("x_train", "y_train", "x_test", "y_test")  # of an .npz file

Pair = tuple[TensorDataset, TensorDataset]


def load_dataset(name: str | Path, *, root: str | Path | None = None) -> Pair:
    """Training and test examples by the name of a data set, or from your own files.

    - "embedded": 2,000 + 2,000 images of Fashion-MNIST at 14x14 pixels, from the embedded zoo.
    - "fashion-mnist": 60,000 + 10,000 images of 28x28, from the IDX files in `root` (default: where
      Debian's package `dataset-fashion-mnist` puts them).
    - "cifar10", "cifar100" (fine labels), "svhn" (without its extra images): from `root`, or
      downloaded once, with size and checksum verified, into the user's cache.
    - a path to an .npz file with x_train, y_train, x_test, y_test.
    - a folder or .zip file of images `train/<class>/*.jpg` (or .png) and `test/<class>/*.jpg`.
    - "ZOO:TASK": the data of a task of a zoo in the PGDL layout, such as
      "public_data:task1_v4"; or "embedded:TASK".

    Images of bytes are normalised: mean 0 and variance 1 per channel over the training set,
    computed in float64, and the test set by the same numbers. In an .npz file, uint8 arrays are
    such images, of shape (n, h, w), (n, h, w, c) or (n, c, h, w), where c is 1, 3 or 4; arrays of
    floats are taken as they are, in the model's own layout. PGDL data are as stored. What a
    compressed file expands to, pixels of images included, may be 64 MiB and 100 times its size.

    Args:
        name: One of the above.
        root: Folder with the files of "fashion-mnist", "cifar10", "cifar100" or "svhn": CIFAR as
            `cifar-10-binary.tar.gz` or its .bin files, SVHN as `train_32x32.mat`, `test_32x32.mat`.

    Returns:
        tuple: Training and test data: inputs float32, (n, c, h, w) for images; labels int64 (n,).

    Raises:
        ArgumentError: An unknown name, or a root for data that need none.
        DataError: A file is missing, damaged or of another form; names it.
        DownloadError: The server cannot be reached, or has another file.
        ZooFormatError: The zoo cannot be read.

    Example:
        >>> train, test = load_dataset("embedded")
        >>> train.tensors[0].shape, test.tensors[1].shape
        (torch.Size([2000, 1, 14, 14]), torch.Size([2000]))
    """
    text, folder = str(name), None if root is None else _place(root)
    if text in _IMAGES:
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        return _checked(text, normalised(*_IMAGES[text](folder)))
    if folder is not None:
        raise ArgumentError(f"root is for {', '.join(_IMAGES)}; {text!r} has none")
    if text == "embedded":
        return _task("embedded", "fashion_mnist_14x14")
    path = _place(text)
    if path.suffix == ".npz":
        return _checked(text, _arrays(path))
    if (text and path.is_dir()) or path.suffix == ".zip":
        return _checked(text, normalised(*read_image_tree(path)))
    zoo, _, task = text.rpartition(":")
    if zoo and (zoo == "embedded" or _place(zoo).exists()):
        return _task(zoo, task)
    raise ArgumentError(f"unknown data set {text!r}, and no such file; expected {_NAMES}")


@dataclass(frozen=True)
class DataSource:
    """Where the examples come from.

    Example:
        >>> train, test = DataSource("embedded", train_size=100).load()
        >>> len(train), len(test)
        (100, 2000)
    """

    name: str  # as for `load_dataset`
    root: str | None = None  # the folder that has the files; None for the data set's own place
    train_size: int | None = None  # training examples, a seeded choice; None for all
    seed: int = 0  # of the choice

    def at(self, place: str) -> DataSource:
        """The same data from another folder, or another data set."""
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


def _place(text: str | Path) -> Path:
    """The path that a user's text means, there or not."""
    with reading(shown(str(text)), ArgumentError, "the name of a data set, or a path"):
        path = Path(text).expanduser()
        path.exists()  # raises for what can be no path here
    return path


def _fashion_mnist(root: Path | None) -> tuple[Split, Split]:
    folder = root or FASHION_MNIST
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. On Debian and Ubuntu: apt-get install "
            "dataset-fashion-mnist; or give root= a folder with the four IDX files"
        )
    splits = [read_idx_split(folder, split) for split in ("train", "t10k")]
    (train, test) = ((images[:, None], labels.astype(np.int64)) for images, labels in splits)
    return train, test


_IMAGES: dict[str, Callable[[Path | None], tuple[Split, Split]]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
}


def _task(zoo: str, task: str) -> Pair:
    """As stored in a zoo."""
    opened = embedded_zoo() if zoo == "embedded" else load_zoo(zoo)
    if task not in opened:
        raise ArgumentError(f"no task {task!r} in {zoo}: it has {', '.join(opened)}")
    return opened[task].dataset("train"), opened[task].dataset("test")


def _arrays(path: Path) -> Pair:
    """The four arrays of an .npz file."""
    arrays = read_npz(path, ARRAYS, DataError)
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise DataError(f"{path}: {missing[0]} is missing; expected {', '.join(ARRAYS)}")
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if not x.ndim:
            raise DataError(f"{path}: x_{split} is a single number, expected shape (n, ...)")
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise DataError(
                f"{path}: y_{split} is {y.dtype} of shape {y.shape}; expected integers of shape "
                f"({len(x)},), one label for each row of x_{split}"
            )
    train, test = arrays["x_train"], arrays["x_test"]
    if train.dtype != test.dtype or train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{path}: x_train is {train.dtype} {train.shape}, x_test {test.dtype} {test.shape}; "
            "expected the same kind and shape of example"
        )
    labels = [_whole(path, name, arrays[name]) for name in ("y_train", "y_test")]
    if train.dtype == np.uint8:
        in_order = channels_first(path, train.shape)
        return normalised((in_order(train), labels[0]), (in_order(test), labels[1]))
    if not np.issubdtype(train.dtype, np.floating):
        raise DataError(f"{path}: x_train is {train.dtype}; expected uint8 images or floats")
    (first, second) = (
        TensorDataset(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y))
        for x, y in zip((train, test), labels, strict=True)
    )
    return first, second


def _whole(path: Path, name: str, labels: np.ndarray) -> np.ndarray:
    """Labels as int64, if it holds them."""
    if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: {name} has the label {labels.max()}, more than an int64 holds")
    return labels.astype(np.int64)


def _checked(name: str, data: Pair) -> Pair:
    """The data, if there are some, all finite, with the training classes only."""
    for split, part in zip(("training", "test"), data, strict=True):
        inputs, labels = part.tensors
        if not len(labels):
            raise DataError(f"{name}: there are no {split} examples")
        if not inputs.numel():
            raise DataError(f"{name}: {split} inputs of shape {tuple(inputs.shape)} have no values")
        if int(labels.min()) < 0:
            raise DataError(f"{name}: {split} label {int(labels.min())} is negative")
        if int(labels.max()) >= _MAX_CLASSES:
            raise DataError(
                f"{name}: {split} label {int(labels.max())}; classes are numbered from 0, and "
                f"there may be {_MAX_CLASSES:,}"
            )
        if not bool(torch.isfinite(inputs).all()):
            raise DataError(f"{name}: the {split} inputs have NaN or infinite entries")
    return data
