"""Fashion-MNIST from its IDX files, shrunk to 14x14 pixels: the data of the embedded zoo."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d
from torch.utils.data import TensorDataset

from sharpkit.errors import ArgumentError, DataError

_IDX_BYTE = 0x08  # the element type of every file of the MNIST family


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file, the format of MNIST and its relatives.

    Args:
        path: The file, gzip-compressed or not.

    Returns:
        ndarray: uint8, in the shape that the file states.

    Raises:
        DataError: Missing, damaged, another element type, or more or fewer bytes than stated.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels-idx1-ubyte")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        ...     read_idx(path)
        array([7, 8, 9], dtype=uint8)
    """
    try:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    start = 4 + 4 * content[3] if len(content) >= 4 else 0
    if content[:3] != bytes([0, 0, _IDX_BYTE]) or len(content) < start:
        raise DataError(f"{path}: not an IDX file of bytes (first bytes {content[:4].hex()})")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path}: {len(content) - start} bytes of data; shape {shape} was stated")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


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
    images, labels = _read_split(Path(folder), "train")
    each, rest = divmod(train_size, 10)
    if rest or not 0 < each <= np.bincount(labels).min():
        raise ArgumentError(f"train_size is {train_size}; expected a multiple of 10 in the data")
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(10)]
    part = np.sort(np.concatenate(chosen))
    return _shrink(images[part], labels[part]), _shrink(*_read_split(Path(folder), "t10k"))


def _read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        path = folder / f"{split}-{kind}.gz"
        arrays.append(read_idx(path if path.exists() else path.with_suffix("")))
    images, labels = arrays
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or labels.max(initial=0) > 9:
        raise DataError(f"{folder}: {split} images {images.shape} and labels {labels.shape}")
    return images, labels


def _shrink(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> TensorDataset:
    x = avg_pool2d(torch.from_numpy(images).float().unsqueeze(1), 2)
    return TensorDataset(x / 128 - 0.5, torch.from_numpy(labels.astype(np.int64)))
