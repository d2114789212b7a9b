"""IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharpkit.errors import DataError
from sharpkit.files import read_regular

_BYTE = 0x08  # the element type of every file of the MNIST family


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
        content = read_regular(Path(path))
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    start = 4 + 4 * content[3] if len(content) >= 4 else 0
    if content[:3] != bytes([0, 0, _BYTE]) or len(content) < start:
        raise DataError(f"{path}: not an IDX file of bytes (first bytes {content[:4].hex()})")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path}: {len(content) - start} bytes of data; shape {shape} was stated")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


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
        arrays.append(read_idx(path if path.exists() else path.with_suffix("")))
    images, labels = arrays
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or labels.max(initial=0) > 9:
        raise DataError(f"{folder}: {split} images {images.shape} and labels {labels.shape}")
    return images, labels
