"""Images of bytes as normalised tensors, and images in files of one folder per class."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from sharpkit.errors import DataError

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, c, h, w), labels (n,)
_SUFFIXES = (".jpg", ".jpeg", ".png")


def normalised(train: Split, test: Split) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images with mean 0 and variance 1 per channel over the training set.

    Mean and standard deviation come from counts of the 256 values, in float64, so they are exact;
    the test images are shifted and scaled by the same numbers. A constant channel becomes 0.

    Args:
        train: Images (n, c, h, w) uint8 and labels (n,).
        test: The same.

    Returns:
        tuple: Inputs (n, c, h, w) float32, labels (n,) int64.

    Example:
        >>> pair = np.array([[[[0]]], [[[255]]]], np.uint8), np.array([0, 1])
        >>> normalised(pair, pair)[0].tensors[0].flatten().tolist()
        [-1.0, 1.0]
    """
    tables = [_table(train[0][:, channel]) for channel in range(train[0].shape[1])]
    data = []
    for images, labels in (train, test):
        inputs = np.empty(images.shape, np.float32)
        for channel, table in enumerate(tables):
            np.take(table, images[:, channel], out=inputs[:, channel])
        target = torch.from_numpy(labels.astype(np.int64))
        data.append(TensorDataset(torch.from_numpy(inputs), target))
    return data[0], data[1]


def _table(channel: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The normalised value of each of the 256 values."""
    values = np.arange(256.0)
    counts = np.bincount(channel.ravel(), minlength=256)
    mean = (counts * values).sum() / counts.sum()
    deviation = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
    table: NDArray[np.float64] = (values - mean) / (deviation or 1.0)
    return table.astype(np.float32)


def read_image_tree(path: Path) -> tuple[Split, Split]:
    """Images in `train/<class>/*` and `test/<class>/*` of a folder or zip archive.

    Classes are numbered in alphabetical order, images come in the order of their paths. Grey
    images have one channel, all others become RGB. An archive is read without being unpacked.

    Args:
        path: The folder or .zip file; everything may be inside one more folder.

    Returns:
        tuple: (images, labels) for training and for test.

    Raises:
        DataError: Names the file: nothing found, not an image, another size or number of channels
            than the first, or a class that the training images do not have.
    """
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        return _read_tree(path, names, lambda name: (path / name).read_bytes())
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_tree(path, archive.namelist(), archive.read)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot be read as a zip archive ({error})") from error


def _read_tree(path: Path, names: list[str], read: Callable[[str], bytes]) -> tuple[Split, Split]:
    found: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}  # (name, class)
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if len(parts) < 3 or parts[-3] not in found or parts[-1].startswith("."):
            continue
        if "__MACOSX" not in parts and name.lower().endswith(_SUFFIXES):
            found[parts[-3]].append((name, parts[-2]))
    for split, images in found.items():
        if not images:
            raise DataError(
                f"{path}: no images of {split}; expected {split}/<class>/*.jpg or *.png (and for "
                "the data of a task of a zoo, ZOO:TASK)"
            )
    classes = sorted({label for _, label in found["train"]})
    unknown = sorted({label for _, label in found["test"]} - set(classes))
    if unknown:
        raise DataError(f"{path}: test has the class {unknown[0]!r}, which train does not have")
    return _decode(path, found["train"], classes, read), _decode(path, found["test"], classes, read)


def _decode(
    path: Path, images: list[tuple[str, str]], classes: list[str], read: Callable[[str], bytes]
) -> Split:
    from PIL import Image
    from tqdm import tqdm

    pixels: NDArray[np.uint8] | None = None
    # silent if it takes no longer than a moment
    for i, (name, _) in enumerate(tqdm(images, f"reading {path.name}", delay=2)):
        try:
            with Image.open(io.BytesIO(read(name))) as image:
                grey = image.mode in ("1", "L")
                array = np.asarray(image.convert("L" if grey else "RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: {name} is not a readable image ({error})") from error
        array = array[None] if grey else array.transpose(2, 0, 1)
        if pixels is None:
            pixels = np.empty((len(images), *array.shape), np.uint8)
        if array.shape != pixels.shape[1:]:
            raise DataError(
                f"{path}: {name} has (channels, height, width) {array.shape}; {images[0][0]} has "
                f"{pixels.shape[1:]}"
            )
        pixels[i] = array
    assert pixels is not None
    index = {label: k for k, label in enumerate(classes)}
    return pixels, np.array([index[label] for _, label in images])
