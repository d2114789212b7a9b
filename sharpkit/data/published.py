"""Images of known data sets as published, not normalised: which files hold them; reading them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpkit.data.downloads import cifar10, cifar100, svhn
from sharpkit.data.idx import FASHION_MNIST, read_idx_split
from sharpkit.data.images import channels_first, read_image_tree
from sharpkit.data.npz import read_npz
from sharpkit.errors import DataError
from sharpkit.files import cache_folder

Images = tuple[NDArray[Any], NDArray[Any]]  # (n, c, h, w), and labels (n,), integers
Pair = tuple[Images, Images]  # training and test
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
EXPECTED = (
    "the four IDX files of MNIST or Fashion-MNIST, CIFAR-10 or CIFAR-100 in binary form, "
    "train_32x32.mat and test_32x32.mat of SVHN, one .npz file with x_train, y_train, x_test and "
    "y_test, or train/<class>/*.png and test/<class>/*.png"
)


@dataclass(frozen=True)
class Published:
    """The files of one data set, training and test, and how they are read.

    `read` returns (images, labels) of training and of test: images (n, channels, height, width),
    uint8 as published, or float32 of an .npz file whose images are prepared already; labels (n,).
    """

    files: tuple[Path, ...]
    read: Callable[[], Pair]


def images_in(folder: Path) -> Published | None:
    """The data set whose files lie in a folder; None if there are none of a known form.

    Example:
        >>> images_in(Path("/nowhere")) is None
        True
    """
    for find in (_npz, _idx, _cifar10, _cifar100, _svhn, _tree):
        if found := find(folder):
            return found
    return None


def known_place(name: str) -> Published | None:
    """A data set where Debian's package or `load_dataset` has put it; nothing is downloaded.

    Args:
        name: "fashion_mnist", "cifar10", "cifar100" or "svhn"; of others no place is known.
    """
    if name == "fashion_mnist":
        return _idx(FASHION_MNIST)
    finders = {"cifar10": _cifar10, "cifar100": _cifar100, "svhn": _svhn}
    return finders[name](cache_folder() / "datasets") if name in finders else None


def _all(folder: Path, names: list[str]) -> tuple[Path, ...] | None:
    files = tuple(folder / name for name in names)
    return files if all(file.is_file() for file in files) else None


def _idx(folder: Path) -> Published | None:
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    stems = [folder / f"{split}-{kind}" for split in ("train", "t10k") for kind in kinds]
    both = [(stem.with_name(f"{stem.name}.gz"), stem) for stem in stems]
    present = tuple(next(filter(Path.is_file, pair), pair[1]) for pair in both)
    if not all(map(Path.is_file, present)):
        return None
    return Published(present, partial(_read_idx, folder))


def _read_idx(folder: Path) -> Pair:
    (train, y_train), (test, y_test) = (read_idx_split(folder, s) for s in ("train", "t10k"))
    return (train[:, None], y_train.astype(np.int64)), (test[:, None], y_test.astype(np.int64))


def _cifar10(folder: Path) -> Published | None:
    batches = [f"data_batch_{k}.bin" for k in range(1, 6)]
    return _cifar(folder, "cifar-10-binary.tar.gz", [*batches, "test_batch.bin"], cifar10)


def _cifar100(folder: Path) -> Published | None:
    return _cifar(folder, "cifar-100-binary.tar.gz", ["train.bin", "test.bin"], cifar100)


def _cifar(
    folder: Path, archive: str, names: list[str], read: Callable[[Path], Pair]
) -> Published | None:
    folders = [folder, *sorted(p for p in folder.glob("cifar-*-batches-bin") if p.is_dir())]
    found = next(filter(None, (_all(f, names) for f in folders)), None)
    found = found or _all(folder, [archive])
    return Published(found, partial(read, folder)) if found else None


def _svhn(folder: Path) -> Published | None:
    files = _all(folder, ["train_32x32.mat", "test_32x32.mat"])
    return Published(files, partial(svhn, folder)) if files else None


def _tree(folder: Path) -> Published | None:
    if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        return None
    found = (p for split in ("train", "test") for p in (folder / split).rglob("*") if p.is_file())
    return Published(tuple(sorted(found)), partial(read_image_tree, folder))


def _npz(folder: Path) -> Published | None:
    found = sorted(folder.glob("*.npz"))
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{folder}: has {len(found)} .npz files; expected one")
    return Published((found[0],), partial(_arrays, found[0]))


def _arrays(path: Path) -> Pair:
    arrays = read_npz(path, _ARRAYS, DataError)
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise DataError(f"{path}: {missing[0]} is missing; expected {', '.join(_ARRAYS)}")
    splits = [_split(path, arrays[f"x_{s}"], arrays[f"y_{s}"], s) for s in ("train", "test")]
    if splits[0][0].dtype != splits[1][0].dtype or splits[0][0].shape[1:] != splits[1][0].shape[1:]:
        raise DataError(
            f"{path}: x_train is {arrays['x_train'].dtype} {arrays['x_train'].shape}, x_test "
            f"{arrays['x_test'].dtype} {arrays['x_test'].shape}; expected the same kind and size"
        )
    return splits[0], splits[1]


def _split(path: Path, x: NDArray[Any], y: NDArray[Any], split: str) -> Images:
    """Images (n, c, h, w), float32 or uint8, and their labels."""
    fits = x.ndim > 0 and y.shape == x.shape[:1] and np.issubdtype(y.dtype, np.integer)
    if not fits or not len(y):
        raise DataError(
            f"{path}: y_{split} is {y.dtype} of shape {y.shape}, x_{split} has shape {x.shape}; "
            "expected an integer label for each image, and at least one"
        )
    if x.dtype == np.uint8:
        x = channels_first(path, x.shape)(x)
    elif not (np.issubdtype(x.dtype, np.floating) and x.ndim == 4):
        raise DataError(
            f"{path}: x_{split} is {x.dtype} of shape {x.shape}; expected images of uint8, or of "
            "floats, prepared, of shape (n, channels, height, width)"
        )
    else:
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise DataError(f"{path}: x_{split} has NaN or infinite entries")
    if (lowest := int(y.min())) < 0 or int(y.max()) >= 2**20:
        raise DataError(
            f"{path}: y_{split} has labels from {lowest} to {int(y.max())}; expected classes from 0"
        )
    return x, y.astype(np.int64)
