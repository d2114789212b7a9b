"""The arrays of a Keras HDF5 file, looked at before any is read.

Whatever a file declares (names, shapes, chunks, how far they expand) is compared with what it
holds before memory is taken for it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sharpkit.doors import (
    FREE_BYTES,
    MAX_ARRAYS,
    MAX_CHUNKS,
    MAX_DEPTH,
    MAX_LAYERS,
    allowed_expansion,
    reading,
    shown,
)
from sharpkit.errors import ZooFormatError
from sharpkit.zoo.keras.heaps import check_heaps

if TYPE_CHECKING:
    from h5py import Dataset

_CHUNK = 2**22  # bytes of a chunk of any array; else as many as the array has
_SHUFFLE, _GZIP, _CHECKSUM = 2, 1, 3
_FILTERS = (_SHUFFLE, _GZIP, _CHECKSUM)  # in the order in which h5py puts them


@contextmanager
def open_layers(path: Path) -> Iterator[list[tuple[str, list[Dataset]]]]:
    """Each layer that has weights, with its checked datasets, in order, while the file is open.

    Raises:
        ZooFormatError: Not a Keras 2 weight file, damaged, or it declares more than it holds;
            also for whatever HDF5 finds wrong inside the block.
    """
    import h5py

    with reading(path, ZooFormatError, "an undamaged Keras HDF5 weight file"):
        if not path.is_file():
            raise ZooFormatError(f"{path}: weight file is missing")
        largest_text = check_heaps(path)
        with h5py.File(path, "r", locking="best-effort") as file:
            yield _Names(path, largest_text).layers(file)


def read_array(path: Path, layer: str, dataset: Dataset) -> NDArray[np.float32]:
    """The numbers of a dataset as float32; NaN and infinite ones are refused."""
    array = np.empty(dataset.shape, dtype=np.float32)
    if array.size:
        dataset.read_direct(array)
    # one infinite or NaN entry spoils the sum, and the sum needs no temporary; a huge but finite
    # array may overflow, so only the slow test has the last word
    tensor = torch.from_numpy(array)
    if not math.isfinite(float(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ZooFormatError(
            f"{path}: layer {shown(layer)}: {shown(dataset.name)[1:-1]} has {bad} NaN or infinite "
            f"entries of {array.size}"
        )
    return array


class _Names:
    """Follows the names that a file lists; all its lists together are bounded."""

    def __init__(self, path: Path, largest_text: int) -> None:
        self._path, self._size = path, path.stat().st_size
        self._largest_text = largest_text  # bytes of one of variable length
        self._bytes_left = FREE_BYTES

    def layers(self, file: Any) -> list[tuple[str, list[Any]]]:
        """Each layer that has weights, with its checked datasets, in order."""
        layers, stored, expanded = [], 0, 0
        for name, group, weights in self._groups(file):
            datasets = [self._follow(group, weight, "Dataset") for weight in weights]
            for dataset in datasets:
                _check_dataset(self._path, self._size, name, dataset)
                stored += dataset.id.get_storage_size()
                expanded += 4 * dataset.size
                # such as one array that is named often
                if stored > self._size or expanded > allowed_expansion(self._size):
                    raise ZooFormatError(
                        f"{self._path}: declares {expanded:,} bytes of weights, more than a file "
                        f"of {self._size:,} holds"
                    )
            if datasets:
                layers.append((name, datasets))
        return layers

    def _groups(self, file: Any) -> list[tuple[str, Any, list[str]]]:
        """Each layer's name, its group and the names of its arrays."""
        names = self._read(file, "layer_names")
        if len(set(names)) < len(names):
            raise ZooFormatError(f"{self._path}: lists a layer twice in {shown(names)}")
        groups, arrays = [], 0
        for name in names:
            group = self._follow(file, name, "Group")
            groups.append((name, group, self._read(group, "weight_names")))
            arrays += len(groups[-1][2])
            if arrays > MAX_ARRAYS:
                raise ZooFormatError(f"{self._path}: lists more than {MAX_ARRAYS:,} arrays")
        return groups

    def _read(self, group: Any, key: str) -> list[str]:
        """A list of names from an attribute, possibly split into key0, key1, ..."""
        parts = [key]
        if key not in group.attrs:
            numbered = (f"{key}{k}" for k in range(MAX_LAYERS))
            parts = list(takewhile(group.attrs.__contains__, numbered))
        where = f"{self._path}: attribute {key!r} of {shown(group.name)[1:-1]}"
        if not parts:
            raise ZooFormatError(
                f"{self._path}: {shown(group.name)[1:-1]} has no attribute {key!r}"
            )
        raw: list[Any] = []
        for part in parts:
            self._check_attribute(where, group.attrs.get_id(part), len(raw))
            raw += np.atleast_1d(group.attrs[part]).tolist()
        return [name.decode() if isinstance(name, bytes) else str(name) for name in raw]

    def _check_attribute(self, where: str, attribute: Any, before: int) -> None:
        """Refuse what is no list of names, or declares more of them than the file holds."""
        import h5py

        text, shape = h5py.check_string_dtype(attribute.dtype), attribute.shape
        if shape is None or len(shape) > 1 or (text is None and math.prod(shape)):
            raise ZooFormatError(f"{where} is not a list of names")
        names = math.prod(shape)
        if before + names > MAX_LAYERS:
            raise ZooFormatError(f"{where} has more than {MAX_LAYERS:,} names")
        # an empty list has no storage, which h5py takes for an error
        stored = attribute.get_storage_size() if names else 0
        # many references may name one text of variable length
        variable = text is not None and text.length is None
        self._bytes_left -= names * self._largest_text if variable else stored
        if stored > self._size or self._bytes_left < 0:
            raise ZooFormatError(f"{where} declares more than the file holds")

    def _follow(self, group: Any, name: str, kind: str) -> Any:
        """The object of a name inside a group, through hard links only."""
        import h5py

        parts = [part for part in name.split("/") if part]
        if len(parts) > MAX_DEPTH:
            raise ZooFormatError(
                f"{self._path}: {shown(name)} is more than {MAX_DEPTH} levels deep"
            )
        node = group
        for part in parts:
            if not isinstance(node, h5py.Group) or not node.id.links.exists(part.encode()):
                raise ZooFormatError(
                    f"{self._path}: {shown(group.name)[1:-1]} names {shown(name)}, which is not in "
                    "the file"
                )
            if node.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
                raise ZooFormatError(
                    f"{self._path}: {shown(name)} is a link to elsewhere; only data inside the "
                    "file is read"
                )
            node = node[part]
        if not isinstance(node, getattr(h5py, kind)):
            raise ZooFormatError(f"{self._path}: {shown(name)} should be an HDF5 {kind.lower()}")
        return node


