"""CIFAR-10, CIFAR-100 and SVHN: in a folder of your own, or downloaded once from their authors.

The checksums are those that the authors' files have had for over a decade; CIFAR comes in its
binary version, because the other one is a Python pickle.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sharpkit.data.images import Split
from sharpkit.errors import DataError, DownloadError
from sharpkit.files import cache_folder


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


def cifar10(root: Path | None) -> tuple[Split, Split]:
    """CIFAR-10: 50,000 and 10,000 images of 10 classes (see `load_dataset`)."""
    train = [f"data_batch_{k}.bin" for k in range(1, 6)]
    return _cifar(root, _CIFAR10, train, ["test_batch.bin"], labels=1)


def cifar100(root: Path | None) -> tuple[Split, Split]:
    """CIFAR-100: 50,000 and 10,000 images with the labels of the 100 fine classes."""
    return _cifar(root, _CIFAR100, ["train.bin"], ["test.bin"], labels=2)


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
    from sharpkit.zoo.fetch import fetch_file

    target = cache_folder() / "datasets" / remote.name
    try:
        return fetch_file(remote.url, target, size=remote.size, sha256=remote.sha256)
    except DownloadError as error:
        raise DownloadError(f"{error}. Or give root= a folder that has {remote.name}") from error


def _cifar(
    root: Path | None, remote: _Remote, train: list[str], test: list[str], *, labels: int
) -> tuple[Split, Split]:
    """Both splits, from binary files in the folder or one below it, or from the archive."""
    folders = [] if root is None else [root, *(p for p in root.glob("*") if p.is_dir())]
    for folder in folders:
        if all((folder / name).is_file() for name in train + test):
            found = {name: (folder / name).read_bytes() for name in train + test}
            break
    else:
        folder = _file(root, remote)
        found = _members(folder, train + test)
    records = [
        np.concatenate([_records(folder, name, found[name], labels) for name in names])
        for names in (train, test)
    ]
    splits = [(r[:, labels:].reshape(-1, 3, 32, 32), r[:, labels - 1]) for r in records]
    return splits[0], splits[1]


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Files of a .tar.gz by their names without folders; nothing is unpacked."""
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in names and member.isreg():
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise DataError(f"{archive}: cannot be read as .tar.gz ({error})") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{archive}: {missing[0]} is not in it")
    return found


def _records(folder: Path, name: str, content: bytes, labels: int) -> Any:
    """Rows of label bytes and pixels."""
    row = labels + _PIXELS
    if not content or len(content) % row:
        raise DataError(
            f"{folder}: {name} has {len(content)} bytes; expected a multiple of {row}, one row of "
            f"{labels} label and {_PIXELS} pixel bytes per image"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, row)


def _svhn_split(path: Path) -> Split:
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"], content["y"].ravel()
    except Exception as error:  # scipy raises whatever its parser meets
        raise DataError(f"{path}: cannot be read as SVHN's .mat file ({error!r})") from error
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise DataError(
            f"{path}: images are {images.dtype} of shape {images.shape}; expected uint8 "
            f"(32, 32, 3, {len(labels)})"
        )
    # (h, w, c, n) -> (n, c, h, w); the digit 0 is stored as 10
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10
