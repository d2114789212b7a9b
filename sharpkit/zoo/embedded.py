"""The zoo inside the package: small networks trained on Fashion-MNIST, unpacked on first use.

`sharpkit zoo train mini` trains it; benchmarks/embedded_zoo.md records the result.
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tarfile
import uuid
from importlib.resources import files
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sharpkit.errors import ZooFormatError
from sharpkit.files import cache_folder

if TYPE_CHECKING:
    from sharpkit.zoo.layout import Zoo

ARCHIVE_NAME = "embedded_zoo.tar.xz"
# bytes of float32 data: those of one significance, 4 apart, are alike
_FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 2, "pb": 2, "dict_size": 2**25}
]


def embedded_zoo() -> Zoo:
    """The zoo that ships with the package; needs no download.

    The first call unpacks it into the user's cache (`SHARPKIT_CACHE`, if set, else the platform's
    cache directory), in a folder named after the archive's SHA-256, so that versions never mix.
    Several processes may call it at once.

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
    from sharpkit.zoo.layout import load_zoo

    return load_zoo(_unpacked(Path(str(files("sharpkit"))) / "data" / ARCHIVE_NAME, cache_folder()))


def pack_zoo(zoo: str | Path, archive: str | Path) -> Path:
    """Pack `input_data` and `reference_data` of a zoo; the same files give the same archive.

    Args:
        zoo: The zoo's root.
        archive: The .tar.xz file to write.

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
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in paths:
            member = tarfile.TarInfo(path.relative_to(root).as_posix())  # no date, no owner
            data = path.read_bytes()
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    archive.write_bytes(lzma.compress(content.getvalue(), filters=_FILTERS))
    return archive


def _unpacked(archive: Path, cache: Path) -> Path:
    """The folder with the archive's content, made in one step if it is not there."""
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise ZooFormatError(f"{archive}: cannot be read; reinstall sharpkit ({error})") from error
    target = cache / f"embedded_zoo-{hashlib.sha256(content).hexdigest()}"
    if target.is_dir():
        return target
    temporary = cache / f".{target.name}.{uuid.uuid4().hex}.unpacking"
    try:
        temporary.mkdir(parents=True)
        with tarfile.open(fileobj=BytesIO(content), mode="r:xz") as tar:
            for member in tar:
                _extract(tar, member, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ZooFormatError(f"{archive}: damaged; reinstall sharpkit ({error})") from error
    except OSError as error:
        raise ZooFormatError(f"{cache}: cannot unpack the embedded zoo here ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member; anything but a plain file below the folder is refused."""
    path = PurePosixPath(member.name)
    source = tar.extractfile(member) if member.isreg() else None
    if source is None or path.is_absolute() or ".." in path.parts:
        raise tarfile.TarError(f"unexpected member {member.name!r}")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read())
