"""Whether files and settings are those that a result was computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sharpkit.files import open_regular


def stamp(paths: Iterable[Path]) -> str:
    """Sizes and times of files: as long as it is the same, so are they, and it costs no reading.

    Example:
        >>> stamp([Path("/nowhere")])
        'missing'
    """
    return " ".join(map(_stamp, paths))


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files in order; empty if one cannot be read.

    Example:
        >>> digest([])
        'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    whole = hashlib.sha256()
    try:
        for path in paths:
            with open_regular(path) as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return ""
    return whole.hexdigest()


def digest_of_settings(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, whatever their order.

    Example:
        >>> digest_of_settings({"a": 1, "b": 2}) == digest_of_settings({"b": 2, "a": 1})
        True
    """
    text = json.dumps(settings, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    # the change time too: a copy may keep the modification time of another file
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