def _check_dataset(path: Path, size: int, layer: str, dataset: Any) -> None:
    """Refuse data outside the file, other types, and sizes that the file cannot hold."""
    where = f"{path}: layer {shown(layer)}: {shown(dataset.name)[1:-1]}"
    if dataset.is_virtual or dataset.external:
        raise ZooFormatError(f"{where} keeps its data in another file")
    dtype, shape, stored = dataset.dtype, dataset.shape, dataset.id.get_storage_size()
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ZooFormatError(f"{where} has type {dtype}; expected floating point")
    chunked = dataset.chunks is not None
    numbers = math.inf if shape is None else math.prod(shape)
    held = allowed_expansion(size) if chunked else stored
    if stored > size or max(dtype.itemsize, 4 * chunked) * numbers > held:
        raise ZooFormatError(f"{where} declares shape {shown(shape)}, more than the file holds")
    if chunked:
        _check_chunks(path, size, where, dataset)


def _check_chunks(path: Path, size: int, where: str, dataset: Any) -> None:
    """Refuse chunks that are missing, many, large, or not as long as a chunk when expanded.

    HDF5 takes memory for a whole chunk, however little of it the array needs, and for whatever
    deflate makes of it; of one that is too short it reads what lies behind it in memory.
    """
    filters = _filters(where, dataset)
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    if chunk > max(_CHUNK, dataset.nbytes):
        raise ZooFormatError(f"{where} of shape {dataset.shape} has chunks of {chunk:,} bytes")
    if chunks > MAX_CHUNKS:
        raise ZooFormatError(f"{where} has {chunks:,} chunks; at most {MAX_CHUNKS:,} are read")
    places: list[Any] = []

    def keep(place: Any) -> bool | None:
        places.append(place)
        return len(places) > chunks or None  # the iteration ends when something is returned

    dataset.id.chunk_iter(keep)
    if len(places) != chunks:
        raise ZooFormatError(f"{where} declares shape {dataset.shape}, more than the file holds")
    with path.open("rb") as file:
        for place in places:
            if place.byte_offset is None or place.byte_offset + place.size > size:
                raise ZooFormatError(f"{where} has a chunk beyond the end of the file")
            skipped = place.filter_mask
            packed, checked = (
                name in filters and not skipped & 1 << filters.index(name)
                for name in (_GZIP, _CHECKSUM)
            )
            expanded = place.size - 4 * checked
            if packed:
                file.seek(place.byte_offset)
                content = file.read(max(expanded, 0))
                expanded = len(zlib.decompressobj().decompress(content, chunk + 1))
            if expanded != chunk:
                raise ZooFormatError(f"{where} has a chunk that expands to more or less than one")


def _filters(where: str, dataset: Any) -> tuple[int, ...]:
    """The numbers of a dataset's filters: shuffle, gzip and checksums, each at most once."""
    plan = dataset.id.get_create_plist()
    filters = tuple(plan.get_filter(k)[0] for k in range(min(plan.get_nfilters(), 8)))
    if filters != tuple(f for f in _FILTERS if f in filters):
        raise ZooFormatError(
            f"{where} is packed by the filters {filters}; expected gzip or none: save the weights "
            "again without compression"
        )
    return filters
