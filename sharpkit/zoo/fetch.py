"""Download of the competition's public archives."""

from __future__ import annotations

from pathlib import Path

from sharpkit.download import fetch_file
from sharpkit.errors import ArgumentError, DownloadError
from sharpkit.files import cache_folder
from sharpkit.zoo.archive import BadArchiveError, unpack_zip

_BUCKET = "https://storage.googleapis.com/gresearch/pgdl/"
ARCHIVES = {
    "public": _BUCKET + "public_data.zip",  # 8.8 GB: tasks 1 and 2
    "phase-one": _BUCKET + "phase_one_data.zip",  # 2.5 GB: tasks 4 and 5
    "phase-two": _BUCKET + "phase_two_data.zip",  # 9.0 GB: tasks 6 to 9
}


def fetch_zoo(
    name: str,
    target: str | Path | None = None,
    *,
    url: str | None = None,
    size: int | None = None,
    progress: bool = True,
) -> Path:
    """Download and unpack one of the PGDL competition's archives; returns at once if it is there.

    A broken connection is retried and continued, within a call and from one call to the next. If
    the file on the server has changed in between, the download starts over. The archive is deleted
    once unpacked; for a time, disk space for both is needed.

    Args:
        name: "public" (tasks 1 and 2, 8.8 GB), "phase-one" (tasks 4 and 5, 2.5 GB) or "phase-two"
            (tasks 6 to 9, 9.0 GB); with `url`, any name for the folder.
        target: The folder to put `<name>` into; default: the user's cache directory.
        url: Another place to download from.
        size: The archive's exact size in bytes, if known.
        progress: Show progress bars.

    Returns:
        Path: The unpacked zoo, for `load_zoo`.

    Raises:
        ArgumentError: Unknown name.
        DownloadError: The server refuses or stays unreachable, the size is wrong, the archive is
            damaged or unsafe. What has arrived is kept for the next call.

    Source:
        https://github.com/google-research/google-research/tree/master/pgdl

    Example:
        >>> zoo = load_zoo(fetch_zoo("public"))  # doctest: +SKIP
    """
    if url is None:
        if name not in ARCHIVES:
            raise ArgumentError(f"unknown archive {name!r}; expected one of {', '.join(ARCHIVES)}")
        url = ARCHIVES[name]
    if not name or Path(name).name != name or name.startswith("."):
        raise ArgumentError(f"name {name!r} cannot be a directory name")
    folder = cache_folder() / "zoos" if target is None else Path(target).expanduser()
    unpacked, archive = folder / name, folder / f"{name}.zip"
    if unpacked.is_dir():
        return unpacked
    try:
        fetch_file(url, archive, size=size, progress=progress)
        unpack_zip(archive, unpacked, progress=progress)
    except OSError as error:
        raise DownloadError(f"{folder}: cannot be written ({error})") from error
    except BadArchiveError:
        archive.unlink(missing_ok=True)  # a bad archive would fail for ever
        raise
    archive.unlink()
    return unpacked
