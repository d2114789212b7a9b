"""Zoos elsewhere (s3://, gs://, hf://, https://, ...): a file is copied here when it is used.

fsspec speaks to the server, with the user's own credentials. Opening a zoo lists its files and
makes their folders here; a file comes when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from sharpkit.errors import ArgumentError, DownloadError, SharpkitError, ZooFormatError
from sharpkit.files import cache_folder
from sharpkit.settings import from_table
from sharpkit.zoo.files import is_litter, read_json, write_json
from sharpkit.zoo.remote_copy import download, version_of

_ATTEMPTS = 3
_PAUSE = 0.5  # seconds, doubled after each attempt


def is_remote(path: str | Path) -> bool:
    """Whether this is a URL of a file system other than this machine's.

    Example:
        >>> is_remote("s3://bucket/zoo"), is_remote("file:///data/zoo"), is_remote("zoo")
        (True, False, False)
    """
    return isinstance(path, str) and "://" in path and not path.startswith(_LOCAL)


def local_path(path: str | Path) -> Path:
    """The path that a local URL (file://, local://) or an ordinary path means.

    Example:
        >>> local_path("file:///data/zoo").as_posix()
        '/data/zoo'
    """
    if isinstance(path, str) and path.startswith(_LOCAL):
        path = path.partition("://")[2]
    return Path(path).expanduser()


_LOCAL = ("file://", "local://")


@dataclass(frozen=True)
class _Listed:
    size: int | None
    version: str  # "" if the listing does not tell


@dataclass(frozen=True)
class _Note:
    """Which version of a remote file the copy here is."""

    size: int
    version: str
    listed: str  # the same as the listing tells it, which may be in other words
    modified: int  # of the copy


class Mirror:
    """A remote folder and its copy on this machine, which has the files used so far.

    Several processes may use one copy. A file gets its name when it is whole, and a note says of
    which version it is; what the server does not have any more goes at the next opening.

    Args:
        url: Of the folder, for fsspec.

    Attributes:
        url: Without a password in it.
        path: The folder here.

    Raises:
        ArgumentError: Unknown protocol, or its package is missing.
        DownloadError: The server cannot be reached, or refuses.
        ZooFormatError: Nothing there, or a name in it that would lie outside the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = re.sub(r"(?<=://)[^/@]*@", "", url)
        self._target = url
        self._fs: tuple[Any, str] | None = None
        fs, top = self._connect()
        # on the server, names are `head` and the path here
        head, inner = re.fullmatch(r"(\w[\w+.-]*://[^/]*/?|/*)(.*?)/*", top, re.S).groups()  # type: ignore[union-attr]
        self._head = head if not inner or not head or head.endswith("/") else f"{head}/"
        chain = self.url.partition("::")
        place = f"{chain[0].partition('://')[0]} {self._head} {chain[2]}"
        kind = re.sub(r"\W+", "-", chain[0].partition("://")[0])
        name = f"{kind}-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
        self._home = cache_folder().resolve() / "remote" / name
        self._files = self._home / "files"
        self._top = "/".join(self._safe(inner)) if inner else ""
        self.path = self._files / self._top
        self._listed = self._list(fs, top)
        self._lay_out()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None}  # other processes connect themselves

    def location(self, path: Path) -> str:
        """The URL of a file or folder here."""
        inside = path.relative_to(self.path).as_posix() if path != self.path else ""
        first, mark, rest = self.url.partition("::")
        return "/".join(filter(None, (first.rstrip("/"), inside))) + mark + rest

    def children(self, path: Path) -> list[Path]:
        """What the server has in a folder, in order of names."""
        prefix = self._relative(path) + "/"
        names = {n[len(prefix) :].partition("/")[0] for n in self._listed if n.startswith(prefix)}
        return [path / name for name in sorted(names)]

    def has(self, path: Path) -> bool:
        """Whether the server has a file."""
        if not path.is_relative_to(self._files):
            return False
        name = self._relative(path)
        if name in self._listed or path.is_relative_to(self.path):
            return name in self._listed
        try:
            return self._info(name).get("type") == "file"
        except FileNotFoundError:
            return False
        except SharpkitError:
            raise
        except Exception as error:
            raise self._unreachable(error) from error

    def size(self, path: Path) -> int | None:
        """Bytes of a file on the server, as listed; ZooFormatError if it is not there."""
        name = self._relative(path)
        if name not in self._listed:
            raise ZooFormatError(f"{self._url_of(name)}: file is missing")
        return self._listed[name].size

    def stamp(self, path: Path) -> str:
        """Size and version of a file, which change when it does; "missing" if it is not there."""
        name = self._relative(path)
        listed = self._listed.get(name)
        if listed is None:
            return "missing"
        if not listed.version:
            try:
                info = self._info(name)
            except Exception:  # libraries have errors of their own; told when the file is read
                return "missing"
            listed = _Listed(info.get("size"), version_of(info))
        return f"{listed.size}:{listed.version}"

    def fetch(self, path: Path) -> Path:
        """The copy of a file, made or renewed if the server has a newer one.

        Raises:
            ZooFormatError: The server does not have it.
            DownloadError: It cannot be copied whole, or no place is left for it.
        """
        name = self._relative(path)
        listed = self._listed.get(name)
        if listed is None and path.is_relative_to(self.path):
            raise ZooFormatError(f"{self._url_of(name)}: file is missing")
        version = "" if listed is None else listed.version
        key = hashlib.sha256(name.encode()).hexdigest()
        note_path = self._home / "notes" / f"{key}.json"
        if version and (note := _note_of(path, note_path)) and note.listed == version:
            return path
        try:
            for folder in (path.parent, note_path.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with FileLock(note_path.with_suffix(".lock")):
                self._renew(name, path, note_path, version)
        except OSError as error:
            raise DownloadError(f"{path}: cannot be written ({error})") from error
        return path

    def _renew(self, name: str, path: Path, note_path: Path, listed: str) -> None:
        """Copy a file unless the copy is the server's version; the caller holds its lock."""
        reason: object = "changes while it is copied"
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                info = self._info(name)
                note = _note_of(path, note_path)
                if note is None or (note.size, note.version) != (info["size"], version_of(info)):
                    part = note_path.with_suffix(".part")
                    fs, url = self._connect()[0], self._url_of(name)
                    download(fs, self._head + name, info, part, url)
                    if version_of(self._info(name)) != version_of(info):
                        continue
                    note_path.unlink(missing_ok=True)  # in no moment it tells of another copy
                    part.replace(path)
                size, modified = info["size"], path.stat().st_mtime_ns
                write_json(note_path, asdict(_Note(size, version_of(info), listed, modified)))
                return
            except FileNotFoundError as error:
                raise ZooFormatError(f"{self._url_of(name)}: file is missing") from error
            except SharpkitError:
                raise
            except Exception as error:  # each library has errors of its own
                reason = f"{type(error).__name__}: {error}"
        raise DownloadError(f"{self._url_of(name)}: cannot be copied here ({reason})")

    def _connect(self) -> tuple[Any, str]:
        """The file system, and the folder's name in it."""
        if self._fs is None:
            from fsspec.core import url_to_fs

            try:
                fs, top = url_to_fs(self._target, skip_instance_cache=True)
                self._fs = fs, str(top)
            except ImportError as error:
                raise ArgumentError(
                    f"{self.url}: {error}. pip install 'sharpkit[remote]' brings what s3://, "
                    "gs://, hf:// and https:// need"
                ) from error
            except ValueError as error:
                raise ArgumentError(f"{self.url}: {error}") from error
            except Exception as error:  # each library has errors of its own
                raise self._unreachable(error) from error
        return self._fs

    def _info(self, name: str) -> Mapping[str, Any]:
        """What the server says about a file now."""
        fs, _ = self._connect()
        fs.invalidate_cache()
        info: Mapping[str, Any] = fs.info(self._head + name)
        return info

    def _list(self, fs: Any, top: str) -> dict[str, _Listed]:
        """Every file below the folder, by its path here."""
        try:
            fs.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = fs.find(top, detail=True)
        except FileNotFoundError:
            found = {}
        except Exception as error:  # each library has errors of its own
            raise self._unreachable(error) from error
        above = top.rstrip("/") + "/" if top.strip("/") else ""
        listed = {}
        for name, info in found.items():
            inside = name.removeprefix(above).lstrip("/") if name.startswith(above) else ""
            if not inside or inside.endswith("/"):
                continue  # the folder itself, as some stores list it, or something beside it
            parts = self._safe(inside)
            if not any(map(is_litter, parts)):
                path = "/".join(filter(None, (self._top, *parts)))
                size = info.get("size")
                listed[path] = _Listed(size, "" if size is None else version_of(info))
        if not listed:
            raise ZooFormatError(f"{self.url}: nothing there")
        return listed

    def _lay_out(self) -> None:
        """Make the folders, and remove what the server does not have any more."""
        folders = {str(parent) for name in self._listed for parent in PurePosixPath(name).parents}
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with FileLock(self._home / "folders.lock"):
                for here, _, files in os.walk(self.path, topdown=False):
                    for path in (Path(here) / file for file in files):
                        if self._relative(path) not in self._listed:
                            path.unlink(missing_ok=True)
                    if Path(here) != self.path and self._relative(Path(here)) not in folders:
                        Path(here).rmdir()
                for folder in folders:
                    (self._files / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DownloadError(f"{self._home}: cannot be written ({error})") from error

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._files).as_posix()

    def _url_of(self, name: str) -> str:
        path = self._files / name
        return self.location(path) if path.is_relative_to(self.path) else self._head + name

    def _safe(self, name: str) -> tuple[str, ...]:
        """The parts of a name, if it stays below the folder that it is put into."""
        parts = tuple(name.split("/"))
        bad = "\\\0:" if os.name == "nt" else "\\\0"
        if any(part in ("", ".", "..") or set(part) & set(bad) for part in parts):
            raise ZooFormatError(
                f"{self.url}: lists {name!r}, which is no path below a folder; nothing is copied"
            )
        return parts

    def _unreachable(self, error: Exception) -> DownloadError:
        return DownloadError(f"{self.url}: cannot be read ({type(error).__name__}: {error})")


def _note_of(path: Path, note_path: Path) -> _Note | None:
    """The note about a copy; None if there is none that fits."""
    try:
        note = from_table(_Note, read_json(note_path), str(note_path))
        status = path.stat()
    except (ZooFormatError, ArgumentError, OSError):  # nothing, or nothing of use
        return None
    fits = (note.size, note.modified) == (status.st_size, status.st_mtime_ns)
    return note if fits else None
