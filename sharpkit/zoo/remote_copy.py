"""One file of a server copied to this machine, whole and of one version."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sharpkit.errors import DownloadError

# what file systems tell about a file that changes when its content does
_VERSION_FIELDS = """ETag etag generation VersionId version_id blob_id lfs md5Hash crc32c
Content-MD5 content_md5 Digest CRC LastModified last_modified Last-Modified updated modify mtime
created ino"""


def download(fs: Any, name: str, info: Mapping[str, Any], part: Path, url: str) -> None:
    """Copy a file of a server, and check size and checksums.

    Raises:
        DownloadError: The server tells no size, or there is no room.
        OSError: What came is not what was told; another attempt may help.
    """
    from fsspec.callbacks import Callback

    size = info.get("size")
    if size is None:
        raise DownloadError(
            f"{url}: the server does not tell its size, "
            "so a copy that is cut off would not be noticed"
        )
    free = shutil.disk_usage(part.parent).free
    if size > free:
        raise DownloadError(f"{url}: has {size:,} bytes; {part.parent} has {free:,} free")

    def stop_at_size(_: int | None, value: int, **__: Any) -> None:
        if value > size:
            raise OSError(f"the server sends more than the {size:,} bytes that it told")

    fs.get_file(name, str(part), callback=Callback(hooks={"size": stop_at_size}))
    if part.stat().st_size != size:
        raise OSError(f"got {part.stat().st_size:,} of {size:,} bytes")
    with part.open("rb+") as file:
        for algorithm, expected in _checksums(info):
            file.seek(0)
            found = hashlib.file_digest(file, algorithm).hexdigest()
            if found != expected:
                raise OSError(f"{algorithm} is {found}, the server told {expected}")
        os.fsync(file.fileno())


def version_of(info: Mapping[str, Any]) -> str:
    """A short form of all that tells one version of a file from another; "" if nothing does."""
    told = {key: str(info[key]) for key in _VERSION_FIELDS.split() if info.get(key) is not None}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] if told else ""


def _checksums(info: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Algorithm and hexadecimal checksum, as far as the server tells one of the whole content."""
    for key in ("md5Hash", "Content-MD5"):
        if info.get(key):
            yield "md5", base64.b64decode(info[key]).hex()
    if sha256 := getattr(info.get("lfs"), "sha256", None):
        yield "sha256", sha256
