"""Images of bytes as normalised tensors, and images in files of one folder per class."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from sharpkit.containers import open_zip, require_sizes
from sharpkit.doors import allowed_expansion, reading
from sharpkit.errors import DataError
from sharpkit.files import read_regular
from sharpkit.progress import progress_bar

if TYPE_CHECKING:
    from PIL import Image

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, c, h, w), labels (n,)
_SUFFIXES = (".jpg", ".jpeg", ".png")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_FILE = 2**25  # bytes of one image
_MAX_SCANS = 100  # of a progressive JPEG, each of which costs as much time as the whole image


def normalised(train: Split, test: Split) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images with mean 0 and variance 1 per channel over the training set.

    Mean and standard deviation come from counts of the 256 values, in float64, so they are exact;
    the test images are shifted and scaled by the same numbers. A constant channel becomes 0.

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


def channels_first(path: Path, shape: tuple[int, ...]) -> Callable[..., NDArray[Any]]:
    """How arrays of images of this shape become (n, c, h, w)."""
    if len(shape) == 3:
        return lambda images: images[:, None]
    first, last = (len(shape) == 4 and shape[axis] in (1, 3, 4) for axis in (1, 3))
    if first == last:
        raise DataError(
            f"{path}: uint8 images of shape {shape}; expected (n, h, w), (n, h, w, c) or "
            "(n, c, h, w) with c = 1, 3 or 4, and no doubt which"
        )
    return lambda images: images if first else images.transpose(0, 3, 1, 2)


def read_image_tree(path: Path) -> tuple[Split, Split]:
    """Images in `train/<class>/*` and `test/<class>/*` of a folder or zip archive.

    Classes are numbered in alphabetical order, images come in the order of their paths. Grey
    images have one channel, all others become RGB. An archive is read without being unpacked, and
    everything may be inside one more folder.

    Returns:
        tuple: (images, labels) for training and for test.

    Raises:
        DataError: Names the file: nothing found, not an image, another size or number of channels
            than the first, or a class that the training images do not have.
    """
    if path.is_dir():
        with reading(path, DataError, "a folder of images"):
            found = [p for p in path.rglob("*") if p.is_file()]
            sizes = {p.relative_to(path).as_posix(): p.stat().st_size for p in found}
        return _read_tree(path, sizes, lambda name: read_regular(path / name, _MAX_FILE))
    where = f"{path}: cannot be read as a zip archive"
    with reading(where, DataError, "one of images"), open_zip(path, DataError) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        return _read_tree(path, sizes, archive.read, archive)


def _read_tree(
    path: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], bytes],
    archive: zipfile.ZipFile | None = None,
) -> tuple[Split, Split]:
    found: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}  # (name, class)
    for name in sorted(sizes):
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
    names = [name for images in found.values() for name, _ in images]
    large = max(names, key=lambda name: sizes[name])
    if sizes[large] > _MAX_FILE:
        raise DataError(
            f"{path}: {large} has {sizes[large]:,} bytes; at most {_MAX_FILE:,} are read"
        )
    stored = sum(sizes[name] for name in names)
    if archive is not None:
        stored = min(stored, path.stat().st_size)
        require_sizes(path, map(archive.getinfo, names), stored, DataError)
    room = allowed_expansion(stored)
    train = _decode(path, found["train"], classes, read, room)
    return train, _decode(path, found["test"], classes, read, room - train[0].nbytes)


def _decode(
    path: Path,
    images: list[tuple[str, str]],
    classes: list[str],
    read: Callable[[str], bytes],
    room: int,
) -> Split:
    """The images of a split, if their pixels are no more bytes than there is room for."""
    pixels: NDArray[np.uint8] | None = None
    # silent if it takes no longer than a moment
    bar = progress_bar(iterable=images, desc=f"reading {path.name}", delay=2, progress=True)
    for i, (name, _) in enumerate(bar):
        where = f"{path}: {name} is not a readable image"
        with reading(where, DataError, "PNG or JPEG"), _opened(read(name)) as image:
            channels = 1 if image.mode in ("1", "L") else 3
            shape = (channels, image.height, image.width)
            if pixels is None:
                pixels = _room(path, (len(images), *shape), room)
            if shape != pixels.shape[1:]:
                raise DataError(
                    f"{path}: {name} has (channels, height, width) {shape}; {images[0][0]} has "
                    f"{pixels.shape[1:]}"
                )
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        pixels[i] = array[None] if channels == 1 else array.transpose(2, 0, 1)
    assert pixels is not None
    index = {label: k for k, label in enumerate(classes)}
    return pixels, np.array([index[label] for _, label in images])


def _room(path: Path, shape: tuple[int, ...], room: int) -> NDArray[np.uint8]:
    """Where the pixels go, unless they are more than files of this size should hold."""
    size = math.prod(shape)
    if size > room:
        raise DataError(
            f"{path}: images of (n, channels, height, width) {shape} are {size:,} bytes; at most "
            f"{room:,} are made of files of this size"
        )
    return np.empty(shape, np.uint8)


def _opened(content: bytes) -> Image.Image:
    """An image whose header has been read, and of whose text and profiles nothing will be."""
    from PIL import Image

    if content.startswith(_PNG):
        content = _needed_chunks(content)
    elif content.count(b"\xff\xda") > _MAX_SCANS:
        raise ValueError(f"it has more than {_MAX_SCANS} scans")
    image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    if image.mode[0] in "IF":
        raise ValueError("its pixels are no bytes: save it with 8 bits per channel")
    return image


def _needed_chunks(content: bytes) -> bytes:
    """A PNG without the chunks that do not change its pixels, which may hold megabytes of text."""
    needed, at = [_PNG], len(_PNG)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")  # length, name, data, checksum
        name = content[at + 4 : at + 8]
        if name[:1].isupper() or name == b"tRNS":
            needed.append(content[at:end])
        at = end
    return b"".join(needed)
