"""IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharpkit.containers import open_expanded
from sharpkit.data.raw import read_values
from sharpkit.doors import reading
from sharpkit.errors import DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
_BYTE = 0x08  # the element type of every file of the MNIST family


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file, the format of MNIST and its relatives.

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
    path = Path(path)
    where = f"{path}: cannot be read"
    with reading(where, DataError, "an IDX file"), open_expanded(path, DataError) as file:
        start = file.read(4)
        sides = file.read(4 * start[3]) if len(start) == 4 else b""
        if start[:3] != bytes([0, 0, _BYTE]) or len(sides) < 4 * start[3]:
            raise DataError(f"{path}: not an IDX file of bytes (first bytes {start.hex()})")
        shape = struct.unpack(f">{start[3]}I", sides)
        stated = math.prod(shape)
        if stated > file.left:
            raise DataError(
                f"{path}: {file.left} bytes of data; shape {shape} was stated, which is more than "
                "the file's size allows"
            )
        values = read_values(file.read, stated, np.dtype(np.uint8))
        if file.read(1):
            raise DataError(f"{path}: has more data than shape {shape}, which was stated")
        return values.reshape(shape)


def read_idx_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (n, 28, 28) and labels (n,) of MNIST or a relative with the same file names.

    Args:
        folder: Has `<split>-images-idx3-ubyte` and `<split>-labels-idx1-ubyte`, or those with .gz.
        split: "train" or "t10k".

    Raises:
        DataError: A file is missing or damaged, or they do not belong together.
    """
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        path = folder / f"{split}-{kind}.gz"
        arrays.append(read_idx(path if path.is_file() else path.with_suffix("")))
    images, labels = arrays
    if images.shape != (labels.size, 28, 28) or labels.ndim != 1 or labels.max(initial=0) > 9:
        raise DataError(f"{folder}: {split} images {images.shape} and labels {labels.shape}")
    return images, labels
