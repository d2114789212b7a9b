"""JSON files and listings of directories, with errors that name the path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharpkit import doors
from sharpkit.doors import MAX_CONFIG_BYTES, reading
from sharpkit.errors import ZooFormatError
from sharpkit.files import atomic_path

_ARCHIVES = (".tar.xz", ".tar.gz", ".tar", ".zip")


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """The content of a zoo's JSON file; ZooFormatError that names the file if it is no good one."""
    return doors.read_json(path, ZooFormatError, max_bytes)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; ZooFormatError for what would not be read again."""
    data = f"{json_text(content, indent=1)}\n".encode()
    values, most = doors.json_values(data), doors.MAX_JSON_VALUES
    if values > most or len(data) > MAX_CONFIG_BYTES:
        raise ZooFormatError(
            f"{path}: not written, for it would have {values:,} values in {len(data):,} bytes, and "
            f"at most {most:,} and {MAX_CONFIG_BYTES:,} are read. Divide the models between tasks, "
            'or put them into stacks (layout="stacked")'
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON, with numbers of numpy and torch as Python's."""
    return json.dumps(content, indent=indent, default=_plain)


def list_directory(path: Path) -> list[Path]:
    """The entries of a directory by name, without the litter that archives of macOS bring."""
    with reading(path, ZooFormatError, "a directory"):
        if not path.exists():
            raise ZooFormatError(f"{path}: directory is missing")
        if not path.is_dir():
            packed = path.name.endswith(_ARCHIVES)
            hint = "; unpack the archive, then give the folder" if packed else ""
            raise ZooFormatError(f"{path}: expected a directory, found a file{hint}")
        entries = sorted(path.iterdir())
    return [e for e in entries if not is_litter(e.name)]


def is_folder(path: Path) -> bool:
    """Whether a path is a folder that can be looked at."""
    try:
        return path.is_dir()
    except OSError:  # such as one inside a folder that may not be entered
        return False


def is_file(path: Path) -> bool:
    """Whether a path is a file that can be looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_litter(name: str) -> bool:
    """Whether a name is one of those macOS scatters: .DS_Store, __MACOSX, ._*."""
    return name in (".DS_Store", "__MACOSX") or name.startswith("._")


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
