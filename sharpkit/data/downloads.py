"""CIFAR-10, CIFAR-100 and SVHN: in a folder of your own, or downloaded once from their authors.

The checksums are those that the authors' files have had for over a decade; CIFAR comes in its
binary version, because the other one is a Python pickle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sharpkit.containers import open_expanded
from sharpkit.data.images import Split
from sharpkit.data.matlab import read_matlab
from sharpkit.doors import reading
from sharpkit.download import fetch_file
from sharpkit.errors import DataError, DownloadError
from sharpkit.files import cache_folder, read_regular


@dataclass(frozen=True)
class _Remote:
    """A file on its authors' server."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_STANFORD = "http://ufldl.stanford.edu/housenumbers/"
_CIFAR10 = _Remote(
    _TORONTO + "cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
_CIFAR100 = _Remote(
    _TORONTO + "cifar-100-binary.tar.gz",
    168_513_733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
_SVHN = {
    "train": _Remote(
        _STANFORD + "train_32x32.mat",
        182_040_794,
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    ),
    "test": _Remote(
        _STANFORD + "test_32x32.mat",
        64_275_384,
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    ),
}
_PIXELS = 3 * 32 * 32
_MAX_CIFAR = 2**28  # bytes of one file; the largest has 154 million


def cifar10(root: Path | None) -> tuple[Split, Split]:
    """CIFAR-10: 50,000 and 10,000 images of 10 classes (see `load_dataset`)."""
    train = [f"data_batch_{k}.bin" for k in range(1, 6)]
    return _cifar(root, _CIFAR10, train, ["test_batch.bin"], labels=1, classes=10)


def cifar100(root: Path | None) -> tuple[Split, Split]:
    """CIFAR-100: 50,000 and 10,000 images with the labels of the 100 fine classes."""
    return _cifar(root, _CIFAR100, ["train.bin"], ["test.bin"], labels=2, classes=100)


def svhn(root: Path | None) -> tuple[Split, Split]:
    """SVHN's cropped digits: 73,257 and 26,032 images; the label of a digit is the digit."""
    splits = [_svhn_split(_file(root, remote)) for remote in _SVHN.values()]
    return splits[0], splits[1]


def _file(root: Path | None, remote: _Remote) -> Path:
    """The file in the folder given, or in the cache, where it is downloaded to if need be."""
    if root is not None:
        if not (root / remote.name).is_file():
            raise DataError(f"{root}: {remote.name} is missing; it is at {remote.url}")
        return root / remote.name
    target = cache_folder() / "datasets" / remote.name
    try:
        return fetch_file(remote.url, target, size=remote.size, sha256=remote.sha256)
    except DownloadError as error:
        raise DownloadError(f"{error}. Or give root= a folder that has {remote.name}") from error


def _cifar(
    root: Path | None,
    remote: _Remote,
    train: list[str],
    test: list[str],
    *,
    labels: int,
    classes: int,
) -> tuple[Split, Split]:
    """Both splits, from binary files in the folder or one below it, or from the archive."""
    folder = None if root is None else _folder_with(root, train + test)
    if folder is None:
        place = _file(root, remote)
        found = _members(place, train + test)
    else:
        place = folder
        with reading(folder, DataError, "CIFAR's binary files"):
            found = {name: read_regular(folder / name, _MAX_CIFAR) for name in train + test}
    records = [
        np.concatenate([_records(place, name, found[name], labels, classes) for name in names])
        for names in (train, test)
    ]
    splits = [(r[:, labels:].reshape(-1, 3, 32, 32), r[:, labels - 1]) for r in records]
    return splits[0], splits[1]


def _folder_with(root: Path, names: list[str]) -> Path | None:
    """The folder, or the one below it, that has all of the files."""
    with reading(root, DataError, "a folder"):
        for folder in [root, *(p for p in root.glob("*") if p.is_dir())]:
            if all((folder / name).is_file() for name in names):
                return folder
    return None


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Plain files of a .tar.gz by their names without folders; nothing is unpacked."""
    found = {}
    where = f"{archive}: cannot be read as .tar.gz"
    with reading(where, DataError, "an archive"), open_expanded(archive, DataError) as content:
        while (header := content.read(512)).strip(b"\0"):
            if sum(header[:148] + b" " * 8 + header[156:]) != _octal(header[148:156]):
                raise ValueError("wrong checksum of a member's header")
            name = PurePosixPath(header[:100].partition(b"\0")[0].decode("latin-1")).name
            size = _octal(header[124:136])
            content.require(size)
            if name in names and header[156:157] in (b"0", b"\0"):
                if size > _MAX_CIFAR:
                    raise ValueError(f"{name} has {size:,} bytes; at most {_MAX_CIFAR:,} are read")
                found[name] = content.read(size)
            else:
                content.skip(size)
            content.skip(-size % 512)
        while content.read(2**20):  # to the end, where the checksum of the whole is compared
            pass
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{archive}: {missing[0]} is not in it")
    return found


def _octal(field: bytes) -> int:
    return int(field.strip(b" \0") or b"0", 8)


def _records(folder: Path, name: str, content: bytes, labels: int, classes: int) -> Any:
    """Rows of label bytes and pixels."""
    row = labels + _PIXELS
    if not content or len(content) % row:
        raise DataError(
            f"{folder}: {name} has {len(content)} bytes; expected a multiple of {row}, one row of "
            f"{labels} label and {_PIXELS} pixel bytes per image"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    if (largest := rows[:, labels - 1].max()) >= classes:
        raise DataError(f"{folder}: {name} has the label {largest}; expected 0 to {classes - 1}")
    return rows


def _svhn_split(path: Path) -> Split:
    where = f"{path}: cannot be read"
    with reading(where, DataError, "SVHN's .mat file"):
        content = read_matlab(path, ["X", "y"], DataError)
        images, labels = content["X"], content["y"].ravel()
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise DataError(
            f"{path}: images are {images.dtype} of shape {images.shape}; expected uint8 "
            f"(32, 32, 3, {len(labels)})"
        )
    if not np.isin(labels, np.arange(11)).all():
        raise DataError(f"{path}: y has labels other than the digits 1 to 9 and 10 for 0")
    # (h, w, c, n) -> (n, c, h, w); the digit 0 is stored as 10
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10
