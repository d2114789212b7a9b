"""Arrays from raw bytes, read in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PIECE = 2**20


def read_values(read: Callable[[int], bytes], count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The next values of a file, in the machine's byte order.

    Args:
        read: Gives at most so many of the next bytes, none at the end.
        count: How many values; the caller has compared it with what the file may hold.
        dtype: Of the values in the file.

    Raises:
        ValueError: The file ends before.

    Example:
        >>> import io
        >>> read_values(io.BytesIO(bytes([0, 1, 0, 2])).read, 2, np.dtype(">u2"))
        array([1, 2], dtype=uint16)
    """
    values = np.empty(count * dtype.itemsize, np.uint8)
    have = 0
    while have < len(values):
        piece = read(min(len(values) - have, _PIECE))
        if not piece:
            raise ValueError(f"ends after {have:,} of {len(values):,} bytes")
        values[have : have + len(piece)] = np.frombuffer(piece, np.uint8)
        have += len(piece)
    return values.view(dtype).astype(dtype.newbyteorder("="), copy=False)
