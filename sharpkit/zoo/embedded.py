"""The zoo inside the package: small networks trained on Fashion-MNIST, unpacked on first use.

`sharpkit zoo train mini` trains it; benchmarks/embedded_zoo.md records the result.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
from collections.abc import Iterator
from importlib.resources import files
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sharpkit.doors import reading
from sharpkit.errors import ZooFormatError
from sharpkit.files import cache_folder, read_regular, remove_leftovers, temporary_folder

if TYPE_CHECKING:
    from sharpkit.zoo.formats import Zoo

ARCHIVE_NAME = "embedded_zoo.tar.xz"
_verified: set[Path] = set()  # folders that this process has compared with the archive's checksums
# bytes of float32 data: those of one significance, 4 apart, are alike
_FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 2, "pb": 2, "dict_size": 2**25}
]


def embedded_zoo() -> Zoo:
    """The zoo that ships with the package; needs no download.

    The first call unpacks it into the user's cache (`SHARPKIT_CACHE`, if set, else the platform's
    cache directory), in a folder named after the archive's SHA-256, so that versions never mix.
    Several processes may call it at once. A folder that is there already is compared with the
    checksums in the package, once in each process, and replaced if a file differs.

    Returns:
        Zoo: One task, "fashion_mnist_14x14": small CNNs on a complete hyperparameter grid, with
        their 2,000 training images and 2,000 of the 10,000 test images that `test_acc` counts.

    Raises:
        ZooFormatError: The archive is missing from the installation or damaged, or the cache
            cannot be written.

    Example:
        >>> from sharpkit.zoo.embedded import embedded_zoo
        >>> zoo = embedded_zoo()
        >>> round(zoo["fashion_mnist_14x14"]["0"].generalization_gap, 3)
        0.165
    """
    from sharpkit.zoo.formats import load_zoo

    return load_zoo(_unpacked(Path(str(files("sharpkit"))) / "data" / ARCHIVE_NAME, cache_folder()))


def pack_zoo(zoo: str | Path, archive: str | Path) -> Path:
    """Pack `input_data` and `reference_data` of a zoo; the same files give the same archive.

    Beside the archive, `<name>.sha256` gets the checksum, size and path of each file, by which a
    folder that was unpacked before is known again.

    Returns:
        Path: The archive.

    Raises:
        ZooFormatError: No such zoo.
    """
    root, archive = Path(zoo), Path(archive)
    parts = (root / "input_data", root / "reference_data")
    paths = sorted(p for part in parts for p in part.rglob("*") if p.is_file())
    if not paths:
        raise ZooFormatError(f"{root}: no input_data and reference_data to pack")
    content, checksums = BytesIO(), []
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in paths:
            member = tarfile.TarInfo(path.relative_to(root).as_posix())  # no date, no owner
            data = path.read_bytes()
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
            checksums.append(f"{hashlib.sha256(data).hexdigest()} {len(data)} {member.name}\n")
    _checksum_path(archive).write_text("".join(checksums))
    archive.write_bytes(lzma.compress(content.getvalue(), filters=_FILTERS))
    return archive


def _unpacked(archive: Path, cache: Path) -> Path:
    """The folder with the archive's content, made in one step if it is not there."""
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise ZooFormatError(f"{archive}: cannot be read; reinstall sharpkit ({error})") from error
    target = cache / f"embedded_zoo-{hashlib.sha256(content).hexdigest()}"
    if target in _verified and target.is_dir():
        return target
    remove_leftovers(cache)
    if not os.path.lexists(target) or not _is_intact(target, archive):
        _unpack(content, archive, target)
    _verified.add(target)
    return target


def _unpack(content: bytes, archive: Path, target: Path) -> None:
    """Make the folder with the content of the archive, or replace what is there by it."""
    try:
        with temporary_folder(target) as temporary, temporary_folder(target) as displaced:
            for name, data in _members(content, archive):
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            if os.path.lexists(target) and not _is_intact(target, archive):
                target.rename(displaced / target.name)
            try:
                temporary.rename(target)
            except OSError:
                if not _is_intact(target, archive):  # else another process was first
                    raise
    except OSError as error:
        raise ZooFormatError(
            f"{target}: cannot unpack the embedded zoo here ({error}); set SHARPKIT_CACHE to a "
            "folder that is yours"
        ) from error


def _is_intact(folder: Path, archive: Path) -> bool:
    """Whether a folder holds the files of the archive and nothing else."""
    checksums = _checksum_path(archive)
    with reading(checksums, ZooFormatError, "checksums; reinstall sharpkit"):
        lines = [line.split(" ", 2) for line in checksums.read_text().splitlines()]
        expected = {name: (checksum, int(size)) for checksum, size, name in lines}
    found: list[str] = []
    for here, folders, names in os.walk(folder):
        if any(Path(here, name).is_symlink() for name in (".", *folders)):
            return False
        found += (Path(here, name).relative_to(folder).as_posix() for name in names)
        if len(found) > len(expected):
            return False
    return set(found) == set(expected) and all(
        _is_file(folder / name, *known) for name, known in expected.items()
    )


def _is_file(path: Path, checksum: str, size: int) -> bool:
    try:
        content = b"" if path.is_symlink() else read_regular(path, size)
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == checksum


def _checksum_path(archive: Path) -> Path:
    return archive.with_name(archive.name.removesuffix(".tar.xz") + ".sha256")


def _members(content: bytes, archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Path and content of each member; anything but a plain file below a folder is refused."""
    with (
        reading(archive, ZooFormatError, "an undamaged archive; reinstall sharpkit"),
        tarfile.open(fileobj=BytesIO(content), mode="r:xz") as tar,
    ):
        for member in tar:
            path = PurePosixPath(member.name)
            source = tar.extractfile(member) if member.isreg() else None
            if source is None or path.is_absolute() or ".." in path.parts:
                raise ZooFormatError(f"{archive}: unexpected member {member.name!r}")
            yield path, source.read()
