"""Arrays of numbers in the .mat files of MATLAB 5 to 7.2: a header of 128 bytes, then elements.

An element is a tag, which states type and bytes, and its data; those of a matrix are elements in
turn: flags, dimensions, name and values, each padded to 8 bytes. A matrix may be compressed.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sharpkit.containers import Expanded, Inflated
from sharpkit.data.raw import read_values
from sharpkit.doors import allowed_expansion, reading
from sharpkit.errors import SharpkitError
from sharpkit.files import open_regular

_MATRIX, _COMPRESSED = 14, 15  # types of elements
_TYPES = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_CLASSES = {
    6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8",
}  # fmt: skip
_COMPLEX = 8  # among the flags of a matrix
_MAX_DIMENSIONS = 32
_MAX_NAME = 256

_Order = str  # "<" or ">"


def read_matlab(
    path: Path, names: Collection[str], error: type[SharpkitError]
) -> dict[str, NDArray[Any]]:
    """Those of the named matrices that a .mat file has, if they are real numbers.

    Returns:
        dict: Name to array, in the matrix's own type and at least of two dimensions.

    Source:
        MathWorks, MAT-File Format, "Level 5 MAT-File Format".

    Example:
        >>> import tempfile
        >>> from scipy.io import savemat
        >>> from sharpkit.errors import DataError
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "data.mat")
        ...     savemat(path, {"y": np.arange(3.0), "text": "no numbers"})
        ...     read_matlab(path, ["y"], DataError)
        {'y': array([[0., 1., 2.]])}
    """
    where = f"{path}: cannot be read"
    with reading(where, error, "a .mat file of MATLAB 5 to 7.2"), open_regular(path) as file:
        stored = os.fstat(file.fileno()).st_size
        order = _byte_order(file.read(128))
        # what is decompressed is counted over the whole file
        matrices = _Matrices(path, file, order, allowed_expansion(stored), names, error)
        while len(tag := file.read(8)) == 8:
            kind, size = _numbers(tag, order)
            end = file.tell() + size
            if end > stored:
                raise ValueError(f"an element of {size:,} bytes goes beyond the end")
            matrices.read(kind, size)
            file.seek(end)
    return matrices.found


class _Matrices:
    """The matrices of a file, found one after the other."""

    def __init__(
        self,
        path: Path,
        file: IO[bytes],
        order: _Order,
        limit: int,
        names: Collection[str],
        error: type[SharpkitError],
    ) -> None:
        self._path, self._file, self._order, self._limit = path, file, order, limit
        self._names, self._error = names, error
        self.found: dict[str, NDArray[Any]] = {}

    def read(self, kind: int, size: int) -> None:
        """Look at the element that begins here, after its tag."""
        packed = kind == _COMPRESSED
        if packed:
            stream = Inflated(self._file, size)
            content = Expanded(self._path, stream, self._limit, self._error)
            kind, size = _numbers(_exactly(content, 8), self._order)
        else:
            content = Expanded(self._path, self._file, size, self._error)
        content.require(size)
        # reading to the end of compressed data also compares their checksum
        kept = kind == _MATRIX and self._keep(content)
        if kept and (content.read(1) if packed else content.left):
            raise ValueError("an element is longer than its matrix")
        self._limit -= content.done

    def _keep(self, content: Expanded) -> bool:
        """Keep the matrix whose parts follow, if it is one of those wanted; whether it was."""
        order = self._order
        flags = int(_part(content, order, 8).view(f"{order}u4")[0])
        shape = tuple(_part(content, order, 4 * _MAX_DIMENSIONS).view(f"{order}i4").tolist())
        name = _part(content, order, _MAX_NAME).tobytes().decode("latin-1")
        if name not in self._names:
            return False
        where = f"{self._path}, {name}"
        with reading(where, self._error, "a matrix of real numbers"):
            if flags & 0xFF not in _CLASSES or (flags >> 8) & _COMPLEX:
                raise ValueError(f"class {flags & 0xFF}, flags {flags >> 8 & 0xFF:#x}")
            if len(shape) < 2 or min(shape) < 0:
                raise ValueError(f"dimensions {shape}")
            values = _values(content, order, math.prod(shape))
            # whole numbers may be stored in a smaller type
            array = values.astype(_CLASSES[flags & 0xFF], casting="safe", copy=False)
            self.found[name] = array.reshape(shape[::-1]).T
        return True


def _byte_order(header: bytes) -> _Order:
    """That of a file, by the last four bytes of its header: version and order."""
    for order, mark in (("<", b"\x00\x01IM"), (">", b"\x01\x00MI")):
        if len(header) == 128 and header[124:] == mark:
            return order
    raise ValueError("its header is not that of MATLAB 5 to 7.2")


def _numbers(content: bytes, order: _Order) -> tuple[int, int]:
    first, second = struct.unpack(f"{order}II", content)
    return first, second


def _values(content: Expanded, order: _Order, count: int) -> NDArray[Any]:
    """An element of numbers, as many as the dimensions state."""
    kind, size, padding, data = _tag(content, order)
    if kind not in _TYPES:
        raise ValueError(f"values of type {kind}")
    dtype = np.dtype(order + _TYPES[kind])
    if count * dtype.itemsize != size:
        raise ValueError(f"{size:,} bytes of data for {count:,} values of {dtype.itemsize} bytes")
    if data is not None:
        return np.frombuffer(data[:size], dtype).astype(dtype.newbyteorder("="))
    content.require(size)
    values = read_values(content.read, count, dtype)
    content.skip(padding)
    return values


def _part(content: Expanded, order: _Order, most: int) -> NDArray[np.uint8]:
    """The bytes of a small element."""
    _, size, padding, data = _tag(content, order)
    if size > most:
        raise ValueError(f"{size:,} bytes where at most {most} are expected")
    found = data[:size] if data is not None else _exactly(content, size)
    content.skip(padding)
    return np.frombuffer(found, np.uint8)


def _tag(content: Expanded, order: _Order) -> tuple[int, int, int, bytes | None]:
    """Type, bytes and padding of an element, and its data if they are within the tag."""
    tag = _exactly(content, 8)
    kind, size = _numbers(tag, order)
    if kind >> 16:  # up to four bytes of data, whose number is in the upper half
        kind, size = kind & 0xFFFF, kind >> 16
        if size > 4:
            raise ValueError(f"{size} bytes in a tag that has place for 4")
        return kind, size, 0, tag[4:]
    return kind, size, -size % 8, None


def _exactly(content: Expanded, size: int) -> bytes:
    if len(found := content.read(size)) < size:
        raise ValueError(f"ends after {len(found)} of {size} bytes")
    return found
