"""Download of a file; a broken download continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharpkit.doors import read_json
from sharpkit.errors import ArgumentError, DownloadError
from sharpkit.files import atomic_path
from sharpkit.progress import progress_bar
from sharpkit.settings import from_table

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces
_PIECE = 2**20
_ATTEMPTS = 6  # in a row without a new byte
_FIRST_PAUSE = 1.0  # seconds, doubled after each such attempt


def fetch_file(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """Download a file once and check it; returns at once if it is there.

    A broken connection is retried and continued, within a call and from one call to the next. If
    the file on the server has changed in between, the download starts over.

    Raises:
        DownloadError: The server refuses or stays unreachable, or the file is another one.
    """
    if path.is_file():
        return path
    arrived = path if sha256 is None else path.with_name(path.name + ".unchecked")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not arrived.is_file():
            _Download(url, arrived, size, progress).run()
        if sha256 is not None:
            with arrived.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
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
            with atomic_path(self.note) as temporary:
                temporary.write_text(json.dumps(asdict(found)))
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
            return from_table(_Identity, read_json(self.note, DownloadError), str(self.note))
        except (DownloadError, ArgumentError):  # nothing, or nothing of use
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
