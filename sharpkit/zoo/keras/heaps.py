"""A guard against three kinds of damage that the HDF5 library itself does not survive.

The names of a group's members lie in a local heap whose free blocks form a linked list. Where
damage turns that list into a cycle, HDF5 (2.0 and before) follows it for ever and takes memory at
every step. Text of variable length, as Keras' names are with h5py 3, lies in global heaps; HDF5
stays for ever at an object there that takes no room, and takes as much memory for a text as the
attribute that refers to it states. So all three are looked at here first.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from sharpkit.errors import ZooFormatError
from sharpkit.files import open_regular

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LOCAL, _GLOBAL = b"HEAP\0", b"GCOL\1"  # with the version that there is
_HEADER = struct.Struct("<QQQ")  # data size, first free block, data address
_BLOCK = struct.Struct("<QQ")  # next free block, size
_END = 1  # "no next block"
_NAMES = (b"layer_names", b"weight_names")
_ATTRIBUTE = struct.Struct("<BxHHH")  # version, size of name, type and shape; without an encoding
_VARIABLE = 9  # class of a type
_OBJECT = struct.Struct("<HxxxxxxQ")  # index, size
_MAX_STEPS = 100_000  # of all heaps; a group that h5py writes has one free block or none
_PIECE = 2**20


def check_heaps(path: Path) -> int:
    """Refuse an HDF5 file with a heap in which HDF5 would walk for ever.

    Other damage is left to the HDF5 library, which reports it. Reads the file once, without holes.

    Returns:
        int: Bytes of the largest object in a global heap, 0 if there is none: no text is longer.

    Raises:
        ZooFormatError: Such a heap, or a file that does not begin with HDF5's signature and
            addresses of 8 bytes, which are all that h5py writes.

    Source:
        HDF5 File Format Specification, version 3.0, sections II.A, III.D and III.E.
    """
    with open_regular(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(16)
        widths = start[13:15] if start[8:9] in (b"\0", b"\1") else start[9:11]
        if not start.startswith(_SIGNATURE) or widths != b"\x08\x08":
            raise ZooFormatError(
                f"{path}: expected an undamaged Keras HDF5 weight file (its first bytes are others)"
            )
        steps, largest, stated = 0, 0, 0
        for kind, offset in _places(file, size):
            if kind in _NAMES:
                stated = max(stated, _longest_text(file, offset, size))
                continue
            walk = _free_blocks if kind == _LOCAL else _objects
            for length in walk(file, offset, size):
                steps += 1
                if length < 0 or steps >= _MAX_STEPS:
                    raise ZooFormatError(
                        f"{path}: damaged HDF5 file (endless or cyclic heap at byte {offset})"
                    )
                largest = max(largest, length)
    if stated > largest:
        raise ZooFormatError(
            f"{path}: damaged HDF5 file (a name of {stated:,} bytes; no text has more than "
            f"{largest:,})"
        )
    return largest


def _free_blocks(file: BufferedReader, heap: int, end: int) -> Iterator[int]:
    """A 0 for each free block of a local heap that HDF5 would visit."""
    file.seek(heap + 8)
    header = file.read(_HEADER.size)
    size, block, address = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 0, 0)
    while block != _END and block + _BLOCK.size <= size and address + block + 16 <= end:
        yield 0
        file.seek(address + block)
        block = _BLOCK.unpack(file.read(_BLOCK.size))[0]


def _objects(file: BufferedReader, heap: int, end: int) -> Iterator[int]:
    """The size of each object in a global heap; -1 for one that HDF5 would not get past."""
    file.seek(heap + 8)
    size, at = int.from_bytes(file.read(8), "little"), 16
    if heap + size > end:  # HDF5 itself refuses that
        return
    while at + _OBJECT.size <= size:
        file.seek(heap + at)
        index, length = _OBJECT.unpack(file.read(_OBJECT.size))
        taken = _OBJECT.size + -(-length // 8) * 8 if index else length  # index 0: what is free
        yield length if taken and at + taken <= size else -1
        at += taken


def _longest_text(file: BufferedReader, name: int, end: int) -> int:
    """Bytes of the longest text that an attribute refers to, of which this is the name; else 0."""
    start = max(name - _ATTRIBUTE.size - 1, 0)
    file.seek(start)
    before = file.read(name - start)
    for skip, padded, version in ((0, True, 1), (0, False, 2), (1, False, 3)):
        header = before[len(before) - _ATTRIBUTE.size - skip : len(before) - skip]
        found, *sizes = _ATTRIBUTE.unpack(header) if len(header) == _ATTRIBUTE.size else (0,)
        if found == version:
            name_size, type_size, shape_size = (-(-n // 8) * 8 if padded else n for n in sizes)
            file.seek(name + name_size)
            kind, shape = file.read(type_size), file.read(shape_size)
            if kind[:1] and kind[0] & 0xF == _VARIABLE:
                texts = file.read(min(16 * _count(shape), end))
                whole = texts[: len(texts) // 16 * 16]
                return max((n for n, _ in struct.iter_unpack("<I12s", whole)), default=0)
    return 0


def _count(shape: bytes) -> int:
    """How many entries a stored shape has; 0 if it is none."""
    if len(shape) < 4 or shape[0] not in (1, 2):
        return 0
    dims = shape[8 if shape[0] == 1 else 4 :][: 8 * shape[1]]
    return math.prod(n for (n,) in struct.iter_unpack("<Q", dims[: len(dims) // 8 * 8]))


def _places(file: BufferedReader, size: int) -> Iterator[tuple[bytes, int]]:
    """Kind and offset of everything in a file that looks like a heap or a name of an attribute."""
    for start, end in _extents(file, size):
        for offset in range(start, end, _PIECE):
            file.seek(offset)
            piece = file.read(min(_PIECE, end - offset) + len(_NAMES[1]) - 1)
            for kind in (_LOCAL, _GLOBAL, *_NAMES):
                at = piece.find(kind)
                while at >= 0:
                    yield kind, offset + at
                    at = piece.find(kind, at + 1)


def _extents(file: BufferedReader, size: int) -> list[tuple[int, int]]:
    """Beginning and end of each part of a file that is no hole."""
    if not hasattr(os, "SEEK_DATA"):  # Windows
        return [(0, size)]
    descriptor, extents, end = file.fileno(), [], 0
    before = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        while end < size:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            extents.append((start, end))
    except OSError as error:
        if error.errno != errno.ENXIO:  # which says that the rest is a hole
            return [(0, size)]
    finally:
        os.lseek(descriptor, before, os.SEEK_SET)  # where the buffer believes it to be
    return extents
