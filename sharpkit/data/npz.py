"""The arrays of .npz files: numbers and text, of no more bytes than their headers may state."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sharpkit.containers import open_zip, require_sizes
from sharpkit.data.raw import read_values
from sharpkit.doors import reading
from sharpkit.errors import SharpkitError

_EXPECTED = "a zip archive of arrays"
_MAX_HEADER = 10_000  # bytes
_HEADER = re.compile(
    rb"\{'descr': '([<>|=][biufcUS]\d{1,8})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}L?, ?)*(?:\d{1,18}L?)?)\), ?\} *\n"
)


def read_npz(
    path: Path, names: Collection[str], error: type[SharpkitError]
) -> dict[str, NDArray[Any]]:
    """Those of the named arrays that an .npz file has; others are not looked at.

    Example:
        >>> import tempfile
        >>> from sharpkit.errors import DataError
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "data.npz")
        ...     np.savez_compressed(path, x=np.arange(3.0), other=0)
        ...     read_npz(path, ["x", "y"], DataError)
        {'x': array([0., 1., 2.])}
    """
    whole = _whole(path)
    with reading(whole, error, _EXPECTED), open_zip(path, error) as archive:
        known = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        wanted = {name: known[name] for name in names if name in known}
        require_sizes(path, wanted.values(), path.stat().st_size, error)
        arrays = {}
        for name, member in wanted.items():
            with reading(f"{whole}, {name}", error, "an array"), archive.open(member) as file:
                arrays[name] = _read_npy(file, member.file_size)
    return arrays


def has_arrays(path: Path, names: Collection[str], error: type[SharpkitError]) -> bool:
    """Whether an .npz file has all of the named arrays."""
    with reading(_whole(path), error, _EXPECTED), open_zip(path, error) as archive:
        return set(names) <= {name.removesuffix(".npy") for name in archive.namelist()}


def _whole(path: Path) -> str:
    return f"{path}: not a readable .npz file"


def _read_npy(file: IO[bytes], size: int) -> NDArray[Any]:
    """The array of a .npy file of so many bytes."""
    magic = file.read(8)
    if magic[:7] not in (b"\x93NUMPY\x01", b"\x93NUMPY\x02"):
        raise ValueError(f"it is not in numpy's format 1 or 2, as it begins with {magic!r}")
    form = "<H" if magic[6] == 1 else "<I"
    (length,) = struct.unpack(form, file.read(struct.calcsize(form)))
    if length > _MAX_HEADER:
        raise ValueError(f"its header states {length:,} bytes; at most {_MAX_HEADER:,} are read")
    header = file.read(length)
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError(f"only numbers and text are read; its header is {header!r}")
    dtype = np.dtype(match[1].decode())
    shape = tuple(int(side.strip(b" L")) for side in match[3].split(b",") if side.strip())
    data = size - len(magic) - struct.calcsize(form) - length
    if math.prod(shape) * dtype.itemsize != data:
        raise ValueError(f"{data:,} bytes of data, and {dtype} of shape {shape} is stated")
    values = read_values(file.read, math.prod(shape), dtype)
    if file.read(1):  # and so the checksum has been compared
        raise ValueError("it holds more than it states")
    return values.reshape(shape[::-1]).T if match[2] == b"True" else values.reshape(shape)
