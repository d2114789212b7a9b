"""Gzip files and zip archives, read in pieces and never further than a file may expand."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from sharpkit.doors import MAX_DIRECTORY_BYTES, allowed_expansion
from sharpkit.errors import SharpkitError
from sharpkit.files import MAX_BYTES, open_regular

_PIECE = 2**20


class Source(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """At most so many of the next bytes, none at the end."""
        ...


class Expanded:
    """Content read in pieces; more than the limit is an error of the project.

    Args:
        where: The file, for errors.
        file: What the content is read from.
        limit: Bytes at most.
        error: What is raised for more.

    Attributes:
        left: Bytes that may still come.

    Example:
        >>> import io
        >>> from sharpkit.errors import DataError
        >>> content = Expanded("a.gz", io.BytesIO(b"abc"), 2, DataError)
        >>> content.read(2)
        b'ab'
        >>> content.read(2)
        Traceback (most recent call last):
        sharpkit.errors.DataError: a.gz: holds more than the 2 bytes that its size allows
    """

    def __init__(self, where: object, file: Source, limit: int, error: type[SharpkitError]) -> None:
        self._where, self._file, self._error = where, file, error
        self._limit = self.left = limit

    def read(self, size: int) -> bytes:
        """The next bytes: as many as asked for, fewer only at the end."""
        pieces = []
        while size > 0 and (piece := self._file.read(min(size, _PIECE))):
            self.left -= len(piece)
            self.require(0)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    @property
    def done(self) -> int:
        """How many bytes have been read."""
        return self._limit - self.left

    def skip(self, size: int) -> None:
        """Pass over bytes."""
        self.require(size)
        while size > 0 and (piece := self.read(min(size, _PIECE))):
            size -= len(piece)

    def require(self, size: int) -> None:
        """Refuse, before memory is taken for them, to read as many bytes as a header states."""
        if size > self.left:
            raise self._error(
                f"{self._where}: holds more than the {self._limit:,} bytes that its size allows"
            )


@contextmanager
def open_expanded(path: Path, error: type[SharpkitError]) -> Iterator[Expanded]:
    """A file to be read in pieces, decompressed if it is gzip; inside `reading`."""
    with open_regular(path) as file:
        stored = os.fstat(file.fileno()).st_size
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if packed:
            with gzip.GzipFile(fileobj=file) as inside:
                yield Expanded(path, inside, allowed_expansion(stored), error)
        else:
            yield Expanded(path, file, stored, error)


class Inflated:
    """A zlib stream inside a file, decompressed piece by piece."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left, self._stream = file, size, zlib.decompressobj()

    def read(self, size: int) -> bytes:
        """Some of the next bytes, at most `size`; none at the end."""
        while not self._stream.eof:
            packed = self._stream.unconsumed_tail
            if not packed:
                packed = self._file.read(min(self._left, 2**16))
                self._left -= len(packed)
            if piece := self._stream.decompress(packed, size):
                return piece
            if not packed and not self._stream.eof:
                raise ValueError("the compressed data end too early")
        return b""


@contextmanager
def open_zip(
    path: Path, error: type[SharpkitError], max_bytes: int = MAX_BYTES
) -> Iterator[zipfile.ZipFile]:
    """A zip archive with a list of members that is not too long; inside `reading`.

    Before members are read, `require_sizes` looks at what they state.
    """
    with open_regular(path, max_bytes) as file:
        if (size := _directory_size(file)) > MAX_DIRECTORY_BYTES:
            raise error(
                f"{path}: the list of its members has {size:,} bytes; at most "
                f"{MAX_DIRECTORY_BYTES:,} are read: unpack it, or divide it"
            )
        with zipfile.ZipFile(file) as archive:
            yield archive


def require_sizes(
    where: object, members: Iterable[zipfile.ZipInfo], stored: int, error: type[SharpkitError]
) -> None:
    """Refuse members that are compressed otherwise, or state more bytes than may come of them."""
    total = 0
    for member in members:
        total += member.file_size
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise error(
                f"{where}: {member.filename} is compressed by method {member.compress_type}, "
                "expected stored or deflated"
            )
    if total > allowed_expansion(stored):
        raise error(
            f"{where}: its members state {total:,} bytes; at most {allowed_expansion(stored):,} "
            f"are read of an archive of {stored:,}"
        )


def _directory_size(file: IO[bytes]) -> int:
    """Bytes of the list of members, as the archive's last record states them; 0 without one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 2**16 - 98, 0))  # a comment of 64 KiB, and the three last records
    end = file.read()
    file.seek(0)
    at = len(end) - 22  # where the last record is if no comment follows it, as zipfile looks first
    if end[max(at, 0) :][:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        at = end.rfind(b"PK\x05\x06")
    if at < 0:
        return 0
    if end[max(at - 20, 0) : at][:4] == b"PK\x06\x07":  # a larger record is before this one
        return int.from_bytes(end[max(at - 36, 0) : max(at - 28, 0)], "little")
    return int.from_bytes(end[at + 12 : at + 16], "little")
