"""Download of the competition's public archives; a broken download continues where it stopped."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharpkit.errors import ArgumentError, DownloadError, ZooFormatError
from sharpkit.files import cache_folder
from sharpkit.progress import progress_bar
from sharpkit.settings import from_table
from sharpkit.zoo.archive import BadArchiveError, unpack_zip
from sharpkit.zoo.files import read_json, write_json

_BUCKET = "https://storage.googleapis.com/gresearch/pgdl/"
ARCHIVES = {
    "public": _BUCKET + "public_data.zip",  # 8.8 GB: tasks 1 and 2
    "phase-one": _BUCKET + "phase_one_data.zip",  # 2.5 GB: tasks 4 and 5
    "phase-two": _BUCKET + "phase_two_data.zip",  # 9.0 GB: tasks 6 to 9
}

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces
_PIECE = 2**20
_ATTEMPTS = 6  # in a row without a new byte
_FIRST_PAUSE = 1.0  # seconds, doubled after each such attempt


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
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.is_file():
            _Download(url, archive, size, progress).run()
        unpack_zip(archive, unpacked, progress=progress)
    except OSError as error:
        raise DownloadError(f"{folder}: cannot be written ({error})") from error
    except BadArchiveError:
        archive.unlink(missing_ok=True)  # a bad archive would fail for ever
        raise
    archive.unlink()
    return unpacked


def fetch_file(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """Download a file once, as `fetch_zoo` does, and check it; returns at once if it is there.

    Args:
        url: Where it is.
        path: Where to put it.
        size: Its exact size in bytes.
        sha256: Its checksum; a file that has another one is removed.
        progress: Show a progress bar.

    Raises:
        DownloadError: The server refuses or stays unreachable, or the file is another one.
    """
    if path.is_file():
        return path
    arrived = path.with_name(path.name + ".unchecked")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not arrived.is_file():
            _Download(url, arrived, size, progress).run()
        with arrived.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 is not None and found != sha256:
            arrived.unlink()
            raise DownloadError(f"{url}: the file has SHA-256 {found}; expected {sha256}")
        arrived.replace(path)
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written ({error})") from error
    return path


@dataclass(frozen=True)
class _Identity:
    """What tells whether the file on the server is still the one whose start we have."""

    url: str
    validator: str  # strong ETag or Last-Modified; "" if the server gives neither
    size: int | None


class _Restart(Exception):
    """The start that we have does not belong to the file that the server has now."""


class _Download:
    """One file, with its `.part` and a note about what that is part of."""

    def __init__(self, url: str, path: Path, size: int | None, progress: bool) -> None:
        self.url, self.path, self.size, self.progress = url, path, size, progress
        self.part = path.with_name(path.name + ".part")
        self.note = path.with_name(path.name + ".part.json")

    def run(self) -> None:
        """Download until complete; DownloadError after too many fruitless attempts."""
        import requests

        fruitless, pause = 0, _FIRST_PAUSE
        while True:
            before = self._have()
            try:
                self._attempt()
                break
            except _Restart:
                self._forget()
                reason, progressed = "the file on the server has changed", False
            except requests.RequestException as error:
                reason, progressed = str(error), self._have() > before
            fruitless = 0 if progressed else fruitless + 1
            pause = _FIRST_PAUSE if progressed else pause * 2
            if fruitless >= _ATTEMPTS:
                raise DownloadError(
                    f"{self.url}: {reason}; {self._have():,} bytes are kept, run again to continue"
                )
            time.sleep(pause)
        self.part.replace(self.path)
        self.note.unlink(missing_ok=True)

    def _attempt(self) -> None:
        """One connection: ask for what is missing, append what comes."""
        import requests

        known, have = self._read_note(), self._have()
        if have and (known is None or not known.validator or known.url != self.url):
            self._forget()  # nothing says what these bytes are part of
            known, have = None, 0
        if known is not None and have and have == known.size:
            return
        headers = {"Accept-Encoding": "identity"}
        if known is not None and have:
            headers |= {"Range": f"bytes={have}-", "If-Range": known.validator}
        with requests.get(self.url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            self._check_status(response)
            found = _identity(self.url, response)
            continued = response.status_code == 206
            if continued and (known is None or found != known or _range_start(response) != have):
                raise _Restart
            self._check_size(found, 0 if not continued else have)
            write_json(self.note, asdict(found))
            self._append(response, have if continued else 0, found.size)
        if found.size is not None and self._have() != found.size:
            raise requests.ConnectionError(f"got {self._have():,} of {found.size:,} bytes")

    def _append(self, response: Any, have: int, total: int | None) -> None:
        bar = progress_bar(
            desc=self.path.name, total=total, initial=have, unit="B", unit_scale=True,
            progress=self.progress,
        )  # fmt: skip
        with bar, self.part.open("ab" if have else "wb") as file:
            for piece in response.iter_content(_PIECE):
                file.write(piece)
                bar.update(len(piece))

    def _check_status(self, response: Any) -> None:
        """Sort the answers: go on, start over, try again, give up."""
        import requests

        status = response.status_code
        if status == 416:
            raise _Restart
        if status == 429 or status >= 500:
            raise requests.ConnectionError(f"server answers {status} {response.reason}")
        if status not in (200, 206):
            raise DownloadError(f"{self.url}: server answers {status} {response.reason}")

    def _check_size(self, found: _Identity, have: int) -> None:
        if self.size is not None and found.size not in (None, self.size):
            raise DownloadError(f"{self.url}: has {found.size:,} bytes; expected {self.size:,}")
        free = shutil.disk_usage(self.path.parent).free
        if found.size is not None and found.size - have > free:
            raise DownloadError(
                f"{self.url}: needs {found.size - have:,} bytes; "
                f"{self.path.parent} has {free:,} free"
            )

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _read_note(self) -> _Identity | None:
        try:
            return from_table(_Identity, read_json(self.note), str(self.note))
        except (ZooFormatError, ArgumentError):  # nothing, or nothing of use
            return None


def _identity(url: str, response: Any) -> _Identity:
    """What the headers say about the whole file."""
    etag = response.headers.get("ETag", "")
    strong = "" if etag.startswith("W/") else etag
    validator = strong or response.headers.get("Last-Modified", "")
    if response.status_code == 206:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = response.headers.get("Content-Length", "")
    return _Identity(url, validator, _number(size))


def _range_start(response: Any) -> int:
    """The first byte that a partial answer holds, or -1."""
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    found = _number(start)
    return -1 if found is None else found


def _number(text: str) -> int | None:
    """A number of bytes as a header tells it."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
