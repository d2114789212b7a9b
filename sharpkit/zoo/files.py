"""JSON files and listings of directories, with errors that name the path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharpkit.errors import ZooFormatError
from sharpkit.files import atomic_path, read_regular

_MAX_DEPTH = 64


def read_json(path: Path, max_bytes: int = 2**30) -> Any:
    """The content of a JSON file; ZooFormatError that names the file if there is none.

    Args:
        path: The file.
        max_bytes: A larger file is refused before it is read.
    """
    try:
        content = json.loads(read_regular(path, max_bytes))
    except FileNotFoundError:
        raise ZooFormatError(f"{path}: file is missing") from None
    except OSError as error:
        raise ZooFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ZooFormatError(f"{path}: not valid JSON ({error})") from error
    if not _is_shallow(content):
        raise ZooFormatError(f"{path}: is nested more than {_MAX_DEPTH} levels deep")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(content, indent=1, default=_plain)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def list_directory(path: Path) -> list[Path]:
    """The entries of a directory by name, without the litter that archives of macOS bring."""
    try:
        entries = sorted(path.iterdir())
    except FileNotFoundError:
        raise ZooFormatError(f"{path}: directory is missing") from None
    except NotADirectoryError:
        raise ZooFormatError(f"{path}: expected a directory, found a file") from None
    except OSError as error:
        raise ZooFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    return [e for e in entries if not is_litter(e.name)]


def is_litter(name: str) -> bool:
    """Whether a name is one of those macOS scatters: .DS_Store, __MACOSX, ._*."""
    return name in (".DS_Store", "__MACOSX") or name.startswith("._")


def _is_shallow(content: Any) -> bool:
    """Whether parsed JSON is nested so little that nothing that walks through it overflows."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        nested = [node for node in level if isinstance(node, dict | list)]
        level = [v for node in nested for v in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return True
    return False


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
